//! What the store costs: reports taken, minutes made, dashboard questions, bytes on disk. `cargo bench -p aegis-usage`.
//!
//! 1,000,000 rows of 10 seconds in each store; another number by AEGIS_USAGE_ROWS, one of the stores by AEGIS_USAGE_STORE=sqlite or
//! postgres. PostgreSQL is measured where it is installed: on a
//! Unix socket, as it is configured by default but for 512 MB of buffers and with `fsync` on. Prints a table in Markdown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/support/mod.rs"]
mod support;

use aegis_usage::{
    Aggregation, Dimension, Figure, Filter, Level, Measure, Order, Query, Retention, Scope, Store,
};
use aegis_usage_report::{Figures, Key, Protocol, Report, Row, VERSION, Volume};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use support::T0;

/// Rows of a report: origins of a node.
const ORIGINS: u64 = 1_000;
/// Nodes.
const NODES: u64 = 50;
/// Reports of one transaction, as the collector takes them when it is busy.
const BATCH: usize = 16;

fn main() {
    let wanted = std::env::var("AEGIS_USAGE_ROWS").ok().and_then(|text| text.parse().ok());
    let rows: u64 = wanted.unwrap_or(1_000_000);
    println!(
        "| store, rows | rows/s taken | bytes a row | rows/s made minutes | rows/s taken while minutes are made | question | milliseconds, median of 5 |"
    );
    println!("|---|---|---|---|---|---|---|");
    let store = std::env::var("AEGIS_USAGE_STORE").unwrap_or_default();
    if store != "postgres" {
        sqlite(rows);
    }
    if store != "sqlite" {
        postgres(rows);
    }
}

/// No question of the bench is ended.
const PATIENCE: Duration = Duration::from_secs(600);

fn sqlite(rows: u64) {
    let folder = support::folder("usage-bench");
    let path = folder.path().join("usage.db");
    let store = Store::sqlite(&path, PATIENCE).unwrap();
    let size = || {
        let of = |name: &str| std::fs::metadata(folder.path().join(name)).map_or(0, |it| it.len());
        of("usage.db") + of("usage.db-wal")
    };
    measure("SQLite", &store, rows, &size);
}

fn postgres(rows: u64) {
    let settings = ["shared_buffers=512MB", "max_wal_size=4GB"];
    let Some(server) = support::server::Server::installed(&settings) else {
        println!("PostgreSQL is not installed: not measured");
        return;
    };
    let url = server.database();
    let store = Store::postgres(&url, PATIENCE).unwrap();
    measure("PostgreSQL", &store, rows, &|| server.size(&url) as u64);
}

fn measure(name: &str, store: &Store, rows: u64, size: &dyn Fn() -> u64) {
    let slots = (rows / ORIGINS / NODES).max(1);
    let empty = size();
    let reports: Vec<Report> =
        (0..slots).flat_map(|slot| (0..NODES).map(move |node| report(node, slot))).collect();
    let end = T0 + 10 * slots as i64;
    let begin = Instant::now();
    for batch in reports.chunks(BATCH) {
        store.ingest(batch, end).unwrap();
    }
    let taken = rate(reports.len() as u64 * ORIGINS, begin);
    let bytes = (size() - empty) / (reports.len() as u64 * ORIGINS);
    let begin = Instant::now();
    store.maintain(end + 7_300, &Retention::default()).unwrap();
    let made = rate(reports.len() as u64 * ORIGINS, begin);
    let both = both(store, slots);
    print!("| {name}, {} | {taken} | {bytes} | {made} | {both} ", reports.len() as u64 * ORIGINS);
    for (at, (question, query)) in questions(end).into_iter().enumerate() {
        let mut times: Vec<Duration> = (0..5)
            .map(|_| {
                let begin = Instant::now();
                assert!(!store.query(&Scope::All, &query).unwrap().rows.is_empty());
                begin.elapsed()
            })
            .collect();
        times.sort_unstable();
        let lead = if at == 0 { "" } else { "| | | | | " };
        println!("{lead}| {question} | {:.1} |", times[2].as_secs_f64() * 1_000.0);
    }
}

