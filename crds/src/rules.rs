//! From what people write to the rules of `aegis_core::policy`, for whoever goes by them.

use crate::{
    BindingMode, ConditionMatch, ConditionStatus, EgressApplication, EgressPolicy, PolicyAction, PolicyMode,
    Protocol, WhenUnavailable, ZoneBinding, ZonePort,
};
use aegis_core::gateway::Place;
use aegis_core::model::AllocationName;
use aegis_core::policy::names::HostPattern;
use aegis_core::policy::{
    self, Binding, BindingName, ConditionIs, Conditions, Endpoint, Exit, Expression, Identity, NodeFacts,
    Operator, PortRange, Posture, Workloads,
};
use aegis_core::selector::Selector;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use std::net::IpAddr;

/// Why an object cannot be used: a field holds what it must not. The API server checks all of this, so it happens only if its schema
/// was changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: \"{value}\" is not {expected}")]
pub struct FieldError {
    /// Path of the field.
    pub field: &'static str,
    /// What it holds.
    pub value: String,
    /// What it should hold.
    pub expected: &'static str,
}

/// Says that a field holds what it must not.
pub fn wrong(field: &'static str, value: &str, expected: &'static str) -> FieldError {
    FieldError { field, value: value.to_owned(), expected }
}

/// Reads an EgressPolicy.
pub fn policy(object: &EgressPolicy) -> Result<policy::EgressPolicy, FieldError> {
    let spec = &object.spec;
    let identity = spec.matches.identity.clone().unwrap_or_default();
    let posture = spec.matches.posture.clone().unwrap_or_default();
    let destination = spec.matches.destination.clone().unwrap_or_default();
    let selector = identity.pod_selector.unwrap_or_default();
    let mut cidrs = ranges("spec.match.destination.cidrs", &destination.cidrs)?;
    let names = !(destination.countries.is_empty() && destination.hosts.is_empty());
    if cidrs.is_empty() && !names && destination.applications.is_empty() {
        cidrs = everything();
    }
    if !(destination.applications.is_empty() || destination.ports.is_empty()) {
        return Err(wrong(
            "spec.match.destination.ports",
            "given",
            "left out, as applications have their own",
        ));
    }
    let exit = match (spec.action, &spec.egress) {
        (PolicyAction::Egress, Some(egress)) => {
            Exit::Allocations { primary: egress.primary.clone(), secondary: egress.secondary.clone() }
        }
        (PolicyAction::Egress, None) => {
            return Err(wrong("spec.egress", "", "given, as action Egress needs it"));
        }
        (PolicyAction::Default, _) => Exit::Default,
        (PolicyAction::Deny, _) => Exit::Deny,
    };
    Ok(policy::EgressPolicy {
        name: object.metadata.name.clone().unwrap_or_default(),
        precedence: spec.precedence,
        identity: Identity {
            namespaces: identity.namespaces,
            namespace_selector: selector_of(
                "spec.match.identity.namespaceSelector.matchExpressions.operator",
                identity.namespace_selector,
            )?,
            labels: selector.match_labels.unwrap_or_default(),
            expressions: expressions(
                "spec.match.identity.podSelector.matchExpressions.operator",
                selector.match_expressions,
            )?,
            service_accounts: identity.service_accounts,
            host_network: identity.host_network,
        },
        posture: Posture {
            node: selector_of(
                "spec.match.posture.nodeSelector.matchExpressions.operator",
                posture.node_selector,
            )?,
            node_conditions: conditions(&posture.node_conditions),
            pod_conditions: conditions(&posture.pod_conditions),
        },
        sources: ranges("spec.match.sources", &spec.matches.sources)?,
        cidrs,
        countries: destination.countries,
        ports: ports(&destination.ports),
        hosts: hosts("spec.match.destination.hosts", &destination.hosts)?,
        applications: destination.applications,
        exit,
        observes: spec.mode == PolicyMode::Observe,
        generation: object.metadata.generation.unwrap_or(0),
    })
}

