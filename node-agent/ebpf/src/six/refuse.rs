//! Telling a pod at once that its IPv6 packet will not leave, as for IPv4: RST for TCP, ICMPv6 for the rest.

use super::{ICMPV6, IPV6_LEN, Ipv6, LATER, Layers, START, follow_headers};
use crate::checksum::fold;
use crate::headers::{self, ACK, ETH_LEN, FIN, RST, SYN, TCP};
use crate::{maps, refuse};
use aegis_common::Counter;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_skb_change_tail;
use aya_ebpf::programs::TcContext;

const UNREACHABLE: u8 = 1;
/// Administratively prohibited (RFC 4443 section 3.1).
const PROHIBITED: u8 = 1;
const ECHO: u8 = 128;
/// Bytes of the refused packet that are quoted: its header and eight more. The pod sent it, and knows the rest.
const QUOTED: usize = IPV6_LEN + 8;
const MESSAGE: usize = 8 + QUOTED;

/// Turns the packet into an answer, as if the origin had sent it; 0 if it has none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn answer_skb6(skb: *mut __sk_buff) -> u32 {
    u32::from(turned(&TcContext::new(skb)).is_some())
}

#[inline(always)]
fn turned(ctx: &TcContext) -> Option<()> {
    let config = maps::config()?;
    let ip: Ipv6 = ctx.load(ETH_LEN).ok()?;
    let mut layers = Layers::default();
    if follow_headers(ctx.skb.skb, u32::from(ip.next), START as u32, &raw mut layers) == 0
        || layers.fragment == LATER
        // What is still to be cut into segments is not answered.
        || headers::segment_size(ctx) != 0
        || !refuse::allowed(config)
    {
        return None;
    }
    match layers.protocol as u8 {
        TCP => reset(ctx, &ip, layers.offset as usize)?,
        ICMPV6 if ctx.load::<u8>(layers.offset as usize).ok()? != ECHO => return None,
        _ => unreachable(ctx, &ip)?,
    }
    let macs: [[u8; 6]; 2] = ctx.load(0).ok()?;
    ctx.store(0, &[macs[1], macs[0]], 0).ok()?;
    maps::count(Counter::RefusalSent, 0);
    Some(())
}

/// Makes the segment an RST that answers it (RFC 9293 section 3.10.7.1). Addresses and ports change places, which no checksum
/// notices.
#[inline(always)]
fn reset(ctx: &TcContext, ip: &Ipv6, tcp: usize) -> Option<()> {
    let ports: [u16; 2] = ctx.load(tcp).ok()?;
    let [sequence, acknowledged]: [u32; 2] = ctx.load(tcp + 4).ok()?;
    let [length, flags]: [u8; 2] = ctx.load(tcp + 12).ok()?;
    if flags & RST != 0 {
        return None;
    }
    let (new_sequence, new_acknowledged, new_flags) = if flags & ACK != 0 {
        (acknowledged, 0, RST)
    } else {
        let before = (tcp - ETH_LEN) as u32 + u32::from(length >> 4) * 4;
        let payload = ip.length().wrapping_sub(before);
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
    ctx.store(ETH_LEN + 8, &[ip.destination, ip.source], 0).ok()
}

/// An ICMPv6 error (RFC 4443 section 3.1) with what it quotes.
#[repr(C)]
struct Reply {
    ip: Ipv6,
    kind: [u8; 2],
    checksum: u16,
    unused: u32,
    quoted: [u32; QUOTED / 4],
}
const _: () = assert!(size_of::<Reply>() == IPV6_LEN + MESSAGE);

#[inline(always)]
fn unreachable(ctx: &TcContext, ip: &Ipv6) -> Option<()> {
    let mut reply = Reply {
        ip: Ipv6 {
            version_flow: u32::from_ne_bytes([0x60, 0, 0, 0]),
            payload_length: (MESSAGE as u16).to_be(),
            next: ICMPV6,
            hop_limit: 64,
            source: ip.destination,
            destination: ip.source,
        },
        kind: [UNREACHABLE, PROHIBITED],
        checksum: 0,
        unused: 0,
        quoted: ctx.load(ETH_LEN).ok()?,
    };
    // SAFETY: `Reply` is plain data without padding, so it can be read as words of 16 bits.
    let words = unsafe { &*core::ptr::from_ref(&reply).cast::<[u16; (IPV6_LEN + MESSAGE) / 2]>() };
    // The pseudo-header: addresses, length and protocol (RFC 8200 section 8.1).
    let (mut sum, mut at) = (u32::from((MESSAGE as u16).to_be()) + u32::from(u16::from(ICMPV6).to_be()), 4);
    while at < (IPV6_LEN + MESSAGE) / 2 {
        sum += u32::from(words[at]);
        at += 1;
    }
    reply.checksum = !fold(sum);
    // SAFETY: plain arguments; the frame becomes Ethernet + reply.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, (ETH_LEN + IPV6_LEN + MESSAGE) as u32, 0) } != 0 {
        return None;
    }
    ctx.store(ETH_LEN, &reply, 0).ok()
}
