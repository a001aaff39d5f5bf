//! Pods of the host network: real sockets in real control groups, on a node with the whole data plane.

use super::path::{Aegis, NODE, ORIGIN, Row, holding, inputs};
use super::{need_root, run};
use aegis_common::Timeouts;
use aegis_core::policy::Pod;
use aegis_node_agent::desired::Inputs;
use aegis_node_agent::groups;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Patience with which a packet is waited for that comes.
pub const LONG: Duration = Duration::from_secs(5);
/// And for one that does not.
pub const SHORT: Duration = Duration::from_millis(300);
/// The pods: one is covered, one is known, one has been named by nobody.
pub const COVERED: u32 = 1;
pub const KNOWN: u32 = 2;
pub const UNKNOWN: u32 = 3;

pub const MOUNT: &str = "/sys/fs/cgroup";

/// Control groups as kubelet makes them.
pub struct Groups {
    pub number: u32,
    pub top: PathBuf,
}

impl Groups {
    pub fn new() -> Groups {
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
    pub fn uid(&self, pod: u32) -> String {
        format!("{:08x}-{pod:04x}-4000-8000-{:012x}", self.number, std::process::id())
    }

    /// That of a container of the pod.
    pub fn folder(&self, pod: u32) -> PathBuf {
        let uid = self.uid(pod);
        self.top.join(format!("kubepods/burstable/pod{uid}/container"))
    }

    /// Runs code while this process is in a container of the pod: a socket is in the group in which it was made.
    pub fn inside<T>(&self, pod: u32, code: impl FnOnce() -> T) -> T {
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
        // What another test has just started may be in one for a moment.
        run(&format!(
            "for i in $(seq 50); do find {0} -depth -type d -exec rmdir {{}} + 2>/dev/null || true; \
             if [ ! -e {0} ]; then exit 0; fi; sleep 0.1; done; exit 1",
            self.top.display()
        ));
    }
}

pub fn hierarchy() -> PathBuf {
    let hybrid = Path::new(MOUNT).join("unified");
    if hybrid.is_dir() { hybrid } else { MOUNT.into() }
}

pub fn enter(group: &Path) {
    std::fs::write(group.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

/// What the node is to do: a pod of the host network is covered towards the origin.
pub fn hosts(groups: &Groups, last: u8) -> Inputs {
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

pub struct Lab {
    pub row: Row,
    pub groups: Groups,
    pub aegis: Aegis,
    pub listener: TcpListener,
    pub udp: UdpSocket,
}

impl Lab {
    pub fn new() -> Lab {
        Lab::with(19)
    }

    pub fn with(last: u8) -> Lab {
        let (row, groups) = (Row::new(), Groups::new());
        let aegis = Aegis::with(&row, &hosts(&groups, last));
        Lab::of(row, groups, aegis)
    }

    pub fn of(row: Row, groups: Groups, aegis: Aegis) -> Lab {
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
    pub fn connect(&self, pod: u32, patience: Duration) -> std::io::Result<TcpStream> {
        self.connect_to(pod, (ORIGIN, 80), patience)
    }

    /// The same to any port.
    pub fn connect_to(
        &self,
        pod: u32,
        to: impl Into<SocketAddr>,
        patience: Duration,
    ) -> std::io::Result<TcpStream> {
        let to = to.into();
        self.groups.inside(pod, || self.row.node.enter(|| TcpStream::connect_timeout(&to, patience)))
    }

    /// The origin's end of the next connection, with the source that it sees.
    pub fn accept(&self) -> (TcpStream, Ipv4Addr) {
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

    pub fn udp_in(&self, pod: u32) -> UdpSocket {
        let socket =
            self.groups.inside(pod, || self.row.node.enter(|| UdpSocket::bind(("0.0.0.0", 0)).unwrap()));
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket
    }

    /// Source of the datagram at the origin; the answer must come back.
    pub fn exchange(&self, socket: &UdpSocket, size: usize) -> Option<Ipv4Addr> {
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
    pub fn nodes_packets(&self) -> u64 {
        let listing = self.row.origin.output("nft list counter ip seen node");
        listing.split_whitespace().skip_while(|word| *word != "packets").nth(1).unwrap().parse().unwrap()
    }

    pub fn policy(&self) -> Inputs {
        hosts(&self.groups, 19)
    }
}

pub fn ip(address: SocketAddr) -> Ipv4Addr {
    match address {
        SocketAddr::V4(address) => *address.ip(),
        SocketAddr::V6(_) => unreachable!("IPv4 only"),
    }
}

/// Sends much both ways.
pub fn transfer(near: &TcpStream, far: &TcpStream) {
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
