//! IPv6 through the real programs, byte for byte: classification, translation both ways, steering.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aegis_node_agent::kernel::kept::Kept;
use aegis_node_agent::observed::from_network;
use aegis_node_agent::sweep::Tables;
use aya::maps::{HashMap, Map, MapData};
use std::net::Ipv6Addr;
use support::packet::{ACK, NODE_MAC, ROUTER_MAC, SYN, geneve};
use support::six::*;
use support::*;

fn world() -> World {
    let mut world = World::new();
    six(&mut world);
    world
}

/// The frame with another source or destination address, and nothing else changed.
fn with_address(frame: &[u8], at: usize, address: Ipv6Addr) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[14 + at..14 + at + 16].copy_from_slice(&address.octets());
    frame
}

/// Gives a frame the Ethernet addresses of an answer.
fn to_router(frame: &mut [u8]) {
    frame[..6].copy_from_slice(&ROUTER_MAC);
    frame[6..12].copy_from_slice(&NODE_MAC);
}

const SOURCE: usize = 8;
const DESTINATION: usize = 24;

/// A frame of a pod leaves with this source, with right checksums and nothing else changed.
fn leaves(world: &mut World, name: &str, frame: &[u8], source: Ipv6Addr) {
    let out = world.out(frame);
    assert_eq!(out.verdict, TCX_NEXT, "{name}: verdict; {:?}", world.counted());
    assert_eq!(out.frame, with_address(frame, SOURCE, source), "{name}: frame");
    let mut counted = world.counted();
    counted.retain(|(label, _)| *label != "new_flow");
    assert_eq!(counted, [("translated", 1)], "{name}: counters");
}

fn kept_in(world: &mut World, name: &str, frame: &[u8], reason: Counter) {
    assert_eq!(world.out(frame).verdict, TCX_DROP, "{name}: verdict");
    assert_eq!(world.counted(), [(reason.label(), 1)], "{name}: counters");
}

/// A frame of a pod is turned away with an answer.
fn refused(world: &mut World, name: &str, frame: &[u8], reason: Counter) -> Vec<u8> {
    let out = world.out(frame);
    assert_eq!((out.verdict, out.mark & MARK), (TCX_REDIRECT, 0), "{name}: verdict; {:?}", world.counted());
    assert_eq!(world.counted(), [("refusal_sent", 1), (reason.label(), 1)], "{name}: counters");
    assert!(is_sound(&out.frame[14..]), "{name}: checksum");
    out.frame
}

/// A frame from outside reaches the host stack with this destination, and the word before it.
fn arrives(world: &mut World, name: &str, frame: &[u8], destination: Ipv6Addr) {
    let (verdict, out) = world.back(frame);
    assert_eq!(verdict, XDP_PASS, "{name}: verdict; {:?}", world.counted());
    assert_eq!(out, with_address(frame, DESTINATION, destination), "{name}: frame");
    assert_eq!(world.counted(), [("reverse", 1)], "{name}: counters");
}

fn kept_out(world: &mut World, name: &str, frame: &[u8], reason: Counter) {
    assert_eq!(world.back(frame).0, XDP_DROP, "{name}: verdict");
    assert_eq!(world.counted(), [(reason.label(), 1)], "{name}: counters");
}

fn syn(source: Ipv6Addr, destination: Ipv6Addr, port: u16) -> Packet6 {
    Packet6::tcp((source, 40000), (destination, port), SYN, b"")
}

/// Packets of many kinds from a pod to the origin.
fn kinds(pod: Ipv6Addr) -> Vec<(&'static str, Packet6)> {
    let udp = Packet6::udp((pod, 5000), (ORIGIN6, 53), b"question");
    vec![
        ("TCP", Packet6::tcp((pod, 40001), (ORIGIN6, 443), ACK, b"some bytes of an odd length")),
        ("UDP", udp.clone()),
        ("echo", Packet6::echo(pod, ORIGIN6, 128)),
        ("ESP", Packet6::new(pod, ORIGIN6, 50, vec![7; 40])),
        ("GRE", Packet6::new(pod, ORIGIN6, 47, vec![0; 24])),
        ("SCTP", Packet6::new(pod, ORIGIN6, 132, vec![9; 32])),
        ("a protocol without a byte", Packet6::new(pod, ORIGIN6, 253, Vec::new())),
        ("hop-by-hop options", udp.clone().behind(0, 1)),
        ("destination options", udp.clone().behind(60, 0)),
        ("a routing header", udp.clone().behind(43, 2)),
        ("authentication", udp.clone().behind(51, 1)),
        ("all of them", udp.behind(51, 1).behind(60, 0).behind(43, 2).behind(0, 0)),
    ]
}

