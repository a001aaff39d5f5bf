//! Fencing by time: what becomes of a node's Lease, by the node's agent and by operators. The operators' rules are the
//! real ones (`aegis_core::fence`), but for one thing: an operator may take a Lease over whenever it likes. That it
//! waits for renewals first spares nodes that are alive; no safety comes from it.

use super::state::*;
use super::{Cluster, Kind, View};
use aegis_core::fence::{Holder, Sighting, Step, burdens};
use aegis_core::model::{self, Inputs};
use std::time::Duration;

/// What can happen to Leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// An agent asks for its Lease, or for a renewal; the request arrives; the answer does.
    Ask(usize),
    Land(usize),
    Answer(usize),
    /// It goes by the Lease that it acquired.
    Arm(usize),
    /// An operator takes over the Lease of a node, ...
    TakeOver(usize, usize),
    /// ... or finds that it can give it back, which arrives later.
    AskRelease(usize, usize),
    LandRelease(usize),
}

/// An operator's clock, which nobody sets.
fn clock(time: u8) -> Duration {
    Duration::from_secs(u64::from(time) * TICK as u64)
}

fn write(cluster: &Cluster, state: &mut State, node: usize, holder: Holder) -> u8 {
    let version = state.server.leases[node].map_or(0, |lease| lease.version) + 1;
    state.server.leases[node] = Some(Lease { version, holder });
    if !cluster.lagging.contains(&Kind::Leases) {
        Kind::Leases.catch_up(state);
    }
    version
}

fn holder(state: &State, node: usize) -> Holder {
    state.server.leases[node].map_or(Holder::Nobody, |lease| lease.holder)
}

/// Time passes: nodes without a fault renew, and what was sent just before a deadline is still under way.
pub fn tick(cluster: &Cluster, state: &mut State) {
    let time = state.time;
    for node in 0..cluster.nodes {
        let renews = cluster.faulty & bit(node) == 0 && holder(state, node) == Holder::Node;
        let agent = &mut state.agents[node];
        if renews && agent.on {
            agent.renewed = agent.renewed.map(|_| time);
        }
        if agent.plane.is_some_and(|plane| plane.fence) && agent.renewed == time.checked_sub(HARD) {
            agent.linger |= agent.flows;
        }
        // It matters no more how long ago it passed.
        let passed = time.saturating_sub(HARD + 1);
        agent.renewed = agent.renewed.map(|renewed| renewed.max(passed));
    }
}

/// A new agent knows of nothing that was under way.
pub fn restart(agent: &mut Agent) {
    (agent.request, agent.acquired, agent.fresh) = (None, None, false);
}

/// It does not matter when operators saw Leases change that they do not hold (see above).
pub fn forget_when(mut state: State) -> State {
    state.operators.iter_mut().for_each(|operator| operator.leases.begin(Duration::ZERO));
    state
}

pub fn actions(cluster: &Cluster, state: &State, actions: &mut Vec<super::Action>) {
    let mut push = |action| actions.push(super::Action::Lease(action));
    for node in 0..cluster.nodes {
        let agent = &state.agents[node];
        if !agent.on || state.server.nodes[node].is_none() {
            continue;
        }
        push(Action::Ask(node));
        if let Some(request) = agent.request {
            push(if request.landed { Action::Answer(node) } else { Action::Land(node) });
        }
        if agent.acquired.is_some() && (agent.fresh || !cluster.safeguards.fresh_read) {
            push(Action::Arm(node));
        }
    }
    for (at, operator) in state.operators.iter().enumerate().take(cluster.operators) {
        for node in (0..cluster.nodes).filter(|node| cluster.faulty & bit(*node) != 0) {
            let holds = operator.leases.get(node_name(node)).is_some_and(|it| it.holder == Holder::Operator);
            if !holds && state.left.takeovers > 0 {
                push(Action::TakeOver(at, node));
            }
            if holds && operator.release.is_none() {
                push(Action::AskRelease(at, node));
            }
        }
        if operator.release.is_some() {
            push(Action::LandRelease(at));
        }
    }
}

