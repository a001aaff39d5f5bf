//! Prometheus metrics of the collector, those of the service with them.

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// All metrics; clones share them.
#[derive(Clone)]
pub struct Metrics {
    /// Those of the service.
    pub service: aegis_usage::Metrics,
    registry: Arc<Registry>,
    reviews: Family<ReviewLabels, Counter>,
    failures: Counter,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReviewLabels {
    kind: &'static str,
    result: &'static str,
}

/// What the API server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whose a token is.
    Token,
    /// What somebody may see.
    Access,
}

impl Metrics {
    /// All zero.
    pub fn new() -> Metrics {
        let (service, reviews, failures) =
            (aegis_usage::Metrics::new(), Family::default(), Counter::default());
        let mut registry = Registry::with_prefix("aegis_collector");
        service.register(&mut registry);
        registry.register(
            "reviews",
            "Questions to the API server by kind (token, access) and result (answered, failed)",
            Family::clone(&reviews),
        );
        registry.register(
            "certificate_failures",
            "Attempts to read a certificate that has changed that failed",
            Counter::clone(&failures),
        );
        Metrics { service, registry: Arc::new(registry), reviews, failures }
    }

    /// The page.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut page = String::new();
        text::encode(&mut page, &self.registry)?;
        Ok(page)
    }

    /// The API server was asked.
    pub fn reviewed(&self, kind: Kind, answered: bool) {
        let kind = match kind {
            Kind::Token => "token",
            Kind::Access => "access",
        };
        let result = if answered { "answered" } else { "failed" };
        self.reviews.get_or_create(&ReviewLabels { kind, result }).inc();
    }

    /// A certificate could not be read.
    pub fn certificate_failed(&self) {
        self.failures.inc();
    }
}
