//! Finalizers: an object whose addresses nodes may send from stays until they are given back.

use crate::error::CallError;
use crate::gate::Gate;
use crate::object::Target;
use crate::watch::{Guarded, Snapshot};
use crate::world::World;
use aegis_core::model::{Address, AllocationName};
use aegis_core::plan::Plan;
use aegis_crds::{AegisPrefix, EgressAllocation, FINALIZER};
use kube::api::{Patch, PatchParams};
use kube::{Client, Resource, ResourceExt};
use serde_json::json;
use std::collections::BTreeSet;

/// A finalizer to put on an object, or to take away.
#[derive(Clone, Debug, PartialEq)]
pub struct FinalizerChange {
    /// The object.
    pub target: Target,
    /// Its resource version: nobody must have changed the list in between.
    pub version: Option<String>,
    /// All finalizers that it shall have.
    pub finalizers: Vec<String>,
    /// Whether ours is among them.
    pub adds: bool,
}

/// Compares what is there with what the plan needs. Additions must be written before the plan, removals may follow
/// when everything else is done.
pub fn changes(snapshot: &Snapshot, world: &World, plan: &Plan) -> Vec<FinalizerChange> {
    let existing: Vec<&Address> =
        world.inputs.addresses.iter().chain(&world.frozen).chain(&plan.addresses).collect();
    let prefixes: BTreeSet<&str> = existing.iter().map(|address| address.prefix.as_str()).collect();
    let allocations: BTreeSet<&AllocationName> = existing.iter().map(|address| &address.allocation).collect();
    let prefixes = snapshot.prefixes.iter().filter_map(|object| {
        let needed = prefixes.contains(object.name_any().as_str());
        change::<AegisPrefix>(object, needed)
    });
    let allocations = snapshot.allocations.iter().filter_map(|object| {
        let name =
            AllocationName { account: object.namespace().unwrap_or_default(), name: object.name_any() };
        change::<EgressAllocation>(object, allocations.contains(&name))
    });
    prefixes.chain(allocations).collect()
}

fn change<K: Resource<DynamicType = ()> + Clone>(
    object: &Guarded<K>,
    needed: bool,
) -> Option<FinalizerChange> {
    let meta = object.meta();
    let present = object.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
    // The API server refuses new finalizers on an object that is being deleted.
    if present == needed || (needed && meta.deletion_timestamp.is_some()) {
        return None;
    }
    let others = object.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER).cloned();
    Some(FinalizerChange {
        target: Target::of::<K>(meta),
        version: meta.resource_version.clone(),
        finalizers: others.chain(needed.then(|| FINALIZER.to_owned())).collect(),
        adds: needed,
    })
}

/// Writes one.
pub async fn write(client: &Client, gate: &Gate, change: &FinalizerChange) -> Result<(), CallError> {
    let patch = json!({"metadata": {"resourceVersion": change.version, "finalizers": change.finalizers}});
    let api = change.target.api(client);
    let params = PatchParams { field_manager: Some(crate::FIELD_MANAGER.into()), ..PatchParams::default() };
    match gate.write(api.patch_metadata(&change.target.name, &params, &Patch::Merge(patch))).await {
        Ok(_) => Ok(()),
        // The last finalizer is gone, and the object with it.
        Err(error) if error.is_gone() && !change.adds => Ok(()),
        Err(error) => Err(error),
    }
}
