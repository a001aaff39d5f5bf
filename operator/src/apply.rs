//! Writes a plan: each `EgressAddress` by compare-and-swap.

use crate::error::CallError;
use crate::gate::Gate;
use crate::metrics::{Metrics, Step};
use crate::object::version;
use crate::server::Health;
use crate::watch::{Pending, Snapshot, by_name};
use crate::world::spec;
use aegis_core::diff::Change;
use aegis_core::egress::Egress;
use aegis_core::model::Address;
use aegis_crds::EgressAddress;
use futures::{StreamExt, stream};
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use kube::{Client, ResourceExt};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Writes at a time. They are of different objects, so their order does not matter.
pub const PARALLEL: usize = 8;
/// Label that names the account, so that people can select the addresses of one.
const ACCOUNT_LABEL: &str = "aegis.dev/account";

/// Writes plans.
pub struct Applier {
    /// Access to the objects.
    pub addresses: Api<EgressAddress>,
    /// The right to write.
    pub gate: Arc<Gate>,
    /// For the counters.
    pub metrics: Metrics,
    /// Told of every write: thousands of them on a slow API server are no reason to be taken for stuck.
    pub health: Arc<Health>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Applied {
    /// What the local copies have to show before the next plan.
    pub pending: Vec<Pending>,
    /// Addresses that were not written, as somebody else wrote first.
    pub stale: BTreeSet<Egress>,
    /// Addresses whose write failed and has to be tried again, though nothing changed.
    pub failed: BTreeMap<Egress, String>,
}

impl Applier {
    /// Writes with this client.
    pub fn new(client: &Client, gate: Arc<Gate>, metrics: Metrics, health: Arc<Health>) -> Applier {
        Applier { addresses: Api::all(client.clone()), gate, metrics, health }
    }

    /// Makes the changes. `snapshot` is what they were planned from.
    pub async fn apply(&self, changes: Vec<Change>, snapshot: &Snapshot) -> Applied {
        let stored = by_name(&snapshot.addresses);
        let mut applied = Applied::default();
        let mut writes = stream::iter(changes)
            .map(async |change| (target(&change), self.write(change, &stored).await))
            .buffer_unordered(PARALLEL);
        while let Some(written) = writes.next().await {
            self.health.turn();
            match written {
                (address, Ok(pending)) => {
                    if matches!(pending, Pending::Stale(..)) {
                        applied.stale.insert(address);
                    }
                    applied.pending.push(pending);
                }
                (address, Err(error)) => {
                    applied.failed.insert(address, error);
                }
            }
        }
        applied
    }

    async fn write(
        &self,
        change: Change,
        stored: &HashMap<String, &EgressAddress>,
    ) -> Result<Pending, String> {
        let address = target(&change);
        let name = address.object_name();
        let before = stored.get(&name).copied();
        let result = match (change, before) {
            (Change::Create(address), _) => self.create(&address).await,
            (Change::Replace(address), Some(before)) => self.replace(&address, before).await,
            (Change::Delete(_), Some(before)) => self.delete(before).await,
            // The plan was made from this very snapshot.
            (Change::Replace(_) | Change::Delete(_), None) => return Err("not in the local copy".to_owned()),
        };
        let error = match result {
            Ok(pending) => return Ok(pending),
            Err(error) => error,
        };
        if error.is_conflict() || (error.is_gone() && before.is_some()) {
            tracing::info!(%address, "somebody else wrote first, planning again");
            self.metrics.conflict();
            return Ok(Pending::Stale(name, before.and_then(ResourceExt::resource_version)));
        }
        if !matches!(error, CallError::NotLeader) {
            tracing::warn!(%address, error = %error, "could not write the address");
            self.metrics.error(Step::Address);
        }
        Err(error.words())
    }

    async fn create(&self, address: &Address) -> Result<Pending, CallError> {
        let mut object = EgressAddress::new(&address.address.object_name(), spec(address));
        label(&mut object, address);
        let made = self.gate.write(self.addresses.create(&params(), &object)).await?;
        Ok(Pending::Written(version(&made.metadata)))
    }

    async fn replace(&self, address: &Address, before: &EgressAddress) -> Result<Pending, CallError> {
        let mut object = EgressAddress { spec: spec(address), ..before.clone() };
        label(&mut object, address);
        let made = self.gate.write(self.addresses.replace(&before.name_any(), &params(), &object)).await?;
        Ok(Pending::Written(version(&made.metadata)))
    }

    async fn delete(&self, before: &EgressAddress) -> Result<Pending, CallError> {
        let uid = before.uid().unwrap_or_default();
        let preconditions =
            Preconditions { uid: Some(uid.clone()), resource_version: before.resource_version() };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        self.gate.write(self.addresses.delete(&before.name_any(), &params)).await?;
        Ok(Pending::Deleted(before.name_any(), uid))
    }
}

/// Address that a change concerns.
pub fn target(change: &Change) -> Egress {
    match change {
        Change::Create(address) | Change::Replace(address) => address.address,
        Change::Delete(address) => *address,
    }
}

fn label(object: &mut EgressAddress, address: &Address) {
    object.labels_mut().insert(ACCOUNT_LABEL.to_owned(), address.allocation.account.clone());
}

fn params() -> PostParams {
    PostParams { field_manager: Some(crate::FIELD_MANAGER.to_owned()), ..PostParams::default() }
}
