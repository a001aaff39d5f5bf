//! `uplink_egress`: translation of what leaves, the leak guard, refusals.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use support::packet::{ACK, Body, DF, FIN, MF, PSH, Packet, RST, SYN};
use support::*;

fn syn() -> Packet {
    Packet::tcp((POD, 40000), (ORIGIN, 443), SYN)
}

/// Runs a packet that must be translated; returns egress port or identifier. The frame must be exactly the packet
/// with another source.
fn translated(world: &mut World, name: &str, packet: &Packet, new: bool) -> u16 {
    let out = world.out(&packet.frame());
    assert_eq!(out.verdict, TCX_NEXT, "{name}: verdict; {:?}", world.counted());
    let transport = 14 + usize::from(out.frame[14] & 15) * 4;
    let at = if packet.protocol() == 1 { transport + 4 } else { transport };
    let port = u16::from_be_bytes([out.frame[at], out.frame[at + 1]]);
    assert_eq!(out.frame, packet.clone().from(EGRESS, port).frame(), "{name}: frame");
    assert_eq!(port >> 8, SLICE, "{name}: a port of the held slice");
    let mut counted = vec![("translated", 1)];
    if new {
        counted.push(("new_flow", 1));
    }
    assert_eq!(world.counted(), counted, "{name}: counters");
    port
}

/// Runs a packet that must be dropped untouched for this reason.
fn dropped(world: &mut World, name: &str, frame: &[u8], reason: Counter) {
    let out = world.out(frame);
    assert_eq!(out.verdict, TCX_DROP, "{name}: verdict");
    assert_eq!(world.counted(), [(reason.label(), 1)], "{name}: counters");
}

#[test]
fn xdp_uplink_egress_new_flows() {
    let mut world = World::new();
    let packets = [
        ("TCP", syn()),
        ("TCP with ECN", Packet::tcp((POD, 40001), (ORIGIN, 443), SYN | 0xc0)),
        ("TCP with IP options", Packet::tcp((POD, 40002), (ORIGIN, 443), SYN).with_ip_options()),
        ("UDP", Packet::udp((POD, 5000), (ORIGIN, 53), b"question")),
        ("UDP, empty", Packet::udp((POD, 5001), (ORIGIN, 53), b"")),
        ("UDP, odd length", Packet::udp((POD, 5002), (ORIGIN, 53), b"odd")),
        ("UDP without checksum", Packet::udp((POD, 5003), (ORIGIN, 53), b"question").without_checksum()),
        ("UDP with IP options", Packet::udp((POD, 5004), (ORIGIN, 53), b"question").with_ip_options()),
        ("echo", Packet::echo(POD, ORIGIN, 77)),
        ("echo with identifier 0", Packet::echo(POD, ORIGIN, 0)),
    ];
    for (flows, (name, packet)) in packets.iter().enumerate() {
        let port = translated(&mut world, name, packet, true);
        assert_eq!(world.consistent(), flows + 1, "{name}");
        // The same packet again is the same flow.
        assert_eq!(translated(&mut world, name, packet, false), port, "{name}: second packet");
        assert_eq!(world.consistent(), flows + 1, "{name}");
    }
}

#[test]
fn xdp_uplink_egress_enters_the_flow_into_all_tables() {
    let mut world = World::new();
    let before = now();
    let port = translated(&mut world, "SYN", &syn(), true);
    let forward = world.forward(&flow(6, (POD, 40000), (ORIGIN, 443))).unwrap();
    assert!(forward.last_seen >= before);
    let expected = ForwardValue {
        life: forward.life,
        egress: raw(EGRESS),
        egress_port: port,
        allocation: 0,
        seen: SEEN_SYN,
        binding: 3,
        buried: 0,
        last_seen: forward.last_seen,
        incarnation: INCARNATION,
        peer: 0,
        meter: REST_METER as u16,
    };
    assert_eq!(forward, expected);
    let key = flow(6, (EGRESS, port), (ORIGIN, 443));
    let reverse = world.reverse(&key).unwrap();
    assert!(reverse.made >= before);
    let (digest, made) = (key.digest(), reverse.made);
    let expected = ReverseValue { digest, pod: raw(POD), pod_port: 40000, made, ..Default::default() };
    assert_eq!(reverse, expected);
    let block = world.block(&block(6, (EGRESS, port), (ORIGIN, 443))).unwrap();
    assert_eq!((block.used, block.high, block.full), (1, 1, 0));
    assert_eq!(world.consistent(), 1);
}

