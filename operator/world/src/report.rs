//! What agents report (`EgressNode`), in a form of which thousands fit into memory.
//!
//! Every node says of every address and binding what it has: of 5,000 nodes and 1,000 addresses those are five million lines.
//! But nearly all nodes say the same, so each list is kept once.

use aegis_core::egress::Egress;
use aegis_core::slice::SliceSet;
use aegis_crds::{
    EgressNode, EgressNodeStatus, Observed, ProgrammedAddress, ProgrammedBinding, ProgrammedPolicy,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::ClusterResourceScope;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

/// An `EgressNode` as it is kept.
#[derive(Clone, Debug, Deserialize)]
pub struct Report {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// Its status.
    pub status: Option<ReportStatus>,
}

/// What an agent says.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "EgressNodeStatus")]
pub struct ReportStatus {
    /// All but `addresses`, `bindings` and `policies`, which are empty here.
    pub told: EgressNodeStatus,
    /// What it has of addresses, ascending.
    pub addresses: Arc<[Programmed]>,
    /// Slices that are draining and carry no flow any more, by address.
    pub drained: Box<[(Egress, SliceSet)]>,
    /// What should be an address and is none.
    pub unreadable: Box<[String]>,
    /// Which generation it has of bindings and policies, ascending.
    pub rules: Arc<[Enforced]>,
    /// Pods that are covered, for those of `rules` that cover any: place in that list, number.
    pub pods: Box<[(usize, u32)]>,
    /// What policies that only observe would have done, by name.
    pub observed: Box<[(String, Observed)]>,
}

/// What a node has of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Programmed {
    /// Epoch.
    pub epoch: i64,
    /// The address.
    pub address: Egress,
    /// The data plane keeps its fence's deadline.
    pub fenced: bool,
}

/// What a node has of a binding or a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Enforced {
    /// Namespace (of a policy none) and name.
    pub rule: Box<str>,
    /// `metadata.generation`.
    pub generation: i64,
}

impl From<EgressNodeStatus> for ReportStatus {
    fn from(mut told: EgressNodeStatus) -> ReportStatus {
        let (mut addresses, mut drained, mut unreadable) = (Vec::new(), Vec::new(), Vec::new());
        for entry in std::mem::take(&mut told.addresses) {
            let Ok(address) = entry.address.parse() else {
                unreadable.push(entry.address);
                continue;
            };
            if !entry.drained.is_empty() {
                drained.push((address, drained_slices(&entry)));
            }
            addresses.push(Programmed { epoch: entry.epoch, address, fenced: entry.fenced });
        }
        addresses.sort_by_key(|entry| entry.address);
        let bindings = std::mem::take(&mut told.bindings).into_iter().map(enforced);
        let observed = told.policies.iter();
        let observed = observed.filter_map(|it| Some((it.name.clone(), it.observed?))).collect();
        let policies = std::mem::take(&mut told.policies).into_iter().map(enforced_policy);
        let mut listed: Vec<(Enforced, u32)> = bindings.chain(policies).collect();
        listed.sort_by(|(a, _), (b, _)| a.rule.cmp(&b.rule));
        let pods = listed.iter().map(|(_, pods)| *pods).enumerate().filter(|(_, pods)| *pods > 0);
        ReportStatus {
            observed,
            pods: pods.collect(),
            rules: listed.into_iter().map(|(enforced, _)| enforced).collect(),
            addresses: addresses.into(),
            drained: drained.into(),
            unreadable: unreadable.into(),
            told,
        }
    }
}

fn drained_slices(entry: &ProgrammedAddress) -> SliceSet {
    let slices = entry.drained.iter().flat_map(|range| range.first..=range.last.min(255));
    slices.filter_map(|slice| u8::try_from(slice).ok()).collect()
}

fn enforced(entry: ProgrammedBinding) -> (Enforced, u32) {
    let rule = rule_key(&entry.namespace, &entry.name).into();
    (Enforced { rule, generation: entry.generation }, entry.pods)
}

fn enforced_policy(entry: ProgrammedPolicy) -> (Enforced, u32) {
    let rule = rule_key("", &entry.name).into();
    (Enforced { rule, generation: entry.generation }, entry.pods)
}

