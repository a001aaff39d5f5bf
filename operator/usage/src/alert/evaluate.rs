//! What a slot, or the state of the cluster, changes for an account: pure. What it takes to know is asked by `table`.

use super::item::{Happening, Item, Limit};
use super::machine::{Key, Kind, Seen, Track, Turn, step};
use super::observe::{Figures, Place, SCALE};
use super::{Account, Allocation, Rule};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// For how many seconds a slot is waited for whose reports are not all there. So long, too, after the collector began: agents deliver
/// first what they could not while it was away.
pub const GRACE: i64 = 60;

/// Alerts of an account that count.
pub const MOST_RULES: usize = 64;

/// Things of an account that are kept an eye on at a time, since they exceed a limit. What comes on top of that waits.
pub const MOST_TRACKS: usize = 1_000;

/// Items of an account that are kept, the newest ones.
pub const MOST_ITEMS: i64 = 200;

/// Longest step of the clock that counts as time in which a site had no holder: what lies between two looks beyond that is not known.
const STEP: i64 = 30;

/// What is known of an account's alerts between two looks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct State {
    /// Begin of the next slot to look at.
    pub until: i64,
    /// When sites were looked at.
    pub looked: i64,
    /// Number of the next item.
    pub next: i64,
    /// Nodes that hold ports and did not report in the last slot.
    pub silent: u32,
    /// What exceeds a limit.
    #[serde(with = "pairs")]
    pub tracks: BTreeMap<Key, Track>,
}

/// A map whose keys are no text, as a list.
mod pairs {
    use super::{BTreeMap, Key, Track};
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub fn serialize<S: Serializer>(map: &BTreeMap<Key, Track>, to: S) -> Result<S::Ok, S::Error> {
        map.iter().collect::<Vec<_>>().serialize(to)
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<BTreeMap<Key, Track>, D::Error> {
        Ok(Vec::<(Key, Track)>::deserialize(from)?.into_iter().collect())
    }
}

/// What was reported of a slot.
pub(super) struct Slot<'a> {
    /// Its begin.
    pub begin: i64,
    /// Nodes that reported in it.
    pub reported: &'a BTreeSet<String>,
    /// Ports in use.
    pub ports: &'a Figures,
    /// By the seconds of the window that ends with it: refused connections, and nodes that reported in all of it.
    pub refused: &'a BTreeMap<i64, (Figures, BTreeSet<String>)>,
}

/// Rules that count.
pub(super) fn counting(account: &Account) -> impl Iterator<Item = &Rule> {
    account.rules.iter().take(MOST_RULES)
}

impl State {
    /// Drops what no rule is about any more: what was raised is cleared.
    pub fn prune(&mut self, account: &Account, now: i64) -> Vec<Item> {
        let gone: Vec<Key> =
            self.tracks.keys().filter(|key| limit(account, key).is_none()).cloned().collect();
        let gone = gone.into_iter().filter_map(|key| {
            let track = self.tracks.remove(&key)?;
            let begin = track.raised?;
            let item =
                Item::new(&account.name, key, &track, Happening::Cleared, now.max(begin), Limit::default());
            Some(Item { unwatched: true, ..item })
        });
        gone.collect()
    }

    /// Looks at a slot.
    pub fn look(&mut self, account: &Account, slot: &Slot) -> Vec<Item> {
        let mut items = Vec::new();
        for rule in counting(account) {
            if rule.port_use.is_some() {
                for key in self.keys(rule, Kind::PortUse, account, slot.ports, slot.begin) {
                    items.extend(self.ports(account, rule, key, slot));
                }
            }
            if let Some((figures, reported)) = rule.refusals.and_then(|it| slot.refused.get(&it.within)) {
                for key in self.keys(rule, Kind::Refusals, account, figures, slot.begin) {
                    items.extend(self.refused(account, key, slot.begin, figures, reported));
                }
            }
        }
        let holders = expected(account);
        self.silent = holders.difference(slot.reported).count() as u32;
        self.until = slot.begin + 10;
        items
    }

    /// What is to be looked at for a limit of a rule: what exceeded it before, and all that was found.
    fn keys(
        &self,
        rule: &Rule,
        kind: Kind,
        account: &Account,
        figures: &Figures,
        begin: i64,
    ) -> BTreeSet<Key> {
        let known = |key: &Key| key.kind == kind && key.uid == rule.uid && key.alert == rule.name;
        let before = self.tracks.keys().filter(|key| known(key)).cloned();
        let found = figures.found.keys().map(|place| key(rule, kind, place.clone()));
        let found = found.filter(|key| limit(account, key).is_some());
        // After a clock went back a slot may come again that something has behind it.
        let behind = |key: &Key| self.tracks.get(key).is_some_and(|track| begin < track.until);
        before.chain(found).filter(|key| !behind(key)).collect()
    }

    fn ports(&mut self, account: &Account, rule: &Rule, key: Key, slot: &Slot) -> Option<Item> {
        let (allocation, wanted) = (account.allocations.get(&key.allocation)?, rule.port_use?);
        let known = slot.ports.found.get(&Place::from(&key));
        let figure = known.copied().unwrap_or(0);
        // In percent of a millionth of a port, without a rest.
        let reaches = |percent: i64| {
            i128::from(figure) * 100 >= i128::from(percent) * i128::from(allocation.ports) * i128::from(SCALE)
        };
        let whole = known.is_some() || slot.ports.whole;
        let seen = if known.is_some() && reaches(wanted.percent) {
            Seen::Above
        } else if !whole || !all_report(allocation, &key, slot.reported) {
            Seen::Unknown
        } else if reaches(wanted.clear_below) {
            Seen::Between
        } else {
            Seen::Below
        };
        self.step(account, key, seen, (slot.begin, 10), figure / SCALE, wanted.wait)
    }

