//! An upgrade to another layout of the maps: flows go on, and no port is given twice.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aegis_node_agent::carry::{Change, Entry, SERIES, STEPS, Step};
use aegis_node_agent::ebpf::MapSizes;
use aegis_node_agent::flows::Table;
use aegis_node_agent::meter::Maps;
use aegis_node_agent::observed::NO_ALLOCATION;
use aegis_node_agent::raw::{self, Sizes};
use aegis_node_agent::sweep::for_each;
use aya::maps::MapData;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use support::packet::{ACK, Packet, SYN};
use support::six::{self, NETWORK, NETWORK_2, ORIGIN6, POD6, Packet6, pod_outside};
use support::*;

const SIZES: MapSizes = MapSizes {
    flows: 4096,
    blocks: 1024,
    pods: 1 << 12,
    destinations: 1 << 16,
    ports: 1 << 16,
    verdicts: 1 << 17,
    meters: 1 << 12,
    metered: true,
};
/// Layouts of the same version under other numbers.
const OTHER: u32 = SCHEMA + SERIES;

fn segment(pod_port: u16, flags: u8) -> Packet {
    Packet::tcp((POD, pod_port), (ORIGIN, 443), flags)
}

/// Egress ports by pod port; `None` if the packet does not leave.
fn sent(world: &World, pod_ports: std::ops::Range<u16>, flags: u8) -> BTreeMap<u16, Option<u16>> {
    let leaves = |port: u16| {
        let out = world.out(&segment(port, flags).frame());
        (out.verdict == TCX_NEXT).then(|| u16::from_be_bytes([out.frame[34], out.frame[35]]))
    };
    pod_ports.map(|port| (port, leaves(port))).collect()
}

fn none() -> BTreeSet<u32> {
    BTreeSet::new()
}

#[test]
fn xdp_carry_flows_keep_their_ports_and_no_port_is_given_twice() {
    let mut world = World::sized(&SIZES);
    let before = sent(&world, 10_000..10_150, SYN);
    let mut old = world.load_beside(OTHER, STEPS, &SIZES);
    // While the new agent starts, the old programs go on: some flows more, and one less whose port is another's now.
    std::mem::swap(&mut world.plane, &mut old);
    let later = sent(&world, 10_150..10_200, SYN);
    std::mem::swap(&mut world.plane, &mut old);
    drop(old);
    world.plane.take_over(&none(), now()).unwrap();

    assert_eq!(world.consistent(), 200);
    assert_eq!(sent(&world, 10_000..10_150, ACK), before, "each by its port");
    assert_eq!(sent(&world, 10_150..10_200, ACK), later, "also those that were made last");
    assert_eq!(world.counted().iter().find(|(label, _)| *label == "carried"), Some(&("carried", 200)));
    // All of the slice's ports that are left, and not one more.
    let new = sent(&world, 20_000..20_060, SYN);
    let ports: BTreeSet<u16> =
        before.values().chain(later.values()).chain(new.values()).copied().flatten().collect();
    assert_eq!(ports.len(), 256);
    assert_eq!(new.values().flatten().count(), 56);
    assert_eq!(world.consistent(), 256);
    assert!(!world.root().join(format!("v{SCHEMA}")).exists(), "nothing is left of the version before");
}

#[test]
fn xdp_carry_flows_count_as_in_use_until_they_end() {
    let mut world = World::sized(&SIZES);
    let mut meters = Maps::open(&world.plane).unwrap();
    meters.give_out().unwrap();
    sent(&world, 10_000..10_100, SYN);
    let key = flow(6, (POD, 10_000), (ORIGIN, 443));
    assert_ne!(u32::from(world.forward(&key).unwrap().meter), REST_METER);
    drop(world.load_beside(OTHER, STEPS, &SIZES));
    world.plane.take_over(&none(), now()).unwrap();
    // Numbers of the other version's meters mean nothing here.
    assert_eq!(u32::from(world.forward(&key).unwrap().meter), REST_METER);
    let mut meters = Maps::open(&world.plane).unwrap();
    let mut in_use = || meters.look([REST_METER].into_iter()).unwrap().meters[&REST_METER].0.in_use;
    assert_eq!(in_use(), 100);
    let over = ForwardValue { last_seen: 1, seen: SEEN_RST, ..world.forward(&key).unwrap() };
    world.set_forward(key, over);
    assert_eq!(world.plane.sweeper().unwrap().flows(&[key]).unwrap(), 1);
    assert_eq!(in_use(), 99);
}

