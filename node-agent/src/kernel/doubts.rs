//! What should not be there: flows whose slice is another node's, and entries for incoming packets that no flow has. Both are
//! looked for now and then beside the usual scan; the `sweep` program looks again and ends them.

use crate::ebpf::{Dataplane, EbpfError, SweepProgram};
use crate::flows::Flows;
use crate::sweep;
use aegis_common::{
    AddressValue, Config, FlowKey, ForwardValue, REST, ReverseValue, SLOTS_PER_ADDRESS, SlotValue,
};
use aegis_core::slice::SliceSet;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Seconds between two looks at whose slices the flows are. Two looks must agree, since agents do not write all at once; they
/// are over long before a slice has rested and may be another node's.
const SLICES: u32 = 10;
/// Seconds between two looks for entries without flow.
const ORPHANS: u32 = 60;

/// The maps, and what the last look found.
pub struct Doubts {
    reverse: Flows<ReverseValue>,
    addresses: OwnedFd,
    slots: OwnedFd,
    slices_at: u32,
    orphans_at: u32,
    /// Slices of each address that are this node's, while flows are being looked at.
    own: Option<BTreeMap<u32, SliceSet>>,
    suspects: HashSet<FlowKey>,
    found: HashSet<FlowKey>,
}

impl Doubts {
    /// Takes the maps.
    pub fn new(dataplane: &Dataplane) -> Result<Doubts, EbpfError> {
        let fd = |name| dataplane.map_fd(name)?.try_clone_to_owned().map_err(EbpfError::Sweep);
        Ok(Doubts {
            reverse: dataplane.reverse()?,
            addresses: fd("ADDRESSES")?,
            slots: fd("SLOTS")?,
            slices_at: 0,
            orphans_at: 0,
            own: None,
            suspects: HashSet::new(),
            found: HashSet::new(),
        })
    }

    /// Before a scan of `FORWARD`. `now` is in seconds since boot. Whose slices the flows are is looked at when it is time
    /// to, or at once if it is to be looked at closely.
    pub fn begin(&mut self, config: &Config, now: u32, closely: bool) -> io::Result<()> {
        self.own = None;
        let due = closely || now.saturating_sub(self.slices_at) >= SLICES;
        if config.own_peer == 0 || !due {
            return Ok(());
        }
        self.slices_at = now;
        let (mut by_index, mut own) = (BTreeMap::new(), BTreeMap::new());
        sweep::for_each(self.addresses.as_fd(), |address: &u32, value: &AddressValue| {
            by_index.insert(value.index, *address);
            own.insert(*address, SliceSet::default());
        })?;
        sweep::for_each(self.slots.as_fd(), |index: &u32, slot: &SlotValue| {
            if slot.peer == config.own_peer
                && let Some(slices) =
                    by_index.get(&(index / SLOTS_PER_ADDRESS)).and_then(|address| own.get_mut(address))
            {
                slices.insert((index % SLOTS_PER_ADDRESS) as u8);
            }
        })?;
        self.own = Some(own);
        Ok(())
    }

    /// A flow that the scan met.
    pub fn look(&mut self, key: &FlowKey, flow: &ForwardValue) {
        let Some(own) = &self.own else { return };
        if own.get(&flow.egress).is_some_and(|slices| !slices.contains((flow.egress_port >> 8) as u8)) {
            self.found.insert(*key);
        }
    }

    /// After the scan. Gives how many flows were met in slices that are not this node's, if that was looked at.
    pub fn end(&mut self, program: &SweepProgram, now: u32) -> io::Result<Option<u64>> {
        let mut foreign = None;
        if self.own.take().is_some() {
            let found = std::mem::take(&mut self.found);
            foreign = Some(found.len() as u64);
            let twice: Vec<FlowKey> = found.intersection(&self.suspects).copied().collect();
            self.suspects = found;
            program.revoked(&twice).map_err(io::Error::other)?;
        }
        if now.saturating_sub(self.orphans_at) >= ORPHANS {
            self.orphans_at = now;
            let mut idle = Vec::new();
            self.reverse.for_each(|key, value| {
                if now.saturating_sub(value.made) > REST {
                    idle.push(*key);
                }
            });
            program.orphans(&idle).map_err(io::Error::other)?;
        }
        Ok(foreign)
    }
}
