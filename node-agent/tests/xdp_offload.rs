//! The programs attached to devices, with what `BPF_PROG_TEST_RUN` cannot make: packets whose checksum is not computed
//! yet, segments larger than the MTU, refusals that find their way back to a socket.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;
mod support;

use aegis_common::*;
use aegis_node_agent::ebpf::MapSizes;
use netns_support::{Namespace, need_root};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use support::*;

const PATIENCE: Duration = Duration::from_secs(10);

struct Lab {
    pod: Namespace,
    origin: Namespace,
    world: World,
    _node: Namespace,
}

/// Pod, node and origin. `offload`: the pod leaves checksums and segmentation to its device. The node's uplink has
/// neither, so that what leaves is complete and the origin checks it.
fn lab(offload: bool) -> Lab {
    lab_with(offload, World::new)
}

fn lab_with(offload: bool, world: impl FnOnce() -> World) -> Lab {
    need_root();
    let (pod, node, origin) = (Namespace::new("pod"), Namespace::new("node"), Namespace::new("origin"));
    node.link("pod0", &pod, "eth0");
    node.link("eth0", &origin, "eth0");
    pod.run(&format!("ip addr add {POD}/24 dev eth0; ip route add default via 10.244.1.1"));
    node.run(&format!(
        "ip addr add 10.244.1.1/24 dev pod0; ip addr add {NODE}/24 dev eth0; ip route add default via 10.0.0.9"
    ));
    origin.run(&format!(
        "ip addr add 10.0.0.9/24 dev eth0; ip addr add {ORIGIN}/32 dev lo; ip route add {EGRESS}/32 via {NODE}"
    ));
    for namespace in [&node, &origin] {
        namespace.run("ethtool -K eth0 tx off >/dev/null");
    }
    if !offload {
        pod.run("ethtool -K eth0 tx off >/dev/null");
    }
    let mut world = world();
    world
        .plane
        .array("PEERS")
        .unwrap()
        .set(1, PeerValue { address: raw(NODE), ..Default::default() }, 0)
        .unwrap();
    let index = |name: &'static str| node.enter(|| nix::net::if_::if_nametoindex(name).unwrap());
    let (pod_device, uplink) = (index("pod0"), index("eth0"));
    node.enter(|| {
        world.plane.attach_uplink("eth0", uplink).unwrap();
        world.plane.attach_pod_device("pod0", pod_device).unwrap();
    });
    Lab { pod, origin, world, _node: node }
}

/// Packets that a namespace dropped for a wrong checksum.
fn checksum_errors(namespace: &Namespace) -> u64 {
    let text = namespace.output("cat /proc/self/net/snmp");
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    lines
        .chunks(2)
        .flat_map(|pair| pair[0].iter().zip(&pair[1]))
        .filter(|(name, _)| name.ends_with("InCsumErrors"))
        .map(|(_, value)| value.parse::<u64>().unwrap())
        .sum()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 255) as u8).collect()
}

fn udp(lab: &Lab) {
    let origin = lab.origin.enter(|| UdpSocket::bind((ORIGIN, 53)).unwrap());
    let pod = lab.pod.enter(|| UdpSocket::bind((POD, 0)).unwrap());
    for socket in [&origin, &pod] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    // 4,000 bytes go in fragments, both ways.
    for length in [0, 1, 500, 1472, 4000] {
        let (sent, mut got) = (pattern(length), vec![0; 5000]);
        pod.send_to(&sent, (ORIGIN, 53)).unwrap();
        let (count, from) = origin.recv_from(&mut got).unwrap();
        assert_eq!((from.ip(), &got[..count]), (IpAddr::V4(EGRESS), &sent[..]), "{length} bytes out");
        origin.send_to(&sent, from).unwrap();
        let (count, from) = pod.recv_from(&mut got).unwrap();
        assert_eq!((from, &got[..count]), (SocketAddr::from((ORIGIN, 53)), &sent[..]), "{length} bytes back");
    }
}

fn bulk(lab: &Lab) {
    let listener = lab.origin.enter(|| TcpListener::bind((ORIGIN, 443)).unwrap());
    let data = pattern(8 << 20);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (mut stream, from) = listener.accept().unwrap();
            assert_eq!(from.ip(), IpAddr::V4(EGRESS));
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert!(got == data, "what the origin got");
            stream.write_all(&got).unwrap();
        });
        let mut stream =
            lab.pod.enter(|| TcpStream::connect_timeout(&(ORIGIN, 443).into(), PATIENCE).unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&data).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == data, "what the pod got");
        server.join().unwrap();
    });
}

