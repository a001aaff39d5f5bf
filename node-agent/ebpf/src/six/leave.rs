//! `uplink_egress`: gives covered IPv6 packets their egress address, and lets nothing else of them out. All of the address
//! changes and no checksum: bits 80 to 95 make up for the rest, wherever the sum is, in quoted packets and fragments too.

use super::lookup::{self, ALLOCATIONS6, FLOWS6, NETWORKS};
use super::single;
use super::{
    FIRST, ICMPV6, IPV6_LEN, Ipv6, LATER, Layers, START, WHOLE, by_node, follow_headers, has_ports, is_error,
    ports, refuse, turned,
};
use crate::headers::{self, ACK, ETH_LEN, SYN, TCP};
use crate::maps::{self, OPENING, SLOTS};
use crate::meter;
use crate::rule;
use crate::snat::{self, Stop};
use aegis_common::*;
use aya_ebpf::bindings::tcx_action_base::{TCX_DROP, TCX_NEXT};
use aya_ebpf::bindings::{__sk_buff, BPF_ANY, BPF_F_INGRESS, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::TcContext;

pub const MALFORMED: Stop = Stop::Drop(Counter::DropMalformedOut);
/// Offset of the source address in the IPv6 header, and of the destination.
pub const SOURCE: usize = 8;
pub const DESTINATION: usize = 24;
/// What MSS of IPv6 is less than that of IPv4: its header is longer.
const LONGER: u32 = 20;

#[inline(always)]
pub fn run(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let mut verdict = single::leave::follow_single(skb);
    if verdict == single::leave::NOT_OURS {
        verdict = leave6(skb, 0);
        if verdict == SINGLE {
            verdict = single::leave::open_single(skb);
        }
        if verdict == single::leave::TRY_SECONDARY {
            verdict = leave6(skb, 1);
            if verdict == SINGLE {
                verdict = single::leave::open_single(skb);
            }
        }
    }
    match verdict {
        REFUSED if refuse::answer_skb6(skb) != 0 => {
            // The answer is not a packet of the pod any more.
            let bit = maps::config().map_or(0, |config| config.mark);
            ctx.skb.set_mark(headers::mark(ctx) & !bit);
            // SAFETY: a field of the context, plain arguments.
            unsafe { bpf_redirect((*skb).ifindex, u64::from(BPF_F_INGRESS)) as i32 }
        }
        REFUSED => TCX_DROP,
        verdict => verdict as i32,
    }
}

/// The packet is to be turned away with an answer.
pub const REFUSED: u32 = 100;
/// It opens a flow that is to leave from a single address, by what `Opening::single` says.
const SINGLE: u32 = 101;

/// Sends a packet of a pod from a /64. `second`: nothing could be had of the policy's first allocation, and only the other one is
/// asked.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn leave6(skb: *mut __sk_buff, second: u32) -> u32 {
    let ctx = &TcContext::new(skb);
    let (Some(config), Some(_)) = (maps::config(), lookup::config()) else { return TCX_NEXT as u32 };
    let bytes = ctx.len().saturating_sub(ETH_LEN as u32);
    let covered = headers::mark(ctx) & config.mark != 0;
    if covered {
        by_node::speak_for_pod6(ctx.skb.skb);
    }
    let ip = ctx.load::<Ipv6>(ETH_LEN).ok().filter(Ipv6::is_sound);
    let stop = match ip {
        None if !covered => return TCX_NEXT as u32,
        None => MALFORMED,
        // SAFETY: only presence matters.
        Some(ip) if !covered => match unsafe { NETWORKS.get(&network_of(&ip.source)) } {
            None if !single::is(&ip.source) => return TCX_NEXT as u32,
            _ => Stop::Drop(Counter::DropForged),
        },
        Some(ip) => match translate(ctx, config, &ip, second) {
            Ok(SINGLE) => return SINGLE,
            Ok(verdict) => {
                maps::count(Counter::Translated, bytes);
                return verdict;
            }
            Err(stop) => stop,
        },
    };
    match stop {
        Stop::Drop(reason) => maps::count(reason, bytes),
        Stop::Refuse(reason) => {
            maps::count(reason, bytes);
            return REFUSED;
        }
    }
    TCX_DROP as u32
}

