//! What people and agents write in tests.

use super::{Cluster, eventually};
use aegis_crds::{
    AegisPrefix, AegisPrefixSpec, AllocationRef, Announcement, Condition, Demand, EgressAddress,
    EgressAllocation, EgressNode, EgressNodeSpec, EgressNodeStatus, HoldingState, Limited, PrefixSource,
    ProgrammedAddress, ProgrammedBinding, SliceRange, ZoneBinding, type_,
};
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::DeserializeGuard;
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

/// Long enough for a busy machine; nothing waits that long when all is well.
pub const SOON: Duration = Duration::from_secs(20);

/// An agent of a node, played by the test.
#[derive(Clone)]
pub struct Agent {
    pub node: String,
    pub ready: bool,
    pub demand: Vec<Demand>,
    pub limited: Vec<Limited>,
    /// Reports draining slices as drained.
    pub drains: bool,
    /// Is being taken off its node.
    pub leaving: bool,
    pub bindings: Vec<ProgrammedBinding>,
}

impl Cluster {
    pub async fn namespace(&self, name: &str) {
        let namespace = Namespace {
            metadata: ObjectMeta { name: Some(name.into()), ..Default::default() },
            ..Default::default()
        };
        Api::all(self.client.clone()).create(&PostParams::default(), &namespace).await.expect("namespace");
    }

    pub async fn prefix(&self, name: &str, cidr: &str, account: &str) {
        let spec = AegisPrefixSpec {
            cidr: cidr.into(),
            reserved: Vec::new(),
            account: account.into(),
            source: PrefixSource::default(),
            proof: None,
            delegations: Vec::new(),
            announcement: Announcement::default(),
        };
        let prefix = AegisPrefix::new(name, spec);
        Api::all(self.client.clone()).create(&PostParams::default(), &prefix).await.expect("prefix");
    }

    /// Creates an allocation from JSON of its spec.
    pub async fn allocation(&self, account: &str, name: &str, spec: Value) {
        let object = json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressAllocation", "metadata": {"name": name}, "spec": spec,
        });
        let object: EgressAllocation = serde_json::from_value(object).expect("allocation");
        self.in_account(account).create(&PostParams::default(), &object).await.expect("allocation");
    }

    pub async fn binding(&self, account: &str, name: &str, spec: Value) {
        let object = json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "ZoneBinding", "metadata": {"name": name}, "spec": spec,
        });
        let object: ZoneBinding = serde_json::from_value(object).expect("binding");
        self.in_account(account).create(&PostParams::default(), &object).await.expect("binding");
    }

    pub fn in_account<K>(&self, account: &str) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), account)
    }

    pub fn all<K: Resource<DynamicType = ()>>(&self) -> Api<K> {
        Api::all(self.client.clone())
    }

    /// A Node with an agent that reports that it is ready.
    pub async fn node(&self, name: &str) -> Agent {
        let metadata = ObjectMeta { name: Some(name.into()), ..Default::default() };
        let node = Node { metadata, ..Default::default() };
        self.all::<Node>().create(&PostParams::default(), &node).await.expect("node");
        let report = EgressNode::new(name, EgressNodeSpec {});
        self.all::<EgressNode>().create(&PostParams::default(), &report).await.expect("report");
        let agent = Agent {
            node: name.into(),
            ready: true,
            demand: Vec::new(),
            limited: Vec::new(),
            drains: false,
            leaving: false,
            bindings: Vec::new(),
        };
        agent.report(self).await;
        agent
    }

    pub async fn nodes<const N: usize>(&self, names: [&str; N]) -> [Agent; N] {
        let mut agents = Vec::new();
        for name in names {
            agents.push(self.node(name).await);
        }
        agents.try_into().unwrap_or_else(|_| unreachable!())
    }

    /// Lets agents report until an allocation is programmed: what they say of one epoch says nothing of the next, and a plan that came
    /// before a node was known is followed by another.
    pub async fn programmed(&self, agents: &[&Agent], account: &str, name: &str) {
        let allocations: Api<EgressAllocation> = self.in_account(account);
        eventually(&format!("{account}/{name} to be programmed"), SOON, async || {
            for agent in agents {
                agent.report(self).await;
            }
            let status =
                allocations.get(name).await.map_err(|error| error.to_string())?.status.unwrap_or_default();
            let programmed = |it: &&Condition| it.type_ == type_::PROGRAMMED && it.status == "True";
            status
                .conditions
                .iter()
                .find(programmed)
                .map(drop)
                .ok_or_else(|| format!("{:?}", status.conditions))
        })
        .await;
    }

    /// Waits until `count` addresses of an allocation stand, and returns them.
    pub async fn addresses(&self, account: &str, name: &str, count: usize) -> Vec<EgressAddress> {
        let what = format!("{count} addresses of {account}/{name}");
        eventually(&what, SOON, async || {
            let found = self.addresses_now(account, name).await?;
            if found.len() == count { Ok(found) } else { Err(format!("{} stand", found.len())) }
        })
        .await
    }

    /// All addresses but those that a test broke.
    pub async fn readable_addresses(&self) -> Result<Vec<EgressAddress>, kube::Error> {
        let list = self.all::<DeserializeGuard<EgressAddress>>().list(&ListParams::default()).await?;
        Ok(list.items.into_iter().filter_map(|item| item.0.ok()).collect())
    }

    pub async fn addresses_now(&self, account: &str, name: &str) -> Result<Vec<EgressAddress>, String> {
        let mut items = self.readable_addresses().await.map_err(|error| error.to_string())?;
        items.retain(|it| {
            it.spec.allocation_ref == AllocationRef { namespace: account.into(), name: name.into() }
        });
        Ok(items)
    }

    /// Waits until the condition has this status (and the message this part), for the current generation.
    pub async fn condition<K>(
        &self,
        api: &Api<K>,
        name: &str,
        type_: &str,
        status: &str,
        part: &str,
    ) -> Condition
    where
        K: Resource + Clone + DeserializeOwned + Debug + serde::Serialize,
    {
        let what = format!("condition {type_}={status} with {part:?} on {name}");
        eventually(&what, SOON, async || {
            let object = api.get(name).await.map_err(|error| error.to_string())?;
            let generation = object.meta().generation;
            let value = serde_json::to_value(&object).map_err(|error| error.to_string())?;
            let conditions = value.pointer("/status/conditions").cloned().unwrap_or_else(|| json!([]));
            let conditions: Vec<Condition> =
                serde_json::from_value(conditions).map_err(|error| error.to_string())?;
            let found = conditions.into_iter().find(|condition| condition.type_ == type_);
            match found {
                Some(it)
                    if it.status == status
                        && it.message.contains(part)
                        && it.observed_generation == generation =>
                {
                    Ok(it)
                }
                other => Err(format!("{other:?}")),
            }
        })
        .await
    }

    /// Events about an object: reason and note.
    pub async fn events(&self, namespace: &str, name: &str) -> Vec<(String, String)> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let list = api.list(&ListParams::default()).await.expect("events").items;
        let about = list
            .into_iter()
            .filter(|event| event.regarding.as_ref().and_then(|it| it.name.as_deref()) == Some(name));
        about.map(|event| (event.reason.unwrap_or_default(), event.note.unwrap_or_default())).collect()
    }
}

