//! What must be true in the end: if from now on everybody does its part and nothing else happens, slices of nodes that
//! must not have them become free, and nodes that lack one get those that are free.

use super::state::*;
use super::{Cluster, Fence, Kind, View, Views, agent, lease, operator};

/// Longest time that this may take, in ticks: two deadlines (that of renewals, and the wait after it), a rest, once more
/// after a take-over, by a clock that is behind or ahead.
const ROUNDS: usize = 10;
/// Steps of everybody between two ticks.
const STEPS: usize = 6;

/// Whether every slice comes back, whoever leads in the end; with a fence, also from nodes that do nothing any more.
pub fn recovers(cluster: &Cluster, state: &State) -> bool {
    let silent = (0..cluster.nodes).filter(|node| is_fenced(state, *node)).map(bit);
    let silent: Vec<Bits> = std::iter::once(0).chain(silent).collect();
    let leaders = 0..cluster.operators;
    leaders
        .into_iter()
        .all(|leader| silent.iter().all(|silent| recovers_under(cluster, state.clone(), leader, *silent)))
}

/// Whether it is known that the node keeps the deadline of the address.
fn is_fenced(state: &State, node: usize) -> bool {
    let (report, object) = (state.server.reports[node], state.server.object);
    let (Some(report), Some(fence)) = (report, object.and_then(|object| object.fence)) else { return false };
    let lasts = state.server.fenced && state.server.nodes[node].is_some();
    lasts && report.fenced && report.epoch.is_some_and(|epoch| epoch >= fence)
}

/// `silent` nodes do nothing.
fn recovers_under(cluster: &Cluster, mut state: State, leader: usize, silent: Bits) -> bool {
    let done = |state: &State| {
        let slots = state.server.object.iter().flat_map(|object| object.slots.iter().flatten());
        let silent_hold = slots.map(|slot| bit(slot.node.into())).any(|node| node & silent != 0);
        state.server.unfree() == 0 && state.server.is_served(cluster.slices, silent) && !silent_hold
    };
    (state.left.takeovers, state.left.confirms) = (u8::MAX, u8::MAX);
    for round in 0..ROUNDS {
        for _ in 0..STEPS {
            if done(&state) {
                return true;
            }
            everybody(cluster, &mut state, leader, silent);
        }
        // A node whose agent was away while the last version of an object went by may keep the address withheld when
        // another leader takes over; people are told to reboot it then (docs/decisions/0010).
        if round == ROUNDS / 2 && cluster.left.edits > 0 {
            state.agents.iter_mut().for_each(agent::stop);
        }
        state.time += 1;
        state.agents.iter_mut().for_each(|agent| (agent.linger, agent.late) = (0, 0));
    }
    false
}

/// Goes on until nothing changes any more.
pub fn settle(cluster: &Cluster, state: &mut State) {
    for _ in 0..STEPS {
        everybody(cluster, state, 0, 0);
    }
}

/// Everybody does its part once.
fn everybody(cluster: &Cluster, state: &mut State, leader: usize, silent: Bits) {
    for at in 0..state.operators.len() {
        then(state, |state| operator::land(cluster, state, at));
        then(state, |state| lease::next(cluster, state, lease::Action::LandRelease(at)));
    }
    for node in (0..cluster.nodes).filter(|node| silent & bit(*node) == 0) {
        let exists = state.server.nodes[node].is_some();
        match (state.agents[node].on, exists) {
            // A Node is deleted only when its machine stops for good.
            (true, false) => agent::stop(&mut state.agents[node]),
            (false, true) => state.agents[node].on = true,
            _ => {}
        }
        if !state.agents[node].on {
            continue;
        }
        then(state, |state| agent::program(cluster, state, node, View::Current, false));
        if cluster.fence == Fence::Time && state.server.object.is_some_and(|object| object.fence.is_some()) {
            lease::obtain(cluster, state, node);
        }
        let agent = &mut state.agents[node];
        (agent.linger, agent.flows) = (agent.linger | agent.flows, 0);
        (agent.late, agent.settled) = (0, true);
        then(state, |state| agent::report(cluster, state, node));
    }
    for kind in Kind::ALL {
        kind.catch_up(state);
    }
    then(state, |state| operator::turn(cluster, state, leader, Views::CURRENT));
    if cluster.fence == Fence::Time {
        operator::tend(cluster, state, leader);
    }
}

fn then(state: &mut State, step: impl Fn(&State) -> Option<State>) {
    if let Some(next) = step(state) {
        *state = next;
    }
}
