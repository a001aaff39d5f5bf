//! Two nodes and a router on one link: who answers for a /64, and that the router follows when it becomes another one. Real programs,
//! the agents' election, and the kernel's own neighbour table.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_core::egress::Egress;
use aegis_core::model::{Address, AllocationName, Holding, State};
use aegis_node_agent::announce::l2::L2;
use aegis_node_agent::announce::l2::election::{Mac, Seat, Wanted};
use aegis_node_agent::apply::Plane;
use aegis_node_agent::desired::{Inputs, desired};
use aegis_node_agent::objects::NodeRecord;
use aegis_node_agent::ops::Known;
use aegis_node_agent::probe::Prober;
use aegis_node_agent::uplink::Devices;
use netns_support::plane::{Bpffs, bring};
use netns_support::{Namespace, need_root};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// 2001:db8:1:2::/64
const NETWORK: Egress = Egress::V6(0x2001_0db8_0001_0002);
const PATIENCE: Duration = Duration::from_secs(10);

struct Node {
    name: &'static str,
    namespace: Namespace,
    l2: L2,
    index: u32,
    mac: Mac,
    _plane: Box<dyn Plane>,
    _bpffs: Bpffs,
}

fn pod(of: &str) -> Ipv6Addr {
    let slice = if of == "n0" { 4 } else { 5 };
    Ipv6Addr::new(0x2001, 0xdb8, 1, 2, slice, 0, 0, 7)
}

impl Node {
    fn new(router: &Namespace, name: &'static str, last: u8) -> Node {
        let namespace = Namespace::new(name);
        let port = format!("port{last}");
        namespace.link("eth0", router, &port);
        router.run(&format!("ip link set {port} master br0"));
        namespace.run(&format!("ip addr add 192.0.2.{last}/24 dev eth0"));
        let (port_index, _) = device(router, &port);
        let (index, mac) = device(&namespace, "eth0");
        let bpffs = Bpffs::new(&namespace.name);
        // What a veth sends back from XDP its peer takes only with a program of its own.
        router.enter(|| std::mem::forget(pass(port_index)));
        let plane = namespace.enter(|| {
            let mut plane = bpffs.open();
            bring(plane.as_mut(), &desired(&inputs(name)), &Known::default());
            let device =
                aegis_node_agent::network::Device { index, name: "eth0".into(), mac, ..Default::default() };
            let devices = Devices { uplinks: [(index, device)].into(), ..Devices::default() };
            let failed = plane.attach(&devices, &[index].into());
            assert!(failed.is_empty(), "{failed:?}");
            plane
        });
        let l2 = L2::new(Prober::default(), || {});
        l2.take_table(plane.answers().unwrap());
        Node { name, namespace, l2, index, mac, _plane: plane, _bpffs: bpffs }
    }

    /// Takes part in the election, or leaves it to the other.
    fn follow(&self, other: &Node, stands: bool) {
        let seat = Seat { stands, others: [other.name.to_owned()].into(), pods: [pod(self.name)].into() };
        let wanted = Wanted {
            node: self.name.to_owned(),
            seats: [(NETWORK, seat)].into(),
            tunnels: BTreeMap::new(),
            macs: [(other.mac, other.name.to_owned())].into(),
        };
        let (l2, uplinks) = (&self.l2, [(self.index, self.mac)].into());
        self.namespace.enter(|| l2.follow(wanted, &uplinks));
    }

    /// Listens, without end.
    fn run(&self) {
        let (l2, file) =
            (self.l2.clone(), std::fs::File::open(format!("/run/netns/{}", self.namespace.name)).unwrap());
        std::thread::spawn(move || {
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            l2.run();
        });
    }

    fn answers(&self) -> bool {
        self.l2.outcome().answering.contains(&NETWORK)
    }

    fn takes_all_multicast(&self) -> bool {
        self.namespace.output("ip link show eth0").contains("ALLMULTI")
    }
}

/// Each node holds a slice of the /64.
fn inputs(node: &str) -> Inputs {
    let holding = |slice: u8, node: &str| Holding {
        first: slice,
        last: slice,
        node: node.to_owned(),
        epoch: 1,
        state: State::Held,
    };
    let object = Address {
        address: NETWORK,
        prefix: "p".into(),
        allocation: AllocationName { account: "shop".into(), name: "main".into() },
        epoch: 1,
        fence: None,
        holdings: vec![holding(4, "n0"), holding(5, "n1")],
    };
    let record =
        |last| NodeRecord { addresses: vec![Ipv4Addr::new(192, 0, 2, last)], ..NodeRecord::default() };
    Inputs {
        node: node.to_owned(),
        networks: [(NETWORK, object)].into(),
        nodes: [("n0".to_owned(), record(1)), ("n1".to_owned(), record(2))].into(),
        tunnel_address: Some(Ipv4Addr::new(192, 0, 2, if node == "n0" { 1 } else { 2 })),
        six: true,
        uplink_mtu: Some(1500),
        mark: 0x1000,
        tunnel_port: 6081,
        ..Inputs::default()
    }
}

