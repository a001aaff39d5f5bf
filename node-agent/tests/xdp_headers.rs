//! What is not a source, a destination, a port or a checksum stays as it is, in both directions; and what is no packet of a
//! flow stays out.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aya::maps::lpm_trie::Key;
use support::exact::{age, arrives, flows, kept_in, kept_out, leaves};
use support::packet::{ACK, Body, DF, MF, PSH, Packet, SYN, checksum};
use support::*;

/// What makes a packet another of the same flow.
type Change = Box<dyn Fn(&mut Packet)>;

/// A flow: its name, the packet that opens it, and one of the origin's, whose port is to be set.
fn kinds() -> [(&'static str, Packet, Packet); 4] {
    [
        (
            "TCP",
            Packet::tcp((POD, 40_000), (ORIGIN, 443), SYN),
            Packet::tcp((ORIGIN, 443), (EGRESS, 0), SYN | ACK),
        ),
        (
            "UDP",
            Packet::udp((POD, 5000), (ORIGIN, 53), b"question"),
            Packet::udp((ORIGIN, 53), (EGRESS, 0), b"an answer"),
        ),
        (
            "UDP without checksum",
            Packet::udp((POD, 5001), (ORIGIN, 53), b"question").without_checksum(),
            Packet::udp((ORIGIN, 53), (EGRESS, 0), b"an answer").without_checksum(),
        ),
        ("echo", Packet::echo(POD, ORIGIN, 77), Packet::echo_reply(ORIGIN, EGRESS, 0)),
    ]
}

/// Port or identifier of the pod in a packet that it sends.
fn pod_port(packet: &Packet) -> u16 {
    match &packet.body {
        Body::Tcp(tcp) => tcp.source,
        Body::Udp(udp) => udp.source,
        Body::Icmp(icmp) => u16::from_be_bytes([icmp.rest[0], icmp.rest[1]]),
        Body::Raw(..) => unreachable!(),
    }
}

#[test]
fn xdp_headers_what_is_not_translated_stays() {
    let mut variants: Vec<(String, Change)> = Vec::new();
    // Each ECN code point, and DSCPs with and without.
    for tos in [0, 1, 2, 3, 0xb8, 0x2b, 0xff] {
        variants.push((format!("DSCP and ECN {tos:#x}"), Box::new(move |packet| packet.tos = tos)));
    }
    for ttl in [1, 2, 64, 255] {
        variants.push((format!("TTL {ttl}"), Box::new(move |packet| packet.ttl = ttl)));
    }
    for id in [0, 1, 0xffff] {
        for fragment in [0, DF] {
            let name = format!("identification {id:#x}, flags {fragment:#x}");
            variants.push((name, Box::new(move |packet| (packet.id, packet.fragment) = (id, fragment))));
        }
    }
    variants.push(("the reserved flag".to_owned(), Box::new(|packet| packet.fragment = 0x8000)));
    for (name, options) in [
        ("router alert", vec![148, 4, 0, 0]),
        ("a timestamp option", vec![68, 12, 9, 0, 1, 2, 3, 4, 0, 0, 0, 0]),
        ("no operation and end", vec![1, 1, 1, 0]),
        ("40 bytes of options", [vec![7, 39, 4], vec![0; 37]].concat()),
    ] {
        variants.push((name.to_owned(), Box::new(move |packet| packet.options = options.clone())));
    }
    let mut world = World::new();
    for (kind, opens, answer) in kinds() {
        let port = leaves(&mut world, kind, &opens);
        let answer = answer.to(EGRESS, port);
        for (name, change) in &variants {
            let name = format!("{kind}, {name}");
            let (mut out, mut back) = (opens.clone(), answer.clone());
            change(&mut out);
            change(&mut back);
            assert_eq!(leaves(&mut world, &name, &out), port, "{name}");
            arrives(&mut world, &name, &back, &back.clone().to(POD, pod_port(&opens)));
        }
    }
    assert_eq!(world.consistent(), kinds().len());
}

/// Sum of the transport segment of a frame with its pseudo-header, 0 if the checksum is right.
fn rest(frame: &[u8]) -> u16 {
    let (ip, segment) = frame[14..].split_at(20);
    let pseudo = [&ip[12..20], &[0, ip[9]], &(segment.len() as u16).to_be_bytes()].concat();
    checksum(&if ip[9] == 1 { segment.to_vec() } else { [&pseudo, segment].concat() })
}

#[test]
fn xdp_headers_wrong_checksums_stay_wrong() {
    let mut world = World::new();
    for (kind, opens, answer) in kinds().into_iter().filter(|(kind, ..)| !kind.contains("without")) {
        let port = leaves(&mut world, kind, &opens);
        let at = 34 + [16, 6, 2][usize::from(opens.protocol() != 6) + usize::from(opens.protocol() == 1)];
        for wrong in [0x0001, 0x5a5a, 0x8000] {
            let spoil = |packet: &Packet| {
                let mut frame = packet.frame();
                let sum = u16::from_be_bytes([frame[at], frame[at + 1]]).wrapping_add(wrong);
                frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
                frame
            };
            let name = format!("{kind}, off by {wrong:#x}");
            let frame = spoil(&opens);
            let out = world.out(&frame);
            assert_eq!(out.verdict, TCX_NEXT, "{name}");
            assert_ne!(rest(&frame), 0, "{name}");
            assert_eq!(rest(&out.frame), rest(&frame), "{name}: out");
            let frame = spoil(&answer.clone().to(EGRESS, port));
            let (verdict, back) = world.back(&frame);
            assert_eq!(verdict, XDP_PASS, "{name}");
            assert_ne!(rest(&frame), 0, "{name}");
            assert_eq!(rest(&back), rest(&frame), "{name}: in");
        }
        world.counted();
    }
}

/// A computed checksum of zero is sent as ones, for zero says that there is none (RFC 768).
#[test]
fn xdp_headers_udp_checksum_of_zero_leaves_as_ones() {
    let mut world = World::new();
    let with = |word: u16| Packet::udp((POD, 5000), (ORIGIN, 53), &word.to_be_bytes());
    let sum = |packet: &Packet| u16::from_be_bytes(packet.segment()[6..8].try_into().unwrap());
    let port = leaves(&mut world, "opens", &with(0));
    let packet = with(sum(&with(0).from(EGRESS, port)));
    assert_eq!(sum(&packet.clone().from(EGRESS, port)), 0xffff);
    leaves(&mut world, "zero", &packet);
}

#[test]
fn xdp_headers_payload_is_not_looked_at() {
    let mut world = World::new();
    let port_command: &[u8] = b"PORT 10,244,1,5,156,64\r\n";
    let invitation: &[u8] = b"INVITE sip:x@198.51.100.7 SIP/2.0\r\nVia: SIP/2.0/UDP 10.244.1.5:5060\r\n";
    let address: &[u8] = &[10, 244, 1, 5, 192, 0, 2, 1];
    for (name, remote, payload) in [("FTP", 21, port_command), ("an address", 1000, address)] {
        let out = |flags| Packet::tcp((POD, 40_000), (ORIGIN, remote), flags);
        let port = leaves(&mut world, name, &out(SYN));
        let with = |mut packet: Packet| {
            let Body::Tcp(tcp) = &mut packet.body else { unreachable!() };
            tcp.payload = payload.to_vec();
            packet
        };
        leaves(&mut world, name, &with(out(ACK | PSH)));
        let back = with(Packet::tcp((ORIGIN, remote), (EGRESS, port), ACK | PSH));
        arrives(&mut world, name, &back, &back.clone().to(POD, 40_000));
    }
    for (name, remote, payload) in [("SIP", 5060, invitation), ("an address", 1000, address)] {
        let port = leaves(&mut world, name, &Packet::udp((POD, 5060), (ORIGIN, remote), payload));
        let back = Packet::udp((ORIGIN, remote), (EGRESS, port), payload);
        arrives(&mut world, name, &back, &back.clone().to(POD, 5060));
    }
    assert_eq!(world.consistent(), 4, "and nothing else was opened");
}

#[test]
fn xdp_headers_other_protocols_are_refused_and_stay_out() {
    let mut world = World::new();
    for protocol in [0, 2, 4, 33, 41, 47, 50, 51, 88, 89, 103, 115, 132, 136, 255] {
        let name = format!("protocol {protocol}");
        let out = world.out(&Packet::raw(POD, ORIGIN, protocol, &[9; 40]).frame());
        assert_eq!(out.verdict, TCX_REDIRECT, "{name}: answered");
        assert_eq!(out.frame[34..36], [3, 13], "{name}: administratively prohibited");
        assert_eq!(world.counted(), [("refusal_sent", 1), ("refuse_protocol", 1)], "{name}");
        let back = Packet::raw(ORIGIN, EGRESS, protocol, &[9; 40]);
        kept_out(&mut world, &name, &back.frame(), Counter::DropMalformedIn);
    }
    assert_eq!(world.consistent(), 0);
}

/// There is no way back inside by an egress address: neither to the flow that sends, nor to another's.
#[test]
fn xdp_headers_nothing_comes_back_in_by_an_egress_address() {
    let mut world = World::new();
    let key = Key::new(64, DestinationKey { generation: 1, address: raw(EGRESS) });
    world.plane.trie("DESTINATIONS").unwrap().insert(&key, DestinationValue { class: 1 }, 0).unwrap();
    for (kind, opens, _) in kinds() {
        let port = leaves(&mut world, kind, &opens);
        // Another pod sends to the port that the flow has.
        let hairpin = Packet { source: POD_2, ..opens.clone() }.to(EGRESS, port);
        let name = format!("{kind}, to the flow of another pod");
        let hairpin = if opens.protocol() == 1 { Packet::echo(POD_2, EGRESS, port) } else { hairpin };
        let from = leaves(&mut world, &name, &hairpin);
        age(&mut world);
        let before = flows(&world);
        // It leaves as any packet does, and so it would come back.
        kept_out(&mut world, &name, &hairpin.from(EGRESS, from).frame(), Counter::DropNoFlow);
        assert_eq!(flows(&world), before, "{name}: it changes nothing");
    }
}

#[test]
fn xdp_headers_fragments() {
    let mut world = World::new();
    for (at, (kind, opens, answer)) in
        kinds().into_iter().enumerate().filter(|(_, (kind, ..))| *kind != "TCP")
    {
        let port = leaves(&mut world, kind, &opens);
        let answer = answer.to(EGRESS, port).with_payload(2000).with_id(at as u16 + 7).with_fragment(0);
        for (name, answer, size) in [
            ("two", answer.clone(), 1480),
            ("smallest first", answer.clone(), 8),
            ("with IP options", answer.clone().with_ip_options(), 512),
        ] {
            let name = format!("{kind}, {name}");
            let expected = answer.clone().to(POD, pod_port(&opens)).fragments(size);
            let fragments = answer.fragments(size);
            // The first, the last, the second, and both again: only the first has to be before the others.
            for at in [0, fragments.len() - 1, 1, 0, 1] {
                assert_eq!(
                    world.back(&fragments[at]),
                    (XDP_PASS, expected[at].clone()),
                    "{name}, fragment {at}"
                );
                assert_eq!(world.counted(), [("reverse", 1)], "{name}, fragment {at}");
            }
            // A fragment that overlaps the transport header goes the datagram's way and says nothing of the flow.
            age(&mut world);
            let before = flows(&world);
            let mut overlapping = Packet::raw(ORIGIN, EGRESS, answer.protocol(), &[0xff; 24]);
            (overlapping.id, overlapping.fragment) = (answer.id, 1 | MF);
            let inside = Packet { destination: POD, ..overlapping.clone() };
            arrives(&mut world, &name, &overlapping, &inside);
            assert_eq!(flows(&world), before, "{name}: overlapping");
            // It waits for its own first one, if its protocol is one that can have one.
            let other = Body::Raw(200, vec![0; 24]);
            for (what, stranger, reason) in [
                ("another identification", Packet { id: 999, ..overlapping.clone() }, Counter::FragmentKept),
                (
                    "another source",
                    Packet { source: ELSEWHERE, ..overlapping.clone() },
                    Counter::FragmentKept,
                ),
                ("another protocol", Packet { body: other, ..overlapping.clone() }, Counter::DropFragmentIn),
            ] {
                kept_out(&mut world, &format!("{name}, {what}"), &stranger.frame(), reason);
            }
        }
    }
    // A first fragment without the whole of what is judged by is no use (RFC 1858 section 3).
    let port = leaves(&mut world, "TCP", &kinds()[0].1);
    let segment = Packet::tcp((ORIGIN, 443), (EGRESS, port), ACK).segment();
    for bytes in [8, 16] {
        let name = format!("TCP, {bytes} bytes");
        let tiny = Packet::raw(ORIGIN, EGRESS, 6, &segment[..bytes]).with_fragment(MF);
        kept_out(&mut world, &name, &tiny.frame(), Counter::DropMalformedIn);
        let tiny = Packet::raw(POD, ORIGIN, 6, &segment[..bytes]).with_fragment(MF);
        kept_in(&mut world, &name, &tiny.frame(), Counter::DropMalformedOut);
    }
}
