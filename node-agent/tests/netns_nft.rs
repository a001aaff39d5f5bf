//! The nftables table on real packets: pod, node and origin are network namespaces. What `pod_ingress` does (marking
//! packets for covered destinations) is done by a table of the test, what the CNI does (masquerade) by another.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_common::FlowKey;
use aegis_node_agent::conntrack;
use aegis_node_agent::nft::{self, Firewall, Outcome, Rules};
use aegis_node_agent::observed::to_map;
use netns_support::{Namespace, need_root};
use socket2::{Domain, Socket, Type};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ORIGIN: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Another node, and a service that leads to its tunnel.
const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 9);
const TUNNEL: u16 = 6081;
/// Interface indices on the node.
const POD_DEVICE: u32 = 70;
const UPLINK: u32 = 71;
const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(5);

struct Lab {
    pod: Namespace,
    node: Namespace,
    origin: Namespace,
    runtime: tokio::runtime::Runtime,
    firewall: Firewall,
    /// Calls nft in the node.
    wrapper: std::path::PathBuf,
}

fn rules() -> Rules {
    Rules {
        mark: 0x1000,
        pods: vec!["10.244.1.0/24".parse().unwrap()],
        pod_devices: [(POD_DEVICE, "pod0".to_owned())].into(),
        uplinks: [(UPLINK, "eth0".to_owned())].into(),
        hold: true,
        internal: vec!["10.96.0.0/16".parse().unwrap(), "10.244.0.0/16".parse().unwrap()],
        uncovered: Vec::new(),
        hosts: false,
        tunnel_port: TUNNEL,
        nodes: [NODE, PEER].into(),
        queries: Default::default(),
    }
}

