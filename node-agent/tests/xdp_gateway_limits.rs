//! What does not go through a gateway, and what goes on although nodes do not agree.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::net::Ipv4Addr;
use support::gateway::*;
use support::packet::{ACK, Body, Packet, SYN, geneve};
use support::*;

const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);

fn question() -> Packet {
    Packet::udp((POD, 5000), (ORIGIN, 53), b"question")
}

/// A frame for the gateway with another packet in it, or another name.
fn forged(node: &mut World, inner: &Packet, name: Ipv4Addr) -> Vec<u8> {
    let mut frame = encapsulated(node, "to be forged", &question(), NODE_2);
    frame.truncate(14 + 44);
    frame[54..58].copy_from_slice(&name.octets());
    frame.extend(inner.bytes());
    let (length, udp) = (frame.len() as u16 - 14, frame.len() as u16 - 34);
    frame[16..18].copy_from_slice(&length.to_be_bytes());
    frame[38..40].copy_from_slice(&udp.to_be_bytes());
    frame
}

#[test]
fn xdp_gateway_a_node_speaks_only_for_its_own_pods_and_to_the_outside() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    let own = Ipv4Addr::new(10, 244, 2, 7);
    gateway.pod_class(1, own, 0);
    let inside = Ipv4Addr::new(10, 244, 9, 9);
    for (name, packet, reason) in [
        ("a pod of the gateway", Packet::udp((own, 5000), (ORIGIN, 53), b"x"), "drop_forged"),
        ("to the inside", Packet::udp((POD, 5000), (inside, 53), b"x"), "drop_forged"),
        ("to an egress address", Packet::udp((POD, 5000), (EGRESS_2, 53), b"x"), "refuse_unavailable"),
        ("from an egress address", Packet::udp((EGRESS_2, 5000), (ORIGIN, 53), b"x"), "drop_forged"),
    ] {
        let frame = forged(&mut node, &packet, EGRESS);
        gateway.counted();
        gateway.back(&frame);
        assert!(gateway.counted().contains(&(reason, 1)), "{name}");
        assert_eq!(gateway.consistent(), 0, "{name}");
    }
    let frame = forged(&mut node, &question(), EGRESS);
    sent_on(&mut gateway, "what nothing is wrong with", &frame, &question());
}

#[test]
fn xdp_gateway_live_flows_go_on_whatever_their_name_stands_for() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    let syn = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN);
    let frame = encapsulated(&mut node, "SYN", &syn, NODE_2);
    let port = sent_on(&mut gateway, "SYN", &frame, &syn);
    // The gateway does not know the name any more: the allocation is being deleted, say.
    let value = AddressValue { index: 0, allocation: 0 };
    gateway.plane.hash("ADDRESSES").unwrap().insert(raw(EGRESS), value, 0).unwrap();
    let ack = Packet::tcp((POD, 40000), (ORIGIN, 443), ACK);
    let frame = encapsulated(&mut node, "ACK", &ack, NODE_2);
    assert_eq!(sent_on(&mut gateway, "ACK", &frame, &ack), port);
    // Nor any name like the one that the node uses by now.
    let frame = forged(&mut node, &ack, Ipv4Addr::new(192, 0, 2, 77));
    assert_eq!(sent_on(&mut gateway, "another name", &frame, &ack), port);
    gateway.counted();
    let frame = encapsulated(&mut node, "new", &question(), NODE_2);
    gateway.back(&frame);
    assert!(gateway.counted().contains(&("refuse_unavailable", 1)), "a new flow needs the name");
    // Nor is it known any more whose the bitmap is.
    gateway.recount();
    assert_eq!(gateway.consistent(), 1);
}

#[test]
fn xdp_gateway_only_the_flows_own_gateway_brings_answers() {
    let mut node = pods_node();
    encapsulated(&mut node, "question", &question(), NODE_2);
    let answer = Packet::udp((ORIGIN, 53), (POD, 5000), b"answer").with_payload(1000).with_id(7);
    let from = |from, inner: &[u8]| geneve((from, NODE), ([2; 6], [3; 6]), 0xc001, VNI_RETURN, inner);
    let fragments = answer.fragments(800);
    let frames = [answer.bytes(), fragments[0][14..].to_vec(), fragments[1][14..].to_vec()];
    for (frame, reason) in frames.iter().zip(["drop_no_flow", "drop_no_flow", "drop_fragment_in"]) {
        node.counted();
        assert_eq!(node.back(&from(NODE_3, frame)).0, XDP_DROP);
        assert_eq!(node.counted(), [(reason, 1)]);
    }
    for frame in &frames {
        assert_eq!(node.back(&from(NODE_2, frame)).0, XDP_PASS);
    }
    node.counted();
    assert_eq!(node.back(&from(NODE_3, &frames[2])).0, XDP_DROP, "a fragment from another than the first");
    assert_eq!(node.counted(), [("drop_fragment_in", 1)]);
}

