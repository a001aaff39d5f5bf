//! Allocations: what this node sends from, or through whom.

use super::{EgressAddress, Inputs, tunnel_of};
use crate::objects::Most;
use crate::singles;
use aegis_common::{ADDRESSES_PER_ALLOCATION, ANY_NUMBER, Timeouts};
use aegis_core::egress::{Egress, Family};
use aegis_core::gateway::{self, Holder};
use aegis_core::growth::MOST;
use aegis_core::model::{Address, AllocationName, State};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// Single IPv6 addresses that one allocation can use on one node, in the list of those with ports.
const MOST_SINGLES: usize = 4;

/// An allocation that has an egress address. It keeps its entry and its name even while nothing may be opened from it:
/// flows that leave through a gateway name it with each packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Addresses in which this node may open flows, sorted.
    pub addresses: Vec<Ipv4Addr>,
    /// Without any such address, and for when their deadlines have passed: tunnel addresses of the nodes to send through,
    /// best first.
    pub gateways: Vec<Ipv4Addr>,
    /// How many of the gateways are nearer than the rest.
    pub near: usize,
    /// One of the allocation's addresses, by which gateways know it; it may have none but /64s.
    pub name: Option<Ipv4Addr>,
    /// Stand-ins of single IPv6 addresses in which this node may open flows, sorted.
    pub singles: Vec<Ipv4Addr>,
    /// /64s from which this node may open flows, sorted.
    pub networks: Vec<Egress>,
    /// Time-outs.
    pub timeouts: Timeouts,
    /// Ports that may rest at a time.
    pub max_resting: u32,
    /// What one pod may take.
    pub per_pod: Most,
    /// Slices of each address that this node can grow to.
    pub most: u32,
}

impl Allocation {
    /// Whether new flows have a way out, by family.
    pub fn is_usable(&self, family: Family) -> bool {
        match family {
            Family::V4 => !self.addresses.is_empty() || !self.gateways.is_empty(),
            Family::V6 => !self.networks.is_empty() || !self.singles.is_empty(),
        }
    }

    /// Keys of the addresses in whose ports this node may open flows.
    pub fn with_ports(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.addresses.iter().chain(&self.singles).copied()
    }
}

/// All allocations that have an egress address.
pub(super) fn allocations(
    inputs: &Inputs,
    addresses: &BTreeMap<Ipv4Addr, EgressAddress>,
    networks: &BTreeMap<Egress, EgressAddress>,
) -> BTreeMap<AllocationName, Allocation> {
    let mut objects: BTreeMap<&AllocationName, Vec<(Ipv4Addr, &Address)>> = BTreeMap::new();
    let mut single: BTreeMap<&AllocationName, Vec<Ipv4Addr>> = BTreeMap::new();
    for (address, object) in &inputs.addresses {
        let all = objects.entry(&object.allocation).or_default();
        match singles::is(*address) {
            true => single.entry(&object.allocation).or_default().push(*address),
            false => all.push((*address, object)),
        }
    }
    let mut open: BTreeMap<&AllocationName, Vec<Egress>> = BTreeMap::new();
    for (network, wanted) in networks {
        let Some(name) = &wanted.allocation else { continue };
        objects.entry(name).or_default();
        open.entry(name).or_default().extend(Some(*network).filter(|_| !wanted.allowed.is_empty()));
    }
    let allocation = |(name, objects): (&AllocationName, Vec<(Ipv4Addr, &Address)>)| {
        let may_open = |own: &Ipv4Addr| addresses.get(own).is_some_and(|own| !own.allowed.is_empty());
        let (all, objects): (Vec<Ipv4Addr>, Vec<&Address>) = objects.into_iter().unzip();
        let singles = single.get(name).into_iter().flatten().copied().filter(may_open);
        let singles: Vec<Ipv4Addr> = singles.take(MOST_SINGLES).collect();
        let own = all.iter().copied().filter(may_open).take(ADDRESSES_PER_ALLOCATION - singles.len());
        let own: Vec<Ipv4Addr> = own.collect();
        let may_lapse = own.iter().any(|own| addresses.get(own).is_some_and(|own| own.deadlines.is_some()));
        let (gateways, near) =
            if own.is_empty() || may_lapse { gateways(inputs, name, &objects) } else { (Vec::new(), 0) };
        let limits = inputs.allocations.get(name);
        let allocation = Allocation {
            addresses: own,
            gateways,
            near,
            name: all.first().copied(),
            singles,
            networks: open.get(name).cloned().unwrap_or_default(),
            timeouts: limits.map(|limits| limits.timeouts).unwrap_or_default(),
            max_resting: limits.map_or(ANY_NUMBER, |limits| limits.max_resting),
            per_pod: limits.map(|limits| limits.per_pod).unwrap_or_default(),
            most: limits.map_or(MOST, |limits| limits.per_node_max),
        };
        (name.clone(), allocation)
    };
    objects.into_iter().map(allocation).collect()
}

/// Tunnel addresses of the nodes to send through, and how many of them are near.
fn gateways(inputs: &Inputs, name: &AllocationName, objects: &[&Address]) -> (Vec<Ipv4Addr>, usize) {
    let place = |node: &str| inputs.nodes.get(node).map(|node| node.place.clone()).unwrap_or_default();
    let site = |node: &str| Some(inputs.allocations.get(name)?.site_of(inputs.nodes.get(node)?));
    let holder = |node: &str| Holder {
        place: place(node),
        site: site(node).unwrap_or_default(),
        full: inputs.full.contains(node, name),
    };
    let holders: BTreeMap<&str, Holder> = objects
        .iter()
        .flat_map(|object| &object.holdings)
        .filter(|holding| holding.state == State::Held && holding.node != inputs.node)
        .filter(|holding| tunnel_of(inputs, &holding.node).is_some())
        .map(|holding| (holding.node.as_str(), holder(&holding.node)))
        .collect();
    let chosen = gateway::choose(&inputs.node, &place(&inputs.node), &holders);
    let addresses = chosen.nodes.iter().filter_map(|node| tunnel_of(inputs, node));
    (addresses.collect(), chosen.near)
}
