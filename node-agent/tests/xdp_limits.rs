//! Limits of pods and accounts: exact at the edge, and counted back however a flow ends.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what they are for")]

mod support;

use aegis_common::*;
use aegis_node_agent::ebpf::MapSizes;
use aegis_node_agent::kernel::kept::Kept;
use aegis_node_agent::load::ALL;
use aegis_node_agent::sweep::Tables;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use support::gateway::{
    NODE_3, XDP_REDIRECT, encapsulated, gateway, gateways, network, pods_node, sent_on, way_to,
};
use support::packet::{ACK, Body, Packet, RST, SYN};
use support::*;

/// Sets limits of an allocation.
fn limit(world: &mut World, allocation: u32, set: impl FnOnce(&mut AllocationValue)) {
    let mut allocations = world.plane.array::<AllocationValue>("ALLOCATIONS").unwrap();
    let mut value = allocations.get(&allocation, 0).unwrap();
    set(&mut value);
    allocations.set(allocation, value, 0).unwrap();
}

/// [`POD_2`] is of another account, which leaves from [`EGRESS_2`].
fn two_accounts(sizes: &MapSizes) -> World {
    let mut world = World::sized(sizes);
    world.second_account();
    world.pod_class(1, POD_2, 2);
    for (index, address) in [(0, EGRESS), (1, EGRESS_2)] {
        let value = AddressValue { index, allocation: index + 1 };
        world.plane.hash("ADDRESSES").unwrap().insert(raw(address), value, 0).unwrap();
    }
    world
}

fn small() -> MapSizes {
    MapSizes { flows: 4096, blocks: 1024, ..MapSizes::default() }
}

fn syn(pod: Ipv4Addr, port: u16) -> Packet {
    Packet::tcp((pod, port), (ORIGIN, 443), SYN)
}

/// Whether the packet leaves; if not, it is refused.
fn passes(world: &World, packet: &Packet) -> bool {
    match world.out(&packet.frame()).verdict {
        TCX_NEXT => true,
        TCX_REDIRECT => false,
        verdict => panic!("verdict {verdict}"),
    }
}

/// How many of these new connections leave.
fn opened(world: &World, pod: Ipv4Addr, ports: std::ops::Range<u16>) -> usize {
    ports.filter(|port| passes(world, &syn(pod, *port))).count()
}

/// The reset that answers a SYN.
fn reset(syn: &Packet) -> Packet {
    let mut expected = syn.clone();
    std::mem::swap(&mut expected.source, &mut expected.destination);
    let Body::Tcp(tcp) = &mut expected.body else { unreachable!() };
    std::mem::swap(&mut tcp.source, &mut tcp.destination);
    (tcp.acknowledged, tcp.sequence, tcp.flags) = (tcp.sequence.wrapping_add(1), 0, RST | ACK);
    expected
}

fn limited(world: &World, allocation: u32) -> LimitedValue {
    let map = world.plane.per_cpu::<LimitedValue>("LIMITED").unwrap();
    map.get(&allocation, 0).unwrap().iter().fold(LimitedValue::default(), |sum, value| LimitedValue {
        pod_flows: sum.pod_flows + value.pod_flows,
        pod_rate: sum.pod_rate + value.pod_rate,
        account_flows: sum.account_flows + value.account_flows,
        account_rate: sum.account_rate + value.account_rate,
    })
}

fn load(world: &mut World, key: LoadKey) -> LoadValue {
    world.plane.hash::<LoadKey, LoadValue>("LOADS").unwrap().get(&key, 0).unwrap()
}

fn set_load(world: &mut World, key: LoadKey, value: LoadValue) {
    world.plane.hash("LOADS").unwrap().insert(key, value, 0).unwrap();
}

/// As the agent does it, which counts what there is.
fn sweep(world: &World) {
    Kept::new(&world.plane).unwrap().sweep(false).unwrap();
}

fn pod_key(pod: Ipv4Addr) -> LoadKey {
    LoadKey::pod(raw(pod), INCARNATION, 0)
}

