//! What the commands look at: objects of one moment, and what could not be read of them.

use aegis_core::model::Seconds;
use aegis_core::policy::{self, Applications, Binding, EgressPolicy};
use aegis_crds::{EgressPolicy as PolicyObject, UsageAlert, ZoneBinding, rules};
use aegis_world::snapshot::{Guarded, Snapshot};
use aegis_world::world::{World, translate};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{Resource, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

/// Label that says which part of Aegis a pod is.
pub const PART: &str = "app.kubernetes.io/name";
/// Its value for agents.
pub const AGENT: &str = "aegis-node-agent";
/// Its value for operators.
pub const OPERATOR: &str = "aegis-operator";

/// Objects of one moment.
#[derive(Clone, Default)]
pub struct State {
    /// What the operator plans from.
    pub snapshot: Snapshot,
    /// Alerts, which no plan depends on, where they were asked for.
    pub alerts: Vec<Guarded<UsageAlert>>,
    /// Pods.
    pub pods: Vec<Pod>,
    /// The pods of operator and agents.
    pub system: Vec<Pod>,
    /// Services, and what they lead to, where that was asked for.
    pub service_objects: Vec<Service>,
    /// Their endpoints.
    pub endpoints: Vec<EndpointSlice>,
    /// Ranges inside the cluster that no object tells.
    pub cluster_cidrs: Vec<IpNet>,
    /// Kinds (in the plural) that could not be read, or only in part, and why.
    pub missing: BTreeMap<&'static str, String>,
    /// When.
    pub now: Seconds,
}

/// Seconds that a slice rests, unless the operator's arguments say otherwise.
const QUARANTINE: Seconds = aegis_core::model::QUARANTINE;

impl State {
    /// As planning sees it.
    pub fn world(&self) -> World {
        translate(&self.snapshot, &[], self.now, self.quarantine())
    }

    /// How long slices rest: what the operator's pods were told.
    fn quarantine(&self) -> Seconds {
        let told = self.arguments(OPERATOR, "--quarantine-seconds=").next();
        told.and_then(|text| text.parse().ok()).unwrap_or(QUARANTINE)
    }

    /// Values of an argument of operators or agents.
    fn arguments<'a>(&'a self, part: &'a str, flag: &'a str) -> impl Iterator<Item = &'a str> {
        let pods = self.system.iter().filter(move |pod| is_part(pod, part));
        let containers = pods.filter_map(|pod| pod.spec.as_ref()).flat_map(|spec| &spec.containers);
        let arguments = containers.flat_map(|it| it.args.iter().flatten().chain(it.command.iter().flatten()));
        arguments.filter_map(move |argument| argument.strip_prefix(flag))
    }

    /// Everything inside the cluster, as the agents know it.
    pub fn internal(&self) -> Vec<IpNet> {
        let nodes = self.snapshot.nodes.iter().filter_map(|node| node.0.as_ref().ok());
        let nodes = nodes.flat_map(|node| {
            rules::pod_ranges(node).into_iter().chain(rules::node_addresses(node).map(IpNet::from))
        });
        let told = self.arguments(AGENT, "--cluster-cidrs=").flat_map(|it| it.split(','));
        let told = told.filter_map(|range| range.parse().ok());
        let mut all: Vec<IpNet> = nodes
            .chain(readable(&self.snapshot.services).into_iter().flat_map(rules::service_ranges))
            .chain(told)
            .chain(self.cluster_cidrs.iter().copied())
            .chain(policy::never_covered())
            .map(|range| range.trunc())
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// All rules, as agents read them.
    pub fn rules(&self) -> Rules {
        let accounts: BTreeSet<String> = self.pods.iter().filter_map(ResourceExt::namespace).collect();
        let (policies, bad_policies) = read(&self.snapshot.policies, rules::policy);
        let (bindings, bad_bindings) = read(&self.snapshot.bindings, rules::binding);
        let (applications, bad_applications) =
            read(&self.snapshot.applications, |object| Ok((object.name_any(), rules::application(object)?)));
        let applications = applications.into_iter().collect();
        Rules { policies, bindings, applications, bad_policies, bad_bindings, bad_applications, accounts }
    }

    /// A pod by namespace and name.
    pub fn pod(&self, account: &str, name: &str) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.namespace().as_deref() == Some(account) && pod.name_any() == name)
    }

    /// A pod as the rules see it.
    pub fn read(&self, pod: &Pod) -> policy::Pod {
        let mut read = rules::pod(pod);
        let mut namespaces = self.snapshot.namespaces.iter().filter_map(|it| it.0.as_ref().ok());
        let own = namespaces.find(|it| it.name_any() == read.account);
        read.namespace_labels = own.and_then(|it| it.metadata.labels.clone()).unwrap_or_default();
        read
    }

    /// What to say about kinds that could not be read.
    pub fn notes(&self) -> Vec<String> {
        self.missing.iter().map(|(kind, why)| format!("{kind}: {why}")).collect()
    }
}

/// Whether a pod is this part of Aegis.
pub fn is_part(pod: &Pod, part: &str) -> bool {
    pod.labels().get(PART).is_some_and(|name| name == part)
}

/// All rules, as agents read them.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    policies: Vec<EgressPolicy>,
    bindings: Vec<Binding>,
    applications: Applications,
    /// Namespace, name and fault of those that cannot be read.
    bad_policies: Vec<(String, String, String)>,
    bad_bindings: Vec<(String, String, String)>,
    bad_applications: Vec<(String, String, String)>,
    accounts: BTreeSet<String>,
}

impl Rules {
    /// Policies that can be read.
    pub fn policies(&self) -> &[EgressPolicy] {
        &self.policies
    }

    /// Applications that can be read.
    pub fn applications(&self) -> &Applications {
        &self.applications
    }

