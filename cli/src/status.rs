//! `kubectl aegis status`: what is there, and what is wrong with it.

use crate::output::{Answer, Table, notes, plural, sections};
use crate::state::{OPERATOR, State, is_part, readable};
use aegis_crds::{Condition, reason, type_};
use aegis_world::agents::AgentPod;
use aegis_world::world::agent_state;
use k8s_openapi::api::core::v1::Pod;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use std::collections::BTreeSet;

/// Conditions that are bad if they are true.
const BAD_IF_TRUE: [&str; 1] = [type_::CAPACITY_LOW];
/// Conditions that tell something of which neither is bad.
const NEITHER: [&str; 1] = [type_::FAST_PATH];

/// What is there.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Nothing is wrong.
    pub healthy: bool,
    /// The operator's pods; left out if they could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator: Option<Ready>,
    /// The nodes' agents; left out if their reports could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agents: Option<Ready>,
    /// Prefixes.
    pub prefixes: Vec<Prefix>,
    /// Allocations.
    pub allocations: Vec<Allocation>,
    /// Bindings.
    pub bindings: usize,
    /// Policies.
    pub policies: usize,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// What could not be looked at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// How many are ready.
#[derive(Serialize)]
pub struct Ready {
    /// These.
    pub ready: usize,
    /// Of so many.
    pub total: usize,
}

/// A prefix.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Prefix {
    /// Name.
    pub name: String,
    /// Range.
    pub cidr: String,
    /// Owner.
    pub account: String,
    /// Addresses that can be allocated.
    pub addresses: u32,
    /// Addresses that allocations hold.
    pub used: u32,
    /// Addresses that they can get.
    pub free: u32,
    /// To whom it is delegated, and how many each may have.
    pub delegated: Vec<String>,
}

/// An allocation.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Addresses.
    pub addresses: Vec<String>,
    /// Nodes that hold slices.
    pub nodes: u32,
    /// Slices that nodes hold, over all addresses.
    pub slices_held: u32,
    /// Slices that nobody holds.
    pub slices_free: u32,
    /// The message of `Programmed`.
    pub programmed: String,
}

/// Something that is wrong.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// Kind.
    pub kind: String,
    /// Namespace, a slash and name, or name.
    pub name: String,
    /// Type of the condition.
    pub condition: String,
    /// Its reason.
    pub reason: String,
    /// What is the case and what to do.
    pub message: String,
}

/// Looks at everything, or of namespaced kinds at one namespace.
pub fn status(state: &State, namespace: Option<&str>) -> Status {
    let snapshot = &state.snapshot;
    let here = |it: &Option<String>| namespace.is_none_or(|wanted| it.as_deref() == Some(wanted));
    let mut problems = Vec::new();
    let operator = operator(state, &mut problems);
    let agents = (!state.missing.contains_key("egressnodes")).then(|| agents(state, &mut problems));
    for object in readable(&snapshot.prefixes) {
        let conditions = object.status.as_ref().map(|status| status.conditions.as_slice());
        judge("AegisPrefix", object, conditions, &mut problems);
    }
    let allocations: Vec<_> =
        readable(&snapshot.allocations).into_iter().filter(|it| here(&it.namespace())).collect();
    for object in &allocations {
        let conditions = object.status.as_ref().map(|status| status.conditions.as_slice());
        judge("EgressAllocation", *object, conditions, &mut problems);
    }
    let bindings: Vec<_> =
        readable(&snapshot.bindings).into_iter().filter(|it| here(&it.namespace())).collect();
    for object in &bindings {
        let conditions = object.status.as_ref().map(|status| status.conditions.as_slice());
        judge("ZoneBinding", *object, conditions, &mut problems);
    }
    let policies = readable(&snapshot.policies);
    for object in &policies {
        let conditions = object.status.as_ref().map(|status| status.conditions.as_slice());
        judge("EgressPolicy", *object, conditions, &mut problems);
    }
    for object in readable(&snapshot.applications) {
        let conditions = object.status.as_ref().map(|status| status.conditions.as_slice());
        judge("EgressApplication", object, conditions, &mut problems);
    }
    for problem in state.world().problems {
        let target = problem.target;
        let name = match &target.namespace {
            Some(namespace) => format!("{namespace}/{}", target.name),
            None => target.name,
        };
        let told = problems.iter().any(|it| it.kind == target.resource.kind && it.name == name);
        if !told && (target.namespace.is_none() || here(&target.namespace)) {
            problems.push(Problem {
                kind: target.resource.kind,
                name,
                condition: type_::ACCEPTED.to_owned(),
                reason: reason::INVALID.to_owned(),
                message: problem.message,
            });
        }
    }
    Status {
        healthy: problems.is_empty(),
        operator,
        agents,
        prefixes: readable(&snapshot.prefixes).into_iter().map(prefix).collect(),
        allocations: allocations.into_iter().map(allocation).collect(),
        bindings: bindings.len(),
        policies: policies.len(),
        problems,
        notes: state.notes(),
    }
}

