//! The keepers of the nftables tables: each writes what differs in its own, and looks from time to time whether somebody else was
//! there.

use super::Signals;
use crate::nft::{Firewall, Outcome, Ruleset};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Pause between two looks at the table without a notification.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Longest time for which writes put off a look at the table.
const WRITES_FIRST: Duration = Duration::from_millis(300);

pub(super) struct TableKeeper {
    /// Place of its flag in [`Signals::tables`].
    number: usize,
    firewall: Firewall,
    seen: Instant,
    /// Whether the table is as it should be.
    pub state: Result<(), String>,
    /// Times it was put back.
    pub repairs: u64,
}

impl TableKeeper {
    /// With the program to call.
    pub fn new(number: usize, nft: PathBuf, now: Instant) -> TableKeeper {
        TableKeeper {
            number,
            firewall: Firewall::new(nft),
            seen: now,
            state: Err("not written yet".to_owned()),
            repairs: 0,
        }
    }

    /// Packets that it has dropped, by reason.
    pub fn drops(&self) -> &BTreeMap<&'static str, u64> {
        self.firewall.drops()
    }

    /// Brings the table to these rules. A look at it takes longer than most writes: where writes wait, they go first,
    /// for a short while.
    pub async fn keep(&mut self, rules: &impl Ruleset, writes_wait: bool, signals: &Signals) {
        let (flag, family) = (&signals.tables[self.number], rules.table().family());
        let urgent = writes_wait && self.seen.elapsed() < WRITES_FIRST && self.state.is_ok();
        let check = !urgent && (Signals::take(flag) || self.seen.elapsed() >= LOOK_AGAIN);
        if check {
            self.seen = Instant::now();
        }
        if urgent && flag.load(Ordering::Acquire) {
            signals.wake.notify_one();
        }
        match self.firewall.ensure(rules, check || self.state.is_err()).await {
            Ok(outcome) => {
                if outcome == Outcome::Repaired {
                    self.repairs += 1;
                    tracing::warn!(family, "the nftables table had been changed or removed; it is back");
                }
                self.state = Ok(());
            }
            Err(error) => {
                let error = error.to_string();
                if self.state != Err(error.clone()) {
                    tracing::error!(family, error, "cannot write the nftables table");
                }
                self.state = Err(error);
            }
        }
    }
}
