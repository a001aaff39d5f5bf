//! Sending through a gateway: the pod's node encapsulates, the gateway translates and sends on, and what comes back takes the
//! same way. Each node is a set of maps of its own; the frames go from one to the other.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::net::Ipv4Addr;
use support::gateway::*;
use support::packet::{ACK, Body, FIN, MF, Packet, RST, SYN, checksum, geneve};
use support::*;

#[test]
fn xdp_gateway_there_and_back() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    let router = Ipv4Addr::new(203, 0, 113, 1);
    for (name, packet, reply, to_pod) in [
        (
            "TCP",
            Packet::tcp((POD, 40000), (ORIGIN, 443), SYN),
            Packet::tcp((ORIGIN, 443), (EGRESS, 0), SYN | ACK),
            Packet::tcp((ORIGIN, 443), (POD, 40000), SYN | ACK),
        ),
        (
            "TCP with IP options",
            Packet::tcp((POD, 40001), (ORIGIN, 443), SYN).with_ip_options(),
            Packet::tcp((ORIGIN, 443), (EGRESS, 0), SYN | ACK).with_ip_options(),
            Packet::tcp((ORIGIN, 443), (POD, 40001), SYN | ACK).with_ip_options(),
        ),
        (
            "UDP",
            Packet::udp((POD, 5000), (ORIGIN, 53), b"question"),
            Packet::udp((ORIGIN, 53), (EGRESS, 0), b"answer"),
            Packet::udp((ORIGIN, 53), (POD, 5000), b"answer"),
        ),
        (
            "UDP without checksum",
            Packet::udp((POD, 5001), (ORIGIN, 53), b"odd").without_checksum(),
            Packet::udp((ORIGIN, 53), (EGRESS, 0), b"x").without_checksum(),
            Packet::udp((ORIGIN, 53), (POD, 5001), b"x").without_checksum(),
        ),
        (
            "echo",
            Packet::echo(POD, ORIGIN, 77),
            Packet::echo_reply(ORIGIN, EGRESS, 0),
            Packet::echo_reply(ORIGIN, POD, 77),
        ),
    ] {
        node.counted();
        gateway.counted();
        let frame = encapsulated(&mut node, name, &packet, NODE_2);
        assert_eq!(node.counted(), [("new_flow", 1), ("to_gateway", 1)], "{name}");
        let port = sent_on(&mut gateway, name, &frame, &packet);
        assert_eq!(gateway.counted(), [("new_flow", 1), ("guest", 1)], "{name}");
        // The second packet is of the same flow on both.
        let frame = encapsulated(&mut node, name, &packet, NODE_2);
        assert_eq!(node.counted(), [("to_gateway", 1)], "{name}");
        assert_eq!(sent_on(&mut gateway, name, &frame, &packet), port, "{name}");
        gateway.counted();
        back(&mut gateway, &mut node, name, &reply.clone().to(EGRESS, port), &to_pod);
        assert_eq!(gateway.counted(), [("returned", 1)], "{name}");
        // What the way says about the flow. (What is quoted of a UDP or ICMP header keeps the checksum that it had on the
        // way.)
        if packet.protocol() != 6 {
            continue;
        }
        let left = packet.clone().from(EGRESS, port);
        let told = Packet::error(router, &packet, 3, 1, 8);
        back(&mut gateway, &mut node, name, &Packet::error(router, &left, 3, 1, 8), &told);
    }
    assert_eq!((node.consistent(), gateway.consistent()), (5, 5));
}

