//! A single IPv6 address through the real programs, byte for byte: its ports are taken, steered, kept and given back like those of
//! IPv4, and every checksum is right afterwards.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use support::packet::{ACK, FIN, NODE_MAC, ROUTER_MAC, RST, SYN, geneve};
use support::six::*;
use support::*;

const ROUTER: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xeeee, 0, 0, 0, 0, 1);

const SOURCE: usize = 8;
const DESTINATION: usize = 24;

fn port_at(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(frame[14 + 40 + at..14 + 40 + at + 2].try_into().unwrap())
}

/// Sends a packet of a pod whose transport header has the port at `at`; gives the port outside. The frame must be the one that a
/// pod with the address and the port would have sent.
fn leaves(world: &mut World, name: &str, packet: &Packet6, at: usize) -> u16 {
    let out = world.out(&packet.frame());
    let counted = world.counted();
    assert_eq!(out.verdict, TCX_NEXT, "{name}: {counted:?}");
    assert!(counted.contains(&("translated", 1)), "{name}: {counted:?}");
    let port = port_at(&out.frame, at);
    assert_eq!(port >> 8, SLICE, "{name}: port {port}");
    assert_eq!(out.frame, outside(packet, at, port).frame(), "{name}: frame");
    port
}

/// The packet as the origin must see it.
fn outside(packet: &Packet6, at: usize, port: u16) -> Packet6 {
    let mut outside = packet.clone().from(SINGLE);
    outside.body[at..at + 2].copy_from_slice(&port.to_be_bytes());
    outside
}

/// The packet that comes in, `port` at `at`, must reach the pod as if it had been sent to its address and `pod_port`.
fn arrives(world: &mut World, name: &str, packet: &Packet6, pod: Ipv6Addr, at: usize, pod_port: u16) {
    let (verdict, frame) = world.back(&packet.frame());
    assert_eq!((verdict, world.counted()), (XDP_PASS, vec![("reverse", 1)]), "{name}");
    let mut expected = packet.clone().to(pod);
    expected.body[at..at + 2].copy_from_slice(&pod_port.to_be_bytes());
    assert_eq!(frame, expected.frame(), "{name}: frame");
}

/// What another node sends here.
fn steered(packet: &[u8], vni: u32) -> Vec<u8> {
    let mut frame = geneve((NODE_2, NODE), (ROUTER_MAC, NODE_MAC), 0xc123, vni, packet);
    frame[14 + 20 + 8 + 2..][..2].copy_from_slice(&[0x86, 0xdd]);
    frame
}

fn kept_out(world: &mut World, name: &str, frame: &[u8], reason: Counter) {
    assert_eq!(world.back(frame).0, XDP_DROP, "{name}");
    assert_eq!(world.counted(), [(reason.label(), 1)], "{name}");
}

fn refused(world: &mut World, name: &str, packet: &Packet6, reason: Counter) {
    let out = world.out(&packet.frame());
    assert_eq!(out.verdict, TCX_REDIRECT, "{name}: {:?}", world.counted());
    assert_eq!(world.counted(), [("refusal_sent", 1), (reason.label(), 1)], "{name}");
    assert!(is_sound(&out.frame[14..]), "{name}: the answer");
}

fn syn(pod: (Ipv6Addr, u16), to: (Ipv6Addr, u16)) -> Packet6 {
    Packet6::tcp(pod, to, SYN, b"")
}

