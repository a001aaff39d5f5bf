//! `uplink_ingress` and ARP: it answers for what the node announces, and leaves everything else alone.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::{ArpKey, ArpValue};
use std::net::Ipv4Addr;
use support::packet::{NODE_MAC, ROUTER_MAC};
use support::*;

const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);
const BROADCAST: [u8; 6] = [0xff; 6];
const UNKNOWN: [u8; 6] = [0; 6];
const QUESTION: u16 = 1;
const ANSWER: u16 = 2;
/// Interface of frames in a test run.
const IFINDEX: u32 = 1;

type End = ([u8; 6], Ipv4Addr);

/// An Ethernet frame with an ARP packet, padded as a driver delivers it.
fn arp(destination: [u8; 6], operation: u16, sender: End, target: End) -> Vec<u8> {
    let mut frame = [&destination[..], &sender.0, &[0x08, 0x06, 0, 1, 8, 0, 6, 4]].concat();
    frame.extend(operation.to_be_bytes());
    for (mac, address) in [sender, target] {
        frame.extend(mac);
        frame.extend(address.octets());
    }
    frame.resize(60, 0);
    frame
}

fn question(sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    arp(BROADCAST, QUESTION, (ROUTER_MAC, sender), (UNKNOWN, target))
}

fn announce(world: &mut World, address: Ipv4Addr, ifindex: u32) {
    let key = ArpKey { address: raw(address), ifindex };
    let value = ArpValue { mac: NODE_MAC, pad: 0 };
    world.plane.hash("ARP_ANSWERS").unwrap().insert(key, value, 0).unwrap();
}

#[test]
fn xdp_arp_is_answered_for_what_the_node_announces() {
    let mut world = World::new();
    announce(&mut world, EGRESS, IFINDEX);
    // An address probe (RFC 5227) too.
    for asker in [ROUTER, Ipv4Addr::UNSPECIFIED] {
        let answer = arp(ROUTER_MAC, ANSWER, (NODE_MAC, EGRESS), (ROUTER_MAC, asker));
        assert_eq!(world.back(&question(asker, EGRESS)), (XDP_TX, answer), "asked by {asker}");
        assert_eq!(world.counted(), [("arp_answered", 1)]);
    }
    // A question to the node itself, to see whether it is still there.
    let mut again = question(ROUTER, EGRESS);
    again[..6].copy_from_slice(&NODE_MAC);
    assert_eq!(world.back(&again).0, XDP_TX);
    world.counted();
    // A frame without padding is long enough.
    let (verdict, answer) = world.back(&question(ROUTER, EGRESS)[..42]);
    assert_eq!((verdict, answer.len()), (XDP_TX, 42));
}

#[test]
fn xdp_arp_of_others_passes() {
    let mut world = World::new();
    announce(&mut world, EGRESS, IFINDEX);
    announce(&mut world, EGRESS_2, IFINDEX + 1);
    let other = |bytes: &[u8], at: usize| {
        let mut frame = question(ROUTER, EGRESS);
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    for (name, frame) in [
        ("an address of the node's", question(ROUTER, NODE)),
        ("an address that it announces elsewhere", question(ROUTER, EGRESS_2)),
        ("an answer", arp(NODE_MAC, ANSWER, (ROUTER_MAC, EGRESS), (NODE_MAC, EGRESS))),
        ("an announcement of another node", question(EGRESS, EGRESS)),
        ("too short", question(ROUTER, EGRESS)[..41].to_vec()),
        ("another kind of hardware", other(&[0, 6], 14)),
        ("another protocol", other(&[0x86, 0xdd], 16)),
        ("addresses of other lengths", other(&[8], 18)),
        ("no ARP", other(&[0x88, 0xcc], 12)),
    ] {
        assert_eq!(world.back(&frame), (XDP_PASS, frame.clone()), "{name}");
        assert_eq!(world.counted(), [], "{name}");
    }
}
