//! Which node holds which slices.

use super::addresses::Assignment;
use super::board::{Board, Slot};
use super::members::{Members, Sites, Standing, demands};
use super::targets::{Wants, staying};
use super::{SiteOutcome, plural};
use crate::egress::{Egress, Kind};
use crate::fence;
use crate::model::{Address, Allocation, AllocationName, Holding, Inputs, Lease, Node, State};
use crate::site::quotas;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// How an allocation fared with its nodes, by kind of address: of IPv4 always, of the others where it has some.
pub(super) type Shares = BTreeMap<Kind, Share>;

/// How the addresses of one kind fared.
#[derive(Default)]
pub(super) struct Share {
    /// How many nodes hold slices.
    pub holders: usize,
    /// Ready nodes of the sites that hold none of any address: over IPv4 they send through others.
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
    /// Each site, by name.
    pub sites: Vec<SiteOutcome>,
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

/// All addresses that shall exist, sorted, and the share of each allocation.
pub(super) fn plan(
    inputs: &Inputs,
    assignments: &BTreeMap<AllocationName, Assignment>,
) -> (Vec<Address>, BTreeMap<AllocationName, Shares>) {
    let nodes: BTreeMap<&str, &Node> = inputs.nodes.iter().map(|node| (node.name.as_str(), node)).collect();
    let mut standing: BTreeMap<&AllocationName, Vec<&Address>> = BTreeMap::new();
    for address in &inputs.addresses {
        standing.entry(&address.allocation).or_default().push(address);
    }
    let mut planned: Vec<Address> = Vec::new();
    let mut shares = BTreeMap::new();
    let mut sites = Sites::new(&nodes);
    let demands = demands(&inputs.nodes);
    let withheld = |address: Egress| inputs.withheld.contains_key(&address);
    for allocation in &inputs.allocations {
        let Some(assignment) = assignments.get(&allocation.name) else { continue };
        let standing = standing.remove(&allocation.name).unwrap_or_default();
        let (fixed, standing): (Vec<&Address>, Vec<&Address>) =
            standing.into_iter().partition(|it| withheld(it.address));
        planned.extend(fixed.iter().copied().cloned());
        let fresh: Vec<Address> = fresh(allocation, assignment, inputs);
        let members = sites.members(allocation);
        let asked = demands.get(&allocation.name).map(Vec::as_slice).unwrap_or_default();
        let wanted = |board: &Board| assignment.wanted.contains(&board.address().address);
        let mut of_kind = |kind: Kind| {
            let is = |it: &&Address| it.address.kind() == kind;
            let fixed: Vec<&Address> = fixed.iter().copied().filter(is).collect();
            let boards = standing.iter().copied().chain(&fresh).filter(is).map(Board::new);
            let mut boards: Vec<Board> = boards.collect();
            if kind != Kind::Address && boards.is_empty() && fixed.is_empty() {
                return None;
            }
            let allocation = allocation.of(kind);
            boards.sort_by_key(|board| board.address().address);
            if !allocation.deleting {
                boards.iter_mut().for_each(|board| board.set_fence(allocation.fence));
            }
            let (mut serving, mut leaving): (Vec<Board>, Vec<Board>) = boards.into_iter().partition(wanted);
            for board in &mut leaving {
                step(board, &nodes, |_| false, inputs);
            }
            let quotas = quotas(&allocation.sites, allocation.slices);
            let wants = Wants::new(&allocation, &members, &quotas, asked);
            let total = serve(&mut serving, &wants, &nodes, inputs);
            let share = share(&allocation, &serving, &fixed, &members, (&quotas, &total));
            planned.extend(serving.into_iter().map(Board::finish));
            planned.extend(still_held(leaving));
            Some((kind, share))
        };
        let own: Shares = Kind::ALL.into_iter().filter_map(&mut of_kind).collect();
        shares.insert(allocation.name.clone(), own);
    }
    // The allocation is gone without its finalizer having run: what it held drains all the same.
    let (fixed, orphans): (Vec<&Address>, Vec<&Address>) =
        standing.into_values().flatten().partition(|it| withheld(it.address));
    planned.extend(fixed.into_iter().cloned());
    let mut orphans: Vec<Board> = orphans.into_iter().map(Board::new).collect();
    for board in &mut orphans {
        step(board, &nodes, |_| false, inputs);
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
    let reported = |address: &Egress| {
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

/// Takes every slice at most one step further. `keeps` tells whether a node that exists keeps a slice, or gets it back.
fn step(board: &mut Board, nodes: &BTreeMap<&str, &Node>, keeps: impl Fn(u8) -> bool, inputs: &Inputs) {
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
            State::Held | State::Draining if keeps(slice) => Some(State::Held),
            State::Held => Some(State::Draining),
            State::Draining => {
                let programmed = node.and_then(|node| node.programmed.get(&address));
                let drained = programmed.is_some_and(|it| it.epoch >= epoch && it.drained.contains(slice));
                Some(if drained { resting } else { state })
            }
        }
    });
}

/// Takes the slices of the addresses that serve an allocation a step further, and gives free ones out. Returns how many
/// slices each member holds then, over all of these addresses.
fn serve<'a>(
    serving: &mut [Board<'a>],
    wants: &Wants<'_, 'a>,
    nodes: &BTreeMap<&str, &Node>,
    inputs: &Inputs,
) -> Vec<u32> {
    let Wants { allocation, members, quotas, .. } = *wants;
    let standing = |board: &Board| Standing::of(board, allocation.slices, members);
    let before: Vec<Standing> = serving.iter().map(standing).collect();
    let mut total = vec![0; members.all.len()];
    for (place, has) in before.iter().flat_map(Standing::iter) {
        total[place] += has.held.len();
    }
    for (board, had) in serving.iter_mut().zip(&before) {
        let targets = wants.targets(had, &total, |place| members.takes(place, board));
        let staying = staying(had, &targets);
        step(board, nodes, |slice| staying.contains(slice), inputs);
        if had.is_as(&targets) {
            continue;
        }
        let meanwhile = standing(board);
        let mut granting = Granting::new(board, allocation, members, (quotas, &meanwhile));
        granting.grant(&targets, &total);
        for (place, count) in granting.given {
            total[place] += count;
        }
        for (place, has) in had.iter() {
            total[place] = total[place] + meanwhile.holds(place) - has.held.len();
        }
    }
    total
}

/// Gives free slices of one address to ready members.
struct Granting<'b, 'a> {
    board: &'b mut Board<'a>,
    allocation: &'b Allocation,
    members: &'b Members<'a>,
    /// Slices that may be given to each site's nodes: what is left of its quota. What drains counts, since it is as good as
    /// the site's own.
    room: Vec<u32>,
    free: u32,
    /// What was held before.
    before: &'b Standing,
    /// Slices given, by place.
    given: BTreeMap<usize, u32>,
}

impl<'b, 'a> Granting<'b, 'a> {
    fn new(
        board: &'b mut Board<'a>,
        allocation: &'b Allocation,
        members: &'b Members<'a>,
        (quotas, before): (&[u32], &'b Standing),
    ) -> Granting<'b, 'a> {
        let mut room = quotas.to_vec();
        for (place, has) in before.iter() {
            let room = &mut room[members.site(place)];
            *room = room.saturating_sub(has.held.len() + has.draining.len());
        }
        let (free, given) = (board.free(allocation.slices).len(), BTreeMap::new());
        Granting { board, allocation, members, room, free, before, given }
    }

    /// The minimum comes first, to the nodes that have the fewest slices of all addresses, then by name. Then one slice
    /// at a time goes to the node that has the fewest of this one.
    fn grant(&mut self, targets: &[u32], total: &[u32]) {
        let min = self.allocation.per_node_min;
        let before = self.before;
        let lacking = |(place, target): &(usize, u32)| *target > 0 && *target > before.holds(*place);
        let lacks = |granting: &Self, place: usize, target: u32| {
            target.saturating_sub(granting.holds(place)).min(granting.left(place))
        };
        let mut order: Vec<(usize, u32)> = match self.free {
            0 => Vec::new(),
            _ => targets.iter().copied().enumerate().filter(lacking).collect(),
        };
        order.retain(|(place, _)| self.members.takes(*place, self.board));
        order.sort_by_key(|(place, _)| (total[*place], *place));
        for (place, target) in &order {
            self.give(*place, lacks(self, *place, min.min(*target)));
        }
        let mut extra: BTreeMap<usize, u32> = BTreeMap::new();
        let mut queue: BTreeSet<(u32, usize, u32)> =
            order.iter().map(|(place, target)| (self.holds(*place), *place, *target)).collect();
        let (mut free, mut room) = (self.free, self.room.clone());
        while let (true, Some((held, place, target))) = (free > 0, queue.pop_first()) {
            let room = &mut room[self.members.site(place)];
            if held >= target || *room == 0 {
                continue;
            }
            (free, *room) = (free - 1, *room - 1);
            *extra.entry(place).or_default() += 1;
            queue.insert((held + 1, place, target));
        }
        for (place, count) in extra {
            self.give(place, count);
        }
    }

    fn give(&mut self, place: usize, count: u32) {
        if count == 0 {
            return;
        }
        let member = &self.members.all[place];
        self.board.grant(&member.node.name, count, self.allocation.slices);
        self.free -= count;
        self.room[member.site] -= count;
        *self.given.entry(place).or_default() += count;
    }

    fn holds(&self, place: usize) -> u32 {
        self.before.holds(place) + self.given.get(&place).copied().unwrap_or_default()
    }

    /// Slices that may be given to a node.
    fn left(&self, place: usize) -> u32 {
        self.free.min(self.room[self.members.site(place)])
    }
}

/// Counts, and names who goes without. `total` is how many slices each member holds of the addresses that serve.
fn share(
    allocation: &Allocation,
    serving: &[Board],
    fixed: &[&Address],
    members: &Members,
    (quotas, total): (&[u32], &[u32]),
) -> Share {
    let boards = serving.iter().flat_map(Board::slots).map(|(_, slot)| (slot.node, slot.state, 1));
    let length = |it: &Holding| u32::from(it.last.saturating_sub(it.first)) + 1;
    let fixed = fixed.iter().flat_map(|it| &it.holdings);
    let fixed = fixed.map(|it| (it.node.as_str(), it.state, length(it)));
    let fixed_holders: BTreeSet<&str> =
        fixed.clone().filter(|(_, state, _)| *state == State::Held).map(|(node, ..)| node).collect();
    // By node: whether it may start flows, and how many slices it has.
    let mut has: BTreeMap<&str, (bool, u32)> = BTreeMap::new();
    for (node, state, count) in boards.chain(fixed) {
        if let State::Held | State::Draining = state {
            let (holds, slices) = has.entry(node).or_default();
            (*holds, *slices) = (*holds || state == State::Held, *slices + count);
        }
    }
    let mut share = Share {
        holders: has.values().filter(|(holds, _)| *holds).count(),
        all_unready: !members.all.is_empty() && members.ready.is_empty(),
        no_member: members.all.is_empty(),
        sites: SiteOutcome::all(allocation, quotas, serving.len()),
        ..Share::default()
    };
    for (member, total) in members.all.iter().zip(total) {
        let name = member.node.name.as_str();
        let fence = allocation.fence.map(|_| member.node.lease);
        if let Some(Lease::Taken { .. }) = fence {
            share.fenced.add(name);
        }
        let lacks = member.node.ready && *total < allocation.per_node_min && !fixed_holders.contains(name);
        let short = lacks
            && match fence {
                Some(Lease::Taken { .. }) => false,
                Some(Lease::Free) if *total == 0 => {
                    share.leaseless.add(name);
                    false
                }
                _ => true,
            };
        match total {
            0 if short => share.without.add(name),
            _ if short => share.below.add(name),
            _ => {}
        }
        if let Some(site) = share.sites.get_mut(member.site) {
            let (holds, slices) = has.get(name).copied().unwrap_or_default();
            site.nodes += 1;
            site.usable += u32::from(member.node.ready || slices > 0);
            site.holders += u32::from(holds);
            site.held += slices;
            site.short |= short;
        }
    }
    share
}
