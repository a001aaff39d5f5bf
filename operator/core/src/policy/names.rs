//! Host names: which names a rule means, and which addresses they have been found to have. Time is passed in.

use crate::model::Seconds;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Longest name, without the root's dot.
const MAX_NAME: usize = 253;
/// Longest label.
const MAX_LABEL: usize = 63;
/// Longest time for which a record is believed. Longer ones are mistakes (RFC 8767, section 4).
const MAX_TTL: Seconds = 7 * 86_400;

/// A name, or with `*.` in front all names below one. In lower case, without the root's dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPattern(String);

impl HostPattern {
    /// Reads a pattern; nothing if it is none.
    pub fn new(text: &str) -> Option<HostPattern> {
        let text = normal(text);
        let name = text.strip_prefix("*.").unwrap_or(&text);
        is_name(name).then_some(HostPattern(text))
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name, if it means only one.
    pub fn name(&self) -> Option<&str> {
        self.below().is_none().then_some(&self.0)
    }

    /// The name below which it means all.
    fn below(&self) -> Option<&str> {
        self.0.strip_prefix("*.")
    }

    /// Whether a name (as [`normal`] gives it) is meant.
    pub fn matches(&self, name: &str) -> bool {
        match self.below() {
            None => self.0 == name,
            Some(below) => name.strip_suffix(below).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
        }
    }

    /// Whether all names that another means are meant.
    pub fn contains(&self, other: &HostPattern) -> bool {
        self == other
            || match other.below() {
                None => self.matches(&other.0),
                Some(below) => self.below().is_some() && self.matches(below),
            }
    }
}

/// A name in the one form in which names are compared: lower case, without the root's dot.
pub fn normal(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        let letters = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        (1..=MAX_LABEL).contains(&label.len()) && letters && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= MAX_NAME && name.split('.').all(label)
}

/// Patterns by which names are looked up, with whose rules name them (an account; of the cluster's policies nobody): the number of them
/// costs nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patterns(BTreeMap<HostPattern, BTreeSet<String>>);

impl Patterns {
    /// Whether some pattern means the name.
    pub fn mean(&self, name: &str) -> bool {
        self.matching(name).next().is_some()
    }

    /// Patterns that mean a name: itself, and a wildcard for each of the names above it.
    pub fn matching<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a HostPattern> {
        let above = name.match_indices('.').map(|(dot, _)| HostPattern(format!("*{}", &name[dot..])));
        let all: Vec<HostPattern> = std::iter::once(HostPattern(name.to_owned())).chain(above).collect();
        all.into_iter().filter_map(|pattern| Some(self.0.get_key_value(&pattern)?.0))
    }

    /// Whose rules mean a name.
    fn owners(&self, name: &str) -> BTreeSet<&str> {
        self.matching(name).filter_map(|pattern| self.0.get(pattern)).flatten().map(String::as_str).collect()
    }

