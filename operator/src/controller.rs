//! The planning loop: wait for a change -> snapshot -> translate -> plan -> audit -> apply -> hand over to statuses.

use crate::apply::{Applied, Applier, PARALLEL, target};
use crate::backoff::Backoff;
use crate::error::CallError;
use crate::events::{Notice, Publisher};
use crate::evidence::Evidence;
use crate::fence::Fencer;
use crate::finalizer::{self, FinalizerChange};
use crate::gate::Gate;
use crate::memory::Memory;
use crate::metrics::{Metrics, Step};
use crate::presence;
use crate::server::Health;
use crate::status::View;
use crate::watch::{Caches, Pending, Snapshot};
use crate::world::{self, Presence, World};
use aegis_core::audit::audit;
use aegis_core::diff::{Change, diff};
use aegis_core::egress::Egress;
use aegis_core::model::{Address, Seconds};
use aegis_core::plan::{Plan, plan};
use aegis_core::rests::Rests;
use futures::{StreamExt, stream};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use std::collections::{BTreeMap, BTreeSet};
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
/// Questions that the API server did not answer are asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(2);
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
    /// Takes the Leases of nodes over.
    pub fencer: Fencer,
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
    /// What this leader knows beside the objects.
    pub mind: Mind,
    /// How long the last plan took.
    pub thought: Duration,
}

/// What a leader knows beside the objects. It is gone with the leadership.
#[derive(Default)]
pub struct Mind {
    /// Addresses as last seen.
    memory: Memory,
    /// How long slices have rested.
    rests: Rests,
    /// What nodes report that no object says.
    evidence: Evidence,
    /// Writes that failed.
    backoff: Backoff,
    /// Has planned before.
    begun: bool,
    told: Told,
}

