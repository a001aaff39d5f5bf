//! The fast path on real devices: packets of established flows pass by the host stack, and all that the stack is needed for does not.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_common::{Counter, Timeouts};
use netns_support::Namespace;
use netns_support::path::{Aegis, EGRESS, ORIGIN, POD, Row};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(8);
/// Covered, and translated by the host to [`ORIGIN`].
const SERVICE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 99);

fn udp(namespace: &Namespace, address: Ipv4Addr) -> UdpSocket {
    let socket = namespace.enter(|| UdpSocket::bind((address, 0)).unwrap());
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket
}

/// A row of pod, node and origin, of which the node counts what its host stack forwards.
fn row() -> Row {
    let row = Row::new();
    row.node.run(
        "nft \"table ip watch { chain every { type filter hook forward priority 300; counter; }; \
        chain dropped { type filter hook forward priority 301; ct state invalid counter drop; }; }\"",
    );
    row
}

/// Packets that the host stack forwarded, and those of them that conntrack called invalid (which are dropped, as kube-proxy does).
fn forwarded(row: &Row) -> (u64, u64) {
    let listed = row.node.output("nft list table ip watch");
    let mut counters = listed
        .split("counter packets ")
        .skip(1)
        .map(|rest| rest.split(' ').next().unwrap().parse::<u64>().unwrap());
    (counters.next().unwrap(), counters.next().unwrap())
}

/// Connects, sends `length` bytes and gets them back, and closes: first the side that `pod_closes_first` says.
fn exchange(row: &Row, length: usize, pod_closes_first: bool) {
    let listener = row.origin.enter(|| TcpListener::bind((ORIGIN, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip(), IpAddr::V4(EGRESS));
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut received = vec![0; length];
        stream.read_exact(&mut received).unwrap();
        stream.write_all(&received).unwrap();
        if pod_closes_first {
            assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "the pod's FIN arrives");
        }
    });
    let mut stream = row.pod.enter(|| TcpStream::connect_timeout(&to, LONG).unwrap());
    stream.set_read_timeout(Some(LONG)).unwrap();
    let sent: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let all = sent.clone();
    let writing = std::thread::spawn(move || writer.write_all(&all).unwrap());
    let mut received = vec![0; length];
    stream.read_exact(&mut received).unwrap();
    assert!(sent == received);
    writing.join().unwrap();
    if pod_closes_first {
        drop(stream);
    } else {
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "the origin's FIN arrives");
    }
    server.join().unwrap();
}

#[test]
fn established_connections_pass_by_the_host_stack_and_close_as_others_do() {
    for pod_closes_first in [true, false] {
        let row = row();
        let aegis = Aegis::fast_on(&row, 11);
        exchange(&row, 4_000_000, pod_closes_first);
        let (fast_out, fast_in) = (aegis.counted(Counter::FastOut), aegis.counted(Counter::FastIn));
        assert!(fast_out > 50 && fast_in > 50, "{fast_out} out, {fast_in} in");
        assert_eq!(aegis.counted(Counter::Translated), aegis.counted(Counter::Translated).max(fast_out));
        let (forwarded, invalid) = forwarded(&row);
        // Handshake, the first segments, and the end.
        assert!(forwarded <= 24, "{forwarded} through the stack, {fast_out} and {fast_in} not");
        assert_eq!(invalid, 0);
        let state = row.node.output("conntrack -L -p tcp 2>/dev/null");
        assert!(
            state.contains("TIME_WAIT") || state.contains("LAST_ACK") || state.contains("CLOSE"),
            "conntrack saw the end: {state}"
        );
    }
}

#[test]
fn without_it_everything_goes_through_the_host_stack() {
    let row = row();
    let aegis = Aegis::on(&row, 11, Timeouts::default());
    exchange(&row, 400_000, true);
    assert_eq!((aegis.counted(Counter::FastOut), aegis.counted(Counter::FastIn)), (0, 0));
}

