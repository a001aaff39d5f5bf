//! What must be true in the end: if from now on everybody does its part and nothing else happens, slices of nodes that
//! must not have them become free, and nodes that lack one get those that are free.

use super::state::*;
use super::{Cluster, Kind, View, Views, agent, operator};

/// Longest time that this may take, in ticks: a rest, once more after a take-over, by a clock that is behind or ahead.
const ROUNDS: usize = 8;
/// Steps of everybody between two ticks.
const STEPS: usize = 6;

/// Whether every slice comes back, whoever leads in the end.
pub fn recovers(cluster: &Cluster, state: &State) -> bool {
    (0..state.operators.len()).all(|leader| recovers_under(cluster, state.clone(), leader))
}

fn recovers_under(cluster: &Cluster, mut state: State, leader: usize) -> bool {
    let done = |state: &State| state.server.unfree() == 0 && state.server.is_served(cluster.slices);
    for round in 0..ROUNDS {
        for _ in 0..STEPS {
            if done(&state) {
                return true;
            }
            everybody(cluster, &mut state, leader);
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
        everybody(cluster, state, 0);
    }
}

/// Everybody does its part once.
fn everybody(cluster: &Cluster, state: &mut State, leader: usize) {
    for at in 0..state.operators.len() {
        then(state, |state| operator::land(cluster, state, at));
    }
    for node in 0..cluster.nodes {
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
        let agent = &mut state.agents[node];
        (agent.linger, agent.flows) = (agent.linger | agent.flows, 0);
        (agent.late, agent.settled) = (0, true);
        then(state, |state| agent::report(cluster, state, node));
    }
    for kind in Kind::ALL {
        kind.catch_up(state);
    }
    then(state, |state| operator::turn(cluster, state, leader, Views::CURRENT));
}

fn then(state: &mut State, step: impl Fn(&State) -> Option<State>) {
    if let Some(next) = step(state) {
        *state = next;
    }
}
