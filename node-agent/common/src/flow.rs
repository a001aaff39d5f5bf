//! NAT state of live flows.
//!
//! Each direction of a packet costs one look-up: what the outgoing direction saw is kept in `FORWARD`, what the
//! incoming direction saw in `REVERSE`. Whoever judges a flow (the sweeper) reads both.

use crate::{map_type, mix};

/// Key of `FORWARD` (local = the pod) and of `REVERSE` (local = the egress address), the tables of [`Bucket`](crate::Bucket)s. Neither
/// ever gives a live flow's place away, as an LRU map would.
///
/// For ICMP echo `local_port` is the identifier and `remote_port` is 0. Aligned so that two comparisons are enough.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Pod (FORWARD) or egress (REVERSE) address.
    pub local: u32,
    /// Origin's address.
    pub remote: u32,
    /// Pod's (FORWARD) or egress (REVERSE) port.
    pub local_port: u16,
    /// Origin's port.
    pub remote_port: u16,
    /// IP protocol number: 1, 6 or 17.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}
map_type!(FlowKey, 16);

impl FlowKey {
    /// What a flow's values carry of their key. Memory of an entry that is removed is used for another at once, even under
    /// the eyes of a program that still reads it: whoever has copied a value compares.
    #[inline(always)]
    pub const fn digest(&self) -> u32 {
        let ports = (self.local_port as u32) << 16 | self.remote_port as u32;
        mix(mix(self.local ^ self.remote.rotate_left(16)) ^ ports ^ (self.protocol as u32) << 8)
    }
}

/// Value of `FORWARD`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForwardValue {
    /// Which flow this is: [`FlowKey::digest`] of its key in the upper half, a random number in the lower; 0 once somebody has
    /// begun to end it. Whoever ends a flow puts the 0 there by compare-and-swap: one only, and only the very flow that it
    /// has looked at.
    pub life: u64,
    /// Egress address of the flow; the pod's own where another node translates it.
    pub egress: u32,
    /// Egress port (or identifier) of the flow; the pod's own where another node translates it.
    pub egress_port: u16,
    /// Index into `ALLOCATIONS`, for the time-outs.
    pub allocation: u16,
    /// Second of the last packet out.
    pub last_seen: u32,
    /// [`PodValue::incarnation`](crate::PodValue::incarnation) of the pod that made the flow. A later pod with the same
    /// address has no part in it.
    pub incarnation: u32,
    /// What was seen in this direction: [`SEEN_SYN`] and the others.
    pub seen: u8,
    /// Not 0: [`ReverseValue::buried`] was set, which a packet of the pod undoes.
    pub buried: u8,
    /// Index into `PEERS` of the other node that takes part: the gateway through which the flow leaves, or, on the
    /// gateway, the node whose pod it is of. 0 = none.
    pub peer: u16,
    /// Index of the binding that made the flow (see `VerdictValue::binding`).
    pub binding: u16,
    /// Number of the flow's meter; [`REST_METER`](crate::REST_METER) also where another node translates it, and meters it.
    pub meter: u16,
}
map_type!(ForwardValue, 32);

impl ForwardValue {
    /// Whether this is the value of a live flow with that key.
    #[inline(always)]
    pub fn is_of(&self, key: &FlowKey) -> bool {
        self.life >> 32 == u64::from(key.digest()) && self.life != 0
    }

    /// [`ForwardValue::life`] of a new flow.
    #[inline(always)]
    pub fn new_life(key: &FlowKey, random: u32) -> u64 {
        u64::from(key.digest()) << 32 | u64::from(random | 1)
    }

    /// Whether the flow is translated here for a pod of another node.
    #[inline(always)]
    pub fn is_guest(&self, key: &FlowKey) -> bool {
        self.peer != 0 && self.egress != key.local
    }
}

/// Value of `REVERSE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReverseValue {
    /// [`FlowKey::digest`] of the key.
    pub digest: u32,
    /// Pod's address.
    pub pod: u32,
    /// Pod's port (or identifier).
    pub pod_port: u16,
    /// Index into `PEERS` of the other node that takes part, as in [`ForwardValue::peer`].
    pub peer: u16,
    /// Second of the last packet in; 0 while the origin has not answered.
    pub last_seen: u32,
    /// Second at which the flow was made.
    pub made: u32,
    /// What was seen in this direction: [`SEEN_SYN`] and the others.
    pub seen: u8,
    /// Not 0: the pod is gone. The port rests, and nothing is taken to the next pod with that address.
    pub buried: u8,
    /// As in [`ForwardValue::meter`].
    pub meter: u16,
}
map_type!(ReverseValue, 24);

