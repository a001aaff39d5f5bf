//! The maps of meters.

use super::Fill;
use super::book::{Look, Step, Told};
use super::bound::Bound;
use super::uses::Uses;
use crate::ebpf::{Dataplane, EbpfError};
use crate::raw;
use crate::sweep;
use aegis_common::{
    Counter, Flow6Key, Flow6Value, METER_RETIRED, MeterKey, MeterValue, REST_METER, RefusalKey,
};
use aya::maps::{Array, Map, MapData, MapError, PerCpuArray, Queue};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Numbers are few when less than one of so many is free.
const FEW: usize = 8;

/// The maps, for a thread of their own.
pub struct Maps {
    index: OwnedFd,
    values: PerCpuArray<MapData, MeterValue>,
    used: Uses,
    told: Array<MapData, MeterValue>,
    free: Queue<MapData, u32>,
    refusals: OwnedFd,
    told_refusals: OwnedFd,
    clock: Array<MapData, u64>,
    flows6: OwnedFd,
    bound: Bound,
    size: u32,
}

impl Maps {
    /// Handles of their own for the maps.
    ///
    /// # Errors
    /// A map is missing, or cannot be mapped into memory.
    pub fn open(dataplane: &Dataplane) -> Result<Maps, EbpfError> {
        let own = |name| dataplane.map_fd(name)?.try_clone_to_owned().map_err(EbpfError::Carry);
        let size = dataplane.max_entries("METER_USE")?;
        Ok(Maps {
            index: own("METER_INDEX")?,
            values: dataplane.handle("METERS", Map::PerCpuArray)?,
            used: Uses::open(dataplane.map_fd("METER_USE")?, size).map_err(EbpfError::Carry)?,
            told: dataplane.handle("METERS_TOLD", Map::Array)?,
            free: dataplane.handle("FREE_METERS", Map::Queue)?,
            refusals: own("REFUSALS")?,
            told_refusals: own("REFUSALS_TOLD")?,
            clock: dataplane.handle("METER_CLOCK", Map::Array)?,
            flows6: own("FLOWS6")?,
            bound: Bound::open(dataplane)?,
            size,
        })
    }

    /// Second since boot up to which was told; 0 = never.
    pub fn clock(&self) -> u64 {
        self.clock.get(&0, 0).unwrap_or_default()
    }

    /// Notes it.
    ///
    /// # Errors
    /// The map refuses it.
    pub fn set_clock(&mut self, second: u64) -> Result<(), MapError> {
        self.clock.set(0, second, 0)
    }

    /// Takes all numbers back that are free.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn withdraw(&mut self) -> Result<(), MapError> {
        loop {
            match self.free.pop(0) {
                Ok(_) => {}
                Err(MapError::ElementNotFound) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives those out that are not in the index. Some time after [`Maps::withdraw`]: a program that had just taken one has
    /// put it into the index by then.
    ///
    /// # Errors
    /// A map cannot be read or written.
    pub fn give_out(&mut self) -> Result<(), MapError> {
        let linked: BTreeSet<u32> = self.linked()?.into_values().collect();
        for number in 1..self.size {
            if !linked.contains(&number) {
                self.clear(number)?;
                self.free.push(number, 0)?;
            }
        }
        Ok(())
    }

    /// Lets refusals be counted of which there are too many kinds.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn keep_rest_of_refusals(&self) -> Result<(), MapError> {
        for refusals in [map(self.refusals.as_fd())?, map(self.told_refusals.as_fd())?] {
            for counter in Counter::ALL {
                let key = RefusalKey::rest_of(*counter as u8);
                refusals.insert(raw::bytes(&key), raw::bytes(&0u64))?;
            }
        }
        Ok(())
    }

    /// Looks whether connections of sockets with an egress address are over.
    ///
    /// # Errors
    /// A map cannot be read or written, or sockets cannot be listed.
    pub fn look_at_sockets(&mut self) -> Result<(), MapError> {
        let Maps { bound, used, index, .. } = self;
        bound.look(used, || entries(index.as_fd()))
    }

    /// What was told before.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn told(&self) -> Result<Told, MapError> {
        let linked = self.linked()?;
        let numbers = linked.values().copied().chain([REST_METER]);
        let meters = numbers.map(|number| Ok((number, self.told.get(&number, 0)?)));
        let meters = meters.collect::<Result<BTreeMap<_, _>, MapError>>()?;
        Ok(Told { meters, refusals: entries(self.told_refusals.as_fd())?, rules: None })
    }

