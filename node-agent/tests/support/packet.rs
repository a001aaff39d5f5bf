//! Frames, built field by field with checksums summed anew: nothing here shares code with the programs, which update
//! checksums incrementally.

use std::net::Ipv4Addr;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;

pub const DF: u16 = 0x4000;
pub const MF: u16 = 0x2000;

/// MAC address of the node under test, and of the router it talks to.
pub const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];

/// An IPv4 packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    /// DSCP and ECN.
    pub tos: u8,
    pub id: u16,
    /// Flags and offset.
    pub fragment: u16,
    pub ttl: u8,
    /// A multiple of four bytes.
    pub options: Vec<u8>,
    pub body: Body,
}

/// What an IPv4 packet carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    Tcp(Tcp),
    Udp(Udp),
    Icmp(Icmp),
    /// Protocol number and bytes.
    Raw(u8, Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tcp {
    pub source: u16,
    pub destination: u16,
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    /// A multiple of four bytes.
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Udp {
    pub source: u16,
    pub destination: u16,
    /// False: the field is zero.
    pub checksum: bool,
    pub payload: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Icmp {
    pub kind: u8,
    pub code: u8,
    /// Bytes 4 to 7.
    pub rest: [u8; 4],
    pub payload: Vec<u8>,
}

/// The Internet checksum of the bytes, RFC 1071.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

impl Packet {
    fn new(source: Ipv4Addr, destination: Ipv4Addr, body: Body) -> Packet {
        Packet { source, destination, tos: 0, id: 0x1234, fragment: DF, ttl: 61, options: Vec::new(), body }
    }

    pub fn tcp(source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16), flags: u8) -> Packet {
        let body = Tcp {
            source: source.1,
            destination: destination.1,
            sequence: 0x1020_3040,
            acknowledged: if flags & ACK != 0 { 0x5060_7080 } else { 0 },
            flags,
            options: Vec::new(),
            payload: Vec::new(),
        };
        Packet::new(source.0, destination.0, Body::Tcp(body))
    }

    pub fn udp(source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16), payload: &[u8]) -> Packet {
        let (source, port) = source;
        let body =
            Udp { source: port, destination: destination.1, checksum: true, payload: payload.to_vec() };
        Packet::new(source, destination.0, Body::Udp(body))
    }

    pub fn echo(source: Ipv4Addr, destination: Ipv4Addr, id: u16) -> Packet {
        Packet::icmp(source, destination, 8, 0, [(id >> 8) as u8, id as u8, 0, 7], b"ping ping ping")
    }

    pub fn echo_reply(source: Ipv4Addr, destination: Ipv4Addr, id: u16) -> Packet {
        Packet::icmp(source, destination, 0, 0, [(id >> 8) as u8, id as u8, 0, 7], b"ping ping ping")
    }

    pub fn icmp(
        source: Ipv4Addr,
        destination: Ipv4Addr,
        kind: u8,
        code: u8,
        rest: [u8; 4],
        payload: &[u8],
    ) -> Packet {
        Packet::new(source, destination, Body::Icmp(Icmp { kind, code, rest, payload: payload.to_vec() }))
    }

    /// An ICMP error about the packet, quoting its IP header and `bytes` more.
    pub fn error(source: Ipv4Addr, about: &Packet, kind: u8, code: u8, bytes: usize) -> Packet {
        let header = 20 + about.options.len();
        let quoted = about.bytes()[..header + bytes].to_vec();
        Packet::icmp(source, about.source, kind, code, [0; 4], &quoted)
    }

    pub fn raw(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, bytes: &[u8]) -> Packet {
        Packet::new(source, destination, Body::Raw(protocol, bytes.to_vec()))
    }

    /// The same packet from another address and port (or echo identifier).
    pub fn from(mut self, address: Ipv4Addr, port: u16) -> Packet {
        self.source = address;
        match &mut self.body {
            Body::Tcp(tcp) => tcp.source = port,
            Body::Udp(udp) => udp.source = port,
            Body::Icmp(icmp) => icmp.rest[..2].copy_from_slice(&port.to_be_bytes()),
            Body::Raw(..) => (),
        }
        self
    }

    /// The same packet to another address and port (or echo identifier).
    pub fn to(mut self, address: Ipv4Addr, port: u16) -> Packet {
        self.destination = address;
        match &mut self.body {
            Body::Tcp(tcp) => tcp.destination = port,
            Body::Udp(udp) => udp.destination = port,
            Body::Icmp(icmp) => icmp.rest[..2].copy_from_slice(&port.to_be_bytes()),
            Body::Raw(..) => (),
        }
        self
    }

    pub fn with_payload(mut self, length: usize) -> Packet {
        let bytes = (0..length).map(|at| (at * 7 + at / 251) as u8).collect();
        match &mut self.body {
            Body::Tcp(Tcp { payload, .. })
            | Body::Udp(Udp { payload, .. })
            | Body::Icmp(Icmp { payload, .. }) => {
                *payload = bytes;
            }
            Body::Raw(_, payload) => *payload = bytes,
        }
        self
    }

    pub fn with_fragment(mut self, fragment: u16) -> Packet {
        self.fragment = fragment;
        self
    }

    pub fn with_id(mut self, id: u16) -> Packet {
        self.id = id;
        self
    }

    pub fn with_tcp_options(mut self, bytes: &[u8]) -> Packet {
        if let Body::Tcp(tcp) = &mut self.body {
            tcp.options = bytes.to_vec();
        }
        self
    }

    /// With IP options: a record-route option of eight bytes.
    pub fn with_ip_options(mut self) -> Packet {
        self.options = vec![7, 7, 4, 0, 0, 0, 0, 0];
        self
    }

    pub fn without_checksum(mut self) -> Packet {
        if let Body::Udp(udp) = &mut self.body {
            udp.checksum = false;
        }
        self
    }

    pub fn protocol(&self) -> u8 {
        match &self.body {
            Body::Tcp(_) => 6,
            Body::Udp(_) => 17,
            Body::Icmp(_) => 1,
            Body::Raw(protocol, _) => *protocol,
        }
    }

    /// The transport segment with its checksum.
    pub fn segment(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let place = match &self.body {
            Body::Tcp(tcp) => {
                bytes.extend(tcp.source.to_be_bytes());
                bytes.extend(tcp.destination.to_be_bytes());
                bytes.extend(tcp.sequence.to_be_bytes());
                bytes.extend(tcp.acknowledged.to_be_bytes());
                bytes.extend([((20 + tcp.options.len()) / 4 * 16) as u8, tcp.flags]);
                bytes.extend([0xfa, 0xf0, 0, 0, 0, 0]);
                bytes.extend(&tcp.options);
                bytes.extend(&tcp.payload);
                16
            }
            Body::Udp(udp) => {
                bytes.extend(udp.source.to_be_bytes());
                bytes.extend(udp.destination.to_be_bytes());
                bytes.extend((8 + udp.payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(&udp.payload);
                if !udp.checksum {
                    return bytes;
                }
                6
            }
            Body::Icmp(icmp) => {
                bytes.extend([icmp.kind, icmp.code, 0, 0]);
                bytes.extend(icmp.rest);
                bytes.extend(&icmp.payload);
                2
            }
            Body::Raw(_, raw) => return raw.clone(),
        };
        let mut summed = Vec::new();
        if place != 2 {
            summed.extend(self.source.octets());
            summed.extend(self.destination.octets());
            summed.extend([0, self.protocol()]);
            summed.extend((bytes.len() as u16).to_be_bytes());
        }
        summed.extend(&bytes);
        let sum = match checksum(&summed) {
            0 if place == 6 => 0xffff,
            sum => sum,
        };
        bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// The IP packet.
    pub fn bytes(&self) -> Vec<u8> {
        self.datagram(&self.segment(), self.fragment)
    }

    fn datagram(&self, payload: &[u8], fragment: u16) -> Vec<u8> {
        let header = 20 + self.options.len();
        let mut bytes = vec![0x40 | (header / 4) as u8, self.tos];
        bytes.extend(((header + payload.len()) as u16).to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        bytes.extend(fragment.to_be_bytes());
        bytes.extend([self.ttl, self.protocol(), 0, 0]);
        bytes.extend(self.source.octets());
        bytes.extend(self.destination.octets());
        bytes.extend(&self.options);
        let sum = checksum(&bytes);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    /// The frame that a router sends to the node.
    pub fn frame(&self) -> Vec<u8> {
        ethernet(NODE_MAC, ROUTER_MAC, &self.bytes())
    }

    /// The same in fragments of at most `size` bytes of payload (a multiple of eight).
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let segment = self.segment();
        let count = segment.len().div_ceil(size);
        let part = |(at, bytes): (usize, &[u8])| {
            let more = if at + 1 < count { MF } else { 0 };
            ethernet(NODE_MAC, ROUTER_MAC, &self.datagram(bytes, more | (at * size / 8) as u16))
        };
        segment.chunks(size).enumerate().map(part).collect()
    }
}

/// An Ethernet II frame with an IPv4 packet.
pub fn ethernet(destination: [u8; 6], source: [u8; 6], packet: &[u8]) -> Vec<u8> {
    [&destination[..], &source[..], &[8, 0], packet].concat()
}

/// The outer frame in which one node sends `inner` (an IP packet) to another.
pub fn geneve(
    nodes: (Ipv4Addr, Ipv4Addr),
    macs: ([u8; 6], [u8; 6]),
    source_port: u16,
    vni: u32,
    inner: &[u8],
) -> Vec<u8> {
    let mut payload = vec![0, 0, 8, 0];
    payload.extend((vni << 8).to_be_bytes());
    payload.extend(inner);
    let mut outer =
        Packet::udp((nodes.0, source_port), (nodes.1, 6081), &payload).without_checksum().with_id(0);
    outer.ttl = 64;
    ethernet(macs.1, macs.0, &outer.bytes())
}
