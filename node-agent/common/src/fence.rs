//! Deadlines of egress addresses whose slices may be given to another node when this one has been lost for some time.

use crate::{HoldingValue, map_type};

/// Value of `LEASE` (array of one): the node's Lease, by which deadlines are counted. Times are nanoseconds of boot time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseValue {
    /// When the last renewal that succeeded was sent; 0 = every deadline has passed.
    pub renewed: u64,
    /// Until then no deadline of any address has passed: programs look an address up only later. [`NEVER`] while no
    /// address has a deadline.
    pub soonest: u64,
}
map_type!(LeaseValue, 16);

/// No deadline ever passes.
pub const NEVER: u64 = u64::MAX;

const SECOND: u64 = 1_000_000_000;

/// What may still leave from an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// Everything.
    Ahead,
    /// No new flow.
    Soft,
    /// Nothing.
    Hard,
}

/// Which deadline of an address has passed at `now`, in nanoseconds of boot time.
#[inline(always)]
pub fn passed(holding: &HoldingValue, renewed: u64, now: u64) -> Deadline {
    let after = |seconds: u32| renewed == 0 || now > renewed.saturating_add(seconds as u64 * SECOND);
    if holding.hard == 0 {
        Deadline::Ahead
    } else if after(holding.hard) {
        Deadline::Hard
    } else if after(holding.soft) {
        Deadline::Soft
    } else {
        Deadline::Ahead
    }
}

/// [`LeaseValue::soonest`] of a lease, where `seconds` is the shortest time that an address has, if any has one.
pub fn soonest(renewed: u64, seconds: Option<u32>) -> u64 {
    match seconds {
        None => NEVER,
        Some(_) if renewed == 0 => 0,
        Some(seconds) => renewed.saturating_add(u64::from(seconds) * SECOND),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_passes_to_the_nanosecond() {
        let holding = HoldingValue { soft: 45, hard: 60, ..Default::default() };
        let at = |now| passed(&holding, 1000, now);
        assert_eq!(at(1000 + 45 * SECOND), Deadline::Ahead);
        assert_eq!(at(1001 + 45 * SECOND), Deadline::Soft);
        assert_eq!(at(1000 + 60 * SECOND), Deadline::Soft);
        assert_eq!(at(1001 + 60 * SECOND), Deadline::Hard);
        assert_eq!(passed(&holding, 0, 1), Deadline::Hard, "without a lease every deadline has passed");
    }

    #[test]
    fn without_a_fence_nothing_ever_passes() {
        assert_eq!(passed(&HoldingValue::default(), 0, NEVER), Deadline::Ahead);
        assert_eq!(passed(&HoldingValue::default(), 1, NEVER), Deadline::Ahead);
    }

    #[test]
    fn the_soonest_is_no_later_than_any_deadline() {
        assert_eq!(soonest(5, None), NEVER);
        assert_eq!(soonest(5, Some(11)), 5 + 11 * SECOND);
        assert_eq!(soonest(0, Some(11)), 0);
    }
}
