//! What the data plane holds: the contents of its maps, as plain data.
//!
//! It is read from the kernel when the agent starts and after any failed write; between the two every write that
//! succeeded is repeated here ([`Observed::apply`]), so that a reconciliation costs no system call when nothing changed.

use crate::ops::Op;
use crate::singles::{self, Singles};
use aegis_common::{
    Address6, AddressValue, Allocation6Value, AllocationValue, BindValue, Config, Config6, HOMES_PER_ADDRESS,
    HoldingValue, HostValue, LeaseValue, Network, NetworkValue, PeerValue, Pod6Value, PodValue,
    SLOTS_PER_ADDRESS, SlotValue, VerdictValue,
};
use aegis_core::egress::Egress;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

/// An address as the maps hold it: the four octets in network order, read natively.
pub fn to_map(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

/// The inverse of [`to_map`].
pub fn from_map(address: u32) -> Ipv4Addr {
    Ipv4Addr::from(address.to_ne_bytes())
}

/// An IPv6 address as the maps hold it.
pub fn to_map6(address: Ipv6Addr) -> Address6 {
    let bits = address.to_bits();
    [96, 64, 32, 0].map(|shift| u32::from_ne_bytes(((bits >> shift) as u32).to_be_bytes()))
}

/// The inverse of [`to_map6`].
pub fn from_map6([a, b, c, d]: Address6) -> Ipv6Addr {
    let word = |word: u32| u128::from(u32::from_be_bytes(word.to_ne_bytes()));
    Ipv6Addr::from_bits(word(a) << 96 | word(b) << 64 | word(c) << 32 | word(d))
}

/// The key of an egress /64; an address by itself has none.
pub fn to_network(egress: Egress) -> Option<Network> {
    let Egress::V6(network) = egress else { return None };
    let [first, second, ..] = to_map6(Ipv6Addr::from_bits(u128::from(network) << 64));
    Some([first, second])
}

/// The inverse of [`to_network`].
pub fn from_network([first, second]: Network) -> Egress {
    Egress::containing(from_map6([first, second, 0, 0]).into())
}

/// A destination of the policy.
pub type DestinationEntry = IpNet;
/// A prefix of ports: protocol, first port, length (without the generation's and the protocol's bits).
pub type PortEntry = (u8, u16, u8);
/// Pod class, destination class, port class.
pub type VerdictEntry = (u32, u32, u32);

/// One generation of the policy, in the numbers that the maps use.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// `PODS`.
    pub pods: BTreeMap<Ipv4Addr, PodValue>,
    /// `HOSTS`, by group.
    pub hosts: BTreeMap<u64, HostValue>,
    /// `PODS6`.
    pub pods6: BTreeMap<Ipv6Addr, Pod6Value>,
    /// `DESTINATIONS` and `DESTINATIONS6`.
    pub destinations: BTreeMap<DestinationEntry, u32>,
    /// `PORTS`.
    pub ports: BTreeMap<PortEntry, u32>,
    /// `VERDICTS`.
    pub verdicts: BTreeMap<VerdictEntry, VerdictValue>,
}

impl Generation {
    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
            && self.hosts.is_empty()
            && self.pods6.is_empty()
            && self.destinations.is_empty()
            && self.ports.is_empty()
            && self.verdicts.is_empty()
    }
}

/// Contents of the maps that the agent writes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// `CONFIG`.
    pub config: Config,
    /// `PEERS` by index; free entries are absent.
    pub peers: BTreeMap<u32, PeerValue>,
    /// `PEER_INDEX`.
    pub peer_index: BTreeMap<Ipv4Addr, u32>,
    /// `ADDRESSES`.
    pub addresses: BTreeMap<Ipv4Addr, AddressValue>,
    /// `SINGLES`.
    pub singles: Singles,
    /// `SLOTS` by address index and slice; slots without owner are absent.
    pub slots: BTreeMap<(u32, u8), SlotValue>,
    /// `HOMES` by address index; lists of zeroes are absent.
    pub homes: BTreeMap<u32, Homes>,
    /// `HOLDINGS`.
    pub holdings: BTreeMap<Ipv4Addr, HoldingValue>,
    /// `BINDS`.
    pub binds: BTreeMap<Ipv4Addr, BindValue>,
    /// `GROWING`.
    pub growing: BTreeSet<Ipv4Addr>,
    /// `LEASE`.
    pub lease: LeaseValue,
    /// `ALLOCATIONS` by index; entries never used are absent.
    pub allocations: BTreeMap<u32, AllocationValue>,
    /// `CONFIG6`.
    pub config6: Config6,
    /// `NETWORKS`.
    pub networks: BTreeMap<Egress, NetworkValue>,
    /// `SUFFIXES`.
    pub suffixes: BTreeMap<u32, Ipv6Addr>,
    /// `ALLOCATIONS6` by index; entries without /64 are absent.
    pub allocations6: BTreeMap<u32, Allocation6Value>,
    /// The policy maps, by generation.
    pub generations: BTreeMap<u32, Generation>,
}

/// Fragment homes of one address: indices into `PEERS`.
pub type Homes = [u32; HOMES_PER_ADDRESS as usize];

/// An `ALLOCATIONS` entry that was never written.
pub const NO_ALLOCATION: AllocationValue = AllocationValue {
    addresses: [0; aegis_common::ADDRESSES_PER_ALLOCATION],
    count: 0,
    timeouts: aegis_common::Timeouts {
        tcp_established: 0,
        tcp_transitory: 0,
        tcp_closed: 0,
        udp: 0,
        icmp: 0,
        rest: 0,
    },
    name: 0,
    gateway_count: 0,
    near_count: 0,
    gateways: [0; aegis_common::GATEWAYS_PER_ALLOCATION],
    max_resting: 0,
    identity: 0,
    account: 0,
    pod_flows: 0,
    pod_rate: 0,
    account_flows: 0,
    account_rate: 0,
    room_flows: 0,
    room_blocks: 0,
    singles: 0,
    pad: 0,
};

