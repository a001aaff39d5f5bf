//! On a gateway: a packet of another node's pod is translated and sent on, without the host stack.

use crate::answer;
use crate::checksum::{apply, difference, difference16};
use crate::fence;
use crate::flow::{self, Leaving};
use crate::headers::{self, ACK, ETH_LEN, Ipv4, SYN, Transport};
use crate::icmp_out::key_to_pod;
use crate::identification;
use crate::maps::{self, ADDRESSES, FRAGMENTS_OUT, OPENING};
use crate::meter;
use crate::opening::{self, Opener};
use crate::refuse;
use crate::reverse::{replace_checksum, replace_word};
use crate::route;
use crate::snat::{self, Stop, fragment_key};
use crate::steer::{Inbound, Step};
use crate::tunnel::{self, Arrival, Received};
use crate::xdp;
use aegis_common::*;
use aya_ebpf::bindings::{BPF_ANY, xdp_md};
use aya_ebpf::helpers::bpf_xdp_load_bytes;
use aya_ebpf::programs::XdpContext;

const MALFORMED: Stop = Stop::Drop(Counter::DropMalformedIn);
const FENCED: Stop = Stop::Drop(Counter::DropFenced);

/// Handles the packet, whose outer headers are gone.
#[inline(always)]
pub fn run(
    ctx: &XdpContext,
    config: &Config,
    ip: &Ipv4,
    transport_offset: usize,
    received: &Received,
) -> Step {
    match translate(ctx, config, ip, transport_offset, received) {
        Ok(egress) => match route::find(ctx, ip.protocol, egress, ip.destination) {
            Some(way) => {
                maps::count(Counter::Guest, u32::from(ip.total_length()));
                route::leave(ctx, &way)
            }
            None => Step::Drop(Counter::DropNoNeighbour),
        },
        Err(Stop::Drop(reason)) => Step::Drop(reason),
        Err(Stop::Refuse(_)) if maps::taking_over() => Step::Drop(Counter::DropTakingOver),
        Err(Stop::Refuse(reason)) => {
            count_refusal(ctx.ctx, transport_offset as u32, reason as u32);
            refuse(ctx, config, ip, transport_offset, received.peer, reason)
        }
    }
}

