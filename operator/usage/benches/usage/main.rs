//! What the store costs: reports taken, minutes made, dashboard questions, bytes on disk. `cargo bench -p aegis-usage`.
//!
//! 1,000,000 rows of 10 seconds in each store, once of many nodes and a short time and once of fewer and a long one; another number by
//! AEGIS_USAGE_ROWS, one of the stores by AEGIS_USAGE_STORE=sqlite or postgres. With AEGIS_USAGE_SECONDS instead: as many rows as
//! 1,000 nodes with 1,000 origins each report, for so long. PostgreSQL is measured where it is installed: on a Unix socket, as it is
//! configured by default but for 512 MB of buffers and a longer log, and with `fsync` on. Prints tables in Markdown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../tests/support/mod.rs"]
mod support;

mod cluster;
mod questions;
mod sustained;

use aegis_usage::{Retention, Store};
use aegis_usage_report::Report;
use cluster::Cluster;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use support::T0;

/// Many nodes and origins, a short time; fewer, for hours.
const CLUSTERS: [Cluster; 2] = [Cluster { nodes: 50, origins: 1_000 }, Cluster { nodes: 20, origins: 240 }];
/// Reports of one transaction, as the collector takes them when it is busy.
const BATCH: usize = 16;
/// No question of the bench is ended.
const PATIENCE: Duration = Duration::from_secs(600);
/// Times that each question is asked.
const TIMES: usize = 5;

fn main() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rows = number("AEGIS_USAGE_ROWS").unwrap_or(1_000_000);
    let time = number("AEGIS_USAGE_SECONDS").map(Duration::from_secs);
    let store = std::env::var("AEGIS_USAGE_STORE").unwrap_or_default();
    let stores = [("sqlite", sqlite as fn(&Measured)), ("postgres", postgres)];
    for (_, measured) in stores.into_iter().filter(|(name, _)| store.is_empty() || store == *name) {
        match time {
            Some(time) => measured(&|name, store, size| sustained::sustain(name, store, time, size)),
            None => CLUSTERS.iter().for_each(|cluster| {
                measured(&|name, store, size| measure(name, store, *cluster, rows, size));
            }),
        }
    }
}

/// What is done with an empty store, of which it is said what it is and how many bytes it takes.
type Measured<'m> = dyn Fn(&str, &Store, &dyn Fn() -> u64) + 'm;

fn sqlite(measured: &Measured) {
    let folder = support::folder("usage-bench");
    let store = Store::sqlite(folder.path().join("usage.db"), PATIENCE).unwrap();
    let size = || {
        let of = |name: &str| std::fs::metadata(folder.path().join(name)).map_or(0, |it| it.len());
        of("usage.db") + of("usage.db-wal")
    };
    measured("SQLite", &store, &size);
}

fn postgres(measured: &Measured) {
    let settings = ["shared_buffers=512MB", "max_wal_size=4GB"];
    let Some(server) = support::server::Server::installed(&settings) else {
        println!("PostgreSQL is not installed: not measured");
        return;
    };
    let url = server.database();
    let store = Store::postgres(&url, PATIENCE).unwrap();
    measured("PostgreSQL", &store, &|| server.size(&url) as u64);
}

fn measure(name: &str, store: &Store, cluster: Cluster, rows: u64, size: &dyn Fn() -> u64) {
    let slots = (rows / cluster.rows()).max(1);
    let rows = slots * cluster.rows();
    let empty = size();
    let end = T0 + 10 * slots as i64;
    let mut left = (0..slots).flat_map(|slot| cluster.reports(slot)).peekable();
    let mut taken = Duration::ZERO;
    while left.peek().is_some() {
        let batch: Vec<Report> = left.by_ref().take(BATCH).collect();
        let begin = Instant::now();
        store.ingest(&batch, end).unwrap();
        taken += begin.elapsed();
    }
    let taken = rate(rows, taken);
    let bytes = (size() - empty) / rows;
    let begin = Instant::now();
    store.maintain(end + 7_300, &Retention::default()).unwrap();
    let made = rate(rows, begin.elapsed());
    let both = both(store, cluster, slots);
    println!("\n| {name}: {rows} rows of {} nodes with {} origins each |  |", cluster.nodes, cluster.origins);
    println!("|---|---|");
    println!("| rows a second taken | {taken} |");
    println!("| rows a second made minutes | {made} |");
    println!("| rows a second taken while minutes are made of them | {both} |");
    println!("| bytes a row of 10 s | {bytes} |");
    for questions::Look { what, ask } in questions::looks(end) {
        let turns: Vec<Vec<Duration>> = (0..TIMES).map(|_| ask(store)).collect();
        let medians = (0..turns[0].len()).map(|question| {
            let mut times: Vec<Duration> = turns.iter().map(|turn| turn[question]).collect();
            times.sort_unstable();
            format!("{:.0}", times[TIMES / 2].as_secs_f64() * 1_000.0)
        });
        let worst = turns.iter().flatten().max().map_or(0.0, Duration::as_secs_f64) * 1_000.0;
        println!("| {what} | {} ms ({worst:.0} at worst) |", medians.collect::<Vec<_>>().join(" and "));
    }
}

/// Rows a second that are taken and made minutes of at once, as a collector does: until both are done.
fn both(store: &Store, cluster: Cluster, first: u64) -> u64 {
    let slots = first..first + 24;
    let reports: Vec<Report> = slots.clone().flat_map(|slot| cluster.reports(slot)).collect();
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
    rate(cluster.rows() * 24, begin.elapsed())
}

fn rate(rows: u64, time: Duration) -> u64 {
    (rows as f64 / time.as_secs_f64()) as u64
}
