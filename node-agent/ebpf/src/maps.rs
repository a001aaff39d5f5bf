//! The maps. Sizes given here are defaults; the agent sets the real ones when it loads the object.

use crate::headers;
use crate::opening::Opening;
use aegis_common::*;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, Queue, RingBuf};

#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
pub static ADDRESSES: HashMap<u32, AddressValue> = HashMap::with_max_entries(MAX_ADDRESSES, 0);
#[map]
pub static SLOTS: Array<SlotValue> = Array::with_max_entries(MAX_ADDRESSES * SLOTS_PER_ADDRESS, 0);
#[map]
pub static PEERS: Array<PeerValue> = Array::with_max_entries(MAX_PEERS, 0);
#[map]
pub static PEER_INDEX: HashMap<u32, u32> = HashMap::with_max_entries(MAX_PEERS, 0);
#[map]
pub static HOMES: Array<FragmentHome> = Array::with_max_entries(MAX_ADDRESSES * HOMES_PER_ADDRESS, 0);
#[map]
pub static HOLDINGS: HashMap<u32, HoldingValue> = HashMap::with_max_entries(MAX_ADDRESSES, 0);
/// Slices of this node's that are for sockets, by egress address: see `bind`.
#[map]
pub static BINDS: HashMap<u32, BindValue> = HashMap::with_max_entries(MAX_ADDRESSES, 0);
#[map]
pub static LEASE: Array<LeaseValue> = Array::with_max_entries(1, 0);
#[map]
pub static PODS: HashMap<PodKey, PodValue> = HashMap::with_max_entries(4096, 0);
/// Pods of the host network, by control group: see `host`.
#[map]
pub static HOSTS: HashMap<HostKey, HostValue> = HashMap::with_max_entries(4096, 0);
/// Sockets of such pods (by cookie) whose connection left from an egress address, with the digest of its key: when the flow is
/// lost, it must not go on with the node's. An LRU map, since a forgotten one matters only to a connection that was lost first.
#[map]
pub static HOST_SOCKETS: LruHashMap<u64, u32> = LruHashMap::with_max_entries(16384, 0);
#[map]
pub static DESTINATIONS: LpmTrie<DestinationKey, DestinationValue> = LpmTrie::with_max_entries(65536, 0);
#[map]
pub static PORTS: LpmTrie<PortKey, u32> = LpmTrie::with_max_entries(65536, 0);
#[map]
pub static VERDICTS: HashMap<VerdictKey, VerdictValue> = HashMap::with_max_entries(262144, BPF_F_NO_PREALLOC);
#[map]
pub static ALLOCATIONS: Array<AllocationValue> = Array::with_max_entries(MAX_ALLOCATIONS, 0);
#[map]
pub static BLOCKS: HashMap<BlockKey, BlockValue> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
/// The flow tables: see `table`. The agent reads them in its own memory.
#[map]
pub static FORWARD: Array<Bucket<ForwardValue>> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
#[map]
pub static REVERSE: Array<Bucket<ReverseValue>> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
/// What they are like, and how many entries are in.
#[map]
pub static TABLES: Array<TableValue> = Array::with_max_entries(2, BPF_F_MMAPABLE);
#[map]
pub static FRAGMENTS_OUT: LruHashMap<FragmentKey, FragmentValue> = LruHashMap::with_max_entries(8192, 0);
#[map]
pub static FRAGMENTS_IN: LruHashMap<FragmentKey, FragmentValue> = LruHashMap::with_max_entries(8192, 0);
/// How many identifications were given to packets of an egress address to an origin.
#[map]
pub static IDENTIFICATIONS: Array<u32> = Array::with_max_entries(COUNTERS_OF_IDENTIFICATIONS, 0);
/// Fragments that came before the first of their datagram, for the agent: an [`EarlyHeader`] and the frame.
#[map]
pub static EARLY: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
#[map]
pub static EARLY_SCRATCH: PerCpuArray<EarlyScratch> = PerCpuArray::with_max_entries(1, 0);
/// Gateways that had no port towards an origin, with the second at which they said so. What is forgotten is asked for again.
#[map]
pub static SPENT: LruHashMap<SpentKey, u32> = LruHashMap::with_max_entries(8192, 0);
/// Next hops whose MAC the kernel does not know, with the second at which one was last wanted. XDP cannot make it ask: the
/// agent does.
#[map]
pub static UNRESOLVED: LruHashMap<u32, u32> = LruHashMap::with_max_entries(256, 0);
/// Egress addresses for which this node answers ARP.
#[map]
pub static ARP_ANSWERS: HashMap<ArpKey, ArpValue> =
    HashMap::with_max_entries(MAX_ARP_ANSWERS, BPF_F_NO_PREALLOC);
