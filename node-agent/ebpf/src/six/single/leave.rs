//! What leaves from a single address: source and port are written, with all checksums.

use super::{ORIGINS6, address_of};
use crate::fence;
use crate::flow::{self, Leaving};
use crate::headers::{self, ACK, ETH_LEN, SYN, TCP, UDP};
use crate::maps::{self, OPENING};
use crate::meter;
use crate::opening::{self, Asked, MADE, Opener};
use crate::rule;
use crate::six::leave::{
    DESTINATION, MALFORMED, NO_FLAGS, NO_WAY, Outbound, REFUSED, SOURCE, UNREAD, clamp, length,
    read_outbound, recall6, remember6,
};
use crate::six::{FIRST, ICMPV6, IPV6_LEN, Ipv6, LATER, Layers, by_node, follow_headers, has_ports, lookup};
use crate::snat::{self, Stop, belongs};
use aegis_common::*;
use aya_ebpf::bindings::tcx_action_base::{TCX_DROP, TCX_NEXT};
use aya_ebpf::bindings::{__sk_buff, BPF_ANY, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_csum_diff;
use aya_ebpf::programs::TcContext;

/// In place of a verdict: the packet is of no flow from a single address.
pub const NOT_OURS: u32 = 200;
/// The policy's first allocation has nothing to leave from now, but there is another.
pub const TRY_SECONDARY: u32 = 201;

const ECHO: u8 = 128;
const ECHO_REPLY: u8 = 129;
/// Length of an address.
const ADDRESS: u32 = size_of::<Address6>() as u32;

/// Sends a covered packet of a pod on, if it is of a flow that leaves from a single address.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn follow_single(skb: *mut __sk_buff) -> u32 {
    let ctx = &TcContext::new(skb);
    let (Some(config), Some(config6)) = (maps::config(), lookup::config()) else { return NOT_OURS };
    if config6.singles == 0 || headers::mark(ctx) & config.mark == 0 {
        return NOT_OURS;
    }
    by_node::speak_for_pod6(skb);
    let Some(outbound) = read(skb) else { return NOT_OURS };
    let pod = pod_of(skb);
    if pod == NOBODY {
        return NOT_OURS;
    }
    let (incarnation, suffix) = ((pod >> 32) as u32, pod as u32);
    if outbound.layers.fragment == LATER {
        return later(ctx, &outbound.flow, incarnation);
    }
    if !has_ports(outbound.flow.protocol) {
        return NOT_OURS;
    }
    let mut leaving = Leaving::new(single_flow(&outbound.flow, suffix, config.seed));
    if outbound.quoted != 0 {
        return error(ctx, outbound, &leaving.key, incarnation);
    }
    let opens = opens(ctx, outbound);
    if opens == NEITHER {
        return NOT_OURS;
    }
    match snat::follow(&raw mut leaving, u64::from(incarnation), flags(outbound), opens) {
        snat::FOLLOWED => finish(ctx, send(ctx, config, outbound, &leaving, incarnation)),
        snat::FENCED => finish(ctx, Err(Stop::Drop(Counter::DropFenced))),
        snat::OVER | snat::LOST => {
            leaving.end();
            NOT_OURS
        }
        _ => NOT_OURS,
    }
}

/// Opens a flow from a single address, as `Opening::single` says, and sends its packet.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn open_single(skb: *mut __sk_buff) -> u32 {
    let ctx = &TcContext::new(skb);
    let (Some(config), Some(opening)) = (maps::config(), OPENING.get_ptr_mut(0)) else {
        return TCX_DROP as u32;
    };
    // SAFETY: a per-CPU value, written by `leave6` just before; programs on one CPU do not nest here.
    let asked = unsafe { &(*opening).single };
    let pod = pod_of(skb);
    let Some(outbound) = read(skb).filter(|_| pod != NOBODY) else { return TCX_DROP as u32 };
    let (incarnation, suffix) = ((pod >> 32) as u32, pod as u32);
    let mut leaving = Leaving::new(single_flow(&outbound.flow, suffix, config.seed));
    let result = match begin(ctx, outbound, asked, &mut leaving, incarnation) {
        MADE => send(ctx, config, outbound, &leaving, incarnation),
        made if opening::for_another(made) && asked.allocation != asked.secondary => return TRY_SECONDARY,
        made => opening::result(made),
    };
    finish(ctx, result)
}

/// Reads a packet of a pod, to where there is room.
#[inline(always)]
fn read(skb: *mut __sk_buff) -> Option<&'static Outbound> {
    let opening = OPENING.get_ptr_mut(0)?;
    // SAFETY: a per-CPU value that only one program at a time uses; programs on one CPU do not nest here.
    let outbound = unsafe { &mut (*opening).outbound };
    *outbound = UNREAD;
    if read_outbound(skb, &raw mut *outbound) == 0 { None } else { Some(outbound) }
}

/// In place of a pod: the packet is of none that is known.
const NOBODY: u64 = u64::MAX;

