//! `uplink_ingress` at the owner of a port: translation of what comes back, and what is not let in.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::net::Ipv4Addr;
use support::packet::{ACK, Body, FIN, NODE_MAC, PSH, Packet, ROUTER_MAC, RST, SYN, ethernet};
use support::*;

const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// Opens a flow by letting its first packet out; returns its egress port or identifier.
fn open(world: &mut World, packet: &Packet) -> u16 {
    let out = world.out(&packet.frame());
    assert_eq!(out.verdict, TCX_NEXT, "open: {:?}", world.counted());
    world.counted();
    let at = if packet.protocol() == 1 { 38 } else { 34 };
    u16::from_be_bytes([out.frame[at], out.frame[at + 1]])
}

fn passed(world: &mut World, name: &str, packet: &Packet, expected: &Packet) {
    let (verdict, frame) = world.back(&packet.frame());
    assert_eq!(verdict, XDP_PASS, "{name}: verdict; {:?}", world.counted());
    assert_eq!(frame, expected.frame(), "{name}: frame");
    assert_eq!(world.counted(), [("reverse", 1)], "{name}: counters");
}

fn dropped(world: &mut World, name: &str, frame: &[u8], reason: Counter) {
    let (verdict, _) = world.back(frame);
    assert_eq!(verdict, XDP_DROP, "{name}: verdict");
    assert_eq!(world.counted(), [(reason.label(), 1)], "{name}: counters");
}

fn untouched(world: &mut World, name: &str, frame: &[u8]) {
    assert_eq!(world.back(frame), (XDP_PASS, frame.to_vec()), "{name}");
    assert_eq!(world.counted(), [], "{name}: counters");
}

#[test]
fn xdp_uplink_ingress_replies() {
    let mut world = World::new();
    let tcp = open(&mut world, &Packet::tcp((POD, 40000), (ORIGIN, 443), SYN));
    let udp = open(&mut world, &Packet::udp((POD, 5000), (ORIGIN, 53), b"question"));
    let echo = open(&mut world, &Packet::echo(POD, ORIGIN, 77));
    let segment = |flags| Packet::tcp((ORIGIN, 443), (EGRESS, tcp), flags);
    let datagram = |payload: &[u8]| Packet::udp((ORIGIN, 53), (EGRESS, udp), payload);
    for (name, packet, port) in [
        ("SYN-ACK", segment(SYN | ACK), 40000),
        ("data", segment(ACK | PSH).with_payload(1000), 40000),
        ("data, odd length", segment(ACK | PSH).with_payload(333), 40000),
        ("TCP with IP options", segment(ACK).with_ip_options(), 40000),
        ("FIN", segment(FIN | ACK), 40000),
        ("RST", segment(RST | ACK), 40000),
        ("data after RST: the flow was not deleted", segment(ACK | PSH), 40000),
        ("UDP", datagram(b"answer"), 5000),
        ("UDP, empty", datagram(b""), 5000),
        ("UDP without checksum", datagram(b"answer").without_checksum(), 5000),
        ("UDP of full size", datagram(b"").with_payload(1472), 5000),
        ("echo reply", Packet::echo_reply(ORIGIN, EGRESS, echo), 77),
    ] {
        passed(&mut world, name, &packet, &packet.clone().to(POD, port));
    }
    assert_eq!(world.consistent(), 3);
}

/// All checksums from 0 to 0xffff appear among these payloads' neighbours; a computed zero must be sent as ones.
#[test]
fn xdp_uplink_ingress_udp_checksum_of_zero_is_sent_as_ones() {
    let mut world = World::new();
    let udp = open(&mut world, &Packet::udp((POD, 5000), (ORIGIN, 53), b"question"));
    let with = |word: u16| Packet::udp((ORIGIN, 53), (EGRESS, udp), &word.to_be_bytes());
    let sum = |packet: &Packet| u16::from_be_bytes(packet.segment()[6..8].try_into().unwrap());
    // The word for which the translated packet's sum is zero, which the builder writes as ones.
    let base = sum(&with(0).to(POD, 5000));
    let packet = with(base);
    assert_eq!(sum(&packet.clone().to(POD, 5000)), 0xffff);
    passed(&mut world, "zero", &packet, &packet.clone().to(POD, 5000));
}

