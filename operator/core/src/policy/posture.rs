//! Posture: in which state a pod and its node are.

use super::rules::Pod;
use crate::selector::{Labels, Selector};
use std::collections::BTreeMap;

/// Conditions of an object: status by type.
pub type Conditions = BTreeMap<String, String>;

/// Status of a condition that an object does not have.
const UNKNOWN: &str = "Unknown";

/// What policies may ask of the node that its pods run on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its labels.
    pub labels: Labels,
    /// Its conditions.
    pub conditions: Conditions,
}

/// What is asked of a pod and its node: all of it. Nothing given = any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Posture {
    /// Of the node's labels.
    pub node: Option<Selector>,
    /// Of the node's conditions.
    pub node_conditions: Vec<ConditionIs>,
    /// Of the pod's.
    pub pod_conditions: Vec<ConditionIs>,
}

/// Asks that a condition has a status. One that is not there is `Unknown`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConditionIs {
    /// Type of the condition.
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

impl ConditionIs {
    fn holds(&self, conditions: &Conditions) -> bool {
        self.found(conditions) == self.status
    }

    /// The status that the condition has.
    pub(super) fn found<'a>(&self, conditions: &'a Conditions) -> &'a str {
        conditions.get(&self.kind).map_or(UNKNOWN, String::as_str)
    }
}

impl Posture {
    /// Whether the pod and the node are in this state.
    pub fn matches(&self, pod: &Pod, node: &NodeFacts) -> bool {
        self.node.as_ref().is_none_or(|selector| selector.matches(&node.labels))
            && self.node_conditions.iter().all(|wanted| wanted.holds(&node.conditions))
            && self.pod_conditions.iter().all(|wanted| wanted.holds(&pod.conditions))
    }

    /// Whether everything that the other one matches is matched by this one, as far as that can be told without looking at values.
    pub(super) fn covers(&self, narrow: &Posture) -> bool {
        let all = |wide: &[ConditionIs], narrow: &[ConditionIs]| wide.iter().all(|it| narrow.contains(it));
        asks_less(self.node.as_ref(), narrow.node.as_ref())
            && all(&self.node_conditions, &narrow.node_conditions)
            && all(&self.pod_conditions, &narrow.pod_conditions)
    }
}

/// Whether a selector asks for nothing that the other one does not ask for too.
pub(super) fn asks_less(wide: Option<&Selector>, narrow: Option<&Selector>) -> bool {
    let Some(wide) = wide else { return true };
    narrow.is_some_and(|narrow| {
        wide.labels.iter().all(|(key, value)| narrow.labels.get(key) == Some(value))
            && wide.expressions.iter().all(|expression| narrow.expressions.contains(expression))
    })
}
