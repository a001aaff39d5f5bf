//! Sockets that have an egress address themselves: how many slices they need, which ones they have, and what must stand for it.

use super::Controller;
use crate::demand::{Meter, Origin, Ports, Want};
use crate::desired::{Allocation, Desired, EgressAddress, Inputs};
use crate::local;
use crate::observed::Observed;
use crate::singles;
use crate::sockets;
use crate::sweep::Usage;
use crate::uses::{Seen, Uses, share};
use aegis_common::PressureValue;
use aegis_core::growth::{Growth, MOST, Millis};
use aegis_core::holding::Rights;
use aegis_core::model::AllocationName;
use aegis_core::slice::SliceSet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What is remembered between turns.
pub(super) struct Sockets {
    meter: Meter,
    window: Millis,
    uses: BTreeMap<Ipv4Addr, Uses>,
    /// When a slice last had a socket, or could get one.
    last: BTreeMap<(Ipv4Addr, u8), Instant>,
    /// Connections, at the last look that told.
    ports: Ports,
    looked: Option<Instant>,
    look_again: Instant,
    wants: BTreeMap<AllocationName, Want>,
    /// Slices for translation that are not to be had for sockets, as flows are in them.
    taken: BTreeMap<AllocationName, Growth>,
    attached: bool,
    /// Why something is not as it must be.
    pub failure: Option<String>,
}

impl Sockets {
    pub fn new(window: Duration, now: Instant) -> Sockets {
        let window = u64::try_from(window.as_millis()).unwrap_or(Millis::MAX);
        Sockets {
            meter: Meter::new(window),
            window,
            uses: BTreeMap::new(),
            last: BTreeMap::new(),
            ports: Ports::default(),
            looked: None,
            look_again: now,
            wants: BTreeMap::new(),
            taken: BTreeMap::new(),
            attached: false,
            failure: None,
        }
    }

    /// What slices of this node's are used for, where not all are for translation: as the data plane has it, until there was a look.
    pub fn uses(&self, observed: &Observed) -> BTreeMap<Ipv4Addr, Uses> {
        let found = observed.binds.iter().map(|(address, value)| (*address, Uses::found(value)));
        found.chain(self.uses.iter().map(|(address, uses)| (*address, *uses))).collect()
    }

    /// Connections by egress address.
    pub fn by_address(&self) -> &BTreeMap<Ipv4Addr, u32> {
        &self.ports.by_address
    }

    /// What translation wants, or has flows in, and what sockets want besides.
    pub fn add_to(&self, mut wants: BTreeMap<AllocationName, Want>) -> BTreeMap<AllocationName, Want> {
        for (name, want) in &self.wants {
            let Some(all) = wants.get_mut(name) else {
                wants.insert(name.clone(), want.clone());
                continue;
            };
            let taken = self.taken.get(name).map_or(0, Growth::wants);
            all.reason = want.reason;
            all.slices = (all.slices.max(taken) + want.slices).min(MOST);
            all.fill_percent = all.fill_percent.max(want.fill_percent);
        }
        wants
    }

    /// Looks at the connections of these slices. `open` are those that may get some at any time.
    fn look(&mut self, kept: &BTreeMap<Ipv4Addr, (SliceSet, SliceSet)>, now: Instant) {
        self.last.retain(|(address, slice), _| kept.get(address).is_some_and(|(_, it)| it.contains(*slice)));
        for (address, (open, kept)) in kept {
            for slice in kept.iter() {
                let last = self.last.entry((*address, slice)).or_insert(now);
                *last = if open.contains(slice) { now } else { *last };
            }
        }
        if kept.is_empty() {
            (self.ports, self.looked) = (Ports::default(), None);
            return;
        }
        if now < self.look_again {
            return;
        }
        match tokio::task::block_in_place(|| sockets::list(&kept.keys().copied().collect())) {
            Ok(found) => {
                self.ports = Ports::default();
                for sockets::Connection { near, far } in found {
                    let origin = Origin { address: *far.ip(), port: far.port(), protocol: 6 };
                    self.ports.add(*near.ip(), origin, 1, 1);
                    let slice = (near.port() >> 8) as u8;
                    self.last.entry((*near.ip(), slice)).and_modify(|last| *last = now);
                }
                self.looked = Some(now);
            }
            Err(error) => tracing::warn!(%error, "cannot list sockets: their slices stay as they are"),
        }
        self.look_again = sockets::next_look(now);
    }