#[test]
fn xdp_limits_a_pod_gets_as_many_flows_as_it_may_and_not_one_more() {
    let mut world = World::new();
    limit(&mut world, 0, |it| it.pod_flows = 20);
    assert_eq!(opened(&world, POD, 10_000..10_018), 18);
    let (udp, echo) = (Packet::udp((POD, 5000), (ORIGIN, 53), b"x"), Packet::echo(POD, ORIGIN, 7));
    assert!(passes(&world, &udp) && passes(&world, &echo), "every protocol counts");
    world.counted();

    let over = syn(POD, 20_000);
    let out = world.out(&over.frame());
    assert_eq!(out.verdict, TCX_REDIRECT);
    assert_eq!(out.frame[14..], reset(&over).frame()[14..]);
    for over in [Packet::udp((POD, 5001), (ORIGIN, 53), b"x"), Packet::echo(POD, ORIGIN, 8)] {
        let mut expected = Packet::error(ORIGIN, &over, 3, 13, 8).with_id(0);
        expected.ttl = 64;
        let out = world.out(&over.frame());
        assert_eq!((out.verdict, &out.frame[14..]), (TCX_REDIRECT, &expected.frame()[14..]));
    }
    assert_eq!(world.counted(), [("refusal_sent", 3), ("refuse_pod_flows", 3)]);
    assert_eq!(limited(&world, 0), LimitedValue { pod_flows: 3, ..LimitedValue::default() });
    assert_eq!(load(&mut world, pod_key(POD)).refused, 3, "by which the pod is named");

    // What lives goes on, and other pods are not concerned; nor is the next pod with the address.
    assert!(passes(&world, &Packet::tcp((POD, 10_003), (ORIGIN, 443), ACK)) && passes(&world, &udp));
    assert_eq!(opened(&world, POD_2, 10_000..10_025), 20);
    assert_eq!(world.consistent(), 40);
    world.next_pod(POD, 1);
    assert_eq!(opened(&world, POD, 30_000..30_025), 20);
    assert_eq!(world.consistent(), 60);

    // A lower limit takes nothing away, a higher one gives more, and none is none.
    limit(&mut world, 0, |it| it.pod_flows = 5);
    assert!(passes(&world, &Packet::tcp((POD_2, 10_003), (ORIGIN, 443), ACK)));
    assert_eq!(opened(&world, POD_2, 11_000..11_005), 0);
    limit(&mut world, 0, |it| it.pod_flows = 21);
    assert_eq!(opened(&world, POD_2, 11_000..11_005), 1);
    limit(&mut world, 0, |it| it.pod_flows = 0);
    assert_eq!(opened(&world, POD_2, 12_000..12_100), 100);
    assert_eq!(world.consistent(), 161);
}

#[test]
fn xdp_limits_what_ends_counts_no_more() {
    let mut world = World::new();
    limit(&mut world, 0, |it| it.pod_flows = 4);
    let key = |port| flow(6, (POD, port), (ORIGIN, 443));
    let sweeper = world.plane.sweeper().unwrap();
    assert_eq!(opened(&world, POD, 1..9), 4);
    // It is over.
    let value = ForwardValue { last_seen: 1, seen: SEEN_RST, ..world.forward(&key(1)).unwrap() };
    world.set_forward(key(1), value);
    assert_eq!(sweeper.flows(&[key(1), key(1)]).unwrap(), 1);
    assert_eq!((world.consistent(), opened(&world, POD, 11..19)), (3, 1));
    // Its slice is another node's.
    world.own(0, SLICE, 2);
    assert_eq!(sweeper.revoked(&[key(2), key(3)]).unwrap(), 2);
    world.own(0, SLICE, 1);
    assert_eq!((world.consistent(), opened(&world, POD, 21..29)), (2, 2));
    // It gives way to one of the next pod with the address: each is its own pod's.
    world.next_pod(POD, 1);
    assert!(passes(&world, &syn(POD, 21)));
    let (old, new) = (pod_key(POD), LoadKey { id: pod_key(POD).id + 1, ..pod_key(POD) });
    assert_eq!([old, new].map(|key| count(load(&mut world, key).flows)), [3, 1]);
    world.pod_class(1, POD, 1);
    assert_eq!((world.consistent(), opened(&world, POD, 31..39)), (4, 1));
    // It found no port.
    world.allow(EGRESS, &[]);
    limit(&mut world, 0, |it| it.pod_flows = 100);
    world.counted();
    assert_eq!(opened(&world, POD, 41..49), 0);
    assert_eq!(world.counted(), [("refusal_sent", 8), ("refuse_unavailable", 8)]);
    world.allow(EGRESS, &[SLICE]);
    // 256 ports are all that there are.
    limit(&mut world, 0, |it| it.pod_flows = 0);
    assert_eq!(opened(&world, POD_2, 1000..1400), 251);
    assert_eq!(world.consistent(), 256);
}

