//! `sweep`: what is over goes, everything else stays.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aegis_node_agent::kernel::kept::Kept;
use aegis_node_agent::sweep::Tables;
use std::net::Ipv4Addr;
use support::packet::{ACK, Packet, SYN};
use support::*;

/// Short ones, so that the machine need not have run for hours.
const TIMEOUTS: Timeouts =
    Timeouts { tcp_established: 20, tcp_transitory: 10, tcp_closed: 5, udp: 8, icmp: 3, rest: REST };

/// Opens a flow; its keys in FORWARD and REVERSE.
fn open(world: &World, packet: &Packet) -> (FlowKey, FlowKey) {
    let out = world.out(&packet.frame());
    assert_eq!(out.verdict, TCX_NEXT);
    let word = |at: usize| u16::from_be_bytes([out.frame[at], out.frame[at + 1]]);
    let (protocol, pod) = (packet.protocol(), packet.source);
    let frame = packet.frame();
    let pod_word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let (from, to, port) =
        if protocol == 1 { (pod_word(38), 0, word(38)) } else { (pod_word(34), pod_word(36), word(34)) };
    let origin = packet.destination;
    (flow(protocol, (pod, from), (origin, to)), flow(protocol, (EGRESS, port), (origin, to)))
}

/// Sets when the last packets passed, and what was seen.
fn set(world: &mut World, keys: &(FlowKey, FlowKey), out: (u32, u8), back: (u32, u8)) {
    let forward = ForwardValue { last_seen: out.0, seen: out.1, ..world.forward(&keys.0).unwrap() };
    let reverse = ReverseValue { last_seen: back.0, seen: back.1, ..world.reverse(&keys.1).unwrap() };
    world.set_forward(keys.0, forward);
    world.set_reverse(keys.1, reverse);
}

fn sweep(world: &World, keys: &[FlowKey]) -> u32 {
    world.plane.sweeper().unwrap().flows(keys).unwrap()
}

fn uptime_suffices() {
    assert!(now() > 200, "the machine must run for 200 s before flows can have ended that long ago");
}

#[test]
fn xdp_sweep_each_phase_has_its_time() {
    uptime_suffices();
    let mut world = World::new();
    world.allocation(&[EGRESS], TIMEOUTS);
    let tcp = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN);
    let both = SEEN_SYN | SEEN_ACK;
    for (name, packet, out, back, limit) in [
        ("SYN only", tcp.clone(), SEEN_SYN, 0, 10 + REST),
        ("SYN-ACK not answered", tcp.clone(), SEEN_SYN, SEEN_SYN, 10 + REST),
        ("established", tcp.clone(), both, both, 20 + REST),
        ("FIN of the pod", tcp.clone(), both | SEEN_FIN, both, 10 + REST),
        ("FIN of the origin", tcp.clone(), both, both | SEEN_FIN, 10 + REST),
        ("FIN both ways", tcp.clone(), both | SEEN_FIN, both | SEEN_FIN, 5),
        ("RST of the pod", tcp.clone(), both | SEEN_RST, both, 5),
        ("an RST from outside that the pod has no part in", tcp.clone(), both, both | SEEN_RST, 10 + REST),
        ("the same to a pod that had closed", tcp.clone(), both | SEEN_FIN, both | SEEN_RST, 5),
        ("refused", tcp, SEEN_SYN, SEEN_RST, 5),
        ("UDP", Packet::udp((POD, 5000), (ORIGIN, 53), b"x"), 0, 0, 8 + REST),
        ("echo", Packet::echo(POD, ORIGIN, 7), 0, 0, 3 + REST),
    ] {
        let keys = open(&world, &packet);
        world.counted();
        // Two seconds within, so that a slow test does not fail.
        set(&mut world, &keys, (now() + 2 - limit, out), (0, back));
        assert_eq!(sweep(&world, &[keys.0]), 0, "{name}: within {limit} s");
        set(&mut world, &keys, (0, out), (now() + 2 - limit, back));
        assert_eq!(sweep(&world, &[keys.0]), 0, "{name}: the other direction keeps it too");
        assert_eq!((world.consistent(), world.counted()), (1, vec![]), "{name}");
        set(&mut world, &keys, (now() - limit - 1, out), (1, back));
        assert_eq!(sweep(&world, &[keys.0]), 1, "{name}: after {limit} s");
        assert_eq!((world.consistent(), world.counted()), (0, vec![("expired", 1)]), "{name}");
        assert_eq!(world.reverse(&keys.1), None, "{name}");
    }
}

