//! Selectors: which nodes belong to the sites of an allocation, which pods a binding covers, and which accounts a
//! delegation is for.

use crate::model::{Allocation, Node, Site};
use crate::policy::{Expression, Operator};
use std::collections::BTreeMap;

/// Labels of a Kubernetes object.
pub type Labels = BTreeMap<String, String>;

/// A label selector.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Labels that the object carries.
    pub labels: Labels,
    /// Further conditions on its labels.
    pub expressions: Vec<Expression>,
}

impl Selector {
    /// Whether it selects an object with these labels. One that asks for nothing selects nothing.
    pub fn matches(&self, labels: &Labels) -> bool {
        !(self.labels.is_empty() && self.expressions.is_empty())
            && matches_labels(&self.labels, labels)
            && self.expressions.iter().all(|expression| expression.matches(labels))
    }
}

/// Whether the object carries all of the labels; no label at all is a match.
pub fn matches_labels(wanted: &Labels, labels: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The site to which a node with these labels belongs: its place among the names of the sites. A node that matches
/// several belongs to the first by name. Without sites all nodes are one site.
pub fn site_of(sites: &BTreeMap<String, Site>, labels: &Labels) -> Option<usize> {
    if sites.is_empty() {
        return Some(0);
    }
    sites.values().position(|site| matches_labels(&site.selector, labels))
}

/// The site whose slices the node may hold, see [`site_of`]. A node that its agent is leaving belongs to none.
pub fn serves(sites: &BTreeMap<String, Site>, node: &Node) -> Option<usize> {
    if node.leaving {
        return None;
    }
    site_of(sites, &node.labels)
}

/// Whether the node may hold slices of the allocation.
pub fn matches_sites(allocation: &Allocation, node: &Node) -> bool {
    serves(&allocation.sites, node).is_some()
}

impl Expression {
    /// Whether the labels satisfy the expression, as Kubernetes defines it: a missing label is `NotIn` everything.
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => !value.is_some_and(|value| self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}
