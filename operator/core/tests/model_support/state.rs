//! What a state of the model is made of: small numbers, so that millions of states fit, and their translation into
//! what the rules read.

use aegis_core::egress::Egress;
use aegis_core::fence::{Holder, Sightings};
use aegis_core::model::{self, AllocationName, Fence, Holding, QUARANTINE, Seconds};
use aegis_core::rests::Rests;
use aegis_core::slice::{FIRST, SliceSet};
use std::net::Ipv4Addr;

/// Most nodes and slices of a model.
pub const NODES: usize = 3;
pub const SLICES: usize = 2;
/// The one egress address.
pub const ADDRESS: Egress = Egress::V4(Ipv4Addr::new(203, 0, 113, 1));
/// Time 0. Epochs are counted from here too.
pub const START: Seconds = 1_000_000;
/// A tick of the model's clock. Whatever happens between two ticks happens at one moment.
pub const TICK: Seconds = QUARANTINE;

/// Deadline of nodes that can't renew their Lease, in seconds, and in ticks. Whoever waits waits for as many ticks.
pub const AFTER: Seconds = 2 * TICK * 19 / 20;
pub const HARD: u8 = 2;

/// A set of slices (bit 0 is the first usable one) or of nodes.
pub type Bits = u8;

pub fn bit(number: usize) -> Bits {
    1 << number
}

pub fn slice_set(bits: Bits) -> SliceSet {
    (0..SLICES).filter(|slice| bits & bit(*slice) != 0).map(|slice| FIRST + slice as u8).collect()
}

pub fn bits(set: SliceSet) -> Bits {
    set.iter().map(|slice| bit(usize::from(slice - FIRST))).fold(0, |all, bit| all | bit)
}

pub fn node_name(node: usize) -> &'static str {
    ["n0", "n1", "n2"][node]
}

pub fn allocation_name() -> AllocationName {
    AllocationName { account: "shop".into(), name: "a".into() }
}

/// Everything there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// True time, in ticks.
    pub time: u8,
    /// What the API server answers to a consistent read.
    pub server: Server,
    /// What local copies and API servers that lag behind say.
    pub behind: Server,
    pub operators: [Operator; 2],
    pub agents: [Agent; NODES],
    /// What may still happen.
    pub left: Left,
    /// Some plan did not pass the audit.
    pub refused: bool,
    /// Some slice has gone from one node to another.
    pub moved: bool,
}

/// Objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Server {
    /// The `EgressAddress`.
    pub object: Option<Object>,
    /// The Nodes.
    pub nodes: [Option<NodeObject>; NODES],
    /// The `EgressNode`s; they outlive their Nodes for a while.
    pub reports: [Option<Report>; NODES],
    /// The `EgressAllocation`.
    pub allocation: Life,
    /// It has a fence.
    pub fenced: bool,
    /// The Lease of each node.
    pub leases: [Option<Lease>; NODES],
}

/// A Lease; every write makes a new version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    pub version: u8,
    pub holder: Holder,
}

/// Life of the allocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Life {
    #[default]
    Live,
    Deleting,
    Gone,
}

/// An `EgressAddress`. Every change raises the epoch, so that it stands for the resource version within one life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Object {
    /// Number of the object: one that is made again has another uid.
    pub life: u8,
    pub epoch: u16,
    pub slots: [Option<Slot>; SLICES],
    /// Epoch at which the fence was set, if there is one.
    pub fence: Option<u16>,
}

/// A slice that is not free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    pub node: u8,
    pub epoch: u16,
    pub state: SlotState,
}

/// State of a holding; times in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotState {
    Held,
    Draining,
    Quarantined(i8),
}

/// A Node object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeObject {
    /// Its labels put it into a site of the allocation.
    pub member: bool,
}

/// What an agent reports of the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Report {
    pub epoch: Option<u16>,
    pub drained: Bits,
    pub fenced: bool,
}

/// An operator that believes to lead.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Operator {
    /// How long slices have rested under its eyes.
    pub rests: Rests,
    /// Epoch of the object that it deleted itself.
    pub released: Option<u16>,
    /// Highest epoch that it ever knew nodes to report against what it read.
    pub highest: Option<u16>,
    /// A write that is under way.
    pub write: Option<Write>,
    /// The Leases as it saw them last.
    pub leases: Sightings,
    /// A Lease that is being given back: of which node, in which version.
    pub release: Option<(usize, u8)>,
}

/// A write of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Write {
    /// Life and epoch of the object that it was planned from.
    pub from: Option<(u8, u16)>,
    /// What shall stand; `None` deletes.
    pub to: Option<Object>,
    /// Nodes that the API server said are gone.
    pub gone: Bits,
}

