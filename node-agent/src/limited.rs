//! What limits have refused during the last minute. Pure: time is passed in.

use crate::demand::Minute;
use aegis_common::LimitedValue;
use aegis_core::model::AllocationName;
use std::collections::BTreeMap;

/// New flows of an allocation that its limits have refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// A pod had as many flows as it may.
    pub pod_flows: u32,
    /// A pod had begun as many in the second as it may.
    pub pod_rate: u32,
    /// The account had as many as it may.
    pub account_flows: u32,
    /// The account had begun as many in the second as it may.
    pub account_rate: u32,
}

/// The counts of one allocation.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    last: [u64; 4],
    minutes: [Minute; 4],
}

/// Remembers what was counted before.
#[derive(Clone, Debug, Default)]
pub struct Memory(BTreeMap<AllocationName, Seen>);

impl Memory {
    /// Notes what the programs have counted until now; gives what of it is of the last minute. `now` is in seconds of any steady
    /// clock.
    pub fn look(
        &mut self,
        counts: &BTreeMap<AllocationName, LimitedValue>,
        now: u64,
    ) -> BTreeMap<AllocationName, Refusals> {
        self.0.retain(|name, _| counts.contains_key(name));
        let mut refusals = BTreeMap::new();
        for (name, count) in counts {
            let count = [count.pod_flows, count.pod_rate, count.account_flows, count.account_rate];
            // What happened before the agent looked first is no news.
            let seen = self.0.entry(name.clone()).or_insert(Seen { last: count, ..Seen::default() });
            let mut minute = [0; 4];
            for at in 0..4 {
                seen.minutes[at].add(now, count[at].saturating_sub(seen.last[at]));
                minute[at] = u32::try_from(seen.minutes[at].sum(now)).unwrap_or(u32::MAX);
            }
            seen.last = count;
            let [pod_flows, pod_rate, account_flows, account_rate] = minute;
            if minute != [0; 4] {
                refusals.insert(name.clone(), Refusals { pod_flows, pod_rate, account_flows, account_rate });
            }
        }
        refusals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_for_a_minute() {
        let name = AllocationName { account: "shop".into(), name: "main".into() };
        let counted = |pod_flows, account_rate| {
            [(name.clone(), LimitedValue { pod_flows, account_rate, ..LimitedValue::default() })].into()
        };
        let told = |pod_flows, account_rate| {
            [(name.clone(), Refusals { pod_flows, account_rate, ..Refusals::default() })].into()
        };
        let mut memory = Memory::default();
        assert!(memory.look(&counted(7, 0), 0).is_empty(), "from before");
        assert_eq!(memory.look(&counted(9, 1), 5), told(2, 1));
        assert_eq!(memory.look(&counted(10, 1), 30), told(3, 1));
        assert_eq!(memory.look(&counted(10, 1), 59), told(3, 1));
        assert_eq!(memory.look(&counted(10, 1), 75), told(1, 0));
        assert!(memory.look(&counted(10, 1), 100).is_empty());
    }
}
