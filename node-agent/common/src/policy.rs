//! Who may leave where: pods, destinations and what is to happen.
//!
//! All policy is keyed by a *generation*. The agent writes a whole new generation beside the live one and then
//! changes `Config::generation`: one store switches every look-up at once, so no packet ever meets half a policy.

use crate::{REST, map_type};

/// Key of `PODS` (hash).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PodKey {
    /// Generation of the policy.
    pub generation: u32,
    /// Pod's address.
    pub address: u32,
}
map_type!(PodKey, 8);

/// Value of `PODS`. A local pod that no binding selects is present too, with class 0: known, not covered.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodValue {
    /// Class of the pod: pods to which the same rules apply share one. 0 = not covered by anything; [`POD_REFUSED`].
    pub class: u32,
    /// Which of the pods that have had this address it is (see [`incarnation`]).
    pub incarnation: u32,
    /// MAC of the pod's device, as the CNI told it: a packet with another one is a later pod's, of which the agent does not
    /// know yet. All zero = nobody told, and it is not compared.
    pub mac: [u8; 6],
    /// Zero.
    pub pad: u16,
}
map_type!(PodValue, 16);

/// Class of covered pods whose rules find no room in the tables: whatever they open towards the outside is refused.
pub const POD_REFUSED: u32 = u32::MAX;

/// [`PodValue::mac`] of an address whose pod is gone while conntrack still knows its connections: no device has this one
/// (it is the broadcast address), so whoever sends from there is a stranger.
pub const MAC_LEAVING: [u8; 6] = [0xff; 6];

/// Key of `HOSTS` (hash): pods of the host network, which have the node's addresses. What tells them apart is the control group
/// of a packet's socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HostKey {
    /// The number of a group of cgroup2, which is the inode of its folder; or [`of_incarnation`].
    pub group: u64,
    /// Generation of the policy.
    pub generation: u32,
    /// Zero.
    pub pad: u32,
}
map_type!(HostKey, 16);

/// In place of a group's number: the incarnation of a pod that is there, for whoever judges flows. Numbers of groups are not as
/// high.
#[inline(always)]
pub const fn of_incarnation(incarnation: u32) -> u64 {
    1 << 63 | incarnation as u64
}

/// Value of `HOSTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostValue {
    /// As [`PodValue::class`]; or [`HOST_UNKNOWN`].
    pub class: u32,
    /// As [`PodValue::incarnation`].
    pub incarnation: u32,
}
map_type!(HostValue, 8);

/// Class of the group that all pods' groups are in: whoever is found by it alone is a pod that nobody has named yet.
pub const HOST_UNKNOWN: u32 = u32::MAX - 1;

/// Levels of the control group hierarchy at which pods may stand, from the root (0) on: one less than this is the deepest.
pub const HOST_LEVELS: u32 = 16;

/// What tells a pod from those that had its address before: a digest of its UID (FNV-1a), the same after a restart of
/// the agent. A flow belongs to a pod only if it carries the pod's own.
pub const fn incarnation(uid: &str) -> u32 {
    let bytes = uid.as_bytes();
    let mut digest = 0x811c_9dc5u32;
    let mut at = 0;
    while at < bytes.len() {
        digest = (digest ^ bytes[at] as u32).wrapping_mul(0x0100_0193);
        at += 1;
    }
    digest
}

/// Data of the LPM key of `DESTINATIONS`: the prefix length counts the 32 bits of the generation too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DestinationKey {
    /// Generation of the policy (any fixed byte order: it is matched in full).
    pub generation: u32,
    /// Destination address, network byte order.
    pub address: u32,
}
map_type!(DestinationKey, 8);

/// Value of `DESTINATIONS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DestinationValue {
    /// Class of the destination, or [`DESTINATION_INTERNAL`].
    pub class: u32,
}
map_type!(DestinationValue, 4);

/// Class of destinations inside the cluster (pods, services, nodes): never covered, and reachable for pods that
/// are not known yet.
pub const DESTINATION_INTERNAL: u32 = u32::MAX;

/// Data of the LPM key of `PORTS`: which port class a destination port belongs to. The prefix length counts
/// generation (32), protocol (16) and then the bits of the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortKey {
    /// Generation of the policy.
    pub generation: u32,
    /// IP protocol number.
    pub protocol: u16,
    /// Destination port in **network** order (a prefix match works on the leading bits).
    pub port: u16,
}
map_type!(PortKey, 8);

