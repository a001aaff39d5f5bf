//! An operator's turn: snapshot -> `plan` -> `audit` -> `diff` -> a write that lands later, if at all.

use super::state::*;
use super::{Cluster, Fence, Views, lease};
use aegis_core::model::{self, AddressRequest, Allocation, Inputs, Prefix, Programmed, Seconds};
use aegis_core::slice::{FIRST, SliceSet};
use aegis_core::{Change, audit, diff, holding, plan};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What an operator reads. The same is planned only once: planning is pure.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sight {
    object: Option<Object>,
    nodes: [Option<NodeObject>; NODES],
    /// Nodes that the list lacks and of which the API server said that they are there.
    found: [Option<NodeObject>; NODES],
    reports: [Option<Report>; NODES],
    allocation: Life,
    fenced: bool,
    /// Who holds the nodes' Leases.
    leases: [model::Lease; NODES],
    /// Ticks, by the operator's clock.
    now: i8,
    unrested: Bits,
    withheld: bool,
    /// What a new epoch must be above.
    epochs: Option<u16>,
}

/// What came of planning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planned {
    Nothing,
    Refused,
    Write(Option<Object>),
}

/// What operator `at` sees, but for the Leases, and which nodes the API server said are gone.
fn look(cluster: &Cluster, state: &mut State, last: &State, at: usize, views: Views) -> (Sight, Bits) {
    let operator = &mut state.operators[at];
    let object = views.object.of(last).object;
    let nodes = views.nodes.of(last).nodes;
    let mut reports = views.reports.of(last).reports;
    if !cluster.safeguards.confirmed_epoch {
        // Taken as if it had been made just now.
        for report in reports.iter_mut().flatten() {
            report.epoch = report.epoch.and(object.map(|object| object.epoch));
        }
    }
    let (found, gone) = ask(cluster, &last.server, &nodes, object.as_ref());
    let address = object.map(|object| object.address());
    let unrested = rests(cluster, operator, address.as_ref(), last.time);
    let known = object.map(|object| object.epoch).or(operator.released);
    let speaks = contradicting(&nodes, &found, &reports, known);
    operator.highest = operator.highest.max(speaks);
    let sight = Sight {
        object,
        nodes,
        found,
        reports,
        allocation: last.server.allocation,
        fenced: last.server.fenced,
        leases: [model::Lease::Free; NODES],
        now: last.time as i8 + cluster.drift[at],
        unrested,
        withheld: speaks.is_some(),
        epochs: operator.highest.max(operator.released),
    };
    (sight, gone)
}

/// Does what is due about Leases, by the rules for all of it.
pub fn tend(cluster: &Cluster, state: &mut State, at: usize) {
    let last = state.clone();
    let (sight, _) = look(cluster, state, &last, at, Views::CURRENT);
    lease::tend(cluster, state, at, &inputs(cluster, &sight));
}

/// One turn of operator `at`. `None`: nothing changes.
pub fn turn(cluster: &Cluster, last: &State, at: usize, views: Views) -> Option<State> {
    let mut state = last.clone();
    state.left.lags -= u8::from(views != Views::CURRENT);
    let (mut sight, gone) = look(cluster, &mut state, last, at, views);
    let object = sight.object;
    if cluster.fence == Fence::Time {
        sight.leases = lease::judge(cluster, &mut state, at, views.leases, &inputs(cluster, &sight));
    }
    let operator = &mut state.operators[at];
    match cluster.planned(sight) {
        Planned::Nothing => {}
        Planned::Refused => state.refused = true,
        Planned::Write(to) => {
            let from = object.map(|object| (object.life, object.epoch));
            let write = Write { from, to, gone };
            operator.write = write.may_ever_land(cluster, last.server.object.as_ref()).then_some(write);
        }
    }
    (state != *last).then_some(state)
}

/// What the API server says of nodes that hold slices and that the list lacks, and which of them it says are gone
/// (`World::absent` and `World::confirm`).
fn ask(
    cluster: &Cluster,
    server: &Server,
    nodes: &[Option<NodeObject>; NODES],
    object: Option<&Object>,
) -> ([Option<NodeObject>; NODES], Bits) {
    let (mut found, mut gone) = ([None; NODES], 0);
    for slot in object.iter().flat_map(|object| object.slots.iter().flatten()) {
        let node = usize::from(slot.node);
        if nodes[node].is_some() || matches!(slot.state, SlotState::Quarantined(_)) {
            continue;
        }
        match server.nodes[node] {
            Some(object) if cluster.safeguards.ask_for_nodes => found[node] = Some(object),
            _ => gone |= bit(node),
        }
    }
    (found, gone)
}