pub fn next(cluster: &Cluster, last: &State, action: Action) -> Option<State> {
    let mut state = last.clone();
    match action {
        Action::Ask(node) => return ask(cluster, last, node),
        Action::Land(node) => {
            let version = state.server.leases[node].map(|lease| lease.version);
            let request = state.agents[node].request?;
            if request.version == version {
                write(cluster, &mut state, node, Holder::Node);
                state.agents[node].request = Some(Request { landed: true, ..request });
            } else {
                state.agents[node].request = None;
            }
        }
        Action::Answer(node) => {
            let agent = &mut state.agents[node];
            let request = agent.request.take()?;
            let sent = if cluster.safeguards.from_sending { request.sent } else { last.time };
            if request.renews {
                agent.renewed = Some(sent);
            } else {
                (agent.acquired, agent.fresh) = (Some(sent), false);
            }
        }
        Action::Arm(node) => arm(cluster, &mut state.agents[node]),
        Action::TakeOver(at, node) => {
            state.left.takeovers -= 1;
            if !take_over(cluster, &mut state, at, node) {
                return None;
            }
        }
        Action::AskRelease(at, node) => {
            let seen = state.operators[at].leases.get(node_name(node))?;
            if cluster.safeguards.empty_release && bears(&state, node) {
                return None;
            }
            state.operators[at].release = Some((node, seen.version as u8));
        }
        Action::LandRelease(at) => {
            let (node, version) = state.operators[at].release.take()?;
            release(cluster, &mut state, at, node, version);
        }
    }
    let state = forget_when(state);
    (state != *last).then_some(state)
}

/// An agent asks once in a tick; the answer to what it asked before may be lost.
fn ask(cluster: &Cluster, last: &State, node: usize) -> Option<State> {
    let mut state = last.clone();
    let holder = holder(last, node);
    if cluster.faulty & bit(node) == 0 {
        return (holder == Holder::Nobody && obtain(cluster, &mut state, node)).then_some(state);
    }
    let agent = &mut state.agents[node];
    let asked = agent.request.is_some_and(|request| !request.landed || request.sent == last.time);
    let renews = holder == Holder::Node && agent.renewed.is_some();
    let since = if renews { agent.renewed } else { agent.acquired };
    if asked || holder == Holder::Operator || since == Some(last.time) {
        return None;
    }
    if !renews && cluster.safeguards.disarm {
        disarm(agent, last.time);
    }
    let version = last.server.leases[node].map(|lease| lease.version);
    agent.request = Some(Request { sent: last.time, version, landed: false, renews });
    Some(state)
}

fn disarm(agent: &mut Agent, time: u8) {
    if agent.in_time(time) && agent.plane.is_some_and(|plane| plane.fence) {
        agent.linger |= agent.flows;
    }
    agent.renewed = None;
}

fn arm(cluster: &Cluster, agent: &mut Agent) {
    let Some(sent) = agent.acquired.take() else { return };
    let (own, fenced) = agent.plane.map_or((0, false), |plane| (plane.open | plane.draining, plane.fence));
    if fenced && cluster.safeguards.sweep {
        agent.flows &= own;
        (agent.late, agent.settled) = (0, true);
    }
    (agent.renewed, agent.fresh) = (Some(sent), false);
}

/// All that an agent does to go by its Lease, at one moment, after it has programmed the object as it stands; false if it
/// can't.
pub fn obtain(cluster: &Cluster, state: &mut State, node: usize) -> bool {
    let time = state.time;
    state.agents[node].request = None;
    if holder(state, node) == Holder::Operator {
        disarm(&mut state.agents[node], time);
        return false;
    }
    let renews = holder(state, node) == Holder::Node && state.agents[node].renewed.is_some();
    write(cluster, state, node, Holder::Node);
    let agent = &mut state.agents[node];
    if renews {
        agent.renewed = Some(time);
    } else {
        disarm(agent, time);
        agent.acquired = Some(time);
        arm(cluster, agent);
    }
    true
}

/// Whether a node holds slices of the address, and that has a fence.
fn bears(state: &State, node: usize) -> bool {
    let address = state.server.object.map(|object| object.address());
    address.is_some_and(|address| aegis_core::fence::bearers(&address).any(|it| it == node_name(node)))
}