/// Reads an EgressApplication.
pub fn application(object: &EgressApplication) -> Result<Vec<Endpoint>, FieldError> {
    let endpoints = object.spec.endpoints.iter().map(|endpoint| {
        let hosts = hosts("spec.endpoints.hosts", &endpoint.hosts)?;
        let mut cidrs = ranges("spec.endpoints.cidrs", &endpoint.cidrs)?;
        if cidrs.is_empty() && hosts.is_empty() {
            cidrs = everything();
        }
        Ok(Endpoint { cidrs, hosts, ports: ports(&endpoint.ports) })
    });
    endpoints.collect()
}

fn everything() -> Vec<IpNet> {
    vec![Ipv4Net::default().into(), Ipv6Net::default().into()]
}

fn selector_of(field: &'static str, selector: Option<LabelSelector>) -> Result<Option<Selector>, FieldError> {
    let read = |selector: LabelSelector| {
        let expressions = expressions(field, selector.match_expressions)?;
        Ok(Selector { labels: selector.match_labels.unwrap_or_default(), expressions })
    };
    selector.map(read).transpose()
}

fn conditions(wanted: &[ConditionMatch]) -> Vec<ConditionIs> {
    let status = |status| match status {
        ConditionStatus::True => "True",
        ConditionStatus::False => "False",
        ConditionStatus::Unknown => "Unknown",
    };
    wanted.iter().map(|it| ConditionIs { kind: it.type_.clone(), status: status(it.status).into() }).collect()
}

/// Stands for a ZoneBinding that cannot be read: since nobody knows what it covers, pods of its account are refused whatever no
/// other binding covers. Its allocation has no name, and so never an address.
pub fn unreadable_binding(account: &str, name: &str) -> Binding {
    Binding {
        name: BindingName { account: account.to_owned(), name: name.to_owned() },
        allocation: AllocationName { account: account.to_owned(), name: String::new() },
        enabled: true,
        workloads: Workloads { all: true, ..Workloads::default() },
        cidrs: everything(),
        ports: Vec::new(),
        hosts: Vec::new(),
        use_node_address: false,
        binds: false,
        generation: 0,
    }
}

/// Reads a ZoneBinding. One that is being deleted counts as switched off.
pub fn binding(object: &ZoneBinding) -> Result<Binding, FieldError> {
    let account = text(object.metadata.namespace.as_ref());
    let name = BindingName { account: account.clone(), name: text(object.metadata.name.as_ref()) };
    let spec = &object.spec;
    let selector = spec.workloads.pod_selector.clone().unwrap_or_default();
    Ok(Binding {
        name,
        allocation: AllocationName { account, name: spec.allocation_ref.name.clone() },
        enabled: spec.enabled && object.metadata.deletion_timestamp.is_none(),
        workloads: Workloads {
            labels: selector.match_labels.unwrap_or_default(),
            expressions: expressions(
                "spec.workloads.podSelector.matchExpressions.operator",
                selector.match_expressions,
            )?,
            service_accounts: spec.workloads.service_accounts.clone(),
            all: spec.workloads.all_pods,
        },
        cidrs: ranges("spec.zone.cidrs", &spec.zone.cidrs)?,
        ports: ports(&spec.zone.ports),
        hosts: hosts("spec.zone.hosts", &spec.zone.hosts)?,
        use_node_address: spec.when_unavailable == WhenUnavailable::UseNodeAddress,
        binds: spec.mode == BindingMode::Bind,
        generation: object.metadata.generation.unwrap_or(0),
    })
}