/// What is told once, not with every turn.
#[derive(Default)]
struct Told {
    vanished: BTreeSet<Egress>,
    withheld: BTreeSet<Egress>,
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
            self.mind = Mind::default();
            self.metrics.objects(&snapshot, &BTreeMap::new());
            self.metrics.follow();
            return IDLE;
        }
        if !std::mem::replace(&mut self.mind.begun, true) {
            self.fencer.leases.begin();
        }
        let started = Instant::now();
        let now = Timestamp::now().as_second();
        let (world, due) = self.see(&snapshot, now).await;
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
        self.mind.told.violations.clear();

        let mut waiting = BTreeSet::new();
        let finalizers = finalizer::changes(&snapshot, &world, &plan);
        let unprotected = self.protect(&finalizers, &mut waiting).await;
        let mut changes = diff(&world.observed, &plan);
        changes.retain(|change| !matches!(change, Change::Create(address) if unprotected.covers(address)));
        let (pending, mut unwritten) = self.apply(changes, &snapshot, &mut waiting).await;
        let planned: BTreeSet<Egress> = plan.addresses.iter().map(|it| it.address).collect();
        let gone = world.observed.iter().filter(|it| !planned.contains(&it.address));
        for address in gone.filter(|it| !unwritten.contains_key(&it.address)) {
            self.mind.evidence.released(address.address, address.epoch);
        }
        unwritten.extend(unprotected.addresses(&plan, &self.mind.backoff));
        plan.addresses
            .iter()
            .filter(|it| !unwritten.contains_key(&it.address))
            .for_each(|it| self.mind.memory.wrote(it));
        let wake = plan.wake.map(|wake| Duration::from_secs(u64::try_from(wake - now).unwrap_or(0).max(1)));
        self.views.send_replace(Arc::new(View { world, plan, unwritten }));
        self.release(&finalizers, &mut waiting).await;
        if !self.caches.caught_up(&pending, CATCH_UP).await {
            tracing::warn!("the watch has not delivered what was written");
        }
        self.mind.backoff.keep(&waiting);
        let again = self.mind.backoff.next(self.gate.now());
        [wake, again, due].into_iter().flatten().min().unwrap_or(IDLE)
    }

    /// Translates what stands, with what vanished, what nodes report, and what the API server says of nodes that seem
    /// to be gone, and does what is due about Leases. Also when to look again at the latest.
    async fn see(&mut self, snapshot: &Snapshot, now: Seconds) -> (World, Option<Duration>) {
        let mut world = block_in_place(|| world::translate(snapshot, &[], now, self.quarantine));
        let standing: BTreeMap<_, _> =
            world.observed.iter().chain(&world.frozen).map(|it| (it.address, it.clone())).collect();
        let mut lost = self.mind.memory.observe(&standing, now);
        lost.retain(|address| !world.unreadable.contains(&address.address));
        self.alarm(&lost).await;
        world.restore(&lost);
        let clock = self.gate.now();
        let mut withheld = self.mind.evidence.observe(&world, clock);
        world.inputs.withheld.extend(withheld.clone());
        let presences = presence::of(&self.client, world.absent(), &self.health).await;
        if !presences.is_empty() {
            world.confirm(&presences, snapshot);
            withheld = self.mind.evidence.observe(&world, clock);
            world.inputs.withheld.extend(withheld.clone());
        }
        world.inputs.epochs = self.mind.evidence.epochs();
        self.accuse(&withheld).await;
        world.inputs.unrested = self.mind.rests.observe(&world.inputs.addresses, clock, self.quarantine);
        let due = self.fencer.settle(&mut world, snapshot).await;
        let unknown = presences.values().any(|it| matches!(it, Presence::Unknown));
        (world, [due, unknown.then_some(ASK_AGAIN)].into_iter().flatten().min())
    }

    /// Writes the changes that need not wait, and returns what was written and, with what to tell, what was not.
    async fn apply(
        &mut self,
        mut changes: Vec<Change>,
        snapshot: &Snapshot,
        waiting: &mut BTreeSet<String>,
    ) -> (Vec<Pending>, BTreeMap<Egress, Option<String>>) {
        let now = self.gate.now();
        let mut unwritten = BTreeSet::new();
        changes.retain(|change| {
            let waits = self.mind.backoff.waits(&target(change).to_string(), now);
            if waits {
                unwritten.insert(target(change));
                waiting.insert(target(change).to_string());
            }
            !waits
        });
        report(&changes);
        let Applied { pending, stale, failed } = self.applier.apply(changes, snapshot).await;
        let now = self.gate.now();
        for (address, error) in failed {
            unwritten.insert(address);
            waiting.insert(address.to_string());
            self.mind.backoff.failed(address.to_string(), error, now);
        }
        unwritten.extend(stale);
        let told = |it: Egress| (it, self.mind.backoff.told(&it.to_string()));
        (pending, unwritten.into_iter().map(told).collect())
    }

    /// Says loudly that nodes send from addresses which no object, or only an older one, gives them.
    async fn accuse(&mut self, withheld: &BTreeMap<Egress, Option<String>>) {
        let told: BTreeMap<Egress, &String> =
            withheld.iter().filter_map(|(address, told)| Some((*address, told.as_ref()?))).collect();
        self.metrics.withheld(told.len());
        let new: Vec<&String> =
            told.iter().filter(|(it, _)| !self.mind.told.withheld.contains(it)).map(|(_, it)| *it).collect();
        self.mind.told.withheld = told.keys().copied().collect();
        for message in &new {
            tracing::error!("{message}");
        }
        if let Some(first) = new.first() {
            let note = format!("{} addresses are withheld. {first}", new.len());
            self.publisher.publish_own(&Notice::warning("AddressesWithheld", note)).await;
        }
    }

    /// Says loudly that addresses vanished.
    async fn alarm(&mut self, lost: &[Address]) {
        let told = &mut self.mind.told.vanished;
        let new: Vec<&Address> = lost.iter().filter(|address| !told.contains(&address.address)).collect();
        *told = lost.iter().map(|address| address.address).collect();
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
        if self.mind.told.violations == violations {
            return;
        }
        for violation in &violations {
            tracing::error!(violation, "the plan breaks an invariant, nothing is applied");
        }
        let note = format!("the plan breaks an invariant, nothing is applied: {}", violations.join("; "));
        self.publisher.publish_own(&Notice::warning("PlanRefused", note)).await;
        self.mind.told.violations = violations;
    }

    /// Puts finalizers on, and returns the objects that have not been given theirs.
    async fn protect(
        &mut self,
        finalizers: &[FinalizerChange],
        waiting: &mut BTreeSet<String>,
    ) -> Unprotected {
        let adds: Vec<&FinalizerChange> = finalizers.iter().filter(|change| change.adds).collect();
        let missing = self.write_finalizers(&adds, waiting).await;
        let name = |it: &FinalizerChange| (it.target.namespace.clone(), it.target.name.clone());
        Unprotected(missing.into_iter().map(|it| (name(it), it.target.uid.clone())).collect())
    }

    /// Takes finalizers away.
    async fn release(&mut self, finalizers: &[FinalizerChange], waiting: &mut BTreeSet<String>) {
        let removals: Vec<&FinalizerChange> = finalizers.iter().filter(|change| !change.adds).collect();
        self.write_finalizers(&removals, waiting).await;
    }

    /// Writes those that need not wait, and returns those that were not written.
    async fn write_finalizers<'a>(
        &mut self,
        changes: &[&'a FinalizerChange],
        waiting: &mut BTreeSet<String>,
    ) -> Vec<&'a FinalizerChange> {
        let now = self.gate.now();
        let (mut missing, due): (Vec<&FinalizerChange>, Vec<&FinalizerChange>) =
            changes.iter().copied().partition(|it| self.mind.backoff.waits(&it.target.uid, now));
        let mut failed = Vec::new();
        {
            let writes: Vec<_> = due.into_iter().map(|change| self.write_finalizer(change)).collect();
            let mut writes = stream::iter(writes).buffer_unordered(PARALLEL);
            while let Some((change, written)) = writes.next().await {
                self.health.turn();
                failed.extend(written.err().map(|error| (change, error)));
            }
        }
        for (change, error) in failed {
            self.finalizer_failed(change, &error);
            self.mind.backoff.failed(change.target.uid.clone(), error.words(), self.gate.now());
            missing.push(change);
        }
        waiting.extend(missing.iter().map(|it| it.target.uid.clone()));
        missing
    }

    async fn write_finalizer<'a>(
        &self,
        change: &'a FinalizerChange,
    ) -> (&'a FinalizerChange, Result<(), CallError>) {
        let written = finalizer::write(&self.client, &self.gate, change).await;
        if written.is_ok() && !change.adds {
            tracing::info!(object = %change.target, "no address is held any more, finalizer removed");
            let notice = Notice::normal("Released", "no address is held any more");
            self.publisher.publish(&notice, &change.target.reference()).await;
        }
        (change, written)
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
        self.metrics.prefixes(&plan.prefixes);
        let usable: BTreeMap<_, u32> =
            world.inputs.allocations.iter().map(|it| (&it.name, it.slices.len())).collect();
        let addresses = plan.addresses.iter().chain(&world.frozen);
        self.metrics.slices(addresses.map(|it| match it.address.has_ports() {
            true => (it, usable.get(&it.allocation).copied().unwrap_or_default()),
            false => (it, aegis_core::slice::COUNT),
        }));
    }
}

/// Objects without the finalizer that they need: namespace and name, and uid.
struct Unprotected(BTreeMap<(Option<String>, String), String>);

impl Unprotected {
    /// Uid of the object that stands against writing the address.
    fn against(&self, address: &Address) -> Option<&String> {
        let allocation = &address.allocation;
        let prefix = self.0.get(&(None, address.prefix.clone()));
        prefix.or_else(|| self.0.get(&(Some(allocation.account.clone()), allocation.name.clone())))
    }

    fn covers(&self, address: &Address) -> bool {
        self.against(address).is_some()
    }

    /// Addresses that are not written for it, with what to tell.
    fn addresses(&self, plan: &Plan, backoff: &Backoff) -> Vec<(Egress, Option<String>)> {
        let told = |uid: &String| backoff.told(uid).map(|error| format!("finalizer: {error}"));
        let addresses = plan.addresses.iter();
        addresses.filter_map(|it| Some((it.address, told(self.against(it)?)))).collect()
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