#[test]
fn xdp_single_tcp_udp_and_echoes_go_both_ways_and_nothing_else_changes() {
    let mut world = single_world();
    for (pod, local) in [(POD6, 40000), (FAR_POD6, 40000), (POD6, 40001)] {
        let port = leaves(&mut world, "SYN", &syn((pod, local), (ORIGIN6, 443)), 0);
        for (name, flags, payload) in [("SYN-ACK", SYN | ACK, &b""[..]), ("data", ACK, b"answer, odd")] {
            let back = Packet6::tcp((ORIGIN6, 443), (SINGLE, port), flags, payload);
            arrives(&mut world, name, &back, pod, 2, local);
        }
        let more = Packet6::tcp((pod, local), (ORIGIN6, 443), ACK, b"more of it");
        assert_eq!(leaves(&mut world, "data", &more, 0), port, "the same flow");

        let question = Packet6::udp((pod, local), (ORIGIN6, 53), b"question");
        let port = leaves(&mut world, "question", &question, 0);
        let answer = Packet6::udp((ORIGIN6, 53), (SINGLE, port), b"answers");
        arrives(&mut world, "answer", &answer, pod, 2, local);

        let mut ping = Packet6::echo(pod, ORIGIN6, 128);
        ping.body[4..6].copy_from_slice(&local.to_be_bytes());
        let id = leaves(&mut world, "ping", &ping, 4);
        let mut pong = Packet6::echo(ORIGIN6, SINGLE, 129);
        pong.body[4..6].copy_from_slice(&id.to_be_bytes());
        arrives(&mut world, "pong", &pong, pod, 4, local);
    }
    assert_eq!(world.consistent(), 9);
    let behind = syn((POD6, 40002), (ORIGIN6, 443)).behind(60, 1);
    let out = world.out(&behind.frame());
    assert_eq!(out.verdict, TCX_NEXT, "behind an extension header");
    assert!(is_sound(&out.frame[14..]));
}

#[test]
fn xdp_single_a_sum_of_zero_is_sent_as_ones() {
    let mut world = single_world();
    // Some payload of two bytes makes the sum come out as zero, whatever the port.
    let port = leaves(&mut world, "first", &Packet6::udp((POD6, 5000), (ORIGIN6, 53), &[0, 0]), 0);
    let mut met = 0;
    for word in 0..=u16::MAX {
        let back = Packet6::udp((ORIGIN6, 53), (SINGLE, port), &word.to_be_bytes());
        let frame = back.clone().to(POD6);
        let mut expected = frame.clone();
        expected.body[2..4].copy_from_slice(&5000u16.to_be_bytes());
        if expected.frame()[14 + 40 + 6..14 + 40 + 8] == [0xff, 0xff] {
            met += 1;
            arrives(&mut world, "in", &back, POD6, 2, 5000);
        }
        let packet = Packet6::udp((POD6, 5000), (ORIGIN6, 53), &word.to_be_bytes());
        if outside(&packet, 0, port).frame()[14 + 40 + 6..14 + 40 + 8] == [0xff, 0xff] {
            met += 1;
            leaves(&mut world, "out", &packet, 0);
        }
    }
    assert!(met >= 2, "{met}");
}

#[test]
fn xdp_single_a_slice_is_filled_to_the_last_port_towards_each_origin() {
    let mut world = single_world();
    for (name, origin) in [("one", (ORIGIN6, 443)), ("another port", (ORIGIN6, 444))] {
        let mut ports = BTreeSet::new();
        for local in 0..256 {
            ports.insert(leaves(&mut world, name, &syn((POD6, 20000 + local), origin), 0));
        }
        assert_eq!(ports.len(), 256, "{name}");
        refused(&mut world, name, &syn((POD6, 30000), origin), Counter::RefuseNoPort);
    }
    let other = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 8);
    leaves(&mut world, "another origin", &syn((POD6, 30000), (other, 443)), 0);
    assert_eq!(world.consistent(), 513);
}

