//! IPv6 frames, built field by field with checksums summed anew, and a parser that sums them again: neither shares code with the
//! programs, which touch no checksum at all.

use super::packet::{NODE_MAC, ROUTER_MAC, checksum};
use super::*;
use std::net::Ipv6Addr;

pub const POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 5);
/// A pod that shares no /96 with [`POD6`], but its last 32 bits: its suffix is another.
pub const FAR_POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0xa1b2, 0xc3d4, 0, 5);
/// A pod that nothing covers.
pub const FREE_POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 7);
/// An address of the node's pod range that nobody has named.
pub const UNKNOWN_POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0x99);
/// A pod of another node.
pub const INSIDE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, 9);
/// Covered for both pods: leaves from [`NETWORK`].
pub const ORIGIN6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 7);
/// Covered, but there is nothing to leave from.
pub const DENIED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xfffe, 0, 0, 0, 0, 7);
/// Covered only on TCP ports 440 to 443.
pub const WEB6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xfffd, 0, 0, 0, 0, 7);
/// Named by no binding.
pub const ELSEWHERE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xfffc, 0, 0, 0, 0, 7);
/// An egress /64 of which this node has slice 8, and the other node slice 16.
pub const NETWORK: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 0, 0, 0, 0);
pub const NETWORK_2: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 3, 0, 0, 0, 0);
/// Suffix that was chosen for [`FAR_POD6`].
pub const FAR_SUFFIX: u32 = 0x77;

/// What tells the allocation from others.
pub const IDENTITY: u64 = 0x1dea;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP6: u8 = 58;

pub fn raw6(address: Ipv6Addr) -> Address6 {
    let octets = address.octets();
    std::array::from_fn(|at| u32::from_ne_bytes(octets[4 * at..4 * at + 4].try_into().unwrap()))
}

/// The address of a pod outside: the one whose words sum up as the pod's own do, found by trying.
pub fn outside(pod: Ipv6Addr, network: Ipv6Addr, slice: u16, suffix: u32) -> Ipv6Addr {
    let sum = |address: Ipv6Addr| {
        let mut sum: u32 = address.segments().iter().map(|word| u32::from(*word)).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum % 0xffff
    };
    let [a, b, c, d, ..] = network.segments();
    let (high, low) = ((suffix >> 16) as u16, suffix as u16);
    let with = |neutral| Ipv6Addr::new(a, b, c, d, slice, neutral, high, low);
    (0..0xffff).map(with).find(|address| sum(*address) == sum(pod)).unwrap()
}

pub fn pod_outside() -> Ipv6Addr {
    outside(POD6, NETWORK, SLICE, 5)
}

/// An IPv6 packet. `before` are extension headers (number and bytes, of which the first is filled in).
#[derive(Clone, Debug)]
pub struct Packet6 {
    pub source: Ipv6Addr,
    pub destination: Ipv6Addr,
    pub before: Vec<(u8, Vec<u8>)>,
    pub protocol: u8,
    /// Transport header and what follows; a checksum in it is filled in.
    pub body: Vec<u8>,
    pub wrong_checksum: bool,
}

impl Packet6 {
    pub fn new(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, body: Vec<u8>) -> Packet6 {
        Packet6 { source, destination, before: Vec::new(), protocol, body, wrong_checksum: false }
    }

    pub fn tcp(source: (Ipv6Addr, u16), destination: (Ipv6Addr, u16), flags: u8, payload: &[u8]) -> Packet6 {
        let mut body = [source.1.to_be_bytes(), destination.1.to_be_bytes()].concat();
        body.extend([1, 2, 3, 4, 5, 6, 7, 8, 5 << 4, flags, 0xfa, 0xf0, 0, 0, 0, 0]);
        body.extend(payload);
        Packet6::new(source.0, destination.0, TCP, body)
    }

    pub fn udp(source: (Ipv6Addr, u16), destination: (Ipv6Addr, u16), payload: &[u8]) -> Packet6 {
        let mut body = [source.1.to_be_bytes(), destination.1.to_be_bytes()].concat();
        body.extend((8 + payload.len() as u16).to_be_bytes());
        body.extend([0, 0]);
        body.extend(payload);
        Packet6::new(source.0, destination.0, UDP, body)
    }

    pub fn icmp(source: Ipv6Addr, destination: Ipv6Addr, kind: u8, rest: [u8; 4], payload: &[u8]) -> Packet6 {
        let mut body = vec![kind, 0, 0, 0];
        body.extend(rest);
        body.extend(payload);
        Packet6::new(source, destination, ICMP6, body)
    }

    pub fn echo(source: Ipv6Addr, destination: Ipv6Addr, kind: u8) -> Packet6 {
        Packet6::icmp(source, destination, kind, [0x12, 0x34, 0, 1], b"ping ping ping")
    }