#[test]
fn xdp_carry_flows_over_ipv6_keep_their_64() {
    let mut world = World::sized(&SIZES);
    six::six(&mut world);
    let frame = |port| Packet6::tcp((POD6, 40_000), (ORIGIN6, port), SYN, b"").frame();
    let source = |world: &World, port| {
        let out = world.out(&frame(port));
        (out.verdict == TCX_NEXT).then(|| out.frame[22..38].to_vec())
    };
    let before = pod_outside().octets().to_vec();
    let meter = |world: &World| world.entries::<Flow6Key, Flow6Value>("FLOWS6")[0].1.meter;
    Maps::open(&world.plane).unwrap().give_out().unwrap();
    assert_eq!(source(&world, 443), Some(before.clone()));
    assert_ne!(meter(&world), REST_METER);
    // New flows leave from another one now.
    six::set_allocation6(&mut world, &[NETWORK_2]);
    drop(world.load_beside(OTHER, STEPS, &SIZES));
    world.plane.take_over(&none(), now()).unwrap();
    assert_eq!(meter(&world), REST_METER, "numbers of the other version's meters mean nothing here");
    assert_eq!(source(&world, 443), Some(before.clone()));
    let new = source(&world, 444).unwrap();
    assert_eq!(new[..8], NETWORK_2.octets()[..8], "{NETWORK} is no longer opened from");
}

#[test]
fn xdp_carry_meanwhile_nothing_is_made_refused_or_ended() {
    let mut world = World::sized(&SIZES);
    let known = sent(&world, 10_000..10_002, SYN);
    world.plane.array("HANDOVER").unwrap().set(0, 1u32, 0).unwrap();
    world.counted();
    assert_eq!(sent(&world, 10_000..10_002, ACK), known, "flows that are here go on");
    world.counted();
    for (what, packet) in [
        ("a new connection", segment(20_000, SYN)),
        ("a connection that is not here yet", segment(20_001, ACK)),
        ("a datagram", Packet::udp((POD, 5000), (ORIGIN, 53), b"x")),
    ] {
        // A refusal is sent back, which is a redirect.
        assert_eq!(world.out(&packet.frame()).verdict, TCX_DROP, "{what}");
        assert_eq!(world.counted(), [("drop_taking_over", 1)], "{what}");
    }
    // The next pod with the address would end the flow of the one before.
    world.next_pod(POD, 1);
    assert_eq!(world.out(&segment(10_000, SYN).frame()).verdict, TCX_DROP);
    assert_eq!(world.consistent(), 2);
    world.plane.array("HANDOVER").unwrap().set(0, 0u32, 0).unwrap();
    assert_eq!(world.out(&segment(20_000, SYN).frame()).verdict, TCX_NEXT);
}

#[test]
fn xdp_carry_what_was_copied_before_follows_what_the_old_programs_did_since() {
    let mut world = World::sized(&SIZES);
    sent(&world, 10_000..10_256, SYN);
    let mut old = world.load_beside(OTHER, STEPS, &SIZES);
    let source = world.plane.source().unwrap();
    world.plane.carry_flows(&source).unwrap();
    std::mem::swap(&mut world.plane, &mut old);
    // All ports are taken: a flow ends, and its port is another flow's.
    let key = flow(6, (POD, 10_007), (ORIGIN, 443));
    let over = ForwardValue { last_seen: 1, seen: SEEN_RST, ..world.forward(&key).unwrap() };
    world.set_forward(key, over);
    assert_eq!(world.plane.sweeper().unwrap().flows(&[key]).unwrap(), 1);
    let instead = sent(&world, 20_000..20_001, SYN);
    assert_eq!(instead[&20_000], Some(over.egress_port));
    // And a connection goes on: what was seen of it follows.
    sent(&world, 10_008..10_009, ACK);
    std::mem::swap(&mut world.plane, &mut old);
    world.plane.take_over(&none(), now()).unwrap();
    assert_eq!(world.consistent(), 256);
    assert_eq!(sent(&world, 20_000..20_001, ACK), instead);
    assert_eq!(world.forward(&key), None);
    let seen = world.forward(&flow(6, (POD, 10_008), (ORIGIN, 443))).unwrap().seen;
    assert_eq!(seen, SEEN_SYN | SEEN_ACK);
}

