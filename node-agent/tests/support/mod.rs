//! A node's data plane without a node: the real programs and maps, run packet by packet (`BPF_PROG_TEST_RUN`).
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is what they are for"
)]

pub mod exact;
pub mod gateway;
pub mod meter;
pub mod packet;
pub mod six;

use aegis_common::*;
use aegis_node_agent::carry::Step;
use aegis_node_agent::ebpf::{Dataplane, MapSizes};
use aegis_node_agent::load::{ALL, Found, fixes};
use aegis_node_agent::raw as bytes;
use aegis_node_agent::sweep::for_each;
use aegis_node_agent::test_run::{self, Outcome};
use aya::maps::lpm_trie::Key;
use aya::maps::{Map, MapData, RingBuf};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

pub const MARK: u32 = 0x1000;
/// Another bit of the mark, which must survive.
pub const OTHER_MARK: u32 = 0x4000;
pub const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 5);
pub const POD_2: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 6);
/// A pod that nothing covers.
pub const FREE_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 7);
/// An address of the node's pod range that nobody has named.
pub const UNKNOWN_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 99);
pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub const NODE_2: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub const MAC_2: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const EGRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const EGRESS_2: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// Covered for [`POD`]: leaves from [`EGRESS`].
pub const ORIGIN: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// Covered for [`POD`], but there is nothing to leave from.
pub const DENIED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
/// Covered for [`POD`] only on TCP ports 440 to 443.
pub const WEB: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 200);
/// Named by no binding.
pub const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 101, 1);
/// The slice of [`EGRESS`] that the node holds, and the one that the other node holds.
pub const SLICE: u16 = 8;
pub const SLICE_2: u16 = 16;

pub const TCX_NEXT: u32 = -1i32 as u32;
pub const TCX_DROP: u32 = 2;
pub const TCX_REDIRECT: u32 = 7;
pub const XDP_DROP: u32 = 1;
pub const XDP_PASS: u32 = 2;
pub const XDP_TX: u32 = 3;

/// Size and places of fields of `struct __sk_buff`.
const CONTEXT: usize = 192;
const CONTEXT_MARK: usize = 8;
const CONTEXT_IFINDEX: usize = 40;
const CONTEXT_GSO_SEGS: usize = 164;
const CONTEXT_GSO_SIZE: usize = 176;

/// A bpffs that only this thread (and those it starts) can see.
struct Bpffs {
    path: PathBuf,
}

impl Bpffs {
    fn mount() -> Bpffs {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        assert!(nix::unistd::geteuid().is_root(), "this test loads eBPF programs: run it as root");
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace of the test's own");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let name = format!("aegis-xdp-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), None::<&str>).expect("a bpffs");
        Bpffs { path }
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.path);
    }
}

/// IPv4 address as maps hold it.
pub fn raw(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

/// Whole seconds since boot.
pub fn now() -> u32 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap();
    time.tv_sec() as u32
}

/// What a classifier did.
#[derive(Debug, PartialEq, Eq)]
pub struct Classified {
    pub verdict: u32,
    pub frame: Vec<u8>,
    pub mark: u32,
}

/// One node's programs and maps.
pub struct World {
    pub plane: Dataplane,
    /// Counters as they were when last looked at.
    before: Vec<u64>,
    mount: Bpffs,
}

impl World {
    /// Maps with the standard content: see the constants of this module.
    pub fn new() -> World {
        World::sized(&MapSizes { flows: 4096, blocks: 1024, ..MapSizes::default() })
    }

