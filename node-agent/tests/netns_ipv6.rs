//! IPv6 through the real kernel: the programs at their hooks, conntrack and the table `ip6 aegis`, between a pod and an origin. What
//! somebody asked for comes in, and nothing else.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what unwrap is for")]

mod netns_support;
mod support;

use aegis_node_agent::nft::six::Rules6;
use aegis_node_agent::nft::{Firewall, Outcome};
use aegis_node_agent::refused;
use aegis_node_agent::{conntrack, network, rule};
use netns_support::{Namespace, need_root};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;
use support::six::*;
use support::*;

const POD_DEVICE: u32 = 71;
const UPLINK: u32 = 72;
/// As long as a packet may take, and as long as one is waited for that must not come.
const LONG: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(300);

struct Lab {
    pod: Namespace,
    node: Namespace,
    origin: Namespace,
    firewall: Firewall,
    wrapper: std::path::PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Lab {
    fn new() -> Lab {
        need_root();
        let (pod, node, origin) = (Namespace::new("pod"), Namespace::new("node"), Namespace::new("origin"));
        for namespace in [&pod, &node, &origin] {
            namespace.run("sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0");
        }
        node.run("sysctl -qw net.ipv6.conf.all.forwarding=1");
        node.link_with(&format!("pod0 index {POD_DEVICE}"), &pod, "eth0");
        node.link_with(&format!("eth0 index {UPLINK}"), &origin, "eth0");
        pod.run(&format!(
            "ip addr add {POD6}/64 dev eth0 nodad; ip -6 route add default via fd00:10:244:1::1"
        ));
        node.run(
            "ip addr add fd00:10:244:1::1/64 dev pod0 nodad; ip addr add 2001:db8:eeee::2/64 dev eth0 nodad; \
             ip -6 route add default via 2001:db8:eeee::1",
        );
        // XDP sees no checksum that a device is to fill in.
        origin.run(&format!(
            "ip addr add 2001:db8:eeee::1/64 dev eth0 nodad; ip addr add {ORIGIN6}/128 dev lo; \
             ip -6 route add default via 2001:db8:eeee::2; ethtool -K eth0 tx off >/dev/null"
        ));
        node.run("nft \"table ip6 cni { chain post { type nat hook postrouting priority srcnat; ip6 saddr fd00:10:244:1::/64 oifname eth0 masquerade; }; }\"");
        let name = node.name.clone();
        let wrapper = std::env::temp_dir().join(format!("{name}-nft"));
        std::fs::write(&wrapper, format!("#!/bin/sh\nexec nsenter --net=/run/netns/{name} nft \"$@\"\n"))
            .unwrap();
        netns_support::run(&format!("chmod +x {}", wrapper.display()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Lab { pod, node, origin, firewall: Firewall::new(wrapper.clone()), wrapper, runtime }
    }

    fn ensure(&mut self, rules: &Rules6, check: bool) -> Outcome {
        self.runtime.block_on(self.firewall.ensure(rules, check)).unwrap()
    }

    /// Packets that nobody had asked for.
    fn unasked(&mut self) -> u64 {
        assert_eq!(self.ensure(&rules(), true), Outcome::Unchanged);
        self.firewall.drops()["unasked"]
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.wrapper);
    }
}

fn rules() -> Rules6 {
    Rules6 {
        mark: MARK,
        pods: vec!["fd00:10:244:1::/64".parse().unwrap()],
        pod_devices: [(POD_DEVICE, "pod0".to_owned())].into(),
        uplinks: [(UPLINK, "eth0".to_owned())].into(),
        hold: true,
        internal: vec!["fd00:10:244::/48".parse().unwrap()],
        uncovered: Vec::new(),
        queries: Default::default(),
    }
}

fn udp(namespace: &Namespace, address: Ipv6Addr) -> UdpSocket {
    let socket = namespace.enter(|| UdpSocket::bind((address, 0)).unwrap());
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket
}

/// Who the other end sees as the sender of a datagram.
fn sender(to: &UdpSocket) -> SocketAddr {
    to.recv_from(&mut [0; 8]).unwrap().1
}

/// Runs with programs and tables of a node. In a thread of its own: its mounts are nobody else's, and namespaces must go where they
/// came from.
fn with_programs(lab: &mut Lab, body: impl FnOnce(&mut Lab) + Send) {
    with_world(lab, |lab, _| body(lab));
}

/// The same, with what the programs know.
fn with_world(lab: &mut Lab, body: impl FnOnce(&mut Lab, &mut World) + Send) {
    assert_eq!(lab.ensure(&rules(), false), Outcome::Written);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut world = World::new();
            six(&mut world);
            let known = &mut world;
            lab.node.enter(move || {
                known.plane.attach_uplink("eth0", UPLINK).unwrap();
                known.plane.attach_pod_device("pod0", POD_DEVICE).unwrap();
            });
            body(lab, &mut world);
        });
        thread.join().unwrap();
    });
}

