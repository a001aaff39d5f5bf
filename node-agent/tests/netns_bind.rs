//! Sockets that have the egress address themselves: real ones in real control groups, on a node with the whole data plane.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_common::{Counter, LeaseValue, MeterKey, MeterUse, MeterValue, RefusalKey, mapped, metered_egress};
use aegis_core::model::Fence;
use aegis_core::slice::SliceSet;
use aegis_node_agent::desired::Inputs;
use aegis_node_agent::local;
use aegis_node_agent::meter::Maps;
use aegis_node_agent::observed::to_map;
use aegis_node_agent::ops::Op;
use aegis_node_agent::sockets;
use aegis_node_agent::uses::Uses;
use netns_support::hosts::{COVERED, Groups, KNOWN, LONG, Lab, MOUNT, SHORT, hosts, transfer};
use netns_support::path::{Aegis, EGRESS, NODE, ORIGIN, Row};
use socket2::{Domain, Protocol, Socket, Type};
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

/// Ports of the slice that is for sockets; the one before it is for translation.
const BOUND: Range<u16> = 0x500..0x600;

fn slices(first: u8, last: u8) -> Uses {
    let open = SliceSet::range(first, last);
    Uses { open, kept: open, leaving: SliceSet::EMPTY }
}

/// What the node is to do: sockets of a pod of the host network have addresses.
fn binds(groups: &Groups, last: u8) -> Inputs {
    let mut inputs = hosts(groups, last);
    inputs.bindings[0].binds = true;
    inputs.uses = [(EGRESS, slices(5, last))].into();
    inputs
}

fn lab(last: u8) -> Lab {
    lab_with(last, Aegis::with)
}

fn lab_with(last: u8, aegis: impl FnOnce(&Row, &Inputs) -> Aegis) -> Lab {
    let (row, groups) = (Row::new(), Groups::new());
    let mut aegis = aegis(&row, &binds(&groups, last));
    aegis.plane.attach_sockets(Path::new(MOUNT)).unwrap();
    make_local(&row, true);
    Lab::of(row, groups, aegis)
}

fn make_local(row: &Row, wanted: bool) {
    row.node.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            let present = aegis_node_agent::network::read(&handle).await.unwrap().local;
            let wanted: BTreeSet<Ipv4Addr> = wanted.then_some(EGRESS).into_iter().collect();
            local::bring(&handle, &wanted, &present).await.unwrap();
            assert_eq!(aegis_node_agent::network::read(&handle).await.unwrap().local, wanted);
        });
    });
}

fn source(stream: &TcpStream) -> SocketAddrV4 {
    match stream.local_addr().unwrap() {
        SocketAddr::V4(address) => address,
        SocketAddr::V6(_) => unreachable!("IPv4 only"),
    }
}

fn listed(lab: &Lab) -> usize {
    lab.row.node.enter(|| sockets::list(&[EGRESS].into()).unwrap().len())
}

#[test]
fn a_slice_is_filled_to_the_last_port_towards_each_origin_and_then_connect_fails_at_once() {
    let lab = lab(5);
    let other = lab.row.origin.enter(|| TcpListener::bind((ORIGIN, 81)).unwrap());
    let mut open = Vec::new();
    for port in [80, 81] {
        let mut ports = BTreeSet::new();
        for _ in 0..256 {
            let near = lab.connect_to(COVERED, (ORIGIN, port), LONG).unwrap();
            let far = if port == 80 { lab.accept().0 } else { other.accept().unwrap().0 };
            let (own, seen) = (source(&near), far.peer_addr().unwrap());
            assert_eq!((*own.ip(), SocketAddr::V4(own)), (EGRESS, seen), "it knows what the origin sees");
            assert!(BOUND.contains(&own.port()) && ports.insert(own.port()));
            open.push((near, far));
        }
        let began = Instant::now();
        let refused = lab.connect_to(COVERED, (ORIGIN, port), LONG).unwrap_err();
        println!("refused after {:?}", began.elapsed());
        assert_eq!(refused.kind(), ErrorKind::AddrNotAvailable);
        assert!(began.elapsed().as_millis() < 50);
    }
    assert_eq!(listed(&lab), 512);
    assert_eq!((lab.aegis.count(Counter::Bound), lab.aegis.count(Counter::RefuseNoSocketPort)), (512, 2));
    transfer(&open[300].0, &open[300].1);
    // A port is free as soon as nobody has it.
    let (near, far) = open.pop().unwrap();
    drop(far);
    std::thread::sleep(SHORT);
    drop(near);
    std::thread::sleep(SHORT);
    lab.connect_to(COVERED, (ORIGIN, 81), LONG).unwrap();
    assert_eq!((lab.aegis.count(Counter::NewFlow), lab.nodes_packets()), (0, 0));
}

