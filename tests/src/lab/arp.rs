//! Asking by ARP, as a router does: who answers?

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use ipnet::Ipv6Net;

use super::Lab;
use super::plan::{NODES, Node};
use super::process::{in_network, run};
use super::topology;

/// Ethernet type of ARP.
const ARP: u16 = 0x0806;
const BROADCAST: [u8; 6] = [0xff; 6];
/// Hardware address that asks, without an IPv4 address (a probe, RFC 5227): neither the question nor the answers may change what
/// the router or nodes have in their caches.
const ASKER: [u8; 6] = [2, 0, 0x0a, 0x63, 0, 0xfd];
/// Time for answers.
const WAIT: Duration = Duration::from_millis(150);

impl Lab {
    /// An address that is on the router's link to the nodes for as long as the value lives: the router finds out by ARP
    /// who has it, instead of sending it along a route.
    pub fn on_link(&self, address: Ipv4Addr) -> anyhow::Result<super::Undo<'_>> {
        let undo = super::Undo::by(format!("{address} on the link"), move || self.pin(address, &[]));
        topology::on_link(self.plan(), IpAddr::V4(address).into())?;
        Ok(undo)
    }

    /// The same for a /64: the router asks for each address in it.
    pub fn on_link6(&self, network: Ipv6Net) -> anyhow::Result<super::Undo<'_>> {
        let undo = super::Undo::by(format!("{network} on the link"), move || self.pin6(network, &[]));
        topology::on_link(self.plan(), network.into())?;
        Ok(undo)
    }

    /// Nodes that answer one question for an address.
    pub fn who_has(&self, address: Ipv4Addr) -> anyhow::Result<Vec<Node>> {
        let mut nodes = BTreeMap::new();
        for node in NODES {
            nodes.insert(topology::mac(self.plan(), node)?, node);
        }
        let answers = self.answers(address)?.into_iter();
        let node = |mac: String| {
            nodes.get(&mac).copied().with_context(|| format!("{mac} of no node answers for {address}"))
        };
        answers.map(node).collect()
    }

    /// The node to which the router sends packets for an address that is on its link, if it knows one.
    pub fn router_sends_to(&self, address: impl Into<IpAddr>) -> anyhow::Result<Option<Node>> {
        let address: IpAddr = address.into();
        let router = self.plan().namespace("router");
        let known = run("ip", &["-n", &router, "neigh", "show", &address.to_string(), "dev", "lan"])?;
        for node in NODES {
            if known.contains(&topology::mac(self.plan(), node)?) {
                return Ok(Some(node));
            }
        }
        Ok(None)
    }

    fn answers(&self, address: Ipv4Addr) -> anyhow::Result<BTreeSet<String>> {
        let router = topology::namespace_path(&self.plan().namespace("router"));
        in_network(&router, || Ok(ask(address)?))
    }
}

fn check(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn ask(address: Ipv4Addr) -> io::Result<BTreeSet<String>> {
    // SAFETY: plain arguments.
    let socket = unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
    };
    check(socket as libc::ssize_t)?;
    // SAFETY: just opened, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: the name ends with a zero byte; all-zero is a valid value of the structure.
    let (index, mut place) =
        unsafe { (libc::if_nametoindex(c"lan".as_ptr()), std::mem::zeroed::<libc::sockaddr_ll>()) };
    place.sll_family = libc::AF_PACKET as u16;
    place.sll_protocol = ARP.to_be();
    place.sll_ifindex = index.cast_signed();
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address outlives the call and has the length that is given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const place).cast(), length) };
    check(bound as libc::ssize_t)?;
    let all = libc::packet_mreq {
        mr_ifindex: place.sll_ifindex,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    // SAFETY: the option outlives the call and has the length that is given.
    let promiscuous = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            (&raw const all).cast(),
            size_of::<libc::packet_mreq>() as libc::socklen_t,
        )
    };
    check(promiscuous as libc::ssize_t)?;
    let mut frame = [&BROADCAST[..], &ASKER, &ARP.to_be_bytes(), &[0, 1, 8, 0, 6, 4, 0, 1]].concat();
    for part in [&ASKER[..], &[0; 4], &[0; 6], &address.octets(), &[0; 18]] {
        frame.extend_from_slice(part);
    }
    // SAFETY: the frame outlives the call and has the length that is given.
    check(unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) })?;
    let (end, mut found) = (Instant::now() + WAIT, BTreeSet::new());
    while Instant::now() < end {
        let mut answer = [0u8; 128];
        // SAFETY: the buffer outlives the call and has the length that is given.
        let received = unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
        match check(received) {
            Ok(length) if length >= 42 && answer[20..22] == [0, 2] && answer[28..32] == address.octets() => {
                let octets: Vec<String> = answer[22..28].iter().map(|octet| format!("{octet:02x}")).collect();
                found.insert(octets.join(":"));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}
