//! The maps of IPv6, and looking things up in them. Sizes given here are defaults; the agent sets the real ones when it loads
//! the object.

use crate::maps::{self, LEASE, PORTS};
use aegis_common::*;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap};

#[map]
pub static CONFIG6: Array<Config6> = Array::with_max_entries(1, 0);
#[map]
pub static NETWORKS: HashMap<Network, NetworkValue> = HashMap::with_max_entries(MAX_ADDRESSES, 0);
#[map]
pub static PODS6: HashMap<Pod6Key, Pod6Value> = HashMap::with_max_entries(4096, 0);
#[map]
pub static SUFFIXES: HashMap<u32, SuffixValue> = HashMap::with_max_entries(4096, 0);
#[map]
pub static DESTINATIONS6: LpmTrie<Destination6Key, DestinationValue> = LpmTrie::with_max_entries(65536, 0);
#[map]
pub static ALLOCATIONS6: Array<Allocation6Value> = Array::with_max_entries(MAX_ALLOCATIONS, 0);
/// Which /64 flows have chosen. What is forgotten here is decided anew.
#[map]
pub static FLOWS6: LruHashMap<Flow6Key, Flow6Value> = LruHashMap::with_max_entries(65536, 0);
/// Which flows datagrams belong to that come in in fragments: for metering alone.
#[map]
pub static FRAGMENTED6_IN: LruHashMap<Flow6Key, Datagram6Value> = LruHashMap::with_max_entries(4096, 0);
/// For which /64s neighbour solicitations are answered.
#[map]
pub static NDP_ANSWERS: HashMap<NdpKey, NdpValue> =
    HashMap::with_max_entries(MAX_ARP_ANSWERS, BPF_F_NO_PREALLOC);

/// The settings; `None` while IPv6 packets pass untouched.
#[inline(always)]
pub fn config() -> Option<&'static Config6> {
    CONFIG6.get(0).filter(|config| config.active != 0)
}

/// The egress /64 that contains an address.
#[inline(always)]
pub fn network(address: &Address6) -> Option<NetworkValue> {
    // SAFETY: copied at once; who holds which slice is one word in `SLOTS`.
    unsafe { NETWORKS.get(&network_of(address)) }.copied()
}

/// A local pod, `None` while it is unknown.
#[inline(always)]
pub fn pod(generation: u32, address: &Address6) -> Option<Pod6Value> {
    let key = Pod6Key { generation, address: *address };
    // SAFETY: copied at once. An address changes hands by way of being unknown, so the halves always fit together.
    unsafe { PODS6.get(&key) }.copied()
}

/// Whether the address lies in a range from which this node's pods get theirs.
#[inline(always)]
pub fn in_pod_range(config: &Config6, address: &Address6) -> bool {
    let mut at = 0;
    while at < MAX_POD_RANGES6 {
        let range = &config.pod_ranges[at];
        let inside = |word: usize| address[word] & range.mask[word] == range.network[word];
        if (at as u32) < config.pod_range_count && inside(0) && inside(1) && inside(2) && inside(3) {
            return true;
        }
        at += 1;
    }
    false
}

/// Class of a destination, `None` if no binding names it.
#[inline(always)]
pub fn destination_class(generation: u32, address: &Address6) -> Option<u32> {
    let key = Key::new(160, Destination6Key { generation, address: *address });
    DESTINATIONS6.get(&key).map(|destination| destination.class)
}

/// What the policy says of packets of a pod class in a flow: the verdict, packed, 0 if it is not covered.
/// `any_port`: the packet has none. That of ICMPv6 is 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn look_up_verdict6(
    generation: u32,
    pod_class: u32,
    flow: *const Flow6Key,
    any_port: u32,
) -> u64 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return u64::from(ACTION_DENY) };
    let destination_class = destination_class(generation, &flow.remote);
    if destination_class == Some(DESTINATION_INTERNAL) {
        return u64::from(ACTION_PASS);
    }
    if pod_class == POD_REFUSED {
        return u64::from(ACTION_DENY);
    }
    let Some(destination_class) = destination_class else { return u64::from(ACTION_PASS) };
    let mut port_class = 0;
    if any_port == 0 {
        let key = PortKey { generation, protocol: flow.protocol as u16, port: (flow.ports as u16).to_be() };
        if let Some(class) = PORTS.get(&Key::new(64, key)) {
            port_class = *class;
        }
    }
    maps::verdict_of(VerdictKey { generation, pod_class, destination_class, port_class })
}

/// Which deadline of a /64 has passed. The clock is read last: an old lease only makes one pass earlier.
#[inline(always)]
pub fn deadline(network: &NetworkValue) -> Deadline {
    if network.hard == 0 {
        return Deadline::Ahead;
    }
    let Some(lease) = LEASE.get_ptr(0) else { return Deadline::Hard };
    // SAFETY: an aligned word in a map's value, which the agent may be writing.
    let renewed = unsafe { (&raw const (*lease).renewed).read_volatile() };
    let holding = HoldingValue { soft: network.soft, hard: network.hard, ..NOTHING_HELD };
    // SAFETY: no arguments.
    passed(&holding, renewed, unsafe { bpf_ktime_get_boot_ns() })
}

const NOTHING_HELD: HoldingValue = HoldingValue { allowed: [0; 4], epoch: 0, soft: 0, hard: 0 };