    /// An ICMPv6 error about the packet, quoting as many bytes of it.
    pub fn error(source: Ipv6Addr, about: &Packet6, kind: u8, bytes: usize) -> Packet6 {
        let quoted = about.bytes();
        let mtu = if kind == 2 { [0, 0, 5, 0] } else { [0; 4] };
        Packet6::icmp(source, about.source, kind, mtu, &quoted[..bytes.min(quoted.len())])
    }

    pub fn from(mut self, source: Ipv6Addr) -> Packet6 {
        self.source = source;
        self
    }

    pub fn to(mut self, destination: Ipv6Addr) -> Packet6 {
        self.destination = destination;
        self
    }

    /// With an extension header of this number before the others; `units` of eight bytes beyond the first.
    pub fn behind(mut self, number: u8, units: u8) -> Packet6 {
        let length = if number == 51 { units * 2 } else { units };
        let mut header = vec![0, length];
        header.resize(8 * (usize::from(units) + 1), 0);
        self.before.insert(0, (number, header));
        self
    }

    fn payload(&self) -> Vec<u8> {
        let mut body = self.body.clone();
        let place = match self.protocol {
            TCP => 16,
            UDP => 6,
            ICMP6 => 2,
            _ => return body,
        };
        if body.len() < place + 2 {
            return body;
        }
        body[place..place + 2].copy_from_slice(&[0, 0]);
        let mut sum = checksum(
            &[&pseudo(self.source, self.destination, self.protocol, body.len())[..], &body].concat(),
        );
        if self.protocol == UDP && sum == 0 {
            sum = 0xffff;
        }
        if self.wrong_checksum {
            sum ^= 0x1111;
        }
        body[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        body
    }

    /// The packet, with `more` behind the headers in place of the whole payload.
    fn assemble(&self, extra: Option<(u8, Vec<u8>)>, payload: &[u8]) -> Vec<u8> {
        let headers: Vec<&(u8, Vec<u8>)> = self.before.iter().chain(&extra).collect();
        let length: usize = headers.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() + payload.len();
        let first = headers.first().map_or(self.protocol, |(number, _)| *number);
        let mut bytes = vec![0x60, 0x0a, 0xbc, 0xde];
        bytes.extend((length as u16).to_be_bytes());
        bytes.extend([first, 61]);
        bytes.extend(self.source.octets());
        bytes.extend(self.destination.octets());
        for (at, (_, header)) in headers.iter().enumerate() {
            let start = bytes.len();
            bytes.extend(header);
            bytes[start] = headers.get(at + 1).map_or(self.protocol, |(number, _)| *number);
        }
        bytes.extend(payload);
        bytes
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.assemble(None, &self.payload())
    }

    pub fn frame(&self) -> Vec<u8> {
        ethernet6(&self.bytes())
    }

    /// The same in fragments of at most `size` bytes (a multiple of eight) of a datagram with this identification.
    pub fn fragments(&self, size: usize, id: u32) -> Vec<Vec<u8>> {
        let payload = self.payload();
        let count = payload.len().div_ceil(size);
        let part = |(at, part): (usize, &[u8])| {
            let place = (at * size) as u16 | u16::from(at + 1 < count);
            let mut header = vec![0, 0];
            header.extend(place.to_be_bytes());
            header.extend(id.to_be_bytes());
            ethernet6(&self.assemble(Some((44, header)), part))
        };
        payload.chunks(size).enumerate().map(part).collect()
    }
}

fn pseudo(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = [source.octets(), destination.octets()].concat();
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}

pub fn ethernet6(packet: &[u8]) -> Vec<u8> {
    [&NODE_MAC[..], &ROUTER_MAC, &[0x86, 0xdd], packet].concat()
}

/// Whether the checksum of a whole packet is right: read from the bytes alone.
pub fn is_sound(packet: &[u8]) -> bool {
    let address = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap());
    let (mut next, mut at) = (packet[6], 40);
    while [0, 43, 60, 51].contains(&next) {
        let units = usize::from(packet[at + 1]);
        let length = if next == 51 { (units + 2) * 4 } else { (units + 1) * 8 };
        (next, at) = (packet[at], at + length);
    }
    if ![TCP, UDP, ICMP6].contains(&next) {
        return true;
    }
    let body = &packet[at..];
    checksum(&[&pseudo(address(8), address(24), next, body.len())[..], body].concat()) == 0
}

/// The standard content of the IPv6 maps, beside that of IPv4: see the constants of this module.
pub fn six(world: &mut World) {
    let mut config = Config6 { active: 1, pod_range_count: 1, ..Default::default() };
    config.pod_ranges[0] = PodRange6 {
        network: raw6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0)),
        mask: raw6(Ipv6Addr::new(0xffff, 0xffff, 0xffff, 0xffff, 0, 0, 0, 0)),
    };
    set_config6(world, config);
    for (network, index) in [(NETWORK, 2), (NETWORK_2, 3)] {
        set_network(
            world,
            network,
            NetworkValue {
                epoch: 1,
                identity: IDENTITY,
                index,
                slice: SLICE,
                open: 1,
                ..NetworkValue::default()
            },
        );
        world.own(index, SLICE, 1);
        world.own(index, SLICE_2, 2);
    }
    set_allocation6(world, &[NETWORK]);
    policy6(world, 1);
}

