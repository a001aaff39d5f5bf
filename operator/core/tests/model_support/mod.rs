//! A cluster with one egress address, as a model: everything that can happen to the life of slices happens in every
//! order. The rules are the real ones (`plan`, `audit`, `diff`, `rests`, `holding`); around them are, as simple as can
//! be, an API server (`state`), two operators that both believe to lead all the time (`operator`), and nodes (`agent`).
//!
//! What is late, lost, paused or cut off needs no step of its own: it is what simply does not happen yet. So a report
//! that is late is one that the agent has not replaced, and an operator that plans from an old copy of the address is
//! one whose write takes long. Old copies of the Nodes, which a later one contradicts, are there as such, and one test
//! has them of everything. Endless sequences are cut by how often something may happen (`Left`).
//!
//! What is assumed, because people are told so (docs/operations.md): a Node is deleted only when its machine is off, or
//! will be before a quarantine has passed; and a machine takes longer from the moment its Node is made again to its
//! first flow than a write of the operator takes. Not modelled: objects that strangers delete or restore.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod agent;
pub mod fair;
pub mod lease;
pub mod operator;
pub mod state;
pub mod views;

use aegis_core::model::{QUARANTINE, Seconds};
use operator::{Planned, Sight};
use state::*;
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Instant;
pub use views::{Kind, View, Views};

/// What is kept of invariant 1.
pub const ONE_OWNER: &str = "no two nodes can send from the same slice at a time";
pub const AUDITED: &str = "every plan passes the audit";
pub const COME_BACK: &str = "slices of drained and deleted nodes become free, and free ones are given out";
pub const MOVES: &str = "a slice goes from one node to another";

/// How a slice is taken from a node that does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// Never: the node reports it empty, or its Node is gone.
    Confirmed,
    /// Its own deadline has passed, and it can't get another one (`lease`).
    Time,
}

/// What keeps invariant 1. Each test of `model_safeguards.rs` goes without one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Safeguards {
    /// A data plane does not follow an object that is older than what it has.
    pub epoch_at_agent: bool,
    /// Slices rest between two holders.
    pub quarantine: bool,
    /// An operator goes by its own clock for that, too.
    pub own_rests: bool,
    /// The operator writes over, or deletes, nothing but what it planned from.
    pub compare_and_swap: bool,
    /// The API server lets the epoch grow only.
    pub epoch_grows: bool,
    /// A report of drained slices counts only for what the node had programmed when it reported.
    pub confirmed_epoch: bool,
    /// A node reports drained slices only by a scan that shows flows of packets that were under way.
    pub settled: bool,
    /// A node that the list lacks is asked for.
    pub ask_for_nodes: bool,
    /// A Node that is made again takes longer than a write (see above).
    pub slow_start: bool,
    /// With a fence: the Lease is taken over before anybody waits, ...
    pub take_over: bool,
    /// ... the deadline is waited for, ...
    pub wait: bool,
    /// ... the data plane keeps it, ...
    pub deadline: bool,
    /// ... counted from when the renewal was sent, ...
    pub from_sending: bool,
    /// ... and only what a node is known to keep counts.
    pub programmed_fence: bool,
    /// That a Lease is held is confirmed before its passing counts.
    pub confirm: bool,
    /// A Lease is given back only when the node holds nothing any more.
    pub empty_release: bool,
    /// A node that acquires its Lease sends nothing (`disarm`) before it has read the object, ...
    pub disarm: bool,
    pub fresh_read: bool,
    /// ... and has removed flows from slices that are not its own any more.
    pub sweep: bool,
}

impl Safeguards {
    pub const ALL: Safeguards = Safeguards {
        epoch_at_agent: true,
        quarantine: true,
        own_rests: true,
        compare_and_swap: true,
        epoch_grows: true,
        confirmed_epoch: true,
        settled: true,
        ask_for_nodes: true,
        slow_start: true,
        take_over: true,
        wait: true,
        deadline: true,
        from_sending: true,
        programmed_fence: true,
        confirm: true,
        empty_release: true,
        disarm: true,
        fresh_read: true,
        sweep: true,
    };
}

