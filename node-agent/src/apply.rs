//! From operations to the data plane. [`Plane`] is all that the controller knows of it.

use crate::demand::Ports;
use crate::fragments::Fragments;
use crate::limited::Counted;
use crate::meter::Maps;
use crate::observed::Observed;
use crate::ops::Op;
use crate::sweep::Sweeper;
use crate::uplink::Devices;
use aegis_common::{CounterValue, PressureValue, RuleValue};
use aegis_core::egress::Egress;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;

/// Why the data plane did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// Programs cannot be loaded, or pinned state cannot be used.
    #[error("{0}")]
    Load(String),
    /// A map cannot be read.
    #[error("cannot read {map}: {reason}")]
    Read {
        /// Name of the map.
        map: &'static str,
        /// The kernel's reason.
        reason: String,
    },
    /// A map refuses a write.
    #[error("{op}: {reason}")]
    Write {
        /// What was to be written.
        op: String,
        /// The kernel's reason.
        reason: String,
    },
    /// The sweeper cannot be started.
    #[error("cannot start the sweeper: {0}")]
    Sweeper(String),
    /// Fragments that come early cannot be kept.
    #[error("cannot keep fragments that come early: {0}")]
    Fragments(String),
}

/// Programs and maps of one node.
pub trait Plane: Send {
    /// Reads back what the maps hold.
    fn read(&mut self) -> Result<Observed, PlaneError>;
    /// Does one write.
    fn write(&mut self, op: &Op) -> Result<(), PlaneError>;
    /// Does the first of these writes, or more of them that follow it, in order. Gives how many have been done, and why not one more.
    fn write_some(&mut self, ops: &[Op]) -> (usize, Result<(), PlaneError>) {
        match ops.first().map(|op| self.write(op)) {
            None => (0, Ok(())),
            Some(Ok(())) => (1, Ok(())),
            Some(Err(error)) => (0, Err(error)),
        }
    }
    /// `COUNTERS`, summed over the CPUs.
    fn counters(&self) -> Result<Vec<CounterValue>, PlaneError>;
    /// `PRESSURE` of these allocations, summed over the CPUs.
    fn pressure(&self, numbers: &BTreeSet<u32>) -> Result<BTreeMap<u32, PressureValue>, PlaneError>;
    /// What limits of these allocations have refused.
    fn limited(&self, numbers: &BTreeSet<u32>) -> Result<BTreeMap<u32, Counted>, PlaneError>;
    /// `RULES` of the first so many rules, summed over the CPUs, of even and of odd generations.
    fn rules(&self, count: usize) -> Result<[Vec<RuleValue>; 2], PlaneError>;
    /// The maps of meters, for a thread of their own.
    fn meters(&self) -> Result<Maps, PlaneError>;
    /// Says that the agent lives. Gives a number that rises while ports run short somewhere.
    fn beat(&mut self) -> Result<u64, PlaneError>;
    /// Ports in use at this moment.
    fn ports(&self) -> Result<Ports, PlaneError>;
    /// Next hops whose MAC a program wanted within the last `seconds`, and the kernel did not know.
    fn unresolved(&self, seconds: u32) -> Result<BTreeSet<Ipv4Addr>, PlaneError>;
    /// Attaches programs to devices that lack them, uplinks first, and forgets devices that are not among `existing`
    /// interface indices. Gives what failed, by device.
    fn attach(&mut self, devices: &Devices, existing: &BTreeSet<u32>) -> BTreeMap<String, String>;
    /// Lets sockets be given addresses when they connect, of all processes that have a group below a mount of the control groups.
    fn attach_sockets(&mut self, cgroups: &Path) -> Result<(), PlaneError>;
    /// Uplinks and pod-facing devices that have their programs.
    fn attached(&self) -> Attached;
    /// Whether programs of another version may still run, whose flows are not in the maps.
    fn inherits(&self) -> bool {
        false
    }
    /// Starts the thread that ends flows.
    fn sweeper(&mut self) -> Result<Sweeper, PlaneError>;
    /// Starts the thread that fragments wait for.
    fn fragments(&self) -> Result<Fragments, PlaneError>;
    /// For which egress addresses the data plane answers ARP or neighbour solicitations.
    fn answers(&self) -> Result<Box<dyn AnswerTable>, PlaneError>;
    /// What forgets connections that were refused, whenever and wherever it is called.
    fn forget_refused(&self, mark: u32) -> Result<Forget, PlaneError>;
    /// Room in the maps that are sized by the user or hold the policy (`flows`, `blocks`, `pods`, `destinations`, `ports`,
    /// `verdicts`): a pinned one keeps its size.
    fn sizes(&self) -> Vec<(&'static str, u64)>;
}

/// For which egress addresses the data plane answers ARP or neighbour solicitations, and on which uplinks (by interface index).
pub trait AnswerTable: Send {
    /// All entries.
    fn read(&self) -> std::io::Result<BTreeMap<(Egress, u32), Answering>>;
    /// Answers so from now on; with `None`, not at all.
    fn set(&mut self, address: Egress, ifindex: u32, value: Option<Answering>) -> std::io::Result<()>;
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answering {
    /// MAC that is told.
    pub mac: [u8; 6],
    /// Of a /64: it is for this that the uplink takes in all multicast frames.
    pub multicast: bool,
}

/// Forgets connections; gives how many there were.
pub type Forget = Box<dyn FnOnce() -> std::io::Result<usize> + Send>;

/// Devices that have their programs, by interface index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// Uplinks: name, and how XDP runs there (`Native` or `Generic`).
    pub uplinks: BTreeMap<u32, (String, String)>,
    /// Pod-facing devices: name.
    pub pods: BTreeMap<u32, String>,
}

/// Writes in order and repeats in `observed` what was accepted; stops at the first refusal. `counts` are writes and
/// refusals.
pub fn apply(
    plane: &mut dyn Plane,
    ops: &[Op],
    observed: &mut Observed,
    counts: &mut (u64, u64),
) -> Result<(), PlaneError> {
    let mut rest = ops;
    while !rest.is_empty() {
        let (done, result) = plane.write_some(rest);
        let (written, left) = rest.split_at(done);
        written.iter().for_each(|op| observed.apply(op));
        counts.0 += done as u64;
        if let Err(error) = result {
            counts.0 += 1;
            counts.1 += 1;
            return Err(error);
        }
        rest = left;
    }
    Ok(())
}
