//! The tunnel between nodes: Geneve (RFC 8926) over IPv4, the inner packet without an Ethernet header, so that it costs
//! 36 bytes. The network identifier says what the receiver is to do.

use crate::answer;
use crate::checksum::fold;
use crate::fence;
use crate::headers::{self, DF, ETH_LEN, ETH_P_IP, Ethernet, Ipv4, Transport};
use crate::maps::{self, PEER_INDEX, PEERS};
use crate::route::{self, Way};
use crate::six::ETH_P_IPV6;
use crate::steer::{Inbound, Step};
use crate::xdp;
use aegis_common::{
    Config, Counter, GATEWAY_OVERHEAD, OPTION_ALLOCATION, PeerValue, TUNNEL_OVERHEAD, VNI_FRAGMENT,
    VNI_GATEWAY, VNI_PROBE, VNI_PROBE_ANSWER, VNI_REFUSED, VNI_RETURN, VNI_STEER, mix,
};
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_TX};
use aya_ebpf::helpers::bpf_xdp_adjust_head;
use aya_ebpf::programs::XdpContext;

const OVERHEAD: usize = TUNNEL_OVERHEAD as usize;
/// Flow source ports of the outer UDP header, so that the underlay spreads flows (RFC 8926 section 3.3).
const FIRST_SOURCE_PORT: u16 = 0xc000;
/// ICMP code of "destination unreachable" (RFC 792).
const FRAGMENTATION_NEEDED: u8 = 4;

/// How a packet got here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// From outside.
    Wire,
    /// From another node, which says that the port is ours.
    Steered,
    /// From another node, since this is where fragments of the datagram meet.
    Fragment,
    /// From another node, whose pod's packet it is to send on.
    Guest,
    /// From another node, for a pod of this one.
    Returned,
    /// The same, and a refusal for want of a port.
    Refused,
}

/// A packet that came through the tunnel.
pub struct Received {
    pub arrival: Arrival,
    /// Index of the sender in `PEERS`.
    pub peer: u32,
    /// For [`Arrival::Guest`]: the egress address that names the allocation.
    pub name: u32,
}

/// What there is to do with a packet for this node's tunnel address.
pub enum Outer {
    /// Not one of ours.
    Foreign,
    /// Decapsulated.
    Inner(Received),
    /// Already answered.
    Answered(u32),
}

/// UDP and Geneve headers.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Geneve {
    source_port: u16,
    destination_port: u16,
    length: u16,
    checksum: u16,
    version_options: u8,
    flags: u8,
    protocol: u16,
    /// Network identifier in the upper 24 bits.
    vni: u32,
}

impl Geneve {
    /// For a UDP datagram of `length` bytes. Arguments are in host order.
    #[inline(always)]
    pub fn new(source_port: u16, destination_port: u16, length: u16, vni: u32) -> Geneve {
        Geneve {
            source_port: source_port.to_be(),
            destination_port: destination_port.to_be(),
            length: length.to_be(),
            // None: the inner packet has its own (RFC 8926 section 3.3).
            checksum: 0,
            version_options: options(vni),
            // "Critical options present" is for the receiver to see where there are options (section 3.4).
            flags: if options(vni) == 0 { 0 } else { 0x40 },
            protocol: ETH_P_IP,
            vni: (vni << 8).to_be(),
        }
    }
}

/// Words of options that go with a network identifier.
#[inline(always)]
fn options(vni: u32) -> u8 {
    if vni == VNI_GATEWAY { (GATEWAY_OVERHEAD - TUNNEL_OVERHEAD) as u8 / 4 } else { 0 }
}