#[map]
pub static COUNTERS: PerCpuArray<CounterValue> = PerCpuArray::with_max_entries(64, 0);
/// New flows that found no port, by index into `ALLOCATIONS`.
#[map]
pub static PRESSURE: PerCpuArray<PressureValue> = PerCpuArray::with_max_entries(MAX_ALLOCATIONS, 0);
/// Egress addresses of which this node expects more slices when it needs them. A value is always 1.
#[map]
pub static GROWING: HashMap<u32, u32> = HashMap::with_max_entries(MAX_ADDRESSES, 0);
/// Second at which the agent last said that it lives: without it no slices come.
#[map]
pub static PULSE: Array<u32> = Array::with_max_entries(1, 0);
/// What pods and accounts take of this node.
#[map]
pub static LOADS: HashMap<LoadKey, LoadValue> = HashMap::with_max_entries(MAX_LOADS, BPF_F_NO_PREALLOC);
/// What all of them take.
#[map]
pub static ALL_LOADS: Array<AllLoads> = Array::with_max_entries(1, 0);
/// New flows that were refused by a limit, by index into `ALLOCATIONS`.
#[map]
pub static LIMITED: PerCpuArray<LimitedValue> = PerCpuArray::with_max_entries(MAX_ALLOCATIONS, 0);
#[map]
pub static LIMITER: PerCpuArray<LimiterValue> = PerCpuArray::with_max_entries(1, 0);
/// Where a new block is put together: it is too large for the stack.
#[map]
pub static SCRATCH: PerCpuArray<BlockValue> = PerCpuArray::with_max_entries(1, 0);

/// New flows that rules have decided about, or would have.
#[map]
pub static RULES: PerCpuArray<RuleValue> = PerCpuArray::with_max_entries(2 * RULES_COUNTED, 0);
/// Flows that policies which only observe have been asked about, with the second of the last packet: each counts once. What is
/// forgotten here is counted twice, and nothing more.
#[map]
pub static OBSERVED: LruHashMap<ObservedKey, u32> = LruHashMap::with_max_entries(16384, 0);

/// Numbers of meters, by what they meter.
#[map]
pub static METER_INDEX: HashMap<MeterKey, u32> = HashMap::with_max_entries(MAX_METERS, BPF_F_NO_PREALLOC);
/// What was counted, by number.
#[map]
pub static METERS: PerCpuArray<MeterValue> = PerCpuArray::with_max_entries(MAX_METERS, 0);
/// Ports in use, by number.
#[map]
pub static METER_USE: Array<MeterUse> = Array::with_max_entries(MAX_METERS, BPF_F_MMAPABLE);
/// Numbers that nobody has.
#[map]
pub static FREE_METERS: Queue<u32> = Queue::with_max_entries(MAX_METERS, 0);
/// What of `METERS` the agent has told: its own.
#[map]
pub static METERS_TOLD: Array<MeterValue> = Array::with_max_entries(MAX_METERS, 0);
/// Meters of connections whose socket has the egress address itself, by the key that a flow would have. The agent removes what has
/// no socket any more.
#[map]
pub static BOUND_METERS: HashMap<FlowKey, u32> =
    HashMap::with_max_entries(MAX_BOUND_METERS, BPF_F_NO_PREALLOC);
