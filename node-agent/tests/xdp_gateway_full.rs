//! A gateway without a port towards an origin: the pod's node takes another way, where there is one.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::net::Ipv4Addr;
use support::gateway::*;
use support::packet::{ACK, Packet, RST, SYN};
use support::*;

/// A policy whose primary is allocation 0, which the node has by gateways only, and whose secondary is allocation 1, of which it
/// holds a slice.
fn with_secondary(node: &mut World) {
    node.second_account();
    let key = VerdictKey { generation: 1, pod_class: 1, destination_class: 1, port_class: 0 };
    let value = VerdictValue { action: ACTION_ALLOCATE, secondary: 1, binding: 3, ..Default::default() };
    node.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
}

fn syn(port: u16) -> Packet {
    Packet::tcp((POD, port), (ORIGIN, 443), SYN)
}

/// Sends a packet through a gateway, which refuses it. Gives what the gateway sends to the pod's node.
fn refused(node: &mut World, gateway: &mut World, name: &str, packet: &Packet, to: Ipv4Addr) -> Vec<u8> {
    let frame = encapsulated(node, name, packet, to);
    gateway.counted();
    let (verdict, frame) = gateway.back(&frame);
    assert_eq!(verdict, XDP_REDIRECT, "{name}: {:?}", gateway.counted());
    assert!(gateway.counted().contains(&("refusal_sent", 1)), "{name}");
    assert_eq!(frame[46..49], VNI_REFUSED.to_be_bytes()[1..], "{name}: it says why");
    node.counted();
    frame
}

/// Where a packet leaves from that needs no gateway.
fn leaves(node: &mut World, packet: &Packet) -> Ipv4Addr {
    let out = node.out(&packet.frame());
    assert_eq!(out.verdict, TCX_NEXT, "{:?}", node.counted());
    Ipv4Addr::new(out.frame[26], out.frame[27], out.frame[28], out.frame[29])
}

fn live(node: &World) -> usize {
    let mut flows = 0;
    node.plane.forward().unwrap().for_each(|key, value| flows += usize::from(value.is_of(key)));
    flows
}

/// Lets time pass for what is known of full gateways.
fn age(node: &mut World, seconds: u32) {
    let spent: Vec<(SpentKey, u32)> = node.entries("SPENT");
    for (key, said) in spent {
        node.plane.hash("SPENT").unwrap().insert(key, said - seconds, 0).unwrap();
    }
}

#[test]
fn xdp_gateway_full_the_secondary_takes_over() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    with_secondary(&mut node);
    let question = Packet::udp((POD, 5000), (ORIGIN, 53), b"question");
    let packets = [("TCP", syn(40_000)), ("UDP", question), ("ICMP", Packet::echo(POD, ORIGIN, 77))];
    for (kept, (name, packet)) in packets.into_iter().enumerate() {
        let origin = match packet.protocol() {
            1 => (ORIGIN, 0),
            17 => (ORIGIN, 53),
            _ => (ORIGIN, 443),
        };
        exhaust(&mut gateway, packet.protocol(), origin);
        let frame = refused(&mut node, &mut gateway, name, &packet, NODE_2);
        assert_eq!(node.back(&frame).0, XDP_DROP, "{name}: the pod hears nothing of it");
        assert_eq!(node.counted(), [("drop_gateway_full", 1)], "{name}");
        assert_eq!(live(&node), kept, "{name}: the flow is over");
        assert_eq!(leaves(&mut node, &packet), EGRESS_2, "{name}: its next packet");
        assert!(node.counted().contains(&("secondary_flow", 1)), "{name}");
        // What says it a second time finds another flow.
        assert_eq!(node.back(&frame).0, XDP_DROP);
        assert_eq!(node.counted(), [("drop_no_flow", 1)], "{name}");
        assert_eq!(leaves(&mut node, &packet), EGRESS_2, "{name}: it goes on");
    }
}

#[test]
fn xdp_gateway_full_is_of_one_origin_and_for_a_while() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    with_secondary(&mut node);
    exhaust(&mut gateway, 6, (ORIGIN, 443));
    let frame = refused(&mut node, &mut gateway, "the first", &syn(40_000), NODE_2);
    assert_eq!(node.back(&frame).0, XDP_DROP);
    for port in 40_001..40_010 {
        assert_eq!(leaves(&mut node, &syn(port)), EGRESS_2, "not one more is late");
    }
    let other = Packet::tcp((POD, 40_000), (ORIGIN, 444), SYN);
    let frame = encapsulated(&mut node, "another origin", &other, NODE_2);
    sent_on(&mut gateway, "another origin", &frame, &other);
    // What left from the secondary stays there when the gateway is tried again.
    age(&mut node, SPENT_LIFE + 1);
    encapsulated(&mut node, "after a while", &syn(40_100), NODE_2);
    assert_eq!(leaves(&mut node, &Packet::tcp((POD, 40_001), (ORIGIN, 443), ACK)), EGRESS_2);
}

#[test]
fn xdp_gateway_full_another_gateway_takes_over() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    gateways(&mut node, &[2, 3], 1);
    exhaust(&mut gateway, 6, (ORIGIN, 443));
    let frame = refused(&mut node, &mut gateway, "the near one", &syn(40_000), NODE_2);
    assert_eq!(node.back(&frame).0, XDP_DROP);
    encapsulated(&mut node, "the far one", &syn(40_000), NODE_3);
    // It is silent: better a refusal than no answer.
    silence(&mut node, 3, PEER_SILENT);
    let frame = refused(&mut node, &mut gateway, "the only one that answers", &syn(40_001), NODE_2);
    let (verdict, frame) = node.back(&frame);
    assert_eq!(verdict, XDP_PASS, "there is no other way: {:?}", node.counted());
    assert_eq!(frame[47] & RST, RST, "the pod is told");
}

#[test]
fn xdp_gateway_full_without_another_way_the_pod_is_told_each_time() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    exhaust(&mut gateway, 6, (ORIGIN, 443));
    for port in 40_000..40_003 {
        let frame = refused(&mut node, &mut gateway, "no other", &syn(port), NODE_2);
        assert_eq!(node.back(&frame).0, XDP_PASS, "{:?}", node.counted());
        assert_eq!(node.counted(), [("from_gateway", 1)]);
    }
}

#[test]
fn xdp_gateway_full_is_believed_of_the_flows_own_gateway_only() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    with_secondary(&mut node);
    gateways(&mut node, &[2, 3], 1);
    exhaust(&mut gateway, 6, (ORIGIN, 443));
    let frame = refused(&mut node, &mut gateway, "the first", &syn(40_000), NODE_2);
    let mut foreign = frame.clone();
    foreign[26..30].copy_from_slice(&NODE_3.octets());
    assert_eq!(node.back(&foreign).0, XDP_DROP);
    assert_eq!(node.counted(), [("drop_no_flow", 1)]);
    assert_eq!(live(&node), 1, "the flow goes on");
    let spent: Vec<(SpentKey, u32)> = node.entries("SPENT");
    assert_eq!(spent, []);
    // From outside of the tunnel nobody says so.
    let mut stranger = frame;
    stranger[26..30].copy_from_slice(&ELSEWHERE.octets());
    assert_eq!(node.back(&stranger).0, XDP_DROP);
    assert_eq!(node.counted(), [("drop_not_peer", 1)]);
    assert_eq!(live(&node), 1);
}
