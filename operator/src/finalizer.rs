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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::testing::object;
    use crate::world::translate;
    use aegis_core::plan::plan;
    use serde_json::Value;

    /// A prefix, an allocation of it, and a node, so that the plan has an address; and an unused prefix.
    fn snapshot(metadata: Value) -> Snapshot {
        let spec = json!({"spec": {"cidr": "203.0.113.0/28", "account": "shop"}});
        let unused = json!({"spec": {"cidr": "198.51.100.0/28", "account": "shop"}});
        let allocation = json!({"spec": {"prefixes": ["leased"]}, "metadata": metadata});
        Snapshot {
            prefixes: vec![object(None, "leased", spec), object(None, "unused", unused)],
            allocations: vec![object(Some("shop"), "partner", allocation)],
            ..Snapshot::default()
        }
    }

    fn found(snapshot: &Snapshot) -> Vec<(String, Vec<String>)> {
        let world = translate(snapshot, &[], 0, 120);
        let changes = changes(snapshot, &world, &plan(&world.inputs));
        changes.into_iter().map(|change| (change.target.name, change.finalizers)).collect()
    }

    #[test]
    fn what_an_address_is_planned_for_is_protected_and_other_finalizers_stay() {
        let expected = [
            ("leased".to_owned(), vec![FINALIZER.into()]),
            ("partner".to_owned(), vec!["x".into(), FINALIZER.into()]),
        ];
        assert_eq!(found(&snapshot(json!({"finalizers": ["x"]}))), expected);
    }

    #[test]
    fn what_is_not_in_use_is_released() {
        let metadata = json!({"finalizers": [FINALIZER, "x"], "deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert_eq!(found(&snapshot(metadata)), [("partner".to_owned(), vec!["x".into()])]);
    }

    #[test]
    fn what_cannot_be_read_but_is_in_use_keeps_it() {
        let mut snapshot = snapshot(json!({"finalizers": [FINALIZER]}));
        let spec = json!({"spec": {
            "address": "203.0.113.2", "prefix": "leased", "epoch": 1, "holdings": [],
            "allocationRef": {"namespace": "shop", "name": "partner"},
        }});
        snapshot.addresses = vec![object(None, "203.0.113.2", spec)];
        let broken = json!({"spec": {"prefixes": 5}, "metadata": {"finalizers": [FINALIZER]}});
        snapshot.allocations = vec![object(Some("shop"), "partner", broken)];
        assert_eq!(
            found(&snapshot),
            [("leased".to_owned(), vec![FINALIZER.into()])],
            "partner is not touched"
        );
    }
}