/// A packet of a pod, as far as it has been read.
#[repr(C)]
pub struct Outbound {
    /// Its flow. Of a later fragment its datagram.
    pub flow: Flow6Key,
    pub layers: Layers,
    /// Where the packet begins that it quotes; 0 if it is no error.
    pub quoted: u32,
    /// Flags of a whole segment of TCP, or [`NO_FLAGS`].
    pub flags: u32,
}

pub const UNREAD: Outbound = Outbound {
    flow: Flow6Key { local: [0; 4], remote: [0; 4], ports: 0, protocol: 0 },
    layers: Layers { offset: 0, protocol: 0, fragment: 0, id: 0 },
    quoted: 0,
    flags: NO_FLAGS,
};

/// Reads a packet of a pod; 0 if it is not sound. A function of its own, as all of these.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn read_outbound(skb: *mut __sk_buff, outbound: *mut Outbound) -> u32 {
    let ctx = TcContext::new(skb);
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(outbound) = (unsafe { outbound.as_mut() }) else { return 0 };
    let Ok(ip) = ctx.load::<Ipv6>(ETH_LEN) else { return 0 };
    let Outbound { flow, layers, quoted, flags } = outbound;
    if follow_headers(skb, u32::from(ip.next), START as u32, &raw mut *layers) == 0 {
        return 0;
    }
    *flow = Flow6Key { local: ip.source, remote: ip.destination, ports: 0, protocol: layers.protocol };
    if layers.fragment == LATER {
        (flow.ports, flow.protocol) = (layers.id, FRAGMENTED);
    } else if has_ports(layers.protocol) {
        let Ok(header) = ctx.load::<[u8; 8]>(layers.offset as usize) else { return 0 };
        flow.ports = ports(layers.protocol as u8, header);
        if layers.protocol == u32::from(ICMPV6) && is_error(header[0]) {
            *quoted = layers.offset + 8;
            if flow_of_quoted(skb, *quoted, &raw mut *flow) == 0 {
                return 0;
            }
        }
    }
    if layers.protocol == u32::from(TCP) && layers.fragment == WHOLE {
        let Ok(byte) = ctx.load::<u8>(layers.offset as usize + 13) else { return 0 };
        *flags = u32::from(byte);
    }
    1
}

#[inline(always)]
fn translate(ctx: &TcContext, config: &Config, ip: &Ipv6, second: u32) -> Result<u32, Stop> {
    let generation = maps::generation(config);
    let Some(pod) = lookup::pod(generation, &ip.source) else {
        let local = lookup::config().is_some_and(|config6| lookup::in_pod_range(config6, &ip.source));
        return Err(Stop::Drop(if local { Counter::DropUnknownPod } else { Counter::DropLeak }));
    };
    let mut outbound = UNREAD;
    if read_outbound(ctx.skb.skb, &raw mut outbound) == 0 {
        return Err(MALFORMED);
    }
    let (flow, layers) = (&raw const outbound.flow, &outbound.layers);
    let (quoted, flags) = (outbound.quoted, outbound.flags);
    let mut way = Flow6Value { incarnation: pod.incarnation, ..NO_WAY };
    let mut standing = if recall6(flow, &raw mut way, flags) == 0 { GONE } else { standing6(&raw const way) };
    if standing == GONE {
        if layers.fragment == LATER {
            return Err(Stop::Drop(Counter::DropFragmentOut));
        }
        // What only answers, or speaks of a flow, is none that is refused.
        let opens = quoted == 0 && (flags == NO_FLAGS || flags & u32::from(SYN | ACK) == u32::from(SYN));
        let how = u32::from(opens) | second << 1;
        match choose_network(generation, flow, &raw const pod, &raw mut way, how) {
            0 => {}
            BY_PORTS => return Ok(SINGLE),
            outcome => return Err(Stop::Refuse(reason(outcome))),
        }
        standing = standing6(&raw const way);
        if standing == GONE {
            return Err(Stop::Refuse(Counter::RefuseUnavailable));
        }
        if begin6(flow, &raw mut way, flags) != 0 {
            maps::count(Counter::NewFlow, 0);
        }
    }
    if standing == LAPSED {
        return Err(Stop::Drop(Counter::DropFenced));
    }
    if layers.fragment == FIRST {
        let datagram =
            Flow6Key { ports: layers.id, protocol: FRAGMENTED, local: ip.source, remote: ip.destination };
        remember6(&raw const datagram, &raw const way, NO_FLAGS, u64::from(BPF_ANY));
    }
    let bytes = length(ctx);
    clamp(ctx, config, bytes, layers, flags);
    let egress = egress_address(&ip.source, way.network, way.slice, pod.suffix);
    if quoted != 0 {
        ctx.store(quoted as usize + DESTINATION, &egress, 0).map_err(|_| MALFORMED)?;
    }
    ctx.store(ETH_LEN + SOURCE, &egress, 0).map_err(|_| MALFORMED)?;
    if quoted == 0 {
        let header = meter::header(layers.offset, layers.protocol as u8);
        meter::sends_segments(ctx.skb.skb, way.meter, bytes, header);
    }
    Ok(TCX_NEXT as u32)
}

