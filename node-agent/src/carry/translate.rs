//! What one version's map entries mean to the next: pure.
//!
//! Whoever changes the layout of a pinned map raises `aegis_common::SCHEMA` and adds a [`Step`] here that says what becomes of
//! the entries of the version before. Maps that a step does not name keep their layout. A test compares every step's result
//! with the layouts of the programs.

use aegis_common::{ANY_NUMBER, REST};
use std::borrow::Cow;

/// One entry of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<'e> {
    /// Its key.
    pub key: Cow<'e, [u8]>,
    /// Its value.
    pub value: Cow<'e, [u8]>,
}

/// What becomes of a map's entries.
#[derive(Clone, Copy)]
pub enum Change {
    /// Fields were added at the end of the value, which has so many bytes now. All zeroes must mean what was before.
    Grown(usize),
    /// Anything else; `None` where an entry cannot be carried.
    Anew(for<'e> fn(Entry<'e>) -> Option<Entry<'e>>),
}

/// From one schema to the next.
pub struct Step {
    /// The earlier schema.
    pub from: u32,
    /// Maps whose layout has changed.
    pub changes: &'static [(&'static str, Change)],
}

/// All steps that this agent knows, in order.
pub const STEPS: &[Step] = &[
    Step { from: 4, changes: &[("HOLDINGS", Change::Grown(48))] },
    // The flows went from hashes into tables of our own, and have meters.
    // Values of `FRAGMENTS_OUT` and `FRAGMENTS_IN` have grown, too: they are hints for seconds, and not carried.
    Step {
        from: 5,
        changes: &[
            ("ALLOCATIONS", Change::Anew(allocations_of_6)),
            ("CONFIG", Change::Grown(116)),
            ("FORWARD", Change::Anew(forward_of_6)),
            ("REVERSE", Change::Anew(reverse_of_6)),
            ("VERDICTS", Change::Anew(verdicts_of_6)),
        ],
    },
    // Single IPv6 addresses, of which there were none.
    Step { from: 6, changes: &[("ALLOCATIONS", Change::Grown(184)), ("CONFIG6", Change::Grown(272))] },
];

