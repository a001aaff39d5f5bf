//! Reports of 1,000 nodes with 1,000 origins each, as they come: every 10 s, of one node after another, while minutes are made of them.

use crate::cluster::{Cluster, tell};
use crate::support::T0;
use aegis_usage::{Aggregation, Figure, Measure};
use aegis_usage::{Level, Query, Retention, Scope, Store};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

/// Who reports.
const CLUSTER: Cluster = Cluster { nodes: 1_000, origins: 1_000 };
/// Reports of one transaction at most, as the collector takes them when it is busy.
const BATCH: usize = 64;
/// How often minutes are made, as the collector does.
const EVERY: Duration = Duration::from_secs(10);
/// Between reports of all nodes.
const INTERVAL: Duration = Duration::from_secs(10);

/// Takes them for so long, and prints how late the last report of each minute was in the store, and how old minutes are when they are made.
pub fn sustain(name: &str, store: &Store, time: Duration, size: &dyn Fn() -> u64) {
    let mut reports: Vec<_> = CLUSTER.reports(0).collect();
    let begin = Instant::now();
    for batch in reports.chunks(BATCH) {
        store.ingest(batch, T0 + 10).unwrap();
    }
    let series = CLUSTER.rows();
    println!("{name}: the first reports of {series} series took {:.0} s", begin.elapsed().as_secs_f64());
    let (empty, mut taken) = (size(), 0);
    // The collector's time: the next slot begins now.
    let (now, done) = (AtomicI64::new(T0 + 10), AtomicI64::new(0));
    println!(
        "| {name}: s | rows/s that come | rows/s taken | latest, s | newest minute made, s ago | bytes a row, all levels |"
    );
    println!("|---|---|---|---|---|---|");
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while done.load(Ordering::Acquire) == 0 {
                std::thread::sleep(EVERY);
                store.maintain(now.load(Ordering::Acquire), &Retention::default()).unwrap();
            }
        });
        let mut latest = Duration::ZERO;
        for slot in 1.. {
            let due = |node: usize| INTERVAL * slot as u32 + INTERVAL * node as u32 / CLUSTER.nodes as u32;
            let mut node = 0;
            while node < reports.len() {
                // What has come by now, and at least one.
                std::thread::sleep(due(node).saturating_sub(begin.elapsed()));
                let came = (node + 1..reports.len())
                    .take_while(|next| next - node < BATCH && due(*next) <= begin.elapsed())
                    .last()
                    .map_or(node + 1, |last| last + 1);
                for (report, at) in reports[node..came].iter_mut().zip(node as u64..) {
                    tell(report, at, slot);
                }
                let time = T0 + 10 + begin.elapsed().as_secs() as i64;
                now.store(time, Ordering::Release);
                store.ingest(&reports[node..came], time).unwrap();
                latest = latest.max(begin.elapsed().saturating_sub(due(node)));
                taken += CLUSTER.origins * (came - node) as u64;
                node = came;
            }
            if slot % 6 == 0 {
                let passed = begin.elapsed();
                println!(
                    "| {:.0} | {} | {:.0} | {:.1} | {} | {} |",
                    passed.as_secs_f64(),
                    CLUSTER.rows() / INTERVAL.as_secs(),
                    taken as f64 / (passed - INTERVAL).as_secs_f64(),
                    latest.as_secs_f64(),
                    now.load(Ordering::Acquire) - made(store),
                    (size() - empty) / taken,
                );
                latest = Duration::ZERO;
                if passed >= time {
                    break;
                }
            }
        }
        done.store(1, Ordering::Release);
    });
}

/// Up to when minutes are made.
fn made(store: &Store) -> i64 {
    let figures = vec![Figure { measure: Measure::Flows, aggregation: Aggregation::Sum }];
    let query =
        Query { from: T0, to: T0 + 60, level: Some(Level::Minutes), figures, first: 1, ..Query::default() };
    store.query(&Scope::All, &query).unwrap().until
}
