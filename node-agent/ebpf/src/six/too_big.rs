//! "Packet too big" (RFC 4443 section 3.2), made of a packet in XDP that does not fit into the tunnel.

use super::inbound::header;
use super::{ICMPV6, IPV6_LEN, Ipv6, LATER, Layers, START, follow_headers_xdp, is_error, load};
use crate::checksum::fold;
use crate::headers::{ETH_LEN, Ethernet};
use crate::maps;
use crate::xdp;
use aegis_common::{Counter, MIN_MTU6};
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_TX};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use aya_ebpf::programs::XdpContext;

/// Bytes of the packet that are quoted. It could be more; what is too big for a tunnel always has these.
const QUOTED: usize = 256;
const MESSAGE: usize = 8 + QUOTED;
const TOO_BIG: u8 = 2;

/// An ICMPv6 error without what it quotes.
#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    ip: Ipv6,
    kind: [u8; 2],
    checksum: u16,
    mtu: u32,
}
const _: () = assert!(size_of::<Head>() == IPV6_LEN + 8);

/// Turns the packet into the answer, or drops it. Gives the verdict.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn answer6(context: *mut xdp_md) -> u32 {
    let ctx = &XdpContext::new(context);
    answer(ctx).unwrap_or_else(|| {
        maps::count(Counter::DropTooBig, xdp::length(ctx).saturating_sub(ETH_LEN) as u32);
        XDP_DROP
    })
}

#[inline(always)]
fn answer(ctx: &XdpContext) -> Option<u32> {
    let config = maps::config()?;
    let ip = header(ctx)?;
    let mut layers = Layers::default();
    if follow_headers_xdp(ctx.ctx, u32::from(ip.next), START as u32, &raw mut layers) == 0 {
        return None;
    }
    // An error is never answered by an error (RFC 4443 section 2.4).
    if layers.protocol == u32::from(ICMPV6)
        && (layers.fragment == LATER || is_error(load(ctx, layers.offset)?))
    {
        return None;
    }
    // SAFETY: within the frame.
    let ethernet = unsafe { *xdp::at::<Ethernet>(ctx, 0)? };
    let shrink = (ETH_LEN + QUOTED) as i32 - xdp::length(ctx) as i32;
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if shrink > 0 || unsafe { bpf_xdp_adjust_tail(ctx.ctx, shrink) } != 0 {
        return None;
    }
    // SAFETY: as above.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(size_of::<Head>() as i32)) } != 0 {
        return None;
    }
    let (place, head) = (xdp::at::<Ethernet>(ctx, 0)?, xdp::at::<Head>(ctx, ETH_LEN)?);
    let answer = Ipv6 {
        version_flow: u32::from_ne_bytes([0x60, 0, 0, 0]),
        payload_length: (MESSAGE as u16).to_be(),
        next: ICMPV6,
        hop_limit: 64,
        source: ip.destination,
        destination: ip.source,
    };
    // No link is narrower than that, so nobody believes less.
    let mtu = if config.tunnel_mtu < MIN_MTU6 { MIN_MTU6 } else { config.tunnel_mtu };
    // SAFETY: within the frame.
    unsafe {
        *place = Ethernet { destination: ethernet.source, source: ethernet.destination, kind: ethernet.kind };
        *head = Head { ip: answer, kind: [TOO_BIG, 0], checksum: 0, mtu: mtu.to_be() };
    }
    // The pseudo-header: addresses, length and protocol (RFC 8200 section 8.1).
    let words = xdp::at::<[u16; (32 + MESSAGE) / 2]>(ctx, ETH_LEN + 8)?;
    let (mut sum, mut at) = (u32::from((MESSAGE as u16).to_be()) + u32::from(u16::from(ICMPV6).to_be()), 0);
    while at < (32 + MESSAGE) / 2 {
        // SAFETY: within the frame.
        sum += u32::from(unsafe { (*words)[at] });
        at += 1;
    }
    // SAFETY: within the frame.
    unsafe { (*head).checksum = !fold(sum) };
    maps::count(Counter::TooBig, ip.length());
    Some(XDP_TX)
}