#[test]
fn xdp_limits_a_flow_that_finds_no_room_does_not_count() {
    // Room in kernel hashes is counted roughly, but it has an end.
    let mut world = World::sized(&MapSizes { flows: 64, blocks: 1024, ..MapSizes::default() });
    let opened = opened(&world, POD, 1..200);
    assert!((64..199).contains(&opened), "{opened}");
    assert!(world.counted().iter().any(|(label, _)| *label == "refuse_table_full"));
    assert_eq!(world.consistent(), opened);
}

#[test]
fn xdp_limits_allocations_of_an_account_share_its_limit_and_another_account_has_its_own() {
    let mut world = two_accounts(&small());
    limit(&mut world, 1, |it| it.account = ACCOUNT);
    for allocation in [0, 1] {
        limit(&mut world, allocation, |it| it.account_flows = 30);
    }
    assert_eq!(opened(&world, POD, 1..21), 20);
    assert_eq!(opened(&world, POD_2, 1..21), 10, "the other allocation has what is left");
    assert_eq!(opened(&world, POD, 31..41), 0);
    let counts = |world: &World| [0, 1].map(|allocation| limited(world, allocation).account_flows);
    assert_eq!(counts(&world), [10, 10]);
    let (own, other) = (pod_key(POD), LoadKey { allocation: 1, ..pod_key(POD_2) });
    assert_eq!([own, other].map(|key| load(&mut world, key).refused), [10, 10]);
    let all = |label| [("refusal_sent", 20), (label, 20)];
    let mut counted = world.counted();
    counted.retain(|(label, _)| label.starts_with("ref"));
    assert_eq!(counted, all("refuse_account_flows"));
    assert_eq!(world.consistent(), 30);

    let mut world = two_accounts(&small());
    for allocation in [0, 1] {
        limit(&mut world, allocation, |it| it.account_flows = 30);
    }
    assert_eq!([POD, POD_2].map(|pod| opened(&world, pod, 1..41)), [30, 30]);
    assert_eq!(world.consistent(), 60);
}

#[test]
fn xdp_limits_one_account_leaves_room_for_the_next() {
    let mut world = two_accounts(&small());
    for allocation in [0, 1] {
        limit(&mut world, allocation, |it| (it.room_flows, it.account_flows) = (64, 50));
    }
    assert_eq!(opened(&world, POD, 1..65), 32, "half of all");
    assert_eq!(opened(&world, POD_2, 1..65), 16, "half of what is left");
    assert_eq!(opened(&world, POD, 101..111), 0);
    assert_eq!(limited(&world, 0).account_flows, 42);
    assert_eq!(load(&mut world, pod_key(POD)).refused, 42);
    assert_eq!(world.consistent(), 48);

    // An account that connects everywhere does not take all the bitmaps either.
    let mut world = two_accounts(&small());
    for allocation in [0, 1] {
        limit(&mut world, allocation, |it| it.room_blocks = 16);
    }
    let to = |pod, port| Packet::tcp((pod, 4000), (ORIGIN, port), SYN);
    let reached = |world: &World, pod| (1..33).filter(|port| passes(world, &to(pod, *port))).count();
    assert_eq!([reached(&world, POD), reached(&world, POD_2)], [8, 4]);
    let counted: std::collections::BTreeMap<_, _> = world.counted().into_iter().collect();
    assert_eq!(counted["refuse_account_flows"], 24 + 28);
    assert_eq!(load(&mut world, pod_key(POD)).refused, 24);
    assert!(passes(&world, &Packet::tcp((POD, 5000), (ORIGIN, 8), SYN)), "to where it has a bitmap");
    assert_eq!(world.consistent(), 13);
    // Bitmaps that are idle are removed, and count no more.
    let keys: Vec<FlowKey> =
        world.entries::<FlowKey, ForwardValue>("FORWARD").iter().map(|it| it.0).collect();
    for slice in [0, 1] {
        world.own(slice, SLICE, 2);
    }
    world.plane.sweeper().unwrap().revoked(&keys).unwrap();
    let blocks: Vec<(BlockKey, BlockValue)> = world.entries("BLOCKS");
    for (key, value) in &blocks {
        let value = BlockValue { last_used: value.last_used.saturating_sub(BLOCK_IDLE + 1), ..*value };
        world.plane.hash("BLOCKS").unwrap().insert(*key, value, 0).unwrap();
    }
    let keys: Vec<BlockKey> = blocks.iter().map(|(key, _)| *key).collect();
    assert_eq!(world.plane.sweeper().unwrap().blocks(&keys).unwrap(), 12);
    assert_eq!(world.consistent(), 0);
    assert_eq!(reached(&world, POD_2), 8);
}