/// Gives the egress address.
#[inline(always)]
fn translate(
    ctx: &XdpContext,
    config: &Config,
    ip: &Ipv4,
    transport_offset: usize,
    received: &Received,
) -> Result<u32, Stop> {
    // SAFETY: only presence matters.
    if unsafe { ADDRESSES.get(&ip.source) }.is_some() {
        return Err(Stop::Drop(Counter::DropForged));
    }
    if ip.is_later_fragment() {
        let first = maps::first_fragment(&FRAGMENTS_OUT, &fragment_key(ip));
        let first = first.ok_or(Stop::Drop(Counter::DropFragmentOut))?;
        if fence::is_closed(first.address) {
            return Err(FENCED);
        }
        meter::sends(u32::from(first.meter), 1, u64::from(ip.total_length()));
        source(ctx, ip, first.address).ok_or(MALFORMED)?;
        renumber(ctx, first.identification).ok_or(MALFORMED)?;
        return Ok(first.address);
    }
    // What follows the packet in the frame is padding.
    let needed = if ip.protocol == headers::TCP { 20 } else { size_of::<Transport>() };
    if transport_offset + needed > ETH_LEN + usize::from(ip.total_length()) {
        return Err(MALFORMED);
    }
    // SAFETY: within the frame.
    let transport = unsafe { *xdp::at::<Transport>(ctx, transport_offset).ok_or(MALFORMED)? };
    let flags = match ip.protocol {
        headers::TCP => {
            let header = xdp::at::<[u8; 20]>(ctx, transport_offset).ok_or(MALFORMED)?;
            // SAFETY: within the frame.
            unsafe { (*header)[13] }
        }
        headers::UDP => 0,
        headers::ICMP if transport.icmp_type() == headers::ICMP_ECHO => 0,
        headers::ICMP if headers::is_icmp_error(transport.icmp_type()) => {
            return error(ctx, ip, transport_offset, received.peer);
        }
        headers::ICMP => return Err(Stop::Drop(Counter::RefuseNoFlow)),
        _ => return Err(Stop::Drop(Counter::RefuseProtocol)),
    };
    let mut leaving = Leaving::new(snat::key(ip, &transport));
    let peer = received.peer as u16;
    // SAFETY: read at once.
    let named = unsafe { ADDRESSES.get(&received.name) }.map_or(0, |address| address.allocation);
    let opens = ip.protocol != headers::TCP || flags & (SYN | ACK) == SYN;
    let opens_flags = u32::from(flags) | if opens { OPENS } else { 0 };
    match follow_guest(&mut leaving, u32::from(peer), named, opens_flags) {
        FOLLOWED => (),
        CLOSED => return Err(FENCED),
        other => {
            if other == OVER {
                leaving.end();
            }
            let allocation = may_open(config, ip, named)?;
            if !opens {
                return Err(Stop::Refuse(Counter::RefuseNoFlow));
            }
            if let Some(opening) = OPENING.get_ptr_mut(0) {
                // SAFETY: a per-CPU value.
                unsafe { (*opening).asked = allocation };
            }
            opening::make(&mut leaving, allocation, Opener { incarnation: 0, binding: 0, peer }, flags)?;
        }
    }
    let (egress, port) = (leaving.way.egress, leaving.way.egress_port);
    let renumbered = identification::matters(ip);
    let flow = u32::from(port) << 16 | u32::from(ip.protocol);
    let identification = match renumbered {
        true => identification::next_identification(egress, ip.destination, flow, 1) as u16,
        false => 0,
    };
    let meter = leaving.way.meter;
    meter::sends(u32::from(meter), 1, u64::from(ip.total_length()));
    if ip.is_first_fragment() {
        let value =
            FragmentValue { address: egress, port, peer: 0, seen: maps::now(), identification, meter };
        let _ = FRAGMENTS_OUT.insert(&fragment_key(ip), &value, u64::from(BPF_ANY));
    }
    rewrite(ctx, ip, transport_offset, &transport, egress, port).ok_or(MALFORMED)?;
    if renumbered {
        renumber(ctx, identification).ok_or(MALFORMED)?;
    }
    Ok(egress)
}

/// The packet is of no flow that goes on.
const NONE: u32 = 0;
/// It is of a flow that goes on.
const FOLLOWED: u32 = 1;
/// It is of a flow that may not go on from here at present.
const CLOSED: u32 = 2;
/// It opens one, and is of a flow that is to be ended for that.
const OVER: u32 = 3;

/// Finds the flow of a packet and notes the packet. One that a packet that opens one finds in
/// its place is to be ended: the pod's address has been another pod's, of another account or on another node. A function of its own
/// for the verifier's sake, like `take` in `ports`, and for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn follow_guest(leaving: *mut Leaving, peer: u32, named: u32, flags: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(leaving) = (unsafe { leaving.as_mut() }) else { return NONE };
    let key = &leaving.key;
    let found = flow::find(key);
    if !found.exists() {
        return NONE;
    }
    let belongs = belongs(&found.value, key, named, peer);
    if !belongs || fence::is_closed(found.value.egress) {
        return match (flags & OPENS, belongs) {
            (0, true) => CLOSED,
            (0, false) => NONE,
            _ => {
                leaving.way.like(&found.value);
                OVER
            }
        };
    }
    found.touch(key, flags as u8);
    leaving.way.like(&found.value);
    FOLLOWED
}

/// Beside the TCP flags: the packet opens a flow if there is none.
const OPENS: u32 = 1 << 8;

/// Whether a flow is the one that the node speaks of: the pod's address may have been another pod's, of another account or
/// on another node. `named` is what the packet's name stands for here (see `AddressValue::allocation`); if it stands for
/// nothing, the two nodes just do not know the same, which a live flow need not mind.
#[inline(always)]
fn belongs(flow: &ForwardValue, key: &FlowKey, named: u32, peer: u32) -> bool {
    flow.is_guest(key)
        && u32::from(flow.peer) == peer
        && (named == 0 || named - 1 == u32::from(flow.allocation))
}

