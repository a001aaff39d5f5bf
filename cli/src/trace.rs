//! `kubectl aegis trace`: where a pod's packets to a destination leave, and why.

mod outcome;
mod question;
mod services;
#[cfg(test)]
mod tests;

pub use question::{Destination, Found, Placed, Protocol, Subject};

use crate::cluster::Live;
use crate::decision::{Decider, Way, full};
use crate::describe;
use crate::flows::leaves_from;
use crate::output::{Answer, Table, notes, plural, sections};
use crate::state::State;
use aegis_core::egress::Family;
use aegis_core::model::AllocationName;
use aegis_core::policy::{Action, EgressPolicy, Packet, Pod, RuleName, Step};
use aegis_crds::{Demand, reason, type_};
use aegis_world::report::rule_key;
use aegis_world::snapshot::by_name;
use outcome::outcome;
use serde::Serialize;
use std::net::IpAddr;

/// The answer to a question.
#[derive(Serialize)]
pub struct Traces {
    /// One for each pod and address.
    pub traces: Vec<Trace>,
    /// What could not be looked at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A pod's way to an address.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Trace {
    /// Namespace and name of the pod.
    pub pod: String,
    /// As what it runs.
    pub service_account: String,
    /// Where it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Where the packet goes.
    pub destination: IpAddr,
    /// Protocol, and port if it has one.
    pub packet: String,
    /// Each rule, in order; none if the destination is inside the cluster.
    pub rules: Vec<Rule>,
    /// What happens.
    pub outcome: Outcome,
    /// The rule that says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// The same in words, with what to do if it is refused.
    pub message: String,
    /// What it leaves from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// Live flows, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flows: Option<Live>,
    /// What the answer depends on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What happens to a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// It stays inside the cluster.
    Internal,
    /// It leaves from an egress address.
    Egress,
    /// It leaves with the node's address.
    NodeAddress,
    /// It is refused.
    Refused,
}

/// What a rule makes of it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// `policy NAME` or `binding NAME`.
    pub rule: String,
    /// What it does.
    pub action: String,
    /// It decides.
    pub decides: bool,
    /// It matches, whether it decides or not.
    pub matches: bool,
    /// Why it does not match.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub misses: Vec<Miss>,
}

/// A criterion that is not met.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Miss {
    /// Field of the rule.
    pub criterion: String,
    /// What it wants, and what is there.
    pub message: String,
}

/// What a flow leaves from.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Egress {
    /// Namespace and name of the allocation.
    pub allocation: String,
    /// From which addresses, through whom.
    #[serde(flatten)]
    pub way: Way,
    /// Ports in use towards the busiest origin on the node, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fill_percent: Option<u32>,
    /// New flows that the node refused for want of a port during the last minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<u32>,
    /// What it leaves from where there is no port of the allocation, or of IPv6 no part of its /64s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secondary: Option<Box<Egress>>,
}

/// Answers.
pub fn traces(state: &State, subject: &Subject, found: &Found) -> anyhow::Result<Traces> {
    let addresses: Vec<IpAddr> = found.packets.iter().map(|packet| packet.destination).collect();
    let decider = Decider::of(state).with_names(&found.names, &addresses);
    let (pods, mut told) = subject.pods(state)?;
    told.extend(state.rules().notes(&found.names));
    told.extend(state.notes());
    told.extend(found.notes.iter().cloned());
    let mut traces = Vec::new();
    for (pod, node) in &pods {
        for packet in &found.packets {
            traces.push(trace(state, &decider, pod, node.as_deref(), *packet));
        }
    }
    Ok(Traces { traces, notes: told })
}

/// One pod's way to one address.
pub fn trace(state: &State, decider: &Decider<'_>, pod: &Pod, node: Option<&str>, packet: Packet) -> Trace {
    let told = decider.explain(pod, node, packet);
    let decides = told.winner.map(|place| &told.steps[place]);
    let family = if packet.destination.is_ipv4() { Family::V4 } else { Family::V6 };
    let by = decides.map(|step| title(&step.rule));
    let (outcome, message) = outcome(state, decider, &told, decides, node, family);
    let egress = match &told.action {
        Action::Allocate { allocation, secondary, .. } => {
            let of = |name: &AllocationName| egress(state, decider, name, node.unwrap_or_default(), family);
            let secondary = secondary.as_ref().map(|name| Box::new(of(name)));
            Some(Egress { secondary, ..of(allocation) })
        }
        _ => None,
    };
    let steps = if told.internal.is_some() { &[][..] } else { &told.steps };
    let rules = steps.iter().enumerate().map(|(place, step)| Rule {
        rule: title(&step.rule),
        action: action(decider, step),
        decides: told.winner == Some(place),
        matches: step.matches(),
        misses: step
            .misses
            .iter()
            .map(|it| Miss { criterion: it.criterion.to_owned(), message: it.message.clone() })
            .collect(),
    });
    Trace {
        pod: format!("{}/{}", pod.account, pod.name),
        service_account: pod.service_account.clone(),
        node: node.map(str::to_owned),
        addresses: pod.addresses.clone(),
        destination: packet.destination,
        packet: packet.to_string(),
        rules: rules.collect(),
        outcome,
        by,
        message,
        egress,
        flows: None,
        notes: depends(state, decider, pod, node, packet, decides),
    }
}