    /// Slices of an address in which a socket is, or was within the time that ports rest; `None` = nobody has looked.
    fn busy(&self, address: Ipv4Addr, kept: SliceSet, rest: Duration) -> Option<SliceSet> {
        let looked = self.looked?;
        let is_busy = |slice: &u8| {
            let last = self.last.get(&(address, *slice));
            last.is_none_or(|last| looked.saturating_duration_since(*last) < rest.max(sockets::PERIOD))
        };
        Some(kept.iter().filter(is_busy).collect())
    }
}

/// The same with the slices of sockets in place of those of translation.
fn of_sockets(wanted: &Desired) -> Desired {
    let allocations = wanted.allocations.iter().filter(|(name, _)| wanted.bound.contains(*name));
    let allocations: BTreeMap<_, _> = allocations
        .map(|(name, it)| (name.clone(), Allocation { singles: Vec::new(), ..it.clone() }))
        .collect();
    let own: BTreeSet<&Ipv4Addr> = allocations.values().flat_map(|it| &it.addresses).collect();
    let addresses = wanted.addresses.iter().filter(|(own_address, _)| own.contains(own_address));
    let addresses = addresses.map(|(address, it)| {
        (*address, EgressAddress { allowed: it.bound, unsettled: SliceSet::EMPTY, ..it.clone() })
    });
    Desired { addresses: addresses.collect(), allocations, ..Desired::default() }
}

impl Controller {
    /// What sockets want, and which slices are theirs.
    pub(super) fn look_at_sockets(&mut self, usage: &Usage) {
        let (Some(force), Some(inputs)) = (self.in_force.clone(), self.inputs.clone()) else {
            return;
        };
        let wanted = &*force.wanted;
        let observed = &self.pinned.observed;
        if wanted.bound.is_empty() && observed.binds.is_empty() && self.sockets.uses.is_empty() {
            self.sockets.wants.clear();
            return;
        }
        let set = SliceSet::from_words;
        let kept = observed.binds.iter().map(|(own, it)| (*own, (set(it.open), set(it.kept)))).collect();
        self.sockets.look(&kept, Instant::now());

        let pressure = self.pressure(wanted);
        let pressure = pressure
            .into_iter()
            .map(|(name, PressureValue { refused, .. })| (name, PressureValue { refused, waited: refused }));
        let (pressure, now) = (pressure.collect(), self.clock());
        let sockets = &mut self.sockets;
        let bound = of_sockets(wanted);
        sockets.wants = sockets.meter.wants(&bound, &wanted.bound, &sockets.ports, &pressure, now);
        sockets.wants.retain(|name, _| wanted.bound.contains(name));
        sockets.taken.retain(|name, _| wanted.bound.contains(name));
        for (name, want) in &mut sockets.wants {
            want.reason = "sockets of pods of the host network";
            let own = wanted.allocations.get(name).map_or(&[] as &[_], |own| own.addresses.as_slice());
            let taken = own.iter().filter_map(|address| {
                let own = wanted.addresses.get(address)?;
                Some(usage.slices.get(address)?.intersection(own.allowed).len())
            });
            let taken = taken.max().unwrap_or(0);
            let growth = sockets.taken.entry(name.clone()).or_insert_with(|| Growth::begin(1, now));
            growth.look(taken, MOST, sockets.window, now);
        }
        self.divide(wanted, &inputs, usage);
    }

    fn divide(&mut self, wanted: &Desired, inputs: &Inputs, usage: &Usage) {
        let observed = &self.pinned.observed;
        let mut uses = BTreeMap::new();
        // Sockets get IPv4 addresses only.
        for (address, object) in inputs.addresses.iter().filter(|(address, _)| !singles::is(**address)) {
            let name = &object.allocation;
            let found = observed.binds.get(address).map(Uses::found);
            let before = self.sockets.uses.get(address).copied().or(found);
            if before.is_none() && !wanted.bound.contains(name) {
                continue;
            }
            let before = before.unwrap_or_default();
            let rights = Rights::of(object, &inputs.node);
            let rest = inputs.allocations.get(name).map_or(aegis_common::REST, |it| it.timeouts.rest);
            let kept = observed.binds.get(address).map(|it| SliceSet::from_words(it.kept));
            let kept = kept.unwrap_or_default().union(before.kept);
            let seen = Seen {
                rights,
                allowed: observed
                    .holdings
                    .get(address)
                    .map_or(SliceSet::EMPTY, |it| SliceSet::from_words(it.allowed)),
                flows: usage.slices.get(address).copied().unwrap_or_default(),
                settled: self.settled.address(*address, usage),
                sockets: self.sockets.busy(*address, kept, Duration::from_secs(rest.into())),
            };
            let translation = self.growing.wants.get(name).map_or(1, |want| want.slices);
            let sockets = self.sockets.wants.get(name).map_or(0, |want| want.slices);
            let next = before.next(&seen, share(rights.open.len(), translation, sockets));
            // What the data plane still has is not to be found there as if it were new.
            if next != Uses::default() || found.is_some() {
                uses.insert(*address, next);
            }
        }
        self.dirty |= uses != self.sockets.uses;
        self.sockets.uses = uses;
    }

