//! `uplink_egress`: gives covered packets their egress address and port, and lets nothing else of them out.

use crate::headers::{self, ACK, ETH_LEN, ETH_P_IP, Ipv4, Packet, SYN, Transport};
use crate::maps::{self, ADDRESSES, FORWARD, FRAGMENTS_OUT, REVERSE};
use crate::ports::{self, Claim};
use crate::{icmp_out, mss, refuse, via};
use aegis_common::*;
use aya_ebpf::bindings::tcx_action_base::{TCX_DROP, TCX_NEXT};
use aya_ebpf::bindings::{__sk_buff, BPF_ANY, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_NOEXIST};
use aya_ebpf::programs::TcContext;

/// Why a packet does not pass.
pub enum Stop {
    /// Dropped without an answer.
    Drop(Counter),
    /// Turned away with an answer.
    Refuse(Counter),
}

pub fn run(ctx: &TcContext) -> i32 {
    if ctx.skb.protocol() != u32::from(ETH_P_IP) {
        return TCX_NEXT;
    }
    let Some(config) = maps::config() else { return TCX_NEXT };
    let covered = headers::mark(ctx) & config.mark != 0;
    let Some(packet) = Packet::read(ctx) else {
        if !covered {
            return TCX_NEXT;
        }
        maps::count(Counter::DropMalformedOut, ctx.len());
        return TCX_DROP;
    };
    let bytes = u32::from(packet.ip.total_length());
    if !covered {
        // SAFETY: only presence matters.
        if unsafe { ADDRESSES.get(&packet.ip.source) }.is_none() {
            return TCX_NEXT;
        }
        maps::count(Counter::DropForged, bytes);
        return TCX_DROP;
    }
    match translate(ctx, config, &packet) {
        Ok(verdict) => {
            if verdict == TCX_NEXT {
                maps::count(Counter::Translated, bytes);
            }
            verdict
        }
        Err(Stop::Drop(reason)) => {
            maps::count(reason, bytes);
            TCX_DROP
        }
        Err(Stop::Refuse(reason)) => {
            maps::count(reason, bytes);
            refuse::answer(ctx, config, &packet, reason)
        }
    }
}

const MALFORMED: Stop = Stop::Drop(Counter::DropMalformedOut);

#[inline(always)]
fn translate(ctx: &TcContext, config: &Config, packet: &Packet) -> Result<i32, Stop> {
    let (source, protocol) = (packet.ip.source, packet.ip.protocol);
    let generation = maps::generation(config);
    let pod = maps::pod(generation, source);
    if pod.is_none() && !maps::in_pod_range(config, source) {
        return Err(Stop::Drop(Counter::DropLeak));
    }
    if packet.ip.is_later_fragment() {
        return later_fragment(ctx, config, packet);
    }
    let (transport, flags) = match protocol {
        headers::TCP => {
            let flags = packet.tcp_flags(ctx).ok_or(MALFORMED)?;
            (packet.transport(ctx).ok_or(MALFORMED)?, flags)
        }
        headers::UDP => (packet.transport(ctx).ok_or(MALFORMED)?, 0),
        headers::ICMP => {
            let transport = packet.transport(ctx).ok_or(MALFORMED)?;
            if headers::is_icmp_error(transport.icmp_type()) {
                return icmp_out::translate(ctx, packet, &pod).map(|()| TCX_NEXT);
            }
            (transport, 0)
        }
        _ => return Err(Stop::Refuse(Counter::RefuseProtocol)),
    };
    let key = key(&packet.ip, &transport);
    let flow = match FORWARD.get_ptr_mut(&key) {
        // SAFETY: map values stay readable until the program ends.
        Some(flow) if belongs(unsafe { &*flow }, &pod) && goes_on(unsafe { &*flow }, &key, flags)? => {
            // SAFETY: as above.
            let flow = unsafe { &mut *flow };
            touch(flow, &key, flags);
            *flow
        }
        other => {
            let opens = match protocol {
                headers::TCP => flags & (SYN | ACK) == SYN,
                headers::UDP => true,
                _ => transport.icmp_type() == headers::ICMP_ECHO,
            };
            if !opens {
                return Err(Stop::Refuse(Counter::RefuseNoFlow));
            }
            if let Some(flow) = other {
                // SAFETY: as above.
                remove(&key, unsafe { &*flow });
            }
            open(generation, pod.unwrap_or_default(), &key, flags)?
        }
    };
    let (egress, port) = (flow.egress, flow.egress_port);
    if packet.ip.is_first_fragment() {
        let value = FragmentValue { address: egress, port, peer: flow.peer, seen: maps::now() };
        let _ = FRAGMENTS_OUT.insert(&fragment_key(&packet.ip), &value, u64::from(BPF_ANY));
    }
    if protocol == headers::TCP && flags & SYN != 0 && config.mss != 0 {
        clamp_mss(ctx.skb.skb, packet.transport_offset as u32, config.mss);
    }
    if flow.peer != 0 {
        return via::send(ctx, config, packet, Some(&transport), flow.peer, flow.allocation);
    }
    rewrite(ctx, packet, &transport, egress, port).map_err(|_| MALFORMED)?;
    Ok(TCX_NEXT)
}