#[test]
fn xdp_carry_flows_that_find_no_room_are_told_and_leave_no_port_to_share() {
    let mut world = World::sized(&SIZES);
    sent(&world, 10_000..10_200, SYN);
    let old = world.load_beside(OTHER, STEPS, &MapSizes { flows: 64, ..SIZES });
    drop(old);
    world.plane.take_over(&none(), now()).unwrap();
    let flows = world.entries::<FlowKey, ForwardValue>("FORWARD");
    let backs: BTreeSet<(u32, u16)> = world
        .entries::<FlowKey, ReverseValue>("REVERSE")
        .into_iter()
        .map(|(key, _)| (key.local, key.local_port))
        .collect();
    assert!(!flows.is_empty() && flows.len() <= 64);
    assert!(flows.iter().all(|(_, flow)| backs.contains(&(flow.egress, flow.egress_port))));
    let counted: BTreeMap<_, _> = world.counted().into_iter().collect();
    assert_eq!(counted["carried"], flows.len() as u64);
    assert_eq!(counted["carried"] + counted["not_carried"], 200);
}

/// The version before: values of `FORWARD` backwards with eight bytes more, holdings without their last bytes.
const BEFORE: &[Step] = &[Step {
    from: SCHEMA - 1,
    changes: &[("FORWARD", Change::Anew(forwards)), ("HOLDINGS", Change::Grown(size_of::<HoldingValue>()))],
}];
/// Flow of which the version before said something that this one cannot say.
const ODD: u16 = 10_003;