impl Lab {
    fn new() -> Lab {
        need_root();
        let (pod, node, origin) = (Namespace::new("pod"), Namespace::new("node"), Namespace::new("origin"));
        node.link_with(&format!("pod0 index {POD_DEVICE}"), &pod, "eth0");
        node.link_with(&format!("eth0 index {UPLINK}"), &origin, "eth0");
        pod.run(&format!("ip addr add {POD}/24 dev eth0; ip route add default via 10.244.1.1"));
        node.run(&format!(
            "ip addr add 10.244.1.1/24 dev pod0; ip addr add {NODE}/24 dev eth0; ip route add {ORIGIN}/32 via 192.0.2.9"
        ));
        origin.run(&format!(
            "ip addr add 192.0.2.9/24 dev eth0; ip addr add {ORIGIN}/32 dev lo; ip route add 10.244.1.0/24 via {NODE}"
        ));
        node.run(
            "nft \"table ip cni { chain post { type nat hook postrouting priority srcnat; ip saddr 10.244.1.0/24 ip daddr != 10.244.0.0/16 masquerade; }; }\"",
        );
        let name = node.name.clone();
        let wrapper = std::env::temp_dir().join(format!("{name}-nft"));
        std::fs::write(&wrapper, format!("#!/bin/sh\nexec nsenter --net=/run/netns/{name} nft \"$@\"\n"))
            .unwrap();
        netns_support::run(&format!("chmod +x {}", wrapper.display()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let firewall = Firewall::new(wrapper.clone());
        let mut lab = Lab { pod, node, origin, runtime, firewall, wrapper };
        assert_eq!(lab.ensure(&rules(), false), Outcome::Written);
        lab
    }

    fn ensure(&mut self, rules: &Rules, check: bool) -> Outcome {
        self.runtime.block_on(self.firewall.ensure(rules, check)).unwrap()
    }

    /// What `pod_ingress` would do for a binding of the pod to the origin.
    fn bind(&self) {
        self.node.run(&format!(
            "nft \"table ip binding {{ chain pre {{ type filter hook prerouting priority raw; iifname pod0 ip daddr {ORIGIN} meta mark set meta mark or 0x1000; }}; }}\""
        ));
    }

    fn unbind(&self) {
        self.node.run("nft delete table ip binding");
    }

    fn pod_socket(&self) -> UdpSocket {
        self.pod.enter(|| UdpSocket::bind((POD, 0)).unwrap())
    }

    fn origin_socket(&self) -> UdpSocket {
        self.origin.enter(|| UdpSocket::bind((ORIGIN, 0)).unwrap())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.wrapper);
    }
}

/// Source with which the origin sees a datagram; `None` if it does not arrive.
fn source(from: &UdpSocket, to: &UdpSocket, patience: Duration) -> Option<Ipv4Addr> {
    to.set_read_timeout(Some(patience)).unwrap();
    from.send_to(b"x", to.local_addr().unwrap()).unwrap();
    match to.recv_from(&mut [0; 8]) {
        Ok((_, SocketAddr::V4(peer))) => Some(*peer.ip()),
        _ => None,
    }
}

#[test]
fn only_new_covered_flows_keep_the_pods_address() {
    let lab = Lab::new();
    let origin = lab.origin_socket();
    let before = lab.pod_socket();
    assert_eq!(source(&before, &origin, LONG), Some(NODE), "uncovered: the CNI's masquerade");

    lab.bind();
    // The origin never answered, so for conntrack the flow is as new as it was at its first packet.
    assert_eq!(source(&before, &origin, LONG), Some(NODE), "a flow from before the binding stays");
    let covered = lab.pod_socket();
    assert_eq!(source(&covered, &origin, LONG), Some(POD), "a new flow is Aegis's");

    lab.unbind();
    assert_eq!(source(&covered, &origin, LONG), Some(POD), "a flow of a deleted binding keeps its address");
    assert_eq!(source(&lab.pod_socket(), &origin, LONG), Some(NODE));
}

#[test]
fn the_next_pod_with_an_address_is_judged_anew() {
    let lab = Lab::new();
    let origin = lab.origin_socket();
    let bound = |port| lab.pod.enter(move || UdpSocket::bind((POD, port)).unwrap());
    let port = {
        let gone = lab.pod_socket();
        assert_eq!(source(&gone, &origin, LONG), Some(NODE), "the first pod is not covered");
        gone.local_addr().unwrap().port()
    };
    // A port of its own choice, as syslog senders and the like have.
    lab.bind();
    let next = bound(port);
    assert_eq!(source(&next, &origin, LONG), Some(NODE), "conntrack takes the next pod for the first");
    let others = lab.node.enter(|| conntrack::forget(Ipv4Addr::new(10, 244, 1, 3)).unwrap());
    assert_eq!(others, 0, "connections of other addresses stay");
    let forgotten = lab.node.enter(|| conntrack::forget(POD).unwrap());
    assert!(forgotten >= 1);
    assert_eq!(source(&next, &origin, LONG), Some(POD), "covered from its first packet");
    drop(next);
    lab.unbind();
    assert_eq!(source(&bound(port), &origin, LONG), Some(POD));
    lab.node.enter(|| conntrack::forget(POD).unwrap());
    assert_eq!(source(&bound(port), &origin, LONG), Some(NODE), "and the other way round");
}

#[test]
fn what_was_refused_is_judged_anew_once_nothing_covers_it() {
    let lab = Lab::new();
    let (origin, refused) = (lab.origin_socket(), lab.pod_socket());
    let other = lab.pod_socket();
    assert_eq!(source(&other, &origin, LONG), Some(NODE), "no flow of Aegis's: not even looked at");
    lab.bind();
    let covered = lab.pod_socket();
    assert_eq!(source(&covered, &origin, LONG), Some(POD));
    assert_eq!(source(&refused, &origin, LONG), Some(POD));
    lab.unbind();
    let number = |socket: &UdpSocket| socket.local_addr().unwrap().port();
    let found = lab.node.enter(|| conntrack::marked(0x1000).unwrap());
    let key = |from: &UdpSocket| FlowKey {
        local: to_map(POD),
        remote: to_map(ORIGIN),
        local_port: number(from),
        remote_port: number(&origin),
        protocol: 17,
        ..FlowKey::default()
    };
    let flows: BTreeSet<u16> = found.iter().map(|connection| connection.flow.local_port).collect();
    assert_eq!(flows, [number(&covered), number(&refused)].into());
    assert!(found.iter().all(|connection| [key(&covered), key(&refused)].contains(&connection.flow)));
    // One of them has a flow.
    let (with, without): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|connection| connection.flow == key(&covered));
    assert_eq!((with.len(), lab.node.enter(|| conntrack::remove(&without).unwrap())), (1, 1));
    assert_eq!(lab.node.enter(|| conntrack::remove(&without).unwrap()), 0, "gone is gone");
    assert_eq!(source(&covered, &origin, LONG), Some(POD), "it lives on");
    assert_eq!(source(&refused, &origin, LONG), Some(NODE), "nothing covers it");
}

