//! What an agent tells the collector of use, every 10 seconds: a [`Report`], in JSON.
//!
//! Only types and pure rules, so that agents share them without any store. [`bound`] keeps a report small and its sums whole;
//! [`Report::check`] is what the collector takes.
#![forbid(unsafe_code)]

mod bound;
mod check;

pub use bound::bound;
pub use check::{Invalid, MAX_COUNT, MAX_GAUGE, MAX_INTERVAL, MAX_NAME, MAX_REASONS, MAX_ROWS};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Version of the format. A collector reads those up to its own.
pub const VERSION: u8 = 1;

/// How often an agent reports, in seconds.
pub const INTERVAL: i64 = 10;

/// What one node did from `from` to `to`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// [`VERSION`] of whoever wrote it.
    pub version: u8,
    /// Name of the node.
    pub node: String,
    /// One start of the agent: sequence numbers begin anew with each.
    pub boot: String,
    /// Grows by one with each report of a boot. The same number is the same report, however often it comes.
    pub sequence: u64,
    /// Begin of the interval, in seconds since the Unix epoch.
    pub from: i64,
    /// End of the interval, not included, in the same seconds.
    pub to: i64,
    /// One for each key that has a flow or had anything to count; what has no row was not in use.
    pub rows: Vec<Row>,
}

/// The figures of one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// What is counted apart.
    pub key: Key,
    /// What was counted.
    pub figures: Figures,
}

/// What is counted apart. A name that is empty, an address or origin that is missing: not known, or several summed ([`bound`]).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Key {
    /// The egress address; of a /64, its first one. None where nothing could be left from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Where the traffic goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<SocketAddr>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// `binding/NAME` or `policy/NAME`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rule: String,
    /// Namespace of the pods.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub account: String,
    /// Name of the allocation, in the account's namespace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub allocation: String,
    /// Site of the allocation that the node belongs to.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub site: String,
    /// Name of the pod, where pods are counted apart.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod: String,
}

/// Transport protocol of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo, IPv4 and IPv6.
    Icmp,
    /// Any other.
    #[default]
    Other,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Protocol; 4] = [Protocol::Tcp, Protocol::Udp, Protocol::Icmp, Protocol::Other];

    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Icmp => "icmp",
            Protocol::Other => "other",
        }
    }
}

/// What was counted of one key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Ports in use at `to`. A /64 has none: 0.
    pub in_use: u64,
    /// The most that were in use at any moment of the interval. Of rows that were summed the sum of theirs, which the truth
    /// does not exceed.
    pub peak: u64,
    /// Flows that began. Over IPv6 what a node had forgotten and goes on counts again.
    #[serde(default)]
    pub flows: u64,
    /// Flows that were refused, by reason: the data plane's own words (`no_port`, `pod_flows`, …).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub refused: BTreeMap<String, u64>,
    /// Towards the origin.
    #[serde(default)]
    pub sent: Volume,
    /// From the origin.
    #[serde(default)]
    pub received: Volume,
}

/// An amount of traffic, in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Packets.
    pub packets: u64,
    /// Bytes from the IP header on.
    pub bytes: u64,
}

impl Figures {
    /// Adds what was counted of another key in the same interval.
    pub fn add(&mut self, other: &Figures) {
        self.in_use = self.in_use.saturating_add(other.in_use);
        self.peak = self.peak.saturating_add(other.peak);
        self.flows = self.flows.saturating_add(other.flows);
        for (reason, count) in &other.refused {
            let sum = self.refused.entry(reason.clone()).or_default();
            *sum = sum.saturating_add(*count);
        }
        self.sent.add(other.sent);
        self.received.add(other.received);
    }
}

impl Volume {
    fn add(&mut self, other: Volume) {
        self.packets = self.packets.saturating_add(other.packets);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}