    pub fn sized(sizes: &MapSizes) -> World {
        let mount = Bpffs::mount();
        let plane = match Dataplane::load(&mount.path, sizes) {
            Ok(plane) => plane,
            Err(error) => panic!("{error}"),
        };
        let mut world = World { plane, before: vec![0; Counter::ALL.len()], mount };
        world.set_config(&config());
        world.set_lease(LeaseValue { renewed: 0, soonest: NEVER });
        for (index, address, mac, ifindex) in [(1, NODE, [0; 6], 0), (2, NODE_2, MAC_2, 1)] {
            let peer = PeerValue { address: raw(address), mac, flags: 0, ifindex };
            world.plane.array("PEERS").unwrap().set(index, peer, 0).unwrap();
            world.plane.hash("PEER_INDEX").unwrap().insert(raw(address), index, 0).unwrap();
        }
        for (index, address) in [(0, EGRESS), (1, EGRESS_2)] {
            let value = AddressValue { index, allocation: 0 };
            world.plane.hash("ADDRESSES").unwrap().insert(raw(address), value, 0).unwrap();
        }
        world.own(0, SLICE, 1);
        world.own(0, SLICE_2, 2);
        world.own(1, SLICE, 1);
        world.allow(EGRESS, &[SLICE]);
        world.allow(EGRESS_2, &[SLICE]);
        world.allocation(&[EGRESS], Timeouts::default());
        world.policy(1);
        world
    }

    /// Below which the maps are pinned.
    pub fn root(&self) -> &std::path::Path {
        &self.mount.path
    }

    /// Loads another version, whose schema has this number, beside this one; gives what this one's programs are, to go on with.
    pub fn load_beside(&mut self, schema: u32, known: &'static [Step], sizes: &MapSizes) -> Dataplane {
        let new = Dataplane::load_as(&self.mount.path, schema, sizes, known).unwrap();
        self.before = vec![0; Counter::ALL.len()];
        std::mem::replace(&mut self.plane, new)
    }

    fn policy(&mut self, generation: u32) {
        for (pod, class) in [(POD, 1), (POD_2, 1), (FREE_POD, 0)] {
            self.pod_class(generation, pod, class);
        }
        for (network, length, class) in [
            (ORIGIN, 24, 1),
            (DENIED, 25, 2),
            (Ipv4Addr::new(203, 0, 113, 128), 25, 3),
            (Ipv4Addr::new(10, 244, 0, 0), 16, DESTINATION_INTERNAL),
        ] {
            let key = Key::new(32 + length, DestinationKey { generation, address: raw(network) });
            self.plane.trie("DESTINATIONS").unwrap().insert(&key, DestinationValue { class }, 0).unwrap();
        }
        let port = PortKey { generation, protocol: 6, port: 440u16.to_be() };
        self.plane.trie("PORTS").unwrap().insert(&Key::new(48 + 14, port), 1u32, 0).unwrap();
        for (destination_class, port_class, action) in [
            // Whatever the port, but for class 3.
            (1, 0, ACTION_ALLOCATE),
            (2, 0, ACTION_DENY),
            (3, 1, ACTION_ALLOCATE),
        ] {
            let key = VerdictKey { generation, pod_class: 1, destination_class, port_class };
            let value = VerdictValue { action, binding: 3, ..Default::default() };
            self.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
        }
    }

    pub fn pod_class(&mut self, generation: u32, pod: Ipv4Addr, class: u32) {
        self.set_pod(generation, pod, PodValue { class, incarnation: INCARNATION, ..PodValue::default() });
    }

    pub fn set_pod(&mut self, generation: u32, pod: Ipv4Addr, value: PodValue) {
        self.plane.hash("PODS").unwrap().insert(PodKey { generation, address: raw(pod) }, value, 0).unwrap();
    }

    /// The next pod with an address, of a class.
    pub fn next_pod(&mut self, pod: Ipv4Addr, class: u32) {
        self.set_pod(1, pod, PodValue { class, incarnation: INCARNATION + 1, ..PodValue::default() });
    }

    /// Nobody has the address any more.
    pub fn remove_pod(&mut self, pod: Ipv4Addr) {
        let key = PodKey { generation: 1, address: raw(pod) };
        self.plane.hash::<_, PodValue>("PODS").unwrap().remove(&key).unwrap();
    }

