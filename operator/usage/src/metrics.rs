//! Prometheus metrics of the service.

use crate::ingest::Receipt;
use crate::store::Contents;
use axum::http::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
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
    newest: Gauge,
    series: Gauge,
    bytes: Gauge,
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
            newest: Gauge::default(),
            series: Gauge::default(),
            bytes: Gauge::default(),
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
            "newest_report_seconds",
            "End of the newest report that is stored in seconds since 1970 and 0 without any",
            self.newest.clone(),
        );
        registry.register("store_series", "Series that the store knows", self.series.clone());
        registry.register("store_bytes", "Bytes that the store takes", self.bytes.clone());
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
            Receipt::Repeated => "repeated",
            Receipt::TooOld => "too_old",
            Receipt::TooNew => "too_new",
            Receipt::Invalid(_) => "invalid",
        };
        self.reports.get_or_create(&OutcomeLabel { outcome }).inc();
        if *receipt == Receipt::Stored {
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