#[test]
fn xdp_ipv6_pod_ingress_table() {
    let mut world = world();
    let udp = |source, destination, port| Packet6::udp((source, 5000), (destination, port), b"x").frame();
    let tcp = |source, destination, port| syn(source, destination, port).frame();
    let short = tcp(POD6, ORIGIN6, 443)[..14 + 40 + 4].to_vec();
    let mut version = tcp(POD6, ORIGIN6, 443);
    version[14] = 0x40;
    let deep = (0..9).fold(syn(POD6, ORIGIN6, 443), |packet, _| packet.behind(60, 0)).frame();
    let later = Packet6::udp((POD6, 1), (ORIGIN6, 2), &[1; 64]).fragments(32, 9).remove(1);
    let neighbour = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
    let covered = |frame: Vec<u8>| (frame, TCX_NEXT, true, None);
    let passes = |frame: Vec<u8>| (frame, TCX_NEXT, false, None);
    let dropped = |frame: Vec<u8>, reason: Counter| (frame, TCX_DROP, false, Some(reason.label()));
    let mut table = vec![
        ("another pod", covered(tcp(FAR_POD6, ORIGIN6, 443))),
        ("a pod without binding", passes(tcp(FREE_POD6, ORIGIN6, 443))),
        ("denied: marked, refused at the uplink", covered(tcp(POD6, DENIED6, 443))),
        ("a destination that no binding names", passes(tcp(POD6, ELSEWHERE6, 443))),
        ("inside the cluster", passes(tcp(POD6, INSIDE6, 443))),
        ("first of the ports", covered(tcp(POD6, WEB6, 440))),
        ("last of the ports", covered(tcp(POD6, WEB6, 443))),
        ("ports behind extension headers", covered(syn(POD6, WEB6, 443).behind(60, 1).behind(0, 0).frame())),
        ("another port behind extension headers", passes(syn(POD6, WEB6, 444).behind(60, 1).frame())),
        ("a port after the range", passes(tcp(POD6, WEB6, 444))),
        ("the port of another protocol", passes(udp(POD6, WEB6, 443))),
        ("a later fragment", covered(later)),
        ("an unknown pod is held", dropped(tcp(UNKNOWN_POD6, ORIGIN6, 443), Counter::DropUnknownPod)),
        ("wherever it goes", dropped(tcp(UNKNOWN_POD6, ELSEWHERE6, 443), Counter::DropUnknownPod)),
        ("an unknown pod reaches the cluster", passes(udp(UNKNOWN_POD6, INSIDE6, 53))),
        (
            "neighbours are spoken to",
            passes(Packet6::icmp(neighbour, neighbour, 135, [0; 4], &[0; 16]).frame()),
        ),
        ("a forged egress address", dropped(tcp(pod_outside(), ORIGIN6, 443), Counter::DropForged)),
        ("any of an egress /64", dropped(tcp(NETWORK_2, INSIDE6, 443), Counter::DropForged)),
        ("not version 6", dropped(version, Counter::DropMalformedOut)),
        ("no whole transport header", dropped(short, Counter::DropMalformedOut)),
        ("more extension headers than there are", dropped(deep, Counter::DropMalformedOut)),
    ];
    table.extend(kinds(POD6).into_iter().map(|(name, packet)| (name, covered(packet.frame()))));
    for (name, (frame, verdict, covered, reason)) in table {
        for before in [OTHER_MARK, OTHER_MARK | MARK] {
            let out = world.pod(&frame, before);
            assert_eq!((out.verdict, out.frame == frame), (verdict, true), "{name}: {:?}", world.counted());
            if verdict == TCX_NEXT {
                let mark = if covered { OTHER_MARK | MARK } else { OTHER_MARK };
                assert_eq!(out.mark, mark, "{name}: mark");
            }
        }
        let expected: Vec<_> = reason.iter().map(|label| (*label, 2)).collect();
        assert_eq!(world.counted(), expected, "{name}: counters");
    }
}

#[test]
fn xdp_ipv6_passes_untouched_while_it_is_not_active() {
    let mut world = world();
    set_config6(&mut world, Config6::default());
    for (name, packet) in kinds(POD6) {
        let frame = packet.frame();
        for out in [world.pod(&frame, OTHER_MARK | MARK), world.out(&frame)] {
            assert_eq!((out.verdict, out.frame), (TCX_NEXT, frame.clone()), "{name}");
        }
        assert_eq!(world.back(&frame), (XDP_PASS, frame), "{name}");
    }
    assert_eq!(world.pod(&syn(POD6, ORIGIN6, 1).frame(), OTHER_MARK | MARK).mark, OTHER_MARK | MARK);
    assert!(world.counted().is_empty());
}

