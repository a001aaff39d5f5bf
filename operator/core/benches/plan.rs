//! What a turn of the operator's pure rules costs, by size of the cluster: `make bench`, or
//! `cargo bench -p aegis-core --bench plan`.
//!
//! Each allocation has one address, of which the nodes of one of 40 groups hold a slice each. Prints a table in Markdown.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, missing_docs)] // A measurement fails as a whole.

use aegis_core::audit::audit;
use aegis_core::diff::{Change, diff};
use aegis_core::model::*;
use aegis_core::plan::plan;
use aegis_core::slice::SliceSet;
use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Runs of each measurement; the fastest counts, which is what the work takes when nothing else runs.
const RUNS: usize = 5;

fn name(index: usize) -> AllocationName {
    AllocationName { account: "shop".into(), name: format!("allocation-{index:04}") }
}

fn node(index: usize) -> Node {
    let [_, _, high, low] = u32::try_from(index).unwrap().to_be_bytes();
    Node {
        name: format!("node-{index:04}"),
        labels: (0..12)
            .map(|it| (format!("example.com/label-{it}"), format!("value-{it}")))
            .chain(group(index))
            .collect(),
        addresses: vec![Ipv4Addr::new(172, 16, high, low).into()],
        pod_ranges: vec![ipnet::IpNet::new(Ipv4Addr::new(10, high, low, 0).into(), 24).unwrap()],
        ready: true,
        ..Node::default()
    }
}

/// Nodes are in so many groups, and each allocation is for one of them.
fn group(index: usize) -> BTreeMap<String, String> {
    [("example.com/group".to_owned(), format!("{}", index % 40))].into()
}

fn allocation(index: usize) -> Allocation {
    Allocation {
        name: name(index),
        created: 1,
        prefixes: vec!["leased".into()],
        request: AddressRequest::Count(1),
        ipv6: 0,
        sites: [("group".to_owned(), Site { selector: group(index), weight: 100 })].into(),
        slices: SliceSet::range(4, 255),
        per_node_min: 1,
        per_node_max: 252,
        fence: None,
        listed: BTreeSet::new(),
        deleting: false,
    }
}

/// A cluster before its first plan: nodes in 40 groups, each allocation for one of them.
fn cluster(nodes: usize, addresses: usize) -> Inputs {
    Inputs {
        prefixes: vec![Prefix {
            name: "leased".into(),
            created: 1,
            cidr: "203.0.0.0/20".parse().unwrap(),
            reserved: vec![],
            account: "shop".into(),
            delegations: vec![],
            deleting: false,
        }],
        allocations: (0..addresses).map(allocation).collect(),
        nodes: (0..nodes).map(node).collect(),
        now: 1_000_000,
        ..Inputs::default()
    }
}

fn fastest<T>(mut work: impl FnMut() -> T) -> Duration {
    let once = |work: &mut dyn FnMut() -> T| {
        let started = Instant::now();
        black_box(work());
        started.elapsed()
    };
    (0..RUNS).map(|_| once(&mut work)).min().unwrap()
}

fn changed(inputs: &Inputs) -> usize {
    diff(&inputs.addresses, &plan(inputs)).len()
}

/// One row for a size.
struct Row {
    nodes: usize,
    addresses: usize,
    full: Duration,
    steady: Duration,
    demand: Duration,
    gone: Duration,
    audit: Duration,
    diff: Duration,
}

fn measure(nodes: usize, addresses: usize) -> Row {
    let mut inputs = cluster(nodes, addresses);
    let full = fastest(|| plan(&inputs));
    let first = plan(&inputs);
    audit(&inputs, &first).expect("the plan breaks an invariant");
    assert_eq!(diff(&inputs.addresses, &first).len(), addresses, "not every address was planned");
    // Of what agents report then nothing is left that planning could learn from.
    inputs.addresses.clone_from(&first.addresses);

    let steady = fastest(|| plan(&inputs));
    assert_eq!(changed(&inputs), 0, "a steady cluster changes");
    let same = plan(&inputs);
    let audited = fastest(|| audit(&inputs, &same));
    let compared = fastest(|| diff(&inputs.addresses, &same));

    inputs.nodes[0].demand.insert(name(0), 20);
    let demand = fastest(|| plan(&inputs));
    assert!(
        matches!(diff(&inputs.addresses, &plan(&inputs)).as_slice(), [Change::Replace(_)]),
        "one demand does not change one address"
    );
    inputs.nodes[0].demand.clear();

    inputs.nodes.remove(0);
    let gone = fastest(|| plan(&inputs));
    assert!(changed(&inputs) > 0, "slices of a node that is gone do not rest");
    Row { nodes, addresses, full, steady, demand, gone, audit: audited, diff: compared }
}

fn main() {
    // `cargo test --benches` runs it without `--bench`: then a small one shows that it works.
    let sizes: &[(usize, usize)] = match std::env::args().any(|it| it == "--bench") {
        true => &[(500, 100), (500, 1_000), (5_000, 100), (5_000, 1_000)],
        false => &[(80, 40)],
    };
    println!(
        "| nodes | addresses | first plan | nothing new | one demand | one node gone | audit | diff |\n|--:|--:|--:|--:|--:|--:|--:|--:|"
    );
    for (nodes, addresses) in sizes {
        let row = measure(*nodes, *addresses);
        let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        println!(
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            row.nodes,
            row.addresses,
            ms(row.full),
            ms(row.steady),
            ms(row.demand),
            ms(row.gone),
            ms(row.audit),
            ms(row.diff)
        );
    }
}