/// An XDP program that passes everything, on a device; it goes with the descriptor.
fn pass(index: u32) -> OwnedFd {
    const PROG_LOAD: libc::c_long = 5;
    const LINK_CREATE: libc::c_long = 28;
    const XDP: u32 = 37;
    /// `r0 = XDP_PASS; exit`
    const CODE: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];
    let bpf = |command: libc::c_long, attributes: &[u64]| {
        // SAFETY: the attributes outlive the call and have the length that is given, as does what they point to.
        let fd =
            unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: a descriptor that has just been made, and is nobody else's.
        unsafe { OwnedFd::from_raw_fd(fd as i32) }
    };
    let license = c"GPL";
    // Program type 6 (XDP) and number of instructions, where they are, licence.
    let program = bpf(PROG_LOAD, &[6 | 2 << 32, CODE.as_ptr() as u64, license.as_ptr() as u64, 0, 0, 0]);
    bpf(LINK_CREATE, &[program.as_raw_fd() as u64 | u64::from(index) << 32, u64::from(XDP)])
}

/// The router's way to an address of the /64: asks for it if it is not known.
fn sends_to(router: &Namespace, address: Ipv6Addr) -> String {
    router.enter(|| {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        let _ = socket.send_to(b"hello", (address, 9));
    });
    router.output(&format!("ip -6 neigh show {address} dev br0"))
}

fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !until() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Index and MAC of a device: `2: eth0@if3: … link/ether 02:…`.
fn device(of: &Namespace, name: &str) -> (u32, Mac) {
    let shown = of.output(&format!("ip -o link show dev {name}"));
    let mac = shown.split_once("link/ether ").unwrap().1.split(' ').next().unwrap();
    let octets = mac.split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap());
    (shown.split(':').next().unwrap().parse().unwrap(), octets.collect::<Vec<u8>>().try_into().unwrap())
}

fn text(mac: &Mac) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

#[test]
fn one_node_answers_for_a_64_and_routers_follow_to_another_at_once() {
    need_root();
    let router = Namespace::new("router");
    router.run(
        "sysctl -qw net.ipv6.conf.default.accept_dad=0; \
         ip link add br0 type bridge mcast_snooping 0; ip link set br0 up; sysctl -qw net.ipv6.neigh.br0.delay_first_probe_time=1; \
         ip addr add 2001:db8:eeee::1/64 dev br0 nodad; ip -6 route add 2001:db8:1:2::/64 dev br0",
    );
    let nodes = [Node::new(&router, "n0", 1), Node::new(&router, "n1", 2)];
    let [a, b] = &nodes;
    for (node, other) in [(a, b), (b, a)] {
        node.follow(other, true);
        node.run();
    }
    wait("one node to answer", || a.answers() != b.answers());
    let (first, second) = if a.answers() { (a, b) } else { (b, a) };
    assert!(first.takes_all_multicast() && !second.takes_all_multicast());
    for node in [a, b] {
        let address = pod(node.name);
        wait("the router to know", || sends_to(&router, address).contains(&text(&first.mac)));
    }
    // Of a slice that nobody holds nobody knows.
    let nobody = Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 77, 0, 0, 7);
    assert!(!sends_to(&router, nobody).contains("lladdr"));

    // It leaves it to the other one, and the router sends there at once: it is told of every pod, whoever's it is.
    first.follow(second, false);
    wait("the other node to answer", || second.answers() && !first.answers());
    let told = Instant::now();
    for node in [a, b] {
        let address = pod(node.name);
        wait("the router to be told", || {
            router.output(&format!("ip -6 neigh show {address} dev br0")).contains(&text(&second.mac))
        });
    }
    assert!(told.elapsed() < Duration::from_secs(2), "told after {:?}", told.elapsed());
    assert!(second.takes_all_multicast() && !first.takes_all_multicast());
    // It asks again, directly, and is answered.
    for node in [a, b] {
        let address = pod(node.name);
        wait("the router to be sure", || sends_to(&router, address).contains("REACHABLE"));
    }
    // Nor does it come back by itself.
    first.follow(second, true);
    std::thread::sleep(Duration::from_secs(1));
    assert!(second.answers() && !first.answers());
}
