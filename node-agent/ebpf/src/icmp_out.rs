//! ICMP errors that a pod sends about packets of its flows, or that its node sends in its place (it is gone, or has a narrower
//! link): the origin must see them from the egress address, and the packet they quote must be the one that the origin sent
//! (RFC 5508 section 4.2).

use crate::fence;
use crate::flow;
use crate::headers::{self, Ipv4, Packet, Transport};
use crate::snat::{ANYBODY, Stop, belongs, rewrite_source};
use crate::via;
use aegis_common::{Counter, FlowKey};
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::tcx_action_base::TCX_NEXT;
use aya_ebpf::programs::TcContext;

const MALFORMED: Stop = Stop::Drop(Counter::DropMalformedOut);

/// Translates the error of a pod if it is about a live flow. Gives the verdict.
#[inline(always)]
pub fn translate(ctx: &TcContext, whose: u64) -> Result<i32, Stop> {
    send(ctx, whose, 0)
}

/// Translates an error of the node itself if it is about a live flow. Gives the verdict.
#[inline(always)]
pub fn translate_by_node(ctx: &TcContext) -> Result<i32, Stop> {
    send(ctx, ANYBODY, 1)
}

/// Translates a covered packet that is no pod's if it is an error of the node itself about a live flow of a pod.
#[inline(always)]
pub fn translate_of_node(ctx: &TcContext, packet: &Packet) -> Result<i32, Stop> {
    const LEAK: Stop = Stop::Drop(Counter::DropLeak);
    // SAFETY: a field of the context. What the node itself sends came in nowhere.
    let forwarded = unsafe { (*ctx.skb.skb).ingress_ifindex } != 0;
    if forwarded || packet.ip.protocol != headers::ICMP || packet.ip.is_later_fragment() {
        return Err(LEAK);
    }
    match packet.transport(ctx) {
        Some(transport) if headers::is_icmp_error(transport.icmp_type()) => translate_by_node(ctx),
        _ => Err(LEAK),
    }
}

#[inline(always)]
fn send(ctx: &TcContext, whose: u64, by_node: u32) -> Result<i32, Stop> {
    match translate_error(ctx.skb.skb, whose, by_node) {
        NO_FLOW => Err(Stop::Drop(Counter::RefuseNoFlow)),
        FENCED => Err(Stop::Drop(Counter::DropFenced)),
        FAILED => Err(MALFORMED),
        TRANSLATED => Ok(TCX_NEXT),
        // The gateway translates it, as it did what is quoted.
        flow => via::send(ctx, flow as u16, flow >> 16, 0),
    }
}

/// In place of the flow's gateway (peer 0 is none) and allocation: it is translated.
const TRANSLATED: u32 = 0;
/// The flow may not go on from here at present.
const FENCED: u32 = 1 << 29;
/// No live flow is quoted.
const NO_FLOW: u32 = 1 << 30;
/// It cannot be parsed.
const FAILED: u32 = 1 << 31;

/// A function of its own for the verifier's sake, like `take` in `ports`, and for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn translate_error(skb: *mut __sk_buff, whose: u64, by_node: u32) -> u32 {
    let ctx = &TcContext::new(skb);
    match Packet::read(ctx).ok_or(MALFORMED).and_then(|packet| error(ctx, packet, whose, by_node != 0)) {
        Ok(flow) => flow,
        Err(Stop::Drop(Counter::RefuseNoFlow)) => NO_FLOW,
        Err(Stop::Drop(Counter::DropFenced)) => FENCED,
        Err(_) => FAILED,
    }
}

#[inline(always)]
fn error(ctx: &TcContext, mut packet: Packet, whose: u64, by_node: bool) -> Result<u32, Stop> {
    let icmp = packet.transport_offset;
    let quoted = icmp + 8;
    let ip: Ipv4 = ctx.load(quoted).map_err(|_| MALFORMED)?;
    let length = ip.header_length().ok_or(MALFORMED)?;
    if !packet.has(8 + length + 8) {
        return Err(MALFORMED);
    }
    let ports: Transport = ctx.load(quoted + length).map_err(|_| MALFORMED)?;
    let key = key_to_pod(&ip, &ports);
    let found = flow::find(&key);
    let flow = found.value;
    let about_it = found.exists()
        && belongs(&flow, &key, whose)
        && (by_node || ip.destination == packet.ip.source)
        && !ip.is_later_fragment();
    if !about_it {
        return Err(Stop::Drop(Counter::RefuseNoFlow));
    }
    if by_node {
        // From here on it is the pod's.
        rewrite_source(ctx, &packet, ip.destination).map_err(|_| MALFORMED)?;
        packet.ip.source = ip.destination;
    }
    if flow.peer != 0 {
        return Ok(u32::from(flow.allocation) << 16 | u32::from(flow.peer));
    }
    if fence::is_closed(flow.egress) {
        return Err(Stop::Drop(Counter::DropFenced));
    }
    write(ctx, &packet, &ip, length, key.local_port, flow.egress, flow.egress_port).map_err(|_| MALFORMED)?;
    Ok(TRANSLATED)
}

/// Key in `FORWARD` of the flow of a packet from the origin to the pod, such as an error of the pod quotes.
#[inline(always)]
pub fn key_to_pod(ip: &Ipv4, ports: &Transport) -> FlowKey {
    let (local_port, remote_port) = match ip.protocol {
        headers::ICMP => (ports.icmp_id(), 0),
        _ => (ports.destination_port(), ports.source_port()),
    };
    FlowKey {
        local: ip.destination,
        remote: ip.source,
        local_port,
        remote_port,
        protocol: ip.protocol,
        pad: [0; 3],
    }
}

#[inline(always)]
fn write(
    ctx: &TcContext,
    packet: &Packet,
    ip: &Ipv4,
    length: usize,
    old_port: u16,
    egress: u32,
    port: u16,
) -> Result<(), i64> {
    let icmp = packet.transport_offset;
    let quoted = icmp + 8;
    let checksum = icmp + 2;
    // The quoted destination, and the quoted header's own checksum: inside the ICMP checksum the two cancel out, since
    // the header they belong to sums to the same before and after.
    ctx.l3_csum_replace(quoted + 10, u64::from(ip.destination), u64::from(egress), 4)?;
    ctx.store(quoted + 16, &egress, 0)?;
    let at = match ip.protocol {
        headers::ICMP => quoted + length + 4,
        _ => quoted + length + 2,
    };
    ctx.l4_csum_replace(checksum, u64::from(old_port.to_be()), u64::from(port.to_be()), 2)?;
    ctx.store(at, &port.to_be(), 0)?;
    rewrite_source(ctx, packet, egress)
}