/// Second since boot up to which it has told: its own.
#[map]
pub static METER_CLOCK: Array<u64> = Array::with_max_entries(1, 0);
/// New flows that were refused.
#[map]
pub static REFUSALS: HashMap<RefusalKey, u64> = HashMap::with_max_entries(MAX_REFUSALS, BPF_F_NO_PREALLOC);
/// How many of them the agent has told: its own.
#[map]
pub static REFUSALS_TOLD: HashMap<RefusalKey, u64> =
    HashMap::with_max_entries(MAX_REFUSALS, BPF_F_NO_PREALLOC);

/// What a new flow asks for, while a port is sought: see `opening`.
#[map]
pub static OPENING: PerCpuArray<Opening> = PerCpuArray::with_max_entries(1, 0);

/// 1 while flows are taken over from programs of another version.
#[map]
pub static HANDOVER: Array<u32> = Array::with_max_entries(1, 0);

/// Whether flows are just being taken over from programs of another version. Until all are here, a packet of no flow may be
/// of one of those, and a port that is free here may be taken there: nothing is made, ended or refused meanwhile.
#[inline(always)]
pub fn taking_over() -> bool {
    // SAFETY: an aligned word in a map's value, which the agent may be writing.
    HANDOVER.get(0).is_some_and(|held| unsafe { core::ptr::from_ref(held).read_volatile() } != 0)
}

/// The settings; `None` only before the agent has ever written them.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// Counts a packet of `bytes` bytes (IP header included).
#[inline(always)]
pub fn count(counter: Counter, bytes: u32) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a per-CPU value; programs on one CPU do not preempt each other between these two additions in a
        // way that matters for statistics.
        unsafe {
            (*value).packets += 1;
            (*value).bytes += u64::from(bytes);
        }
    }
}

/// Counts a new flow of an allocation that found no port.
#[inline(always)]
pub fn count_pressure(allocation: u32, by: PressureValue) {
    if let Some(value) = PRESSURE.get_ptr_mut(allocation) {
        // SAFETY: as in `count`.
        unsafe {
            (*value).waited += by.waited;
            (*value).refused += by.refused;
        }
    }
}

/// Whole seconds since boot.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: no arguments.
    (unsafe { aya_ebpf::helpers::bpf_ktime_get_boot_ns() } / 1_000_000_000) as u32
}

/// What the first fragment of a datagram led to, `None` if it did not pass or is too long ago: an LRU map forgets only
/// when it is full.
#[inline(always)]
pub fn first_fragment(
    map: &LruHashMap<FragmentKey, FragmentValue>,
    key: &FragmentKey,
) -> Option<&'static FragmentValue> {
    // SAFETY: the caller reads it at once. The map is a static, and its values stay readable until the program ends.
    let first = unsafe { &*map.get_ptr(key)? };
    (now().saturating_sub(first.seen) <= FRAGMENT_LIFE).then_some(first)
}

/// Generation of the policy. A program judges a packet by one generation from beginning to end, so it reads it once; the agent
/// removes a generation only when every packet that a program judged by it has left the host stack too.
#[inline(always)]
pub fn generation(config: &Config) -> u32 {
    // SAFETY: an aligned word in a map's value, which the agent may be writing.
    unsafe { (&raw const config.generation).read_volatile() }
}

/// A local pod, `None` while it is unknown.
#[inline(always)]
pub fn pod(generation: u32, address: u32) -> Option<PodValue> {
    let key = PodKey { generation, address };
    // SAFETY: copied at once. An address changes hands by way of being unknown, so the halves always fit together.
    unsafe { PODS.get(&key) }.copied()
}