impl Observed {
    /// The generation that look-ups use; empty when it has no entry.
    pub fn live(&self) -> Generation {
        self.generations.get(&self.config.generation).cloned().unwrap_or_default()
    }

    /// The egress address that has a key.
    pub fn egress(&self, key: Ipv4Addr) -> Egress {
        singles::egress(key, &self.singles)
    }

    /// Slots of an address, by slice.
    pub fn slots_of(&self, index: u32) -> impl Iterator<Item = (u8, SlotValue)> + '_ {
        self.slots
            .range((index, 0)..=(index, (SLOTS_PER_ADDRESS - 1) as u8))
            .map(|((_, slice), slot)| (*slice, *slot))
    }

    /// Repeats a write that the kernel has accepted.
    pub fn apply(&mut self, op: &Op) {
        match *op {
            Op::SetConfig(config) => self.config = config,
            Op::SetPeer { index, value } => set_or_clear(&mut self.peers, index, value, value.address == 0),
            Op::IndexPeer { address, index } => _ = self.peer_index.insert(address, index),
            Op::UnindexPeer { address } => _ = self.peer_index.remove(&address),
            Op::SetSlot { index, slice, value } => {
                set_or_clear(&mut self.slots, (index, slice), value, value == SlotValue::default());
            }
            Op::SetHomes { index, homes } => {
                set_or_clear(&mut self.homes, index, homes, homes == Homes::default())
            }
            Op::SetAddress { address, value } => _ = self.addresses.insert(address, value),
            Op::RemoveAddress { address } => _ = self.addresses.remove(&address),
            Op::SetSingle { stand_in, address } => _ = self.singles.insert(stand_in, address),
            Op::RemoveSingle { stand_in } => _ = self.singles.remove(&stand_in),
            Op::SetHolding { address, value } => _ = self.holdings.insert(address, value),
            Op::RemoveHolding { address } => _ = self.holdings.remove(&address),
            Op::SetBinds { address, value } => _ = self.binds.insert(address, value),
            Op::RemoveBinds { address } => _ = self.binds.remove(&address),
            Op::SetGrowing { address } => _ = self.growing.insert(address),
            Op::RemoveGrowing { address } => _ = self.growing.remove(&address),
            Op::SetLease(lease) => self.lease = lease,
            Op::SetAllocation { index, value } => {
                set_or_clear(&mut self.allocations, index, value, value == NO_ALLOCATION);
            }
            Op::SetPod { generation, address, value } => {
                self.generation(generation).pods.insert(address, value);
            }
            Op::ForgetConnections { .. } | Op::Settle => {}
            Op::SetConfig6(config) => self.config6 = config,
            Op::SetNetwork { network, value } => _ = self.networks.insert(network, value),
            Op::RemoveNetwork { network } => _ = self.networks.remove(&network),
            Op::SetSuffix { suffix, address } => _ = self.suffixes.insert(suffix, address),
            Op::RemoveSuffix { suffix } => _ = self.suffixes.remove(&suffix),
            Op::SetAllocation6 { index, value } => {
                set_or_clear(&mut self.allocations6, index, value, value.count == 0);
            }
            Op::SetPod6 { generation, address, value } => {
                self.generation(generation).pods6.insert(address, value);
            }
            Op::RemovePod6 { generation, address } => {
                self.generation(generation).pods6.remove(&address);
            }
            Op::RemovePod { generation, address } => {
                self.generation(generation).pods.remove(&address);
            }
            Op::SetHost { generation, group, value } => {
                self.generation(generation).hosts.insert(group, value);
            }
            Op::RemoveHost { generation, group } => {
                self.generation(generation).hosts.remove(&group);
            }
            Op::SetDestination { generation, destination, class } => {
                self.generation(generation).destinations.insert(destination, class);
            }
            Op::RemoveDestination { generation, destination } => {
                self.generation(generation).destinations.remove(&destination);
            }
            Op::SetPort { generation, port, class } => {
                _ = self.generation(generation).ports.insert(port, class)
            }
            Op::RemovePort { generation, port } => _ = self.generation(generation).ports.remove(&port),
            Op::SetVerdict { generation, verdict, value } => {
                self.generation(generation).verdicts.insert(verdict, value);
            }
            Op::RemoveVerdict { generation, verdict } => {
                self.generation(generation).verdicts.remove(&verdict);
            }
        }
        self.generations.retain(|_, generation| !generation.is_empty());
    }

    fn generation(&mut self, generation: u32) -> &mut Generation {
        self.generations.entry(generation).or_default()
    }
}

fn set_or_clear<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: V, clear: bool) {
    if clear {
        map.remove(&key);
    } else {
        map.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_in_network_order_and_come_back() {
        let address: Ipv6Addr = "2001:db8:1:2:3:4:5:6".parse().unwrap();
        let bytes: Vec<u8> = to_map6(address).iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes, address.octets());
        assert_eq!(from_map6(to_map6(address)), address);
        let network: Egress = "2001:db8:1:2::/64".parse().unwrap();
        assert_eq!(to_network(network), Some(aegis_common::network_of(&to_map6(address))));
        assert_eq!(to_network(network).map(from_network), Some(network));
        assert_eq!(to_network(Ipv4Addr::LOCALHOST.into()), None);
    }
}
