//! Numbers of the classes and rules of a policy. Those that are already in the maps keep them, so that the tables of before and after
//! an edit differ in few entries.
//!
//! A class has no name: what it was before is told by what is in it. So an agent that has just started numbers like the one before.

use crate::observed::{Generation, VerdictEntry};
use aegis_common::{
    DESTINATION_INTERNAL, DESTINATION_OBSERVED, HOST_UNKNOWN, POD_REFUSED, VERDICT_BINDS, VerdictValue,
    observed, observes,
};
use aegis_core::policy::RuleName;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Numbers of the rules that cover local pods.
pub type Rules = BTreeMap<u32, RuleName>;

/// The number of each of `rules`: the one that it has in `former`, or one that nobody has there, since counts go by it.
pub(super) fn number_rules(rules: &[RuleName], former: &Rules) -> Vec<u32> {
    let of: BTreeMap<&RuleName, u32> = former.iter().map(|(number, name)| (name, *number)).collect();
    let mut free = (0..).filter(|number| !former.contains_key(number));
    let number = |name| of.get(name).copied().or_else(|| free.next()).unwrap_or(u32::MAX);
    rules.iter().map(number).collect()
}

/// `VerdictValue::binding` with numbers of rules in place of their places. Where something `passes`, no rule has decided about it.
pub(super) fn number_binding(binding: u32, passes: bool, numbers: &[u32]) -> u32 {
    const OWN: u32 = u16::MAX as u32;
    let number = |place: u32| numbers.get(place as usize).map_or(OWN, |number| (*number).min(OWN));
    let own = if passes { 0 } else { number(binding & OWN) };
    let observer = observed(binding).map_or(0, |(place, would)| observes(number(place), would));
    binding & VERDICT_BINDS | observer | own
}

/// The same policy with the numbers that its classes have in `live`. A class of pods or of ports has that of the one with which it has
/// most in common; a class of destinations only if its verdicts are the same too, so that no verdict changes. Its verdicts come apart
/// from it: they are put in order once, by the numbers that they get.
pub(super) fn follow(
    mut wanted: Generation,
    verdicts: Vec<(VerdictEntry, VerdictValue)>,
    live: &Generation,
) -> Generation {
    let mut pods = Votes::default();
    for (address, pod) in &live.pods {
        let now = wanted.pods.get(address).filter(|now| now.incarnation == pod.incarnation);
        pods.was(now.map(|now| now.class), pod.class);
    }
    for (address, pod) in &live.pods6 {
        let now = wanted.pods6.get(address).filter(|now| now.incarnation == pod.incarnation);
        pods.was(now.map(|now| now.class), pod.class);
    }
    for (group, host) in &live.hosts {
        pods.was(wanted.hosts.get(group).map(|now| now.class), host.class);
    }
    let mut destinations = Votes::default();
    for (range, class) in &live.destinations {
        destinations.was(wanted.destinations.get(range).copied(), *class);
    }
    let mut ports = Votes::default();
    for (port, class) in &live.ports {
        ports.was(wanted.ports.get(port).copied(), *class);
    }
    for (pod, destination, port) in live.verdicts.keys() {
        pods.taken.insert(*pod);
        destinations.taken.insert(*destination);
        ports.taken.insert(*port);
    }

    let own = |class: u32| ![0, POD_REFUSED, HOST_UNKNOWN].contains(&class);
    let mut classes = Set::default();
    let v4 = wanted.pods.values().map(|pod| pod.class);
    let all = v4.chain(wanted.pods6.values().map(|pod| pod.class));
    let all = all.chain(wanted.hosts.values().map(|pod| pod.class));
    all.filter(|class| own(*class)).for_each(|class| classes.insert(class));
    // Of pods of the host network, while nobody looks at these.
    let mut unmet = Set::default();
    let all = verdicts.iter().map(|((pod, ..), _)| *pod);
    all.filter(|class| !classes.contains(place(*class))).for_each(|class| unmet.insert(class));
    let mut pods = pods.numbers(&classes, &unmet, |_, _| true);

    let mut classes = Set::default();
    wanted.ports.values().for_each(|class| classes.insert(*class));
    let ports = ports.numbers(&classes, &Set::default(), |_, _| true);

    // Of pods and ports that had classes before and have them now.
    let after = verdicts.iter().filter(|((pod, _, port), _)| pods.has(*pod) && ports.has(*port));
    let after = digests(after.map(|(key, value)| (key.1, [pods.of(key.0), ports.of(key.2)], value)));
    let before = live.verdicts.iter().filter(|((pod, _, port), _)| pods.gave(*pod) && ports.gave(*port));
    let before = digests(before.map(|(key, value)| (key.1, [key.0, key.2], value)));
    let same = |now, then| after.get(place(now)).unwrap_or(&0) == before.get(place(then)).unwrap_or(&0);
    let mut classes = Set::default();
    let all = wanted.destinations.values().copied().filter(|class| *class != DESTINATION_INTERNAL);
    all.for_each(|class| classes.insert(class));
    let destinations = destinations.numbers(&classes, &Set::default(), same);

    // Pods of a class may all be others now.
    let after = verdicts.iter().filter(|((pod, ..), _)| !pods.has(*pod));
    let after = digests(after.map(|(key, value)| (key.0, [destinations.of(key.1), ports.of(key.2)], value)));
    let before = live.verdicts.iter().filter(|((pod, ..), _)| !pods.gave(*pod));
    pods.adopt(&after, &digests(before.map(|(key, value)| (key.0, [key.1, key.2], value))));

    wanted.pods.values_mut().for_each(|pod| pod.class = pods.of(pod.class));
    wanted.pods6.values_mut().for_each(|pod| pod.class = pods.of(pod.class));
    wanted.hosts.values_mut().for_each(|pod| pod.class = pods.of(pod.class));
    wanted.destinations.values_mut().for_each(|class| *class = destinations.of(*class));
    wanted.ports.values_mut().for_each(|class| *class = ports.of(*class));
    let verdicts = verdicts.into_iter().map(|((pod, destination, port), value)| {
        ((pods.of(pod), destinations.of(destination), ports.of(port)), value)
    });
    wanted.verdicts = verdicts.collect();
    wanted
}