#[test]
fn xdp_uplink_egress_notes_what_a_segment_says() {
    let mut world = World::new();
    let key = flow(6, (POD, 40000), (ORIGIN, 443));
    translated(&mut world, "SYN", &syn(), true);
    for (name, flags, seen) in [
        ("ACK", ACK, SEEN_SYN | SEEN_ACK),
        ("data", ACK | PSH, SEEN_SYN | SEEN_ACK),
        ("RST", RST, SEEN_SYN | SEEN_ACK | SEEN_RST),
        ("data after an RST that ended nothing", ACK, SEEN_SYN | SEEN_ACK),
        ("FIN", FIN | ACK, SEEN_SYN | SEEN_ACK | SEEN_FIN),
    ] {
        translated(&mut world, name, &Packet::tcp((POD, 40000), (ORIGIN, 443), flags), false);
        assert_eq!(world.forward(&key).unwrap().seen, seen, "{name}");
    }
}

#[test]
fn xdp_uplink_egress_a_reopened_port_begins_anew() {
    let mut world = World::new();
    let key = flow(6, (POD, 40000), (ORIGIN, 443));
    // (name, seen out, seen back) of the connection before, which is over.
    for (name, out, back) in [
        ("FIN both ways", SEEN_SYN | SEEN_ACK | SEEN_FIN, SEEN_SYN | SEEN_ACK | SEEN_FIN),
        ("RST from the pod", SEEN_SYN | SEEN_ACK | SEEN_RST, SEEN_SYN | SEEN_ACK),
        ("RST from the origin", SEEN_SYN | SEEN_ACK, SEEN_SYN | SEEN_RST),
        ("FIN then RST from the origin", SEEN_SYN | SEEN_ACK, SEEN_SYN | SEEN_ACK | SEEN_FIN | SEEN_RST),
    ] {
        let new = world.consistent() == 0;
        let port = translated(&mut world, name, &syn(), new);
        let back_key = flow(6, (EGRESS, port), (ORIGIN, 443));
        let forward = ForwardValue { seen: out, ..world.forward(&key).unwrap() };
        let reverse = ReverseValue { seen: back, ..world.reverse(&back_key).unwrap() };
        world.set_forward(key, forward);
        world.set_reverse(back_key, reverse);
        assert_eq!(translated(&mut world, name, &syn(), false), port);
        assert_eq!(world.forward(&key).unwrap().seen, SEEN_SYN, "{name}: out");
        assert_eq!(world.reverse(&back_key).unwrap().seen, 0, "{name}: back");
        let (verdict, _) = world.back(&Packet::tcp((ORIGIN, 443), (EGRESS, port), SYN | ACK).frame());
        assert_eq!(verdict, XDP_PASS);
        world.counted();
        translated(&mut world, name, &Packet::tcp((POD, 40000), (ORIGIN, 443), ACK), false);
        let seen = (world.forward(&key).unwrap().seen, world.reverse(&back_key).unwrap().seen);
        assert_eq!(phase(6, seen.0, seen.1), Phase::Established, "{name}");
    }
}

