//! How many slices this node wants, from the ports that are in use. Pure: time is passed in.

use crate::desired::Desired;
use aegis_common::{FIRST_SLICE, PORTS_PER_SLICE, SLOTS_PER_ADDRESS};
use aegis_core::model::AllocationName;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;

/// Share of the held ports above which more are wanted.
const TARGET: (u64, u64) = (6, 10);
/// Slices of an address that can be used, and that can be asked for.
const MAX_SLICES: u32 = SLOTS_PER_ADDRESS - FIRST_SLICE;

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

    /// Ports towards the busiest origin, for each allocation over all addresses from which this node sends.
    fn busiest<'a>(&self, desired: &'a Desired) -> BTreeMap<&'a AllocationName, InUse> {
        let holders = desired.allocations.iter();
        let owner: HashMap<Ipv4Addr, &AllocationName> = holders
            .flat_map(|(name, allocation)| allocation.addresses.iter().map(move |address| (*address, name)))
            .collect();
        let mut by_origin: HashMap<(&AllocationName, Origin), InUse> = HashMap::new();
        for ((address, origin), ports) in &self.by_origin {
            if let Some(name) = owner.get(address) {
                let sum = by_origin.entry((*name, *origin)).or_default();
                *sum = InUse { now: sum.now + ports.now, peak: sum.peak + ports.peak };
            }
        }
        let mut busiest: BTreeMap<&AllocationName, InUse> = BTreeMap::new();
        for ((name, _), ports) in by_origin {
            let most = busiest.entry(name).or_default();
            *most = InUse { now: most.now.max(ports.now), peak: most.peak.max(ports.peak) };
        }
        busiest
    }
}

/// Something counted over the last minute, in steps of ten seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Minute {
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

    fn add(&mut self, now: u64, amount: u64) {
        *self.turn(now) += amount;
    }

    fn raise(&mut self, now: u64, value: u64) {
        let slot = self.turn(now);
        *slot = value.max(*slot);
    }

    fn sum(&mut self, now: u64) -> u64 {
        self.turn(now);
        self.slots.iter().sum()
    }

    fn max(&mut self, now: u64) -> u64 {
        self.turn(now);
        self.slots.iter().copied().max().unwrap_or(0)
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

/// Remembers peaks and refusals.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    peaks: BTreeMap<AllocationName, Minute>,
    refused: BTreeMap<AllocationName, Minute>,
    refusals_seen: BTreeMap<AllocationName, u64>,
}

impl Meter {
    /// Wants of every allocation that pods of this node use (`local`), and of those from which this node sends for pods of
    /// others. `refusals` count flows refused for want of a port, `now` seconds of any steady clock.
    pub fn wants(
        &mut self,
        desired: &Desired,
        local: &BTreeSet<AllocationName>,
        ports: &Ports,
        refusals: &BTreeMap<AllocationName, u64>,
        now: u64,
    ) -> BTreeMap<AllocationName, Want> {
        let busiest = ports.busiest(desired);
        for (name, ports) in &busiest {
            self.peaks.entry((*name).clone()).or_default().raise(now, ports.peak.into());
        }
        for (name, count) in refusals {
            // What was refused before the agent looked first is no news.
            let before = self.refusals_seen.insert(name.clone(), *count).unwrap_or(*count);
            if *count > before {
                self.refused.entry(name.clone()).or_default().add(now, count - before);
            }
        }
        self.refusals_seen.retain(|name, _| refusals.contains_key(name));
        for minutes in [&mut self.peaks, &mut self.refused] {
            minutes.retain(|_, minute| minute.max(now) > 0);
        }

        let guests = self.peaks.keys().chain(self.refused.keys());
        let guests = guests.filter(|name| desired.allocations.contains_key(*name));
        let needed: BTreeSet<AllocationName> = guests.chain(local).cloned().collect();
        let mut want = |name: &AllocationName| {
            let addresses =
                desired.allocations.get(name).map(|own| own.addresses.as_slice()).unwrap_or_default();
            let held: u32 =
                addresses.iter().filter_map(|a| desired.addresses.get(a)).map(|a| a.allowed.len()).sum();
            let peak = self.peaks.get_mut(name).map_or(0, |minute| minute.max(now));
            let each = peak.div_ceil((addresses.len() as u64).max(1));
            let slices = (each * TARGET.1).div_ceil(u64::from(PORTS_PER_SLICE) * TARGET.0);
            let in_use = u64::from(busiest.get(name).copied().unwrap_or_default().now);
            let fill = (in_use * 100).checked_div(u64::from(held * PORTS_PER_SLICE)).unwrap_or(0);
            let refused = self.refused.get_mut(name).map_or(0, |minute| minute.sum(now));
            Want {
                slices: u32::try_from(slices).unwrap_or(u32::MAX).clamp(1, MAX_SLICES),
                fill_percent: u32::try_from(fill.min(100)).unwrap_or(100),
                refused: u32::try_from(refused).unwrap_or(u32::MAX),
                reason: match (slices > 1, local.contains(name)) {
                    (true, _) => "ports in use towards the busiest origin",
                    (false, true) => "bound pods",
                    (false, false) => "pods of other nodes",
                },
            }
        };
        needed.into_iter().map(|name| (name.clone(), want(&name))).collect()
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
                    name: A,
                    timeouts: Default::default(),
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
        Meter::default().wants(desired, &local, ports, &BTreeMap::new(), 0).remove(&name())
    }

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
        assert_eq!(want(1229), (9, 60));
        assert_eq!(want(2048), (14, 100));
        assert_eq!(want(64_000), (252, 100), "there are no more");
    }

    #[test]
    fn the_same_origin_is_summed_over_the_addresses() {
        let want = want(&holding(&[A, B], 1), true, &used(&[(A, 1, 256), (B, 1, 128)])).unwrap();
        assert_eq!((want.fill_percent, want.slices), (75, 2));
    }

    #[test]
    fn what_was_in_use_between_two_looks_counts() {
        let mut ports = Ports::default();
        ports.add(A, origin(1), 10, 2000);
        let want = want(&holding(&[A], 8), true, &ports).unwrap();
        assert_eq!((want.slices, want.fill_percent), (14, 0));
    }

    #[test]
    fn pods_of_other_nodes_want_slices_too() {
        let desired = holding(&[A], 8);
        assert_eq!(want(&desired, false, &Ports::default()), None, "it holds what nobody here uses");
        let few = want(&desired, false, &used(&[(A, 1, 10)])).unwrap();
        assert_eq!((few.slices, few.reason), (1, "pods of other nodes"));
        assert_eq!(want(&desired, false, &used(&[(A, 1, 2000)])).unwrap().slices, 14);
    }

    #[test]
    fn a_peak_counts_for_a_minute() {
        let desired = holding(&[A], 8);
        let mut meter = Meter::default();
        let mut slices = |ports: &Ports, now| {
            meter.wants(&desired, &[name()].into(), ports, &BTreeMap::new(), now)[&name()].slices
        };
        slices(&used(&[(A, 1, 2000)]), 100);
        assert_eq!([101, 159, 160].map(|now| slices(&Ports::default(), now)), [14, 14, 1]);
    }

    #[test]
    fn refusals_are_an_allocations_own_and_those_since_the_agent_looked_first() {
        let other = AllocationName { account: "shop".into(), name: "other".into() };
        let mut meter = Meter::default();
        let mut refused = |count, now| {
            let counts = [(name(), count), (other.clone(), 7)].into();
            let local = [name(), other.clone()].into();
            let wants = meter.wants(&holding(&[A], 1), &local, &used(&[(A, 1, 256)]), &counts, now);
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
