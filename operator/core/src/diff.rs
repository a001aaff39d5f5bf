//! The difference between what stands and what is planned.

use crate::egress::Egress;
use crate::model::Address;
use crate::plan::Plan;
use std::collections::BTreeMap;

/// One write to an `EgressAddress` object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Make it.
    Create(Address),
    /// Write it over the observed one, which must still be at the observed resource version.
    Replace(Address),
    /// Remove it.
    Delete(Egress),
}

/// The writes that turn `observed` into the plan: deletions first, then the others, each sorted by address.
pub fn diff(observed: &[Address], plan: &Plan) -> Vec<Change> {
    let observed: BTreeMap<Egress, &Address> =
        observed.iter().map(|address| (address.address, address)).collect();
    let planned: BTreeMap<Egress, &Address> =
        plan.addresses.iter().map(|address| (address.address, address)).collect();
    let deletions =
        observed.keys().filter(|address| !planned.contains_key(address)).copied().map(Change::Delete);
    let writes = planned.iter().filter_map(|(key, address)| match observed.get(key) {
        None => Some(Change::Create((*address).clone())),
        Some(before) if before != address => Some(Change::Replace((*address).clone())),
        Some(_) => None,
    });
    deletions.chain(writes).collect()
}
