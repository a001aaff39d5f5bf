//! Pods of the host network: real sockets in real control groups, on a node with the whole data plane.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_common::{Counter, Timeouts};
use aegis_node_agent::groups;
use netns_support::Namespace;
use netns_support::hosts::{COVERED, Groups, KNOWN, LONG, Lab, MOUNT, SHORT, UNKNOWN, hosts, ip, transfer};
use netns_support::path::{Aegis, EGRESS, NODE, ORIGIN, Row};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

#[test]
fn connections_leave_from_the_egress_address_and_nothing_else_of_the_pod() {
    let lab = Lab::new();
    for _ in 0..3 {
        let near = lab.connect(COVERED, LONG).unwrap();
        let (far, source) = lab.accept();
        assert_eq!(source, EGRESS);
        transfer(&near, &far);
    }
    // Closed by the pod, which then answers the origin's FIN, for one without a socket.
    let near = lab.connect(COVERED, LONG).unwrap();
    let (mut far, _) = lab.accept();
    drop(near);
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
    drop(far);
    // And one whose socket is gone while the origin still sends: answered by the kernel.
    let near = lab.connect(COVERED, LONG).unwrap();
    let (mut far, _) = lab.accept();
    far.write_all(&[1; 10]).unwrap();
    std::thread::sleep(SHORT);
    drop(near);
    std::thread::sleep(SHORT);
    assert!((0..3).any(|_| far.write_all(&[1]).is_err()), "it was reset");
    assert_eq!(lab.nodes_packets(), 0);
    let _near = lab.connect(KNOWN, LONG).unwrap();
    assert_eq!(lab.accept().1, NODE, "nothing covers it");
    let _near = lab.row.node.enter(|| TcpStream::connect((ORIGIN, 80)).unwrap());
    assert_eq!(lab.accept().1, NODE, "of no pod");
}

