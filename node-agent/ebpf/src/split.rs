//! Cutting a datagram in two that does not fit into the tunnel to a gateway and may be cut (RFC 791 section 3.2).
//!
//! A pod that has learnt the MTU of the way sends fragments that fit. But a node whose bridge hands packets to the IP hooks
//! (`bridge-nf-call-iptables`, which kubeadm asks for) puts them together again, and forgets how large they were: telling
//! the pod once more would not help. No helper makes two packets of one, so a clone comes through the uplink's program
//! first, labelled, and becomes the front; the packet itself becomes the back.

use crate::checksum::{apply, difference16, fold};
use crate::headers::{self, DF, ETH_LEN, MF, OFFSET, Packet};
use crate::via;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_clone_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;

/// `tc_index` of a clone that is to become the front. Packets from elsewhere have 0, or what a classifier on the way set.
const FRONT: u16 = 0xae91;
/// `BPF_ADJ_ROOM_NET`: room behind the IP header.
const BEHIND_IP: u32 = 0;
const IP_LEN: u32 = 20;

/// The packet is whole, or must stay so.
pub const UNCUT: u32 = 0;
/// It has become one of two fragments that fit.
pub const CUT: u32 = 1;
/// Something went wrong.
pub const FAILED: u32 = 2;

/// Makes of a packet that does not fit the fragment that it is to become. A function of its own for the verifier's sake,
/// like `take` in `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut(skb: *mut __sk_buff) -> u32 {
    let ctx = &TcContext::new(skb);
    let (Some(config), Some(packet)) = (crate::maps::config(), Packet::read(ctx)) else { return FAILED };
    let payload = packet.length - IP_LEN.min(packet.length);
    // Every fragment but the last carries a multiple of eight bytes.
    let front = via::limit(config).saturating_sub(IP_LEN) & !7;
    if front == 0 || payload <= front || payload - front > front || !may_be_cut(ctx, &packet) {
        return UNCUT;
    }
    // SAFETY: fields of the context.
    let (label, ifindex) = unsafe { ((*skb).tc_index, (*skb).ifindex) };
    let fragment = u16::from_be(packet.ip.fragment);
    let made = if label == u32::from(FRONT) {
        // SAFETY: a field of the context.
        unsafe { (*skb).tc_index = 0 };
        // SAFETY: plain arguments.
        let trimmed = unsafe { bpf_skb_change_tail(skb, ETH_LEN as u32 + IP_LEN + front, 0) } == 0;
        trimmed && header(ctx, &packet, IP_LEN + front, fragment | MF)
    } else {
        // What becomes of the clone does not matter here: without it the datagram is lost as any may be.
        // SAFETY: fields of the context, plain arguments.
        unsafe {
            (*skb).tc_index = u32::from(FRONT);
            bpf_clone_redirect(skb, ifindex, 0);
            (*skb).tc_index = 0;
        }
        ctx.adjust_room(-(front as i32), BEHIND_IP, 0).is_ok()
            && header(ctx, &packet, IP_LEN + payload - front, fragment + (front >> 3) as u16)
    };
    if made { CUT } else { FAILED }
}

#[inline(always)]
fn may_be_cut(ctx: &TcContext, packet: &Packet) -> bool {
    let fragment = u16::from_be(packet.ip.fragment);
    // Options would have to be told apart by whether they are copied (RFC 791 section 3.1).
    let plain = packet.transport_offset == ETH_LEN + IP_LEN as usize && headers::segment_size(ctx) == 0;
    plain && fragment & DF == 0 && (fragment & (OFFSET | MF) != 0 || is_complete(ctx, packet))
}

/// Whether the transport checksum has been computed. A sender may leave that to its device, with the sum of the
/// pseudo-header in its place; over half a datagram it would come out wrong. That such a sender is answered instead is
/// enough: it then sends fragments, which are complete.
#[inline(always)]
fn is_complete(ctx: &TcContext, packet: &Packet) -> bool {
    if packet.ip.protocol != headers::UDP {
        return packet.ip.protocol == headers::ICMP;
    }
    let Ok([length, checksum]) = ctx.load::<[u16; 2]>(packet.transport_offset + 4) else { return false };
    let (source, destination) = (packet.ip.source, packet.ip.destination);
    let sum = (source & 0xffff) + (source >> 16) + (destination & 0xffff) + (destination >> 16);
    let pseudo = fold(sum + u32::from(u16::from(headers::UDP).to_be()) + u32::from(length));
    checksum != pseudo
}

/// Writes length and fragment fields (host order) of the IP header, with its checksum.
#[inline(always)]
fn header(ctx: &TcContext, packet: &Packet, length: u32, fragment: u16) -> bool {
    let (length, fragment) = ((length as u16).to_be(), fragment.to_be());
    let change = difference16(packet.ip.total_length, length) + difference16(packet.ip.fragment, fragment);
    ctx.store(ETH_LEN + 2, &length, 0).is_ok()
        && ctx.store(ETH_LEN + 6, &fragment, 0).is_ok()
        && ctx.store(ETH_LEN + 10, &apply(packet.ip.checksum, change), 0).is_ok()
}
