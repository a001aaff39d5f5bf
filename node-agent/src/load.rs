//! What pods and accounts take of this node, by the flows and the bitmaps of ports themselves. What the programs count is held
//! against it now and then: a count that is wrong would refuse flows, or let too many pass, for ever. Pure.

use aegis_common::{
    AddressValue, AllocationValue, BlockKey, FlowKey, ForwardValue, LOAD_IDLE, LoadFix, LoadKey, LoadValue,
    count, error,
};
use std::collections::{BTreeMap, HashMap};

/// In place of an account: all together, in `ALL_LOADS`.
pub const ALL: LoadKey = LoadKey::account(0);

/// What a scan has found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    pods: HashMap<LoadKey, u32>,
    /// Of other nodes' pods, by index of the allocation.
    guests: BTreeMap<u32, u32>,
    /// Bitmaps, by egress address.
    blocks: HashMap<u32, u32>,
}

/// Flows of an allocation on this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// All.
    pub flows: u64,
    /// Those of the pod of this node that has most.
    pub busiest_pod: u32,
}

impl Found {
    /// Counts one flow.
    pub fn add_flow(&mut self, key: &FlowKey, flow: &ForwardValue) {
        let allocation = u32::from(flow.allocation);
        let flows = if flow.is_guest(key) {
            self.guests.entry(allocation).or_default()
        } else {
            self.pods.entry(LoadKey::pod(key.local, flow.incarnation, allocation)).or_default()
        };
        *flows += 1;
    }

    /// Counts one bitmap.
    pub fn add_block(&mut self, key: &BlockKey) {
        *self.blocks.entry(key.egress).or_default() += 1;
    }

    /// Flows by index of the allocation.
    pub fn taken(&self) -> BTreeMap<u32, Taken> {
        let mut taken: BTreeMap<u32, Taken> = BTreeMap::new();
        for (key, flows) in &self.pods {
            let entry = taken.entry(key.allocation).or_default();
            entry.flows += u64::from(*flows);
            entry.busiest_pod = entry.busiest_pod.max(*flows);
        }
        for (allocation, flows) in &self.guests {
            taken.entry(*allocation).or_default().flows += u64::from(*flows);
        }
        taken
    }

    /// Flows and bitmaps that each entry should count, by what the entries of allocations and addresses (by their raw form) say
    /// about whose they are.
    pub fn counts(
        &self,
        allocations: &BTreeMap<u32, AllocationValue>,
        addresses: &BTreeMap<u32, AddressValue>,
    ) -> BTreeMap<LoadKey, (u32, u32)> {
        let account = |allocation: u32| {
            let account = allocations.get(&allocation).map(|allocation| allocation.account);
            account.filter(|account| *account != 0).map(LoadKey::account)
        };
        let mut counts: BTreeMap<LoadKey, (u32, u32)> = BTreeMap::new();
        let mut add = |key: LoadKey, flows: u32, blocks: u32| {
            let entry = counts.entry(key).or_default();
            *entry = (entry.0 + flows, entry.1 + blocks);
        };
        for (key, flows) in &self.pods {
            add(*key, *flows, 0);
        }
        let pods = self.pods.iter().map(|(key, flows)| (key.allocation, *flows));
        for (allocation, flows) in
            pods.chain(self.guests.iter().map(|(allocation, flows)| (*allocation, *flows)))
        {
            add(ALL, flows, 0);
            account(allocation).into_iter().for_each(|account| add(account, flows, 0));
        }
        for (egress, blocks) in &self.blocks {
            add(ALL, 0, *blocks);
            let owner = addresses.get(egress).and_then(|address| account(address.allocation.checked_sub(1)?));
            owner.into_iter().for_each(|account| add(account, 0, *blocks));
        }
        counts
    }
}

