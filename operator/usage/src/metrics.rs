//! Prometheus metrics of the service.

use crate::ingest::Receipt;
use crate::rollup::Maintained;
use crate::store::Contents;
use axum::http::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// All metrics; clones share them.
#[derive(Clone)]
pub struct Metrics {
    deliveries: Family<OutcomeLabel, Counter>,
    reports: Family<OutcomeLabel, Counter>,
    rows: Counter,
    ingest_seconds: Histogram,
    waiting: Gauge,
    questions: Family<OutcomeLabel, Counter>,
    question_seconds: Histogram,
    failures: Counter,
    skipped: Gauge,
    newest: Gauge,
    series: Gauge,
    bytes: Gauge,
    feeds: Family<OutcomeLabel, Counter>,
    firing: Family<AlertLabels, Gauge>,
    pending: Family<AlertLabels, Gauge>,
    told: Family<AlertLabels, Counter>,
    alert_failures: Counter,
}

/// An alert: there are as many as objects, and those that are gone are dropped.
#[derive(Clone, Debug, Hash, PartialEq, Eq, PartialOrd, Ord, EncodeLabelSet)]
pub(crate) struct AlertLabels {
    namespace: String,
    alert: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Marks the answer to a question that could not be answered, though its words came in well.
#[derive(Clone, Copy)]
pub(crate) struct Failed;

impl Metrics {
    /// All zero.
    pub fn new() -> Metrics {
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        Metrics {
            deliveries: Family::default(),
            reports: Family::default(),
            rows: Counter::default(),
            ingest_seconds: seconds(),
            waiting: Gauge::default(),
            questions: Family::default(),
            question_seconds: seconds(),
            failures: Counter::default(),
            skipped: Gauge::default(),
            newest: Gauge::default(),
            series: Gauge::default(),
            bytes: Gauge::default(),
            feeds: Family::default(),
            firing: Family::default(),
            pending: Family::default(),
            told: Family::default(),
            alert_failures: Counter::default(),
        }
    }

    /// Adds them to those that are served.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("deliveries", "Deliveries of agents, by outcome", self.deliveries.clone());
        registry.register("reports", "Reports of agents, by outcome", self.reports.clone());
        registry.register("rows", "Rows of the reports that were stored", self.rows.clone());
        registry.register(
            "ingest_seconds",
            "Time to store the reports that waited at a time",
            self.ingest_seconds.clone(),
        );
        registry.register("deliveries_waiting", "Deliveries that wait to be stored", self.waiting.clone());
        registry.register("questions", "Questions, by outcome", self.questions.clone());
        registry.register(
            "question_seconds",
            "Time from a question to its answer",
            self.question_seconds.clone(),
        );
        registry.register(
            "maintenance_failures",
            "Attempts to make minutes and hours, and to forget what is old, that failed",
            self.failures.clone(),
        );
        registry.register(
            "maintenance_skipped",
            "Minutes and hours of nodes that cannot be made while others are",
            self.skipped.clone(),
        );
        registry.register(
            "newest_report_seconds",
            "End of the newest report that is stored in seconds since 1970 and 0 without any",
            self.newest.clone(),
        );
        registry.register("store_series", "Series that the store knows", self.series.clone());
        registry.register("store_bytes", "Bytes that the store takes", self.bytes.clone());
        registry.register("feeds", "Requests for feeds, by outcome", self.feeds.clone());
        registry.register("alert_firing", "Things that an alert is raised for", self.firing.clone());
        registry.register(
            "alert_pending",
            "Things that exceed a limit of an alert but not for long enough",
            self.pending.clone(),
        );
        registry.register("alert_items", "What was raised and cleared, by alert", self.told.clone());
        registry.register(
            "alert_failures",
            "Attempts to look at alerts, or to write their events and status, that failed",
            self.alert_failures.clone(),
        );
    }

    /// A delivery was answered.
    pub(crate) fn delivered(&self, status: StatusCode, again: bool) {
        let outcome = match status {
            StatusCode::OK => "taken",
            _ if again => "put_off",
            _ => refusal(status),
        };
        self.deliveries.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// A question was answered.
    pub(crate) fn answered(&self, status: StatusCode, failed: bool, took: Duration) {
        let outcome = match status {
            StatusCode::OK if failed => "failed",
            StatusCode::OK => "answered",
            _ => refusal(status),
        };
        self.questions.get_or_create(&OutcomeLabel { outcome }).inc();
        self.question_seconds.observe(took.as_secs_f64());
    }

    /// A report with so many rows, which ends at a moment, was stored or not.
    pub(crate) fn reported(&self, receipt: &Receipt, rows: usize, end: i64) {
        let outcome = match receipt {
            Receipt::Stored => "stored",
            Receipt::Moved => "moved",
            Receipt::Repeated => "repeated",
            Receipt::TooOld => "too_old",
            Receipt::Invalid(_) => "invalid",
        };
        self.reports.get_or_create(&OutcomeLabel { outcome }).inc();
        if receipt.is_new() {
            self.rows.inc_by(rows as u64);
            self.newest.inner().fetch_max(end, Ordering::Relaxed);
        }
    }

    /// So many deliveries more wait, or less.
    pub(crate) fn wait(&self, more: i64) {
        self.waiting.inc_by(more);
    }

    /// What waited at a time was stored.
    pub(crate) fn ingested(&self, took: Duration) {
        self.ingest_seconds.observe(took.as_secs_f64());
    }

    /// Minutes and hours could not be made.
    pub(crate) fn failed(&self) {
        self.failures.inc();
    }

    /// They could, but for some.
    pub(crate) fn maintained(&self, done: &Maintained) {
        self.skipped.set(done.skipped as i64);
    }

    /// A feed was asked for.
    pub(crate) fn read(&self, status: StatusCode) {
        let outcome = match status {
            StatusCode::OK => "read",
            StatusCode::NOT_MODIFIED => "unchanged",
            StatusCode::NOT_FOUND => "denied",
            _ => "unavailable",
        };
        self.feeds.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// How it stands with alerts, each by namespace and name: for how many things it is raised, and how many wait. Those of which nothing
    /// is said any more, as was the last time, are gone.
    pub fn alerts(
        &self,
        known: &mut BTreeSet<(String, String)>,
        now: &BTreeMap<(String, String), (i64, i64)>,
    ) {
        let labels = |(namespace, alert): &(String, String)| AlertLabels {
            namespace: namespace.clone(),
            alert: alert.clone(),
        };
        for gone in known.iter().filter(|alert| !now.contains_key(alert)) {
            self.firing.remove(&labels(gone));
            self.pending.remove(&labels(gone));
            self.told.remove(&labels(gone));
        }
        for (alert, (firing, pending)) in now {
            self.firing.get_or_create(&labels(alert)).set(*firing);
            self.pending.get_or_create(&labels(alert)).set(*pending);
        }
        *known = now.keys().cloned().collect();
    }

    /// Something was raised or cleared.
    pub fn happened(&self, namespace: &str, alert: &str) {
        let labels = AlertLabels { namespace: namespace.into(), alert: alert.into() };
        self.told.get_or_create(&labels).inc();
    }

    /// Alerts could not be looked at or told.
    pub fn alerts_failed(&self) {
        self.alert_failures.inc();
    }

    /// What the store has.
    pub(crate) fn contents(&self, contents: &Contents) {
        self.newest.inner().fetch_max(contents.newest.unwrap_or(0), Ordering::Relaxed);
        self.series.set(contents.series);
        self.bytes.set(contents.bytes);
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

fn refusal(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "denied",
        status if status.is_server_error() => "unavailable",
        _ => "malformed",
    }
}
