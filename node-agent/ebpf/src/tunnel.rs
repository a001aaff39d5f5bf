//! The tunnel between nodes: Geneve (RFC 8926) over IPv4, the inner packet without an Ethernet header, so that it costs
//! 36 bytes. The network identifier says what the receiver is to do.

use crate::checksum::fold;
use crate::headers::{self, DF, ETH_LEN, ETH_P_IP, Ethernet, Ipv4, Transport};
use crate::maps::{self, PEER_INDEX, PEERS};
use crate::steer::{Inbound, Step};
use crate::xdp;
use aegis_common::{Config, Counter, PeerValue, TUNNEL_OVERHEAD, VNI_FRAGMENT, VNI_STEER, mix};
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use aya_ebpf::bindings::xdp_action::XDP_TX;
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_redirect, bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use aya_ebpf::programs::XdpContext;

const OVERHEAD: usize = TUNNEL_OVERHEAD as usize;
/// Flow source ports of the outer UDP header, so that the underlay spreads flows (RFC 8926 section 3.3).
const FIRST_SOURCE_PORT: u16 = 0xc000;
const AF_INET: u8 = 2;

/// How a packet got here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// From outside.
    Wire,
    /// From another node, which says that the port is ours.
    Steered,
    /// From another node, since this is where fragments of the datagram meet.
    Fragment,
}

/// UDP and Geneve headers.
#[repr(C)]
#[derive(Clone, Copy)]
struct Geneve {
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

/// Takes the outer headers off a packet for this node's tunnel. `None`: not one of ours.
#[inline(always)]
pub fn receive(ctx: &XdpContext, config: &Config, ip: &Ipv4) -> Result<Option<Arrival>, Counter> {
    if ip.protocol != headers::UDP
        || ip.version_length != 0x45
        || ip.is_later_fragment()
        || ip.is_first_fragment()
    {
        return Ok(None);
    }
    let Some(geneve) = xdp::at::<Geneve>(ctx, ETH_LEN + 20) else { return Ok(None) };
    // SAFETY: within the frame.
    let geneve = unsafe { *geneve };
    let ours = u32::from(u16::from_be(geneve.destination_port)) == config.tunnel_port
        && geneve.version_options == 0
        && geneve.protocol == ETH_P_IP;
    if !ours {
        return Ok(None);
    }
    let arrival = match u32::from_be(geneve.vni) >> 8 {
        VNI_STEER => Arrival::Steered,
        VNI_FRAGMENT => Arrival::Fragment,
        _ => return Ok(None),
    };
    // SAFETY: only presence matters.
    if unsafe { PEER_INDEX.get(&ip.source) }.is_none() {
        return Err(Counter::DropNotPeer);
    }
    // SAFETY: within the frame, which `ipv4` has read already.
    let ethernet = unsafe { *xdp::at::<Ethernet>(ctx, 0).ok_or(Counter::DropMalformedIn)? };
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, OVERHEAD as i32) } != 0 {
        return Err(Counter::DropMalformedIn);
    }
    let place = xdp::at::<Ethernet>(ctx, 0).ok_or(Counter::DropMalformedIn)?;
    // SAFETY: within the frame.
    unsafe { *place = ethernet };
    maps::count(Counter::SteeredHere, u32::from(ip.total_length()));
    Ok(Some(arrival))
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
    let hash = flow_hash(ctx, inbound);
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(OVERHEAD as i32)) } != 0 {
        return Step::Drop(Counter::DropNoNeighbour);
    }
    let (Some(ip), Some(geneve)) = (xdp::at::<Ipv4>(ctx, ETH_LEN), xdp::at::<Geneve>(ctx, ETH_LEN + 20))
    else {
        return Step::Drop(Counter::DropMalformedIn);
    };
    let outer = outer_header(config, peer, length + OVERHEAD as u16);
    // SAFETY: within the frame.
    unsafe {
        *ip = outer;
        *geneve = Geneve {
            source_port: (FIRST_SOURCE_PORT | hash as u16 & 0x3fff).to_be(),
            destination_port: (config.tunnel_port as u16).to_be(),
            length: (length + 16).to_be(),
            // None: the inner packet has its own (RFC 8926 section 3.3).
            checksum: 0,
            version_options: 0,
            flags: 0,
            protocol: ETH_P_IP,
            vni: (vni << 8).to_be(),
        };
    }
    transmit(ctx, config, peer, &ethernet, u32::from(length))
}