/// Takes the outer headers off a packet for this node's tunnel.
#[inline(always)]
pub fn receive(ctx: &XdpContext, config: &Config, ip: &Ipv4) -> Result<Outer, Counter> {
    if ip.protocol != headers::UDP
        || ip.version_length != 0x45
        || ip.is_later_fragment()
        || ip.is_first_fragment()
    {
        return Ok(Outer::Foreign);
    }
    let Some(geneve) = xdp::at::<Geneve>(ctx, ETH_LEN + 20) else { return Ok(Outer::Foreign) };
    // SAFETY: within the frame.
    let geneve = unsafe { *geneve };
    let vni = u32::from_be(geneve.vni) >> 8;
    let carried = geneve.protocol == ETH_P_IP
        || geneve.protocol == ETH_P_IPV6 && (vni == VNI_STEER || vni == VNI_FRAGMENT);
    let ours = u32::from(u16::from_be(geneve.destination_port)) == config.tunnel_port && carried;
    if !ours {
        return Ok(Outer::Foreign);
    }
    let arrival = match vni {
        VNI_STEER => Arrival::Steered,
        VNI_FRAGMENT => Arrival::Fragment,
        VNI_RETURN => Arrival::Returned,
        VNI_REFUSED => Arrival::Refused,
        VNI_GATEWAY => Arrival::Guest,
        VNI_PROBE => Arrival::Wire,
        _ => return Ok(Outer::Foreign),
    };
    if geneve.version_options != options(vni) {
        return Ok(Outer::Foreign);
    }
    let length = usize::from(ip.total_length());
    if length < OVERHEAD || ETH_LEN + length > xdp::length(ctx) {
        return Err(Counter::DropMalformedIn);
    }
    // SAFETY: read at once.
    let Some(peer) = (unsafe { PEER_INDEX.get(&ip.source) }).copied() else {
        return Err(Counter::DropNotPeer);
    };
    if vni == VNI_PROBE {
        return answer_probe(ctx).ok_or(Counter::DropMalformedIn).map(Outer::Answered);
    }
    let mut name = 0;
    let mut overhead = OVERHEAD;
    if arrival == Arrival::Guest {
        let option = xdp::at::<[u32; 2]>(ctx, ETH_LEN + OVERHEAD).ok_or(Counter::DropMalformedIn)?;
        // SAFETY: within the frame.
        let [kind, value] = unsafe { option.read_unaligned() };
        if kind != OPTION_ALLOCATION {
            return Err(Counter::DropMalformedIn);
        }
        name = value;
        overhead = GATEWAY_OVERHEAD as usize;
    }
    // SAFETY: within the frame, which `ipv4` has read already.
    let ethernet = unsafe { *xdp::at::<Ethernet>(ctx, 0).ok_or(Counter::DropMalformedIn)? };
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, overhead as i32) } != 0 {
        return Err(Counter::DropMalformedIn);
    }
    let place = xdp::at::<Ethernet>(ctx, 0).ok_or(Counter::DropMalformedIn)?;
    // SAFETY: within the frame.
    unsafe { *place = Ethernet { kind: geneve.protocol, ..ethernet } };
    if arrival == Arrival::Steered || arrival == Arrival::Fragment {
        maps::count(Counter::SteeredHere, u32::from(ip.total_length()));
    }
    Ok(Outer::Inner(Received { arrival, peer, name }))
}

/// Answers a probe: to the port of the agent that asks, so that it goes up the stack there. An answer is no probe, or two
/// nodes could be made to answer each other without end.
#[inline(always)]
fn answer_probe(ctx: &XdpContext) -> Option<u32> {
    let ethernet = xdp::at::<Ethernet>(ctx, 0)?;
    let ip = xdp::at::<Ipv4>(ctx, ETH_LEN)?;
    let geneve = xdp::at::<Geneve>(ctx, ETH_LEN + 20)?;
    // SAFETY: within the frame. The IP checksum does not notice what changes places.
    unsafe {
        *ethernet =
            Ethernet { destination: (*ethernet).source, source: (*ethernet).destination, kind: ETH_P_IP };
        ((*ip).source, (*ip).destination) = ((*ip).destination, (*ip).source);
        ((*geneve).source_port, (*geneve).destination_port) =
            ((*geneve).destination_port, (*geneve).source_port);
        (*geneve).vni = (VNI_PROBE_ANSWER << 8).to_be();
        // None is needed over IPv4 (RFC 768).
        (*geneve).checksum = 0;
    }
    maps::count(Counter::Probed, 0);
    Some(XDP_TX)
}