#[test]
fn xdp_limits_new_flows_are_counted_for_each_second() {
    let mut world = two_accounts(&small());
    // Seconds that do not pass while the test runs.
    let later = u64::from(now() + 3600) << 32;
    limit(&mut world, 0, |it| (it.pod_rate, it.pod_flows) = (10, 100));
    assert!(passes(&world, &syn(POD, 1)));
    let at = |world: &mut World, key, opened| {
        let value = load(world, key);
        set_load(world, key, LoadValue { opened, ..value });
    };
    at(&mut world, pod_key(POD), later | 7);
    assert_eq!(opened(&world, POD, 11..21), 3);
    let mut counted = world.counted();
    counted.retain(|(label, _)| label.starts_with("refuse"));
    assert_eq!(counted, [("refuse_pod_rate", 7)]);
    assert_eq!(limited(&world, 0).pod_rate, 7);
    assert_eq!(world.consistent(), 4, "what is refused counts as no flow");
    assert!(passes(&world, &Packet::tcp((POD, 1), (ORIGIN, 443), ACK)), "and touches none that lives");
    // In vain or not: each attempt counts, and a second begins at none.
    assert_eq!(load(&mut world, pod_key(POD)).opened, later | 17);
    at(&mut world, pod_key(POD), u64::from(now() - 1) << 32 | 500);
    assert!(passes(&world, &syn(POD, 31)));
    let opened_now = load(&mut world, pod_key(POD)).opened;
    assert!(opened_now >> 32 >= u64::from(now() - 1) && opened_now as u32 == 1, "{opened_now:#x}");

    // What a pod asks for in vain is not counted for its account.
    limit(&mut world, 0, |it| it.account_rate = 20);
    let account = LoadKey::account(ACCOUNT);
    at(&mut world, account, later | 18);
    at(&mut world, pod_key(POD), later | 10);
    assert_eq!(opened(&world, POD, 41..51), 0);
    assert_eq!(load(&mut world, account).opened, later | 18);
    at(&mut world, pod_key(POD), later);
    world.counted();
    assert_eq!(opened(&world, POD, 51..56), 2);
    let mut counted = world.counted();
    counted.retain(|(label, _)| label.starts_with("refuse"));
    assert_eq!(counted, [("refuse_account_rate", 3)]);
    assert_eq!(opened(&world, POD_2, 1..31), 30, "another account");
    assert_eq!(world.consistent(), 37);
}