#[test]
fn xdp_sweep_an_allocation_says_how_long_its_ports_rest() {
    uptime_suffices();
    let mut world = World::new();
    let udp = Packet::udp((POD, 5000), (ORIGIN, 53), b"x");
    let syn = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN);
    for rest in [0, 40] {
        world.allocation(&[EGRESS], Timeouts { rest, ..TIMEOUTS });
        for (name, packet, seen, limit) in [
            ("timed out", &udp, 0, 8 + rest),
            ("opened by one side", &syn, SEEN_SYN, 10 + rest),
            ("closed", &syn, SEEN_RST, 5),
        ] {
            let keys = open(&world, packet);
            set(&mut world, &keys, (now() + 2 - limit, seen), (0, 0));
            assert_eq!(sweep(&world, &[keys.0]), 0, "{name}: within {limit} s");
            set(&mut world, &keys, (now() - limit - 1, seen), (0, 0));
            assert_eq!(sweep(&world, &[keys.0]), 1, "{name}: after {limit} s");
        }
        let keys = open(&world, &udp);
        world.remove_pod(POD);
        // Within a rest of none there is no time to look.
        set(&mut world, &keys, (now() + 2 - rest.max(2), 0), (0, 0));
        assert_eq!(sweep(&world, &[keys.0]), 0, "a pod that is gone: within {rest} s");
        set(&mut world, &keys, (now() - rest - 1, 0), (now(), 0));
        assert_eq!(sweep(&world, &[keys.0]), 1, "a pod that is gone: after {rest} s");
        assert_eq!(world.consistent(), 0);
        world.pod_class(1, POD, 1);
    }
}

/// Of what rests more than may, what has rested longest goes.
#[test]
fn xdp_sweep_no_more_ports_rest_than_may() {
    uptime_suffices();
    let mut world = World::new();
    let flows: Vec<_> =
        (0..200).map(|at| open(&world, &Packet::udp((POD, 5000 + at), (ORIGIN, 53), b"x"))).collect();
    world.bound_rest(TIMEOUTS, ANY_NUMBER);
    let mut kept = Kept::new(&world.plane).unwrap();
    let mut left = |world: &World| {
        kept.sweep(false).unwrap();
        let mut ports: Vec<u16> = world
            .entries::<FlowKey, ForwardValue>("FORWARD")
            .iter()
            .map(|it| it.0.local_port - 5000)
            .collect();
        ports.sort_unstable();
        assert_eq!(world.consistent(), ports.len());
        ports
    };
    // 0 to 169 rest, the first ones longest; of the others an answer has just come, or a packet gone.
    for (at, keys) in (0..).zip(&flows) {
        let (out, back) = match at {
            0..170 => (now() - 80 + at / 4, 1),
            170..190 => (now() - 60, now()),
            _ => (now(), 1),
        };
        set(&mut world, keys, (out, 0), (back, 0));
    }
    assert_eq!(left(&world).len(), 200, "there is no bound");
    world.counted();
    for (most, first, gone) in [(102, 68, 68), (2, 168, 100), (0, 170, 2)] {
        world.bound_rest(TIMEOUTS, most);
        let before = left(&world);
        assert_eq!(before, (first..200).collect::<Vec<_>>(), "at most {most}");
        assert_eq!(world.counted(), [("rest_cut_short", gone)]);
        assert_eq!((left(&world), world.counted()), (before, vec![]), "and no more go");
    }
}