fn operator(state: &State, problems: &mut Vec<Problem>) -> Option<Ready> {
    if state.system.is_empty() {
        return None;
    }
    let pods: Vec<&Pod> = state.system.iter().filter(|pod| is_part(pod, OPERATOR)).collect();
    for pod in pods.iter().filter(|pod| !is_ready(pod)) {
        problems.push(Problem {
            kind: "Pod".to_owned(),
            name: name(*pod),
            condition: type_::READY.to_owned(),
            reason: "NotReady".to_owned(),
            message: "a replica of the operator is not ready: see its log; traffic goes on, and changes wait if no replica is ready"
                .to_owned(),
        });
    }
    if pods.is_empty() {
        problems.push(Problem {
            kind: "Deployment".to_owned(),
            name: OPERATOR.to_owned(),
            condition: type_::READY.to_owned(),
            reason: reason::NOT_FOUND.to_owned(),
            message: "there is no pod of the operator: nothing that changes takes effect; install the chart, or scale the Deployment up"
                .to_owned(),
        });
    }
    Some(Ready { ready: pods.iter().filter(|pod| is_ready(pod)).count(), total: pods.len() })
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().filter_map(|status| status.conditions.as_ref()).flatten();
    conditions.into_iter().any(|it| it.type_ == "Ready" && it.status == "True")
}

fn agents(state: &State, problems: &mut Vec<Problem>) -> Ready {
    let snapshot = &state.snapshot;
    let reports = readable(&snapshot.egress_nodes);
    let with_pod = snapshot.agents.iter().flatten().map(|(node, _)| node.clone());
    let nodes: BTreeSet<String> = reports.iter().map(|report| report.name_any()).chain(with_pod).collect();
    let mut ready = 0;
    for node in &nodes {
        let report = reports.iter().find(|report| report.name_any() == *node).copied();
        let conditions = report.and_then(|it| it.status.as_ref()).map(|status| &status.told.conditions);
        let standing = agent_state(report, snapshot.agent(node));
        ready += usize::from(standing.is_ok());
        let mut told = false;
        for condition in conditions.into_iter().flatten().filter(|it| is_bad(it)) {
            told |= condition.type_ == type_::READY;
            problems.push(problem("EgressNode", node.clone(), condition));
        }
        if let (Err(why), false) = (standing, told) {
            let reason = match snapshot.agent(node) {
                AgentPod::Missing => "NoAgent",
                AgentPod::Ending => "Leaving",
                AgentPod::Ready => "NotReady",
            };
            problems.push(Problem {
                kind: "EgressNode".to_owned(),
                name: node.clone(),
                condition: type_::READY.to_owned(),
                reason: reason.to_owned(),
                message: format!(
                    "{why}; what it has programmed goes on, but it gets no new slices and follows no change"
                ),
            });
        }
    }
    Ready { ready, total: nodes.len() }
}

fn is_bad(condition: &Condition) -> bool {
    let type_ = condition.type_.as_str();
    match condition.status.as_str() {
        _ if NEITHER.contains(&type_) || condition.reason == reason::DISABLED => false,
        "True" => BAD_IF_TRUE.contains(&type_),
        _ => !BAD_IF_TRUE.contains(&type_),
    }
}

/// What keeps an allocation from having all of its addresses on all nodes.
pub fn faults(object: &aegis_crds::EgressAllocation) -> Vec<Problem> {
    let mut problems = Vec::new();
    let conditions = object.status.as_ref().map(|status| status.conditions.as_slice());
    judge("EgressAllocation", object, conditions, &mut problems);
    // How much of them is used is another matter.
    problems.retain(|it| ![type_::CAPACITY_LOW, type_::WITHIN_LIMITS].contains(&it.condition.as_str()));
    problems
}