/// The model.
pub struct Cluster {
    /// Nodes, and how many of them exist in the beginning.
    pub nodes: usize,
    pub joined: usize,
    pub slices: u8,
    pub fence: Fence,
    /// Nodes whose dealings with their Lease are looked at step by step; others renew in time, without a fault.
    pub faulty: Bits,
    pub safeguards: Safeguards,
    /// How many operators act.
    pub operators: usize,
    /// Ticks by which the operators' clocks are ahead.
    pub drift: [i8; 2],
    pub left: Left,
    /// What has happened before.
    pub before: fn(&mut State),
    /// Kinds of which operators read old copies. Of agents, it is the object.
    pub lagging: &'static [Kind],
    /// Whether it is looked into how every state goes on.
    pub liveness: bool,
    /// What has been planned. Planning is pure, so that it is done once only.
    pub plans: RwLock<HashMap<Sight, Planned>>,
}

/// What a check found.
pub struct Found {
    pub states: usize,
    /// Ways to states in which something is wrong, by what it is.
    pub wrong: Vec<(&'static str, Vec<Action>)>,
    /// Whether some slice ever went from one node to another.
    pub moves: bool,
}

/// One after the other: each takes all processors, and a gigabyte or more.
static TURN: Mutex<()> = Mutex::new(());

/// Goes through all states, or until something is wrong.
pub fn check(what: &str, cluster: Cluster) -> Found {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (begin, threads) =
        (Instant::now(), std::thread::available_parallelism().map_or(2, |it| it.get().min(8)));
    let checker =
        cluster.checker().threads(threads).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{what}: {states} states, {depth} steps deep, {:.0} s", begin.elapsed().as_secs_f64());
    let mut found = Found { states, wrong: Vec::new(), moves: false };
    for (name, path) in checker.discoveries() {
        match name {
            MOVES => found.moves = true,
            _ => found.wrong.push((name, path.into_actions())),
        }
    }
    for (name, way) in &found.wrong {
        println!("not true that {name}:");
        way.iter().for_each(|action| println!("  {action:?}"));
    }
    found
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Copies and API servers that lag catch up.
    CatchUp(Kind),
    /// An operator plans.
    Plan(usize, Views),
    /// Its write arrives at the API server, ...
    Land(usize),
    /// ... or never does.
    Lose(usize),
    /// An operator is replaced by another one, its write under way.
    Replace(usize),
    /// An agent brings its data plane to the object, or begins to.
    Program {
        node: usize,
        object: View,
        partly: bool,
    },
    /// Packets that were under way are through, and a scan has seen them.
    Settle(usize),
    Open(usize, usize),
    Close(usize, usize),
    Report(usize),
    /// An agent is killed and started; the data plane stays.
    Restart(usize),
    Stop(usize),
    Start(usize),
    DeleteNode(usize),
    /// A node is put into the site, or out of it.
    Move(usize),
    DeleteAllocation,
    /// What becomes of the finalizer, or a new allocation of the same name.
    NextAllocation,
    /// The allocation gets a fence, or loses it.
    EditFence,
    Lease(lease::Action),
    Tick,
}

impl Cluster {
    /// With all safeguards. One operator's clock is ahead, and operators read old copies of the nodes.
    pub fn new(nodes: usize, joined: usize, slices: u8, left: Left) -> Cluster {
        Cluster {
            nodes,
            joined,
            slices,
            fence: Fence::Confirmed,
            faulty: 0,
            safeguards: Safeguards::ALL,
            operators: 2,
            drift: [0, 1],
            left,
            before: |_| {},
            lagging: &[Kind::Nodes],
            liveness: false,
            plans: RwLock::default(),
        }
    }

    pub fn quarantine(&self) -> Seconds {
        if self.safeguards.quarantine { QUARANTINE } else { 0 }
    }

    pub fn planned(&self, sight: Sight) -> Planned {
        if let Some(planned) = self.plans.read().unwrap().get(&sight) {
            return *planned;
        }
        let planned = operator::planned(self, &sight);
        self.plans.write().unwrap().insert(sight, planned);
        planned
    }