#[test]
fn xdp_uplink_egress_drops() {
    let mut world = World::new();
    let out = world.out_unmarked(&syn().frame());
    assert_eq!((out.verdict, out.frame), (TCX_NEXT, syn().frame()), "not covered: untouched");
    assert_eq!(world.counted(), []);

    let forged = syn().from(EGRESS, 2048);
    let out = world.out_unmarked(&forged.frame());
    assert_eq!((out.verdict, out.frame), (TCX_DROP, forged.frame()), "forged without mark");
    assert_eq!(world.counted(), [("drop_forged", 1)]);

    dropped(&mut world, "translated by somebody else", &syn().from(NODE, 40000).frame(), Counter::DropLeak);
    dropped(&mut world, "forged with the mark", &forged.frame(), Counter::DropLeak);
    let malformed = Counter::DropMalformedOut;
    let mut version = syn().frame();
    version[14] = 0x65;
    dropped(&mut world, "not version 4", &version, malformed);
    assert_eq!(world.out_unmarked(&version).verdict, TCX_NEXT, "unmarked: not ours to judge");
    dropped(&mut world, "TCP cut before its flags", &syn().frame()[..14 + 20 + 12], malformed);
    let udp = Packet::udp((POD, 5000), (ORIGIN, 53), b"");
    dropped(&mut world, "UDP cut", &udp.frame()[..14 + 20 + 7], malformed);
    dropped(&mut world, "echo cut", &Packet::echo(POD, ORIGIN, 7).frame()[..14 + 20 + 6], malformed);
    let padded = [Packet::raw(POD, ORIGIN, 17, &[1, 2, 3, 4]).frame(), vec![0; 22]].concat();
    dropped(&mut world, "ports that are padding", &padded, malformed);
    let later = Packet::raw(POD, ORIGIN, 17, &[0; 16]).with_fragment(2);
    dropped(&mut world, "later fragment without the first", &later.frame(), Counter::DropFragmentOut);
    assert_eq!(world.consistent(), 0);
}

#[test]
fn xdp_uplink_egress_a_change_overtakes_a_packet_in_the_host_stack() {
    let mut world = World::new();
    let from = |port| Packet::tcp((POD, port), (ORIGIN, 443), SYN);
    let pod = |world: &mut World, generation, class| world.pod_class(generation, POD, class);
    let refused = |world: &mut World, name, port| {
        assert_eq!(world.out(&from(port).frame()).verdict, TCX_REDIRECT, "{name}");
        assert_eq!(world.counted(), [("refusal_sent", 1), ("refuse_unavailable", 1)], "{name}");
    };
    // `pod_ingress` saw the binding, and nothing names the destination any more.
    pod(&mut world, 2, 7);
    world.set_config(&Config { generation: 2, ..config() });
    translated(&mut world, "not covered any more", &from(40001), true);
    pod(&mut world, 2, 0);
    translated(&mut world, "a pod of no binding any more", &from(40002), true);
    // What the new policy says counts.
    pod(&mut world, 2, POD_REFUSED);
    refused(&mut world, "denied by now", 40003);
    // The packets of the last generation have left: the agent has removed it.
    pod(&mut world, 2, 7);
    world.remove_pod(POD);
    refused(&mut world, "the last generation is gone", 40004);
    assert_eq!(world.consistent(), 2);
}