#[test]
fn xdp_single_what_is_full_goes_on_to_the_next_address_and_then_to_the_secondary() {
    let mut world = single_world();
    add_single(&mut world, SINGLE_2, INDEX + 1);
    set_singles(&mut world, 0, &[SINGLE, SINGLE_2]);
    let mut seen = BTreeSet::new();
    for local in 0..512 {
        let out = world.out(&syn((POD6, 20000 + local), (ORIGIN6, 443)).frame());
        assert_eq!(out.verdict, TCX_NEXT, "{local}");
        let source = <[u8; 16]>::try_from(&out.frame[14 + SOURCE..14 + SOURCE + 16]).unwrap();
        seen.insert((Ipv6Addr::from(source), port_at(&out.frame, 0)));
    }
    let of = |address| seen.iter().filter(|(source, _)| *source == address).count();
    assert_eq!((seen.len(), of(SINGLE), of(SINGLE_2)), (512, 256, 256));
    world.counted();
    refused(&mut world, "both full", &syn((POD6, 30000), (ORIGIN6, 443)), Counter::RefuseNoPort);

    // The secondary has a /64.
    let value = VerdictValue { action: ACTION_ALLOCATE, secondary: 1, binding: 3, ..Default::default() };
    let key = VerdictKey { generation: 1, pod_class: 1, destination_class: 1, port_class: 0 };
    world.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
    let mut second = Allocation6Value { identity: IDENTITY, count: 1, ..Default::default() };
    second.networks[0] = network_of(&raw6(NETWORK));
    world.plane.array("ALLOCATIONS6").unwrap().set(1, second, 0).unwrap();
    let out = world.out(&syn((POD6, 30000), (ORIGIN6, 443)).frame());
    assert_eq!(
        (out.verdict, &out.frame[14 + SOURCE..14 + SOURCE + 16]),
        (TCX_NEXT, &pod_outside().octets()[..])
    );
    assert!(world.counted().contains(&("secondary_flow", 1)));

    // Or a single address of its own, while the first one has none that is free.
    world.plane.array("ALLOCATIONS6").unwrap().set(1, Allocation6Value::default(), 0).unwrap();
    let third = Ipv6Addr::new(0x2001, 0xdb8, 1, 9, 0, 0, 0, 9);
    add_single(&mut world, third, INDEX + 2);
    set_singles(&mut world, 1, &[third]);
    let out = world.out(&syn((POD6, 30001), (ORIGIN6, 443)).frame());
    assert_eq!((out.verdict, &out.frame[14 + SOURCE..14 + SOURCE + 16]), (TCX_NEXT, &third.octets()[..]));
    assert!(world.counted().contains(&("secondary_flow", 1)));
}

#[test]
fn xdp_single_a_64_is_left_from_first_and_a_flow_keeps_what_it_has() {
    let mut world = single_world();
    let port = leaves(&mut world, "before", &syn((POD6, 40000), (ORIGIN6, 443)), 0);
    set_allocation6(&mut world, &[NETWORK]);
    let data = Packet6::tcp((POD6, 40000), (ORIGIN6, 443), ACK, b"data");
    assert_eq!(leaves(&mut world, "after", &data, 0), port);
    let out = world.out(&syn((POD6, 40001), (ORIGIN6, 443)).frame());
    assert_eq!(&out.frame[14 + SOURCE..14 + SOURCE + 16], &pod_outside().octets()[..], "a new one");
    assert_eq!(port_at(&out.frame, 0), 40001);
    // Neither do flows over IPv4 take ports of it, nor its flows those of IPv4.
    let v4 = world.out(&support::packet::Packet::tcp((POD, 40000), (ORIGIN, 443), SYN).frame());
    assert_eq!(v4.verdict, TCX_NEXT);
    assert_eq!(&v4.frame[26..30], &EGRESS.octets());
    assert_eq!(world.consistent(), 2);
}

#[test]
fn xdp_single_nothing_comes_in_that_no_flow_asked_for() {
    let mut world = single_world();
    let port = leaves(&mut world, "question", &Packet6::udp((POD6, 5000), (ORIGIN6, 53), b"q"), 0);
    let udp = |from: (Ipv6Addr, u16), port| Packet6::udp(from, (SINGLE, port), b"x").frame();
    kept_out(&mut world, "another host", &udp((ROUTER, 53), port), Counter::DropNoFlow);
    kept_out(&mut world, "another port of the origin", &udp((ORIGIN6, 54), port), Counter::DropNoFlow);
    kept_out(&mut world, "another port", &udp((ORIGIN6, 53), port ^ 1), Counter::DropNoFlow);
    kept_out(&mut world, "a port of no slice", &udp((ORIGIN6, 53), 80), Counter::DropNoOwner);
    kept_out(&mut world, "a slice of nobody", &udp((ORIGIN6, 53), 0x2000), Counter::DropNoOwner);
    let syn = Packet6::tcp((ORIGIN6, 53), (SINGLE, port), SYN, b"").frame();
    kept_out(&mut world, "another protocol", &syn, Counter::DropNoFlow);
    let ping = Packet6::echo(ORIGIN6, SINGLE, 128).frame();
    kept_out(&mut world, "an echo request", &ping, Counter::DropNoFlow);
    let esp = Packet6::new(ORIGIN6, SINGLE, 50, vec![7; 40]).frame();
    kept_out(&mut world, "a protocol without ports", &esp, Counter::DropNoFlow);
    let mut cut = udp((ORIGIN6, 53), port);
    cut.truncate(14 + 40 + 4);
    kept_out(&mut world, "cut short", &cut, Counter::DropMalformedIn);

    let local = leaves(&mut world, "SYN", &self::syn((POD6, 40000), (ORIGIN6, 443)), 0);
    let open = Packet6::tcp((ORIGIN6, 443), (SINGLE, local), SYN | ACK, b"");
    arrives(&mut world, "SYN-ACK", &open, POD6, 2, 40000);
    let syn = Packet6::tcp((ORIGIN6, 443), (SINGLE, local), SYN, b"").frame();
    kept_out(&mut world, "a SYN into a connection", &syn, Counter::DropNoFlow);
    // Another address of its /64 is nobody's business.
    let frame = udp((ORIGIN6, 53), port);
    let mut other = frame.clone();
    other[14 + DESTINATION + 15] = 99;
    assert_eq!(world.back(&other), (XDP_PASS, other.clone()));
}

