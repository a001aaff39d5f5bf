//! `uplink_ingress` and neighbour solicitations (RFC 4861): it answers for addresses of /64s that the node announces, and leaves
//! everything else alone.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::{NdpKey, NdpValue, network_of};
use std::net::Ipv6Addr;
use support::packet::{NODE_MAC, ROUTER_MAC};
use support::six::*;
use support::*;

const ROUTER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xeeee, 0, 0, 0, 0, 1);
const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
/// Interface of frames in a test run.
const IFINDEX: u32 = 1;

fn world() -> World {
    let mut world = World::new();
    six(&mut world);
    announce(&mut world, NETWORK, IFINDEX);
    world
}

fn announce(world: &mut World, network: Ipv6Addr, ifindex: u32) {
    let key = NdpKey { network: network_of(&raw6(network)), ifindex };
    let value = NdpValue { mac: NODE_MAC, multicast: 0 };
    world.plane.hash("NDP_ANSWERS").unwrap().insert(key, value, 0).unwrap();
}

/// The group in which whoever has an address is (RFC 4291 section 2.7.1), and its MAC (RFC 2464 section 7).
fn group(target: Ipv6Addr) -> (Ipv6Addr, [u8; 6]) {
    let [.., a, b, c] = target.octets();
    let address = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
    (address, [0x33, 0x33, 0xff, a, b, c])
}

/// A message between neighbours: Ethernet destination and source, IPv6 packet with a right checksum.
fn message(macs: [[u8; 6]; 2], packet: &Packet6) -> Vec<u8> {
    let mut frame = packet.frame();
    frame[..6].copy_from_slice(&macs[0]);
    frame[6..12].copy_from_slice(&macs[1]);
    // Traffic class, flow label and hop limit are no part of any checksum.
    frame[14..18].copy_from_slice(&[0x60, 0, 0, 0]);
    frame[21] = 255;
    frame
}

fn packet(source: Ipv6Addr, to: Ipv6Addr, kind: u8, flags: u8, target: Ipv6Addr, options: &[u8]) -> Packet6 {
    Packet6::icmp(source, to, kind, [flags, 0, 0, 0], &[&target.octets()[..], options].concat())
}

/// The asker's own address on the link.
fn own(mac: [u8; 6]) -> Vec<u8> {
    [&[1, 1][..], &mac].concat()
}

fn question(source: Ipv6Addr, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let (to, mac) = group(target);
    message([mac, ROUTER_MAC], &packet(source, to, SOLICITATION, 0, target, options))
}

fn answer(mac: [u8; 6], to: Ipv6Addr, flags: u8, target: Ipv6Addr) -> Vec<u8> {
    let option = [&[2, 1][..], &NODE_MAC].concat();
    message([mac, NODE_MAC], &packet(target, to, ADVERTISEMENT, flags, target, &option))
}

fn answered(world: &mut World, name: &str, frame: &[u8], expected: &[u8]) {
    let (verdict, back) = world.back(frame);
    assert_eq!((verdict, &back[..]), (XDP_TX, expected), "{name}");
    assert!(is_sound(&back[14..]), "{name}: checksum");
    assert_eq!(world.counted(), [("ndp_answered", 1)], "{name}");
}

#[test]
fn xdp_ndp_is_answered_for_every_address_whose_slice_somebody_holds() {
    let mut world = world();
    let theirs = outside(INSIDE6, NETWORK, SLICE_2, 9);
    let unused = outside(POD6, NETWORK, SLICE, 0x1234_5678);
    for (name, target) in [("a pod's", pod_outside()), ("another node's", theirs), ("nobody's", unused)] {
        let expected = answer(ROUTER_MAC, ROUTER6, SOLICITED | OVERRIDE, target);
        answered(&mut world, name, &question(ROUTER6, target, &own(ROUTER_MAC)), &expected);
    }
    let target = pod_outside();
    let expected = answer(ROUTER_MAC, LINK_LOCAL, SOLICITED | OVERRIDE, target);
    answered(
        &mut world,
        "from a link-local address",
        &question(LINK_LOCAL, target, &own(ROUTER_MAC)),
        &expected,
    );
    // Frames become longer and shorter.
    let expected = answer(ROUTER_MAC, ROUTER6, SOLICITED | OVERRIDE, target);
    answered(&mut world, "without options", &question(ROUTER6, target, &[]), &expected);
    let nonce = [&own(ROUTER_MAC)[..], &[14, 1, 1, 2, 3, 4, 5, 6]].concat();
    answered(&mut world, "with two options", &question(ROUTER6, target, &nonce), &expected);
    let mut padded = question(ROUTER6, target, &own(ROUTER_MAC));
    padded.extend([7; 30]);
    answered(&mut world, "with something behind the packet", &padded, &expected);
    // A neighbour that knows the answer asks whether it still holds (section 7.3.3), with its own address on the link or without.
    for options in [own(ROUTER_MAC), vec![]] {
        let again = packet(ROUTER6, target, SOLICITATION, 0, target, &options);
        answered(&mut world, "asked directly", &message([NODE_MAC, ROUTER_MAC], &again), &expected);
    }
    // Who has no address of its own yet is told with all others.
    let expected = answer([0x33, 0x33, 0, 0, 0, 1], ALL_NODES, OVERRIDE, target);
    answered(&mut world, "a probe", &question(Ipv6Addr::UNSPECIFIED, target, &[]), &expected);
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    answered(&mut world, "a probe (RFC 7527)", &question(Ipv6Addr::UNSPECIFIED, target, &nonce), &expected);
    // By this address nodes ask each other who answers.
    let seat: Ipv6Addr = "2001:db8:1:2::a:e915".parse().unwrap();
    let expected = answer([0x33, 0x33, 0, 0, 0, 1], ALL_NODES, OVERRIDE, seat);
    answered(&mut world, "the seat", &question(Ipv6Addr::UNSPECIFIED, seat, &nonce), &expected);
}