/// Incarnation (upper half) and suffix of the pod that a packet is of. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pod_of(skb: *mut __sk_buff) -> u64 {
    let ctx = TcContext::new(skb);
    let (Some(config), Ok(ip)) = (maps::config(), ctx.load::<Ipv6>(ETH_LEN)) else { return NOBODY };
    match lookup::pod(maps::generation(config), &ip.source).filter(|_| ip.is_sound()) {
        Some(pod) => u64::from(pod.incarnation) << 32 | u64::from(pod.suffix),
        None => NOBODY,
    }
}

/// What is said of a packet that is none of ours.
#[inline(always)]
fn finish(ctx: &TcContext, result: Result<(), Stop>) -> u32 {
    let bytes = length(ctx);
    match result {
        Ok(()) => {
            maps::count(Counter::Translated, bytes);
            TCX_NEXT as u32
        }
        Err(Stop::Drop(reason)) => {
            maps::count(reason, bytes);
            TCX_DROP as u32
        }
        Err(Stop::Refuse(_)) if maps::taking_over() => {
            maps::count(Counter::DropTakingOver, bytes);
            TCX_DROP as u32
        }
        Err(Stop::Refuse(reason)) => {
            maps::count(reason, bytes);
            REFUSED
        }
    }
}

/// Flags of a segment, as flows note them.
#[inline(always)]
fn flags(outbound: &Outbound) -> u32 {
    if outbound.flags == NO_FLAGS { 0 } else { outbound.flags }
}

/// In place of whether it opens a flow: it can be of none.
const NEITHER: u32 = 2;

/// Whether a packet that is no error opens a flow.
#[inline(always)]
fn opens(ctx: &TcContext, outbound: &Outbound) -> u32 {
    match outbound.layers.protocol as u8 {
        TCP => u32::from(flags(outbound) & u32::from(SYN | ACK) == u32::from(SYN)),
        UDP => 1,
        ICMPV6 => match ctx.load::<u8>(outbound.layers.offset as usize) {
            Ok(ECHO) => 1,
            Ok(ECHO_REPLY) => 0,
            _ => NEITHER,
        },
        _ => NEITHER,
    }
}

/// Makes the flow: see `opening`. What is refused, is counted with its destination.
#[inline(always)]
fn begin(
    ctx: &TcContext,
    outbound: &Outbound,
    asked: &Asked,
    leaving: &mut Leaving,
    incarnation: u32,
) -> u32 {
    let opens = if outbound.layers.fragment == LATER { NEITHER } else { opens(ctx, outbound) };
    if outbound.quoted != 0 || opens == 0 {
        return Counter::RefuseNoFlow as u32;
    }
    let mut made = Counter::RefuseProtocol as u32;
    if opens != NEITHER {
        let by = Opener { incarnation, binding: asked.rule as u16, peer: 0 };
        made = opening::make_single(leaving, asked.allocation, by, flags(outbound) as u8);
    }
    if made == MADE {
        let origin = SingleValue { address: asked.remote };
        let _ = ORIGINS6.insert(&leaving.key.remote, &origin, u64::from(BPF_ANY));
        rule::count_flow(asked.generation, asked.rule, rule::LEFT);
        if asked.is_second != 0 {
            maps::count(Counter::SecondaryFlow, 0);
        }
    } else if made & opening::SILENT == 0 && !maps::taking_over() {
        meter::refuses6(&raw const outbound.flow, asked.allocation, asked.rule, made);
    }
    made
}

/// Sends a packet of a flow.
#[inline(always)]
fn send(
    ctx: &TcContext,
    config: &Config,
    outbound: &Outbound,
    leaving: &Leaving,
    incarnation: u32,
) -> Result<(), Stop> {
    let (layers, way) = (&outbound.layers, &leaving.way);
    if layers.fragment == FIRST {
        remember_datagram(&raw const *outbound, way.egress, u32::from(way.meter), incarnation);
    }
    let bytes = length(ctx);
    clamp(ctx, config, bytes, layers, outbound.flags);
    let header = meter::header(layers.offset, layers.protocol as u8);
    meter::sends_segments(ctx.skb.skb, u32::from(way.meter), bytes, header);
    match rewrite_single(ctx.skb.skb, &raw const *layers, way.egress, u32::from(way.egress_port)) {
        0 => Err(MALFORMED),
        _ => Ok(()),
    }
}

/// Remembers for later fragments where the first one of a datagram has left from. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn remember_datagram(first: *const Outbound, egress: u32, meter: u32, incarnation: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(Outbound { flow, layers, .. }) = (unsafe { first.as_ref() }) else { return 0 };
    let datagram = Flow6Key { ports: layers.id, protocol: FRAGMENTED, ..*flow };
    let way = Flow6Value { incarnation, network: [0, egress], meter, ..NO_WAY };
    remember6(&raw const datagram, &raw const way, NO_FLAGS, u64::from(BPF_ANY))
}

