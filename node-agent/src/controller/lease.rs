//! What the data plane makes of the node's Lease, and what it needs of it.

use super::Controller;
use crate::apply;
use crate::desired::Desired;
use crate::lease::{Hold, Need, Read, Trouble};
use crate::observed::Observed;
use crate::ops::Op;
use crate::singles;
use crate::status::{NotReady, reason};
use crate::sweep::Usage;
use aegis_common::{LeaseValue, soonest};
use aegis_core::egress::Egress;
use aegis_core::model::Seconds;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest time for which writes wait for a node's first Lease: flows that live are not to be cut for want of it.
const FIRST_LEASE: Duration = Duration::from_secs(5);

impl Controller {
    /// Writes by which renewal the programs count, and the soonest deadline of what the data plane has or, with `wanted`, is
    /// about to get. False if that failed.
    pub(super) fn write_lease(&mut self, wanted: Option<&Desired>) -> bool {
        let Some(plane) = &mut self.pinned.plane else { return false };
        let observed = &self.pinned.observed;
        let renewed = match &*self.hold.borrow() {
            Some(hold) => hold.renewed,
            // Nobody has looked yet: what an agent before has achieved counts.
            None => observed.lease.renewed,
        };
        let shortest = deadlines(observed, wanted).map(|(soft, _)| soft).min();
        let lease = LeaseValue { renewed, soonest: soonest(renewed, shortest) };
        if lease == observed.lease {
            return true;
        }
        if (lease.renewed == 0) != (observed.lease.renewed == 0) && shortest.is_some() {
            tracing::info!(armed = lease.renewed != 0, "addresses with a fence");
        }
        let ops = [Op::SetLease(lease)];
        match apply::apply(plane.as_mut(), &ops, &mut self.pinned.observed, &mut self.counts) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "cannot write the lease; reading the data plane anew");
                self.write_error = Some(error.to_string());
                false
            }
        }
    }

    /// Tells what is needed of the Lease.
    pub(super) fn ask_for_lease(&mut self, wanted: Option<&Desired>, usage: &Usage) {
        if self.pinned.plane.is_none() {
            return;
        }
        let observed = &self.pinned.observed;
        let read = self.hold.borrow().as_ref().and_then(|hold| hold.read.clone());
        let uid = {
            let cluster = self.shared.lock();
            let key = (String::new(), self.args.node_name.clone());
            cluster.nodes.objects.get(&key).map(|node| node.uid.clone()).unwrap_or_default()
        };
        let need = Need {
            uid,
            after: deadlines(observed, wanted).map(|(_, hard)| Seconds::from(hard)).min(),
            renewed: observed.lease.renewed,
            followed: read.filter(|read| self.has_followed(read, usage)).map(|read| read.round),
        };
        if let Some(sweeper) = &self.pinned.sweeper {
            sweeper.look_closely(need.after.is_some() && need.renewed == 0);
        }
        self.need.send_if_modified(|before| {
            let changed = before.as_ref() != Some(&need);
            *before = Some(need);
            changed
        });
    }

    /// Whether everything that was read is in force, and nothing of what was here before is left.
    fn has_followed(&self, read: &Read, usage: &Usage) -> bool {
        let observed = &self.pinned.observed;
        let mut fenced = fenced(observed).peekable();
        if fenced.peek().is_none() {
            return true;
        }
        // Flows of programs of another version are not in the maps yet.
        let all_here = self.pinned.plane.as_ref().is_some_and(|plane| !plane.inherits());
        let scanned = all_here && usage.foreign == Some(0) && self.settled.slices(usage);
        scanned
            && fenced.all(|(address, epoch)| {
                let programmed = i64::try_from(epoch).unwrap_or(i64::MAX);
                let follows = match read.epochs.get(&address) {
                    Some(epoch) => programmed >= *epoch,
                    None => !owns(observed, address),
                };
                follows && self.settled.address(address, usage)
            })
    }

    /// What the Lease says about what may be followed.
    pub(super) fn heed_lease(&mut self) {
        let hold = self.hold.borrow().clone().unwrap_or_default();
        let observed = &self.pinned.observed;
        let lost: BTreeSet<Egress> = match &hold.read {
            Some(read) if hold.renewed == 0 => fenced(observed)
                .map(|(address, _)| address)
                .filter(|address| !read.epochs.contains_key(address))
                .collect(),
            _ => BTreeSet::new(),
        };
        let floor = hold.read.map(|read| read.epochs).unwrap_or_default();
        self.dirty |=
            lost != self.known.lost || !Arc::ptr_eq(&floor, &self.known.floor) && floor != self.known.floor;
        (self.known.lost, self.known.floor) = (lost, floor);
    }

    /// Whether writes wait for the first Lease.
    pub(super) fn waits_for_lease(&mut self, wanted: &Desired) -> bool {
        let observed = &self.pinned.observed;
        let mut all = wanted.addresses.values().chain(wanted.networks.values());
        let first = all.any(|address| address.deadlines.is_some())
            && observed.lease.renewed == 0
            && fenced(observed).next().is_none();
        if !first {
            self.lease_wanted = None;
            return false;
        }
        self.lease_wanted.get_or_insert_with(Instant::now).elapsed() < FIRST_LEASE
    }

    /// Whether the Lease is held, if it is needed.
    pub(super) fn lease(&self) -> Option<Result<(), NotReady>> {
        let observed = &self.pinned.observed;
        deadlines(observed, None).next()?;
        let not = |reason, message| Some(Err(NotReady { reason, message }));
        let hold = self.hold.borrow();
        match hold.as_ref() {
            Some(Hold { trouble: Some(Trouble::TakenBy(who)), .. }) => not(
                reason::TAKEN_OVER,
                format!(
                    "{who} has taken the Lease over, since it was not renewed: slices with a fence go to other nodes"
                ),
            ),
            Some(Hold { trouble: Some(Trouble::Failed(error)), .. }) => not(
                reason::NOT_RENEWED,
                format!("flows of allocations with a fence end when it is not renewed in time: {error}"),
            ),
            Some(Hold { renewed: 0, .. }) | None if observed.lease.renewed == 0 => not(
                reason::RETURNING,
                "nothing leaves from addresses with a fence until what this node has lost is given up"
                    .to_owned(),
            ),
            _ => Some(Ok(())),
        }
    }

    /// Seconds until some address is closed, if any has a deadline.
    pub(super) fn lease_seconds_left(&self) -> Option<f64> {
        let observed = &self.pinned.observed;
        let hard = deadlines(observed, None).map(|(_, hard)| hard).min()?;
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).ok()?;
        let closes = soonest(observed.lease.renewed, Some(hard)) as f64 / 1e9;
        Some((closes - Duration::from(now).as_secs_f64()).max(0.0))
    }
}

