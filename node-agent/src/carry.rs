//! An upgrade to another layout of the maps, without a break: what the maps of the version before hold is carried over.
//!
//! In this order ([decision 17](../../docs/decisions/0017-flows-are-carried.md)): everything that the agent wrote, as soon as
//! the programs are loaded; then, in one go, the flows, the programs, the flows again for what has come in between, and the
//! bitmaps of ports, which are made from the flows. From before the programs are replaced until all that is done, the new ones
//! make no flow and end none: what they do not know yet is dropped without an answer, and comes again.

mod translate;

pub use translate::{Change, Entry, SERIES, STEPS, Step, Way};

use crate::ebpf::{Dataplane, EbpfError};
use crate::flows::{EnterProgram, FlowValue, Flows, Table};
use crate::links::Links;
use crate::load;
use crate::raw;
use crate::sweep;
use aegis_common::{
    AllLoads, BlockKey, BlockValue, Config, Counter, CounterValue, Flow6Key, Flow6Value, FlowKey,
    ForwardValue, LoadKey, LoadValue, MeterUse, PORTS_PER_BLOCK, REST_METER, ReverseValue, WORDS_PER_BLOCK,
    permutation_key, place_of_port,
};
use aya::maps::{MapData, MapError, PerCpuArray, PerCpuValues};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

/// Maps that the agent writes, in the order in which they are carried. `CONFIG` comes last: it says which policy is in force.
const WRITTEN: &[&str] = &[
    "PEERS",
    "PEER_INDEX",
    "ADDRESSES",
    "SINGLES",
    "SLOTS",
    "HOMES",
    "LEASE",
    "HOLDINGS",
    "BINDS",
    "ALLOCATIONS",
    "PODS",
    "HOSTS",
    "DESTINATIONS",
    "PORTS",
    "VERDICTS",
    "NETWORKS",
    "SUFFIXES",
    "ALLOCATIONS6",
    "PODS6",
    "DESTINATIONS6",
    "CONFIG6",
    "CONFIG",
];

/// The flow tables, which were hashes until schema 5.
const FLOWS: [&str; 2] = ["FORWARD", "REVERSE"];

/// What is remembered of flows over IPv6.
const FLOWS6: &str = "FLOWS6";

/// The maps of another version.
pub struct Source {
    links: Links,
    way: Way,
}

/// What was carried, and what could not be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Flows that are here now.
    pub flows: u64,
    /// Flows that could not be translated, or found no room.
    pub lost: u64,
}

impl Source {
    /// The maps of another version that can be carried, if there are any.
    pub fn find(own: &Links, known: &'static [Step]) -> Option<Source> {
        let others = own.others().into_iter();
        let mut found: Vec<Source> = others
            .filter_map(|links| {
                let way = Way::between(links.schema(), own.schema(), known)?;
                Some(Source { way, links }).filter(|source| source.path("CONFIG").exists())
            })
            .collect();
        // Links are what says that it is in use.
        found.sort_by_key(|source| source.links.pins().map_or(0, |pins| pins.len()));
        found.pop()
    }

    fn path(&self, map: &str) -> PathBuf {
        self.links.maps().join(map)
    }

    /// Calls `each` with every entry of a map, translated; gives how many could not be.
    fn for_each(&self, map: &str, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<u64> {
        let mut lost = 0;
        entries(&self.links, map, |key, value| {
            match self.way.translate(map, Entry { key: key.into(), value: value.into() }) {
                Some(entry) => each(&entry.key, &entry.value),
                None => lost += 1,
            }
        })?;
        Ok(lost)
    }

    /// The same for known types: entries of another size are not carried either.
    fn read<K: aya::Pod, V: aya::Pod>(&self, map: &str, mut each: impl FnMut(K, V)) -> io::Result<u64> {
        let mut lost = 0;
        lost += self.for_each(map, |key, value| match raw::from_bytes(key).zip(raw::from_bytes(value)) {
            Some((key, value)) => each(key, value),
            None => lost += 1,
        })?;
        Ok(lost)
    }
}

/// Calls `each` with every entry of a map of some version.
fn entries(links: &Links, map: &str, each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    let data = MapData::from_pin(links.maps().join(map)).map_err(io::Error::other)?;
    if FLOWS.contains(&map) && Table::is_one(&data)? {
        Table::open(&data)?.for_each(each);
        return Ok(());
    }
    raw::Map::of(data.fd().as_fd())?.for_each(each)
}

/// An open map of this version.
fn target(dataplane: &Dataplane, map: &'static str) -> Result<OwnedFd, EbpfError> {
    let path = dataplane.links.maps().join(map);
    let failed = |source: MapError| EbpfError::Map { name: map.into(), source };
    let data = MapData::from_pin(&path).map_err(failed)?;
    data.fd().as_fd().try_clone_to_owned().map_err(EbpfError::Carry)
}

impl Dataplane {
    /// Carries what the agent before has written, unless an agent of this version has already written something.
    pub fn carry_written(&mut self, source: &Source) -> Result<(), EbpfError> {
        if self.config()?.generation != 0 {
            return Ok(());
        }
        // A map that the version before did not have stays as it is: empty.
        for map in WRITTEN.iter().copied().filter(|map| source.path(map).exists()) {
            let fd = target(self, map)?;
            let own = raw::Map::of(fd.as_fd()).map_err(EbpfError::Carry)?;
            let mut result = Ok(());
            let lost = source.for_each(map, |key, value| {
                // Most entries of arrays were never written.
                if result.is_ok() && value.iter().any(|byte| *byte != 0) {
                    result = own.update(key, value);
                }
            });
            let lost = lost.map_err(EbpfError::Carry)?;
            result.map_err(EbpfError::Carry)?;
            if lost > 0 {
                return Err(EbpfError::Carry(io::Error::other(format!(
                    "{lost} entries of {map} cannot be translated"
                ))));
            }
        }
        Ok(())
    }