#[test]
fn xdp_ipv6_every_kind_of_packet_leaves_and_its_answer_comes_back() {
    let mut world = world();
    for (pod, outside) in [(POD6, pod_outside()), (FAR_POD6, outside(FAR_POD6, NETWORK, SLICE, FAR_SUFFIX))] {
        for (name, packet) in kinds(pod) {
            let frame = packet.frame();
            assert!(is_sound(&frame[14..]), "{name}: the test's own packet");
            leaves(&mut world, name, &frame, outside);
            // Only the address differs from a packet that was made with it: so no checksum had to change.
            assert_eq!(packet.clone().from(outside).frame(), with_address(&frame, SOURCE, outside), "{name}");
            let back = Packet6 { source: ORIGIN6, destination: outside, ..packet };
            arrives(&mut world, name, &back.frame(), pod);
            assert_eq!(back.clone().to(pod).frame(), with_address(&back.frame(), DESTINATION, pod), "{name}");
        }
    }
}

#[test]
fn xdp_ipv6_datagrams_in_fragments_go_both_ways() {
    let mut world = world();
    let payload: Vec<u8> = (0..3000u32).map(|at| at as u8).collect();
    for (pod, outside) in [(POD6, pod_outside()), (FAR_POD6, outside(FAR_POD6, NETWORK, SLICE, FAR_SUFFIX))] {
        let datagram = Packet6::udp((pod, 5000), (ORIGIN6, 53), &payload);
        for frame in datagram.fragments(1232, 0xfeed) {
            leaves(&mut world, "out", &frame, outside);
        }
        let back = Packet6::udp((ORIGIN6, 53), (outside, 5000), &payload);
        // In whatever order: each names its pod.
        for frame in back.fragments(1232, 0xbeef).iter().rev() {
            arrives(&mut world, "in", frame, pod);
        }
    }
    let later = Packet6::udp((POD6, 5000), (ORIGIN6, 53), &payload).fragments(1232, 0x0dd).remove(2);
    kept_in(&mut world, "nothing is known of its first one", &later, Counter::DropFragmentOut);
    let atomic = Packet6::udp((POD6, 5000), (ORIGIN6, 53), b"whole").fragments(1232, 3).remove(0);
    leaves(&mut world, "a fragment that is the whole", &atomic, pod_outside());
}

#[test]
fn xdp_ipv6_errors_about_what_pods_sent_come_in_with_what_they_quote() {
    let mut world = world();
    let router = Ipv6Addr::new(0x2001, 0xdb8, 0xeeee, 0, 0, 0, 0, 1);
    let sent = Packet6::tcp((pod_outside(), 40000), (ORIGIN6, 443), ACK, &[7; 100]);
    let inner = |frame: Vec<u8>, pod: Ipv6Addr| {
        let mut frame = with_address(&frame, DESTINATION, pod);
        frame[14 + 48 + SOURCE..14 + 48 + SOURCE + 16].copy_from_slice(&pod.octets());
        frame
    };
    for (name, kind, bytes) in [("unreachable", 1, 48), ("too big", 2, 148), ("time exceeded", 3, 40)] {
        let frame = Packet6::error(router, &sent, kind, bytes).frame();
        let (verdict, out) = world.back(&frame);
        assert_eq!((verdict, world.counted()), (XDP_PASS, vec![("reverse", 1)]), "{name}");
        assert_eq!(out, inner(frame, POD6), "{name}");
        assert!(is_sound(&out[14..]), "{name}: its checksum is right, though it covers what was quoted");
    }
    let other = Packet6::tcp((ORIGIN6, 1), (router, 443), ACK, b"");
    let mut foreign = Packet6::error(router, &other, 1, 60);
    foreign.destination = pod_outside();
    kept_out(&mut world, "about a packet that is not the pod's", &foreign.frame(), Counter::DropNoFlow);
    let mut cut = Packet6::error(router, &sent, 1, 20).frame();
    kept_out(&mut world, "quotes no address", &cut, Counter::DropMalformedIn);
    cut.truncate(14 + 40);
    kept_out(&mut world, "cut short", &cut, Counter::DropMalformedIn);
}