#[test]
fn xdp_sweep_looks_again() {
    uptime_suffices();
    let mut world = World::new();
    world.allocation(&[EGRESS], TIMEOUTS);
    // Idle when the agent looked, active when the program does.
    for direction in ["out", "back"] {
        let packet = Packet::udp((POD, 5000), (ORIGIN, 53), b"x");
        let keys = open(&world, &packet);
        set(&mut world, &keys, (1, 0), (1, 0));
        match direction {
            "out" => assert_eq!(world.out(&packet.frame()).verdict, TCX_NEXT),
            _ => {
                let reply = Packet::udp((ORIGIN, 53), (EGRESS, keys.1.local_port), b"y");
                assert_eq!(world.back(&reply.frame()).0, XDP_PASS);
            }
        }
        assert_eq!(sweep(&world, &[keys.0]), 0, "{direction}");
        assert_eq!(world.consistent(), 1, "{direction}");
    }
    let strangers = [flow(6, (POD, 1), (ORIGIN, 1)), flow(17, (POD_2, 5000), (ORIGIN, 53))];
    assert_eq!(sweep(&world, &strangers), 0, "keys without flow");
    assert_eq!(sweep(&world, &[]), 0);
}

#[test]
fn xdp_sweep_more_than_one_batch() {
    uptime_suffices();
    let mut world = World::new();
    world.allocation(&[EGRESS], TIMEOUTS);
    let count = 2 * SWEEP_BATCH + 5;
    let flows: Vec<_> = (0..count)
        .map(|at| open(&world, &Packet::udp((POD, 5000 + at as u16), (ORIGIN, 53), b"x")))
        .collect();
    // Every third goes on.
    for keys in flows.iter().enumerate().filter(|(at, _)| at % 3 != 0).map(|(_, keys)| keys) {
        set(&mut world, keys, (1, 0), (0, 0));
    }
    let candidates: Vec<_> = flows.iter().map(|keys| keys.0).collect();
    let live = count.div_ceil(3);
    assert_eq!(sweep(&world, &candidates) as usize, count - live);
    assert_eq!(world.consistent(), live);
    for (at, keys) in flows.iter().enumerate() {
        assert_eq!(world.forward(&keys.0).is_some(), at % 3 == 0, "flow {at}");
    }
}

#[test]
fn xdp_sweep_what_follows() {
    let mut world = World::new();
    let syn = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN);
    let keys = open(&world, &syn);
    set(&mut world, &keys, (1, SEEN_RST), (1, 0));
    assert_eq!(sweep(&world, &[keys.0]), 1);
    world.counted();
    let late = Packet::tcp((ORIGIN, 443), (EGRESS, keys.1.local_port), ACK);
    assert_eq!(world.back(&late.frame()).0, XDP_DROP);
    assert_eq!(world.counted(), [("drop_no_flow", 1)], "a late reply");
    let late = Packet::tcp((POD, 40000), (ORIGIN, 443), ACK);
    assert_eq!(world.out(&late.frame()).verdict, TCX_REDIRECT);
    assert_eq!(world.counted(), [("refusal_sent", 1), ("refuse_no_flow", 1)], "a late segment of the pod");
    let again = open(&world, &syn);
    assert_ne!(again.1.local_port, keys.1.local_port, "a new connection has a new port");
}

