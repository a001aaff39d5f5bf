//! Prefixes: which of them count, and which of their addresses are free.

use crate::egress::{Egress, Kind};
use crate::model::{Node, Prefix};
use crate::plan::{Verdict, plural};
use crate::reason;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// All prefixes, each judged.
pub(crate) struct Prefixes<'a> {
    by_name: BTreeMap<&'a str, Judged<'a>>,
}

/// A prefix and whether addresses may be taken from it.
pub(crate) struct Judged<'a> {
    pub prefix: &'a Prefix,
    pub accepted: Verdict,
    /// Addresses of nodes that lie in it: reserved, whatever people write.
    pub nodes: Vec<IpAddr>,
}

impl<'a> Prefixes<'a> {
    /// Of prefixes that overlap only the oldest is accepted (then the first by name). A prefix that is not accepted
    /// itself still stands in the way of younger ones: otherwise deleting an old prefix could withdraw the
    /// acceptance of one that is in use. A range that nodes use for pods, or that Services have, is refused too: replies would not
    /// come back.
    pub fn judge(prefixes: &'a [Prefix], nodes: &[Node], services: &[IpNet]) -> Prefixes<'a> {
        let ranges: Vec<(IpNet, &str)> = nodes
            .iter()
            .flat_map(|node| node.pod_ranges.iter().map(|range| (*range, node.name.as_str())))
            .collect();
        let own: BTreeSet<IpAddr> = nodes.iter().flat_map(|node| node.addresses.iter().copied()).collect();
        let mut oldest_first: Vec<&Prefix> = prefixes.iter().collect();
        oldest_first.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
        let mut by_name = BTreeMap::new();
        for (age, prefix) in oldest_first.iter().enumerate() {
            let older = oldest_first[..age].iter().find(|older| overlap(older.cidr, prefix.cidr));
            // Of several the first by name: the message must not depend on the order.
            let pods = ranges.iter().filter(|(range, _)| overlap(*range, prefix.cidr)).min_by_key(|it| it.1);
            let nodes: Vec<IpAddr> =
                own.range(prefix.cidr.network()..=prefix.cidr.broadcast()).copied().collect();
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
                None => match (pods, services.iter().filter(|range| overlap(**range, prefix.cidr)).min()) {
                    (Some((range, node)), _) => Verdict::bad(
                        reason::OVERLAPS_PODS,
                        inside(prefix, range, &format!("the pods of node {node:?}")),
                    ),
                    (None, Some(range)) => Verdict::bad(
                        reason::OVERLAPS_SERVICES,
                        inside(prefix, range, "addresses of Services"),
                    ),
                    (None, None) => Verdict::good(reason::ACCEPTED, available(prefix, &nodes)),
                },
            };
            by_name.insert(prefix.name.as_str(), Judged { prefix, accepted, nodes });
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

/// What to say of a prefix with addresses that are used inside the cluster.
fn inside(prefix: &Prefix, range: &IpNet, whose: &str) -> String {
    format!(
        "spec.cidr: {} overlaps {range}, {whose}: replies would not come back; create another prefix with a range that is not used inside the cluster",
        prefix.cidr
    )
}

fn available(prefix: &Prefix, nodes: &[IpAddr]) -> String {
    let message = format!("{} is available to account {:?}", prefix.cidr, prefix.account);
    match nodes {
        [] => message,
        [first, ..] => format!(
            "{message}, except {} that nodes have themselves ({first}{})",
            plural(nodes.len(), "address", "addresses"),
            if nodes.len() > 1 { ", ..." } else { "" }
        ),
    }
}

/// Whether two ranges have an address in common (one then contains the other).
pub(crate) fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// The egress addresses of a prefix: IPv4 addresses, IPv6 /64s, or one IPv6 address. All of the range can be allocated, the
/// first and the last included, except what is reserved.
pub(crate) struct Pool {
    pub kind: Kind,
    /// Places, see [`Egress::place`].
    first: u128,
    last: u128,
    /// Reserved ranges within the prefix: sorted, disjoint, both ends included.
    reserved: Vec<(u128, u128)>,
}

impl Pool {
    pub fn new(Judged { prefix, nodes, .. }: &Judged) -> Pool {
        let kind = Kind::of(&prefix.cidr);
        let (first, last) = ends(kind, prefix.cidr);
        let reserved = prefix.reserved.iter().filter(|range| overlap(**range, prefix.cidr));
        let reserved = reserved.copied().chain(nodes.iter().map(|address| IpNet::from(*address)));
        let mut ranges: Vec<(u128, u128)> = reserved.map(|range| ends(kind, range)).collect();
        ranges.sort_unstable();
        let mut reserved: Vec<(u128, u128)> = Vec::new();
        for (from, to) in ranges {
            let (from, to) = (from.max(first), to.min(last));
            match reserved.last_mut() {
                Some((_, end)) if from <= *end => *end = to.max(*end),
                _ => reserved.push((from, to)),
            }
        }
        Pool { kind, first, last, reserved }
    }

    /// How many egress addresses can be allocated.
    pub fn capacity(&self) -> u32 {
        u32::try_from(size((self.first, self.last)) - self.all_reserved()).unwrap_or(u32::MAX)
    }

    /// How many egress addresses are reserved.
    pub fn reserved(&self) -> u32 {
        u32::try_from(self.all_reserved()).unwrap_or(u32::MAX)
    }

    fn all_reserved(&self) -> u128 {
        self.reserved.iter().copied().map(size).sum()
    }

    /// Whether the address lies in the prefix.
    pub fn contains(&self, address: Egress) -> bool {
        self.kind == address.kind() && (self.first..=self.last).contains(&address.place())
    }

    /// The address of the pool that nobody can get while this one is somebody's: itself, or what overlaps it.
    pub fn blocked_by(&self, address: Egress) -> Option<Egress> {
        let own = match (self.kind, address) {
            (Kind::Network, Egress::Single(address)) => Egress::containing(address.into()),
            (Kind::Single, Egress::V6(_)) => self.kind.at(self.first),
            _ => address,
        };
        (own.overlaps(address) && self.contains(own) && !self.is_reserved(own)).then_some(own)
    }

    /// Whether the address must not be allocated.
    pub fn is_reserved(&self, address: Egress) -> bool {
        self.reserved_range(address.place()).is_some()
    }

    /// The lowest address from `from` on that is neither reserved nor taken.
    pub fn lowest_free(&self, from: u128, taken: impl Fn(Egress) -> bool) -> Option<Egress> {
        let mut candidate = from.max(self.first);
        while candidate <= self.last {
            let last_unusable = match self.reserved_range(candidate) {
                Some((_, end)) => end,
                None if taken(self.kind.at(candidate)) => candidate,
                None => return Some(self.kind.at(candidate)),
            };
            candidate = last_unusable.checked_add(1)?;
        }
        None
    }

    fn reserved_range(&self, place: u128) -> Option<(u128, u128)> {
        let after = self.reserved.partition_point(|(from, _)| *from <= place);
        self.reserved[..after].last().copied().filter(|(_, to)| place <= *to)
    }
}

/// How many places a range has, both ends included.
fn size((from, to): (u128, u128)) -> u128 {
    (to - from).saturating_add(1)
}

/// Places of the first and the last egress address of a kind of which a range has a part.
fn ends(kind: Kind, range: IpNet) -> (u128, u128) {
    let place = |address| kind.containing(address).place();
    (place(range.network()), place(range.broadcast()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool_prefix() -> Prefix {
        Prefix {
            name: "p".into(),
            created: 1,
            cidr: IpNet::default(),
            reserved: vec![],
            account: "shop".into(),
            delegations: vec![],
            deleting: false,
        }
    }

    fn pool(cidr: &str, reserved: &[&str]) -> Pool {
        let prefix = Prefix {
            cidr: cidr.parse().unwrap(),
            reserved: reserved.iter().map(|range| range.parse().unwrap()).collect(),
            ..pool_prefix()
        };
        Pool::new(&Judged { prefix: &prefix, accepted: Verdict::good(reason::ACCEPTED, ""), nodes: vec![] })
    }

    fn all(pool: &Pool) -> Vec<Egress> {
        let mut found: Vec<Egress> = Vec::new();
        while let Some(address) = pool.lowest_free(0, |address| found.contains(&address)) {
            found.push(address);
        }
        found
    }

    #[test]
    fn the_whole_range_is_usable() {
        for (cidr, size) in
            [("192.0.2.0/24", 256), ("192.0.2.4/30", 4), ("192.0.2.6/31", 2), ("192.0.2.7/32", 1)]
        {
            assert_eq!(pool(cidr, &[]).capacity(), size);
            assert_eq!(all(&pool(cidr, &[])).len(), size as usize);
        }
        assert_eq!(pool("255.255.255.254/31", &[]).capacity(), 2);
        assert_eq!(all(&pool("255.255.255.254/31", &[])).len(), 2);
        assert_eq!(pool("0.0.0.0/0", &[]).capacity(), u32::MAX);
    }

    #[test]
    fn reserved_ranges_may_nest_touch_repeat_and_reach_beyond() {
        let reserved = [
            "192.0.2.8/30",
            "192.0.2.9/32",
            "192.0.2.11/32",
            "192.0.2.12/31",
            "192.0.2.8/30",
            "198.51.100.0/24",
        ];
        let some = pool("192.0.2.0/28", &reserved);
        assert_eq!((some.capacity(), some.reserved()), (10, 6));
        let free = all(&some);
        assert_eq!(free.len(), 10);
        assert!(free.iter().all(|address| !some.is_reserved(*address) && some.contains(*address)));
        let none = pool("192.0.2.0/28", &["192.0.2.0/24"]);
        assert_eq!((none.capacity(), all(&none).len()), (0, 0));
        let last = pool("255.255.255.254/31", &["255.255.255.255/32"]);
        assert_eq!(all(&last), [Egress::V4(std::net::Ipv4Addr::new(255, 255, 255, 254))]);
    }

    #[test]
    fn of_ipv6_each_64_is_one_and_goes_with_any_part_that_is_reserved() {
        let some = pool("2001:db8::/62", &["2001:db8:0:1::7/128", "2001:db8:0:2:8000::/65", "192.0.2.0/24"]);
        assert_eq!(some.capacity(), 2);
        assert_eq!(all(&some), ["2001:db8::/64", "2001:db8:0:3::/64"].map(|it| it.parse().unwrap()));
        assert_eq!(pool("2001:db8::/64", &[]).capacity(), 1);
        assert_eq!(pool("2001:db8::/32", &[]).capacity(), u32::MAX, "one more than can be told");
        let prefix = Prefix { cidr: "2001:db8::/63".parse().unwrap(), ..pool_prefix() };
        let nodes = vec!["2001:db8::9".parse().unwrap()];
        let pool =
            Pool::new(&Judged { prefix: &prefix, accepted: Verdict::good(reason::ACCEPTED, ""), nodes });
        assert_eq!(all(&pool), ["2001:db8:0:1::/64".parse().unwrap()], "a node's own is reserved");
    }

    #[test]
    fn a_128_is_one_address_unless_it_is_reserved_or_a_nodes() {
        let one: Egress = "2001:db8::7".parse().unwrap();
        for reserved in [&[][..], &["2001:db8::8/128"], &["192.0.2.0/24"]] {
            let pool = pool("2001:db8::7/128", reserved);
            assert_eq!((pool.capacity(), pool.reserved(), all(&pool)), (1, 0, vec![one]));
            assert!(pool.contains(one) && !pool.is_reserved(one));
            assert!(!pool.contains("2001:db8::8".parse().unwrap()));
            assert!(!pool.contains("2001:db8::/64".parse().unwrap()), "it is not all of it");
            assert_eq!(pool.lowest_free(0, |it| it == one), None);
        }
        for reserved in ["2001:db8::7/128", "2001:db8::/120"] {
            let pool = pool("2001:db8::7/128", &[reserved]);
            assert_eq!((pool.capacity(), pool.reserved(), all(&pool)), (0, 1, vec![]));
        }
        let prefix = Prefix { cidr: "2001:db8::7/128".parse().unwrap(), ..pool_prefix() };
        let nodes = vec!["2001:db8::7".parse().unwrap()];
        let judged = Judged { prefix: &prefix, accepted: Verdict::good(reason::ACCEPTED, ""), nodes };
        assert_eq!(Pool::new(&judged).capacity(), 0, "a node's own is reserved");
        let last = pool("2001:db8::ffff:ffff:ffff:ffff/128", &[]);
        assert_eq!(all(&last).len(), 1);
    }

    #[test]
    fn what_overlaps_an_address_of_a_pool_blocks_it() {
        let of = |text: &str| text.parse::<Egress>().unwrap();
        let (wide, one) = (pool("2001:db8::/62", &["2001:db8:0:3::/64"]), pool("2001:db8::7/128", &[]));
        for (address, blocks_wide, blocks_one) in [
            ("2001:db8::7", Some("2001:db8::/64"), Some("2001:db8::7")),
            ("2001:db8::8", Some("2001:db8::/64"), None),
            ("2001:db8::/64", Some("2001:db8::/64"), Some("2001:db8::7")),
            ("2001:db8:0:1::/64", Some("2001:db8:0:1::/64"), None),
            ("2001:db8:0:3::9", None, None),
            ("2001:db8:0:4::/64", None, None),
            ("192.0.2.7", None, None),
        ] {
            assert_eq!(wide.blocked_by(of(address)), blocks_wide.map(of), "{address}");
            assert_eq!(one.blocked_by(of(address)), blocks_one.map(of), "{address}");
        }
    }

    #[test]
    fn a_prefix_that_is_refused_still_stands_in_the_way() {
        let prefix = |name: &str, created, cidr: &str| Prefix {
            name: name.into(),
            created,
            cidr: cidr.parse().unwrap(),
            reserved: vec![],
            account: "shop".into(),
            delegations: vec![],
            deleting: false,
        };
        let first = prefix("first", 1, "192.0.2.0/29");
        let rest = [prefix("second", 2, "192.0.2.0/28"), prefix("third", 3, "192.0.2.8/29")];
        let accepted = |prefixes: &[Prefix], name: &str| {
            Prefixes::judge(prefixes, &[], &[]).get(name).is_some_and(|judged| judged.accepted.is_good())
        };
        let all = [vec![first], rest.to_vec()].concat();
        assert_eq!(["first", "second", "third"].map(|name| accepted(&all, name)), [true, false, false]);
        assert_eq!(["second", "third"].map(|name| accepted(&rest, name)), [true, false]);
    }
}