    fn tick(&self, state: &mut State) {
        state.time += 1;
        for agent in &mut state.agents {
            // Both are much shorter than a quarantine.
            (agent.linger, agent.late) = (0, 0);
            agent.normalise();
        }
        if self.fence == Fence::Time {
            lease::tick(self, state);
        }
    }

    fn operator_actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (at, operator) in state.operators.iter().enumerate().take(self.operators) {
            if operator.write.is_some() {
                actions.extend([Action::Land(at), Action::Lose(at)]);
            } else {
                let old =
                    |kind: Kind| state.left.lags > 0 && self.lagging.contains(&kind) && kind.lags(state);
                let views = |kind: Kind| View::both(old(kind));
                for &object in views(Kind::Object) {
                    for &nodes in views(Kind::Nodes) {
                        for &reports in views(Kind::Reports) {
                            for &leases in views(Kind::Leases) {
                                actions.push(Action::Plan(at, Views { object, nodes, reports, leases }));
                            }
                        }
                    }
                }
            }
            if state.left.crashes > 0 {
                actions.push(Action::Replace(at));
            }
        }
    }

    fn agent_actions(&self, state: &State, node: usize, actions: &mut Vec<Action>) {
        let agent = &state.agents[node];
        // The first list of a data plane that knows nothing is a consistent read.
        let lags = Kind::Object.lags(state);
        for &object in View::both(lags && agent.plane.is_some()) {
            actions.push(Action::Program { node, object, partly: true });
            actions.push(Action::Program { node, object, partly: false });
        }
        actions.push(Action::Report(node));
        if !agent.settled {
            actions.push(Action::Settle(node));
        }
        let may_open = agent.plane.map_or(0, |plane| plane.open) | agent.late;
        for slice in 0..usize::from(self.slices) {
            if agent.flows & bit(slice) != 0 {
                actions.push(Action::Close(node, slice));
            } else if may_open & bit(slice) != 0 && agent.in_time(state.time) {
                actions.push(Action::Open(node, slice));
            }
        }
        if state.left.crashes > 0 && agent.settled {
            actions.push(Action::Restart(node));
        }
        if state.left.stops > 0 || state.server.nodes[node].is_none() {
            actions.push(Action::Stop(node));
        }
    }

    fn may_start(&self, state: &State, node: usize) -> bool {
        let relied = state.operators.iter().filter_map(|operator| operator.write);
        let relied = relied.fold(0, |all, write| all | write.gone) & bit(node) != 0;
        let starts = state.left.starts > 0 && !state.agents[node].on;
        starts && (state.server.nodes[node].is_some() || !relied || !self.safeguards.slow_start)
    }

    /// A deleted Node's machine stops before a quarantine has passed.
    fn may_tick(&self, state: &State) -> bool {
        let deleted = |node: usize| state.agents[node].on && state.server.nodes[node].is_none();
        state.left.ticks > 0 && !(0..self.nodes).any(deleted)
    }
}