#[test]
fn xdp_single_what_is_for_another_node_is_sent_there_and_taken_there() {
    let mut world = single_world();
    let port = SLICE_2 << 8 | 5;
    let packet = Packet6::udp((ORIGIN6, 53), (SINGLE, port), b"for the other");
    let (verdict, frame) = world.back(&packet.frame());
    assert_eq!(world.counted(), [("steered", 1)]);
    assert_eq!(verdict, XDP_TX);
    assert_eq!(&frame[..6], &MAC_2);
    assert_eq!(&frame[14 + 36..], &packet.bytes()[..], "the packet as it came");
    // The other one's agent says the same of this node's port.
    let own = leaves(&mut world, "question", &Packet6::udp((POD6, 5000), (ORIGIN6, 53), b"q"), 0);
    let packet = |port| Packet6::udp((ORIGIN6, 53), (SINGLE, port), b"steered");
    let (verdict, out) = world.back(&steered(&packet(own).bytes(), VNI_STEER));
    assert_eq!((verdict, world.counted()), (XDP_PASS, vec![("reverse", 1), ("steered_here", 1)]));
    let mut expected = packet(own).to(POD6);
    expected.body[2..4].copy_from_slice(&5000u16.to_be_bytes());
    assert_eq!(out[14..], expected.bytes()[..]);
    let frame = steered(&packet(port).bytes(), VNI_STEER);
    assert_eq!(world.back(&frame).0, XDP_DROP, "never sent on");
    assert!(world.counted().contains(&("drop_not_owner", 1)));
    let big = Packet6::udp((ORIGIN6, 53), (SINGLE, port), &[0; 1450]);
    let (verdict, answer) = world.back(&big.frame());
    assert_eq!((verdict, world.counted()), (XDP_TX, vec![("too_big", 1)]));
    assert!(is_sound(&answer[14..]));
    assert_eq!((answer[14 + 40], &answer[14 + 44..14 + 48]), (2, &1464u32.to_be_bytes()[..]));
}

