//! How many slices this node wants, from the ports that are in use. Pure: time is passed in.

use crate::desired::Desired;
use crate::singles;
use aegis_common::{PORTS_PER_SLICE, PressureValue};
use aegis_core::growth::{self, Growth, Look, Millis, Patience};
use aegis_core::model::AllocationName;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;

/// How far growth is looked ahead: about the time from a look until slices have come, and over how long it is measured.
const AHEAD: Millis = 1_000;
/// For how long a flow that waited counts as waiting: TCP tries again after a second.
const WAITS: Millis = 1_500;

/// What ports towards one destination are counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Address.
    pub address: Ipv4Addr,
    /// Port; 0 for ICMP echo.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
}

/// Ports of one origin, or of several bitmaps together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// At this moment. A port that rests counts: it is not to be had.
    pub now: u32,
    /// At most, since they were counted last.
    pub peak: u32,
}

/// Ports in use.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ports {
    /// By egress address and origin.
    pub by_origin: HashMap<(Ipv4Addr, Origin), InUse>,
    /// At this moment by egress address, over all origins.
    pub by_address: BTreeMap<Ipv4Addr, u32>,
}

impl Ports {
    /// Counts ports of one bitmap.
    pub fn add(&mut self, egress: Ipv4Addr, origin: Origin, now: u32, peak: u32) {
        let peak = peak.max(now);
        if peak == 0 {
            return;
        }
        let entry = self.by_origin.entry((egress, origin)).or_default();
        *entry = InUse { now: entry.now + now, peak: entry.peak + peak };
        if now > 0 {
            *self.by_address.entry(egress).or_default() += now;
        }
    }

    /// Ports towards the busiest origin, for each allocation over all addresses from which this node sends; with whether they are of
    /// single IPv6 addresses, which have other origins.
    fn busiest<'a>(&self, desired: &'a Desired) -> BTreeMap<(&'a AllocationName, bool), InUse> {
        let holders = desired.allocations.iter();
        let owner: HashMap<Ipv4Addr, &AllocationName> = holders
            .flat_map(|(name, allocation)| allocation.with_ports().map(move |address| (address, name)))
            .collect();
        let mut by_origin: HashMap<(&AllocationName, bool, Origin), InUse> = HashMap::new();
        for ((address, origin), ports) in &self.by_origin {
            if let Some(name) = owner.get(address) {
                let sum = by_origin.entry((*name, singles::is(*address), *origin)).or_default();
                *sum = InUse { now: sum.now + ports.now, peak: sum.peak + ports.peak };
            }
        }
        let mut busiest: BTreeMap<(&AllocationName, bool), InUse> = BTreeMap::new();
        for ((name, single, _), ports) in by_origin {
            let most = busiest.entry((name, single)).or_default();
            *most = InUse { now: most.now.max(ports.now), peak: most.peak.max(ports.peak) };
        }
        busiest
    }
}

/// Something counted over the last minute, in steps of ten seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Minute {
    slots: [u64; 6],
    step: u64,
}

impl Minute {
    fn turn(&mut self, now: u64) -> &mut u64 {
        let step = now / 10;
        for passed in self.step + 1..=step.min(self.step + 6) {
            self.slots[(passed % 6) as usize] = 0;
        }
        self.step = self.step.max(step);
        &mut self.slots[(self.step % 6) as usize]
    }

    pub(crate) fn add(&mut self, now: u64, amount: u64) {
        *self.turn(now) += amount;
    }

    pub(crate) fn sum(&mut self, now: u64) -> u64 {
        self.turn(now);
        self.slots.iter().sum()
    }
}

/// What an allocation wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Slices of each address.
    pub slices: u32,
    /// Ports in use towards the busiest origin, in percent of the ports held.
    pub fill_percent: u32,
    /// New flows refused for want of a port during the last minute.
    pub refused: u32,
    /// Why.
    pub reason: &'static str,
}