#[test]
fn xdp_ipv6_errors_of_pods_leave_with_what_they_quote() {
    let mut world = world();
    let got = Packet6::udp((ORIGIN6, 53), (POD6, 5000), b"for a closed port");
    let frame = Packet6::error(POD6, &got, 1, 64).to(ORIGIN6).frame();
    let out = world.out(&frame);
    assert_eq!(out.verdict, TCX_NEXT, "{:?}", world.counted());
    let mut expected = with_address(&frame, SOURCE, pod_outside());
    expected[14 + 48 + DESTINATION..14 + 48 + DESTINATION + 16].copy_from_slice(&pod_outside().octets());
    assert_eq!(out.frame, expected);
    assert!(is_sound(&out.frame[14..]));
    world.counted();
    let other = Packet6::udp((ORIGIN6, 53), (FAR_POD6, 5000), b"not this pod's");
    let frame = Packet6::error(POD6, &other, 1, 64).to(ORIGIN6).from(POD6).frame();
    kept_in(&mut world, "about what came to somebody else", &frame, Counter::DropMalformedOut);
}

#[test]
fn xdp_ipv6_errors_of_the_node_are_those_of_the_pod() {
    let mut world = world();
    let node = Ipv6Addr::new(0x2001, 0xdb8, 0xeeee, 0, 0, 0, 0, 2);
    let got = Packet6::udp((ORIGIN6, 53), (POD6, 5000), b"for a link that is too narrow");
    for (kind, name) in [(1, "unreachable"), (2, "too big"), (3, "time exceeded")] {
        let frame = Packet6::error(node, &got, kind, 64).to(ORIGIN6).frame();
        let of_pod = Packet6::error(POD6, &got, kind, 64).to(ORIGIN6).frame();
        let out = world.out(&frame);
        assert_eq!(out.verdict, TCX_NEXT, "{name}: {:?}", world.counted());
        assert_eq!(out.frame, world.out(&of_pod).frame, "{name}: as if the pod had sent it");
        assert!(is_sound(&out.frame[14..]), "{name}");
        assert_eq!(out.frame[14 + SOURCE..14 + SOURCE + 16], pod_outside().octets(), "{name}");
        world.counted();
    }
    let other = Packet6::udp((ORIGIN6, 53), (UNKNOWN_POD6, 5000), b"to one that is gone");
    let frame = Packet6::error(node, &other, 1, 64).to(ORIGIN6).frame();
    kept_in(&mut world, "about a pod that is gone", &frame, Counter::DropUnknownPod);
    let other = Packet6::udp((ORIGIN6, 53), (INSIDE6, 5000), b"to somebody else's");
    let frame = Packet6::error(node, &other, 1, 64).to(ORIGIN6).frame();
    kept_in(&mut world, "about another node's pod", &frame, Counter::DropLeak);
}

#[test]
fn xdp_ipv6_nothing_leaves_that_should_not() {
    let mut world = world();
    let frame = |source, destination| syn(source, destination, 443).frame();
    refused(&mut world, "denied", &frame(POD6, DENIED6), Counter::RefuseUnavailable);
    refused(&mut world, "covered no more", &frame(POD6, ELSEWHERE6), Counter::RefuseUnavailable);
    kept_in(&mut world, "somebody has translated it", &frame(ELSEWHERE6, ORIGIN6), Counter::DropLeak);
    kept_in(&mut world, "an unknown pod", &frame(UNKNOWN_POD6, ORIGIN6), Counter::DropUnknownPod);
    for (name, packet, passes) in
        [("unmarked", frame(POD6, ORIGIN6), true), ("forged", frame(pod_outside(), ORIGIN6), false)]
    {
        let out = world.out_unmarked(&packet);
        assert_eq!((out.verdict == TCX_NEXT, out.frame), (passes, packet), "{name}");
    }
    assert_eq!(world.counted(), [(Counter::DropForged.label(), 1)]);
}

