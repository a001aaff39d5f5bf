//! The node's Lease: whoever fences this node takes it over first, so that while renewals succeed nobody has.
//!
//! Pure: boot time (nanoseconds) and answers of the API server are passed in; [`keep`] carries out what is to be done.
//!
//! A node that has lost its Lease, or never had it, is *disarmed*: its data plane takes every deadline for passed. It arms
//! again when it has acquired the Lease, has read afterwards what the API server says of the addresses, and its data plane
//! has followed all of that: what it was made to give up is nobody else's to send from any more.

mod keep;

pub use keep::{Access, keep};

use aegis_core::egress::Egress;
use aegis_core::fence::{LABEL, lease_name};
use aegis_core::model::Seconds;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::api::ObjectMeta;
use std::collections::BTreeMap;
use std::sync::Arc;

const SECOND: u64 = 1_000_000_000;
/// Longest time between two renewals.
const LONGEST: u64 = 10 * SECOND;
/// Pause after a failure, and between two looks at a Lease that somebody else holds.
const PAUSE: u64 = SECOND;

/// Epoch of each egress address, as the API server had it.
pub type Epochs = BTreeMap<Egress, i64>;

/// What the data plane needs of the Lease, and what it has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// UID of the Node, the Lease's owner.
    pub uid: String,
    /// Shortest time after which an address counts the node as lost, if any does.
    pub after: Option<Seconds>,
    /// Renewal by which the programs count; 0 = disarmed.
    pub renewed: u64,
    /// The data plane has followed what was read in this round.
    pub followed: Option<u64>,
}

/// What the data plane may go by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// When the last renewal that succeeded was sent; 0 = every deadline has passed.
    pub renewed: u64,
    /// What was read after the Lease had been acquired. No address is to be followed at an older epoch.
    pub read: Option<Read>,
    /// Who else holds the Lease, or why it cannot be renewed.
    pub trouble: Option<Trouble>,
}

/// A consistent read of all addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// Which one.
    pub round: u64,
    /// What it gave.
    pub epochs: Arc<Epochs>,
}

/// Why the Lease is not held.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// Somebody has taken it over.
    #[error("it was taken over by {0}")]
    TakenBy(String),
    /// The API server does not answer, or refuses.
    #[error("{0}")]
    Failed(String),
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// Nothing until then, unless the need changes.
    Wait(u64),
    /// Read the Lease.
    Get,
    /// Write it: create it if it has no version, replace that version otherwise.
    Put(Box<Lease>),
    /// Read all addresses, not from a cache.
    List,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The object is there already, is gone, or has another version.
    Conflict,
    /// Anything else; the write may have succeeded all the same.
    Other(String),
}

/// What is known of the object.
#[derive(Clone, Debug, Default)]
enum Object {
    #[default]
    Unknown,
    Absent,
    There(Box<Lease>),
}

/// Keeps the Lease of one node.
#[derive(Clone, Debug)]
pub struct Keeper {
    node: String,
    object: Object,
    /// When the last renewal that succeeded was sent, in this term.
    renewed: u64,
    armed: bool,
    read: Option<Read>,
    round: u64,
    /// Not before this.
    next: u64,
    trouble: Option<Trouble>,
}

impl Keeper {
    /// Of a node whose programs count by a renewal that an earlier agent sent, if not 0.
    pub fn new(node: &str, inherited: u64) -> Keeper {
        Keeper {
            node: node.to_owned(),
            object: Object::Unknown,
            renewed: inherited,
            armed: inherited != 0,
            read: None,
            round: 0,
            next: 0,
            trouble: None,
        }
    }

    /// What the data plane may go by.
    pub fn hold(&self) -> Hold {
        Hold {
            renewed: if self.armed { self.renewed } else { 0 },
            read: self.read.clone(),
            trouble: self.trouble.clone(),
        }
    }

    /// What to do now. `clock` is only written down for people to read.
    pub fn act(&mut self, need: &Need, now: u64, clock: Timestamp) -> Act {
        let Some(after) = need.after.filter(|_| !need.uid.is_empty()) else {
            if need.after.is_none() {
                // Whoever takes it over from a node that has no use for it takes nothing.
                *self = Keeper { round: self.round, ..Keeper::new(&self.node, 0) };
            }
            return Act::Wait(u64::MAX);
        };
        if self.read.as_ref().is_some_and(|read| need.followed == Some(read.round)) {
            self.armed = true;
        }
        if now < self.next {
            return Act::Wait(self.next);
        }
        match &self.object {
            Object::Unknown => Act::Get,
            Object::Absent => self.acquire(None, need, after, now, clock),
            Object::There(lease) => match holder(lease) {
                "" => self.acquire(Some(lease.clone()), need, after, now, clock),
                holder if holder == self.node => {
                    // First a renewal: what is read afterwards is read under this very term.
                    let due = self.renewed == 0 || now >= self.renewed.saturating_add(period(need.after));
                    if !due && !self.armed && self.read.is_none() {
                        return Act::List;
                    }
                    Act::Put(Box::new(self.written(Some(lease), need, after, clock)))
                }
                _ => {
                    self.lose();
                    Act::Get
                }
            },
        }
    }

