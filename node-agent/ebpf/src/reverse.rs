//! Translating replies back to the pod.

use crate::bind;
use crate::checksum::{apply, difference, difference16, fold};
use crate::fast;
use crate::flow::{self, Back};
use crate::headers::{self, ACK, ETH_LEN, Ipv4, SYN, Transport};
use crate::maps;
use crate::steer::Inbound;
use crate::xdp;
use aegis_common::{Config, Counter, FlowKey, SEEN_FAST, seen_after};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::{bpf_csum_diff, bpf_xdp_load_bytes};
use aya_ebpf::programs::XdpContext;

/// A packet of ours that an ICMP error quotes.
pub struct Quoted {
    /// Key in `REVERSE` of the flow it belongs to.
    pub key: FlowKey,
    /// Length of its IP header.
    pub header_length: usize,
}

/// Reads the packet that an ICMP error quotes; eight bytes of its transport header are enough. `None` if it is not
/// one that left from the egress address.
#[inline(always)]
pub fn quoted(ctx: &XdpContext, inbound: &Inbound) -> Option<Quoted> {
    let start = inbound.transport_offset + 8;
    // SAFETY: within the frame.
    let ip = unsafe { *xdp::at::<Ipv4>(ctx, start)? };
    let header_length = ip.header_length()?;
    if ip.source != inbound.ip.destination || ip.is_later_fragment() {
        return None;
    }
    // What follows the packet in the frame is padding, and quotes nothing.
    if start + header_length + 8 > ETH_LEN + usize::from(inbound.ip.total_length()) {
        return None;
    }
    // SAFETY: within the frame.
    let ports = unsafe { *xdp::at::<Transport>(ctx, start + header_length)? };
    let (local_port, remote_port) = match ip.protocol {
        headers::TCP | headers::UDP => (ports.source_port(), ports.destination_port()),
        headers::ICMP if ports.icmp_type() == headers::ICMP_ECHO => (ports.icmp_id(), 0),
        _ => return None,
    };
    let key = FlowKey {
        local: ip.source,
        remote: ip.destination,
        local_port,
        remote_port,
        protocol: ip.protocol,
        pad: [0; 3],
    };
    Some(Quoted { key, header_length })
}

/// Key in `REVERSE` of the flow that a whole packet or a first fragment belongs to.
#[inline(always)]
pub fn key(ctx: &XdpContext, inbound: &Inbound) -> Option<FlowKey> {
    // SAFETY: within the frame.
    let transport = unsafe { *xdp::at::<Transport>(ctx, inbound.transport_offset)? };
    Some(key_of(inbound, &transport))
}

#[inline(always)]
fn key_of(inbound: &Inbound, transport: &Transport) -> FlowKey {
    let (local_port, remote_port) = match inbound.ip.protocol {
        headers::ICMP => (transport.icmp_id(), 0),
        _ => (transport.destination_port(), transport.source_port()),
    };
    FlowKey {
        local: inbound.ip.destination,
        remote: inbound.ip.source,
        local_port,
        remote_port,
        protocol: inbound.ip.protocol,
        pad: [0; 3],
    }
}

/// In place of a node: the packet is dropped, and counted.
pub const DROPPED: u32 = 1 << 16;
/// It does not fit into the tunnel to the pod's node, and is left as it is.
pub const TOO_BIG: u32 = 2 << 16;
/// It is for a pod of this node, and may take the fast path.
pub const FAST: u32 = 4 << 16;
/// It is for a socket of this node, which has the egress address itself.
pub const BOUND: u32 = 8 << 16;

/// Translates a packet whose egress port is this node's, if a live flow asked for it. Gives the node of the pod as index
/// into `PEERS` (0 = this one), or [`FAST`], [`BOUND`], [`DROPPED`] or [`TOO_BIG`]. (Not a `Result`: its unset half would be spilled to the
/// stack uninitialised, which the verifier refuses.)
#[inline(always)]
pub fn translate(ctx: &XdpContext, config: &Config, inbound: &Inbound) -> u32 {
    match rewrite(ctx, config, inbound) {
        Ok(peer) => peer,
        Err(Counter::TooBig) => TOO_BIG,
        Err(reason) => {
            maps::count(reason, u32::from(inbound.ip.total_length()));
            DROPPED
        }
    }
}