fn refusals(lab: &Lab) {
    let begun = Instant::now();
    let error = lab.pod.enter(|| TcpStream::connect_timeout(&(DENIED, 443).into(), PATIENCE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    for length in [0, 100, 1400] {
        let socket = lab.pod.enter(|| UdpSocket::bind((POD, 0)).unwrap());
        socket.connect((DENIED, 53)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send(&pattern(length)).unwrap();
        let error = socket.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{length} bytes");
    }
    assert!(begun.elapsed() < PATIENCE / 2, "refusals come at once");
}

fn everything(offload: bool) {
    let mut lab = lab(offload);
    udp(&lab);
    bulk(&lab);
    lab.pod.run(&format!("ping -c 1 -W 5 {ORIGIN} >/dev/null; ping -c 1 -W 5 -s 5000 {ORIGIN} >/dev/null"));
    refusals(&lab);
    for namespace in [&lab.pod, &lab.origin] {
        assert_eq!(checksum_errors(namespace), 0, "checksum errors in {}", namespace.name);
    }
    lab.world.consistent();
    let counted = lab.world.counted();
    assert!(counted.contains(&("refusal_sent", 4)), "{counted:?}");
    assert!(!counted.iter().any(|(label, _)| label.starts_with("drop_")), "{counted:?}");
}

#[test]
fn xdp_offload_on() {
    everything(true);
}

#[test]
fn xdp_offload_off() {
    everything(false);
}

/// The inner packet of a datagram that came through the tunnel to a gateway, behind Geneve and its option.
fn tunnelled(socket: &UdpSocket) -> Vec<u8> {
    let mut got = [0; 2000];
    let (count, _) = socket.recv_from(&mut got).unwrap();
    got[16..count].to_vec()
}

/// What the socket sends may be fragmented on its way.
fn allow_fragments(socket: &UdpSocket) {
    let value = libc::IP_PMTUDISC_DONT;
    // SAFETY: the value is an int, as the option asks for.
    let result = unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value, 4)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Two fragments for one datagram, the front first, where telling the pod once more would not help: it may be sending
/// fragments already, which the node has put together again.
#[test]
fn xdp_offload_a_datagram_too_large_for_a_gateway_goes_in_two() {
    let mut lab = lab_with(false, gateway::pods_node);
    lab.origin.run(&format!("ip addr add {NODE_2}/24 dev eth0"));
    let peer = PeerValue { address: raw(NODE_2), ..Default::default() };
    lab.world.plane.array("PEERS").unwrap().set(2, peer, 0).unwrap();
    let gateway = lab.origin.enter(|| UdpSocket::bind((NODE_2, 6081)).unwrap());
    gateway.set_read_timeout(Some(PATIENCE)).unwrap();
    let pod = lab.pod.enter(|| UdpSocket::bind((POD, 5000)).unwrap());
    allow_fragments(&pod);
    let limit = 1464 - 8;
    for length in [limit - 28, limit - 27, 1472, 4000] {
        let sent = pattern(length);
        pod.send_to(&sent, (ORIGIN, 53)).unwrap();
        let mut whole: Vec<u8> = Vec::new();
        loop {
            let packet = tunnelled(&gateway);
            assert!(packet.len() <= limit, "{length}: a packet of {} bytes", packet.len());
            assert_eq!(support::packet::checksum(&packet[..20]), 0, "{length}: its header's checksum");
            assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len());
            let fragment = u16::from_be_bytes([packet[6], packet[7]]);
            assert_eq!(usize::from(fragment & 0x1fff) * 8, whole.len(), "{length}: in order");
            whole.extend(&packet[20..]);
            if fragment & 0x2000 == 0 {
                break;
            }
        }
        assert_eq!(whole[8..], sent[..], "{length}: what the gateway gets");
    }
    let counted = lab.world.counted();
    assert!(!counted.iter().any(|(label, _)| label.starts_with("drop_")), "{counted:?}");
}

/// Entries are allocated in softirq, where memory may be short for a moment: as many new flows as a pod can send in a
/// row, each with a bitmap of its own, must all find room.
#[test]
fn xdp_offload_a_burst_of_new_flows() {
    let sizes = MapSizes { flows: 1 << 17, blocks: 1 << 17, ..MapSizes::default() };
    let mut lab = lab_with(true, || World::sized(&sizes));
    let socket = lab.pod.enter(|| UdpSocket::bind((POD, 0)).unwrap());
    for port in 1..=50_000 {
        let _ = socket.send_to(b"x", (ORIGIN, port));
    }
    let counted = lab.world.counted();
    assert!(!counted.iter().any(|(label, _)| label.starts_with("refuse_")), "{counted:?}");
    // The devices' queues may have dropped some.
    let made = counted.iter().find(|(label, _)| *label == "new_flow").map_or(0, |(_, count)| *count);
    assert!(made > 10_000, "{counted:?}");
    assert_eq!(lab.world.consistent() as u64, made);
}
