//! What nodes report of addresses, against what the API server has of them.

use crate::world::World;
use aegis_core::egress::Egress;
use aegis_core::holding::contradicts;
use aegis_core::model::Address;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Nodes take a moment to let go of an address whose object was deleted, and local copies are not of the same moment.
/// Only what lasts longer is told.
const LASTING: Duration = Duration::from_secs(300);

/// Finds addresses that nodes send from though no object says so, or only one that is older than what the nodes have:
/// objects were deleted while no leader remembered them, or came back from a backup. Planned as if nothing were the
/// case, the same ports would be given to others.
#[derive(Default)]
pub struct Evidence {
    /// Since when, by a clock that never goes back.
    since: BTreeMap<Egress, Duration>,
    /// Addresses that this leader gave back when all of them had rested, with their last epoch: whoever has not noticed
    /// yet (its agent is away) does not send from them.
    released: BTreeMap<Egress, i64>,
    /// Highest epoch that nodes reported of addresses that were ever found so.
    highest: BTreeMap<Egress, i64>,
}

/// Nodes that speak for one address.
#[derive(Default)]
struct Witnesses<'a> {
    first: Vec<&'a str>,
    count: usize,
    older: bool,
    epoch: i64,
}

impl Evidence {
    /// Looks again. What a plan must leave alone, with what to tell about it.
    pub fn observe(&mut self, world: &World, now: Duration) -> BTreeMap<Egress, Option<String>> {
        let found = self.find(world);
        self.since.retain(|address, _| found.contains_key(address));
        let lasts = |address: &Egress, since: &Duration| {
            (now >= *since + LASTING).then(|| found.get(address).map(|it| it.message(address))).flatten()
        };
        for (address, witnesses) in &found {
            self.since.entry(*address).or_insert(now);
            let highest = self.highest.entry(*address).or_default();
            *highest = witnesses.epoch.max(*highest);
        }
        self.since.iter().map(|(address, since)| (*address, lasts(address, since))).collect()
    }

    /// What the epoch of an address that is made anew must be above, also when no node speaks for it any more.
    pub fn epochs(&self) -> BTreeMap<Egress, i64> {
        let mut epochs = self.highest.clone();
        for (address, released) in &self.released {
            let epoch = epochs.entry(*address).or_default();
            *epoch = (*epoch).max(*released);
        }
        epochs
    }

    /// An address was given back when all of it had rested.
    pub fn released(&mut self, address: Egress, epoch: i64) {
        self.released.insert(address, epoch);
    }

    fn find<'w>(&self, world: &'w World) -> BTreeMap<Egress, Witnesses<'w>> {
        let standing: BTreeMap<Egress, &Address> =
            world.inputs.addresses.iter().map(|address| (address.address, address)).collect();
        // Nobody gets these anyhow, and what is wrong with them is told elsewhere.
        let untouchable: BTreeSet<Egress> =
            world.frozen.iter().map(|it| it.address).chain(world.unreadable.iter().copied()).collect();
        let mut found: BTreeMap<Egress, Witnesses> = BTreeMap::new();
        for node in &world.inputs.nodes {
            for (address, report) in &node.programmed {
                let object = standing.get(address);
                let known = match object {
                    Some(object) => Some(object.epoch),
                    None if untouchable.contains(address) => continue,
                    None => self.released.get(address).copied(),
                };
                if !contradicts(report.epoch, known) {
                    continue;
                }
                let witnesses = found.entry(*address).or_default();
                witnesses.older = object.is_some();
                witnesses.epoch = witnesses.epoch.max(report.epoch);
                witnesses.count += 1;
                if witnesses.first.len() < 3 {
                    witnesses.first.push(&node.name);
                }
            }
        }
        found
    }
}

impl Witnesses<'_> {
    fn message(&self, address: &Egress) -> String {
        let dots = if self.count > self.first.len() { ", ..." } else { "" };
        let nodes = format!("{}{dots}", self.first.join(", "));
        let page = "see \"Withheld addresses\" in docs/operations.md";
        if self.older {
            format!(
                "{address}: nodes ({nodes}) have a newer EgressAddress than the API server, which may have been restored from a backup; nothing is changed in it until no node does: stop these nodes, and start none before the last is stopped; {page}"
            )
        } else {
            format!(
                "{address}: nodes ({nodes}) send from it, but its EgressAddress is gone; nobody gets it until no node does: drain and reboot these nodes; {page}"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_core::model::{AllocationName, Node, Programmed};

    const ADDRESS: Egress = Egress::V4(std::net::Ipv4Addr::new(203, 0, 113, 1));

    fn world(object: Option<i64>, reported: &[i64]) -> World {
        let mut world = World::default();
        world.inputs.addresses.extend(object.map(|epoch| Address {
            address: ADDRESS,
            prefix: "p".into(),
            allocation: AllocationName { account: "a".into(), name: "x".into() },
            epoch,
            holdings: Vec::new(),
            fence: None,
        }));
        world.inputs.nodes = (0..)
            .zip(reported)
            .map(|(index, epoch)| Node {
                name: format!("n{index}"),
                programmed: [(ADDRESS, Programmed { epoch: *epoch, ..Programmed::default() })].into(),
                ..Node::default()
            })
            .collect();
        world
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_agrees_is_left_alone() {
        let mut evidence = Evidence::default();
        assert!(evidence.observe(&world(Some(7), &[7, 6]), at(0)).is_empty());
        assert!(evidence.observe(&world(None, &[]), at(0)).is_empty());
        let mut unreadable = world(None, &[7]);
        unreadable.unreadable.push(ADDRESS);
        assert!(evidence.observe(&unreadable, at(0)).is_empty(), "told elsewhere");
    }

    #[test]
    fn what_this_leader_gave_back_itself_is_free_whoever_has_not_noticed() {
        let mut evidence = Evidence::default();
        evidence.released(ADDRESS, 7);
        assert!(evidence.observe(&world(None, &[7]), at(0)).is_empty());
        assert_eq!(evidence.observe(&world(None, &[8]), at(0)).len(), 1);
        assert_eq!(evidence.observe(&world(Some(6), &[7]), at(0)).len(), 1, "an older one came back");
    }

    #[test]
    fn gone_or_older_objects_are_withheld_at_once_and_told_if_it_lasts() {
        for (object, part) in [(None, "its EgressAddress is gone"), (Some(6), "restored from a backup")] {
            let mut evidence = Evidence::default();
            let world = world(object, &[7, 7, 7, 7]);
            assert_eq!(evidence.observe(&world, at(0)), [(ADDRESS, None)].into());
            assert_eq!(evidence.observe(&world, at(299)), [(ADDRESS, None)].into());
            let told = evidence.observe(&world, at(300)).remove(&ADDRESS).flatten().unwrap();
            assert!(told.contains("nodes (n0, n1, n2, ...)") && told.contains(part), "{told}");
        }
    }

    #[test]
    fn a_while_without_evidence_begins_anew() {
        let mut evidence = Evidence::default();
        evidence.observe(&world(None, &[7]), at(0));
        assert!(evidence.observe(&world(None, &[]), at(200)).is_empty());
        assert_eq!(evidence.epochs(), [(ADDRESS, 7)].into(), "what is made anew must be newer all the same");
        assert_eq!(evidence.observe(&world(None, &[7]), at(400)), [(ADDRESS, None)].into());
    }
}
