//! Sending a pod's packet through a gateway: another node that holds slices of the allocation translates it.
//!
//! The flow is entered here too, with the pod's own address in place of the egress address: it keeps to its gateway for
//! life, and answers are taken in for it only.

use crate::headers::{self, ETH_LEN, Packet, SYN, Transport};
use crate::maps::{self, FORWARD, PEERS, REVERSE};
use crate::snat::{Stop, remove, reverse_key};
use crate::tunnel::{Geneve, encapsulation, source_port};
use aegis_common::*;
use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_NOEXIST,
};
use aya_ebpf::helpers::bpf_redirect_neigh;
use aya_ebpf::programs::TcContext;

/// `BPF_ADJ_ROOM_MAC`: room between the Ethernet and the IP header.
const BEHIND_ETHERNET: u32 = 1;

/// The gateway of a new flow: of those that answer, of these of the near ones, the one with the highest hash (rendezvous
/// hashing: one that fails moves its own flows only). If none answers, all count: it may be us who do not hear. 0 =
/// there is none. A function of its own for the verifier's sake, like `take` in `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn choose(allocation: u32, flow: u32) -> u32 {
    let Some(allocation) = maps::ALLOCATIONS.get(allocation) else { return 0 };
    let (mut best, mut best_hash) = (0, 0);
    let mut at = 0;
    while at < GATEWAYS_PER_ALLOCATION {
        let gateway = allocation.gateways[at];
        if at >= usize::from(allocation.gateway_count) {
            break;
        }
        let near = at < usize::from(allocation.near_count);
        at += 1;
        let Some(peer) = PEERS.get(u32::from(gateway)) else { continue };
        let mut hash = mix(flow ^ peer.address) >> 2;
        hash |= u32::from(peer.flags & PEER_SILENT == 0) << 31 | u32::from(near) << 30;
        if best == 0 || hash > best_hash {
            (best, best_hash) = (u32::from(gateway), hash);
        }
    }
    best
}

/// Makes a new flow through a gateway.
#[inline(always)]
pub fn open(key: &FlowKey, flow: ForwardValue) -> Result<ForwardValue, Stop> {
    let ports = u32::from(key.local_port) << 16 | u32::from(key.remote_port);
    let hash = mix(mix(key.local ^ key.remote.rotate_left(16)) ^ ports);
    let peer = choose(u32::from(flow.allocation), hash) as u16;
    if peer == 0 {
        return Err(Stop::Refuse(Counter::RefuseUnavailable));
    }
    let flow = ForwardValue { egress: key.local, egress_port: key.local_port, peer, ..flow };
    let back = ReverseValue { pod: key.local, pod_port: key.local_port, ..Default::default() };
    // What is there already is this very flow's, made by another CPU.
    let _ = REVERSE.insert(key, &back, u64::from(BPF_NOEXIST));
    if FORWARD.insert(key, &flow, u64::from(BPF_NOEXIST)).is_ok() {
        maps::count(Counter::NewFlow, 0);
        return Ok(flow);
    }
    // SAFETY: copied at once.
    if let Some(winner) = unsafe { FORWARD.get(key) } {
        return Ok(*winner);
    }
    let _ = REVERSE.remove(key);
    Err(Stop::Refuse(Counter::RefuseTableFull))
}

/// Whether the flow goes on through its gateway. A connection keeps to a gateway that is only silent, as it would not
/// survive a change; what opens or has no connection takes another at once.
#[inline(always)]
pub fn keeps(flow: &ForwardValue, key: &FlowKey, flags: u8) -> Result<bool, Stop> {
    let lost = PEERS.get(u32::from(flow.peer)).map_or(PEER_SILENT | PEER_LOST, |peer| peer.flags);
    if lost & PEER_SILENT == 0 {
        return Ok(true);
    }
    if key.protocol != headers::TCP {
        return Ok(false);
    }
    // SAFETY: read at once.
    let answered = unsafe { REVERSE.get(&reverse_key(key, flow.egress, flow.egress_port)) }
        .is_some_and(|back| back.last_seen != 0);
    if !answered && flags & SYN != 0 {
        return Ok(false);
    }
    if lost & PEER_LOST != 0 {
        remove(key, flow);
        return Err(Stop::Refuse(Counter::RefuseGatewayLost));
    }
    Ok(true)
}

/// Encapsulates the packet for the gateway and sends it. Gives the verdict.
#[inline(always)]
pub fn send(
    ctx: &TcContext,
    config: &Config,
    packet: &Packet,
    transport: Option<&Transport>,
    peer: u16,
    allocation: u16,
) -> Result<i32, Stop> {
    let no_way = Stop::Drop(Counter::DropNoNeighbour);
    let Some(gateway) = PEERS.get(u32::from(peer)).filter(|peer| peer.address != 0) else {
        return Err(no_way);
    };
    // SAFETY: fields of the context.
    let (segments, ifindex) = unsafe { ((*ctx.skb.skb).gso_size, (*ctx.skb.skb).ifindex) };
    let bytes = packet.ip.total_length();
    // The kernel makes the segments of a large packet smaller by as much as is added here.
    if segments == 0 && u32::from(bytes) > limit(config) {
        return Err(Stop::Refuse(Counter::TooBigOut));
    }
    let name = maps::ALLOCATIONS.get(u32::from(allocation)).map_or(0, |allocation| allocation.name);
    let ports = transport.map_or(0, |transport| {
        u32::from(transport.source_port()) << 16 | u32::from(transport.destination_port())
    });
    let fixed = if packet.ip.protocol == headers::TCP { 0 } else { BPF_F_ADJ_ROOM_FIXED_GSO };
    let flags = u64::from(BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | fixed);
    ctx.adjust_room(GATEWAY_OVERHEAD as i32, BEHIND_ETHERNET, flags).map_err(|_| MALFORMED)?;
    let length = bytes.wrapping_add(GATEWAY_OVERHEAD as u16);
    let outer = Outer {
        ip: encapsulation(config.tunnel_address, gateway.address, length),
        geneve: Geneve::new(
            source_port(packet.ip.source, packet.ip.destination, ports),
            config.tunnel_port as u16,
            length - 20,
            VNI_GATEWAY,
        ),
        option: OPTION_ALLOCATION,
        name,
    };
    ctx.store(ETH_LEN, &outer, 0).map_err(|_| MALFORMED)?;
    // It is the node's own packet now, and passes this program once more.
    ctx.skb.set_mark(headers::mark(ctx) & !config.mark);
    maps::count(Counter::ToGateway, u32::from(bytes));
    // SAFETY: plain arguments: the kernel finds the way to the outer destination.
    Ok(unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) } as i32)
}

const MALFORMED: Stop = Stop::Drop(Counter::DropMalformedOut);

/// Largest packet that fits into the tunnel to a gateway.
#[inline(always)]
pub fn limit(config: &Config) -> u32 {
    config.tunnel_mtu.saturating_sub(GATEWAY_OVERHEAD - TUNNEL_OVERHEAD)
}

/// The headers in front of the pod's packet.
#[repr(C)]
#[derive(Clone, Copy)]
struct Outer {
    ip: headers::Ipv4,
    geneve: Geneve,
    option: u32,
    name: u32,
}
const _: () = assert!(size_of::<Outer>() == GATEWAY_OVERHEAD as usize);
