//! Growth by demand: a look at the ports as soon as the programs say that they run short, and what follows from it.

use super::Controller;
use crate::apply::Plane;
use crate::demand::{Meter, Ports, Want};
use crate::desired::{Desired, Inputs};
use crate::limited::{self, Counted, Refusals};
use crate::observed::Observed;
use crate::sweep::Usage;
use aegis_common::{Counter, CounterValue, PressureValue};
use aegis_core::growth::Millis;
use aegis_core::holding::{Rights, Settling};
use aegis_core::model::AllocationName;
use aegis_core::slice::SliceSet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between two questions to the programs whether ports run short.
pub(super) const POLL: Duration = Duration::from_millis(100);
/// A look at all ports is followed by a pause of this many times its own duration,
const REST: u32 = 10;
/// but no longer one: flows wait for slices that have to be asked for, and only for [`aegis_core::growth::PATIENCE`].
const LONGEST_REST: Duration = Duration::from_secs(1);

/// What is remembered between turns.
pub(super) struct Growing {
    meter: Meter,
    /// Slices that this node has, by egress address.
    settling: BTreeMap<Ipv4Addr, Settling>,
    in_vain: BTreeSet<Ipv4Addr>,
    pub wants: BTreeMap<AllocationName, Want>,
    /// What limits have refused: as counted, when something was last counted, and during the last minute.
    pub counted: BTreeMap<AllocationName, Counted>,
    counted_at: Option<(u64, usize)>,
    limited: limited::Memory,
    /// What the programs said last.
    alarm: Option<u64>,
    look_again: Instant,
    /// The last look at the ports that did not come from a scan.
    ports: Option<(Instant, Ports)>,
    failing: bool,
}

impl Growing {
    pub fn new(window: Duration, now: Instant) -> Growing {
        Growing {
            meter: Meter::new(u64::try_from(window.as_millis()).unwrap_or(Millis::MAX)),
            settling: BTreeMap::new(),
            in_vain: BTreeSet::new(),
            wants: BTreeMap::new(),
            counted: BTreeMap::new(),
            counted_at: None,
            limited: limited::Memory::default(),
            alarm: None,
            look_again: now,
            ports: None,
            failing: false,
        }
    }

    /// Says that the agent lives, and looks at the ports if they run short somewhere. True if it did.
    fn poll(&mut self, plane: &mut dyn Plane) -> bool {
        match self.look(plane, Instant::now()) {
            Ok(looked) => {
                self.failing = false;
                looked
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(%error, "cannot see whether ports run short");
                }
                false
            }
        }
    }

    fn look(&mut self, plane: &mut dyn Plane, now: Instant) -> Result<bool, crate::apply::PlaneError> {
        let alarm = plane.beat()?;
        if now < self.look_again {
            return Ok(false);
        }
        let before = self.alarm.replace(alarm);
        if before.is_none_or(|before| before == alarm) {
            return Ok(false);
        }
        let ports = tokio::task::block_in_place(|| plane.ports())?;
        self.ports = Some((now, ports));
        self.look_again = now + (now.elapsed() * REST).clamp(POLL, LONGEST_REST);
        Ok(true)
    }

    /// Ports in use, by the newest look.
    fn ports<'a>(&'a self, usage: &'a Usage) -> &'a Ports {
        match &self.ports {
            Some((at, ports)) if usage.started.is_none_or(|scan| scan < *at) => ports,
            _ => &usage.ports,
        }
    }

    /// Slices that are not to be opened yet.
    fn unsettled(
        &mut self,
        inputs: &Inputs,
        observed: &Observed,
        now: Millis,
    ) -> BTreeMap<Ipv4Addr, SliceSet> {
        let known = &mut self.settling;
        known.retain(|address, _| inputs.addresses.contains_key(address));
        let mut unsettled = BTreeMap::new();
        for (address, object) in &inputs.addresses {
            let found = || {
                observed.holdings.get(address).map_or(SliceSet::EMPTY, |it| SliceSet::from_words(it.allowed))
            };
            let settling = known.entry(*address).or_insert_with(|| Settling::found(found()));
            let hurry = self.meter.waits(&object.allocation, now);
            let slices = settling.look(&Rights::of(object, &inputs.node), hurry, now);
            if !slices.is_empty() {
                unsettled.insert(*address, slices);
            }
        }
        unsettled
    }
}