/// Sends the packet to a peer.
#[inline(always)]
pub fn send(ctx: &XdpContext, config: &Config, inbound: &Inbound, peer: u32, vni: u32) -> Step {
    let Some(peer) = PEERS.get(peer).filter(|peer| peer.address != 0) else {
        return Step::Drop(Counter::DropNoNeighbour);
    };
    let length = inbound.ip.total_length();
    if u32::from(length) > config.tunnel_mtu {
        return too_big(ctx, config, inbound);
    }
    // SAFETY: within the frame.
    let ethernet = match xdp::at::<Ethernet>(ctx, 0) {
        Some(ethernet) => unsafe { *ethernet },
        None => return Step::Drop(Counter::DropMalformedIn),
    };
    let from = flow_port(ctx, inbound);
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(OVERHEAD as i32)) } != 0 {
        return Step::Drop(Counter::DropNoNeighbour);
    }
    let (Some(ip), Some(geneve)) = (xdp::at::<Ipv4>(ctx, ETH_LEN), xdp::at::<Geneve>(ctx, ETH_LEN + 20))
    else {
        return Step::Drop(Counter::DropMalformedIn);
    };
    let outer = encapsulation(config.tunnel_address, peer.address, length + OVERHEAD as u16);
    // SAFETY: within the frame.
    unsafe {
        *ip = outer;
        *geneve = Geneve::new(from, config.tunnel_port as u16, length + 16, vni);
    }
    let returned = vni == VNI_RETURN || vni == VNI_REFUSED;
    let reason = if returned { Counter::Returned } else { Counter::Steered };
    transmit(ctx, config, peer, &ethernet, reason, u32::from(length))
}

/// Sends an IPv6 packet of `length` bytes to the peer that owns its slice, or, by the network identifier, where its fragments meet,
/// from this port.
#[inline(always)]
pub fn send_ipv6(ctx: &XdpContext, config: &Config, peer: u32, from: u16, length: u32, vni: u32) -> Step {
    let Some(peer) = PEERS.get(peer).filter(|peer| peer.address != 0) else {
        return Step::Drop(Counter::DropNoNeighbour);
    };
    // SAFETY: within the frame.
    let ethernet = match xdp::at::<Ethernet>(ctx, 0) {
        Some(ethernet) => unsafe { *ethernet },
        None => return Step::Drop(Counter::DropMalformedIn),
    };
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(OVERHEAD as i32)) } != 0 {
        return Step::Drop(Counter::DropNoNeighbour);
    }
    let (Some(ip), Some(geneve)) = (xdp::at::<Ipv4>(ctx, ETH_LEN), xdp::at::<Geneve>(ctx, ETH_LEN + 20))
    else {
        return Step::Drop(Counter::DropMalformedIn);
    };
    let length = length as u16;
    let geneve_header = Geneve::new(from, config.tunnel_port as u16, length + 16, vni);
    // SAFETY: within the frame.
    unsafe {
        *ip = encapsulation(config.tunnel_address, peer.address, length + OVERHEAD as u16);
        *geneve = Geneve { protocol: ETH_P_IPV6, ..geneve_header };
    }
    transmit(ctx, config, peer, &ethernet, Counter::Steered, u32::from(length))
}

/// The outer IP header of a packet of `length` bytes.
#[inline(always)]
pub fn encapsulation(source: u32, destination: u32, length: u16) -> Ipv4 {
    let mut ip = Ipv4 {
        version_length: 0x45,
        tos: 0,
        total_length: length.to_be(),
        id: 0,
        fragment: DF.to_be(),
        ttl: 64,
        protocol: headers::UDP,
        checksum: 0,
        source,
        destination,
    };
    let sum = u32::from(u16::from_ne_bytes([0x45, 0]))
        + u32::from(ip.total_length)
        + u32::from(ip.fragment)
        + u32::from(u16::from_ne_bytes([64, headers::UDP]))
        + (ip.source & 0xffff)
        + (ip.source >> 16)
        + (ip.destination & 0xffff)
        + (ip.destination >> 16);
    ip.checksum = !fold(sum);
    ip
}

