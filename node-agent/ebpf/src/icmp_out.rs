//! ICMP errors that a pod sends about packets of its flows: the origin must see them from the egress address, and the
//! packet they quote must be the one that the origin sent (RFC 5508 section 4.2).

use crate::headers::{self, Ipv4, Packet, Transport};
use crate::maps::FORWARD;
use crate::snat::{Stop, belongs, rewrite_source};
use aegis_common::{Counter, FlowKey, ForwardValue, PodValue};
use aya_ebpf::programs::TcContext;

const MALFORMED: Stop = Stop::Drop(Counter::DropMalformedOut);

/// Translates the error if it is about a live flow.
#[inline(always)]
pub fn translate(ctx: &TcContext, packet: &Packet, pod: &Option<PodValue>) -> Result<(), Stop> {
    let icmp = packet.transport_offset;
    let quoted = icmp + 8;
    let ip: Ipv4 = ctx.load(quoted).map_err(|_| MALFORMED)?;
    let length = ip.header_length().ok_or(MALFORMED)?;
    let ports: Transport = ctx.load(quoted + length).map_err(|_| MALFORMED)?;
    // The quoted packet went from the origin to the pod.
    let (local_port, remote_port) = match ip.protocol {
        headers::ICMP => (ports.icmp_id(), 0),
        _ => (ports.destination_port(), ports.source_port()),
    };
    let key = FlowKey {
        local: ip.destination,
        remote: ip.source,
        local_port,
        remote_port,
        protocol: ip.protocol,
        pad: [0; 3],
    };
    // SAFETY: read at once.
    let flow = unsafe { FORWARD.get(&key) };
    let about_it = |flow: &&ForwardValue| {
        belongs(flow, pod) && ip.destination == packet.ip.source && !ip.is_later_fragment()
    };
    let Some(flow) = flow.filter(about_it) else {
        return Err(Stop::Drop(Counter::RefuseNoFlow));
    };
    let (egress, port) = (flow.egress, flow.egress_port);
    write(ctx, packet, &ip, length, local_port, egress, port).map_err(|_| MALFORMED)
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