/// What is to be set right in the counts, and which entries may not be needed any more, from looks at `LOADS` (and [`ALL`]) before
/// and after a scan. `now` is in seconds since boot.
pub fn fixes(
    before: &HashMap<LoadKey, LoadValue>,
    found: &BTreeMap<LoadKey, (u32, u32)>,
    after: &HashMap<LoadKey, LoadValue>,
    now: u32,
) -> Vec<LoadFix> {
    let cell = |look: &HashMap<LoadKey, LoadValue>, key: &LoadKey| look.get(key).copied().unwrap_or_default();
    let missing = found.keys().filter(|key| !after.contains_key(*key));
    let fixes = after.keys().chain(missing).filter_map(|key| {
        let (before, after) = (cell(before, key), cell(after, key));
        let (flows, blocks) = found.get(key).copied().unwrap_or_default();
        let fix = LoadFix {
            key: *key,
            flows: error(before.flows, after.flows, flows),
            blocks: error(before.blocks, after.blocks, blocks),
        };
        let empty = (count(after.flows), count(after.blocks)) == (0, 0) && *key != ALL;
        let idle = empty && now.saturating_sub((after.opened >> 32) as u32) > LOAD_IDLE;
        ((fix.flows, fix.blocks) != (0, 0) || idle).then_some(fix)
    });
    fixes.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_common::{LESS, MORE};

    const OWN: u32 = 0x0a00_0001;
    const EGRESS: u32 = 0xc000_0201;

    fn scan() -> (Found, BTreeMap<u32, AllocationValue>, BTreeMap<u32, AddressValue>) {
        let mut found = Found::default();
        let key = |local, local_port| FlowKey { local, local_port, ..FlowKey::default() };
        let flow = |egress, peer, incarnation, allocation| ForwardValue {
            egress,
            peer,
            incarnation,
            allocation,
            ..ForwardValue::default()
        };
        for port in 0..5 {
            found.add_flow(&key(OWN, port), &flow(EGRESS, 0, 7, 0));
        }
        found.add_flow(&key(OWN, 9), &flow(EGRESS, 0, 8, 0));
        // Through a gateway, and as one.
        found.add_flow(&key(OWN, 10), &flow(OWN, 2, 7, 1));
        found.add_flow(&key(OWN + 9, 11), &flow(EGRESS, 3, 0, 1));
        // Of an allocation whose account is not known.
        found.add_flow(&key(OWN, 12), &flow(EGRESS, 0, 7, 2));
        found.add_block(&BlockKey { egress: EGRESS, ..BlockKey::default() });
        found.add_block(&BlockKey { egress: EGRESS, block: 1, ..BlockKey::default() });
        found.add_block(&BlockKey { egress: EGRESS + 1, ..BlockKey::default() });
        let of = |account| AllocationValue { account, ..AllocationValue::default() };
        let allocations = [(0, of(70)), (1, of(70)), (2, of(0))].into();
        let addresses = [(EGRESS, AddressValue { index: 0, allocation: 1 })].into();
        (found, allocations, addresses)
    }

    #[test]
    fn flows_count_for_their_pod_their_account_and_all() {
        let (found, allocations, addresses) = scan();
        let pod = |incarnation, allocation| LoadKey::pod(OWN, incarnation, allocation);
        let expected = [
            (ALL, (9, 3)),
            (LoadKey::account(70), (8, 2)),
            (pod(7, 0), (5, 0)),
            (pod(8, 0), (1, 0)),
            (pod(7, 1), (1, 0)),
            (pod(7, 2), (1, 0)),
        ];
        assert_eq!(found.counts(&allocations, &addresses), expected.into());
        let taken = |flows, busiest_pod| Taken { flows, busiest_pod };
        assert_eq!(found.taken(), [(0, taken(6, 5)), (1, taken(2, 1)), (2, taken(1, 1))].into());
    }

    #[test]
    fn what_changes_do_not_explain_is_set_right_and_what_is_idle_is_looked_at() {
        let now = 1000;
        let entry = |key: LoadKey, ups: u64, downs: u64, second: u32| {
            let flows = MORE.wrapping_mul(ups).wrapping_add(LESS.wrapping_mul(downs));
            (key, LoadValue { key, flows, opened: u64::from(second) << 32, ..LoadValue::default() })
        };
        let key = |incarnation| LoadKey::pod(OWN, incarnation, 0);
        let before =
            [entry(key(1), 5, 0, 0), entry(key(2), 5, 0, 0), entry(key(3), 9, 9, 0), entry(key(4), 9, 9, 0)]
                .into();
        let after = [
            entry(key(1), 8, 1, now),
            entry(key(2), 5, 0, now),
            entry(key(3), 9, 9, 0),
            entry(key(4), 9, 9, now - 5),
        ]
        .into();
        let found = [(key(1), (4, 0)), (key(2), (3, 0)), (key(5), (2, 0))].into();
        let mut fixes = fixes(&before, &found, &after, now);
        fixes.sort_by_key(|fix| fix.key);
        let fix = |incarnation, flows| LoadFix { key: key(incarnation), flows, blocks: 0 };
        // The first may be right; the third counts nothing and has had nothing for long; the last is not counted at all.
        assert_eq!(fixes, [fix(2, 2), fix(3, 0), fix(5, -2)]);
    }
}
