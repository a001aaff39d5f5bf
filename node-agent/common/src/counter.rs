//! Why packets were dropped, refused, steered or translated.

use crate::map_type;

/// Value of `COUNTERS` (per-CPU array; index: [`Counter`] as `u32`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CounterValue {
    /// Packets.
    pub packets: u64,
    /// Bytes of the IP packets.
    pub bytes: u64,
}
map_type!(CounterValue, 16);

macro_rules! counters {
    ($($(#[doc = $doc:expr])+ $name:ident = $label:literal,)+) => {
        /// Index into `COUNTERS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter { $($(#[doc = $doc])+ $name,)+ }

        impl Counter {
            /// All counters, in index order.
            pub const ALL: &'static [Counter] = &[$(Counter::$name,)+];

            /// The one with an index.
            pub fn from_index(index: u32) -> Option<Counter> {
                if index as usize >= Counter::ALL.len() {
                    return None;
                }
                // SAFETY: the variants of a `repr(u32)` are numbered from 0 on, and there are more of them than that.
                Some(unsafe { core::mem::transmute::<u32, Counter>(index) })
            }

            /// Stable name for metrics. Names that begin with `drop_` are packets that went no further, those with
            /// `refuse_` new flows that were turned away.
            pub const fn label(self) -> &'static str {
                match self { $(Counter::$name => $label,)+ }
            }
        }
    };
}

counters! {
    /// Out: translated packets of flows that existed.
    Translated = "translated",
    /// Out: new flows.
    NewFlow = "new_flow",
    /// Out: new flows after which more than 60 % of this node's ports towards their origin are taken.
    PastHighWater = "past_high_water",
    /// In: packets translated back to a local pod.
    Reverse = "reverse",
    /// In: packets sent on to the node that owns the port.
    Steered = "steered",
    /// In: packets received from another node through the tunnel.
    SteeredHere = "steered_here",
    /// Out: packets sent to a gateway, since this node has no slice to send from.
    ToGateway = "to_gateway",
    /// Gateway: packets of other nodes' pods that were translated and sent on.
    Guest = "guest",
    /// Gateway: packets sent back to the node whose pod they are for.
    Returned = "returned",
    /// In: packets for a pod of this node that a gateway has translated back.
    FromGateway = "from_gateway",
    /// Probes of other nodes that were answered.
    Probed = "probed",
    /// Questions for the MAC of an egress address that were answered.
    ArpAnswered = "arp_answered",
    /// In: packets answered with "fragmentation needed", since they do not fit into the tunnel.
    TooBig = "too_big",
    /// Refusals that were answered to the pod (RST or ICMP).
    RefusalSent = "refusal_sent",
    /// New flow refused: no port is free towards this origin.
    RefuseNoPort = "refuse_no_port",
    /// New flow refused: the allocation has no slice on this node, or nothing to leave from.
    RefuseUnavailable = "refuse_unavailable",
    /// New flow refused: the node has not renewed its Lease for so long that its slices may soon be another's.
    RefuseFenced = "refuse_fenced",
    /// Refused: a TCP segment that opens nothing and belongs to no flow.
    RefuseNoFlow = "refuse_no_flow",
    /// Refused: the gateway of the flow is lost.
    RefuseGatewayLost = "refuse_gateway_lost",
    /// Out: packets answered with "fragmentation needed", since they do not fit into the tunnel to the gateway.
    TooBigOut = "too_big_out",
    /// Refused: a protocol that has no ports to share.
    RefuseProtocol = "refuse_protocol",
    /// New flow refused: a flow table is full.
    RefuseTableFull = "refuse_table_full",
    /// New flow refused: the pod has as many of this allocation as it may.
    RefusePodFlows = "refuse_pod_flows",
    /// New flow refused: the pod has asked for as many of this allocation in this second as it may.
    RefusePodRate = "refuse_pod_rate",
    /// New flow refused: the account has as many on this node as it may, or as leaves room for others.
    RefuseAccountFlows = "refuse_account_flows",
    /// New flow refused: the account has asked for as many on this node in this second as it may.
    RefuseAccountRate = "refuse_account_rate",
    /// Out: dropped, the pod's address is not known yet.
    DropUnknownPod = "drop_unknown_pod",
    /// Dropped, what a pod forged: a source that is an egress address, or a packet of the tunnel between nodes.
    DropForged = "drop_forged",
    /// Out: dropped, somebody else translated a covered packet (leak guard).
    DropLeak = "drop_leak",
    /// Out: dropped, a covered packet that cannot be parsed.
    DropMalformedOut = "drop_malformed_out",
    /// Out: dropped, a later fragment whose first fragment was not seen.
    DropFragmentOut = "drop_fragment_out",
    /// New flow dropped: no port is free, but more slices are about to come to this node; its next packet finds them.
    DropWaiting = "drop_waiting_for_slice",
    /// Out: dropped, another CPU is just ending the flow; the next packet finds it gone.
    DropEnding = "drop_ending",
    /// Dropped: the node has not renewed its Lease for so long that its slices may be another's.
    DropFenced = "drop_fenced",
    /// In: dropped, nobody holds the slice.
    DropNoOwner = "drop_no_owner",
    /// In: dropped, no live flow asked for it.
    DropNoFlow = "drop_no_flow",
    /// In: dropped, cannot be parsed, is a protocol without ports, or an ICMP error with a wrong checksum.
    DropMalformedIn = "drop_malformed_in",
    /// In: dropped, a later fragment whose first fragment was not seen, and which could not be kept.
    DropFragmentIn = "drop_fragment_in",
    /// In: dropped, it came through the tunnel but this node is not the owner (loop guard).
    DropNotOwner = "drop_not_owner",
    /// In: dropped, too large for the tunnel, and nothing that could be answered (a later fragment, for example).
    DropTooBig = "drop_too_big",
    /// Dropped, no way on (no neighbour, no route): to the owner, or from a gateway to the origin.
    DropNoNeighbour = "drop_no_neighbour",
    /// In: dropped, the tunnel packet came from an address that is no peer.
    DropNotPeer = "drop_not_peer",
    /// Flows that the sweeper removed.
    Expired = "expired",
    /// Flows that the sweeper removed before their port had rested, since more rested than their allocation allows.
    RestCutShort = "rest_cut_short",
    /// Flows that the sweeper removed since their slice is not this node's any more.
    Revoked = "revoked",
    /// Entries of incoming packets that the sweeper removed since no flow had them.
    Orphaned = "orphaned",
    /// Dropped without an answer while flows are taken over from another version of the data plane: of a new flow, or of one
    /// that is not here yet. It comes again.
    DropTakingOver = "drop_taking_over",
    /// Flows that were taken over from another version of the data plane.
    Carried = "carried",
    /// Flows of another version of the data plane that could not be taken over.
    NotCarried = "not_carried",
    /// In: later fragments that came before the first of their datagram, and were given to the agent to keep for a moment.
    FragmentKept = "fragment_kept",
    /// In: dropped, translated back but with no room for the word that says so: the driver has no metadata.
    DropNoMetadata = "drop_no_metadata",
    /// Out: packets that went to the uplink without the host stack.
    FastOut = "fast_out",
    /// In: packets that went to the pod without the host stack.
    FastIn = "fast_in",
    /// Questions for the MAC of an address of a /64 that were answered.
    NdpAnswered = "ndp_answered",
    /// Sockets that were given an egress address and a port when they connected.
    Bound = "bound",
    /// In: packets for such sockets.
    BoundIn = "bound_in",
    /// Refused: a socket that connects, since no port for sockets is free towards its destination.
    RefuseNoSocketPort = "refuse_no_socket_port",
    /// Out: dropped, the kernel's answer for a socket that is gone.
    DropSocketless = "drop_socketless",
    /// Out: new flows that left from a policy's secondary allocation, since the primary had nothing to leave from.
    SecondaryFlow = "secondary_flow",
    /// New flow refused: a policy says so.
    RefusePolicy = "refuse_policy",
    /// In: dropped, a gateway's refusal of a new flow for want of a port: the flow's next packet takes another gateway, or the policy's
    /// secondary allocation.
    DropGatewayFull = "drop_gateway_full",
}
