//! What metrics say of deliveries.

/// Why a report will never get to the collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// There was no room for it any more.
    Full,
    /// It is older than what the collector takes.
    Old,
    /// The collector, an older one, says that it ends in the future: the node's clock, or the collector's, was wrong.
    New,
    /// The collector does not understand it, or its interval makes no sense.
    Invalid,
    /// Its file cannot be read, or is not what its name says.
    Damaged,
    /// It came while several others were not even written to the disk, which hangs.
    Busy,
}

impl Loss {
    /// All of them.
    pub const ALL: [Loss; 6] = [Loss::Full, Loss::Old, Loss::New, Loss::Invalid, Loss::Damaged, Loss::Busy];

    /// As metrics have it.
    pub fn label(self) -> &'static str {
        match self {
            Loss::Full => "full",
            Loss::Old => "old",
            Loss::New => "new",
            Loss::Invalid => "invalid",
            Loss::Damaged => "damaged",
            Loss::Busy => "busy",
        }
    }
}

/// What became of one attempt to deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The collector has it.
    Taken,
    /// The collector does not understand what was sent.
    Refused,
    /// The collector asks to come later (429, 503).
    Busy,
    /// There is no token yet, or the collector does not believe it (401, 403).
    Unauthorized,
    /// No connection, none that can be trusted, or no answer in time.
    Unreachable,
    /// An answer that is none of the collector's.
    Strange,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Outcome; 6] = [
        Outcome::Taken,
        Outcome::Refused,
        Outcome::Busy,
        Outcome::Unauthorized,
        Outcome::Unreachable,
        Outcome::Strange,
    ];

    /// As metrics have it.
    pub fn label(self) -> &'static str {
        match self {
            Outcome::Taken => "taken",
            Outcome::Refused => "refused",
            Outcome::Busy => "busy",
            Outcome::Unauthorized => "unauthorized",
            Outcome::Unreachable => "unreachable",
            Outcome::Strange => "strange",
        }
    }
}

/// Counts since the agent started, and what waits now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reports that the collector has.
    pub delivered: u64,
    /// Reports that it will never have, in the order of [`Loss::ALL`].
    pub lost: [u64; Loss::ALL.len()],
    /// Attempts to deliver, in the order of [`Outcome::ALL`].
    pub deliveries: [u64; Outcome::ALL.len()],
    /// Reports that wait, on the disk and in memory.
    pub waiting: u64,
    /// Those of them that are only in memory, since the disk does not take them.
    pub in_memory: u64,
    /// Bytes of those that wait; on the disk by blocks of 4 KiB.
    pub bytes: u64,
    /// End of the oldest that waits, in seconds since the Unix epoch.
    pub oldest: Option<i64>,
    /// When the collector last took something, in the same seconds.
    pub last_success: Option<i64>,
}

impl Counters {
    /// Counts what is lost.
    pub fn lose(&mut self, loss: Loss, reports: u64) {
        let lost = &mut self.lost[loss as usize];
        *lost = lost.saturating_add(reports);
    }

    /// Counts an attempt.
    pub fn attempt(&mut self, outcome: Outcome) {
        let attempts = &mut self.deliveries[outcome as usize];
        *attempts = attempts.saturating_add(1);
    }

    /// Reports that are lost, with why.
    pub fn losses(&self) -> impl Iterator<Item = (Loss, u64)> + '_ {
        Loss::ALL.into_iter().zip(self.lost)
    }

    /// Attempts, with what became of them.
    pub fn outcomes(&self) -> impl Iterator<Item = (Outcome, u64)> + '_ {
        Outcome::ALL.into_iter().zip(self.deliveries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_place_of_its_own() {
        let mut counters = Counters::default();
        for (index, loss) in Loss::ALL.into_iter().enumerate() {
            counters.lose(loss, index as u64);
        }
        Outcome::ALL.into_iter().for_each(|outcome| counters.attempt(outcome));
        assert!(counters.losses().enumerate().all(|(index, (_, lost))| lost == index as u64));
        assert!(counters.outcomes().all(|(_, attempts)| attempts == 1));
    }
}
