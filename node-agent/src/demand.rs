//! How many slices this node wants, from the ports that are in use. Pure: time is passed in.

use crate::desired::Desired;
use aegis_common::PORTS_PER_SLICE;
use aegis_core::model::AllocationName;
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;

/// Share of the held ports above which more are wanted.
const TARGET: (u64, u64) = (6, 10);

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

/// Ports in use at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ports {
    /// By egress address and origin.
    pub by_origin: HashMap<(Ipv4Addr, Origin), u32>,
    /// By egress address, over all origins.
    pub by_address: BTreeMap<Ipv4Addr, u32>,
}

impl Ports {
    /// Counts ports of one bitmap.
    pub fn add(&mut self, egress: Ipv4Addr, origin: Origin, used: u32) {
        if used > 0 {
            *self.by_origin.entry((egress, origin)).or_default() += used;
            *self.by_address.entry(egress).or_default() += used;
        }
    }

    /// Ports in use towards the busiest origin, over these addresses.
    fn busiest(&self, addresses: &[Ipv4Addr]) -> u32 {
        let mut by_origin: HashMap<Origin, u32> = HashMap::new();
        for ((address, origin), used) in &self.by_origin {
            if addresses.contains(address) {
                *by_origin.entry(*origin).or_default() += used;
            }
        }
        by_origin.into_values().max().unwrap_or(0)
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

    fn sum(&self) -> u64 {
        self.slots.iter().sum()
    }

    fn max(&self) -> u64 {
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
    refusals_seen: Option<u64>,
}

impl Meter {
    /// Wants of every allocation that pods of this node use. `needed` are these allocations, `refusals` the counter of
    /// flows refused for want of a port, `now` seconds of any steady clock.
    pub fn wants(
        &mut self,
        desired: &Desired,
        needed: &[AllocationName],
        ports: &Ports,
        refusals: u64,
        now: u64,
    ) -> BTreeMap<AllocationName, Want> {
        let new_refusals = self.refusals_seen.map_or(0, |seen| refusals.saturating_sub(seen));
        self.refusals_seen = Some(refusals);
        self.peaks.retain(|name, _| needed.contains(name));
        self.refused.retain(|name, _| needed.contains(name));

        let mut wants = BTreeMap::new();
        let mut fullest: Option<(u32, AllocationName)> = None;
        for name in needed {
            let addresses =
                desired.allocations.get(name).map(|usable| usable.addresses.as_slice()).unwrap_or_default();
            let held: u32 =
                addresses.iter().filter_map(|a| desired.addresses.get(a)).map(|a| a.allowed.len()).sum();
            let busiest = ports.busiest(addresses);
            let peak = self.peaks.entry(name.clone()).or_default();
            peak.raise(now, u64::from(busiest));
            let each = peak.max().div_ceil((addresses.len() as u64).max(1));
            let slices = (each * TARGET.1).div_ceil(u64::from(PORTS_PER_SLICE) * TARGET.0);
            let slices = u32::try_from(slices).unwrap_or(u32::MAX).max(1);
            let capacity = held * PORTS_PER_SLICE;
            let fill_percent = (busiest * 100).checked_div(capacity).unwrap_or(0).min(100);
            if held > 0 && fullest.as_ref().is_none_or(|(fill, _)| fill_percent > *fill) {
                fullest = Some((fill_percent, name.clone()));
            }
            let reason = if slices > 1 { "ports in use towards the busiest origin" } else { "bound pods" };
            wants.insert(name.clone(), Want { slices, fill_percent, refused: 0, reason });
        }
        // The counter does not tell the allocation: the fullest one is the one that refuses.
        if let (Some((_, name)), true) = (fullest, new_refusals > 0) {
            self.refused.entry(name).or_default().add(now, new_refusals);
        }
        for (name, want) in &mut wants {
            if let Some(refused) = self.refused.get_mut(name) {
                refused.add(now, 0);
                want.refused = u32::try_from(refused.sum()).unwrap_or(u32::MAX);
            }
        }
        wants
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{EgressAddress, UsableAllocation};
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
                UsableAllocation {
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
        entries.iter().for_each(|(address, last, count)| ports.add(*address, origin(*last), *count));
        ports
    }

    #[test]
    fn bound_pods_want_at_least_one_slice_even_without_any() {
        let wants = Meter::default().wants(&Desired::default(), &[name()], &Ports::default(), 0, 0);
        assert_eq!(wants[&name()], Want { slices: 1, fill_percent: 0, refused: 0, reason: "bound pods" });
    }

    #[test]
    fn more_is_wanted_above_sixty_percent_of_the_busiest_origin() {
        let desired = holding(&[A], 8);
        let want = |count| {
            Meter::default().wants(&desired, &[name()], &used(&[(A, 1, count), (A, 2, 50)]), 0, 0)[&name()]
                .clone()
        };
        assert_eq!((want(1228).slices, want(1228).fill_percent), (8, 59));
        assert_eq!((want(1229).slices, want(1229).fill_percent), (9, 60));
        assert_eq!((want(2048).slices, want(2048).fill_percent), (14, 100));
    }

    #[test]
    fn the_same_origin_is_summed_over_the_addresses() {
        let desired = holding(&[A, B], 1);
        let wants = Meter::default().wants(&desired, &[name()], &used(&[(A, 1, 256), (B, 1, 128)]), 0, 0);
        assert_eq!((wants[&name()].fill_percent, wants[&name()].slices), (75, 2));
    }

    #[test]
    fn a_peak_counts_for_a_minute() {
        let desired = holding(&[A], 8);
        let mut meter = Meter::default();
        meter.wants(&desired, &[name()], &used(&[(A, 1, 2000)]), 0, 100);
        let mut slices = |now| meter.wants(&desired, &[name()], &Ports::default(), 0, now)[&name()].slices;
        assert_eq!((slices(101), slices(159), slices(160)), (14, 14, 1));
    }

    #[test]
    fn refusals_are_those_since_the_agent_looked_first() {
        let desired = holding(&[A], 1);
        let full = used(&[(A, 1, 256)]);
        let mut meter = Meter::default();
        let mut refused = |count, now| meter.wants(&desired, &[name()], &full, count, now)[&name()].refused;
        assert_eq!(refused(1000, 0), 0, "from before");
        assert_eq!(refused(1005, 1), 5);
        assert_eq!(refused(1007, 30), 7);
        assert_eq!(refused(1007, 65), 2);
        assert_eq!(refused(1007, 200), 0);
    }
}