#[test]
fn a_connection_in_place_of_one_that_ended_is_not_forgotten() {
    let lab = Lab::new();
    let listener = lab.origin.enter(|| TcpListener::bind((ORIGIN, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    let connect = |port: u16| {
        let client = lab.pod.enter(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
        client.bind(&SocketAddr::from((POD, port)).into()).unwrap();
        client.connect(&to.into()).unwrap();
        let (server, peer) = listener.accept().unwrap();
        (TcpStream::from(client), server, peer.ip())
    };
    let marked = || lab.node.enter(|| conntrack::marked(0x1000).unwrap());
    // Conntrack often gives the new one the memory, and so the number, of the old one, but not always.
    for port in 20_000..20_020 {
        lab.bind();
        let (mut client, server, source) = connect(port);
        assert_eq!(source, POD);
        assert_eq!(marked().len(), 1, "as long as it lives");
        drop(server);
        assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
        drop(client);
        let mut found = marked();
        for _ in 0..100 {
            if found.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
            found = marked();
        }
        lab.unbind();
        let (mut client, mut server, source) = connect(port);
        assert_eq!(source, NODE);
        assert_eq!(lab.node.enter(|| conntrack::remove(&found).unwrap()), 0, "port {port}");
        server.write_all(b"x").unwrap();
        assert_eq!(client.read(&mut [0; 8]).unwrap(), 1);
    }
}

#[test]
fn a_flow_that_began_while_the_table_was_missing_does_not_get_out_afterwards() {
    let mut lab = Lab::new();
    // What the program at the uplink does, after conntrack: a marked packet with another source goes nowhere.
    lab.node.run(&format!(
        "nft \"table netdev leakguard {{ chain out {{ type filter hook egress device eth0 priority 0; \
         meta mark and 0x1000 == 0x1000 ip saddr != {POD} drop; }}; }}\""
    ));
    let origin = lab.origin_socket();
    lab.bind();
    lab.node.run("nft delete table ip aegis");
    let between = lab.pod_socket();
    assert_eq!(source(&between, &origin, SHORT), None, "dropped by the guard while the table is missing");
    assert_eq!(lab.ensure(&rules(), true), Outcome::Repaired);
    assert_eq!(
        source(&between, &origin, SHORT),
        None,
        "and its masquerade does not come into use afterwards"
    );
    assert_eq!(source(&lab.pod_socket(), &origin, LONG), Some(POD), "new flows are Aegis's again");
}

#[test]
fn other_bits_of_both_marks_stay() {
    let lab = Lab::new();
    lab.node.run("nft \"table ip other { chain pre { type filter hook prerouting priority -310; meta mark set 0x24; }; \
        chain post { type filter hook postrouting priority 300; meta mark 0x1024 counter; meta mark 0x24 counter; }; \
        chain early { type filter hook prerouting priority -160; ct mark set 0x8; }; \
        chain late { type filter hook postrouting priority 301; ct mark 0x3008 counter; ct mark 0x2008 counter; }; }\"");
    lab.bind();
    let origin = lab.origin_socket();
    assert_eq!(source(&lab.pod_socket(), &origin, LONG), Some(POD));
    let counted = lab.node.output("nft list table ip other");
    for line in ["meta mark 0x00001024 counter packets 1", "ct mark 0x00003008 counter packets 1"] {
        assert!(counted.contains(line), "{line} in {counted}");
    }
}

#[test]
fn replies_of_inbound_connections_are_not_marked() {
    let lab = Lab::new();
    lab.bind();
    lab.node.run("nft \"table ip watch { chain post { type filter hook postrouting priority 300; \
        tcp sport 8080 meta mark and 0x1000 == 0x1000 counter; tcp sport 8080 meta mark and 0x1000 == 0 counter; }; }\"");
    let listener = lab.pod.enter(|| TcpListener::bind((POD, 8080)).unwrap());
    let mut client = lab.origin.enter(|| {
        let address = SocketAddr::from((POD, 8080));
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((ORIGIN, 0)).into()).unwrap();
        socket.connect_timeout(&address.into(), LONG).unwrap();
        TcpStream::from(socket)
    });
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"hello").unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    let counted = lab.node.output("nft list table ip watch");
    assert!(counted.contains("== 0x00001000 counter packets 0"), "{counted}");
    assert!(!counted.contains("== 0x00000000 counter packets 0"), "{counted}");
}

#[test]
fn covered_packets_leave_only_through_devices_with_programs() {
    let mut lab = Lab::new();
    lab.bind();
    let origin = lab.origin_socket();
    let without = Rules { uplinks: Default::default(), ..rules() };
    assert_eq!(lab.ensure(&without, false), Outcome::Written);
    assert_eq!(source(&lab.pod_socket(), &origin, SHORT), None);
    assert_eq!(lab.ensure(&rules(), false), Outcome::Written);
    assert_eq!(source(&lab.pod_socket(), &origin, LONG), Some(POD));
}

#[test]
fn new_flows_of_a_device_without_program_are_held_while_something_is_covered() {
    let mut lab = Lab::new();
    let origin = lab.origin_socket();
    let old = lab.pod_socket();
    assert_eq!(source(&old, &origin, LONG), Some(NODE));
    // The origin answers, so that the flow is established.
    let reply_to = lab.pod_socket();
    origin.set_read_timeout(Some(LONG)).unwrap();
    reply_to.send_to(b"x", origin.local_addr().unwrap()).unwrap();
    let (_, peer) = origin.recv_from(&mut [0; 8]).unwrap();
    origin.send_to(b"y", peer).unwrap();
    reply_to.set_read_timeout(Some(LONG)).unwrap();
    reply_to.recv_from(&mut [0; 8]).unwrap();

    let unprogrammed = Rules { pod_devices: Default::default(), ..rules() };
    lab.ensure(&unprogrammed, false);
    assert_eq!(source(&lab.pod_socket(), &origin, SHORT), None, "new flow");
    assert_eq!(source(&reply_to, &origin, LONG), Some(NODE), "established flow");
    let known = Rules { uncovered: vec![POD.into()], ..unprogrammed.clone() };
    lab.ensure(&known, false);
    assert_eq!(source(&lab.pod_socket(), &origin, LONG), Some(NODE), "known to be uncovered");
    lab.ensure(&Rules { hold: false, ..unprogrammed }, false);
    assert_eq!(source(&lab.pod_socket(), &origin, LONG), Some(NODE), "nothing is covered");
}

/// CNIs derive a veth's name from the pod's: one that was made anew while the agent was away has no program.
#[test]
fn a_device_made_anew_under_its_old_name_is_held() {
    let mut lab = Lab::new();
    let origin = lab.origin_socket();
    assert_eq!(source(&lab.pod_socket(), &origin, LONG), Some(NODE), "the program knows it is not covered");
    lab.node.run("ip link del pod0");
    lab.node.link("pod0", &lab.pod, "eth0");
    lab.pod.run(&format!("ip addr add {POD}/24 dev eth0; ip route add default via 10.244.1.1"));
    lab.node.run("ip addr add 10.244.1.1/24 dev pod0");
    assert_eq!(source(&lab.pod_socket(), &origin, SHORT), None);
    assert_eq!(lab.ensure(&rules(), true), Outcome::Unchanged, "a device that goes is no repair");
    assert!(lab.firewall.drops()["no_program_in"] >= 1, "{:?}", lab.firewall.drops());
    let listed = lab.node.output("ip -o link show pod0");
    let index = listed.split(':').next().unwrap().parse().unwrap();
    let programmed = Rules { pod_devices: [(index, "pod0".to_owned())].into(), ..rules() };
    lab.ensure(&programmed, false);
    assert_eq!(source(&lab.pod_socket(), &origin, LONG), Some(NODE));
    assert_eq!(lab.ensure(&programmed, true), Outcome::Unchanged);
}

#[test]
fn pods_do_not_get_to_the_tunnel_of_a_node() {
    let mut lab = Lab::new();
    let tunnel = lab.origin.enter(|| UdpSocket::bind((PEER, TUNNEL)).unwrap());
    let elsewhere = lab.origin.enter(|| UdpSocket::bind((ORIGIN, TUNNEL)).unwrap());
    tunnel.set_read_timeout(Some(SHORT)).unwrap();
    elsewhere.set_read_timeout(Some(LONG)).unwrap();
    let arrives = |socket: &UdpSocket| socket.recv_from(&mut [0; 8]).is_ok();
    lab.node.run(&format!(
        "nft \"table ip services {{ chain pre {{ type nat hook prerouting priority dstnat; ip daddr {SERVICE} udp dport 53 dnat to {PEER}:{TUNNEL}; }}; }}\""
    ));
    // Straight, by way of a service, and with the address of another node as a forged source.
    lab.pod_socket().send_to(b"x", (PEER, TUNNEL)).unwrap();
    lab.pod_socket().send_to(b"x", (SERVICE, 53)).unwrap();
    lab.pod.run("ip addr add 192.0.2.77/32 dev eth0");
    let forged = lab.pod.enter(|| UdpSocket::bind((Ipv4Addr::new(192, 0, 2, 77), 0)).unwrap());
    forged.send_to(b"x", (PEER, TUNNEL)).unwrap();
    assert!(!arrives(&tunnel));
    lab.ensure(&rules(), true);
    assert_eq!(lab.firewall.drops()["tunnel"], 3);
    // From outside by way of a service of this node: it would arrive with this node's address.
    let outside = lab.origin_socket();
    lab.origin.run(&format!("ip route add {SERVICE}/32 via {NODE}"));
    outside.send_to(b"x", (SERVICE, 53)).unwrap();
    assert!(!arrives(&tunnel));

    lab.pod_socket().send_to(b"x", (ORIGIN, TUNNEL)).unwrap();
    assert!(arrives(&elsewhere), "the port is only the nodes' own");
    lab.node.enter(|| UdpSocket::bind((NODE, 0)).unwrap()).send_to(b"x", (PEER, TUNNEL)).unwrap();
    assert!(arrives(&tunnel), "a node speaks to nodes");
    lab.ensure(&Rules { nodes: [NODE].into(), ..rules() }, false);
    lab.pod_socket().send_to(b"x", (PEER, TUNNEL)).unwrap();
    assert!(arrives(&tunnel), "without the rule it does arrive");
}

/// The hook is never empty: no connection begins without being judged, however often the table changes.
#[test]
fn a_table_that_changes_judges_every_connection() {
    let mut lab = Lab::new();
    lab.bind();
    let origin = lab.origin_socket();
    let to = origin.local_addr().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sockets = scope.spawn(|| {
            lab.pod.enter(|| {
                let mut count = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    UdpSocket::bind((POD, 0)).unwrap().send_to(b"x", to).unwrap();
                    count += 1;
                }
                count
            })
        });
        for turn in 0..200 {
            let internal = (0..turn % 5).map(|net| format!("10.{net}.0.0/16").parse().unwrap()).collect();
            let uplinks = [(UPLINK, "eth0"), (UPLINK + 1, "eth1")].into_iter().take(1 + turn % 2);
            let uplinks = uplinks.map(|(index, name)| (index, name.to_owned())).collect();
            let rules = Rules { hold: turn % 2 == 0, internal, uplinks, ..rules() };
            // An agent that starts writes everything.
            if turn % 8 == 0 {
                lab.firewall = Firewall::new(lab.wrapper.clone());
            }
            let outcome = lab.runtime.block_on(lab.firewall.ensure(&rules, false)).unwrap();
            assert_ne!(outcome, Outcome::Repaired);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(sockets.join().unwrap() > 1000);
    });
    let count = |what: &str| {
        let listed =
            lab.node.output(&format!("conntrack -L -p udp {what} 2>/dev/null | grep -c src={POD} || true"));
        listed.trim().parse::<u32>().unwrap()
    };
    assert_eq!(count(&format!("--mark {:#x}", 0x3000)), count(""), "all are judged, and covered");
    assert_eq!(count(&format!("--reply-dst {NODE}")), 0, "and none has the CNI's translation");
}

