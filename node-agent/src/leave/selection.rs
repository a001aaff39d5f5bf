//! Whether a DaemonSet wants its pod on a node, by the node's labels and name as the DaemonSet controller looks at them.

use aegis_core::selector::{Labels, matches_labels};
use aegis_crds::rules::expression;
use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, PodSpec};
use std::cmp::Ordering;

/// The one field that a selector can name.
const NAME: &str = "metadata.name";

/// Whether the node selector and the required node affinity of a pod's template select the node. What this version does not
/// know counts as met. Taints are not looked at.
pub fn selects(template: &PodSpec, node: &Node) -> bool {
    let labels = node.metadata.labels.clone().unwrap_or_default();
    let fields: Labels = node.metadata.name.iter().map(|name| (NAME.to_owned(), name.clone())).collect();
    let affinity = template.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required =
        affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    template.node_selector.as_ref().is_none_or(|wanted| matches_labels(wanted, &labels))
        && required.is_none_or(|it| it.node_selector_terms.iter().any(|term| is_met(term, &labels, &fields)))
}

/// A term without a requirement selects nothing.
fn is_met(term: &NodeSelectorTerm, labels: &Labels, fields: &Labels) -> bool {
    let of_labels = term.match_expressions.iter().flatten().map(|it| (it, labels));
    let mut all = of_labels.chain(term.match_fields.iter().flatten().map(|it| (it, fields))).peekable();
    all.peek().is_some() && all.all(|(requirement, labels)| matches(requirement, labels))
}

fn matches(requirement: &NodeSelectorRequirement, labels: &Labels) -> bool {
    let NodeSelectorRequirement { key, operator, values } = requirement;
    let values = values.clone().unwrap_or_default();
    match operator.as_str() {
        "Gt" => compares(labels.get(key), values.first(), Ordering::Greater),
        "Lt" => compares(labels.get(key), values.first(), Ordering::Less),
        _ => expression(key, operator, values).is_none_or(|expression| expression.matches(labels)),
    }
}

/// Both as whole numbers; what is none compares with nothing.
fn compares(label: Option<&String>, value: Option<&String>, expected: Ordering) -> bool {
    let number = |text: Option<&String>| text.and_then(|text| text.parse::<i64>().ok());
    number(label).zip(number(value)).is_some_and(|(label, value)| label.cmp(&value) == expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Node n1 in zone a, on floor 7.
    fn selected(selector: Value, terms: Value) -> bool {
        let node = json!({"metadata": {"name": "n1", "labels": {"zone": "a", "floor": "7", "name": "x"}}});
        let required = json!({"nodeSelectorTerms": terms});
        let affinity = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}});
        let mut template = json!({"containers": [], "nodeSelector": selector});
        if !terms.is_null() {
            template["affinity"] = affinity;
        }
        selects(&serde_json::from_value(template).unwrap(), &serde_json::from_value(node).unwrap())
    }

    #[test]
    fn every_label_of_the_selector_must_be_there() {
        let cases = [
            (Value::Null, true),
            (json!({}), true),
            (json!({"zone": "a"}), true),
            (json!({"zone": "a", "floor": "7"}), true),
            (json!({"zone": "a", "floor": "8"}), false),
            (json!({"room": ""}), false),
        ];
        for (selector, expected) in cases {
            assert_eq!(selected(selector.clone(), Value::Null), expected, "{selector}");
        }
    }

    #[test]
    fn each_operator_is_that_of_kubernetes() {
        let cases = [
            ("zone", "In", json!(["a", "b"]), true),
            ("zone", "In", json!(["b"]), false),
            ("room", "In", json!(["b"]), false),
            ("zone", "NotIn", json!(["b"]), true),
            ("zone", "NotIn", json!(["a", "b"]), false),
            ("room", "NotIn", json!(["b"]), true),
            ("zone", "Exists", Value::Null, true),
            ("room", "Exists", Value::Null, false),
            ("room", "DoesNotExist", Value::Null, true),
            ("zone", "DoesNotExist", Value::Null, false),
            ("floor", "Gt", json!(["6"]), true),
            ("floor", "Gt", json!(["7"]), false),
            ("floor", "Gt", json!(["10"]), false),
            ("floor", "Lt", json!(["10"]), true),
            ("floor", "Lt", json!(["7"]), false),
            ("zone", "Lt", json!(["7"]), false),
            ("room", "Gt", json!(["-1"]), false),
            ("floor", "Gt", json!([]), false),
            ("zone", "Unheard", json!(["b"]), true),
        ];
        for (key, operator, values, expected) in cases {
            let requirement = json!({"key": key, "operator": operator, "values": values});
            let terms = json!([{"matchExpressions": [requirement]}]);
            assert_eq!(selected(Value::Null, terms), expected, "{requirement}");
        }
    }

    #[test]
    fn one_term_is_enough_and_needs_all_that_it_names() {
        let zone = |values: Value| json!({"key": "zone", "operator": "In", "values": values});
        let name = |operator: &str, names: Value| json!({"key": NAME, "operator": operator, "values": names});
        let met = json!({"matchExpressions": [zone(json!(["a"]))]});
        let unmet = json!({"matchExpressions": [zone(json!(["a"])), zone(json!(["b"]))]});
        let named = |name: Value| json!({"matchFields": [name]});
        let both =
            json!({"matchExpressions": [zone(json!(["a"]))], "matchFields": [name("In", json!(["n2"]))]});
        let cases = [
            (json!([met]), true),
            (json!([unmet]), false),
            (json!([unmet, met]), true),
            (json!([]), false),
            (json!([{}]), false),
            (json!([{}, met]), true),
            (json!([named(name("In", json!(["n1"])))]), true),
            (json!([named(name("In", json!(["n2"])))]), false),
            (json!([named(name("NotIn", json!(["n2"])))]), true),
            (json!([named(name("NotIn", json!(["n1"])))]), false),
            (json!([both]), false),
        ];
        for (terms, expected) in cases {
            assert_eq!(selected(Value::Null, terms.clone()), expected, "{terms}");
        }
        assert!(!selected(json!({"zone": "b"}), json!([met])), "selector and affinity");
    }
}