#[test]
fn xdp_uplink_egress_refuses_tcp_with_a_reset() {
    let mut world = World::new();
    let denied = |flags, payload| Packet::tcp((POD, 40000), (DENIED, 443), flags).with_payload(payload);
    let options = &[2, 4, 5, 180, 1, 1, 1, 0];
    // (name, packet, reason, sequence, acknowledged, flags) of the answer
    let cases = [
        ("SYN", denied(SYN, 0), Counter::RefuseUnavailable, 0, 0x1020_3041, RST | ACK),
        (
            "SYN with options",
            denied(SYN, 0).with_tcp_options(options),
            Counter::RefuseUnavailable,
            0,
            0x1020_3041,
            RST | ACK,
        ),
        ("SYN with data", denied(SYN, 5), Counter::RefuseUnavailable, 0, 0x1020_3046, RST | ACK),
        ("mid-stream without flow", denied(ACK, 9), Counter::RefuseNoFlow, 0x5060_7080, 0, RST),
        ("FIN without flow", denied(ACK | FIN, 0), Counter::RefuseNoFlow, 0x5060_7080, 0, RST),
        ("SYN-ACK without flow", denied(SYN | ACK, 0), Counter::RefuseNoFlow, 0x5060_7080, 0, RST),
        (
            "SYN with IP options",
            denied(SYN, 0).with_ip_options(),
            Counter::RefuseUnavailable,
            0,
            0x1020_3041,
            RST | ACK,
        ),
    ];
    for (name, packet, reason, sequence, acknowledged, flags) in cases {
        let mut expected = packet.clone();
        std::mem::swap(&mut expected.source, &mut expected.destination);
        let Body::Tcp(tcp) = &mut expected.body else { unreachable!() };
        std::mem::swap(&mut tcp.source, &mut tcp.destination);
        (tcp.sequence, tcp.acknowledged, tcp.flags) = (sequence, acknowledged, flags);
        answered(&mut world, name, &packet, reason, &expected);
    }
    let out = world.out(&denied(RST, 0).frame());
    assert_eq!(out.verdict, TCX_DROP, "an RST is not answered");
    assert_eq!(world.counted(), [("refuse_no_flow", 1)]);
    assert_eq!(world.consistent(), 0);
}

/// Runs a packet that must come back as `expected`, with its Ethernet addresses swapped and the mark cleared.
fn answered(world: &mut World, name: &str, packet: &Packet, reason: Counter, expected: &Packet) {
    let out = world.out(&packet.frame());
    assert_eq!(out.verdict, TCX_REDIRECT, "{name}: verdict");
    let frame = packet.frame();
    let mut wanted = expected.frame();
    wanted[..6].copy_from_slice(&frame[6..12]);
    wanted[6..12].copy_from_slice(&frame[..6]);
    assert_eq!(out.frame, wanted, "{name}: answer");
    assert_eq!(out.mark, 0, "{name}: mark");
    let mut counted = vec![(reason.label(), 1), ("refusal_sent", 1)];
    counted.sort_by_key(|(label, _)| *label != "refusal_sent");
    assert_eq!(world.counted(), counted, "{name}: counters");
}

#[test]
fn xdp_uplink_egress_refuses_the_rest_with_unreachable() {
    let mut world = World::new();
    let udp = |length| Packet::udp((POD, 5000), (DENIED, 53), b"").with_payload(length);
    let unavailable = Counter::RefuseUnavailable;
    for (name, packet, reason, code) in [
        ("UDP", udp(100), unavailable, 13),
        ("UDP, empty: the answer is longer", udp(0), unavailable, 13),
        ("UDP of full size", udp(1472), unavailable, 13),
        ("echo", Packet::echo(POD, DENIED, 5), unavailable, 13),
        ("GRE to a covered destination", Packet::raw(POD, ORIGIN, 47, &[9; 24]), Counter::RefuseProtocol, 13),
    ] {
        let mut expected = Packet::error(packet.destination, &packet, 3, code, 8).with_id(0);
        expected.ttl = 64;
        answered(&mut world, name, &packet, reason, &expected);
    }
    for (name, packet, reason) in [
        ("echo reply without flow", Packet::echo_reply(POD, ORIGIN, 5), "refuse_no_flow"),
        ("timestamp", Packet::icmp(POD, ORIGIN, 13, 0, [0; 4], &[0; 12]), "refuse_no_flow"),
        ("UDP with IP options", udp(20).with_ip_options(), "refuse_unavailable"),
        ("GRE of four bytes", Packet::raw(POD, ORIGIN, 47, &[9; 4]), "refuse_protocol"),
    ] {
        assert_eq!(world.out(&packet.frame()).verdict, TCX_DROP, "{name}: no answer");
        assert_eq!(world.counted(), [(reason, 1)], "{name}");
    }
    let first = udp(64).with_fragment(MF);
    assert_eq!(world.out(&first.frame()).verdict, TCX_REDIRECT, "a first fragment is answered");
    assert_eq!(world.consistent(), 0);
}

