//! Which node holds which slices.

use super::addresses::Assignment;
use super::board::{Board, Slot};
use crate::model::{Address, Allocation, AllocationName, Inputs, Node, State};
use crate::selector::matches_sites;
use std::collections::{BTreeMap, BTreeSet};

/// How an allocation fared with its nodes.
#[derive(Default)]
pub(super) struct Share {
    /// Nodes that take part: they match a site, and are ready or hold slices already.
    pub nodes: BTreeSet<String>,
    /// Ready nodes of `nodes` that have less than the minimum of some address.
    pub short: BTreeSet<String>,
    /// Nodes match, but none of them is ready.
    pub all_unready: bool,
}

/// All addresses that shall exist, sorted, and the share of each allocation.
pub(super) fn plan(
    inputs: &Inputs,
    assignments: &BTreeMap<AllocationName, Assignment>,
) -> (Vec<Address>, BTreeMap<AllocationName, Share>) {
    let nodes: BTreeMap<&str, &Node> = inputs.nodes.iter().map(|node| (node.name.as_str(), node)).collect();
    let mut standing: BTreeMap<&AllocationName, Vec<&Address>> = BTreeMap::new();
    for address in &inputs.addresses {
        standing.entry(&address.allocation).or_default().push(address);
    }
    let mut planned: Vec<Address> = Vec::new();
    let mut shares = BTreeMap::new();
    for allocation in &inputs.allocations {
        let Some(assignment) = assignments.get(&allocation.name) else { continue };
        let standing = standing.remove(&allocation.name).unwrap_or_default();
        let fresh: Vec<Address> = fresh(allocation, assignment, inputs.now);
        let mut boards: Vec<Board> = standing.iter().copied().chain(&fresh).map(Board::new).collect();
        boards.sort_by_key(|board| board.address().address);
        let wanted = |board: &Board| assignment.wanted.contains(&board.address().address);

        let members: Vec<&Node> =
            nodes.values().copied().filter(|node| matches_sites(allocation, node)).collect();
        let names: BTreeSet<&str> = members.iter().map(|node| node.name.as_str()).collect();
        for board in &mut boards {
            let wanted = wanted(board);
            let keeps =
                |slice: u8, node: &str| wanted && allocation.slices.contains(slice) && names.contains(node);
            step(board, &nodes, keeps, inputs);
        }
        let (mut serving, leaving): (Vec<Board>, Vec<Board>) = boards.into_iter().partition(wanted);
        let ready: Vec<&Node> = members.iter().copied().filter(|node| node.ready).collect();
        let short = grant(&mut serving, allocation, &ready);
        shares.insert(allocation.name.clone(), share(&serving, &members, short));
        planned.extend(serving.into_iter().map(Board::finish));
        planned.extend(still_held(leaving));
    }
    // The allocation is gone without its finalizer having run: what it held drains all the same.
    let mut orphans: Vec<Board> = standing.into_values().flatten().map(Board::new).collect();
    for board in &mut orphans {
        step(board, &nodes, |_, _| false, inputs);
    }
    planned.extend(still_held(orphans));
    planned.sort_by_key(|address| address.address);
    (planned, shares)
}

/// New addresses. Their epoch starts at the present second, not at 1: a former object of the same address had lower
/// ones (its slices rested before it went, and only a storm of changes outruns the clock), so that a node
/// which missed that it was deleted does not take the new one for an old one.
fn fresh(allocation: &Allocation, assignment: &Assignment, now: i64) -> Vec<Address> {
    let fresh = assignment.fresh.iter().map(|(address, prefix)| Address {
        address: *address,
        prefix: prefix.clone(),
        allocation: allocation.name.clone(),
        epoch: now.max(1),
        holdings: Vec::new(),
    });
    fresh.collect()
}

/// Addresses on their way out: they stay until the last quarantine has ended, since whoever gets the address next
/// starts with all slices free.
fn still_held(boards: Vec<Board>) -> impl Iterator<Item = Address> {
    boards.into_iter().map(Board::finish).filter(|address| !address.holdings.is_empty())
}

