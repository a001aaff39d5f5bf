//! Telling a pod at once that its packet will not leave: RST for TCP (RFC 9293 section 3.10.7.1), ICMP for the rest.
//!
//! The packet itself is turned into the answer and redirected to the ingress of the uplink: it enters the host stack
//! as if the origin had sent it, and conntrack takes it to the pod.

use crate::checksum::fold;
use crate::headers::{self, ACK, ETH_LEN, FIN, Packet, RST, SYN};
use crate::maps::{self, LIMITER};
use crate::via;
use aegis_common::{Config, Counter};
use aya_ebpf::bindings::tcx_action_base::TCX_DROP;
use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS};
use aya_ebpf::helpers::{bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;

/// Bytes of the refused packet that an ICMP error quotes: its IP header and eight more (RFC 792).
const QUOTED: usize = 28;

/// Turns the packet into an answer, or drops it. Gives the verdict.
#[inline(always)]
pub fn answer(ctx: &TcContext, reason: Counter) -> i32 {
    answer_skb(ctx.skb.skb, reason as u32) as i32
}

/// A function of its own for the verifier's sake, like `take` in `ports`, and for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn answer_skb(skb: *mut __sk_buff, reason: u32) -> u32 {
    let ctx = &TcContext::new(skb);
    match (maps::config(), Packet::read(ctx)) {
        (Some(config), Some(packet)) => turned(ctx, config, &packet, reason) as u32,
        _ => TCX_DROP as u32,
    }
}

#[inline(always)]
fn turned(ctx: &TcContext, config: &Config, packet: &Packet, reason: u32) -> i32 {
    // SAFETY: a field of the context.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    // What is still to be cut into segments is answered only where that is what is wrong with it.
    let whole = headers::segment_size(ctx) == 0 || reason == Counter::TooBigOut as u32;
    if !whole || !allowed(config) {
        return TCX_DROP;
    }
    let made = match packet.ip.protocol {
        headers::TCP if reason != Counter::TooBigOut as u32 => reset(ctx, packet),
        _ => unreachable(ctx, config, packet, reason),
    };
    if made.is_none() {
        return TCX_DROP;
    }
    // The answer is not a packet of the pod any more.
    ctx.skb.set_mark(headers::mark(ctx) & !config.mark);
    maps::count(Counter::RefusalSent, 0);
    // SAFETY: plain arguments.
    (unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) }) as i32
}

/// Whether this CPU may answer once more in this second.
#[inline(always)]
pub fn allowed(config: &Config) -> bool {
    let Some(limiter) = LIMITER.get_ptr_mut(0) else { return false };
    // SAFETY: a per-CPU value.
    let limiter = unsafe { &mut *limiter };
    let now = maps::now();
    if limiter.second != now {
        limiter.second = now;
        limiter.answered = 0;
    }
    if limiter.answered >= config.refusals_per_second {
        return false;
    }
    limiter.answered += 1;
    true
}

#[inline(always)]
fn swap_ethernet(ctx: &TcContext) -> Result<(), i64> {
    let addresses: [[u8; 6]; 2] = ctx.load(0)?;
    ctx.store(0, &[addresses[1], addresses[0]], 0)
}

/// Makes the segment an RST that answers it. Addresses and ports change places, which no checksum notices; payload and
/// options stay, which no receiver of an RST minds.
#[inline(always)]
fn reset(ctx: &TcContext, packet: &Packet) -> Option<()> {
    let tcp = packet.transport_offset;
    let ports: [u16; 2] = ctx.load(tcp).ok()?;
    let [sequence, acknowledged]: [u32; 2] = ctx.load(tcp + 4).ok()?;
    let [length, flags]: [u8; 2] = ctx.load(tcp + 12).ok()?;
    if flags & RST != 0 {
        return None;
    }
    let (new_sequence, new_acknowledged, new_flags) = if flags & ACK != 0 {
        (acknowledged, 0, RST)
    } else {
        let header = (packet.transport_offset - ETH_LEN) as u32 + u32::from(length >> 4) * 4;
        let payload = packet.length.wrapping_sub(header);
        let taken = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        (0, u32::from_be(sequence).wrapping_add(taken).to_be(), RST | ACK)
    };
    let checksum = tcp + 16;
    let word = |flags: u8| u64::from(u16::from_ne_bytes([length, flags]));
    ctx.l4_csum_replace(checksum, u64::from(sequence), u64::from(new_sequence), 4).ok()?;
    ctx.l4_csum_replace(checksum, u64::from(acknowledged), u64::from(new_acknowledged), 4).ok()?;
    ctx.l4_csum_replace(checksum, word(flags), word(new_flags), 2).ok()?;
    ctx.store(tcp, &[ports[1], ports[0]], 0).ok()?;
    ctx.store(tcp + 4, &[new_sequence, new_acknowledged], 0).ok()?;
    ctx.store(tcp + 13, &new_flags, 0).ok()?;
    ctx.store(ETH_LEN + 12, &[packet.ip.destination, packet.ip.source], 0).ok()?;
    swap_ethernet(ctx).ok()
}

