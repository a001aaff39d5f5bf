//! The interpreter: it goes through all reports for every question.

use super::generate;
use aegis_usage::{
    Aggregation, Answer, Dimension, FUTURE, Filter, Level, Measure, Order, OriginFilter, Query, Scope,
};
use aegis_usage_report::{Figures, Key, Report};
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;

type Series = (String, Key, String);

/// What a group is ordered by.
type Group = Vec<Vec<u8>>;

/// Sums of each figure, slot by slot.
type Slots = Vec<Vec<i128>>;

/// What is shown of it.
type Names = Vec<String>;

/// What one slot has of a series.
#[derive(Clone, Debug, Default)]
struct Slot {
    in_use: i128,
    in_use_max: i128,
    peak: i128,
    flows: i128,
    refused: i128,
    sent: (i128, i128),
    received: (i128, i128),
}

/// The answer to a question, of reports that each came once.
pub fn answer(reports: &[Report], scope: &Scope, query: &Query, level: Level) -> Vec<Answer> {
    let mut samples: BTreeMap<(String, i64), i128> = BTreeMap::new();
    let mut slots: BTreeMap<(Series, i64), Slot> = BTreeMap::new();
    for report in reports {
        // What says that it ends long after it came counts as if it ended then.
        let end = if report.to > generate::NOW + FUTURE { generate::NOW } else { report.to };
        let slot = level.slot(end - 1);
        *samples.entry((report.node.clone(), slot)).or_default() += 1;
        for (series, figures) in series(report) {
            let sum = slots.entry((series, slot)).or_default();
            sum.in_use += figures.in_use;
            sum.in_use_max = sum.in_use_max.max(figures.in_use);
            sum.peak = sum.peak.max(figures.peak);
            sum.flows += figures.flows;
            sum.refused += figures.refused;
            sum.sent = (sum.sent.0 + figures.sent.0, sum.sent.1 + figures.sent.1);
            sum.received = (sum.received.0 + figures.received.0, sum.received.1 + figures.received.1);
        }
    }
    // Sums of each group in each slot.
    let begin = level.slot(query.from);
    let mut newest: BTreeMap<&str, i64> = BTreeMap::new();
    for (node, slot) in samples.keys().filter(|(_, slot)| (begin..query.to).contains(slot)) {
        newest.insert(node, *slot);
    }
    let mut groups: BTreeMap<(Group, i64, i64), (Names, Vec<i128>)> = BTreeMap::new();
    for (((node, mut key, reason), slot), values) in slots {
        if slot < begin || slot >= query.to || !sees(scope, &key, slot) {
            continue;
        }
        if query.newest && newest[&node[..]] != slot {
            continue;
        }
        if !sees_pods(scope, &key) {
            key.pod.clear();
        }
        if !passes(&query.filter, &node, &key, &reason) {
            continue;
        }
        let by: Vec<(Vec<u8>, String)> = query.by.iter().map(|it| value(*it, &node, &key, &reason)).collect();
        let (bytes, names): (Vec<_>, Vec<_>) = by.into_iter().unzip();
        let step = query.step.map_or(begin, |step| slot / step * step);
        let (_, sums) =
            groups.entry((bytes, step, slot)).or_insert_with(|| (names, vec![0; query.figures.len()]));
        for (sum, figure) in sums.iter_mut().zip(&query.figures) {
            *sum += measured(&values, figure.measure, samples[&(node.clone(), slot)]);
        }
    }
    // Slots of each group in each step.
    let mut steps: BTreeMap<(Group, i64), (Names, Slots)> = BTreeMap::new();
    for ((bytes, step, _), (names, sums)) in groups {
        steps.entry((bytes, step)).or_insert_with(|| (names, Vec::new())).1.push(sums);
    }
    let answers = steps
        .into_iter()
        .map(|((bytes, at), (by, slots))| {
            let of = |place: usize| slots.iter().map(|sums| sums[place]).collect::<Vec<i128>>();
            let figures = query.figures.iter().enumerate();
            let figures =
                figures.map(|(place, it)| aggregated(of(place), it.aggregation, it.measure)).collect();
            (bytes, Answer { by, at, slots: slots.len() as i64, figures })
        })
        .collect();
    let mut answers = fullest(answers, query.fullest);
    if query.order == Order::Highest {
        answers.sort_by(|a, b| b.figures[0].total_cmp(&a.figures[0]));
    }
    answers
}

/// The greatest of all answers with the same first groups and step: of equal ones the first.
fn fullest(answers: Vec<(Group, Answer)>, by: Option<usize>) -> Vec<Answer> {
    let Some(by) = by else { return answers.into_iter().map(|(_, answer)| answer).collect() };
    let beaten = |(group, it): &(Group, Answer)| {
        let rivals = answers.iter().filter(|(other, rival)| other[..by] == group[..by] && rival.at == it.at);
        let key = |group: &Group, answer: &Answer| (-answer.figures[0], group.clone());
        rivals.into_iter().any(|(other, rival)| key(other, rival) < key(group, it))
    };
    answers.iter().filter(|it| !beaten(it)).map(|(_, answer)| answer.clone()).collect()
}

