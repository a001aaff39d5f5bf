//! Prefixes: which of them count, and which of their addresses are free.

use crate::model::Prefix;
use crate::plan::Verdict;
use crate::reason;
use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// All prefixes, each judged.
pub(crate) struct Prefixes<'a> {
    by_name: BTreeMap<&'a str, Judged<'a>>,
}

/// A prefix and whether addresses may be taken from it.
pub(crate) struct Judged<'a> {
    pub prefix: &'a Prefix,
    pub accepted: Verdict,
}

impl<'a> Prefixes<'a> {
    /// Of prefixes that overlap only the oldest is accepted (then the first by name). A prefix that is not accepted
    /// itself still stands in the way of younger ones: otherwise deleting an old prefix could withdraw the
    /// acceptance of one that is in use.
    pub fn judge(prefixes: &'a [Prefix]) -> Prefixes<'a> {
        let mut oldest_first: Vec<&Prefix> = prefixes.iter().collect();
        oldest_first.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
        let mut by_name = BTreeMap::new();
        for (age, prefix) in oldest_first.iter().enumerate() {
            let older = oldest_first[..age].iter().find(|older| overlap(older.cidr, prefix.cidr));
            let accepted = match older {
                _ if prefix.deleting => Verdict::bad(
                    reason::DRAINING,
                    "being deleted: nothing new is taken from it, and it goes when no allocation has an address of it",
                ),
                Some(older) => Verdict::bad(
                    reason::OVERLAP,
                    format!(
                        "spec.cidr: {} overlaps {} of AegisPrefix {:?}, which is older; delete one of the two, or create this one again with a range of its own",
                        prefix.cidr, older.cidr, older.name
                    ),
                ),
                None => {
                    let message = format!("{} is available to account {:?}", prefix.cidr, prefix.account);
                    Verdict::good(reason::ACCEPTED, message)
                }
            };
            by_name.insert(prefix.name.as_str(), Judged { prefix, accepted });
        }
        Prefixes { by_name }
    }

    /// The prefix of this name.
    pub fn get(&self, name: &str) -> Option<&Judged<'a>> {
        self.by_name.get(name)
    }

    /// All prefixes, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Judged<'a>> {
        self.by_name.values()
    }
}

/// Whether two ranges have an address in common (one then contains the other).
pub(crate) fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// The addresses of a prefix. Every address of the range can be allocated, the first and the last included, except
/// what is reserved.
pub(crate) struct Pool {
    first: u32,
    last: u32,
    /// Reserved ranges within the prefix: sorted, disjoint, both ends included.
    reserved: Vec<(u32, u32)>,
}

impl Pool {
    pub fn new(prefix: &Prefix) -> Pool {
        let (first, last) = ends(prefix.cidr);
        let mut ranges: Vec<(u32, u32)> = prefix
            .reserved
            .iter()
            .filter(|range| overlap(**range, prefix.cidr))
            .map(|range| ends(*range))
            .collect();
        ranges.sort_unstable();
        let mut reserved: Vec<(u32, u32)> = Vec::new();
        for (from, to) in ranges {
            let (from, to) = (from.max(first), to.min(last));
            match reserved.last_mut() {
                Some((_, end)) if from <= *end => *end = to.max(*end),
                _ => reserved.push((from, to)),
            }
        }
        Pool { first, last, reserved }
    }

    /// How many addresses can be allocated.
    pub fn capacity(&self) -> u32 {
        let size = |(from, to): (u32, u32)| u64::from(to - from) + 1;
        let reserved: u64 = self.reserved.iter().copied().map(size).sum();
        u32::try_from(size((self.first, self.last)) - reserved).unwrap_or(u32::MAX)
    }

    /// Whether the address lies in the prefix.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        (self.first..=self.last).contains(&address.to_bits())
    }

    /// Whether the address must not be allocated.
    pub fn is_reserved(&self, address: Ipv4Addr) -> bool {
        self.reserved_range(address.to_bits()).is_some()
    }

    /// The lowest address from `from` on that is neither reserved nor taken.
    pub fn lowest_free(&self, from: Ipv4Addr, taken: impl Fn(Ipv4Addr) -> bool) -> Option<Ipv4Addr> {
        let mut candidate = from.to_bits().max(self.first);
        while candidate <= self.last {
            let last_unusable = match self.reserved_range(candidate) {
                Some((_, end)) => end,
                None if taken(Ipv4Addr::from_bits(candidate)) => candidate,
                None => return Some(Ipv4Addr::from_bits(candidate)),
            };
            candidate = last_unusable.checked_add(1)?;
        }
        None
    }

    fn reserved_range(&self, address: u32) -> Option<(u32, u32)> {
        let after = self.reserved.partition_point(|(from, _)| *from <= address);
        self.reserved[..after].last().copied().filter(|(_, to)| address <= *to)
    }
}

/// First and last address of a range.
fn ends(range: Ipv4Net) -> (u32, u32) {
    (range.network().to_bits(), range.broadcast().to_bits())
}
