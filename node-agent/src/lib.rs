//! The agent of one node: it watches the node's pods and the objects of Aegis, computes what the data plane should
//! hold, compares that with what it does hold, and writes the difference.
//!
//! | to change | look in |
//! |---|---|
//! | what is watched | [`watch`], [`objects`] |
//! | which pod an address belongs to | [`identity`], [`cni`], [`nri`] |
//! | what is behind Services | [`services`] |
//! | which control group a pod's sockets are in | [`groups`] |
//! | what the data plane should hold | [`desired`] (rules of policy: `aegis_core::policy`) |
//! | in which order it is written | [`ops`] |
//! | devices, next hops, nftables, conntrack | [`network`], [`uplink`], [`neighbour`], [`nft`], [`rule`], [`conntrack`], [`refused`] |
//! | which addresses host names have | [`names`] (rules: `aegis_core::policy::names`) |
//! | whether gateways answer | [`probe`] |
//! | fragments that come before the first of their datagram | [`fragments`] |
//! | what the agent itself sends through the tunnel | [`geneve`] |
//! | what the network is told | [`announce`] |
//! | for how long a node that is cut off may send | [`lease`] |
//! | when an agent that is told to end does so | [`leave`] |
//! | how maps are read and written | [`apply`], [`kernel`], [`ebpf`] (programs: `node-agent/ebpf`) |
//! | how programs are attached, and outlive the agent | [`attach`], [`links`] |
//! | how the flow tables are read and written | [`flows`] |
//! | what the command line is told of live flows | [`live`] |
//! | how flows outlive a change of the maps' layout | [`carry`] |
//! | sockets that have an egress address themselves | [`uses`], [`sockets`], [`local`] |
//! | how flows end, how ports are counted | [`sweep`], [`demand`] |
//! | what is reported | [`status`], [`metrics`], [`server`] |
//! | how reports of use get to the collector | [`usage`] (rules: `aegis_delivery`) |
//! | when all of this happens | [`controller`] |

pub mod announce;
pub mod apply;
pub mod args;
pub mod attach;
pub mod carry;
pub mod cni;
pub mod conntrack;
pub mod controller;
pub mod countries;
pub mod demand;
pub mod desired;
pub mod ebpf;
pub mod ethtool;
pub mod fast;
pub mod flows;
pub mod fragments;
pub mod geneve;
pub mod groups;
pub mod identity;
pub mod kernel;
pub mod lease;
pub mod leave;
pub mod limited;
pub mod links;
pub mod live;
pub mod load;
pub mod local;
pub mod meter;
pub mod metrics;
pub mod names;
pub mod neighbour;
pub mod network;
pub mod nft;
pub mod nri;
pub mod objects;
pub mod observed;
pub mod ops;
pub mod probe;
pub mod raw;
pub mod refused;
pub mod rule;
pub mod server;
pub mod singles;
pub mod snapshot;
pub mod sockets;
pub mod status;
pub mod suffix;
pub mod sweep;
pub mod tally;
pub mod tcx;
pub mod test_run;
pub mod uplink;
pub mod usage;
pub mod uses;
pub mod watch;