fn take_over(cluster: &Cluster, state: &mut State, at: usize, node: usize) -> bool {
    let (name, now) = (node_name(node), clock(state.time));
    let current = state.server.leases[node];
    let unseen = state.operators[at].leases.get(name).is_none();
    if unseen {
        see(cluster, state, at, node, current);
    }
    let Some(seen) = state.operators[at].leases.get(name) else { return false };
    if seen.version != u64::from(current.map_or(0, |lease| lease.version)) {
        return false;
    }
    let version = match cluster.safeguards.take_over {
        true => write(cluster, state, node, Holder::Operator).into(),
        false => seen.version,
    };
    state.operators[at].leases.saw(name, version, Holder::Operator, now);
    true
}

fn release(cluster: &Cluster, state: &mut State, at: usize, node: usize, version: u8) {
    let held = Some(Lease { version, holder: Holder::Operator });
    if state.server.leases[node] == held {
        let version = write(cluster, state, node, Holder::Nobody);
        let now = clock(state.time);
        state.operators[at].leases.saw(node_name(node), version.into(), Holder::Nobody, now);
    }
}

/// The operator's copy shows this Lease.
fn see(cluster: &Cluster, state: &mut State, at: usize, node: usize, lease: Option<Lease>) {
    let (version, holder) = lease.map_or((0, Holder::Nobody), |lease| (lease.version, lease.holder));
    let (name, now) = (node_name(node), clock(state.time));
    let leases = &mut state.operators[at].leases;
    // Without a take-over it only believes to hold what it saw.
    let believes = |it: Sighting| it.holder == Holder::Operator && it.version == u64::from(version);
    if cluster.safeguards.take_over || !leases.get(name).is_some_and(believes) {
        leases.saw(name, version.into(), holder, now);
    }
}

/// Operator `at` looks at the Leases, and confirms those whose deadline has passed.
pub fn judge(
    cluster: &Cluster,
    state: &mut State,
    at: usize,
    view: View,
    inputs: &Inputs,
) -> [model::Lease; NODES] {
    let (now, shown) = (clock(state.time), view.of(state).leases);
    let burdens = burdens(inputs);
    let mut judged = [model::Lease::Free; NODES];
    for (node, lease) in judged.iter_mut().enumerate() {
        let name = node_name(node);
        if inputs.nodes.iter().all(|it| it.name != name) {
            continue;
        }
        see(cluster, state, at, node, shown[node]);
        let due = state.operators[at].leases.step(name, burdens.get(name).copied(), now) == Step::Confirm;
        let sure = due && confirm(cluster, state, at, node);
        *lease = state.operators[at].leases.lease(name, sure, now);
        if let (model::Lease::Taken { waited }, false) = (&mut *lease, cluster.safeguards.wait) {
            *waited = Duration::MAX;
        }
    }
    judged
}

fn confirm(cluster: &Cluster, state: &mut State, at: usize, node: usize) -> bool {
    if !cluster.safeguards.confirm || !cluster.safeguards.take_over {
        return true;
    }
    let name = node_name(node);
    let Some(seen) = state.operators[at].leases.get(name) else { return false };
    let held = Some(Lease { version: seen.version as u8, holder: Holder::Operator });
    if state.left.confirms == 0 || state.server.leases[node] != held {
        return false;
    }
    state.left.confirms -= 1;
    let version = write(cluster, state, node, Holder::Operator);
    state.operators[at].leases.confirmed(name, seen, version.into());
    true
}

/// An operator does what is due about Leases, by the real rules for all of it; `inputs` is what it plans from.
pub fn tend(cluster: &Cluster, state: &mut State, at: usize, inputs: &Inputs) {
    let burdens = burdens(inputs);
    for node in 0..cluster.nodes {
        let (name, now) = (node_name(node), clock(state.time));
        if state.server.nodes[node].is_none() {
            continue;
        }
        match state.operators[at].leases.step(name, burdens.get(name).copied(), now) {
            Step::TakeOver => drop(take_over(cluster, state, at, node)),
            Step::Release if !bears(state, node) => {
                let version = state.operators[at].leases.get(name).map_or(0, |seen| seen.version as u8);
                release(cluster, state, at, node, version);
            }
            _ => {}
        }
    }
}