/// A connection with more than one segment each way, of which the origin sees this source.
fn echo_by_tcp(lab: &Lab, source: Ipv6Addr) {
    let listener = lab.origin.enter(|| TcpListener::bind((ORIGIN6, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        let mut received = vec![0; 100_000];
        stream.read_exact(&mut received).unwrap();
        stream.write_all(&received).unwrap();
        peer
    });
    let mut stream = lab.pod.enter(|| TcpStream::connect_timeout(&address, LONG).unwrap());
    stream.set_read_timeout(Some(LONG)).unwrap();
    let sent: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8).collect();
    stream.write_all(&sent).unwrap();
    let mut received = vec![0; sent.len()];
    stream.read_exact(&mut received).unwrap();
    assert!(sent == received);
    assert_eq!(server.join().unwrap().ip(), IpAddr::V6(source));
}

#[test]
fn what_a_pod_asked_for_comes_back_and_the_origin_sees_the_64_only() {
    let mut lab = Lab::new();
    with_programs(&mut lab, |lab| {
        // UDP, both ways, twice.
        let (pod, origin) = (udp(&lab.pod, POD6), udp(&lab.origin, ORIGIN6));
        for _ in 0..2 {
            pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
            let seen = sender(&origin);
            assert_eq!(seen.ip(), IpAddr::V6(pod_outside()));
            origin.send_to(b"answer", seen).unwrap();
            assert_eq!(sender(&pod), origin.local_addr().unwrap());
        }
        echo_by_tcp(lab, pod_outside());
        // Real programs: echo, and a datagram that has to be put together again.
        lab.pod.run(&format!("ping -6 -c 2 -i 0.2 -W 5 {ORIGIN6} && ping -6 -c 1 -W 5 -s 4000 {ORIGIN6}"));
        assert_eq!(lab.unasked(), 0);
    });
}

#[test]
fn an_error_about_what_a_pod_sent_comes_in() {
    let mut lab = Lab::new();
    with_programs(&mut lab, |lab| {
        let (pod, closed) = (udp(&lab.pod, POD6), udp(&lab.origin, ORIGIN6).local_addr().unwrap());
        pod.connect(closed).unwrap();
        pod.send(b"x").unwrap();
        let error = pod.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "the origin's port is closed");
    });
}

