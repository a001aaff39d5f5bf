//! Sending a pod's packet through a gateway: another node that holds slices of the allocation translates it.
//!
//! The flow is entered here too, with the pod's own address in place of the egress address: it keeps to its gateway for
//! life, and answers are taken in for it only.

use crate::flow;
use crate::headers::{self, ETH_LEN, Packet, SYN};
use crate::maps::{self, OPENING, PEERS, SPENT as SPENT_GATEWAYS};
use crate::meter;
use crate::snat::Stop;
use crate::split;
use crate::tunnel::{Geneve, encapsulation, source_port};
use aegis_common::*;
use aya_ebpf::bindings::{
    __sk_buff, BPF_ANY, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
};
use aya_ebpf::helpers::bpf_redirect_neigh;
use aya_ebpf::programs::TcContext;

/// `BPF_ADJ_ROOM_MAC`: room between the Ethernet and the IP header.
const BEHIND_ETHERNET: u32 = 1;

/// Beside a gateway: it, and all others that answer, had no port towards the origin just before.
pub const SPENT: u32 = 1 << 16;

/// The gateway of a new flow: of those that answer, of these of those that are not known to lack a port towards the origin, of
/// these of the near ones, the one with the highest hash (rendezvous hashing: one that fails moves its own flows only). If none
/// answers, all count: it may be us who do not hear. 0 = there is none. A function of its own for the verifier's sake, like `take`
/// in `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn choose(allocation: u32, flow: *const FlowKey) -> u32 {
    let (mut best, mut at) = (0, 0);
    while at < GATEWAYS_PER_ALLOCATION as u32 {
        best = rank(allocation, at, flow).max(best);
        at += 1;
    }
    let spent = best != 0 && best & UNSPENT == 0;
    best as u32 & 0xffff | if spent { SPENT } else { 0 }
}

// Bits of a rank, which is the greater the better.
const ANSWERS: u64 = 1 << 63;
const UNSPENT: u64 = 1 << 62;
const NEAR: u64 = 1 << 61;

/// How good a gateway is for a flow, with its index in the lowest bits; 0 = there is none at this place. A function of its own, so
/// that the verifier follows it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rank(allocation: u32, at: u32, flow: *const FlowKey) -> u64 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return 0 };
    let Some(allocation) = maps::ALLOCATIONS.get(allocation) else { return 0 };
    if at >= u32::from(allocation.gateway_count) || at >= GATEWAYS_PER_ALLOCATION as u32 {
        return 0;
    }
    let gateway = allocation.gateways[at as usize & (GATEWAYS_PER_ALLOCATION - 1)];
    let Some(peer) = PEERS.get(u32::from(gateway)) else { return 0 };
    if peer.address == 0 {
        return 0;
    }
    let mut rank = u64::from(mix(flow.digest() ^ peer.address)) << 16 | u64::from(gateway);
    if peer.flags & PEER_SILENT == 0 {
        rank |= ANSWERS;
    }
    if !is_spent(allocation.name, peer.address, flow) {
        rank |= UNSPENT;
    }
    if at < u32::from(allocation.near_count) {
        rank |= NEAR;
    }
    rank
}

/// Says which gateway, allocation and origin; not on the stack, where there is no room for it.
#[inline(always)]
fn spent_key(name: u32, gateway: u32, flow: &FlowKey) -> Option<&'static SpentKey> {
    let opening = OPENING.get_ptr_mut(0)?;
    // SAFETY: a per-CPU value, of which only this function and its callers use this part; programs on one CPU do not nest here.
    let key = unsafe { &mut (*opening).spent };
    (key.name, key.gateway, key.remote) = (name, gateway, flow.remote);
    (key.remote_port, key.protocol, key.pad) = (flow.remote_port, flow.protocol, 0);
    Some(key)
}

/// Whether the gateway said not long ago that it has no port.
#[inline(always)]
fn is_spent(name: u32, gateway: u32, flow: &FlowKey) -> bool {
    let Some(key) = spent_key(name, gateway, flow) else { return false };
    // SAFETY: an aligned word in a map's value, read at once.
    let Some(said) = (unsafe { SPENT_GATEWAYS.get(key) }) else { return false };
    maps::now().saturating_sub(*said) <= SPENT_LIFE
}

/// Notes that the gateway of a new flow has no port for it. Gives 1 where there is another way, which the flow's next packet takes if it
/// is ended. A function of its own for the verifier's sake, like `take` in `ports`, and for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn may_turn(key: *const FlowKey) -> u32 {
    // SAFETY: as above.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let found = flow::find(key);
    let flow = &found.value;
    if !found.exists() || maps::taking_over() {
        return 0;
    }
    let allocation = u32::from(flow.allocation);
    let (Some(named), Some(gateway)) = (maps::ALLOCATIONS.get(allocation), PEERS.get(u32::from(flow.peer)))
    else {
        return 0;
    };
    let Some(spent) = spent_key(named.name, gateway.address, key) else { return 0 };
    let _ = SPENT_GATEWAYS.insert(spent, &maps::now(), u64::from(BPF_ANY));
    let elsewhere = flow.seen & HAS_SECONDARY != 0 || choose(allocation, key) & SPENT == 0;
    if !elsewhere {
        meter::refuses(key, allocation, u32::from(flow.binding), Counter::RefuseNoPort as u32);
    }
    u32::from(elsewhere)
}

