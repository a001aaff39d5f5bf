//! When something is sent, and how much of it. Pure: time is an argument, and so is chance.

use std::time::Duration;

/// How patient a delivery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// All agents make their report in the same second: each delivers so much later at most, by chance.
    pub spread: Duration,
    /// Least pause between two deliveries while more waits; it is up to twice as long, by chance.
    pub pause: Duration,
    /// First wait after a delivery that failed. It doubles with each that fails after it.
    pub backoff: Duration,
    /// Longest wait.
    pub longest: Duration,
    /// Most reports of a delivery. The collector takes 64.
    pub reports: usize,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            spread: Duration::from_secs(5),
            pause: Duration::from_secs(2),
            backoff: Duration::from_secs(1),
            longest: Duration::from_secs(60),
            reports: 16,
        }
    }
}

/// The newest and the oldest: fewer are not sent, but where one of several is not understood.
const LEAST: usize = 2;

/// When the next delivery is due, and how large it may be. All times are since one moment that does not matter.
///
/// While much waits, a delivery that is taken is followed by one of twice the size, after a pause at least as long as the collector took for it;
/// one that is not, by half the size. So agents that come back together find out between themselves how much the collector can bear.
#[derive(Clone, Debug)]
pub struct Pace {
    timing: Timing,
    due: Duration,
    phase: Duration,
    failures: u32,
    reports: usize,
    alone: usize,
}

impl Pace {
    /// At the start of the agent, with a random number.
    pub fn new(timing: Timing, now: Duration, random: u64) -> Pace {
        let phase = part(timing.spread, random);
        Pace { timing, due: now + phase, phase, failures: 0, reports: LEAST, alone: 0 }
    }

    /// When the next delivery is due, if anything waits.
    pub fn due(&self) -> Duration {
        self.due
    }

    /// Most reports of it.
    pub fn reports(&self) -> usize {
        if self.alone > 0 { 1 } else { self.reports }
    }

    /// A report came, and nothing else waits.
    pub fn arrived(&mut self, now: Duration) {
        self.due = self.due.max(now + self.phase);
    }

    /// So many reports were taken, within `took`.
    pub fn taken(&mut self, now: Duration, reports: usize, took: Duration, random: u64) {
        self.failures = 0;
        if self.alone > 0 {
            self.alone = self.alone.saturating_sub(reports);
        } else if reports >= self.reports {
            self.reports = self.reports.saturating_mul(2).min(self.timing.reports).max(LEAST);
        }
        self.rest(now, took, random);
    }

    /// What was sent is not understood. Of several nobody knows which; then each of them goes alone, and that it was one is returned by
    /// true: it would never be.
    pub fn refused(&mut self, now: Duration, reports: usize, random: u64) -> bool {
        self.failures = 0;
        let one = reports <= 1;
        self.alone = if one { self.alone.saturating_sub(1) } else { reports };
        self.rest(now, Duration::ZERO, random);
        one
    }

    /// Not now, and not before `wait` if the collector said so, within reason.
    pub fn put_off(&mut self, now: Duration, wait: Option<Duration>, random: u64) {
        let doubled = self.timing.backoff.saturating_mul(2u32.saturating_pow(self.failures));
        self.failures = self.failures.saturating_add(1);
        self.reports = (self.reports / 2).max(LEAST);
        let least = wait.unwrap_or_default().min(self.timing.longest);
        let wait = doubled.min(self.timing.longest).max(least);
        // Not before it is told, but not all at once either.
        self.due = now + least.max(wait / 2) + part(wait / 2, random);
    }

    fn rest(&mut self, now: Duration, took: Duration, random: u64) {
        let pause = self.timing.pause.max(took).min(self.timing.longest);
        self.due = now + pause + part(pause, random);
    }
}