impl Controller {
    /// Milliseconds since the agent started.
    pub(super) fn clock(&self) -> Millis {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(Millis::MAX)
    }

    /// Says that the agent lives. True if ports run short.
    pub(super) fn poll(&mut self) -> bool {
        self.pinned.plane.as_mut().is_some_and(|plane| self.growing.poll(plane.as_mut()))
    }

    /// What is wanted of each allocation, and whether flows should wait for it.
    pub(super) fn look_at_demand(&mut self, usage: &Usage) {
        let now = self.clock();
        self.dirty |= self.settles_at().is_some_and(|at| at <= now);
        let Some(wanted) = self.in_force.as_ref().map(|force| Arc::clone(&force.wanted)) else { return };
        let pressure = self.pressure(&wanted);
        let ports = self.growing.ports(usage).clone();
        let wants = self.growing.meter.wants(&wanted, &wanted.named, &ports, &pressure, now);
        let in_vain = self.growing.meter.in_vain(&wanted, &wants, now);
        // Where flows wait there is no use in letting slices settle.
        let unsettled = wanted.addresses.values().filter(|address| !address.unsettled.is_empty());
        let hurry =
            unsettled.filter_map(|it| it.allocation.as_ref()).any(|it| self.growing.meter.waits(it, now));
        self.dirty |= in_vain != self.growing.in_vain || hurry;
        self.growing.in_vain = in_vain;
        self.growing.wants = wants;
    }

    /// What limits have refused during the last minute. `counters` say whether there was anything since the last look: allocations
    /// are many, and most have met none.
    pub(super) fn look_at_limits(&mut self, counters: &[CounterValue]) -> BTreeMap<AllocationName, Refusals> {
        use Counter::{RefuseAccountFlows, RefuseAccountRate, RefusePodFlows, RefusePodRate};
        let reasons = [RefusePodFlows, RefusePodRate, RefuseAccountFlows, RefuseAccountRate];
        let sum = reasons.iter().filter_map(|reason| Some(counters.get(*reason as usize)?.packets)).sum();
        let at = Some((sum, self.numbers.len()));
        if self.growing.counted_at != at
            && let Some(plane) = &self.pinned.plane
            && let Ok(counts) = plane.limited(&self.numbers.values().copied().collect())
        {
            let count =
                |(name, number): (&AllocationName, &u32)| Some((name.clone(), counts.get(number)?.clone()));
            self.growing.counted = self.numbers.iter().filter_map(count).collect();
            self.growing.counted_at = at;
        }
        let now = self.clock() / 1000;
        self.growing.limited.look(&self.growing.counted, now)
    }

    /// Adds to the inputs what time tells. Before everything has been listed, nothing is opened anyway.
    pub(super) fn time(&mut self, inputs: &mut Inputs) {
        if !self.shared.lock().listed() {
            return;
        }
        let now = self.clock();
        inputs.unsettled = self.growing.unsettled(inputs, &self.pinned.observed, now);
        inputs.in_vain = self.growing.in_vain.clone();
        inputs.uses = self.sockets.uses(&self.pinned.observed);
    }

    fn settles_at(&self) -> Option<Millis> {
        self.growing.settling.values().filter_map(Settling::next).min()
    }

    /// How long until slices have settled.
    pub(super) fn until_settled(&self) -> Option<Duration> {
        Some(Duration::from_millis(self.settles_at()?.saturating_sub(self.clock())))
    }

    /// Flows that found no port, of each allocation from which this node sends.
    pub(super) fn pressure(&self, wanted: &Desired) -> BTreeMap<AllocationName, PressureValue> {
        let sends =
            |name: &AllocationName| wanted.allocations.get(name).is_some_and(|a| !a.addresses.is_empty());
        let numbers: BTreeMap<u32, &AllocationName> = self
            .numbers
            .iter()
            .filter(|(name, _)| sends(name))
            .map(|(name, number)| (*number, name))
            .collect();
        let plane = self.pinned.plane.as_ref();
        let counts = plane.and_then(|plane| plane.pressure(&numbers.keys().copied().collect()).ok());
        let counts = counts.unwrap_or_default().into_iter();
        counts.filter_map(|(number, count)| Some(((*numbers.get(&number)?).clone(), count))).collect()
    }
}