    /// Whether flows are just being taken over: set from before programs of this version replace others until all flows are
    /// here, also if the agent dies between.
    pub fn taking_over(&mut self) -> Result<bool, EbpfError> {
        let handover = self.array::<u32>("HANDOVER")?;
        handover
            .get(&0, 0)
            .map(|held| held != 0)
            .map_err(|source| EbpfError::Map { name: "HANDOVER".into(), source })
    }

    pub(crate) fn set_taking_over(&mut self, held: bool) -> Result<(), EbpfError> {
        let mut handover = self.array::<u32>("HANDOVER")?;
        handover
            .set(0, u32::from(held), 0)
            .map_err(|source| EbpfError::Map { name: "HANDOVER".into(), source })
    }

    /// Makes the flow tables what the other version's are. For as long as nobody else makes or ends flows here.
    pub fn carry_flows(&mut self, source: &Source) -> Result<Carried, EbpfError> {
        let (reverse, enter) = (self.reverse()?, self.enter()?);
        let (_, lost_back) = follow(source, "REVERSE", &reverse, &enter, |_, _| true)?;
        let mut backs = HashSet::new();
        if lost_back > 0 {
            reverse.for_each(|key, _| _ = backs.insert(*key));
        }
        // A flow without its way back would share its port with the next one.
        let (flows, lost) =
            follow(source, "FORWARD", &self.forward()?, &enter, |key, flow: &ForwardValue| {
                let back = FlowKey { local: flow.egress, local_port: flow.egress_port, ..*key };
                flow.is_of(key) && (lost_back == 0 || backs.contains(&back))
            })?;
        self.carry_flows6(source)?;
        Ok(Carried { flows, lost })
    }

    /// Adds what the other version remembers of flows over IPv6. Of one that goes on here, it is known already.
    fn carry_flows6(&mut self, source: &Source) -> Result<(), EbpfError> {
        if !source.path(FLOWS6).exists() {
            return Ok(());
        }
        let fd = target(self, FLOWS6)?;
        let own = raw::Map::of(fd.as_fd()).map_err(EbpfError::Carry)?;
        let mut result = Ok(());
        let each = |key: Flow6Key, value: Flow6Value| {
            // Its meter is one of the other version's.
            let value = Flow6Value { meter: REST_METER, ..value };
            if result.is_ok() {
                result = own.insert(raw::bytes(&key), raw::bytes(&value));
            }
        };
        // What cannot be translated is decided anew.
        source.read(FLOWS6, each).map_err(EbpfError::Carry)?;
        result.map_err(EbpfError::Carry)
    }

