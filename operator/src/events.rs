//! Events on the objects that they are about.

use crate::error::CallError;
use crate::gate::Gate;
use crate::metrics::{Metrics, Step};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use std::sync::Arc;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Somebody should look at it.
    pub warning: bool,
    /// Stable word.
    pub reason: String,
    /// For people.
    pub note: String,
}

impl Notice {
    /// Somebody should look at it.
    pub fn warning(reason: &str, note: impl Into<String>) -> Notice {
        Notice { warning: true, reason: reason.to_owned(), note: note.into() }
    }

    /// All is well.
    pub fn normal(reason: &str, note: impl Into<String>) -> Notice {
        Notice { warning: false, reason: reason.to_owned(), note: note.into() }
    }
}

/// Most bytes of an Event's note.
const NOTE_LIMIT: usize = 1_000;

/// Publishes.
#[derive(Clone)]
pub struct Publisher {
    recorder: Recorder,
    gate: Arc<Gate>,
    metrics: Metrics,
    /// What Events about the operator itself are about.
    lease: ObjectReference,
}

impl Publisher {
    /// In the name of this replica.
    pub fn new(client: &Client, args: &crate::args::Args, gate: Arc<Gate>, metrics: Metrics) -> Publisher {
        let reporter =
            Reporter { controller: crate::FIELD_MANAGER.into(), instance: Some(args.identity.clone()) };
        let lease = ObjectReference {
            api_version: Some("coordination.k8s.io/v1".into()),
            kind: Some("Lease".into()),
            namespace: Some(args.namespace.clone()),
            name: Some(args.lease.clone()),
            ..ObjectReference::default()
        };
        Publisher { recorder: Recorder::new(client.clone(), reporter), gate, metrics, lease }
    }

    /// Publishes one. An Event that fails is logged and not tried again: conditions hold the state.
    pub async fn publish(&self, notice: &Notice, about: &ObjectReference) {
        let mut note = notice.note.clone();
        note.truncate(note.floor_char_boundary(NOTE_LIMIT));
        let event = Event {
            type_: if notice.warning { EventType::Warning } else { EventType::Normal },
            reason: notice.reason.clone(),
            note: Some(note),
            action: "Plan".to_owned(),
            secondary: None,
        };
        match self.gate.write(self.recorder.publish(&event, about)).await {
            Ok(()) | Err(CallError::NotLeader) => {}
            Err(error) => {
                tracing::warn!(reason = notice.reason, error = %error, "could not publish an Event");
                self.metrics.error(Step::Event);
            }
        }
    }

    /// Publishes one about the operator itself, on its Lease.
    pub async fn publish_own(&self, notice: &Notice) {
        self.publish(notice, &self.lease).await;
    }
}
