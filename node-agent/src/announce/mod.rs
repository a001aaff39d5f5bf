//! Announcing egress addresses to the network: which ones this node announces, and that it happens.
//!
//! By BGP: the agent puts routes into a routing table of the kernel ([`routes`]), from which FRR or BIRD redistributes them;
//! [`health`] looks whether that daemon does. By L2: one of the nodes answers ARP or, for a /64, neighbour
//! solicitations ([`l2`]).

pub mod daemon;
pub mod health;
mod keeper;
pub mod l2;
pub mod routes;

pub use keeper::{Keeper, Standing, reason};

use crate::objects::NodeRecord;
use crate::singles;
use aegis_core::egress::Egress;
use aegis_core::model::{Address, Holding, State};
use aegis_crds::AnnouncementMode;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// What it depends on whether this node announces an address.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Name of this node.
    pub node: &'a str,
    /// All egress addresses that have ports, by their keys (see [`singles`](crate::singles)).
    pub addresses: &'a BTreeMap<Ipv4Addr, Address>,
    /// All egress addresses that are an IPv6 /64.
    pub networks: &'a BTreeMap<Egress, Address>,
    /// How the addresses of each prefix are announced.
    pub modes: &'a BTreeMap<String, AnnouncementMode>,
    /// All nodes.
    pub nodes: &'a BTreeMap<String, NodeRecord>,
    /// Addresses that the tables of this node's data plane have.
    pub programmed: &'a BTreeSet<Egress>,
    /// Every uplink of this node has its program: what arrives is taken.
    pub entry: bool,
}

impl Facts<'_> {
    /// What is known of an egress address.
    pub fn object(&self, egress: Egress) -> Option<&Address> {
        match singles::key(egress) {
            Some(key) => self.addresses.get(&key),
            None => self.networks.get(&egress),
        }
    }

    /// How an egress address is announced, if that is known.
    pub fn mode(&self, egress: Egress) -> Option<AnnouncementMode> {
        self.modes.get(&self.object(egress)?.prefix).copied()
    }

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

fn sends(holding: &&Holding) -> bool {
    matches!(holding.state, State::Held | State::Draining)
}

/// Nodes that send from an address, in the order of their names.
pub fn holders(address: &Address) -> BTreeSet<&str> {
    address.holdings.iter().filter(sends).map(|holding| holding.node.as_str()).collect()
}

/// Slices of an address that a node sends from.
pub fn slices_of(address: &Address, node: &str) -> impl Iterator<Item = u8> {
    let own = address.holdings.iter().filter(sends).filter(move |holding| holding.node == node);
    own.flat_map(|holding| holding.first..=holding.last)
}

/// Addresses of this mode of which this node holds slices.
pub fn held(facts: &Facts<'_>, mode: AnnouncementMode) -> BTreeSet<Egress> {
    let all = facts.addresses.values().chain(facts.networks.values());
    let all = all.filter(|object| facts.modes.get(&object.prefix) == Some(&mode));
    all.filter(|object| holders(object).contains(facts.node)).map(|object| object.address).collect()
}

/// Addresses that this node announces by BGP, with their routes. One that `present` says it announces stays so as long as the
/// data plane has it and either its object or its prefix is gone: that alone says nothing about its flows.
pub fn announced(facts: &Facts<'_>, present: &BTreeSet<IpNet>) -> BTreeMap<Egress, BTreeSet<IpNet>> {
    if !facts.entry {
        return BTreeMap::new();
    }
    let own = |egress: &Egress| {
        let object = facts.object(*egress)?;
        let due = !facts.drains() || !facts.others_remain(object);
        due.then(|| (*egress, routes::of(*egress, slices_of(object, facts.node))))
    };
    let mut all: BTreeMap<Egress, BTreeSet<IpNet>> =
        held(facts, AnnouncementMode::BGP).iter().filter_map(own).collect();
    for range in present {
        let egress = routes::egress(*range);
        if facts.mode(egress).is_none() {
            all.entry(egress).or_default().insert(*range);
        }
    }
    all.retain(|egress, _| facts.programmed.contains(egress));
    all
}

#[cfg(test)]
mod tests;