    /// Whether the rules are of more than one.
    fn are_shared(&self) -> bool {
        let mut owners = self.0.values().flatten();
        owners.next().is_some_and(|first| owners.any(|other| other != first))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&HostPattern, &BTreeSet<String>)> {
        self.0.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(HostPattern, String)> for Patterns {
    fn from_iter<I: IntoIterator<Item = (HostPattern, String)>>(named: I) -> Patterns {
        let mut patterns = Patterns::default();
        for (pattern, owner) in named {
            patterns.0.entry(pattern).or_default().insert(owner);
        }
        patterns
    }
}

impl FromIterator<HostPattern> for Patterns {
    fn from_iter<I: IntoIterator<Item = HostPattern>>(patterns: I) -> Patterns {
        patterns.into_iter().map(|pattern| (pattern, String::new())).collect()
    }
}

/// A record of an answer that matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A name has an address, for so many seconds.
    Address(String, IpAddr, u32),
    /// A name is another one's alias.
    Alias(String, String),
}

/// Whose addresses an answer tells: each name that has some itself or by way of aliases, with them and for how long. Names are as
/// [`normal`] gives them.
pub fn told(records: &[Record]) -> BTreeMap<String, BTreeMap<IpAddr, u32>> {
    let mut aliases: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for record in records {
        if let Record::Alias(name, of) = record {
            aliases.entry(of).or_default().push(name);
        }
    }
    let mut told: BTreeMap<String, BTreeMap<IpAddr, u32>> = BTreeMap::new();
    for record in records {
        let Record::Address(name, address, ttl) = record else { continue };
        let (mut names, mut next) = (BTreeSet::from([name.as_str()]), vec![name.as_str()]);
        while let Some(name) = next.pop() {
            next.extend(aliases.get(name).into_iter().flatten().copied().filter(|alias| names.insert(alias)));
        }
        for name in names {
            let known = told.entry(name.to_owned()).or_default().entry(*address).or_default();
            *known = (*known).max(*ttl);
        }
    }
    told
}

/// How much may be remembered, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Addresses of one name.
    pub per_name: usize,
    /// Pairs of name and address in all.
    pub total: usize,
    /// Seconds for which an address is kept beyond its time to live: applications keep addresses for longer than they should.
    pub grace: Seconds,
}

/// Why an answer cannot be learned. Whoever asked must not get it: what it does not know it cannot go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// One name has as many addresses as are remembered of one.
    Name,
    /// All names together have.
    Total,
    /// Those of whoever means the name have more than there is room left for others.
    Share,
}

/// Addresses that names have been found to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    /// Until when each address of a name is believed; the grace comes on top.
    names: BTreeMap<String, BTreeMap<IpAddr, Seconds>>,
    /// Pairs given up before their grace had passed, to make room.
    pub hurried: u64,
}

impl Learned {
    /// Takes what an answer tells of names that are meant; all of it or nothing. Gives whether something is new.
    pub fn learn(
        &mut self,
        told: &BTreeMap<String, BTreeMap<IpAddr, u32>>,
        patterns: &Patterns,
        limits: &Limits,
        now: Seconds,
    ) -> Result<bool, Full> {
        let mut next = None;
        for (name, addresses) in told.iter().filter(|(name, _)| patterns.mean(name)) {
            // Answers with nothing new are by far the most: they cost no copy.
            let known = self.names.get(name);
            if next.is_none() && addresses.keys().all(|it| known.is_some_and(|known| known.contains_key(it)))
            {
                continue;
            }
            let next = next.get_or_insert_with(|| self.clone());
            next.insert(name, addresses, limits, now)?;
            next.leave_room(name, patterns, limits)?;
        }
        let new = next.is_some();
        if let Some(next) = next {
            *self = next;
        }
        for (name, addresses) in told {
            let Some(known) = self.names.get_mut(name) else { continue };
            for (address, ttl) in addresses {
                if let Some(until) = known.get_mut(address) {
                    *until = (*until).max(now + Seconds::from(*ttl).min(MAX_TTL));
                }
            }
        }
        Ok(new)
    }

    fn insert(
        &mut self,
        name: &str,
        addresses: &BTreeMap<IpAddr, u32>,
        limits: &Limits,
        now: Seconds,
    ) -> Result<(), Full> {
        let known = self.names.entry(name.to_owned()).or_default();
        for (address, ttl) in addresses {
            let until = now + Seconds::from(*ttl).min(MAX_TTL);
            let known = known.entry(*address).or_insert(until);
            *known = (*known).max(until);
        }
        while self.names.get(name).map_or(0, BTreeMap::len) > limits.per_name {
            self.give_up(Some(name), now).ok_or(Full::Name)?;
        }
        while self.len() > limits.total {
            self.give_up(None, now).ok_or(Full::Total)?;
        }
        Ok(())
    }

