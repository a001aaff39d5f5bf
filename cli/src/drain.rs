//! `kubectl aegis drain`: what is done, and how it comes on.
//!
//! A node is drained by taking its agent off it: the label makes the DaemonSet select it no more, and the agent stays until no flow
//! uses the node's slices. An allocation is drained by deleting it: its finalizer keeps it until its slices are empty.

use crate::output::{Answer, Table, notes, plural, sections};
use crate::state::{State, readable};
use aegis_crds::{EgressAllocation, HoldingState};
use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use serde::Serialize;
use std::collections::BTreeMap;

/// Label of nodes that the agents' DaemonSet does not select.
pub const LABEL: &str = "aegis.dev/drain";

/// What to drain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A node.
    Node(String),
    /// An allocation, by namespace and name.
    Allocation(String, String),
}

impl Target {
    /// Reads `node/NAME`, `allocation/NAME`, or a name that one of both has.
    pub fn parse(text: &str, namespace: &str, state: &State) -> Result<Target> {
        let (kind, name) = text.split_once('/').unwrap_or(("", text));
        let node = readable(&state.snapshot.nodes).into_iter().any(|it| it.name_any() == name);
        let allocation = allocation(state, namespace, name).is_some();
        let target =
            (Target::Node(name.to_owned()), Target::Allocation(namespace.to_owned(), name.to_owned()));
        match (kind, node, allocation) {
            ("node" | "nodes" | "no", true, _) | ("", true, false) => Ok(target.0),
            ("allocation" | "egressallocation" | "ealloc", _, true) | ("", false, true) => Ok(target.1),
            ("", true, true) => {
                bail!("both a node and an allocation are called {name}: say node/{name} or allocation/{name}")
            }
            ("", ..) => bail!(
                "there is neither a node {name} nor an EgressAllocation {name} in namespace {namespace}"
            ),
            ("node" | "nodes" | "no", ..) => bail!("there is no node {name}"),
            ("allocation" | "egressallocation" | "ealloc", ..) => {
                bail!("there is no EgressAllocation {name} in namespace {namespace}")
            }
            _ => bail!("{text:?} is neither node/NAME nor allocation/NAME"),
        }
    }
}

/// What is done, and to what.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Preview {
    /// What is drained.
    pub target: String,
    /// What is done, in order.
    pub steps: Vec<String>,
    /// What is in the way: nothing is done.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<String>,
    /// Slices that are still to become empty, or have to rest.
    pub slices: Vec<Slices>,
    /// What it means for traffic.
    pub effects: Vec<String>,
}

/// Slices of a node or an allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Slices {
    /// The address.
    pub address: String,
    /// The node.
    pub node: String,
    /// Held.
    pub held: u32,
    /// With flows that live, or may live.
    pub draining: u32,
    /// Empty, and resting before somebody else gets them.
    pub resting: u32,
}

/// What stands of a node or an allocation.
pub fn slices(state: &State, target: &Target) -> Vec<Slices> {
    let mut found: BTreeMap<(String, String), Slices> = BTreeMap::new();
    for address in readable(&state.snapshot.addresses) {
        let spec = &address.spec;
        for holding in &spec.holdings {
            let ours = match target {
                Target::Node(name) => holding.node == *name,
                Target::Allocation(namespace, name) => {
                    spec.allocation_ref.namespace == *namespace && spec.allocation_ref.name == *name
                }
            };
            if !ours {
                continue;
            }
            let key = (spec.address.clone(), holding.node.clone());
            let entry = found.entry(key).or_insert_with(|| Slices {
                address: spec.address.clone(),
                node: holding.node.clone(),
                ..Slices::default()
            });
            let count = holding.last + 1 - holding.first;
            match holding.state {
                HoldingState::Held => entry.held += count,
                HoldingState::Draining => entry.draining += count,
                HoldingState::Quarantined => entry.resting += count,
            }
        }
    }
    found.into_values().collect()
}

/// Whether nothing is used any more.
pub fn is_empty(slices: &[Slices]) -> bool {
    slices.iter().all(|it| it.held == 0 && it.draining == 0)
}

/// How it comes on, in one line.
pub fn progress(slices: &[Slices]) -> String {
    let sum = |count: fn(&Slices) -> u32| slices.iter().map(count).sum::<u32>();
    format!(
        "{} held, {} draining, {} resting",
        sum(|it| it.held),
        sum(|it| it.draining),
        sum(|it| it.resting)
    )
}

/// What would be done.
pub fn preview(state: &State, target: &Target, undo: bool) -> Preview {
    let slices = slices(state, target);
    match target {
        Target::Node(name) => of_node(state, name, slices, undo),
        Target::Allocation(namespace, name) => of_allocation(state, namespace, name, slices, undo),
    }
}

fn of_node(state: &State, name: &str, slices: Vec<Slices>, undo: bool) -> Preview {
    let node = readable(&state.snapshot.nodes).into_iter().find(|it| it.name_any() == *name);
    let target = format!("node {name}");
    if undo {
        let steps = vec![format!("remove the label {LABEL} from the node"), "uncordon the node".to_owned()];
        let effects = vec!["an agent starts on it, and takes back slices as its pods need them".to_owned()];
        return Preview { target, steps, refused: Vec::new(), slices, effects };
    }
    let report = readable(&state.snapshot.egress_nodes).into_iter().find(|it| it.name_any() == *name);
    let pods = report.and_then(|it| it.status.as_ref()).map(|status| status.told.covered_pods);
    let mut refused = Vec::new();
    for address in alone(state, name) {
        refused.push(format!(
            "{address}: no other node holds slices of it, so its allocation would have nothing to leave from; give others some first (spec.sites, spec.ports.perNode)"
        ));
    }
    let mut steps = Vec::new();
    if node.is_some_and(|node| !is_cordoned(node)) {
        steps.push("cordon the node, so that others announce its addresses and no new pods come".to_owned());
    }
    steps.push(format!("label the node {LABEL}=true: the DaemonSet takes its agent off it, which stays until the slices are empty"));
    let mut effects = vec!["connections go on; new ones of its pods leave from the same addresses, through nodes that hold slices".to_owned()];
    if let Some(pods) = pods.filter(|pods| *pods > 0) {
        effects.push(format!(
            "{} on it: without an agent it follows no change any more, so move them away (`kubectl drain {name}`), which also empties the slices sooner",
            plural(pods as usize, "covered pod is", "covered pods are")
        ));
    }
    Preview { target, steps, refused, slices, effects }
}