    /// Only once the programs take every deadline for passed: an agent that came next would believe them otherwise.
    fn acquire(
        &mut self,
        lease: Option<Box<Lease>>,
        need: &Need,
        after: Seconds,
        now: u64,
        clock: Timestamp,
    ) -> Act {
        self.lose();
        if need.renewed != 0 {
            return Act::Wait(now + PAUSE);
        }
        Act::Put(Box::new(self.written(lease.as_deref(), need, after, clock)))
    }

    fn lose(&mut self) {
        (self.armed, self.renewed, self.read) = (false, 0, None);
    }

    /// The Lease was read; `None` = there is none.
    pub fn got(&mut self, result: Result<Option<Lease>, Failure>, now: u64) {
        match result {
            Ok(Some(lease)) => self.found(lease, now),
            Ok(None) => {
                self.object = Object::Absent;
                self.next = now;
            }
            Err(failure) => self.failed(failure, now),
        }
    }

    fn found(&mut self, lease: Lease, now: u64) {
        let holder = holder(&lease).to_owned();
        self.object = Object::There(Box::new(lease));
        if holder.is_empty() || holder == self.node {
            self.next = now;
        } else {
            self.lose();
            self.object = Object::Unknown;
            (self.next, self.trouble) = (now + PAUSE, Some(Trouble::TakenBy(holder)));
        }
    }

    /// The Lease was written, by a request that was sent at `sent`.
    pub fn put(&mut self, sent: u64, need: &Need, result: Result<Lease, Failure>, now: u64) {
        match result {
            Ok(lease) => {
                self.object = Object::There(Box::new(lease));
                self.renewed = sent;
                self.trouble = None;
                // What is still to be read comes at once.
                self.next = if self.armed || self.read.is_some() { sent + period(need.after) } else { now };
            }
            // Somebody may have written, or it was we whose answer was lost.
            Err(failure) => self.failed(failure, now),
        }
    }

    /// The addresses were read.
    pub fn listed(&mut self, sent: u64, need: &Need, result: Result<Epochs, Failure>, now: u64) {
        match result {
            Ok(epochs) => {
                self.round += 1;
                self.read = Some(Read { round: self.round, epochs: Arc::new(epochs) });
                self.next = sent + period(need.after);
            }
            Err(Failure::Other(error)) => {
                (self.next, self.trouble) = (now + PAUSE, Some(Trouble::Failed(error)));
            }
            Err(Failure::Conflict) => self.next = now + PAUSE,
        }
    }

    fn failed(&mut self, failure: Failure, now: u64) {
        self.object = Object::Unknown;
        match failure {
            Failure::Conflict => self.next = now,
            Failure::Other(error) => {
                (self.next, self.trouble) = (now + PAUSE, Some(Trouble::Failed(error)));
            }
        }
    }

    fn written(&self, before: Option<&Lease>, need: &Need, after: Seconds, clock: Timestamp) -> Lease {
        let metadata = before.map_or_else(ObjectMeta::default, |lease| lease.metadata.clone());
        let spec = before.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let kept = spec.holder_identity.as_deref() == Some(self.node.as_str());
        let transitions = spec.lease_transitions.unwrap_or_default();
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.node.clone(),
            uid: need.uid.clone(),
            ..OwnerReference::default()
        };
        let mut labels = metadata.labels.unwrap_or_default();
        labels.insert(LABEL.0.to_owned(), LABEL.1.to_owned());
        Lease {
            metadata: ObjectMeta {
                name: Some(lease_name(&self.node)),
                labels: Some(labels),
                owner_references: Some(vec![owner]),
                managed_fields: None,
                ..metadata
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.node.clone()),
                lease_duration_seconds: i32::try_from(after).ok(),
                acquire_time: spec.acquire_time.filter(|_| kept).or(Some(MicroTime(clock))),
                renew_time: Some(MicroTime(clock)),
                lease_transitions: Some(if kept { transitions } else { transitions.saturating_add(1) }),
                ..LeaseSpec::default()
            }),
        }
    }
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
}

/// Time between two renewals: several may be lost before the soft deadline.
fn period(after: Option<Seconds>) -> u64 {
    let after = after.and_then(|after| u64::try_from(after).ok()).unwrap_or(0);
    (after * SECOND / 5).clamp(SECOND, LONGEST)
}

#[cfg(test)]
mod tests;