#[test]
fn xdp_gateway_the_node_keeps_a_flow_and_what_it_saw() {
    let mut node = pods_node();
    let key = flow(6, (POD, 40000), (ORIGIN, 443));
    encapsulated(&mut node, "SYN", &Packet::tcp((POD, 40000), (ORIGIN, 443), SYN), NODE_2);
    encapsulated(&mut node, "ACK", &Packet::tcp((POD, 40000), (ORIGIN, 443), ACK), NODE_2);
    let reply = Packet::tcp((ORIGIN, 443), (POD, 40000), ACK | FIN);
    let tunnel = geneve((NODE_2, NODE), ([2; 6], [3; 6]), 0xc001, VNI_RETURN, &reply.bytes());
    assert_eq!(node.back(&tunnel).0, XDP_PASS);
    let forward = node.forward(&key).unwrap();
    assert_eq!((forward.egress, forward.egress_port, forward.peer), (raw(POD), 40000, 2));
    assert_eq!(forward.seen, SEEN_SYN | SEEN_ACK);
    assert_eq!(node.reverse(&key).unwrap().seen, SEEN_ACK | SEEN_FIN);
    // The pod goes: nothing is taken in any more.
    node.remove_pod(POD);
    assert_eq!(node.plane.sweeper().unwrap().flows(&[key]).unwrap(), 0, "the port rests, at the gateway too");
    node.counted();
    assert_eq!(node.back(&tunnel).0, XDP_DROP);
    assert_eq!(node.counted(), [("drop_no_flow", 1)]);
}

#[test]
fn xdp_gateway_what_nobody_asked_for_is_not_taken_in() {
    let mut node = pods_node();
    encapsulated(&mut node, "SYN", &Packet::tcp((POD, 40000), (ORIGIN, 443), SYN), NODE_2);
    node.counted();
    let tunnel =
        |from, packet: &Packet| geneve((from, NODE), ([2; 6], [3; 6]), 0xc001, VNI_RETURN, &packet.bytes());
    let other_port = Packet::tcp((ORIGIN, 443), (POD, 40001), ACK);
    let other_pod = Packet::tcp((ORIGIN, 443), (POD_2, 40000), ACK);
    let echo = Packet::echo(ORIGIN, POD, 7);
    let known = Packet::tcp((ORIGIN, 443), (POD, 40000), ACK);
    for (name, frame, reason) in [
        ("another port", tunnel(NODE_2, &other_port), "drop_no_flow"),
        ("another pod", tunnel(NODE_2, &other_pod), "drop_no_flow"),
        ("a question", tunnel(NODE_2, &echo), "drop_malformed_in"),
        ("from nobody", tunnel(Ipv4Addr::new(10, 0, 0, 9), &known), "drop_not_peer"),
    ] {
        assert_eq!(node.back(&frame).0, XDP_DROP, "{name}");
        assert_eq!(node.counted(), [(reason, 1)], "{name}");
    }
    // A flow that leaves from here has its own way in, and no other.
    let mut holder = World::new();
    assert_eq!(holder.out(&Packet::tcp((POD, 40000), (ORIGIN, 443), SYN).frame()).verdict, TCX_NEXT);
    holder.counted();
    assert_eq!(holder.back(&tunnel(NODE_2, &known)).0, XDP_DROP);
    assert_eq!(holder.counted(), [("drop_no_flow", 1)]);
}

#[test]
fn xdp_gateway_fragments_follow_their_first() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    gateway.home(0, 2);
    let packet = Packet::udp((POD, 5000), (ORIGIN, 53), b"").with_payload(2000).with_id(99);
    let packet = packet.with_fragment(0);
    let (mut port, mut identification) = (0, [0; 2]);
    for (at, fragment) in packet.fragments(800).iter().enumerate() {
        let out = node.out(fragment);
        assert_eq!(out.verdict, TCX_REDIRECT, "fragment {at}");
        let (verdict, frame) = gateway.back(&out.frame);
        assert_eq!(verdict, XDP_REDIRECT, "fragment {at}; {:?}", gateway.counted());
        assert_eq!(frame[26..30], EGRESS.octets());
        assert_eq!(checksum(&frame[14..34]), 0, "fragment {at}");
        // All have the same new identification, of a slice that the gateway holds.
        if at == 0 {
            port = u16::from_be_bytes([frame[34], frame[35]]);
            identification = [frame[18], frame[19]];
            assert_eq!(u16::from(frame[18]), SLICE);
        }
        assert_eq!(frame[18..20], identification, "fragment {at}");
    }
    let reply = Packet::udp((ORIGIN, 53), (EGRESS, port), b"").with_payload(2000).with_id(7);
    let expected = Packet::udp((ORIGIN, 53), (POD, 5000), b"").with_payload(2000).with_id(7).fragments(800);
    for (at, (fragment, expected)) in reply.fragments(800).iter().zip(&expected).enumerate() {
        let (verdict, frame) = gateway.back(fragment);
        assert_eq!(verdict, XDP_REDIRECT, "reply's fragment {at}; {:?}", gateway.counted());
        let (verdict, frame) = node.back(&frame);
        assert_eq!(verdict, XDP_PASS, "reply's fragment {at}; {:?}", node.counted());
        assert_eq!(frame[30..34], POD.octets(), "reply's fragment {at}");
        assert_eq!(frame[14..], expected[14..], "reply's fragment {at}");
    }
    let late =
        Packet::udp((POD, 5000), (ORIGIN, 53), b"").with_payload(800).with_fragment(MF | 100).with_id(5);
    assert_eq!(node.out(&late.frame()).verdict, TCX_DROP, "without its first fragment");
}