fn is_cordoned(node: &Node) -> bool {
    node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true)
}

/// Addresses of which this node alone holds slices.
fn alone(state: &State, name: &str) -> Vec<String> {
    let addresses = readable(&state.snapshot.addresses).into_iter().filter(|address| {
        let mut held = address.spec.holdings.iter().filter(|it| it.state == HoldingState::Held).peekable();
        held.peek().is_some() && held.all(|it| it.node == name)
    });
    addresses.map(|address| address.spec.address.clone()).collect()
}

/// An allocation of a namespace.
pub fn allocation<'a>(state: &'a State, namespace: &str, name: &str) -> Option<&'a EgressAllocation> {
    let mut all = readable(&state.snapshot.allocations).into_iter();
    all.find(|it| it.namespace().as_deref() == Some(namespace) && it.name_any() == name)
}

fn of_allocation(state: &State, namespace: &str, name: &str, slices: Vec<Slices>, undo: bool) -> Preview {
    let target = format!("allocation {namespace}/{name}");
    if undo {
        let refused = vec![
            "a deletion cannot be undone: when it is over, make the allocation anew, with spec.addresses.explicit to get the same addresses".to_owned(),
        ];
        return Preview { target, steps: Vec::new(), refused, slices, effects: Vec::new() };
    }
    let mut refused = Vec::new();
    let bindings = readable(&state.snapshot.bindings).into_iter().filter(|it| {
        it.namespace().as_deref() == Some(namespace) && it.spec.allocation_ref.name == name && it.spec.enabled
    });
    for binding in bindings {
        refused.push(format!(
            "ZoneBinding {namespace}/{} leaves from it: what it covers would be refused at once; delete it, set spec.enabled: false, or name another allocation first",
            binding.name_any()
        ));
    }
    let mut effects =
        vec!["connections go on until they end; then the addresses are free for others".to_owned()];
    for policy in readable(&state.snapshot.policies) {
        let Some(egress) = &policy.spec.egress else { continue };
        let about = policy.spec.matches.identity.as_ref().is_none_or(|identity| {
            identity.namespaces.is_empty() || identity.namespaces.iter().any(|it| it == namespace)
        });
        if about && egress.primary == name {
            effects.push(match &egress.secondary {
                Some(secondary) => {
                    format!("EgressPolicy {}: pods of {namespace} leave from {secondary}", policy.name_any())
                }
                None => format!(
                    "EgressPolicy {}: pods of {namespace} that it matches are refused",
                    policy.name_any()
                ),
            });
        } else if about && egress.secondary.as_deref() == Some(name) {
            let primary = &egress.primary;
            effects.push(format!(
                "EgressPolicy {}: pods of {namespace} have no secondary any more: where {primary} has nothing to leave from, or no port, they are refused",
                policy.name_any()
            ));
        }
    }
    let steps =
        vec![format!("delete EgressAllocation {namespace}/{name}; it stays until its slices are empty")];
    Preview { target, steps, refused, slices, effects }
}

impl Answer for Preview {
    fn table(&self) -> String {
        let list = |title: &str, lines: &[String]| match lines.is_empty() {
            true => String::new(),
            false => {
                format!("{title}\n{}", lines.iter().map(|line| format!("  - {line}\n")).collect::<String>())
            }
        };
        let mut slices = Table::new(["ADDRESS", "NODE", "HELD", "DRAINING", "RESTING"]);
        for it in &self.slices {
            slices.row([
                it.address.clone(),
                it.node.clone(),
                it.held.to_string(),
                it.draining.to_string(),
                it.resting.to_string(),
            ]);
        }
        sections([
            list(&format!("{}:", self.target), &self.steps),
            list("what follows:", &self.effects),
            slices.text(),
            list("nothing is done, since", &self.refused),
            notes(&[]),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::state_of;

    #[test]
    fn policies_that_leave_from_an_allocation_are_told_also_where_it_is_their_secondary() {
        let policy = |name: &str, egress: &str| {
            format!(
                "{{apiVersion: aegis.dev/v1alpha1, kind: EgressPolicy, metadata: {{name: {name}}}, spec: {{precedence: 1, match: {{destination: {{cidrs: [0.0.0.0/0]}}}}, egress: {egress}}}}}\n---\n"
            )
        };
        let state = state_of(
            &[
                policy("alone", "{primary: main}"),
                policy("first", "{primary: main, secondary: spare}"),
                policy("second", "{primary: other, secondary: main}"),
                policy("without", "{primary: other}"),
            ]
            .concat(),
        );
        let told = preview(&state, &Target::Allocation("shop".into(), "main".into()), false).effects;
        assert_eq!(
            told[1..],
            [
                "EgressPolicy alone: pods of shop that it matches are refused",
                "EgressPolicy first: pods of shop leave from spare",
                "EgressPolicy second: pods of shop have no secondary any more: where other has nothing to leave from, or no port, they are refused",
            ]
        );
    }
}
