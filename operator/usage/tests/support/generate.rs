//! Reports and questions at random, of few names, so that they meet.

use super::T0;
use aegis_usage::{
    Aggregation, Dimension, FUTURE, Figure, Filter, Level, Measure, Order, OriginFilter, Owned, Query,
    Receipt, Scope,
};
use aegis_usage_report::{Figures, Key, Protocol, Report, Row, VERSION, Volume};
use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// Length of the time in which reports are.
const SPAN: i64 = 2 * 3_600;

/// Words whose order differs between languages and bytes.
const NAMES: [&str; 4] = ["shop", "Shop", "bank-1", "bank_2"];
const NODES: [&str; 3] = ["node-a", "node-B", "node_c"];
const ADDRESSES: [&str; 4] = ["192.0.2.1", "192.0.2.9", "2001:db8:1::", "203.0.113.5"];
const ORIGINS: [&str; 4] = ["198.51.100.1:443", "198.51.100.1:53", "198.51.100.200:443", "[2001:db8::7]:443"];
const REASONS: [&str; 2] = ["no_port", "pod_flows"];

/// A run of the collector.
#[derive(Clone, Debug)]
pub struct Run {
    /// Reports, each once.
    pub reports: Vec<Report>,
    /// Which of them come, in which order; each at least once. After a batch, minutes and hours are made up to some moment.
    pub batches: Vec<(Vec<usize>, i64)>,
    /// What is asked at the end.
    pub questions: Vec<Question>,
}

#[derive(Clone, Debug)]
pub struct Question {
    pub scope: Scope,
    pub query: Query,
}

/// When reports come: after all of those whose clock is right.
pub const NOW: i64 = T0 + SPAN + 600;

/// The end of all that happens in a run: every slot has settled.
pub const END: i64 = T0 + SPAN + 2 * 3_600;

pub fn run() -> impl Strategy<Value = Run> {
    let reports = prop::collection::vec(report(), 1..40).prop_map(distinct);
    let reports = reports.prop_flat_map(|reports| {
        let all: Vec<usize> = (0..reports.len()).collect();
        let again = prop::collection::vec(0..reports.len(), 0..20);
        let order = again.prop_flat_map(move |again| {
            let mut all = all.clone();
            all.extend(again);
            Just(all).prop_shuffle()
        });
        let cuts = prop::collection::vec((1usize..12, 0..END - T0), 1..8);
        (Just(reports), order, cuts)
    });
    (reports, prop::collection::vec(question(), 1..8)).prop_map(|((reports, order, cuts), questions)| {
        let mut rest = order.as_slice();
        let mut batches = Vec::new();
        for (length, until) in cuts {
            let (batch, after) = rest.split_at(length.min(rest.len()));
            batches.push((batch.to_vec(), T0 + until));
            rest = after;
        }
        batches.push((rest.to_vec(), END));
        Run { reports, batches, questions }
    })
}

/// The same number of the same boot is the same report: the first one counts.
fn distinct(reports: Vec<Report>) -> Vec<Report> {
    let mut seen = BTreeSet::new();
    reports.into_iter().filter(|it| seen.insert((it.node.clone(), it.boot.clone(), it.sequence))).collect()
}

fn report() -> impl Strategy<Value = Report> {
    // Not only every 10 seconds: clocks jump, agents start anew, so that two reports meet in a slot.
    // The last are of a clock that is ahead.
    let times = prop_oneof![
        4 => (0..SPAN / 10).prop_map(|it| it * 10),
        4 => 0..SPAN,
        4 => 0..90i64,
        1 => SPAN + 1_000..SPAN + 90_000,
    ];
    let rows = prop::collection::vec((key(), figures()), 0..5);
    let parts = (
        select(&NODES[..]),
        select(&["b1", "b2"][..]),
        0u64..400,
        times,
        prop_oneof![8 => 1i64..25, 1 => 25i64..500],
        rows,
    );
    parts.prop_map(|(node, boot, sequence, at, length, rows)| {
        let rows = rows.into_iter().map(|(key, figures)| Row { key, figures }).collect();
        let from = T0 + at;
        Report {
            version: VERSION,
            node: node.into(),
            boot: boot.into(),
            sequence,
            from,
            to: from + length,
            rows,
        }
    })
}

fn key() -> impl Strategy<Value = Key> {
    let address = prop::option::weighted(0.9, select(&ADDRESSES[..]));
    let origin = prop::option::weighted(0.8, select(&ORIGINS[..]));
    let name = || select(&NAMES[..]);
    (address, origin, select(&Protocol::ALL[..]), name(), name(), select(&["", "east"][..]), name()).prop_map(
        |(address, origin, protocol, account, rule, site, pod)| Key {
            address: address.map(|it| it.parse::<IpAddr>().unwrap()),
            origin: origin.map(|it| it.parse::<SocketAddr>().unwrap()),
            protocol,
            rule: format!("binding/{rule}"),
            account: account.into(),
            allocation: "partner".into(),
            site: site.into(),
            pod: pod.into(),
        },
    )
}

fn figures() -> impl Strategy<Value = Figures> {
    let refused = prop::collection::btree_map(select(&REASONS[..]).prop_map(String::from), 1u64..9, 0..2);
    let numbers = prop_oneof![4 => 0u64..500, 1 => Just(0), 1 => Just(64_512)];
    (numbers, 0u64..50, 0u64..90, refused, any::<bool>()).prop_map(|(in_use, more, flows, refused, idle)| {
        if idle && !refused.is_empty() {
            return Figures { refused, ..Figures::default() };
        }
        let sent = Volume { packets: flows * 3, bytes: flows * 300 };
        let received = Volume { packets: flows * 2, bytes: flows << 20 };
        Figures { in_use, peak: in_use + more, flows, refused, sent, received }
    })
}

