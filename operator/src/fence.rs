//! Fencing: a node that does not renew its Lease loses it, and, once its own deadline has passed, its slices. The rules
//! are those of `aegis_core::fence`; here they meet the API server.

mod leases;

pub use leases::Leases;

use crate::error::{CallError, call};
use crate::events::{Notice, Publisher};
use crate::gate::Gate;
use crate::metrics::{Metrics, Step as Failed};
use crate::object::Target;
use crate::server::Health;
use crate::watch::Snapshot;
use crate::world::World;
use aegis_core::fence::{self, Sighting, Step, TAKEN, bearers, burdens, lease_name};
use aegis_core::model::Seconds;
use aegis_crds::EgressAddress;
use futures::{StreamExt, stream};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams, ObjectMeta, PostParams};
use kube::core::DeserializeGuard;
use kube::{Client, Resource};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Writes at a time.
const PARALLEL: usize = 8;
/// What failed is tried again after this.
const AGAIN: Duration = Duration::from_secs(2);
/// Addresses in one answer of the API server.
const PAGE: u32 = 100;

/// Takes Leases over and gives them back.
pub struct Fencer {
    client: Client,
    api: Api<Lease>,
    /// The Leases as they are seen.
    pub leases: Leases,
    gate: Arc<Gate>,
    publisher: Publisher,
    metrics: Metrics,
    health: Arc<Health>,
}

/// What to write about the Lease of one node.
struct Task {
    node: String,
    step: Step,
    seen: Sighting,
    /// Shortest deadline that counts, in seconds.
    after: Seconds,
}

/// What came of it.
enum Done {
    /// The Lease has been confirmed.
    Sure,
    /// Another step was taken, or somebody else wrote first.
    Past,
    /// It has to be tried again.
    Failed,
}

impl Fencer {
    /// Writes with this client, in this namespace.
    pub fn new(
        client: &Client,
        namespace: &str,
        leases: Leases,
        gate: Arc<Gate>,
        publisher: Publisher,
        metrics: Metrics,
        health: Arc<Health>,
    ) -> Fencer {
        let api = Api::namespaced(client.clone(), namespace);
        Fencer { client: client.clone(), api, leases, gate, publisher, metrics, health }
    }

    /// Does what is due about the Leases, and tells the world who holds them. Returns when to look again at the latest.
    ///
    /// `world` must have been read before this is called: what is taken from a node whose Lease is confirmed here is
    /// then refused by the API server if somebody has given the Lease back since.
    pub async fn settle(&self, world: &mut World, snapshot: &Snapshot) -> Option<Duration> {
        let addresses = world.inputs.addresses.iter().chain(&world.frozen);
        if self.leases.is_empty() && addresses.into_iter().all(|it| it.fence.is_none()) {
            return None;
        }
        let now = self.gate.now();
        let names: BTreeMap<String, String> =
            world.inputs.nodes.iter().map(|node| (node.name.clone(), lease_name(&node.name))).collect();
        let sightings = self.leases.sightings(names.values().map(String::as_str), now);
        let (tasks, wait) = {
            let mut burdens = burdens(&world.inputs);
            for node in world.frozen.iter().flat_map(bearers) {
                burdens.entry(node).or_default();
            }
            let (mut tasks, mut wait) = (Vec::new(), None);
            for (node, name) in &names {
                let burden = burdens.get(node.as_str()).copied();
                let step = sightings.step(name, burden, now);
                match (step, sightings.get(name)) {
                    (Step::Wait(left), _) => wait = sooner(wait, left),
                    (_, Some(seen)) => tasks.push(Task {
                        node: node.clone(),
                        step,
                        seen,
                        after: burden.flatten().unwrap_or_default(),
                    }),
                    (_, None) => {}
                }
            }
            (tasks, wait)
        };
        let (sure, failed) = self.run(tasks, &names, world, snapshot).await;
        // As they are after what was done.
        let sightings = self.leases.sightings(names.values().map(String::as_str), now);
        let mut counts = [("own", 0), ("taken", 0), ("free", 0)];
        for node in &mut world.inputs.nodes {
            let Some(name) = names.get(&node.name) else { continue };
            node.lease = sightings.lease(name, sure.contains(&node.name), now);
            let state = match node.lease {
                aegis_core::model::Lease::Own => 0,
                aegis_core::model::Lease::Taken { .. } => 1,
                aegis_core::model::Lease::Free => 2,
            };
            counts[state].1 += 1;
        }
        self.metrics.node_leases(counts);
        if failed { sooner(wait, Some(AGAIN)) } else { wait }
    }

    /// Runs the tasks: the nodes whose Lease was confirmed, and whether some task has to be tried again.
    async fn run(
        &self,
        tasks: Vec<Task>,
        names: &BTreeMap<String, String>,
        world: &World,
        snapshot: &Snapshot,
    ) -> (BTreeSet<String>, bool) {
        let (mut sure, mut failed) = (BTreeSet::new(), false);
        let held = match tasks.iter().any(|task| task.step == Step::Release) {
            // Asked for after the Leases were looked at, see `Step::Confirm`.
            true => self.bearers().await,
            false => None,
        };
        let writes: Vec<_> = tasks
            .iter()
            .filter_map(|task| {
                let name = names.get(&task.node)?;
                let may = task.step != Step::Release
                    || held.as_ref().is_some_and(|held| !held.contains(&task.node));
                failed |= !may;
                may.then(|| self.perform(task, name, world, snapshot))
            })
            .collect();
        let mut writes = stream::iter(writes).buffer_unordered(PARALLEL);
        while let Some((node, done)) = writes.next().await {
            self.health.turn();
            match done {
                Done::Sure => drop(sure.insert(node.to_owned())),
                Done::Past => {}
                Done::Failed => failed = true,
            }
        }
        (sure, failed)
    }