#[test]
fn xdp_gateway_refusals_reach_the_pod() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    let syn = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN);
    let question = Packet::udp((POD, 5000), (ORIGIN, 53), b"question");
    let refuse =
        |node: &mut World, gateway: &mut World, name: &str, packet: &Packet, reason: &'static str| {
            let frame = encapsulated(node, name, packet, NODE_2);
            gateway.counted();
            let (verdict, frame) = gateway.back(&frame);
            assert_eq!(verdict, XDP_REDIRECT, "{name}: {:?}", gateway.counted());
            let mut counted = gateway.counted();
            counted.sort();
            let mut expected = vec![(reason, 1), ("refusal_sent", 1), ("returned", 1)];
            expected.sort();
            assert_eq!(counted, expected, "{name}");
            node.counted();
            let (verdict, frame) = node.back(&frame);
            assert_eq!(verdict, XDP_PASS, "{name}: {:?}", node.counted());
            frame
        };
    // The gateway has lost its slices.
    gateway.allow(EGRESS, &[]);
    let frame = refuse(&mut node, &mut gateway, "SYN", &syn, "refuse_unavailable");
    let mut reset = made(Packet::tcp((ORIGIN, 443), (POD, 40000), RST | ACK));
    let (Body::Tcp(answer), Body::Tcp(asked)) = (&mut reset.body, &syn.body) else { unreachable!() };
    (answer.sequence, answer.acknowledged) = (0, asked.sequence + 1);
    assert_eq!(frame[14..], reset.frame()[14..], "the reset that answers the SYN");
    let frame = refuse(&mut node, &mut gateway, "UDP", &question, "refuse_unavailable");
    assert_eq!(frame[14..], made(Packet::error(ORIGIN, &question, 3, 13, 8)).frame()[14..]);
    // It is full.
    gateway.allow(EGRESS, &[SLICE]);
    exhaust(&mut gateway, 6, (ORIGIN, 443));
    refuse(&mut node, &mut gateway, "no port", &syn, "refuse_no_port");
    // It does not know the connection (any more).
    let middle = Packet::tcp((POD, 40000), (ORIGIN, 443), ACK);
    refuse(&mut node, &mut gateway, "no flow", &middle, "refuse_no_flow");
}

#[test]
fn xdp_gateway_takes_no_flow_for_another_accounts_or_another_nodes() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    let question = Packet::udp((POD, 5000), (ORIGIN, 53), b"question");
    let key = flow(17, (POD, 5000), (ORIGIN, 53));
    let frame = encapsulated(&mut node, "first", &question, NODE_2);
    sent_on(&mut gateway, "first", &frame, &question);
    // The same pod address, but from another node.
    let mut from_3 = frame.clone();
    from_3[26..30].copy_from_slice(&NODE_3.octets());
    gateway.plane.hash("PEER_INDEX").unwrap().insert(raw(NODE_3), 3u32, 0).unwrap();
    sent_on(&mut gateway, "another node", &from_3, &question);
    assert_eq!(gateway.forward(&key).unwrap().peer, 3);
    assert_eq!(gateway.consistent(), 1, "the former flow's port is given back");
    // The same pod address, but another allocation.
    gateway.second_account();
    gateway
        .plane
        .hash("ADDRESSES")
        .unwrap()
        .insert(raw(EGRESS_2), AddressValue { index: 1, allocation: 2 }, 0)
        .unwrap();
    let mut named_2 = frame;
    named_2[54..58].copy_from_slice(&EGRESS_2.octets());
    let (verdict, out) = gateway.back(&named_2);
    assert_eq!((verdict, &out[26..30]), (XDP_REDIRECT, &EGRESS_2.octets()[..]));
    assert_eq!(gateway.consistent(), 1);
    // A source that is one of ours.
    gateway.counted();
    let forged = encapsulated(&mut node, "forged", &question, NODE_2);
    let mut forged = forged;
    forged[70..74].copy_from_slice(&EGRESS_2.octets());
    assert_eq!(gateway.back(&forged).0, XDP_DROP);
    assert_eq!(gateway.counted(), [("drop_forged", 1)]);
}

