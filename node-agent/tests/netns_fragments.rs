//! Fragments that arrive before the first of their datagram, on real devices: the agent's thread sends them after it.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;
#[path = "support/packet.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod packet;

use aegis_common::{Counter, HOMES_PER_ADDRESS, Timeouts, VNI_STEER, mix};
use aegis_node_agent::apply::Plane;
use aegis_node_agent::desired::{Inputs, PeerLink, desired};
use aegis_node_agent::fragments::{Fragments, PATIENCE};
use aegis_node_agent::objects::NodeRecord;
use aegis_node_agent::observed::{Observed, to_map};
use aegis_node_agent::ops::Known;
use netns_support::path::{self, EGRESS, MARK, NODE, ORIGIN, POD, attach, holding};
use netns_support::plane::{Bpffs, bring};
use netns_support::{Namespace, need_root};
use nix::sys::socket::sockopt::Mark;
use packet::Packet;
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// First port of the slices that the other node holds.
const OTHERS_PORT: u16 = 12 << 8;

/// The node `n0` holds a part of the egress address and `n1` another. (The pod is the node itself here, which has its address; what
/// matters is that the host stack puts the fragments together.)
fn inputs(router_mac: [u8; 6], uplink: u32) -> Inputs {
    let mut inputs = path::inputs(vec![holding(4, 11, "n0"), holding(12, 19, "n1")], Timeouts::default());
    inputs.nodes.insert("n1".to_owned(), NodeRecord { addresses: vec![OTHER], ..NodeRecord::default() });
    inputs.links.insert(OTHER, PeerLink { mac: router_mac, ifindex: uplink });
    inputs
}

/// An identification with which the fragments of a datagram from the origin meet at this node.
fn meets_here(observed: &Observed, from: u16) -> u16 {
    let index = observed.addresses[&EGRESS].index;
    (from..)
        .find(|id| {
            let hash = mix(to_map(ORIGIN) ^ u32::from(id.to_be()) << 8 ^ 17);
            observed.homes[&index][(hash & (HOMES_PER_ADDRESS - 1)) as usize] == observed.config.own_peer
        })
        .unwrap()
}

/// Sends IP packets as they are.
fn send(packets: &[&[u8]]) {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).unwrap();
    for packet in packets {
        socket.send_to(packet, &SocketAddr::from((EGRESS, 0)).into()).unwrap();
    }
}

/// The IP packets of a datagram in fragments.
fn fragments(packet: &Packet) -> Vec<Vec<u8>> {
    packet.fragments(1400).into_iter().map(|frame| frame[14..].to_vec()).collect()
}

/// The node: its data plane, what waits for fragments, and the socket of the pod.
struct Node {
    plane: Box<dyn Plane>,
    fragments: Fragments,
    observed: Observed,
    socket: UdpSocket,
}

fn start(bpffs: &Bpffs, router_mac: [u8; 6]) -> Node {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut plane = bpffs.open();
    let uplink = nix::net::if_::if_nametoindex("eth0").unwrap();
    let wanted = desired(&inputs(router_mac, uplink));
    let (observed, ..) = bring(plane.as_mut(), &wanted, &Known::default());
    attach(plane.as_mut(), &runtime);
    let fragments = plane.fragments().unwrap();
    let socket = UdpSocket::bind((POD, 4000)).unwrap();
    nix::sys::socket::setsockopt(&socket, Mark, &MARK).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    Node { plane, fragments, observed, socket }
}

/// Packets by what happened to them.
fn counted(node: &Node) -> Vec<(&'static str, u64)> {
    let counters = node.plane.counters().unwrap();
    let counters = Counter::ALL.iter().zip(counters).filter(|(_, value)| value.packets != 0);
    counters.map(|(counter, value)| (counter.label(), value.packets)).collect()
}

/// Waits until so many fragments were delivered and lost.
fn tally(node: &Node, expected: (u64, u64)) {
    let end = Instant::now() + PATIENCE + Duration::from_secs(10);
    while node.fragments.tally() != expected && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(node.fragments.tally(), expected);
}