#[test]
fn connections_that_begin_at_the_same_moment_never_choose_the_same_port() {
    const THREADS: usize = 8;
    let lab = lab(5);
    for port in 90..98 {
        // Nobody accepts: the backlog has room for all.
        let listener = lab.row.origin.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
            socket.bind(&SocketAddr::from((ORIGIN, port)).into()).unwrap();
            socket.listen(512).unwrap();
            socket
        });
        let begin = std::sync::Barrier::new(THREADS);
        let connects = || {
            lab.row.node.enter(|| {
                begin.wait();
                let connect = |_| TcpStream::connect_timeout(&(ORIGIN, port).into(), LONG);
                (0..BOUND.len() / THREADS).map(connect).collect::<Vec<_>>()
            })
        };
        let all: Vec<_> = lab.groups.inside(COVERED, || {
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(connects)).collect();
                threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
            })
        });
        let streams: Vec<_> = all.into_iter().collect::<Result<_, _>>().unwrap();
        let ports: BTreeSet<u16> = streams.iter().map(|stream| source(stream).port()).collect();
        assert!(ports.into_iter().eq(BOUND), "the whole slice");
        drop(listener);
    }
    assert_eq!(lab.aegis.count(Counter::RefuseNoSocketPort), 0);
}

/// What is metered of connections to a port of the origin.
fn metered(maps: &mut Maps, port: u16) -> (MeterUse, MeterValue) {
    let look = maps.look(std::iter::empty()).unwrap();
    let ours = |key: &&MeterKey| {
        (key.egress, key.remote) == (metered_egress(to_map(EGRESS)), mapped(to_map(ORIGIN)))
            && (key.remote_port, key.protocol) == (port, 6)
    };
    look.linked.keys().find(ours).map(|key| look.meters[&look.linked[key]]).unwrap_or_default()
}

/// Looks at the sockets until two looks must have seen the same.
fn look_at_sockets(lab: &Lab, maps: &mut Maps) {
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(1100));
        lab.row.node.enter(|| maps.look_at_sockets().unwrap());
    }
}

#[test]
fn connections_are_metered_as_the_origin_sees_them_for_as_long_as_there_is_a_socket() {
    let lab = lab_with(5, Aegis::metered_with);
    let mut maps = lab.aegis.plane.meters().unwrap();
    maps.withdraw().unwrap();
    maps.give_out().unwrap();
    maps.keep_rest_of_refusals().unwrap();
    lab.row.origin.run(&format!(
        "nft \"table ip count {{ counter from {{ }}; counter to {{ }}; \
         chain in {{ type filter hook prerouting priority -300; ip saddr {EGRESS} tcp dport 80 counter name from; }}; \
         chain out {{ type filter hook postrouting priority 300; ip daddr {EGRESS} tcp sport 80 counter name to; }}; }}\""
    ));
    let counted = |name: &str| -> (u64, u64) {
        let told = lab.row.origin.output(&format!("nft list counter ip count {name}"));
        let mut words = told.split_whitespace();
        let mut after = |word| {
            words.find(|it| *it == word);
            words.next().unwrap().parse().unwrap()
        };
        (after("packets"), after("bytes"))
    };
    let first = lab.connect(COVERED, LONG).unwrap();
    let (far_of_first, _) = lab.accept();
    let second = lab.connect(COVERED, LONG).unwrap();
    let (far_of_second, _) = lab.accept();
    // Nothing here is cut into segments, which the origin would count as one packet.
    for (mut from, mut to) in [(&first, &far_of_first), (&far_of_first, &first)].repeat(50) {
        from.write_all(&[7; 1000]).unwrap();
        to.read_exact(&mut [0; 1000]).unwrap();
    }
    let (used, _) = metered(&mut maps, 80);
    assert_eq!((used.in_use, used.peak), (2, 2));

    // The origin's end first: then nothing is left of it here.
    drop(far_of_second);
    std::thread::sleep(SHORT);
    drop(second);
    look_at_sockets(&lab, &mut maps);
    let (used, value) = metered(&mut maps, 80);
    assert_eq!((used.in_use, used.peak), (1, 2));
    assert_eq!(value.flows, 2);
    assert_eq!((value.sent_packets, value.sent_bytes), counted("from"));
    assert_eq!((value.received_packets, value.received_bytes), counted("to"));
    assert!(value.sent_bytes > 50_000 && value.received_bytes > 50_000, "{value:?}");
    // A port whose connection waits for stray packets is in use.
    drop(first);
    std::thread::sleep(SHORT);
    drop(far_of_first);
    look_at_sockets(&lab, &mut maps);
    assert_eq!(metered(&mut maps, 80).0, MeterUse { in_use: 1, peak: 1 });
}

