//! What the agent does when it is told to end. Where its DaemonSet still wants it (it is replaced, or restarted), or there is no
//! DaemonSet any more, it ends at once: what is pinned goes on. Where the DaemonSet wants no agent on this node any more,
//! nobody would ever say that the node's slices are empty: the agent stays until they are.

mod selection;

pub use selection::selects;

use crate::announce::holders;
use crate::controller::Signals;
use crate::metrics::Metrics;
use crate::server::STUCK;
use aegis_core::egress::Egress;
use aegis_core::model::Address;
use futures::{Stream, StreamExt};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Client;
use kube::api::{Api, ListParams};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// How long the API server may take to say whether the agent is still wanted; without an answer it ends.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between two looks at whether the agent may end.
const LOOK: Duration = Duration::from_millis(500);
/// Time between two questions whether the agent is wanted again.
pub const ASK: Duration = Duration::from_secs(10);

/// Where the agent stands in the cluster.
#[derive(Clone)]
pub struct Place {
    /// Access to the API server.
    pub client: Client,
    /// Namespace of the release.
    pub namespace: String,
    /// Name of the DaemonSet; empty if there is none.
    pub daemon_set: String,
    /// Name of the node.
    pub node: String,
    /// UID of the agent's own pod; empty if it has none.
    pub pod_uid: String,
}

