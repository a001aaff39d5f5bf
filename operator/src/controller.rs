//! The planning loop: wait for a change -> snapshot -> translate -> plan -> audit -> apply -> hand over to statuses.

use crate::apply::{Applied, Applier, PARALLEL, target};
use crate::error::CallError;
use crate::events::{Notice, Publisher};
use crate::finalizer::{self, FinalizerChange};
use crate::gate::Gate;
use crate::memory::Memory;
use crate::metrics::{Metrics, Step};
use crate::server::Health;
use crate::status::View;
use crate::watch::{Caches, Snapshot};
use crate::world::{self, World};
use aegis_core::audit::audit;
use aegis_core::diff::{Change, diff};
use aegis_core::model::{Address, Seconds};
use aegis_core::plan::{Plan, plan};
use futures::{StreamExt, stream};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::block_in_place;

/// Changes that come together are planned together.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// Where planning takes long, as long is waited before the next plan, but never longer than this.
const PAUSE_CAP: Duration = Duration::from_secs(1);
/// Plans are made this often even if nothing changes.
const IDLE: Duration = Duration::from_secs(30);
/// Failed writes are tried again after this, doubling up to [`RETRY_CAP`].
const RETRY: Duration = Duration::from_millis(250);
/// See [`RETRY`].
const RETRY_CAP: Duration = Duration::from_secs(5);
/// How long the watch may take to deliver what was written.
const CATCH_UP: Duration = Duration::from_secs(5);

/// The planning loop and what it works with.
pub struct Controller {
    /// Access to the objects.
    pub client: Client,
    /// What stands.
    pub caches: Caches,
    /// The right to write.
    pub gate: Arc<Gate>,
    /// Writes plans.
    pub applier: Applier,
    /// For Events.
    pub publisher: Publisher,
    /// For the counters.
    pub metrics: Metrics,
    /// For the probes.
    pub health: Arc<Health>,
    /// Where statuses hear of plans.
    pub views: watch::Sender<Arc<View>>,
    /// How long slices rest.
    pub quarantine: Seconds,
    /// Addresses as last seen.
    pub memory: Memory,
    /// What is told once, not with every turn.
    pub told: Told,
    /// How long the last plan took.
    pub thought: Duration,
    /// How long to wait after the next failure.
    pub retry: Duration,
}

/// What is told once, not with every turn.
#[derive(Default)]
pub struct Told {
    vanished: BTreeSet<Ipv4Addr>,
    violations: Vec<String>,
}

impl Controller {
    /// Runs until `stop` resolves. A turn that has begun is ended first, unless it takes too long.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        loop {
            let next = self.turn().await.min(IDLE);
            let pause = self.thought.clamp(DEBOUNCE, PAUSE_CAP);
            self.health.turn();
            tokio::select! {
                () = &mut stop => return,
                () = self.caches.dirty.notified() => {}
                () = tokio::time::sleep(next) => {}
            }
            tokio::select! {
                () = &mut stop => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// One turn; returns how long to wait for the next one at most.
    async fn turn(&mut self) -> Duration {
        let snapshot = self.caches.snapshot();
        if !self.gate.is_open() {
            self.memory.clear();
            self.told = Told::default();
            self.metrics.objects(&snapshot, &BTreeMap::new());
            return IDLE;
        }
        let started = Instant::now();
        let now = Timestamp::now().as_second();
        let world = self.see(&snapshot, now).await;
        // Thousands of nodes take long enough for others to miss the thread, the renewal of the lease above all.
        let (plan, verdict) = block_in_place(|| {
            let plan = plan(&world.inputs);
            let verdict = audit(&world.inputs, &plan);
            (plan, verdict)
        });
        self.thought = started.elapsed();
        self.metrics.planned(self.thought);
        self.count(&snapshot, &world, &plan);
        if let Err(violations) = verdict {
            self.refuse(violations.iter().map(ToString::to_string).collect()).await;
            return IDLE;
        }
        self.told.violations.clear();

        let finalizers = finalizer::changes(&snapshot, &world, &plan);
        let unprotected = self.protect(&finalizers).await;
        let mut changes = diff(&world.observed, &plan);
        changes.retain(|change| !matches!(change, Change::Create(address) if unprotected.covers(address)));
        report(&changes);
        let Applied { pending, unwritten, mut failed } = self.applier.apply(changes, &snapshot).await;
        failed |= !unprotected.is_empty();
        let unwritten: BTreeSet<Ipv4Addr> = unprotected.addresses(&plan).chain(unwritten).collect();
        plan.addresses
            .iter()
            .filter(|it| !unwritten.contains(&it.address))
            .for_each(|it| self.memory.wrote(it));
        let wake = plan.wake.map(|wake| Duration::from_secs(u64::try_from(wake - now).unwrap_or(0).max(1)));
        self.views.send_replace(Arc::new(View { world, plan, unwritten }));
        failed |= !self.release(&finalizers).await;
        if !self.caches.caught_up(&pending, CATCH_UP).await {
            tracing::warn!("the watch has not delivered what was written");
        }
        self.retry = if failed { (self.retry * 2).clamp(RETRY, RETRY_CAP) } else { Duration::ZERO };
        if failed { self.retry } else { wake.unwrap_or(IDLE) }
    }

    /// Translates what stands, with what vanished.
    async fn see(&mut self, snapshot: &Snapshot, now: Seconds) -> World {
        let world = block_in_place(|| world::translate(snapshot, &[], now, self.quarantine));
        let standing: BTreeMap<_, _> =
            world.observed.iter().chain(&world.frozen).map(|it| (it.address, it.clone())).collect();
        let mut lost = self.memory.observe(&standing, now);
        lost.retain(|address| !world.unreadable.contains(&address.address));
        self.alarm(&lost).await;
        if lost.is_empty() { world } else { world::translate(snapshot, &lost, now, self.quarantine) }
    }

    /// Says loudly that addresses vanished.
    async fn alarm(&mut self, lost: &[Address]) {
        let new: Vec<&Address> =
            lost.iter().filter(|address| !self.told.vanished.contains(&address.address)).collect();
        self.told.vanished = lost.iter().map(|address| address.address).collect();
        if new.is_empty() {
            return;
        }
        self.metrics.vanished(new.len());
        for address in &new {
            tracing::error!(
                address = %address.address,
                allocation = %format_args!("{}/{}", address.allocation.account, address.allocation.name),
                "somebody deleted an EgressAddress that nodes send from; it is written again as it was"
            );
        }
        let names: Vec<String> = new.iter().take(10).map(|address| address.address.to_string()).collect();
        let note = format!(
            "{} EgressAddress objects that nodes send from were deleted ({}); they are written again as they were. Never delete them, nor their CRD: delete the EgressAllocation",
            new.len(),
            names.join(", ")
        );
        self.publisher.publish_own(&Notice::warning("AddressesVanished", note)).await;
    }

    /// A plan that breaks an invariant is not applied. That is a mistake in the program, or objects that a stranger
    /// wrote.
    async fn refuse(&mut self, violations: Vec<String>) {
        self.metrics.refused();
        if self.told.violations == violations {
            return;
        }
        for violation in &violations {
            tracing::error!(violation, "the plan breaks an invariant, nothing is applied");
        }
        let note = format!("the plan breaks an invariant, nothing is applied: {}", violations.join("; "));
        self.publisher.publish_own(&Notice::warning("PlanRefused", note)).await;
        self.told.violations = violations;
    }

    /// Puts finalizers on, and returns the objects that could not be given theirs.
    async fn protect(&self, finalizers: &[FinalizerChange]) -> Unprotected {
        let adds = finalizers.iter().filter(|change| change.adds);
        let writes: Vec<_> = adds.map(|change| self.write_finalizer(change)).collect();
        let mut writes = stream::iter(writes).buffer_unordered(PARALLEL);
        let mut unprotected = Unprotected::default();
        while let Some((change, written)) = writes.next().await {
            if let Err(error) = written {
                self.finalizer_failed(change, &error);
                unprotected.0.insert((change.target.namespace.clone(), change.target.name.clone()));
            }
        }
        unprotected
    }

    async fn write_finalizer<'a>(
        &self,
        change: &'a FinalizerChange,
    ) -> (&'a FinalizerChange, Result<(), CallError>) {
        (change, finalizer::write(&self.client, &self.gate, change).await)
    }