fn question() -> impl Strategy<Value = Question> {
    let window = (prop_oneof![4 => 0..SPAN, 1 => SPAN..SPAN + 600], prop_oneof![1..600i64, 1..SPAN]);
    let level = select(&Level::ALL[..]);
    let by = subsequence(dimensions(), 0..5).prop_shuffle();
    let figures = prop::collection::vec(figure(), 1..5);
    let shape = (window, level, prop::option::of(1i64..20), by, figures);
    let part = (prop::bool::weighted(0.3), prop::option::weighted(0.3, 0usize..4));
    let order = (any::<bool>(), 1u32..12);
    (shape, filter(), scope(), part, order).prop_map(|(shape, filter, scope, part, (highest, first))| {
        let ((from, length), level, step, by, figures) = shape;
        let mean = figures[0].aggregation == Aggregation::Avg;
        let (newest, fullest) = part;
        let fullest = fullest.filter(|fullest| *fullest < by.len() && !mean);
        let query = Query {
            from: T0 + from,
            to: T0 + from + length,
            step: step.map(|step| step * level.resolution()),
            level: Some(level),
            filter,
            newest,
            by,
            fullest,
            figures,
            order: if highest && !mean { Order::Highest } else { Order::Group },
            first,
            after: None,
        };
        Question { scope, query }
    })
}

fn dimensions() -> Vec<Dimension> {
    use Dimension as D;
    vec![
        D::Address,
        D::Account,
        D::Allocation,
        D::Rule,
        D::Site,
        D::Node,
        D::Origin,
        D::Protocol,
        D::Pod,
        D::Reason,
    ]
}

fn figure() -> impl Strategy<Value = Figure> {
    use Measure as M;
    let measures = [
        M::InUse,
        M::InUseMax,
        M::Peak,
        M::Flows,
        M::Refused,
        M::SentPackets,
        M::SentBytes,
        M::ReceivedPackets,
        M::ReceivedBytes,
    ];
    let aggregation = prop_oneof![
        select(vec![Aggregation::Avg, Aggregation::Min, Aggregation::Max, Aggregation::Sum]),
        (1u16..=1000).prop_map(Aggregation::Quantile),
    ];
    (select(measures.to_vec()), aggregation)
        .prop_map(|(measure, aggregation)| Figure { measure, aggregation })
}

fn filter() -> impl Strategy<Value = Filter> {
    let some = |names: &'static [&'static str]| prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(select(names).prop_map(String::from), 1..3)];
    let ranges = || {
        let ranges =
            ["192.0.2.0/29", "192.0.2.9/32", "0.0.0.0/0", "198.51.100.0/25", "2001:db8::/32", "::/0"];
        select(ranges.map(|it| it.parse::<IpNet>().unwrap()).to_vec())
    };
    let origin = prop_oneof![
        4 => (ranges(), prop::option::of(select(vec![443u16, 53]))).prop_map(|(range, port)| OriginFilter::Range(range, port)),
        1 => Just(OriginFilter::Summed),
    ];
    let addresses = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(ranges(), 1..3)];
    let origins = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(origin, 1..3)];
    let protocols = prop_oneof![3 => Just(Vec::new()), 1 => subsequence(Protocol::ALL.to_vec(), 1..3)];
    let names = (some(&NAMES), some(&NODES), some(&["", "east"]), some(&NAMES), some(&["", "no_port"]));
    (names, addresses, origins, protocols).prop_map(|(names, addresses, origins, protocols)| {
        let (accounts, nodes, sites, pods, reasons) = names;
        Filter { addresses, accounts, nodes, sites, pods, reasons, origins, protocols, ..Filter::default() }
    })
}

fn scope() -> impl Strategy<Value = Scope> {
    let accounts = subsequence(NAMES.map(String::from).to_vec(), 0..3);
    let prefixes = ["192.0.2.0/28", "2001:db8:1::/48", "203.0.113.0/24"];
    let prefixes = subsequence(prefixes.map(|it| it.parse::<IpNet>().unwrap()).to_vec(), 0..3);
    // Some from the beginning.
    let since = prop_oneof![Just(T0), T0..T0 + SPAN];
    let part = (accounts, prefixes, since).prop_map(|(accounts, prefixes, since)| {
        let owned = |range| Owned { range, account: String::new(), since };
        Scope::Part {
            accounts: accounts.into_iter().collect(),
            prefixes: prefixes.into_iter().map(owned).collect(),
        }
    });
    prop_oneof![Just(Scope::All), part]
}

/// Delivers all of a run to a store.
///
/// # Panics
/// The store fails, or takes a report twice or not at all.
pub fn deliver(store: &aegis_usage::Store, run: &Run) {
    let retention = aegis_usage::Retention::default();
    let mut came = BTreeSet::new();
    for (batch, until) in &run.batches {
        let reports: Vec<Report> = batch.iter().map(|at| run.reports[*at].clone()).collect();
        let receipts = store.ingest(&reports, NOW).unwrap();
        for (at, receipt) in batch.iter().zip(receipts) {
            let expected = match came.insert(*at) {
                true if run.reports[*at].to > NOW + FUTURE => Receipt::Moved,
                true => Receipt::Stored,
                false => Receipt::Repeated,
            };
            assert_eq!(receipt, expected);
        }
        store.maintain(*until, &retention).unwrap();
    }
}
