//! Destination classes: ranges that the same terms of rules name, and addresses of Services.

use super::rules::Rule;
use super::services::{ServicePort, Way};
use super::terms::Term;
use super::{Destination, PolicyInputs};
use crate::egress::Family;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

/// Destinations of one class.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Members {
    /// What can be left from differs.
    pub family: Family,
    /// Terms of rules that name a range around them, ascending, and what matters of the longest one's length.
    pub terms: Vec<(usize, u8)>,
    /// Of a Service's address, which no rule names: where packets go from there. Empty of everything else.
    pub ways: Vec<Way>,
}

/// The longest range inside the cluster that an address is in.
pub(super) fn internal_around(internal: &[IpNet], address: IpAddr) -> Option<IpNet> {
    internal.iter().filter(|range| range.contains(&address)).max_by_key(|range| range.prefix_len()).copied()
}

/// Ranges divided into classes: two of one family are in the same class when the same rules name them, in the same way. Those inside the
/// cluster have none: as the longer ones they would win over the internal range. That is what the address of a Service does that has
/// endpoints outside.
///
/// Classes are numbered by who is in them, not by where they are met first: one more address of a name that has some changes the number
/// of none.
pub(super) struct Destinations {
    internal: BTreeSet<IpNet>,
    ranges: Vec<(IpNet, u32)>,
    classes: Vec<Members>,
}

impl Destinations {
    /// `terms` come with the numbers of the rules that they are of.
    pub fn new(rules: &[Rule<'_>], terms: &[(usize, Term<'_>)], inputs: &PolicyInputs) -> Destinations {
        let internal: BTreeSet<IpNet> = inputs.internal.iter().map(IpNet::trunc).collect();
        // Who names ranges: each term its own, and all terms with a country together that country's. There are thousands of them, which
        // would else be there for each term.
        let mut namers: Vec<Vec<usize>> = (0..terms.len()).map(|number| vec![number]).collect();
        let mut named: Vec<(IpNet, usize)> = Vec::new();
        let mut of_countries: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (number, (_, term)) in terms.iter().enumerate() {
            named.extend(term.own_ranges(inputs).map(|range| (range.trunc(), number)));
            for country in term.countries {
                of_countries.entry(country).or_default().push(number);
            }
        }
        for (country, numbers) in of_countries {
            named.extend(inputs.ranges_of(country).iter().map(|range| (range.trunc(), namers.len())));
            namers.push(numbers);
        }
        named.sort();
        named.dedup();
        // Disjoint, so that only the last one that does not begin after a range can contain it. There may be as many as nodes.
        let merged = IpNet::aggregate(&internal.iter().copied().collect());
        let inside = |range: &IpNet| {
            let before = merged.partition_point(|it| it <= range);
            before.checked_sub(1).is_some_and(|last| merged[last].contains(range))
        };
        let mut sets = Sets::default();
        let mut found: Vec<(IpNet, usize)> = Vec::new();
        // Ranges in order come after those that are around them: these are on the stack.
        let mut around: Vec<(IpNet, usize)> = Vec::new();
        for by in named.chunk_by(|(one, _), (other, _)| one == other) {
            let range = by[0].0;
            while around.last().is_some_and(|(outer, _)| !outer.contains(&range)) {
                around.pop();
            }
            let length = |number: usize| rules[terms[number].0].length(range.prefix_len());
            let outer = around.last().map(|(_, members)| *members);
            // What matters of the length depends on the kind of rule, and countries are of one kind.
            let namer = |number: usize| (number, namers[number].first().map_or(0, |term| length(*term)));
            let asked = (outer, Family::of(&range), by.iter().map(|(_, number)| namer(*number)).collect());
            let own = by.iter().flat_map(|(_, number)| &namers[*number]);
            let members = sets.within(asked, own.map(|number| (*number, length(*number))));
            around.push((range, members));
            if !inside(&range) {
                found.push((range, members));
            }
        }
        let mut ways: BTreeMap<IpAddr, Vec<Way>> = BTreeMap::new();
        let mut sorted: Vec<&ServicePort> = inputs.services.iter().collect();
        sorted.sort_unstable();
        for port in sorted {
            let outside = port.endpoints.iter().filter(|(address, _)| !inside(&IpNet::from(*address)));
            let covered = outside.filter_map(|endpoint| Way::new(port, *endpoint, rules, terms, inputs));
            let covered: Vec<Way> = covered.collect();
            if !covered.is_empty() {
                ways.entry(port.address).or_default().extend(covered);
            }
        }
        for (address, ways) in ways {
            let address = IpNet::from(address);
            // Whatever rules say about the address itself: nothing gets there.
            found.push((
                address,
                sets.number(Members { family: Family::of(&address), terms: Vec::new(), ways }),
            ));
        }
        let used: BTreeSet<usize> = found.iter().map(|(_, members)| *members).collect();
        let mut classes: Vec<(&Members, usize)> = used.iter().map(|it| (&sets.members[*it], *it)).collect();
        classes.sort_unstable();
        let mut numbers = vec![0; sets.members.len()];
        for (number, (_, members)) in (1..).zip(&classes) {
            numbers[*members] = number;
        }
        let classes = classes.into_iter().map(|(members, _)| members.clone()).collect();
        let ranges = found.iter().map(|(range, members)| (*range, numbers[*members])).collect();
        Destinations { internal, ranges, classes }
    }

    /// The longest-prefix table.
    pub fn table(&self) -> BTreeMap<IpNet, Destination> {
        let internal = self.internal.iter().map(|range| (*range, Destination::Internal));
        internal
            .chain(self.ranges.iter().map(|(range, class)| (*range, Destination::Class(*class))))
            .collect()
    }

    /// Each class with its number, from 1 on.
    pub fn classes(&self) -> impl Iterator<Item = (u32, &Members)> {
        (1..).zip(&self.classes)
    }
}

/// Sets of terms, each once: thousands of ranges have a few hundred.
#[derive(Default)]
struct Sets {
    members: Vec<Members>,
    numbers: HashMap<Members, usize>,
    /// What was asked, and the answers.
    asked: HashMap<Asked, usize>,
}

/// The set of the range around, the family, and who names the range itself, with what matters of its length.
type Asked = (Option<usize>, Family, Vec<(usize, u8)>);

impl Sets {
    /// The number of the set.
    fn number(&mut self, members: Members) -> usize {
        *self.numbers.entry(members).or_insert_with_key(|members| {
            self.members.push(members.clone());
            self.members.len() - 1
        })
    }

    /// The number of a set with the terms that name a range itself added to those of the one around it.
    fn within(&mut self, asked: Asked, own: impl Iterator<Item = (usize, u8)>) -> usize {
        if let Some(number) = self.asked.get(&asked) {
            return *number;
        }
        let (around, family, _) = asked;
        // The range itself is the longest one.
        let outer = around.map(|outer| self.members[outer].terms.iter().copied()).into_iter().flatten();
        let all: BTreeMap<usize, u8> = outer.chain(own).collect();
        let number = self.number(Members { family, terms: all.into_iter().collect(), ways: Vec::new() });
        self.asked.insert(asked, number);
        number
    }
}