/// Whether a flow can go on as it is: always, unless its gateway has failed.
#[inline(always)]
fn goes_on(flow: &ForwardValue, key: &FlowKey, flags: u8) -> Result<bool, Stop> {
    if flow.peer == 0 { Ok(true) } else { via::keeps(flow, key, flags) }
}

/// Key in `FORWARD` of the flow of a packet from a pod.
#[inline(always)]
pub fn key(ip: &Ipv4, transport: &Transport) -> FlowKey {
    let (local_port, remote_port) = match ip.protocol {
        headers::ICMP => (transport.icmp_id(), 0),
        _ => (transport.source_port(), transport.destination_port()),
    };
    FlowKey {
        local: ip.source,
        remote: ip.destination,
        local_port,
        remote_port,
        protocol: ip.protocol,
        pad: [0; 3],
    }
}

/// Whether a flow was made by this pod, not by an earlier one with its address. Of an address that nobody has named (its
/// pod is just gone) the flow is the last one's.
#[inline(always)]
pub fn belongs(flow: &ForwardValue, pod: &Option<PodValue>) -> bool {
    pod.is_none_or(|pod| pod.incarnation == flow.incarnation)
}

/// Ends a flow and gives its port back.
#[inline(always)]
pub fn remove(key: &FlowKey, flow: &ForwardValue) {
    end(key, flow.egress, u32::from(flow.egress_port));
}

/// A function of its own for the verifier's sake, like `take` in `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn end(key: *const FlowKey, egress: u32, port: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's key.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let port = port as u16;
    let _ = REVERSE.remove(&reverse_key(key, egress, port));
    let _ = FORWARD.remove(key);
    ports::release(&block_key(key, egress, port), port);
    0
}

/// Notes a packet of a flow that exists.
#[inline(always)]
pub fn touch(flow: &mut ForwardValue, key: &FlowKey, flags: u8) {
    let now = maps::now();
    // Written only when it changes: the line stays shared between CPUs.
    if flow.last_seen != now {
        flow.last_seen = now;
    }
    if key.protocol == headers::TCP {
        if flags & (SYN | ACK) == SYN {
            reopen(flow, key);
        }
        let seen = seen_after(flow.seen, flags);
        if seen != flow.seen {
            flow.seen = seen;
        }
    }
}

/// Forgets what a connection saw that has ended, by whichever side, when the pod uses its port for a new one.
#[inline(always)]
fn reopen(flow: &mut ForwardValue, key: &FlowKey) {
    let Some(reverse) = REVERSE.get_ptr_mut(&reverse_key(key, flow.egress, flow.egress_port)) else { return };
    // SAFETY: map values stay readable until the program ends.
    let reverse = unsafe { &mut *reverse };
    if (flow.seen | reverse.seen) & (SEEN_FIN | SEEN_RST) != 0 {
        flow.seen = 0;
        reverse.seen = 0;
    }
}

