//! Pods of the host network: real sockets in real control groups, on a node with the whole data plane.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_common::{Counter, Timeouts};
use aegis_core::policy::Pod;
use aegis_node_agent::desired::Inputs;
use aegis_node_agent::groups;
use netns_support::path::{Aegis, EGRESS, NODE, ORIGIN, Row, holding, inputs};
use netns_support::{Namespace, need_root, run};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Patience with which a packet is waited for that comes.
const LONG: Duration = Duration::from_secs(5);
/// And for one that does not.
const SHORT: Duration = Duration::from_millis(300);
/// The pods: one is covered, one is known, one has been named by nobody.
const COVERED: u32 = 1;
const KNOWN: u32 = 2;
const UNKNOWN: u32 = 3;

const MOUNT: &str = "/sys/fs/cgroup";

/// Control groups as kubelet makes them.
struct Groups {
    number: u32,
    top: PathBuf,
}

impl Groups {
    fn new() -> Groups {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        need_root();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let top = hierarchy().join(format!("aegis-hosts-{}-{number}", std::process::id()));
        let groups = Groups { number, top };
        for pod in [COVERED, KNOWN, UNKNOWN] {
            std::fs::create_dir_all(groups.folder(pod)).unwrap();
        }
        groups
    }

    /// All tests see the groups of all.
    fn uid(&self, pod: u32) -> String {
        format!("{:08x}-{pod:04x}-4000-8000-{:012x}", self.number, std::process::id())
    }

    /// That of a container of the pod.
    fn folder(&self, pod: u32) -> PathBuf {
        let uid = self.uid(pod);
        self.top.join(format!("kubepods/burstable/pod{uid}/container"))
    }

    /// Runs code while this process is in a container of the pod: a socket is in the group in which it was made.
    fn inside<T>(&self, pod: u32, code: impl FnOnce() -> T) -> T {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        enter(&self.folder(pod));
        let result = code();
        enter(&hierarchy());
        result
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        run(&format!("find {} -depth -type d -exec rmdir {{}} +", self.top.display()));
    }
}

fn hierarchy() -> PathBuf {
    let hybrid = Path::new(MOUNT).join("unified");
    if hybrid.is_dir() { hybrid } else { MOUNT.into() }
}

fn enter(group: &Path) {
    std::fs::write(group.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

/// What the node is to do: a pod of the host network is covered towards the origin.
fn hosts(groups: &Groups, last: u8) -> Inputs {
    let mut inputs = inputs(vec![holding(4, last, "n0")], Timeouts::default());
    let labels = inputs.pods[0].labels.clone();
    let pod = |pod, labels| Pod {
        account: "shop".into(),
        name: groups.uid(pod),
        uid: groups.uid(pod),
        host_network: true,
        addresses: vec![NODE.into()],
        labels,
        ..Pod::default()
    };
    inputs.pods = vec![pod(COVERED, labels), pod(KNOWN, Default::default())];
    let found = groups::read(Path::new(MOUNT)).unwrap();
    inputs.groups = found.pods.into_iter().filter(|(uid, _)| *uid != groups.uid(UNKNOWN)).collect();
    // Of other tests there are some, too.
    let own = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(groups.top.join("kubepods")).unwrap());
    inputs.group_roots = found.roots.into_iter().filter(|root| root.number == own).collect();
    inputs
}

struct Lab {
    row: Row,
    groups: Groups,
    aegis: Aegis,
    listener: TcpListener,
    udp: UdpSocket,
}

impl Lab {
    fn new() -> Lab {
        Lab::with(19)
    }

    fn with(last: u8) -> Lab {
        let (row, groups) = (Row::new(), Groups::new());
        let aegis = Aegis::with(&row, &hosts(&groups, last));
        Lab::of(row, groups, aegis)
    }

    fn of(row: Row, groups: Groups, aegis: Aegis) -> Lab {
        row.origin.run("ethtool -K eth0 tx off >/dev/null");
        // What reaches the origin from the node's address.
        row.origin.run(&format!(
            "nft \"table ip seen {{ counter node {{ }}; chain c {{ type filter hook prerouting priority -400; ip saddr {NODE} counter name node; }}; }}\""
        ));
        let (listener, udp) = row
            .origin
            .enter(|| (TcpListener::bind((ORIGIN, 80)).unwrap(), UdpSocket::bind((ORIGIN, 53)).unwrap()));
        listener.set_nonblocking(true).unwrap();
        Lab { row, groups, aegis, listener, udp }
    }

    /// Opens a connection from within a pod, on the node.
    fn connect(&self, pod: u32, patience: Duration) -> std::io::Result<TcpStream> {
        let to = SocketAddr::from((ORIGIN, 80));
        self.groups.inside(pod, || self.row.node.enter(|| TcpStream::connect_timeout(&to, patience)))
    }

    /// The origin's end of the next connection, with the source that it sees.
    fn accept(&self) -> (TcpStream, Ipv4Addr) {
        let end = Instant::now() + LONG;
        loop {
            match self.listener.accept() {
                Ok((stream, from)) => {
                    stream.set_nonblocking(false).unwrap();
                    return (stream, ip(from));
                }
                Err(error) => {
                    assert!(error.kind() == ErrorKind::WouldBlock && Instant::now() < end, "{error}");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    fn udp_in(&self, pod: u32) -> UdpSocket {
        let socket =
            self.groups.inside(pod, || self.row.node.enter(|| UdpSocket::bind(("0.0.0.0", 0)).unwrap()));
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket
    }

    /// Source of the datagram at the origin; the answer must come back.
    fn exchange(&self, socket: &UdpSocket, size: usize) -> Option<Ipv4Addr> {
        let sent: Vec<u8> = (0..size).map(|i| (i * 7) as u8).collect();
        let _ = socket.send_to(&sent, (ORIGIN, 53));
        let mut buffer = vec![0; 65536];
        self.udp.set_read_timeout(Some(SHORT)).unwrap();
        let (length, from) = self.udp.recv_from(&mut buffer).ok()?;
        assert!(buffer[..length] == sent, "{length} of {size} bytes");
        self.udp.send_to(&sent, from).unwrap();
        let (length, by) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((length, by), (size, (ORIGIN, 53).into()));
        assert!(buffer[..length] == sent);
        Some(ip(from))
    }

    /// Packets that the origin has seen from the node's own address.
    fn nodes_packets(&self) -> u64 {
        let listing = self.row.origin.output("nft list counter ip seen node");
        listing.split_whitespace().skip_while(|word| *word != "packets").nth(1).unwrap().parse().unwrap()
    }

    fn policy(&self) -> Inputs {
        hosts(&self.groups, 19)
    }
}

fn ip(address: SocketAddr) -> Ipv4Addr {
    match address {
        SocketAddr::V4(address) => *address.ip(),
        SocketAddr::V6(_) => unreachable!("IPv4 only"),
    }
}

/// Sends much both ways.
fn transfer(near: &TcpStream, far: &TcpStream) {
    const SIZE: usize = 3_000_000;
    for (mut from, mut to) in [(near, far), (far, near)] {
        std::thread::scope(|scope| {
            scope.spawn(move || from.write_all(&vec![5; SIZE]).unwrap());
            let mut got = vec![0; SIZE];
            to.set_read_timeout(Some(LONG)).unwrap();
            to.read_exact(&mut got).unwrap();
            assert!(got.iter().all(|byte| *byte == 5));
        });
    }
}

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