/// Ports in use at a time.
#[derive(Clone, Debug, Default)]
struct Past {
    at: Millis,
    ports: HashMap<(Ipv4Addr, Origin), u32>,
}

/// Remembers what was needed, and what was not to be had.
#[derive(Clone, Debug)]
pub struct Meter {
    window: Millis,
    growth: BTreeMap<AllocationName, Growth>,
    patience: BTreeMap<Ipv4Addr, Patience>,
    refused: BTreeMap<AllocationName, Minute>,
    waited: BTreeMap<AllocationName, Millis>,
    seen: BTreeMap<AllocationName, PressureValue>,
    /// What growth is measured from, and what it will be measured from next; `None` before the first look.
    past: Option<[Past; 2]>,
}

impl Meter {
    /// A meter whose wants halve after each `window` in which less was needed.
    pub fn new(window: Millis) -> Meter {
        Meter {
            window,
            growth: BTreeMap::new(),
            patience: BTreeMap::new(),
            refused: BTreeMap::new(),
            waited: BTreeMap::new(),
            seen: BTreeMap::new(),
            past: None,
        }
    }

    /// Wants of every allocation that pods of this node use (`local`), and of those from which this node sends for pods of
    /// others. `pressure` counts flows that found no port, `now` is of any steady clock.
    pub fn wants(
        &mut self,
        desired: &Desired,
        local: &BTreeSet<AllocationName>,
        ports: &Ports,
        pressure: &BTreeMap<AllocationName, PressureValue>,
        now: Millis,
    ) -> BTreeMap<AllocationName, Want> {
        let busiest = ports.busiest(desired);
        let waited = self.note_pressure(pressure, now);
        let soon = self.soon(ports, now);

        let guests =
            busiest.keys().map(|(name, _)| *name).chain(self.growth.keys()).chain(self.refused.keys());
        let guests = guests.filter(|name| desired.allocations.contains_key(*name)).cloned();
        let needed: BTreeSet<AllocationName> = guests.chain(local.iter().cloned()).collect();
        let mut want = |name: &AllocationName| {
            let own = desired.allocations.get(name);
            let addresses: Vec<Ipv4Addr> = own.into_iter().flat_map(|own| own.with_ports()).collect();
            let held = |address: &Ipv4Addr| desired.addresses.get(address).map_or(0, |it| it.held());
            let looks = addresses.iter().map(|address| {
                let (ports, soon) = soon.get(address).copied().unwrap_or_default();
                Look { ports, soon, held: held(address), waited: waited.contains(name) }
            });
            let need = looks.map(|look| growth::need(&look)).max().unwrap_or(1);
            let most = own.map_or(growth::MOST, |own| own.most);
            let begin = Growth::begin(addresses.iter().map(held).max().unwrap_or(1), now);
            let growth = self.growth.entry(name.clone()).or_insert(begin);
            let slices = growth.look(need, most, self.window, now);
            let fill = |single: bool| {
                let in_use = u64::from(busiest.get(&(name, single)).copied().unwrap_or_default().now);
                let all: u32 = addresses.iter().filter(|own| singles::is(**own) == single).map(held).sum();
                (in_use * 100).checked_div(u64::from(all * PORTS_PER_SLICE)).unwrap_or(0)
            };
            let fill = fill(false).max(fill(true));
            let refused = self.refused.get_mut(name).map_or(0, |minute| minute.sum(now / 1000));
            Want {
                slices,
                fill_percent: u32::try_from(fill.min(100)).unwrap_or(100),
                refused: u32::try_from(refused).unwrap_or(u32::MAX),
                reason: match (slices > 1, local.contains(name)) {
                    (true, _) => "ports in use towards the busiest origin",
                    (false, true) => "bound pods",
                    (false, false) => "pods of other nodes",
                },
            }
        };
        let wants: BTreeMap<_, _> = needed.into_iter().map(|name| (name.clone(), want(&name))).collect();
        let is_used = |name: &AllocationName| busiest.keys().any(|(used, _)| *used == name);
        self.growth.retain(|name, growth| {
            wants.contains_key(name) && (local.contains(name) || is_used(name) || !growth.is_idle())
        });
        wants
    }

