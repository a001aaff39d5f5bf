//! The nftables table `ip6 aegis`: as for IPv4, and what lets no packet in that nobody asked for.
//!
//! The program at the uplink's tcx ingress gives what was translated back the mark. conntrack knows whether somebody asked for
//! it: if not, it goes no further. The mark goes too, since from there on it would say that a flow leaves.

use super::{
    QUERIES, Queries, Ruleset, Table, arrival, arrived, decide, first, from_pods, is_set, output, outside,
    unmarked,
};
use ipnet::Ipv6Net;
use std::collections::{BTreeMap, BTreeSet};

/// What the table is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules6 {
    /// Mark bit.
    pub mark: u32,
    /// Ranges of this node's pods.
    pub pods: Vec<Ipv6Net>,
    /// Devices with `pod_ingress`: index and name.
    pub pod_devices: BTreeMap<u32, String>,
    /// Devices with the uplink programs: index and name.
    pub uplinks: BTreeMap<u32, String>,
    /// Unknown sources are held.
    pub hold: bool,
    /// Ranges inside the cluster.
    pub internal: Vec<Ipv6Net>,
    /// Pods known to be uncovered, while programs cannot be attached.
    pub uncovered: Vec<Ipv6Net>,
    /// DNS queries that the agent answers.
    pub queries: Queries,
}

/// What the table counts, by reason: packets that it drops.
pub const DROPS6: [&str; 4] = ["no_program_out", "no_program_in", "unasked", "undirected_query"];

const SETS: [(&str, &str); 4] = [
    ("pod_devices", "type iface_index"),
    ("held", "type ipv6_addr; flags interval"),
    ("internal", "type ipv6_addr; flags interval"),
    ("uncovered", "type ipv6_addr; flags interval"),
];

const CHAINS: [(&str, &str); 12] = [
    ("decide", ""),
    ("first", ""),
    ("unmarked", ""),
    ("outside", ""),
    ("arrived", ""),
    ("asked", ""),
    ("undirected", ""),
    ("queries", QUERIES),
    // conntrack has looked at the packet by then (priority -200), and no destination is translated yet.
    ("arrival", "type filter hook prerouting priority mangle; policy accept;"),
    ("forward", "type filter hook forward priority mangle; policy accept;"),
    ("output", "type filter hook output priority mangle; policy accept;"),
    ("postrouting", "type nat hook postrouting priority srcnat - 10; policy accept;"),
];

impl Ruleset for Rules6 {
    fn uplinks(&self) -> &BTreeMap<u32, String> {
        &self.uplinks
    }

    fn pod_devices(&self) -> &BTreeMap<u32, String> {
        &self.pod_devices
    }

    fn table(&self) -> Table {
        table(self)
    }
}

fn table(rules: &Rules6) -> Table {
    let ranges = |ranges: &[Ipv6Net]| -> BTreeSet<String> {
        Ipv6Net::aggregate(&ranges.to_vec()).iter().map(ToString::to_string).collect()
    };
    Table {
        family: "ip6",
        drops: &DROPS6,
        forms: &SETS,
        hooks: &CHAINS,
        sets: vec![
            rules.pod_devices.keys().map(u32::to_string).collect(),
            if rules.hold { ranges(&rules.pods) } else { BTreeSet::new() },
            ranges(&rules.internal),
            ranges(&rules.uncovered),
        ],
        chains: chains(rules, &ranges(&rules.pods)),
    }
}

/// Rules of [`CHAINS`]. What every covered packet must match stands in them, not in sets, as for IPv4.
fn chains(rules: &Rules6, pods: &BTreeSet<String>) -> Vec<Vec<String>> {
    let mark = rules.mark;
    let is_set = is_set(mark);
    let [no_program_out, no_program_in, unasked, undirected] =
        DROPS6.map(|name| format!("counter name {name} drop"));
    let programmed = rules.uplinks.keys().chain(rules.pod_devices.keys());
    let postrouting = pods
        .iter()
        .map(|range| format!("meta mark {is_set} ip6 saddr {range} snat ip6 prefix to {range}"))
        .collect();
    let [queries, asked, undirected] = rules.queries.chains("ip6", pods, &undirected);
    let forwarded = rules.queries.forwarded("ip6");
    let output = output(mark, "ip6 daddr", "meta l4proto icmpv6", pods);
    vec![
        decide(mark),
        first(mark),
        unmarked("ip6", &no_program_in),
        outside(programmed, no_program_out),
        arrived(mark, [format!("ct state new,invalid {unasked}")]),
        asked,
        undirected,
        queries,
        rules.queries.untracked("ip6").into_iter().chain(arrival(&rules.uplinks)).collect(),
        forwarded.into_iter().chain(from_pods("ip6", pods, &rules.uplinks)).collect(),
        output,
        postrouting,
    ]
}