/// Reads a Pod. What labels its namespace has it does not tell.
pub fn pod(pod: &Pod) -> policy::Pod {
    let spec = pod.spec.as_ref();
    let addresses = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref()).into_iter().flatten();
    policy::Pod {
        account: text(pod.metadata.namespace.as_ref()),
        name: text(pod.metadata.name.as_ref()),
        uid: text(pod.metadata.uid.as_ref()),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        service_account: text(spec.and_then(|spec| spec.service_account_name.as_ref())),
        addresses: addresses.filter_map(|address| address.ip.parse().ok()).collect(),
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
        namespace_labels: Default::default(),
        conditions: pod_conditions(pod),
    }
}

fn pod_conditions(pod: &Pod) -> Conditions {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let conditions = conditions.into_iter().flatten();
    conditions.map(|it| (it.type_.clone(), it.status.clone())).collect()
}

/// What policies may ask of a Node. Not when its conditions were told last: that changes all the time, and means nothing.
pub fn node_facts(node: &Node) -> NodeFacts {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    let conditions = conditions.into_iter().flatten();
    NodeFacts {
        labels: node.metadata.labels.clone().unwrap_or_default(),
        conditions: conditions.map(|it| (it.type_.clone(), it.status.clone())).collect(),
    }
}

/// Whether a pod has ended: its address may already be another's.
pub fn is_finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Ranges of a node's pods.
pub fn pod_ranges(node: &Node) -> Vec<IpNet> {
    let spec = node.spec.as_ref();
    let ranges = spec.and_then(|spec| spec.pod_cidrs.clone());
    let ranges = ranges.or_else(|| Some(vec![spec?.pod_cidr.clone()?])).unwrap_or_default();
    ranges.iter().filter_map(|range| range.parse().ok()).collect()
}

/// A node's own addresses inside the cluster.
pub fn node_addresses(node: &Node) -> impl Iterator<Item = IpAddr> {
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref()).into_iter().flatten();
    let internal = addresses.filter(|address| address.type_ == "InternalIP");
    internal.filter_map(|address| address.address.parse().ok())
}

/// Where a node is.
pub fn place(node: &Node) -> Place {
    let label = |name: &str| text(node.metadata.labels.as_ref().and_then(|labels| labels.get(name)));
    Place { zone: label("topology.kubernetes.io/zone"), region: label("topology.kubernetes.io/region") }
}

/// Protocol numbers of ICMP for IPv4 and IPv6.
const ICMP: [u8; 2] = [1, 58];

/// Reads a ServiceCIDR.
pub fn service_ranges(object: &ServiceCIDR) -> Vec<IpNet> {
    let ranges = object.spec.as_ref().and_then(|spec| spec.cidrs.as_ref()).into_iter().flatten();
    ranges.filter_map(|range| range.parse().ok()).collect()
}

fn text(value: Option<&String>) -> String {
    value.cloned().unwrap_or_default()
}

/// Reads ranges.
pub fn ranges(field: &'static str, ranges: &[String]) -> Result<Vec<IpNet>, FieldError> {
    ranges.iter().map(|range| range.parse().map_err(|_| wrong(field, range, "a CIDR"))).collect()
}

/// Reads host names.
pub fn hosts(field: &'static str, hosts: &[String]) -> Result<Vec<HostPattern>, FieldError> {
    let pattern = |host: &String| HostPattern::new(host).ok_or_else(|| wrong(field, host, "a host name"));
    hosts.iter().map(pattern).collect()
}

/// Reads the requirements of a label selector.
pub fn expressions(
    field: &'static str,
    requirements: Option<Vec<LabelSelectorRequirement>>,
) -> Result<Vec<Expression>, FieldError> {
    let requirements = requirements.into_iter().flatten();
    requirements
        .map(|it| {
            expression(&it.key, &it.operator, it.values.unwrap_or_default())
                .ok_or_else(|| wrong(field, &it.operator, "In, NotIn, Exists or DoesNotExist"))
        })
        .collect()
}