/// Rows a second that are taken and made minutes of at once, as a collector does: until both are done.
fn both(store: &Store, first: u64) -> u64 {
    let slots = first..first + 24;
    let reports: Vec<Report> =
        slots.clone().flat_map(|slot| (0..NODES).map(move |node| report(node, slot))).collect();
    let taken = AtomicI64::new(T0 + 10 * first as i64);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut done = false;
            while !done {
                let now = taken.load(Ordering::Acquire);
                done = now == i64::MAX;
                let now = if done { T0 + 10 * slots.end as i64 + 80 } else { now };
                store.maintain(now, &Retention::default()).unwrap();
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        for batch in reports.chunks(BATCH) {
            let end = batch.iter().map(|report| report.to).max().unwrap();
            store.ingest(batch, end).unwrap();
            taken.store(end, Ordering::Release);
        }
        taken.store(i64::MAX, Ordering::Release);
    });
    rate(reports.len() as u64 * ORIGINS, begin)
}

fn rate(rows: u64, begin: Instant) -> u64 {
    (rows as f64 / begin.elapsed().as_secs_f64()) as u64
}

/// 1,000 origins of a node, of 20 accounts with an address each.
fn report(node: u64, slot: u64) -> Report {
    let row = |origin: u64| {
        let account = origin % 20;
        let key = Key {
            address: Some([192, 0, 2, account as u8].into()),
            origin: Some(([198, 51, (origin >> 8) as u8, origin as u8], 443).into()),
            protocol: Protocol::Tcp,
            rule: "binding/partner".into(),
            account: format!("account-{account}"),
            allocation: "partner".into(),
            site: format!("site-{}", node % 3),
            pod: String::new(),
        };
        let in_use = (origin * 7 + slot * 13 + node) % 2_000;
        let volume = Volume { packets: in_use * 12, bytes: in_use * 9_000 };
        let figures = Figures {
            in_use,
            peak: in_use + 20,
            flows: in_use / 3,
            sent: volume,
            received: volume,
            ..Figures::default()
        };
        Row { key, figures }
    };
    let from = T0 + 10 * slot as i64;
    let rows = (0..ORIGINS).map(row).collect();
    Report {
        version: VERSION,
        node: format!("node-{node}"),
        boot: "b".into(),
        sequence: slot,
        from,
        to: from + 10,
        rows,
    }
}

/// What dashboards ask, of all the time there is.
fn questions(end: i64) -> Vec<(&'static str, Query)> {
    let figure = |measure, aggregation| Figure { measure, aggregation };
    let of = |account: u64| Filter { accounts: vec![format!("account-{account}")], ..Filter::default() };
    let base = Query { from: T0, to: end, first: 1_000, level: Some(Level::Tens), ..Query::default() };
    let ports = vec![figure(Measure::InUse, Aggregation::Avg), figure(Measure::Peak, Aggregation::Max)];
    let one = Filter {
        origins: vec![aegis_usage::OriginFilter::Range("198.51.0.40/32".parse().unwrap(), None)],
        ..of(0)
    };
    let minutes = Query { level: Some(Level::Minutes), step: Some(60), ..base.clone() };
    vec![
        (
            "one address, one origin, over time, 10 s",
            Query { step: Some(10), filter: one, figures: ports.clone(), ..base.clone() },
        ),
        (
            "one account, fullest origins, 10 s",
            Query {
                filter: of(3),
                by: vec![Dimension::Address, Dimension::Origin],
                figures: vec![
                    figure(Measure::Peak, Aggregation::Max),
                    figure(Measure::InUse, Aggregation::Quantile(950)),
                ],
                order: Order::Highest,
                first: 10,
                ..base.clone()
            },
        ),
        (
            "one account by node, over time, minutes",
            Query { filter: of(7), by: vec![Dimension::Node], figures: ports.clone(), ..minutes.clone() },
        ),
        (
            "all accounts, over time, minutes",
            Query {
                by: vec![Dimension::Account],
                figures: vec![figure(Measure::Flows, Aggregation::Sum)],
                ..minutes
            },
        ),
    ]
}