    async fn perform<'a>(
        &self,
        task: &'a Task,
        name: &str,
        world: &World,
        snapshot: &Snapshot,
    ) -> (&'a str, Done) {
        let node = task.node.as_str();
        let Some(lease) = self.leases.get(name, task.seen) else { return (node, Done::Failed) };
        let known = find(snapshot, node);
        let written = match lease {
            Some(mut lease) => {
                lease.spec = Some(spec(task, lease.spec.unwrap_or_default(), Timestamp::now()));
                self.gate.write(self.api.replace(name, &PostParams::default(), &lease)).await
            }
            None => {
                let lease = missing(task, name, known, Timestamp::now());
                self.gate.write(self.api.create(&PostParams::default(), &lease)).await
            }
        };
        let lease = match written {
            Ok(lease) => lease,
            Err(error) => return (node, self.failed(node, &error)),
        };
        if task.step == Step::Confirm {
            self.leases.confirmed(task.seen, lease);
            return (node, Done::Sure);
        }
        self.leases.wrote(lease);
        let notice = notice(task, name, world);
        tracing::info!(node, lease = name, "{}", notice.note);
        if let Some(known) = known {
            self.publisher.publish(&notice, &Target::of::<Node>(known.meta()).reference()).await;
        }
        (node, Done::Past)
    }

    fn failed(&self, node: &str, error: &CallError) -> Done {
        if error.is_conflict() || error.is_gone() {
            tracing::debug!(node, "somebody else wrote the Lease first");
            self.metrics.conflict();
            return Done::Past;
        }
        if !matches!(error, CallError::NotLeader) {
            tracing::warn!(node, error = %error, "could not write the Lease");
            self.metrics.error(Failed::Lease);
        }
        Done::Failed
    }

    /// Nodes that hold slices of addresses with a fence by what the API server itself says; `None` if it does not say all
    /// of it.
    async fn bearers(&self) -> Option<BTreeSet<String>> {
        let api: Api<DeserializeGuard<EgressAddress>> = Api::all(self.client.clone());
        let mut held = BTreeSet::new();
        // Without a version each is answered by a majority of etcd, and all pages are of one moment.
        let mut page = ListParams::default().limit(PAGE);
        loop {
            let list = match call(api.list(&page)).await {
                Ok(list) => list,
                Err(error) => {
                    tracing::warn!(error = %error, "cannot ask which slices nodes hold");
                    return None;
                }
            };
            self.health.turn();
            for object in list.items {
                let object = object.0.ok()?;
                held.extend(bearers(&crate::world::address(&object).ok()?).map(str::to_owned));
            }
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Some(held),
            }
        }
    }
}

fn sooner(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    [one, other].into_iter().flatten().min()
}

fn find<'a>(snapshot: &'a Snapshot, node: &str) -> Option<&'a crate::watch::Guarded<Node>> {
    snapshot.nodes.iter().find(|object| object.meta().name.as_deref() == Some(node))
}

/// The Lease's next contents.
fn spec(task: &Task, before: LeaseSpec, now: Timestamp) -> LeaseSpec {
    let now = Some(MicroTime(now));
    let transitions = before.lease_transitions.unwrap_or_default().saturating_add(1);
    match task.step {
        Step::TakeOver => LeaseSpec {
            holder_identity: Some(TAKEN.to_owned()),
            lease_duration_seconds: i32::try_from(task.after).ok().filter(|after| *after > 0),
            acquire_time: now.clone(),
            renew_time: now,
            lease_transitions: Some(transitions),
            ..before
        },
        Step::Release => LeaseSpec {
            holder_identity: None,
            renew_time: now,
            lease_transitions: Some(transitions),
            ..before
        },
        Step::Confirm | Step::Wait(_) => LeaseSpec { renew_time: now, ..before },
    }
}

/// A Lease that did not exist. It goes with its Node.
fn missing(task: &Task, name: &str, node: Option<&crate::watch::Guarded<Node>>, now: Timestamp) -> Lease {
    let owner = node.and_then(|node| {
        Some(OwnerReference {
            api_version: Node::api_version(&()).into_owned(),
            kind: Node::kind(&()).into_owned(),
            name: task.node.clone(),
            uid: node.meta().uid.clone()?,
            ..OwnerReference::default()
        })
    });
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some([(fence::LABEL.0.to_owned(), fence::LABEL.1.to_owned())].into()),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(spec(task, LeaseSpec::default(), now)),
    }
}

/// What to tell about a Lease that was taken over, or given back.
fn notice(task: &Task, name: &str, world: &World) -> Notice {
    if task.step == Step::Release {
        let note = format!(
            "holds nothing of addresses with a fence any more: its Lease {name} was given back to it"
        );
        return Notice::normal("NodeUnfenced", note);
    }
    let held = world.inputs.addresses.iter();
    let held = held.filter(|address| bearers(address).any(|node| node == task.node)).count();
    Notice::warning(
        "NodeFenced",
        format!(
            "has not renewed its Lease {name} for {} s, so it was taken over: the node sends nothing more from {held} {} with a fence, and in {:.0} s the slices that it holds there begin to rest, for others to get them. It gets the Lease back when it holds none of them any more",
            task.after,
            if held == 1 { "address" } else { "addresses" },
            fence::wait(task.after).as_secs_f64().ceil(),
        ),
    )
}
