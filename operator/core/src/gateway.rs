//! Through which other nodes a node without slices sends.

use crate::model::AllocationName;
use crate::rendezvous::weight;
use std::collections::{BTreeMap, BTreeSet};

/// Gateways that one node uses for one allocation at most.
pub const GATEWAYS: usize = 16;

/// Where a node is (`topology.kubernetes.io/zone` and `/region`); empty = unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Zone.
    pub zone: String,
    /// Region.
    pub region: String,
}

/// The gateways of a node for one allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gateways {
    /// Names of nodes, best first.
    pub nodes: Vec<String>,
    /// How many of them, from the front, are nearer than the rest: flows go to others only while none of these answers.
    pub near: usize,
}

/// A node that holds slices of an allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// Where it is.
    pub place: Place,
    /// Place of its site among the names of the sites.
    pub site: usize,
    /// It has no ports left, or hardly any.
    pub full: bool,
}

/// Chooses among the holders: first those that are not full; of these the ones of the node's zone, then those of its
/// region, then all others; of equally near ones those of the first site by name. Among those that are equal then each
/// node prefers others (rendezvous hashing over both names), so that the flows of many nodes are spread over all of them.
/// The same input gives the same choice.
pub fn choose(node: &str, place: &Place, holders: &BTreeMap<&str, Holder>) -> Gateways {
    let distance = |other: &Place| match other {
        Place { zone, .. } if !zone.is_empty() && *zone == place.zone => 0,
        Place { region, .. } if !region.is_empty() && *region == place.region => 1,
        _ => 2,
    };
    let mut ranked: Vec<_> = holders
        .iter()
        .filter(|(name, _)| **name != node)
        .map(|(name, other)| {
            let rank = weight(node.bytes().chain([0]).chain(name.bytes()));
            ((other.full, distance(&other.place), other.site), std::cmp::Reverse(rank), *name)
        })
        .collect();
    ranked.sort_unstable();
    // The nearest fill three quarters at most: were they all in one zone that fails, there must be others.
    let nearest = ranked.first().map(|(distance, _, _)| *distance);
    let far = ranked.iter().filter(|(distance, _, _)| Some(*distance) != nearest).count();
    let near = (ranked.len() - far).min(GATEWAYS - far.min(GATEWAYS / 4));
    let chosen = ranked.iter().filter(|(distance, _, _)| Some(*distance) == nearest).take(near);
    let others = ranked.iter().filter(|(distance, _, _)| Some(*distance) != nearest).take(GATEWAYS - near);
    Gateways { nodes: chosen.chain(others).map(|(_, _, name)| (*name).to_owned()).collect(), near }
}

/// A label of a node or of a site's selector. With thousands of nodes the text would be most of what an agent remembers
/// of them; that two labels share a number is as good as impossible, and would only send flows to another site.
pub fn label(key: &str, value: &str) -> u64 {
    weight(key.bytes().chain([b'=']).chain(value.bytes()))
}

/// How far a node's ports for an allocation are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Load {
    /// There is room.
    Easy,
    /// Not for long, perhaps: what was thought of the node before holds.
    High,
    /// No room, or hardly any.
    Full,
}

impl Load {
    /// By what the node reports: ports in use towards the busiest origin, in percent, and flows refused during the last
    /// minute.
    pub fn of(fill_percent: u32, refused: u32) -> Load {
        match fill_percent {
            _ if refused > 0 => Load::Full,
            95.. => Load::Full,
            80.. => Load::High,
            _ => Load::Easy,
        }
    }
}

/// Nodes that are full, with the allocation for which they are: one that is stays so until there is room to spare, so that
/// flows do not go to and fro.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FullNodes(BTreeSet<(AllocationName, String)>);