    /// Makes the bitmaps of ports from the ways back, which say what is in use.
    pub(crate) fn make_blocks(&mut self, now: u32) -> Result<(), EbpfError> {
        let seed = self.config()?.seed;
        let mut keys = Vec::new();
        self.reverse()?.for_each(|key, back| {
            // What goes through a gateway has no port of its own here.
            if (back.pod, back.pod_port) != (key.local, key.local_port) {
                keys.push(*key);
            }
        });
        let fd = target(self, "BLOCKS")?;
        let own = raw::Map::of(fd.as_fd()).map_err(EbpfError::Carry)?;
        for (number, (key, block)) in blocks(keys, seed, now).into_iter().enumerate() {
            // Not at zero, where the newest ports would come first.
            let cursor = aegis_common::mix(seed ^ now ^ number as u32) & (PORTS_PER_BLOCK - 1);
            let block = BlockValue { cursor, ..block };
            match own.update(raw::bytes(&key), raw::bytes(&block)) {
                // Without a bitmap the way back still keeps each port from being taken twice.
                Err(error) if matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOMEM)) => {}
                other => other.map_err(EbpfError::Carry)?,
            }
        }
        Ok(())
    }

    /// Makes the counts of pods and accounts from the flows and bitmaps.
    pub(crate) fn make_loads(&mut self, now: u32) -> Result<(), EbpfError> {
        let mut found = load::Found::default();
        let (mut allocations, mut addresses) = (BTreeMap::new(), BTreeMap::new());
        let carry = EbpfError::Carry;
        self.forward()?.for_each(|key, value| found.add_flow(key, value));
        sweep::for_each(self.map_fd("BLOCKS")?, |key, _: &BlockValue| found.add_block(key)).map_err(carry)?;
        sweep::for_each(self.map_fd("ALLOCATIONS")?, |index: &u32, value| {
            _ = allocations.insert(*index, *value)
        })
        .map_err(carry)?;
        sweep::for_each(self.map_fd("ADDRESSES")?, |address: &u32, value| {
            _ = addresses.insert(*address, *value)
        })
        .map_err(carry)?;
        let counts = found.counts(&allocations, &addresses);
        let fd = target(self, "LOADS")?;
        let own = raw::Map::of(fd.as_fd()).map_err(carry)?;
        let mut stale = Vec::new();
        sweep::for_each(fd.as_fd(), |key: &LoadKey, _: &LoadValue| stale.push(*key)).map_err(carry)?;
        for key in stale {
            own.delete(raw::bytes(&key)).map_err(carry)?;
        }
        let all = counts.get(&load::ALL).copied().unwrap_or_default();
        for (key, (flows, blocks)) in counts.into_iter().filter(|(key, _)| *key != load::ALL) {
            let opened = u64::from(now) << 32;
            let value = LoadValue { key, flows: flows.into(), blocks: blocks.into(), opened, refused: 0 };
            match own.update(raw::bytes(&key), raw::bytes(&value)) {
                // What is not counted is not limited, for as long as there is no room.
                Err(error) if matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOMEM)) => {}
                other => other.map_err(carry)?,
            }
        }
        let mut loads = self.array::<AllLoads>("ALL_LOADS")?;
        let value = AllLoads { flows: all.0.into(), blocks: all.1.into() };
        loads.set(0, value, 0).map_err(|source| EbpfError::Map { name: "ALL_LOADS".into(), source })
    }

    /// Lets flows that were carried count as in use, until they end: of whom, only their own meters knew.
    pub(crate) fn make_rest(&mut self) -> Result<(), EbpfError> {
        let mut in_use = 0;
        self.forward()?.for_each(|key, flow| {
            let here = flow.is_of(key) && flow.egress != key.local;
            in_use += u32::from(here && u32::from(flow.meter) == REST_METER);
        });
        let mut uses = self.array::<MeterUse>("METER_USE")?;
        let value = MeterUse { in_use, peak: in_use };
        uses.set(REST_METER, value, 0).map_err(|source| EbpfError::Map { name: "METER_USE".into(), source })
    }

    /// Adds to the counters what was carried.
    pub(crate) fn count_carried(&mut self, carried: Carried) -> Result<(), EbpfError> {
        for (counter, packets) in [(Counter::Carried, carried.flows), (Counter::NotCarried, carried.lost)] {
            let failed = |source| EbpfError::Map { name: "COUNTERS".into(), source };
            let map = self.object.map_mut("COUNTERS").ok_or(EbpfError::Missing("COUNTERS"))?;
            let mut map = PerCpuArray::<_, CounterValue>::try_from(map).map_err(failed)?;
            let mut values: Vec<CounterValue> =
                map.get(&(counter as u32), 0).map_err(failed)?.iter().copied().collect();
            if let Some(first) = values.first_mut() {
                first.packets += packets;
            }
            let values = PerCpuValues::try_from(values).map_err(EbpfError::Carry)?;
            map.set(counter as u32, values, 0).map_err(failed)?;
        }
        Ok(())
    }

    fn config(&mut self) -> Result<Config, EbpfError> {
        let config = self.array::<Config>("CONFIG")?;
        config.get(&0, 0).map_err(|source| EbpfError::Map { name: "CONFIG".into(), source })
    }
}