/// Whether a new flow may be opened; gives its allocation. No node sends such packets as these of its own accord.
#[inline(always)]
fn may_open(config: &Config, ip: &Ipv4, named: u32) -> Result<u32, Stop> {
    let generation = maps::generation(config);
    // A pod of this node, which would not come from another one.
    if maps::pod(generation, ip.source).is_some()
        || maps::destination_class(generation, ip.destination) == Some(DESTINATION_INTERNAL)
    {
        return Err(Stop::Drop(Counter::DropForged));
    }
    // SAFETY: only presence matters. Nobody listens at an egress address.
    if unsafe { ADDRESSES.get(&ip.destination) }.is_some() {
        return Err(Stop::Refuse(Counter::RefuseUnavailable));
    }
    named.checked_sub(1).ok_or(Stop::Refuse(Counter::RefuseUnavailable))
}

/// An ICMP error of the pod about a packet that came back through here: see `icmp_out`. Gives the egress address.
#[inline(always)]
fn error(ctx: &XdpContext, ip: &Ipv4, transport_offset: usize, peer: u32) -> Result<u32, Stop> {
    let start = transport_offset + 8;
    // SAFETY: within the frame.
    let quoted = unsafe { *xdp::at::<Ipv4>(ctx, start).ok_or(MALFORMED)? };
    let length = quoted.header_length().ok_or(MALFORMED)?;
    if start + length + 8 > ETH_LEN + usize::from(ip.total_length()) {
        return Err(MALFORMED);
    }
    // SAFETY: within the frame.
    let ports = unsafe { *xdp::at::<Transport>(ctx, start + length).ok_or(MALFORMED)? };
    let key = key_to_pod(&quoted, &ports);
    let flow = flow::find(&key);
    let about_it = flow.exists()
        && flow.value.is_guest(&key)
        && u32::from(flow.value.peer) == peer
        && quoted.destination == ip.source
        && !quoted.is_later_fragment();
    if !about_it {
        return Err(Stop::Drop(Counter::RefuseNoFlow));
    }
    let (egress, port) = (flow.value.egress, flow.value.egress_port);
    if fence::is_closed(egress) {
        return Err(FENCED);
    }
    let place = xdp::at::<Ipv4>(ctx, start).ok_or(MALFORMED)?;
    // The quoted header sums to the same before and after, so the ICMP checksum only notices the port.
    // SAFETY: within the frame.
    unsafe {
        (*place).checksum = apply((*place).checksum, difference(quoted.destination, egress));
        (*place).destination = egress;
    }
    let at = match quoted.protocol {
        headers::ICMP => start + length + 4,
        _ => start + length + 2,
    };
    replace_word(ctx, at, port.to_be()).ok_or(MALFORMED)?;
    let change = difference16(key.local_port.to_be(), port.to_be());
    replace_checksum(ctx, transport_offset + 2, change).ok_or(MALFORMED)?;
    source(ctx, ip, egress).ok_or(MALFORMED)?;
    Ok(egress)
}

/// Writes source address and port, with all checksums.
#[inline(always)]
fn rewrite(
    ctx: &XdpContext,
    ip: &Ipv4,
    offset: usize,
    transport: &Transport,
    egress: u32,
    port: u16,
) -> Option<()> {
    let ports = difference16(transport.source_port().to_be(), port.to_be());
    match ip.protocol {
        headers::TCP => {
            replace_checksum(ctx, offset + 16, difference(ip.source, egress) + ports)?;
            replace_word(ctx, offset, port.to_be())?;
        }
        headers::UDP => {
            // SAFETY: within the frame.
            let checksum = unsafe { *xdp::at::<u16>(ctx, offset + 6)? };
            if checksum != 0 {
                let updated = apply(checksum, difference(ip.source, egress) + ports);
                replace_word(ctx, offset + 6, if updated == 0 { 0xffff } else { updated })?;
            }
            replace_word(ctx, offset, port.to_be())?;
        }
        _ => {
            let id = difference16(transport.icmp_id().to_be(), port.to_be());
            replace_checksum(ctx, offset + 2, id)?;
            replace_word(ctx, offset + 4, port.to_be())?;
        }
    }
    source(ctx, ip, egress)
}

