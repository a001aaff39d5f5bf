//! What a policy is about, in words.

use aegis_crds::{ConditionMatch, Match, PolicyDestination, Posture, Protocol, ZonePort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// Entries of a list that are told; of more their number.
const MOST: usize = 12;

/// Which pods, namespaces by name aside. Empty: all.
pub fn pods(of: &Match) -> String {
    let mut parts = Vec::new();
    if let Some(identity) = &of.identity {
        parts.extend(
            identity.namespace_selector.as_ref().map(|it| format!("namespaces with {}", selector(it))),
        );
        parts.extend(identity.pod_selector.as_ref().map(|it| format!("pods with {}", selector(it))));
        parts.extend(list("service accounts", &identity.service_accounts));
        parts.extend(identity.host_network.then(|| "those of the host network, too".into()));
    }
    if let Some(posture) = &of.posture {
        let Posture { node_selector, node_conditions, pod_conditions } = posture;
        parts.extend(node_selector.as_ref().map(|it| format!("nodes with {}", selector(it))));
        parts.extend(list("nodes that are", &conditions(node_conditions)));
        parts.extend(list("pods that are", &conditions(pod_conditions)));
    }
    parts.extend(list("addresses in", &of.sources));
    parts.join("; ")
}

/// Which destinations. Empty: all.
pub fn destinations(of: &PolicyDestination) -> String {
    let mut parts = Vec::new();
    parts.extend(list("applications", &of.applications));
    parts.extend(list("", &of.cidrs));
    parts.extend(list("countries", &of.countries));
    parts.extend(list("hosts", &of.hosts));
    parts.extend(list("ports", &of.ports.iter().map(port).collect::<Vec<_>>()));
    parts.join("; ")
}

fn list(what: &str, entries: &[String]) -> Option<String> {
    let mut told = entries.iter().take(MOST).cloned().collect::<Vec<_>>().join(", ");
    if entries.len() > MOST {
        told += &format!(" and {} more", entries.len() - MOST);
    }
    (!entries.is_empty()).then(|| format!("{what} {told}").trim_start().to_owned())
}

fn port(it: &ZonePort) -> String {
    let protocol = match it.protocol {
        Protocol::TCP => "TCP",
        Protocol::UDP => "UDP",
        Protocol::ICMP => "ICMP",
    };
    match (it.port, it.end_port) {
        (Some(first), Some(end)) => format!("{protocol} {first} to {end}"),
        (Some(port), None) => format!("{protocol} {port}"),
        (None, _) => protocol.to_owned(),
    }
}

fn conditions(of: &[ConditionMatch]) -> Vec<String> {
    of.iter().map(|it| format!("{}={:?}", it.type_, it.status)).collect()
}

/// As `kubectl` has it.
fn selector(of: &LabelSelector) -> String {
    let labels = of.match_labels.iter().flatten().map(|(key, value)| format!("{key}={value}"));
    let expressions = of.match_expressions.iter().flatten().map(|it| {
        let values = it.values.iter().flatten().cloned().collect::<Vec<_>>().join(",");
        match it.operator.as_str() {
            "Exists" => it.key.clone(),
            "DoesNotExist" => format!("!{}", it.key),
            "NotIn" => format!("{} notin ({values})", it.key),
            _ => format!("{} in ({values})", it.key),
        }
    });
    let all: Vec<String> = labels.chain(expressions).collect();
    if all.is_empty() { "any labels".into() } else { all.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_value, json};

    #[test]
    fn a_match_is_told_in_words() {
        let of: Match = from_value(json!({
            "identity": {
                "namespaces": ["shop"], "serviceAccounts": ["web"], "hostNetwork": true,
                "podSelector": {"matchLabels": {"app": "web"}, "matchExpressions": [
                    {"key": "tier", "operator": "NotIn", "values": ["a", "b"]}, {"key": "old", "operator": "DoesNotExist"}]},
            },
            "posture": {"nodeConditions": [{"type": "Ready", "status": "True"}]},
            "sources": ["10.0.0.0/8"],
            "destination": {
                "cidrs": ["198.51.100.0/24"], "hosts": ["api.example.com"],
                "ports": [{"protocol": "TCP", "port": 443}, {"protocol": "UDP", "port": 1, "endPort": 9}],
            },
        }))
        .unwrap();
        assert_eq!(
            pods(&of),
            "pods with app=web,tier notin (a,b),!old; service accounts web; those of the host network, too; \
             nodes that are Ready=True; addresses in 10.0.0.0/8"
        );
        assert_eq!(
            of.destination.as_ref().map(destinations).unwrap(),
            "198.51.100.0/24; hosts api.example.com; ports TCP 443, UDP 1 to 9"
        );
        assert_eq!(
            (pods(&Match::default()), destinations(&PolicyDestination::default())),
            (String::new(), String::new())
        );
        let many = PolicyDestination { hosts: vec!["h".into(); 14], ..PolicyDestination::default() };
        assert!(destinations(&many).ends_with("h and 2 more"));
    }
}
