//! Packets with a source address of choice, as a hostile workload would send them.

use std::io;
use std::net::SocketAddrV4;

use socket2::{Domain, Socket, Type};

use crate::command::Protocol;
use crate::packet::{Payload, build};

/// Sends so many packets and returns how many the kernel took.
pub fn send(from: SocketAddrV4, to: SocketAddrV4, protocol: Protocol, count: u16) -> io::Result<u16> {
    // IPPROTO_RAW: the packet brings its own IPv4 header.
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(libc::IPPROTO_RAW.into()))?;
    let payload = match protocol {
        Protocol::Tcp => Payload::Tcp { syn: true, ack: false },
        Protocol::TcpAck => Payload::Tcp { syn: false, ack: true },
        Protocol::Udp => Payload::Udp,
        Protocol::Icmp => Payload::Echo,
    };
    for number in 1..=count {
        socket.send_to(&build(from, to, payload, number), &SocketAddrV4::new(*to.ip(), 0).into())?;
    }
    Ok(count)
}
