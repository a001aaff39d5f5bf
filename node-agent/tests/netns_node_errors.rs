//! What the node itself has to say about a flow of a pod, and flows that conntrack has forgotten: on real devices, with the whole
//! data plane. Whatever happens, the origin sees the egress address only.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_common::Timeouts;
use aegis_node_agent::conntrack;
use netns_support::Namespace;
use netns_support::path::{Aegis, EGRESS, NODE, ORIGIN, POD, Row};
use socket2::{Domain, Protocol, Socket, Type};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

/// As long as a packet may take. (A node waits three seconds for a pod to answer ARP.)
const LONG: Duration = Duration::from_secs(8);
const SHORT: Duration = Duration::from_millis(300);

fn udp(namespace: &Namespace, address: Ipv4Addr) -> UdpSocket {
    let socket = namespace.enter(|| UdpSocket::bind((address, 0)).unwrap());
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket
}

/// Opens a flow: the pod's socket, the origin's, and who the origin sees.
fn flow(row: &Row) -> (UdpSocket, UdpSocket, SocketAddr) {
    let (pod, origin) = (udp(&row.pod, POD), udp(&row.origin, ORIGIN));
    let seen = ask(&pod, &origin);
    assert_eq!(seen.ip(), IpAddr::V4(EGRESS));
    origin.connect(seen).unwrap();
    (pod, origin, seen)
}

fn ask(pod: &UdpSocket, origin: &UdpSocket) -> SocketAddr {
    pod.send_to(b"question", origin.local_addr().unwrap()).unwrap();
    origin.recv_from(&mut [0; 16]).unwrap().1
}

/// Sees all ICMP that reaches the origin.
struct Icmp(Socket);

impl Icmp {
    fn at(namespace: &Namespace) -> Icmp {
        let socket =
            namespace.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap());
        socket.set_read_timeout(Some(LONG)).unwrap();
        Icmp(socket)
    }

    /// The next error: sender, type, code, and to whom the packet was that it quotes; `None` if none comes.
    fn next(&self) -> Option<(IpAddr, u8, u8, SocketAddr)> {
        let mut packet = [MaybeUninit::<u8>::uninit(); 1500];
        let (length, from) = self.0.recv_from(&mut packet).ok()?;
        // SAFETY: the kernel has written so many bytes.
        let packet = unsafe { std::slice::from_raw_parts(packet.as_ptr().cast::<u8>(), length) };
        let quoted = &packet[28..];
        let to: [u8; 4] = quoted[16..20].try_into().unwrap();
        let port = u16::from_be_bytes([quoted[22], quoted[23]]);
        Some((from.as_socket().unwrap().ip(), packet[20], packet[21], SocketAddr::from((to, port))))
    }
}

/// As agents do when a pod is gone.
fn forget(row: &Row) {
    assert!(row.node.enter(|| conntrack::forget(POD).unwrap()) >= 1);
}

#[test]
fn a_late_packet_for_a_pod_that_is_gone_is_answered_by_the_egress_address() {
    for forgotten in [false, true] {
        let row = Row::new();
        let _aegis = Aegis::on(&row, 11, Timeouts::default());
        let icmp = Icmp::at(&row.origin);
        let (_pod, origin, seen) = flow(&row);
        row.pod.run(&format!("ip addr del {POD}/24 dev eth0"));
        row.node.run("ip neigh flush dev pod0");
        if forgotten {
            forget(&row);
        }
        origin.send(b"late").unwrap();
        assert_eq!(icmp.next(), Some((EGRESS.into(), 3, 1, seen)), "forgotten: {forgotten}");
    }
}

#[test]
fn an_origin_learns_that_the_link_to_the_pod_is_narrower() {
    let row = Row::new();
    let _aegis = Aegis::on(&row, 11, Timeouts::default());
    let icmp = Icmp::at(&row.origin);
    let (pod, origin, seen) = flow(&row);
    row.node.run("ip link set pod0 mtu 1300");
    // The kernel forbids others to fragment what it sends, and does it itself once it knows that it must.
    origin.send(&[7; 1400]).unwrap();
    assert_eq!(icmp.next(), Some((EGRESS.into(), 3, 4, seen)));
    pod.set_read_timeout(Some(SHORT)).unwrap();
    assert!(pod.recv(&mut [0; 1500]).is_err(), "the first is lost");
    pod.set_read_timeout(Some(LONG)).unwrap();
    let sent = origin.send(&[7; 1400]).or_else(|_| origin.send(&[7; 1400])).unwrap();
    assert_eq!(pod.recv(&mut [0; 1500]).unwrap(), sent);
}

#[test]
fn a_flow_that_conntrack_has_forgotten_goes_on_whoever_speaks_first() {
    let row = Row::new();
    let _aegis = Aegis::on(&row, 11, Timeouts::default());
    let (pod, origin, seen) = flow(&row);
    forget(&row);
    assert_eq!(ask(&pod, &origin), seen, "the pod speaks first");
    forget(&row);
    for turn in 0..2 {
        origin.send(b"hello").unwrap();
        assert_eq!(pod.recv_from(&mut [0; 16]).unwrap().1.ip(), IpAddr::V4(ORIGIN));
        // The origin's socket is connected: it takes nothing from another address.
        pod.send_to(b"answer", origin.local_addr().unwrap()).unwrap();
        assert_eq!(origin.recv(&mut [0; 16]).unwrap(), 6, "turn {turn}");
    }
}

#[test]
fn a_connection_that_conntrack_has_forgotten_goes_on_when_the_origin_speaks_first() {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    let row = Row::new();
    let _aegis = Aegis::on(&row, 11, Timeouts::default());
    let listener = row.origin.enter(|| TcpListener::bind((ORIGIN, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    let mut client = row.pod.enter(|| TcpStream::connect_timeout(&to, LONG).unwrap());
    let (mut server, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), IpAddr::V4(EGRESS));
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(LONG)).unwrap();
    }
    let icmp = Icmp::at(&row.origin);
    for first in [&mut server as &mut dyn Write, &mut client] {
        forget(&row);
        first.write_all(b"hello").unwrap();
    }
    let mut read = [0; 5];
    client.read_exact(&mut read).unwrap();
    server.read_exact(&mut read).unwrap();
    icmp.0.set_read_timeout(Some(SHORT)).unwrap();
    assert_eq!(icmp.next(), None, "nobody complained, {NODE} least of all");
}