#[test]
fn xdp_single_datagrams_in_fragments_go_both_ways_and_meet_at_one_node() {
    let mut world = single_world();
    let payload: Vec<u8> = (0..3000u32).map(|at| at as u8).collect();
    let datagram = Packet6::udp((POD6, 5000), (ORIGIN6, 53), &payload);
    let mut port = 0;
    for (at, frame) in datagram.fragments(1232, 0xfeed).iter().enumerate() {
        let out = world.out(frame);
        assert_eq!(out.verdict, TCX_NEXT, "{at}: {:?}", world.counted());
        if at == 0 {
            port = port_at(&out.frame, 8);
        }
        assert_eq!(out.frame, outside(&datagram, 0, port).fragments(1232, 0xfeed)[at], "out {at}");
    }
    world.counted();
    let later = datagram.fragments(1232, 0x0dd).remove(2);
    assert_eq!(world.out(&later).verdict, TCX_DROP, "nothing is known of its first one");
    assert_eq!(world.counted(), [("drop_fragment_out", 1)]);

    let back = Packet6::udp((ORIGIN6, 53), (SINGLE, port), &payload);
    let mut to_pod = back.clone().to(POD6);
    to_pod.body[2..4].copy_from_slice(&5000u16.to_be_bytes());
    for (frame, expected) in back.fragments(1232, 0xbeef).iter().zip(to_pod.fragments(1232, 0xbeef)) {
        assert_eq!(world.back(frame), (XDP_PASS, expected), "{:?}", world.counted());
    }
    world.counted();
    let early = back.fragments(1232, 0xcafe).remove(1);
    kept_out(&mut world, "before its first one", &early, Counter::DropFragmentIn);
    // All of a datagram go to its home, from wherever they come, and from there to the owner of the port.
    world.home(INDEX, 2);
    for frame in back.fragments(1232, 0xd00d) {
        let (verdict, out) = world.back(&frame);
        assert_eq!((verdict, world.counted()), (XDP_TX, vec![("steered", 1)]));
        assert_eq!((&out[..6], &out[14 + 36..]), (&MAC_2[..], &frame[14..]));
        let vni = u32::from_be_bytes([0, out[14 + 32], out[14 + 33], out[14 + 34]]);
        assert_eq!(vni, VNI_FRAGMENT);
    }
    let theirs = Packet6::udp((ORIGIN6, 53), (SINGLE, SLICE_2 << 8), &payload);
    for frame in theirs.fragments(1232, 0xd11d) {
        let (verdict, out) = world.back(&steered(&frame[14..], VNI_FRAGMENT));
        assert_eq!((verdict, world.counted()), (XDP_TX, vec![("steered", 1), ("steered_here", 1)]));
        let vni = u32::from_be_bytes([0, out[14 + 32], out[14 + 33], out[14 + 34]]);
        assert_eq!((vni, &out[14 + 36..]), (VNI_STEER, &frame[14..]));
    }
    for (frame, expected) in back.fragments(1232, 0xd22d).iter().zip(to_pod.fragments(1232, 0xd22d)) {
        for vni in [VNI_FRAGMENT, VNI_STEER] {
            let (verdict, out) = world.back(&steered(&frame[14..], vni));
            assert_eq!((verdict, &out[14..]), (XDP_PASS, &expected[14..]), "{vni}: {:?}", world.counted());
        }
    }
}

/// An error about a packet of the address reaches the pod as one about the pod's own.
#[test]
fn xdp_single_errors_come_in_with_what_they_quote() {
    let mut world = single_world();
    let mut ping = Packet6::echo(POD6, ORIGIN6, 128);
    ping.body[4..6].copy_from_slice(&77u16.to_be_bytes());
    let sent = [
        ("TCP", syn((POD6, 40000), (ORIGIN6, 443)), 0),
        ("UDP", Packet6::udp((POD6, 5000), (ORIGIN6, 53), b"question"), 0),
        ("ping", ping, 4),
    ];
    for (name, inside, at) in sent {
        let port = leaves(&mut world, name, &inside, at);
        let seen = outside(&inside, at, port);
        for (kind, bytes) in [(1, 48), (2, 100), (3, 48)] {
            let (verdict, frame) = world.back(&Packet6::error(ROUTER, &seen, kind, bytes).frame());
            assert_eq!((verdict, world.counted()), (XDP_PASS, vec![("reverse", 1)]), "{name} {kind}");
            assert!(is_sound(&frame[14..]), "{name} {kind}: checksum");
            // All but the checksums, that of the error and the quoted one, which nobody looks at.
            let expected = Packet6::error(ROUTER, &inside, kind, bytes).frame();
            let quoted = 14 + 48;
            let bare = |frame: &[u8]| {
                let mut frame = frame.to_vec();
                frame[14 + 42..14 + 44].fill(0);
                let place = quoted
                    + 40
                    + if at == 4 {
                        2
                    } else if name == "TCP" {
                        16
                    } else {
                        6
                    };
                if place + 2 <= frame.len() {
                    frame[place..place + 2].fill(0);
                }
                frame
            };
            assert_eq!(bare(&frame), bare(&expected), "{name} {kind}");
        }
        let mut foreign = seen.clone().to(ROUTER);
        foreign.source = SINGLE;
        let about_another = Packet6::error(ROUTER, &foreign, 1, 60).frame();
        kept_out(&mut world, "to another destination", &about_another, Counter::DropNoFlow);
    }
    let mut other = Packet6::error(ROUTER, &Packet6::udp((ROUTER, 1), (ORIGIN6, 2), b""), 1, 60);
    other.destination = SINGLE;
    kept_out(&mut world, "about a packet of somebody else", &other.frame(), Counter::DropMalformedIn);
    let cut = Packet6::error(ROUTER, &Packet6::udp((SINGLE, 0x800), (ORIGIN6, 53), b""), 1, 44).frame();
    kept_out(&mut world, "quotes no ports", &cut, Counter::DropMalformedIn);
}