#[test]
fn xdp_sweep_blocks() {
    uptime_suffices();
    let mut world = World::new();
    let syn = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN);
    let keys = open(&world, &syn);
    let egress = Ipv4Addr::from(keys.1.local.to_ne_bytes());
    let key = block(6, (egress, keys.1.local_port), (ORIGIN, 443));
    let idle = |world: &mut World, seconds| {
        let value = BlockValue { last_used: now() - seconds, ..world.block(&key).unwrap() };
        world.plane.hash("BLOCKS").unwrap().insert(key, value, 0).unwrap();
    };
    let sweep_blocks = |world: &World| world.plane.sweeper().unwrap().blocks(&[key]).unwrap();
    idle(&mut world, BLOCK_IDLE + 10);
    assert_eq!(sweep_blocks(&world), 0, "a port is in use");
    assert_eq!(world.consistent(), 1);

    set(&mut world, &keys, (1, SEEN_RST), (1, 0));
    assert_eq!(sweep(&world, &[keys.0]), 1);
    assert_eq!(sweep_blocks(&world), 0, "just used");
    idle(&mut world, BLOCK_IDLE - 10);
    assert_eq!(sweep_blocks(&world), 0, "used not long ago");
    idle(&mut world, BLOCK_IDLE + 1);
    assert_eq!(sweep_blocks(&world), 1, "idle");
    assert_eq!(world.block(&key), None);
    assert_eq!(sweep_blocks(&world), 0, "gone already");
    open(&world, &syn);
    assert_eq!(world.consistent(), 1, "made anew when needed");
}

#[test]
fn xdp_sweep_flows_of_a_pod_that_is_gone_take_nothing_in_and_end_after_a_rest() {
    uptime_suffices();
    for gone in ["nobody has the address", "another pod has the address"] {
        let mut world = World::new();
        let packet = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN);
        let keys = open(&world, &packet);
        let both = SEEN_SYN | SEEN_ACK;
        set(&mut world, &keys, (now(), both), (now(), both));
        let reply = Packet::tcp((ORIGIN, 443), (EGRESS, keys.1.local_port), ACK).frame();
        assert_eq!(sweep(&world, &[keys.0]), 0);
        assert_eq!(world.back(&reply).0, XDP_PASS, "the pod lives");
        match gone {
            "nobody has the address" => world.remove_pod(POD),
            _ => world.next_pod(POD, 1),
        }
        world.counted();
        assert_eq!(sweep(&world, &[keys.0]), 0, "{gone}: the port rests");
        assert_eq!(world.back(&reply).0, XDP_DROP, "{gone}");
        let left = Packet::tcp((EGRESS, keys.1.local_port), (ORIGIN, 443), SYN);
        let quote = Packet::error(ORIGIN, &left, 3, 1, 8);
        assert_eq!(world.back(&quote.frame()).0, XDP_DROP, "{gone}: nor an error");
        assert_eq!(world.counted(), [("drop_no_flow", 2)], "{gone}");
        // However long the origin goes on.
        let old = now() - REST - 1;
        set(&mut world, &keys, (old, both), (now(), both));
        assert_eq!(sweep(&world, &[keys.0]), 1, "{gone}: after the rest");
        assert_eq!(world.consistent(), 0, "{gone}");
    }
}

#[test]
fn xdp_sweep_a_pod_that_was_only_overlooked_gets_its_replies_again() {
    let mut world = World::new();
    let packet = Packet::udp((POD, 5000), (ORIGIN, 53), b"x");
    let keys = open(&world, &packet);
    let reply = Packet::udp((ORIGIN, 53), (EGRESS, keys.1.local_port), b"y").frame();
    world.remove_pod(POD);
    assert_eq!(sweep(&world, &[keys.0]), 0);
    assert_eq!(world.back(&reply).0, XDP_DROP);
    assert_eq!(world.out(&packet.frame()).verdict, TCX_NEXT);
    assert_eq!(world.back(&reply).0, XDP_DROP, "nobody has named the pod again");
    world.pod_class(1, POD, 1);
    assert_eq!(world.out(&packet.frame()).verdict, TCX_NEXT);
    assert_eq!(world.back(&reply).0, XDP_PASS);
    assert_eq!(world.consistent(), 1);
}