#[inline(always)]
fn outer_header(config: &Config, peer: &PeerValue, length: u16) -> Ipv4 {
    let mut ip = Ipv4 {
        version_length: 0x45,
        tos: 0,
        total_length: length.to_be(),
        id: 0,
        fragment: DF.to_be(),
        ttl: 64,
        protocol: headers::UDP,
        checksum: 0,
        source: config.tunnel_address,
        destination: peer.address,
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

#[inline(always)]
fn flow_hash(ctx: &XdpContext, inbound: &Inbound) -> u32 {
    let ports = match xdp::at::<Transport>(ctx, inbound.transport_offset) {
        // Later fragments have no ports, so none of a datagram's fragments uses them.
        // SAFETY: within the frame.
        Some(transport) if u16::from_be(inbound.ip.fragment) & 0x3fff == 0 => unsafe {
            u32::from((*transport).source_port()) << 16 | u32::from((*transport).destination_port())
        },
        _ => 0,
    };
    mix(mix(inbound.ip.source ^ inbound.ip.destination.rotate_left(16)) ^ ports)
}

/// Gives the encapsulated frame its Ethernet header and sends it.
#[inline(always)]
fn transmit(ctx: &XdpContext, config: &Config, peer: &PeerValue, old: &Ethernet, bytes: u32) -> Step {
    let ingress = ctx.ingress_ifindex() as u32;
    let (mut destination, mut source, mut ifindex) = (peer.mac, old.destination, peer.ifindex);
    if peer.mac == [0; 6] || ifindex != ingress {
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut fib: FibLookup = unsafe { core::mem::zeroed() };
        fib.family = AF_INET;
        fib.l4_protocol = headers::UDP;
        fib.ifindex = ingress;
        fib.__bindgen_anon_3.ipv4_src = config.tunnel_address;
        fib.__bindgen_anon_4.ipv4_dst = peer.address;
        let size = size_of::<FibLookup>() as i32;
        // SAFETY: context and structure are valid for the call.
        if unsafe { bpf_fib_lookup(ctx.as_ptr(), &raw mut fib, size, 0) } != 0 {
            return Step::Drop(Counter::DropNoNeighbour);
        }
        (destination, source, ifindex) = (fib.dmac, fib.smac, fib.ifindex);
    }
    let Some(ethernet) = xdp::at::<Ethernet>(ctx, 0) else { return Step::Drop(Counter::DropMalformedIn) };
    // SAFETY: within the frame.
    unsafe { *ethernet = Ethernet { destination, source, kind: ETH_P_IP } };
    maps::count(Counter::Steered, bytes);
    if ifindex == ingress {
        return Step::Done(XDP_TX);
    }
    // SAFETY: plain arguments.
    Step::Done(unsafe { bpf_redirect(ifindex, 0) } as u32)
}

/// Answers "fragmentation needed" (RFC 1191): Ethernet, IPv4, ICMP and the quoted start of the packet.
///
/// Also when "don't fragment" is not set: XDP can't make two packets of one, and an origin that sends a large datagram
/// in fragments of its link's MTU, which are never marked so, would otherwise not learn that they do not arrive.
#[inline(always)]
fn too_big(ctx: &XdpContext, config: &Config, inbound: &Inbound) -> Step {
    const QUOTED: usize = 28;
    const REPLY: usize = 28 + QUOTED;
    let failed = Step::Drop(Counter::DropTooBig);
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
    let shrink = (ETH_LEN + QUOTED) as i32 - xdp::length(ctx) as i32;
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if shrink > 0 || unsafe { bpf_xdp_adjust_tail(ctx.ctx, shrink) } != 0 {
        return failed;
    }
    // SAFETY: as above.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -28) } != 0 {
        return failed;
    }
    let Some(frame) = xdp::at::<TooBig>(ctx, 0) else { return failed };
    // SAFETY: within the frame.
    let frame = unsafe { &mut *frame };
    frame.ethernet = Ethernet { destination: ethernet.source, source: ethernet.destination, kind: ETH_P_IP };
    frame.ip = Ipv4 {
        version_length: 0x45,
        tos: 0,
        total_length: (REPLY as u16).to_be(),
        id: 0,
        fragment: DF.to_be(),
        ttl: 64,
        protocol: headers::ICMP,
        checksum: 0,
        source: inbound.ip.destination,
        destination: inbound.ip.source,
    };
    frame.icmp =
        [u16::from_ne_bytes([headers::ICMP_UNREACHABLE, 4]), 0, 0, (config.tunnel_mtu as u16).to_be()];
    let Some(words) = xdp::at::<[u16; REPLY / 2]>(ctx, ETH_LEN) else { return failed };
    let (mut header, mut message, mut at) = (0u32, 0u32, 0);
    while at < REPLY / 2 {
        // SAFETY: within the frame.
        let word = u32::from(unsafe { (*words)[at] });
        if at < 10 {
            header += word;
        } else {
            message += word;
        }
        at += 1;
    }
    frame.ip.checksum = !fold(header);
    frame.icmp[1] = !fold(message);
    maps::count(Counter::TooBig, u32::from(inbound.ip.total_length()));
    Step::Done(XDP_TX)
}

/// Whether the packet is an ICMP error.
#[inline(always)]
fn is_error(ctx: &XdpContext, inbound: &Inbound) -> bool {
    let Some(transport) = xdp::at::<Transport>(ctx, inbound.transport_offset) else { return true };
    // SAFETY: within the frame.
    inbound.ip.protocol == headers::ICMP && headers::is_icmp_error(unsafe { (*transport).icmp_type() })
}

/// What goes before the quoted packet.
#[repr(C, packed)]
struct TooBig {
    ethernet: Ethernet,
    ip: Ipv4,
    icmp: [u16; 4],
}