#[test]
fn xdp_uplink_egress_limits_answers() {
    let mut world = World::new();
    world.set_config(&Config { refusals_per_second: 0, ..config() });
    let packet = Packet::udp((POD, 5000), (DENIED, 53), b"x");
    assert_eq!(world.out(&packet.frame()).verdict, TCX_DROP);
    assert_eq!(world.counted(), [("refuse_unavailable", 1)]);
}

#[test]
fn xdp_uplink_egress_clamps_the_mss() {
    let mss = |value: u16| [2, 4, (value >> 8) as u8, value as u8];
    let options = |before: &[u8], value: u16, after: &[u8]| [before, &mss(value), after].concat();
    let timestamps = [8, 10, 1, 2, 3, 4, 5, 6, 7, 8];
    let mut world = World::new();
    translated(&mut world, "open", &syn(), true);
    // (name, options before and after MSS, MSS, what is sent)
    for (name, before, after, value, sent) in [
        ("first", &[][..], &[][..], 1460, 1424),
        ("small enough", &[], &[], 1424, 1424),
        ("smaller", &[], &[], 536, 536),
        ("largest", &[], &[], 65535, 1424),
        ("at an odd place", &[1], &[1, 1, 1], 1460, 1424),
        ("after two", &[1, 1], &[1, 1], 8960, 1424),
        ("after a long option", &timestamps, &[1, 1], 1460, 1424),
        ("after a long option, odd", &[&[1][..], &timestamps].concat(), &[0], 9001, 1424),
        ("after the end", &[0, 0, 0, 0], &[], 1460, 1460),
        ("behind an option of length 0", &[8, 0, 0, 0], &[], 1460, 1460),
    ] {
        for flags in [SYN, SYN | ACK] {
            let packet = Packet::tcp((POD, 40000), (ORIGIN, 443), flags);
            let packet_in = packet.clone().with_tcp_options(&options(before, value, after));
            let expected = packet.with_tcp_options(&options(before, sent, after));
            let out = world.out(&packet_in.frame());
            assert_eq!(out.verdict, TCX_NEXT, "{name}");
            let port = u16::from_be_bytes([out.frame[34], out.frame[35]]);
            assert_eq!(out.frame, expected.from(EGRESS, port).frame(), "{name}");
        }
    }
    // Nothing behind the packet is looked at, whatever the packet says of itself.
    let short = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN);
    let mut frame = [short.frame(), mss(1460).to_vec()].concat();
    frame[14 + 20 + 12] = 0x60;
    let out = world.out(&frame);
    assert_eq!((out.verdict, &out.frame[54..]), (TCX_NEXT, &mss(1460)[..]), "options behind the packet");
    world.counted();
    let data = Packet::tcp((POD, 40000), (ORIGIN, 443), ACK).with_tcp_options(&mss(1460));
    translated(&mut world, "only SYNs are clamped", &data, false);
    world.set_config(&Config { mss: 0, ..config() });
    translated(&mut world, "clamping is off", &syn().with_tcp_options(&mss(9000)), false);
}