#[inline(always)]
fn rewrite(ctx: &XdpContext, config: &Config, inbound: &Inbound) -> Result<u32, Counter> {
    let malformed = Counter::DropMalformedIn;
    let offset = inbound.transport_offset;
    // SAFETY: within the frame.
    let transport = unsafe { *xdp::at::<Transport>(ctx, offset).ok_or(malformed)? };
    if inbound.ip.protocol == headers::ICMP && transport.icmp_type() != headers::ICMP_ECHO_REPLY {
        return error(ctx, config, inbound);
    }
    let key = key_of(inbound, &transport);
    let local_port = key.local_port;
    let back = flow::find_back(&key);
    let flow = back.value;
    let (pod, pod_port) = (flow.pod, flow.pod_port);
    if !back.exists() {
        return to_socket(ctx, &key, offset as u32);
    }
    may_go_on(config, inbound, &back)?;
    let change = difference(inbound.ip.destination, pod) + difference16(local_port.to_be(), pod_port.to_be());
    let mut goes_on = true;
    let bytes = u32::from(inbound.ip.total_length());
    match inbound.ip.protocol {
        headers::TCP => {
            let header = xdp::at::<[u8; 20]>(ctx, offset).ok_or(malformed)?;
            // SAFETY: within the frame.
            let flags = unsafe { (*header)[13] };
            // Only a connection that is being opened from our side too can meet a SYN (RFC 5382 REQ-2).
            if flags & (SYN | ACK) == SYN && flow.seen != 0 {
                return Err(Counter::DropNoFlow);
            }
            back.receive(seen_after(flow.seen, flags), bytes);
            goes_on = fast::goes_on(flow.seen, flags);
            replace_checksum(ctx, offset + 16, change).ok_or(malformed)?;
            replace_word(ctx, offset + 2, pod_port.to_be()).ok_or(malformed)?;
        }
        headers::UDP => {
            back.receive(flow.seen, bytes);
            // SAFETY: within the frame.
            let checksum = unsafe { *xdp::at::<u16>(ctx, offset + 6).ok_or(malformed)? };
            // Zero means "no checksum", so a computed zero is sent as ones (RFC 768).
            if checksum != 0 {
                let updated = apply(checksum, change);
                replace_word(ctx, offset + 6, if updated == 0 { 0xffff } else { updated })
                    .ok_or(malformed)?;
            }
            replace_word(ctx, offset + 2, pod_port.to_be()).ok_or(malformed)?;
        }
        _ => {
            back.receive(flow.seen, bytes);
            let id = difference16(local_port.to_be(), pod_port.to_be());
            replace_checksum(ctx, offset + 2, id).ok_or(malformed)?;
            replace_word(ctx, offset + 4, pod_port.to_be()).ok_or(malformed)?;
        }
    }
    destination(ctx, inbound, pod).ok_or(malformed)?;
    let fast = config.fast != 0 && flow.seen & SEEN_FAST != 0 && goes_on && fast::is_plain(&inbound.ip);
    Ok(if fast { FAST } else { u32::from(flow.peer) })
}

/// A packet that is for no flow: it may be for a socket.
#[inline(always)]
fn to_socket(ctx: &XdpContext, key: &FlowKey, offset: u32) -> Result<u32, Counter> {
    match bind::bound_arrives(ctx.ctx, key, offset) {
        0 => Err(Counter::DropNoFlow),
        _ => Ok(BOUND),
    }
}

/// Whether a live flow asked for the packet, and it can be taken to the pod.
#[inline(always)]
fn may_go_on(config: &Config, inbound: &Inbound, back: &Back) -> Result<(), Counter> {
    if !back.exists() || back.value.buried != 0 {
        return Err(Counter::DropNoFlow);
    }
    if back.value.peer != 0 && u32::from(inbound.ip.total_length()) > config.tunnel_mtu {
        return Err(Counter::TooBig);
    }
    Ok(())
}