/// A part of a time by chance.
fn part(of: Duration, random: u64) -> Duration {
    of.mul_f64((random >> 11) as f64 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ZERO: Duration = Duration::ZERO;

    fn pace() -> Pace {
        Pace::new(Timing::default(), ZERO, 0)
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn agents_do_not_report_at_once() {
        let mut late = Pace::new(Timing::default(), ZERO, u64::MAX);
        late.arrived(seconds(10));
        assert!(late.due() > seconds(14) && late.due() <= seconds(15), "{late:?}");
        let mut soon = pace();
        soon.arrived(seconds(10));
        assert_eq!(soon.due(), seconds(10));
    }

    #[test]
    fn what_is_taken_makes_the_next_larger_and_what_is_not_smaller() {
        let mut pace = pace();
        let mut sizes = Vec::new();
        for _ in 0..5 {
            sizes.push(pace.reports());
            pace.taken(ZERO, pace.reports(), ZERO, 0);
        }
        assert_eq!((sizes, pace.due()), (vec![2, 4, 8, 16, 16], seconds(2)));
        pace.put_off(ZERO, None, 0);
        assert_eq!(pace.reports(), 8);
        pace.taken(ZERO, 3, ZERO, 0);
        assert_eq!(pace.reports(), 8, "no larger by one that was not full");
        (0..9).for_each(|_| pace.put_off(ZERO, None, 0));
        assert_eq!(pace.reports(), 2);
        // The collector is slow: so much time is others'.
        pace.taken(ZERO, 2, seconds(9), u64::MAX);
        assert!(pace.due() > seconds(17) && pace.due() <= seconds(18), "{pace:?}");
    }

    #[test]
    fn waits_double_up_to_a_bound_and_no_shorter_than_told() {
        let mut pace = pace();
        let mut waits = Vec::new();
        for _ in 0..9 {
            pace.put_off(ZERO, None, u64::MAX);
            waits.push(pace.due().as_secs_f64().round() as u64);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        pace.taken(ZERO, 1, ZERO, 0);
        pace.put_off(ZERO, Some(seconds(5)), 0);
        assert_eq!(pace.due(), seconds(5));
        pace.put_off(ZERO, Some(seconds(5)), u64::MAX);
        assert!(pace.due() > seconds(7) && pace.due() < seconds(8), "{pace:?}");
        pace.put_off(ZERO, Some(seconds(1_000_000)), 0);
        assert_eq!(pace.due(), seconds(60), "nobody is silenced for ever");
    }

    #[test]
    fn of_several_that_are_refused_each_goes_alone() {
        let mut pace = pace();
        (0..3).for_each(|_| pace.taken(ZERO, pace.reports(), ZERO, 0));
        assert!(!pace.refused(ZERO, 3, 0));
        assert_eq!(pace.reports(), 1);
        pace.taken(ZERO, 1, ZERO, 0);
        assert!(pace.refused(ZERO, 1, 0));
        assert_eq!(pace.reports(), 1);
        pace.put_off(ZERO, None, 0);
        assert_eq!(pace.reports(), 1);
        pace.taken(ZERO, 1, ZERO, 0);
        assert_eq!(pace.reports(), 8);
    }

    proptest! {
        /// Whatever the collector says: never more than may be sent, never sooner than it asks, never later than the bound.
        #[test]
        fn due_is_in_bounds(steps in prop::collection::vec((0u8..4, 0u64..200, any::<u64>()), 0..100)) {
            let timing = Timing::default();
            let mut pace = Pace::new(timing, ZERO, 7);
            let mut now = ZERO;
            for (step, number, random) in steps {
                now = now.max(pace.due());
                match step {
                    0 => pace.taken(now, pace.reports(), Duration::from_secs(number), random),
                    1 => { pace.refused(now, number as usize % 20, random); }
                    2 => pace.put_off(now, None, random),
                    _ => {
                        pace.put_off(now, Some(Duration::from_secs(number)), random);
                        prop_assert!(pace.due() >= now + Duration::from_secs(number).min(timing.longest));
                    }
                }
                prop_assert!(pace.due() > now && pace.due() <= now + 2 * timing.longest);
                prop_assert!((1..=timing.reports).contains(&pace.reports()));
            }
        }
    }
}
