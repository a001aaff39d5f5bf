//! Which node holds which slices.

use super::addresses::Assignment;
use super::board::{Board, Slot};
use super::plural;
use crate::fence;
use crate::model::{Address, Allocation, AllocationName, Holding, Inputs, Lease, Node, State};
use crate::selector::{Labels, matches_sites};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;
use std::rc::Rc;

/// How an allocation fared with its nodes.
#[derive(Default)]
pub(super) struct Share {
    /// How many nodes hold slices.
    pub holders: usize,
    /// Ready nodes of the sites that hold none of any address: they send through others.
    pub without: Nodes,
    /// Ready nodes of the sites that hold some, but less than the minimum of one address.
    pub below: Nodes,
    /// Nodes of the sites whose Lease was taken over: what they held goes to others.
    pub fenced: Nodes,
    /// Ready nodes of the sites that hold none, as they do not hold their Lease either.
    pub leaseless: Nodes,
    /// Nodes match, but none of them is ready.
    pub all_unready: bool,
    /// No node matches.
    pub no_member: bool,
}

/// A number of nodes and the names of the first three: with thousands of nodes and allocations all names would be
/// most of a plan.
#[derive(Default)]
pub(super) struct Nodes {
    pub count: usize,
    pub first: Vec<String>,
}

impl Nodes {
    fn add(&mut self, name: &str) {
        self.count += 1;
        if self.first.len() < 3 {
            self.first.push(name.to_owned());
        }
    }
}

/// `5 nodes (n1, n2, n3, ...)`: a condition's message must stay short however many there are.
impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dots = if self.count > self.first.len() { ", ..." } else { "" };
        write!(f, "{} ({}{dots})", plural(self.count, "node", "nodes"), self.first.join(", "))
    }
}

/// The nodes of some sites, by name.
struct Members<'a> {
    all: Vec<&'a Node>,
    ready: Vec<&'a Node>,
    names: BTreeSet<&'a str>,
    /// Place in `ready`, by name.
    index: BTreeMap<&'a str, usize>,
}

/// Members of each set of selectors: most allocations have the same one.
struct Sites<'a> {
    nodes: &'a BTreeMap<&'a str, &'a Node>,
    known: BTreeMap<BTreeSet<&'a Labels>, Rc<Members<'a>>>,
}

