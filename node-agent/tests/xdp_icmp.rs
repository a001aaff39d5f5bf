//! ICMP: errors both ways, what is no answer to a pod, and echo identifiers (RFC 5508).
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::net::Ipv4Addr;
use support::exact::{age, arrives, flows, kept_in, kept_out, leaves};
use support::packet::{ACK, Body, Icmp, Packet, SYN};
use support::*;

const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// Error messages: type and code.
const ERRORS: [(u8, u8); 21] = [
    (3, 0),
    (3, 1),
    (3, 2),
    (3, 3),
    (3, 4),
    (3, 5),
    (3, 6),
    (3, 7),
    (3, 8),
    (3, 9),
    (3, 10),
    (3, 11),
    (3, 12),
    (3, 13),
    (3, 14),
    (3, 15),
    (11, 0),
    (11, 1),
    (12, 0),
    (12, 1),
    (12, 2),
];
/// Types that are neither errors about a packet nor echo: source quench, redirect, router messages, timestamps, information,
/// address masks, and what nobody uses.
const OTHERS: [u8; 16] = [1, 2, 4, 5, 6, 9, 10, 13, 14, 15, 16, 17, 18, 30, 42, 255];

/// What a pod sends, what the origin answers to it (by `EGRESS`, port 0), and the pod's port.
fn kinds() -> [(&'static str, Packet, Packet, u16); 3] {
    [
        (
            "TCP",
            Packet::tcp((POD, 40_000), (ORIGIN, 443), SYN),
            Packet::tcp((ORIGIN, 443), (EGRESS, 0), ACK),
            40_000,
        ),
        (
            "UDP",
            Packet::udp((POD, 5000), (ORIGIN, 53), b"question").without_checksum(),
            Packet::udp((ORIGIN, 53), (EGRESS, 0), b"answer").without_checksum(),
            5000,
        ),
        ("echo", Packet::echo(POD, ORIGIN, 77), Packet::echo_reply(ORIGIN, EGRESS, 0), 77),
    ]
}

/// An error, with what bytes 5 to 8 say (the MTU of the next hop, where a header is wrong).
fn error(source: Ipv4Addr, about: &Packet, kind: u8, code: u8, bytes: usize) -> Packet {
    let mut packet = Packet::error(source, about, kind, code, bytes);
    let Body::Icmp(icmp) = &mut packet.body else { unreachable!() };
    icmp.rest = match kind {
        3 if code == 4 => [0, 0, 5, 100],
        12 => [20, 0, 0, 0],
        _ => [0; 4],
    };
    packet
}

/// `expected`, with the transport checksum quoted of an ICMP packet that `packet` has: nobody may judge it.
fn with_quoted_checksum(mut expected: Packet, packet: &Packet, about: &Packet) -> Packet {
    let (Body::Icmp(to), Body::Icmp(from)) = (&mut expected.body, &packet.body) else { unreachable!() };
    if about.protocol() == 1 {
        let at = 20 + about.options.len() + 2;
        to.payload[at..at + 2].copy_from_slice(&from.payload[at..at + 2]);
    }
    expected
}

/// Extensions behind the quoted packet (RFC 4884): the quoted packet is filled up to 128 bytes, and its length told.
fn extended(mut packet: Packet) -> Packet {
    let Body::Icmp(icmp) = &mut packet.body else { unreachable!() };
    icmp.rest[1] = 128 / 4;
    icmp.payload.resize(128, 0);
    // Version 2, a checksum, and an object: an MPLS label.
    icmp.payload.extend([0x20, 0, 0x8d, 0x2d, 0, 8, 1, 1, 0x12, 0x34, 0x51, 0x40]);
    packet
}

#[test]
fn xdp_icmp_errors_arrive_as_they_are_and_change_no_flow() {
    let mut world = World::new();
    for (kind, sent, _, _) in kinds() {
        let port = leaves(&mut world, kind, &sent);
        let translated = sent.clone().from(EGRESS, port);
        // The packet as a router further on sees it, and as one saw it that puts options into it.
        let aged = |packet: &Packet| Packet { ttl: 1, tos: 0x20, ..packet.clone() };
        age(&mut world);
        let before = flows(&world);
        let mut check = |name: &str, packet: Packet, expected: Packet, about: &Packet| {
            let expected = with_quoted_checksum(expected, &packet, about);
            arrives(&mut world, &format!("{kind}, {name}"), &packet, &expected);
        };
        for (error_kind, code) in ERRORS {
            let name = format!("type {error_kind}, code {code}");
            let make = |about: &Packet| error(ROUTER, about, error_kind, code, 8);
            check(&name, make(&aged(&translated)), make(&aged(&sent)), &sent);
        }
        for (name, source) in [
            ("from the origin", ORIGIN),
            ("from a private address", Ipv4Addr::new(10, 9, 9, 9)),
            ("from elsewhere", ELSEWHERE),
        ] {
            let make = |about: &Packet| error(source, about, 11, 0, 8);
            check(name, make(&translated), make(&sent), &sent);
        }
        let (inside, outside) = (sent.clone().with_ip_options(), translated.clone().with_ip_options());
        check(
            "quotes IP options",
            error(ROUTER, &outside, 12, 0, 8),
            error(ROUTER, &inside, 12, 0, 8),
            &inside,
        );
        let make = |about: &Packet| error(ROUTER, about, 11, 0, 8).with_ip_options();
        check("with IP options itself", make(&translated), make(&sent), &sent);
        // A router that has counted the TTL down, and quotes the checksum from before.
        let make = |about: &Packet| {
            let mut packet = error(ROUTER, &aged(about), 11, 0, 8);
            let Body::Icmp(icmp) = &mut packet.body else { unreachable!() };
            icmp.payload[10..12].copy_from_slice(&about.bytes()[10..12]);
            packet
        };
        check("quotes a checksum that is wrong by now", make(&translated), make(&sent), &sent);
        let make = |about: &Packet| extended(error(ROUTER, about, 11, 0, 8));
        check("with extensions", make(&translated), make(&sent), &sent);
        assert_eq!(flows(&world), before, "{kind}: neither refreshed nor ended");
    }
    assert_eq!(world.consistent(), 3);
}

#[test]
fn xdp_icmp_errors_of_a_pod_leave_as_they_are_and_change_no_flow() {
    let mut world = World::new();
    for (kind, sent, answer, pod_port) in kinds() {
        let port = leaves(&mut world, kind, &sent);
        let (outside, inside) = (answer.clone().to(EGRESS, port), answer.to(POD, pod_port));
        age(&mut world);
        let before = flows(&world);
        let mut check = |name: &str, packet: Packet, expected: Packet, about: &Packet| {
            let expected = with_quoted_checksum(expected, &packet, about);
            let name = format!("{kind}, {name}");
            let out = world.out(&packet.frame());
            assert_eq!(out.verdict, TCX_NEXT, "{name}: {:?}", world.counted());
            assert_eq!(out.frame, expected.frame(), "{name}");
            assert_eq!(world.counted(), [("translated", 1)], "{name}");
        };
        for (error_kind, code) in ERRORS {
            let name = format!("type {error_kind}, code {code}");
            let packet = error(POD, &inside, error_kind, code, 8);
            check(&name, packet, error(EGRESS, &outside, error_kind, code, 8), &inside);
        }
        let (options_in, options_out) = (inside.clone().with_ip_options(), outside.clone().with_ip_options());
        let packet = error(POD, &options_in, 3, 3, 8);
        check("quotes IP options", packet, error(EGRESS, &options_out, 3, 3, 8), &options_in);
        let important = |packet| Packet { tos: 0xc0, ..packet };
        let packet = important(error(POD, &inside, 3, 3, 8));
        check("of high precedence", packet, important(error(EGRESS, &outside, 3, 3, 8)), &inside);
        assert_eq!(flows(&world), before, "{kind}: neither refreshed nor ended");
    }
    assert_eq!(world.consistent(), 3);
}

#[test]
fn xdp_icmp_errors_of_the_node_are_those_of_the_pod() {
    let mut world = World::new();
    for (kind, sent, answer, pod_port) in kinds() {
        let port = leaves(&mut world, kind, &sent);
        let (outside, inside) = (answer.clone().to(EGRESS, port), answer.to(POD, pod_port));
        age(&mut world);
        let before = flows(&world);
        for (error_kind, code) in [(3, 1), (3, 4), (11, 0), (11, 1), (12, 0)] {
            let name = format!("{kind}, type {error_kind}, code {code}");
            let packet = error(NODE, &inside, error_kind, code, 8);
            let expected = error(EGRESS, &outside, error_kind, code, 8);
            let out = world.out(&packet.frame());
            assert_eq!(out.verdict, TCX_NEXT, "{name}: {:?}", world.counted());
            assert_eq!(out.frame, with_quoted_checksum(expected, &packet, &inside).frame(), "{name}");
            assert_eq!(world.counted(), [("translated", 1)], "{name}");
            // What is not marked is about no covered flow.
            assert_eq!(world.out_unmarked(&packet.frame()).frame, packet.frame(), "{name}");
        }
        assert_eq!(flows(&world), before, "{kind}: neither refreshed nor ended");
        let gone = error(NODE, &inside.clone().to(POD, 1), 3, 1, 8).frame();
        kept_in(&mut world, &format!("{kind}: about no flow"), &gone, Counter::RefuseNoFlow);
        let no_error = Packet { source: NODE, ..sent };
        kept_in(&mut world, &format!("{kind}: no error"), &no_error.frame(), Counter::DropLeak);
    }
    assert_eq!(world.consistent(), 3);
}

#[test]
fn xdp_icmp_without_metadata_the_flow_tells_what_was_translated() {
    let mut world = World::new();
    let mark = |world: &World, packet: &Packet| {
        let outcome = classify(world.program("uplink_mark"), &packet.frame(), OTHER_MARK);
        assert_eq!(outcome.packet, packet.frame());
        u32::from_ne_bytes(outcome.context[8..12].try_into().unwrap())
    };
    for missing in [false, true] {
        world.plane.array("NO_METADATA").unwrap().set(0, u32::from(missing), 0).unwrap();
        for (kind, sent, answer, pod_port) in kinds() {
            leaves(&mut world, kind, &sent);
            let inside = answer.to(POD, pod_port);
            let expected = if missing { MARK | OTHER_MARK } else { OTHER_MARK };
            assert_eq!(mark(&world, &inside), expected, "{kind}");
            assert_eq!(mark(&world, &inside.clone().to(POD, 1)), OTHER_MARK, "{kind}: no flow");
            assert_eq!(mark(&world, &inside.to(NODE, pod_port)), OTHER_MARK, "{kind}: not the pod");
        }
    }
}

/// Every length that a link carries in a byte's steps would be many; these are each remainder of what is summed at a time.
#[test]
fn xdp_icmp_errors_with_a_wrong_checksum_do_not_get_in() {
    let mut world = World::new();
    let sent = Packet::udp((POD, 5000), (ORIGIN, 53), b"").without_checksum().with_payload(3000);
    let port = leaves(&mut world, "UDP", &sent);
    let translated = sent.clone().from(EGRESS, port);
    age(&mut world);
    let before = flows(&world);
    let lengths = (8..80).chain([548, 1000, 1001, 1443, 1471, 1472]);
    for length in lengths {
        let name = format!("{length} bytes quoted");
        let right = error(ROUTER, &translated, 3, 4, length);
        arrives(&mut world, &name, &right, &error(ROUTER, &sent, 3, 4, length));
        // Type, code, checksum, MTU, the quoted header and the last byte.
        let last = right.frame().len() - 1;
        for at in [35, 36, 41, 14 + 20 + 8 + 8, last] {
            for bit in [1, 0x80] {
                let mut wrong = right.frame();
                wrong[at] ^= bit;
                kept_out(&mut world, &format!("{name}, byte {at}"), &wrong, Counter::DropMalformedIn);
            }
        }
    }
    let right = error(ROUTER, &translated, 3, 4, 8);
    let padded = [right.frame(), vec![0xff; 4]].concat();
    let expected = [error(ROUTER, &sent, 3, 4, 8).frame(), vec![0xff; 4]].concat();
    assert_eq!(world.back(&padded), (XDP_PASS, expected), "what follows in the frame does not count");
    world.counted();
    let (mut large, expected) = (error(ROUTER, &translated, 3, 4, 1600), error(ROUTER, &sent, 3, 4, 1600));
    arrives(&mut world, "a large one", &large, &expected);
    large = large.with_fragment(support::packet::MF);
    arrives(&mut world, "the first fragment of one", &large, &expected.with_fragment(support::packet::MF));
    assert_eq!(flows(&world), before, "nothing was noted");
}

#[test]
fn xdp_icmp_what_is_no_answer_to_a_pod_does_not_get_in() {
    let mut world = World::new();
    let (_, sent, answer, _) = kinds()[1].clone();
    let port = leaves(&mut world, "UDP", &sent);
    let translated = sent.from(EGRESS, port);
    age(&mut world);
    let before = flows(&world);
    for kind in OTHERS {
        let name = format!("type {kind}");
        let packet = error(ROUTER, &translated, kind, 0, 8);
        kept_out(&mut world, &name, &packet.frame(), Counter::DropNoFlow);
        let packet = error(POD, &answer.clone().to(POD, 5000), kind, 0, 8);
        kept_in(&mut world, &name, &packet.frame(), Counter::RefuseNoFlow);
    }
    let quoted = translated.bytes();
    // Every length of what is quoted that is too short to tell a flow by.
    for length in 0..28 {
        let packet = Packet::icmp(ROUTER, EGRESS, 3, 1, [0; 4], &quoted[..length]);
        kept_out(&mut world, &format!("{length} bytes quoted"), &packet.frame(), Counter::DropMalformedIn);
    }
    let malformed = Counter::DropMalformedIn;
    for (name, about, reason) in [
        ("about an ICMP error", Packet::error(EGRESS, &answer, 3, 3, 8), malformed),
        ("about an echo reply", Packet::echo_reply(EGRESS, ORIGIN, port), malformed),
        ("about a protocol without ports", Packet::raw(EGRESS, ORIGIN, 47, &[0; 8]), malformed),
        ("about a packet of the node", translated.clone().from(NODE, port), malformed),
        ("about a packet of the pod, not translated", translated.clone().from(POD, 5000), malformed),
        ("about a packet that came from outside", answer.clone().to(EGRESS, port), malformed),
        ("about another port of ours", translated.clone().from(EGRESS, port ^ 1), Counter::DropNoFlow),
        ("about another port of the origin", translated.clone().to(ORIGIN, 54), Counter::DropNoFlow),
        ("about another origin", translated.clone().to(ELSEWHERE, 53), Counter::DropNoFlow),
        ("about a port of nobody", translated.clone().from(EGRESS, 0xff01), Counter::DropNoOwner),
        ("about a port that is never used", translated.clone().from(EGRESS, 80), Counter::DropNoOwner),
        ("about another protocol", Packet::tcp((EGRESS, port), (ORIGIN, 53), SYN), Counter::DropNoFlow),
    ] {
        let packet = Packet::icmp(ROUTER, EGRESS, 3, 1, [0; 4], &about.bytes());
        kept_out(&mut world, name, &packet.frame(), reason);
    }
    for (name, at, value) in
        [("version 6", 0, 0x65), ("a header of 16 bytes", 0, 0x44), ("a header of 60", 0, 0x4f)]
    {
        let mut bytes = quoted.clone();
        bytes[at] = value;
        let packet = Packet::icmp(ROUTER, EGRESS, 3, 1, [0; 4], &bytes);
        kept_out(&mut world, &format!("quotes {name}"), &packet.frame(), malformed);
    }
    assert_eq!(flows(&world), before, "nothing was noted");
}

#[test]
fn xdp_icmp_echo_identifiers() {
    let mut world = World::new();
    let second = Ipv4Addr::new(198, 51, 100, 8);
    // (name, packet of a pod): all go on at a time.
    let questions = [
        ("a pod", Packet::echo(POD, ORIGIN, 7)),
        ("another pod, the same identifier", Packet::echo(POD_2, ORIGIN, 7)),
        ("another identifier", Packet::echo(POD, ORIGIN, 8)),
        ("identifier 0", Packet::echo(POD, ORIGIN, 0)),
        ("the largest identifier", Packet::echo(POD_2, ORIGIN, 0xffff)),
        ("another origin", Packet::echo(POD, second, 7)),
    ];
    let mut taken = Vec::new();
    for (name, question) in &questions {
        let id = leaves(&mut world, name, question);
        taken.push(id);
    }
    for (at, (name, question)) in questions.iter().enumerate() {
        let (origin, id) = (question.destination, taken[at]);
        let twice = (0..at).any(|other| taken[other] == id && questions[other].1.destination == origin);
        assert!(!twice, "{name}: identifier {id} is given twice towards one origin");
        let numbered = |mut packet: Packet, sequence: u16| {
            let Body::Icmp(icmp) = &mut packet.body else { unreachable!() };
            icmp.rest[2..].copy_from_slice(&sequence.to_be_bytes());
            packet
        };
        let Body::Icmp(icmp) = &question.body else { unreachable!() };
        let pod_id = u16::from_be_bytes([icmp.rest[0], icmp.rest[1]]);
        for sequence in [0, 1, 0xffff] {
            let name = format!("{name}, sequence number {sequence}");
            assert_eq!(leaves(&mut world, &name, &numbered(question.clone(), sequence)), id, "{name}");
            let reply = numbered(Packet::echo_reply(origin, EGRESS, id), sequence);
            arrives(&mut world, &name, &reply, &reply.clone().to(question.source, pod_id));
        }
        let stranger = Packet::echo_reply(ELSEWHERE, EGRESS, id);
        kept_out(&mut world, &format!("{name}, answered by another"), &stranger.frame(), Counter::DropNoFlow);
    }
    assert_eq!(world.consistent(), questions.len());
}

/// What follows a packet in the frame quotes nothing.
#[test]
fn xdp_icmp_errors_that_quote_only_padding_are_malformed() {
    let mut world = World::new();
    let opens = Packet::udp((POD, 5000), (ORIGIN, 53), b"question");
    let port = leaves(&mut world, "opens", &opens);
    let sent = Packet::udp((EGRESS, port), (ORIGIN, 53), b"question");
    let received = Packet::udp((ORIGIN, 53), (POD, 5000), b"answer");
    let (back, out) = (Packet::error(ORIGIN, &sent, 3, 3, 8), Packet::error(POD, &received, 3, 3, 8));
    // Without the quoted packet, with a part of its header, and with one byte too few.
    for bytes in [0, 12, 20, 27] {
        let name = format!("{bytes} bytes quoted");
        let short = |packet: &Packet| {
            let Body::Icmp(icmp) = &packet.body else { panic!("an error") };
            let (within, behind) = icmp.payload.split_at(bytes);
            let short = Icmp { payload: within.to_vec(), ..icmp.clone() };
            [Packet { body: Body::Icmp(short), ..packet.clone() }.frame(), behind.to_vec()].concat()
        };
        kept_out(&mut world, &name, &short(&back), Counter::DropMalformedIn);
        let out = Packet { destination: ORIGIN, ..out.clone() };
        kept_in(&mut world, &name, &short(&out), Counter::DropMalformedOut);
    }
    let whole = Packet { destination: ORIGIN, ..out };
    assert_eq!(world.out(&whole.frame()).verdict, TCX_NEXT, "{:?}", world.counted());
}
