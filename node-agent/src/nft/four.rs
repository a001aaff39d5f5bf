//! The nftables table `ip aegis`: what it is made from, and its rules.

use super::{
    QUERIES, Queries, Table, arrival, arrived, decide, first, from_pods, is_set, judged, output, outside,
    unmarked,
};
use ipnet::Ipv4Net;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// What the table is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Mark bit.
    pub mark: u32,
    /// Ranges of this node's pods.
    pub pods: Vec<Ipv4Net>,
    /// Devices with `pod_ingress`: index and name.
    pub pod_devices: BTreeMap<u32, String>,
    /// Devices with the uplink programs: index and name.
    pub uplinks: BTreeMap<u32, String>,
    /// Unknown sources are held.
    pub hold: bool,
    /// Ranges inside the cluster.
    pub internal: Vec<Ipv4Net>,
    /// Pods known to be uncovered, which are not held although their device has no program. Only needed while
    /// programs cannot be attached.
    pub uncovered: Vec<Ipv4Net>,
    /// Packets of the node's own sockets are looked at by the programs already.
    pub hosts: bool,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// Addresses at which tunnels may end.
    pub nodes: BTreeSet<Ipv4Addr>,
    /// DNS queries that the agent answers.
    pub queries: Queries,
}

/// What the table counts, by reason: packets that it drops.
pub const DROPS: [&str; 5] = ["no_program_out", "no_program_in", "tunnel", "invalid", "undirected_query"];

/// Named sets of the table: name and type.
const SETS: [(&str, &str); 4] = [
    ("pod_devices", "type iface_index"),
    ("held", "type ipv4_addr; flags interval"),
    ("internal", "type ipv4_addr; flags interval"),
    ("uncovered", "type ipv4_addr; flags interval"),
];

/// Chains of the table: name and hook.
const CHAINS: [(&str, &str); 15] = [
    ("decide", ""),
    ("first", ""),
    ("unmarked", ""),
    ("outside", ""),
    ("nodes", ""),
    ("tunnel", ""),
    ("arrived", ""),
    ("asked", ""),
    ("undirected", ""),
    ("queries", QUERIES),
    // conntrack has looked at the packet by then (priority -200), and no destination is translated yet. Not later: the node
    // itself may have something to say about a packet before it forwards it.
    ("arrival", "type filter hook prerouting priority mangle; policy accept;"),
    ("forward", "type filter hook forward priority mangle; policy accept;"),
    ("output", "type filter hook output priority mangle; policy accept;"),
    // Where IPVS has translated a destination, there was no forward hook.
    ("forwarded", "type filter hook postrouting priority srcnat - 20; policy accept;"),
    ("postrouting", "type nat hook postrouting priority srcnat - 10; policy accept;"),
];

/// The table that these rules ask for.
pub(super) fn table(rules: &Rules) -> Table {
    let ranges = |ranges: &[Ipv4Net]| -> BTreeSet<String> {
        Ipv4Net::aggregate(&ranges.to_vec()).iter().map(ToString::to_string).collect()
    };
    let held = if rules.hold { ranges(&rules.pods) } else { BTreeSet::new() };
    Table {
        family: "ip",
        drops: &DROPS,
        forms: &SETS,
        hooks: &CHAINS,
        sets: vec![
            rules.pod_devices.keys().map(u32::to_string).collect(),
            held,
            ranges(&rules.internal),
            ranges(&rules.uncovered),
        ],
        chains: chains(rules, &ranges(&rules.pods)).into(),
    }
}

/// Rules of [`CHAINS`].
///
/// What every covered packet must match stands in the rules themselves, not in sets: while a transaction is being
/// committed, a look-up in a set may find nothing for some microseconds, and a connection whose first packet missed the
/// identity translation in that time has the CNI's for good.
fn chains(rules: &Rules, pods: &BTreeSet<String>) -> [Vec<String>; CHAINS.len()] {
    let mark = rules.mark;
    let is_set = is_set(mark);
    let [no_program_out, no_program_in, tunnelled, invalid, undirected] =
        DROPS.map(|name| format!("counter name {name} drop"));
    let programmed = rules.uplinks.keys().chain(rules.pod_devices.keys());
    let nodes = rules.nodes.iter().map(|node| format!("ip daddr {node} {tunnelled}")).collect();
    // What comes in by an uplink may be for a node behind this one, unless it was translated here.
    let tunnel = ["ct status & dnat == dnat goto nodes".to_owned()]
        .into_iter()
        .chain(rules.uplinks.keys().map(|index| format!("iif {index} return")))
        .chain(["goto nodes".to_owned()])
        .collect();
    let to_tunnel = format!("udp dport {}", rules.tunnel_port);
    let arrived = arrived(
        mark,
        [
            format!("ct state invalid {invalid}"),
            format!("ct state new ct mark set ct mark | {:#x}", mark | judged(mark)),
        ],
    );
    let [queries, asked, undirected] = rules.queries.chains("ip", pods, &undirected);
    let forward = [format!("{to_tunnel} jump tunnel")]
        .into_iter()
        .chain(rules.queries.forwarded("ip"))
        .chain(from_pods("ip", pods, &rules.uplinks))
        .collect();
    let forwarded = pods.iter().map(|range| format!("{to_tunnel} ip saddr {range} goto nodes")).collect();
    let postrouting = pods
        .iter()
        .map(|range| format!("meta mark {is_set} ip saddr {range} snat ip prefix to {range}"))
        .collect();
    let mut output = output(mark, "ip daddr", "ip protocol icmp", pods);
    if rules.hosts {
        // An application may have set it.
        output.insert(0, format!("meta mark set meta mark & {:#x}", !mark));
        output.extend(own(mark));
    }
    [
        decide(mark),
        first(mark),
        unmarked("ip", &no_program_in),
        outside(programmed, no_program_out),
        nodes,
        tunnel,
        arrived,
        asked,
        undirected,
        queries,
        rules.queries.untracked("ip").into_iter().chain(arrival(&rules.uplinks)).collect(),
        forward,
        output,
        forwarded,
        postrouting,
    ]
}

/// Rules by which the uplink is told which packets of the node's own open no flow: the marked ones. Without the table none is marked,
/// so that what is covered leaves right or not at all.
fn own(mark: u32) -> [String; 4] {
    let judged = judged(mark);
    let set = format!("meta mark set meta mark | {mark:#x}");
    [
        // Errors go by what they are about: see `output`.
        "ct state related return".to_owned(),
        format!("ct direction reply {set} return"),
        format!("ct status & confirmed == 0 ct mark set ct mark | {judged:#x} return"),
        format!("ct mark & {judged:#x} == 0 {set}"),
    ]
}
