//! The three levels of detail, and how long each is kept.

use thiserror::Error;

/// A level of detail: what one row of the store sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// 10 seconds: what agents report.
    Tens,
    /// One minute.
    Minutes,
    /// One hour.
    Hours,
}

impl Level {
    /// All of them, the finest first.
    pub const ALL: [Level; 3] = [Level::Tens, Level::Minutes, Level::Hours];

    /// Length of a slot in seconds.
    pub fn resolution(self) -> i64 {
        match self {
            Level::Tens => 10,
            Level::Minutes => 60,
            Level::Hours => 3_600,
        }
    }

    /// Begin of the slot that a moment is in.
    pub fn slot(self, at: i64) -> i64 {
        at.div_euclid(self.resolution()) * self.resolution()
    }

    /// What is forgotten at a time, in seconds: a multiple of the next level's slot, and a partition in PostgreSQL.
    pub(crate) fn chunk(self) -> i64 {
        match self {
            // Short, so that the index that reports are written to stays in memory.
            Level::Tens => 600,
            Level::Minutes => 86_400,
            Level::Hours => 30 * 86_400,
        }
    }

    /// Table that has it.
    pub(crate) fn table(self) -> &'static str {
        match self {
            Level::Tens => "usage_10",
            Level::Minutes => "usage_60",
            Level::Hours => "usage_3600",
        }
    }

    /// Table that has its rows summed over origins, rules and pods, of which there are few.
    pub(crate) fn totals(self) -> &'static str {
        match self {
            Level::Tens => "total_10",
            Level::Minutes => "total_60",
            Level::Hours => "total_3600",
        }
    }

    /// Both tables.
    pub(crate) fn tables(self) -> [&'static str; 2] {
        [self.table(), self.totals()]
    }

    /// The level that it is made of.
    pub(crate) fn finer(self) -> Option<Level> {
        match self {
            Level::Tens => None,
            Level::Minutes => Some(Level::Tens),
            Level::Hours => Some(Level::Minutes),
        }
    }

    /// The level that is made of it.
    pub(crate) fn coarser(self) -> Option<Level> {
        match self {
            Level::Tens => Some(Level::Minutes),
            Level::Minutes => Some(Level::Hours),
            Level::Hours => None,
        }
    }
}

/// For how many seconds each level is kept, at least: what is forgotten goes by 10 minutes, the day and 30 days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    tens: i64,
    minutes: i64,
    hours: i64,
}

/// Why levels cannot be kept so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RetentionError {
    /// An hour is made of what came in it, late reports included.
    #[error("10-second figures are to be kept for an hour at least, not {0} s")]
    Short(i64),
    /// A late report changes all levels above its own.
    #[error(
        "a level is to be kept for as long as the finer ones: {tens} s, {minutes} s and {hours} s do not grow"
    )]
    Order {
        /// 10-second figures.
        tens: i64,
        /// Minutes.
        minutes: i64,
        /// Hours.
        hours: i64,
    },
}

impl Retention {
    /// Seconds for each level.
    ///
    /// # Errors
    /// Where a report that comes late could not be added to every level.
    pub fn new(tens: i64, minutes: i64, hours: i64) -> Result<Retention, RetentionError> {
        if tens < 3_600 {
            return Err(RetentionError::Short(tens));
        }
        if minutes < tens || hours < minutes {
            return Err(RetentionError::Order { tens, minutes, hours });
        }
        Ok(Retention { tens, minutes, hours })
    }

    /// Before which moment a level is forgotten.
    pub(crate) fn horizon(&self, level: Level, now: i64) -> i64 {
        let kept = match level {
            Level::Tens => self.tens,
            Level::Minutes => self.minutes,
            Level::Hours => self.hours,
        };
        now.saturating_sub(kept).div_euclid(level.chunk()) * level.chunk()
    }
}

impl Default for Retention {
    /// 6 hours, 14 days and 400 days.
    fn default() -> Retention {
        Retention { tens: 6 * 3_600, minutes: 14 * 86_400, hours: 400 * 86_400 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_report_finds_all_it_changes() {
        for now in (0..40 * 86_400).step_by(1_234) {
            let retention = Retention::new(3_600, 3_600, 3_600).unwrap();
            let oldest = retention.horizon(Level::Tens, now);
            assert!(Level::Minutes.slot(oldest) == oldest);
            assert!(Level::Hours.slot(oldest) >= retention.horizon(Level::Minutes, now));
            assert!(Level::Hours.slot(oldest) >= retention.horizon(Level::Hours, now));
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        assert_eq!(Retention::new(60, 3_600, 3_600), Err(RetentionError::Short(60)));
        let order = RetentionError::Order { tens: 7_200, minutes: 3_600, hours: 9_000 };
        assert_eq!(Retention::new(7_200, 3_600, 9_000), Err(order));
        let Retention { tens, minutes, hours } = Retention::default();
        assert!(Retention::new(tens, minutes, hours).is_ok());
    }
}