/// Lowers the MSS of a SYN in a packet of so many bytes, so that what comes back fits into the tunnel.
#[inline(always)]
pub fn clamp(ctx: &TcContext, config: &Config, bytes: u32, layers: &Layers, flags: u32) {
    if flags != NO_FLAGS && flags & u32::from(SYN) != 0 && config.mss > LONGER {
        let segment = (ETH_LEN as u32 + bytes).saturating_sub(layers.offset);
        snat::clamp_mss(ctx.skb.skb, layers.offset, segment, config.mss - LONGER);
    }
}

/// Length of a packet. What is longer than its field can say has 0 there.
#[inline(always)]
pub fn length(ctx: &TcContext) -> u32 {
    match ctx.load::<u16>(ETH_LEN + 4) {
        Ok(length) if length != 0 => IPV6_LEN as u32 + u32::from(u16::from_be(length)),
        _ => ctx.len().saturating_sub(ETH_LEN as u32),
    }
}

/// Of an ICMPv6 error of a pod, the flow that the packet belonged to which it quotes; 0 if it quotes none that came to the pod.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_of_quoted(skb: *mut __sk_buff, offset: u32, flow: *mut Flow6Key) -> u32 {
    let ctx = TcContext::new(skb);
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(flow) = (unsafe { flow.as_mut() }) else { return 0 };
    let Ok(ip) = ctx.load::<Ipv6>(offset as usize) else { return 0 };
    if !ip.is_sound() || ip.destination != flow.local {
        return 0;
    }
    let mut layers = Layers::default();
    let start = offset + super::IPV6_LEN as u32;
    if follow_headers(skb, u32::from(ip.next), start, &raw mut layers) == 0 {
        return 0;
    }
    let mut theirs =
        Flow6Key { local: ip.source, remote: ip.destination, ports: 0, protocol: layers.protocol };
    if layers.fragment == LATER {
        return 0;
    }
    if has_ports(layers.protocol) {
        let Ok(header) = ctx.load::<[u8; 8]>(layers.offset as usize) else { return 0 };
        theirs.ports = ports(layers.protocol as u8, header);
    }
    *flow = turned(&theirs);
    1
}

/// In place of TCP flags: the packet shows none.
pub const NO_FLAGS: u32 = u32::MAX;
pub const NO_WAY: Flow6Value =
    Flow6Value { incarnation: 0, last_seen: 0, network: [0; 2], identity: 0, slice: 0, state: 0, meter: 0 };

/// What a flow has chosen, noting that it lives; 0 if nothing is known. `way` names the pod's incarnation.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn recall6(flow: *const Flow6Key, way: *mut Flow6Value, flags: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let (Some(flow), Some(way)) = (unsafe { (flow.as_ref(), way.as_mut()) }) else { return 0 };
    let Some(known) = FLOWS6.get_ptr_mut(flow) else { return 0 };
    // SAFETY: a value of the map, readable until the program ends; its words are written whole.
    let known = unsafe { &mut *known };
    (way.network, way.identity, way.slice) = (known.network, known.identity, known.slice);
    way.meter = known.meter;
    // SAFETY: as above; the compiler must read it after the rest.
    if unsafe { (&raw const known.incarnation).read_volatile() } != way.incarnation {
        return 0;
    }
    let now = maps::now();
    if known.last_seen != now {
        known.last_seen = now;
    }
    let state = if flags == NO_FLAGS { known.state } else { flow6_state(known.state, flags as u8) };
    if known.state != state {
        known.state = state;
    }
    1
}