#[test]
fn xdp_sweep_entries_that_no_flow_has_are_buried_and_then_removed() {
    uptime_suffices();
    let mut world = World::new();
    let packet = Packet::udp((POD, 5000), (ORIGIN, 53), b"x");
    let keys = open(&world, &packet);
    let reply = Packet::udp((ORIGIN, 53), (EGRESS, keys.1.local_port), b"y").frame();
    let orphans = |world: &World| world.plane.sweeper().unwrap().orphans(&[keys.1]).unwrap();
    let made = |world: &mut World, made| {
        let value = ReverseValue { made, ..world.reverse(&keys.1).unwrap() };
        world.set_reverse(keys.1, value);
    };
    made(&mut world, 1);
    assert_eq!(orphans(&world), 0, "it has its flow");
    assert_eq!(world.consistent(), 1);
    world.remove_forward(&keys.0);
    world.recount();
    let just = now();
    made(&mut world, just);
    assert_eq!(orphans(&world), 0, "the flow may just be about to be entered");
    made(&mut world, 1);
    assert_eq!(world.back(&reply).0, XDP_PASS);
    assert_eq!(orphans(&world), 0, "the port rests");
    world.counted();
    assert_eq!(world.back(&reply).0, XDP_DROP);
    assert_eq!(world.counted(), [("drop_no_flow", 1)], "nothing is taken in meanwhile");
    let value = ReverseValue { last_seen: 1, ..world.reverse(&keys.1).unwrap() };
    world.set_reverse(keys.1, value);
    assert_eq!(orphans(&world), 1);
    assert_eq!(world.counted(), [("orphaned", 1)]);
    assert_eq!(world.consistent(), 0, "the port is given back");
    assert_eq!(orphans(&world), 0, "gone already");
}

#[test]
fn xdp_sweep_flows_whose_slice_is_another_nodes_are_ended() {
    let mut world = World::new();
    let keys = open(&world, &Packet::udp((POD, 5000), (ORIGIN, 53), b"x"));
    let revoked = |world: &World| world.plane.sweeper().unwrap().revoked(&[keys.0]).unwrap();
    assert_eq!(revoked(&world), 0, "the slice is ours");
    world.allow(EGRESS, &[]);
    assert_eq!(revoked(&world), 0, "it drains");
    world.own(0, SLICE, 2);
    world.plane.hash::<u32, AddressValue>("ADDRESSES").unwrap().remove(&raw(EGRESS)).unwrap();
    assert_eq!(revoked(&world), 0, "the address is not known");
    let value = AddressValue { index: 0, allocation: 0 };
    world.plane.hash("ADDRESSES").unwrap().insert(raw(EGRESS), value, 0).unwrap();
    world.counted();
    assert_eq!(revoked(&world), 1, "it is another node's");
    assert_eq!(world.counted(), [("revoked", 1)]);
    assert_eq!(world.consistent(), 0);
    world.own(0, SLICE, 0);
    world.allow(EGRESS, &[SLICE]);
    let keys = open(&world, &Packet::udp((POD, 5001), (ORIGIN, 53), b"x"));
    assert_eq!(world.plane.sweeper().unwrap().revoked(&[keys.0]).unwrap(), 1, "it is nobody's");
}

/// A mark that rises between being read and being reset is not lost.
#[test]
fn xdp_sweep_high_water_marks_begin_anew_when_they_have_been_read() {
    let mut world = World::new();
    let packet = |port| Packet::tcp((POD, port), (ORIGIN, 443), SYN);
    let keys = open(&world, &packet(40000));
    let egress = Ipv4Addr::from(keys.1.local.to_ne_bytes());
    let block = block(6, (egress, keys.1.local_port), (ORIGIN, 443));
    open(&world, &packet(40001));
    let read = |high| world.plane.sweeper().unwrap().peaks(&[PeakKey { block, high }]).unwrap();
    assert_eq!(read(2), 0, "as many are in use");
    set(&mut world, &keys, (1, SEEN_RST), (1, 0));
    assert_eq!(sweep(&world, &[keys.0]), 1);
    let read =
        |world: &World, high| world.plane.sweeper().unwrap().peaks(&[PeakKey { block, high }]).unwrap();
    assert_eq!(read(&world, 1), 0, "it has risen since");
    assert_eq!(world.block(&block).unwrap().high, 2);
    assert_eq!(read(&world, 2), 1);
    assert_eq!(world.block(&block).unwrap().high, 1);
    assert_eq!(world.consistent(), 1);
}
