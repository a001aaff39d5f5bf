//! Who may leave where: pods, destinations and what is to happen.
//!
//! All policy is keyed by a *generation*. The agent writes a whole new generation beside the live one and then
//! changes `Config::generation`: one store switches every look-up at once, so no packet ever meets half a policy.

use crate::{REST, is_stand_in, map_type};

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

/// Bit of [`DestinationValue::class`]: only policies that observe name the destination, so nobody is held for its sake.
pub const DESTINATION_OBSERVED: u32 = 1 << 30;

/// Whether packets to a destination of this class may be covered for some pod.
pub const fn may_be_covered(class: u32) -> bool {
    class != DESTINATION_INTERNAL && class & DESTINATION_OBSERVED == 0
}

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
    /// Value of `PORTS`, 0 where no entry matches (also for ICMP and later fragments). Without an entry for its class a port is
    /// treated like one of class 0.
    pub port_class: u32,
}
map_type!(VerdictKey, 16);

/// Value of `VERDICTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerdictValue {
    /// [`ACTION_PASS`], [`ACTION_ALLOCATE`], [`ACTION_DENY`] or [`ACTION_FORBID`].
    pub action: u16,
    /// Index into `ALLOCATIONS` for [`ACTION_ALLOCATE`].
    pub allocation: u16,
    /// Agent's number of the rule, for metrics; unique in a generation. With [`VERDICT_BINDS`] sockets of pods of the host network
    /// get their source when they connect. See [`observed`].
    pub binding: u32,
    /// Another index into `ALLOCATIONS`: of what new flows leave from that find no port there. The same one = of none.
    pub secondary: u16,
    /// Zero.
    pub pad: u16,
}
map_type!(VerdictValue, 12);

impl VerdictValue {
    /// All of it, for what can give no more than a number: `binding` in the upper half. Nothing = 0 = [`ACTION_PASS`].
    #[inline(always)]
    pub fn packed(&self) -> u64 {
        u64::from(self.binding) << 32
            | u64::from(self.allocation & INDEX_MASK) << 18
            | u64::from(self.secondary & INDEX_MASK) << 4
            | u64::from(self.action & ACTION_MASK)
    }

    /// Undoes [`VerdictValue::packed`].
    #[inline(always)]
    pub fn unpacked(packed: u64) -> VerdictValue {
        VerdictValue {
            action: packed as u16 & ACTION_MASK,
            allocation: (packed >> 18) as u16 & INDEX_MASK,
            binding: (packed >> 32) as u32,
            secondary: (packed >> 4) as u16 & INDEX_MASK,
            pad: 0,
        }
    }
}

const ACTION_MASK: u16 = 0xf;
/// Of an index into `ALLOCATIONS`.
const INDEX_MASK: u16 = 0x3fff;
const _: () = assert!(MAX_ALLOCATIONS <= 1 << 14);

/// In [`VerdictValue::binding`], from this bit on: the number of the policy that only observes, plus one, 0 = none; and what it would do
/// (`WOULD_*`). Flows, which have sixteen bits for a number, never see it.
pub const OBSERVED_SHIFT: u32 = 16;
const OBSERVED_BITS: u32 = 13;
/// Rules whose flows are counted, in each of two generations that follow each other.
pub const RULES_COUNTED: u32 = 1024;

/// What such a policy would do with a flow: let it leave from an allocation.
pub const WOULD_LEAVE: u32 = 0;
/// Refuse it for want of something to leave from.
pub const WOULD_LACK: u32 = 1;
/// Let it leave with the node's address.
pub const WOULD_PASS: u32 = 2;
/// Refuse it.
pub const WOULD_DENY: u32 = 3;

/// What [`VerdictValue::binding`] says of the policy of this number that only observes. One that is too high is not counted.
pub const fn observes(number: u32, would: u32) -> u32 {
    if number >= RULES_COUNTED { 0 } else { (would << OBSERVED_BITS | (number + 1)) << OBSERVED_SHIFT }
}

/// Number of the policy that only observes and what it would do, from [`VerdictValue::binding`]; `None` if there is none.
#[inline(always)]
pub const fn observed(binding: u32) -> Option<(u32, u32)> {
    let said = binding >> OBSERVED_SHIFT;
    match said & ((1 << OBSERVED_BITS) - 1) {
        0 => None,
        number => Some((number - 1, said >> OBSERVED_BITS & 3)),
    }
}

/// Value of `RULES` (per-CPU array; index: [`rule_index`]): new flows about which a rule has decided, or would have.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleValue {
    /// They left from an allocation.
    pub left: u64,
    /// They were refused for want of something to leave from on the node.
    pub lacked: u64,
    /// They were refused, as the rule says.
    pub denied: u64,
    /// By `WOULD_*`.
    pub would: [u64; 4],
}
map_type!(RuleValue, 56);