impl<'a> Sites<'a> {
    fn members(&mut self, allocation: &'a Allocation) -> Rc<Members<'a>> {
        let found = self.known.entry(allocation.sites.values().collect()).or_insert_with(|| {
            let nodes = self.nodes.values().copied();
            let all: Vec<&Node> = nodes.filter(|node| matches_sites(allocation, node)).collect();
            let ready: Vec<&Node> = all.iter().copied().filter(|node| node.ready).collect();
            Rc::new(Members {
                index: ready.iter().enumerate().map(|(at, node)| (node.name.as_str(), at)).collect(),
                ready,
                names: all.iter().map(|node| node.name.as_str()).collect(),
                all,
            })
        });
        Rc::clone(found)
    }
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
    let mut sites = Sites { nodes: &nodes, known: BTreeMap::new() };
    let withheld = |address: Ipv4Addr| inputs.withheld.contains_key(&address);
    for allocation in &inputs.allocations {
        let Some(assignment) = assignments.get(&allocation.name) else { continue };
        let standing = standing.remove(&allocation.name).unwrap_or_default();
        let (fixed, standing): (Vec<&Address>, Vec<&Address>) =
            standing.into_iter().partition(|it| withheld(it.address));
        planned.extend(fixed.iter().copied().cloned());
        let fresh: Vec<Address> = fresh(allocation, assignment, inputs);
        let mut boards: Vec<Board> = standing.iter().copied().chain(&fresh).map(Board::new).collect();
        boards.sort_by_key(|board| board.address().address);
        let wanted = |board: &Board| assignment.wanted.contains(&board.address().address);

        let members = sites.members(allocation);
        for board in &mut boards {
            let wanted = wanted(board);
            if !allocation.deleting {
                board.set_fence(allocation.fence);
            }
            let keeps = |slice: u8, node: &str| {
                wanted && allocation.slices.contains(slice) && members.names.contains(node)
            };
            step(board, &nodes, keeps, inputs);
        }
        let (mut serving, leaving): (Vec<Board>, Vec<Board>) = boards.into_iter().partition(wanted);
        let held = grant(&mut serving, allocation, &members);
        let mut share = share(&serving, &fixed, &members);
        for (node, held) in members.ready.iter().zip(held) {
            let holds = |it: &Holding| it.node == node.name && it.state == State::Held;
            match held {
                _ if fixed.iter().flat_map(|it| &it.holdings).any(holds) => {}
                _ if allocation.fence.is_some() && matches!(node.lease, Lease::Taken { .. }) => {}
                0 if allocation.fence.is_some() && node.lease == Lease::Free => {
                    share.leaseless.add(&node.name);
                }
                0 => share.without.add(&node.name),
                held if held < allocation.per_node_min => share.below.add(&node.name),
                _ => {}
            }
        }
        if allocation.fence.is_some() {
            let taken = |node: &&&Node| matches!(node.lease, Lease::Taken { .. });
            members.all.iter().filter(taken).for_each(|node| share.fenced.add(&node.name));
        }
        shares.insert(allocation.name.clone(), share);
        planned.extend(serving.into_iter().map(Board::finish));
        planned.extend(still_held(leaving));
    }
    // The allocation is gone without its finalizer having run: what it held drains all the same.
    let (fixed, orphans): (Vec<&Address>, Vec<&Address>) =
        standing.into_values().flatten().partition(|it| withheld(it.address));
    planned.extend(fixed.into_iter().cloned());
    let mut orphans: Vec<Board> = orphans.into_iter().map(Board::new).collect();
    for board in &mut orphans {
        step(board, &nodes, |_, _| false, inputs);
    }
    planned.extend(still_held(orphans));
    planned.sort_by_key(|address| address.address);
    (planned, shares)
}

/// New addresses. Their epoch starts at the present second, not at 1: a former object of the same address had lower
/// ones (its slices rested before it went, and only a storm of changes outruns the clock), so that a node
/// which missed that it was deleted does not take the new one for an old one. One that is known to have had a higher one
/// has it from a clock that was ahead of ours.
fn fresh(allocation: &Allocation, assignment: &Assignment, inputs: &Inputs) -> Vec<Address> {
    let reported = |address: &Ipv4Addr| {
        let reports = inputs.nodes.iter().filter_map(|node| Some(node.programmed.get(address)?.epoch));
        reports.chain(inputs.epochs.get(address).copied()).max()
    };
    let fresh = assignment.fresh.iter().map(|(address, prefix)| Address {
        address: *address,
        prefix: prefix.clone(),
        allocation: allocation.name.clone(),
        epoch: inputs.now.max(1).max(reported(address).unwrap_or(0) + 1),
        holdings: Vec::new(),
        fence: None,
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
    let (before, now) = (board.address(), inputs.now);
    let address = before.address;
    board.advance(|slice, Slot { node: name, epoch, state }| {
        let resting = State::Quarantined { until: now + inputs.quarantine };
        let node = nodes.get(name);
        match state {
            State::Quarantined { until } => inputs.rests(address, slice, until).then_some(state),
            State::Held | State::Draining if node.is_none_or(|it| fence::has_passed(before, it)) => {
                Some(resting)
            }
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

/// Gives free slices to ready nodes of the sites, and returns how many each has then, over all addresses.
///
/// The minimum comes first, address by address, and of each address first to the nodes that have the fewest slices
/// so far (then by name): where one address has not enough for all, the next one serves those that went without.
fn grant<'a>(boards: &mut [Board<'a>], allocation: &Allocation, members: &Members<'a>) -> Vec<u32> {
    let ready = &members.ready;
    // Slices held, by board and node, and by node.
    let mut held: Vec<Vec<u32>> = boards.iter().map(|board| count_held(board, &members.index)).collect();
    let mut total: Vec<u32> =
        (0..ready.len()).map(|node| held.iter().map(|board| board[node]).sum()).collect();
    for (board, held) in boards.iter_mut().zip(&mut held) {
        let mut free = board.free(allocation.slices).len();
        let mut order: Vec<usize> =
            (0..ready.len()).filter(|node| held[*node] < allocation.per_node_min).collect();
        order.retain(|node| board.admits(ready[*node]));
        order.sort_by_key(|node| (total[*node], *node));
        for node in order {
            let granted = (allocation.per_node_min - held[node]).min(free);
            if granted == 0 {
                break;
            }
            board.grant(&ready[node].name, granted, allocation.slices);
            held[node] += granted;
            total[node] += granted;
            free -= granted;
        }
    }
    for (board, held) in boards.iter_mut().zip(&held) {
        let extra = share_out(board, allocation, ready, held);
        for (node, count) in extra.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            board.grant(&ready[node].name, count, allocation.slices);
            total[node] += count;
        }
    }
    total
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
    queue.retain(|(held, node)| *held < wants(*node) && board.admits(ready[*node]));
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

/// Counts. Who goes without is told by the caller, who knows what was granted.
fn share(serving: &[Board], fixed: &[&Address], members: &Members) -> Share {
    let boards = serving.iter().flat_map(Board::slots).map(|(_, slot)| (slot.node, slot.state));
    let fixed = fixed.iter().flat_map(|it| &it.holdings).map(|it| (it.node.as_str(), it.state));
    let holders: BTreeSet<&str> =
        boards.chain(fixed).filter(|(_, state)| *state == State::Held).map(|(node, _)| node).collect();
    Share {
        holders: holders.len(),
        all_unready: !members.all.is_empty() && members.ready.is_empty(),
        no_member: members.all.is_empty(),
        ..Share::default()
    }
}