#[test]
fn xdp_limits_through_a_gateway_the_pods_node_keeps_the_pods_and_both_the_accounts() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    limit(&mut node, 0, |it| it.pod_flows = 3);
    limit(&mut gateway, 0, |it| (it.pod_flows, it.account_flows) = (1, 2));
    let frames: Vec<Vec<u8>> =
        (1..4).map(|port| encapsulated(&mut node, "within", &syn(POD, port), NODE_2)).collect();
    node.counted();
    assert_eq!(node.out(&syn(POD, 4).frame()).frame[14..], reset(&syn(POD, 4)).frame()[14..]);
    assert_eq!(node.counted(), [("refusal_sent", 1), ("refuse_pod_flows", 1)]);
    assert_eq!(count(load(&mut node, pod_key(POD)).flows), 3);
    assert_eq!(count(load(&mut node, LoadKey::account(ACCOUNT)).flows), 3);
    node.loads_are_right();

    for (frame, port) in frames.iter().zip(1..3) {
        sent_on(&mut gateway, "within the account's limit", frame, &syn(POD, port));
    }
    gateway.counted();
    let (verdict, _) = gateway.back(&frames[2]);
    assert_eq!(verdict, XDP_REDIRECT, "the answer goes back through the tunnel");
    assert_eq!(gateway.counted(), [("returned", 1), ("refusal_sent", 1), ("refuse_account_flows", 1)]);
    let loads: Vec<LoadKey> = gateway.entries::<LoadKey, LoadValue>("LOADS").iter().map(|it| it.0).collect();
    assert_eq!(loads, [LoadKey::account(ACCOUNT)], "its pods are other nodes'");
    gateway.loads_are_right();
    // Another gateway that is lost ends its flows, which count no more.
    gateways(&mut node, &[3], 1);
    limit(&mut node, 0, |it| it.pod_flows = 4);
    encapsulated(&mut node, "the other", &syn(POD, 9), NODE_3);
    support::gateway::silence(&mut node, 3, PEER_SILENT | PEER_LOST);
    node.out(&Packet::tcp((POD, 9), (ORIGIN, 443), ACK).frame());
    assert_eq!(count(load(&mut node, pod_key(POD)).flows), 3);
    node.loads_are_right();
}

#[test]
fn xdp_limits_counts_that_are_wrong_are_set_right_and_those_that_are_idle_go() {
    let mut world = two_accounts(&small());
    assert_eq!([POD, POD_2].map(|pod| opened(&world, pod, 1..11)), [10, 10]);
    let (pod, other) = (pod_key(POD), LoadKey { allocation: 1, ..pod_key(POD_2) });
    for (key, wrong) in [(pod, 500), (other, 3), (LoadKey::account(ACCOUNT), 0)] {
        let value = load(&mut world, key);
        set_load(
            &mut world,
            key,
            LoadValue { flows: value.flows & !0xffff_ffff | wrong, blocks: 7, ..value },
        );
    }
    world.plane.hash::<LoadKey, LoadValue>("LOADS").unwrap().remove(&LoadKey::account(ACCOUNT_2)).unwrap();
    let all = AllLoads { flows: 0xffff_fff0, blocks: 99 };
    world.plane.array("ALL_LOADS").unwrap().set(0, all, 0).unwrap();
    sweep(&world);
    assert_eq!(world.consistent(), 20);

    // What counts nothing goes after a while, and nothing else.
    let keys: Vec<FlowKey> =
        world.entries::<FlowKey, ForwardValue>("FORWARD").iter().map(|it| it.0).collect();
    world.own(1, SLICE, 2);
    assert_eq!(world.plane.sweeper().unwrap().revoked(&keys).unwrap(), 10);
    let entries = |world: &World| {
        let mut keys: Vec<LoadKey> =
            world.entries::<LoadKey, LoadValue>("LOADS").iter().map(|it| it.0).collect();
        keys.sort_unstable();
        keys
    };
    let mut expected = [pod, other, LoadKey::account(ACCOUNT), LoadKey::account(ACCOUNT_2)];
    expected.sort_unstable();
    sweep(&world);
    assert_eq!(entries(&world), expected, "there was a flow just now");
    for key in expected {
        let value = load(&mut world, key);
        let opened = u64::from(now() - LOAD_IDLE - 1) << 32;
        set_load(&mut world, key, LoadValue { opened, blocks: 0, ..value });
    }
    sweep(&world);
    // The second account's bitmap is still there.
    expected = [pod, LoadKey::account(ACCOUNT), LoadKey::account(ACCOUNT_2), ALL];
    expected.sort_unstable();
    assert_eq!(entries(&world), expected[1..]);
    assert_eq!(world.consistent(), 10);
}