/// The /64s of the allocation.
pub fn set_allocation6(world: &mut World, networks: &[Ipv6Addr]) {
    let mut allocation =
        Allocation6Value { identity: IDENTITY, count: networks.len() as u32, ..Default::default() };
    for (place, network) in allocation.networks.iter_mut().zip(networks) {
        *place = network_of(&raw6(*network));
    }
    world.plane.array("ALLOCATIONS6").unwrap().set(0, allocation, 0).unwrap();
}

pub fn set_config6(world: &mut World, config: Config6) {
    world.plane.array("CONFIG6").unwrap().set(0, config, 0).unwrap();
}

pub fn set_network(world: &mut World, network: Ipv6Addr, value: NetworkValue) {
    let key: Network = network_of(&raw6(network));
    world.plane.hash::<Network, NetworkValue>("NETWORKS").unwrap().insert(key, value, 0).unwrap();
}

pub fn network(world: &mut World, network: Ipv6Addr) -> NetworkValue {
    world
        .plane
        .hash::<Network, NetworkValue>("NETWORKS")
        .unwrap()
        .get(&network_of(&raw6(network)), 0)
        .unwrap()
}

pub fn set_pod6(world: &mut World, generation: u32, pod: Ipv6Addr, value: Pod6Value) {
    let key = Pod6Key { generation, address: raw6(pod) };
    world.plane.hash("PODS6").unwrap().insert(key, value, 0).unwrap();
}

pub fn pod6(class: u32, suffix: u32) -> Pod6Value {
    Pod6Value { class, incarnation: INCARNATION, suffix: suffix.to_be(), ..Default::default() }
}

pub fn policy6(world: &mut World, generation: u32) {
    for (pod, class, suffix) in [(POD6, 1, 5), (FAR_POD6, 1, FAR_SUFFIX), (FREE_POD6, 0, 7)] {
        set_pod6(world, generation, pod, pod6(class, suffix));
        let value = SuffixValue { address: raw6(pod) };
        world.plane.hash("SUFFIXES").unwrap().insert(suffix.to_be(), value, 0).unwrap();
    }
    for (destination, length, class) in [
        (ORIGIN6, 48, 1),
        (DENIED6, 48, 2),
        (WEB6, 128, 3),
        (Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0), 48, DESTINATION_INTERNAL),
    ] {
        let key = Key::new(32 + length, Destination6Key { generation, address: raw6(destination) });
        world.plane.trie("DESTINATIONS6").unwrap().insert(&key, DestinationValue { class }, 0).unwrap();
    }
}

/// The egress address: this node has slice 8 of its ports, and the other node slice 16.
pub const SINGLE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 9, 0, 0, 0, 7);
pub const SINGLE_2: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 9, 0, 0, 0, 8);
/// Index of the address in `SLOTS`.
pub const INDEX: u32 = 5;
/// The stand-in of a single address, as the maps hold it.
pub fn single_key(address: Ipv6Addr) -> u32 {
    stand_in(&raw6(address), 0)
}

/// The allocation has the single address and no /64.
pub fn single_world() -> World {
    let mut world = World::new();
    six(&mut world);
    single(&mut world);
    world
}

/// Gives the allocation the single address in place of its /64s.
pub fn single(world: &mut World) {
    set_allocation6(world, &[]);
    let mut config6: Config6 = world.plane.array("CONFIG6").unwrap().get(&0, 0).unwrap();
    config6.singles = 1;
    set_config6(world, config6);
    add_single(world, SINGLE, INDEX);
    set_singles(world, 0, &[SINGLE]);
}

pub fn add_single(world: &mut World, address: Ipv6Addr, index: u32) {
    let stand_in = single_key(address);
    world.plane.hash("SINGLES").unwrap().insert(stand_in, SingleValue { address: raw6(address) }, 0).unwrap();
    let value = AddressValue { index, allocation: 1 };
    world.plane.hash("ADDRESSES").unwrap().insert(stand_in, value, 0).unwrap();
    world.own(index, SLICE, 1);
    world.own(index, SLICE_2, 2);
    allow_single(world, address, &[SLICE]);
}

pub fn allow_single(world: &mut World, address: Ipv6Addr, slices: &[u16]) {
    world.allow(Ipv4Addr::from(single_key(address).to_ne_bytes()), slices);
}

/// The allocation's single addresses, beside its IPv4 ones.
pub fn set_singles(world: &mut World, allocation: u32, addresses: &[Ipv6Addr]) {
    let mut allocations = world.plane.array::<AllocationValue>("ALLOCATIONS").unwrap();
    let mut value = allocations.get(&allocation, 0).unwrap();
    for (place, address) in value.addresses[value.count as usize..].iter_mut().zip(addresses) {
        *place = single_key(*address);
    }
    value.singles = addresses.len() as u32;
    allocations.set(allocation, value, 0).unwrap();
}
