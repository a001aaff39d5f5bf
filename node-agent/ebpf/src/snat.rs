//! `uplink_egress`: gives covered packets their egress address and port, and lets nothing else of them out.

use crate::checksum;
use crate::fence;
use crate::flow::{self, Leaving};
use crate::headers::{self, ACK, ETH_LEN, ETH_P_IP, Ipv4, Packet, SYN, Transport};
use crate::identification;
use crate::maps::{self, ADDRESSES, FRAGMENTS_OUT};
use crate::opening::{self, Opener};
use crate::{bind, host, icmp_out, meter, mss, observe, refuse, rule, six, via};
use aegis_common::*;
use aya_ebpf::bindings::tcx_action_base::{TCX_DROP, TCX_NEXT};
use aya_ebpf::bindings::{__sk_buff, BPF_ANY, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::programs::TcContext;

/// Why a packet does not pass.
pub enum Stop {
    /// Dropped without an answer.
    Drop(Counter),
    /// Turned away with an answer.
    Refuse(Counter),
}

#[inline(always)]
pub fn run(ctx: &TcContext) -> i32 {
    match ctx.skb.protocol() {
        IPV4 => leave4(ctx.skb.skb) as i32,
        IPV6 => six::leave::run(ctx),
        _ => TCX_NEXT,
    }
}

const IPV4: u32 = ETH_P_IP as u32;
const IPV6: u32 = six::ETH_P_IPV6 as u32;

/// A function of its own for the stack's sake: that of IPv6 is not beside it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn leave4(skb: *mut __sk_buff) -> u32 {
    leave(&TcContext::new(skb)) as u32
}

#[inline(always)]
fn leave(ctx: &TcContext) -> i32 {
    let Some(config) = maps::config() else { return TCX_NEXT };
    let marked = headers::mark(ctx) & config.mark != 0;
    let own = config.host_levels != 0 && host::is_own(ctx);
    let Some(packet) = Packet::read(ctx) else {
        if !marked || own {
            return TCX_NEXT;
        }
        maps::count(Counter::DropMalformedOut, ctx.len());
        return TCX_DROP;
    };
    let bytes = packet.length;
    let own = own && !maps::in_pod_range(config, packet.ip.source);
    if !marked || own {
        // SAFETY: only presence matters.
        if unsafe { ADDRESSES.get(&packet.ip.source) }.is_some() {
            let reason = match if own { bind::bound_leaves(ctx.skb.skb) } else { bind::FORGED } {
                bind::PASSES => return TCX_NEXT,
                bind::FENCED => Counter::DropFenced,
                bind::SOCKETLESS => Counter::DropSocketless,
                _ => Counter::DropForged,
            };
            maps::count(reason, bytes);
            return TCX_DROP;
        }
        if !own {
            return TCX_NEXT;
        }
    }
    match translate(ctx, config, &packet, own, marked) {
        Ok(PASSED) => {
            if packet.ip.is_first_fragment() {
                host::pass_fragments(ctx.skb.skb);
            }
            TCX_NEXT
        }
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
        Err(Stop::Refuse(_)) if maps::taking_over() => {
            maps::count(Counter::DropTakingOver, bytes);
            TCX_DROP
        }
        Err(Stop::Refuse(reason)) => {
            maps::count(reason, bytes);
            refuse::answer(ctx, reason)
        }
    }
}

const MALFORMED: Stop = Stop::Drop(Counter::DropMalformedOut);
/// In place of a verdict: the packet is the node's own, of no flow, and passes as it is.
const PASSED: i32 = i32::MAX;

