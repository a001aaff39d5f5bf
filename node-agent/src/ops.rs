//! From the observed to the desired state, one map write at a time, in an order in which no moment leaks.
//!
//! 1. What policy stands on grows: peers, slots, addresses, holdings, allocations.
//! 2. The policy: a whole new generation is written beside the live one, then one store of `CONFIG` makes it live. The old generation
//!    goes when every packet that was being judged by it is through. Where single writes to the live generation can be put in a safe
//!    order ([`edit`]), these do.
//! 3. What policy no longer stands on shrinks, in the reverse order.
//!
//! Within a step a slot is owned before it may be used for new flows, and loses that right before it loses its owner.

mod addresses;
mod allocations;
mod edit;
mod networks;
mod numbering;
mod peers;
mod policy;

pub use numbering::Rules;
pub use peers::refresh_peers;

use crate::desired::Desired;
use crate::lease::Epochs;
use crate::observed::{DestinationEntry, Homes, Observed, PortEntry, VerdictEntry, to_map};
use aegis_common::{
    AddressValue, Allocation6Value, AllocationValue, BindValue, Config, Config6, HoldingValue, HostValue,
    LeaseValue, MAX_POD_RANGES, NetworkValue, PeerValue, Pod6Value, PodRange, PodValue, SlotValue,
    VerdictValue,
};
use aegis_core::egress::Egress;
use aegis_core::model::AllocationName;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// One write to one map, or one other step.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(missing_docs, reason = "fields are named for the map's keys and values")]
pub enum Op {
    /// Writes `CONFIG`. With another generation in it this is the switch of the policy.
    SetConfig(Config),
    /// Writes `PEERS`; an address of 0 frees the entry.
    SetPeer { index: u32, value: PeerValue },
    /// Writes `PEER_INDEX`.
    IndexPeer { address: Ipv4Addr, index: u32 },
    /// Removes from `PEER_INDEX`.
    UnindexPeer { address: Ipv4Addr },
    /// Writes `SLOTS`.
    SetSlot { index: u32, slice: u8, value: SlotValue },
    /// Waits until every packet that may have met what was there before is through. What is no longer looked up may go.
    Settle,
    /// Writes the 16 `HOMES` of an address.
    SetHomes { index: u32, homes: Homes },
    /// Writes `ADDRESSES`.
    SetAddress { address: Ipv4Addr, value: AddressValue },
    /// Removes from `ADDRESSES`.
    RemoveAddress { address: Ipv4Addr },
    /// Writes `SINGLES`.
    SetSingle { stand_in: Ipv4Addr, address: Ipv6Addr },
    /// Removes from `SINGLES`.
    RemoveSingle { stand_in: Ipv4Addr },
    /// Writes `HOLDINGS`.
    SetHolding { address: Ipv4Addr, value: HoldingValue },
    /// Removes from `HOLDINGS`.
    RemoveHolding { address: Ipv4Addr },
    /// Writes `BINDS`.
    SetBinds { address: Ipv4Addr, value: BindValue },
    /// Removes from `BINDS`.
    RemoveBinds { address: Ipv4Addr },
    /// Writes `GROWING`.
    SetGrowing { address: Ipv4Addr },
    /// Removes from `GROWING`.
    RemoveGrowing { address: Ipv4Addr },
    /// Writes `LEASE`.
    SetLease(LeaseValue),
    /// Writes `ALLOCATIONS`.
    SetAllocation { index: u32, value: AllocationValue },
    /// Writes `PODS`.
    SetPod { generation: u32, address: Ipv4Addr, value: PodValue },
    /// Removes from `PODS`.
    RemovePod { generation: u32, address: Ipv4Addr },
    /// Writes `HOSTS`.
    SetHost { generation: u32, group: u64, value: HostValue },
    /// Removes from `HOSTS`.
    RemoveHost { generation: u32, group: u64 },
    /// Removes a gone pod's connections from conntrack: the next pod with its address is to be judged anew.
    ForgetConnections { address: IpAddr },
    /// Writes `CONFIG6`.
    SetConfig6(Config6),
    /// Writes `NETWORKS`.
    SetNetwork { network: Egress, value: NetworkValue },
    /// Removes from `NETWORKS`.
    RemoveNetwork { network: Egress },
    /// Writes `ALLOCATIONS6`.
    SetAllocation6 { index: u32, value: Allocation6Value },
    /// Writes `SUFFIXES`.
    SetSuffix { suffix: u32, address: Ipv6Addr },
    /// Removes from `SUFFIXES`.
    RemoveSuffix { suffix: u32 },
    /// Writes `PODS6`.
    SetPod6 { generation: u32, address: Ipv6Addr, value: Pod6Value },
    /// Removes from `PODS6`.
    RemovePod6 { generation: u32, address: Ipv6Addr },
    /// Writes `DESTINATIONS` or `DESTINATIONS6`.
    SetDestination { generation: u32, destination: DestinationEntry, class: u32 },
    /// Removes from `DESTINATIONS` or `DESTINATIONS6`.
    RemoveDestination { generation: u32, destination: DestinationEntry },
    /// Writes `PORTS`.
    SetPort { generation: u32, port: PortEntry, class: u32 },
    /// Removes from `PORTS`.
    RemovePort { generation: u32, port: PortEntry },
    /// Writes `VERDICTS`.
    SetVerdict { generation: u32, verdict: VerdictEntry, value: VerdictValue },
    /// Removes from `VERDICTS`.
    RemoveVerdict { generation: u32, verdict: VerdictEntry },
}