    /// Bindings, with what stands for rules that cannot be read: nobody knows whom such a policy covers, so it may be any pod.
    pub fn bindings(&self) -> Vec<Binding> {
        let bindings =
            self.bad_bindings.iter().map(|(account, name, _)| rules::unreadable_binding(account, name));
        let policies = self.bad_policies.iter().flat_map(|(_, name, _)| {
            self.accounts.iter().map(move |account| rules::unreadable_binding(account, name))
        });
        self.bindings.iter().cloned().chain(bindings).chain(policies).collect()
    }

    /// What is wrong with those that cannot be read, and what is not known here. Of these names the addresses are.
    pub fn notes(&self, known: &[String]) -> Vec<String> {
        let policies = self.bad_policies.iter().map(|(_, name, why)| {
            format!("EgressPolicy {name} cannot be read, so pods open nothing outside that no other rule covers: {why}")
        });
        let bindings = self.bad_bindings.iter().map(|(account, name, why)| {
            format!("ZoneBinding {account}/{name} cannot be read, so pods of {account} open nothing outside that no other rule covers: {why}")
        });
        policies.chain(bindings).chain(self.lacking()).chain(self.unseen(known).map(|it| it.note)).collect()
    }

    /// Policies with applications of which nothing is known.
    pub fn lacking(&self) -> impl Iterator<Item = String> {
        let unknown = |policy| lacks(policy, &self.applications).map(move |name| (policy, name));
        self.policies.iter().filter_map(unknown).map(|(policy, name)| {
            let faults = self.bad_applications.iter().find(|(_, bad, _)| bad == name);
            let fault =
                faults.map_or("does not exist".to_owned(), |(.., why)| format!("cannot be read: {why}"));
            let meanwhile = match policy.observes {
                true => "it counts nothing",
                false => "pods that it matches otherwise are refused whatever no policy before it decides",
            };
            format!(
                "EgressPolicy {} names EgressApplication {name}, which {fault}; so {meanwhile}",
                policy.name
            )
        })
    }

    /// Rules whose destinations only the agents know. Of these names the addresses are known.
    pub fn unseen(&self, known: &[String]) -> impl Iterator<Item = Unseen> {
        let policies = self.policies.iter().filter_map(|policy| {
            let applications = policy.applications.iter().filter_map(|name| self.applications.get(name));
            let mut endpoints = applications.flatten();
            let hosts = !policy.hosts.is_empty() || endpoints.any(|endpoint| !endpoint.hosts.is_empty());
            let what = match (policy.countries.is_empty(), !hosts) {
                (true, true) => return None,
                (false, true) => "countries",
                (true, false) => "hosts",
                (false, false) => "countries and hosts",
            };
            let named = policy.applications.iter().map(|name| format!("EgressApplication {name}"));
            let names: Vec<String> =
                std::iter::once(format!("EgressPolicy {}", policy.name)).chain(named).collect();
            Some((names, what))
        });
        let bindings = self.bindings.iter().filter(|binding| !binding.hosts.is_empty()).map(|binding| {
            (vec![format!("ZoneBinding {}/{}", binding.name.account, binding.name.name)], "hosts")
        });
        let taken = match known {
            [] => "none is taken for one here".to_owned(),
            names => format!("none but those of {} are taken for one here", names.join(" and ")),
        };
        policies.chain(bindings).map(move |(names, what): (Vec<String>, &str)| {
            let rule = names.first().map(String::as_str).unwrap_or_default();
            let blind = match what {
                "hosts" => "",
                _ => "; a node without a database of countries takes every one for it, and refuses",
            };
            let note = format!(
                "{rule} names {what}: which addresses these are only the agents know, so {taken}{blind}"
            );
            Unseen { names, note }
        })
    }
}

/// A rule whose destinations only the agents know.
pub struct Unseen {
    /// Kind and name of the objects that say so: the rule, and applications that it names.
    pub names: Vec<String>,
    /// What to say of it.
    pub note: String,
}

/// The first application that the policy names and that is not known.
pub fn lacks<'a>(policy: &'a EgressPolicy, known: &Applications) -> Option<&'a str> {
    policy.applications.iter().find(|name| !known.contains_key(*name)).map(String::as_str)
}

type Bad = Vec<(String, String, String)>;

fn read<K, M>(objects: &[Guarded<K>], model: impl Fn(&K) -> Result<M, rules::FieldError>) -> (Vec<M>, Bad)
where
    K: Resource<DynamicType = ()> + Clone + Debug,
{
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for object in objects {
        let read = match &object.0 {
            Ok(object) => model(object).map_err(|error| error.to_string()),
            Err(invalid) => Err(invalid.error.clone()),
        };
        match read {
            Ok(read) => good.push(read),
            Err(why) => bad.push((object.namespace().unwrap_or_default(), object.name_any(), why)),
        }
    }
    (good, bad)
}

/// Objects that can be read, in the order of their names.
pub fn readable<K: Resource<DynamicType = ()>>(objects: &[Guarded<K>]) -> Vec<&K> {
    let mut found: Vec<&K> = objects.iter().filter_map(|object| object.0.as_ref().ok()).collect();
    found.sort_by_key(|object| (object.namespace(), object.name_any()));
    found
}

/// Policies and bindings as objects, by name.
pub fn policy_objects(state: &State) -> BTreeMap<String, &PolicyObject> {
    readable(&state.snapshot.policies).into_iter().map(|it| (it.name_any(), it)).collect()
}

/// The same for bindings.
pub fn binding_objects(state: &State) -> BTreeMap<(String, String), &ZoneBinding> {
    let bindings = readable(&state.snapshot.bindings).into_iter();
    bindings.map(|it| ((it.namespace().unwrap_or_default(), it.name_any()), it)).collect()
}
