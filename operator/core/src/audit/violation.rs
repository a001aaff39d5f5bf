//! What can be wrong with a plan.

use crate::egress::Egress;
use crate::model::AllocationName;
use thiserror::Error;

/// An invariant that a plan breaks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Violation {
    /// The same address twice, or not in ascending order.
    #[error("{address}: planned twice, or not in ascending order")]
    AddressOrder {
        /// The address.
        address: Egress,
    },
    /// An address that exists is given to another allocation or prefix.
    #[error("{address}: changes its allocation or prefix while it exists")]
    AddressMoved {
        /// The address.
        address: Egress,
    },
    /// A new address that must not be taken.
    #[error("{address}: must not be allocated: {why}")]
    AddressTaken {
        /// The address.
        address: Egress,
        /// Which rule stands against it.
        why: &'static str,
    },
    /// An address goes while slices of it are held, drain or rest.
    #[error("{address}: removed while a slice of it is held, drains or rests")]
    AddressInUse {
        /// The address.
        address: Egress,
    },
    /// An address goes although its allocation wants it.
    #[error("{address}: removed although its allocation wants it")]
    AddressWanted {
        /// The address.
        address: Egress,
    },
    /// A holding that ends before it begins, or reaches below slice 4.
    #[error("{address}: {first}..={last} are no usable slices")]
    NotSlices {
        /// The address.
        address: Egress,
        /// First slice.
        first: u8,
        /// Last slice.
        last: u8,
    },
    /// A slice is in two holdings.
    #[error("{address} slice {slice}: has two owners")]
    TwoOwners {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
    },
    /// The fence is another one than the allocation's, or bears another epoch than that at which it was set.
    #[error("{address}: the fence is not the allocation's, or not as of its epoch")]
    Fence {
        /// The address.
        address: Egress,
    },
    /// Holdings are not in ascending order.
    #[error("{address} slice {slice}: holdings are not sorted")]
    NotSorted {
        /// The address.
        address: Egress,
        /// First slice of the holding that comes too late.
        slice: u8,
    },
    /// Neighbouring holdings differ in nothing.
    #[error("{address} slice {slice}: not merged with the holding before it")]
    NotMerged {
        /// The address.
        address: Egress,
        /// First slice of the second holding.
        slice: u8,
    },
    /// More holdings than one object may have.
    #[error("{address}: {count} holdings, at most 252 are possible")]
    TooManyHoldings {
        /// The address.
        address: Egress,
        /// How many.
        count: usize,
    },
    /// The epoch of the address goes back, or stays although holdings change.
    #[error("{address}: epoch {after} after {before}, with {}", if *.changed { "changes" } else { "no change" })]
    AddressEpoch {
        /// The address.
        address: Egress,
        /// Epoch that it has.
        before: i64,
        /// Epoch that it would get.
        after: i64,
        /// Whether the holdings change.
        changed: bool,
    },
    /// A slice that changes does not get the new epoch, or one that does not change gets another.
    #[error("{address} slice {slice}: epoch {epoch}, expected {expected}")]
    SliceEpoch {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
        /// Epoch that it would get.
        epoch: i64,
        /// Epoch that is right.
        expected: i64,
    },
    /// A slice goes from one node to another without having rested.
    #[error("{address} slice {slice}: goes from node {from:?} to node {to:?} without a quarantine")]
    Moved {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
        /// Node that has it.
        from: String,
        /// Node that would get it.
        to: String,
    },
    /// A free slice begins to drain or to rest.
    #[error("{address} slice {slice}: drains or rests though nobody held it")]
    FromNowhere {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
    },
    /// A node that takes part would lose a slice that it wants, though there is enough for all; or it does not report.
    #[error("{address} slice {slice}: taken from node {node:?} without a reason")]
    NoReason {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
        /// The node.
        node: String,
    },
    /// A node would have less than `perNode.min` though the site's quota has room for what its nodes hold of it.
    #[error("{address} slice {slice}: taken from node {node:?}, which would have less than the minimum")]
    Minimum {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
        /// The node.
        node: String,
    },
    /// A slice is taken from a node that wants it, while another node of the site keeps more.
    #[error("{address} slice {slice}: taken from node {node:?}, while node {other:?} keeps more")]
    Unfair {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
        /// The node.
        node: String,
        /// Who keeps more.
        other: String,
    },
    /// A slice leaves a node that exists and has not reported it drained.
    #[error("{address} slice {slice}: leaves node {node:?}, which may still send from it")]
    NotDrained {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
        /// The node.
        node: String,
    },
    /// A quarantine is skipped, too short, shortened, or ended early.
    #[error("{address} slice {slice}: does not rest for the full quarantine")]
    Quarantine {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
    },
    /// A slice is given to a node that must not have it.
    #[error("{address} slice {slice}: given to node {node:?}: {why}")]
    Granted {
        /// The address.
        address: Egress,
        /// The slice.
        slice: u8,
        /// The node.
        node: String,
        /// What stands against it.
        why: Unfit,
    },
    /// The owner of an allocation is told nothing.
    #[error("{}/{}: nothing is told of it", .allocation.account, .allocation.name)]
    Untold {
        /// The allocation.
        allocation: AllocationName,
    },
    /// An address that must stay as it is changes, or is made.
    #[error("{address}: changes, though it is withheld")]
    Withheld {
        /// The address.
        address: Egress,
    },
    /// More addresses than nodes have room for, and more than there were.
    #[error("{count} addresses, more than nodes have room for")]
    TooManyAddresses {
        /// How many.
        count: usize,
    },
    /// The prefix is told another number of addresses in use than there are.
    #[error("prefix {prefix:?}: `used` is wrong")]
    PrefixUse {
        /// The prefix.
        prefix: String,
    },
    /// The next planning is not at the end of the first quarantine.
    #[error("the next planning is not at the end of the first quarantine")]
    Wake,
}

/// Why a node must not be given a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Unfit {
    /// The allocation is gone, is being deleted or has too many addresses.
    #[error("its allocation does not serve from this address")]
    Address,
    /// The allocation does not use the slice.
    #[error("the slice is outside the allocation's ports")]
    Slice,
    /// The node does not exist.
    #[error("the node does not exist")]
    NoNode,
    /// The node matches no site.
    #[error("the node is in none of the allocation's sites")]
    Sites,
    /// The node is not ready.
    #[error("the node is not ready")]
    NotReady,
    /// The address has a fence, and the node does not hold its Lease.
    #[error("the node does not hold its Lease")]
    NoLease,
    /// The nodes of its site would hold more than the site's share, what drains included.
    #[error("its site would have more than its share")]
    Quota,
    /// The node would hold more than `perNode.max`.
    #[error("the node would hold more than the maximum")]
    Maximum,
}
