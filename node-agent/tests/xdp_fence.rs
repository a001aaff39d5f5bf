//! Deadlines of addresses: what still leaves after a node has not renewed its Lease for some time.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::net::Ipv4Addr;
use support::gateway::*;
use support::packet::{ACK, Packet, SYN, geneve};
use support::*;

const SOFT: u32 = 45;
const HARD: u32 = 60;

fn syn(port: u16) -> Packet {
    Packet::tcp((POD, port), (ORIGIN, 443), SYN)
}

fn ack(port: u16) -> Packet {
    Packet::tcp((POD, port), (ORIGIN, 443), ACK)
}

fn datagram(port: u16) -> Packet {
    Packet::udp((POD, port), (ORIGIN, 53), b"question")
}

/// A node whose address has deadlines, and which has just renewed its Lease.
fn fenced() -> World {
    let mut world = World::new();
    world.fence(EGRESS, SOFT, HARD);
    world.renewed(0, SOFT);
    world
}

/// What leaves is counted as one of the reasons, and nothing else.
fn stopped(world: &mut World, name: &str, packet: &Packet, reasons: &[(&str, u64)]) {
    world.counted();
    let out = world.out(&packet.frame());
    assert!(out.verdict != TCX_NEXT, "{name}: it left");
    assert_ne!(out.frame[26..30], EGRESS.octets(), "{name}: it bears the address");
    assert_eq!(world.counted(), reasons, "{name}");
}

#[test]
fn xdp_fence_before_the_deadlines_everything_leaves() {
    let mut world = fenced();
    for ago in [0, u64::from(SOFT) - 2] {
        world.renewed(ago, SOFT);
        for packet in [syn(40000 + ago as u16), datagram(5000 + ago as u16), ack(40000)] {
            assert_eq!(world.out(&packet.frame()).verdict, TCX_NEXT, "{ago} s: {:?}", world.counted());
        }
    }
}

#[test]
fn xdp_fence_after_the_soft_deadline_flows_go_on_and_none_begins() {
    let mut world = fenced();
    for packet in [syn(40000), datagram(5000), Packet::echo(POD, ORIGIN, 7)] {
        assert_eq!(world.out(&packet.frame()).verdict, TCX_NEXT);
    }
    world.renewed(u64::from(SOFT) + 1, SOFT);
    for (name, packet) in [
        ("a segment", ack(40000)),
        ("a SYN once more", syn(40000)),
        ("a datagram", datagram(5000)),
        ("an echo", Packet::echo(POD, ORIGIN, 7)),
    ] {
        assert_eq!(world.out(&packet.frame()).verdict, TCX_NEXT, "{name}: {:?}", world.counted());
    }
    let refused = [("refusal_sent", 1), ("refuse_fenced", 1)];
    stopped(&mut world, "TCP", &syn(40001), &refused);
    stopped(&mut world, "UDP", &datagram(5001), &refused);
    stopped(&mut world, "echo", &Packet::echo(POD, ORIGIN, 8), &refused);
    assert_eq!(world.consistent(), 3);
    world.renewed(0, SOFT);
    assert_eq!(world.out(&syn(40001).frame()).verdict, TCX_NEXT, "renewed");
}