/// Writes the source address and port, with all checksums; 0 if that is not possible. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rewrite_single(skb: *mut __sk_buff, layers: *const Layers, egress: u32, port: u32) -> u32 {
    let ctx = &TcContext::new(skb);
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(layers) = (unsafe { layers.as_ref() }) else { return 0 };
    let (Some(egress), Ok(source)) = (address_of(egress), ctx.load::<Address6>(ETH_LEN + SOURCE)) else {
        return 0;
    };
    let at = layers.offset as usize;
    // Where the checksum and the port are. A zero checksum means "none" in UDP, where it may be (RFC 6935).
    let (checksum, place, flags) = match layers.protocol as u8 {
        TCP => (at + 16, at, 0),
        UDP => (at + 6, at, u64::from(BPF_F_MARK_MANGLED_0)),
        _ => (at + 2, at + 4, 0),
    };
    let Ok(old) = ctx.load::<u16>(place) else { return 0 };
    let new = (port as u16).to_be();
    let change = change(&source, &egress);
    let written = ctx
        .l4_csum_replace(checksum, 0, change, flags | u64::from(BPF_F_PSEUDO_HDR))
        .and_then(|()| ctx.l4_csum_replace(checksum, u64::from(old), u64::from(new), flags | 2))
        .and_then(|()| ctx.store(place, &new, 0))
        .and_then(|()| ctx.store(ETH_LEN + SOURCE, &egress, 0));
    u32::from(written.is_ok())
}

/// What replacing an address makes of a sum, as `l4_csum_replace` wants it.
#[inline(always)]
fn change(from: &Address6, to: &Address6) -> u64 {
    let (from, to) = (core::ptr::from_ref(from), core::ptr::from_ref(to));
    // SAFETY: both are addresses, which the helper only reads.
    unsafe { bpf_csum_diff(from.cast_mut().cast(), ADDRESS, to.cast_mut().cast(), ADDRESS, 0) as u64 }
}

/// Sends a later fragment after its first one. (The host stack fragments in order.)
#[inline(always)]
fn later(ctx: &TcContext, datagram: &Flow6Key, incarnation: u32) -> u32 {
    let mut way = Flow6Value { incarnation, ..NO_WAY };
    if recall6(datagram, &raw mut way, NO_FLAGS) == 0 || way.network[0] != 0 {
        return NOT_OURS;
    }
    let egress = way.network[1];
    if fence::is_closed(egress) {
        return finish(ctx, Err(Stop::Drop(Counter::DropFenced)));
    }
    meter::sends(way.meter, 1, u64::from(length(ctx)));
    let written = address_of(egress).is_some_and(|egress| ctx.store(ETH_LEN + SOURCE, &egress, 0).is_ok());
    finish(ctx, if written { Ok(()) } else { Err(MALFORMED) })
}

/// Sends an ICMPv6 error of a pod about a packet of a flow: the origin sees it from the egress address, and in it the packet that
/// it has sent.
#[inline(always)]
fn error(ctx: &TcContext, outbound: &Outbound, key: &FlowKey, incarnation: u32) -> u32 {
    let found = flow::find(key);
    if !found.exists() || !belongs(&found.value, key, u64::from(incarnation)) {
        return NOT_OURS;
    }
    let flow = &found.value;
    if fence::is_closed(flow.egress) {
        return finish(ctx, Err(Stop::Drop(Counter::DropFenced)));
    }
    let port = u32::from(flow.egress_port);
    match rewrite_error_single(ctx.skb.skb, outbound.layers.offset, outbound.quoted, flow.egress, port) {
        0 => finish(ctx, Err(MALFORMED)),
        _ => finish(ctx, Ok(())),
    }
}

/// A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rewrite_error_single(
    skb: *mut __sk_buff,
    icmp: u32,
    quoted: u32,
    egress: u32,
    port: u32,
) -> u32 {
    let ctx = &TcContext::new(skb);
    let (Some(egress), Ok(ip)) = (address_of(egress), ctx.load::<Ipv6>(quoted as usize)) else { return 0 };
    let mut layers = Layers::default();
    if follow_headers(skb, u32::from(ip.next), quoted + IPV6_LEN as u32, &raw mut layers) == 0 {
        return 0;
    }
    let checksum = icmp as usize + 2;
    let place = layers.offset as usize + if layers.protocol == u32::from(ICMPV6) { 4 } else { 2 };
    let Ok(old) = ctx.load::<u16>(place) else { return 0 };
    let new = (port as u16).to_be();
    let change = change(&ip.destination, &egress);
    // Once as a part of what is quoted, and once as that of the pseudo-header: both were the pod's.
    let written = ctx
        .l4_csum_replace(checksum, 0, change, 0)
        .and_then(|()| ctx.l4_csum_replace(checksum, u64::from(old), u64::from(new), 2))
        .and_then(|()| ctx.l4_csum_replace(checksum, 0, change, u64::from(BPF_F_PSEUDO_HDR)))
        .and_then(|()| ctx.store(quoted as usize + DESTINATION, &egress, 0))
        .and_then(|()| ctx.store(place, &new, 0))
        .and_then(|()| ctx.store(ETH_LEN + SOURCE, &egress, 0));
    u32::from(written.is_ok())
}