/// Remembers what a new flow has chosen; 0 if another CPU has been faster, whose meter it has then.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn begin6(flow: *const Flow6Key, way: *mut Flow6Value, flags: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let (Some(key), Some(way)) = (unsafe { (flow.as_ref(), way.as_mut()) }) else { return 0 };
    if remember6(flow, way, flags, u64::from(BPF_NOEXIST)) == 0 {
        if let Some(known) = FLOWS6.get_ptr(key) {
            // SAFETY: as in `recall6`.
            let known = unsafe { &*known };
            let same =
                known.network == way.network && known.identity == way.identity && known.slice == way.slice;
            if same && known.incarnation == way.incarnation {
                way.meter = known.meter;
                return 0;
            }
        }
        remember6(flow, way, flags, u64::from(BPF_ANY));
    }
    meter::begins6(way.meter);
    1
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn remember6(flow: *const Flow6Key, way: *const Flow6Value, flags: u32, how: u64) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let (Some(flow), Some(way)) = (unsafe { (flow.as_ref(), way.as_ref()) }) else { return 0 };
    let state = if flags == NO_FLAGS { 0 } else { flow6_state(0, flags as u8) };
    let value = Flow6Value { last_seen: maps::now(), state, ..*way };
    u32::from(FLOWS6.insert(flow, &value, how).is_ok())
}

/// The /64 is another allocation's by now, or the slice not this node's.
const GONE: u32 = 0;
const GOOD: u32 = 1;
/// Nothing is to be sent from it any more.
const LAPSED: u32 = 2;

/// How what a flow has chosen stands now.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn standing6(way: *const Flow6Value) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let (Some(way), Some(config)) = (unsafe { way.as_ref() }, maps::config()) else { return GONE };
    // SAFETY: read at once.
    let Some(network) = (unsafe { NETWORKS.get(&way.network) }) else { return GONE };
    if network.identity != way.identity {
        return GONE;
    }
    let slice = u32::from(way.slice);
    if !(FIRST_SLICE..SLOTS_PER_ADDRESS).contains(&slice) {
        return GONE;
    }
    let owner = SLOTS.get(network.index * SLOTS_PER_ADDRESS + slice).map_or(0, |slot| slot.peer);
    if owner == 0 || owner != config.own_peer {
        return GONE;
    }
    if lookup::deadline(network) == Deadline::Hard { LAPSED } else { GOOD }
}

const NOTHING: u32 = 1;
/// [`NOTHING`] and a bit more, so that outcomes are put together by "or".
const FENCED: u32 = 3;
/// The policy says so.
const FORBIDDEN: u32 = 4;
/// From a single address.
const BY_PORTS: u32 = 8;

/// The way of a new flow, as the policy says, and its meter; 0 if there is one. `how` is by bits: the packet opens a flow, so that a
/// refusal is counted; only the policy's secondary allocation is asked.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn choose_network(
    mut generation: u32,
    flow: *const Flow6Key,
    pod: *const Pod6Value,
    way: *mut Flow6Value,
    how: u32,
) -> u32 {
    let (opens, second) = (how & 1, how & 2 != 0);
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let (Some(key), Some(pod)) = (unsafe { (flow.as_ref(), pod.as_ref()) }) else {
        return NOTHING;
    };
    if way.is_null() {
        return NOTHING;
    }
    let any_port = u32::from(!has_ports(key.protocol));
    let look_up = |generation, class| {
        VerdictValue::unpacked(lookup::look_up_verdict6(generation, class, flow, any_port))
    };
    let mut verdict = look_up(generation, pod.class);
    if verdict.action == ACTION_PASS {
        // Between `pod_ingress` and here the policy may have changed, as for IPv4.
        let last = generation.wrapping_sub(1);
        let Some(before) = lookup::pod(last, &key.local) else { return NOTHING };
        verdict = look_up(last, before.class);
        generation = last;
    }
    let number = rule::number(verdict.binding);
    match verdict.action {
        ACTION_ALLOCATE => {}
        ACTION_FORBID => {
            rule::count_flow(generation, number, rule::DENIED);
            refuses(flow, NO_ALLOCATION, number, FORBIDDEN, opens);
            return FORBIDDEN;
        }
        ACTION_DENY => {
            rule::count_flow(generation, number, rule::LACKED);
            refuses(flow, NO_ALLOCATION, number, NOTHING, opens);
            return NOTHING;
        }
        _ => return NOTHING,
    }
    let (primary, secondary) = (u32::from(verdict.allocation), u32::from(verdict.secondary));
    let (mut allocation, mut outcome) = (verdict.allocation, NOTHING);
    if !second {
        outcome = try_networks(primary, pod.suffix, way);
        if outcome != 0 && single::has(primary) {
            return ask(&key.remote, generation, number, &verdict, 0);
        }
    }
    // Why the first is not left from is told, unless the second is left from.
    if outcome != 0 && secondary != primary {
        if try_networks(secondary, pod.suffix, way) == 0 {
            maps::count(Counter::SecondaryFlow, 0);
            (allocation, outcome) = (verdict.secondary, 0);
        } else if single::has(secondary) {
            return ask(&key.remote, generation, number, &verdict, 1);
        }
    }
    if outcome != 0 {
        refuses(flow, allocation, number, outcome, opens);
        return outcome;
    }
    rule::count_flow(generation, number, rule::LEFT);
    // SAFETY: not null, see above.
    unsafe { (*way).meter = meter::find_meter6(flow, way, u32::from(allocation), number) };
    0
}