/// `own`: the packet is of a socket of this node's, and only what its control group says tells whether it is covered. It may not
/// open a flow where it is `marked`, since nftables has seen what is not seen here: see `nft`.
#[inline(always)]
fn translate(
    ctx: &TcContext,
    config: &Config,
    packet: &Packet,
    own: bool,
    marked: bool,
) -> Result<i32, Stop> {
    let (source, protocol) = (packet.ip.source, packet.ip.protocol);
    let generation = maps::generation(config);
    // Not the pod's whole value, for the sake of the stack.
    let (whose, class) = if own {
        match host::judge_own(ctx.skb.skb, generation) {
            host::PASSES => return Ok(PASSED),
            host::HELD => return Err(Stop::Drop(Counter::DropUnknownPod)),
            ANYBODY => (ANYBODY, 0),
            pod => (pod & u64::from(u32::MAX), (pod >> 32) as u32),
        }
    } else {
        maps::pod(generation, source).map_or((ANYBODY, 0), |pod| (u64::from(pod.incarnation), pod.class))
    };
    let untouched = own && class == 0;
    if !own && whose == ANYBODY && !maps::in_pod_range(config, source) {
        return icmp_out::translate_of_node(ctx, packet);
    }
    if packet.ip.is_later_fragment() {
        return match later_fragment(ctx, packet) {
            Err(Stop::Drop(Counter::DropFragmentOut))
                if untouched || own && !host::is_held(generation, packet.ip.destination) =>
            {
                Ok(PASSED)
            }
            other => other,
        };
    }
    let parsed = match protocol {
        headers::TCP => packet.transport(ctx).zip(packet.tcp_flags(ctx)),
        headers::UDP | headers::ICMP => packet.transport(ctx).zip(Some(0)),
        _ if untouched || own && !is_covered(generation, class, &packet.ip) => return Ok(PASSED),
        _ => return Err(Stop::Refuse(Counter::RefuseProtocol)),
    };
    let (transport, flags) = match parsed {
        Some(parsed) => parsed,
        None if untouched => return Ok(PASSED),
        None => return Err(MALFORMED),
    };
    if protocol == headers::ICMP && headers::is_icmp_error(transport.icmp_type()) {
        if !own {
            return icmp_out::translate(ctx, whose);
        }
        // The kernel's own: about what came back for a pod, or for a socket that has just been closed. A marked one must be.
        return match icmp_out::translate_by_node(ctx) {
            Err(Stop::Drop(Counter::RefuseNoFlow | Counter::DropMalformedOut)) if !marked => Ok(PASSED),
            other => other,
        };
    }
    let mut leaving = Leaving::new(key(&packet.ip, &transport));
    let opens = match protocol {
        headers::TCP => flags & (SYN | ACK) == SYN,
        headers::UDP => true,
        _ => transport.icmp_type() == headers::ICMP_ECHO,
    };
    match follow(&mut leaving, whose, u32::from(flags), u32::from(opens && whose != ANYBODY)) {
        FOLLOWED => (),
        LOST => {
            leaving.end();
            return Err(Stop::Refuse(Counter::RefuseGatewayLost));
        }
        FENCED => return Err(Stop::Drop(Counter::DropFenced)),
        other => {
            if other == OVER {
                leaving.end();
            }
            if own {
                if untouched || !is_opened(ctx.skb.skb, generation, class, &leaving.key) {
                    return Ok(PASSED);
                }
                // What it may not open began before anything was covered, or answers somebody. Of TCP only a SYN opens: the
                // rest is of a connection from before, unless it is known to have been a flow.
                let lost = match protocol {
                    headers::TCP => !opens && host::remembers(ctx.skb.skb, leaving.key.digest()) != 0,
                    headers::UDP => false,
                    _ => !opens && transport.icmp_type() != headers::ICMP_ECHO_REPLY,
                };
                if !lost && (!opens || marked && protocol != headers::TCP) {
                    return Ok(PASSED);
                }
            }
            if !opens {
                return Err(Stop::Refuse(Counter::RefuseNoFlow));
            }
            if whose == ANYBODY {
                return Err(Stop::Refuse(Counter::RefuseUnavailable));
            }
            open(generation, class, whose as u32, &mut leaving, flags)?;
            if own && protocol == headers::TCP {
                host::remember(ctx.skb.skb, leaving.key.digest());
            }
        }
    }
    let (egress, port, peer) = (leaving.way.egress, leaving.way.egress_port, leaving.way.peer);
    // A gateway gives it one by itself.
    let renumbered = peer == 0 && identification::matters(&packet.ip);
    let identification = if renumbered { number(ctx, packet, egress, port) } else { 0 };
    if packet.ip.is_first_fragment() {
        let meter = leaving.way.meter;
        let value = FragmentValue { address: egress, port, peer, seen: maps::now(), identification, meter };
        let _ = FRAGMENTS_OUT.insert(&fragment_key(&packet.ip), &value, u64::from(BPF_ANY));
    }
    if protocol == headers::TCP && flags & SYN != 0 && config.mss != 0 {
        let segment = packet.length.saturating_sub((packet.transport_offset - ETH_LEN) as u32);
        clamp_mss(ctx.skb.skb, packet.transport_offset as u32, segment, config.mss);
    }
    if peer != 0 {
        let ports = u32::from(transport.source_port()) << 16 | u32::from(transport.destination_port());
        return via::send(ctx, peer, u32::from(leaving.way.allocation), ports);
    }
    let header = meter::header(packet.transport_offset as u32, protocol);
    meter::sends_segments(ctx.skb.skb, u32::from(leaving.way.meter), packet.length, header);
    rewrite(ctx, packet, &transport, egress, port).map_err(|_| MALFORMED)?;
    if renumbered {
        identification::write(ctx, &packet.ip, identification).map_err(|_| MALFORMED)?;
    }
    Ok(TCX_NEXT)
}