fn forwards(entry: Entry<'_>) -> Option<Entry<'_>> {
    let key: FlowKey = raw::from_bytes(&entry.key)?;
    let (value, more) = entry.value.split_at_checked(size_of::<ForwardValue>())?;
    let value: Vec<u8> = value.iter().rev().copied().collect();
    (key.local_port != ODD && more.len() == 8).then(|| Entry { key: entry.key.clone(), value: value.into() })
}

fn backwards(value: &[u8]) -> Vec<u8> {
    value.iter().rev().copied().chain([7; 8]).collect()
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> i32 {
    // SAFETY: attributes of the command, whose pointers are valid for as long as the call takes.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    assert!(result >= 0, "bpf command {command}: {}", std::io::Error::last_os_error());
    result as i32
}

/// Makes a map and pins it.
fn pinned_map(path: &Path, kind: u32, sizes: Sizes, entries: u32, flags: u32) -> OwnedFd {
    let create = [kind, sizes.key as u32, sizes.value as u32, entries, flags];
    // SAFETY: what the command gives is a descriptor of ours.
    let map = unsafe { OwnedFd::from_raw_fd(bpf(0, &create)) };
    let path = CString::new(path.to_str().unwrap()).unwrap();
    bpf(6, &(path.as_ptr() as u64, map.as_raw_fd(), 0u32));
    map
}

/// Hashes, not allocated beforehand: what the flows were in until schema 5.
const HASH: (u32, u32) = (1, 1);

/// A value of a map as a version before would have written it.
type Shape = fn(&str, &[u8]) -> Vec<u8>;

/// That of [`BEFORE`].
fn imagined(map: &str, value: &[u8]) -> Vec<u8> {
    match map {
        "FORWARD" => backwards(value),
        "HOLDINGS" => value[..value.len() - 8].to_vec(),
        _ => value.to_vec(),
    }
}

/// Schema 5.
fn released_5(map: &str, value: &[u8]) -> Vec<u8> {
    match map {
        "ALLOCATIONS" => [&value[..88], &value[92..132], &value[136..144]].concat(),
        "CONFIG" => value[..112].to_vec(),
        "VERDICTS" => value[..8].to_vec(),
        _ => value.to_vec(),
    }
}

/// Schema 4.
fn released_4(map: &str, value: &[u8]) -> Vec<u8> {
    if map == "HOLDINGS" { value[..40].to_vec() } else { released_5(map, value) }
}

/// Writes what a version before would have pinned with the same content, with the flows in hashes.
fn pin_version(world: &World, schema: u32, shape: Shape) {
    let own = world.root().join(format!("v{SCHEMA}"));
    let folder = world.root().join(format!("v{schema}/maps"));
    std::fs::create_dir_all(&folder).unwrap();
    for entry in std::fs::read_dir(own.join("maps")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let map = MapData::from_pin(&path).unwrap();
        let info = map.info().unwrap();
        let kind = info.map_type().unwrap() as u32;
        // Those of one CPU each are not carried, nor is a queue.
        if kind == 6 || kind == 22 {
            continue;
        }
        let sizes = Sizes { key: info.key_size() as usize, value: info.value_size() as usize };
        let (key, value, (kind, flags)) = match name.as_str() {
            "FORWARD" => (size_of::<FlowKey>(), size_of::<ForwardValue>(), HASH),
            "REVERSE" => (size_of::<FlowKey>(), size_of::<ReverseValue>(), HASH),
            _ => (sizes.key, sizes.value, (kind, info.map_flags())),
        };
        let other = Sizes { key, value: shape(&name, &vec![0; value]).len() };
        let copy = pinned_map(&folder.join(&name), kind, other, info.max_entries(), flags);
        let copy = raw::Map::of(copy.as_fd()).unwrap();
        let write = |key: &[u8], value: &[u8]| copy.update(key, &shape(&name, value)).unwrap();
        match name.as_str() {
            "FORWARD" | "REVERSE" => Table::open(&map).unwrap().for_each(write),
            _ => raw::Map::of(map.fd().as_fd()).unwrap().for_each(write).unwrap(),
        }
    }
    std::fs::remove_dir_all(own).unwrap();
}

#[test]
fn xdp_carry_translates_what_has_another_layout_and_tells_what_cannot_be() {
    let mut world = World::sized(&SIZES);
    let before = sent(&world, 10_000..10_100, SYN);
    pin_version(&world, SCHEMA - 1, imagined);
    drop(world.load_beside(SCHEMA, BEFORE, &SIZES));
    world.plane.take_over(&none(), now()).unwrap();
    let after = sent(&world, 10_000..10_100, ACK);
    for (port, egress) in &before {
        assert_eq!(after[port], if *port == ODD { None } else { *egress }, "{port}");
    }
    let counted: BTreeMap<_, _> = world.counted().into_iter().collect();
    assert_eq!((counted["carried"], counted["not_carried"]), (99, 1));
    // The port of the one that is lost is nobody's for a while: the origin may still send to it.
    let new = sent(&world, 20_000..20_200, SYN);
    assert!(!new.values().any(|port| *port == before[&ODD]));
    assert_eq!(new.values().flatten().count(), 156);
}

/// From versions whose flows were in hashes.
#[test]
fn xdp_carry_flows_go_on_from_every_version_that_was_released() {
    for (schema, shape) in [(4, released_4 as Shape), (5, released_5)] {
        let mut world = World::sized(&SIZES);
        let before = sent(&world, 10_000..10_100, SYN);
        pin_version(&world, schema, shape);
        drop(world.load_beside(SCHEMA, STEPS, &SIZES));
        world.plane.take_over(&none(), now()).unwrap();
        assert_eq!(sent(&world, 10_000..10_100, ACK), before, "from schema {schema}");
        assert_eq!(world.consistent(), 100, "from schema {schema}");
        assert!(world.counted().contains(&("carried", 100)), "from schema {schema}");
    }
}

#[test]
fn xdp_carry_without_a_known_way_begins_empty_and_says_how_many_are_lost() {
    let mut world = World::sized(&SIZES);
    sent(&world, 10_000..10_100, SYN);
    pin_version(&world, SCHEMA - 1, imagined);
    drop(world.load_beside(SCHEMA, &[], &SIZES));
    assert!(world.plane.source().is_none());
    world.plane.take_over(&none(), now()).unwrap();
    assert!(world.counted().contains(&("not_carried", 100)));
    assert_eq!(world.entries::<FlowKey, ForwardValue>("FORWARD").len(), 0);
}

/// The kernel copies as many bytes as the map's entries have, whatever the buffer.
#[test]
fn xdp_carry_a_map_is_not_read_as_one_of_other_sizes() {
    let world = World::sized(&SIZES);
    let fd = |map| world.plane.map_fd(map).unwrap();
    // The flow table is an array of buckets.
    let wrong = [
        for_each(fd("FORWARD"), |_: &FlowKey, _: &ForwardValue| ()),
        for_each(fd("ALLOCATIONS"), |_: &u32, _: &u32| ()),
        for_each(fd("ALLOCATIONS"), |_: &u64, _: &AllocationValue| ()),
    ];
    for (at, result) in wrong.into_iter().enumerate() {
        assert!(result.is_err(), "{at}");
    }
    let counters = MapData::from_pin(world.root().join(format!("v{SCHEMA}/maps/COUNTERS"))).unwrap();
    assert!(raw::Map::of(counters.fd().as_fd()).is_err(), "a value for each CPU");
    let map = raw::Map::of(fd("ALLOCATIONS")).unwrap();
    assert!(map.update(&[0; 4], &[0; 144]).is_err() && map.delete(&[0; 8]).is_err());
    let mut entries = 0;
    for_each(fd("ALLOCATIONS"), |_: &u32, _: &AllocationValue| entries += 1).unwrap();
    assert_eq!(entries, MAX_ALLOCATIONS);
}

/// Sizes of keys and values of the maps of schema 4.
const SCHEMA_4: &[(&str, usize, usize)] = &[
    ("CONFIG", 4, 112),
    ("ADDRESSES", 4, 8),
    ("SLOTS", 4, 8),
    ("PEERS", 4, 16),
    ("PEER_INDEX", 4, 4),
    ("HOMES", 4, 4),
    ("HOLDINGS", 4, 40),
    ("PODS", 8, 16),
    ("DESTINATIONS", 12, 4),
    ("PORTS", 12, 4),
    ("VERDICTS", 16, 8),
    ("ALLOCATIONS", 4, 136),
    ("FORWARD", 16, 32),
    ("REVERSE", 16, 24),
];

/// The same of schema 5.
const SCHEMA_5: &[(&str, usize, usize)] = &[
    ("CONFIG", 4, 112),
    ("ADDRESSES", 4, 8),
    ("SLOTS", 4, 8),
    ("PEERS", 4, 16),
    ("PEER_INDEX", 4, 4),
    ("HOMES", 4, 4),
    ("HOLDINGS", 4, 48),
    ("LEASE", 4, 16),
    ("PODS", 8, 16),
    ("DESTINATIONS", 12, 4),
    ("PORTS", 12, 4),
    ("VERDICTS", 16, 8),
    ("ALLOCATIONS", 4, 136),
    ("FORWARD", 16, 32),
    ("REVERSE", 16, 24),
];

/// What allocations of schema 5 did not say yet is what held without their saying it.
#[test]
fn xdp_carry_ports_of_allocations_of_schema_5_rest_as_they_did() {
    let way = aegis_node_agent::carry::Way::between(5, SCHEMA, STEPS).unwrap();
    let word = |value: u32| value.to_ne_bytes();
    let entry = |value: Vec<u8>| {
        let entry = Entry { key: vec![0; 4].into(), value: value.into() };
        raw::from_bytes::<AllocationValue>(&way.translate("ALLOCATIONS", entry).unwrap().value).unwrap()
    };
    let before: Vec<u8> = (1..=17)
        .flat_map(word)
        .chain([7440, 240, 10, 300, 60, 99].into_iter().flat_map(word))
        .chain([7u16, 3].into_iter().chain(20..36).flat_map(u16::to_ne_bytes))
        .chain(0x1234_5678_9abc_def0u64.to_ne_bytes())
        .collect();
    assert_eq!(before.len(), 136);
    let expected = AllocationValue {
        addresses: std::array::from_fn(|at| at as u32 + 1),
        count: 17,
        timeouts: Timeouts { rest: REST, ..Timeouts::default() },
        name: 99,
        gateway_count: 7,
        near_count: 3,
        gateways: std::array::from_fn(|at| at as u16 + 20),
        max_resting: ANY_NUMBER,
        identity: 0x1234_5678_9abc_def0,
        ..NO_ALLOCATION
    };
    assert_eq!(entry(before), expected);
    assert_eq!(entry(vec![0; 136]), NO_ALLOCATION, "never written");
}

#[test]
fn xdp_carry_verdicts_of_schema_5_name_no_second_allocation() {
    let way = aegis_node_agent::carry::Way::between(5, SCHEMA, STEPS).unwrap();
    let before = [&ACTION_ALLOCATE.to_ne_bytes()[..], &7u16.to_ne_bytes(), &9u32.to_ne_bytes()].concat();
    let entry = Entry { key: vec![0; 16].into(), value: before.into() };
    let after = raw::from_bytes::<VerdictValue>(&way.translate("VERDICTS", entry).unwrap().value).unwrap();
    let expected = VerdictValue { action: ACTION_ALLOCATE, allocation: 7, binding: 9, secondary: 7, pad: 0 };
    assert_eq!(after, expected);
}

#[test]
fn xdp_carry_every_layout_that_was_released_has_a_way_to_the_present_one() {
    let world = World::sized(&SIZES);
    for (schema, layout) in [(4, SCHEMA_4), (5, SCHEMA_5)] {
        let way = aegis_node_agent::carry::Way::between(schema, SCHEMA, STEPS).unwrap();
        for (map, key, value) in layout {
            let entry = Entry { key: vec![1; *key].into(), value: vec![1; *value].into() };
            let path = world.root().join(format!("v{SCHEMA}/maps/{map}"));
            let info = MapData::from_pin(path).unwrap().info().unwrap();
            let carried = way.translate(map, entry).unwrap();
            let sizes = match *map {
                "FORWARD" => (size_of::<FlowKey>(), size_of::<ForwardValue>()),
                "REVERSE" => (size_of::<FlowKey>(), size_of::<ReverseValue>()),
                _ => (info.key_size() as usize, info.value_size() as usize),
            };
            assert_eq!(
                (carried.key.len(), carried.value.len()),
                sizes,
                "{map} of schema {schema}: add a step to node-agent/src/carry/translate.rs"
            );
        }
    }
}
