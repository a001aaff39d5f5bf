//! Metrics of the reports of use.

use super::{Encoded, counter, family, gauge};
use aegis_delivery::Counters;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use std::sync::{Arc, OnceLock};

/// Whoever counts.
pub(super) struct Source(pub Box<dyn Fn() -> Counters + Send + Sync>);

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0().fmt(f)
    }
}

/// Writes them, where somebody counts.
#[derive(Debug)]
pub(super) struct Encoder(pub Arc<OnceLock<Source>>);

impl Collector for Encoder {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Encoded {
        match self.0.get() {
            Some(source) => encode(&mut encoder, &source.0()),
            None => Ok(()),
        }
    }
}

fn encode(e: &mut DescriptorEncoder<'_>, now: &Counters) -> Encoded {
    counter(e, "usage_reports_delivered", "Reports of use that the collector has", now.delivered)?;
    family(
        e,
        (
            "usage_reports_lost",
            "Reports of use that the collector will never have, by why",
            MetricType::Counter,
        ),
        now.losses().map(|(loss, reports)| ([("reason", loss.label().to_owned())], reports)),
    )?;
    family(
        e,
        (
            "usage_deliveries",
            "Attempts to deliver reports of use, by what became of them",
            MetricType::Counter,
        ),
        now.outcomes().map(|(outcome, attempts)| ([("result", outcome.label().to_owned())], attempts)),
    )?;
    gauge(e, "usage_backlog_reports", "Reports of use that wait for the collector", now.waiting as f64)?;
    gauge(
        e,
        "usage_backlog_memory_reports",
        "Those of them that are only in memory, since the disk takes none",
        now.in_memory as f64,
    )?;
    gauge(e, "usage_backlog_bytes", "Bytes of reports of use that wait", now.bytes as f64)?;
    if let Some(oldest) = now.oldest {
        gauge(
            e,
            "usage_backlog_oldest_seconds",
            "End of the oldest report of use that waits, in seconds since 1970",
            oldest as f64,
        )?;
    }
    if let Some(last) = now.last_success {
        gauge(
            e,
            "usage_delivered_seconds",
            "When the collector last took a report of use, in seconds since 1970",
            last as f64,
        )?;
    }
    Ok(())
}