/// What must happen, and what was refused.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transition {
    /// Writes, in order.
    pub ops: Vec<Op>,
    /// Addresses of which an object older than the data plane was offered; they stay as they are.
    pub stale: BTreeSet<Egress>,
    /// Addresses whose object is gone while flows live, here or elsewhere; they take no new flow.
    pub orphaned: BTreeSet<Egress>,
    /// Indices of peers that are kept only because live flows may name them.
    pub lingering: BTreeSet<u32>,
    /// Numbers of the allocations afterwards.
    pub numbers: BTreeMap<AllocationName, u32>,
    /// Numbers of the rules that cover local pods, afterwards.
    pub rules: Rules,
    /// What found no room, by table.
    pub full: BTreeSet<&'static str>,
}

/// What the agent knows of the data plane beside the contents of the maps that it writes.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Egress addresses that carry no flow of this node.
    pub idle: BTreeSet<Egress>,
    /// What live flows name; `None` = anything may be named.
    pub flows: Option<Named>,
    /// Epochs that addresses have had since this node acquired its Lease: nothing older is followed.
    pub floor: Arc<Epochs>,
    /// Egress addresses with deadlines that were deleted while this node did not hold its Lease: it owns nothing of them.
    pub lost: BTreeSet<Egress>,
    /// Numbers of the rules in the live generation; `None`: nobody knows, since another agent has written it, or a write has failed.
    pub rules: Option<Arc<Rules>>,
}

/// Indices that flow entries hold. What is in here must not become somebody else's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Of peers.
    pub peers: BTreeSet<u32>,
    /// Of allocations.
    pub allocations: BTreeSet<u32>,
}

impl Op {
    /// Whether new flows may have named something until now that they cannot name any more.
    pub fn ends_a_way(&self) -> bool {
        matches!(
            self,
            Op::SetConfig(_)
                | Op::SetAllocation { .. }
                | Op::SetAddress { .. }
                | Op::RemoveAddress { .. }
                | Op::UnindexPeer { .. }
        )
    }
}

/// How to come from `observed` to `desired`.
pub fn transition(desired: &Desired, observed: &Observed, known: &Known) -> Transition {
    let mut builder = Builder {
        observed,
        desired,
        known,
        plan: Transition::default(),
        ending: BTreeMap::new(),
        drains: Vec::new(),
    };
    let peers = builder.grow_peers();
    builder.write_base_config(&peers);
    let kept = builder.grow_addresses(&peers);
    let networks = builder.grow_networks(&kept, &peers);
    let numbers = builder.grow_allocations(&kept, &peers);
    builder.grow_allocations6(&networks, &numbers);
    builder.name_allocations(&kept, &numbers);
    builder.write_policy(&peers, &numbers);
    builder.shrink_allocations(&numbers);
    builder.shrink_addresses(&kept);
    builder.shrink_networks(&networks, &numbers);
    builder.shrink_peers(&peers);
    builder.plan.numbers = numbers;
    builder.plan
}

struct Builder<'a> {
    observed: &'a Observed,
    desired: &'a Desired,
    known: &'a Known,
    plan: Transition,
    /// Entries of allocations that open nothing any more.
    ending: BTreeMap<u32, AllocationValue>,
    /// Writes by which slices that drain lose the right to open flows.
    drains: Vec<Op>,
}

/// Numbers that are free: the lowest ones of `0..size` for which `taken` says no.
fn free_numbers(first: u32, size: u32, taken: impl Fn(u32) -> bool) -> impl Iterator<Item = u32> {
    (first..size).filter(move |number| !taken(*number))
}

impl Builder<'_> {
    fn push(&mut self, op: Op) {
        self.plan.ops.push(op);
    }

    fn config(&self, peers: &BTreeMap<Ipv4Addr, u32>, generation: u32) -> Config {
        let settings = &self.desired.settings;
        let current = self.observed.config;
        let mut config = Config {
            generation,
            mark: settings.mark,
            tunnel_port: u32::from(settings.tunnel_port),
            hold_unknown: u32::from(settings.hold_unknown),
            refusals_per_second: settings.refusals_per_second,
            fast: u32::from(settings.fast_path),
            host_levels: settings.host_levels,
            ..current
        };
        if let Some(address) = settings.tunnel_address {
            config.tunnel_address = to_map(address);
            config.own_peer = peers.get(&address).copied().unwrap_or(current.own_peer);
        }
        if let Some(mtu) = settings.tunnel_mtu {
            config.tunnel_mtu = mtu;
            config.mss = mtu.saturating_sub(40);
        }
        if !settings.pod_ranges.is_empty() {
            config.pod_ranges = [PodRange::default(); MAX_POD_RANGES];
            for (slot, range) in config.pod_ranges.iter_mut().zip(&settings.pod_ranges) {
                *slot = PodRange { network: to_map(range.network()), mask: to_map(range.netmask()) };
            }
            config.pod_range_count = settings.pod_ranges.len().min(MAX_POD_RANGES) as u32;
        }
        config
    }

    /// Settings that do not depend on the policy come first; those that do (what is held) change with it.
    fn write_base_config(&mut self, peers: &BTreeMap<Ipv4Addr, u32>) {
        let current = self.observed.config;
        let mut config = self.config(peers, current.generation);
        config.hold_unknown = current.hold_unknown;
        if current.hold_unknown == 0 {
            config.pod_ranges = current.pod_ranges;
            config.pod_range_count = current.pod_range_count;
        }
        if config != current {
            self.push(Op::SetConfig(config));
        }
    }
}
