//! Connections of this node's sockets from given addresses, as the kernel lists them (`NETLINK_SOCK_DIAG`). What is left of a
//! closed one counts, and so does a socket that is bound and not connected yet, where the kernel tells (Linux 6.8).

use crate::conntrack::{DUMP, NLMSG_DONE, NLMSG_ERROR, REQUEST, connect, messages};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};
use std::time::{Duration, Instant};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const TCP: u8 = 6;
/// All states of TCP (`include/net/tcp_states.h`) but that of one who listens.
const STATES: u32 = 0x3ffe & !(1 << 10);
/// Bytes of `inet_diag_req_v2`, and in an `inet_diag_msg` where ports and addresses are.
const REQUEST_LENGTH: usize = 56;
const PORTS: usize = 4;
const ADDRESSES: usize = 8;

/// Shortest time between two looks at the sockets, and for how long one may be under way that a program has just given a port.
pub const PERIOD: Duration = Duration::from_secs(1);
/// A look is followed by a pause of this many times its own duration.
const REST: u32 = 20;

/// When to look again after a look that began then and is over now.
pub fn next_look(began: Instant) -> Instant {
    began + (began.elapsed() * REST).max(PERIOD)
}

/// Both ends of a connection; the far one is zero where there is none yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection {
    /// This node's.
    pub near: SocketAddrV4,
    /// The other.
    pub far: SocketAddrV4,
}

/// Connections from these addresses, in the network namespace of the calling thread.
pub fn list(from: &BTreeSet<Ipv4Addr>) -> io::Result<Vec<Connection>> {
    let socket = connect(NETLINK_SOCK_DIAG)?;
    let mut found = Vec::new();
    // A socket of IPv6 may have an IPv4 address too.
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        socket.send(&request(family), 0)?;
        'answer: loop {
            let (datagram, _) = socket.recv_from_full()?;
            for message in messages(&datagram) {
                match message.kind {
                    NLMSG_DONE => break 'answer,
                    NLMSG_ERROR => message.error()?,
                    _ => found.extend(connection(message.body).filter(|it| from.contains(it.near.ip()))),
                }
            }
        }
    }
    Ok(found)
}

fn request(family: u8) -> Vec<u8> {
    let length = 16 + REQUEST_LENGTH;
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend((REQUEST | DUMP).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family, TCP, 0, 0]);
    message.extend(STATES.to_ne_bytes());
    message.resize(length, 0);
    message
}

fn connection(message: &[u8]) -> Option<Connection> {
    let port = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| -> Option<Ipv4Addr> {
        let octets: [u8; 16] = message.get(at..at + 16)?.try_into().ok()?;
        if message.first() == Some(&(libc::AF_INET as u8)) {
            return octets.first_chunk().map(|octets: &[u8; 4]| Ipv4Addr::from(*octets));
        }
        Ipv6Addr::from(octets).to_ipv4_mapped()
    };
    let near = SocketAddrV4::new(address(ADDRESSES)?, port(PORTS)?);
    let far = address(ADDRESSES + 16).unwrap_or(Ipv4Addr::UNSPECIFIED);
    Some(Connection { near, far: SocketAddrV4::new(far, port(PORTS + 2)?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    const NEAR: Ipv4Addr = Ipv4Addr::new(127, 9, 8, 7);

    #[test]
    fn the_kernel_lists_connections_and_what_is_left_of_them_but_nobody_who_listens() {
        let listener = TcpListener::bind((NEAR, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let from: BTreeSet<Ipv4Addr> = [NEAR].into();
        let connections = || {
            let mut all = list(&from).unwrap();
            all.sort();
            all
        };
        assert_eq!(connections(), []);
        // From an address that is not asked for, so that only the far end is.
        let near = TcpStream::connect((NEAR, port)).unwrap();
        let far = listener.accept().unwrap().0;
        let found = connections();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(std::net::SocketAddr::V4(found[0].near), far.local_addr().unwrap());
        assert_eq!(std::net::SocketAddr::V4(found[0].far), near.local_addr().unwrap());
        drop(far);
        drop(near);
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert_eq!(connections(), found, "it waits for stragglers");
    }
}
