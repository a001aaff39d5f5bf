//! Through which other nodes a node without slices sends.

use crate::rendezvous::weight;
use std::collections::BTreeMap;

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

/// Chooses among the holders, given with where they are: those of the node's zone, then those of its region, then all
/// others. Among equally near ones each node prefers others (rendezvous hashing over both names), so that the flows of
/// many nodes are spread over all holders. The same input gives the same choice.
pub fn choose(node: &str, place: &Place, holders: &BTreeMap<&str, Place>) -> Gateways {
    let distance = |other: &Place| match other {
        Place { zone, .. } if !zone.is_empty() && *zone == place.zone => 0,
        Place { region, .. } if !region.is_empty() && *region == place.region => 1,
        _ => 2,
    };
    let mut ranked: Vec<(u8, std::cmp::Reverse<u64>, &str)> = holders
        .iter()
        .filter(|(name, _)| **name != node)
        .map(|(name, other)| {
            let rank = weight(node.bytes().chain([0]).chain(name.bytes()));
            (distance(other), std::cmp::Reverse(rank), *name)
        })
        .collect();
    ranked.sort_unstable();
    // The nearest fill three quarters at most: were they all in one zone that fails, there must be others.
    let nearest = ranked.first().map_or(0, |(distance, _, _)| *distance);
    let far = ranked.iter().filter(|(distance, _, _)| *distance != nearest).count();
    let near = (ranked.len() - far).min(GATEWAYS - far.min(GATEWAYS / 4));
    let chosen = ranked.iter().filter(|(distance, _, _)| *distance == nearest).take(near);
    let others = ranked.iter().filter(|(distance, _, _)| *distance != nearest).take(GATEWAYS - near);
    Gateways { nodes: chosen.chain(others).map(|(_, _, name)| (*name).to_owned()).collect(), near }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(zone: &str, region: &str) -> Place {
        Place { zone: zone.into(), region: region.into() }
    }

    #[test]
    fn zone_comes_before_region_and_region_before_the_rest() {
        let holders = BTreeMap::from([
            ("far", place("x", "y")),
            ("region", place("b", "r")),
            ("zone", place("a", "r")),
            ("self", place("a", "r")),
        ]);
        let chosen = choose("self", &place("a", "r"), &holders);
        assert_eq!(chosen, Gateways { nodes: vec!["zone".into(), "region".into(), "far".into()], near: 1 });
        let unlabelled = choose("self", &Place::default(), &holders);
        assert_eq!((unlabelled.nodes.len(), unlabelled.near), (3, 3), "unknown places are all the same");
    }

    #[test]
    fn near_ones_leave_room_for_others() {
        let names: Vec<String> = (0..40).map(|number| format!("n{number}")).collect();
        let holders = |far: usize| -> BTreeMap<&str, Place> {
            let places = names.iter().enumerate();
            places.map(|(at, name)| (name.as_str(), place(if at < far { "far" } else { "a" }, ""))).collect()
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
        let mut holders: BTreeMap<&str, Place> =
            names.iter().map(|name| (name.as_str(), Place::default())).collect();
        let nodes: Vec<String> = (0..400).map(|number| format!("n{number}")).collect();
        let first = |holders: &BTreeMap<&str, Place>| -> Vec<String> {
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
}
