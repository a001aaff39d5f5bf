//! Packets of the node's own sockets: which pod of the host network has sent this?
//!
//! Such a pod has the node's addresses, so it is told by the control group of the packet's socket: the pod's own group is an
//! ancestor of those of its containers. Most of what a node sends is of no covered pod, and passes after one look-up.

use crate::headers::{self, ACK, Packet, SYN};
use crate::maps::{self, FRAGMENTS_OUT, HOST_SOCKETS, PEER_INDEX};
use crate::snat::fragment_key;
use aegis_common::*;
use aya_ebpf::bindings::{__sk_buff, BPF_ANY};
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id};
use aya_ebpf::programs::TcContext;

/// Whether the packet began on this node: one that came in by some device says so, whatever has become of its source.
#[inline(always)]
pub fn is_own(ctx: &TcContext) -> bool {
    // SAFETY: a field of the context, which is valid while the program runs.
    unsafe { (*ctx.skb.skb).ingress_ifindex == 0 }
}

/// A socket of no pod.
const FOREIGN: u64 = 0;
/// No socket, or one that is closed: the kernel answers in its place.
const NO_SOCKET: u64 = u64::MAX;
/// The packet has to do with no flow.
pub const PASSES: u64 = u64::MAX - 1;
/// It is of a pod that nobody has named yet, and goes to where it may be covered.
pub const HELD: u64 = u64::MAX - 2;

/// What is known of a packet of this node's own before its flow is looked for: incarnation and class of the pod, [`ANYBODY`] where
/// no socket tells, [`PASSES`] or [`HELD`]. A function of its own for the verifier's sake, like `take` in `ports`, and for that of the
/// stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn judge_own(skb: *mut __sk_buff, generation: u32) -> u64 {
    let ctx = &TcContext::new(skb);
    let (Some(config), Some(packet)) = (maps::config(), Packet::read(ctx)) else { return PASSES };
    let sender = sender_of(skb, config.host_levels, generation);
    if sender != NO_SOCKET && (sender >> 32) as u32 == HOST_UNKNOWN {
        return if is_held(generation, packet.ip.destination) { HELD } else { PASSES };
    }
    if packet.ip.is_later_fragment() {
        return if sender == FOREIGN { PASSES } else { sender };
    }
    let Some(transport) = packet.transport(ctx) else { return sender };
    let concerns_a_flow = match packet.ip.protocol {
        // What opens a connection ends the flow that had its port before.
        headers::TCP => {
            sender != FOREIGN || packet.tcp_flags(ctx).is_some_and(|flags| flags & (SYN | ACK) == SYN)
        }
        headers::ICMP => sender != FOREIGN || headers::is_icmp_error(transport.icmp_type()),
        // What goes to a gateway comes by once more, and still has the socket.
        // SAFETY: only presence matters.
        headers::UDP if u32::from(transport.destination_port()) == config.tunnel_port => {
            sender != FOREIGN && unsafe { PEER_INDEX.get(&packet.ip.destination) }.is_none()
        }
        _ => sender != FOREIGN,
    };
    if concerns_a_flow { sender } else { PASSES }
}

/// A function of its own for the verifier's sake, like `take` in `ports`, and for that of the stack. Gives class and
/// incarnation of the pod, [`FOREIGN`] or [`NO_SOCKET`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sender_of(skb: *mut __sk_buff, levels: u32, generation: u32) -> u64 {
    // From the innermost on: all pods are in a group that stands for pods that are not known.
    let mut level = HOST_LEVELS;
    while level > 1 {
        level -= 1;
        if levels >> level & 1 == 0 {
            continue;
        }
        // SAFETY: the context is valid while the program runs.
        let group = unsafe { bpf_skb_ancestor_cgroup_id(skb, level as i32) };
        if group == 0 {
            continue;
        }
        if let Some(host) = maps::host(generation, group) {
            return u64::from(host.class) << 32 | u64::from(host.incarnation);
        }
    }
    // SAFETY: as above.
    if unsafe { bpf_skb_cgroup_id(skb) } == 0 { NO_SOCKET } else { FOREIGN }
}

/// Whether a packet of a pod that nobody has named yet is held: where it goes to is covered for some pod.
#[inline(always)]
pub fn is_held(generation: u32, destination: u32) -> bool {
    maps::destination_class(generation, destination).is_some_and(may_be_covered)
}

/// Remembers that the connection of the packet's socket, whose key has this digest, leaves from an egress address.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn remember(skb: *mut __sk_buff, digest: u32) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    let _ = HOST_SOCKETS.insert(&cookie, &digest, u64::from(BPF_ANY));
    0
}

/// Not 0: the connection left from an egress address before its flow was lost.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn remembers(skb: *mut __sk_buff, digest: u32) -> u32 {
    // SAFETY: the context is valid while the program runs, and the value is read at once.
    let known = unsafe { HOST_SOCKETS.get(&bpf_get_socket_cookie(skb.cast())) };
    u32::from(known.is_some_and(|known| *known == digest))
}

/// Lets the later fragments of a datagram pass as its first one did: with the source that it has.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn pass_fragments(skb: *mut __sk_buff) -> u32 {
    let Some(packet) = Packet::read(&TcContext::new(skb)) else { return 0 };
    if packet.ip.is_first_fragment() {
        let value = FragmentValue { address: packet.ip.source, seen: maps::now(), ..Default::default() };
        let _ = FRAGMENTS_OUT.insert(&fragment_key(&packet.ip), &value, u64::from(BPF_ANY));
    }
    0
}
