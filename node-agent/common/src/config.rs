//! Settings of the data plane that change without reloading programs.

use crate::map_type;

/// Value of `CONFIG` (array of one).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Live generation of the policy maps.
    pub generation: u32,
    /// Bit of `skb->mark` that says "this flow is Aegis's".
    pub mark: u32,
    /// This node's tunnel address.
    pub tunnel_address: u32,
    /// UDP port of the tunnel (Geneve, RFC 8926; IANA: 6081).
    pub tunnel_port: u32,
    /// Index of this node in `PEERS`.
    pub own_peer: u32,
    /// 1: a packet from an address of [`Config::pod_ranges`] that is not in `PODS` is dropped unless its destination
    /// is inside the cluster. 0: it passes.
    pub hold_unknown: u32,
    /// Seed of the port permutation and of the random cursor; made once, kept over restarts.
    pub seed: u32,
    /// Largest IPv4 packet that can be encapsulated: the smallest uplink MTU minus 36.
    pub tunnel_mtu: u32,
    /// MSS to which SYNs are clamped: `tunnel_mtu` minus 40; 0 = no clamping.
    pub mss: u32,
    /// Refusals (RST, ICMP) per second and CPU that are answered; the rest is dropped silently.
    pub refusals_per_second: u32,
    /// Entries of `pod_ranges` that are set.
    pub pod_range_count: u32,
    /// 1: packets of established flows go between pod-facing device and uplink without the host stack.
    pub fast: u32,
    /// Ranges from which this node's pods get their addresses.
    pub pod_ranges: [PodRange; MAX_POD_RANGES],
    /// Bit n: some group in `HOSTS` is at level n of the hierarchy (see [`HOST_LEVELS`](crate::HOST_LEVELS)). 0 = packets of the
    /// node's own sockets are not looked at.
    pub host_levels: u32,
}
map_type!(Config, 116);

/// Ranges in [`Config::pod_ranges`].
pub const MAX_POD_RANGES: usize = 8;

/// A range of pod addresses: an address belongs to it when `address & mask == network`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodRange {
    /// First address of the range.
    pub network: u32,
    /// Net mask, in the same byte order.
    pub mask: u32,
}
map_type!(PodRange, 8);

/// Network identifiers of our tunnel's packets: what the receiver is to do. Other identifiers on the same UDP port
/// belong to somebody else and pass.
pub const VNI_STEER: u32 = 0xae9150;
/// The packet is a fragment that is to meet the others of its datagram here.
pub const VNI_FRAGMENT: u32 = 0xae9151;
/// A packet of another node's pod, for this node to translate and send on. Carries [`OPTION_ALLOCATION`].
pub const VNI_GATEWAY: u32 = 0xae9152;
/// A packet for a pod of this node, which the sender has translated back.
pub const VNI_RETURN: u32 = 0xae9153;
/// The same for a refusal in the origin's place: the sender has no port to send the packet from. Another gateway may have one.
pub const VNI_REFUSED: u32 = 0xae9156;
/// To be answered: does the receiver's data plane work?
pub const VNI_PROBE: u32 = 0xae9154;
/// The answer: for the agent that asked, and never answered itself.
pub const VNI_PROBE_ANSWER: u32 = 0xae9155;
/// Bytes that encapsulation adds: IPv4 20, UDP 8, Geneve 8.
pub const TUNNEL_OVERHEAD: u32 = 36;
/// The same on the way to a gateway: an option more.
pub const GATEWAY_OVERHEAD: u32 = TUNNEL_OVERHEAD + 8;
/// First word of the option that names the allocation by one of its egress addresses, which follows (RFC 8926 section
/// 3.5): class 0xff91 (experimental), type 1 with the critical bit, one word of data. In network byte order.
pub const OPTION_ALLOCATION: u32 = 0xff91_8101u32.to_be();
