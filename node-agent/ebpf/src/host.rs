//! Packets of the node's own sockets: which pod of the host network has sent this?
//!
//! Such a pod has the node's addresses, so it is told by the control group of the packet's socket: the pod's own group is an
//! ancestor of those of its containers. Most of what a node sends is of no covered pod, and passes after one look-up.

use crate::maps::{self, FRAGMENTS_OUT, HOST_SOCKETS, HOSTS};
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

/// Who has sent a packet of this node's own.
#[derive(Clone, Copy)]
pub struct Sender {
    /// See [`sender_of`].
    packed: u64,
}

/// A socket of no pod.
const FOREIGN: u64 = 0;
/// No socket, or one that is closed: the kernel answers in its place.
const NO_SOCKET: u64 = u64::MAX;

impl Sender {
    #[inline(always)]
    pub fn of(ctx: &TcContext, config: &Config, generation: u32) -> Sender {
        Sender { packed: sender_of(ctx.skb.skb, config.host_levels, generation) }
    }

    /// A socket of something else than a pod.
    #[inline(always)]
    pub fn is_foreign(self) -> bool {
        self.packed == FOREIGN
    }

    /// In place of the pod: who may open nothing but by its class, which is 0 if nothing covers it. `None` = there is no socket.
    #[inline(always)]
    pub fn pod(self) -> Option<PodValue> {
        if self.packed == NO_SOCKET {
            return None;
        }
        let (class, incarnation) = ((self.packed >> 32) as u32, self.packed as u32);
        Some(PodValue { class, incarnation, mac: [0; 6], pad: 0 })
    }
}

/// A function of its own for the verifier's sake, like `take` in `ports`, and for that of the stack. Gives class and
/// incarnation of the pod, [`FOREIGN`] or [`NO_SOCKET`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sender_of(skb: *mut __sk_buff, levels: u32, generation: u32) -> u64 {
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
        let key = HostKey { group, generation, pad: 0 };
        // SAFETY: copied at once; values of a live generation change as a whole only.
        if let Some(host) = unsafe { HOSTS.get(&key) } {
            return u64::from(host.class) << 32 | u64::from(host.incarnation);
        }
    }
    // SAFETY: as above.
    if unsafe { bpf_skb_cgroup_id(skb) } == 0 { NO_SOCKET } else { FOREIGN }
}

/// Whether a packet of a pod that nobody has named yet is held: where it goes to is covered for some pod.
#[inline(always)]
pub fn is_held(generation: u32, destination: u32) -> bool {
    maps::destination_class(generation, destination).is_some_and(|class| class != DESTINATION_INTERNAL)
}

/// Remembers that the connection of the packet's socket leaves from an egress address.
#[inline(always)]
pub fn remember(ctx: &TcContext, key: &FlowKey) {
    // SAFETY: the context is valid while the program runs.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) };
    let _ = HOST_SOCKETS.insert(&cookie, &key.digest(), u64::from(BPF_ANY));
}

/// Whether the connection left from an egress address before its flow was lost.
#[inline(always)]
pub fn remembers(ctx: &TcContext, key: &FlowKey) -> bool {
    // SAFETY: the context is valid while the program runs, and the value is read at once.
    let known = unsafe { HOST_SOCKETS.get(&bpf_get_socket_cookie(ctx.skb.skb.cast())) };
    known.is_some_and(|digest| *digest == key.digest())
}

/// Lets the later fragments of a datagram pass as the first one did: with the source that it has.
#[inline(always)]
pub fn pass_fragments(ip: &crate::headers::Ipv4) {
    let value = FragmentValue { address: ip.source, seen: maps::now(), ..Default::default() };
    let _ = FRAGMENTS_OUT.insert(&fragment_key(ip), &value, u64::from(BPF_ANY));
}