/// Series of a report with their figures, those of the same key summed.
fn series(report: &Report) -> BTreeMap<Series, Slot> {
    let mut all: BTreeMap<Series, Slot> = BTreeMap::new();
    for row in &report.rows {
        let Figures { in_use, peak, flows, refused, sent, received } = row.figures.clone();
        let nothing =
            in_use + peak + flows + sent.packets + sent.bytes + received.packets + received.bytes == 0;
        if !nothing || refused.is_empty() {
            let of = all.entry((report.node.clone(), row.key.clone(), String::new())).or_default();
            of.in_use += i128::from(in_use);
            of.peak += i128::from(peak);
            of.flows += i128::from(flows);
            of.sent = (of.sent.0 + i128::from(sent.packets), of.sent.1 + i128::from(sent.bytes));
            of.received =
                (of.received.0 + i128::from(received.packets), of.received.1 + i128::from(received.bytes));
        }
        for (reason, count) in refused {
            all.entry((report.node.clone(), row.key.clone(), reason)).or_default().refused +=
                i128::from(count);
        }
    }
    all
}

fn measured(slot: &Slot, measure: Measure, samples: i128) -> i128 {
    match measure {
        Measure::InUse => slot.in_use * 1_000_000 / samples,
        Measure::InUseMax => slot.in_use_max,
        Measure::Peak => slot.peak,
        Measure::Flows => slot.flows,
        Measure::Refused => slot.refused,
        Measure::SentPackets => slot.sent.0,
        Measure::SentBytes => slot.sent.1,
        Measure::ReceivedPackets => slot.received.0,
        Measure::ReceivedBytes => slot.received.1,
    }
}

fn aggregated(mut values: Vec<i128>, aggregation: Aggregation, measure: Measure) -> f64 {
    values.sort_unstable();
    let scale = if measure == Measure::InUse { 1_000_000.0 } else { 1.0 };
    let count = values.len();
    match aggregation {
        Aggregation::Avg => values.iter().sum::<i128>() as f64 / scale / count as f64,
        Aggregation::Sum => values.iter().sum::<i128>() as f64 / scale,
        Aggregation::Min => values[0] as f64 / scale,
        Aggregation::Max => values[count - 1] as f64 / scale,
        Aggregation::Quantile(thousandths) => {
            values[(count * usize::from(thousandths)).div_ceil(1000) - 1] as f64 / scale
        }
    }
}

fn sees(scope: &Scope, key: &Key, slot: i64) -> bool {
    match scope {
        Scope::All => true,
        Scope::Part { accounts, prefixes } => {
            accounts.contains(&key.account)
                || key.address.is_some_and(|address| {
                    prefixes.iter().any(|it| it.range.contains(&address) && slot >= it.since)
                })
        }
    }
}

fn sees_pods(scope: &Scope, key: &Key) -> bool {
    match scope {
        Scope::All => true,
        Scope::Part { accounts, .. } => accounts.contains(&key.account),
    }
}

fn passes(filter: &Filter, node: &str, key: &Key, reason: &str) -> bool {
    let any = |names: &[String], name: &str| names.is_empty() || names.iter().any(|it| it == name);
    let contains = |range: &IpNet, ip: IpAddr| range.contains(&ip);
    let address = key.address;
    let origin = |it: &OriginFilter| match (it, key.origin) {
        (OriginFilter::Summed, origin) => origin.is_none(),
        (OriginFilter::Range(range, port), Some(origin)) => {
            contains(range, origin.ip()) && port.is_none_or(|port| port == origin.port())
        }
        (OriginFilter::Range(..), None) => false,
    };
    any(&filter.accounts, &key.account)
        && any(&filter.allocations, &key.allocation)
        && any(&filter.rules, &key.rule)
        && any(&filter.sites, &key.site)
        && any(&filter.nodes, node)
        && any(&filter.pods, &key.pod)
        && any(&filter.reasons, reason)
        && (filter.protocols.is_empty() || filter.protocols.contains(&key.protocol))
        && (filter.addresses.is_empty()
            || filter.addresses.iter().any(|it| address.is_some_and(|address| contains(it, address))))
        && (filter.origins.is_empty() || filter.origins.iter().any(origin))
}

/// What it is ordered by, and what is shown.
fn value(dimension: Dimension, node: &str, key: &Key, reason: &str) -> (Vec<u8>, String) {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => [&[4], ip.octets().as_slice()].concat(),
        IpAddr::V6(ip) => [&[6], ip.octets().as_slice()].concat(),
    };
    let text = |text: &str| (text.as_bytes().to_vec(), text.to_string());
    match dimension {
        Dimension::Address => {
            let bytes = key.address.map_or_else(Vec::new, octets);
            (bytes, key.address.map_or_else(String::new, |ip| ip.to_string()))
        }
        Dimension::Origin => {
            let port =
                |it: std::net::SocketAddr| [octets(it.ip()).as_slice(), &it.port().to_be_bytes()].concat();
            (key.origin.map_or_else(Vec::new, port), key.origin.map_or_else(String::new, |it| it.to_string()))
        }
        Dimension::Account => text(&key.account),
        Dimension::Allocation => text(&key.allocation),
        Dimension::Rule => text(&key.rule),
        Dimension::Site => text(&key.site),
        Dimension::Node => text(node),
        Dimension::Protocol => text(key.protocol.name()),
        Dimension::Pod => text(&key.pod),
        Dimension::Reason => text(reason),
    }
}

/// Compares a store with the interpreter, question by question.
///
/// # Panics
/// They differ.
pub fn compare(store: &aegis_usage::Store, reports: &[Report], questions: &[generate::Question]) {
    for generate::Question { scope, query } in questions {
        let level = query.level.unwrap();
        let expected = answer(reports, scope, query, level);
        let found = super::all(store, scope, query);
        assert_eq!(found, expected, "{query:?} of {scope:?}");
    }
}