/// Slices that have not rested for the whole quarantine under this operator's eyes.
fn rests(cluster: &Cluster, operator: &mut Operator, address: Option<&model::Address>, time: u8) -> Bits {
    if !cluster.safeguards.own_rests {
        return 0;
    }
    let clock = Duration::from_secs(u64::from(time) * TICK as u64);
    let unrested =
        operator.rests.observe(address.map_or(&[], std::slice::from_ref), clock, cluster.quarantine());
    unrested.get(&ADDRESS).map_or(0, |slices| bits(*slices))
}

/// The highest epoch that a node reports and no object says (`Evidence`).
fn contradicting(
    nodes: &[Option<NodeObject>; NODES],
    found: &[Option<NodeObject>; NODES],
    reports: &[Option<Report>; NODES],
    known: Option<u16>,
) -> Option<u16> {
    let speaks = |node: &usize| nodes[*node].is_some() || found[*node].is_some();
    let epochs = (0..NODES).filter(speaks).filter_map(|node| reports[node]?.epoch);
    epochs.filter(|epoch| holding::contradicts((*epoch).into(), known.map(i64::from))).max()
}

/// Plans, has the plan audited, and names the write.
pub fn planned(cluster: &Cluster, sight: &Sight) -> Planned {
    let inputs = inputs(cluster, sight);
    let plan = plan(&inputs);
    if audit(&inputs, &plan).is_err() {
        return Planned::Refused;
    }
    let changes = diff(&inputs.addresses, &plan);
    assert!(changes.len() <= 1, "there is one address");
    let life = sight.object.map_or(0, |object| object.life);
    match changes.into_iter().next() {
        None => Planned::Nothing,
        Some(Change::Create(address) | Change::Replace(address)) => {
            Planned::Write(Some(Object::of(&address, life)))
        }
        Some(Change::Delete(_)) => Planned::Write(None),
    }
}

pub fn inputs(cluster: &Cluster, sight: &Sight) -> Inputs {
    let zone =
        |member: bool| BTreeMap::from([("zone".to_owned(), if member { "in" } else { "out" }.to_owned())]);
    let node = |at: usize| {
        let object = sight.nodes[at].or(sight.found[at])?;
        let report = sight.reports[at];
        let programmed = report.and_then(|report| {
            let epoch = START + Seconds::from(report.epoch?);
            let programmed = Programmed { epoch, drained: slice_set(report.drained), fenced: report.fenced };
            let fence = sight.object.and_then(|object| object.fence).map(|it| START + Seconds::from(it));
            // Taken as if every node kept every deadline.
            let assumed = fence.filter(|_| !cluster.safeguards.programmed_fence && !report.fenced);
            let assumed = assumed.map(|epoch| Programmed { epoch, drained: SliceSet::EMPTY, fenced: true });
            Some((ADDRESS, assumed.unwrap_or(programmed)))
        });
        Some(model::Node {
            name: node_name(at).into(),
            labels: zone(object.member),
            // The list must show it, and its agent must have reported.
            ready: sight.nodes[at].is_some() && report.is_some(),
            lease: sight.leases[at],
            programmed: programmed.into_iter().collect(),
            ..model::Node::default()
        })
    };
    let allocation = Allocation {
        name: allocation_name(),
        created: 1,
        prefixes: vec!["p".into()],
        request: AddressRequest::Count(1),
        ipv6: 0,
        sites: BTreeMap::from([("s".to_owned(), model::Site { selector: zone(true), weight: 1 })]),
        slices: SliceSet::range(FIRST, FIRST + cluster.slices - 1),
        per_node_min: 1,
        per_node_max: 1,
        fence: sight.fenced.then_some(AFTER),
        listed: BTreeSet::new(),
        deleting: sight.allocation == Life::Deleting,
    };
    Inputs {
        prefixes: vec![Prefix {
            name: "p".into(),
            created: 1,
            cidr: "203.0.113.1/32".parse().unwrap(),
            reserved: vec![],
            account: "shop".into(),
            delegations: vec![],
            deleting: false,
        }],
        allocations: if sight.allocation == Life::Gone { vec![] } else { vec![allocation] },
        nodes: (0..NODES).filter_map(node).collect(),
        addresses: sight.object.iter().map(Object::address).collect(),
        frozen: vec![],
        services: vec![],
        namespaces: BTreeMap::new(),
        now: START + TICK * Seconds::from(sight.now),
        quarantine: cluster.quarantine(),
        unrested: BTreeMap::from([(ADDRESS, slice_set(sight.unrested))]),
        withheld: if sight.withheld { BTreeMap::from([(ADDRESS, None)]) } else { BTreeMap::new() },
        epochs: sight.epochs.map(|epoch| (ADDRESS, START + Seconds::from(epoch))).into_iter().collect(),
    }
}