#[test]
fn what_nobody_asked_for_stays_out_and_without_the_table_it_would_not() {
    let mut lab = Lab::new();
    with_programs(&mut lab, |lab| {
        let (pod, origin) = (udp(&lab.pod, POD6), udp(&lab.origin, ORIGIN6));
        let stranger = udp(&lab.origin, ORIGIN6);
        let listener = lab.pod.enter(|| TcpListener::bind((POD6, 0)).unwrap());
        let port = pod.local_addr().unwrap().port();
        // The pod talks to the origin; another port of the same origin is a stranger all the same.
        pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
        assert_eq!(sender(&origin).port(), port);
        stranger.send_to(b"hello", (pod_outside(), port)).unwrap();
        let to_listener = SocketAddr::from((pod_outside(), listener.local_addr().unwrap().port()));
        let connected = lab.origin.enter(|| TcpStream::connect_timeout(&to_listener, SHORT));
        assert!(connected.is_err(), "a connection from outside");
        origin.send_to(b"answer", (pod_outside(), port)).unwrap();
        assert_eq!(sender(&pod), origin.local_addr().unwrap(), "and nothing before it");
        assert!(lab.unasked() >= 2);
        // What is seen above is the table's doing. Without it, a rule still keeps out what came from the uplink; what was asked
        // for waits for the table, as does what leaves.
        let stand = |wanted: &[(String, u32)]| {
            let node = &lab.node;
            node.enter(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                    tokio::spawn(connection);
                    let present = network::read(&handle).await.unwrap().rules;
                    let wanted = wanted.iter().cloned().collect();
                    assert_eq!(rule::bring(&handle, &wanted, &present).await, [].into());
                    assert_eq!(network::read(&handle).await.unwrap().rules, wanted);
                });
            });
        };
        stand(&[("eth0".to_owned(), MARK)]);
        origin.send_to(b"answer", (pod_outside(), port)).unwrap();
        assert_eq!(sender(&pod), origin.local_addr().unwrap(), "the table has taken the mark away");
        lab.node.run("nft delete table ip6 aegis");
        pod.set_read_timeout(Some(SHORT)).unwrap();
        for socket in [&stranger, &origin] {
            socket.send_to(b"hello", (pod_outside(), port)).unwrap();
            assert!(pod.recv(&mut [0; 8]).is_err(), "without the table");
        }
        pod.set_read_timeout(Some(LONG)).unwrap();
        stand(&[]);
        stranger.send_to(b"hello", (pod_outside(), port)).unwrap();
        assert_eq!(sender(&pod), stranger.local_addr().unwrap());
        assert_eq!(lab.ensure(&rules(), true), Outcome::Repaired);
    });
}

#[test]
fn of_a_pod_that_is_gone_nothing_is_asked_for_any_more() {
    let mut lab = Lab::new();
    with_programs(&mut lab, |lab| {
        let (pod, origin) = (udp(&lab.pod, POD6), udp(&lab.origin, ORIGIN6));
        let ask = || {
            pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
            sender(&origin)
        };
        let seen = ask();
        assert_eq!(lab.node.enter(|| conntrack::forget(FREE_POD6).unwrap()), 0, "another pod's");
        origin.send_to(b"answer", seen).unwrap();
        assert_eq!(sender(&pod), origin.local_addr().unwrap());
        assert_eq!(lab.node.enter(|| conntrack::forget(POD6).unwrap()), 1);
        pod.set_read_timeout(Some(SHORT)).unwrap();
        origin.send_to(b"for the next pod", seen).unwrap();
        assert!(pod.recv(&mut [0; 8]).is_err());
        assert_eq!(lab.unasked(), 1);
        // What asks anew is answered.
        origin.send_to(b"answer", ask()).unwrap();
        assert_eq!(sender(&pod), origin.local_addr().unwrap());
    });
}

#[test]
fn what_was_refused_is_forgotten_and_what_lives_is_not() {
    let mut lab = Lab::new();
    with_world(&mut lab, |lab, world| {
        let (live, refused, origin) = (udp(&lab.pod, POD6), udp(&lab.pod, POD6), udp(&lab.origin, ORIGIN6));
        live.send_to(b"question", origin.local_addr().unwrap()).unwrap();
        let seen = sender(&origin);
        refused.send_to(b"question", SocketAddr::from((DENIED6, 53))).unwrap();
        assert_eq!((forget_refused(lab, world), forget_refused(lab, world)), (1, 0));
        origin.send_to(b"answer", seen).unwrap();
        assert_eq!(sender(&live), origin.local_addr().unwrap());
    });
}

fn forget_refused(lab: &Lab, world: &World) -> usize {
    let map = |name| world.plane.map_fd(name).unwrap();
    let six = refused::Six { flows: map("FLOWS6"), suffixes: map("SUFFIXES"), seed: SEED };
    let forward = world.plane.forward().unwrap();
    lab.node.enter(|| refused::forget(&forward, six, MARK).unwrap())
}