/// Takes every slice at most one step further. `keeps` tells whether a node that exists may keep a slice.
fn step(board: &mut Board, nodes: &BTreeMap<&str, &Node>, keeps: impl Fn(u8, &str) -> bool, inputs: &Inputs) {
    let (address, now) = (board.address().address, inputs.now);
    board.advance(|slice, Slot { node: name, epoch, state }| {
        let resting = State::Quarantined { until: now + inputs.quarantine };
        let node = nodes.get(name);
        match state {
            State::Quarantined { until } => (now < until).then_some(state),
            State::Held | State::Draining if node.is_none() => Some(resting),
            State::Held | State::Draining if keeps(slice, name) => Some(State::Held),
            State::Held => Some(State::Draining),
            State::Draining => {
                let programmed = node.and_then(|node| node.programmed.get(&address));
                let drained = programmed.is_some_and(|it| it.epoch >= epoch && it.drained.contains(slice));
                Some(if drained { resting } else { state })
            }
        }
    });
}

/// Gives free slices to ready nodes of the sites, and says which nodes stay below their minimum.
fn grant<'a>(boards: &mut [Board<'a>], allocation: &Allocation, ready: &[&'a Node]) -> BTreeSet<String> {
    let index: BTreeMap<&str, usize> =
        ready.iter().enumerate().map(|(at, node)| (node.name.as_str(), at)).collect();
    // Slices held, by board and node.
    let mut held: Vec<Vec<u32>> = boards.iter().map(|board| count_held(board, &index)).collect();
    let mut short = BTreeSet::new();
    for (board, held) in boards.iter_mut().zip(&mut held) {
        let mut free = board.free(allocation.slices).len();
        for (node, held) in ready.iter().zip(held) {
            let lacking = allocation.per_node_min.saturating_sub(*held);
            let granted = lacking.min(free);
            if granted > 0 {
                board.grant(&node.name, granted, allocation.slices);
            }
            if granted < lacking {
                short.insert(node.name.clone());
            }
            *held += granted;
            free -= granted;
        }
    }
    for (board, held) in boards.iter_mut().zip(&held) {
        for (node, count) in ready.iter().zip(share_out(board, allocation, ready, held)) {
            if count > 0 {
                board.grant(&node.name, count, allocation.slices);
            }
        }
    }
    short
}

/// How many slices of the address more each node gets for its demand. One at a time goes to the node that has the
/// fewest, then to the first by name.
fn share_out(board: &Board, allocation: &Allocation, ready: &[&Node], held: &[u32]) -> Vec<u32> {
    let mut extra = vec![0; ready.len()];
    let mut free = board.free(allocation.slices).len();
    if free == 0 {
        return extra;
    }
    let wants = |node: usize| {
        let demand = ready[node].demand.get(&allocation.name).copied().unwrap_or(0);
        demand.min(allocation.per_node_max)
    };
    let mut queue: BTreeSet<(u32, usize)> = held.iter().copied().zip(0..).collect();
    queue.retain(|(held, node)| *held < wants(*node));
    while let (true, Some((held, node))) = (free > 0, queue.pop_first()) {
        free -= 1;
        extra[node] += 1;
        if held + 1 < wants(node) {
            queue.insert((held + 1, node));
        }
    }
    extra
}

fn count_held(board: &Board, index: &BTreeMap<&str, usize>) -> Vec<u32> {
    let mut held = vec![0; index.len()];
    for (_, slot) in board.slots().filter(|(_, slot)| slot.state == State::Held) {
        if let Some(node) = index.get(slot.node) {
            held[*node] += 1;
        }
    }
    held
}

fn share(serving: &[Board], members: &[&Node], short: BTreeSet<String>) -> Share {
    let holders: BTreeSet<&str> = serving
        .iter()
        .flat_map(Board::slots)
        .filter(|(_, slot)| slot.state == State::Held)
        .map(|(_, slot)| slot.node)
        .collect();
    let part = members.iter().filter(|node| node.ready || holders.contains(node.name.as_str()));
    Share {
        nodes: part.map(|node| node.name.clone()).collect(),
        short,
        all_unready: !members.is_empty() && members.iter().all(|node| !node.ready),
    }
}
