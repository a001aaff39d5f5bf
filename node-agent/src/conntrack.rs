//! Forgetting connections: those of a pod that is gone, and those that were refused.
//!
//! Conntrack gives later packets of a connection the judgement of its first one. A pod that gets the address, and by
//! chance the port, of an earlier pod would inherit that pod's: leave with the node's address though a binding covers
//! it, or be refused though none does. And a pod's datagrams that were refused would be refused for as long as it goes on
//! sending, though the binding is gone.

use crate::observed::{from_map, from_map6, to_map, to_map6};
use aegis_common::{Flow6Key, FlowKey};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`, and `..._DELETE`.
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;
const IPV4: u8 = libc::AF_INET as u8;
const IPV6: u8 = libc::AF_INET6 as u8;
pub(crate) const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
pub(crate) const DUMP: u16 = 0x300;
pub(crate) const NLMSG_ERROR: u16 = 2;
pub(crate) const NLMSG_DONE: u16 = 3;

/// Attributes (`linux/netfilter/nfnetlink_conntrack.h`).
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_PROTOINFO: u16 = 4;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTO_ICMP_ID: u16 = 4;
const CTA_PROTO_ICMPV6_ID: u16 = 7;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// Only the source address of the tuple counts.
const FLAG_IP_SRC: u32 = 1;
/// The same of its destination.
const FLAG_IP_DST: u32 = 2;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
/// `TCP_CONNTRACK_TIME_WAIT` and `TCP_CONNTRACK_CLOSE` (`linux/netfilter/nf_conntrack_tcp.h`).
const ENDED: [u8; 2] = [7, 8];
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// Bytes of `nlmsghdr` and `nfgenmsg`.
const MESSAGE_HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
/// Longest time that one answer may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// A connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// As `FORWARD` would know it: what the uplink sees of its packets. Only of IPv4.
    pub flow: FlowKey,
    /// As `FLOWS6` would, of IPv6.
    pub flow6: Option<Flow6Key>,
    /// `AF_INET` or `AF_INET6`.
    family: u8,
    /// Who opened it, over IPv6.
    source6: Option<Ipv6Addr>,
    /// Who opened it, to where, and to which port there.
    opened: Option<(IpAddr, IpAddr, u16)>,
    /// What names it: its original tuple, its number and its zone, as the kernel wrote them.
    identity: Vec<u8>,
    /// A TCP connection of which nothing goes on.
    ended: bool,
}

/// Removes every connection that was opened from this address; over IPv4 also those to it, since one of which conntrack has seen an
/// answer first (it had forgotten it) is of that direction. Gives how many there were.
///
/// Of IPv4 the kernel filters (Linux 5.8); its filter for IPv6 gives all but what is asked for (`ctnetlink_filter_match_tuple`
/// takes "equal" for "different"), so these are filtered here. Since it cannot remove by such a filter before 6.11, each is removed
/// by itself.
pub fn forget(address: impl Into<IpAddr>) -> io::Result<usize> {
    let socket = connect(NETLINK_NETFILTER)?;
    let found = match address.into() {
        IpAddr::V4(address) => {
            let mut found = Vec::new();
            for (field, flag) in [(CTA_IP_V4_SRC, FLAG_IP_SRC), (CTA_IP_V4_DST, FLAG_IP_DST)] {
                found.extend(list(&socket, IPV4, &with_address(address, field, flag))?);
            }
            found
        }
        IpAddr::V6(address) => {
            let mut all = list(&socket, IPV6, &[])?;
            all.retain(|connection| connection.source6 == Some(address));
            all
        }
    };
    remove_from(&socket, &found)
}

/// Removes connections that pods have with a resolver at port 53, but for those from these addresses. Gives how many there were.
pub fn forget_queries(resolver: IpAddr, but_for: &BTreeSet<IpAddr>) -> io::Result<usize> {
    let socket = connect(NETLINK_NETFILTER)?;
    let mut found = match resolver {
        IpAddr::V4(address) => list(&socket, IPV4, &with_address(address, CTA_IP_V4_DST, FLAG_IP_DST))?,
        IpAddr::V6(_) => list(&socket, IPV6, &[])?,
    };
    found.retain(|connection| {
        let Some((from, to, port)) = connection.opened else { return false };
        port == 53 && to == resolver && !but_for.contains(&from)
    });
    remove_from(&socket, &found)
}

/// A filter for connections with this address in a field of their original tuple.
fn with_address(address: Ipv4Addr, field: u16, flag: u32) -> Vec<u8> {
    let address = attribute(field, &address.octets());
    let tuple = attribute(CTA_TUPLE_ORIG | NESTED, &attribute(CTA_TUPLE_IP | NESTED, &address));
    let flags = [
        attribute(CTA_FILTER_ORIG_FLAGS, &flag.to_ne_bytes()),
        attribute(CTA_FILTER_REPLY_FLAGS, &0u32.to_ne_bytes()),
    ];
    let filter = attribute(CTA_FILTER | NESTED, &flags.concat());
    [tuple, filter].concat()
}

/// Connections whose mark has this bit, but for those that have ended: the next SYN of such a one makes a new connection, which
/// is judged anew. It often gets the memory of the old one, and with it the number: to remove that would end the new one.
pub fn marked(mark: u32) -> io::Result<Vec<Connection>> {
    let filter =
        [attribute(CTA_MARK, &mark.to_be_bytes()), attribute(CTA_MARK_MASK, &mark.to_be_bytes())].concat();
    let socket = connect(NETLINK_NETFILTER)?;
    let mut found = list(&socket, IPV4, &filter)?;
    found.extend(list(&socket, IPV6, &filter)?);
    found.retain(|connection| !connection.ended);
    Ok(found)
}

/// Removes connections. Gives how many there still were.
pub fn remove(connections: &[Connection]) -> io::Result<usize> {
    remove_from(&connect(NETLINK_NETFILTER)?, connections)
}

fn remove_from(socket: &Socket, connections: &[Connection]) -> io::Result<usize> {
    let mut removed = 0;
    for Connection { family, identity, .. } in connections {
        send(socket, *family, DELETE, REQUEST | ACKNOWLEDGE, identity)?;
        match acknowledged(socket) {
            Ok(()) => removed += 1,
            // It ended by itself meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// A socket to the kernel, which must answer in time.
pub(crate) fn connect(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // SAFETY: the descriptor is the socket's, which outlives the call.
    let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    let seconds = i64::try_from(TIMEOUT.as_secs()).unwrap_or(1);
    let timeout = nix::sys::time::TimeVal::new(seconds, 0);
    nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &timeout)?;
    Ok(socket)
}

fn list(socket: &Socket, family: u8, filter: &[u8]) -> io::Result<Vec<Connection>> {
    send(socket, family, GET, REQUEST | DUMP, filter)?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for message in messages(&datagram) {
            match message.kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => message.error()?,
                _ => {
                    let body = message.body.get(FAMILY_HEADER..).unwrap_or_default();
                    found.push(Connection { family, ..connection(body) });
                }
            }
        }
    }
}

fn connection(body: &[u8]) -> Connection {
    let mut connection = Connection::default();
    for (kind, whole) in attributes(body) {
        if [CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE].contains(&kind) {
            connection.identity.extend(whole);
        }
        if kind == CTA_TUPLE_ORIG {
            connection.source6 = source6(payload(whole));
            connection.opened = Some(opened(payload(whole)));
        }
        if kind == CTA_TUPLE_REPLY {
            (connection.flow, connection.flow6) = flow(payload(whole));
        }
        if kind == CTA_PROTOINFO {
            connection.ended = has_ended(payload(whole));
        }
    }
    connection
}

fn opened(original: &[u8]) -> (IpAddr, IpAddr, u16) {
    // Read as that of a reply: the far end is where it comes from.
    let (tuple, six) = flow(original);
    match six {
        Some(six) => (from_map6(six.remote).into(), from_map6(six.local).into(), tuple.local_port),
        None => (from_map(tuple.remote).into(), from_map(tuple.local).into(), tuple.local_port),
    }
}

fn source6(original: &[u8]) -> Option<Ipv6Addr> {
    address6(original, CTA_IP_V6_SRC)
}

fn address6(tuple: &[u8], field: u16) -> Option<Ipv6Addr> {
    let addresses = attributes(tuple).filter(|(kind, _)| *kind == CTA_TUPLE_IP);
    let mut fields = addresses.flat_map(|(_, whole)| attributes(payload(whole)));
    let (_, whole) = fields.find(|(kind, _)| *kind == field)?;
    payload(whole).first_chunk().map(|octets: &[u8; 16]| Ipv6Addr::from(*octets))
}

fn has_ended(protocol: &[u8]) -> bool {
    let tcp = attributes(protocol).filter(|(kind, _)| *kind == CTA_PROTOINFO_TCP);
    let mut fields = tcp.flat_map(|(_, whole)| attributes(payload(whole)));
    fields.any(|(kind, whole)| {
        kind == CTA_PROTOINFO_TCP_STATE && payload(whole).first().is_some_and(|state| ENDED.contains(state))
    })
}

/// The flow whose replies have this tuple: after all translation of the host's, before that of the uplink.
fn flow(reply: &[u8]) -> (FlowKey, Option<Flow6Key>) {
    let mut flow = FlowKey::default();
    for (kind, part) in attributes(reply) {
        for (inner, whole) in attributes(payload(part)) {
            let value = payload(whole);
            let address =
                || value.first_chunk().map_or(0, |octets: &[u8; 4]| to_map(Ipv4Addr::from(*octets)));
            let port = || value.first_chunk().map_or(0, |octets| u16::from_be_bytes(*octets));
            match (kind, inner) {
                (CTA_TUPLE_IP, CTA_IP_V4_SRC) => flow.remote = address(),
                (CTA_TUPLE_IP, CTA_IP_V4_DST) => flow.local = address(),
                (CTA_TUPLE_PROTO, CTA_PROTO_NUM) => flow.protocol = value.first().copied().unwrap_or(0),
                (CTA_TUPLE_PROTO, CTA_PROTO_SRC_PORT) => flow.remote_port = port(),
                (CTA_TUPLE_PROTO, CTA_PROTO_DST_PORT | CTA_PROTO_ICMP_ID | CTA_PROTO_ICMPV6_ID) => {
                    flow.local_port = port();
                }
                _ => {}
            }
        }
    }
    let six = address6(reply, CTA_IP_V6_DST).zip(address6(reply, CTA_IP_V6_SRC));
    let six = six.map(|(local, remote)| Flow6Key {
        local: to_map6(local),
        remote: to_map6(remote),
        ports: u32::from(flow.local_port) << 16 | u32::from(flow.remote_port),
        protocol: flow.protocol.into(),
    });
    (flow, six)
}

fn acknowledged(socket: &Socket) -> io::Result<()> {
    let (datagram, _) = socket.recv_from_full()?;
    messages(&datagram).filter(|message| message.kind == NLMSG_ERROR).try_for_each(|message| message.error())
}

fn send(socket: &Socket, family: u8, kind: u16, flags: u16, attributes: &[u8]) -> io::Result<()> {
    let length = MESSAGE_HEADER + FAMILY_HEADER + attributes.len();
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence and port number: the socket has one question open at a time.
    message.extend([0; 8]);
    // Family, version, resource.
    message.extend([family, 0, 0, 0]);
    message.extend(attributes);
    socket.send(&message, 0).map(drop)
}

/// One attribute, padded to four bytes.
fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    let mut whole = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    whole.extend(payload);
    whole.resize(whole.len().next_multiple_of(4), 0);
    whole
}

/// What an attribute holds, with its padding.
fn payload(attribute: &[u8]) -> &[u8] {
    attribute.get(4..).unwrap_or_default()
}

/// A message of the kernel's.
pub(crate) struct Message<'a> {
    pub kind: u16,
    pub body: &'a [u8],
}

impl Message<'_> {
    /// What an `NLMSG_ERROR` says; 0 is an acknowledgement.
    pub fn error(&self) -> io::Result<()> {
        let code = self.body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
        if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
    }
}

/// The messages of a datagram.
pub(crate) fn messages(mut rest: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
        let body = rest.get(MESSAGE_HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, body })
    })
}

/// Kind of each attribute, and the whole of it with header and padding.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let whole = rest.get(..length.next_multiple_of(4).min(rest.len())).filter(|_| length >= 4)?;
        rest = &rest[whole.len()..];
        Some((kind, whole))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_are_written() {
        let written = [attribute(CTA_ID, &[1, 2, 3, 4]), attribute(CTA_ZONE, &[5, 6]), attribute(7, &[])];
        let bytes = written.concat();
        let read: Vec<(u16, Vec<u8>)> =
            attributes(&bytes).map(|(kind, whole)| (kind, whole.to_vec())).collect();
        let expected: Vec<(u16, Vec<u8>)> = [CTA_ID, CTA_ZONE, 7].into_iter().zip(written).collect();
        assert_eq!(read, expected);
    }

    #[test]
    fn what_is_cut_short_ends_the_reading() {
        let whole = attribute(CTA_ID, &[1, 2, 3, 4]);
        assert_eq!(attributes(&whole[..3]).count(), 0);
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0, "a length of nothing");
        assert_eq!(messages(&[200, 0, 0, 0, 3, 0, 0, 0]).count(), 0);
    }
}
