//! `uplink_ingress` between nodes: steering through the tunnel, loop guards, what does not fit, fragments.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::net::Ipv4Addr;
use support::packet::{ACK, DF, NODE_MAC, Packet, ROUTER_MAC, SYN, geneve};
use support::*;

/// A port of the other node's slice.
const PORT_2: u16 = SLICE_2 << 8 | 5;

/// Makes these maps the other node's view: it has the flow, and what was "the other node" is now this one.
fn become_other(world: &mut World) {
    world.set_config(&Config { own_peer: 2, tunnel_address: raw(NODE_2), ..config() });
}

fn reverse_entry(world: &mut World, protocol: u8, remote_port: u16, pod_port: u16) {
    let key = flow(protocol, (EGRESS, PORT_2), (ORIGIN, remote_port));
    let value = ReverseValue { digest: key.digest(), pod: raw(POD), pod_port, ..Default::default() };
    world.set_reverse(key, value);
}

/// Checks that the frame is `inner` in the tunnel from NODE to NODE_2; the outer source port is free to choose.
fn tunnelled(name: &str, frame: &[u8], vni: u32, inner: &[u8]) {
    let port = u16::from_be_bytes([frame[34], frame[35]]);
    assert!(port >= 0xc000, "{name}: outer source port {port}");
    let expected = geneve((NODE, NODE_2), (NODE_MAC, MAC_2), port, vni, inner);
    assert_eq!(frame, expected, "{name}: tunnel frame");
}

fn steered(world: &mut World, name: &str, packet: &Packet) -> Vec<u8> {
    let (verdict, frame) = world.back(&packet.frame());
    assert_eq!(verdict, XDP_TX, "{name}: verdict; {:?}", world.counted());
    tunnelled(name, &frame, VNI_STEER, &packet.bytes());
    assert_eq!(world.counted(), [("steered", 1)], "{name}: counters");
    frame
}