#[test]
fn xdp_ipv6_what_is_refused_is_answered() {
    let mut world = world();
    let back = |packet: Packet6| {
        let mut frame = packet.frame();
        to_router(&mut frame);
        frame
    };
    let syn = syn(POD6, DENIED6, 443);
    let answer = refused(&mut world, "SYN", &syn.frame(), Counter::RefuseUnavailable);
    let mut expected = Packet6::tcp((DENIED6, 443), (POD6, 40000), 4 | ACK, b"");
    expected.body[4..12].copy_from_slice(&[0, 0, 0, 0, 1, 2, 3, 5]);
    assert_eq!(answer, back(expected));
    let data = Packet6::tcp((POD6, 40000), (DENIED6, 443), ACK, b"payload");
    let answer = refused(&mut world, "ACK", &data.frame(), Counter::RefuseUnavailable);
    let mut expected = Packet6::tcp((DENIED6, 443), (POD6, 40000), 4, b"payload");
    expected.body[4..12].copy_from_slice(&[5, 6, 7, 8, 0, 0, 0, 0]);
    assert_eq!(answer, back(expected));
    let others = [
        Packet6::udp((POD6, 5000), (DENIED6, 53), b"question"),
        Packet6::echo(POD6, DENIED6, 128),
        Packet6::new(POD6, DENIED6, 50, vec![7; 40]),
        Packet6::udp((POD6, 5000), (DENIED6, 53), b"question").behind(0, 1),
    ];
    for packet in others {
        let answer = refused(&mut world, "ICMPv6", &packet.frame(), Counter::RefuseUnavailable);
        let mut expected = Packet6::error(DENIED6, &packet, 1, 48);
        expected.body[1] = 1;
        let mut expected = back(expected);
        expected[14..18].copy_from_slice(&[0x60, 0, 0, 0]);
        expected[21] = 64;
        assert_eq!(answer, expected);
    }
    // Nothing answers an RST, an echo reply or an error.
    let reset = Packet6::tcp((POD6, 40000), (DENIED6, 443), 4, b"");
    kept_in(&mut world, "RST", &reset.frame(), Counter::RefuseUnavailable);
    kept_in(&mut world, "reply", &Packet6::echo(POD6, DENIED6, 129).frame(), Counter::RefuseUnavailable);
    world.set_config(&Config { refusals_per_second: 0, ..config() });
    kept_in(&mut world, "too many", &syn.frame(), Counter::RefuseUnavailable);
}

#[test]
fn xdp_ipv6_a_flow_keeps_its_64_whatever_the_policy_becomes() {
    let mut world = world();
    let frame = syn(POD6, ORIGIN6, 443).frame();
    leaves(&mut world, "first", &frame, pod_outside());
    set_allocation6(&mut world, &[NETWORK_2]);
    leaves(&mut world, "it goes on", &frame, pod_outside());
    let other = outside(POD6, NETWORK_2, SLICE, 5);
    leaves(&mut world, "a new one", &syn(POD6, ORIGIN6, 444).frame(), other);
    // The next pod with the address inherits nothing.
    set_pod6(&mut world, 1, POD6, Pod6Value { incarnation: INCARNATION + 1, ..pod6(1, 5) });
    leaves(&mut world, "another pod's", &frame, other);
}

#[test]
fn xdp_ipv6_what_drains_opens_nothing_and_what_is_lost_sends_nothing() {
    let mut world = world();
    let (live, new) = (syn(POD6, ORIGIN6, 443).frame(), syn(POD6, ORIGIN6, 444).frame());
    leaves(&mut world, "before", &live, pod_outside());
    let value = network(&mut world, NETWORK);
    set_network(&mut world, NETWORK, NetworkValue { open: 0, ..value });
    leaves(&mut world, "it drains", &live, pod_outside());
    refused(&mut world, "nothing new", &new, Counter::RefuseUnavailable);
    world.own(2, SLICE, 2);
    refused(&mut world, "its slice is another node's", &live, Counter::RefuseUnavailable);
}

fn flows(world: &World) -> HashMap<MapData, Flow6Key, Flow6Value> {
    world.plane.handle("FLOWS6", Map::LruHashMap).unwrap()
}

fn connection(port: u32) -> Flow6Key {
    Flow6Key { local: raw6(POD6), remote: raw6(ORIGIN6), ports: 40000 << 16 | port, protocol: 6 }
}

/// The entry of a connection with this destination port.
fn remembered(world: &World, port: u32) -> Option<Flow6Value> {
    flows(world).get(&connection(port), 0).ok()
}

/// What `kubectl aegis flows` is told: by a second run of the agent's program, which finds the pinned tables.
#[test]
fn xdp_ipv6_live_flows_are_told_with_the_address_that_they_leave_from() {
    let mut world = world();
    for port in [443, 80] {
        leaves(&mut world, "opening", &syn(POD6, ORIGIN6, port).frame(), pod_outside());
    }
    let told = |question: &[&str]| {
        let asked = std::process::Command::new(env!("CARGO_BIN_EXE_aegis-node-agent"))
            .args(["flows", &format!("--pin-root={}", world.root().display())])
            .args(question)
            .output()
            .unwrap();
        serde_json::from_slice::<serde_json::Value>(&asked.stdout).unwrap()
    };
    let (pod, egress) = (POD6.to_string(), pod_outside().to_string());
    let one = told(&[&format!("--pod={pod}"), "--port=443"]);
    assert_eq!((&one["total"], &one["total6"]), (&0.into(), &1.into()), "{one}");
    let flow = &one["flows6"][0];
    assert_eq!((&flow["pod"], &flow["destination"]), (&pod.into(), &ORIGIN6.to_string().into()));
    assert_eq!((&flow["egress"], &flow["egressPort"]), (&egress.clone().into(), &40_000.into()));
    assert_eq!(told(&[&format!("--egress={NETWORK}"), "--most=1"])["total6"], 2);
    assert_eq!(told(&[&format!("--egress={NETWORK_2}")])["total6"], 0);
    assert_eq!(told(&["--protocol=17"])["total6"], 0);
}

