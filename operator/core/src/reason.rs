//! Reasons of conditions, equal to those of the resource types (`aegis_crds::reason`). They are stable: people's
//! alerts and scripts match on them.

/// Accepted.
pub const ACCEPTED: &str = "Accepted";
/// A prefix overlaps an older one.
pub const OVERLAP: &str = "OverlapsPrefix";
/// An object that is referred to does not exist.
pub const NOT_FOUND: &str = "NotFound";
/// The prefix belongs to another account, and is not delegated to this one.
pub const NOT_PERMITTED: &str = "NotPermitted";
/// Every account has addresses by right.
pub const DELEGATED: &str = "Delegated";
/// An account has addresses of a prefix that is not, or not to this number, delegated to it any more.
pub const DELEGATION_WITHDRAWN: &str = "DelegationWithdrawn";
/// The account has as many addresses of the prefix as are delegated to it.
pub const DELEGATION_LIMIT: &str = "DelegationLimit";
/// A value is wrong in a way that only the whole could tell.
pub const INVALID: &str = "Invalid";
/// All that was asked for is set aside.
pub const ALLOCATED: &str = "Allocated";
/// The prefixes have fewer free addresses than asked for.
pub const NO_FREE_ADDRESS: &str = "NoFreeAddress";
/// No slice is free, and no node holds one.
pub const NO_FREE_SLICE: &str = "NoFreeSlice";
/// Nodes get slices only while they hold their Lease, and none does.
pub const NO_LEASE: &str = "NoLease";
/// The cluster has as many addresses, or allocations with addresses, as a node has room for.
pub const LIMIT: &str = "LimitReached";
/// Nodes send from an address though no object, or only an older one, says so: nobody gets it.
pub const WITHHELD: &str = "Withheld";
/// A prefix contains addresses of the cluster's own pods.
pub const OVERLAPS_PODS: &str = "OverlapsPods";
/// A prefix contains addresses of Services.
pub const OVERLAPS_SERVICES: &str = "OverlapsServices";
/// No node matches the sites.
pub const NO_NODE: &str = "NoNode";
/// Being deleted; waiting for live flows to end.
pub const DRAINING: &str = "Draining";