/// A new identification for a packet, or for the segments that it is yet to be cut into.
#[inline(always)]
fn number(ctx: &TcContext, packet: &Packet, egress: u32, port: u16) -> u16 {
    let flow = u32::from(port) << 16 | u32::from(packet.ip.protocol);
    let segments = identification::segments(ctx.skb.skb);
    identification::next_identification(egress, packet.ip.destination, flow, segments) as u16
}

/// The packet is of a flow that goes on.
pub const FOLLOWED: u32 = 0;
/// It is of a flow that is to be ended, since its gateway is lost.
pub const LOST: u32 = 1;
/// It is of no flow.
pub const NONE: u32 = 2;
/// It opens one, and is of a flow that is to be ended for that.
pub const OVER: u32 = 4;
/// It is of a flow that may not go on from here at present.
pub const FENCED: u32 = 3;

/// Finds the flow of a packet and notes the packet. A function of its own for the verifier's sake, like `take` in `ports`, and
/// for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn follow(leaving: *mut Leaving, whose: u64, flags: u32, opens: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(leaving) = (unsafe { leaving.as_mut() }) else { return NONE };
    // Not copied, for the sake of the stack.
    let (key, flags) = (&leaving.key, flags as u8);
    let found = flow::find(key);
    if !found.exists() {
        return NONE;
    }
    let flow = &found.value;
    leaving.way.like(flow);
    let goes_on = if !belongs(flow, key, whose) {
        via::MOVES
    } else if flow.peer == 0 {
        // The rest waits for the agent: if the Lease is renewed after all, connections go on.
        match (fence::is_closed(flow.egress), opens) {
            (false, _) => via::STAYS,
            (true, 0) => return FENCED,
            (true, _) => via::MOVES,
        }
    } else {
        via::keeps(flow, key, flags)
    };
    match goes_on {
        via::STAYS => {
            found.touch(key, flags);
            if flow.buried != 0 && whose != ANYBODY {
                found.unbury(key);
            }
            FOLLOWED
        }
        via::MOVES if opens == 0 => NONE,
        via::MOVES => OVER,
        _ => LOST,
    }
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

/// In place of an incarnation: of an address that nobody has named (its pod is just gone) a flow is the last one's.
pub const ANYBODY: u64 = u64::MAX;

/// Whether a flow was made by this pod, not by an earlier one with its address or by one of another node.
#[inline(always)]
pub fn belongs(flow: &ForwardValue, key: &FlowKey, whose: u64) -> bool {
    !flow.is_guest(key) && (whose == ANYBODY || whose == u64::from(flow.incarnation))
}

/// Whether packets of other protocols than those with ports are covered.
#[inline(always)]
fn is_covered(generation: u32, class: u32, ip: &Ipv4) -> bool {
    maps::verdict(generation, class, ip.destination, ip.protocol, maps::NO_PORT).is_some()
}

/// Makes a new flow, if the policy says so.
#[inline(always)]
fn open(generation: u32, class: u32, incarnation: u32, leaving: &mut Leaving, flags: u8) -> Result<(), Stop> {
    let key = &leaving.key;
    let mut by = generation;
    let verdict = opens(generation, class, key);
    // Between `pod_ingress` and here the policy may have changed. What it covered, and now covers no more, is a flow from
    // before: it keeps the address. While such packets are under way, the agent keeps the last generation.
    let verdict = verdict.or_else(|| {
        by = generation.wrapping_sub(1);
        opens(by, maps::pod(by, key.local)?.class, key)
    });
    let Some(verdict) = verdict else { return Err(Stop::Refuse(Counter::RefuseUnavailable)) };
    let number = rule::number(verdict.binding);
    match verdict.action {
        ACTION_ALLOCATE => {
            let opener = Opener { incarnation, binding: number as u16, peer: 0 };
            let made =
                opening::make_of_either(leaving, [verdict.allocation, verdict.secondary], opener, flags);
            match made {
                Ok(()) => _ = rule::count_flow(by, number, rule::LEFT),
                Err(Stop::Refuse(reason)) => refuses(leaving, verdict.allocation, number, reason),
                Err(Stop::Drop(_)) => {}
            }
            made
        }
        ACTION_FORBID => {
            rule::count_flow(by, number, rule::DENIED);
            refuses(leaving, NO_ALLOCATION, number, Counter::RefusePolicy);
            Err(Stop::Refuse(Counter::RefusePolicy))
        }
        _ => {
            rule::count_flow(by, number, rule::LACKED);
            refuses(leaving, NO_ALLOCATION, number, Counter::RefuseUnavailable);
            Err(Stop::Refuse(Counter::RefuseUnavailable))
        }
    }
}

