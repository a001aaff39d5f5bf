//! Writes statuses and publishes Events, beside the planning loop, which must not wait for it.

use crate::error::CallError;
use crate::events::{Notice, Publisher};
use crate::gate::Gate;
use crate::metrics::{Metrics, Step};
use crate::object::Target;
use crate::status::{self, StatusChange, View};
use crate::watch::{Caches, Snapshot};
use crate::world::Problem;
use aegis_crds::{EgressNode, reason};
use futures::{StreamExt, stream};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Client, Resource};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::block_in_place;
use tokio::time::Instant;

/// Writes at a time.
const PARALLEL: usize = 4;
/// Counts of one object are written no more often than this; a condition that turns is written at once.
const SETTLE: Duration = Duration::from_secs(1);
/// Failed writes are tried again after this.
const RETRY: Duration = Duration::from_secs(3);

/// Keeps statuses current.
pub struct Statuses {
    /// Access to the objects.
    pub client: Client,
    /// What stands.
    pub caches: Caches,
    /// The right to write.
    pub gate: Arc<Gate>,
    /// For the counters.
    pub metrics: Metrics,
    /// For Events.
    pub publisher: Publisher,
    /// What was written, by uid.
    pub written: HashMap<String, Written>,
    /// Problems that have been told: uid and message.
    pub told: HashSet<(String, String)>,
}

/// The last write of an object's status.
pub struct Written {
    at: Instant,
    /// Resource version that it gave; the local copy is behind while it shows a lower one.
    version: u64,
    /// Refused by the API server: pointless to repeat. Without times, which differ with every try.
    refused: Option<Value>,
}

/// A status without the times of its conditions.
fn timeless(status: &Value) -> Value {
    let mut status = status.clone();
    let conditions = status.get_mut("conditions").and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten().filter_map(Value::as_object_mut) {
        condition.remove("lastTransitionTime");
    }
    status
}

