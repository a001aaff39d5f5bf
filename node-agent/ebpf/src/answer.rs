//! Answers that a frame in XDP is turned into: an ICMP error about it, or a reset.

use crate::checksum::fold;
use crate::headers::{self, ACK, DF, ETH_LEN, FIN, Ipv4, RST, SYN};
use crate::xdp;
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use aya_ebpf::programs::XdpContext;

/// Bytes of the packet that an ICMP error quotes: its IP header without options and eight more (RFC 792).
const QUOTED: usize = 28;
const ERROR: usize = 28 + QUOTED;
const RESET: usize = 40;

#[inline(always)]
fn header(length: usize, protocol: u8, source: u32, destination: u32) -> Ipv4 {
    Ipv4 {
        version_length: 0x45,
        tos: 0,
        total_length: (length as u16).to_be(),
        id: 0,
        fragment: DF.to_be(),
        ttl: 64,
        protocol,
        checksum: 0,
        source,
        destination,
    }
}

/// Makes the frame an ICMP "destination unreachable" about itself, from its destination to its source. `mtu` is for code 4
/// (RFC 1191). The Ethernet header is left to the caller. `None` if that can't be done.
#[inline(always)]
pub fn unreachable(ctx: &XdpContext, ip: &Ipv4, code: u8, mtu: u16) -> Option<Ipv4> {
    let shrink = (ETH_LEN + QUOTED) as i32 - xdp::length(ctx) as i32;
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if shrink > 0 || unsafe { bpf_xdp_adjust_tail(ctx.ctx, shrink) } != 0 {
        return None;
    }
    // SAFETY: as above.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -28) } != 0 {
        return None;
    }
    let frame = xdp::at::<Error>(ctx, ETH_LEN)?;
    // SAFETY: within the frame.
    let frame = unsafe { &mut *frame };
    frame.ip = header(ERROR, headers::ICMP, ip.destination, ip.source);
    frame.icmp = [u16::from_ne_bytes([headers::ICMP_UNREACHABLE, code]), 0, 0, mtu.to_be()];
    let words = xdp::at::<[u16; ERROR / 2]>(ctx, ETH_LEN)?;
    let (mut header, mut message, mut at) = (0u32, 0u32, 0);
    while at < ERROR / 2 {
        // SAFETY: within the frame.
        let word = u32::from(unsafe { (*words)[at] });
        if at < 10 {
            header += word;
        } else {
            message += word;
        }
        at += 1;
    }
    frame.ip.checksum = !fold(header);
    frame.icmp[1] = !fold(message);
    Some(frame.ip)
}

/// Makes the TCP segment in the frame the RST that answers it (RFC 9293 section 3.10.7.1). The Ethernet header is left to
/// the caller.
#[inline(always)]
pub fn reset(ctx: &XdpContext, ip: &Ipv4, transport_offset: usize) -> Option<Ipv4> {
    // SAFETY: within the frame.
    let tcp = unsafe { *xdp::at::<Tcp>(ctx, transport_offset)? };
    let [length, flags] = tcp.length_flags;
    if flags & RST != 0 {
        return None;
    }
    let (sequence, acknowledged, new_flags) = if flags & ACK != 0 {
        (tcp.acknowledged, 0, RST)
    } else {
        let headers = (transport_offset - ETH_LEN) as u32 + u32::from(length >> 4) * 4;
        let payload = u32::from(ip.total_length()).wrapping_sub(headers);
        let taken = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        (0, u32::from_be(tcp.sequence).wrapping_add(taken).to_be(), RST | ACK)
    };
    let shrink = (ETH_LEN + RESET) as i32 - xdp::length(ctx) as i32;
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if shrink > 0 || unsafe { bpf_xdp_adjust_tail(ctx.ctx, shrink) } != 0 {
        return None;
    }
    let frame = xdp::at::<Reset>(ctx, ETH_LEN)?;
    // SAFETY: within the frame.
    let frame = unsafe { &mut *frame };
    frame.ip = header(RESET, headers::TCP, ip.destination, ip.source);
    frame.tcp = Tcp {
        ports: [tcp.ports[1], tcp.ports[0]],
        sequence,
        acknowledged,
        length_flags: [5 << 4, new_flags],
        window: tcp.window,
        checksum: 0,
        urgent: 0,
    };
    let words = xdp::at::<[u16; RESET / 2]>(ctx, ETH_LEN)?;
    // The pseudo-header: addresses (summed with the segment below), protocol and length.
    let (mut header, mut segment, mut at) =
        (0u32, u32::from((headers::TCP as u16).to_be()) + u32::from(20u16.to_be()), 0);
    while at < RESET / 2 {
        // SAFETY: within the frame.
        let word = u32::from(unsafe { (*words)[at] });
        if at < 10 {
            header += word;
        }
        if at >= 6 {
            segment += word;
        }
        at += 1;
    }
    frame.ip.checksum = !fold(header);
    frame.tcp.checksum = !fold(segment);
    Some(frame.ip)
}

/// An ICMP error's headers.
#[repr(C, packed)]
struct Error {
    ip: Ipv4,
    icmp: [u16; 4],
}

/// A reset.
#[repr(C, packed)]
struct Reset {
    ip: Ipv4,
    tcp: Tcp,
}

/// TCP without options (RFC 9293 section 3.1).
#[repr(C)]
#[derive(Clone, Copy)]
struct Tcp {
    ports: [u16; 2],
    sequence: u32,
    acknowledged: u32,
    length_flags: [u8; 2],
    window: u16,
    checksum: u16,
    urgent: u16,
}