/// Leaves what is to be opened for `single::leave::open_single`, which follows.
#[inline(always)]
fn ask(remote: &Address6, generation: u32, rule: u32, verdict: &VerdictValue, is_second: u32) -> u32 {
    let Some(opening) = OPENING.get_ptr_mut(0) else { return NOTHING };
    // SAFETY: a per-CPU value that only this and who follows use; programs on one CPU do not nest here.
    let asked = unsafe { &mut (*opening).single };
    asked.remote = *remote;
    (asked.generation, asked.rule, asked.is_second) = (generation, rule, is_second);
    let first = if is_second == 0 { verdict.allocation } else { verdict.secondary };
    (asked.allocation, asked.secondary) = (u32::from(first), u32::from(verdict.secondary));
    BY_PORTS
}

/// Counts a new flow that is refused, unless it may come again and find its flow taken over.
#[inline(always)]
fn refuses(flow: *const Flow6Key, allocation: u16, number: u32, outcome: u32, opens: u32) {
    if opens != 0 && !maps::taking_over() {
        meter::refuses6(flow, u32::from(allocation), number, reason(outcome) as u32);
    }
}

/// Why a new flow has no way.
#[inline(always)]
fn reason(outcome: u32) -> Counter {
    match outcome {
        FENCED => Counter::RefuseFenced,
        FORBIDDEN => Counter::RefusePolicy,
        _ => Counter::RefuseUnavailable,
    }
}

/// The way of a new flow of an allocation; 0 if there is one.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn try_networks(allocation: u32, suffix: u32, way: *mut Flow6Value) -> u32 {
    let (mut step, mut outcome) = (0, NOTHING);
    while step < NETWORKS_PER_ALLOCATION as u32 {
        let tried = try_network(allocation, suffix, step, way);
        if tried == 0 {
            return 0;
        }
        outcome |= tried;
        step += 1;
    }
    outcome
}

/// Gives a /64 of an allocation, the one so many steps from where the pod begins, if new flows may leave from it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn try_network(allocation: u32, suffix: u32, step: u32, way: *mut Flow6Value) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(way) = (unsafe { way.as_mut() }) else { return NOTHING };
    let Some(allocation) = ALLOCATIONS6.get(allocation) else { return NOTHING };
    let count = allocation.count.min(NETWORKS_PER_ALLOCATION as u32);
    if step >= count {
        return NOTHING;
    }
    let start = (u64::from(mix(suffix)) * u64::from(count) >> 32) as u32;
    let at = if start + step < count { start + step } else { start + step - count };
    let candidate = allocation.networks[at as usize & (NETWORKS_PER_ALLOCATION - 1)];
    // SAFETY: read at once.
    let Some(value) = (unsafe { NETWORKS.get(&candidate) }) else { return NOTHING };
    // One that has just become another allocation's is not this one's any more, whatever the list says.
    if value.slice == 0 || value.open == 0 || value.identity != allocation.identity {
        return NOTHING;
    }
    if lookup::deadline(value) != Deadline::Ahead {
        return FENCED;
    }
    (way.network, way.identity, way.slice) = (candidate, value.identity, value.slice);
    0
}
