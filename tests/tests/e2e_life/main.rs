//! Change and failure, end to end: what happens to traffic while objects change and while parts of the cluster fail.
//!
//! Every test has an address of its own, and does not wait at its end until that is given back. What must not happen is
//! always looked for on the wire, between the nodes and the router, with connections going on meanwhile.

mod account;
mod agents;
mod api_outage;
mod autoscaler;
mod changes;
mod criteria;
mod delegated;
mod deletion;
mod explained;
mod fast_path;
mod fence;
mod first_packet;
mod gateways;
mod gone_agents;
mod growth;
mod hosts;
mod inside;
mod ipv6;
mod l2;
mod latency;
mod leaving;
mod lost_nodes;
mod names;
mod pod_start;
mod policies;
mod programs;
mod restart;
mod single;
mod sites;
mod unusable;
mod upgrade;
mod usage;
mod withdrawal;
