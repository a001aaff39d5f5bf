//! A pod's node and a gateway, each a set of maps of its own.

use super::packet::{Packet, ROUTER_MAC, geneve};
use super::*;
use nix::sched::{CloneFlags, unshare};
use std::process::Command;

pub const XDP_REDIRECT: u32 = 4;
/// A third node, index 3 in `PEERS`.
pub const NODE_3: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);

/// A way out to everywhere, in a network namespace of this thread's own, which goes with it.
pub fn network() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let commands = "ip link set lo up; ip link add eth0 type veth peer name router; ip link set router up; \
        ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.0.254; \
        ip neigh add 10.0.0.254 lladdr 02:00:00:00:00:fe dev eth0; echo 1 > /proc/sys/net/ipv4/ip_forward";
    run(commands);
}

/// Runs commands in the thread's namespace.
pub fn run(commands: &str) {
    let output = Command::new("sh").args(["-ec", commands]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The node of the pods: it holds nothing.
pub fn pods_node() -> World {
    let mut world = World::new();
    let peer = PeerValue { address: raw(NODE_3), mac: [2, 0, 0, 0, 0, 3], flags: 0, ifindex: 1 };
    world.plane.array("PEERS").unwrap().set(3, peer, 0).unwrap();
    world.plane.hash("PEER_INDEX").unwrap().insert(raw(NODE_3), 3u32, 0).unwrap();
    gateways(&mut world, &[2], 1);
    world
}

pub fn gateways(world: &mut World, peers: &[u16], near: u16) {
    let mut value = AllocationValue {
        name: raw(EGRESS),
        gateway_count: peers.len() as u16,
        near_count: near,
        max_resting: ANY_NUMBER,
        account: ACCOUNT,
        ..Default::default()
    };
    value.gateways[..peers.len()].copy_from_slice(peers);
    world.plane.array("ALLOCATIONS").unwrap().set(0, value, 0).unwrap();
}

pub fn silence(world: &mut World, peer: u32, flags: u16) {
    let value: PeerValue = world.plane.array("PEERS").unwrap().get(&peer, 0).unwrap();
    world.plane.array("PEERS").unwrap().set(peer, PeerValue { flags, ..value }, 0).unwrap();
}

/// The gateway: NODE_2, which holds the slice. It knows none of the pods.
pub fn gateway() -> World {
    let mut world = World::new();
    world.set_config(&Config { own_peer: 2, tunnel_address: raw(NODE_2), ..config() });
    world.own(0, SLICE, 2);
    for pod in [POD, POD_2, FREE_POD] {
        world.remove_pod(pod);
    }
    world
        .plane
        .hash("ADDRESSES")
        .unwrap()
        .insert(raw(EGRESS), AddressValue { index: 0, allocation: 1 }, 0)
        .unwrap();
    world
}

/// A packet that a program has made, not passed on.
pub fn made(packet: Packet) -> Packet {
    Packet { ttl: 64, id: 0, ..packet }
}

/// What leaves the pod's node for a gateway: the packet behind 44 bytes of headers.
pub fn encapsulated(node: &mut World, name: &str, packet: &Packet, to: Ipv4Addr) -> Vec<u8> {
    let out = node.out(&packet.frame());
    assert_eq!(out.verdict, TCX_REDIRECT, "{name}: verdict; {:?}", node.counted());
    assert_eq!(out.mark & MARK, 0, "{name}: the node's own packet");
    let port = u16::from_be_bytes([out.frame[34], out.frame[35]]);
    assert!(port >= 0xc000, "{name}: outer source port {port}");
    let mut inner = vec![0xff, 0x91, 0x81, 0x01];
    inner.extend(EGRESS.octets());
    inner.extend(packet.bytes());
    let mut expected = geneve((NODE, to), ([0; 6], [0; 6]), port, VNI_GATEWAY, &inner);
    // Two words of options, which are critical.
    expected[42..44].copy_from_slice(&[2, 0x40]);
    assert_eq!(out.frame[14..], expected[14..], "{name}: what is sent");
    out.frame
}

/// What the gateway sends to the origin: the packet from the egress address. Gives the port.
pub fn sent_on(gateway: &mut World, name: &str, frame: &[u8], packet: &Packet) -> u16 {
    let (verdict, frame) = gateway.back(frame);
    assert_eq!(verdict, XDP_REDIRECT, "{name}: verdict; {:?}", gateway.counted());
    assert_eq!(frame[..6], ROUTER_MAC, "{name}: to the router");
    let transport = 14 + usize::from(frame[14] & 15) * 4;
    let at = if packet.protocol() == 1 { transport + 4 } else { transport };
    let port = u16::from_be_bytes([frame[at], frame[at + 1]]);
    assert_eq!(frame[14..], packet.clone().from(EGRESS, port).frame()[14..], "{name}: what is sent");
    assert_eq!(port >> 8, SLICE, "{name}: a port of the held slice");
    port
}

/// What the origin sends reaches the pod.
pub fn back(gateway: &mut World, node: &mut World, name: &str, reply: &Packet, to_pod: &Packet) {
    let (verdict, frame) = gateway.back(&reply.frame());
    assert_eq!(verdict, XDP_REDIRECT, "{name}: the gateway sends it on; {:?}", gateway.counted());
    node.counted();
    let (verdict, frame) = node.back(&frame);
    assert_eq!(verdict, XDP_PASS, "{name}: the node takes it in; {:?}", node.counted());
    assert_eq!(frame[14..], to_pod.frame()[14..], "{name}: what the pod gets");
    assert_eq!(node.counted(), [("from_gateway", 1)], "{name}");
}

/// Makes the way back to the pod's node known, as the agent would.
pub fn way_to(gateway: &mut World, peer: u32) {
    let value: PeerValue = gateway.plane.array("PEERS").unwrap().get(&peer, 0).unwrap();
    Command::new("ip")
        .args(["neigh", "replace", &Ipv4Addr::from(value.address.to_ne_bytes()).to_string()])
        .args(["lladdr", "02:00:00:00:00:01", "dev", "eth0"])
        .status()
        .unwrap();
}

/// Takes all of the gateway's ports towards the origin of a packet.
pub fn exhaust(gateway: &mut World, protocol: u8, origin: (Ipv4Addr, u16)) {
    let key = block(protocol, (EGRESS, SLICE << 8), origin);
    let full = BlockValue {
        key,
        used: 256,
        high: 256,
        full: 0xf,
        words: [u64::MAX; 32],
        cursor: 0,
        last_used: now(),
    };
    gateway.plane.hash("BLOCKS").unwrap().insert(key, full, 0).unwrap();
}