#[test]
fn datagrams_take_it_once_the_origin_has_answered() {
    let row = row();
    let aegis = Aegis::fast_on(&row, 11);
    let (pod, origin) = (udp(&row.pod, POD), udp(&row.origin, ORIGIN));
    let ask = || {
        pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
        origin.recv_from(&mut [0; 16]).unwrap().1
    };
    let answer = |to: SocketAddr| {
        origin.send_to(b"answer", to).unwrap();
        assert_eq!(pod.recv_from(&mut [0; 16]).unwrap().1, origin.local_addr().unwrap());
    };
    let fast = || (aegis.counted(Counter::FastOut), aegis.counted(Counter::FastIn));
    let seen = ask();
    assert_eq!(seen.ip(), IpAddr::V4(EGRESS));
    ask();
    answer(seen);
    assert_eq!(fast(), (0, 0), "conntrack has to see both sides");
    ask();
    answer(seen);
    assert_eq!(fast(), (1, 1));
    // A neighbour that is not known is the stack's to find.
    row.node.run("ip neigh flush dev pod0; ip neigh flush dev eth0");
    ask();
    answer(seen);
    assert_eq!(ask(), seen);
    answer(seen);
    assert_eq!(fast(), (2, 2));
    // Too large for one packet: the fragments go through the stack.
    pod.send_to(&[7; 4000], origin.local_addr().unwrap()).unwrap();
    assert_eq!(origin.recv_from(&mut [0; 5000]).unwrap(), (4000, seen));
    assert_eq!(fast(), (2, 2));
    // So does what may go one hop further only, for the stack to say so; and it does.
    pod.set_ttl(1).unwrap();
    pod.connect(origin.local_addr().unwrap()).unwrap();
    pod.send(b"x").unwrap();
    assert_eq!(fast(), (2, 2));
    pod.set_ttl(64).unwrap();
    // A narrower uplink: the stack tells the pod.
    row.node.run("ip link set eth0 mtu 1300");
    let _ = pod.send(&[7; 1400]);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(fast(), (2, 2));
    row.node.run("ip link set eth0 mtu 1500");
}

#[test]
fn what_the_host_translates_too_goes_through_the_stack_both_ways() {
    let row = row();
    row.node.run(&format!(
        "nft \"table ip service {{ chain pre {{ type nat hook prerouting priority dstnat; ip daddr {SERVICE} dnat to {ORIGIN}; }}; }}\""
    ));
    let aegis = Aegis::fast_on(&row, 11);
    let (pod, origin) = (udp(&row.pod, POD), udp(&row.origin, ORIGIN));
    let service = SocketAddr::from((SERVICE, origin.local_addr().unwrap().port()));
    for _ in 0..4 {
        pod.send_to(b"question", service).unwrap();
        let seen = origin.recv_from(&mut [0; 16]).unwrap().1;
        assert_eq!(seen.ip(), IpAddr::V4(EGRESS));
        origin.send_to(b"answer", seen).unwrap();
        assert_eq!(pod.recv_from(&mut [0; 16]).unwrap().1, service, "who the pod asked");
    }
    assert_eq!((aegis.counted(Counter::FastOut), aegis.counted(Counter::FastIn)), (0, 0));
}

#[test]
fn a_device_without_programs_is_no_way() {
    let row = row();
    let aegis = Aegis::fast_on(&row, 11);
    let (pod, origin) = (udp(&row.pod, POD), udp(&row.origin, ORIGIN));
    for _ in 0..2 {
        pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
        let seen = origin.recv_from(&mut [0; 16]).unwrap().1;
        origin.send_to(b"answer", seen).unwrap();
        pod.recv_from(&mut [0; 16]).unwrap();
    }
    // Another way to the origin, through a device that the agent has not seen.
    row.node.link("eth1", &row.origin, "eth1");
    row.node
        .run(&format!("ip addr add 192.0.3.1/24 dev eth1; ip route add {ORIGIN}/32 via 192.0.3.9 dev eth1"));
    row.origin.run("ip addr add 192.0.3.9/24 dev eth1");
    row.node.run("ping -c 1 -W 2 192.0.3.9 >/dev/null");
    let before = aegis.counted(Counter::FastOut);
    pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
    origin.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(origin.recv_from(&mut [0; 16]).is_err(), "nothing gets out untranslated");
    assert_eq!(aegis.counted(Counter::FastOut), before);
}