#[test]
fn datagrams_leave_from_the_egress_address_in_fragments_too() {
    let lab = Lab::new();
    let socket = lab.udp_in(COVERED);
    for size in [0, 1, 1000, 4000, 20000] {
        assert_eq!(lab.exchange(&socket, size), Some(EGRESS), "{size}");
    }
    socket.connect((ORIGIN, 53)).unwrap();
    assert_eq!(lab.nodes_packets(), 0);
    for size in [1000, 4000] {
        assert_eq!(lab.exchange(&lab.udp_in(KNOWN), size), Some(NODE), "{size}");
    }
    // Nobody listens there, and the origin says so to the one that asked.
    let nobody = lab.udp_in(COVERED);
    nobody.connect((ORIGIN, 54)).unwrap();
    nobody.send(b"x").unwrap();
    assert_eq!(nobody.recv(&mut [0; 4]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn pings_and_what_tells_of_closed_sockets_leave_so_too() {
    let lab = Lab::new();
    let procs = lab.groups.folder(COVERED).join("cgroup.procs");
    let ping = format!("echo $$ > {}; exec ping -c 2 -i 0.2 -W 5 {ORIGIN}", procs.display());
    lab.row.node.run(&ping);
    // An answer to a socket that was just closed: the kernel says so to the origin, which must know the datagram.
    let socket = lab.udp_in(COVERED);
    let lonely = lab.row.origin.enter(|| UdpSocket::bind((ORIGIN, 55)).unwrap());
    lonely.set_read_timeout(Some(LONG)).unwrap();
    socket.send_to(b"x", (ORIGIN, 55)).unwrap();
    let (_, from) = lonely.recv_from(&mut [0; 4]).unwrap();
    assert_eq!(ip(from), EGRESS);
    drop(socket);
    lonely.connect(from).unwrap();
    lonely.send(b"y").unwrap();
    assert_eq!(lonely.recv(&mut [0; 4]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(lab.nodes_packets(), 0);
}

#[test]
fn what_began_before_the_binding_keeps_the_nodes_address_and_what_began_under_it_its_own() {
    let (row, groups) = (Row::new(), Groups::new());
    let mut before = hosts(&groups, 19);
    before.bindings[0].enabled = false;
    let aegis = Aegis::with(&row, &before);
    let mut lab = Lab::of(row, groups, aegis);
    let near = lab.connect(COVERED, LONG).unwrap();
    let (far, source) = lab.accept();
    let socket = lab.udp_in(COVERED);
    assert_eq!((source, lab.exchange(&socket, 10)), (NODE, Some(NODE)));

    lab.aegis.follow(&lab.policy());
    let (mut near_before, mut far_before) = (near, far);
    transfer(&near_before, &far_before);
    assert_eq!(lab.exchange(&socket, 10), Some(NODE));
    let near = lab.connect(COVERED, LONG).unwrap();
    let (far, source) = lab.accept();
    let later = lab.udp_in(COVERED);
    assert_eq!((source, lab.exchange(&later, 10)), (EGRESS, Some(EGRESS)));

    // It is gone again.
    lab.aegis.follow(&before);
    std::thread::sleep(Duration::from_secs(3));
    transfer(&near, &far);
    assert_eq!(lab.exchange(&later, 10), Some(EGRESS));
    assert_eq!(lab.exchange(&socket, 10), Some(NODE));
    near_before.write_all(b"x").unwrap();
    far_before.read_exact(&mut [0]).unwrap();
    let _near = lab.connect(COVERED, LONG).unwrap();
    assert_eq!(lab.accept().1, NODE);
}

#[test]
fn answers_to_those_outside_who_asked_pass_untouched() {
    let lab = Lab::new();
    let to = SocketAddr::from((NODE, 8080));
    let (listener, socket) = lab.groups.inside(COVERED, || {
        lab.row.node.enter(|| (TcpListener::bind(to).unwrap(), UdpSocket::bind(to).unwrap()))
    });
    let asks = |namespace: &Namespace| namespace.enter(|| UdpSocket::bind((ORIGIN, 0)).unwrap());
    let near = lab.row.origin.enter(|| TcpStream::connect_timeout(&to, LONG).unwrap());
    let (far, _) = lab.groups.inside(KNOWN, || listener.accept().unwrap());
    transfer(&near, &far);
    let outside = asks(&lab.row.origin);
    outside.set_read_timeout(Some(LONG)).unwrap();
    outside.send_to(b"?", to).unwrap();
    let (_, from) = socket.recv_from(&mut [0; 4]).unwrap();
    socket.send_to(b"!", from).unwrap();
    assert_eq!(outside.recv_from(&mut [0; 4]).unwrap().1, to);
    lab.row.origin.run(&format!("ping -c 1 -W 5 {NODE}"));
    assert_eq!(lab.aegis.count(Counter::NewFlow), 0);
}

#[test]
fn what_cannot_leave_right_is_refused_at_once() {
    // A pod more than there are ports.
    let lab = Lab::with(4);
    let open: Vec<_> = (0..256).map(|_| (lab.connect(COVERED, LONG).unwrap(), lab.accept())).collect();
    let before = Instant::now();
    assert_eq!(lab.connect(COVERED, LONG).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(before.elapsed() < Duration::from_millis(500));
    drop(open);
    // A datagram larger than a packet must not leave in part.
    let sockets: Vec<UdpSocket> = (0..257).map(|_| lab.udp_in(COVERED)).collect();
    let left = sockets.iter().filter(|socket| {
        socket.send_to(&[1; 4000], (ORIGIN, 53)).unwrap();
        lab.udp.set_read_timeout(Some(SHORT)).unwrap();
        lab.udp.recv_from(&mut [0; 5000]).is_ok()
    });
    assert_eq!(left.count(), 256);
    // Nor what has no ports.
    let raw = lab.groups.inside(COVERED, || {
        lab.row.node.enter(|| {
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::RAW, Some(47.into())).unwrap()
        })
    });
    raw.send_to(&[0; 100], &SocketAddr::from((ORIGIN, 0)).into()).unwrap();
    assert_eq!(lab.aegis.count(Counter::RefuseProtocol), 1);
    assert_eq!(lab.nodes_packets(), 0);
}

#[test]
fn without_ports_here_nothing_leaves() {
    let (row, groups) = (Row::new(), Groups::new());
    let mut none = hosts(&groups, 19);
    none.addresses.clear();
    let aegis = Aegis::with(&row, &none);
    let lab = Lab::of(row, groups, aegis);
    assert_eq!(lab.connect(COVERED, LONG).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(lab.exchange(&lab.udp_in(COVERED), 10), None);
    assert_eq!(lab.nodes_packets(), 0);
    let _near = lab.connect(KNOWN, LONG).unwrap();
    assert_eq!(lab.accept().1, NODE);
}

#[test]
fn a_pod_that_nobody_has_named_is_held_from_what_is_covered() {
    let mut lab = Lab::new();
    let elsewhere = Ipv4Addr::new(192, 0, 2, 9);
    let before = lab.aegis.count(Counter::DropUnknownPod);
    assert_eq!(lab.connect(UNKNOWN, SHORT).unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(lab.aegis.count(Counter::DropUnknownPod) > before);
    let other = lab.row.origin.enter(|| TcpListener::bind((elsewhere, 80)).unwrap());
    let to = SocketAddr::from((elsewhere, 80));
    lab.groups.inside(UNKNOWN, || lab.row.node.enter(|| TcpStream::connect_timeout(&to, LONG).unwrap()));
    assert_eq!(ip(other.accept().unwrap().1), NODE, "where nothing is covered");
    let before_it = lab.nodes_packets();

    // Its name comes: it waits for no more than that.
    let mut named = lab.policy();
    let mut pod = named.pods[0].clone();
    (pod.uid, pod.name) = (lab.groups.uid(UNKNOWN), lab.groups.uid(UNKNOWN));
    named.pods.push(pod);
    named.groups = groups::read(Path::new(MOUNT)).unwrap().pods;
    lab.aegis.follow(&named);
    let _near = lab.connect(UNKNOWN, LONG).unwrap();
    assert_eq!(lab.accept().1, EGRESS);
    assert_eq!(lab.nodes_packets(), before_it);
}

#[test]
fn without_the_table_what_is_covered_leaves_right_all_the_same() {
    let lab = Lab::new();
    let near = lab.connect(COVERED, LONG).unwrap();
    let (far, source) = lab.accept();
    let socket = lab.udp_in(COVERED);
    assert_eq!((source, lab.exchange(&socket, 10)), (EGRESS, Some(EGRESS)));
    lab.row.node.run("nft delete table ip aegis");
    transfer(&near, &far);
    assert_eq!(lab.exchange(&socket, 10), Some(EGRESS));
    assert_eq!(lab.exchange(&lab.udp_in(COVERED), 10), Some(EGRESS));
    assert_eq!(lab.nodes_packets(), 0);
}

#[test]
fn a_connection_whose_flow_is_lost_does_not_go_on_with_the_nodes_address() {
    let mut lab = Lab::new();
    let mut near = lab.connect(COVERED, LONG).unwrap();
    let (far, _) = lab.accept();
    let socket = lab.udp_in(COVERED);
    assert_eq!(lab.exchange(&socket, 10), Some(EGRESS));
    // Nobody has sent anything for longer than it may be.
    let mut short = lab.policy();
    let name = short.bindings[0].allocation.clone();
    let timeouts = Timeouts { tcp_established: 1, tcp_transitory: 1, udp: 1, rest: 0, ..Timeouts::default() };
    short.allocations.get_mut(&name).unwrap().timeouts = timeouts;
    lab.aegis.follow(&short);
    let before = lab.aegis.count(Counter::Expired);
    let end = Instant::now() + Duration::from_secs(20);
    while lab.aegis.count(Counter::Expired) < before + 2 {
        assert!(Instant::now() < end, "both flows are over");
        std::thread::sleep(Duration::from_millis(100));
    }
    near.write_all(b"x").unwrap();
    std::thread::sleep(SHORT);
    assert!(near.write_all(b"x").is_err(), "it was reset");
    drop(far);
    assert_eq!(lab.exchange(&socket, 10), Some(EGRESS), "a new one");
    assert_eq!(lab.nodes_packets(), 0);
}