/// Allocations say how long ports rest, and how many may: 120 s, and any number, until the agent writes what is wanted; and whose
/// they are, which only the agent knows, and limits, of which there were none. An entry that was never written stays so.
fn allocations_of_6(entry: Entry<'_>) -> Option<Entry<'_>> {
    let (timeouts, rest) = entry.value.split_at_checked(88)?;
    let (gateways, identity) = rest.split_at_checked(40).filter(|(_, identity)| identity.len() == 8)?;
    let written = entry.value.iter().any(|byte| *byte != 0);
    let (rest, most) = if written { (REST, ANY_NUMBER) } else { (0, 0) };
    let value = [timeouts, &rest.to_ne_bytes(), gateways, &most.to_ne_bytes(), identity, &[0; 32]].concat();
    Some(Entry { key: entry.key, value: value.into() })
}

/// That a pod is gone is said beside what was seen, in place of the upper half of that, and there is a meter where it was said: of
/// flows from before the one that meters the rest.
fn flows_of_6(entry: Entry<'_>, seen: usize, buried: usize) -> Option<Entry<'_>> {
    let mut value = entry.value.into_owned();
    let gone = u8::from(*value.get(buried)? != 0);
    *value.get_mut(seen + 1)? = gone;
    value.get_mut(buried..buried + 2)?.fill(0);
    Some(Entry { key: entry.key, value: value.into() })
}

fn forward_of_6(entry: Entry<'_>) -> Option<Entry<'_>> {
    flows_of_6(entry, 24, 30)
}

fn reverse_of_6(entry: Entry<'_>) -> Option<Entry<'_>> {
    flows_of_6(entry, 20, 22)
}

/// Verdicts name a second allocation. There was none, which the same one says.
fn verdicts_of_6(entry: Entry<'_>) -> Option<Entry<'_>> {
    let before = entry.value.get(..8)?;
    let value = [before, &before[2..4], &[0; 2]].concat();
    Some(Entry { key: entry.key, value: value.into() })
}

/// Schemas that differ by a multiple of this have the same layouts: see `--pin-series`.
pub const SERIES: u32 = 1000;

/// The way from one schema to another.
#[derive(Clone, Copy)]
pub struct Way {
    steps: &'static [Step],
}

impl Way {
    /// `None` if it is not known: back to an earlier version, or from one that is too old.
    pub fn between(from: u32, to: u32, known: &'static [Step]) -> Option<Way> {
        let (from, to) = (from % SERIES, to % SERIES);
        if from == to {
            return Some(Way { steps: &[] });
        }
        let first = known.iter().position(|step| step.from == from)?;
        let count = usize::try_from(to.checked_sub(from)?).ok()?;
        let steps = known.get(first..first.checked_add(count)?)?;
        let next_to_each_other = steps.iter().zip(from..).all(|(step, schema)| step.from == schema);
        next_to_each_other.then_some(Way { steps })
    }

    /// What an entry of a map is at the end of the way. `None` if it cannot be carried.
    pub fn translate<'e>(&self, map: &str, mut entry: Entry<'e>) -> Option<Entry<'e>> {
        for step in self.steps {
            let Some((_, change)) = step.changes.iter().find(|(name, _)| *name == map) else { continue };
            entry = match change {
                Change::Anew(change) => change(entry)?,
                Change::Grown(size) if entry.value.len() <= *size => {
                    let mut value = entry.value.into_owned();
                    value.resize(*size, 0);
                    Entry { key: entry.key, value: value.into() }
                }
                Change::Grown(_) => return None,
            };
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ports come before the addresses, and what is odd is not carried.
    fn swapped(entry: Entry<'_>) -> Option<Entry<'_>> {
        let (first, second) = entry.key.split_at_checked(2)?;
        let odd = entry.value.first()? % 2 == 1;
        (!odd).then(|| Entry { key: [second, first].concat().into(), value: entry.value.clone() })
    }

    const KNOWN: &[Step] = &[
        Step { from: 4, changes: &[("HOLDINGS", Change::Grown(6))] },
        Step { from: 5, changes: &[("FORWARD", Change::Anew(swapped)), ("HOLDINGS", Change::Grown(8))] },
        Step { from: 6, changes: &[] },
    ];

    fn translated(from: u32, to: u32, map: &str, value: &'static [u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        let entry = Entry { key: vec![1, 2, 3, 4].into(), value: value.into() };
        let entry = Way::between(from, to, KNOWN)?.translate(map, entry)?;
        Some((entry.key.into_owned(), entry.value.into_owned()))
    }

    #[test]
    fn entries_go_through_all_steps_and_each_map_through_its_own() {
        let same = vec![1, 2, 3, 4];
        assert_eq!(translated(4, 4, "HOLDINGS", &[7; 4]), Some((same.clone(), vec![7; 4])));
        let grown = vec![7, 7, 7, 7, 0, 0];
        assert_eq!(translated(4, 5, "HOLDINGS", &[7; 4]), Some((same.clone(), grown)));
        let grown = vec![7, 7, 7, 7, 0, 0, 0, 0];
        assert_eq!(translated(4, 7, "HOLDINGS", &[7; 4]), Some((same.clone(), grown)));
        assert_eq!(translated(4, 7, "PEERS", &[7; 4]), Some((same, vec![7; 4])));
        assert_eq!(translated(5, 6, "FORWARD", &[8]), Some((vec![3, 4, 1, 2], vec![8])));
        assert_eq!(translated(5, 6, "FORWARD", &[7]), None, "cannot be carried");
        assert_eq!(translated(4, 5, "HOLDINGS", &[7; 9]), None, "larger than it can have been");
    }

    #[test]
    fn that_a_pod_is_gone_is_said_in_another_place() {
        let flow = |map, mut value: Vec<u8>, at: usize| {
            value[at] = 1;
            let entry = Entry { key: vec![1; 16].into(), value: value.into() };
            Way::between(5, 6, STEPS).unwrap().translate(map, entry).unwrap().value.into_owned()
        };
        // A SYN was seen in both.
        let seen =
            |length: usize, at: usize| (0..length).map(|byte| u8::from(byte == at)).collect::<Vec<u8>>();
        let both = |length: usize, at: usize| {
            (0..length).map(|byte| u8::from(byte == at || byte == at + 1)).collect::<Vec<u8>>()
        };
        assert_eq!(flow("FORWARD", seen(32, 24), 30), both(32, 24));
        assert_eq!(flow("REVERSE", seen(24, 20), 22), both(24, 20));
    }

    #[test]
    fn there_is_no_way_back_and_none_from_what_is_not_known() {
        assert!(Way::between(4, 7, KNOWN).is_some());
        for (from, to) in [(3, 5), (5, 4), (4, 8), (8, 9), (7, 8)] {
            assert!(Way::between(from, to, KNOWN).is_none(), "{from} to {to}");
        }
        assert!(Way::between(3, 3, KNOWN).is_some());
        assert!(Way::between(4 + SERIES, 7, KNOWN).is_some());
    }
}
