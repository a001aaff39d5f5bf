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
pub mod operator;
pub mod state;

use aegis_core::model::{QUARANTINE, Seconds};
use operator::{Planned, Sight};
use state::*;
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Instant;

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
    // `Time` comes here. Its deadlines pass in `tick`, agents get a Lease beside their report, and `operator::turn` takes
    // the Lease over before it plans without the node.
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
    };
}

/// The model.
pub struct Cluster {
    /// Nodes, and how many of them exist in the beginning.
    pub nodes: usize,
    pub joined: usize,
    pub slices: u8,
    pub fence: Fence,
    pub safeguards: Safeguards,
    /// Ticks by which the operators' clocks are ahead.
    pub drift: [i8; 2],
    pub left: Left,
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

/// What somebody reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    Current,
    Behind,
}

/// What an operator's snapshot is made of: copies of different kinds are of different moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Views {
    pub object: View,
    pub nodes: View,
    pub reports: View,
}

/// Kinds of objects, each of which lags by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Object,
    Nodes,
    Reports,
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
    Tick,
}

impl View {
    pub fn of(self, state: &State) -> &Server {
        match self {
            View::Current => &state.server,
            View::Behind => &state.behind,
        }
    }

    /// The views that differ.
    fn both(differ: bool) -> &'static [View] {
        if differ { &[View::Current, View::Behind] } else { &[View::Current] }
    }
}

impl Views {
    pub const CURRENT: Views = Views { object: View::Current, nodes: View::Current, reports: View::Current };
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Object, Kind::Nodes, Kind::Reports];

    pub fn lags(self, state: &State) -> bool {
        let (server, behind) = (&state.server, &state.behind);
        match self {
            Kind::Object => server.object != behind.object,
            Kind::Nodes => server.nodes != behind.nodes,
            Kind::Reports => server.reports != behind.reports,
        }
    }

    pub fn catch_up(self, state: &mut State) {
        match self {
            Kind::Object => state.behind.object = state.server.object,
            Kind::Nodes => state.behind.nodes = state.server.nodes,
            Kind::Reports => state.behind.reports = state.server.reports,
        }
    }
}

impl Cluster {
    /// With all safeguards. One operator's clock is ahead, and operators read old copies of the nodes.
    pub fn new(nodes: usize, joined: usize, slices: u8, left: Left) -> Cluster {
        Cluster {
            nodes,
            joined,
            slices,
            fence: Fence::Confirmed,
            safeguards: Safeguards::ALL,
            drift: [0, 1],
            left,
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
            match self.fence {
                Fence::Confirmed => {}
            }
        }
    }

    fn operator_actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (at, operator) in state.operators.iter().enumerate() {
            if operator.write.is_some() {
                actions.extend([Action::Land(at), Action::Lose(at)]);
            } else {
                let old =
                    |kind: Kind| state.left.lags > 0 && self.lagging.contains(&kind) && kind.lags(state);
                let views = |kind: Kind| View::both(old(kind));
                for &object in views(Kind::Object) {
                    for &nodes in views(Kind::Nodes) {
                        for &reports in views(Kind::Reports) {
                            actions.push(Action::Plan(at, Views { object, nodes, reports }));
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
            } else if may_open & bit(slice) != 0 {
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
        fair::settle(self, &mut state);
        state.agents.iter_mut().for_each(|agent| agent.linger = 0);
        // Copies are of before the first node joined.
        state.behind.nodes[0] = None;
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
        if self.may_tick(state) {
            actions.push(Action::Tick);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut next = last.clone();
        match action {
            Action::CatchUp(kind) => kind.catch_up(&mut next),
            Action::Plan(at, views) => return operator::turn(self, last, at, views),
            Action::Land(at) => return operator::land(self, last, at),
            Action::Lose(at) => next.operators[at].write = None,
            Action::Replace(at) => {
                next.left.crashes -= 1;
                next.operators[at] = Operator { write: last.operators[at].write, ..Operator::default() };
            }
            Action::Program { node, object, partly } => {
                return agent::program(self, last, node, object, partly);
            }
            Action::Settle(node) => (next.agents[node].settled, next.agents[node].late) = (true, 0),
            Action::Open(node, slice) => next.agents[node].flows |= bit(slice),
            Action::Close(node, slice) => {
                next.agents[node].flows &= !bit(slice);
                next.agents[node].linger |= bit(slice);
            }
            Action::Report(node) => return agent::report(self, last, node),
            Action::Restart(node) => {
                next.left.crashes -= 1;
                next.agents[node].settled = false;
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
            Property::always(ONE_OWNER, |_: &Cluster, state: &State| {
                let mut all = 0;
                state.agents.iter().all(|agent| {
                    let twice = all & agent.reach();
                    all |= agent.reach();
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