#[test]
fn xdp_ipv6_a_flow_does_not_follow_its_64_to_another_allocation() {
    let mut world = world();
    let live = syn(POD6, ORIGIN6, 443).frame();
    leaves(&mut world, "before", &live, pod_outside());
    let value = network(&mut world, NETWORK);
    set_network(&mut world, NETWORK, NetworkValue { identity: IDENTITY + 1, ..value });
    refused(&mut world, "the list of the allocation is old", &live, Counter::RefuseUnavailable);
    set_allocation6(&mut world, &[NETWORK_2]);
    leaves(&mut world, "it begins anew", &live, outside(POD6, NETWORK_2, SLICE, 5));
}

#[test]
fn xdp_ipv6_what_is_known_of_a_connection_follows_its_segments() {
    let mut world = world();
    for (name, flags, state) in [
        ("SYN", SYN, FLOW6_OPENING),
        ("data", ACK, FLOW6_OPEN),
        ("FIN", ACK | 1, FLOW6_CLOSING),
        ("the other side goes on", ACK, FLOW6_CLOSING),
        ("the ports again", SYN, FLOW6_OPENING),
        ("RST", 4, FLOW6_CLOSING),
    ] {
        let segment = Packet6::tcp((POD6, 40000), (ORIGIN6, 443), flags, b"");
        leaves(&mut world, name, &segment.frame(), pod_outside());
        let flow = remembered(&world, 443).unwrap();
        assert_eq!((flow.state, flow.slice, flow.identity), (state, SLICE, IDENTITY), "{name}");
    }
    assert_eq!(remembered(&world, 444), None);
}

#[test]
fn xdp_ipv6_what_is_idle_for_its_time_out_is_forgotten_and_the_slice_is_empty() {
    let mut world = world();
    let mut allocations = world.plane.array::<AllocationValue>("ALLOCATIONS").unwrap();
    let entry = allocations.get(&0, 0).unwrap();
    let timeouts =
        Timeouts { tcp_established: 600, tcp_transitory: 60, udp: 30, icmp: 10, ..Timeouts::default() };
    allocations.set(0, AllocationValue { identity: IDENTITY, timeouts, ..entry }, 0).unwrap();
    let mut kept = Kept::new(&world.plane).unwrap();
    let used = |kept: &mut Kept| {
        let usage = kept.sweep(false).unwrap();
        let key = (from_network(network_of(&raw6(NETWORK))), IDENTITY);
        assert!(usage.networks.keys().all(|it| *it == key), "{:?}", usage.networks);
        let slices = usage.networks.get(&key).copied().unwrap_or_default();
        (usage.flows6, slices.contains(SLICE as u8))
    };
    assert_eq!(used(&mut kept), (0, false));
    let datagram = Packet6::udp((POD6, 5000), (ORIGIN6, 53), &[9; 64]);
    let packets = [
        ("opening", syn(POD6, ORIGIN6, 1).frame(), 60),
        ("open", Packet6::tcp((POD6, 40000), (ORIGIN6, 2), ACK, b"").frame(), 600),
        ("closing", Packet6::tcp((POD6, 40000), (ORIGIN6, 3), ACK | 1, b"").frame(), 60),
        ("UDP", datagram.frame(), 30),
        ("echo", Packet6::echo(POD6, ORIGIN6, 128).frame(), 10),
        ("ESP", Packet6::new(POD6, ORIGIN6, 50, vec![7; 40]).frame(), 30),
    ];
    for (name, frame, limit) in packets {
        leaves(&mut world, name, &frame, pod_outside());
        assert_eq!(used(&mut kept), (1, true), "{name}");
        // As long ago as it may be, and longer.
        let mut flows = flows(&world);
        let (key, value) = flows.iter().next().unwrap().unwrap();
        for (idle, left) in [(limit, 1), (limit + 2, 0)] {
            flows.insert(key, Flow6Value { last_seen: now() - idle, ..value }, 0).unwrap();
            assert_eq!(used(&mut kept), (left, left == 1), "{name} after {idle} s");
        }
    }
    // Those of a pod that is gone go at once; a datagram in fragments is no flow.
    leaves(&mut world, "again", &datagram.fragments(32, 7)[0], pod_outside());
    assert_eq!(used(&mut kept), (2, true));
    set_pod6(&mut world, 1, POD6, Pod6Value { incarnation: INCARNATION + 1, ..pod6(1, 5) });
    assert_eq!(used(&mut kept), (0, false));
}