    /// Takes finalizers away. False if some could not be.
    async fn release(&self, finalizers: &[FinalizerChange]) -> bool {
        let mut done = true;
        for change in finalizers.iter().filter(|change| !change.adds) {
            if let Err(error) = finalizer::write(&self.client, &self.gate, change).await {
                self.finalizer_failed(change, &error);
                done = false;
                continue;
            }
            tracing::info!(object = %change.target, "no address is held any more, finalizer removed");
            let notice = Notice::normal("Released", "no address is held any more");
            self.publisher.publish(&notice, &change.target.reference()).await;
        }
        done
    }

    fn finalizer_failed(&self, change: &FinalizerChange, error: &CallError) {
        if error.is_conflict() || error.is_gone() {
            return self.metrics.conflict();
        }
        if !matches!(error, CallError::NotLeader) {
            tracing::warn!(object = %change.target, error = %error, "could not write the finalizer");
            self.metrics.error(Step::Finalizer);
        }
    }

    fn count(&self, snapshot: &Snapshot, world: &World, plan: &Plan) {
        let mut problems: BTreeMap<String, i64> = BTreeMap::new();
        for problem in &world.problems {
            *problems.entry(problem.target.resource.kind.clone()).or_default() += 1;
        }
        self.metrics.objects(snapshot, &problems);
        let usable: BTreeMap<_, u32> =
            world.inputs.allocations.iter().map(|it| (&it.name, it.slices.len())).collect();
        let addresses = plan.addresses.iter().chain(&world.frozen);
        self.metrics
            .slices(addresses.map(|it| (it, usable.get(&it.allocation).copied().unwrap_or_default())));
    }
}

/// Objects without the finalizer that they need, by namespace and name.
#[derive(Default)]
struct Unprotected(BTreeSet<(Option<String>, String)>);

impl Unprotected {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn covers(&self, address: &Address) -> bool {
        let allocation = &address.allocation;
        self.0.contains(&(None, address.prefix.clone()))
            || self.0.contains(&(Some(allocation.account.clone()), allocation.name.clone()))
    }

    fn addresses<'a>(&'a self, plan: &'a Plan) -> impl Iterator<Item = Ipv4Addr> + 'a {
        plan.addresses.iter().filter(|address| self.covers(address)).map(|address| address.address)
    }
}

fn report(changes: &[Change]) {
    for change in changes {
        let (what, epoch) = match change {
            Change::Create(address) => ("create", address.epoch),
            Change::Replace(address) => ("replace", address.epoch),
            Change::Delete(_) => ("delete", 0),
        };
        tracing::info!(address = %target(change), epoch, what, "writing an address");
    }
}