#[test]
fn connections_that_find_no_port_are_counted_as_refused() {
    let lab = lab_with(5, Aegis::metered_with);
    let maps = &mut lab.aegis.plane.meters().unwrap();
    maps.withdraw().unwrap();
    maps.give_out().unwrap();
    let _open: Vec<_> = (0..256).map(|_| (lab.connect(COVERED, LONG).unwrap(), lab.accept())).collect();
    assert_eq!(metered(maps, 80).0, MeterUse { in_use: 256, peak: 256 });
    lab.connect(COVERED, LONG).unwrap_err();
    let refusals = maps.look(std::iter::empty()).unwrap().refusals;
    let (key, count) = refusals.iter().next().unwrap();
    let expected = RefusalKey {
        remote: mapped(to_map(ORIGIN)),
        remote_port: 80,
        protocol: 6,
        reason: Counter::RefuseNoSocketPort as u8,
        ..*key
    };
    assert_eq!((refusals.len(), *key, *count), (1, expected, 1));
}

#[test]
fn what_no_socket_is_bound_for_is_translated() {
    let lab = lab(5);
    let near = lab.connect(COVERED, LONG).unwrap();
    let (far, _) = lab.accept();
    assert_eq!(*source(&near).ip(), EGRESS);
    transfer(&near, &far);
    // Datagrams, of sockets that are connected or not, and echoes.
    let socket = lab.udp_in(COVERED);
    assert_eq!(lab.exchange(&socket, 100), Some(EGRESS));
    socket.connect((ORIGIN, 53)).unwrap();
    assert_eq!(lab.exchange(&socket, 4000), Some(EGRESS));
    let procs = lab.groups.folder(COVERED).join("cgroup.procs");
    lab.row.node.run(&format!("echo $$ > {}; exec ping -c 1 -W 5 {ORIGIN}", procs.display()));
    // A socket that the application has bound.
    let own = |address: Ipv4Addr| {
        lab.groups.inside(COVERED, || {
            lab.row.node.enter(|| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
                socket.bind(&SocketAddr::from((address, 0)).into()).unwrap();
                socket.connect_timeout(&SocketAddr::from((ORIGIN, 80)).into(), LONG).map(|()| socket)
            })
        })
    };
    let _near = own(NODE).unwrap();
    let (far, source) = lab.accept();
    assert_eq!(source, EGRESS);
    assert!(!BOUND.contains(&far.peer_addr().unwrap().port()), "of a slice for translation");
    // Other pods, and other processes.
    let _near = lab.connect(KNOWN, LONG).unwrap();
    assert_eq!(lab.accept().1, NODE);
    let _near = lab.row.node.enter(|| TcpStream::connect((ORIGIN, 80)).unwrap());
    assert_eq!(lab.accept().1, NODE);
    assert_eq!(lab.aegis.count(Counter::Bound), 1);
}