/// Writes the source address, with the IP checksum.
#[inline(always)]
fn source(ctx: &XdpContext, ip: &Ipv4, egress: u32) -> Option<()> {
    let place = xdp::at::<Ipv4>(ctx, ETH_LEN)?;
    // SAFETY: within the frame.
    unsafe {
        (*place).checksum = apply((*place).checksum, difference(ip.source, egress));
        (*place).source = egress;
    }
    Some(())
}

/// Writes the identification, with the IP checksum.
#[inline(always)]
fn renumber(ctx: &XdpContext, identification: u16) -> Option<()> {
    let place = xdp::at::<Ipv4>(ctx, ETH_LEN)?;
    let new = identification.to_be();
    // SAFETY: within the frame.
    unsafe {
        (*place).checksum = apply((*place).checksum, difference16((*place).id, new));
        (*place).id = new;
    }
    Some(())
}

/// Answers the pod in the origin's place, through its node.
#[inline(always)]
fn refuse(
    ctx: &XdpContext,
    config: &Config,
    ip: &Ipv4,
    transport_offset: usize,
    peer: u32,
    reason: Counter,
) -> Step {
    if !refuse::allowed(config) || (ip.protocol != headers::TCP && transport_offset != ETH_LEN + 20) {
        return Step::Drop(reason);
    }
    maps::count(reason, u32::from(ip.total_length()));
    let asked = ip.destination;
    let answer = match ip.protocol {
        headers::TCP => answer::reset(ctx, ip, transport_offset),
        _ => answer::unreachable(ctx, ip, refuse::code(reason as u32), 0),
    };
    let Some(ip) = answer else { return Step::Drop(Counter::DropMalformedIn) };
    maps::count(Counter::RefusalSent, 0);
    let inbound = Inbound { ip, transport_offset: ETH_LEN + 20, address: 0, arrival: Arrival::Guest };
    // Another node may have what is missing here, unless nobody listens there.
    // SAFETY: only presence matters.
    let elsewhere = may_be_elsewhere(reason) && unsafe { ADDRESSES.get(&asked) }.is_none();
    tunnel::send(ctx, config, &inbound, peer, if elsewhere { VNI_REFUSED } else { VNI_RETURN })
}

/// Whether another node may have what is missing here. The pod's node counts the flow as refused, if it is in the end.
#[inline(always)]
fn may_be_elsewhere(reason: Counter) -> bool {
    matches!(reason, Counter::RefuseNoPort | Counter::RefuseFenced | Counter::RefuseUnavailable)
}

/// Counts a new flow that is refused here and nowhere else. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn count_refusal(ctx: *mut xdp_md, transport: u32, reason: u32) -> u32 {
    let reason = Counter::from_index(reason).unwrap_or(Counter::RefuseNoFlow);
    let opens_nothing = matches!(reason, Counter::RefuseNoFlow | Counter::RefuseProtocol);
    let ctx = &XdpContext::new(ctx);
    let Some(ip) = xdp::at::<Ipv4>(ctx, ETH_LEN) else { return 0 };
    let mut ports = Transport { bytes: [0; 8] };
    let (to, length) = ((&raw mut ports).cast(), size_of::<Transport>() as u32);
    // SAFETY: eight bytes have room.
    if unsafe { bpf_xdp_load_bytes(ctx.ctx, transport, to, length) } != 0 {
        return 0;
    }
    // SAFETY: within the frame.
    let key = unsafe { snat::key(&*ip, &ports) };
    let Some(opening) = OPENING.get_ptr_mut(0) else { return 0 };
    if opens_nothing || may_be_elsewhere(reason) {
        return 0;
    }
    // SAFETY: a per-CPU value; what is left has been asked for just before.
    meter::refuses(&raw const key, unsafe { (*opening).asked }, 0, reason as u32)
}