/// Returns when the agent is to end: at once, or when its node's slices are empty. `told` gives a value whenever the process
/// is told to end; a second time always counts. Whether the agent is wanted again is asked every `ask`.
pub async fn end(
    mut told: impl Stream<Item = ()> + Unpin,
    place: &Place,
    signals: &Signals,
    metrics: &Metrics,
    ask: Duration,
) {
    tokio::select! {
        _ = told.next() => {}
        () = place.was_told_before(ask) => tracing::info!("the agent's pod was deleted before the agent ran"),
    }
    match place.is_left().await {
        Ok(true) => {}
        Ok(false) => return,
        Err(error) => {
            tracing::warn!(error, "cannot ask whether the agent is to leave this node; it ends");
            return;
        }
    }
    tracing::info!("the agent is taken off this node: it ends when the node's slices are empty");
    signals.set(|signals| &signals.leaving);
    let mut asked = Instant::now();
    loop {
        tokio::select! {
            _ = told.next() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        if signals.left.load(Ordering::Acquire) {
            tracing::info!("the agent has left this node");
            return;
        }
        // The kubelet no longer looks whether it lives.
        if metrics.lock().alive.elapsed() > STUCK {
            tracing::error!("the event loop hangs");
            return;
        }
        if asked.elapsed() < ask {
            continue;
        }
        asked = Instant::now();
        // While nobody answers, there is nothing new.
        if place.is_left().await == Ok(false) {
            tracing::info!("the agent is wanted on this node again, and is to be replaced");
            return;
        }
    }
}

impl Place {
    /// Returns if the agent's pod was deleted before the agent could hear of it: its container has just been started again, and the
    /// first process of a container does not get a signal for which it has no handler yet. The kubelet sends it once, and then
    /// waits for as long as an agent may take to leave. What comes later the handler hears.
    async fn was_told_before(&self, ask: Duration) {
        let own = Api::<Pod>::namespaced(self.client.clone(), &self.namespace);
        let on_node = ListParams::default().fields(&format!("spec.nodeName={}", self.node));
        if !self.pod_uid.is_empty() {
            loop {
                match tokio::time::timeout(PATIENCE, own.list(&on_node)).await {
                    Ok(Ok(pods)) => {
                        let mut pods = pods.items.into_iter().map(|pod| pod.metadata);
                        let own = pods.find(|pod| pod.uid.as_ref() == Some(&self.pod_uid));
                        if own.is_some_and(|pod| pod.deletion_timestamp.is_some()) {
                            return;
                        }
                        break;
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "cannot ask for the agent's own pod"),
                    Err(_) => tracing::debug!("no answer in time about the agent's own pod"),
                }
                tokio::time::sleep(ask).await;
            }
        }
        std::future::pending().await
    }

    /// Whether the DaemonSet stands and wants no pod on this node.
    async fn is_left(&self) -> Result<bool, String> {
        if self.daemon_set.is_empty() {
            return Ok(false);
        }
        match tokio::time::timeout(PATIENCE, self.ask()).await {
            // The right to ask goes with the DaemonSet, and may go before it.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => Ok(false),
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err("no answer in time".to_owned()),
        }
    }

    /// Asks for both anew: copies may be behind what the DaemonSet controller has seen.
    async fn ask(&self) -> Result<bool, kube::Error> {
        let sets: Api<DaemonSet> = Api::namespaced(self.client.clone(), &self.namespace);
        let set = sets.get_opt(&self.daemon_set).await?;
        let Some(set) = set.filter(|set| set.metadata.deletion_timestamp.is_none()) else { return Ok(false) };
        let named = ListParams::default().fields(&format!("metadata.name={}", self.node));
        let nodes = Api::<Node>::all(self.client.clone()).list(&named).await?;
        let template = set.spec.and_then(|spec| spec.template.spec);
        Ok(template
            .zip(nodes.items.into_iter().next())
            .is_some_and(|(template, node)| !selects(&template, &node)))
    }
}

/// Whether nothing depends on the agent of a node any more: no address names the node as one that sends, and of those for which
/// it answers on the link nobody else could.
pub fn is_empty<'a>(
    node: &str,
    addresses: impl IntoIterator<Item = &'a Address>,
    answering: &BTreeSet<Egress>,
) -> bool {
    addresses.into_iter().all(|address| {
        let holders = holders(address);
        !holders.contains(node) && (holders.is_empty() || !answering.contains(&address.address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_core::model::{AllocationName, Holding, State};
    use axum::extract::Request;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use axum::{Json, Router};
    use serde_json::{Value, json};
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

    /// UID of the pod that is deleted.
    const DELETED: &str = "uid-deleted";

    /// What the API server says of the DaemonSet: another answer to each question, and then always the last one. First it has no
    /// answer about pods.
    fn answers(sets: Vec<Result<Value, StatusCode>>) -> Client {
        let asked_for_pods = Arc::new(AtomicUsize::new(0));
        let asked = Arc::new(AtomicUsize::new(0));
        let server = Router::new().fallback(move |request: Request| {
            let set = match request.uri().path() {
                "/apis/apps/v1/namespaces/aegis-system/daemonsets/agents" => {
                    let number = asked.fetch_add(1, Ordering::AcqRel).min(sets.len() - 1);
                    Some(sets[number].clone())
                }
                "/api/v1/namespaces/aegis-system/pods" => {
                    let first = asked_for_pods.fetch_add(1, Ordering::AcqRel) == 0;
                    Some(if first { Err(StatusCode::SERVICE_UNAVAILABLE) } else { Ok(pods()) })
                }
                _ => None,
            };
            async move {
                let node = json!({"metadata": {"name": "n1", "labels": {"zone": "a"}}});
                match set {
                    Some(Ok(set)) => Json(set).into_response(),
                    Some(Err(code)) => {
                        let reason = if code == StatusCode::NOT_FOUND { "NotFound" } else { "" };
                        let status = json!({"kind": "Status", "code": code.as_u16(), "reason": reason});
                        (code, Json(status)).into_response()
                    }
                    None => {
                        Json(json!({"kind": "NodeList", "metadata": {}, "items": [node]})).into_response()
                    }
                }
            }
        });
        Client::new(server, "default")
    }

    /// An agent that is being replaced, and the one that replaces it.
    fn pods() -> Value {
        let old =
            json!({"metadata": {"name": "a", "uid": DELETED, "deletionTimestamp": "2026-01-01T00:00:00Z"}});
        let new = json!({"metadata": {"name": "b", "uid": "uid-new"}});
        json!({"kind": "PodList", "metadata": {}, "items": [new, old]})
    }

    fn set(zone: &str) -> Value {
        let template = json!({"metadata": {}, "spec": {"containers": [], "nodeSelector": {"zone": zone}}});
        json!({"metadata": {"name": "agents"}, "spec": {"selector": {}, "template": template}})
    }

    /// An agent that has been told to end, and can be once more.
    fn told(
        sets: Vec<Result<Value, StatusCode>>,
    ) -> (Arc<Signals>, UnboundedSender<()>, tokio::task::JoinHandle<()>) {
        let (signals, again, task) = untold(sets, "");
        again.send(()).unwrap();
        (signals, again, task)
    }

    /// An agent that can be told to end.
    fn untold(
        sets: Vec<Result<Value, StatusCode>>,
        pod_uid: &str,
    ) -> (Arc<Signals>, UnboundedSender<()>, tokio::task::JoinHandle<()>) {
        let place = Place {
            client: answers(sets),
            namespace: "aegis-system".to_owned(),
            daemon_set: "agents".to_owned(),
            node: "n1".to_owned(),
            pod_uid: pod_uid.to_owned(),
        };
        let (again, mut told) = unbounded_channel();
        let signals = Arc::new(Signals::default());
        let seen = Arc::clone(&signals);
        let task = tokio::spawn(async move {
            let told = futures::stream::poll_fn(move |context| told.poll_recv(context));
            end(told, &place, &seen, &Metrics::default(), Duration::ZERO).await;
        });
        (signals, again, task)
    }

    #[track_caller]
    fn ends(task: tokio::task::JoinHandle<()>) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller().line();
        async move {
            tokio::time::timeout(Duration::from_secs(30), task)
                .await
                .unwrap_or_else(|_| panic!("no end, line {caller}"))
                .expect("no panic");
        }
    }

    #[tokio::test]
    async fn an_agent_ends_at_once_unless_its_daemon_set_stands_and_wants_none_on_the_node() {
        let mut going = set("b");
        going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        let cases = [
            Ok(set("a")),
            Ok(going),
            Err(StatusCode::NOT_FOUND),
            Err(StatusCode::FORBIDDEN),
            Err(StatusCode::SERVICE_UNAVAILABLE),
        ];
        for case in cases {
            let (signals, _again, task) = told(vec![case]);
            ends(task).await;
            assert!(!signals.leaving.load(Ordering::Acquire));
        }
    }

    #[tokio::test]
    async fn an_agent_that_leaves_stays_until_nothing_depends_on_it_or_it_is_wanted_or_told_again() {
        // An API server that is away changes nothing.
        let away = vec![Ok(set("b")), Err(StatusCode::SERVICE_UNAVAILABLE)];
        let (signals, _again, task) = told(away.clone());
        tokio::time::sleep(3 * LOOK).await;
        assert!(signals.leaving.load(Ordering::Acquire) && !task.is_finished());
        signals.left.store(true, Ordering::Release);
        ends(task).await;

        let (signals, again, task) = told(away);
        tokio::time::sleep(LOOK).await;
        assert!(signals.leaving.load(Ordering::Acquire) && !task.is_finished());
        again.send(()).unwrap();
        ends(task).await;

        let ends_of_it = [Ok(set("a")), Err(StatusCode::NOT_FOUND), Err(StatusCode::UNAUTHORIZED)];
        for end in ends_of_it {
            let (signals, _again, task) = told(vec![Ok(set("b")), Ok(set("b")), end]);
            ends(task).await;
            assert!(signals.leaving.load(Ordering::Acquire) && !signals.left.load(Ordering::Acquire));
        }
    }

    #[tokio::test]
    async fn an_agent_whose_pod_was_deleted_before_it_ran_ends_and_others_go_on() {
        let (_, _again, task) = untold(vec![Ok(set("a"))], DELETED);
        ends(task).await;
        for uid in ["uid-new", "uid-of-nobody", ""] {
            let (_, again, task) = untold(vec![Ok(set("a"))], uid);
            tokio::time::sleep(LOOK).await;
            assert!(!task.is_finished(), "{uid:?}");
            again.send(()).unwrap();
            ends(task).await;
        }
    }

    #[test]
    fn what_rests_needs_no_agent_and_what_it_sends_or_answers_for_does() {
        const A: Egress = Egress::V4(std::net::Ipv4Addr::new(203, 0, 113, 1));
        let address = |holdings: &[(&str, State)]| {
            let holding = |(node, state): &(&str, State)| Holding {
                first: 4,
                last: 4,
                node: (*node).to_owned(),
                epoch: 1,
                state: *state,
            };
            [Address {
                address: A,
                prefix: "p".into(),
                allocation: AllocationName { account: "shop".into(), name: "main".into() },
                epoch: 1,
                holdings: holdings.iter().map(holding).collect(),
                fence: None,
            }]
        };
        let rests = State::Quarantined { until: 9 };
        let (nothing, own) = (BTreeSet::new(), BTreeSet::from([A]));
        assert!(is_empty("n1", &[], &own));
        assert!(is_empty("n1", &address(&[("n1", rests), ("n2", State::Held)]), &nothing));
        assert!(!is_empty("n1", &address(&[("n2", State::Held), ("n1", State::Draining)]), &nothing));
        assert!(!is_empty("n1", &address(&[("n1", State::Held)]), &nothing));
        assert!(!is_empty("n1", &address(&[("n1", rests), ("n2", State::Held)]), &own));
        assert!(is_empty("n1", &address(&[("n1", rests)]), &own), "nobody else would");
    }
}