/// Reads ports.
pub fn ports(ports: &[ZonePort]) -> Vec<PortRange> {
    let ranges = |port: &ZonePort| {
        // ICMP has none: there it is the port 0.
        let (first, last) = match (port.port, port.protocol) {
            (_, Protocol::ICMP) => (0, 0),
            (Some(first), _) => (first, port.end_port.unwrap_or(first)),
            (None, _) => (0, u16::MAX),
        };
        let protocols: &[u8] = match port.protocol {
            Protocol::TCP => &[6],
            Protocol::UDP => &[17],
            Protocol::ICMP => &ICMP,
        };
        protocols.iter().map(move |protocol| PortRange { protocol: *protocol, first, last })
    };
    ports.iter().flat_map(ranges).collect()
}

/// A requirement of a label selector; nothing if the operator is none of those that all selectors have.
pub fn expression(key: &str, operator: &str, values: Vec<String>) -> Option<Expression> {
    let operator = match operator {
        "In" => Operator::In,
        "NotIn" => Operator::NotIn,
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        _ => return None,
    };
    Some(Expression { key: key.to_owned(), operator, values })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(spec: Value) -> Result<policy::EgressPolicy, FieldError> {
        let metadata = json!({"name": "p", "generation": 4});
        let object = json!({"apiVersion": "aegis.dev/v1alpha1", "kind": "EgressPolicy", "metadata": metadata, "spec": spec});
        policy(&serde_json::from_value(object).expect("a policy"))
    }

    #[test]
    fn a_policy_that_names_nothing_is_about_everything() {
        let policy = read(json!({"precedence": 3, "action": "Deny"})).expect("a rule");
        assert_eq!((policy.name.as_str(), policy.precedence, policy.generation), ("p", 3, 4));
        assert_eq!(policy.identity, Identity::default());
        let everything: Vec<String> = policy.cidrs.iter().map(ToString::to_string).collect();
        assert_eq!(everything, ["0.0.0.0/0", "::/0"]);
        assert!(policy.sources.is_empty() && policy.ports.is_empty());
        assert_eq!(policy.exit, Exit::Deny);
    }

    #[test]
    fn what_it_names_is_read() {
        let policy = read(json!({
            "precedence": 0,
            "match": {
                "identity": {
                    "namespaces": ["shop"],
                    "namespaceSelector": {"matchLabels": {"tier": "gold"}},
                    "podSelector": {
                        "matchLabels": {"app": "web"},
                        "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["test"]}],
                    },
                    "serviceAccounts": ["web"],
                    "hostNetwork": true,
                },
                "sources": ["10.244.1.0/24"],
                "destination": {"cidrs": ["198.51.100.0/24"], "ports": [{"protocol": "UDP", "port": 53}, {"port": 1, "endPort": 9}]},
            },
            "egress": {"primary": "a", "secondary": "b"},
        }));
        let policy = policy.expect("a rule");
        let expression =
            Expression { key: "tier".into(), operator: Operator::NotIn, values: vec!["test".into()] };
        let identity = Identity {
            namespaces: vec!["shop".into()],
            namespace_selector: Some(Selector { labels: one("tier", "gold"), ..Selector::default() }),
            labels: one("app", "web"),
            expressions: vec![expression],
            service_accounts: vec!["web".into()],
            host_network: true,
        };
        assert_eq!(policy.identity, identity);
        assert_eq!((policy.posture, policy.observes), (Posture::default(), false));
        assert_eq!(
            (policy.sources[0].to_string(), policy.cidrs[0].to_string()),
            ("10.244.1.0/24".into(), "198.51.100.0/24".into())
        );
        let ports =
            [PortRange { protocol: 17, first: 53, last: 53 }, PortRange { protocol: 6, first: 1, last: 9 }];
        assert_eq!(policy.ports, ports);
        assert_eq!(policy.exit, Exit::Allocations { primary: "a".into(), secondary: Some("b".into()) });
    }

    #[test]
    fn a_protocol_without_a_port_is_all_of_it_and_of_icmp_both() {
        let read = |port: serde_json::Value| {
            let read = ports(&[serde_json::from_value(port).unwrap()]);
            read.into_iter().map(|it| (it.protocol, it.first, it.last)).collect::<Vec<_>>()
        };
        assert_eq!(read(json!({"protocol": "UDP"})), [(17, 0, u16::MAX)]);
        assert_eq!(read(json!({})), [(6, 0, u16::MAX)]);
        assert_eq!(read(json!({"protocol": "ICMP"})), [(1, 0, 0), (58, 0, 0)]);
    }

    fn one(key: &str, value: &str) -> aegis_core::selector::Labels {
        [(key.to_owned(), value.to_owned())].into()
    }

    #[test]
    fn posture_countries_and_mode_are_read() {
        let policy = read(json!({
            "precedence": 0, "action": "Deny", "mode": "Observe",
            "match": {
                "posture": {
                    "nodeSelector": {"matchExpressions": [{"key": "attested", "operator": "DoesNotExist"}]},
                    "nodeConditions": [{"type": "Attested", "status": "Unknown"}],
                    "podConditions": [{"type": "Ready", "status": "True"}, {"type": "Scanned", "status": "False"}],
                },
                "destination": {"countries": ["NZ"]},
            },
        }));
        let policy = policy.expect("a rule");
        assert!(policy.observes && policy.cidrs.is_empty(), "of a country, not of everything");
        assert_eq!(policy.countries, ["NZ"]);
        let is = |kind: &str, status: &str| ConditionIs { kind: kind.into(), status: status.into() };
        let lacks = Expression { key: "attested".into(), operator: Operator::DoesNotExist, values: vec![] };
        let posture = Posture {
            node: Some(Selector { expressions: vec![lacks], ..Selector::default() }),
            node_conditions: vec![is("Attested", "Unknown")],
            pod_conditions: vec![is("Ready", "True"), is("Scanned", "False")],
        };
        assert_eq!(policy.posture, posture);
    }

    #[test]
    fn what_belongs_to_applications_is_all_that_a_policy_with_them_names() {
        let of = |destination: Value| {
            read(json!({"precedence": 1, "action": "Deny", "match": {"destination": destination}}))
        };
        let policy = of(json!({"applications": ["crm"]})).expect("a rule");
        assert_eq!(policy.applications, ["crm"]);
        assert!(policy.cidrs.is_empty(), "not everything");
        let error = of(json!({"applications": ["crm"], "ports": [{"port": 1}]})).expect_err("no rule");
        assert_eq!(error.field, "spec.match.destination.ports");
        let application = |endpoints: Value| {
            let object = json!({
                "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressApplication", "metadata": {"name": "crm"},
                "spec": {"endpoints": endpoints},
            });
            application(&serde_json::from_value(object).expect("an application"))
        };
        let endpoints = application(json!([
            {"cidrs": ["198.51.100.0/24"], "ports": [{"port": 443}]},
            {"hosts": ["*.example.com"]},
            {"ports": [{"protocol": "UDP", "port": 53}]},
        ]));
        let endpoints = endpoints.expect("endpoints");
        let sizes: Vec<_> =
            endpoints.iter().map(|it| (it.cidrs.len(), it.hosts.len(), it.ports.len())).collect();
        assert_eq!(sizes, [(1, 0, 1), (0, 1, 0), (2, 0, 1)], "of ports alone: everywhere");
        let error = application(json!([{"cidrs": ["x"]}])).expect_err("no range");
        assert_eq!(error.to_string(), "spec.endpoints.cidrs: \"x\" is not a CIDR");
    }

    #[test]
    fn what_makes_no_sense_names_the_field() {
        let of = |spec| read(spec).expect_err("no rule").to_string();
        let error = of(json!({"precedence": 1, "match": {"sources": ["x"]}, "action": "Deny"}));
        assert_eq!(error, "spec.match.sources: \"x\" is not a CIDR");
        assert!(of(json!({"precedence": 1})).starts_with("spec.egress: "));
    }
}
