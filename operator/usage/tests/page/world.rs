//! The service on a port of this machine, with a small cluster and ten minutes of reports.

use crate::support::objects::{NASTY, People, cluster};
use crate::support::{self, T0, figures, report};
use aegis_usage::alert::Account;
use aegis_usage::cluster::Cluster;
use aegis_usage::{Aggregation, Dimension, Figure, Filter, Level, Measure, Metrics, Query, Scope, Store};
use aegis_usage_report::{Key, Report};
use std::collections::BTreeMap;
use std::sync::Arc;
use tempfile::TempDir;

/// The collector's time, which stands still so that pictures do, too.
pub const NOW: i64 = T0 + 3_600;

/// Reports that n4 has sent before it fell silent.
pub const SILENT_AFTER: i64 = 3_000;

pub struct World {
    pub url: String,
    pub store: Arc<Store>,
    _folder: TempDir,
}

impl World {
    pub async fn start() -> World {
        World::of(Some(cluster()), &[]).await
    }

    /// One whose objects are known or not, and where these accounts have alerts.
    pub async fn of(cluster: Option<Cluster>, alerting: &[Account]) -> World {
        let (store, folder) = support::sqlite();
        let store = Arc::new(store);
        store.watch(alerting, T0, T0).unwrap();
        for reports in reports().chunks(64) {
            store.ingest(reports, NOW).unwrap();
        }
        store.maintain(NOW, &aegis_usage::Retention::default()).unwrap();
        // Some slots at a time; those of which a report is missing a minute later.
        for _ in 0..10 {
            store.watch(alerting, NOW + 60, T0).unwrap();
        }
        let people = Arc::new(People(cluster.map(Arc::new)));
        let router = aegis_usage::router(store.clone(), people, Arc::new(|| NOW), Metrics::new());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        World { url, store, _folder: folder }
    }

    /// What the store has of an origin of 192.0.2.1 in a window, by step.
    pub fn stored(&self, origin: &str, window: (i64, i64), step: i64, node: &str) -> BTreeMap<i64, f64> {
        let address = "192.0.2.1".parse::<std::net::IpAddr>().unwrap();
        let nodes = if node.is_empty() { vec![] } else { vec![node.to_owned()] };
        let origins = vec![aegis_usage::OriginFilter::Range(
            origin.parse::<std::net::SocketAddr>().unwrap().ip().into(),
            Some(443),
        )];
        let query = Query {
            from: window.0,
            to: window.1,
            step: Some(step),
            level: Some(Level::Tens),
            filter: Filter { addresses: vec![address.into()], nodes, origins, ..Filter::default() },
            by: vec![Dimension::Origin],
            figures: vec![Figure { measure: Measure::InUse, aggregation: Aggregation::Max }],
            first: 1_000,
            ..Query::default()
        };
        let page = self.store.query(&Scope::All, &query).unwrap();
        page.rows.into_iter().map(|row| (row.at, row.figures[0])).collect()
    }
}

/// An hour of four nodes, one of which falls silent, and of y's.
fn reports() -> Vec<Report> {
    let mut reports = Vec::new();
    for slot in 0..360_u64 {
        let wave = |period: f64, from: f64, to: f64| {
            let at = (slot as f64 * std::f64::consts::TAU / period).sin() * 0.5 + 0.5;
            (from + at * (to - from)) as u64
        };
        let row = |account: &str, origin: u8, in_use| (support::key(account, origin), figures(in_use, 3));
        // A /64 has flows, and no ports.
        let six = Key {
            address: Some("2001:db8:1:2::".parse().unwrap()),
            origin: Some("[2001:db8:9::1]:443".parse().unwrap()),
            ..support::key("x", 1)
        };
        reports.push(report(
            "n1",
            slot,
            vec![
                row("x", 1, wave(70.0, 900.0, 1_750.0)),
                row("x", 2, wave(40.0, 20.0, 300.0)),
                (six, figures(0, slot % 7)),
            ],
        ));
        reports.push(report("n2", slot, vec![row("x", 1, wave(55.0, 200.0, 420.0))]));
        if 10 * (slot as i64) < SILENT_AFTER {
            reports.push(report("n4", slot, vec![row("x", 1, 77)]));
        }
        reports.push(report(NASTY, slot, vec![row("x", 3, 500)]));
        let other = Key {
            address: Some([203, 0, 113, 77].into()),
            origin: Some(([198, 51, 100, 66], 443).into()),
            ..support::key("y", 1)
        };
        reports.push(report("y-node", slot, vec![(other, figures(4_242, 1))]));
    }
    reports
}
