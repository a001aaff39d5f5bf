//! ICMP errors that a pod sends about packets of its flows: the origin must see them from the egress address, and the
//! packet they quote must be the one that the origin sent (RFC 5508 section 4.2).

use crate::fence;
use crate::flow;
use crate::headers::{self, Ipv4, Packet, Transport};
use crate::snat::{Stop, belongs, rewrite_source};
use crate::via;
use aegis_common::{Counter, FlowKey};
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::tcx_action_base::TCX_NEXT;
use aya_ebpf::programs::TcContext;

const MALFORMED: Stop = Stop::Drop(Counter::DropMalformedOut);

/// Translates the error if it is about a live flow. Gives the verdict.
#[inline(always)]
pub fn translate(ctx: &TcContext, whose: u64) -> Result<i32, Stop> {
    match translate_error(ctx.skb.skb, whose) {
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
extern "C" fn translate_error(skb: *mut __sk_buff, whose: u64) -> u32 {
    let ctx = &TcContext::new(skb);
    match Packet::read(ctx).ok_or(MALFORMED).and_then(|packet| error(ctx, &packet, whose)) {
        Ok(flow) => flow,
        Err(Stop::Drop(Counter::RefuseNoFlow)) => NO_FLOW,
        Err(Stop::Drop(Counter::DropFenced)) => FENCED,
        Err(_) => FAILED,
    }
}

#[inline(always)]
fn error(ctx: &TcContext, packet: &Packet, whose: u64) -> Result<u32, Stop> {
    let icmp = packet.transport_offset;
    let quoted = icmp + 8;
    let ip: Ipv4 = ctx.load(quoted).map_err(|_| MALFORMED)?;
    let length = ip.header_length().ok_or(MALFORMED)?;
    if !packet.has(8 + length + 8) {
        return Err(MALFORMED);
    }
    let ports: Transport = ctx.load(quoted + length).map_err(|_| MALFORMED)?;
    let key = key_of_quoted(&ip, &ports);
    let found = flow::find(&key);
    let flow = found.value;
    let about_it = found.exists()
        && belongs(&flow, &key, whose)
        && ip.destination == packet.ip.source
        && !ip.is_later_fragment();
    if !about_it {
        return Err(Stop::Drop(Counter::RefuseNoFlow));
    }
    if flow.peer != 0 {
        return Ok(u32::from(flow.allocation) << 16 | u32::from(flow.peer));
    }
    if fence::is_closed(flow.egress) {
        return Err(Stop::Drop(Counter::DropFenced));
    }
    write(ctx, packet, &ip, length, key.local_port, flow.egress, flow.egress_port).map_err(|_| MALFORMED)?;
    Ok(TRANSLATED)
}

/// Key in `FORWARD` of the flow of a packet, quoted by an error of the pod, that went from the origin to the pod.
#[inline(always)]
pub fn key_of_quoted(ip: &Ipv4, ports: &Transport) -> FlowKey {
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