impl Agent {
    /// Reports that everything which stands now is programmed.
    pub async fn report(&self, cluster: &Cluster) {
        let addresses = cluster.readable_addresses().await.expect("addresses");
        self.report_of(cluster, &addresses).await;
    }

    /// Reports that these addresses are programmed.
    pub async fn report_of(&self, cluster: &Cluster, addresses: &[EgressAddress]) {
        let addresses = addresses.iter().map(|address| {
            let draining = address.spec.holdings.iter().filter(|holding| {
                self.drains && holding.node == self.node && holding.state == HoldingState::Draining
            });
            ProgrammedAddress {
                address: address.spec.address.clone(),
                epoch: address.spec.epoch,
                fenced: address.spec.fence.is_some(),
                drained: draining.map(|it| SliceRange { first: it.first, last: it.last }).collect(),
            }
        });
        let status = EgressNodeStatus {
            tunnel_address: "192.0.2.1".into(),
            version: "test".into(),
            leaving: self.leaving,
            demand: self.demand.clone(),
            limited: self.limited.clone(),
            addresses: addresses.collect(),
            bindings: self.bindings.clone(),
            conditions: vec![Condition {
                type_: type_::READY.into(),
                status: if self.ready { "True" } else { "False" }.into(),
                reason: "Test".into(),
                message: if self.ready { "" } else { "no uplink" }.into(),
                observed_generation: None,
                last_transition_time: Time(Timestamp::UNIX_EPOCH),
            }],
            ..Default::default()
        };
        let mut status = json!(status);
        // What is left out stays as it was.
        status["leaving"] = json!(self.leaving);
        for list in ["addresses", "bindings", "demand", "limited"] {
            status[list] = status.get(list).cloned().unwrap_or_default();
        }
        let patch = Patch::Merge(json!({"status": status}));
        let api = cluster.all::<EgressNode>();
        api.patch_status(&self.node, &PatchParams::default(), &patch).await.expect("report");
    }
}

/// Slices of an address by node, for holdings in this state.
pub fn slices(address: &EgressAddress, state: HoldingState) -> BTreeMap<String, u32> {
    let mut slices = BTreeMap::new();
    for holding in address.spec.holdings.iter().filter(|holding| holding.state == state) {
        *slices.entry(holding.node.clone()).or_default() += holding.last + 1 - holding.first;
    }
    slices
}

/// Name of the first address.
pub fn first(addresses: &[EgressAddress]) -> String {
    addresses.first().map(ResourceExt::name_any).expect("an address")
}
