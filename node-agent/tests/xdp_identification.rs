//! The identification of what can be fragmented (RFC 6864): of one egress address it is one node's and one datagram's.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use support::packet::{DF, MF, Packet};
use support::*;

/// A datagram that can be fragmented, with an identification that the pods have a liking for.
fn datagram(pod: Ipv4Addr, origin: Ipv4Addr) -> Packet {
    Packet::udp((pod, 5000), (origin, 53), b"question").with_id(1).with_fragment(0)
}

/// Its identification on the wire, where nothing else of it but its source is changed.
fn identification(world: &World, packet: &Packet) -> u16 {
    let out = world.out(&packet.frame());
    assert_eq!(out.verdict, TCX_NEXT);
    let port = u16::from_be_bytes([out.frame[34], out.frame[35]]);
    let id = u16::from_be_bytes([out.frame[18], out.frame[19]]);
    assert_eq!(out.frame, packet.clone().from(EGRESS, port).with_id(id).frame());
    id
}

#[test]
fn xdp_identification_no_two_datagrams_of_an_address_have_the_same() {
    let mut world = World::new();
    let other = Ipv4Addr::new(198, 51, 100, 200);
    for slices in [&[SLICE][..], &[SLICE, 9, 63, 64, 255]] {
        world.allow(EGRESS, slices);
        for origin in [ORIGIN, other] {
            let all: Vec<u16> = (0..256 * slices.len())
                .map(|turn| identification(&world, &datagram([POD, POD_2][turn % 2], origin)))
                .collect();
            let different: BTreeSet<u16> = all.iter().copied().collect();
            assert_eq!(different.len(), all.len(), "each once before the first comes again");
            let used: BTreeSet<u16> = all.iter().map(|id| id >> 8).collect();
            assert_eq!(used, slices.iter().copied().collect(), "of the slices that the node holds");
        }
    }
}

#[test]
fn xdp_identification_each_origin_has_its_own_order() {
    let world = World::new();
    let begins: BTreeSet<u16> = (1..=100)
        .map(|host| identification(&world, &datagram(POD, Ipv4Addr::new(198, 51, 100, host))))
        .collect();
    assert!(begins.len() > 50, "{} of 100 begin somewhere else", begins.len());
}

#[test]
fn xdp_identification_stays_where_it_means_nothing() {
    let mut world = World::new();
    for id in [0, 1, 0xffff] {
        let packet = datagram(POD, ORIGIN).with_id(id).with_fragment(DF);
        assert_eq!(identification(&world, &packet), id);
    }
    // A fragment is one also where it says that it may not become one.
    let fragment = datagram(POD, ORIGIN).with_payload(64).with_fragment(DF | MF);
    assert_ne!(identification(&world, &fragment), 1);
    // All slices drain: there is the one of the flow, which goes on.
    let port = |frame: &[u8]| u16::from_be_bytes([frame[34], frame[35]]);
    let before = world.out(&datagram(POD, ORIGIN).frame());
    world.allow(EGRESS, &[]);
    let after = world.out(&datagram(POD, ORIGIN).frame());
    assert_eq!(port(&before.frame), port(&after.frame));
    assert_eq!(u16::from(after.frame[18]), SLICE);
    // And nothing at all is known of the address any more.
    world.plane.hash::<u32, HoldingValue>("HOLDINGS").unwrap().remove(&raw(EGRESS)).unwrap();
    assert_eq!(identification(&world, &datagram(POD, ORIGIN)) >> 8, SLICE);
}

#[test]
fn xdp_identification_segments_yet_to_be_cut_get_one_each() {
    let mut world = World::new();
    let open = Packet::tcp((POD, 40000), (ORIGIN, 443), support::packet::SYN);
    assert_eq!(world.out(&open.frame()).verdict, TCX_NEXT);
    let data = Packet::tcp((POD, 40000), (ORIGIN, 443), support::packet::ACK);
    let data = data.with_payload(2000).with_fragment(0);
    let mut taken = BTreeSet::new();
    for _ in 0..100 {
        let out = classify_segments(world.program("uplink_egress"), &data.frame(), MARK, 1000);
        assert_eq!(out.verdict, TCX_NEXT, "{:?}", world.counted());
        let id = u16::from_be_bytes([out.packet[18], out.packet[19]]);
        // The device numbers the second one onwards.
        assert_eq!((id >> 8, (id + 1) >> 8), (SLICE, SLICE));
        assert!(taken.insert(id) && taken.insert(id + 1));
    }
}