    /// Makes the origin's packets from pods of class 2 leave from [`EGRESS_2`].
    pub fn second_account(&mut self) {
        let mut value =
            AllocationValue { count: 1, max_resting: ANY_NUMBER, account: ACCOUNT_2, ..Default::default() };
        value.addresses[0] = raw(EGRESS_2);
        self.plane.array("ALLOCATIONS").unwrap().set(1, value, 0).unwrap();
        let key = VerdictKey { generation: 1, pod_class: 2, destination_class: 1, port_class: 0 };
        let value = VerdictValue {
            action: ACTION_ALLOCATE,
            allocation: 1,
            secondary: 1,
            binding: 4,
            ..Default::default()
        };
        self.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
    }

    pub fn set_config(&mut self, config: &Config) {
        self.plane.array("CONFIG").unwrap().set(0, *config, 0).unwrap();
    }

    /// Makes `peer` the owner of a slice.
    pub fn own(&mut self, address: u32, slice: u16, peer: u32) {
        let index = address << 8 | u32::from(slice);
        self.plane.array("SLOTS").unwrap().set(index, SlotValue { peer, epoch: 1 }, 0).unwrap();
    }

    /// Makes `peer` the home of all fragments of an address.
    pub fn home(&mut self, address: u32, peer: u32) {
        for at in 0..HOMES_PER_ADDRESS {
            self.plane.array("HOMES").unwrap().set(address * HOMES_PER_ADDRESS + at, peer, 0).unwrap();
        }
    }

    /// Sets the slices from which new flows may be opened.
    pub fn allow(&mut self, address: Ipv4Addr, slices: &[u16]) {
        let mut value = HoldingValue { epoch: 1, ..Default::default() };
        for slice in slices {
            value.allowed[usize::from(slice >> 6)] |= 1 << (slice & 63);
        }
        self.plane.hash("HOLDINGS").unwrap().insert(raw(address), value, 0).unwrap();
    }

    /// Gives an address deadlines.
    pub fn fence(&mut self, address: Ipv4Addr, soft: u32, hard: u32) {
        let mut holdings = self.plane.hash::<u32, HoldingValue>("HOLDINGS").unwrap();
        let value = holdings.get(&raw(address), 0).unwrap();
        holdings.insert(raw(address), HoldingValue { soft, hard, ..value }, 0).unwrap();
    }

    /// The Lease was renewed so long ago, while the shortest time of an address is `soonest` seconds.
    pub fn renewed(&mut self, seconds_ago: u64, shortest: u32) {
        let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap();
        let now = time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64;
        let renewed = now - seconds_ago * 1_000_000_000;
        self.set_lease(LeaseValue { renewed, soonest: soonest(renewed, Some(shortest)) });
    }

    pub fn set_lease(&mut self, value: LeaseValue) {
        self.plane.array("LEASE").unwrap().set(0, value, 0).unwrap();
    }

    pub fn allocation(&mut self, addresses: &[Ipv4Addr], timeouts: Timeouts) {
        let count = addresses.len() as u32;
        let mut value = AllocationValue {
            count,
            timeouts,
            max_resting: ANY_NUMBER,
            account: ACCOUNT,
            ..Default::default()
        };
        for (place, address) in value.addresses.iter_mut().zip(addresses) {
            *place = raw(*address);
        }
        self.plane.array("ALLOCATIONS").unwrap().set(0, value, 0).unwrap();
    }

    /// How long ports of the allocation rest, and how many may.
    pub fn bound_rest(&mut self, timeouts: Timeouts, max_resting: u32) {
        let mut allocations = self.plane.array::<AllocationValue>("ALLOCATIONS").unwrap();
        let value = allocations.get(&0, 0).unwrap();
        allocations.set(0, AllocationValue { timeouts, max_resting, ..value }, 0).unwrap();
    }