#[test]
fn xdp_gateway_guests_are_swept_by_their_times_only() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    let question = Packet::udp((POD, 5000), (ORIGIN, 53), b"question");
    let frame = encapsulated(&mut node, "first", &question, NODE_2);
    sent_on(&mut gateway, "first", &frame, &question);
    let key = flow(17, (POD, 5000), (ORIGIN, 53));
    let sweep = |world: &World| world.plane.sweeper().unwrap().flows(&[key]).unwrap();
    assert_eq!(sweep(&gateway), 0, "the gateway does not know the pod, which says nothing");
    let port = gateway.forward(&key).unwrap().egress_port;
    assert_ne!(gateway.reverse(&flow(17, (EGRESS, port), (ORIGIN, 53))).unwrap().pod, 0);
    assert!(now() > 500, "the machine must run for 500 s before a flow can have ended that long ago");
    let old = ForwardValue { last_seen: 1, ..gateway.forward(&key).unwrap() };
    gateway.set_forward(key, old);
    assert_eq!(sweep(&gateway), 1);
    assert_eq!(gateway.consistent(), 0);
}

#[test]
fn xdp_gateway_one_that_fails_moves_its_own_flows_only() {
    let mut node = pods_node();
    gateways(&mut node, &[2, 3], 2);
    let question = |port| Packet::udp((POD, port), (ORIGIN, 53), b"question");
    let gateway_of = |node: &mut World, port: u16| {
        assert_eq!(node.out(&question(port).frame()).verdict, TCX_REDIRECT);
        node.forward(&flow(17, (POD, port), (ORIGIN, 53))).unwrap().peer
    };
    let before: Vec<u16> = (5000..5100).map(|port| gateway_of(&mut node, port)).collect();
    let share = before.iter().filter(|peer| **peer == 2).count();
    assert!((25..75).contains(&share), "{share} of 100 flows take one of two gateways");
    silence(&mut node, 2, PEER_SILENT);
    for (port, was) in (5000..5100).zip(&before) {
        let is = gateway_of(&mut node, port);
        assert_eq!(is, 3, "flow {port} was with {was}");
    }
    silence(&mut node, 2, 0);
    for port in 5000..5100 {
        assert_eq!(gateway_of(&mut node, port), 3, "a flow does not go back by itself");
    }
    // Far ones are for when no near one answers.
    gateways(&mut node, &[2, 3], 1);
    assert!((6000..6050).all(|port| gateway_of(&mut node, port) == 2));
    silence(&mut node, 2, PEER_SILENT);
    assert!((6100..6150).all(|port| gateway_of(&mut node, port) == 3));
    silence(&mut node, 3, PEER_SILENT);
    assert!(
        (6200..6250).all(|port| gateway_of(&mut node, port) == 2),
        "if nobody answers, it may be us who do not hear"
    );
}

