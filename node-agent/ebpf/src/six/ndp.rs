//! Answering neighbour solicitations (RFC 4861) for addresses of /64s that this node announces, as `arp` does for IPv4. Whoever has
//! an address of a /64, one node answers for all of them: it hands packets to the nodes that they are for.

use super::lookup::{self, NDP_ANSWERS};
use super::{ICMPV6, Ipv6, single};
use crate::checksum::fold;
use crate::headers::{ETH_LEN, Ethernet};
use crate::maps::{self, SLOTS};
use crate::xdp;
use aegis_common::*;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::bpf_xdp_adjust_tail;
use aya_ebpf::programs::XdpContext;

const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Nothing that has passed a router has this hop limit (RFC 4861 section 7.1).
const FROM_THE_LINK: u8 = 255;
/// Bytes of a message without options.
const SHORTEST: u16 = 24;
/// Options: the asker's address on the link, and the one that is asked for.
const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// The answer was asked for by whom it is sent to; it takes the place of what was known (section 4.4).
const SOLICITED: u32 = 0x4000_0000u32.to_be();
const OVERRIDE: u32 = 0x2000_0000u32.to_be();
/// All nodes of the link (RFC 4291 section 2.7.1), and their MAC (RFC 2464 section 7).
const ALL_NODES: Address6 = [0xff02_0000u32.to_be(), 0, 0, 1u32.to_be()];
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// A neighbour solicitation or advertisement, with the IPv6 header before it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    ip: Ipv6,
    kind: [u8; 2],
    checksum: u16,
    flags: u32,
    target: Address6,
}
const _: () = assert!(size_of::<Message>() == 64);

/// An answer: with the target's address on the link.
#[repr(C)]
#[derive(Clone, Copy)]
struct Answer {
    message: Message,
    option: [u8; 2],
    mac: [u8; 6],
}
const _: () = assert!(size_of::<Answer>() == 72);

/// Answers a question for an address of a /64 that this node announces. `None`: it is no message between neighbours.
#[inline(always)]
pub fn answer(context: *mut xdp_md) -> Option<u32> {
    match answer_ndp(context) {
        OTHER => None,
        verdict => Some(verdict),
    }
}

/// The frame has no message between neighbours.
const OTHER: u32 = 100;

/// A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn answer_ndp(context: *mut xdp_md) -> u32 {
    let ctx = &XdpContext::new(context);
    let (Some(ethernet), Some(message)) = (xdp::at::<Ethernet>(ctx, 0), xdp::at::<Message>(ctx, ETH_LEN))
    else {
        return OTHER;
    };
    // SAFETY: within the frame.
    let (asker, question) = unsafe { ((*ethernet).source, *message) };
    let ip = &question.ip;
    if !ip.is_sound()
        || ip.next != ICMPV6
        || ip.hop_limit != FROM_THE_LINK
        || !matches!(question.kind, [SOLICITATION | ADVERTISEMENT, 0])
    {
        return OTHER;
    }
    if question.kind[0] != SOLICITATION {
        return not_asked(ip);
    }
    let network = single::network_of_question(&question.target);
    let key = NdpKey { network, ifindex: ctx.ingress_ifindex() as u32 };
    // SAFETY: copied at once; an entry is written once, as a whole.
    let Some(answer) = (unsafe { NDP_ANSWERS.get(&key) }).copied() else { return not_asked(ip) };
    if !is_taken(&question.target) || !is_valid(ctx, &question) {
        return not_asked(ip);
    }
    let grows = (ETH_LEN + size_of::<Answer>()) as i32 - xdp::length(ctx) as i32;
    // SAFETY: the context is valid; all pointers into the frame are made anew below.
    if unsafe { bpf_xdp_adjust_tail(context, grows) } != 0 {
        return XDP_PASS;
    }
    let (Some(ethernet), Some(place)) = (xdp::at::<Ethernet>(ctx, 0), xdp::at::<Answer>(ctx, ETH_LEN)) else {
        return XDP_PASS;
    };
    // Who has no address yet asks whether it may take this one: that is for all to hear (section 7.2.4).
    let (to, mac, flags) = match ip.source {
        [0, 0, 0, 0] => (ALL_NODES, ALL_NODES_MAC, OVERRIDE),
        source => (source, asker, SOLICITED | OVERRIDE),
    };
    const LENGTH: u16 = (size_of::<Answer>() - size_of::<Ipv6>()) as u16;
    let ip = Ipv6 {
        version_flow: u32::from_ne_bytes([0x60, 0, 0, 0]),
        payload_length: LENGTH.to_be(),
        next: ICMPV6,
        hop_limit: FROM_THE_LINK,
        source: question.target,
        destination: to,
    };
    let kind = [ADVERTISEMENT, 0];
    // SAFETY: within the frame.
    unsafe {
        *ethernet = Ethernet { destination: mac, source: answer.mac, kind: super::ETH_P_IPV6 };
        (*place).message = Message { ip, kind, checksum: 0, flags, target: question.target };
        ((*place).option, (*place).mac) = ([TARGET_LINK_ADDRESS, 1], answer.mac);
    }
    let Some(sum) = sum(ctx, LENGTH) else { return XDP_PASS };
    // SAFETY: within the frame.
    unsafe { (*place).message.checksum = !sum };
    maps::count(Counter::NdpAnswered, 0);
    XDP_TX
}

