//! Status of an `EgressAllocation`.

use super::conditions::{Clock, Wanted};
use super::fleet::{Fleet, Share};
use super::{View, capacity, limits, verdict};
use crate::metrics::SliceCounts;
use aegis_core::model::{Address, AllocationName};
use aegis_core::plan::SiteOutcome;
use aegis_crds::{AddressUse, EgressAllocation, EgressAllocationStatus, SiteStatus, reason, type_};
use kube::ResourceExt;
use std::collections::HashMap;

/// Most addresses that the status lists, so that they fit into its line: far more than one can ask for, but those that
/// drain are on top.
const LISTED: usize = 60;

/// Steps in which a site's fill is told, in percent.
const FILL_STEP: u32 = 10;

/// What the allocation's status should be; `None` if the plan does not know it, or is about to be written.
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
    let sites = crate::world::sites(&object.spec);
    let names: Vec<&str> = sites.keys().map(String::as_str).collect();
    // Without sites, or with one only, there is nothing to tell apart.
    let site = |node: &str| {
        let site = names.get(fleet.site(&sites, node)?).copied();
        site.filter(|_| names.len() > 1)
    };
    let demand = fleet.demand(&name);
    let more = capacity::more(share.addresses.iter().map(|it| it.address.kind()));
    let target = object.spec.capacity.target_percent;
    let capacity = capacity::judge(demand, site, target, more, &old.conditions);
    let limits = limits::judge(fleet.limited(&name));
    let accepted = verdict(type_::ACCEPTED, &outcome.accepted);
    let delegated = verdict(type_::DELEGATED, &outcome.delegated);
    let unwritten: Vec<_> =
        share.addresses.iter().filter_map(|it| view.unwritten.get_key_value(&it.address)).collect();
    if !unwritten.is_empty() {
        // What fails for once is written in a moment. What goes on failing is told; nothing is known of the rest.
        let (address, error) = unwritten.into_iter().find_map(|(it, told)| Some((it, told.as_ref()?)))?;
        let message = format!("{address} cannot be written, it is tried again: {error}");
        let wanted = vec![
            accepted,
            delegated,
            Wanted::bad(type_::ALLOCATED, reason::NOT_WRITTEN, &message),
            Wanted::bad(type_::PROGRAMMED, reason::PENDING, "waits for its addresses to be written"),
            capacity,
            limits,
        ];
        return Some(EgressAllocationStatus {
            conditions: clock.settle(&old.conditions, wanted),
            ..old.clone()
        });
    }
    let mut own = share.addresses.clone();
    own.sort_by_key(|address| (!address.is_held(), address.address));
    own.truncate(LISTED);
    own.sort_by_key(|address| address.address);
    let mut addresses: Vec<AddressUse> = own.iter().map(|address| address_use(address, usable)).collect();
    // It had these, and may get them again: they are the evidence that they are its.
    let had = old.addresses.iter().filter(|it| {
        let address = it.address.parse().ok();
        address.is_some_and(|address| view.world.inputs.withheld.contains_key(&address))
            && own.iter().all(|own| Some(own.address) != address)
    });
    let had = had.map(|it| AddressUse { slices_held: 0, slices_free: 0, ..it.clone() });
    addresses.extend(had.take(LISTED.saturating_sub(own.len())));
    let summary = addresses.iter().map(|it| it.address.as_str()).collect::<Vec<_>>().join(", ");
    let deleting = object.metadata.deletion_timestamp.is_some();
    let drain = fleet.drain(&own, deleting);
    let programmed = if deleting {
        let message = drain.clone().unwrap_or_else(|| "being deleted, nothing is held any more".to_owned());
        Wanted::bad(type_::PROGRAMMED, reason::DRAINING, &message)
    } else {
        fleet.programmed_allocation(share, &summary)
    };
    let mut allocated = verdict(type_::ALLOCATED, &outcome.allocated);
    if let Some(drain) = drain {
        allocated.message += &format!("; {drain}");
    }
    Some(EgressAllocationStatus {
        nodes: u32::try_from(share.holders.len()).unwrap_or(u32::MAX),
        conditions: clock
            .settle(&old.conditions, vec![accepted, delegated, allocated, programmed, capacity, limits]),
        sites: outcome
            .sites
            .iter()
            .enumerate()
            .map(|(at, site)| {
                let nodes = demand.iter().filter(|(node, _)| fleet.site(&sites, node) == Some(at));
                let fill = nodes.map(|(_, demand)| demand.fill_percent).max().unwrap_or(0);
                site_status(site, fill, old.sites.iter().find(|old| old.name == site.name))
            })
            .collect(),
        addresses,
        summary,
    })
}

fn site_status(site: &SiteOutcome, fill: u32, old: Option<&SiteStatus>) -> SiteStatus {
    // In steps, and not to and fro between two of them: each is a write.
    let told = old.map(|old| old.fill_percent).filter(|told| told.abs_diff(fill) < FILL_STEP);
    SiteStatus {
        name: site.name.clone(),
        weight: site.weight,
        nodes: site.nodes,
        nodes_ready: site.usable,
        nodes_holding: site.holders,
        slices: site.slices,
        slices_held: site.held,
        fill_percent: told.unwrap_or(fill / FILL_STEP * FILL_STEP),
    }
}

fn address_use(address: &Address, usable: u32) -> AddressUse {
    let counts = SliceCounts::of(address);
    // Of a /64 all count, whatever the ports are.
    let usable = if address.address.has_ports() { usable } else { aegis_core::slice::COUNT };
    AddressUse {
        address: address.address.to_string(),
        prefix: address.prefix.clone(),
        slices_held: counts.held + counts.draining,
        slices_free: counts.free(usable),
    }
}