/// A pod of the host network, or whom else a control group is of.
#[inline(always)]
pub fn host(generation: u32, group: u64) -> Option<HostValue> {
    let key = HostKey { group, generation, pad: 0 };
    // SAFETY: copied at once; values of a live generation change as a whole only.
    unsafe { HOSTS.get(&key) }.copied()
}

/// Whether a pod of this incarnation is there that has the node's addresses.
#[inline(always)]
pub fn has_host(generation: u32, incarnation: u32) -> bool {
    let key = HostKey { group: of_incarnation(incarnation), generation, pad: 0 };
    // SAFETY: only presence matters.
    unsafe { HOSTS.get(&key) }.is_some()
}

/// Whether the address lies in a range from which this node's pods get theirs.
#[inline(always)]
pub fn in_pod_range(config: &Config, address: u32) -> bool {
    let mut at = 0;
    while at < MAX_POD_RANGES {
        let range = &config.pod_ranges[at];
        if (at as u32) < config.pod_range_count && address & range.mask == range.network {
            return true;
        }
        at += 1;
    }
    false
}

/// Class of a destination, `None` if no binding names it.
#[inline(always)]
pub fn destination_class(generation: u32, address: u32) -> Option<u32> {
    let key = Key::new(64, DestinationKey { generation, address });
    DESTINATIONS.get(&key).map(|destination| destination.class)
}

/// In place of a destination port: the packet has none. (Not an `Option`: its unset half would be spilled to the
/// stack uninitialised, which the verifier refuses.)
pub const NO_PORT: u32 = u32::MAX;

/// The port by which rules judge a flow: that of ICMP, which has none, is 0.
#[inline(always)]
pub fn rules_port(key: &FlowKey) -> u32 {
    if key.protocol == headers::ICMP { 0 } else { u32::from(key.remote_port) }
}

/// What is to happen to packets of a pod class towards a destination; `None` = not covered.
#[inline(always)]
pub fn verdict(
    generation: u32,
    pod_class: u32,
    remote: u32,
    protocol: u8,
    port: u32,
) -> Option<VerdictValue> {
    let verdict = whole_verdict(generation, pod_class, remote, protocol, port);
    (verdict.action != ACTION_PASS).then_some(verdict)
}

/// The same, with who only observes.
#[inline(always)]
pub fn whole_verdict(generation: u32, pod_class: u32, remote: u32, protocol: u8, port: u32) -> VerdictValue {
    VerdictValue::unpacked(look_up_verdict(generation, pod_class, remote, u32::from(protocol), port))
}

/// A function of its own for the verifier's sake, like `take` in `ports`, and for that of the stack. Gives the verdict,
/// packed.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn look_up_verdict(generation: u32, pod_class: u32, remote: u32, protocol: u32, port: u32) -> u64 {
    let destination_class = destination_class(generation, remote);
    if destination_class == Some(DESTINATION_INTERNAL) {
        return u64::from(ACTION_PASS);
    }
    if pod_class == POD_REFUSED {
        return u64::from(ACTION_DENY);
    }
    let Some(destination_class) = destination_class else { return u64::from(ACTION_PASS) };
    let mut port_class = 0;
    if port != NO_PORT {
        let port = (port as u16).to_be();
        let key = PortKey { generation, protocol: protocol as u16, port };
        if let Some(class) = PORTS.get(&Key::new(64, key)) {
            port_class = *class;
        }
    }
    verdict_of(VerdictKey { generation, pod_class, destination_class, port_class })
}

/// The verdict for three classes, packed; 0 = not covered. A port whose class has no verdict of its own is
/// like any other.
#[inline(always)]
pub fn verdict_of(mut key: VerdictKey) -> u64 {
    // SAFETY: verdicts of a live generation are not changed.
    let mut verdict = unsafe { VERDICTS.get(&key) };
    if verdict.is_none() && key.port_class != 0 {
        key.port_class = 0;
        // SAFETY: as above.
        verdict = unsafe { VERDICTS.get(&key) };
    }
    verdict.map_or(u64::from(ACTION_PASS), VerdictValue::packed)
}