#[test]
fn a_socket_keeps_what_it_got_when_it_connects_again() {
    let lab = lab(5);
    let socket = lab.groups.inside(COVERED, || {
        lab.row.node.enter(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap())
    });
    let connect = |to: SocketAddr| lab.groups.inside(COVERED, || socket.connect(&to.into()));
    // Nobody listens there.
    let refused = connect((ORIGIN, 9).into()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let before = socket.local_addr().unwrap().as_socket_ipv4().unwrap();
    assert_eq!(*before.ip(), EGRESS);
    connect((ORIGIN, 80).into()).unwrap();
    assert_eq!(socket.local_addr().unwrap().as_socket_ipv4(), Some(before));
    assert_eq!(lab.accept().0.peer_addr().unwrap(), SocketAddr::V4(before));
    assert_eq!(lab.aegis.count(Counter::Bound), 1);
}

#[test]
fn nothing_comes_in_that_no_connection_asked_for() {
    let lab = lab(5);
    let near = lab.connect(COVERED, LONG).unwrap();
    let (_far, _) = lab.accept();
    let taken = source(&near).port();
    let free = BOUND.clone().find(|port| *port != taken).unwrap();
    let everywhere = Ipv4Addr::UNSPECIFIED;
    let listens = |port| lab.row.node.enter(|| TcpListener::bind((everywhere, port)).unwrap());
    let listener = listens(free);
    let asks = |to: SocketAddrV4| lab.row.origin.enter(|| TcpStream::connect_timeout(&to.into(), SHORT));
    assert!(asks(SocketAddrV4::new(NODE, free)).is_ok(), "it is there");
    drop(listener.accept().unwrap());
    let before = lab.aegis.count(Counter::DropNoFlow);
    for port in [free, taken, 0x455, 80] {
        let refused = asks(SocketAddrV4::new(EGRESS, port)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TimedOut, "{port}");
    }
    assert!(lab.aegis.count(Counter::DropNoFlow) >= before + 3);
    // Datagrams neither.
    let udp = lab.row.node.enter(|| std::net::UdpSocket::bind((everywhere, free)).unwrap());
    udp.set_read_timeout(Some(SHORT)).unwrap();
    lab.udp.send_to(b"x", (EGRESS, free)).unwrap();
    assert!(udp.recv(&mut [0; 4]).is_err());
    // Where somebody listens, no socket is bound: the others have the rest.
    let all: Vec<_> = (0..254).map(|_| (lab.connect(COVERED, LONG).unwrap(), lab.accept())).collect();
    assert!(all.iter().all(|(near, _)| source(near).port() != free));
    assert_eq!(lab.connect(COVERED, LONG).unwrap_err().kind(), ErrorKind::AddrNotAvailable);
}

/// A TCP segment from an egress port, as somebody would forge it.
fn segment(from: u16, flags: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
    packet.extend(EGRESS.octets());
    packet.extend(ORIGIN.octets());
    packet.extend(from.to_be_bytes());
    packet.extend(80u16.to_be_bytes());
    packet.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0]);
    packet
}

#[test]
fn nobody_else_gets_out_with_the_address() {
    let lab = lab(5);
    let near = lab.connect(COVERED, LONG).unwrap();
    let (far, _) = lab.accept();
    let taken = source(&near).port();
    lab.row.origin.run(&format!(
        "nft \"table ip forged {{ counter seen {{ }}; chain c {{ type filter hook prerouting priority -400; ip saddr {EGRESS} tcp sport != {taken} counter name seen; ip saddr {EGRESS} tcp flags rst counter name seen; }}; }}\""
    ));
    // Raw sockets, with ports that are free and with one that is in use.
    for pod in [COVERED, KNOWN] {
        let raw = lab.groups.inside(pod, || {
            lab.row.node.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).unwrap())
        });
        let before = lab.aegis.count(Counter::DropForged);
        for (port, flags) in [(BOUND.start + 9, 0x02), (BOUND.start + 9, 0x10), (taken, 0x14), (0x410, 0x02)]
        {
            raw.send_to(&segment(port, flags), &SocketAddr::from((ORIGIN, 0)).into()).unwrap();
        }
        assert_eq!(lab.aegis.count(Counter::DropForged), before + 4);
    }
    // Sockets of whom nothing covers, and of the pod to where nothing does; and a port that is for translation.
    let elsewhere = Ipv4Addr::new(192, 0, 2, 9);
    let free = BOUND.clone().rev().find(|port| *port != taken).unwrap();
    for (pod, port, to) in [(KNOWN, free, ORIGIN), (COVERED, free - 1, elsewhere), (COVERED, 0x410, ORIGIN)] {
        let connected = lab.groups.inside(pod, || {
            lab.row.node.enter(|| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
                socket.bind(&SocketAddr::from((EGRESS, port)).into()).unwrap();
                socket.connect_timeout(&SocketAddr::from((to, 80)).into(), SHORT)
            })
        });
        assert_eq!(connected.unwrap_err().kind(), ErrorKind::TimedOut, "{port}");
    }
    let seen = lab.row.origin.output("nft list counter ip forged seen");
    assert!(seen.contains("packets 0 "), "{seen}");
    transfer(&near, &far);
    assert_eq!(lab.nodes_packets(), 0);
}

