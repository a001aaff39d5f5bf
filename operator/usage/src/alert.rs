//! Alerts: what accounts want to be told of their use, when it is raised and cleared, and how it is told.
//!
//! Use is looked at slot by slot, in their order, each slot once: [`Store::watch`](crate::Store::watch). What becomes of it is a pure
//! rule (`machine`); what it needs to know of one slot before the next stands in the store, in one transaction with the items that came
//! of it. So a collector that begins anew tells nothing twice.

mod evaluate;
mod feed;
mod item;
mod machine;
mod observe;
mod table;
mod token;

pub use evaluate::{GRACE, MOST_ITEMS, MOST_RULES, MOST_TRACKS};
pub(crate) use feed::date;
pub use feed::{Feed, Form};
pub use item::{Happening, Item, Limit, Pod};
pub use machine::{Key, Kind, Track};
pub use table::{Standing, Told};
pub use token::Token;

use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// An account, as far as alerts need to know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Its name: a namespace.
    pub name: String,
    /// Its alerts, by name. Those beyond [`MOST_RULES`] do not count.
    pub rules: Vec<Rule>,
    /// Its allocations, by name.
    pub allocations: BTreeMap<String, Allocation>,
}

/// A `UsageAlert`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Its name.
    pub name: String,
    /// Its identity: another one of the same name is another alert.
    pub uid: String,
    /// The allocation that it is about. None: all of the account.
    pub allocation: Option<String>,
    /// Origins that it is about, each with one port or any. None: all.
    pub origins: Vec<(IpNet, Option<u16>)>,
    /// When ports count.
    pub port_use: Option<PortUse>,
    /// When refusals count.
    pub refusals: Option<Refusals>,
    /// After how many seconds a site without holders counts.
    pub site_without_holders: Option<i64>,
}

/// When ports of an address towards an origin count as nearly used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortUse {
    /// From this share on, in percent.
    pub percent: i64,
    /// Until it is below this one.
    pub clear_below: i64,
    /// Once it has been so for so many seconds.
    pub wait: i64,
}

/// When refusals count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusals {
    /// If there are more than so many.
    pub more_than: i64,
    /// Within so many seconds, a multiple of ten.
    pub within: i64,
}

/// An allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocation {
    /// Ports that it gives out of each address that has some.
    pub ports: i64,
    /// Those of its addresses that are no IPv4 ones and have ports: IPv6 addresses by themselves.
    pub singles: BTreeSet<IpAddr>,
    /// Its addresses, of a /64 the first, each with the nodes that hold slices of it: nobody else can have ports of it in use.
    pub addresses: BTreeMap<IpAddr, BTreeSet<String>>,
    /// Its sites, each with the number of slices that its nodes hold; one without a name if it has none. Empty while nobody knows.
    pub sites: BTreeMap<String, u32>,
}

impl Rule {
    fn is_about(&self, allocation: &str) -> bool {
        self.allocation.as_deref().is_none_or(|name| name == allocation)
    }

    fn looks_at(&self, origin: Option<SocketAddr>) -> bool {
        let within = |(range, port): &(IpNet, Option<u16>)| {
            origin.is_some_and(|it| range.contains(&it.ip()) && port.is_none_or(|port| port == it.port()))
        };
        self.origins.is_empty() || self.origins.iter().any(within)
    }
}
