//! Ethernet and IPv4, read and written: as much as the recorder and the forger need.

use std::net::{Ipv4Addr, SocketAddrV4};

use serde::Serialize;

/// Protocol numbers of IPv4.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
}

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Who talks to whom. For ICMP echo the identifier takes the place of the source port; else ports are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Flow {
    /// Protocol number.
    pub protocol: u8,
    /// Source.
    pub source: SocketAddrV4,
    /// Destination.
    pub destination: SocketAddrV4,
}

/// What the recorder wants to know of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address of the frame.
    pub source_mac: [u8; 6],
    /// Addresses, protocol, ports.
    pub flow: Flow,
    /// A fragment other than the first, or an ICMP error: its ports are unknown and given as 0, and it stands for no flow.
    pub portless: bool,
    /// Sequence number of a SYN that is no answer: the start of a connection.
    pub syn: Option<u32>,
    /// A TCP reset.
    pub reset: bool,
    /// For an ICMP error: where the packet went that it is about.
    pub about: Option<Ipv4Addr>,
}

/// Reads an Ethernet frame, which may be cut short after the transport header. `None`: not IPv4, or too short.
pub fn parse(frame: &[u8]) -> Option<Packet> {
    let (ethernet, ip) = frame.split_at_checked(14)?;
    if ethernet[12..14] != [0x08, 0x00] || ip.len() < 20 || ip[0] >> 4 != 4 {
        return None;
    }
    let address = |at: usize| Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
    let transport = ip.get(usize::from(ip[0] & 0xf) * 4..)?;
    let later_fragment = u16::from_be_bytes([ip[6] & 0x1f, ip[7]]) != 0;
    let port = |at: usize| transport.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let echo = matches!(transport.first(), Some(0 | 8));
    let portless = later_fragment || ip[9] == protocol::ICMP && !echo;
    let (source_port, destination_port) = match ip[9] {
        _ if portless => (0, 0),
        protocol::TCP | protocol::UDP => (port(0)?, port(2)?),
        protocol::ICMP => (port(4)?, 0),
        _ => (0, 0),
    };
    let tcp = (ip[9] == protocol::TCP && !later_fragment).then(|| transport.get(..14)).flatten();
    let syn = tcp
        .filter(|tcp| tcp[13] & (SYN | ACK) == SYN)
        .map(|tcp| u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]));
    // An error quotes the packet from its IPv4 header on (RFC 792).
    let error =
        ip[9] == protocol::ICMP && !later_fragment && matches!(transport.first(), Some(3 | 4 | 5 | 11 | 12));
    let quoted = error.then(|| transport.get(24..28)).flatten();
    Some(Packet {
        source_mac: ethernet[6..12].try_into().ok()?,
        flow: Flow {
            protocol: ip[9],
            source: SocketAddrV4::new(address(12), source_port),
            destination: SocketAddrV4::new(address(16), destination_port),
        },
        portless,
        syn,
        reset: tcp.is_some_and(|tcp| tcp[13] & RST != 0),
        about: quoted.map(|it| Ipv4Addr::new(it[0], it[1], it[2], it[3])),
    })
}

/// What a forged packet carries above IPv4.
#[derive(Clone, Copy, Debug)]
pub enum Payload {
    /// A TCP segment without data, with these flags set.
    Tcp {
        /// SYN flag.
        syn: bool,
        /// ACK flag.
        ack: bool,
    },
    /// A datagram of a few bytes.
    Udp,
    /// An echo request; the source port is the identifier.
    Echo,
}

