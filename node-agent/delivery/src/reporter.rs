//! What whoever counts calls.

use crate::{Boot, Counters, Loss, Name};
use aegis_usage_report::{MAX_ROWS, Report, Row, VERSION, bound};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc::Sender;

/// Takes the rows of each interval, and makes numbered reports of them. Clones are the same reporter.
#[derive(Clone, Debug)]
pub struct Reporter {
    node: Arc<str>,
    boot: Boot,
    next: Arc<AtomicU64>,
    sender: Sender<(Name, Report)>,
    counters: Shared,
}

impl Reporter {
    pub(crate) fn new(node: &str, boot: Boot, sender: Sender<(Name, Report)>, counters: Shared) -> Reporter {
        Reporter { node: node.into(), boot, next: Arc::default(), sender, counters }
    }

    /// Hands in what was counted from one second to another (seconds since the Unix epoch, `to` not included): every interval of this start of
    /// the agent once, in order, also without rows, since silence would be a gap. There may be any number of rows, also several of one key: they are
    /// summed ([`bound`]).
    ///
    /// It waits for nobody: neither for the network nor for the disk.
    pub fn report(&self, rows: Vec<Row>, from: i64, to: i64) {
        // Whatever becomes of it, it has a number: the collector sees that one is missing.
        let sequence = self.next.fetch_add(1, Ordering::Relaxed);
        let report = Report {
            version: VERSION,
            node: self.node.to_string(),
            boot: self.boot.to_string(),
            sequence,
            from,
            to,
            rows: bound(rows, MAX_ROWS),
        };
        if let Err(error) = report.check() {
            tracing::warn!(sequence, %error, "a report of use makes no sense; it is lost");
            return self.counters.lock().lose(Loss::Invalid, 1);
        }
        let name = Name { boot: self.boot.clone(), sequence, to };
        if self.sender.try_send((name, report)).is_err() {
            tracing::warn!(sequence, "reports of use are not written, the disk hangs; one is lost");
            self.counters.lock().lose(Loss::Busy, 1);
        }
    }

    /// This start of the agent.
    pub fn boot(&self) -> &Boot {
        &self.boot
    }

    /// What metrics say, now.
    pub fn counters(&self) -> Counters {
        *self.counters.lock()
    }
}

/// The counters, which the delivery renews.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shared(Arc<Mutex<Counters>>);

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