impl RuleValue {
    /// Both together.
    pub fn plus(&self, other: &RuleValue) -> RuleValue {
        let would = |at: usize| self.would[at].wrapping_add(other.would[at]);
        RuleValue {
            left: self.left.wrapping_add(other.left),
            lacked: self.lacked.wrapping_add(other.lacked),
            denied: self.denied.wrapping_add(other.denied),
            would: [would(0), would(1), would(2), would(3)],
        }
    }

    /// What has been counted since.
    pub fn since(&self, before: &RuleValue) -> RuleValue {
        let would = |at: usize| self.would[at].saturating_sub(before.would[at]);
        RuleValue {
            left: self.left.saturating_sub(before.left),
            lacked: self.lacked.saturating_sub(before.lacked),
            denied: self.denied.saturating_sub(before.denied),
            would: [would(0), would(1), would(2), would(3)],
        }
    }
}

/// Where the flows of a rule are counted. Generations that follow each other count apart, since numbers change with them.
#[inline(always)]
pub const fn rule_index(generation: u32, number: u32) -> Option<u32> {
    if number >= RULES_COUNTED { None } else { Some((generation & 1) * RULES_COUNTED + number) }
}

/// Key of `OBSERVED`: a flow that was counted, or a digest of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ObservedKey {
    /// Addresses.
    pub addresses: [u32; 2],
    /// Ports.
    pub ports: u32,
    /// Protocol.
    pub protocol: u32,
}
map_type!(ObservedKey, 16);

/// Bit of [`VerdictValue::binding`]; flows, which have sixteen bits for the number, never see it.
pub const VERDICT_BINDS: u32 = 1 << 31;

/// Not covered: leave with the node's address. The same as no entry at all.
pub const ACTION_PASS: u16 = 0;
/// Covered: leave from an address of the allocation.
pub const ACTION_ALLOCATE: u16 = 1;
/// Covered, but there is nothing to leave from: refuse new flows.
pub const ACTION_DENY: u16 = 2;
/// Refuse new flows, since the policy says so.
pub const ACTION_FORBID: u16 = 3;

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
    /// Egress addresses in which this node has slices: IPv4 ones, then stand-ins of single IPv6 ones (see
    /// [`stand_in`](crate::stand_in)). A pod starts at `hash(pod) % count` of those of the family, and spills onwards.
    pub addresses: [u32; ADDRESSES_PER_ALLOCATION],
    /// How many of `addresses` are IPv4 ones.
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
    /// How many of `addresses`, behind the IPv4 ones, are stand-ins of single IPv6 ones.
    pub singles: u32,
    /// Zero.
    pub pad: u32,
}
map_type!(AllocationValue, 184);

impl AllocationValue {
    /// Where in `addresses` those begin from which a flow to this origin may leave, and how many there are.
    #[inline(always)]
    pub const fn own(&self, remote: u32) -> (u32, u32) {
        if is_stand_in(remote) { (self.count, self.singles) } else { (0, self.count) }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_observed_is_beside_the_rules_own_number() {
        for number in [0, 1, 700, RULES_COUNTED - 1] {
            for would in [WOULD_LEAVE, WOULD_LACK, WOULD_PASS, WOULD_DENY] {
                let binding = 0xffff | observes(number, would);
                assert_eq!(observed(binding), Some((number, would)));
                assert_eq!((binding as u16, binding & VERDICT_BINDS), (0xffff, 0));
                assert_eq!(observed(binding | VERDICT_BINDS), Some((number, would)));
            }
        }
        assert_eq!(observed(VERDICT_BINDS | 0xffff), None);
        assert_eq!(observes(RULES_COUNTED, WOULD_DENY), 0, "not counted as somebody else's");
    }

    #[test]
    fn a_packed_verdict_is_the_same_one() {
        let last = MAX_ALLOCATIONS as u16 - 1;
        for (action, allocation, secondary) in
            [(ACTION_PASS, 0, 0), (ACTION_FORBID, last, 0), (ACTION_ALLOCATE, 3, last)]
        {
            let verdict = VerdictValue { action, allocation, secondary, binding: u32::MAX - 7, pad: 0 };
            assert_eq!(VerdictValue::unpacked(verdict.packed()), verdict);
        }
        assert_eq!(VerdictValue::default().packed(), 0);
    }

    #[test]
    fn generations_that_follow_each_other_count_apart() {
        assert_eq!(rule_index(6, 3), Some(3));
        assert_eq!(rule_index(7, 3), Some(RULES_COUNTED + 3));
        assert_eq!(rule_index(7, RULES_COUNTED), None);
    }
}