#[test]
fn xdp_fence_after_the_hard_deadline_nothing_bears_the_address() {
    let mut world = fenced();
    let large = datagram(5000).with_payload(3000).with_fragment(0).with_id(9);
    let fragments = large.fragments(1480);
    let port = |frame: &[u8]| u16::from_be_bytes([frame[34], frame[35]]);
    let tcp = port(&world.out(&syn(40000).frame()).frame);
    let udp = port(&world.out(&datagram(5001).frame()).frame);
    assert_eq!(world.out(&fragments[0]).verdict, TCX_NEXT);
    let closed = [("drop_fenced", 1)];
    let quoted = Packet::udp((ORIGIN, 53), (POD, 5001), b"answer");
    let error = Packet::error(POD, &quoted, 3, 3, 8);
    assert_eq!(world.out(&error.frame()).verdict, TCX_NEXT, "an error of the pod");

    world.renewed(u64::from(HARD) + 1, SOFT);
    stopped(&mut world, "a segment", &ack(40000), &closed);
    stopped(&mut world, "an error of the pod", &error, &closed);
    world.counted();
    assert_eq!(world.out(&fragments[1]).verdict, TCX_DROP, "a later fragment");
    assert_eq!(world.counted(), closed);
    let reply = Packet::tcp((ORIGIN, 443), (EGRESS, tcp), SYN | ACK);
    assert_eq!(world.back(&reply.frame()).0, XDP_DROP, "what comes in may be another node's");
    assert_eq!(world.counted(), closed);
    let elsewhere = Packet::udp((ORIGIN, 53), (EGRESS, SLICE_2 << 8), b"").with_payload(1460);
    assert_eq!(world.back(&elsewhere.frame()).0, XDP_DROP, "an answer in the origin's way");
    assert_eq!(world.counted(), closed);
    // The lease is renewed after all: connections go on where they were.
    world.renewed(0, SOFT);
    assert_eq!(port(&world.out(&ack(40000).frame()).frame), tcp);
    assert_eq!(port(&world.out(&datagram(5001).frame()).frame), udp);
    assert_eq!(world.out(&fragments[1]).verdict, TCX_NEXT);
    assert_eq!(world.back(&reply.frame()).0, XDP_PASS);
    let (verdict, frame) = world.back(&elsewhere.frame());
    assert_eq!((verdict, &frame[26..30]), (XDP_TX, &EGRESS.octets()[..]), "answered");

    // What can begin anew does: there is no other way, so it is refused.
    world.renewed(u64::from(HARD) + 1, SOFT);
    let flows = world.consistent();
    let refused = [("refusal_sent", 1), ("refuse_fenced", 1)];
    stopped(&mut world, "a datagram", &datagram(5001), &refused);
    stopped(&mut world, "a SYN", &syn(40000), &refused);
    assert_eq!(world.consistent(), flows - 2);
}

#[test]
fn xdp_fence_without_a_lease_every_deadline_has_passed() {
    let mut world = fenced();
    assert_eq!(world.out(&syn(40000).frame()).verdict, TCX_NEXT);
    world.set_lease(LeaseValue::default());
    stopped(&mut world, "a segment", &ack(40000), &[("drop_fenced", 1)]);
    stopped(&mut world, "a SYN", &syn(40001), &[("refusal_sent", 1), ("refuse_fenced", 1)]);
}

#[test]
fn xdp_fence_other_addresses_know_of_no_deadline() {
    let mut world = fenced();
    world.second_account();
    world.pod_class(1, POD_2, 2);
    let of_other = |flags| Packet::tcp((POD_2, 40000), (ORIGIN, 443), flags);
    assert_eq!(world.out(&of_other(SYN).frame()).verdict, TCX_NEXT);
    world.set_lease(LeaseValue::default());
    for (name, packet) in
        [("a segment", of_other(ACK)), ("a datagram", Packet::udp((POD_2, 5000), (ORIGIN, 53), b"x"))]
    {
        let out = world.out(&packet.frame());
        assert_eq!((out.verdict, &out.frame[26..30]), (TCX_NEXT, &EGRESS_2.octets()[..]), "{name}");
    }
    stopped(&mut world, "beside it", &syn(40000), &[("refusal_sent", 1), ("refuse_fenced", 1)]);
}

#[test]
fn xdp_fence_another_address_of_the_allocation_takes_what_is_new() {
    let mut world = fenced();
    world.allocation(&[EGRESS, EGRESS_2], Timeouts::default());
    world.renewed(u64::from(SOFT) + 1, SOFT);
    for port in 41000..41020 {
        let out = world.out(&syn(port).frame());
        assert_eq!((out.verdict, &out.frame[26..30]), (TCX_NEXT, &EGRESS_2.octets()[..]), "{port}");
    }
}