/// Makes the packet an ICMP "destination unreachable" about itself, as if the origin had sent it.
#[inline(always)]
fn unreachable(ctx: &TcContext, config: &Config, packet: &Packet, reason: u32) -> Option<()> {
    if packet.transport_offset != ETH_LEN + 20 || packet.ip.is_later_fragment() {
        return None;
    }
    if packet.ip.protocol == headers::ICMP {
        let kind: u8 = ctx.load(packet.transport_offset).ok()?;
        // Never an error about an error (RFC 1122 section 3.2.2).
        if kind != headers::ICMP_ECHO {
            return None;
        }
    }
    let quoted: [u16; QUOTED / 2] = ctx.load(ETH_LEN).ok()?;
    let mut reply = Reply {
        version_length: 0x45,
        tos: 0,
        total_length: (20 + 8 + QUOTED as u16).to_be(),
        id: 0,
        fragment: headers::DF.to_be(),
        ttl: 64,
        protocol: headers::ICMP,
        ip_checksum: 0,
        addresses: [packet.ip.destination, packet.ip.source],
        kind: headers::ICMP_UNREACHABLE,
        code: code(reason),
        checksum: 0,
        mtu: if reason == Counter::TooBigOut as u32 { via::limit(config).to_be() } else { 0 },
        quoted,
    };
    // SAFETY: `Reply` is 56 bytes without padding, so it can be read as 28 words of 16 bits.
    let words = unsafe { &*core::ptr::from_ref(&reply).cast::<[u16; 28]>() };
    let (mut header, mut message, mut at) = (0u32, 0u32, 0);
    while at < 28 {
        if at < 10 {
            header += u32::from(words[at]);
        } else {
            message += u32::from(words[at]);
        }
        at += 1;
    }
    reply.ip_checksum = !fold(header);
    reply.checksum = !fold(message);
    // SAFETY: plain arguments; the frame becomes Ethernet + reply.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, (ETH_LEN + 28 + QUOTED) as u32, 0) } != 0 {
        return None;
    }
    ctx.store(ETH_LEN, &reply, 0).ok()?;
    swap_ethernet(ctx).ok()
}

/// Code of "destination unreachable": host unreachable for want of a port, fragmentation needed, administratively
/// prohibited (RFC 1812 section 5.2.7.1) otherwise.
#[inline(always)]
pub fn code(reason: u32) -> u8 {
    const NO_PORT: u32 = Counter::RefuseNoPort as u32;
    const TABLE_FULL: u32 = Counter::RefuseTableFull as u32;
    const TOO_BIG: u32 = Counter::TooBigOut as u32;
    match reason {
        NO_PORT | TABLE_FULL => 1,
        TOO_BIG => 4,
        _ => 13,
    }
}

/// IPv4 and ICMP headers with the quoted packet.
#[repr(C)]
struct Reply {
    version_length: u8,
    tos: u8,
    total_length: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    ip_checksum: u16,
    addresses: [u32; 2],
    kind: u8,
    code: u8,
    checksum: u16,
    /// For code 4, in the lower half (RFC 1191).
    mtu: u32,
    quoted: [u16; QUOTED / 2],
}
const _: () = assert!(size_of::<Reply>() == 56);