/// Writes an IPv4 packet with correct checksums. `number` goes into sequence and identification fields.
pub fn build(source: SocketAddrV4, destination: SocketAddrV4, payload: Payload, number: u16) -> Vec<u8> {
    let (number_protocol, mut body, checksum_at) = match payload {
        Payload::Tcp { syn, ack } => {
            let mut tcp = vec![0; 20];
            tcp[0..2].copy_from_slice(&source.port().to_be_bytes());
            tcp[2..4].copy_from_slice(&destination.port().to_be_bytes());
            tcp[6..8].copy_from_slice(&number.to_be_bytes());
            tcp[12] = 5 << 4;
            tcp[13] = if syn { SYN } else { 0 } | if ack { ACK } else { 0 };
            tcp[14..16].copy_from_slice(&0xffff_u16.to_be_bytes());
            (protocol::TCP, tcp, 16)
        }
        Payload::Udp => {
            let mut udp =
                [&source.port().to_be_bytes()[..], &destination.port().to_be_bytes(), &[0, 14, 0, 0]]
                    .concat();
            udp.extend(b"forged");
            (protocol::UDP, udp, 6)
        }
        Payload::Echo => {
            let mut icmp = vec![8, 0, 0, 0];
            icmp.extend(source.port().to_be_bytes());
            icmp.extend(number.to_be_bytes());
            icmp.extend(b"forged");
            (protocol::ICMP, icmp, 2)
        }
    };
    let pseudo = match payload {
        Payload::Echo => 0,
        _ => {
            let header = [
                &source.ip().octets()[..],
                &destination.ip().octets(),
                &[0, number_protocol, 0, body.len() as u8],
            ];
            sum(&header.concat())
        }
    };
    let checksum = fold(pseudo + sum(&body));
    body[checksum_at..checksum_at + 2].copy_from_slice(&checksum.to_be_bytes());

    let mut packet = vec![0x45, 0];
    packet.extend((20 + body.len() as u16).to_be_bytes());
    packet.extend(number.to_be_bytes());
    packet.extend([0, 0, 64, number_protocol, 0, 0]);
    packet.extend(source.ip().octets());
    packet.extend(destination.ip().octets());
    let checksum = fold(sum(&packet));
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(body);
    packet
}

/// Sum of 16-bit words (RFC 1071), not folded.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0))).sum()
}

/// The Internet checksum of a sum.
pub fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The Internet checksum of some bytes.
pub fn checksum(bytes: &[u8]) -> u16 {
    fold(sum(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(payload: Payload) -> Vec<u8> {
        let packet =
            build("203.0.113.1:2000".parse().unwrap(), "198.51.100.10:7000".parse().unwrap(), payload, 77);
        [&[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 8, 0][..], &packet].concat()
    }

    #[test]
    fn what_is_built_can_be_read() {
        let packet = parse(&frame(Payload::Tcp { syn: true, ack: false })).unwrap();
        assert_eq!(packet.source_mac, [2; 6]);
        assert_eq!(packet.flow.source, "203.0.113.1:2000".parse().unwrap());
        assert_eq!(packet.flow.destination, "198.51.100.10:7000".parse().unwrap());
        assert_eq!(packet.syn, Some(77));
        assert_eq!(parse(&frame(Payload::Tcp { syn: true, ack: true })).unwrap().syn, None);
        let echo = parse(&frame(Payload::Echo)).unwrap();
        assert_eq!((echo.flow.protocol, echo.flow.source.port(), echo.flow.destination.port()), (1, 2000, 0));
    }

    #[test]
    fn checksums_are_right() {
        for payload in [Payload::Tcp { syn: true, ack: false }, Payload::Udp] {
            let frame = frame(payload);
            let (ip, body) = frame[14..].split_at(20);
            assert_eq!(checksum(ip), 0);
            let pseudo = [&ip[12..20], &[0, ip[9], 0, body.len() as u8]].concat();
            assert_eq!(fold(sum(&pseudo) + sum(body)), 0, "{payload:?}");
        }
        assert_eq!(checksum(&frame(Payload::Echo)[34..]), 0);
    }

    #[test]
    fn a_later_fragment_has_no_ports() {
        let mut frame = frame(Payload::Udp);
        frame[14 + 7] = 10;
        let packet = parse(&frame).unwrap();
        assert!(packet.portless);
        assert_eq!(packet.flow.source.port(), 0);
    }

    #[test]
    fn what_is_cut_short_is_refused_not_misread() {
        let whole = frame(Payload::Udp);
        assert!(parse(&whole[..14 + 20 + 3]).is_none());
        assert!(parse(&whole[..20]).is_none());
        let mut arp = whole.clone();
        arp[13] = 6;
        assert!(parse(&arp).is_none());
    }
}