/// Counts a new flow that is refused, unless it may come again and find its flow taken over.
#[inline(always)]
fn refuses(leaving: &Leaving, allocation: u16, number: u32, reason: Counter) {
    if !maps::taking_over() {
        meter::refuses(&raw const leaving.key, u32::from(allocation), number, reason as u32);
    }
}

/// Whether the policy covers a new flow of a pod of the host network. What only observes it, has seen it then.
#[inline(always)]
fn is_opened(skb: *mut __sk_buff, generation: u32, class: u32, key: &FlowKey) -> bool {
    let verdict = maps::whole_verdict(generation, class, key.remote, key.protocol, maps::rules_port(key));
    if verdict.binding >> OBSERVED_SHIFT != 0 {
        observe::observe(skb, generation, verdict.binding);
    }
    verdict.action != ACTION_PASS
}

/// What a generation of the policy says of a new flow; `None` = not covered.
#[inline(always)]
fn opens(generation: u32, pod_class: u32, key: &FlowKey) -> Option<VerdictValue> {
    maps::verdict(generation, pod_class, key.remote, key.protocol, maps::rules_port(key))
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
fn later_fragment(ctx: &TcContext, packet: &Packet) -> Result<i32, Stop> {
    let Some(first) = maps::first_fragment(&FRAGMENTS_OUT, &fragment_key(&packet.ip)) else {
        return Err(Stop::Drop(Counter::DropFragmentOut));
    };
    if first.address == packet.ip.source && first.peer == 0 {
        return Ok(PASSED);
    }
    if first.peer != 0 {
        // The gateway asks for no allocation here: it goes by the first fragment too.
        return via::send(ctx, first.peer, 0, 0);
    }
    if fence::is_closed(first.address) {
        return Err(Stop::Drop(Counter::DropFenced));
    }
    meter::sends(u32::from(first.meter), 1, u64::from(packet.length));
    rewrite_source(ctx, packet, first.address)
        .and_then(|()| identification::write(ctx, &packet.ip, first.identification))
        .map_err(|_| MALFORMED)?;
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
        if offset == ETH_LEN + size_of::<Ipv4>() {
            return ctx.store(IP_CHECKSUM, &with_source(packet, egress, port), 0);
        }
        ctx.store(offset, &port.to_be(), 0)?;
    }
    rewrite_source(ctx, packet, egress)
}

const IP_CHECKSUM: usize = ETH_LEN + 10;

/// What an IPv4 header has from its checksum on, and the port that follows it if it is without options.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tail {
    checksum: u16,
    source: [u8; 4],
    destination: [u8; 4],
    port: u16,
}

/// With another source. One write instead of three.
#[inline(always)]
fn with_source(packet: &Packet, egress: u32, port: u16) -> Tail {
    let ip = &packet.ip;
    Tail {
        checksum: checksum::apply(ip.checksum, checksum::difference(ip.source, egress)),
        source: egress.to_ne_bytes(),
        destination: ip.destination.to_ne_bytes(),
        port: port.to_be(),
    }
}

/// Writes the source address, with the IP checksum.
#[inline(always)]
pub fn rewrite_source(ctx: &TcContext, packet: &Packet, egress: u32) -> Result<(), i64> {
    ctx.l3_csum_replace(IP_CHECKSUM, u64::from(packet.ip.source), u64::from(egress), 4)?;
    ctx.store(ETH_LEN + 12, &egress, 0)
}

/// Lowers the MSS option of a SYN, so that what the origin sends fits into the tunnel (RFC 9293 section 3.7.1). A function
/// of its own for the verifier's sake, like `take` in `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn clamp_mss(skb: *mut __sk_buff, start: u32, segment: u32, limit: u32) -> u32 {
    let (ctx, start, limit) = (TcContext::new(skb), start as usize, limit as u16);
    let Ok(offset_byte) = ctx.load::<u8>(start + 12) else { return 0 };
    let end = usize::from(offset_byte >> 4) * 4;
    // What follows the packet in the frame is no option.
    if end > segment as usize {
        return 0;
    }
    let Some(found) = mss::find(end, |at| ctx.load(start + at).ok()) else { return 0 };
    if found.value > limit {
        let (old, new) = (mss::word(found.at, found.value), mss::word(found.at, limit));
        let _ = ctx.l4_csum_replace(start + 16, u64::from(old), u64::from(new), 2);
        let _ = ctx.store(start + found.at, &limit.to_be(), 0);
    }
    0
}