#[test]
fn xdp_uplink_egress_fragments() {
    let mut world = World::new();
    let packets = [
        ("UDP", Packet::udp((POD, 5000), (ORIGIN, 53), b"").with_payload(4000)),
        (
            "UDP without checksum",
            Packet::udp((POD, 5000), (ORIGIN, 53), b"").with_payload(3000).without_checksum(),
        ),
        ("ping of 5,000 bytes", Packet::echo(POD, ORIGIN, 99).with_payload(5000)),
    ];
    for (at, (name, packet)) in packets.into_iter().enumerate() {
        let packet = packet.with_id(at as u16 + 100).with_fragment(0);
        let mut fragments = packet.fragments(1480).into_iter();
        let out = world.out(&fragments.next().unwrap());
        assert_eq!(out.verdict, TCX_NEXT, "{name}: first");
        let place = if packet.protocol() == 1 { 38 } else { 34 };
        let port = u16::from_be_bytes([out.frame[place], out.frame[place + 1]]);
        let expected = exact::renumbered(packet.clone().from(EGRESS, port), &out.frame).fragments(1480);
        assert_eq!(out.frame, expected[0], "{name}: first");
        for (fragment, expected) in fragments.zip(&expected[1..]) {
            let out = world.out(&fragment);
            assert_eq!(out.verdict, TCX_NEXT, "{name}: later");
            assert_eq!(&out.frame, expected, "{name}: later");
        }
        // Another datagram's fragment is not taken for one of this.
        let stranger = packet.with_id(9999).fragments(1480);
        assert_eq!(world.out(&stranger[1]).verdict, TCX_DROP, "{name}: stranger");
    }
    let counted = world.counted();
    assert!(counted.contains(&("drop_fragment_out", 3)), "{counted:?}");
}

#[test]
fn xdp_uplink_egress_fragments_of_a_datagram_long_gone() {
    let mut world = World::new();
    let packet = Packet::udp((POD, 5000), (ORIGIN, 53), b"").with_payload(4000).with_id(7).with_fragment(0);
    let fragments = packet.fragments(1480);
    assert_eq!(world.out(&fragments[0]).verdict, TCX_NEXT, "first");
    world.age_fragments("FRAGMENTS_OUT", 29);
    assert_eq!(world.out(&fragments[1]).verdict, TCX_NEXT, "while the rest is waited for");
    world.counted();
    world.age_fragments("FRAGMENTS_OUT", 3);
    assert_eq!(world.out(&fragments[2]).verdict, TCX_DROP, "long gone");
    assert_eq!(world.counted(), [("drop_fragment_out", 1)]);
}

#[test]
fn xdp_uplink_egress_icmp_errors_of_a_pod() {
    let mut world = World::new();
    for (name, opens) in [
        ("UDP", Packet::udp((POD, 5000), (ORIGIN, 53), b"question")),
        ("TCP", syn()),
        ("echo", Packet::echo(POD, ORIGIN, 88)),
    ] {
        let port = translated(&mut world, name, &opens, true);
        // What the origin sent, as the pod saw it and as the origin knows it.
        let (inner, original) = match opens.protocol() {
            1 => (Packet::echo_reply(ORIGIN, POD, 88), Packet::echo_reply(ORIGIN, EGRESS, port)),
            6 => {
                let answer = Packet::tcp((ORIGIN, 443), (POD, 40000), ACK);
                (answer.clone(), answer.to(EGRESS, port))
            }
            _ => {
                let answer = Packet::udp((ORIGIN, 53), (POD, 5000), b"answer").without_checksum();
                (answer.clone(), answer.to(EGRESS, port))
            }
        };
        // An echo reply's checksum is quoted, but not translated: nobody verifies it.
        for quoted in if name == "echo" { &[][..] } else { &[8, 13] } {
            let error = Packet::error(POD, &inner, 3, 3, *quoted);
            let expected = Packet::error(EGRESS, &original, 3, 3, *quoted);
            let out = world.out(&error.frame());
            assert_eq!(out.verdict, TCX_NEXT, "{name}");
            assert_eq!(out.frame, expected.frame(), "{name}, {quoted} bytes quoted");
            assert_eq!(world.counted(), [("translated", 1)], "{name}");
        }
        let stranger = Packet::error(POD, &inner.clone().to(POD, 1), 3, 3, 8);
        dropped(&mut world, "error about no flow", &stranger.frame(), Counter::RefuseNoFlow);
        let mut foreign = Packet::error(POD_2, &inner, 3, 3, 8);
        foreign.source = POD_2;
        dropped(&mut world, "error about another pod's flow", &foreign.frame(), Counter::RefuseNoFlow);
    }
    let cut = Packet::icmp(POD, ORIGIN, 3, 3, [0; 4], &[0x45; 20]);
    dropped(&mut world, "quotes too little", &cut.frame(), Counter::DropMalformedOut);
    let later = Packet::udp((ORIGIN, 53), (POD, 5000), b"").with_payload(40).with_fragment(3 | DF);
    let later = Packet::error(POD, &later, 3, 1, 8);
    dropped(&mut world, "quotes a later fragment", &later.frame(), Counter::RefuseNoFlow);
}