fn problem(kind: &'static str, name: String, condition: &Condition) -> Problem {
    Problem {
        kind: kind.to_owned(),
        name,
        condition: condition.type_.clone(),
        reason: condition.reason.clone(),
        message: condition.message.clone(),
    }
}

/// Adds what the conditions of an object say is wrong.
fn judge<K: Resource>(
    kind: &'static str,
    object: &K,
    conditions: Option<&[Condition]>,
    problems: &mut Vec<Problem>,
) {
    let name = name(object);
    let generation = object.meta().generation;
    let conditions = conditions.unwrap_or_default();
    let stale = conditions.iter().any(|it| generation.is_some() && it.observed_generation < generation);
    if conditions.is_empty() || stale {
        problems.push(Problem {
            kind: kind.to_owned(),
            name: name.clone(),
            condition: type_::ACCEPTED.to_owned(),
            reason: "NotJudged".to_owned(),
            message:
                "the operator has not looked at it in its present form: if that lasts, see whether it runs"
                    .to_owned(),
        });
    }
    problems.extend(conditions.iter().filter(|it| is_bad(it)).map(|it| problem(kind, name.clone(), it)));
}

fn name<K: Resource>(object: &K) -> String {
    match object.meta().namespace.as_deref() {
        Some(namespace) => format!("{namespace}/{}", object.name_any()),
        None => object.name_any(),
    }
}

fn prefix(object: &aegis_crds::AegisPrefix) -> Prefix {
    let status = object.status.clone().unwrap_or_default();
    let to = |it: &aegis_crds::Delegation| match &it.account {
        Some(account) => format!("{account} (at most {})", it.max_addresses),
        None => format!("namespaces of delegation {} (at most {} each)", it.name, it.max_addresses),
    };
    Prefix {
        name: object.name_any(),
        cidr: object.spec.cidr.clone(),
        account: object.spec.account.clone(),
        addresses: status.addresses,
        used: status.used,
        free: status.free,
        delegated: object.spec.delegations.iter().map(to).collect(),
    }
}

fn allocation(object: &aegis_crds::EgressAllocation) -> Allocation {
    let status = object.status.clone().unwrap_or_default();
    let programmed = status.conditions.iter().find(|it| it.type_ == type_::PROGRAMMED);
    Allocation {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        addresses: status.addresses.iter().map(|it| it.address.clone()).collect(),
        nodes: status.nodes,
        slices_held: status.addresses.iter().map(|it| it.slices_held).sum(),
        slices_free: status.addresses.iter().map(|it| it.slices_free).sum(),
        programmed: programmed.map(|it| it.message.clone()).unwrap_or_default(),
    }
}

impl Answer for Status {
    fn table(&self) -> String {
        let ready = |it: &Ready| format!("{} of {} ready", it.ready, it.total);
        let ready = |it: &Option<Ready>| it.as_ref().map_or("not looked at".to_owned(), ready);
        let head = format!(
            "operator: {}\nagents:   {}\nrules:    {}, {}",
            ready(&self.operator),
            ready(&self.agents),
            plural(self.policies, "policy", "policies"),
            plural(self.bindings, "binding", "bindings"),
        );
        let mut prefixes = Table::new(["PREFIX", "CIDR", "ACCOUNT", "USED", "FREE", "DELEGATED TO"]);
        for it in &self.prefixes {
            prefixes.row([
                it.name.clone(),
                it.cidr.clone(),
                it.account.clone(),
                format!("{} of {}", it.used, it.addresses),
                it.free.to_string(),
                it.delegated.join(", "),
            ]);
        }
        let mut allocations =
            Table::new(["ALLOCATION", "ADDRESSES", "NODES", "SLICES HELD", "FREE", "PROGRAMMED"]);
        for it in &self.allocations {
            allocations.row([
                format!("{}/{}", it.namespace, it.name),
                it.addresses.join(", "),
                it.nodes.to_string(),
                it.slices_held.to_string(),
                it.slices_free.to_string(),
                it.programmed.clone(),
            ]);
        }
        let mut problems = Table::new(["PROBLEM WITH", "CONDITION", "REASON", "MESSAGE"]);
        for it in &self.problems {
            problems.row([
                format!("{} {}", it.kind, it.name),
                it.condition.clone(),
                it.reason.clone(),
                it.message.clone(),
            ]);
        }
        let problems = if self.healthy { "nothing is wrong".to_owned() } else { problems.text() };
        sections([head, prefixes.text(), allocations.text(), problems, notes(&self.notes)])
    }
}