/// RFC 5508 REQ-6.
#[test]
fn xdp_gateway_an_error_about_an_echo_does_not_refresh_it() {
    let mut node = pods_node();
    let echo = Packet::echo(POD, ORIGIN, 77);
    let key = flow(1, (POD, 77), (ORIGIN, 0));
    encapsulated(&mut node, "echo", &echo, NODE_2);
    let returned =
        |packet: Packet| geneve((NODE_2, NODE), ([2; 6], [3; 6]), 0xc001, VNI_RETURN, &packet.bytes());
    for (kind, code) in [(3, 1), (11, 0), (12, 0)] {
        let error = Packet::error(Ipv4Addr::new(203, 0, 113, 1), &echo, kind, code, 8);
        assert_eq!(node.back(&returned(error)).0, XDP_PASS, "{kind}/{code}");
        assert_eq!(node.reverse(&key).unwrap().last_seen, 0, "{kind}/{code}: not by an error");
    }
    assert_eq!(node.back(&returned(Packet::echo_reply(ORIGIN, POD, 77))).0, XDP_PASS);
    assert_ne!(node.reverse(&key).unwrap().last_seen, 0, "by a reply");
}

#[test]
fn xdp_gateway_translates_the_pods_errors_too() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    let ping = Packet::echo(POD, ORIGIN, 77);
    for (name, packet, reply) in [
        ("UDP", question(), Packet::udp((ORIGIN, 53), (EGRESS, 0), b"answer")),
        ("echo", ping, Packet::echo_reply(ORIGIN, EGRESS, 0)),
    ] {
        let frame = encapsulated(&mut node, name, &packet, NODE_2);
        let port = sent_on(&mut gateway, name, &frame, &packet);
        let got = reply.clone().to(POD, if packet.protocol() == 1 { 77 } else { 5000 });
        let error = Packet::error(POD, &got, 3, 3, 8);
        let frame = encapsulated(&mut node, name, &error, NODE_2);
        gateway.counted();
        let (verdict, frame) = gateway.back(&frame);
        assert_eq!(verdict, XDP_REDIRECT, "{name}: {:?}", gateway.counted());
        let mut sent = Packet::error(EGRESS, &reply.clone().to(EGRESS, port), 3, 3, 8).frame();
        // What is quoted of the transport header keeps the checksum that the pod saw.
        let quoted = 14 + 20 + 8 + 20;
        let at = if packet.protocol() == 1 { quoted + 2 } else { quoted + 6 };
        assert_eq!(frame[..36][14..], sent[..36][14..], "{name}: IP header and type");
        sent[at..at + 2].copy_from_slice(&got.bytes()[at - 42..at - 40]);
        sent[36..38].copy_from_slice(&[0, 0]);
        let sum = support::packet::checksum(&sent[34..]);
        sent[36..38].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(frame[14..], sent[14..], "{name}: what the origin gets");
        assert_eq!(gateway.counted(), [("guest", 1)], "{name}");
    }
    // About a flow that nobody has.
    let stranger = Packet::error(POD, &Packet::udp((ORIGIN, 54), (POD, 5000), b"x"), 3, 3, 8);
    let out = node.out(&stranger.frame());
    assert_eq!((out.verdict, out.mark & MARK), (TCX_DROP, MARK), "nothing leaves with the pod's address");
    let frame = forged(&mut node, &stranger, EGRESS);
    gateway.counted();
    assert_eq!(gateway.back(&frame).0, XDP_DROP);
    assert_eq!(gateway.counted(), [("refuse_no_flow", 1)]);
}

#[test]
fn xdp_gateway_answers_to_probes_are_not_answered() {
    let world = gateway();
    for (name, vni) in [("an answer", VNI_PROBE_ANSWER), ("somebody else's", 77)] {
        let mut frame = geneve((NODE, NODE_2), ([2, 0, 0, 0, 0, 1], [2; 6]), 6081, vni, &[]);
        frame.truncate(50);
        let (verdict, after) = world.back(&frame);
        assert_eq!((verdict, after), (XDP_PASS, frame), "{name} goes up the stack");
    }
    // Even if somebody makes a probe look as if it came from the tunnel port, its answer ends there.
    let probe = geneve((NODE, NODE_2), ([2, 0, 0, 0, 0, 1], [2; 6]), 6081, VNI_PROBE, &[]);
    let (verdict, answer) = world.back(&probe);
    assert_eq!(verdict, XDP_TX);
    let node = pods_node();
    assert_eq!(node.back(&answer).0, XDP_PASS);
    assert_eq!(world.back(&geneve((STRANGER, NODE_2), ([1; 6], [2; 6]), 1, VNI_PROBE, &[])).0, XDP_DROP);
}

#[test]
fn xdp_gateway_one_that_is_no_peer_any_more_is_lost() {
    let mut node = pods_node();
    gateways(&mut node, &[2, 3], 1);
    let segment = |flags| Packet::tcp((POD, 40000), (ORIGIN, 443), flags);
    encapsulated(&mut node, "SYN", &segment(SYN), NODE_2);
    encapsulated(&mut node, "question", &question(), NODE_2);
    node.plane.array("PEERS").unwrap().set(2, PeerValue::default(), 0).unwrap();
    node.counted();
    assert_eq!(node.out(&segment(ACK).frame()).verdict, TCX_REDIRECT);
    assert_eq!(node.counted(), [("refusal_sent", 1), ("refuse_gateway_lost", 1)]);
    encapsulated(&mut node, "datagrams move", &question(), NODE_3);
    encapsulated(&mut node, "so do new connections", &segment(SYN), NODE_3);
    assert_eq!(node.consistent(), 2);
}

