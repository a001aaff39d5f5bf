//! Ports that rest, where an allocation says how many may: of more, those that have rested longest are used again early.

use crate::ebpf::SweepProgram;
use aegis_common::{ANY_NUMBER, AllocationValue, FlowKey, ForwardValue, SWEEP_BATCH};
use std::collections::BTreeMap;
use std::io;

/// Flows of which nothing but the rest of their ports is left, by index of their allocation.
#[derive(Default)]
pub struct Resting {
    most: BTreeMap<u32, usize>,
    found: BTreeMap<u32, Vec<(u32, FlowKey)>>,
}

impl Resting {
    /// What is to be looked for, by the entries of allocations.
    pub fn new<'a>(allocations: impl Iterator<Item = (&'a u32, &'a AllocationValue)>) -> Resting {
        let bounded = allocations.filter(|(_, allocation)| allocation.max_resting != ANY_NUMBER);
        let most = bounded.map(|(index, allocation)| (*index, allocation.max_resting as usize));
        Resting { most: most.collect(), found: BTreeMap::new() }
    }

    /// Whether it matters which flows of an allocation rest.
    pub fn asks_for(&self, allocation: u32) -> bool {
        self.most.contains_key(&allocation)
    }

    /// A flow whose port seems to rest.
    pub fn add(&mut self, key: &FlowKey, flow: &ForwardValue) {
        self.found.entry(u32::from(flow.allocation)).or_default().push((flow.last_seen, *key));
    }

    /// After the scan: the program looks which of them do rest, and ends the oldest of what is too much.
    pub fn end(self, program: &SweepProgram) -> io::Result<()> {
        for (allocation, mut found) in self.found {
            let most = self.most.get(&allocation).copied().unwrap_or(usize::MAX);
            if found.len() <= most {
                continue;
            }
            found.sort_unstable_by_key(|(last_seen, _)| *last_seen);
            let keys: Vec<FlowKey> = found.into_iter().map(|(_, key)| key).collect();
            let rest = program.resting(&keys).map_err(io::Error::other)? as usize;
            let mut excess = rest.saturating_sub(most);
            let mut left = keys.as_slice();
            while excess > 0 && !left.is_empty() {
                // Never more at a time than may go; some of them do not rest.
                let (oldest, younger) = left.split_at(excess.min(SWEEP_BATCH).min(left.len()));
                excess = excess.saturating_sub(program.cut_short(oldest).map_err(io::Error::other)? as usize);
                left = younger;
            }
        }
        Ok(())
    }
}