impl FullNodes {
    /// Takes in what the nodes report now; one that reports nothing of an allocation has room.
    pub fn follow<'a>(&mut self, reports: impl Iterator<Item = (&'a str, &'a AllocationName, Load)>) {
        let full = reports.filter_map(|(node, allocation, load)| {
            let key = (allocation.clone(), node.to_owned());
            (load == Load::Full || load == Load::High && self.0.contains(&key)).then_some(key)
        });
        self.0 = full.collect();
    }

    /// Whether the node is full for the allocation.
    pub fn contains(&self, node: &str, allocation: &AllocationName) -> bool {
        self.0.contains(&(allocation.clone(), node.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(zone: &str, region: &str) -> Place {
        Place { zone: zone.into(), region: region.into() }
    }

    fn holder(zone: &str, region: &str) -> Holder {
        Holder { place: place(zone, region), ..Holder::default() }
    }

    #[test]
    fn zone_comes_before_region_and_region_before_the_rest() {
        let holders = BTreeMap::from([
            ("far", holder("x", "y")),
            ("region", holder("b", "r")),
            ("zone", holder("a", "r")),
            ("self", holder("a", "r")),
        ]);
        let chosen = choose("self", &place("a", "r"), &holders);
        assert_eq!(chosen, Gateways { nodes: vec!["zone".into(), "region".into(), "far".into()], near: 1 });
        let unlabelled = choose("self", &Place::default(), &holders);
        assert_eq!((unlabelled.nodes.len(), unlabelled.near), (3, 3), "unknown places are all the same");
    }

    #[test]
    fn near_ones_leave_room_for_others() {
        let names: Vec<String> = (0..40).map(|number| format!("n{number}")).collect();
        let holders = |far: usize| -> BTreeMap<&str, Holder> {
            let places = names.iter().enumerate();
            places.map(|(at, name)| (name.as_str(), holder(if at < far { "far" } else { "a" }, ""))).collect()
        };
        for (far, near) in [(0, 16), (1, 15), (3, 13), (10, 12), (38, 2), (40, 16)] {
            let chosen = choose("self", &place("a", ""), &holders(far));
            assert_eq!((chosen.nodes.len(), chosen.near), (16, near), "{far} of 40 are far");
        }
        assert_eq!(choose("self", &Place::default(), &BTreeMap::new()), Gateways::default());
    }

    #[test]
    fn nodes_spread_over_the_holders_and_one_that_goes_moves_only_its_own() {
        let names: Vec<String> = (0..8).map(|number| format!("h{number}")).collect();
        let mut holders: BTreeMap<&str, Holder> =
            names.iter().map(|name| (name.as_str(), Holder::default())).collect();
        let nodes: Vec<String> = (0..400).map(|number| format!("n{number}")).collect();
        let first = |holders: &BTreeMap<&str, Holder>| -> Vec<String> {
            nodes.iter().map(|node| choose(node, &Place::default(), holders).nodes.remove(0)).collect()
        };
        let before = first(&holders);
        for name in &names {
            let share = before.iter().filter(|chosen| *chosen == name).count();
            assert!((20..=80).contains(&share), "{name} is chosen by {share} of 400");
        }
        holders.remove("h3");
        let after = first(&holders);
        for (was, is) in before.iter().zip(&after) {
            assert!(was == is || was == "h3", "{was} -> {is}");
        }
    }

    #[test]
    fn of_equally_near_sites_the_first_by_name_is_used_while_it_has_room() {
        let mut holders = BTreeMap::from([
            ("n1", Holder { site: 1, ..holder("b", "r") }),
            ("n2", Holder { site: 0, ..holder("c", "r") }),
            ("n3", Holder { site: 1, ..holder("b", "r") }),
            ("n4", Holder { site: 0, ..holder("d", "") }),
        ]);
        let mut chosen = |full: &[&str]| {
            holders.iter_mut().for_each(|(name, it)| it.full = full.contains(name));
            let mut chosen = choose("self", &place("a", "r"), &holders);
            chosen.nodes[..chosen.near].sort_unstable();
            (chosen.nodes[..chosen.near].join(" "), chosen.nodes[chosen.near..].len())
        };
        assert_eq!(chosen(&[]), ("n2".into(), 3));
        assert_eq!(chosen(&["n2"]), ("n1 n3".into(), 2), "the next site");
        assert_eq!(chosen(&["n2", "n1"]), ("n3".into(), 3));
        assert_eq!(chosen(&["n1", "n2", "n3"]), ("n4".into(), 3), "even in another region");
        assert_eq!(chosen(&["n1", "n2", "n3", "n4"]), ("n2".into(), 3), "as if none were");
    }

    #[test]
    fn a_full_node_stays_so_until_there_is_room_to_spare() {
        let name = AllocationName { account: "a".into(), name: "x".into() };
        let other = AllocationName { account: "a".into(), name: "y".into() };
        let mut full = FullNodes::default();
        let mut follows = |fill, refused| {
            full.follow([("n1", &name, Load::of(fill, refused))].into_iter());
            assert!(!full.contains("n1", &other) && !full.contains("n2", &name));
            full.contains("n1", &name)
        };
        assert_eq!(
            [94, 95, 94, 80, 79, 94].map(|fill| follows(fill, 0)),
            [false, true, true, true, false, false]
        );
        assert!(follows(10, 1), "it refuses");
        assert!(!follows(10, 0));
        follows(100, 0);
        full.follow(std::iter::empty());
        assert!(!full.contains("n1", &name), "it is gone");
    }

    #[test]
    fn a_label_is_its_key_and_its_value() {
        assert_eq!(label("zone", "a"), label("zone", "a"));
        assert_ne!(label("zone", "a"), label("zone", "b"));
        assert_ne!(label("zone", "a"), label("region", "a"));
    }
}