/// An ICMP error about a packet of ours: the pod must see itself as the sender of what is quoted (RFC 5508 REQ-4).
#[inline(always)]
fn error(ctx: &XdpContext, config: &Config, inbound: &Inbound) -> Result<u32, Counter> {
    let malformed = Counter::DropMalformedIn;
    let quoted = quoted(ctx, inbound).ok_or(malformed)?;
    let back = flow::find_back(&quoted.key);
    let flow = back.value;
    let (pod, pod_port, port) = (flow.pod, flow.pod_port, quoted.key.local_port);
    if !back.exists() {
        return to_socket(ctx, &quoted.key, 0);
    }
    may_go_on(config, inbound, &back)?;
    let length = u32::from(inbound.ip.total_length()) + ETH_LEN as u32 - inbound.transport_offset as u32;
    // Of a fragment the sum cannot be told.
    let judged = !inbound.ip.is_first_fragment();
    if judged && is_intact(ctx.ctx, inbound.transport_offset as u32, length) == 0 {
        return Err(malformed);
    }
    let start = inbound.transport_offset + 8;
    let ip = xdp::at::<Ipv4>(ctx, start).ok_or(malformed)?;
    // The quoted header sums to the same before and after, so the ICMP checksum only notices the port.
    // SAFETY: within the frame.
    unsafe {
        (*ip).checksum = apply((*ip).checksum, difference((*ip).source, pod));
        (*ip).source = pod;
    }
    let at = match quoted.key.protocol {
        headers::ICMP => start + quoted.header_length + 4,
        _ => start + quoted.header_length,
    };
    replace_word(ctx, at, pod_port.to_be()).ok_or(malformed)?;
    let change = difference16(port.to_be(), pod_port.to_be());
    replace_checksum(ctx, inbound.transport_offset + 2, change).ok_or(malformed)?;
    destination(ctx, inbound, pod).ok_or(malformed)?;
    Ok(u32::from(flow.peer))
}

/// Bytes of a message that are summed at a time, and how many times at most.
const PART: usize = 64;
const PARTS: usize = 24;

/// Whether the checksum of an ICMP message of `length` bytes is right (RFC 5508 REQ-3); 0 = it is not. A message that no link
/// of ordinary size carries is left to the pod to judge. A function of its own for the verifier's sake, like `take` in
/// `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_intact(ctx: *mut xdp_md, start: u32, length: u32) -> u32 {
    let ctx = &XdpContext::new(ctx);
    let (mut at, mut left) = (start as usize, length as usize);
    if at > ETH_LEN + 60 || left >= PART * PARTS {
        return 1;
    }
    let (mut sum, mut part) = (0u32, 0);
    while part < PARTS && left >= PART {
        let Some(added) = sum_of(ctx, at, PART) else { return 0 };
        (sum, at, left, part) = (sum + added, at + PART, left - PART, part + 1);
    }
    if left != 0 {
        let Some(added) = sum_of(ctx, at, left) else { return 0 };
        sum += added;
    }
    u32::from(fold(sum) == 0xffff)
}

/// The folded sum of `length` bytes, at most [`PART`].
#[inline(always)]
fn sum_of(ctx: &XdpContext, at: usize, length: usize) -> Option<u32> {
    // What is not written counts as zero, which no sum notices.
    let mut words = [0u32; PART / 4];
    let place = words.as_mut_ptr();
    // SAFETY: `length` bytes have room.
    if length > PART || unsafe { bpf_xdp_load_bytes(ctx.ctx, at as u32, place.cast(), length as u32) } != 0 {
        return None;
    }
    // SAFETY: as above; nothing is taken off.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, place, PART as u32, 0) };
    Some(u32::from(fold(sum as u32)))
}

/// Writes the destination address, with the IP checksum.
#[inline(always)]
pub fn destination(ctx: &XdpContext, inbound: &Inbound, pod: u32) -> Option<()> {
    let ip = xdp::at::<Ipv4>(ctx, ETH_LEN)?;
    // SAFETY: within the frame.
    unsafe {
        (*ip).checksum = apply((*ip).checksum, difference(inbound.ip.destination, pod));
        (*ip).destination = pod;
    }
    Some(())
}

#[inline(always)]
pub fn replace_word(ctx: &XdpContext, offset: usize, word: u16) -> Option<()> {
    let place = xdp::at::<u16>(ctx, offset)?;
    // SAFETY: within the frame; BPF has no alignment demands on packet memory here.
    unsafe { place.write_unaligned(word) };
    Some(())
}

#[inline(always)]
pub fn replace_checksum(ctx: &XdpContext, offset: usize, change: u32) -> Option<()> {
    let place = xdp::at::<u16>(ctx, offset)?;
    // SAFETY: within the frame.
    unsafe { place.write_unaligned(apply(place.read_unaligned(), change)) };
    Some(())
}