/// Who meets an entry that is just being removed neither counts there nor lets the pod wait for the last word.
#[test]
fn xdp_limits_an_entry_that_is_being_removed_is_not_counted_in() {
    let mut world = World::new();
    let key = pod_key(POD);
    set_load(&mut world, key, LoadValue { key, flows: DEAD, opened: 1 << 32, ..LoadValue::default() });
    assert_eq!(world.out(&syn(POD, 1).frame()).verdict, TCX_DROP);
    assert_eq!(world.counted(), [("drop_ending", 1)]);
    // Memory that is another's by now.
    let others = LoadValue { key: pod_key(POD_2), flows: 5, opened: 1 << 32, ..LoadValue::default() };
    set_load(&mut world, key, others);
    assert_eq!(world.out(&syn(POD, 1).frame()).verdict, TCX_DROP);
    assert_eq!((count(load(&mut world, key).flows), load(&mut world, key).opened), (5, 1 << 32));
    world.plane.hash::<LoadKey, LoadValue>("LOADS").unwrap().remove(&key).unwrap();
    assert!(passes(&world, &syn(POD, 1)));
    assert_eq!(world.consistent(), 1);
}

const THREADS: u16 = 4;

/// Has four threads open connections of both pods from these ports, each of them once, and then again for as long as it is to go on.
/// Gives how many each pod got.
fn storm(program: BorrowedFd<'_>, ports: std::ops::Range<u16>, go_on: &AtomicBool) -> [usize; 2] {
    let opened = |thread: u16| {
        let mut got = [0; 2];
        loop {
            for port in ports.clone().filter(|port| port % THREADS == thread) {
                for (pod, got) in [POD, POD_2].into_iter().zip(&mut got) {
                    *got += usize::from(classify(program, &syn(pod, port).frame(), MARK).verdict == TCX_NEXT);
                }
            }
            if !go_on.load(Ordering::Acquire) {
                return got;
            }
        }
    };
    let opened = &opened;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || opened(thread))).collect();
        let got = threads.into_iter().map(|thread| thread.join().unwrap());
        got.fold([0; 2], |sum, got| [sum[0] + got[0], sum[1] + got[1]])
    })
}

/// All CPUs ask at once: exactly as many get through as may, and nothing is miscounted while flows end beside.
#[test]
fn xdp_limits_are_exact_under_any_interleaving() {
    /// Ends the storm, also by a panic.
    struct Calm<'a>(&'a AtomicBool);
    impl Drop for Calm<'_> {
        fn drop(&mut self) {
            self.0.store(false, Ordering::Release);
        }
    }
    let mut world = two_accounts(&small());
    limit(&mut world, 0, |it| it.pod_flows = 100);
    limit(&mut world, 1, |it| it.account_flows = 120);
    let program = world.program("uplink_egress").try_clone_to_owned().unwrap();
    let sweeper = world.plane.sweeper().unwrap();
    let go_on = AtomicBool::new(false);
    assert_eq!(storm(program.as_fd(), 1..1000, &go_on), [100, 120]);
    assert_eq!(world.consistent(), 220);

    // Half of what there is ends all the time.
    for slice in [0, 1] {
        world.own(slice, SLICE, 2);
    }
    go_on.store(true, Ordering::Release);
    let (mut turn, mut ended) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| storm(program.as_fd(), 1000..1600, &go_on));
        let _calm = Calm(&go_on);
        while ended < 1500 {
            let flows: Vec<(FlowKey, ForwardValue)> = world.entries("FORWARD");
            let half = |key: &FlowKey| key.local_port / THREADS % 2 == turn % 2;
            let keys: Vec<_> = flows.iter().map(|(key, _)| *key).filter(half).collect();
            ended += sweeper.revoked(&keys).unwrap();
            turn += 1;
            // The agent counts beside, now and then: it must not take what is under way for an error.
            if turn % 32 == 0 {
                sweep(&world);
            }
        }
    });
    let live = world.consistent();
    assert!(live <= 220, "{live} live");
    // All that may be had can be had.
    let got: usize = storm(program.as_fd(), 20_000..20_400, &go_on).iter().sum();
    assert_eq!(live + got, 220);
    assert_eq!(world.consistent(), 220);
}