/// Key of `VERDICTS` (hash).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VerdictKey {
    /// Generation of the policy.
    pub generation: u32,
    /// [`PodValue::class`].
    pub pod_class: u32,
    /// [`DestinationValue::class`].
    pub destination_class: u32,
    /// Value of `PORTS`, 0 where no entry matches (also for ICMP and later fragments).
    pub port_class: u32,
}
map_type!(VerdictKey, 16);

/// Value of `VERDICTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerdictValue {
    /// [`ACTION_PASS`], [`ACTION_ALLOCATE`] or [`ACTION_DENY`].
    pub action: u16,
    /// Index into `ALLOCATIONS` for [`ACTION_ALLOCATE`].
    pub allocation: u16,
    /// Agent's number of the binding, for metrics; unique in a generation.
    pub binding: u32,
}
map_type!(VerdictValue, 8);

/// Not covered: leave with the node's address. The same as no entry at all.
pub const ACTION_PASS: u16 = 0;
/// Covered: leave from an address of the allocation.
pub const ACTION_ALLOCATE: u16 = 1;
/// Covered, but there is nothing to leave from: refuse new flows.
pub const ACTION_DENY: u16 = 2;

/// Addresses one allocation can use on one node.
pub const ADDRESSES_PER_ALLOCATION: usize = 16;
/// Gateways among which the flows of one allocation are spread.
pub const GATEWAYS_PER_ALLOCATION: usize = 16;
/// Allocations one data plane can know at a time.
pub const MAX_ALLOCATIONS: u32 = 1024;

/// Value of `ALLOCATIONS` (array).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllocationValue {
    /// Egress addresses in which this node has slices; a pod starts at `hash(pod) % count` and spills onwards.
    pub addresses: [u32; ADDRESSES_PER_ALLOCATION],
    /// How many of `addresses` are set.
    pub count: u32,
    /// Time-outs of the allocation's flows.
    pub timeouts: Timeouts,
    /// One of the allocation's egress addresses, by which gateways know it.
    pub name: u32,
    /// How many of `gateways` are set. They count while `count` is 0: this node has nothing to send from by itself.
    pub gateway_count: u16,
    /// How many of them, from the front, are nearer than the rest: the rest is for when none of these answers.
    pub near_count: u16,
    /// Nodes that hold slices, as indices into `PEERS`, one of which each flow leaves through.
    pub gateways: [u16; GATEWAYS_PER_ALLOCATION],
    /// Ports that may rest at a time, or [`ANY_NUMBER`].
    pub max_resting: u32,
    /// Digest of the allocation's namespace and name, by which the agent finds its entry again; programs do not read it. 0
    /// = the entry was never used.
    pub identity: u64,
    /// Whose the allocation is: a digest of its namespace, under which `LOADS` counts. 0 = not known yet.
    pub account: u64,
    /// Flows of the allocation that one pod may have at a time. 0 = no limit, here and below.
    pub pod_flows: u32,
    /// New ones that it may ask for in a second.
    pub pod_rate: u32,
    /// Flows that the account may have at a time on this node.
    pub account_flows: u32,
    /// New ones that it may ask for in a second.
    pub account_rate: u32,
    /// Flows that this node has room for, if accounts are to leave each other room (see [`limit`](crate::limit)).
    pub room_flows: u32,
    /// The same of bitmaps of ports.
    pub room_blocks: u32,
}
map_type!(AllocationValue, 176);

/// In place of a greatest number: there is none.
pub const ANY_NUMBER: u32 = u32::MAX;

/// Seconds without a packet after which a flow's port may be used again (RFC 5382, RFC 4787, RFC 5508, RFC 7857).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP with segments seen in both directions.
    pub tcp_established: u32,
    /// TCP during the handshake, or after a one-sided FIN.
    pub tcp_transitory: u32,
    /// TCP after FIN in both directions, or RST.
    pub tcp_closed: u32,
    /// UDP.
    pub udp: u32,
    /// ICMP echo.
    pub icmp: u32,
    /// For how long a port rests after that, unless its flow was closed: the origin may still hold its end (RFC 6888 REQ-8).
    pub rest: u32,
}
map_type!(Timeouts, 24);

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            tcp_established: 7440,
            tcp_transitory: 240,
            tcp_closed: 10,
            udp: 300,
            icmp: 60,
            rest: REST,
        }
    }
}