#[test]
fn xdp_ipv6_of_several_64s_one_is_taken_that_is_open() {
    let mut world = world();
    set_allocation6(&mut world, &[NETWORK, NETWORK_2]);
    let value = [NETWORK, NETWORK_2].map(|it| network(&mut world, it));
    for (port, open) in [(1, [1, 0]), (2, [0, 1])] {
        for (at, network) in [NETWORK, NETWORK_2].into_iter().enumerate() {
            set_network(&mut world, network, NetworkValue { open: open[at], ..value[at] });
        }
        let expected = if open[0] == 1 { NETWORK } else { NETWORK_2 };
        leaves(
            &mut world,
            "the open one",
            &syn(POD6, ORIGIN6, port).frame(),
            outside(POD6, expected, SLICE, 5),
        );
    }
    set_network(&mut world, NETWORK_2, NetworkValue { open: 0, ..value[1] });
    refused(&mut world, "none is", &syn(POD6, ORIGIN6, 3).frame(), Counter::RefuseUnavailable);
}

#[test]
fn xdp_ipv6_deadlines_end_first_what_is_new_and_then_all() {
    let mut world = world();
    let value = network(&mut world, NETWORK);
    set_network(&mut world, NETWORK, NetworkValue { soft: 45, hard: 60, ..value });
    let (live, new) = (syn(POD6, ORIGIN6, 443).frame(), syn(POD6, ORIGIN6, 444).frame());
    let back = Packet6::tcp((ORIGIN6, 443), (pod_outside(), 40000), ACK, b"").frame();
    world.renewed(10, 45);
    leaves(&mut world, "in time", &live, pod_outside());
    world.renewed(50, 45);
    leaves(&mut world, "live", &live, pod_outside());
    refused(&mut world, "new", &new, Counter::RefuseFenced);
    arrives(&mut world, "answers", &back, POD6);
    world.renewed(61, 45);
    kept_in(&mut world, "all", &live, Counter::DropFenced);
    kept_out(&mut world, "answers too", &back, Counter::DropFenced);
}

#[test]
fn xdp_ipv6_what_is_for_no_pod_is_dropped() {
    let mut world = world();
    let to = |destination| Packet6::tcp((ORIGIN6, 443), (destination, 40000), ACK, b"").frame();
    let [a, b, c, d, slice, neutral, high, low] = pod_outside().segments();
    let with = |slice, neutral, low| to(Ipv6Addr::new(a, b, c, d, slice, neutral, high, low));
    arrives(&mut world, "the right one", &with(slice, neutral, low), POD6);
    kept_out(&mut world, "a suffix that no pod has", &with(slice, neutral, 6), Counter::DropNoFlow);
    kept_out(&mut world, "bits that are not neutral", &with(slice, neutral ^ 1, low), Counter::DropNoFlow);
    for nobodys in [0, 3, 9, 256, 0x0800, 0xffff] {
        kept_out(&mut world, "a slice that nobody has", &with(nobodys, neutral, low), Counter::DropNoOwner);
    }
    kept_out(&mut world, "the router's anycast address", &to(NETWORK), Counter::DropNoOwner);
    let mut long = with(slice, neutral, low);
    long[14 + 4..14 + 6].copy_from_slice(&[1, 0]);
    kept_out(&mut world, "a packet longer than its frame", &long, Counter::DropMalformedIn);
    let deep =
        (0..9).fold(Packet6::tcp((ORIGIN6, 1), (pod_outside(), 2), ACK, b""), |it, _| it.behind(60, 0));
    kept_out(&mut world, "more extension headers than there are", &deep.frame(), Counter::DropMalformedIn);
    let elsewhere = to(Ipv6Addr::new(0x2001, 0xdb8, 9, 9, 8, 0, 0, 5));
    assert_eq!(world.back(&elsewhere), (XDP_PASS, elsewhere.clone()), "no egress /64");
    assert!(world.counted().is_empty());
}