/// Soft and hard deadlines of all addresses that have them, as the data plane has them and as they are to be.
fn deadlines<'a>(
    observed: &'a Observed,
    wanted: Option<&'a Desired>,
) -> impl Iterator<Item = (u32, u32)> + 'a {
    let v4 = observed.holdings.values().map(|holding| (holding.soft, holding.hard));
    let v6 = observed.networks.values().map(|network| (network.soft, network.hard));
    let wanted =
        wanted.into_iter().flat_map(|wanted| wanted.addresses.values().chain(wanted.networks.values()));
    v4.chain(v6)
        .filter(|(_, hard)| *hard != 0)
        .chain(wanted.filter_map(|address| address.deadlines).map(|both| (both.soft, both.hard)))
}

/// Addresses and /64s that have deadlines, with the epoch that the data plane has.
fn fenced(observed: &Observed) -> impl Iterator<Item = (Egress, u64)> + '_ {
    let v4 = observed.holdings.iter().filter(|(_, holding)| holding.hard != 0);
    let v6 = observed.networks.iter().filter(|(_, network)| network.hard != 0);
    v4.map(|(address, holding)| (observed.egress(*address), holding.epoch))
        .chain(v6.map(|(network, value)| (*network, value.epoch)))
}

fn owns(observed: &Observed, address: Egress) -> bool {
    let own = observed.config.own_peer;
    let index = match singles::key(address) {
        Some(key) => observed.addresses.get(&key).map(|value| value.index),
        None => observed.networks.get(&address).map(|value| value.index),
    };
    index.is_some_and(|index| observed.slots_of(index).any(|(_, slot)| slot.peer == own))
}