#[test]
fn xdp_gateway_without_room_for_the_way_back_a_flow_is_refused() {
    let mut node = World::sized(&aegis_node_agent::ebpf::MapSizes {
        flows: 64,
        blocks: 64,
        ..aegis_node_agent::ebpf::MapSizes::default()
    });
    gateways(&mut node, &[2], 1);
    for port in 0..64 {
        let key = flow(17, (EGRESS, port), (ELSEWHERE, 1));
        node.set_reverse(key, ReverseValue::default());
    }
    assert_eq!(node.out(&question().frame()).verdict, TCX_REDIRECT);
    assert_eq!(node.counted(), [("new_flow", 1), ("refusal_sent", 1), ("refuse_table_full", 1)]);
    assert_eq!(node.entries::<FlowKey, ForwardValue>("FORWARD"), []);
}

#[test]
fn xdp_gateway_segments_that_do_not_fit_are_answered() {
    let mut node = pods_node();
    let limit: u32 = 1464 - 8;
    let udp = Packet::udp((POD, 5000), (ORIGIN, 53), b"").with_payload(3000);
    let tcp = Packet::tcp((POD, 40000), (ORIGIN, 443), SYN).with_payload(3000);
    for (name, packet, segment) in [("UDP", udp, limit - 27), ("TCP", tcp, limit - 39 + 44)] {
        node.counted();
        let out = classify_segments(node.program("uplink_egress"), &packet.frame(), MARK, segment);
        assert_eq!(out.verdict, TCX_REDIRECT, "{name}");
        let counted = node.counted();
        assert!(
            counted.contains(&("too_big_out", 1)) && counted.contains(&("refusal_sent", 1)),
            "{counted:?}"
        );
        let mut expected = made(Packet::error(ORIGIN, &packet, 3, 4, 8));
        let Body::Icmp(icmp) = &mut expected.body else { unreachable!() };
        icmp.rest[2..].copy_from_slice(&(limit as u16).to_be_bytes());
        assert_eq!(out.packet[14..], expected.frame()[14..], "{name}");
        // One byte less fits. (A test's packet cannot be encapsulated, since the kernel does not know its kind.)
        classify_segments(node.program("uplink_egress"), &packet.frame(), MARK, segment - 1);
        assert!(!node.counted().iter().any(|(label, _)| *label == "too_big_out"), "{name}");
    }
}

#[test]
fn xdp_gateway_pods_cannot_speak_to_the_tunnel_of_a_node() {
    let mut node = World::new();
    let inner = question();
    let forged = geneve((POD, NODE_2), ([4; 6], [5; 6]), 33333, VNI_GATEWAY, &inner.bytes());
    let to = |destination, port| Packet::udp((POD, 33333), (destination, port), b"x").frame();
    for (name, frame, verdict) in [
        ("a forged packet of the tunnel", forged, TCX_DROP),
        ("anything to a node's tunnel port", to(NODE_2, 6081), TCX_DROP),
        (
            "from a pod that nobody has named",
            Packet::udp((UNKNOWN_POD, 1), (NODE_2, 6081), b"x").frame(),
            TCX_DROP,
        ),
        (
            "in fragments",
            Packet::udp((POD, 1), (NODE_2, 6081), b"").with_payload(100).fragments(64).remove(0),
            TCX_DROP,
        ),
        ("another port", to(NODE_2, 6082), TCX_NEXT),
        ("TCP", Packet::tcp((POD, 1), (NODE_2, 6081), SYN).frame(), TCX_NEXT),
        ("somebody else's tunnel", to(ELSEWHERE, 6081), TCX_NEXT),
    ] {
        node.counted();
        assert_eq!(node.pod(&frame, 0).verdict, verdict, "{name}");
        let expected: &[_] = if verdict == TCX_DROP { &[("drop_forged", 1)] } else { &[] };
        assert_eq!(node.counted(), expected, "{name}");
    }
}

#[test]
fn xdp_gateway_a_next_hop_that_is_not_resolved_is_asked_for() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    let frame = encapsulated(&mut node, "question", &question(), NODE_2);
    run("ip neigh del 10.0.0.254 dev eth0");
    gateway.counted();
    let before = now();
    assert_eq!(gateway.back(&frame).0, XDP_DROP);
    assert_eq!(gateway.counted(), [("new_flow", 1), ("drop_no_neighbour", 1)]);
    let wanted: Vec<(u32, u32)> = gateway.entries("UNRESOLVED");
    assert_eq!((wanted.len(), wanted[0].0), (1, raw(Ipv4Addr::new(10, 0, 0, 254))));
    assert!(wanted[0].1 >= before);
    run("ip neigh add 10.0.0.254 lladdr 02:00:00:00:00:fe dev eth0");
    sent_on(&mut gateway, "resolved", &frame, &question());
}
