//! Meters: what an egress address is used for, towards whom, by which rule.
//!
//! A flow belongs to a meter from its beginning to its end, and has its number in both directions' values, so that a packet
//! costs one look into an array. Meters are few compared with flows; what finds none is counted by [`REST_METER`]. Over IPv6 a flow
//! has one value, which packets that come in are looked up in too.

use crate::{Address6, Network, map_type};

/// The meter of everything that has none of its own.
pub const REST_METER: u32 = 0;

/// Most meters that a node may have: numbers have 16 bits.
pub const MAX_METERS: u32 = 1 << 16;
/// Connections of sockets with an egress address (`mode: Bind`) that are metered apart; of the others the rest of the address tells.
pub const MAX_BOUND_METERS: u32 = 1 << 17;
/// Destinations, with rule and reason, by which refusals are counted apart.
pub const MAX_REFUSALS: u32 = 8192;

/// Key of `METER_INDEX`, whose values are numbers of meters.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MeterKey {
    /// Egress address: see [`metered_egress`].
    pub egress: Network,
    /// Origin's address, of IPv4 as [`mapped`]; 0 in the meter of an address for what has none of its own.
    pub remote: Address6,
    /// Origin's port; 0 of protocols without.
    pub remote_port: u16,
    /// Number of the rule (see [`ForwardValue::binding`](crate::ForwardValue::binding)); 0 for pods of other nodes.
    pub binding: u16,
    /// Index into `ALLOCATIONS`; [`NO_ALLOCATION`] for the rest of a /64, since what comes in for it names none.
    pub allocation: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// [`METER_OF_GUESTS`] and [`METER_RETIRED`].
    pub flags: u8,
}
map_type!(MeterKey, 32);

impl MeterKey {
    /// The meter of a /64 for what has none of its own.
    pub const fn rest_of(network: Network) -> MeterKey {
        MeterKey::rest(network, NO_ALLOCATION)
    }

    /// The meter of an egress address that an allocation has, for what has none of its own.
    pub const fn rest(egress: Network, allocation: u16) -> MeterKey {
        MeterKey { egress, remote: [0; 4], remote_port: 0, binding: 0, allocation, protocol: 0, flags: 0 }
    }
}

/// An IPv4 egress address in [`MeterKey::egress`], where else a /64 is: no /64 begins with zeros.
pub const fn metered_egress(address: u32) -> Network {
    [0, address]
}

/// An IPv4 address as an IPv6 one (RFC 4291 section 2.5.5.2).
pub const fn mapped(address: u32) -> Address6 {
    [0, 0, 0xffffu32.to_be(), address]
}

/// Of pods of other nodes.
pub const METER_OF_GUESTS: u8 = 1;
/// Of flows that it has, but no new one: these get another meter.
pub const METER_RETIRED: u8 = 2;

/// Value of `METERS` (per-CPU array, by number). Only ever grows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MeterValue {
    /// Flows that began.
    pub flows: u64,
    /// Packets towards the origin, as they are on the wire.
    pub sent_packets: u64,
    /// Bytes of their IP packets.
    pub sent_bytes: u64,
    /// Packets from the origin.
    pub received_packets: u64,
    /// Bytes of their IP packets.
    pub received_bytes: u64,
}
map_type!(MeterValue, 40);

impl MeterValue {
    /// The sum of two.
    #[must_use]
    pub fn plus(&self, other: &MeterValue) -> MeterValue {
        MeterValue {
            flows: self.flows.wrapping_add(other.flows),
            sent_packets: self.sent_packets.wrapping_add(other.sent_packets),
            sent_bytes: self.sent_bytes.wrapping_add(other.sent_bytes),
            received_packets: self.received_packets.wrapping_add(other.received_packets),
            received_bytes: self.received_bytes.wrapping_add(other.received_bytes),
        }
    }

    /// What has come since `before`.
    #[must_use]
    pub fn since(&self, before: &MeterValue) -> MeterValue {
        MeterValue {
            flows: self.flows.wrapping_sub(before.flows),
            sent_packets: self.sent_packets.wrapping_sub(before.sent_packets),
            sent_bytes: self.sent_bytes.wrapping_sub(before.sent_bytes),
            received_packets: self.received_packets.wrapping_sub(before.received_packets),
            received_bytes: self.received_bytes.wrapping_sub(before.received_bytes),
        }
    }
}

/// Value of `METER_USE` (array, by number), which the agent has in its own memory. Of IPv4 alone: a /64 has no ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MeterUse {
    /// Ports in use. A flow may end on one CPU a moment before another has counted that it began: see it as signed.
    pub in_use: u32,
    /// The most that were in use since the agent has last asked.
    pub peak: u32,
}
map_type!(MeterUse, 8);

/// Key of `REFUSALS`, whose values count new flows that were refused.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RefusalKey {
    /// Destination's address, of IPv4 as [`mapped`]; 0, or [`mapped`] 0, where there was no room to count it apart.
    pub remote: Address6,
    /// Its port; 0 of protocols without.
    pub remote_port: u16,
    /// Number of the rule; 0 for pods of other nodes.
    pub binding: u16,
    /// Index into `ALLOCATIONS`; [`NO_ALLOCATION`] where a rule names none.
    pub allocation: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// [`Counter`](crate::Counter) of the reason.
    pub reason: u8,
}
map_type!(RefusalKey, 24);

impl RefusalKey {
    /// Where refusals for a reason are counted when there is no room for more: it is always there.
    pub const fn rest_of(reason: u8) -> RefusalKey {
        RefusalKey {
            remote: [0; 4],
            remote_port: 0,
            binding: 0,
            allocation: NO_ALLOCATION,
            protocol: 0,
            reason,
        }
    }
}

/// In place of an allocation: none.
pub const NO_ALLOCATION: u16 = u16::MAX;