#[test]
fn connections_outlive_the_agent_and_the_binding() {
    let mut lab = lab(5);
    let near = lab.connect(COVERED, LONG).unwrap();
    let (far, _) = lab.accept();
    // Another agent takes over what is pinned.
    lab.aegis.restart(&lab.row);
    transfer(&near, &far);
    let later = lab.connect(COVERED, LONG).unwrap();
    let (later_far, _) = lab.accept();
    assert_eq!(*source(&later).ip(), EGRESS, "without anybody");
    lab.aegis.plane.attach_sockets(Path::new(MOUNT)).unwrap();
    transfer(&later, &later_far);
    let again = lab.connect(COVERED, LONG).unwrap();
    drop(lab.accept());
    assert_eq!((*source(&again).ip(), lab.aegis.count(Counter::Bound)), (EGRESS, 3));
    drop(again);

    // The binding goes.
    let mut none = binds(&lab.groups, 5);
    none.bindings[0].enabled = false;
    none.uses = [(EGRESS, Uses { kept: SliceSet::range(5, 5), ..Uses::default() })].into();
    lab.aegis.follow(&none);
    transfer(&near, &far);
    let _near = lab.connect(COVERED, LONG).unwrap();
    assert_eq!(lab.accept().1, NODE);
    transfer(&later, &later_far);
    // What is left of them in the end.
    drop((near, far));
    drop((later_far, later));
    std::thread::sleep(SHORT);
    assert!(listed(&lab) > 0, "they wait for stragglers");
}

#[test]
fn a_slice_that_drains_takes_no_new_socket_and_what_follows_is_translated() {
    let mut lab = lab(6);
    let near: Vec<_> = (0..20).map(|_| lab.connect(COVERED, LONG).unwrap()).collect();
    let far: Vec<_> = (0..20).map(|_| lab.accept().0).collect();
    let mut drains = binds(&lab.groups, 6);
    let kept = SliceSet::range(5, 6);
    drains.uses = [(EGRESS, Uses { open: SliceSet::range(6, 6), kept, ..Uses::default() })].into();
    lab.aegis.follow(&drains);
    for _ in 0..20 {
        assert_eq!(source(&lab.connect(COVERED, LONG).unwrap()).port() >> 8, 6);
        drop(lab.accept());
    }
    drains.uses = [(EGRESS, Uses { kept, ..Uses::default() })].into();
    lab.aegis.follow(&drains);
    let translated = lab.connect(COVERED, LONG).unwrap();
    assert_eq!((*source(&translated).ip(), lab.accept().1), (NODE, EGRESS));
    transfer(&near[3], &far[3]);
    // It is somebody else's, or for translation: what is left of its sockets is heard of no more.
    drains.uses.clear();
    lab.aegis.follow(&drains);
    let before = lab.aegis.count(Counter::DropForged);
    (&near[4]).write_all(b"x").unwrap();
    std::thread::sleep(SHORT);
    assert!(lab.aegis.count(Counter::DropForged) > before);
    make_local(&lab.row, false);
    assert_eq!(lab.nodes_packets(), 0);
}

#[test]
fn nobody_but_the_announcer_answers_arp_for_a_local_address() {
    let lab = lab(5);
    lab.row.origin.run(&format!("ip route add {EGRESS}/32 dev eth0"));
    let mac_of = |address| {
        lab.row.origin.run(&format!("ping -c 1 -W 1 {address} || true"));
        lab.row.origin.output(&format!("ip neigh show {address}")).contains("lladdr")
    };
    assert_eq!((mac_of(NODE), mac_of(EGRESS)), (true, false));
}

#[test]
fn a_node_that_cannot_renew_its_lease_sends_nothing_from_its_sockets_either() {
    let mut lab = lab(5);
    let near = lab.connect(COVERED, LONG).unwrap();
    let (mut far, _) = lab.accept();
    let mut fenced = binds(&lab.groups, 5);
    fenced.addresses.get_mut(&EGRESS).unwrap().fence = Some(Fence { after: 60, epoch: 1 });
    // It has never renewed one.
    lab.aegis.follow(&fenced);
    lab.aegis.plane.write(&Op::SetLease(LeaseValue::default())).unwrap();
    (&near).write_all(b"x").unwrap();
    far.set_read_timeout(Some(SHORT)).unwrap();
    assert_eq!(far.read(&mut [0; 4]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(lab.aegis.count(Counter::DropFenced) > 0);
    assert_eq!(lab.connect(COVERED, LONG).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(lab.aegis.count(Counter::Bound), 1);
    // Should it get it back, what was sent meanwhile comes again.
    lab.aegis.follow(&binds(&lab.groups, 5));
    far.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(far.read(&mut [0; 4]).unwrap(), 1);
    assert_eq!(lab.nodes_packets(), 0);
}