/// The same things from a single address, by ports.
#[test]
fn from_a_single_address_what_a_pod_asked_for_comes_back_and_nothing_else_comes_in() {
    let mut lab = Lab::new();
    with_world(&mut lab, |lab, world| {
        single(world);
        let (pod, origin) = (udp(&lab.pod, POD6), udp(&lab.origin, ORIGIN6));
        for _ in 0..2 {
            pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
            let seen = sender(&origin);
            assert_eq!((seen.ip(), seen.port() >> 8), (IpAddr::V6(SINGLE), SLICE));
            origin.send_to(b"answer", seen).unwrap();
            assert_eq!(sender(&pod), origin.local_addr().unwrap());
        }
        echo_by_tcp(lab, SINGLE);
        let (asks, closed) = (udp(&lab.pod, POD6), udp(&lab.origin, ORIGIN6).local_addr().unwrap());
        asks.connect(closed).unwrap();
        asks.send(b"x").unwrap();
        let error = asks.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "the origin's port is closed");
        // A datagram that has to be put together again, both ways, and a path of several hops.
        lab.pod.run(&format!("ping -6 -c 2 -i 0.2 -W 5 {ORIGIN6} && ping -6 -c 1 -W 5 -s 4000 {ORIGIN6}"));
        let traced = lab.pod.output(&format!("traceroute -6 -n -q 1 -w 2 -U -p 33434 {ORIGIN6}"));
        assert!(traced.lines().last().unwrap().contains(&ORIGIN6.to_string()), "{traced}");
        // What was refused is forgotten, what lives is not, though it is in the table of IPv4.
        udp(&lab.pod, POD6).send_to(b"question", SocketAddr::from((DENIED6, 53))).unwrap();
        assert_eq!(forget_refused(lab, world), 1);
        pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
        let seen = sender(&origin);
        origin.send_to(b"answer", seen).unwrap();
        assert_eq!(sender(&pod), origin.local_addr().unwrap());
        // Strangers: another port of the same host, another address of its network.
        let stranger = udp(&lab.origin, ORIGIN6);
        stranger.send_to(b"hello", seen).unwrap();
        lab.origin.run("ip addr add 2001:db8:ffff::8/128 dev lo");
        udp(&lab.origin, "2001:db8:ffff::8".parse().unwrap()).send_to(b"hello", seen).unwrap();
        origin.send_to(b"answer", seen).unwrap();
        assert_eq!(sender(&pod), origin.local_addr().unwrap(), "and nothing before it");
        assert!(world.counted().contains(&("drop_no_flow", 2)));
        assert_eq!(lab.unasked(), 0);
    });
}

#[test]
fn without_the_table_nothing_that_is_covered_leaves() {
    let mut lab = Lab::new();
    with_programs(&mut lab, |lab| {
        lab.node.run("nft delete table ip6 aegis");
        let (pod, origin) = (udp(&lab.pod, POD6), udp(&lab.origin, ORIGIN6));
        origin.set_read_timeout(Some(SHORT)).unwrap();
        pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
        assert!(origin.recv(&mut [0; 8]).is_err(), "the CNI has translated it: the uplink drops it");
    });
}

#[test]
fn a_pod_that_nothing_covers_leaves_with_the_nodes_address() {
    let mut lab = Lab::new();
    lab.pod.run(&format!("ip addr add {FREE_POD6}/64 dev eth0 nodad"));
    with_programs(&mut lab, |lab| {
        let (pod, origin) = (udp(&lab.pod, FREE_POD6), udp(&lab.origin, ORIGIN6));
        pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
        let seen = sender(&origin);
        assert_eq!(seen.ip(), IpAddr::V6("2001:db8:eeee::2".parse().unwrap()));
        origin.send_to(b"answer", seen).unwrap();
        assert_eq!(sender(&pod), origin.local_addr().unwrap());
        // One that is not known yet is held.
        lab.pod.run(&format!("ip addr add {UNKNOWN_POD6}/64 dev eth0 nodad"));
        let unknown = udp(&lab.pod, UNKNOWN_POD6);
        origin.set_read_timeout(Some(SHORT)).unwrap();
        unknown.send_to(b"question", origin.local_addr().unwrap()).unwrap();
        assert!(origin.recv(&mut [0; 8]).is_err());
    });
}
