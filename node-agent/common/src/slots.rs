//! Which node owns which ports: addresses, slots, peers, and this node's own holdings.

use crate::map_type;

/// Ports of a slice. Slice index = port >> 8.
pub const PORTS_PER_SLICE: u32 = 256;
/// Slots of one address: one for each possible value of the upper port byte.
pub const SLOTS_PER_ADDRESS: u32 = 256;
/// First usable slice: ports below 1024 are never used.
pub const FIRST_SLICE: u32 = 4;
/// Egress addresses one data plane can know at a time.
pub const MAX_ADDRESSES: u32 = 1024;
/// Peers (other nodes) one data plane can know at a time, this node included.
pub const MAX_PEERS: u32 = 8192;
/// Entries of [`FragmentHome`] lists of one address.
pub const HOMES_PER_ADDRESS: u32 = 16;

/// Value of `ADDRESSES` (hash; key: egress address as `u32`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AddressValue {
    /// Index of the address: its slots are `SLOTS[index << 8 | port >> 8]`, its fragment homes
    /// `HOMES[index << 4 | hash & 15]`.
    pub index: u32,
    /// 1 + index into `ALLOCATIONS` of the allocation that it is dedicated to; 0 while this node has no entry for that.
    pub allocation: u32,
}
map_type!(AddressValue, 8);

/// Value of `SLOTS` (array; index: `AddressValue::index << 8 | port >> 8`). Eight aligned bytes, so that a change
/// of owner is one atomic store.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotValue {
    /// Index into `PEERS` of the node that owns the slice; 0 = nobody.
    pub peer: u32,
    /// Epoch of the holding; newer wins.
    pub epoch: u32,
}
map_type!(SlotValue, 8);

/// Value of `PEERS` (array; index 0 is never used). The entry whose index is `Config::own_peer` is this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerValue {
    /// Tunnel address of the node; 0 = the entry is free.
    pub address: u32,
    /// MAC of the next hop towards it, all zero while unknown (the program then asks the kernel's FIB).
    pub mac: [u8; 6],
    /// [`PEER_SILENT`] and the like.
    pub flags: u16,
    /// Interface index of the uplink towards it; 0 while unknown.
    pub ifindex: u32,
}
map_type!(PeerValue, 16);

/// As a gateway the peer has not answered the last probes: new flows take another.
pub const PEER_SILENT: u16 = 2;
/// It has not answered for so long that its flows are given up.
pub const PEER_LOST: u16 = 4;

/// Value of `HOMES` (array; index: `AddressValue::index << 4 | hash & 15`): the peer at which all fragments of a
/// datagram meet. Every node derives the same list from the same `EgressAddress`. 0 = nobody.
pub type FragmentHome = u32;

/// Value of `HOLDINGS` (hash; key: egress address as `u32`): the slices from which this node may open new flows.
/// A draining slice keeps its slot but loses its bit here, so that draining is one store.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldingValue {
    /// Bit `s & 63` of word `s >> 6` is set when slice `s` may be used for new flows.
    pub allowed: [u64; 4],
    /// Epoch of the `EgressAddress` this was made from.
    pub epoch: u64,
    /// Seconds after the renewal of the node's Lease (see [`LeaseValue`](crate::LeaseValue)) from which on no flow is opened
    /// from the address.
    pub soft: u32,
    /// Seconds after it from which on nothing leaves from the address; 0 = neither deadline is there.
    pub hard: u32,
}
map_type!(HoldingValue, 48);

/// Value of `BINDS` (hash; key: egress address as `u32`): slices of this node's whose ports are given to sockets, by the kernel's table of
/// sockets instead of a bitmap. None of them is in [`HoldingValue::allowed`]. Bits as there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BindValue {
    /// Slices from which sockets may be given a port.
    pub open: [u64; 4],
    /// Those, and the ones in which sockets may still be.
    pub kept: [u64; 4],
}
map_type!(BindValue, 64);
