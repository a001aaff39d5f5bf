//! On which nodes an agent works, by its pod: an agent that was killed and does not come back, or was taken off a node, leaves a
//! report that says "ready" for ever.

use k8s_openapi::api::core::v1::Pod;
use std::collections::BTreeMap;

/// What an agent's pod says of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AgentPod {
    /// There is none, or it is not ready.
    Missing,
    /// It is there and being deleted.
    Ending,
    /// It is ready.
    Ready,
}

/// The node on which an agent's pod is, and how, unless it is as good as none.
pub fn works_on(pod: &Pod) -> Option<(&str, AgentPod)> {
    let node = pod.spec.as_ref()?.node_name.as_deref()?;
    if pod.metadata.deletion_timestamp.is_some() {
        return Some((node, AgentPod::Ending));
    }
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().any(|it| it.type_ == "Ready" && it.status == "True");
    ready.then_some((node, AgentPod::Ready))
}

/// Nodes with an agent, and how it is: the better one of two, as while one replaces the other.
pub fn by_node<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> BTreeMap<String, AgentPod> {
    let mut nodes = BTreeMap::new();
    for (node, state) in pods.into_iter().filter_map(works_on) {
        let known = nodes.entry(node.to_owned()).or_insert(state);
        *known = state.max(*known);
    }
    nodes
}
