//! What a scan of the flows proves: it counts for what was written a while before it began, since by then no packet is
//! under way that met anything older.

use crate::observed::Observed;
use crate::ops::{Named, Op};
use crate::singles;
use crate::sweep::Usage;
use aegis_core::egress::Egress;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// No packet is under way in the programs for longer.
const SETTLED: Duration = Duration::from_secs(1);

/// Remembers when things were written.
#[derive(Debug)]
pub(super) struct Settled {
    /// When the right to open flows from an address changed last.
    held: BTreeMap<Egress, Instant>,
    /// When something ceased to be what new flows may name.
    ended: Instant,
    /// When a slice changed hands last.
    owned: Instant,
}

impl Settled {
    /// Nothing is known of the time before `now`.
    pub fn new(now: Instant) -> Settled {
        Settled { held: BTreeMap::new(), ended: now, owned: now }
    }

    /// These maps have been read.
    pub fn read(&mut self, observed: &Observed, now: Instant) {
        let v4 = observed.holdings.keys().chain(observed.addresses.keys());
        let known: BTreeSet<Egress> =
            v4.map(|own| Egress::from(*own)).chain(observed.networks.keys().copied()).collect();
        known.iter().for_each(|own| _ = self.held.entry(*own).or_insert(now));
        self.held.retain(|own, _| known.contains(own));
    }

    /// These writes have just been made, or tried.
    pub fn wrote(&mut self, ops: &[Op], now: Instant) {
        for op in ops {
            match op {
                Op::SetHolding { address, .. } => _ = self.held.insert((*address).into(), now),
                Op::SetNetwork { network, .. } => _ = self.held.insert(*network, now),
                _ => {}
            }
            if let Op::SetSlot { .. } = op {
                self.owned = now;
            }
            if op.ends_a_way() {
                self.ended = now;
            }
        }
    }

    /// Whether the scan shows every flow that an address has by its present holding.
    pub fn address(&self, address: impl Into<Egress>, usage: &Usage) -> bool {
        let own = address.into();
        // By its key.
        let own = singles::key(own).map_or(own, Egress::V4);
        self.held.get(&own).is_some_and(|since| after(usage, *since))
    }

    /// Whether the scan judged by the slices that this node owns at present.
    pub fn slices(&self, usage: &Usage) -> bool {
        after(usage, self.owned)
    }

    /// What flows name, if the scan shows all of it.
    pub fn named(&self, usage: &Usage) -> Option<Named> {
        after(usage, self.ended).then(|| usage.named.clone())
    }
}

fn after(usage: &Usage, time: Instant) -> bool {
    let age = usage.started.and_then(|scan| scan.checked_duration_since(time));
    age.is_some_and(|age| age >= SETTLED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_common::{AddressValue, AllocationValue, NetworkValue};
    use std::net::Ipv4Addr;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

    fn scan(start: Instant, seconds: u64) -> Usage {
        Usage { started: Some(start + Duration::from_secs(seconds)), ..Usage::default() }
    }

    #[test]
    fn a_scan_counts_only_for_what_was_written_before() {
        let start = Instant::now();
        let mut settled = Settled::new(start);
        assert_eq!(settled.named(&Usage::default()), None, "there was none yet");
        assert_eq!(settled.named(&scan(start, 0)), None);
        assert!(settled.named(&scan(start, 1)).is_some());
        let op = Op::SetAllocation { index: 0, value: AllocationValue::default() };
        settled.wrote(&[op], start + Duration::from_secs(5));
        assert_eq!(settled.named(&scan(start, 5)), None);
        assert!(settled.named(&scan(start, 6)).is_some());
    }

    #[test]
    fn an_address_without_holding_has_a_time_too() {
        let start = Instant::now();
        let mut settled = Settled::new(start);
        assert!(!settled.address(ADDRESS, &scan(start, 9)));
        let mut observed = Observed::default();
        observed.addresses.insert(ADDRESS, AddressValue::default());
        settled.read(&observed, start);
        settled.read(&observed, start + Duration::from_secs(9));
        assert!(settled.address(ADDRESS, &scan(start, 9)), "what a crash has left is not kept for ever");
        // The same with a /64.
        let network: Egress = "2001:db8:1:2::/64".parse().unwrap();
        let op = Op::SetNetwork { network, value: NetworkValue::default() };
        settled.wrote(std::slice::from_ref(&op), start + Duration::from_secs(9));
        assert!(!settled.address(network, &scan(start, 9)) && settled.address(network, &scan(start, 10)));
    }
}