#[test]
fn xdp_uplink_ingress_notes_what_a_segment_says() {
    let mut world = World::new();
    let port = open(&mut world, &Packet::tcp((POD, 40000), (ORIGIN, 443), SYN));
    let key = flow(6, (EGRESS, port), (ORIGIN, 443));
    let before = now();
    for (name, flags, seen) in [
        ("SYN-ACK", SYN | ACK, SEEN_SYN),
        ("ACK", ACK, SEEN_SYN | SEEN_ACK),
        ("RST", RST, SEEN_SYN | SEEN_ACK | SEEN_RST),
        ("data after an RST that ended nothing", ACK, SEEN_SYN | SEEN_ACK),
        ("FIN", FIN | ACK, SEEN_SYN | SEEN_ACK | SEEN_FIN),
    ] {
        let packet = Packet::tcp((ORIGIN, 443), (EGRESS, port), flags);
        passed(&mut world, name, &packet, &packet.clone().to(POD, 40000));
        let reverse = world.reverse(&key).unwrap();
        assert_eq!(reverse.seen, seen, "{name}");
        assert!(reverse.last_seen >= before, "{name}");
    }
}

#[test]
fn xdp_uplink_ingress_icmp_errors() {
    let mut world = World::new();
    for (name, sent) in [
        ("TCP", Packet::tcp((POD, 40000), (ORIGIN, 443), SYN)),
        ("UDP", Packet::udp((POD, 5000), (ORIGIN, 53), b"question").without_checksum()),
        (
            "UDP with IP options",
            Packet::udp((POD, 5001), (ORIGIN, 53), b"question").without_checksum().with_ip_options(),
        ),
        ("echo", Packet::echo(POD, ORIGIN, 77)),
    ] {
        let out = world.out(&sent.frame());
        let at = 14 + 20 + sent.options.len() + if name == "echo" { 4 } else { 0 };
        let port = u16::from_be_bytes([out.frame[at], out.frame[at + 1]]);
        world.counted();
        let translated = sent.clone().from(EGRESS, port);
        for (kind, code) in [(3, 1), (3, 3), (3, 4), (11, 0), (12, 0)] {
            // Eight quoted bytes of the transport header, and more.
            for quoted in [8, 13] {
                let error = Packet::error(ROUTER, &translated, kind, code, quoted);
                let mut expected = Packet::error(ROUTER, &sent, kind, code, quoted);
                if let (Body::Icmp(icmp), "echo") = (&mut expected.body, name) {
                    // The quoted ICMP checksum stays the one that was sent.
                    let Body::Icmp(quoting) = &error.body else { unreachable!() };
                    icmp.payload[22..24].copy_from_slice(&quoting.payload[22..24]);
                }
                passed(&mut world, &format!("{name}, {kind}/{code}, {quoted} bytes"), &error, &expected);
            }
        }
        let mut stranger = translated.clone();
        stranger.destination = ELSEWHERE;
        let error = Packet::error(ROUTER, &stranger, 3, 1, 8);
        dropped(&mut world, "about no flow", &error.frame(), Counter::DropNoFlow);
        let error = Packet::error(ROUTER, &translated, 3, 1, 7);
        dropped(&mut world, "quotes seven bytes", &error.frame(), Counter::DropMalformedIn);
        let mut error = Packet::error(ROUTER, &translated, 3, 1, 8);
        error.destination = EGRESS_2;
        dropped(&mut world, "quotes another's packet", &error.frame(), Counter::DropMalformedIn);
        let later = translated.clone().with_fragment(4);
        let error = Packet::error(ROUTER, &later, 3, 1, 8);
        dropped(&mut world, "quotes a later fragment", &error.frame(), Counter::DropMalformedIn);
    }
}

#[test]
fn xdp_uplink_ingress_nothing_unasked_gets_in() {
    let mut world = World::new();
    let port = open(&mut world, &Packet::tcp((POD, 40000), (ORIGIN, 443), SYN));
    let udp = open(&mut world, &Packet::udp((POD, 5000), (ORIGIN, 53), b"question"));
    let free = if port == 2048 { 2049 } else { 2048 };
    let to = |from: (Ipv4Addr, u16), port| Packet::tcp(from, (EGRESS, port), SYN).frame();
    let no_flow = Counter::DropNoFlow;
    dropped(&mut world, "a port without flow", &to((ORIGIN, 443), free), no_flow);
    dropped(&mut world, "the port, from another address", &to((ELSEWHERE, 443), port), no_flow);
    dropped(&mut world, "the port, from another port", &to((ORIGIN, 444), port), no_flow);
    let datagram = Packet::udp((ORIGIN, 443), (EGRESS, port), b"x").frame();
    dropped(&mut world, "the port, by another protocol", &datagram, no_flow);
    let datagram = Packet::udp((ELSEWHERE, 53), (EGRESS, udp), b"x").frame();
    dropped(&mut world, "UDP from another address", &datagram, no_flow);
    let second = Packet::udp((ORIGIN, 53), (EGRESS_2, udp), b"x").frame();
    dropped(&mut world, "another egress address", &second, no_flow);
    dropped(
        &mut world,
        "echo reply that nobody asked for",
        &Packet::echo_reply(ORIGIN, EGRESS, port).frame(),
        no_flow,
    );
    dropped(&mut world, "echo request", &Packet::echo(ORIGIN, EGRESS, port).frame(), no_flow);
    let timestamp = Packet::icmp(ORIGIN, EGRESS, 13, 0, [0; 4], &[0; 12]).frame();
    dropped(&mut world, "timestamp request", &timestamp, no_flow);
    for port in [0, 22, 443, 1023] {
        dropped(&mut world, "a port that is never used", &to((ORIGIN, 443), port), Counter::DropNoOwner);
    }
    dropped(&mut world, "a slice of nobody", &to((ORIGIN, 443), 0xff00), Counter::DropNoOwner);
    let gre = Packet::raw(ORIGIN, EGRESS, 47, &[0; 24]).frame();
    dropped(&mut world, "a protocol without ports", &gre, Counter::DropMalformedIn);

    // A simultaneous open is let in, a SYN into a connection is not (RFC 5382 REQ-2).
    let answer = Packet::tcp((ORIGIN, 443), (EGRESS, port), SYN | ACK);
    passed(&mut world, "SYN-ACK", &answer, &answer.clone().to(POD, 40000));
    dropped(&mut world, "SYN into an established connection", &to((ORIGIN, 443), port), no_flow);
}

