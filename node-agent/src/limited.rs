//! What limits have refused during the last minute, and whom most. Pure: time is passed in.

use crate::demand::Minute;
use aegis_common::LimitedValue;
use aegis_core::model::AllocationName;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// A pod of this node, as the programs know it: by its address and incarnation.
pub type PodId = (Ipv4Addr, u32);

/// What the programs have counted of an allocation since they were loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// New flows that were refused, by limit.
    pub limits: LimitedValue,
    /// The same by pod.
    pub pods: BTreeMap<PodId, u64>,
}

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
    /// The pod of this node whose flows they were for the most part.
    pub pod: Option<PodId>,
}

/// A count that only rises, and what of it is of the last minute.
#[derive(Clone, Copy, Debug)]
struct Rising {
    last: u64,
    minute: Minute,
}

impl Rising {
    fn from(count: u64) -> Rising {
        Rising { last: count, minute: Minute::default() }
    }

    fn look(&mut self, count: u64, now: u64) -> u64 {
        self.minute.add(now, count.saturating_sub(self.last));
        self.last = count;
        self.minute.sum(now)
    }
}

/// The counts of one allocation.
#[derive(Clone, Debug)]
struct Seen {
    limits: [Rising; 4],
    pods: BTreeMap<PodId, Rising>,
    /// Whom the last look named.
    named: Option<PodId>,
}

impl Seen {
    /// The pod with the most refusals. Of two that are much alike it stays with the one that it named before.
    fn name(&mut self, counts: &BTreeMap<PodId, u64>, now: u64) -> Option<PodId> {
        self.pods.retain(|pod, _| counts.contains_key(pod));
        let mut refused = BTreeMap::new();
        for (pod, count) in counts {
            // A pod whose entry is new had been refused nothing before.
            let of_minute = self.pods.entry(*pod).or_insert(Rising::from(0)).look(*count, now);
            refused.insert(*pod, of_minute);
        }
        let most = refused.iter().rev().max_by_key(|(_, count)| **count).filter(|(_, count)| **count > 0);
        let still = self.named.filter(|pod| {
            let own = refused.get(pod).copied().unwrap_or_default();
            own > 0 && most.is_some_and(|(_, most)| own * 2 >= *most)
        });
        self.named = still.or(most.map(|(pod, _)| *pod));
        self.named
    }
}

/// Remembers what was counted before.
#[derive(Clone, Debug, Default)]
pub struct Memory(BTreeMap<AllocationName, Seen>);

impl Memory {
    /// Notes what the programs have counted until now; gives what of it is of the last minute. `now` is in seconds of any steady
    /// clock.
    pub fn look(
        &mut self,
        counts: &BTreeMap<AllocationName, Counted>,
        now: u64,
    ) -> BTreeMap<AllocationName, Refusals> {
        self.0.retain(|name, _| counts.contains_key(name));
        let mut refusals = BTreeMap::new();
        for (name, counted) in counts {
            let limits = &counted.limits;
            let count = [limits.pod_flows, limits.pod_rate, limits.account_flows, limits.account_rate];
            // What happened before the agent looked first is no news.
            let seen = self.0.entry(name.clone()).or_insert_with(|| Seen {
                limits: count.map(Rising::from),
                pods: counted.pods.iter().map(|(pod, count)| (*pod, Rising::from(*count))).collect(),
                named: None,
            });
            let mut minute = [0; 4];
            for ((minute, rising), count) in minute.iter_mut().zip(&mut seen.limits).zip(count) {
                *minute = u32::try_from(rising.look(count, now)).unwrap_or(u32::MAX);
            }
            let pod = seen.name(&counted.pods, now);
            let [pod_flows, pod_rate, account_flows, account_rate] = minute;
            if minute != [0; 4] {
                let refused = Refusals { pod_flows, pod_rate, account_flows, account_rate, pod };
                refusals.insert(name.clone(), refused);
            }
        }
        refusals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> AllocationName {
        AllocationName { account: "shop".into(), name: "main".into() }
    }

    fn pod(last: u8) -> PodId {
        (Ipv4Addr::new(10, 0, 0, last), 7)
    }

    #[test]
    fn refusals_are_told_for_a_minute() {
        let counted = |pod_flows, account_rate| {
            let limits = LimitedValue { pod_flows, account_rate, ..LimitedValue::default() };
            [(name(), Counted { limits, pods: [(pod(1), pod_flows)].into() })].into()
        };
        let told = |pod_flows, account_rate, pod| {
            [(name(), Refusals { pod_flows, account_rate, pod, ..Refusals::default() })].into()
        };
        let mut memory = Memory::default();
        assert!(memory.look(&counted(7, 0), 0).is_empty(), "from before");
        assert_eq!(memory.look(&counted(7, 1), 1), told(0, 1, None), "of another node's pod");
        assert_eq!(memory.look(&counted(9, 1), 5), told(2, 1, Some(pod(1))));
        assert_eq!(memory.look(&counted(10, 1), 30), told(3, 1, Some(pod(1))));
        assert_eq!(memory.look(&counted(10, 1), 59), told(3, 1, Some(pod(1))));
        assert_eq!(memory.look(&counted(10, 1), 75), told(1, 0, Some(pod(1))));
        assert!(memory.look(&counted(10, 1), 100).is_empty());
    }

    #[test]
    fn the_pod_is_named_that_is_refused_most_and_it_does_not_change_with_each_look() {
        let mut memory = Memory::default();
        let mut named = |now, counts: &[(u8, u64)]| {
            let pods: BTreeMap<PodId, u64> =
                counts.iter().map(|(last, count)| (pod(*last), *count)).collect();
            let limits = LimitedValue { pod_flows: pods.values().sum(), ..LimitedValue::default() };
            let refusals = memory.look(&[(name(), Counted { limits, pods })].into(), now);
            refusals.get(&name()).and_then(|refusals| refusals.pod)
        };
        assert_eq!(named(0, &[(1, 500)]), None);
        assert_eq!(named(1, &[(1, 500), (2, 10), (3, 10)]), Some(pod(2)), "of equal ones the first");
        assert_eq!(named(2, &[(1, 500), (2, 10), (3, 20)]), Some(pod(2)), "not much more");
        assert_eq!(named(3, &[(1, 500), (2, 10), (3, 21)]), Some(pod(3)));
        assert_eq!(named(4, &[(1, 500), (2, 22), (3, 21)]), Some(pod(3)));
        assert_eq!(named(5, &[(1, 500), (2, 22)]), Some(pod(2)), "the other is gone");
        assert_eq!(named(90, &[(1, 501), (2, 22)]), Some(pod(1)), "the other is calm");
    }
}
