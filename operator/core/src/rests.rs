//! How long slices in quarantine have rested, by this machine's own clock.

use crate::egress::Egress;
use crate::model::{Address, Seconds, State};
use crate::slice::SliceSet;
use std::collections::BTreeMap;
use std::time::Duration;

/// The end of a rest is written down in wall-clock time, and clocks of two replicas differ: one that takes over with a
/// clock that is ahead would end rests early. So no rest ends before this replica has seen it last for the whole
/// quarantine; at worst a take-over makes one longer by that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rests(BTreeMap<(Egress, u8, i64), Duration>);

impl Rests {
    /// Takes note of what rests, and returns the slices that have not rested for long enough yet. `now` never goes back.
    pub fn observe(
        &mut self,
        addresses: &[Address],
        now: Duration,
        quarantine: Seconds,
    ) -> BTreeMap<Egress, SliceSet> {
        let quarantine = Duration::from_secs(u64::try_from(quarantine).unwrap_or(0));
        let mut seen = BTreeMap::new();
        let mut unrested: BTreeMap<Egress, SliceSet> = BTreeMap::new();
        for address in addresses {
            for holding in &address.holdings {
                let State::Quarantined { .. } = holding.state else { continue };
                for slice in holding.first..=holding.last {
                    let key = (address.address, slice, holding.epoch);
                    let since = self.0.get(&key).copied().unwrap_or(now);
                    seen.insert(key, since);
                    if now < since + quarantine {
                        unrested.entry(address.address).or_default().insert(slice);
                    }
                }
            }
        }
        self.0 = seen;
        unrested
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AllocationName, Holding};

    fn resting(first: u8, last: u8, epoch: i64) -> Address {
        Address {
            address: "203.0.113.1".parse().unwrap(),
            prefix: "p".into(),
            allocation: AllocationName { account: "a".into(), name: "x".into() },
            epoch,
            holdings: vec![Holding {
                first,
                last,
                node: "n1".into(),
                epoch,
                state: State::Quarantined { until: 0 },
            }],
            fence: None,
        }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_rest_lasts_from_when_it_was_first_seen_whatever_the_time_of_day() {
        let mut rests = Rests::default();
        let resting = [resting(4, 5, 7)];
        let expected: BTreeMap<_, _> = [(resting[0].address, SliceSet::range(4, 5))].into();
        assert_eq!(rests.observe(&resting, at(1_000), 120), expected);
        assert_eq!(rests.observe(&resting, at(1_119), 120), expected);
        assert!(rests.observe(&resting, at(1_120), 120).is_empty());
    }

    #[test]
    fn a_later_rest_of_the_same_slice_begins_anew() {
        let mut rests = Rests::default();
        rests.observe(&[resting(4, 5, 7)], at(0), 120);
        assert!(rests.observe(&[resting(4, 5, 7)], at(120), 120).is_empty());
        assert!(!rests.observe(&[resting(4, 5, 9)], at(121), 120).is_empty());
        let mut rests = Rests::default();
        assert!(!rests.observe(&[resting(4, 5, 9)], at(500), 120).is_empty(), "after a take-over");
    }
}
