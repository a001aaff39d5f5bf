//! Flows over IPv6: programs only remember them. What has had no packet for as long as its time-out is forgotten here; what is left
//! says which slices of /64s are in use.

use crate::ebpf::{Dataplane, EbpfError};
use crate::observed::{from_map6, from_network};
use crate::raw;
use crate::sweep::{self, Usage};
use aegis_common::{
    AllocationValue, Config6, FRAGMENTED, Flow6Key, Flow6Value, Pod6Key, Pod6Value, SingleValue,
    flow6_timeout,
};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// The maps.
pub struct Six {
    config: OwnedFd,
    pods: OwnedFd,
    flows: OwnedFd,
    origins: OwnedFd,
}

impl Six {
    pub fn new(dataplane: &Dataplane) -> Result<Six, EbpfError> {
        let fd = |name| dataplane.map_fd(name)?.try_clone_to_owned().map_err(EbpfError::Sweep);
        Ok(Six { config: fd("CONFIG6")?, pods: fd("PODS6")?, flows: fd("FLOWS6")?, origins: fd("ORIGINS6")? })
    }

    /// The incarnation of each pod, by its suffix.
    pub fn pods_by_suffix(&self, generation: u32) -> io::Result<BTreeMap<u32, u32>> {
        let mut pods = BTreeMap::new();
        sweep::for_each(self.pods.as_fd(), |key: &Pod6Key, value: &Pod6Value| {
            if key.generation == generation {
                pods.insert(value.suffix, value.incarnation);
            }
        })?;
        Ok(pods)
    }

    /// Looks up where flows from single addresses lead.
    fn look_up_origins(&self, usage: &mut Usage) -> io::Result<()> {
        let stand_ins = std::mem::take(&mut usage.stand_ins);
        if stand_ins.is_empty() {
            return Ok(());
        }
        sweep::for_each(self.origins.as_fd(), |stand_in: &u32, origin: &SingleValue| {
            if stand_ins.contains(stand_in) {
                usage.add_remote(from_map6(origin.address).into());
            }
        })
    }

    /// Forgets what is over, and counts the rest. `allocations` are all entries.
    pub fn sweep<'a>(
        &self,
        allocations: impl Iterator<Item = &'a AllocationValue>,
        generation: u32,
        now: u32,
        usage: &mut Usage,
    ) -> io::Result<()> {
        self.look_up_origins(usage)?;
        let mut active = false;
        sweep::for_each(self.config.as_fd(), |_: &u32, config: &Config6| active = config.active != 0)?;
        if !active {
            return Ok(());
        }
        let timeouts: BTreeMap<u64, _> = allocations.map(|entry| (entry.identity, entry.timeouts)).collect();
        let mut pods = BTreeMap::new();
        sweep::for_each(self.pods.as_fd(), |key: &Pod6Key, value: &Pod6Value| {
            if key.generation == generation {
                pods.insert(key.address, value.incarnation);
            }
        })?;
        let mut over = Vec::new();
        sweep::for_each(self.flows.as_fd(), |key: &Flow6Key, flow: &Flow6Value| {
            let timeouts = timeouts.get(&flow.identity).copied().unwrap_or_default();
            let idle = now.saturating_sub(flow.last_seen);
            let abandoned = pods.get(&key.local) != Some(&flow.incarnation);
            if abandoned || idle > flow6_timeout(key.protocol, flow.state, &timeouts) {
                over.push(*key);
                return;
            }
            usage.flows6 += 1;
            usage.add_remote(from_map6(key.remote).into());
            // A datagram is a part of a flow.
            if key.protocol != FRAGMENTED {
                let slices = usage.networks.entry((from_network(flow.network), flow.identity)).or_default();
                slices.insert(flow.slice as u8);
            }
        })?;
        let flows = raw::Map::of(self.flows.as_fd())?;
        over.iter().try_for_each(|key| flows.delete(raw::bytes(key)))
    }
}