#[test]
fn xdp_uplink_egress_the_next_pod_with_an_address_inherits_no_flow() {
    let mut world = World::new();
    world.second_account();
    let packets = [
        ("TCP", syn(), flow(6, (POD, 40000), (ORIGIN, 443))),
        ("UDP", Packet::udp((POD, 5000), (ORIGIN, 53), b"question"), flow(17, (POD, 5000), (ORIGIN, 53))),
        ("echo", Packet::echo(POD, ORIGIN, 77), flow(1, (POD, 77), (ORIGIN, 0))),
    ];
    for (name, packet, key) in &packets {
        translated(&mut world, name, packet, true);
        assert_eq!(world.forward(key).unwrap().egress, raw(EGRESS), "{name}");
    }
    world.next_pod(POD, 2);
    world.counted();
    let late = Packet::tcp((POD, 40000), (ORIGIN, 443), ACK);
    assert_eq!(world.out(&late.frame()).verdict, TCX_REDIRECT, "no flow of this pod's");
    assert_eq!(world.counted(), [("refusal_sent", 1), ("refuse_no_flow", 1)]);
    for (name, packet, key) in &packets {
        assert_eq!(world.out(&packet.frame()).verdict, TCX_NEXT, "{name}");
        let flow = world.forward(key).unwrap();
        assert_eq!((flow.egress, flow.incarnation), (raw(EGRESS_2), INCARNATION + 1), "{name}");
    }
    assert_eq!(world.consistent(), packets.len(), "what the earlier pod had is given back");
}

#[test]
fn xdp_uplink_egress_the_last_packets_of_a_pod_that_is_gone_leave() {
    let mut world = World::new();
    let port = translated(&mut world, "SYN", &syn(), true);
    world.remove_pod(POD);
    let fin = Packet::tcp((POD, 40000), (ORIGIN, 443), FIN | ACK);
    assert_eq!(translated(&mut world, "FIN", &fin, false), port);
    let new = Packet::tcp((POD, 40001), (ORIGIN, 443), SYN);
    assert_eq!(world.out(&new.frame()).verdict, TCX_REDIRECT, "nobody opens anything any more");
    assert_eq!(world.counted(), [("refusal_sent", 1), ("refuse_unavailable", 1)]);
}

/// A packet that the kernel will cut into segments may be longer than its header can say, which says 0 then.
#[test]
fn xdp_uplink_egress_takes_big_tcp_for_what_it_is() {
    let mut world = World::new();
    translated(&mut world, "SYN", &syn(), true);
    let mut frame = Packet::tcp((POD, 40000), (ORIGIN, 443), ACK).with_payload(3000).frame();
    frame[16..18].copy_from_slice(&[0, 0]);
    assert_eq!(world.out(&frame).verdict, TCX_DROP, "not if it is not to be cut");
    world.counted();
    let out = classify_segments(world.program("uplink_egress"), &frame, MARK, 1400);
    assert_eq!((out.verdict, &out.packet[26..30]), (TCX_NEXT, &EGRESS.octets()[..]));
    assert_eq!(world.counted(), [("translated", 1)]);
    assert_eq!(world.pod(&frame, 0).verdict, TCX_DROP);
    assert_eq!(classify_segments(world.program("pod_ingress"), &frame, 0, 1400).verdict, TCX_NEXT);
}