    /// What must stand before a socket is given an address: the address is local, and sockets are asked for.
    pub(super) async fn stand_for_sockets(&mut self, wanted: Option<&Desired>) {
        let (Some(wanted), Some(plane), Ok(network)) = (wanted, &mut self.pinned.plane, &self.network) else {
            return;
        };
        let binds = &self.pinned.observed.binds;
        let sockets = &mut self.sockets;
        sockets.failure = None;
        let needed = !wanted.bound.is_empty() || !binds.is_empty();
        if needed && !sockets.attached {
            match plane.attach_sockets(&self.args.cgroups) {
                Ok(()) => sockets.attached = true,
                Err(error) => sockets.failure = Some(error.to_string()),
            }
        }
        let kept = wanted.addresses.iter().filter(|(_, it)| !it.kept.is_empty()).map(|(own, _)| *own);
        let own: BTreeSet<Ipv4Addr> = kept.chain(binds.keys().copied()).collect();
        if own != network.local {
            match local::bring(&self.netlink, &own, &network.local).await {
                // Read back before the next comparison: the notification may come after it.
                Ok(()) => self.signals.network.store(true, Ordering::Release),
                Err(error) => {
                    sockets.failure = Some(format!("cannot make egress addresses local: {error}"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
    const REST: Duration = Duration::from_secs(120);

    #[test]
    fn a_slice_is_empty_when_somebody_has_looked_and_the_last_socket_has_rested() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut sockets = Sockets::new(Duration::from_secs(600), start);
        let (open, kept) = (SliceSet::range(4, 4), SliceSet::range(4, 5));
        let both = BTreeMap::from([(ADDRESS, (open, kept))]);
        // Nobody lists this test's sockets: what a look would have found is said here.
        sockets.look_again = at(1000);
        sockets.look(&both, at(0));
        assert_eq!(sockets.busy(ADDRESS, kept, REST), None, "nobody has looked");
        sockets.looked = Some(at(100));
        sockets.look(&both, at(100));
        assert_eq!(sockets.busy(ADDRESS, kept, REST), Some(kept), "they may have been there just before");
        sockets.looked = Some(at(121));
        assert_eq!(
            sockets.busy(ADDRESS, kept, REST),
            Some(open),
            "where sockets may be bound, there are some"
        );
        sockets.look(&BTreeMap::from([(ADDRESS, (SliceSet::EMPTY, kept))]), at(121));
        assert_eq!(sockets.busy(ADDRESS, kept, Duration::ZERO), Some(SliceSet::EMPTY));
        sockets.looked = Some(at(100));
        assert_eq!(sockets.busy(ADDRESS, open, Duration::ZERO), Some(open), "a program may just be at it");
        assert_eq!(sockets.busy(ADDRESS, SliceSet::range(9, 9), REST), Some(SliceSet::range(9, 9)));
        sockets.look(&BTreeMap::new(), at(200));
        assert_eq!(sockets.busy(ADDRESS, kept, REST), None);
    }

    #[test]
    fn sockets_are_wanted_beside_what_translation_wants_or_cannot_give() {
        let name = |name: &str| AllocationName { account: "shop".into(), name: name.into() };
        let want = |slices, fill_percent| Want { slices, fill_percent, refused: 0, reason: "x" };
        let mut sockets = Sockets::new(Duration::from_secs(600), Instant::now());
        sockets.wants = [(name("a"), want(2, 70)), (name("b"), want(1, 0))].into();
        sockets.taken = [(name("a"), Growth::begin(4, 0)), (name("b"), Growth::begin(1, 0))].into();
        let all = sockets.add_to([("a", 1), ("b", 8), ("c", 3)].map(|(a, n)| (name(a), want(n, 5))).into());
        let slices: Vec<(u32, u32)> = all.values().map(|want| (want.slices, want.fill_percent)).collect();
        assert_eq!(slices, [(6, 70), (9, 5), (3, 5)]);
    }
}