    /// Whether somebody who means the name has no more than there is room left: one alone may have all of it, one of two at most half,
    /// and whoever comes next finds some.
    fn leave_room(&self, name: &str, patterns: &Patterns, limits: &Limits) -> Result<(), Full> {
        let left = limits.total.saturating_sub(self.len());
        let owners = patterns.owners(name);
        let modest = |owner: &&str| {
            let own = self.names.iter().filter(|(name, _)| patterns.owners(name).contains(owner));
            own.map(|(_, known)| known.len()).sum::<usize>() <= left
        };
        if !patterns.are_shared() || owners.iter().any(modest) { Ok(()) } else { Err(Full::Share) }
    }

    /// Gives up the address, of a name or of all, whose time has been over for longest; none if all are still believed.
    fn give_up(&mut self, of: Option<&str>, now: Seconds) -> Option<()> {
        let all = self.names.iter().filter(|(name, _)| of.is_none_or(|of| of == name.as_str()));
        let all =
            all.flat_map(|(name, known)| known.iter().map(move |(address, until)| (until, name, address)));
        let (_, name, address) = all.filter(|(until, ..)| **until < now).min()?;
        let (name, address) = (name.clone(), *address);
        self.forget(&name, address);
        self.hurried += 1;
        Some(())
    }

    fn forget(&mut self, name: &str, address: IpAddr) {
        if let Some(known) = self.names.get_mut(name) {
            known.remove(&address);
            if known.is_empty() {
                self.names.remove(name);
            }
        }
    }

    /// Forgets what nobody means any more, and addresses whose time and grace are over unless a flow uses them. Gives whether
    /// something was forgotten.
    pub fn expire(
        &mut self,
        patterns: &Patterns,
        limits: &Limits,
        in_use: impl Fn(&IpAddr) -> bool,
        now: Seconds,
    ) -> bool {
        let before = self.len();
        self.names.retain(|name, known| {
            known.retain(|address, until| *until + limits.grace >= now || in_use(address));
            !known.is_empty() && patterns.mean(name)
        });
        before != self.len()
    }

    /// What is remembered: name, address, and until when that is believed.
    pub fn entries(&self) -> impl Iterator<Item = (&str, IpAddr, Seconds)> {
        self.names.iter().flat_map(|(name, known)| {
            known.iter().map(move |(address, until)| (name.as_str(), *address, *until))
        })
    }

    /// Remembers again what [`Learned::entries`] gave.
    pub fn restore(entries: impl IntoIterator<Item = (String, IpAddr, Seconds)>) -> Learned {
        let mut learned = Learned::default();
        for (name, address, until) in entries {
            learned.names.entry(name).or_default().insert(address, until);
        }
        learned
    }

    /// Pairs of name and address.
    pub fn len(&self) -> usize {
        self.names.values().map(BTreeMap::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Addresses of a name.
    pub fn of(&self, name: &str) -> impl Iterator<Item = &IpAddr> {
        self.names.get(name).into_iter().flat_map(BTreeMap::keys)
    }

    /// The addresses that each pattern means.
    pub fn resolve(&self, patterns: &Patterns) -> Resolved {
        let mut resolved = Resolved::default();
        for (name, known) in &self.names {
            for pattern in patterns.matching(name) {
                resolved.0.entry(pattern.clone()).or_default().extend(known.keys().copied());
            }
        }
        resolved
    }
}

/// The addresses that each pattern means at present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved(BTreeMap<HostPattern, BTreeSet<IpAddr>>);

impl Resolved {
    /// Those of some patterns.
    pub fn of<'a>(&'a self, patterns: &'a [HostPattern]) -> impl Iterator<Item = &'a IpAddr> {
        patterns.iter().filter_map(|pattern| self.0.get(pattern)).flatten()
    }
}

impl<const N: usize> From<[(HostPattern, BTreeSet<IpAddr>); N]> for Resolved {
    fn from(addresses: [(HostPattern, BTreeSet<IpAddr>); N]) -> Resolved {
        addresses.into_iter().collect()
    }
}

impl FromIterator<(HostPattern, BTreeSet<IpAddr>)> for Resolved {
    fn from_iter<I: IntoIterator<Item = (HostPattern, BTreeSet<IpAddr>)>>(addresses: I) -> Resolved {
        Resolved(addresses.into_iter().collect())
    }
}