fn title(rule: &RuleName) -> String {
    match rule {
        RuleName::Policy(name) => format!("policy {name}"),
        RuleName::Binding(name) => format!("binding {}", name.name),
    }
}

/// The policy that a step is about.
fn policy_of<'a>(decider: &'a Decider<'_>, step: &Step) -> Option<&'a EgressPolicy> {
    decider.policies.iter().find(|policy| step.rule == RuleName::Policy(policy.name.clone()))
}

fn action(decider: &Decider<'_>, step: &Step) -> String {
    match &step.rule {
        RuleName::Policy(_) => {
            policy_of(decider, step).map(|policy| describe::exit(&policy.exit)).unwrap_or_default()
        }
        RuleName::Binding(name) => {
            let binding = decider.bindings.iter().find(|binding| binding.name == *name);
            binding.map(|it| format!("leave from {}", it.allocation.name)).unwrap_or_default()
        }
    }
}

fn egress(
    state: &State,
    decider: &Decider<'_>,
    allocation: &AllocationName,
    node: &str,
    family: Family,
) -> Egress {
    let demand = demand(state, node, allocation);
    Egress {
        allocation: full(allocation),
        way: decider.way(allocation, node, family),
        fill_percent: demand.map(|it| it.fill_percent),
        refused: demand.map(|it| it.refused),
        secondary: None,
    }
}

/// What a node's agent says of its ports for an allocation.
fn demand<'a>(state: &'a State, node: &str, allocation: &AllocationName) -> Option<&'a Demand> {
    let report = by_name(&state.snapshot.egress_nodes).remove(node)?;
    let mut demand = report.status.as_ref()?.told.demand.iter();
    demand.find(|it| it.allocation.namespace == allocation.account && it.allocation.name == allocation.name)
}

/// What the answer depends on, and may be otherwise just now.
fn depends(
    state: &State,
    decider: &Decider<'_>,
    pod: &Pod,
    node: Option<&str>,
    packet: Packet,
    decides: Option<&Step>,
) -> Vec<String> {
    let mut notes = Vec::new();
    let six = packet.destination.is_ipv6();
    if !pod.host_network && !pod.addresses.is_empty() && !pod.addresses.iter().any(|it| it.is_ipv6() == six) {
        let family = if six { "IPv6" } else { "IPv4" };
        notes.push(format!("the pod has no {family} address, so it sends no such packet"));
    }
    let mut endpoints = decider.applications.values().flatten();
    let ports = decider.policies.iter().any(|it| !it.ports.is_empty())
        || endpoints.any(|it| !it.ports.is_empty())
        || decider.bindings.iter().any(|it| !it.ports.is_empty());
    if ports && packet.port.is_none() && [6, 17].contains(&packet.protocol) {
        notes.push("no port is given, so no rule with ports matches: say DEST:PORT".to_owned());
    }
    let Some(node) = node else {
        notes.push("it is on no node yet: from which slices it leaves depends on the node".to_owned());
        return notes;
    };
    let reports = by_name(&state.snapshot.egress_nodes);
    let status = reports.get(node).and_then(|report| report.status.as_ref());
    let Some(status) = status else {
        if !state.missing.contains_key("egressnodes") {
            notes.push(format!("node {node} has no agent that has ever reported: covered packets of its pods may leave with the node's address"));
        }
        return notes;
    };
    for condition in status.told.conditions.iter().filter(|it| it.type_ == "Ready" && it.status != "True") {
        notes.push(format!("the agent of node {node} is not ready: {}", condition.message));
    }
    // One that could not be read may have left an earlier one in use, or none: its message says which.
    let countries = status.told.conditions.iter().filter(|it| it.type_ == type_::COUNTRIES_KNOWN);
    for condition in countries.filter(|it| it.reason == reason::DATABASE_UNREADABLE) {
        notes.push(format!("countries on node {node}: {}", condition.message));
    }
    if let Some((rule, generation)) = decides.and_then(|step| generation(decider, &step.rule)) {
        let enforced = status.rules.iter().find(|it| *it.rule == *rule).map(|it| it.generation);
        if enforced.is_none_or(|enforced| enforced < generation) {
            let has =
                enforced.map_or("does not have it yet".to_owned(), |it| format!("has generation {it} of it"));
            notes.push(format!("this is what generation {generation} of {rule} says; node {node} {has}"));
        }
    }
    notes
}

