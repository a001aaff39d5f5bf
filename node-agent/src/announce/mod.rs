//! Announcing egress addresses to the network: which ones this node announces, and that it happens.
//!
//! By BGP: the agent puts a route into a routing table of the kernel ([`routes`]), from which FRR or BIRD redistributes it;
//! [`health`] looks whether that daemon does. By L2: one of the nodes answers ARP ([`l2`]). Only IPv4: a /64 would be a second kind of route beside these.

pub mod daemon;
pub mod health;
mod keeper;
pub mod l2;
pub mod routes;

pub use keeper::{Keeper, Standing, reason};

use crate::objects::NodeRecord;
use aegis_core::model::{Address, State};
use aegis_crds::AnnouncementMode;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// What it depends on whether this node announces an address.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Name of this node.
    pub node: &'a str,
    /// All egress addresses.
    pub addresses: &'a BTreeMap<Ipv4Addr, Address>,
    /// How the addresses of each prefix are announced.
    pub modes: &'a BTreeMap<String, AnnouncementMode>,
    /// All nodes.
    pub nodes: &'a BTreeMap<String, NodeRecord>,
    /// Addresses that the tables of this node's data plane have.
    pub programmed: &'a BTreeSet<Ipv4Addr>,
    /// Every uplink of this node has its program: what arrives is taken.
    pub entry: bool,
}

impl Facts<'_> {
    /// Whether this node is on its way out of the cluster, or its agent off the node.
    pub fn drains(&self) -> bool {
        self.nodes.get(self.node).is_none_or(|node| node.draining)
    }

    /// Whether somebody else holds slices of an address and is there to stay.
    fn others_remain(&self, address: &Address) -> bool {
        let remains = |name: &str| self.nodes.get(name).is_some_and(|node| !node.draining && !node.lost);
        holders(address).into_iter().any(|holder| holder != self.node && remains(holder))
    }
}

/// Nodes that send from an address, in the order of their names.
pub fn holders(address: &Address) -> BTreeSet<&str> {
    let holdings = address.holdings.iter();
    let sending = holdings.filter(|holding| matches!(holding.state, State::Held | State::Draining));
    sending.map(|holding| holding.node.as_str()).collect()
}

/// Addresses of this mode of which this node holds slices.
pub fn held(facts: &Facts<'_>, mode: AnnouncementMode) -> BTreeSet<Ipv4Addr> {
    let all = facts.addresses.iter().filter(|(_, object)| facts.modes.get(&object.prefix) == Some(&mode));
    all.filter(|(_, object)| holders(object).contains(facts.node)).map(|(address, _)| *address).collect()
}

/// Addresses that this node announces by BGP. One that `present` says it announces stays so as long as the data plane
/// has it and either its object or its prefix is gone: that alone says nothing about its flows.
pub fn announced(facts: &Facts<'_>, present: &BTreeSet<Ipv4Addr>) -> BTreeSet<Ipv4Addr> {
    if !facts.entry {
        return BTreeSet::new();
    }
    let due = |address: &Ipv4Addr| {
        let object = facts.addresses.get(address);
        object.is_some_and(|address| !facts.drains() || !facts.others_remain(address))
    };
    let unknown = |address: &Ipv4Addr| {
        facts.addresses.get(address).is_none_or(|object| !facts.modes.contains_key(&object.prefix))
    };
    let held = held(facts, AnnouncementMode::BGP).into_iter().filter(due);
    let kept = present.iter().copied().filter(unknown);
    held.chain(kept).filter(|address| facts.programmed.contains(address)).collect()
}

#[cfg(test)]
mod tests;
