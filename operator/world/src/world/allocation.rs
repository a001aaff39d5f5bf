//! `EgressAllocation`.

use crate::object::created;
use aegis_core::egress::Egress;
use aegis_core::model::{AddressRequest, Allocation, AllocationName, Site};
use aegis_core::slice::{FIRST, LAST, PORTS, SliceSet};
use aegis_crds::{EgressAllocation, EgressAllocationSpec, Ports};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet};

/// Translates, or says what is wrong.
pub fn model(object: &EgressAllocation) -> Result<Allocation, String> {
    let spec = &object.spec;
    let per_node = &spec.ports.per_node;
    if per_node.min > per_node.max {
        return Err(format!(
            "spec.ports.perNode: min ({}) is greater than max ({})",
            per_node.min, per_node.max
        ));
    }
    let explicit = spec.addresses.explicit.iter().enumerate().map(|(index, address)| {
        address.parse::<Egress>().map_err(|_| {
            format!("spec.addresses.explicit[{index}]: {address:?} is no address and no IPv6 /64")
        })
    });
    let explicit = explicit.collect::<Result<Vec<_>, _>>()?;
    Ok(Allocation {
        name: name(object),
        created: created(&object.metadata),
        prefixes: spec.prefixes.clone(),
        request: match explicit.is_empty() {
            true => AddressRequest::Count(match (spec.addresses.ipv4, spec.addresses.ipv6) {
                (None, None) => 1,
                (ipv4, _) => ipv4.unwrap_or(0),
            }),
            false => AddressRequest::Explicit(explicit),
        },
        ipv6: spec.addresses.ipv6.unwrap_or(0),
        sites: sites(spec),
        slices: slices(&spec.ports)?,
        per_node_min: per_node.min,
        per_node_max: per_node.max,
        fence: spec.fence.after().map(i64::from),
        listed: listed(object),
        deleting: object.metadata.deletion_timestamp.is_some(),
    })
}

/// The sites of an allocation, by name.
pub fn sites(spec: &EgressAllocationSpec) -> BTreeMap<String, Site> {
    let site = |site: &aegis_crds::Site| {
        (site.name.clone(), Site { selector: site.node_selector.clone(), weight: site.weight })
    };
    spec.sites.iter().map(site).collect()
}

/// One that cannot be read but is being deleted: its addresses drain, and nothing else is asked.
pub fn deleted(meta: &ObjectMeta) -> Allocation {
    Allocation {
        name: AllocationName {
            account: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
        },
        created: created(meta),
        prefixes: Vec::new(),
        request: AddressRequest::Count(0),
        ipv6: 0,
        sites: BTreeMap::new(),
        slices: SliceSet::EMPTY,
        per_node_min: 0,
        per_node_max: 0,
        fence: None,
        listed: BTreeSet::new(),
        deleting: true,
    }
}

fn listed(object: &EgressAllocation) -> BTreeSet<Egress> {
    let addresses = object.status.iter().flat_map(|status| &status.addresses);
    addresses.filter_map(|it| it.address.parse().ok()).collect()
}

/// Namespace and name.
pub fn name(object: &EgressAllocation) -> AllocationName {
    AllocationName { account: object.namespace().unwrap_or_default(), name: object.name_any() }
}

fn slices(ports: &Ports) -> Result<SliceSet, String> {
    let first = u8::try_from(ports.first / PORTS).ok().filter(|slice| (FIRST..=LAST).contains(slice));
    let last = u8::try_from(ports.last / PORTS).ok();
    match (first, last) {
        _ if !ports.first.is_multiple_of(PORTS) || !(ports.last + 1).is_multiple_of(PORTS) => Err(format!(
            "spec.ports: {} to {} is not made of whole slices of 256 ports",
            ports.first, ports.last
        )),
        (Some(first), Some(last)) if first <= last => Ok(SliceSet::range(first, last)),
        _ => Err(format!("spec.ports: {} to {} is no range within 1024 to 65535", ports.first, ports.last)),
    }
}
