//! Port classes: ports that the same terms of rules name.

use std::collections::{BTreeMap, BTreeSet};

/// Destination ports `first..=last` of TCP or UDP; of ICMP, which has none, the port 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// IP protocol number: 6 (TCP), 17 (UDP), 1 or 58 (ICMP).
    pub protocol: u8,
    /// First port.
    pub first: u16,
    /// Last port; the range is empty if it is less than `first`.
    pub last: u16,
}

/// The ports that share their `length` leading bits with `port`: a key for a longest-prefix match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortPrefix {
    /// IP protocol number.
    pub protocol: u8,
    /// First port; the bits beyond `length` are zero.
    pub port: u16,
    /// Leading bits that count, 0 to 16.
    pub length: u8,
}

/// Numbers of terms (those that name ports).
type Members = BTreeSet<usize>;

/// Ports divided into classes: two ports, of whichever protocol, are in the same class when the same terms name
/// them. Class 0 is what no term names.
pub(super) struct PortClasses {
    /// Members of class 1, 2, ...
    members: Vec<Members>,
    /// Maximal runs of ports of one protocol in one class (not 0).
    runs: Vec<(PortRange, u32)>,
}

impl PortClasses {
    pub fn new<'a>(terms: impl Iterator<Item = (usize, &'a [PortRange])>) -> PortClasses {
        let named: Vec<(usize, PortRange)> =
            terms.flat_map(|(number, ranges)| ranges.iter().map(move |range| (number, *range))).collect();
        let runs = elementary_runs(&named);
        let distinct: BTreeSet<&Members> = runs.iter().map(|(_, members)| members).collect();
        let numbers: BTreeMap<&Members, u32> = distinct.iter().copied().zip(1..).collect();
        PortClasses {
            runs: runs.iter().map(|(run, members)| (*run, numbers[members])).collect(),
            members: distinct.into_iter().cloned().collect(),
        }
    }

    /// The highest class.
    pub fn count(&self) -> u32 {
        self.members.len() as u32
    }

    /// Whether the term names the ports of the class.
    pub fn has(&self, class: u32, term: usize) -> bool {
        let members = class.checked_sub(1).and_then(|index| self.members.get(index as usize));
        members.is_some_and(|members| members.contains(&term))
    }

    /// Class of a port.
    pub fn class(&self, protocol: u8, port: u16) -> u32 {
        let covers = |run: &PortRange| run.protocol == protocol && (run.first..=run.last).contains(&port);
        self.runs.iter().find(|(run, _)| covers(run)).map_or(0, |(_, class)| *class)
    }

    /// The longest-prefix table. Its entries are disjoint.
    pub fn prefixes(&self) -> BTreeMap<PortPrefix, u32> {
        self.runs
            .iter()
            .flat_map(|(run, class)| prefixes(*run).into_iter().map(|prefix| (prefix, *class)))
            .collect()
    }
}

/// Cuts the ports at every end of a range, so that between two cuts the same terms name all ports, and joins
/// neighbours that the same terms name after all.
fn elementary_runs(named: &[(usize, PortRange)]) -> Vec<(PortRange, Members)> {
    let named: Vec<&(usize, PortRange)> =
        named.iter().filter(|(_, range)| range.first <= range.last).collect();
    let protocols: BTreeSet<u8> = named.iter().map(|(_, range)| range.protocol).collect();
    let mut runs: Vec<(PortRange, Members)> = Vec::new();
    for protocol in protocols {
        let named: Vec<(usize, u32, u32)> = named
            .iter()
            .filter(|(_, range)| range.protocol == protocol)
            .map(|(number, range)| (*number, u32::from(range.first), u32::from(range.last) + 1))
            .collect();
        let cuts: BTreeSet<u32> = named.iter().flat_map(|(_, from, end)| [*from, *end]).collect();
        for (from, end) in cuts.iter().zip(cuts.iter().skip(1)) {
            let members: Members = named
                .iter()
                .filter(|(_, first, past)| first <= from && end <= past)
                .map(|(number, ..)| *number)
                .collect();
            let (first, last) = (*from as u16, (*end - 1) as u16);
            match runs.last_mut() {
                _ if members.is_empty() => {}
                Some((run, same))
                    if run.protocol == protocol
                        && run.last.checked_add(1) == Some(first)
                        && *same == members =>
                {
                    run.last = last;
                }
                _ => runs.push((PortRange { protocol, first, last }, members)),
            }
        }
    }
    runs
}

/// The fewest prefixes that make up the range (at most 30).
fn prefixes(range: PortRange) -> Vec<PortPrefix> {
    let mut prefixes = Vec::new();
    let (mut next, end) = (u32::from(range.first), u32::from(range.last) + 1);
    while next < end {
        // The largest block that starts here: limited by the alignment of `next` and by what is left.
        let bits = next.trailing_zeros().min((end - next).ilog2()).min(16);
        prefixes.push(PortPrefix { protocol: range.protocol, port: next as u16, length: (16 - bits) as u8 });
        next += 1 << bits;
    }
    prefixes
}
