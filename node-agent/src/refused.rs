//! Connections that were refused, when nothing covers them any more.
//!
//! A flow's first packet decides. One that was covered and then refused stays covered in conntrack, and each further packet
//! of a sender that does not give up (syslog, metrics) keeps the entry alive: refused for ever, though its binding is gone.
//! So whenever the policy has changed, conntrack forgets what is marked and has no flow; the next packet is judged anew.

use crate::conntrack;
use crate::desired::Policy;
use crate::flows::Flows;
use crate::sweep;
use aegis_common::{Flow6Key, Flow6Value, FlowKey, ForwardValue, PodValue, SuffixValue, single_flow};
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Shortest time between two looks, which go through all of conntrack.
const PAUSE: Duration = Duration::from_secs(5);

/// Whether something that was covered may not be any more.
pub fn may_uncover(before: &Policy, after: &Policy) -> bool {
    let same_rules = before.verdicts == after.verdicts
        && before.destinations == after.destinations
        && before.ports == after.ports;
    let changed = |pod: &PodValue, now: Option<&PodValue>| {
        now.is_some_and(|now| now.incarnation == pod.incarnation && now.class != pod.class)
    };
    let class_changed = before.pods.iter().any(|(address, pod)| changed(pod, after.pods.get(address)))
        || before.pods6.iter().any(|(address, pod)| changed(pod, after.pods6.get(address)));
    !same_rules || class_changed
}

/// What says which flows there are over IPv6.
#[derive(Clone, Copy, Debug)]
pub struct Six<'a> {
    /// `FLOWS6`.
    pub flows: BorrowedFd<'a>,
    /// `SUFFIXES`, for those that leave from single addresses, which are in `FORWARD` too.
    pub suffixes: BorrowedFd<'a>,
    /// The data plane's secret.
    pub seed: u32,
}

impl Six<'_> {
    /// Keys in `FORWARD` that these would have if they left from single addresses.
    fn singles(&self, connections: &HashSet<Flow6Key>) -> io::Result<HashMap<FlowKey, Flow6Key>> {
        let mut suffixes = HashMap::new();
        sweep::for_each(self.suffixes, |suffix: &u32, pod: &SuffixValue| {
            suffixes.insert(pod.address, *suffix);
        })?;
        let key = |flow: &Flow6Key| {
            let suffix = *suffixes.get(&flow.local)?;
            Some((single_flow(flow, suffix, self.seed), *flow))
        };
        Ok(connections.iter().filter_map(key).collect())
    }
}

/// Forgets connections with this mark of which there is no flow. Gives how many there were.
pub fn forget(forward: &Flows<ForwardValue>, six: Six<'_>, mark: u32) -> io::Result<usize> {
    // In this order: a flow is entered a moment after conntrack has its first packet.
    let mut connections = conntrack::marked(mark)?;
    let v4 = connections.iter().filter(|connection| connection.flow6.is_none());
    let mut without: HashSet<FlowKey> = v4.map(|connection| connection.flow).collect();
    if !without.is_empty() {
        forward.for_each(|key, _| _ = without.remove(key));
    }
    let mut without6: HashSet<Flow6Key> = connections.iter().filter_map(|it| it.flow6).collect();
    if !without6.is_empty() {
        sweep::for_each(six.flows, |key: &Flow6Key, _: &Flow6Value| _ = without6.remove(key))?;
        let singles = six.singles(&without6)?;
        forward.for_each(|key, _| {
            if let Some(flow) = singles.get(key) {
                without6.remove(flow);
            }
        });
    }
    connections.retain(|connection| match &connection.flow6 {
        Some(flow) => without6.contains(flow),
        None => without.contains(&connection.flow),
    });
    conntrack::remove(&connections)
}

/// When to look.
#[derive(Debug, Default)]
pub struct Schedule {
    due: bool,
    last: Option<Instant>,
}

impl Schedule {
    /// There is a reason to look.
    pub fn request(&mut self) {
        self.due = true;
    }

    /// True once for each time that it is to be done.
    pub fn take(&mut self, now: Instant) -> bool {
        let rested = self.last.is_none_or(|last| now.saturating_duration_since(last) >= PAUSE);
        let look = self.due && rested;
        if look {
            (self.due, self.last) = (false, Some(now));
        }
        look
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn pods_that_come_or_go_uncover_nothing() {
        let policy = |pods: &[(u8, u32, u32)]| Policy {
            pods: pods
                .iter()
                .map(|(last, class, incarnation)| {
                    let value = PodValue { class: *class, incarnation: *incarnation, ..PodValue::default() };
                    (Ipv4Addr::new(10, 244, 1, *last), value)
                })
                .collect(),
            ..Policy::default()
        };
        let before = policy(&[(2, 1, 7), (3, 1, 8)]);
        assert!(!may_uncover(&before, &before.clone()));
        assert!(!may_uncover(&before, &policy(&[(2, 1, 7), (4, 1, 9)])));
        assert!(!may_uncover(&before, &policy(&[(2, 1, 7), (3, 2, 9)])), "another pod");
        assert!(may_uncover(&before, &policy(&[(2, 0, 7), (3, 1, 8)])), "other labels");
        let mut rules = before.clone();
        rules.ports.insert((6, 443, 16), 1);
        assert!(may_uncover(&rules, &before) && may_uncover(&before, &rules));
    }

    #[test]
    fn looks_are_few_and_none_is_forgotten() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        assert!(!schedule.take(start));
        schedule.request();
        assert!(schedule.take(start) && !schedule.take(start));
        schedule.request();
        assert!(!schedule.take(start + PAUSE / 2));
        assert!(schedule.take(start + PAUSE) && !schedule.take(start + PAUSE * 3));
    }
}