/// Source port of the outer UDP header.
#[inline(always)]
pub fn source_port(source: u32, destination: u32, ports: u32) -> u16 {
    FIRST_SOURCE_PORT | mix(mix(source ^ destination.rotate_left(16)) ^ ports) as u16 & 0x3fff
}

#[inline(always)]
fn flow_port(ctx: &XdpContext, inbound: &Inbound) -> u16 {
    let ports = match xdp::at::<Transport>(ctx, inbound.transport_offset) {
        // Later fragments have no ports, so none of a datagram's fragments uses them.
        // SAFETY: within the frame.
        Some(transport) if u16::from_be(inbound.ip.fragment) & 0x3fff == 0 => unsafe {
            u32::from((*transport).source_port()) << 16 | u32::from((*transport).destination_port())
        },
        _ => 0,
    };
    source_port(inbound.ip.source, inbound.ip.destination, ports)
}

/// Gives the encapsulated frame its Ethernet header and sends it.
#[inline(always)]
fn transmit(
    ctx: &XdpContext,
    config: &Config,
    peer: &PeerValue,
    old: &Ethernet,
    reason: Counter,
    bytes: u32,
) -> Step {
    let ingress = ctx.ingress_ifindex() as u32;
    let way = if peer.mac == [0; 6] || peer.ifindex != ingress {
        match route::find(ctx, headers::UDP, config.tunnel_address, peer.address) {
            Some(way) => way,
            None => return Step::Drop(Counter::DropNoNeighbour),
        }
    } else {
        Way { destination: peer.mac, source: old.destination, ifindex: ingress }
    };
    maps::count(reason, bytes);
    route::leave(ctx, &way)
}

/// Answers "fragmentation needed" (RFC 1191): Ethernet, IPv4, ICMP and the quoted start of the packet.
///
/// Also when "don't fragment" is not set: XDP can't make two packets of one, and an origin that sends a large datagram
/// in fragments of its link's MTU, which are never marked so, would otherwise not learn that they do not arrive.
#[inline(always)]
pub fn too_big(ctx: &XdpContext, config: &Config, inbound: &Inbound) -> Step {
    let failed = Step::Drop(Counter::DropTooBig);
    // The answer bears the egress address.
    if fence::is_closed(inbound.ip.destination) {
        return Step::Drop(Counter::DropFenced);
    }
    // Without ports in it nobody could tell what the answer is about; an error is never answered by an error
    // (RFC 1122 section 3.2.2).
    if inbound.transport_offset != ETH_LEN + 20 || inbound.ip.is_later_fragment() || is_error(ctx, inbound) {
        return failed;
    }
    // SAFETY: within the frame.
    let ethernet = match xdp::at::<Ethernet>(ctx, 0) {
        Some(ethernet) => unsafe { *ethernet },
        None => return failed,
    };
    if answer::unreachable(ctx, &inbound.ip, FRAGMENTATION_NEEDED, config.tunnel_mtu as u16).is_none() {
        return failed;
    }
    maps::count(Counter::TooBig, u32::from(inbound.ip.total_length()));
    if inbound.arrival != Arrival::Wire {
        // Not back to the node that sent it here, which would take the answer for forged.
        return match route::find(ctx, headers::ICMP, inbound.ip.destination, inbound.ip.source) {
            Some(way) => route::leave(ctx, &way),
            None => Step::Done(XDP_DROP),
        };
    }
    let Some(place) = xdp::at::<Ethernet>(ctx, 0) else { return Step::Done(XDP_DROP) };
    // SAFETY: within the frame.
    unsafe {
        *place = Ethernet { destination: ethernet.source, source: ethernet.destination, kind: ETH_P_IP };
    }
    Step::Done(XDP_TX)
}

/// Whether the packet is an ICMP error.
#[inline(always)]
fn is_error(ctx: &XdpContext, inbound: &Inbound) -> bool {
    let Some(transport) = xdp::at::<Transport>(ctx, inbound.transport_offset) else { return true };
    // SAFETY: within the frame.
    inbound.ip.protocol == headers::ICMP && headers::is_icmp_error(unsafe { (*transport).icmp_type() })
}
