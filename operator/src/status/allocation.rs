//! Status of an `EgressAllocation`.

use super::conditions::{Clock, Wanted};
use super::fleet::{Fleet, Holders, addresses};
use super::{View, capacity, verdict};
use crate::metrics::SliceCounts;
use aegis_core::model::{Address, AllocationName};
use aegis_crds::{AddressUse, EgressAllocation, EgressAllocationStatus, reason, type_};
use kube::ResourceExt;
use std::collections::BTreeMap;

/// What the allocation's status should be; `None` if the plan does not know it, or could not be written.
pub fn status(
    object: &EgressAllocation,
    old: &EgressAllocationStatus,
    view: &View,
    fleet: &Fleet,
    holders: &Holders,
    clock: &Clock,
) -> Option<EgressAllocationStatus> {
    let name = AllocationName { account: object.namespace().unwrap_or_default(), name: object.name_any() };
    let outcome = view.plan.allocations.get(&name)?;
    let ports = &object.spec.ports;
    let usable = (ports.last + 1).saturating_sub(ports.first) / aegis_core::slice::PORTS;
    let mut own: Vec<&Address> = addresses(view).filter(|address| address.allocation == name).collect();
    own.sort_by_key(|address| address.address);
    if own.iter().any(|address| view.unwritten.contains(&address.address)) {
        return None;
    }
    let addresses: Vec<AddressUse> = own.iter().map(|address| address_use(address, usable)).collect();
    let summary = own.iter().map(|address| address.address.to_string()).collect::<Vec<_>>().join(", ");
    let none = BTreeMap::new();
    let holders = holders.get(&name).unwrap_or(&none);
    let programmed = if object.metadata.deletion_timestamp.is_some() {
        let message = format!("being deleted: {} nodes still hold slices", holders.len());
        Wanted::bad(type_::PROGRAMMED, reason::DRAINING, &message)
    } else {
        fleet.programmed_allocation(holders, &summary)
    };
    let wanted = vec![
        verdict(type_::ACCEPTED, &outcome.accepted),
        verdict(type_::ALLOCATED, &outcome.allocated),
        programmed,
        capacity::judge(fleet.demand(&name), object.spec.capacity.target_percent, &old.conditions),
    ];
    Some(EgressAllocationStatus {
        nodes: u32::try_from(holders.len()).unwrap_or(u32::MAX),
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
