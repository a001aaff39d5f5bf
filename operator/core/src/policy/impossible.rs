//! What no pod can ever satisfy.

use super::posture::ConditionIs;
use super::rules::{EgressPolicy, Expression};
use crate::selector::{Labels, Selector};
use std::collections::BTreeSet;

/// The field of a policy that asks for what contradicts itself, so that it matches nothing whatever there is in the cluster.
pub fn impossible(policy: &EgressPolicy) -> Option<&'static str> {
    let (identity, posture) = (&policy.identity, &policy.posture);
    let selector =
        |it: &Option<Selector>| it.as_ref().is_some_and(|it| contradicts(&it.labels, &it.expressions));
    let fields = [
        ("spec.match.identity.podSelector", contradicts(&identity.labels, &identity.expressions)),
        ("spec.match.identity.namespaceSelector", selector(&identity.namespace_selector)),
        ("spec.match.posture.nodeSelector", selector(&posture.node)),
        ("spec.match.posture.nodeConditions", differ(&posture.node_conditions)),
        ("spec.match.posture.podConditions", differ(&posture.pod_conditions)),
    ];
    fields.into_iter().find_map(|(field, impossible)| impossible.then_some(field))
}

/// Whether no labels satisfy all of it.
fn contradicts(labels: &Labels, expressions: &[Expression]) -> bool {
    let keys: BTreeSet<&String> = labels.keys().chain(expressions.iter().map(|it| &it.key)).collect();
    keys.into_iter().any(|key| {
        let asked: Vec<&Expression> = expressions.iter().filter(|it| it.key == *key).collect();
        let satisfies = |value: Option<&String>| {
            let object: Labels = value.map(|value| (key.clone(), value.clone())).into_iter().collect();
            labels.get(key).is_none_or(|wanted| value == Some(wanted))
                && asked.iter().all(|it| it.matches(&object))
        };
        // The values that are named, none at all, and one that nobody names: what else there may be is like that.
        let named = asked.iter().flat_map(|it| &it.values).chain(labels.get(key));
        let other = String::from("/");
        !(satisfies(None) || named.chain([&other]).any(|value| satisfies(Some(value))))
    })
}

/// Whether one condition is to have two statuses.
fn differ(conditions: &[ConditionIs]) -> bool {
    let other =
        |it: &ConditionIs| conditions.iter().any(|other| other.kind == it.kind && other.status != it.status);
    conditions.iter().any(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Operator;
    use proptest::prelude::*;

    fn expression() -> impl Strategy<Value = Expression> {
        let values = prop::collection::vec("[ab]", 1..3);
        ("[xy]", 0..4usize, values).prop_map(|(key, operator, values)| {
            let operators = [Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist];
            let operator = operators[operator];
            let has_values = matches!(operator, Operator::In | Operator::NotIn);
            Expression { key, operator, values: if has_values { values } else { Vec::new() } }
        })
    }

    proptest! {
        /// With two keys, two values that are named and a third, there are sixteen sets of labels that are told apart.
        #[test]
        fn labels_contradict_when_no_object_can_have_them(
            labels in prop::collection::btree_map("[xy]", "[ab]", 0..3),
            expressions in prop::collection::vec(expression(), 0..6),
        ) {
            let values = [None, Some("a"), Some("b"), Some("c")];
            let satisfied = values.iter().any(|x| values.iter().any(|y| {
                let pairs = [("x", x), ("y", y)];
                let object: Labels = pairs
                    .into_iter()
                    .filter_map(|(key, value)| Some((key.to_owned(), (*value)?.to_owned())))
                    .collect();
                crate::selector::matches_labels(&labels, &object) && expressions.iter().all(|it| it.matches(&object))
            }));
            prop_assert_eq!(contradicts(&labels, &expressions), !satisfied);
        }
    }

    #[test]
    fn a_condition_has_one_status() {
        let is = |kind: &str, status: &str| ConditionIs { kind: kind.into(), status: status.into() };
        assert!(differ(&[is("Ready", "True"), is("Attested", "True"), is("Ready", "False")]));
        assert!(!differ(&[is("Ready", "True"), is("Attested", "False"), is("Ready", "True")]));
    }
}