#[test]
fn xdp_single_errors_of_pods_and_of_the_node_leave_with_what_they_quote() {
    let mut world = single_world();
    let port = leaves(&mut world, "question", &Packet6::udp((POD6, 5000), (ORIGIN6, 53), b"q"), 0);
    let got = Packet6::udp((ORIGIN6, 53), (POD6, 5000), b"late");
    let as_sent = Packet6::udp((ORIGIN6, 53), (SINGLE, port), b"late");
    let expected = |kind| {
        let mut expected = Packet6::error(SINGLE, &as_sent, kind, 64).to(ORIGIN6);
        // The quoted checksum is the one that the pod got.
        let place = 8 + 40 + 6;
        expected.body[place..place + 2].copy_from_slice(&got.bytes()[46..48]);
        expected.frame()
    };
    let node = Ipv6Addr::new(0x2001, 0xdb8, 0xeeee, 0, 0, 0, 0, 2);
    for (name, source) in [("the pod's", POD6), ("the node's", node)] {
        for kind in [1, 3] {
            let out = world.out(&Packet6::error(source, &got, kind, 64).to(ORIGIN6).frame());
            assert_eq!((out.verdict, world.counted()), (TCX_NEXT, vec![("translated", 1)]), "{name}");
            assert_eq!(out.frame, expected(kind), "{name} {kind}");
        }
    }
    let other = Packet6::udp((ORIGIN6, 53), (POD6, 5001), b"of no flow");
    let out = world.out(&Packet6::error(POD6, &other, 1, 64).to(ORIGIN6).frame());
    assert_ne!(out.verdict, TCX_NEXT, "nothing leaves about what is of no flow");
}

#[test]
fn xdp_single_what_cannot_leave_is_refused() {
    let mut world = single_world();
    let esp = Packet6::new(POD6, ORIGIN6, 50, vec![7; 40]);
    refused(&mut world, "without ports", &esp, Counter::RefuseProtocol);
    let data = Packet6::tcp((POD6, 40000), (ORIGIN6, 443), ACK, b"data");
    refused(&mut world, "of no flow", &data, Counter::RefuseNoFlow);
    let reply = Packet6::echo(POD6, ORIGIN6, 129).frame();
    assert_eq!(world.out(&reply).verdict, TCX_DROP, "nobody has asked, and a reply is not answered");
    world.counted();
    let forged = syn((SINGLE, 40000), (ORIGIN6, 443)).frame();
    assert_eq!((world.pod(&forged, 0).verdict, world.out_unmarked(&forged).verdict), (TCX_DROP, TCX_DROP));
    assert_eq!(world.counted(), [("drop_forged", 2)]);
    allow_single(&mut world, SINGLE, &[]);
    refused(&mut world, "no slice", &syn((POD6, 40000), (ORIGIN6, 443)), Counter::RefuseUnavailable);
}

#[test]
fn xdp_single_deadlines_end_first_what_is_new_and_then_all() {
    let mut world = single_world();
    let port = leaves(&mut world, "SYN", &syn((POD6, 40000), (ORIGIN6, 443)), 0);
    let as_v4 = std::net::Ipv4Addr::from(single_key(SINGLE).to_ne_bytes());
    world.fence(as_v4, 30, 60);
    world.renewed(40, 30);
    let data = Packet6::tcp((POD6, 40000), (ORIGIN6, 443), ACK, b"data");
    assert_eq!(leaves(&mut world, "soft", &data, 0), port);
    refused(&mut world, "soft", &syn((POD6, 40001), (ORIGIN6, 443)), Counter::RefuseFenced);
    world.renewed(70, 30);
    assert_eq!(world.out(&data.frame()).verdict, TCX_DROP);
    assert_eq!(world.counted(), [("drop_fenced", 1)]);
    let back = Packet6::tcp((ORIGIN6, 443), (SINGLE, port), ACK, b"").frame();
    kept_out(&mut world, "in", &back, Counter::DropFenced);
}