/// The key in `REVERSE` of a flow with this key in `FORWARD`.
#[inline(always)]
pub fn reverse_key(key: &FlowKey, egress: u32, egress_port: u16) -> FlowKey {
    FlowKey { local: egress, local_port: egress_port, ..*key }
}

/// Makes a new flow: from a port of this node, or through a gateway where it has none.
#[inline(always)]
fn open(generation: u32, pod: PodValue, key: &FlowKey, flags: u8) -> Result<ForwardValue, Stop> {
    let unavailable = Stop::Refuse(Counter::RefuseUnavailable);
    let port = if key.protocol == headers::ICMP { maps::NO_PORT } else { u32::from(key.remote_port) };
    let verdict = maps::verdict(generation, pod.class, key.remote, key.protocol, port);
    let Some(verdict) = verdict.filter(|verdict| verdict.action == ACTION_ALLOCATE) else {
        return Err(unavailable);
    };
    let number = u32::from(verdict.allocation);
    let Some(allocation) = maps::ALLOCATIONS.get(number) else { return Err(unavailable) };
    let fresh = fresh(key, number, flags);
    let flow = ForwardValue { incarnation: pod.incarnation, binding: verdict.binding, ..fresh };
    if allocation.count == 0 {
        return via::open(key, flow);
    }
    claim(key, number, 0, flow)
}

/// A flow of which one packet is known, before it has a way.
#[inline(always)]
pub fn fresh(key: &FlowKey, allocation: u32, flags: u8) -> ForwardValue {
    ForwardValue {
        allocation: allocation as u16,
        last_seen: maps::now(),
        seen: if key.protocol == headers::TCP { seen_after(0, flags) } else { 0 },
        ..Default::default()
    }
}

/// Takes a port for a new flow of a pod on the node `peer` (0 = this one) and enters it.
#[inline(always)]
pub fn claim(key: &FlowKey, allocation: u32, peer: u16, flow: ForwardValue) -> Result<ForwardValue, Stop> {
    let mut claim = Claim {
        pod: key.local,
        remote: key.remote,
        pod_port: key.local_port,
        remote_port: key.remote_port,
        allocation,
        start: mix(key.remote ^ u32::from(key.remote_port)),
        egress: 0,
        egress_port: 0,
        protocol: u16::from(key.protocol),
        peer,
        outcome: ports::UNAVAILABLE,
    };
    ports::claim(&mut claim);
    match claim.outcome {
        ports::TAKEN => (),
        ports::UNAVAILABLE => return Err(Stop::Refuse(Counter::RefuseUnavailable)),
        ports::NO_ROOM => return Err(Stop::Refuse(Counter::RefuseTableFull)),
        _ => return Err(Stop::Refuse(Counter::RefuseNoPort)),
    }
    let (egress, egress_port) = (claim.egress, claim.egress_port as u16);
    let flow = ForwardValue { egress, egress_port, ..flow };
    if FORWARD.insert(key, &flow, u64::from(BPF_NOEXIST)).is_ok() {
        maps::count(Counter::NewFlow, 0);
        return Ok(flow);
    }
    // Another CPU made the same flow first, or there is no room: undo, in the reverse order.
    let _ = REVERSE.remove(&reverse_key(key, egress, egress_port));
    ports::release(&block_key(key, egress, egress_port), egress_port);
    // SAFETY: copied at once.
    match unsafe { FORWARD.get(key) } {
        Some(winner) => Ok(*winner),
        None => Err(Stop::Refuse(Counter::RefuseTableFull)),
    }
}