    fn refused(
        &mut self,
        account: &Account,
        key: Key,
        begin: i64,
        figures: &Figures,
        reported: &BTreeSet<String>,
    ) -> Option<Item> {
        let limit = limit(account, &key)?;
        let allocation = account.allocations.get(&key.allocation)?;
        let known = figures.found.get(&Place::from(&key));
        let figure = known.copied().unwrap_or(0);
        let whole = known.is_some() || figures.whole;
        let seen = if figure > limit.limit {
            Seen::Above
        } else if !whole || !all_report(allocation, &key, reported) {
            Seen::Unknown
        } else {
            Seen::Below
        };
        self.step(account, key, seen, (begin, 10), figure, 0)
    }

    /// Looks at the sites, as they are now.
    pub fn look_at_sites(&mut self, account: &Account, now: i64) -> Vec<Item> {
        // The clock may have jumped, and the collector been away.
        let span = if self.looked == 0 { 0 } else { (now - self.looked).clamp(0, STEP) };
        self.looked = now;
        let mut items = Vec::new();
        for rule in counting(account) {
            let Some(wait) = rule.site_without_holders else { continue };
            for (name, allocation) in account.allocations.iter().filter(|(name, _)| rule.is_about(name)) {
                for (site, held) in &allocation.sites {
                    let place = Place {
                        allocation: name.clone(),
                        address: None,
                        origin: None,
                        protocol: Default::default(),
                        reason: String::new(),
                    };
                    let key = Key { site: site.clone(), ..key(rule, Kind::SiteWithoutHolders, place) };
                    let seen = if *held == 0 { Seen::Above } else { Seen::Below };
                    // Nothing was seen before the first look.
                    let span = if self.tracks.contains_key(&key) { span } else { 0 };
                    items.extend(self.step(account, key, seen, (now - span, span), i64::from(*held), wait));
                }
            }
        }
        items
    }

    fn step(
        &mut self,
        account: &Account,
        key: Key,
        seen: Seen,
        (at, span): (i64, i64),
        figure: i64,
        wait: i64,
    ) -> Option<Item> {
        let before = self.tracks.remove(&key);
        if before.is_none() && self.tracks.len() >= MOST_TRACKS {
            return None;
        }
        let (track, turn) = step(before, seen, (at, span), figure, wait);
        let track = track?;
        let item = turn.map(|turn| {
            let (happening, moment) = match turn {
                Turn::Raised => (Happening::Raised, at + span),
                // A site was seen so at the end of the step, use from the begin of the slot on.
                Turn::Cleared if key.kind == Kind::SiteWithoutHolders => (Happening::Cleared, at + span),
                Turn::Cleared => (Happening::Cleared, at),
            };
            let limit = limit(account, &key).unwrap_or_default();
            Item::new(&account.name, key.clone(), &track, happening, moment, limit)
        });
        if turn != Some(Turn::Cleared) {
            self.tracks.insert(key, track);
        }
        item
    }
}

fn key(rule: &Rule, kind: Kind, place: Place) -> Key {
    let Place { allocation, address, origin, protocol, reason } = place;
    let (alert, uid) = (rule.name.clone(), rule.uid.clone());
    Key { alert, uid, kind, allocation, address, origin, protocol, reason, site: String::new() }
}

/// The limit that holds for something; None: nobody wants to know of it.
pub(super) fn limit(account: &Account, key: &Key) -> Option<Limit> {
    let rule = counting(account).find(|rule| rule.name == key.alert && rule.uid == key.uid)?;
    let allocation = account.allocations.get(&key.allocation).filter(|_| rule.is_about(&key.allocation))?;
    match key.kind {
        Kind::PortUse => {
            let wanted = rule.port_use?;
            // A /64 has no ports to be used up, and those of origins that were summed are not of one.
            let has_ports = |it: IpAddr| it.is_ipv4() || allocation.singles.contains(&it);
            let has_ports = key.address.is_some_and(has_ports) && key.origin.is_some();
            (has_ports && allocation.ports > 0 && rule.looks_at(key.origin)).then_some(Limit {
                limit: wanted.percent,
                clear_below: wanted.clear_below,
                seconds: wanted.wait,
                capacity: allocation.ports,
            })
        }
        Kind::Refusals => {
            let wanted = rule.refusals?;
            let (limit, seconds) = (wanted.more_than, wanted.within);
            rule.looks_at(key.origin).then_some(Limit { limit, seconds, ..Limit::default() })
        }
        Kind::SiteWithoutHolders => {
            let seconds = rule.site_without_holders?;
            // While nobody knows of any site, none is gone.
            let known = allocation.sites.is_empty() || allocation.sites.contains_key(&key.site);
            known.then_some(Limit { seconds, ..Limit::default() })
        }
    }
}

/// Whether all nodes that may have to do with it reported.
fn all_report(allocation: &Allocation, key: &Key, reported: &BTreeSet<String>) -> bool {
    match key.address {
        Some(address) => allocation.addresses.get(&address).is_none_or(|holders| holders.is_subset(reported)),
        None => allocation.addresses.values().all(|holders| holders.is_subset(reported)),
    }
}

/// Nodes whose reports a slot of the account needs.
pub(super) fn expected(account: &Account) -> BTreeSet<String> {
    let about = |name: &&String| counting(account).any(|rule| rule.is_about(name));
    let names = account.allocations.keys().filter(about);
    let allocations = names.filter_map(|name| account.allocations.get(name));
    allocations.flat_map(|it| it.addresses.values().flatten()).cloned().collect()
}
