//! The nodes of an allocation's sites, and what they have of an address.

use super::board::Board;
use crate::fence;
use crate::model::{Allocation, AllocationName, Node, State};
use crate::selector::{Labels, serves};
use crate::slice::SliceSet;
use std::collections::BTreeMap;
use std::rc::Rc;

/// A node of a site.
pub(super) struct Member<'a> {
    pub node: &'a Node,
    /// Place of its site among the names of the sites.
    pub site: usize,
}

/// The nodes of some sites.
pub(super) struct Members<'a> {
    /// By name.
    pub all: Vec<Member<'a>>,
    /// Places in `all` of those that new slices can be given to.
    pub ready: Vec<usize>,
    places: BTreeMap<&'a str, usize>,
}

impl Members<'_> {
    /// Place of a node in `all`.
    pub fn place(&self, node: &str) -> Option<usize> {
        self.places.get(node).copied()
    }

    pub fn site(&self, place: usize) -> usize {
        self.all[place].site
    }

    /// Whether slices may be given to the node, and taken from it for others.
    pub fn takes(&self, place: usize, board: &Board) -> bool {
        let node = self.all[place].node;
        node.ready && board.admits(node)
    }
}

/// Members of each list of selectors: most allocations have the same one.
pub(super) struct Sites<'a> {
    nodes: &'a BTreeMap<&'a str, &'a Node>,
    known: BTreeMap<Vec<&'a Labels>, Rc<Members<'a>>>,
}

impl<'a> Sites<'a> {
    pub fn new(nodes: &'a BTreeMap<&'a str, &'a Node>) -> Sites<'a> {
        Sites { nodes, known: BTreeMap::new() }
    }

    pub fn members(&mut self, allocation: &'a Allocation) -> Rc<Members<'a>> {
        let selectors = allocation.sites.values().map(|site| &site.selector).collect();
        let found = self.known.entry(selectors).or_insert_with(|| {
            let member = |node: &&'a Node| Some(Member { node, site: serves(&allocation.sites, node)? });
            let all: Vec<Member> = self.nodes.values().filter_map(member).collect();
            Rc::new(Members {
                ready: (0..all.len()).filter(|at| all[*at].node.ready).collect(),
                places: all.iter().enumerate().map(|(at, it)| (it.node.name.as_str(), at)).collect(),
                all,
            })
        });
        Rc::clone(found)
    }
}

/// Slices that nodes ask for, by allocation: only few nodes ask for each.
pub(super) fn demands(nodes: &[Node]) -> BTreeMap<&AllocationName, Vec<(&str, u32)>> {
    let mut demands: BTreeMap<&AllocationName, Vec<(&str, u32)>> = BTreeMap::new();
    for node in nodes {
        for (allocation, slices) in &node.demand {
            demands.entry(allocation).or_default().push((&node.name, *slices));
        }
    }
    demands
}

/// What a member has of an address, of the slices that it may keep.
#[derive(Clone, Copy, Default)]
pub(super) struct Has {
    /// It may start flows from these.
    pub held: SliceSet,
    /// These may become its own again.
    pub draining: SliceSet,
}

/// What the members have of an address, by place; those that have nothing are missing.
#[derive(Default)]
pub(super) struct Standing(Vec<(usize, Has)>);

impl Standing {
    /// What a node had whose deadline has passed is nobody's.
    pub fn of(board: &Board, slices: SliceSet, members: &Members) -> Standing {
        let mut standing: Vec<(usize, Has)> = Vec::new();
        let mut last: Option<(&str, Option<usize>)> = None;
        for (slice, slot) in board.slots().filter(|(slice, _)| slices.contains(*slice)) {
            if let State::Quarantined { .. } = slot.state {
                continue;
            }
            let place = match last {
                Some((name, place)) if name == slot.node => place,
                _ => {
                    let passed = |place: &usize| fence::has_passed(board.address(), members.all[*place].node);
                    let place = members.place(slot.node).filter(|place| !passed(place));
                    standing.extend(place.map(|place| (place, Has::default())));
                    place
                }
            };
            last = Some((slot.node, place));
            let Some((_, has)) = standing.last_mut().filter(|_| place.is_some()) else { continue };
            match slot.state {
                State::Held => has.held.insert(slice),
                _ => has.draining.insert(slice),
            };
        }
        standing.sort_by_key(|(place, _)| *place);
        standing.dedup_by(|(place, has), (kept, all)| {
            let same = place == kept;
            if same {
                all.held = all.held.union(has.held);
                all.draining = all.draining.union(has.draining);
            }
            same
        });
        Standing(standing)
    }

    /// What a member has.
    pub fn get(&self, place: usize) -> Has {
        let found = self.0.binary_search_by_key(&place, |(place, _)| *place);
        found.ok().and_then(|at| self.0.get(at)).map_or_else(Has::default, |(_, has)| *has)
    }

    /// Slices that a member holds.
    pub fn holds(&self, place: usize) -> u32 {
        self.get(place).held.len()
    }

    /// Whether everybody has its target, and nothing drains.
    pub fn is_as(&self, targets: &[u32]) -> bool {
        let held: u32 = self.0.iter().map(|(_, has)| has.held.len()).sum();
        held == targets.iter().sum()
            && self.0.iter().all(|(place, has)| targets[*place] == has.held.len() && has.draining.is_empty())
    }

    /// By place.
    pub fn iter(&self) -> impl Iterator<Item = (usize, Has)> {
        self.0.iter().copied()
    }
}