#[test]
fn xdp_gateway_connections_keep_to_a_silent_gateway_until_it_is_lost() {
    let mut node = pods_node();
    gateways(&mut node, &[2, 3], 1);
    let key = flow(6, (POD, 40000), (ORIGIN, 443));
    let segment = |flags| Packet::tcp((POD, 40000), (ORIGIN, 443), flags);
    encapsulated(&mut node, "SYN", &segment(SYN), NODE_2);
    silence(&mut node, 2, PEER_SILENT);
    encapsulated(&mut node, "a SYN that nobody answered moves", &segment(SYN), NODE_3);
    silence(&mut node, 2, 0);
    silence(&mut node, 3, PEER_SILENT);
    let reply = Packet::tcp((ORIGIN, 443), (POD, 40000), SYN | ACK);
    let tunnel = geneve((NODE_3, NODE), ([2; 6], [3; 6]), 0xc001, VNI_RETURN, &reply.bytes());
    assert_eq!(node.back(&tunnel).0, XDP_PASS);
    // last_seen is in whole seconds since boot, which is not 0.
    encapsulated(&mut node, "a connection stays", &segment(ACK), NODE_3);
    silence(&mut node, 3, PEER_SILENT | PEER_LOST);
    node.counted();
    assert_eq!(node.out(&segment(ACK).frame()).verdict, TCX_REDIRECT);
    assert_eq!(node.counted(), [("refusal_sent", 1), ("refuse_gateway_lost", 1)]);
    assert_eq!(node.forward(&key), None);
    assert_eq!(node.consistent(), 0);
}

#[test]
fn xdp_gateway_what_does_not_fit_is_answered() {
    let mut node = pods_node();
    let limit = 1464 - 8;
    let fits = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN).with_payload(limit - 40);
    encapsulated(&mut node, "the largest that fits", &fits, NODE_2);
    node.counted();
    for packet in [
        Packet::tcp((POD, 40000), (ORIGIN, 443), ACK).with_payload(limit - 39),
        Packet::udp((POD, 5000), (ORIGIN, 53), b"").with_payload(limit - 27),
    ] {
        let out = node.out(&packet.frame());
        assert_eq!(out.verdict, TCX_REDIRECT);
        let mut expected = made(Packet::error(ORIGIN, &packet, 3, 4, 8));
        let Body::Icmp(icmp) = &mut expected.body else { unreachable!() };
        icmp.rest[2..].copy_from_slice(&(limit as u16).to_be_bytes());
        assert_eq!(out.frame[14..], expected.frame()[14..]);
    }
    let counted = node.counted();
    assert!(counted.contains(&("too_big_out", 2)) && counted.contains(&("refusal_sent", 2)), "{counted:?}");
}

#[test]
fn xdp_gateway_answers_probes_of_peers() {
    let mut world = gateway();
    let probe = |from| {
        let mut frame = geneve((from, NODE_2), ([2, 0, 0, 0, 0, 1], [2; 6]), 33333, VNI_PROBE, &[]);
        frame.truncate(50);
        frame
    };
    let (verdict, frame) = world.back(&probe(NODE));
    assert_eq!(verdict, XDP_TX);
    let mut expected = geneve((NODE_2, NODE), ([2; 6], [2, 0, 0, 0, 0, 1]), 6081, VNI_PROBE_ANSWER, &[]);
    expected[36..38].copy_from_slice(&33333u16.to_be_bytes());
    assert_eq!(frame, expected);
    assert_eq!(world.counted(), [("probed", 1)]);
    assert_eq!(world.back(&probe(Ipv4Addr::new(10, 0, 0, 9))).0, XDP_DROP);
    assert_eq!(world.counted(), [("drop_not_peer", 1)]);
}

/// What follows a packet in the frame is none of it.
#[test]
fn xdp_gateway_a_segment_without_a_whole_header_is_malformed() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    for (name, packet, length) in [
        ("TCP", Packet::tcp((POD, 40000), (ORIGIN, 443), SYN), 39),
        ("UDP", Packet::udp((POD, 5000), (ORIGIN, 53), b"question"), 27),
        ("echo", Packet::echo(POD, ORIGIN, 99), 27),
    ] {
        let mut frame = encapsulated(&mut node, name, &packet, NODE_2);
        // Total length of the packet behind 44 bytes of headers.
        frame[60..62].copy_from_slice(&(length as u16).to_be_bytes());
        gateway.counted();
        assert_eq!(gateway.back(&frame).0, XDP_DROP, "{name}");
        assert_eq!(gateway.counted(), [("drop_malformed_in", 1)], "{name}");
    }
    assert_eq!(gateway.consistent(), 0);
}