#[test]
fn xdp_uplink_ingress_truncated() {
    let mut world = World::new();
    let tcp = open(&mut world, &Packet::tcp((POD, 40000), (ORIGIN, 443), SYN));
    let udp = open(&mut world, &Packet::udp((POD, 5000), (ORIGIN, 53), b"question"));
    let echo = open(&mut world, &Packet::echo(POD, ORIGIN, 77));
    // Every length of each kind: the frame ends before the packet does.
    for (name, packet) in [
        ("TCP", Packet::tcp((ORIGIN, 443), (EGRESS, tcp), ACK)),
        ("UDP", Packet::udp((ORIGIN, 53), (EGRESS, udp), b"answer")),
        ("echo", Packet::echo_reply(ORIGIN, EGRESS, echo)),
    ] {
        let frame = packet.frame();
        for length in 34..frame.len() {
            dropped(
                &mut world,
                &format!("{name}, {length} bytes"),
                &frame[..length],
                Counter::DropMalformedIn,
            );
        }
        // The packet itself is too short, whatever follows in the frame.
        for length in 0..8 {
            let short = Packet::raw(ORIGIN, EGRESS, packet.protocol(), &packet.segment()[..length]).frame();
            let padded = [&short[..], &packet.segment()[length..], &[0; 20]].concat();
            dropped(
                &mut world,
                &format!("{name}, {length} bytes and padding"),
                &padded,
                Counter::DropMalformedIn,
            );
        }
    }
    let short =
        Packet::raw(ORIGIN, EGRESS, 6, &Packet::tcp((ORIGIN, 443), (EGRESS, tcp), ACK).segment()[..16]);
    dropped(&mut world, "TCP of 16 bytes", &short.frame(), Counter::DropMalformedIn);
    let padded = [short.frame(), vec![0; 10]].concat();
    dropped(&mut world, "TCP of 16 bytes and padding", &padded, Counter::DropMalformedIn);
    let mut header = Packet::tcp((ORIGIN, 443), (EGRESS, tcp), ACK).frame();
    header[14] = 0x44;
    dropped(&mut world, "a header of 16 bytes", &header, Counter::DropMalformedIn);
    header[14] = 0x4f;
    dropped(&mut world, "a header longer than the packet", &header, Counter::DropMalformedIn);
}

#[test]
fn xdp_uplink_ingress_lets_others_pass() {
    let mut world = World::new();
    untouched(&mut world, "for the node", &Packet::tcp((ORIGIN, 443), (NODE, 22), SYN).frame());
    untouched(&mut world, "for a pod", &Packet::tcp((ORIGIN, 443), (POD, 80), SYN).frame());
    let mut vlan = Packet::tcp((ORIGIN, 443), (EGRESS, 2048), SYN).frame();
    vlan.splice(12..12, [0x81, 0, 0, 5]);
    untouched(&mut world, "VLAN", &vlan);
    let mut six = ethernet(NODE_MAC, ROUTER_MAC, &[0x60; 60]);
    six[12..14].copy_from_slice(&[0x86, 0xdd]);
    untouched(&mut world, "IPv6", &six);
    let mut arp = ethernet(NODE_MAC, ROUTER_MAC, &[0; 28]);
    arp[12..14].copy_from_slice(&[8, 6]);
    untouched(&mut world, "ARP", &arp);
    untouched(&mut world, "too short for IPv4", &ethernet(NODE_MAC, ROUTER_MAC, &[0x45; 19]));
}