/// Where a class is in a list: numbers are small, but for the bit of those that are only observed, of which none is without it, too.
fn place(class: u32) -> usize {
    (class & !DESTINATION_OBSERVED) as usize
}

/// No policy has as many classes. What says so in a map, this agent has not written: nothing is made of it.
const HIGHEST: usize = 1 << 20;

/// What tells the verdicts of a class of destinations from those of another.
fn digests<'a>(verdicts: impl Iterator<Item = (u32, [u32; 2], &'a VerdictValue)>) -> Vec<u64> {
    let mut digests = Vec::new();
    for (class, [pod, port], value) in verdicts {
        let at = place(class);
        if at > HIGHEST {
            continue;
        }
        if digests.len() <= at {
            digests.resize(at + 1, 0u64);
        }
        let mut mixed = u64::from(pod) << 32 | u64::from(port);
        for word in [value.packed(), 0] {
            mixed = (mixed ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed ^= mixed >> 29;
        }
        // In whatever order they come.
        digests[at] = digests[at].wrapping_add(mixed);
    }
    digests
}

/// Classes, by their places.
#[derive(Default)]
struct Set(Vec<u32>);

impl Set {
    /// In place of a class: none has this number, which says "internal" or "refused".
    const NONE: u32 = u32::MAX;

    fn insert(&mut self, class: u32) {
        let at = place(class);
        if at > HIGHEST {
            return;
        }
        if self.0.len() <= at {
            self.0.resize(at + 1, Set::NONE);
        }
        self.0[at] = class;
    }

    fn contains(&self, at: usize) -> bool {
        self.0.get(at).is_some_and(|class| *class != Set::NONE)
    }

    fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().copied().filter(|class| *class != Set::NONE)
    }
}

/// The numbers of classes.
struct Numbers {
    /// By class.
    numbers: Vec<u32>,
    /// Those of them that a class before had.
    given: Set,
}

impl Numbers {
    fn of(&self, class: u32) -> u32 {
        self.numbers.get(place(class)).copied().filter(|number| *number != Set::NONE).unwrap_or(class)
    }

