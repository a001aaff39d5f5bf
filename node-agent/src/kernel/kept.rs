//! What the sweeping thread holds, and what it does with it.

use super::doubts::Doubts;
use super::resting::Resting;
use super::settle;
use super::six::Six;
use crate::ebpf::{Dataplane, EbpfError, SweepProgram};
use crate::flows::Flows;
use crate::load;
use crate::observed::NO_ALLOCATION;
use crate::sweep::{self, Tables, Usage};
use aegis_common::{
    AddressValue, AllLoads, AllocationValue, BLOCK_IDLE, BlockKey, BlockValue, Config, FlowKey, ForwardValue,
    HostKey, HostValue, LoadKey, LoadValue, PeakKey, PodKey, PodValue, ReverseValue, SEEN_FIN, SEEN_RST,
    Timeouts, expired, is_stand_in, of_incarnation,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Seconds between two looks at whether the programs count right.
const RECOUNT: u32 = 10;

/// The maps and the program.
pub struct Kept {
    forward: Flows<ForwardValue>,
    blocks: OwnedFd,
    allocations: OwnedFd,
    config: OwnedFd,
    pods: OwnedFd,
    hosts: OwnedFd,
    addresses: OwnedFd,
    loads: OwnedFd,
    all_loads: OwnedFd,
    recounted_at: u32,
    doubts: Doubts,
    six: Six,
    program: SweepProgram,
}

impl Kept {
    /// Takes the maps and the program.
    pub fn new(dataplane: &Dataplane) -> Result<Kept, EbpfError> {
        let fd = |name| dataplane.map_fd(name)?.try_clone_to_owned().map_err(EbpfError::Sweep);
        Ok(Kept {
            forward: dataplane.forward()?,
            blocks: fd("BLOCKS")?,
            allocations: fd("ALLOCATIONS")?,
            config: fd("CONFIG")?,
            pods: fd("PODS")?,
            hosts: fd("HOSTS")?,
            addresses: fd("ADDRESSES")?,
            loads: fd("LOADS")?,
            all_loads: fd("ALL_LOADS")?,
            recounted_at: 0,
            doubts: Doubts::new(dataplane)?,
            six: Six::new(dataplane)?,
            program: dataplane.sweeper()?,
        })
    }

    fn config(&self) -> io::Result<Config> {
        let mut found = Config::default();
        sweep::for_each(self.config.as_fd(), |_: &u32, config: &Config| found = *config)?;
        Ok(found)
    }

    /// What the programs count of pods and accounts, once those that were counting something have entered it or taken it out.
    fn counted(&self) -> io::Result<HashMap<LoadKey, LoadValue>> {
        let mut counted = HashMap::new();
        sweep::for_each(self.loads.as_fd(), |key: &LoadKey, value: &LoadValue| {
            _ = counted.insert(*key, *value)
        })?;
        sweep::for_each(self.all_loads.as_fd(), |_: &u32, all: &AllLoads| {
            let value =
                LoadValue { key: load::ALL, flows: all.flows, blocks: all.blocks, ..LoadValue::default() };
            counted.insert(load::ALL, value);
        })?;
        Ok(counted)
    }

    /// The pods of the live policy, by address. (Should it be switched right now: the program looks again.)
    fn pods(&self, generation: u32) -> io::Result<BTreeMap<u32, PodValue>> {
        let mut pods = BTreeMap::new();
        sweep::for_each(self.pods.as_fd(), |key: &PodKey, value: &PodValue| {
            if key.generation == generation {
                pods.insert(key.address, *value);
            }
        })?;
        Ok(pods)
    }

    /// What tells of the pods of the host network that they are there: see `of_incarnation`.
    fn hosts(&self, generation: u32) -> io::Result<BTreeSet<u64>> {
        let mut hosts = BTreeSet::new();
        sweep::for_each(self.hosts.as_fd(), |key: &HostKey, _: &HostValue| {
            if key.generation == generation {
                hosts.insert(key.group);
            }
        })?;
        Ok(hosts)
    }
}

/// Whether a flow could be over, judged without what the other direction saw: a FIN and a reset from there would make the
/// limit the shortest.
fn candidate(key: &FlowKey, forward: &ForwardValue, timeouts: &Timeouts, now: u32) -> bool {
    let reverse = ReverseValue { seen: SEEN_FIN | SEEN_RST, ..ReverseValue::default() };
    expired(key.protocol, forward, &reverse, timeouts, now)
}

impl Tables for Kept {
    fn sweep(&mut self, closely: bool) -> io::Result<Usage> {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?.tv_sec() as u32;
        let mut usage = Usage::default();
        let mut allocations = BTreeMap::new();
        sweep::for_each(self.allocations.as_fd(), |index: &u32, value: &AllocationValue| {
            if *value != NO_ALLOCATION {
                allocations.insert(*index, *value);
            }
        })?;
        let mut resting = Resting::new(allocations.iter());
        let config = self.config()?;
        let pods = self.pods(config.generation)?;
        let hosts = self.hosts(config.generation)?;
        let pods6 = self.six.pods_by_suffix(config.generation)?;
        let abandoned = |key: &FlowKey, flow: &ForwardValue| {
            if is_stand_in(key.remote) {
                return pods6.get(&key.local) != Some(&flow.incarnation);
            }
            !flow.is_guest(key)
                && pods.get(&key.local).is_none_or(|pod| pod.incarnation != flow.incarnation)
                && !hosts.contains(&of_incarnation(flow.incarnation))
        };
        self.doubts.begin(&config, now, closely)?;
        let recount = now.saturating_sub(self.recounted_at) >= RECOUNT;
        let before = if recount { self.counted()? } else { HashMap::new() };
        if recount {
            // Who has counted before has entered it when the scan begins, and who takes out during the scan has counted when it is
            // over: what the counts say in between explains all that may differ.
            settle();
        }
        let mut found = load::Found::default();
        let mut over = Vec::new();
        self.forward.for_each(|key, value| {
            usage.add_flow(key, value);
            found.add_flow(key, value);
            self.doubts.look(key, value);
            let allocation = u32::from(value.allocation);
            let timeouts = allocations.get(&allocation).map(|it| it.timeouts).unwrap_or_default();
            let abandoned = abandoned(key, value);
            if candidate(key, value, &timeouts, now) || abandoned {
                over.push(*key);
            }
            if resting.asks_for(allocation)
                && (abandoned || candidate(key, value, &Timeouts { rest: 0, ..timeouts }, now))
            {
                resting.add(key, value);
            }
        });
        self.program.flows(&over).map_err(io::Error::other)?;
        drop(over);
        resting.end(&self.program)?;
        usage.foreign = self.doubts.end(&self.program, now)?;
        self.six.sweep(allocations.values(), config.generation, now, &mut usage)?;

        let (mut empty, mut peaks) = (Vec::new(), Vec::new());
        sweep::for_each(self.blocks.as_fd(), |key: &BlockKey, value: &BlockValue| {
            usage.add_block(key, value);
            found.add_block(key);
            if value.high > value.used {
                peaks.push(PeakKey { block: *key, high: value.high });
            }
            if value.used == 0 && now.saturating_sub(value.last_used) >= BLOCK_IDLE {
                empty.push(*key);
            }
        })?;
        self.program.blocks(&empty).map_err(io::Error::other)?;
        self.program.peaks(&peaks).map_err(io::Error::other)?;
        usage.taken = found.taken();
        if recount {
            self.recounted_at = now;
            settle();
            let mut addresses = BTreeMap::new();
            sweep::for_each(self.addresses.as_fd(), |address: &u32, value: &AddressValue| {
                addresses.insert(*address, *value);
            })?;
            let counts = found.counts(&allocations, &addresses);
            let fixes = load::fixes(&before, &counts, &self.counted()?, now);
            self.program.loads(&fixes).map_err(io::Error::other)?;
        }
        Ok(usage)
    }
}
