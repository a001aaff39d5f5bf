//! Rules in a few words.

use aegis_core::policy::names::HostPattern;
use aegis_core::policy::{Binding, ConditionIs, EgressPolicy, Exit, Expression, Operator, Workloads};
use aegis_core::selector::Selector;
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
    parts.extend(selected("of namespaces", identity.namespace_selector.as_ref()));
    parts.extend(selected("on nodes", policy.posture.node.as_ref()));
    parts.extend(conditions("where the node is", &policy.posture.node_conditions));
    parts.extend(conditions("where the pod is", &policy.posture.pod_conditions));
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

/// What is asked of the labels of something.
fn selected(what: &str, selector: Option<&Selector>) -> Option<String> {
    let Selector { labels: equal, expressions } = selector?;
    Some(
        labels(equal, expressions)
            .map_or_else(|| format!("{what}: none"), |asked| format!("{what} with {asked}")),
    )
}

fn conditions(what: &str, wanted: &[ConditionIs]) -> Option<String> {
    let wanted: Vec<String> = wanted.iter().map(|it| format!("{}={}", it.kind, it.status)).collect();
    list(what, &wanted)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::state_of;

    #[test]
    fn labels_of_namespaces_and_posture_are_told() {
        let state = state_of(
            "
{apiVersion: aegis.dev/v1alpha1, kind: EgressPolicy, metadata: {name: p}, spec: {precedence: 1, action: Deny, match: {
 identity: {namespaceSelector: {matchLabels: {tier: regulated}, matchExpressions: [{key: legacy, operator: DoesNotExist}]}},
 posture: {nodeSelector: {matchExpressions: [{key: attested, operator: NotIn, values: ['yes']}]},
  nodeConditions: [{type: Attested, status: 'False'}], podConditions: [{type: Scanned, status: 'True'}, {type: Ready, status: 'True'}]},
 destination: {cidrs: [198.51.100.0/24]}}}}
",
        );
        let rules = state.rules();
        assert_eq!(
            policy(&rules.policies()[0]),
            "all pods; of namespaces with tier=regulated,!legacy; on nodes with attested notin (yes); where the node is Attested=False; \
             where the pod is Scanned=True, Ready=True; to 198.51.100.0/24"
        );
    }
}