#[test]
fn fragments_that_come_before_the_first_arrive() {
    need_root();
    let bpffs = Bpffs::new("fragments");
    let (node, router) = (Namespace::new("node"), Namespace::new("router"));
    node.link("eth0", &router, "eth0");
    node.run("ip addr add 192.0.2.1/24 dev eth0; ip route add default via 192.0.2.254; ip addr add 10.244.1.2/32 dev lo");
    router.run("ip addr add 192.0.2.254/24 dev eth0; ip addr add 192.0.2.2/24 dev eth0; ip addr add 198.51.100.7/32 dev lo; ip route add 203.0.113.0/24 via 192.0.2.1");
    let mac = router.output("cat /sys/class/net/eth0/address");
    let bytes: Vec<u8> = mac.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let at_node = node.enter(|| start(&bpffs, bytes.try_into().unwrap()));
    let (origin, peer) = router.enter(|| {
        let (origin, peer) =
            (UdpSocket::bind((ORIGIN, 53)).unwrap(), UdpSocket::bind((OTHER, 6081)).unwrap());
        for socket in [&origin, &peer] {
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        (origin, peer)
    });

    // The pod asks, and the answer comes in each order.
    at_node.socket.send_to(b"question", (ORIGIN, 53)).unwrap();
    let mut buffer = [0; 9000];
    let (_, from) =
        origin.recv_from(&mut buffer).unwrap_or_else(|error| panic!("{error}; {:?}", counted(&at_node)));
    assert_eq!(from.ip(), EGRESS);
    let mut id = 0;
    let orders = [[0, 1, 2], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0], [0, 2, 1]];
    // How many of the three are early.
    let early = [0, 1, 2, 1, 2, 0];
    let mut delivered = 0;
    for (order, early) in orders.iter().zip(early) {
        id = meets_here(&at_node.observed, id + 1);
        let payload: Vec<u8> = (0..4000).map(|at| (at as u16 ^ id) as u8).collect();
        let answer = Packet::udp((ORIGIN, 53), (EGRESS, from.port()), &payload).with_id(id).with_fragment(0);
        let parts = fragments(&answer);
        let sent: Vec<&[u8]> = order.iter().map(|at| parts[*at].as_slice()).collect();
        router.enter(|| send(&sent));
        let (length, sender) = at_node.socket.recv_from(&mut buffer).unwrap();
        assert_eq!(sender, SocketAddr::from((ORIGIN, 53)));
        assert!(buffer[..length] == payload, "{order:?}: {length} bytes");
        delivered += early;
        tally(&at_node, (delivered, 0));
    }

    // For another node's port: they follow the first one to that.
    id = meets_here(&at_node.observed, id + 1);
    let foreign = Packet::udp((ORIGIN, 53), (EGRESS, OTHERS_PORT), &[7; 3000]).with_id(id).with_fragment(0);
    let parts = fragments(&foreign);
    router.enter(|| send(&[&parts[1], &parts[0]]));
    tally(&at_node, (delivered + 1, 0));
    // The first comes from the program, if this device can send back, and the other from the agent; both are to be there, in
    // the tunnel.
    let expected = [&[0, 0, 8, 0][..], &(VNI_STEER << 8).to_be_bytes(), &parts[1]].concat();
    loop {
        let (length, sender) = peer.recv_from(&mut buffer).unwrap();
        assert_eq!(sender.ip(), NODE);
        if buffer[..length] == expected {
            break;
        }
    }

    // Without a first one they are given up.
    id = meets_here(&at_node.observed, id + 1);
    let parts = fragments(&foreign.with_id(id));
    router.enter(|| send(&[&parts[1], &parts[2]]));
    tally(&at_node, (delivered + 1, 2));
    at_node.socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    assert!(at_node.socket.recv_from(&mut buffer).is_err(), "nothing else came");
}
