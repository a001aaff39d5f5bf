//! Decides what to do about the Lease. Time is an argument.

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use std::time::Duration;

/// How long others leave an unrenewed lease alone, counted from when they saw it change last.
const DURATION: Duration = Duration::from_secs(10);
/// How long after *sending* a renewal the leader may begin writes. What is left of [`DURATION`] is longer than a write
/// can take.
const WRITABLE: Duration = Duration::from_secs(7);
/// A leader renews no more often than this.
const RENEW: Duration = Duration::from_millis(1_500);

/// One replica.
pub struct Candidate {
    identity: String,
    /// The last change of the lease that this replica saw, and when by its own clock. Clocks of different machines
    /// are never compared.
    seen: Option<(LeaseSpec, Duration)>,
    /// When this replica sent its last successful renewal.
    renewed: Option<Duration>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Write this over what was read, or create it where nothing was.
    Write(LeaseSpec),
    /// Nothing for now.
    Wait,
}

impl Candidate {
    /// A replica of this name.
    pub fn new(identity: &str) -> Candidate {
        Candidate { identity: identity.to_owned(), seen: None, renewed: None }
    }

    /// Judges the lease as it was just read. `now` is monotonic; `clock` is only written down for people to read.
    pub fn step(&mut self, lease: Option<&Lease>, now: Duration, clock: Timestamp) -> Step {
        let Some(lease) = lease else { return Step::Write(self.spec(None, clock)) };
        let spec = lease.spec.clone().unwrap_or_default();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != spec) {
            self.seen = Some((spec.clone(), now));
        }
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder == self.identity {
            let due = self.renewed.is_none_or(|renewed| now >= renewed + RENEW);
            return if due { Step::Write(self.spec(Some(&spec), clock)) } else { Step::Wait };
        }
        self.renewed = None;
        let seen = self.seen.as_ref().map_or(now, |(_, seen)| *seen);
        let lasts = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let lasts = lasts.map_or(DURATION, Duration::from_secs);
        if holder.is_empty() || now >= seen + lasts {
            Step::Write(self.spec(Some(&spec), clock))
        } else {
            Step::Wait
        }
    }

    /// A write that was sent at `sent` succeeded: this replica leads. Returns until when it may begin writes.
    pub fn wrote(&mut self, sent: Duration) -> Duration {
        self.renewed = Some(sent);
        sent + WRITABLE
    }

    /// The lease without a holder, if it is this replica's.
    pub fn release(&mut self, lease: &Lease, clock: Timestamp) -> Option<LeaseSpec> {
        self.renewed = None;
        let spec = lease.spec.as_ref()?;
        (spec.holder_identity.as_deref() == Some(self.identity.as_str())).then(|| LeaseSpec {
            holder_identity: None,
            renew_time: Some(MicroTime(clock)),
            ..spec.clone()
        })
    }

    fn spec(&self, before: Option<&LeaseSpec>, clock: Timestamp) -> LeaseSpec {
        let kept = before.filter(|spec| spec.holder_identity.as_ref() == Some(&self.identity));
        let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or_default();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: kept.and_then(|spec| spec.acquire_time.clone()).or(Some(MicroTime(clock))),
            renew_time: Some(MicroTime(clock)),
            lease_transitions: Some(if kept.is_some() { transitions } else { transitions.saturating_add(1) }),
            ..LeaseSpec::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::CALL_TIMEOUT;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn clock(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn lease(spec: LeaseSpec) -> Lease {
        Lease { spec: Some(spec), ..Lease::default() }
    }

    fn write(step: Step) -> LeaseSpec {
        match step {
            Step::Write(spec) => spec,
            Step::Wait => panic!("waits"),
        }
    }

    #[test]
    fn takes_a_missing_lease_and_renews_it() {
        let mut a = Candidate::new("a");
        let spec = write(a.step(None, at(0.0), clock(0)));
        assert_eq!(spec.holder_identity.as_deref(), Some("a"));
        assert_eq!(a.wrote(at(0.0)), at(7.0));
        assert_eq!(a.step(Some(&lease(spec.clone())), at(1.0), clock(1)), Step::Wait);
        let renewed = write(a.step(Some(&lease(spec.clone())), at(2.0), clock(2)));
        assert_eq!(renewed.acquire_time, spec.acquire_time);
        assert_eq!(renewed.lease_transitions, spec.lease_transitions);
        assert_ne!(renewed.renew_time, spec.renew_time);
    }

    #[test]
    fn leaves_a_renewed_lease_alone_and_takes_a_silent_one() {
        let mut a = Candidate::new("a");
        let mut b = Candidate::new("b");
        let first = write(a.step(None, at(0.0), clock(0)));
        assert_eq!(b.step(Some(&lease(first.clone())), at(5.0), clock(0)), Step::Wait);
        let second = write(a.step(Some(&lease(first)), at(8.0), clock(8)));
        assert_eq!(
            b.step(Some(&lease(second.clone())), at(15.5), clock(8)),
            Step::Wait,
            "seen to change at 15.5"
        );
        assert_eq!(b.step(Some(&lease(second.clone())), at(25.4), clock(8)), Step::Wait);
        let taken = write(b.step(Some(&lease(second)), at(25.5), clock(8)));
        assert_eq!(taken.holder_identity.as_deref(), Some("b"));
        assert_eq!(taken.lease_transitions, Some(2));
    }

    #[test]
    fn clocks_of_other_machines_do_not_matter() {
        let mut b = Candidate::new("b");
        let past = write(Candidate::new("a").step(None, at(0.0), clock(-100_000)));
        assert_eq!(b.step(Some(&lease(past)), at(100.0), clock(0)), Step::Wait);
    }

    #[test]
    fn takes_a_released_lease_at_once() {
        let mut a = Candidate::new("a");
        let held = lease(write(a.step(None, at(0.0), clock(0))));
        a.wrote(at(0.0));
        assert!(Candidate::new("b").release(&held, clock(1)).is_none(), "not b's to release");
        let released = lease(a.release(&held, clock(1)).unwrap());
        let taken = write(Candidate::new("b").step(Some(&released), at(0.0), clock(1)));
        assert_eq!(taken.holder_identity.as_deref(), Some("b"));
    }

    #[test]
    fn renews_what_it_finds_in_its_own_name() {
        let held = lease(write(Candidate::new("a").step(None, at(0.0), clock(0))));
        write(Candidate::new("a").step(Some(&held), at(0.0), clock(1)));
    }

    /// The leader's last write ends before another replica may make its first, even if both saw the renewal at once.
    #[test]
    fn writes_of_two_leaders_never_overlap() {
        let mut a = Candidate::new("a");
        let mut b = Candidate::new("b");
        let spec = lease(write(a.step(None, at(0.0), clock(0))));
        let last_write_ends = a.wrote(at(0.0)) + CALL_TIMEOUT;
        b.step(Some(&spec), at(0.0), clock(0));
        assert_eq!(b.step(Some(&spec), last_write_ends, clock(0)), Step::Wait);
    }
}