    /// Looks at all meters in the index, and at these. Peaks begin anew.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn look(&mut self, numbers: impl Iterator<Item = u32>) -> Result<Look, MapError> {
        let linked = self.linked()?;
        let numbers: BTreeSet<u32> = linked.values().copied().chain(numbers).collect();
        let mut meters = BTreeMap::new();
        for number in numbers {
            let values = self.values.get(&number, 0)?;
            let sum = values.iter().fold(MeterValue::default(), |sum, value| sum.plus(value));
            meters.insert(number, (self.used.take(number), sum));
        }
        let mut held = BTreeSet::new();
        sweep::for_each(self.flows6.as_fd(), |_: &Flow6Key, flow: &Flow6Value| {
            _ = held.insert(flow.meter);
        })
        .map_err(MapError::IoError)?;
        let short = (self.size as usize).saturating_sub(linked.len()) < self.size as usize / FEW;
        Ok(Look { linked, meters, held, refusals: entries(self.refusals.as_fd())?, short })
    }

    /// How many meters a look found in use. One is for what finds none.
    pub fn fill(&self, look: &Look) -> Fill {
        Fill {
            in_use: u32::try_from(look.linked.len()).unwrap_or(u32::MAX),
            size: self.size.saturating_sub(1),
        }
    }

    /// Does what a look led to.
    ///
    /// # Errors
    /// A map refuses a write.
    pub fn follow(&mut self, steps: &[Step]) -> Result<(), MapError> {
        for step in steps {
            match *step {
                Step::Told(number, value) => self.told.set(number, value, 0)?,
                Step::ToldRefusals(key, count) => {
                    map(self.told_refusals.as_fd())?.update(raw::bytes(&key), raw::bytes(&count))?;
                }
                Step::Retire(key, number) => {
                    let index = map(self.index.as_fd())?;
                    // It is never without one.
                    let retired = MeterKey { flags: key.flags | METER_RETIRED, ..key };
                    index.update(raw::bytes(&retired), raw::bytes(&number))?;
                    index.delete(raw::bytes(&key))?;
                }
                Step::Free(key, number) => {
                    self.clear(number)?;
                    map(self.index.as_fd())?.delete(raw::bytes(&key))?;
                    self.free.push(number, 0)?;
                }
                Step::Forget(key) => {
                    map(self.refusals.as_fd())?.delete(raw::bytes(&key))?;
                    map(self.told_refusals.as_fd())?.delete(raw::bytes(&key))?;
                }
                Step::Keep(key) => match self.free.pop(0) {
                    Ok(number) => map(self.index.as_fd())?.update(raw::bytes(&key), raw::bytes(&number))?,
                    // The next time.
                    Err(MapError::ElementNotFound) => {}
                    Err(error) => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Lets a number that nobody has begin anew.
    fn clear(&mut self, number: u32) -> Result<(), MapError> {
        let cpus = self.values.get(&number, 0)?.iter().map(|_| MeterValue::default()).collect::<Vec<_>>();
        self.values.set(number, cpus.try_into().map_err(MapError::IoError)?, 0)?;
        self.used.take(number);
        self.told.set(number, MeterValue::default(), 0)
    }

    fn linked(&self) -> Result<BTreeMap<MeterKey, u32>, MapError> {
        entries(self.index.as_fd())
    }
}

pub(super) fn map(fd: BorrowedFd<'_>) -> Result<raw::Map<'_>, MapError> {
    raw::Map::of(fd).map_err(MapError::IoError)
}

pub(super) fn entries<K: aya::Pod + Ord, V: aya::Pod>(
    fd: BorrowedFd<'_>,
) -> Result<BTreeMap<K, V>, MapError> {
    let mut found = BTreeMap::new();
    sweep::for_each(fd, |key: &K, value: &V| _ = found.insert(*key, *value)).map_err(MapError::IoError)?;
    Ok(found)
}
