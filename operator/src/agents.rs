//! On which nodes an agent works, by its pod: an agent that was killed and does not come back, or was taken off a node, leaves a
//! report that says "ready" for ever.

use crate::watch::{CappedBackoff, WATCH_SECONDS};
pub use aegis_world::agents::AgentPod;
use aegis_world::agents::by_node;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::{self, watcher};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// The agents' pods.
#[derive(Clone)]
pub struct Agents {
    pods: Store<Pod>,
}

impl Agents {
    /// Watches the pods with these labels in a namespace; `dirty` is told when a node gains or loses its agent, or is about to.
    pub fn start(
        client: &Client,
        namespace: &str,
        labels: &str,
        dirty: Arc<Notify>,
        tasks: &mut JoinSet<&'static str>,
    ) -> Agents {
        let (reader, writer) = reflector::store();
        let pods = watcher(
            Api::<Pod>::namespaced(client.clone(), namespace),
            watcher::Config::default().labels(labels).timeout(WATCH_SECONDS),
        )
        .backoff(CappedBackoff::default())
        .modify(strip)
        .reflect(writer);
        let agents = Agents { pods: reader };
        let looking = agents.clone();
        tasks.spawn(async move {
            let mut pods = std::pin::pin!(pods);
            let mut before = BTreeMap::new();
            while let Some(event) = pods.next().await {
                if let Err(error) = event {
                    tracing::warn!(kind = "Pod", error = %error, "watch failed, trying again");
                    continue;
                }
                let now = looking.nodes();
                if now != before {
                    before = now;
                    dirty.notify_one();
                }
            }
            "Pod"
        });
        agents
    }

    /// Waits until they have been listed once.
    pub async fn complete(&self) -> Result<(), reflector::store::WriterDropped> {
        self.pods.wait_until_ready().await
    }

    /// Nodes with an agent, and how it is: the better one of two, as while one replaces the other.
    pub fn nodes(&self) -> BTreeMap<String, AgentPod> {
        by_node(self.pods.state().iter().map(|pod| &**pod))
    }
}

/// Keeps what [`aegis_world::agents::works_on`] reads.
fn strip(pod: &mut Pod) {
    (pod.metadata.managed_fields, pod.metadata.annotations) = (None, None);
    if let Some(spec) = &mut pod.spec {
        let node_name = spec.node_name.take();
        *spec = Default::default();
        spec.node_name = node_name;
    }
    if let Some(status) = &mut pod.status {
        let conditions = status.conditions.take();
        *status = Default::default();
        status.conditions = conditions;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_world::agents::works_on;
    use serde_json::{Value, json};

    fn pod(metadata: Value, ready: &str) -> Pod {
        let condition = json!({"type": "Ready", "status": ready});
        serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
            "spec": {"nodeName": "n1", "containers": [{"name": "agent", "image": "x"}]},
            "status": {"phase": "Running", "conditions": [condition]},
        }))
        .unwrap()
    }

    #[test]
    fn an_agent_works_where_its_pod_is_ready_or_comes_to_its_end() {
        let leaves = json!({"name": "a", "deletionTimestamp": "2026-01-01T00:00:00Z"});
        let cases = [
            (pod(json!({"name": "a"}), "True"), Some(("n1", AgentPod::Ready))),
            (pod(json!({"name": "a"}), "False"), None),
            (pod(leaves, "True"), Some(("n1", AgentPod::Ending))),
            (Pod::default(), None),
        ];
        for (mut pod, node) in cases {
            assert_eq!(works_on(&pod), node, "{pod:?}");
            strip(&mut pod);
            assert_eq!(works_on(&pod), node, "what is kept says the same: {pod:?}");
        }
    }
}
