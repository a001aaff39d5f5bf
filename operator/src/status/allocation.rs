//! Status of an `EgressAllocation`.

use super::conditions::{Clock, Wanted};
use super::fleet::{Fleet, Share};
use super::{View, capacity, verdict};
use crate::metrics::SliceCounts;
use aegis_core::model::{Address, AllocationName};
use aegis_crds::{AddressUse, EgressAllocation, EgressAllocationStatus, reason, type_};
use kube::ResourceExt;
use std::collections::HashMap;

/// What the allocation's status should be; `None` if the plan does not know it, or could not be written.
pub fn status(
    object: &EgressAllocation,
    old: &EgressAllocationStatus,
    view: &View,
    fleet: &Fleet,
    shares: &HashMap<&AllocationName, Share>,
    clock: &Clock,
) -> Option<EgressAllocationStatus> {
    let name = AllocationName { account: object.namespace().unwrap_or_default(), name: object.name_any() };
    let outcome = view.plan.allocations.get(&name)?;
    let ports = &object.spec.ports;
    let usable = (ports.last + 1).saturating_sub(ports.first) / aegis_core::slice::PORTS;
    let none = Share::default();
    let share = shares.get(&name).unwrap_or(&none);
    let own = &share.addresses;
    if own.iter().any(|address| view.unwritten.contains(&address.address)) {
        return None;
    }
    let addresses: Vec<AddressUse> = own.iter().map(|address| address_use(address, usable)).collect();
    let summary = own.iter().map(|address| address.address.to_string()).collect::<Vec<_>>().join(", ");
    let programmed = if object.metadata.deletion_timestamp.is_some() {
        let message = format!("being deleted: {} nodes still hold slices", share.holders.len());
        Wanted::bad(type_::PROGRAMMED, reason::DRAINING, &message)
    } else {
        fleet.programmed_allocation(share, &summary)
    };
    let wanted = vec![
        verdict(type_::ACCEPTED, &outcome.accepted),
        verdict(type_::ALLOCATED, &outcome.allocated),
        programmed,
        capacity::judge(fleet.demand(&name), object.spec.capacity.target_percent, &old.conditions),
    ];
    Some(EgressAllocationStatus {
        nodes: u32::try_from(share.holders.len()).unwrap_or(u32::MAX),
        conditions: clock.settle(&old.conditions, wanted),
        addresses,
        summary,
    })
}

fn address_use(address: &Address, usable: u32) -> AddressUse {
    let counts = SliceCounts::of(address);
    AddressUse {
        address: address.address.to_string(),
        prefix: address.prefix.clone(),
        slices_held: counts.held + counts.draining,
        slices_free: counts.free(usable),
    }
}