#[test]
fn xdp_single_flows_are_a_pods_and_end_like_others() {
    let mut world = single_world();
    let port = leaves(&mut world, "SYN", &syn((POD6, 40000), (ORIGIN6, 443)), 0);
    for flags in [SYN | ACK, FIN | ACK] {
        let back = Packet6::tcp((ORIGIN6, 443), (SINGLE, port), flags, b"");
        arrives(&mut world, "in", &back, POD6, 2, 40000);
    }
    let fin = Packet6::tcp((POD6, 40000), (ORIGIN6, 443), FIN | ACK, b"");
    assert_eq!(leaves(&mut world, "FIN", &fin, 0), port);
    let udp = leaves(&mut world, "UDP", &Packet6::udp((POD6, 5000), (ORIGIN6, 53), b"q"), 0);
    // The next pod with the address has no part in them.
    let next = Pod6Value { incarnation: INCARNATION + 1, ..pod6(1, 5) };
    set_pod6(&mut world, 1, POD6, next);
    let again = leaves(&mut world, "the next pod's", &Packet6::udp((POD6, 5000), (ORIGIN6, 53), b"q"), 0);
    assert_ne!(again, udp);
    let key = |protocol, local_port, remote_port| FlowKey {
        local: 5u32.to_be(),
        remote: stand_in(&raw6(ORIGIN6), SEED),
        local_port,
        remote_port,
        protocol,
        pad: [0; 3],
    };
    // Its pod is gone: the flow rests, and then ends.
    let (flow, value) = (key(6, 40000, 443), world.forward(&key(6, 40000, 443)).unwrap());
    assert_eq!(world.plane.sweeper().unwrap().flows(&[flow]).unwrap(), 0, "its port rests");
    world.set_forward(flow, ForwardValue { last_seen: value.last_seen - 200, ..value });
    assert_eq!(world.plane.sweeper().unwrap().flows(&[flow]).unwrap(), 1);
    // That of the pod that is there does not.
    let alive = key(17, 5000, 53);
    let value = world.forward(&alive).unwrap();
    world.set_forward(alive, ForwardValue { last_seen: value.last_seen - 30, ..value });
    assert_eq!(world.plane.sweeper().unwrap().flows(&[alive]).unwrap(), 0);
    let rst = Packet6::tcp((ORIGIN6, 443), (SINGLE, port), RST, b"").frame();
    world.counted();
    kept_out(&mut world, "of what has ended", &rst, Counter::DropNoFlow);
    assert_eq!(world.consistent(), 1);
}

#[test]
fn xdp_single_the_mss_of_a_syn_fits_the_tunnel() {
    let world = single_world();
    let mut packet = syn((POD6, 40000), (ORIGIN6, 443));
    packet.body[12] = 6 << 4;
    packet.body.extend([2, 4, 0x05, 0xa0]);
    let out = world.out(&packet.frame());
    let mss = u16::from_be_bytes(out.frame[14 + 40 + 22..14 + 40 + 24].try_into().unwrap());
    assert_eq!((out.verdict, mss), (TCX_NEXT, 1404));
    assert!(is_sound(&out.frame[14..]));
}

#[test]
fn xdp_single_neighbours_are_told_of_the_address_alone() {
    let mut world = single_world();
    let ask = |target: Ipv6Addr| {
        let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
        body.extend(target.octets());
        body.extend([1, 1]);
        body.extend(ROUTER_MAC);
        let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, target.segments()[7]);
        let asker = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
        let mut frame = Packet6::new(asker, group, ICMP6, body).frame();
        frame[14 + 7] = 255;
        frame
    };
    // Nobody has told this node to answer.
    assert_eq!(world.back(&ask(SINGLE)).0, XDP_PASS);
    let key = NdpKey { network: [0, single_key(SINGLE)], ifindex: 1 };
    let value = NdpValue { mac: NODE_MAC, multicast: 0 };
    world.plane.hash("NDP_ANSWERS").unwrap().insert(key, value, 0).unwrap();
    let (verdict, answer) = world.back(&ask(SINGLE));
    assert_eq!((verdict, world.counted()), (XDP_TX, vec![("ndp_answered", 1)]));
    assert!(is_sound(&answer[14..]));
    assert_eq!((answer[14 + 40], &answer[14 + 48..14 + 64]), (136, &SINGLE.octets()[..]));
    assert_eq!(world.back(&ask(SINGLE_2)).0, XDP_PASS, "its neighbour in the /64 is somebody else's");
}
