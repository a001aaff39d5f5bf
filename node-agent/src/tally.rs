//! New flows by the rule that has decided about them. Pure.
//!
//! The programs count by numbers: here the counts get names. A rule keeps its number; one that is gone leaves it to another not before
//! the edit after. Generations that follow each other count apart, since after a restart numbers may change with them.

use crate::ops::Rules;
use aegis_common::{RULES_COUNTED, RuleValue};
use aegis_core::policy::RuleName;
use std::collections::{BTreeMap, BTreeSet};

/// What was counted, by rule, since the agent started.
#[derive(Debug, Default)]
pub struct Tally {
    totals: BTreeMap<RuleName, RuleValue>,
    /// Even and odd generations.
    halves: [Half; 2],
}

#[derive(Debug, Default)]
struct Half {
    /// Which generation.
    generation: u32,
    /// Whose the numbers are. Those of rules that are gone stay theirs until others get them.
    names: Rules,
    /// What the programs said last.
    seen: Vec<RuleValue>,
}

impl Tally {
    /// How many numbers have to be looked at for the names that are known.
    pub fn size(&self) -> usize {
        let highest = self.halves.iter().filter_map(|half| half.names.last_key_value());
        highest.map(|(number, _)| *number as usize + 1).max().unwrap_or_default()
    }

    /// Takes what the programs have counted, of even and of odd generations. Must be done before numbers change their names.
    pub fn look(&mut self, counted: [Vec<RuleValue>; 2]) {
        for (half, counted) in self.halves.iter_mut().zip(counted) {
            for (number, now) in (0..).zip(&counted) {
                // Whoever gets a number starts with what is there.
                let before = half.seen.get(number as usize).copied().unwrap_or_default();
                let more = now.since(&before);
                // A rule that is gone does not come back by counting nothing.
                if let Some(name) = half.names.get(&number)
                    && more != RuleValue::default()
                {
                    let total = self.totals.entry(name.clone()).or_default();
                    *total = total.plus(&more);
                }
            }
            if counted.len() < half.seen.len() {
                half.seen[..counted.len()].copy_from_slice(&counted);
            } else {
                half.seen = counted;
            }
        }
    }

    /// Says whose the numbers of a generation are from now on, and which rules there are at all.
    pub fn name(&mut self, generation: u32, names: &Rules, existing: &BTreeSet<&RuleName>) {
        let half = &mut self.halves[(generation & 1) as usize];
        if half.generation != generation {
            *half = Half { generation, seen: std::mem::take(&mut half.seen), ..Half::default() };
        }
        let counted = names.iter().filter(|(number, _)| **number < RULES_COUNTED);
        half.names.extend(counted.map(|(number, name)| (*number, name.clone())));
        self.totals.retain(|name, _| existing.contains(name));
    }

    /// By rule.
    pub fn totals(&self) -> &BTreeMap<RuleName, RuleValue> {
        &self.totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Rules {
        (0..).zip(names.iter().map(|name| RuleName::Policy((*name).to_owned()))).collect()
    }

    fn left(counts: &[u64]) -> Vec<RuleValue> {
        counts.iter().map(|left| RuleValue { left: *left, ..RuleValue::default() }).collect()
    }

    fn of(tally: &Tally, name: &str) -> u64 {
        tally.totals().get(&RuleName::Policy(name.to_owned())).map_or(0, |value| value.left)
    }

    #[test]
    fn counts_follow_the_names_when_numbers_change() {
        let all = names(&["a", "b", "c"]);
        let all: BTreeSet<&RuleName> = all.values().collect();
        let mut tally = Tally::default();
        tally.name(2, &names(&["b", "c"]), &all);
        tally.look([left(&[5, 1]), left(&[0, 0])]);
        assert_eq!((of(&tally, "b"), of(&tally, "c")), (5, 1));
        // A rule comes before the others. Packets of the generation before are still under way.
        tally.look([left(&[6, 1, 0]), left(&[0, 0, 0])]);
        tally.name(3, &names(&["a", "b", "c"]), &all);
        tally.look([left(&[7, 1, 0]), left(&[3, 2, 1])]);
        assert_eq!(["a", "b", "c"].map(|name| of(&tally, name)), [3, 9, 2]);
        // The numbers of the first generation are others' now: what they counted before is not theirs.
        tally.name(4, &names(&["c", "a"]), &all);
        tally.look([left(&[8, 3, 0]), left(&[3, 2, 1])]);
        assert_eq!(["a", "b", "c"].map(|name| of(&tally, name)), [5, 9, 3]);
    }

    #[test]
    fn a_rule_that_is_gone_is_forgotten() {
        let all = names(&["a", "b"]);
        let mut tally = Tally::default();
        tally.name(1, &all, &all.values().collect());
        tally.look([left(&[0, 0]), left(&[1, 2])]);
        let one = names(&["a"]);
        tally.name(2, &one, &one.values().collect());
        assert_eq!(tally.totals().len(), 1);
        tally.look([left(&[0, 0]), left(&[1, 2])]);
        assert_eq!(tally.totals().len(), 1, "nothing more is counted");
    }

    #[test]
    fn a_number_that_gets_another_name_in_the_same_generation_brings_nothing_along() {
        let all = names(&["a", "b", "c"]);
        let all: BTreeSet<&RuleName> = all.values().collect();
        let mut tally = Tally::default();
        tally.name(2, &names(&["a", "b"]), &all);
        tally.look([left(&[3, 4]), Vec::new()]);
        // The first one goes. A packet that has met it is counted a moment later.
        tally.name(2, &names(&["a", "b"]).split_off(&1), &all);
        tally.look([left(&[4, 4]), Vec::new()]);
        assert_eq!((of(&tally, "a"), of(&tally, "b")), (4, 4));
        tally.name(2, &names(&["c", "b"]), &all);
        tally.look([left(&[6, 5]), Vec::new()]);
        assert_eq!(["a", "b", "c"].map(|name| of(&tally, name)), [4, 5, 2]);
    }

    #[test]
    fn fewer_counts_than_before_forget_none() {
        let all = names(&["a", "b"]);
        let mut tally = Tally::default();
        tally.name(1, &all, &all.values().collect());
        tally.look([Vec::new(), left(&[1, 2])]);
        tally.look([Vec::new(), left(&[1])]);
        tally.look([Vec::new(), left(&[1, 3])]);
        assert_eq!((of(&tally, "a"), of(&tally, "b")), (1, 3));
    }
}