impl Model for Cluster {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State {
            time: 0,
            server: Server::default(),
            behind: Server::default(),
            operators: Default::default(),
            agents: Default::default(),
            left: self.left,
            refused: false,
            moved: false,
        };
        for node in 0..self.joined {
            state.server.nodes[node] = Some(NodeObject { member: true });
        }
        // A model in which fences come and go begins without one.
        state.server.fenced = self.fence == Fence::Time && self.left.fences == 0;
        fair::settle(self, &mut state);
        state.agents.iter_mut().for_each(|agent| agent.linger = 0);
        // Copies are of before the first node joined.
        state.behind.nodes[0] = None;
        (self.before)(&mut state);
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.extend(Kind::ALL.into_iter().filter(|kind| kind.lags(state)).map(Action::CatchUp));
        self.operator_actions(state, actions);
        for node in 0..self.nodes {
            if state.agents[node].on {
                self.agent_actions(state, node, actions);
            }
            if self.may_start(state, node) {
                actions.push(Action::Start(node));
            }
            if state.server.nodes[node].is_some() {
                actions.extend((state.left.deletions > 0).then_some(Action::DeleteNode(node)));
                actions.extend((state.left.moves > 0).then_some(Action::Move(node)));
            }
        }
        if state.left.edits > 0 {
            actions.extend((state.server.allocation == Life::Live).then_some(Action::DeleteAllocation));
        }
        if state.server.allocation != Life::Live {
            actions.push(Action::NextAllocation);
        }
        actions.extend((state.left.fences > 0).then_some(Action::EditFence));
        if self.fence == Fence::Time {
            lease::actions(self, state, actions);
        }
        if self.may_tick(state) {
            actions.push(Action::Tick);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut next = last.clone();
        match action {
            Action::CatchUp(kind) => kind.catch_up(&mut next),
            Action::Plan(at, views) => {
                let next = operator::turn(self, last, at, views).map(lease::forget_when);
                return next.filter(|next| next != last);
            }
            Action::Lease(action) => return lease::next(self, last, action),
            Action::EditFence => {
                next.left.fences -= 1;
                next.server.fenced = !next.server.fenced;
            }
            Action::Land(at) => return operator::land(self, last, at),
            Action::Lose(at) => next.operators[at].write = None,
            Action::Replace(at) => {
                next.left.crashes -= 1;
                let Operator { write, release, .. } = last.operators[at];
                next.operators[at] = Operator { write, release, ..Operator::default() };
            }
            Action::Program { node, object, partly } => {
                return agent::program(self, last, node, object, partly);
            }
            Action::Settle(node) => (next.agents[node].settled, next.agents[node].late) = (true, 0),
            Action::Open(node, slice) => next.agents[node].flows |= bit(slice),
            Action::Close(node, slice) => {
                let agent = &mut next.agents[node];
                agent.flows &= !bit(slice);
                // One whose deadline has passed sent its last packet then.
                agent.linger |= if agent.in_time(last.time) { bit(slice) } else { 0 };
            }
            Action::Report(node) => return agent::report(self, last, node),
            Action::Restart(node) => {
                next.left.crashes -= 1;
                next.agents[node].settled = false;
                lease::restart(&mut next.agents[node]);
                next.agents[node].normalise();
            }
            Action::Stop(node) => {
                next.left.stops = next.left.stops.saturating_sub(1);
                agent::stop(&mut next.agents[node]);
            }
            Action::Start(node) => {
                next.left.starts -= 1;
                next.agents[node].on = true;
                next.server.nodes[node].get_or_insert(NodeObject { member: true });
            }
            Action::DeleteNode(node) => {
                next.left.deletions -= 1;
                next.server.nodes[node] = None;
            }
            Action::Move(node) => {
                next.left.moves -= 1;
                next.server.nodes[node].iter_mut().for_each(|node| node.member = !node.member);
            }
            Action::DeleteAllocation => {
                next.left.edits -= 1;
                next.server.allocation = Life::Deleting;
            }
            Action::NextAllocation => match last.server.allocation {
                // The finalizer goes when no address is left.
                Life::Deleting if last.server.object.is_none() => next.server.allocation = Life::Gone,
                Life::Gone if last.left.edits > 0 => {
                    next.left.edits -= 1;
                    next.server.allocation = Life::Live;
                }
                _ => return None,
            },
            Action::Tick => {
                next.left.ticks -= 1;
                self.tick(&mut next);
            }
        }
        (next != *last).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(ONE_OWNER, |cluster: &Cluster, state: &State| {
                let mut all = 0;
                state.agents.iter().all(|agent| {
                    let reach = agent.reach(state.time, cluster.safeguards.deadline);
                    let twice = all & reach;
                    all |= reach;
                    twice == 0
                })
            }),
            Property::always(AUDITED, |_: &Cluster, state: &State| !state.refused),
            Property::sometimes(MOVES, |_: &Cluster, state: &State| state.moved),
        ];
        if self.liveness {
            properties.push(Property::always(COME_BACK, |cluster: &Cluster, state: &State| {
                fair::recovers(cluster, state)
            }));
        }
        properties
    }
}