/// A rule as reports name it, and its generation.
fn generation(decider: &Decider<'_>, rule: &RuleName) -> Option<(String, i64)> {
    match rule {
        RuleName::Policy(name) => {
            let policy = decider.policies.iter().find(|policy| policy.name == *name)?;
            Some((rule_key("", name), policy.generation))
        }
        RuleName::Binding(name) => {
            let binding = decider.bindings.iter().find(|binding| binding.name == *name)?;
            Some((rule_key(&name.account, &name.name), binding.generation))
        }
    }
}

impl Answer for Traces {
    fn table(&self) -> String {
        let traces: Vec<String> = self.traces.iter().map(Trace::table).collect();
        sections([traces.join("\n"), notes(&self.notes)])
    }
}

impl Trace {
    fn table(&self) -> String {
        let addresses: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        let node = self.node.as_deref().unwrap_or("none");
        let head = format!(
            "pod {} ({}) on node {node}, service account {}\nto {}, {}",
            self.pod,
            if addresses.is_empty() { "no address".to_owned() } else { addresses.join(", ") },
            self.service_account,
            self.destination,
            self.packet,
        );
        let mut rules = Table::new(["#", "RULE", "ACTION", "MATCHES"]);
        for (number, it) in self.rules.iter().enumerate() {
            let why: Vec<String> =
                it.misses.iter().map(|miss| format!("{}: {}", miss.criterion, miss.message)).collect();
            let matches = match (it.decides, it.matches) {
                (true, _) => "yes, and decides".to_owned(),
                (false, true) => "yes, but one before it decides".to_owned(),
                (false, false) => format!("no: {}", why.join("; ")),
            };
            rules.row([(number + 1).to_string(), it.rule.clone(), it.action.clone(), matches]);
        }
        let egress = self.egress.as_ref().map(Egress::table).unwrap_or_default();
        let outcome = format!("=> {}\n{egress}", self.message);
        let flows = self.flows.as_ref().map(flows).unwrap_or_default();
        sections([head, rules.text(), outcome, flows, notes(&self.notes)])
    }
}

fn flows(live: &Live) -> String {
    let mut table = Table::new(["FLOW", "FROM PORT", "TO PORT", "LEAVES FROM", "IDLE"]);
    for flow in &live.flows {
        let protocol = Packet { destination: UNSPECIFIED, protocol: flow.protocol, port: None };
        table.row([
            protocol.to_string(),
            flow.pod_port.to_string(),
            flow.port.to_string(),
            leaves_from(flow.egress, flow.egress_port),
            format!("{} s", flow.idle),
        ]);
    }
    format!("{}\n{}", plural(live.total, "live flow", "live flows"), table.text())
}

const UNSPECIFIED: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

impl Egress {
    fn table(&self) -> String {
        let mut text = String::new();
        for own in &self.way.addresses {
            let programmed = match own.programmed {
                Some(true) | None => "",
                Some(false) => ", not programmed yet",
            };
            let slices = plural(own.slices as usize, "slice", "slices");
            text +=
                &format!("   {}: {} ({slices} of the node{programmed})\n", own.address, own.ports.join(", "));
        }
        for gateway in &self.way.through {
            let near = if gateway.near { "" } else { ", only while none of these answers" };
            text += &format!("   through node {}{near}: {}\n", gateway.node, gateway.addresses.join(", "));
        }
        if let Some(fill) = self.fill_percent {
            let refused = self.refused.unwrap_or_default();
            text += &format!(
                "   ports towards the busiest origin: {fill} % used, {refused} flows refused in the last minute\n"
            );
        }
        if let Some(secondary) = &self.secondary {
            text += &format!("   else from {}:\n{}", secondary.allocation, secondary.table());
        }
        text
    }
}

/// Reads a pod with the node it is on.
pub fn with_node(state: &State, pod: &k8s_openapi::api::core::v1::Pod) -> (Pod, Option<String>) {
    (state.read(pod), pod.spec.as_ref().and_then(|spec| spec.node_name.clone()))
}