    pub fn program(&self, name: &'static str) -> BorrowedFd<'_> {
        self.plane.program_fd(name).unwrap().as_fd()
    }

    fn classify(&self, program: &'static str, frame: &[u8], mark: u32) -> Classified {
        let outcome = classify(self.program(program), frame, mark);
        let mark = u32::from_ne_bytes(outcome.context[CONTEXT_MARK..CONTEXT_MARK + 4].try_into().unwrap());
        Classified { verdict: outcome.verdict, frame: outcome.packet, mark }
    }

    /// A frame from a pod.
    pub fn pod(&self, frame: &[u8], mark: u32) -> Classified {
        self.classify("pod_ingress", frame, mark)
    }

    /// A covered frame that leaves the node.
    pub fn out(&self, frame: &[u8]) -> Classified {
        self.classify("uplink_egress", frame, MARK)
    }

    /// A frame that leaves the node without the mark.
    pub fn out_unmarked(&self, frame: &[u8]) -> Classified {
        self.classify("uplink_egress", frame, 0)
    }

    /// A frame that arrives at the uplink: verdict and frame. Fails unless exactly the frames that are translated back here have
    /// the word before them that says so: those that the host stack gets, with another destination.
    pub fn back(&self, frame: &[u8]) -> (u32, Vec<u8>) {
        let context = xdp_context(frame.len());
        let outcome = test_run::run(self.program("uplink_ingress"), frame, &context, 1).unwrap();
        // The kernel gives the frame from its metadata on.
        let start = u32::from_ne_bytes(outcome.context[..4].try_into().unwrap()) as usize;
        let (word, packet) = outcome.packet.split_at(start);
        let translated = outcome.verdict == XDP_PASS && packet != frame;
        let expected = if translated { TRANSLATED_IN.to_ne_bytes().to_vec() } else { Vec::new() };
        assert_eq!(word, expected, "metadata");
        (outcome.verdict, packet.to_vec())
    }

    /// Labels of the counters that grew since the last call, with by how many packets.
    pub fn counted(&mut self) -> Vec<(&'static str, u64)> {
        let after: Vec<u64> = {
            let map = self.plane.per_cpu::<CounterValue>("COUNTERS").unwrap();
            Counter::ALL
                .iter()
                .map(|counter| {
                    map.get(&(*counter as u32), 0).unwrap().iter().map(|value| value.packets).sum()
                })
                .collect()
        };
        let before = std::mem::replace(&mut self.before, after.clone());
        let grown = Counter::ALL.iter().zip(before.iter().zip(after)).filter(|(_, (old, new))| *old != new);
        grown.map(|(counter, (old, new))| (counter.label(), new - old)).collect()
    }

    pub fn forward(&self, key: &FlowKey) -> Option<ForwardValue> {
        let mut found = None;
        self.plane
            .forward()
            .unwrap()
            .for_each(|other, value| found = found.or((other == key).then_some(*value)));
        found
    }

    pub fn reverse(&self, key: &FlowKey) -> Option<ReverseValue> {
        let mut found = None;
        self.plane
            .reverse()
            .unwrap()
            .for_each(|other, value| found = found.or((other == key).then_some(*value)));
        found
    }

    /// Enters a flow, or replaces it.
    pub fn set_forward(&self, key: FlowKey, value: ForwardValue) {
        assert_eq!(self.plane.enter().unwrap().set(&[(key, value)]).unwrap(), 1, "no room for {key:?}");
    }

    /// Enters a way back, or replaces it.
    pub fn set_reverse(&self, key: FlowKey, value: ReverseValue) {
        assert_eq!(self.plane.enter().unwrap().set(&[(key, value)]).unwrap(), 1, "no room for {key:?}");
    }

    /// Removes a flow, but not its way back.
    pub fn remove_forward(&self, key: &FlowKey) {
        assert_eq!(self.plane.enter().unwrap().remove::<ForwardValue>(&[*key]).unwrap(), 1, "{key:?}");
    }

    pub fn block(&mut self, key: &BlockKey) -> Option<BlockValue> {
        self.plane.hash("BLOCKS").unwrap().get(key, 0).ok()
    }

    /// Makes what a fragment map remembers older.
    pub fn age_fragments(&mut self, map: &'static str, seconds: u32) {
        let entries: Vec<(FragmentKey, FragmentValue)> = self.entries(map);
        assert!(!entries.is_empty(), "{map} remembers something");
        for (key, value) in entries {
            let value = FragmentValue { seen: value.seen - seconds, ..value };
            self.plane.hash(map).unwrap().insert(key, value, 0).unwrap();
        }
    }

    /// Fragments that the agent is given, since the last call.
    pub fn early(&self) -> Vec<(EarlyHeader, Vec<u8>)> {
        let mut ring: RingBuf<MapData> = self.plane.handle("EARLY", Map::RingBuf).unwrap();
        let mut found = Vec::new();
        while let Some(record) = ring.next() {
            let (header, frame) = record.split_at(size_of::<EarlyHeader>());
            found.push((aegis_node_agent::raw::from_bytes(header).unwrap(), frame.to_vec()));
        }
        found
    }

    /// Flows and bitmaps that should be counted of pods, accounts and all together.
    fn expected_loads(&self) -> BTreeMap<LoadKey, (u32, u32)> {
        let mut found = Found::default();
        self.entries("FORWARD").iter().for_each(|(key, flow)| found.add_flow(key, flow));
        self.entries("BLOCKS").iter().for_each(|(key, _): &(BlockKey, BlockValue)| found.add_block(key));
        let allocations = self.entries("ALLOCATIONS").into_iter().collect();
        let addresses = self.entries("ADDRESSES").into_iter().collect();
        found.counts(&allocations, &addresses)
    }

    /// What is counted of them.
    fn counted_loads(&self) -> HashMap<LoadKey, LoadValue> {
        let all: Vec<(u32, AllLoads)> = self.entries("ALL_LOADS");
        let all =
            LoadValue { key: ALL, flows: all[0].1.flows, blocks: all[0].1.blocks, ..LoadValue::default() };
        self.entries("LOADS").into_iter().chain([(ALL, all)]).collect()
    }

    /// Fails unless what is counted is what there is.
    pub fn loads_are_right(&self) {
        let counted = self.counted_loads().into_iter().map(|(key, value)| {
            assert_eq!(value.key, key);
            (key, (i64::from(count(value.flows)), i64::from(count(value.blocks))))
        });
        let expected = self.expected_loads().into_iter();
        let expected = expected.map(|(key, (flows, blocks))| (key, (i64::from(flows), i64::from(blocks))));
        let some = |(_, counts): &(LoadKey, (i64, i64))| *counts != (0, 0);
        let counted: BTreeMap<_, _> = counted.filter(some).collect();
        assert_eq!(counted, expected.filter(some).collect());
    }

    /// Sets right what is counted of pods and accounts, after entries were written past the programs.
    pub fn recount(&self) {
        let counted = self.counted_loads();
        let fixes = fixes(&counted, &self.expected_loads(), &counted, now());
        self.plane.sweeper().unwrap().loads(&fixes).unwrap();
    }

    /// All entries of a hash map, of an array or of a flow table.
    pub fn entries<K: aya::Pod, V: aya::Pod>(&self, map: &'static str) -> Vec<(K, V)> {
        let mut found = Vec::new();
        match map {
            "FORWARD" => self.plane.forward().unwrap().for_each(|key, value| found.push(entry(key, value))),
            "REVERSE" => self.plane.reverse().unwrap().for_each(|key, value| found.push(entry(key, value))),
            _ => {
                for_each(self.plane.map_fd(map).unwrap(), |key: &K, value: &V| found.push((*key, *value)))
                    .unwrap();
            }
        }
        found
    }

    /// What a flow table is like.
    pub fn table(&self, index: u32) -> TableValue {
        let tables: Vec<(u32, TableValue)> = self.entries("TABLES");
        tables[index as usize].1
    }

    /// Makes both flow tables, which must be empty, so small: buckets of the keys' own, further ones, and most flows.
    pub fn shrink_tables(&mut self, own: u32, further: u32, limit: u32) {
        for index in [FORWARD_TABLE, REVERSE_TABLE] {
            let value = TableValue { own, further, limit, ..self.table(index) };
            assert_eq!(value.used, 0);
            self.plane.array("TABLES").unwrap().set(index, value, 0).unwrap();
        }
    }

    /// Fails unless every entry of a flow table is where its key can be, and all counts are exact.
    fn exact<V: aya::Pod>(&self, index: u32, map: &'static str)
    where
        Bucket<V>: aya::Pod,
    {
        let table = self.table(index);
        let mut buckets = Vec::new();
        for_each(self.plane.map_fd(map).unwrap(), |at: &u32, bucket: &Bucket<V>| {
            buckets.push((*at, *bucket))
        })
        .unwrap();
        let mut spilled = vec![0; buckets.len()];
        let mut used = 0;
        for (at, bucket) in &buckets {
            for (tag, way) in bucket.tags.iter().zip(&bucket.ways) {
                assert_eq!(tag & PENDING, 0, "{map}: nobody is entering anything");
                if tag & TAG == 0 {
                    continue;
                }
                used += 1;
                let spots = table.spots(hash(&table.seed, &way.key));
                let level = (0..3).find(|level| spots.bucket(*level) == *at).expect("a bucket of the key");
                (0..level).for_each(|passed| spilled[spots.bucket(passed) as usize] += 1);
            }
        }
        assert_eq!(table.used, used, "{map}: entries counted");
        let counted: Vec<u32> = buckets.iter().map(|(_, bucket)| bucket.spilled).collect();
        assert_eq!(counted, spilled, "{map}: entries that went on, by bucket");
    }

    /// Fails unless bitmaps, their counts, FORWARD, REVERSE and what is counted of pods and accounts say the same. Returns the
    /// number of flows.
    pub fn consistent(&self) -> usize {
        self.exact::<ForwardValue>(FORWARD_TABLE, "FORWARD");
        self.exact::<ReverseValue>(REVERSE_TABLE, "REVERSE");
        self.loads_are_right();
        let forward: Vec<(FlowKey, ForwardValue)> = self.entries("FORWARD");
        let reverse: std::collections::HashMap<FlowKey, ReverseValue> =
            self.entries("REVERSE").into_iter().collect();
        assert_eq!(forward.len(), reverse.len(), "as many flows out as back");
        for (key, value) in &forward {
            let back = FlowKey { local: value.egress, local_port: value.egress_port, ..*key };
            let entry = reverse.get(&back).unwrap_or_else(|| panic!("{back:?} is missing in REVERSE"));
            assert_eq!((entry.pod, entry.pod_port, entry.peer), (key.local, key.local_port, value.peer));
            assert!(value.is_of(key) && entry.digest == back.digest(), "{key:?}");
        }
        let mut expected: std::collections::HashMap<BlockKey, [u64; WORDS_PER_BLOCK]> = Default::default();
        // A flow through a gateway has no port here.
        for (key, value) in forward.iter().filter(|(key, value)| value.egress != key.local) {
            let block = BlockKey {
                egress: value.egress,
                remote: key.remote,
                remote_port: key.remote_port,
                protocol: key.protocol,
                block: (value.egress_port >> 11) as u8,
            };
            let slice = u32::from(value.egress_port >> 8);
            let place = place_of_port(value.egress_port as u8, permutation_key(SEED, &block, slice));
            let bit = (slice & 7) << 8 | u32::from(place);
            expected.entry(block).or_default()[(bit >> 6) as usize] |= 1 << (bit & 63);
        }
        for (key, value) in self.entries::<BlockKey, BlockValue>("BLOCKS") {
            assert_eq!(value.key, key);
            assert_eq!(value.words, expected.remove(&key).unwrap_or_default(), "bitmap of {key:?}");
            let set: u32 = value.words.iter().map(|word| word.count_ones()).sum();
            assert_eq!(value.used, set, "used of {key:?}");
            assert!(value.high >= value.used);
            for (at, word) in value.words.iter().enumerate() {
                assert!(value.full >> at & 1 == 0 || *word == u64::MAX, "summary of {key:?}");
            }
        }
        assert!(expected.is_empty(), "flows without a bitmap: {:?}", expected.keys());
        forward.len()
    }
}

/// A flow's entry under the names of its types that a caller has.
fn entry<K: aya::Pod, V: aya::Pod>(key: &impl aya::Pod, value: &impl aya::Pod) -> (K, V) {
    let (key, value) = (bytes::from_bytes(bytes::bytes(key)), bytes::from_bytes(bytes::bytes(value)));
    key.zip(value).unwrap()
}

/// Runs a classifier on a frame that is yet to be cut into segments with so many bytes of payload.
pub fn classify_segments(program: BorrowedFd<'_>, frame: &[u8], mark: u32, segment: u32) -> Outcome {
    let mut context = context(mark);
    context[CONTEXT_GSO_SEGS..CONTEXT_GSO_SEGS + 4].copy_from_slice(&2u32.to_ne_bytes());
    context[CONTEXT_GSO_SIZE..CONTEXT_GSO_SIZE + 4].copy_from_slice(&segment.to_ne_bytes());
    test_run::run(program, frame, &context, 1).unwrap()
}

/// Runs a classifier on a frame with a mark.
pub fn classify(program: BorrowedFd<'_>, frame: &[u8], mark: u32) -> Outcome {
    test_run::run(program, frame, &context(mark), 1).unwrap()
}

/// A `struct xdp_md` for a frame of so many bytes.
fn xdp_context(length: usize) -> [u8; 24] {
    let mut context = [0; 24];
    context[4..8].copy_from_slice(&(length as u32).to_ne_bytes());
    context
}

/// A `struct __sk_buff` with a mark, on the loopback device.
pub fn context(mark: u32) -> Vec<u8> {
    let mut context = vec![0; CONTEXT];
    context[CONTEXT_MARK..CONTEXT_MARK + 4].copy_from_slice(&mark.to_ne_bytes());
    context[CONTEXT_IFINDEX..CONTEXT_IFINDEX + 4].copy_from_slice(&1u32.to_ne_bytes());
    context
}

/// Whose the first allocation is, and the second.
pub const ACCOUNT: u64 = 0xacc1_acc1_acc1_acc1;
pub const ACCOUNT_2: u64 = 0xacc2_acc2_acc2_acc2;
pub const SEED: u32 = 0x5eed_0001;
/// Which of the pods that have had its address each pod is.
pub const INCARNATION: u32 = 7;

/// The standard settings.
pub fn config() -> Config {
    let mut config = Config {
        generation: 1,
        mark: MARK,
        tunnel_address: raw(NODE),
        tunnel_port: 6081,
        own_peer: 1,
        hold_unknown: 1,
        seed: SEED,
        tunnel_mtu: 1464,
        mss: 1424,
        refusals_per_second: 1_000_000,
        pod_range_count: 1,
        ..Default::default()
    };
    config.pod_ranges[0] =
        PodRange { network: raw(Ipv4Addr::new(10, 244, 1, 0)), mask: raw(Ipv4Addr::new(255, 255, 255, 0)) };
    config
}

/// Key in FORWARD of a flow.
pub fn flow(protocol: u8, local: (Ipv4Addr, u16), remote: (Ipv4Addr, u16)) -> FlowKey {
    FlowKey {
        local: raw(local.0),
        remote: raw(remote.0),
        local_port: local.1,
        remote_port: remote.1,
        protocol,
        pad: [0; 3],
    }
}

/// Key of the block with a port towards an origin.
pub fn block(protocol: u8, egress: (Ipv4Addr, u16), remote: (Ipv4Addr, u16)) -> BlockKey {
    BlockKey {
        egress: raw(egress.0),
        remote: raw(remote.0),
        remote_port: remote.1,
        protocol,
        block: (egress.1 >> 11) as u8,
    }
}