/// Flows that another version has.
pub(crate) fn flows(links: &Links) -> u64 {
    let mut flows = 0;
    entries(links, "FORWARD", |_, _| flows += 1).map_or(0, |()| flows)
}

/// Makes one table what the other version's is: adds, replaces and removes. Gives how many entries it has, and how many it should
/// have in addition.
fn follow<V: Followed>(
    source: &Source,
    map: &'static str,
    flows: &Flows<V>,
    enter: &EnterProgram,
    wanted: impl Fn(&FlowKey, &V) -> bool,
) -> Result<(u64, u64), EbpfError> {
    let (mut there, mut refused) = (HashMap::new(), 0);
    let mut lost = source
        .read(map, |key: FlowKey, value: V| {
            let value = value.unmetered();
            if wanted(&key, &value) {
                there.insert(key, value);
            } else if value.is_live() {
                refused += 1;
            }
        })
        .map_err(EbpfError::Carry)?;
    lost += refused;
    let (mut changed, mut stale, mut count) = (Vec::new(), Vec::new(), 0);
    flows.for_each(|key, here| match there.remove(key) {
        Some(old) => {
            count += 1;
            changed.extend(old.newer_than(here).map(|value| (*key, value)));
        }
        None => stale.push(*key),
    });
    enter.remove::<V>(&stale)?;
    enter.set(&changed)?;
    let new: Vec<_> = there.into_iter().collect();
    let entered = u64::from(enter.set(&new)?);
    Ok((count + entered, lost + (new.len() as u64).saturating_sub(entered)))
}

/// A value that another version's programs may go on writing while it is copied.
trait Followed: FlowValue {
    /// What it has to become here, if the value here is another flow's, or has missed something.
    fn newer_than(&self, here: &Self) -> Option<Self>;
    /// Whether it is of a flow that goes on.
    fn is_live(&self) -> bool;
    /// The same without the meter that it had in another version's maps.
    fn unmetered(self) -> Self;
}

impl Followed for ForwardValue {
    fn newer_than(&self, here: &Self) -> Option<Self> {
        if self.life != here.life {
            return Some(*self);
        }
        let merged = ForwardValue {
            seen: here.seen | self.seen,
            last_seen: here.last_seen.max(self.last_seen),
            buried: here.buried | self.buried,
            ..*here
        };
        (merged != *here).then_some(merged)
    }

    fn is_live(&self) -> bool {
        self.life != 0
    }

    fn unmetered(self) -> Self {
        ForwardValue { meter: REST_METER as u16, ..self }
    }
}

impl Followed for ReverseValue {
    fn newer_than(&self, here: &Self) -> Option<Self> {
        let whose = |it: &Self| (it.digest, it.pod, it.pod_port, it.peer, it.made);
        if whose(self) != whose(here) {
            return Some(*self);
        }
        let merged = ReverseValue {
            seen: here.seen | self.seen,
            last_seen: here.last_seen.max(self.last_seen),
            buried: here.buried | self.buried,
            ..*here
        };
        (merged != *here).then_some(merged)
    }

    fn is_live(&self) -> bool {
        true
    }

    fn unmetered(self) -> Self {
        ReverseValue { meter: REST_METER as u16, ..self }
    }
}

/// The bitmaps in which the ports of these ways back are taken. `now` is in seconds since boot.
fn blocks(keys: impl IntoIterator<Item = FlowKey>, seed: u32, now: u32) -> HashMap<BlockKey, BlockValue> {
    let mut blocks = HashMap::new();
    for key in keys {
        let id = BlockKey {
            egress: key.local,
            remote: key.remote,
            remote_port: key.remote_port,
            protocol: key.protocol,
            block: (key.local_port >> 11) as u8,
        };
        let block = blocks.entry(id).or_insert_with(|| BlockValue {
            key: id,
            cursor: 0,
            used: 0,
            high: 0,
            full: 0,
            last_used: now,
            words: [0; WORDS_PER_BLOCK],
        });
        let slice = u32::from(key.local_port >> 8);
        let low = place_of_port(key.local_port as u8, permutation_key(seed, &id, slice));
        let place = (slice & 7) << 8 | u32::from(low);
        let (word, bit) = ((place >> 6) as usize, 1u64 << (place & 63));
        if let Some(word) = block.words.get_mut(word).filter(|word| **word & bit == 0) {
            *word |= bit;
            block.used += 1;
        }
    }
    for block in blocks.values_mut() {
        block.high = block.used;
        for (word, ports) in block.words.iter().enumerate() {
            block.full |= u32::from(*ports == u64::MAX) << word;
        }
    }
    blocks
}