    /// Addresses of which more was wanted in vain for so long that no flow should wait for it.
    pub fn in_vain(
        &mut self,
        desired: &Desired,
        wants: &BTreeMap<AllocationName, Want>,
        now: Millis,
    ) -> BTreeSet<Ipv4Addr> {
        let mut before = std::mem::take(&mut self.patience);
        let mut in_vain = BTreeSet::new();
        for (name, want) in wants {
            let own = desired.allocations.get(name);
            for address in own.map(|own| own.addresses.as_slice()).unwrap_or_default() {
                let held = desired.addresses.get(address).map_or(0, |it| it.held());
                let fresh = Patience::begin(held, now);
                let mut patience = before.remove(address).unwrap_or(fresh);
                if patience.is_over(want.slices, held, now) {
                    in_vain.insert(*address);
                }
                self.patience.insert(*address, patience);
            }
        }
        in_vain
    }

    /// Whether flows of an allocation wait for slices.
    pub fn waits(&self, name: &AllocationName, now: Millis) -> bool {
        self.waited.get(name).is_some_and(|at| now.saturating_sub(*at) < WAITS)
    }

    /// Notes new refusals; gives the allocations whose flows have waited since the last look.
    fn note_pressure(
        &mut self,
        pressure: &BTreeMap<AllocationName, PressureValue>,
        now: Millis,
    ) -> BTreeSet<AllocationName> {
        let mut waited = BTreeSet::new();
        for (name, count) in pressure {
            // What happened before the agent looked first is no news.
            let before = self.seen.insert(name.clone(), *count).unwrap_or(*count);
            if count.refused > before.refused {
                let new = count.refused - before.refused;
                self.refused.entry(name.clone()).or_default().add(now / 1000, new);
            }
            if count.waited > before.waited {
                self.waited.insert(name.clone(), now);
                waited.insert(name.clone());
            }
        }
        self.seen.retain(|name, _| pressure.contains_key(name));
        self.refused.retain(|_, minute| minute.sum(now / 1000) > 0);
        self.waited.retain(|_, at| now.saturating_sub(*at) < WAITS);
        waited
    }

    /// For each egress address the ports in use towards its busiest origin, and what will be in use towards one soon.
    fn soon(&mut self, ports: &Ports, now: Millis) -> HashMap<Ipv4Addr, (u32, u32)> {
        let present = || Past {
            at: now,
            ports: ports.by_origin.iter().map(|(key, ports)| (*key, ports.now)).collect(),
        };
        let [base, next] = self.past.get_or_insert_with(|| [present(), present()]);
        if now.saturating_sub(next.at) >= AHEAD / 2 {
            *base = std::mem::replace(next, present());
        }
        // Over less than that it would be a guess.
        let over = now.saturating_sub(base.at).max(AHEAD);
        let mut busiest: HashMap<Ipv4Addr, (u32, u32)> = HashMap::new();
        for (key, ports) in &ports.by_origin {
            let grown = ports.now.saturating_sub(base.ports.get(key).copied().unwrap_or(0));
            let ahead = u64::from(grown) * AHEAD / over;
            let soon = ports.now.saturating_add(u32::try_from(ahead).unwrap_or(u32::MAX));
            let most = busiest.entry(key.0).or_default();
            *most = (most.0.max(ports.peak), most.1.max(soon));
        }
        busiest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Allocation, EgressAddress};
    use aegis_core::slice::SliceSet;