#[test]
fn a_table_with_chains_of_another_kind_is_replaced() {
    let mut lab = Lab::new();
    lab.node.run(
        "nft delete table ip aegis; nft \"table ip aegis { set pods { type inet_service; }; chain forward { type filter hook input priority 5; }; }\"",
    );
    assert_eq!(lab.ensure(&rules(), true), Outcome::Repaired);
    lab.bind();
    assert_eq!(source(&lab.pod_socket(), &lab.origin_socket(), LONG), Some(POD));
}

#[test]
fn chains_of_earlier_versions_go() {
    let mut lab = Lab::new();
    lab.node.run("nft \"table ip aegis { chain guard { type filter hook forward priority -10; drop; }; }\"");
    lab.firewall = Firewall::new(lab.wrapper.clone());
    assert_eq!(lab.ensure(&rules(), false), Outcome::Written);
    assert!(!lab.node.output("nft list table ip aegis").contains("guard"));
    lab.bind();
    assert_eq!(source(&lab.pod_socket(), &lab.origin_socket(), LONG), Some(POD));
}

#[test]
fn a_table_that_was_changed_or_removed_is_noticed_and_put_back() {
    let mut lab = Lab::new();
    assert_eq!(lab.ensure(&rules(), false), Outcome::Unchanged);
    assert_eq!(lab.ensure(&rules(), true), Outcome::Unchanged);
    lab.bind();
    let origin = lab.origin_socket();

    let file = std::fs::File::open(format!("/run/netns/{}", lab.node.name)).unwrap();
    let (seen, notified) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(nft::watch(|| _ = seen.send(())))
    });
    notified.recv_timeout(LONG).unwrap();
    assert!(notified.try_recv().is_err());
    for damage in ["nft flush ruleset", "nft delete table ip aegis", "nft flush chain ip aegis decide"] {
        lab.node.run("nft add table ip unrelated; nft delete table ip unrelated");
        assert!(notified.recv_timeout(SHORT).is_err(), "another table is nobody's business");
        lab.node.run(damage);
        notified.recv_timeout(LONG).unwrap();
        assert_eq!(lab.ensure(&rules(), true), Outcome::Repaired, "{damage}");
        while notified.recv_timeout(SHORT).is_ok() {}
    }
    lab.bind();
    assert_eq!(source(&lab.pod_socket(), &origin, LONG), Some(POD));
}
