//! `kubectl aegis policies`: the rules in the order in which they are asked.

use crate::decision::Decider;
use crate::describe;
use crate::output::{Answer, Table, notes, sections};
use crate::state::{State, binding_objects, policy_objects};
use aegis_core::policy::{self, Packet, Pod, RuleName, in_order, shadowed};
use aegis_crds::{Condition, type_};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The rules.
#[derive(Serialize)]
pub struct Policies {
    /// Policies, in order.
    pub policies: Vec<Policy>,
    /// Bindings, which are asked after them.
    pub bindings: Vec<Binding>,
    /// The pod for which `applies` is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// What could not be looked at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A policy.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// Place in the order, from 1 on.
    pub order: usize,
    /// Name.
    pub name: String,
    /// Precedence.
    pub precedence: i32,
    /// What it is about.
    pub matches: String,
    /// What it does.
    pub action: String,
    /// The policy before it that decides about everything that it matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shadowed_by: Option<String>,
    /// Pods that match, as the nodes report.
    pub pods: u32,
    /// The message of `Programmed`.
    pub programmed: String,
    /// Whether it is about the pod, or why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applies: Option<String>,
}

/// A binding.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Binding {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// What it is about.
    pub matches: String,
    /// Allocation to leave from.
    pub allocation: String,
    /// Switched on.
    pub enabled: bool,
    /// Pods that it covers, as the nodes report.
    pub pods: u32,
    /// The message of `Programmed`.
    pub programmed: String,
    /// Whether it is about the pod, or why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applies: Option<String>,
}

/// All policies, and the bindings of all namespaces or one. With a pod, whether they are about it; then the bindings are those of its
/// namespace.
pub fn policies(state: &State, namespace: Option<&str>, pod: Option<&Pod>) -> Policies {
    let decider = Decider::of(state);
    let applies = pod.map(|pod| applies(&decider, pod));
    let applies = |name: &RuleName| applies.as_ref().and_then(|all| all.get(name).cloned());
    let (policy_objects, binding_objects) = (policy_objects(state), binding_objects(state));
    let shadows = shadowed(&decider.policies, &decider.applications);
    let policies = in_order(&decider.policies).into_iter().zip(1..).map(|(policy, order)| {
        let status = policy_objects.get(&policy.name).and_then(|object| object.status.as_ref());
        Policy {
            order,
            name: policy.name.clone(),
            precedence: policy.precedence,
            matches: describe::policy(policy),
            action: describe::exit(&policy.exit),
            shadowed_by: shadows.get(policy.name.as_str()).map(|name| (*name).to_owned()),
            pods: status.map(|status| status.pods).unwrap_or_default(),
            programmed: programmed(status.map(|status| status.conditions.as_slice())),
            applies: applies(&RuleName::Policy(policy.name.clone())),
        }
    });
    let namespace = pod.map(|pod| pod.account.as_str()).or(namespace);
    let mut bindings: Vec<&policy::Binding> = decider.bindings.iter().collect();
    bindings.retain(|it| namespace.is_none_or(|namespace| it.name.account == namespace));
    bindings.sort_by(|a, b| a.name.cmp(&b.name));
    let bindings = bindings.into_iter().map(|binding| {
        let name = (binding.name.account.clone(), binding.name.name.clone());
        let status = binding_objects.get(&name).and_then(|object| object.status.as_ref());
        Binding {
            namespace: name.0,
            name: name.1,
            matches: describe::binding(binding),
            allocation: binding.allocation.name.clone(),
            enabled: binding.enabled,
            pods: status.map(|status| status.pods).unwrap_or_default(),
            programmed: programmed(status.map(|status| status.conditions.as_slice())),
            applies: applies(&binding.name.clone().into()),
        }
    });
    Policies {
        policies: policies.collect(),
        bindings: bindings.collect(),
        pod: pod.map(|pod| format!("{}/{}", pod.account, pod.name)),
        notes: state.rules().notes(&[]).into_iter().chain(state.notes()).collect(),
    }
}

fn programmed(conditions: Option<&[Condition]>) -> String {
    let found = conditions.unwrap_or_default().iter().find(|it| it.type_ == type_::PROGRAMMED);
    found.map(|it| it.message.clone()).unwrap_or_default()
}

/// Whether each rule is about a pod, whatever the destination.
fn applies(decider: &Decider<'_>, pod: &Pod) -> BTreeMap<RuleName, String> {
    let mut found: BTreeMap<RuleName, String> = BTreeMap::new();
    for destination in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        let packet = Packet { destination, protocol: 6, port: Some(1) };
        for step in decider.explain(pod, None, packet).steps {
            let why: Vec<&str> = step
                .misses
                .iter()
                .filter(|miss| !ABOUT_DESTINATION.contains(&miss.criterion))
                .map(|miss| miss.message.as_str())
                .collect();
            let told = if why.is_empty() { "yes".to_owned() } else { format!("no: {}", why.join("; ")) };
            let known = found.entry(step.rule).or_insert_with(|| told.clone());
            if why.is_empty() {
                *known = told;
            }
        }
    }
    found
}

/// Criteria that are about where a packet goes, not whose it is.
const ABOUT_DESTINATION: [&str; 2] = ["destination", "ports"];

impl Answer for Policies {
    fn table(&self) -> String {
        let mut policies =
            Table::new(["ORDER", "POLICY", "PRECEDENCE", "MATCH", "ACTION", "PODS", "SHADOWED BY"]);
        for it in &self.policies {
            policies.row([
                it.order.to_string(),
                it.name.clone(),
                it.precedence.to_string(),
                it.matches.clone(),
                it.action.clone(),
                it.pods.to_string(),
                it.shadowed_by.clone().unwrap_or_default(),
            ]);
        }
        let mut bindings = Table::new(["THEN BINDING", "MATCH", "ALLOCATION", "ENABLED", "PODS"]);
        for it in &self.bindings {
            bindings.row([
                format!("{}/{}", it.namespace, it.name),
                it.matches.clone(),
                it.allocation.clone(),
                it.enabled.to_string(),
                it.pods.to_string(),
            ]);
        }
        let mut pod = Table::new(["RULE", "IS ABOUT THE POD"]);
        let all = self.policies.iter().map(|it| (format!("policy {}", it.name), &it.applies));
        let all = all.chain(self.bindings.iter().map(|it| (format!("binding {}", it.name), &it.applies)));
        for (name, applies) in all {
            if let Some(applies) = applies {
                pod.row([name, applies.clone()]);
            }
        }
        let empty = "there are neither policies nor bindings: everything leaves with the nodes' addresses";
        let empty = if self.policies.is_empty() && self.bindings.is_empty() { empty } else { "" };
        sections([empty.to_owned(), policies.text(), bindings.text(), pod.text(), notes(&self.notes)])
    }
}

/// The pod of a state, in the words of the rules.
pub fn pod_of(state: &State, account: &str, name: &str) -> anyhow::Result<Pod> {
    let pod = state.pod(account, name);
    let pod = pod.ok_or_else(|| anyhow::anyhow!("there is no pod {name} in namespace {account}"))?;
    Ok(state.read(pod))
}
