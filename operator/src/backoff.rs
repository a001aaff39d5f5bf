//! When failed writes are tried again.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

/// A failed write is tried again after this, doubling up to [`CAP`].
const FIRST: Duration = Duration::from_millis(250);
/// See [`FIRST`].
const CAP: Duration = Duration::from_secs(5);
/// A write that failed this often is told to people.
const LASTING: u32 = 3;

/// Failed writes by what they are of. Each waits for itself: whatever else changes goes on at once, and wakes nothing
/// that waits.
#[derive(Default)]
pub struct Backoff(HashMap<String, Failure>);

struct Failure {
    times: u32,
    again: Duration,
    error: String,
}

impl Backoff {
    /// Whether a write must wait. `now` never goes back.
    pub fn waits(&self, key: &str, now: Duration) -> bool {
        self.0.get(key).is_some_and(|failure| now < failure.again)
    }

    /// A write failed.
    pub fn failed(&mut self, key: String, error: String, now: Duration) {
        let times = self.0.get(&key).map_or(0, |failure| failure.times).saturating_add(1);
        let delay = FIRST.saturating_mul(1 << (times - 1).min(16)).min(CAP);
        self.0.insert(key, Failure { times, again: now + delay, error });
    }

    /// What to tell about a write that fails again and again.
    pub fn told(&self, key: &str) -> Option<String> {
        self.0.get(key).filter(|failure| failure.times >= LASTING).map(|failure| failure.error.clone())
    }

    /// Forgets all writes but these: they succeeded, or nobody wants them any more.
    pub fn keep(&mut self, keys: &BTreeSet<String>) {
        self.0.retain(|key, _| keys.contains(key));
    }

    /// How long until the next write may be tried again.
    pub fn next(&self, now: Duration) -> Option<Duration> {
        self.0.values().map(|failure| failure.again.saturating_sub(now)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn each_waits_for_itself_longer_each_time() {
        let mut backoff = Backoff::default();
        backoff.failed("a".into(), "no".into(), at(0));
        assert!(backoff.waits("a", at(249)) && !backoff.waits("a", at(250)) && !backoff.waits("b", at(0)));
        backoff.failed("a".into(), "no".into(), at(1_000));
        assert!(backoff.waits("a", at(1_499)) && !backoff.waits("a", at(1_500)));
        assert_eq!(backoff.next(at(1_100)), Some(at(400)));
        for _ in 0..100 {
            backoff.failed("a".into(), "no".into(), at(0));
        }
        assert_eq!(backoff.next(at(0)), Some(CAP));
    }

    #[test]
    fn what_lasts_is_told_and_what_succeeds_is_forgotten() {
        let mut backoff = Backoff::default();
        for time in 0..3 {
            assert_eq!(backoff.told("a"), None, "{time}");
            backoff.failed("a".into(), "no room".into(), at(0));
        }
        assert_eq!(backoff.told("a").as_deref(), Some("no room"));
        backoff.keep(&BTreeSet::new());
        assert_eq!((backoff.told("a"), backoff.next(at(0))), (None, None));
    }
}
