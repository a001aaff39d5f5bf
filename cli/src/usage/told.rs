//! What the collector says, as far as it is read.

use super::period::moment;
use serde::{Deserialize, Deserializer};

/// An answer to [`USAGE`](super::question::USAGE).
#[derive(Clone, Debug, Deserialize)]
pub struct UsageTold {
    /// The field.
    pub usage: Connection,
}

/// A page.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// The level that was read.
    pub level: String,
    /// Groups and steps.
    pub nodes: Vec<Line>,
    /// What comes next.
    pub page_info: PageInfo,
}

/// A group in a step.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Line {
    /// Values of what is told apart.
    pub by: Vec<String>,
    /// Begin of the step.
    #[serde(deserialize_with = "time")]
    pub at: i64,
    /// Slots in which it was seen.
    pub slots: u64,
    /// Figures.
    pub figures: Vec<f64>,
}

/// Where a page ends.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PageInfo {
    /// There is another one.
    pub has_next_page: bool,
    /// Where it begins.
    pub end_cursor: Option<String>,
}

/// An answer to [`OBJECTS`](super::question::OBJECTS).
#[derive(Clone, Debug, Deserialize)]
pub struct ObjectsTold {
    /// Addresses.
    pub addresses: Vec<Address>,
}

/// An address and who holds its slices.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Address {
    /// The address, or the /64.
    pub address: String,
    /// Whose.
    pub account: String,
    /// Of which allocation.
    pub allocation: String,
    /// First slice in use.
    pub first: u64,
    /// And the last.
    pub last: u64,
    /// Nodes that hold some.
    pub holders: Vec<Holder>,
}

/// What a node holds of an address.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Holder {
    /// The node.
    pub node: String,
    /// Its site.
    pub site: String,
    /// Slices in which flows may start.
    pub held: u64,
    /// Slices in which they go on.
    pub draining: u64,
}

/// An answer to [`COVERAGE`](super::question::COVERAGE).
#[derive(Clone, Debug, Default, Deserialize)]
pub struct CoverageTold {
    /// Nodes, and when they reported last.
    pub reports: Vec<NodeReport>,
    /// What was reported of each step.
    pub reported: Vec<Step>,
}

/// When a node reported.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct NodeReport {
    /// The node.
    pub node: String,
    /// End of what it reported last.
    #[serde(deserialize_with = "maybe_time")]
    pub last: Option<i64>,
}

/// How much of a step was reported.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct Step {
    /// Its begin.
    #[serde(deserialize_with = "time")]
    pub at: i64,
    /// Seconds, of all nodes together.
    pub seconds: i64,
}

/// An answer to [`NOW`](super::question::NOW).
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct NowTold {
    /// The collector's time.
    #[serde(deserialize_with = "time")]
    pub now: i64,
}

fn time<'a, D: Deserializer<'a>>(source: D) -> Result<i64, D::Error> {
    moment(&String::deserialize(source)?).map_err(serde::de::Error::custom)
}

fn maybe_time<'a, D: Deserializer<'a>>(source: D) -> Result<Option<i64>, D::Error> {
    let text = Option::<String>::deserialize(source)?;
    text.map(|it| moment(&it)).transpose().map_err(serde::de::Error::custom)
}