/// Ends a flow; gives 1 if there was one. A function of its own for the verifier's sake, like `take` in `ports`, and for that of the
/// stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn turn(key: *const FlowKey) -> u32 {
    // SAFETY: as above.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let found = flow::find(key);
    u32::from(found.exists() && found.end(key))
}

/// What is known of a gateway's silence.
#[inline(always)]
fn silence(peer: &PeerValue) -> u16 {
    // Without an address it is no peer any more.
    if peer.address == 0 { PEER_SILENT | PEER_LOST } else { peer.flags }
}

/// The flow goes on through its gateway.
pub const STAYS: u32 = 0;
/// It takes another.
pub const MOVES: u32 = 1;
/// It is over: its gateway is lost.
pub const LOST: u32 = 2;

/// Whether the flow goes on through its gateway. A connection keeps to a gateway that is only silent, as it would not
/// survive a change; what opens or has no connection takes another at once.
#[inline(always)]
pub fn keeps(flow: &ForwardValue, key: &FlowKey, flags: u8) -> u32 {
    let silence = PEERS.get(u32::from(flow.peer)).map_or(PEER_SILENT | PEER_LOST, silence);
    if silence & PEER_SILENT == 0 {
        return STAYS;
    }
    if key.protocol != headers::TCP {
        return MOVES;
    }
    let answered = flow::find_back(&flow::reverse_key(key, flow)).value.last_seen != 0;
    if !answered && flags & SYN != 0 {
        return MOVES;
    }
    if silence & PEER_LOST != 0 { LOST } else { STAYS }
}

/// Encapsulates the packet for the gateway and sends it. Gives the verdict. `ports` are the packet's, for the underlay to
/// spread flows by.
#[inline(always)]
pub fn send(ctx: &TcContext, peer: u16, allocation: u32, ports: u32) -> Result<i32, Stop> {
    let peer = u32::from(peer);
    let mut sent = encapsulate(ctx.skb.skb, peer, allocation, ports);
    if sent == TOO_BIG {
        sent = match split::cut(ctx.skb.skb) {
            split::CUT => encapsulate(ctx.skb.skb, peer, allocation, ports),
            split::UNCUT => TOO_BIG,
            _ => FAILED,
        };
    }
    match sent {
        NO_WAY => Err(Stop::Drop(Counter::DropNoNeighbour)),
        TOO_BIG => Err(Stop::Refuse(Counter::TooBigOut)),
        FAILED => Err(Stop::Drop(Counter::DropMalformedOut)),
        verdict => Ok(verdict as i32),
    }
}

/// In place of a verdict: the gateway cannot be reached.
const NO_WAY: u32 = 1 << 16;
/// The packet does not fit into the tunnel.
const TOO_BIG: u32 = 2 << 16;
/// It could not be changed.
const FAILED: u32 = 3 << 16;

/// A function of its own for the verifier's sake, like `take` in `ports`, and for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn encapsulate(skb: *mut __sk_buff, peer: u32, allocation: u32, ports: u32) -> u32 {
    let ctx = &TcContext::new(skb);
    let (Some(config), Some(packet)) = (maps::config(), Packet::read(ctx)) else { return FAILED };
    let packet = &packet;
    let Some(gateway) = PEERS.get(peer).filter(|peer| peer.address != 0) else { return NO_WAY };
    if headers::largest(ctx, packet, GATEWAY_OVERHEAD) > limit(config) {
        return TOO_BIG;
    }
    let name = maps::ALLOCATIONS.get(allocation).map_or(0, |allocation| allocation.name);
    let fixed = if packet.ip.protocol == headers::TCP { 0 } else { BPF_F_ADJ_ROOM_FIXED_GSO };
    let flags = u64::from(BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | fixed);
    if ctx.adjust_room(GATEWAY_OVERHEAD as i32, BEHIND_ETHERNET, flags).is_err() {
        return FAILED;
    }
    let whole = packet.length + GATEWAY_OVERHEAD;
    // 0 where it is longer than can be said (see `Packet::length`): the kernel writes it anew when it cuts the segments.
    let length = if whole > u32::from(u16::MAX) { 0 } else { whole as u16 };
    let outer = Outer {
        ip: encapsulation(config.tunnel_address, gateway.address, length),
        geneve: Geneve::new(
            source_port(packet.ip.source, packet.ip.destination, ports),
            config.tunnel_port as u16,
            length.saturating_sub(20),
            VNI_GATEWAY,
        ),
        option: OPTION_ALLOCATION,
        name,
    };
    if ctx.store(ETH_LEN, &outer, 0).is_err() {
        return FAILED;
    }
    // It is the node's own packet now, and passes this program once more.
    ctx.skb.set_mark(headers::mark(ctx) & !config.mark);
    maps::count(Counter::ToGateway, packet.length);
    // The uplink towards the gateway may be another than the one towards the origin.
    // SAFETY: a field of the context.
    let ifindex = if gateway.ifindex != 0 { gateway.ifindex } else { unsafe { (*ctx.skb.skb).ifindex } };
    // SAFETY: plain arguments: the kernel finds the way to the outer destination.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as u32 }
}

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