    /// Gives those that nobody had before the numbers of classes that nobody has any more, where their verdicts are the same.
    fn adopt(&mut self, after: &[u64], before: &[u64]) {
        let mut free: BTreeMap<u64, usize> = BTreeMap::new();
        for (class, digest) in before.iter().enumerate().filter(|(_, digest)| **digest != 0) {
            free.entry(*digest).or_insert(class);
        }
        for (class, digest) in after.iter().enumerate() {
            if let Some(before) = free.remove(digest)
                && let Some(number) = self.numbers.get_mut(class)
            {
                *number = before as u32;
                self.given.insert(before as u32);
            }
        }
    }

    /// Whether there was something of the class before.
    fn has(&self, class: u32) -> bool {
        class == 0 || self.gave(self.of(class))
    }

    /// Whether there is something now of a class before.
    fn gave(&self, before: u32) -> bool {
        before == 0 || self.given.contains(place(before))
    }
}

/// How many entries of a table have a class now, of those that had one before.
#[derive(Default)]
struct Votes {
    /// Of a class now and a class before.
    both: BTreeMap<(u32, u32), usize>,
    /// Numbers that entries have.
    met: Set,
    /// Numbers that verdicts have.
    taken: Set,
}

impl Votes {
    /// An entry has a class now that had another one, or is gone.
    fn was(&mut self, now: Option<u32>, before: u32) {
        if [0, HOST_UNKNOWN, POD_REFUSED, DESTINATION_INTERNAL].contains(&before) {
            return;
        }
        self.met.insert(before);
        if let Some(now) = now.filter(|now| now & DESTINATION_OBSERVED == before & DESTINATION_OBSERVED) {
            *self.both.entry((now, before)).or_default() += 1;
        }
    }

    /// A number for each class: that of the class before that has most in common with it and `may` be it, or one that nobody has. Those
    /// that no entry has keep their own, if no entry had that.
    fn numbers(mut self, classes: &Set, unmet: &Set, may: impl Fn(u32, u32) -> bool) -> Numbers {
        let both = self.both.iter().filter(|((now, _), _)| classes.contains(place(*now)));
        let mut both: Vec<(u32, u32, usize)> =
            both.map(|((now, before), votes)| (*now, *before, *votes)).collect();
        both.sort_by_key(|(now, before, votes)| (Reverse(*votes), *now, *before));
        let mut numbers = vec![Set::NONE; classes.0.len().max(unmet.0.len())];
        let mut given = Set::default();
        for (now, before, _) in both {
            if numbers[place(now)] == Set::NONE && !given.contains(place(before)) && may(now, before) {
                numbers[place(now)] = before;
                given.insert(before);
            }
        }
        for class in unmet.iter().filter(|class| !self.met.contains(place(*class))) {
            numbers[place(class)] = class;
        }
        unmet.iter().for_each(|class| self.taken.insert(class));
        let mut free = (1..).filter(|number| !self.taken.contains(*number) && !self.met.contains(*number));
        for class in classes.iter().chain(unmet.iter()) {
            if numbers[place(class)] == Set::NONE
                && let Some(number) = free.next()
            {
                numbers[place(class)] = number as u32 | class & DESTINATION_OBSERVED;
            }
        }
        Numbers { numbers, given }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_common::{WOULD_DENY, observes};

    fn rule(name: &str) -> RuleName {
        RuleName::Policy(name.to_owned())
    }

    #[test]
    fn rules_keep_their_numbers_and_none_gets_that_of_one_that_goes() {
        let former: Rules = [(0, rule("a")), (1, rule("b")), (3, rule("d"))].into();
        assert_eq!(number_rules(&[rule("new"), rule("d"), rule("a"), rule("newer")], &former), [2, 3, 0, 4]);
        assert_eq!(number_rules(&[rule("x"), rule("y")], &Rules::default()), [0, 1]);
    }

    #[test]
    fn numbers_take_the_places_of_places() {
        let numbers = [7, 5];
        assert_eq!(number_binding(1, false, &numbers), 5);
        assert_eq!(number_binding(VERDICT_BINDS, false, &numbers), VERDICT_BINDS | 7);
        let both = 1 | observes(0, WOULD_DENY);
        assert_eq!(number_binding(both, false, &numbers), 5 | observes(7, WOULD_DENY));
        assert_eq!(number_binding(observes(0, WOULD_DENY), true, &numbers), observes(7, WOULD_DENY));
        assert_eq!(number_binding(0xffff, false, &numbers), 0xffff, "without a number");
    }
}