impl ReverseValue {
    /// Key in `FORWARD` of the flow with this value under `key` in `REVERSE`.
    #[inline(always)]
    pub fn forward_key(&self, key: &FlowKey) -> FlowKey {
        FlowKey { local: self.pod, local_port: self.pod_port, ..*key }
    }
}

/// A TCP SYN passed in this direction.
pub const SEEN_SYN: u8 = 1;
/// A TCP segment without SYN (so, one that acknowledges) passed in this direction.
pub const SEEN_ACK: u8 = 2;
/// A TCP FIN passed in this direction.
pub const SEEN_FIN: u8 = 4;
/// A TCP RST passed in this direction.
pub const SEEN_RST: u8 = 8;
/// The flow may take the fast path, in both directions: it is established, as conntrack has seen too, and the pod's packets had its key
/// before the host stack touched them, so that answers need no more translation than the uplink's.
pub const SEEN_FAST: u8 = 16;

/// Not seen, but known when the flow was made: what its gateway refuses for want of a port may leave from the policy's secondary
/// allocation.
pub const HAS_SECONDARY: u8 = 1 << 7;

/// Key of `SPENT`: a gateway that had no port for a new flow of an allocation towards an origin.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SpentKey {
    /// The allocation, by the egress address that names it (`AllocationValue::name`).
    pub name: u32,
    /// Tunnel address of the gateway.
    pub gateway: u32,
    /// Origin's address.
    pub remote: u32,
    /// Origin's port; 0 for ICMP echo.
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}
map_type!(SpentKey, 16);

/// Seconds for which a gateway that had no port towards an origin is passed over, where there is another way. Then one flow
/// tries it again, and is late by one packet if there is still none.
pub const SPENT_LIFE: u32 = 10;

/// Key of `FRAGMENTS_OUT` and `FRAGMENTS_IN` (LRU hashes: they hold no NAT state, only hints that live for the
/// time a datagram is under way).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address of the datagram.
    pub source: u32,
    /// Destination address of the datagram.
    pub destination: u32,
    /// IPv4 identification, host order.
    pub id: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}
map_type!(FragmentKey, 12);

/// Value of `FRAGMENTS_OUT` and `FRAGMENTS_IN`: what the first fragment's ports led to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentValue {
    /// Address that replaces the source (out) or the destination (in).
    pub address: u32,
    /// Egress port of the datagram, for steering.
    pub port: u16,
    /// Index into `PEERS` of the node to which the datagram goes on; 0 = none.
    pub peer: u16,
    /// Second at which the first fragment passed.
    pub seen: u32,
    /// Identification that replaces the datagram's (out), host order.
    pub identification: u16,
    /// As in [`ForwardValue::meter`].
    pub meter: u16,
}
map_type!(FragmentValue, 16);

/// Seconds for which a first fragment speaks for later ones: what Linux gives a datagram to become whole
/// (`ipfrag_time`). After that the identification may be another datagram's, and the flow over.
pub const FRAGMENT_LIFE: u32 = 30;

/// TCP flags (RFC 9293 section 3.1).
pub const FIN: u8 = 1;
/// Begins a connection.
pub const SYN: u8 = 2;
/// Ends a connection at once.
pub const RST: u8 = 4;
/// Acknowledges.
pub const ACK: u8 = 16;

/// What a direction has seen after a segment with these flags. A segment that goes on after an RST shows that the RST
/// did not end the connection.
#[inline(always)]
pub fn seen_after(seen: u8, flags: u8) -> u8 {
    let mut seen = seen;
    if flags & RST != 0 {
        return seen | SEEN_RST;
    }
    seen &= !SEEN_RST;
    if flags & SYN != 0 {
        // The direction begins anew: a FIN that came late from the connection before says nothing of this one.
        seen = seen & !SEEN_FIN | SEEN_SYN;
    } else if flags & ACK != 0 {
        seen |= SEEN_ACK;
    }
    if flags & FIN != 0 {
        seen |= SEEN_FIN;
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_segment_adds() {
        let both = SEEN_SYN | SEEN_ACK;
        for (before, flags, after) in [
            (0, SYN, SEEN_SYN),
            (0, SYN | ACK, SEEN_SYN),
            (SEEN_SYN, ACK, both),
            (both, FIN | ACK, both | SEEN_FIN),
            (both, RST, both | SEEN_RST),
            (both, RST | ACK, both | SEEN_RST),
            (both | SEEN_RST, ACK, both),
            (both | SEEN_FIN, ACK, both | SEEN_FIN),
            (both | SEEN_FIN, RST, both | SEEN_FIN | SEEN_RST),
            (both | SEEN_FIN, SYN | ACK, both),
            (both | SEEN_FIN | SEEN_RST, SYN, both),
            (0, 0, 0),
        ] {
            assert_eq!(seen_after(before, flags), after, "{before:#x} and flags {flags:#x}");
        }
    }
}