    const A: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
    const B: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);

    fn name() -> AllocationName {
        AllocationName { account: "shop".into(), name: "main".into() }
    }

    fn origin(last: u8) -> Origin {
        Origin { address: Ipv4Addr::new(198, 51, 100, last), port: 443, protocol: 6 }
    }

    fn holding(addresses: &[Ipv4Addr], slices: u8) -> Desired {
        let held = || EgressAddress { allowed: SliceSet::range(4, 3 + slices), ..EgressAddress::default() };
        Desired {
            addresses: addresses.iter().map(|address| (*address, held())).collect(),
            allocations: [(
                name(),
                Allocation {
                    addresses: addresses.to_vec(),
                    gateways: Vec::new(),
                    near: 0,
                    name: Some(A),
                    singles: Vec::new(),
                    networks: Vec::new(),
                    timeouts: Default::default(),
                    max_resting: aegis_common::ANY_NUMBER,
                    per_pod: Default::default(),
                    most: growth::MOST,
                },
            )]
            .into(),
            ..Desired::default()
        }
    }

    fn used(entries: &[(Ipv4Addr, u8, u32)]) -> Ports {
        let mut ports = Ports::default();
        entries.iter().for_each(|(address, last, count)| ports.add(*address, origin(*last), *count, *count));
        ports
    }

    /// What a new meter says.
    fn want(desired: &Desired, local: bool, ports: &Ports) -> Option<Want> {
        let local = local.then(name).into_iter().collect();
        Meter::new(WINDOW).wants(desired, &local, ports, &BTreeMap::new(), 100).remove(&name())
    }

    const WINDOW: Millis = 60_000;

    #[test]
    fn bound_pods_want_at_least_one_slice_even_without_any() {
        let want = want(&Desired::default(), true, &Ports::default()).unwrap();
        assert_eq!(want, Want { slices: 1, fill_percent: 0, refused: 0, reason: "bound pods" });
    }

    #[test]
    fn more_is_wanted_above_sixty_percent_of_the_busiest_origin() {
        let want = |count| {
            let want = want(&holding(&[A], 8), true, &used(&[(A, 1, count), (A, 2, 50)])).unwrap();
            (want.slices, want.fill_percent)
        };
        assert_eq!(want(1228), (8, 59));
        assert_eq!(want(1229), (12, 60));
        assert_eq!(want(2048), (16, 100));
        assert_eq!(want(64_000), (252, 100), "there are no more");
    }

    #[test]
    fn each_address_has_to_hold_what_its_own_pods_need() {
        let want = want(&holding(&[A, B], 1), true, &used(&[(A, 1, 256), (B, 1, 128)])).unwrap();
        assert_eq!((want.fill_percent, want.slices), (75, 2));
    }

    #[test]
    fn of_both_families_the_fuller_one_counts() {
        let single = singles::stand_in("2001:db8::7".parse().unwrap());
        let mut desired = holding(&[A, single], 1);
        let own = desired.allocations.get_mut(&name()).unwrap();
        (own.addresses, own.singles) = (vec![A], vec![single]);
        let want = |v4, v6| {
            let want = want(&desired, true, &used(&[(A, 1, v4), (single, 2, v6)])).unwrap();
            (want.slices, want.fill_percent)
        };
        assert_eq!(want(64, 192), (2, 75));
        assert_eq!(want(256, 0), (2, 100), "the other's ports are of no use to it");
    }

    #[test]
    fn what_was_in_use_between_two_looks_counts() {
        let mut ports = Ports::default();
        ports.add(A, origin(1), 10, 2000);
        let want = want(&holding(&[A], 8), true, &ports).unwrap();
        assert_eq!((want.slices, want.fill_percent), (16, 0));
    }

    #[test]
    fn pods_of_other_nodes_want_slices_too() {
        let desired = holding(&[A], 1);
        assert_eq!(want(&desired, false, &Ports::default()), None, "it holds what nobody here uses");
        let few = want(&desired, false, &used(&[(A, 1, 10)])).unwrap();
        assert_eq!((few.slices, few.reason), (1, "pods of other nodes"));
        assert_eq!(want(&desired, false, &used(&[(A, 1, 2000)])).unwrap().slices, 16);
    }

    #[test]
    fn what_grows_is_looked_ahead_by_a_second() {
        let desired = holding(&[A], 8);
        let mut meter = Meter::new(WINDOW);
        let mut slices = |count, now| {
            let ports = used(&[(A, 1, count)]);
            meter.wants(&desired, &[name()].into(), &ports, &BTreeMap::new(), now)[&name()].slices
        };
        assert_eq!(slices(1000, 10_000), 8, "there is no telling how old they are");
        assert_eq!(slices(1000, 10_600), 8);
        assert_eq!(slices(1100, 11_000), 8, "1,200 in a second are still less than 60 %");
        assert_eq!(slices(1200, 11_100), 12, "1,400 are not");
        assert_eq!(slices(4000, 11_500), 48, "7,000");
    }

    #[test]
    fn an_idle_guest_is_forgotten_a_window_later_and_a_bound_pod_is_not() {
        let desired = holding(&[A], 8);
        for local in [true, false] {
            let mut meter = Meter::new(WINDOW);
            let local: BTreeSet<AllocationName> = local.then(name).into_iter().collect();
            let mut slices = |ports: &Ports, now| {
                let wants = meter.wants(&desired, &local, ports, &BTreeMap::new(), now);
                wants.get(&name()).map(|want| want.slices)
            };
            slices(&used(&[(A, 1, 2000)]), 0);
            let nothing = Ports::default();
            assert_eq!(slices(&nothing, 1), Some(16));
            let later: Vec<_> = (1..=7u64).map(|window| slices(&nothing, window * WINDOW)).collect();
            let end = (!local.is_empty()).then_some(1);
            assert_eq!(later, [Some(16), Some(8), Some(4), Some(2), Some(1), end, end]);
        }
    }

    #[test]
    fn flows_wait_for_what_comes_and_not_for_what_does_not() {
        let mut meter = Meter::new(WINDOW);
        let mut look = |slices, waited, now| {
            let desired = holding(&[A], slices);
            let ports = used(&[(A, 1, u32::from(slices) * 256)]);
            // Nothing of it is new.
            meter.past = None;
            let pressure = [(name(), PressureValue { waited, refused: 0 })].into();
            let wants = meter.wants(&desired, &[name()].into(), &ports, &pressure, now);
            let in_vain = meter.in_vain(&desired, &wants, now);
            (wants[&name()].slices, in_vain.contains(&A), meter.waits(&name(), now))
        };
        assert_eq!(look(48, 0, 0), (96, false, false));
        assert_eq!(look(48, 9, 1_000), (96, false, true));
        assert_eq!(look(96, 9, 2_000), (192, false, true), "they may still be waiting");
        assert_eq!(look(96, 9, 2_500), (192, false, false));
        assert_eq!(look(96, 9, 5_000), (192, true, false), "nothing has come for three seconds");
        assert!(!look(97, 9, 5_001).1);
    }

    #[test]
    fn refusals_are_an_allocations_own_and_those_since_the_agent_looked_first() {
        let other = AllocationName { account: "shop".into(), name: "other".into() };
        let mut meter = Meter::new(WINDOW);
        let mut refused = |count, now: Millis| {
            let pressure = |refused| PressureValue { refused, waited: 0 };
            let counts = [(name(), pressure(count)), (other.clone(), pressure(7))].into();
            let local = [name(), other.clone()].into();
            let wants = meter.wants(&holding(&[A], 1), &local, &used(&[(A, 1, 256)]), &counts, now * 1000);
            assert_eq!(wants[&other].refused, 0);
            wants[&name()].refused
        };
        assert_eq!(refused(1000, 0), 0, "from before");
        assert_eq!(refused(1005, 1), 5);
        assert_eq!(refused(1007, 30), 7);
        assert_eq!(refused(1007, 65), 2);
        assert_eq!(refused(1007, 200), 0);
        assert_eq!(refused(3, 201), 0, "the counters began anew");
    }
}