/// A node with its data plane and its agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Agent {
    /// The machine runs.
    pub on: bool,
    /// What the data plane has of the address.
    pub plane: Option<Plane>,
    /// A scan shows all flows that were opened by any former right.
    pub settled: bool,
    /// Slices without right from which packets under way may still open flows.
    pub late: Bits,
    /// Slices with live flows.
    pub flows: Bits,
    /// Slices whose last packets may still be in the network, or in the memory of the origin.
    pub linger: Bits,
    /// `LEASE`: when the renewal was sent from which the data plane counts.
    pub renewed: Option<u8>,
    /// A renewal, or an attempt to acquire the Lease, that is under way.
    pub request: Option<Request>,
    /// The agent has acquired the Lease, by a request that was sent then, and may not go by it yet.
    pub acquired: Option<u8>,
    /// It has read the object since, and programmed it.
    pub fresh: bool,
}

/// A write of the node's Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    pub sent: u8,
    /// Version that it replaces; `None` makes the Lease.
    pub version: Option<u8>,
    /// The API server has taken it; the answer is under way.
    pub landed: bool,
    /// It renews a Lease that the data plane goes by already.
    pub renews: bool,
}

/// `HOLDINGS` and `SLOTS` of the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plane {
    pub epoch: u16,
    /// Slices from which flows may be opened.
    pub open: Bits,
    /// Slices that are to become empty by the object of that epoch.
    pub draining: Bits,
    /// Some slice has an owner.
    pub owned: bool,
    /// Nothing is sent after the deadline.
    pub fence: bool,
}

/// How often things may still happen that would otherwise happen for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Left {
    pub ticks: u8,
    /// Nodes change sites.
    pub moves: u8,
    /// Machines stop.
    pub stops: u8,
    /// Machines start.
    pub starts: u8,
    /// Node objects are deleted.
    pub deletions: u8,
    /// The allocation is deleted, or made again.
    pub edits: u8,
    /// Operators plan from old copies.
    pub lags: u8,
    /// Operators and agents restart.
    pub crashes: u8,
    /// Leases are taken over, ...
    pub takeovers: u8,
    /// ... and confirmed.
    pub confirms: u8,
    /// The allocation gets or loses its fence.
    pub fences: u8,
}

impl Object {
    /// As the rules read it.
    pub fn address(&self) -> model::Address {
        let mut holdings: Vec<Holding> = Vec::new();
        for (slice, slot) in (FIRST..).zip(&self.slots) {
            let Some(slot) = slot else { continue };
            let (node, epoch) = (node_name(slot.node.into()), START + Seconds::from(slot.epoch));
            let state = match slot.state {
                SlotState::Held => model::State::Held,
                SlotState::Draining => model::State::Draining,
                SlotState::Quarantined(until) => {
                    model::State::Quarantined { until: START + TICK * Seconds::from(until) }
                }
            };
            match holdings.last_mut() {
                Some(last)
                    if last.last + 1 == slice
                        && (&*last.node, last.epoch, last.state) == (node, epoch, state) =>
                {
                    last.last = slice;
                }
                _ => holdings.push(Holding { first: slice, last: slice, node: node.into(), epoch, state }),
            }
        }
        model::Address {
            address: ADDRESS,
            prefix: "p".into(),
            allocation: allocation_name(),
            epoch: START + Seconds::from(self.epoch),
            holdings,
            fence: self.fence.map(|epoch| Fence { after: AFTER, epoch: START + Seconds::from(epoch) }),
        }
    }

    /// From what the rules wrote.
    pub fn of(address: &model::Address, life: u8) -> Object {
        let mut slots = [None; SLICES];
        for holding in &address.holdings {
            let slot = Slot {
                node: (0..NODES).position(|node| node_name(node) == holding.node).unwrap() as u8,
                epoch: small(holding.epoch),
                state: match holding.state {
                    model::State::Held => SlotState::Held,
                    model::State::Draining => SlotState::Draining,
                    model::State::Quarantined { until } => {
                        assert_eq!((until - START) % TICK, 0, "times are whole ticks");
                        SlotState::Quarantined(((until - START) / TICK) as i8)
                    }
                },
            };
            for slice in holding.first..=holding.last {
                slots[usize::from(slice - FIRST)] = Some(slot);
            }
        }
        let fence = address.fence.map(|fence| small(fence.epoch));
        Object { life, epoch: small(address.epoch), slots, fence }
    }
}

/// An epoch as the model keeps it.
pub fn small(epoch: i64) -> u16 {
    u16::try_from(epoch - START).unwrap()
}

impl Agent {
    /// Slices from which the node can send, or from which something that it sent may still arrive.
    pub fn reach(&self, time: u8, deadlines: bool) -> Bits {
        let can_send = match self.plane {
            _ if deadlines && !self.in_time(time) => 0,
            Some(plane) if self.on => plane.open | self.late | self.flows,
            _ if self.on => self.late | self.flows,
            _ => 0,
        };
        can_send | self.linger
    }
}

impl Agent {
    /// The data plane knows no deadline of the address, or it has not passed.
    pub fn in_time(&self, time: u8) -> bool {
        let fenced = self.plane.is_some_and(|plane| plane.fence);
        !fenced || self.renewed.is_some_and(|renewed| time < renewed + HARD)
    }

    /// States that differ in nothing that matters become the same.
    pub fn normalise(&mut self) {
        let draining = self.plane.is_some_and(|plane| plane.draining != 0);
        self.settled |= !draining && self.late == 0;
    }
}
