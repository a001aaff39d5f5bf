//! Conditions and their words. They follow the Gateway API's habit: `observedGeneration`, stable reasons, and a
//! message that tells the reader what to do.

pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// Condition types.
pub mod type_ {
    /// The object is valid and every object it names exists.
    pub const ACCEPTED: &str = "Accepted";
    /// Egress addresses and slices have been set aside.
    pub const ALLOCATED: &str = "Allocated";
    /// The nodes enforce what the object says; the message has "n of m nodes".
    pub const PROGRAMMED: &str = "Programmed";
    /// A policy can decide about something.
    pub const EFFECTIVE: &str = "Effective";
    /// There is a database of countries for the policies that name some.
    pub const COUNTRIES_KNOWN: &str = "CountriesKnown";
    /// Nodes find addresses of the host names.
    pub const RESOLVED: &str = "Resolved";
    /// Some origin uses more of the ports than planned.
    pub const CAPACITY_LOW: &str = "CapacityLow";
    /// A node agent is ready to forward.
    pub const READY: &str = "Ready";
    /// A node renews its Lease, so that it may send from addresses with a fence.
    pub const LEASE_HELD: &str = "LeaseHeld";
    /// Packets of established flows pass by the node's host stack.
    pub const FAST_PATH: &str = "FastPath";
    /// Containers of a node's pods start once the data plane knows the pod.
    pub const PODS_WAIT: &str = "PodsWait";
    /// A node has room for all that is asked of it; of an allocation, no limit refuses flows.
    pub const WITHIN_LIMITS: &str = "WithinLimits";
    /// No account has addresses of a prefix without a right to so many; of an allocation, its account.
    pub const DELEGATED: &str = "Delegated";
    /// The network has been told of the addresses that a node takes packets for; the message has "n of m addresses".
    pub const ANNOUNCED: &str = "Announced";
    /// An alert is raised for something.
    pub const FIRING: &str = "Firing";
}

/// Condition reasons.
pub mod reason {
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
    /// The API server refuses to store an address.
    pub const NOT_WRITTEN: &str = "NotWritten";
    /// The allocation that a binding names has nothing to leave from.
    pub const UNAVAILABLE: &str = "Unavailable";
    /// No policy before this one decides about everything that it matches.
    pub const EFFECTIVE: &str = "Effective";
    /// The policy only counts what it would decide about.
    pub const OBSERVING: &str = "Observing";
    /// A database of countries is in use.
    pub const DATABASE_READ: &str = "DatabaseRead";
    /// Policies name countries, and no database of them is given.
    pub const NO_DATABASE: &str = "NoDatabase";
    /// The database of countries cannot be read; one that was read before stays in use.
    pub const DATABASE_UNREADABLE: &str = "DatabaseUnreadable";
    /// A policy before this one decides about everything that it matches.
    pub const SHADOWED: &str = "Shadowed";
    /// Nothing in the cluster is what the policy asks for.
    pub const MATCHES_NOTHING: &str = "MatchesNothing";
    /// Nodes find addresses of every host name that they look up.
    pub const RESOLVED: &str = "Resolved";
    /// A host name has no address.
    pub const HOST_NOT_FOUND: &str = "HostNotFound";
    /// No resolver tells addresses of a host name.
    pub const RESOLVER_FAILED: &str = "ResolverFailed";
    /// No node matches the sites.
    pub const NO_NODE: &str = "NoNode";
    /// All nodes concerned have it.
    pub const PROGRAMMED: &str = "Programmed";
    /// Some nodes do not have it yet.
    pub const PENDING: &str = "Pending";
    /// Switched off by `spec.enabled: false`.
    pub const DISABLED: &str = "Disabled";
    /// Being deleted; waiting for live flows to end.
    pub const DRAINING: &str = "Draining";
    /// Ports in use are below the planned share.
    pub const CAPACITY_SUFFICIENT: &str = "Sufficient";
    /// Ports in use are above the planned share.
    pub const ABOVE_TARGET: &str = "AboveTarget";
    /// New flows are being refused, since no port is free.
    pub const EXHAUSTED: &str = "Exhausted";
    /// No limit refuses flows.
    pub const NOTHING_REFUSED: &str = "NothingRefused";
    /// A pod has as many flows as it may.
    pub const POD_FLOWS: &str = "PodFlows";
    /// A pod begins flows faster than it may.
    pub const POD_NEW_FLOWS: &str = "PodNewFlows";
    /// The account has as many flows on a node as it may.
    pub const ACCOUNT_FLOWS: &str = "AccountFlows";
    /// The account begins flows on a node faster than it may.
    pub const ACCOUNT_NEW_FLOWS: &str = "AccountNewFlows";
    /// An alert is raised for something.
    pub const RAISED: &str = "Raised";
    /// An alert is raised for nothing.
    pub const QUIET: &str = "Quiet";
}