#[test]
fn xdp_fence_new_flows_go_through_a_gateway_meanwhile() {
    let mut node = fenced();
    let mut value: AllocationValue = node.plane.array("ALLOCATIONS").unwrap().get(&0, 0).unwrap();
    (value.gateways[0], value.gateway_count, value.name) = (2, 1, raw(EGRESS));
    node.plane.array("ALLOCATIONS").unwrap().set(0, value, 0).unwrap();
    assert_eq!(node.out(&syn(40000).frame()).verdict, TCX_NEXT, "by itself while it may");
    assert_eq!(node.out(&datagram(5000).frame()).verdict, TCX_NEXT);

    node.renewed(u64::from(SOFT) + 1, SOFT);
    encapsulated(&mut node, "a new connection", &syn(40001), NODE_2);
    assert_eq!(node.out(&datagram(5000).frame()).verdict, TCX_NEXT, "a flow stays where it is");
    node.renewed(u64::from(HARD) + 1, SOFT);
    encapsulated(&mut node, "a datagram of an old flow", &datagram(5000), NODE_2);
    encapsulated(&mut node, "the connection", &ack(40001), NODE_2);
    stopped(&mut node, "an old connection", &ack(40000), &[("drop_fenced", 1)]);
    assert_eq!(node.consistent(), 3);
}

#[test]
fn xdp_fence_a_gateway_keeps_its_deadlines_too() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    gateway.fence(EGRESS, SOFT, HARD);
    gateway.renewed(0, SOFT);
    let mut through = |gateway: &mut World, packet: &Packet| {
        let frame = encapsulated(&mut node, "to the gateway", packet, NODE_2);
        gateway.counted();
        let (verdict, _) = gateway.back(&frame);
        (verdict, gateway.counted())
    };
    let large = datagram(5001).with_payload(1000).with_fragment(0).with_id(9);
    let fragments = large.fragments(800);
    let quoted = Packet::udp((ORIGIN, 53), (POD, 5000), b"answer");
    let error = Packet::error(POD, &quoted, 3, 3, 8);
    for packet in [&syn(40000), &datagram(5000), &error] {
        assert_eq!(through(&mut gateway, packet).0, XDP_REDIRECT);
    }
    let encapsulate = |fragment: &[u8]| {
        let mut inner = vec![0xff, 0x91, 0x81, 0x01];
        inner.extend(EGRESS.octets());
        inner.extend(&fragment[14..]);
        let mut frame = geneve((NODE, NODE_2), ([0; 6], [0; 6]), 0xc001, VNI_GATEWAY, &inner);
        frame[42..44].copy_from_slice(&[2, 0x40]);
        frame
    };
    assert_eq!(gateway.back(&encapsulate(&fragments[0])).0, XDP_REDIRECT);

    gateway.renewed(u64::from(SOFT) + 1, SOFT);
    assert_eq!(through(&mut gateway, &ack(40000)), (XDP_REDIRECT, vec![("guest", 1)]), "it goes on");
    let answered = vec![("returned", 1), ("refusal_sent", 1), ("refuse_fenced", 1)];
    assert_eq!(through(&mut gateway, &syn(40001)), (XDP_REDIRECT, answered.clone()), "answered, not sent on");

    gateway.renewed(u64::from(HARD) + 1, SOFT);
    let closed = (XDP_DROP, vec![("drop_fenced", 1)]);
    assert_eq!(through(&mut gateway, &ack(40000)), closed, "a segment");
    assert_eq!(through(&mut gateway, &error), closed, "an error");
    assert_eq!(gateway.back(&encapsulate(&fragments[1])).0, XDP_DROP, "a fragment");
    assert_eq!(gateway.counted(), [("drop_fenced", 1)]);
    assert_eq!(through(&mut gateway, &datagram(5000)).1, answered, "a datagram begins anew");
    // A reply that is too large for the tunnel to the pod's node is not answered in the address's name.
    let reply = Packet::udp((ORIGIN, 53), (EGRESS, SLICE << 8), b"").with_payload(1460);
    assert_eq!(gateway.back(&reply.frame()).0, XDP_DROP);
    assert_eq!(gateway.counted(), [("drop_fenced", 1)]);
    assert_eq!(gateway.consistent(), 2);
}

#[test]
fn xdp_fence_an_address_without_deadline_needs_no_lease() {
    let mut world = World::new();
    // As the maps are before the agent has ever written a lease.
    world.set_lease(LeaseValue::default());
    for packet in [syn(40000), datagram(5000)] {
        assert_eq!(world.out(&packet.frame()).verdict, TCX_NEXT);
    }
    let unknown = Ipv4Addr::new(192, 0, 2, 77);
    assert_eq!(world.out_unmarked(&Packet::udp((unknown, 1), (ORIGIN, 53), b"").frame()).verdict, TCX_NEXT);
}