impl Statuses {
    /// Runs until the planning loop is gone.
    pub async fn run(mut self, mut views: watch::Receiver<Arc<View>>) {
        let mut again: Option<Instant> = None;
        loop {
            let timer = again.unwrap_or_else(|| Instant::now() + Duration::from_secs(3_600));
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(timer) => {}
            }
            let view = views.borrow_and_update().clone();
            again = if self.gate.is_open() { self.pass(&view).await } else { None };
            if !self.gate.is_open() {
                self.written.clear();
                self.told.clear();
                self.metrics.follow();
            }
        }
    }

    /// Writes what differs; returns when to come back for what had to wait.
    async fn pass(&mut self, view: &View) -> Option<Instant> {
        let current = self.caches.snapshot();
        let mut again = None;
        let changes = block_in_place(|| status::changes(&current, view, Timestamp::now()));
        let due: Vec<StatusChange> = changes
            .into_iter()
            .filter(|change| match self.written.get(&change.target.uid) {
                Some(written) if change.version < written.version => false,
                Some(written) if written.refused.as_ref() == Some(&timeless(&change.status)) => false,
                Some(written) if !change.urgent && written.at.elapsed() < SETTLE => {
                    earliest(&mut again, written.at + SETTLE);
                    false
                }
                _ => true,
            })
            .collect();
        let writes: Vec<_> = due.iter().map(|change| self.write(change)).collect();
        let results: Vec<Result<Written, ()>> = stream::iter(writes).buffered(PARALLEL).collect().await;
        for (change, result) in due.iter().zip(results) {
            match result {
                Ok(written) => drop(self.written.insert(change.target.uid.clone(), written)),
                Err(()) => earliest(&mut again, Instant::now() + RETRY),
            }
        }
        if !self.tell(&view.world.problems).await {
            earliest(&mut again, Instant::now() + RETRY);
        }
        self.forget(&current);
        let low = status::capacity_low(&current).into_iter();
        self.metrics.capacity_low(low.map(|((namespace, name), low)| (namespace, name, low)));
        again
    }

    async fn write(&self, change: &StatusChange) -> Result<Written, ()> {
        let target = &change.target;
        let patch = json!({
            "apiVersion": target.resource.api_version,
            "kind": target.resource.kind,
            "metadata": {"name": target.name, "namespace": target.namespace, "uid": target.uid},
            "status": change.status,
        });
        let params = PatchParams::apply(crate::FIELD_MANAGER).force();
        let api = target.api(&self.client);
        let at = Instant::now();
        match self.gate.write(api.patch_status(&target.name, &params, &Patch::Apply(patch))).await {
            Ok(object) => {
                for notice in &change.notices {
                    self.publisher.publish(notice, &target.reference()).await;
                }
                Ok(Written { at, version: crate::object::version(&object.metadata), refused: None })
            }
            Err(error) => self.failed(target, &error, at, &change.status),
        }
    }

    /// Sorts a failure: what is worth another try, and what is not.
    fn failed(&self, target: &Target, error: &CallError, at: Instant, status: &Value) -> Result<Written, ()> {
        match error {
            CallError::NotLeader => return Err(()),
            // Deleted, or deleted and made again: the next view knows. (An apply of an old uid is a conflict.)
            _ if error.is_gone() || error.is_conflict() => self.metrics.conflict(),
            _ => {
                tracing::warn!(object = %target, error = %error, "could not write the status");
                self.metrics.error(Step::Status);
            }
        }
        let pointless = error.is_refusal();
        if pointless { Ok(Written { at, version: 0, refused: Some(timeless(status)) }) } else { Err(()) }
    }

    /// Tells each new problem once: log, Event, condition. False if some of it has to be tried again.
    async fn tell(&mut self, problems: &[Problem]) -> bool {
        let mut done = true;
        let key = |problem: &Problem| (problem.target.uid.clone(), problem.message.clone());
        let present: HashSet<_> = problems.iter().map(key).collect();
        self.told.retain(|told| present.contains(told));
        for problem in problems {
            let target = &problem.target;
            if self.told.contains(&key(problem)) {
                continue;
            }
            tracing::warn!(object = %target, problem = problem.message, "invalid object");
            // The status of an EgressNode is its agent's.
            if target.resource.kind != EgressNode::kind(&()) {
                let patch = status::invalid(problem.generation, &problem.message, Timestamp::now());
                let params = PatchParams {
                    field_manager: Some(crate::FIELD_MANAGER.into()),
                    ..PatchParams::default()
                };
                let api = target.api(&self.client);
                let written =
                    self.gate.write(api.patch_status(&target.name, &params, &Patch::Merge(&patch))).await;
                if let Err(error) = written
                    && self.failed(target, &error, Instant::now(), &patch).is_err()
                {
                    done = false;
                    continue;
                }
            }
            let notice = Notice::warning(reason::INVALID, problem.message.clone());
            self.publisher.publish(&notice, &target.reference()).await;
            self.told.insert(key(problem));
        }
        done
    }

    /// Forgets objects that are gone.
    fn forget(&mut self, current: &Snapshot) {
        if self.written.len() > 2 * (64 + current.len()) {
            let uids = current.uids();
            self.written.retain(|uid, _| uids.contains(uid));
        }
    }
}

fn earliest(again: &mut Option<Instant>, at: Instant) {
    *again = Some(again.map_or(at, |known| known.min(at)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_status_is_known_again_at_another_time() {
        let status = |time, message| json!({"nodes": 3, "conditions": [{"message": message, "lastTransitionTime": time}]});
        assert_eq!(
            timeless(&status("2026-01-01T00:00:00Z", "a")),
            timeless(&status("2026-01-01T00:00:09Z", "a"))
        );
        assert_ne!(
            timeless(&status("2026-01-01T00:00:00Z", "a")),
            timeless(&status("2026-01-01T00:00:00Z", "b"))
        );
    }
}
