//! Answering ARP (RFC 826) for egress addresses that this node announces: no address of the kernel's own stands for them, and
//! while the agent is away somebody must go on answering.

use crate::headers::{ETH_P_ARP, Ethernet};
use crate::maps::{self, ARP_ANSWERS, BINDS};
use crate::xdp;
use aegis_common::{ArpKey, Counter};
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::programs::XdpContext;

/// Ethernet and IPv4, with the lengths of their addresses, and the question: the first eight bytes of an ARP packet.
const QUESTION: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const ANSWER: u16 = 2u16.to_be();

/// An Ethernet frame with an ARP packet.
#[repr(C)]
struct Frame {
    ethernet: Ethernet,
    start: [u8; 6],
    operation: u16,
    sender_mac: [u8; 6],
    sender: [u8; 4],
    target_mac: [u8; 6],
    target: [u8; 4],
}

/// Answers a question for the MAC of an address that this node announces. What is asked of others for one that is local
/// here is kept from the kernel. Everything else passes: the agent hears what others say.
#[inline(always)]
pub fn answer(ctx: &XdpContext) -> u32 {
    answer_arp(ctx.ctx)
}

/// A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn answer_arp(ctx: *mut xdp_md) -> u32 {
    let ctx = &XdpContext::new(ctx);
    let Some(frame) = xdp::at::<Frame>(ctx, 0) else { return XDP_PASS };
    // SAFETY: within the frame.
    let frame = unsafe { &mut *frame };
    let [a, b, c, d, e, f, g, h] = QUESTION;
    if frame.ethernet.kind != ETH_P_ARP
        || frame.start != [a, b, c, d, e, f]
        || frame.operation != u16::from_ne_bytes([g, h])
        // Who names it as its own tells, and does not ask.
        || frame.sender == frame.target
    {
        return XDP_PASS;
    }
    let key = ArpKey { address: u32::from_ne_bytes(frame.target), ifindex: ctx.ingress_ifindex() as u32 };
    // SAFETY: copied at once; an entry is written once, as a whole.
    let Some(answer) = (unsafe { ARP_ANSWERS.get(&key) }).copied() else {
        // Where it is local for the sake of sockets, the kernel would answer.
        // SAFETY: only presence matters.
        return if unsafe { BINDS.get(&key.address) }.is_some() { XDP_DROP } else { XDP_PASS };
    };
    frame.ethernet = Ethernet { destination: frame.sender_mac, source: answer.mac, kind: ETH_P_ARP };
    frame.operation = ANSWER;
    (frame.target_mac, frame.sender_mac) = (frame.sender_mac, answer.mac);
    (frame.target, frame.sender) = (frame.sender, frame.target);
    maps::count(Counter::ArpAnswered, 0);
    XDP_TX
}