#[test]
fn xdp_ndp_of_others_and_what_is_not_sound_passes() {
    let mut world = world();
    announce(&mut world, NETWORK_2, IFINDEX + 1);
    let target = pod_outside();
    let plain = question(ROUTER6, target, &own(ROUTER_MAC));
    let with = |change: &dyn Fn(&mut Packet6)| {
        let (to, mac) = group(target);
        let mut packet = packet(ROUTER6, to, SOLICITATION, 0, target, &own(ROUTER_MAC));
        change(&mut packet);
        message([mac, ROUTER_MAC], &packet)
    };
    let far = Ipv6Addr::new(0x2001, 0xdb8, 0xeeee, 0, 0, 0, 0, 6);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("an address of the node's", question(ROUTER6, far, &own(ROUTER_MAC))),
        (
            "a /64 that it announces elsewhere",
            question(ROUTER6, outside(POD6, NETWORK_2, SLICE, 5), &own(ROUTER_MAC)),
        ),
        ("a slice that nobody holds", question(ROUTER6, outside(POD6, NETWORK, 77, 5), &own(ROUTER_MAC))),
        ("no slice", question(ROUTER6, "2001:db8:1:2::1".parse().unwrap(), &own(ROUTER_MAC))),
        ("beyond all slices", question(ROUTER6, "2001:db8:1:2:100::1".parse().unwrap(), &own(ROUTER_MAC))),
        ("an announcement of another node", {
            message(
                [[0x33, 0x33, 0, 0, 0, 1], ROUTER_MAC],
                &packet(target, ALL_NODES, ADVERTISEMENT, OVERRIDE, target, &[2, 1, 2, 0, 0, 0, 0, 9]),
            )
        }),
        ("who asks for its own address", question(target, target, &own(ROUTER_MAC))),
        ("asked by a group", question(ALL_NODES, target, &own(ROUTER_MAC))),
        ("another group", with(&|it| it.destination = group(far).0)),
        ("nobody with an address on the link", question(Ipv6Addr::UNSPECIFIED, target, &own(ROUTER_MAC))),
        ("a wrong checksum", with(&|it| it.wrong_checksum = true)),
        ("a code", with(&|it| it.body[1] = 1)),
        ("an option without length", with(&|it| it.body[25] = 0)),
        ("half an option", with(&|it| it.body.truncate(28))),
        ("too many options", with(&|it| it.body.extend([14, 1, 0, 0, 0, 0, 0, 0].repeat(3)))),
        ("too short", plain[..77].to_vec()),
        ("shorter than it says", plain[..80].to_vec()),
    ];
    for (name, frame) in cases {
        assert_eq!(world.back(&frame), (XDP_PASS, frame.clone()), "{name}");
        assert_eq!(world.counted(), [], "{name}");
    }
}

#[test]
fn xdp_ndp_from_beyond_the_link_is_a_packet_like_any_other() {
    let mut world = world();
    let target = pod_outside();
    // What a router has passed on is for the pod, or for nobody: conntrack says so.
    let mut frame =
        message([NODE_MAC, ROUTER_MAC], &packet(ROUTER6, target, SOLICITATION, 0, target, &own(ROUTER_MAC)));
    frame[21] = 254;
    assert_eq!(world.back(&frame).0, XDP_PASS);
    assert_eq!(world.counted(), [("reverse", 1)]);
    // Asked directly by one that says not who it is.
    let nobody = packet(Ipv6Addr::UNSPECIFIED, target, SOLICITATION, 0, target, &[]);
    assert_eq!(world.back(&message([NODE_MAC, ROUTER_MAC], &nobody)).0, XDP_DROP);
    assert_eq!(world.counted(), [("drop_no_flow", 1)]);
    // Without an announcement nothing is answered, and no neighbour's word goes to a pod or another node.
    let key = NdpKey { network: network_of(&raw6(NETWORK)), ifindex: IFINDEX };
    world.plane.hash::<NdpKey, NdpValue>("NDP_ANSWERS").unwrap().remove(&key).unwrap();
    for target in [target, outside(INSIDE6, NETWORK, SLICE_2, 9)] {
        let asked = packet(ROUTER6, target, SOLICITATION, 0, target, &own(ROUTER_MAC));
        let frame = question(ROUTER6, target, &own(ROUTER_MAC));
        assert_eq!(world.back(&frame), (XDP_PASS, frame.clone()));
        assert_eq!(world.counted(), []);
        assert_eq!(world.back(&message([NODE_MAC, ROUTER_MAC], &asked)).0, XDP_DROP);
        assert_eq!(world.counted(), [("drop_no_flow", 1)]);
    }
}