/// The block that a flow's port belongs to.
#[inline(always)]
pub fn block_key(key: &FlowKey, egress: u32, egress_port: u16) -> BlockKey {
    BlockKey {
        egress,
        remote: key.remote,
        remote_port: key.remote_port,
        protocol: key.protocol,
        block: (egress_port >> 11) as u8,
    }
}

/// Key of a datagram from a pod.
#[inline(always)]
pub fn fragment_key(ip: &Ipv4) -> FragmentKey {
    FragmentKey {
        source: ip.source,
        destination: ip.destination,
        id: u16::from_be(ip.id),
        protocol: ip.protocol,
        pad: 0,
    }
}

/// The host stack fragments in order, so the first fragment has always passed before.
#[inline(always)]
fn later_fragment(ctx: &TcContext, config: &Config, packet: &Packet) -> Result<i32, Stop> {
    let Some(first) = maps::first_fragment(&FRAGMENTS_OUT, &fragment_key(&packet.ip)) else {
        return Err(Stop::Drop(Counter::DropFragmentOut));
    };
    if first.peer != 0 {
        // The gateway asks for no allocation here: it goes by the first fragment too.
        return via::send(ctx, config, packet, None, first.peer, 0);
    }
    rewrite_source(ctx, packet, first.address).map_err(|_| MALFORMED)?;
    Ok(TCX_NEXT)
}

/// Writes source address and port, with all checksums.
#[inline(always)]
fn rewrite(
    ctx: &TcContext,
    packet: &Packet,
    transport: &Transport,
    egress: u32,
    port: u16,
) -> Result<(), i64> {
    let offset = packet.transport_offset;
    let new_port = u64::from(port.to_be());
    if packet.ip.protocol == headers::ICMP {
        let old_id = u64::from(transport.icmp_id().to_be());
        ctx.l4_csum_replace(offset + 2, old_id, new_port, 2)?;
        ctx.store(offset + 4, &port.to_be(), 0)?;
    } else {
        let (checksum, flags) = match packet.ip.protocol {
            headers::TCP => (offset + 16, 0),
            // A zero checksum means "none" in UDP, and a computed zero is sent as ones (RFC 768).
            _ => (offset + 6, u64::from(BPF_F_MARK_MANGLED_0)),
        };
        let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR) | 4;
        ctx.l4_csum_replace(checksum, u64::from(packet.ip.source), u64::from(egress), pseudo)?;
        let old_port = u64::from(transport.source_port().to_be());
        ctx.l4_csum_replace(checksum, old_port, new_port, flags | 2)?;
        ctx.store(offset, &port.to_be(), 0)?;
    }
    rewrite_source(ctx, packet, egress)
}

/// Writes the source address, with the IP checksum.
#[inline(always)]
pub fn rewrite_source(ctx: &TcContext, packet: &Packet, egress: u32) -> Result<(), i64> {
    ctx.l3_csum_replace(ETH_LEN + 10, u64::from(packet.ip.source), u64::from(egress), 4)?;
    ctx.store(ETH_LEN + 12, &egress, 0)
}

/// Lowers the MSS option of a SYN, so that what the origin sends fits into the tunnel (RFC 9293 section 3.7.1). A function
/// of its own for the verifier's sake, like `take` in `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn clamp_mss(skb: *mut __sk_buff, start: u32, limit: u32) -> u32 {
    let (ctx, start, limit) = (TcContext::new(skb), start as usize, limit as u16);
    let Ok(offset_byte) = ctx.load::<u8>(start + 12) else { return 0 };
    let end = usize::from(offset_byte >> 4) * 4;
    let Some(found) = mss::find(end, |at| ctx.load(start + at).ok()) else { return 0 };
    if found.value > limit {
        let (old, new) = (mss::word(found.at, found.value), mss::word(found.at, limit));
        let _ = ctx.l4_csum_replace(start + 16, u64::from(old), u64::from(new), 2);
        let _ = ctx.store(start + found.at, &limit.to_be(), 0);
    }
    0
}