fn dropped(world: &mut World, name: &str, frame: &[u8], counted: &[(&'static str, u64)]) {
    assert_eq!(world.back(frame).0, XDP_DROP, "{name}: verdict");
    assert_eq!(world.counted(), counted, "{name}: counters");
}

#[test]
fn xdp_steering_to_the_owner_and_back_to_the_pod() {
    let mut world = World::new();
    reverse_entry(&mut world, 6, 443, 40000);
    reverse_entry(&mut world, 17, 53, 5000);
    reverse_entry(&mut world, 1, 0, 77);
    let sent = Packet::udp((EGRESS, PORT_2), (ORIGIN, 53), b"question").without_checksum();
    let original = sent.clone().from(POD, 5000);
    let router = Ipv4Addr::new(203, 0, 113, 1);
    for (name, packet, expected) in [
        ("TCP", Packet::tcp((ORIGIN, 443), (EGRESS, PORT_2), ACK).with_payload(1000), None),
        (
            "TCP of the largest size",
            Packet::tcp((ORIGIN, 443), (EGRESS, PORT_2), ACK).with_payload(1424),
            None,
        ),
        ("with IP options", Packet::tcp((ORIGIN, 443), (EGRESS, PORT_2), ACK).with_ip_options(), None),
        ("UDP", Packet::udp((ORIGIN, 53), (EGRESS, PORT_2), b"answer"), None),
        ("echo reply", Packet::echo_reply(ORIGIN, EGRESS, PORT_2), None),
        (
            "ICMP error",
            Packet::error(router, &sent, 3, 1, 8),
            Some(Packet::error(router, &original, 3, 1, 8)),
        ),
    ] {
        world.set_config(&config());
        let tunnel = steered(&mut world, name, &packet);
        become_other(&mut world);
        let (verdict, frame) = world.back(&tunnel);
        assert_eq!(verdict, XDP_PASS, "{name}: at the owner");
        let port = match packet.protocol() {
            6 => 40000,
            17 => 5000,
            _ => 77,
        };
        let mut wanted = expected.unwrap_or_else(|| packet.clone().to(POD, port)).frame();
        wanted[..6].copy_from_slice(&MAC_2);
        wanted[6..12].copy_from_slice(&NODE_MAC);
        assert_eq!(frame, wanted, "{name}: at the owner");
        assert_eq!(world.counted(), [("reverse", 1), ("steered_here", 1)], "{name}: at the owner");
    }
}

#[test]
fn xdp_steering_keeps_a_flow_on_one_outer_port_and_spreads_flows() {
    let mut world = World::new();
    let outer = |world: &mut World, remote| {
        let packet = Packet::tcp((ORIGIN, remote), (EGRESS, PORT_2), ACK);
        let frame = steered(world, "flow", &packet);
        u16::from_be_bytes([frame[34], frame[35]])
    };
    let ports: std::collections::BTreeSet<_> = (1..=100).map(|port| outer(&mut world, port)).collect();
    assert!(ports.len() > 90, "{} of 100 flows have an outer port of their own", ports.len());
    assert_eq!(outer(&mut world, 443), outer(&mut world, 443));
}

#[test]
fn xdp_steering_is_not_confused_by_padding_behind_the_packet() {
    let world = World::new();
    let packet = Packet::tcp((ORIGIN, 443), (EGRESS, PORT_2), ACK);
    let padded = [packet.frame(), vec![0; 6]].concat();
    let (verdict, frame) = world.back(&padded);
    assert_eq!(verdict, XDP_TX);
    let length = 14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    tunnelled("padded", &frame[..length], VNI_STEER, &packet.bytes());
}

#[test]
fn xdp_steering_loop_guards() {
    let mut world = World::new();
    let packet = Packet::tcp((ORIGIN, 443), (EGRESS, PORT_2), ACK);
    let from =
        |node, vni, inner: &Packet| geneve((node, NODE), (MAC_2, NODE_MAC), 0xc001, vni, &inner.bytes());
    let here = ("steered_here", 1);
    dropped(
        &mut world,
        "steered here, but the port is another node's",
        &from(NODE_2, VNI_STEER, &packet),
        &[here, ("drop_not_owner", 1)],
    );
    let free = packet.clone().to(EGRESS, 0xff00);
    dropped(&mut world, "nobody's port", &from(NODE_2, VNI_STEER, &free), &[here, ("drop_no_owner", 1)]);
    let mine = packet.clone().to(EGRESS, SLICE << 8);
    dropped(&mut world, "no flow", &from(NODE_2, VNI_STEER, &mine), &[here, ("drop_no_flow", 1)]);
    let other = packet.clone().to(ELSEWHERE, PORT_2);
    dropped(
        &mut world,
        "not an egress address",
        &from(NODE_2, VNI_STEER, &other),
        &[here, ("drop_not_owner", 1)],
    );
    let cut = from(NODE_2, VNI_STEER, &packet);
    let malformed = ("drop_malformed_in", 1);
    dropped(&mut world, "cut", &cut[..14 + 36 + 30], &[malformed]);
    dropped(&mut world, "cut behind the tunnel's headers", &cut[..14 + 36 + 5], &[malformed]);
    // As long as it says, but with less inside than that says.
    let mut short = cut.clone();
    short[14 + 36 + 3] += 1;
    dropped(&mut world, "too little inside", &short, &[here, malformed]);
    let stranger = from(Ipv4Addr::new(10, 0, 0, 66), VNI_STEER, &mine);
    dropped(&mut world, "from a node that is no peer", &stranger, &[("drop_not_peer", 1)]);
    let mut options = from(NODE_2, VNI_STEER, &mine);
    options[42] = 1;
    let mut other_port = from(NODE_2, VNI_STEER, &mine);
    other_port[37] ^= 1;
    let mut ethernet_inside = from(NODE_2, VNI_STEER, &mine);
    ethernet_inside[44..46].copy_from_slice(&[0x65, 0x58]);
    for (name, frame) in [
        ("another network identifier", from(NODE_2, 77, &mine)),
        ("Geneve options", options),
        ("another UDP port", other_port),
        ("Ethernet inside", ethernet_inside),
    ] {
        assert_eq!(world.back(&frame), (XDP_PASS, frame), "{name}: somebody else's");
        assert_eq!(world.counted(), [], "{name}");
    }
}

#[test]
fn xdp_steering_without_a_way() {
    let mut world = World::new();
    let packet = Packet::tcp((ORIGIN, 443), (EGRESS, PORT_2), ACK);
    let no_way = [("drop_no_neighbour", 1)];
    world.plane.array("PEERS").unwrap().set(2, PeerValue::default(), 0).unwrap();
    dropped(&mut world, "the peer is gone", &packet.frame(), &no_way);
    world.own(0, SLICE_2, MAX_PEERS + 5);
    dropped(&mut world, "no such peer", &packet.frame(), &no_way);
    world.own(0, SLICE_2, 3);
    let unknown = PeerValue { address: raw(Ipv4Addr::new(192, 0, 2, 250)), ..Default::default() };
    world.plane.array("PEERS").unwrap().set(3, unknown, 0).unwrap();
    dropped(&mut world, "no route to the peer", &packet.frame(), &no_way);
}

/// The answer "fragmentation needed" to a packet, for the MTU of [`config`].
fn too_big(packet: &Packet) -> Vec<u8> {
    let quoted = &packet.bytes()[..28];
    let mut answer = Packet::icmp(
        packet.destination,
        packet.source,
        3,
        4,
        [0, 0, (1464 >> 8) as u8, 1464u16 as u8],
        quoted,
    );
    (answer.id, answer.ttl) = (0, 64);
    support::packet::ethernet(ROUTER_MAC, NODE_MAC, &answer.bytes())
}

#[test]
fn xdp_steering_what_does_not_fit() {
    let mut world = World::new();
    let tcp = Packet::tcp((ORIGIN, 443), (EGRESS, PORT_2), ACK);
    let udp = Packet::udp((ORIGIN, 53), (EGRESS, PORT_2), b"");
    for (name, packet) in [
        ("one byte too many", tcp.clone().with_payload(1425)),
        ("full size", tcp.with_payload(1460)),
        ("UDP", udp.clone().with_payload(1472)),
        ("UDP that may be fragmented: XDP can't", udp.clone().with_payload(1472).with_fragment(0)),
        ("echo reply", Packet::echo_reply(ORIGIN, EGRESS, PORT_2).with_payload(1472)),
    ] {
        let (verdict, frame) = world.back(&packet.frame());
        assert_eq!(verdict, XDP_TX, "{name}: verdict");
        assert_eq!(frame, too_big(&packet), "{name}: answer");
        assert_eq!(world.counted(), [("too_big", 1)], "{name}");
    }
    let options = udp.clone().with_payload(1460).with_ip_options();
    dropped(&mut world, "IP options", &options.frame(), &[("drop_too_big", 1)]);
    let sent = Packet::udp((EGRESS, PORT_2), (ORIGIN, 53), b"").with_payload(1472);
    let error = Packet::error(ORIGIN, &sent, 3, 1, 1460);
    dropped(&mut world, "an error is not answered by an error", &error.frame(), &[("drop_too_big", 1)]);
    // What fits nowhere else is welcome at its owner.
    world.own(0, SLICE_2, 1);
    reverse_entry(&mut world, 17, 53, 5000);
    let packet = udp.with_payload(1472);
    assert_eq!(world.back(&packet.frame()), (XDP_PASS, packet.clone().to(POD, 5000).frame()));
}

fn datagram(id: u16) -> Packet {
    Packet::udp((ORIGIN, 53), (EGRESS, PORT_2), b"").with_payload(3000).with_id(id).with_fragment(0)
}

#[test]
fn xdp_steering_fragments_where_home_is_owner() {
    let mut world = World::new();
    become_other(&mut world);
    reverse_entry(&mut world, 17, 53, 5000);
    for (home, name) in [(0, "no home"), (2, "home here")] {
        world.home(0, home);
        let packet = datagram(100 + home as u16);
        let expected = packet.clone().to(POD, 5000).fragments(1440);
        let fragments = packet.fragments(1440);
        dropped(&mut world, name, &fragments[1], &[("fragment_kept", 1)]);
        for (fragment, expected) in fragments.iter().zip(&expected) {
            assert_eq!(world.back(fragment), (XDP_PASS, expected.clone()), "{name}");
        }
        assert_eq!(world.counted(), [("reverse", 3)], "{name}");
    }
    let stranger = Packet::udp((ORIGIN, 54), (EGRESS, PORT_2), b"").with_payload(3000).with_fragment(0);
    for (fragment, reason) in stranger.fragments(1440).iter().zip(["drop_no_flow", "drop_fragment_in"]) {
        dropped(&mut world, "no flow", fragment, &[(reason, 1)]);
    }
}

/// RFC 4787 REQ-14: what comes before the first fragment is the agent's to send after it.
#[test]
fn xdp_steering_fragments_that_come_early_are_kept() {
    let mut world = World::new();
    world.home(0, 1);
    let first_of = |key: &FragmentKey| (key.source, key.destination, key.id, key.protocol);
    let fragments = datagram(9).fragments(1440);
    dropped(&mut world, "from the wire", &fragments[2], &[("fragment_kept", 1)]);
    let outer = geneve((NODE_2, NODE), (MAC_2, NODE_MAC), 0xc001, VNI_FRAGMENT, &fragments[1][14..]);
    dropped(&mut world, "tunnel", &outer, &[("steered_here", 1), ("fragment_kept", 1)]);
    let kept = world.early();
    assert_eq!(kept.len(), 2);
    for ((header, frame), fragment) in kept.iter().zip([&fragments[2], &fragments[1]]) {
        assert_eq!(first_of(&header.key), (raw(ORIGIN), raw(EGRESS), 9, 17));
        assert_eq!((header.address, header.length as usize), (0, fragment.len()));
        assert_eq!(frame[12..], fragment[12..], "as it came, without the tunnel");
    }
    assert_eq!(kept[0].1, fragments[2]);
    // Padding is none of it.
    let padded = [&fragments[2][..], &[0; 9]].concat();
    dropped(&mut world, "padding", &padded, &[("fragment_kept", 1)]);
    assert_eq!(world.early()[0].1, fragments[2]);

    let large = Packet::udp((ORIGIN, 53), (EGRESS, PORT_2), b"").with_payload(8000).with_fragment(0);
    dropped(&mut world, "larger than a page", &large.fragments(3200)[1], &[("drop_fragment_in", 1)]);
    let kept = (0..2000).filter(|_| {
        assert_eq!(world.back(&fragments[1]).0, XDP_DROP);
        world.counted() == [("fragment_kept", 1)]
    });
    // A mebibyte, in records of 28 + 1,474 bytes and a header of 8, rounded up to eight.
    assert_eq!(kept.count(), (1 << 20) / 1512);
    assert_eq!(world.early().len(), (1 << 20) / 1512);
    dropped(&mut world, "there is room again", &fragments[1], &[("fragment_kept", 1)]);
}

#[test]
fn xdp_steering_fragments_of_a_datagram_long_gone() {
    let mut world = World::new();
    let fragments = datagram(7).fragments(1440);
    // At the home, which would send it on, and at the owner, which would translate it.
    for (name, at_owner, arrived) in [("home", false, XDP_TX), ("owner", true, XDP_PASS)] {
        if at_owner {
            become_other(&mut world);
            reverse_entry(&mut world, 17, 53, 5000);
        }
        assert_eq!(world.back(&fragments[0]).0, arrived, "{name}");
        world.age_fragments("FRAGMENTS_IN", 29);
        assert_eq!(world.back(&fragments[1]).0, arrived, "{name}: while the rest is waited for");
        world.counted();
        world.age_fragments("FRAGMENTS_IN", 3);
        dropped(&mut world, name, &fragments[2], &[("fragment_kept", 1)]);
    }
}

#[test]
fn xdp_steering_fragments_by_way_of_home() {
    let mut world = World::new();
    let packet = datagram(7);
    let fragments = packet.fragments(1440);
    let bytes: Vec<&[u8]> = fragments.iter().map(|frame| &frame[14..]).collect();

    // At the entry node, which is neither: all go to the home, ports or not, by the same outer port.
    world.home(0, 2);
    let mut outer_ports = Vec::new();
    for (fragment, inner) in fragments.iter().zip(&bytes) {
        let (verdict, frame) = world.back(fragment);
        assert_eq!(verdict, XDP_TX, "entry");
        tunnelled("entry", &frame, VNI_FRAGMENT, inner);
        outer_ports.push([frame[34], frame[35]]);
    }
    assert!(outer_ports.iter().all(|port| *port == outer_ports[0]));
    assert_eq!(world.counted(), [("steered", 3)], "entry");

    // At the home, which is not the owner: on to the owner.
    world.home(0, 1);
    let at_home = |inner: &[u8]| geneve((NODE_2, NODE), (MAC_2, NODE_MAC), 0xc001, VNI_FRAGMENT, inner);
    dropped(
        &mut world,
        "later before first",
        &at_home(bytes[1]),
        &[("steered_here", 1), ("fragment_kept", 1)],
    );
    let mut to_owner = Vec::new();
    for inner in &bytes {
        let (verdict, frame) = world.back(&at_home(inner));
        assert_eq!(verdict, XDP_TX, "home");
        tunnelled("home", &frame, VNI_STEER, inner);
        to_owner.push(frame);
    }
    assert_eq!(world.counted(), [("steered", 3), ("steered_here", 3)], "home");

    // At the owner (with maps of its own).
    let mut owner = World::new();
    become_other(&mut owner);
    reverse_entry(&mut owner, 17, 53, 5000);
    for (frame, expected) in to_owner.iter().zip(packet.clone().to(POD, 5000).fragments(1440)) {
        let (verdict, translated) = owner.back(frame);
        assert_eq!(verdict, XDP_PASS, "owner");
        assert_eq!(translated[14..], expected[14..], "owner");
    }
    assert_eq!(owner.counted(), [("reverse", 3), ("steered_here", 3)], "owner");
    // A later fragment that is steered to a node which never saw the first one waits there.
    let stranger = datagram(8).fragments(1440);
    let frame = geneve((NODE, NODE_2), (NODE_MAC, MAC_2), 0xc001, VNI_STEER, &stranger[1][14..]);
    dropped(&mut owner, "no first", &frame, &[("steered_here", 1), ("fragment_kept", 1)]);
}

#[test]
fn xdp_steering_fragments_that_do_not_fit() {
    let mut world = World::new();
    world.home(0, 2);
    let packet = Packet::udp((ORIGIN, 53), (EGRESS, PORT_2), b"").with_payload(4000).with_fragment(0);
    let fragments = packet.fragments(1480);
    let (verdict, frame) = world.back(&fragments[0]);
    assert_eq!(verdict, XDP_TX, "the first is answered");
    assert_eq!(frame[14 + 20..14 + 22], [3, 4]);
    assert_eq!(frame[14 + 28..], fragments[0][14..14 + 28], "quotes it");
    assert_eq!(world.counted(), [("too_big", 1)]);
    dropped(&mut world, "a later one is not", &fragments[1], &[("drop_too_big", 1)]);
    let (verdict, _) = world.back(&fragments[2]);
    assert_eq!(verdict, XDP_TX, "the last one fits");
}

#[test]
fn xdp_steering_a_syn_and_the_home_of_whole_packets() {
    // Only fragments go by the home: a whole packet, with or without "don't fragment", goes to its owner.
    let mut world = World::new();
    world.own(0, SLICE_2, 2);
    world.home(0, 1);
    for fragment in [0, DF] {
        let packet = Packet::tcp((ORIGIN, 443), (EGRESS, PORT_2), SYN | ACK).with_fragment(fragment);
        steered(&mut world, "whole", &packet);
    }
}