/// An address in the other node's part of the /64.
fn theirs() -> Ipv6Addr {
    outside(INSIDE6, NETWORK, SLICE_2, 9)
}

#[test]
fn xdp_ipv6_what_is_for_another_node_is_sent_there() {
    let mut world = world();
    let packet = Packet6::tcp((ORIGIN6, 443), (theirs(), 40000), ACK, &[3; 777]);
    let (verdict, frame) = world.back(&packet.frame());
    assert_eq!((verdict, world.counted()), (XDP_TX, vec![("steered", 1)]));
    let port = u16::from_be_bytes([frame[34], frame[35]]);
    assert!(port >= 0xc000);
    let mut expected = geneve((NODE, NODE_2), (NODE_MAC, MAC_2), port, VNI_STEER, &packet.bytes());
    // What it carries is IPv6.
    expected[14 + 20 + 8 + 2..][..2].copy_from_slice(&[0x86, 0xdd]);
    assert_eq!(frame, expected);
}

fn steered(packet: &Packet6, vni: u32) -> Vec<u8> {
    let mut frame = geneve((NODE_2, NODE), (ROUTER_MAC, NODE_MAC), 0xc123, vni, &packet.bytes());
    frame[14 + 20 + 8 + 2..][..2].copy_from_slice(&[0x86, 0xdd]);
    frame
}

#[test]
fn xdp_ipv6_what_another_node_sends_is_taken_or_dropped_but_never_sent_on() {
    let mut world = world();
    let packet = Packet6::udp((ORIGIN6, 53), (pod_outside(), 5000), b"answer");
    let (verdict, out) = world.back(&steered(&packet, VNI_STEER));
    assert_eq!(verdict, XDP_PASS);
    assert_eq!(out, packet.clone().to(POD6).frame());
    assert_eq!(world.counted(), [("reverse", 1), ("steered_here", 1)]);
    let other = steered(&packet.clone().to(theirs()), VNI_STEER);
    assert_eq!(world.back(&other).0, XDP_DROP);
    assert_eq!(world.counted(), [("steered_here", 1), ("drop_not_owner", 1)]);
    let unknown = steered(&packet.clone().to(ELSEWHERE6), VNI_STEER);
    assert_eq!(world.back(&unknown).0, XDP_DROP);
    assert_eq!(world.counted(), [("steered_here", 1), ("drop_not_owner", 1)]);
    let guest = steered(&packet, VNI_RETURN);
    assert_eq!(world.back(&guest), (XDP_PASS, guest), "not one of ours");
}

#[test]
fn xdp_ipv6_too_big_for_the_tunnel_is_answered() {
    let mut world = world();
    let fits = Packet6::udp((ORIGIN6, 53), (theirs(), 5000), &[5; 1464 - 48]);
    assert_eq!(world.back(&fits.frame()).0, XDP_TX);
    assert_eq!(world.counted(), [("steered", 1)]);
    let big = Packet6::udp((ORIGIN6, 53), (theirs(), 5000), &[5; 1464 - 47]);
    let (verdict, frame) = world.back(&big.frame());
    assert_eq!((verdict, world.counted()), (XDP_TX, vec![("too_big", 1)]));
    let mut expected = Packet6::error(theirs(), &big, 2, 256);
    expected.body[4..8].copy_from_slice(&1464u32.to_be_bytes());
    let mut expected = expected.frame();
    // To the router that sent it, with flow label and hop limit of its own.
    to_router(&mut expected);
    expected[14..18].copy_from_slice(&[0x60, 0, 0, 0]);
    expected[21] = 64;
    assert_eq!(frame, expected);
    assert!(is_sound(&frame[14..]));
    let mut error = Packet6::error(ORIGIN6, &big, 1, 1232);
    error.destination = theirs();
    error.body.resize(1500, 0);
    kept_out(&mut world, "an error about an error", &error.frame(), Counter::DropTooBig);
}

#[test]
fn xdp_ipv6_the_mss_of_a_syn_fits_the_tunnel() {
    let world = world();
    let mss = |value: u16| {
        let mut packet = syn(POD6, ORIGIN6, 443);
        packet.body[12] = 6 << 4;
        packet.body.extend([2, 4]);
        packet.body.extend(value.to_be_bytes());
        packet
    };
    for (given, sent) in [(1440, 1404), (1404, 1404), (1220, 1220)] {
        let out = world.out(&mss(given).frame());
        assert_eq!(out.frame, mss(sent).from(pod_outside()).frame(), "{given}");
    }
}
