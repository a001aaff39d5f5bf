//! Egress addresses: who owns which slice, from which this node may open flows, and where fragments meet.

use super::{Inputs, tunnel_of};
use crate::objects;
use aegis_core::egress::Egress;
use aegis_core::fence;
use aegis_core::growth;
use aegis_core::holding::Rights;
use aegis_core::model::{Address, AllocationName, Seconds, State};
use aegis_core::slice::SliceSet;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

/// An egress address as this node should know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressAddress {
    /// The address, if it is a single IPv6 one, of which the key is the stand-in.
    pub single: Option<Ipv6Addr>,
    /// Allocation that it is dedicated to.
    pub allocation: Option<AllocationName>,
    /// Epoch of the object.
    pub epoch: i64,
    /// Owner of each slice that has one.
    pub owners: BTreeMap<u8, Owner>,
    /// Tunnel addresses at which fragments meet: 16, or none.
    pub homes: Vec<Ipv4Addr>,
    /// Slices from which this node may open flows.
    pub allowed: SliceSet,
    /// Slices of which it gives sockets ports.
    pub bound: SliceSet,
    /// Those, and the ones of this node in which sockets may be left.
    pub kept: SliceSet,
    /// Slices of this node that are to become empty.
    pub draining: SliceSet,
    /// Slices of this node that it will open when the others have heard of them.
    pub unsettled: SliceSet,
    /// New flows that find no port wait for more slices instead of being refused.
    pub growing: bool,
    /// Until when flows may be opened and packets sent without a renewal of the node's Lease.
    pub deadlines: Option<Deadlines>,
}

/// Seconds from a renewal of the node's Lease on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// After these no flow is opened.
    pub soft: u32,
    /// After these nothing is sent.
    pub hard: u32,
}

impl EgressAddress {
    /// What this node may do with its slices.
    pub fn rights(&self) -> Rights {
        Rights { open: self.allowed, draining: self.draining }
    }

    /// What it is, of which `key` is the key.
    pub fn egress(&self, key: Ipv4Addr) -> Egress {
        self.single.map_or(Egress::V4(key), Egress::Single)
    }

    /// Whether this node has any slice, whatever for.
    pub fn is_used(&self) -> bool {
        let flows = self.allowed.union(self.unsettled).union(self.draining);
        !flows.union(self.kept).is_empty()
    }

    /// How many slices this node holds, but for those of sockets.
    pub fn held(&self) -> u32 {
        self.allowed.union(self.unsettled).len()
    }
}

impl Deadlines {
    fn of(after: Seconds) -> Deadlines {
        let seconds = |seconds: Seconds| u32::try_from(seconds).unwrap_or(0).max(1);
        Deadlines { soft: seconds(fence::soft(after)), hard: seconds(fence::hard(after)) }
    }
}

/// Owner of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its tunnel address; `None` when nobody has told it, in which case the slot stays as it is.
    pub peer: Option<Ipv4Addr>,
    /// Epoch of the holding.
    pub epoch: u32,
}

/// An address as this node should know it, from its object.
pub(super) fn egress_address(inputs: &Inputs, own: Ipv4Addr, object: &Address) -> EgressAddress {
    let Rights { open, draining } = Rights::of(object, &inputs.node);
    let uses = inputs.uses.get(&own).copied().unwrap_or_default();
    let translated = uses.translated(open);
    let kept = uses.kept.intersection(open.union(draining));
    let unsettled = inputs.unsettled.get(&own).copied().unwrap_or_default().intersection(translated);
    let has_room = |limits: &objects::Allocation| {
        growth::has_room(object, &inputs.node, limits.slices, limits.per_node_max)
    };
    let grows =
        !inputs.in_vain.contains(&own) && inputs.allocations.get(&object.allocation).is_some_and(has_room);
    let mut address = EgressAddress {
        single: match object.address {
            Egress::Single(address) => Some(address),
            _ => None,
        },
        allocation: Some(object.allocation.clone()),
        epoch: object.epoch,
        allowed: translated.difference(unsettled),
        bound: uses.open.intersection(kept).intersection(open),
        kept,
        draining,
        unsettled,
        growing: grows || !unsettled.is_empty(),
        deadlines: object.fence.map(|fence| Deadlines::of(fence.after)),
        ..EgressAddress::default()
    };
    address.owners = owners(inputs, object);
    let homes = aegis_core::fragment_homes(object);
    let resolved: Option<Vec<Ipv4Addr>> = homes.iter().map(|node| tunnel_of(inputs, node)).collect();
    address.homes = resolved.unwrap_or_default();
    address
}

/// A /64 as this node should know it. It has one slice of it, or none, and opens flows from it at once; there are no ports
/// to run short of.
pub(super) fn egress_network(inputs: &Inputs, object: &Address) -> EgressAddress {
    let Rights { open, draining } = Rights::of(object, &inputs.node);
    EgressAddress {
        allocation: Some(object.allocation.clone()),
        epoch: object.epoch,
        owners: owners(inputs, object),
        allowed: open,
        draining,
        deadlines: object.fence.map(|fence| Deadlines::of(fence.after)),
        ..EgressAddress::default()
    }
}

fn owners(inputs: &Inputs, object: &Address) -> BTreeMap<u8, Owner> {
    let mut owners = BTreeMap::new();
    for holding in &object.holdings {
        if let State::Quarantined { .. } = holding.state {
            continue;
        }
        let slices = SliceSet::range(holding.first, holding.last);
        let peer = tunnel_of(inputs, &holding.node);
        let owner = Owner { peer, epoch: u32::try_from(holding.epoch).unwrap_or(u32::MAX) };
        owners.extend(slices.iter().map(|slice| (slice, owner)));
    }
    owners
}