/// What is not answered passes: the agent hears what others say, and the kernel knows its own addresses. But no pod is a neighbour
/// of the link, nor is anything of this kind steered.
#[inline(always)]
fn not_asked(ip: &Ipv6) -> u32 {
    if lookup::network(&ip.destination).is_none() && !single::is(&ip.destination) {
        return XDP_PASS;
    }
    maps::count(Counter::DropNoFlow, ip.length());
    XDP_DROP
}

/// Whether somebody holds the slice of an address, or nodes ask each other by it. (Whether a pod has it, only its node knows.)
#[inline(always)]
fn is_taken(target: &Address6) -> bool {
    let Some(network) = lookup::network(target) else {
        return single::is(target);
    };
    if *target == seat(network_of(target)) {
        return true;
    }
    let slice = u32::from(slice_of(target));
    (FIRST_SLICE..SLOTS_PER_ADDRESS).contains(&slice)
        && SLOTS.get(network.index * SLOTS_PER_ADDRESS + slice).is_some_and(|slot| slot.peer != 0)
}

/// Whether it is a question as RFC 4861 section 7.1.1 has it.
#[inline(always)]
fn is_valid(ctx: &XdpContext, question: &Message) -> bool {
    let ip = &question.ip;
    let length = u16::from_be(ip.payload_length);
    let known = match ip.source {
        [0, 0, 0, 0] => false,
        // Who names it as its own tells, and does not ask. Nobody's address is a group.
        [first, ..] if ip.source == question.target || first.to_ne_bytes()[0] == 0xff => return false,
        _ => true,
    };
    let [.., low] = question.target;
    let group =
        [0xff02_0000u32.to_be(), 0, 1u32.to_be(), (0xff00_0000u32 | u32::from_be(low) & 0xff_ffff).to_be()];
    if ip.destination != group && !(known && ip.destination == question.target) {
        return false;
    }
    if length > SHORTEST {
        let Some(option) = xdp::at::<[u8; 2]>(ctx, ETH_LEN + size_of::<Message>()) else { return false };
        // SAFETY: within the frame.
        let [kind, words] = unsafe { *option };
        if words == 0 || (kind == SOURCE_LINK_ADDRESS && !known) {
            return false;
        }
    }
    sum(ctx, length) == Some(0xffff)
}

/// Sum over a message of so many bytes and its pseudo-header (RFC 8200 section 8.1), in ones' complement. `None` if the frame ends
/// before, or a message is never so long.
#[inline(always)]
fn sum(ctx: &XdpContext, length: u16) -> Option<u16> {
    let sum = match length {
        SHORTEST => sum_words::<28>(ctx)?,
        32 => sum_words::<32>(ctx)?,
        40 => sum_words::<36>(ctx)?,
        48 => sum_words::<40>(ctx)?,
        _ => return None,
    };
    Some(fold(sum + u32::from(length.to_be()) + u32::from(u16::from(ICMPV6).to_be())))
}

/// Sum over the addresses, which lie before the message, and the message: so many words.
#[inline(always)]
fn sum_words<const COUNT: usize>(ctx: &XdpContext) -> Option<u32> {
    let words = xdp::at::<[u16; COUNT]>(ctx, ETH_LEN + 8)?;
    let (mut sum, mut at) = (0, 0);
    while at < COUNT {
        // SAFETY: within the frame.
        sum += u32::from(unsafe { (*words)[at] });
        at += 1;
    }
    Some(sum)
}