impl Write {
    /// What compare-and-swap refuses now it refuses for ever: no version comes back. Such a write is as good as lost.
    fn may_ever_land(&self, cluster: &Cluster, stands: Option<&Object>) -> bool {
        !cluster.safeguards.compare_and_swap || self.may_land(cluster, stands)
    }

    /// Whether the API server takes it.
    fn may_land(&self, cluster: &Cluster, stands: Option<&Object>) -> bool {
        let unchanged = self.from == stands.map(|object| (object.life, object.epoch));
        let safeguards = &cluster.safeguards;
        match (self.from, &self.to, stands) {
            // What exists cannot be made, whatever the safeguards, nor can what does not exist be replaced.
            (None, _, stands) => stands.is_none(),
            (Some(_), _, None) => false,
            (Some(_), None, Some(_)) => unchanged || !safeguards.compare_and_swap,
            (Some(_), Some(to), Some(stands)) => {
                (unchanged || !safeguards.compare_and_swap)
                    && (!safeguards.epoch_grows || epoch_grows(stands, to))
            }
        }
    }
}

/// The write of operator `at` reaches the API server.
pub fn land(cluster: &Cluster, last: &State, at: usize) -> Option<State> {
    let mut state = last.clone();
    let write = state.operators[at].write.take()?;
    let stands = last.server.object;
    if !write.may_land(cluster, stands.as_ref()) {
        return Some(state);
    }
    match (write.to, stands) {
        (Some(object), Some(stands)) => state.server.object = Some(Object { life: stands.life, ..object }),
        (Some(object), None) => {
            state.server.object = Some(Object { life: last.server.next_life(&last.behind), ..object });
        }
        (None, _) => {
            state.server.object = None;
            state.operators[at].released = write.from.map(|(_, epoch)| epoch);
        }
    }
    for operator in &mut state.operators {
        operator.write =
            operator.write.filter(|write| write.may_ever_land(cluster, state.server.object.as_ref()));
    }
    if let (Some(before), Some(after)) = (stands, state.server.object) {
        state.moved |= before.slots.iter().zip(&after.slots).any(|(before, after)| {
            matches!((before, after), (Some(before), Some(after)) if before.node != after.node)
        });
    }
    Some(state)
}

/// The rule that the API server itself checks (`crds/src/egress_address.rs`).
fn epoch_grows(before: &Object, after: &Object) -> bool {
    after.epoch > before.epoch
        || (after.epoch, after.slots, after.fence) == (before.epoch, before.slots, before.fence)
}

impl Server {
    /// Number of the next object.
    fn next_life(&self, behind: &Server) -> u8 {
        let lives = [&self.object, &behind.object].into_iter().flatten().map(|object| object.life);
        lives.max().map_or(0, |life| life + 1)
    }

    /// Whether no node of the site but `silent` ones lacks a slice while one is free.
    pub fn is_served(&self, slices: u8, silent: Bits) -> bool {
        let slots = self.object.map_or([None; SLICES], |object| object.slots);
        let free = slots[..usize::from(slices)].iter().any(Option::is_none);
        let lacks = |node: usize| {
            let member = self.nodes[node].is_some_and(|node| node.member) && silent & bit(node) == 0;
            member && !slots.iter().flatten().any(|slot| usize::from(slot.node) == node)
        };
        self.allocation != Life::Live || !free || !(0..NODES).any(lacks)
    }

    /// The slices of nodes that must not keep them, and those that rest.
    pub fn unfree(&self) -> usize {
        let Some(object) = &self.object else { return 0 };
        let serves = self.allocation == Life::Live;
        let rightful = |slot: &&Slot| {
            let member = self.nodes[usize::from(slot.node)].is_some_and(|node| node.member);
            slot.state == SlotState::Held && member && serves
        };
        object.slots.iter().flatten().filter(|slot| !rightful(slot)).count()
    }
}