/// How [`Enforced`] names a rule.
pub fn rule_key(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

impl ReportStatus {
    /// Slices of an address that are draining and carry no flow any more.
    pub fn drained(&self, address: Egress) -> SliceSet {
        let mut found = self.drained.iter().filter(|(drained, _)| *drained == address);
        found.next().map(|(_, slices)| *slices).unwrap_or_default()
    }
}

impl Resource for Report {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        EgressNode::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        EgressNode::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        EgressNode::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        EgressNode::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Lists that several reports have in common.
#[derive(Default)]
pub struct Lists {
    addresses: Pool<Programmed>,
    rules: Pool<Enforced>,
}

impl Lists {
    /// Gives a report that has just been read the lists that others have, where they are equal.
    pub fn share(&mut self, report: &mut Report) {
        if let Some(status) = &mut report.status {
            self.addresses.share(&mut status.addresses);
            self.rules.share(&mut status.rules);
        }
    }
}

struct Pool<T> {
    lists: HashSet<Arc<[T]>>,
    /// Number of lists at which those that nobody has any more are looked for.
    full: usize,
}

/// Fewer lists are not looked through.
const FEW: usize = 64;

impl<T> Default for Pool<T> {
    fn default() -> Pool<T> {
        Pool { lists: HashSet::new(), full: FEW }
    }
}

impl<T: Eq + Hash> Pool<T> {
    fn share(&mut self, list: &mut Arc<[T]>) {
        if let Some(known) = self.lists.get(&**list) {
            *list = known.clone();
            return;
        }
        if self.lists.len() >= self.full {
            self.lists.retain(|list| Arc::strong_count(list) > 1);
            self.full = (self.lists.len() * 2).max(FEW);
        }
        self.lists.insert(list.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report(epoch: i64, generation: i64, pods: u32) -> Report {
        let object = json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressNode", "metadata": {"name": "n1"}, "spec": {},
            "status": {
                "version": "1", "coveredPods": pods,
                "addresses": [
                    {"address": "203.0.113.9", "epoch": 3, "fenced": true},
                    {"address": "x", "epoch": 1},
                    {"address": "203.0.113.1", "epoch": epoch, "drained": [{"first": 250, "last": 999}]},
                ],
                "bindings": [
                    {"namespace": "shop", "name": "b", "generation": generation, "pods": pods},
                    {"namespace": "shop", "name": "a", "generation": 2},
                ],
                "policies": [{"name": "a", "generation": 5, "pods": 1}],
            },
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn lists_are_read_in_order() {
        let status = report(7, 4, 2).status.unwrap();
        assert_eq!((status.told.version.as_str(), status.told.covered_pods), ("1", 2));
        assert!(status.told.addresses.is_empty() && status.told.bindings.is_empty());
        let entry = |last, epoch, fenced| Programmed {
            epoch,
            address: Egress::V4(std::net::Ipv4Addr::new(203, 0, 113, last)),
            fenced,
        };
        assert_eq!(*status.addresses, [entry(1, 7, false), entry(9, 3, true)]);
        assert_eq!(status.drained(entry(1, 0, false).address), SliceSet::range(250, 255));
        assert_eq!(status.drained(entry(9, 0, false).address), SliceSet::default());
        assert_eq!(*status.unreadable, ["x".to_owned()]);
        let names: Vec<(&str, i64)> = status.rules.iter().map(|it| (&*it.rule, it.generation)).collect();
        assert_eq!(names, [("/a", 5), ("shop/a", 2), ("shop/b", 4)]);
        assert_eq!(*status.pods, [(0, 1), (2, 2)]);
    }

    #[test]
    fn equal_lists_are_one_and_forgotten_with_the_last_report() {
        let mut lists = Lists::default();
        let mut read = |epoch, generation, pods| {
            let mut report = report(epoch, generation, pods);
            lists.share(&mut report);
            report.status.unwrap()
        };
        let (a, b, c) = (read(7, 4, 2), read(7, 4, 0), read(8, 4, 2));
        assert!(Arc::ptr_eq(&a.addresses, &b.addresses) && Arc::ptr_eq(&a.rules, &b.rules));
        assert!(!Arc::ptr_eq(&a.addresses, &c.addresses) && Arc::ptr_eq(&a.rules, &c.rules));
        for epoch in 10..1_000 {
            read(epoch, 4, 0);
        }
        assert!(Arc::ptr_eq(&a.addresses, &read(7, 4, 0).addresses), "it is still in use");
        assert!(lists.addresses.lists.len() <= FEW, "{}", lists.addresses.lists.len());
    }
}
