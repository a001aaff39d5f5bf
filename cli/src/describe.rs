//! Rules in a few words.

use aegis_core::policy::names::HostPattern;
use aegis_core::policy::{Binding, EgressPolicy, Exit, Expression, Operator, Posture, Workloads};
use ipnet::IpNet;
use std::collections::BTreeMap;

/// Entries to name before it is said how many more there are.
const FEW: usize = 3;

/// What a policy is about.
pub fn policy(policy: &EgressPolicy) -> String {
    let identity = &policy.identity;
    let mut parts = Vec::new();
    parts.extend(list("namespace", &identity.namespaces));
    parts.extend(labels(&identity.labels, &identity.expressions));
    parts.extend(list("service account", &identity.service_accounts));
    if parts.is_empty() {
        parts.push("all pods".to_owned());
    }
    if identity.host_network {
        parts.push("also of the host network".to_owned());
    }
    if identity.namespace_selector.is_some() {
        parts.push("by labels of the namespace".to_owned());
    }
    if policy.posture != Posture::default() {
        parts.push("by posture".to_owned());
    }
    parts.extend(list("from", &policy.sources));
    parts.extend(destination(&policy.cidrs));
    parts.extend(list("to", &policy.countries));
    parts.extend(hosts(&policy.hosts));
    parts.extend(list("to application", &policy.applications));
    parts.extend(list("port", &policy.ports));
    if policy.observes {
        parts.push("only observes".to_owned());
    }
    parts.join("; ")
}

/// What a policy does.
pub fn exit(exit: &Exit) -> String {
    match exit {
        Exit::Allocations { primary, secondary: None } => format!("leave from {primary}"),
        Exit::Allocations { primary, secondary: Some(secondary) } => {
            format!("leave from {primary}, else {secondary}")
        }
        Exit::Default => "node's address".to_owned(),
        Exit::Deny => "deny".to_owned(),
    }
}

/// What a binding is about.
pub fn binding(binding: &Binding) -> String {
    let mut parts = vec![workloads(&binding.workloads)];
    parts.extend(destination(&binding.cidrs));
    parts.extend(hosts(&binding.hosts));
    parts.extend(list("port", &binding.ports));
    parts.join("; ")
}

fn workloads(workloads: &Workloads) -> String {
    if workloads.all {
        return "all pods".to_owned();
    }
    let accounts = list("service account", &workloads.service_accounts);
    let parts: Vec<String> =
        labels(&workloads.labels, &workloads.expressions).into_iter().chain(accounts).collect();
    if parts.is_empty() { "no pods".to_owned() } else { parts.join("; ") }
}

fn labels(labels: &BTreeMap<String, String>, expressions: &[Expression]) -> Option<String> {
    let labels = labels.iter().map(|(key, value)| format!("{key}={value}"));
    let expressions = expressions.iter().map(|Expression { key, operator, values }| match operator {
        Operator::In => format!("{key} in ({})", values.join(",")),
        Operator::NotIn => format!("{key} notin ({})", values.join(",")),
        Operator::Exists => key.clone(),
        Operator::DoesNotExist => format!("!{key}"),
    });
    let all: Vec<String> = labels.chain(expressions).collect();
    (!all.is_empty()).then(|| all.join(","))
}

fn hosts(hosts: &[HostPattern]) -> Option<String> {
    let names: Vec<&str> = hosts.iter().map(HostPattern::as_str).collect();
    list("to", &names)
}

fn destination(cidrs: &[IpNet]) -> Option<String> {
    let everything = cidrs.len() == 2 && cidrs.iter().all(|range| range.prefix_len() == 0);
    if everything { None } else { list("to", cidrs) }
}

fn list<T: ToString>(what: &str, entries: &[T]) -> Option<String> {
    let named: Vec<String> = entries.iter().take(FEW).map(ToString::to_string).collect();
    let more = match entries.len().saturating_sub(FEW) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (!named.is_empty()).then(|| format!("{what} {}{more}", named.join(", ")))
}
