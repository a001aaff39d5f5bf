//! All objects of one moment.

use crate::agents::AgentPod;
use crate::report::Report;
use aegis_crds::{
    AegisPrefix, EgressAddress, EgressAllocation, EgressApplication, EgressPolicy, ZoneBinding,
};
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::core::DeserializeGuard;
use kube::{Resource, ResourceExt};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// An object, or why it could not be read.
pub type Guarded<K> = Arc<DeserializeGuard<K>>;

/// All objects of one moment.
#[derive(Clone, Default)]
pub struct Snapshot {
    /// Prefixes.
    pub prefixes: Vec<Guarded<AegisPrefix>>,
    /// Allocations.
    pub allocations: Vec<Guarded<EgressAllocation>>,
    /// Bindings.
    pub bindings: Vec<Guarded<ZoneBinding>>,
    /// Policies.
    pub policies: Vec<Guarded<EgressPolicy>>,
    /// Applications that policies name.
    pub applications: Vec<Guarded<EgressApplication>>,
    /// Addresses.
    pub addresses: Vec<Guarded<EgressAddress>>,
    /// What agents report.
    pub egress_nodes: Vec<Guarded<Report>>,
    /// Nodes.
    pub nodes: Vec<Guarded<Node>>,
    /// Namespaces, for their labels.
    pub namespaces: Vec<Guarded<Namespace>>,
    /// Ranges of Services.
    pub services: Vec<Guarded<ServiceCIDR>>,
    /// The agents' pods by the names of their nodes; `None` if nobody looks.
    pub agents: Option<BTreeMap<String, AgentPod>>,
}

impl Snapshot {
    /// The agent of a node, as far as its pod tells.
    pub fn agent(&self, node: &str) -> AgentPod {
        match &self.agents {
            Some(agents) => agents.get(node).copied().unwrap_or(AgentPod::Missing),
            None => AgentPod::Ready,
        }
    }

    /// Number of objects whose status the operator writes.
    #[allow(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        let written = self.prefixes.len() + self.allocations.len() + self.addresses.len();
        written + self.bindings.len() + self.policies.len() + self.applications.len()
    }

    /// Their uids.
    pub fn uids(&self) -> HashSet<String> {
        fn of<K: Resource>(objects: &[Guarded<K>]) -> impl Iterator<Item = String> {
            objects.iter().filter_map(|object| object.meta().uid.clone())
        }
        of(&self.prefixes)
            .chain(of(&self.allocations))
            .chain(of(&self.bindings))
            .chain(of(&self.policies))
            .chain(of(&self.applications))
            .chain(of(&self.addresses))
            .collect()
    }
}

/// Readable objects by name.
pub fn by_name<K: ResourceExt>(objects: &[Guarded<K>]) -> HashMap<String, &K> {
    objects
        .iter()
        .filter_map(|object| object.0.as_ref().ok())
        .map(|object| (object.name_any(), object))
        .collect()
}
