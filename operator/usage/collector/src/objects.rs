//! Objects of the cluster, as questions are answered about them.

use crate::words::{destinations, pods};
use aegis_core::selector::{Labels, matches_labels};
use aegis_crds as crds;
use aegis_crds::{EgressAddress, EgressAllocation, EgressPolicy, HoldingState, PolicyAction, PolicyMode};
use aegis_usage::cluster::{Address, Allocation, Cluster, Condition, Holding, Policy, Site, State};
use ipnet::IpNet;
use kube::ResourceExt;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// What is told of these objects. `nodes` are the labels of nodes, by name.
pub fn cluster<'a>(
    allocations: impl Iterator<Item = &'a EgressAllocation>,
    addresses: impl Iterator<Item = &'a EgressAddress>,
    policies: impl Iterator<Item = &'a EgressPolicy>,
    nodes: &BTreeMap<String, Labels>,
) -> Cluster {
    let allocations: BTreeMap<(String, String), &EgressAllocation> =
        allocations.map(|it| ((it.namespace().unwrap_or_default(), it.name_any()), it)).collect();
    let mut names = Names::default();
    let mut seen: Vec<Address> = addresses
        .filter_map(|it| {
            let of = &it.spec.allocation_ref;
            let allocation = allocations.get(&(of.namespace.clone(), of.name.clone())).copied();
            address(it, allocation, nodes, &mut names)
        })
        .collect();
    seen.sort_by_key(|it| it.range);
    let mut ordered: Vec<&EgressPolicy> = policies.collect();
    ordered.sort_by_key(|it| (it.spec.precedence, it.name_any()));
    Cluster {
        allocations: allocations.iter().map(|((account, name), it)| allocation(account, name, it)).collect(),
        addresses: seen,
        policies: (1..).zip(ordered).map(|(order, it)| policy(order, it)).collect(),
    }
}

/// Names that many holdings share.
#[derive(Default)]
struct Names(HashMap<String, Arc<str>>);

impl Names {
    fn get(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.0.get(name) {
            return known.clone();
        }
        let new: Arc<str> = name.into();
        self.0.insert(name.into(), new.clone());
        new
    }
}

fn allocation(account: &str, name: &str, it: &EgressAllocation) -> Allocation {
    let status = it.status.clone().unwrap_or_default();
    let site = |it: &crds::SiteStatus| Site {
        name: it.name.clone(),
        nodes: it.nodes,
        slices: it.slices,
        held: it.slices_held,
    };
    Allocation {
        account: account.into(),
        name: name.into(),
        addresses: status.addresses.iter().map(|it| it.address.clone()).collect(),
        sites: status.sites.iter().map(site).collect(),
        first_port: it.spec.ports.first,
        last_port: it.spec.ports.last,
        target_percent: it.spec.capacity.target_percent,
        conditions: conditions(&status.conditions),
    }
}

fn address(
    it: &EgressAddress,
    allocation: Option<&EgressAllocation>,
    nodes: &BTreeMap<String, Labels>,
    names: &mut Names,
) -> Option<Address> {
    let text = &it.spec.address;
    let range =
        text.parse::<IpNet>().ok().or_else(|| text.parse::<std::net::IpAddr>().ok().map(IpNet::from))?;
    let mut holding = |it: &crds::Holding| Holding {
        first: it.first,
        last: it.last,
        node: names.get(&it.node),
        site: names.get(allocation.map_or("", |of| site(of, nodes.get(&it.node)))),
        state: match it.state {
            HoldingState::Held => State::Held,
            HoldingState::Draining => State::Draining,
            HoldingState::Quarantined => State::Quarantined,
        },
        until: it.until.as_ref().map(|time| time.0.as_second()),
    };
    // Ports are nothing to a /64: each of its slices may be a node's.
    let single = range.prefix_len() == range.max_prefix_len();
    let ports = allocation.map(|of| &of.spec.ports).filter(|_| single);
    Some(Address {
        range,
        account: it.spec.allocation_ref.namespace.clone(),
        allocation: it.spec.allocation_ref.name.clone(),
        prefix: it.spec.prefix.clone(),
        epoch: it.spec.epoch,
        holdings: it.spec.holdings.iter().map(&mut holding).collect(),
        first: ports.map_or(4, |ports| ports.first / 256),
        last: ports.map_or(255, |ports| ports.last / 256),
        target_percent: allocation.map(|of| of.spec.capacity.target_percent),
        conditions: it.status.iter().flat_map(|status| conditions(&status.conditions)).collect(),
    })
}

/// The site of a node: the first by name whose labels it has. Without sites, or of a node that is gone, none.
fn site<'a>(allocation: &'a EgressAllocation, labels: Option<&Labels>) -> &'a str {
    let Some(labels) = labels else { return "" };
    let fits = allocation.spec.sites.iter().filter(|site| matches_labels(&site.node_selector, labels));
    fits.map(|site| site.name.as_str()).min().unwrap_or_default()
}

fn policy(order: u32, it: &EgressPolicy) -> Policy {
    let identity = it.spec.matches.identity.as_ref();
    let egress = it.spec.egress.iter().flat_map(|it| [Some(&it.primary), it.secondary.as_ref()]);
    let action = match it.spec.action {
        PolicyAction::Egress => "Egress",
        PolicyAction::Default => "Default",
        PolicyAction::Deny => "Deny",
    };
    Policy {
        order,
        name: it.name_any(),
        precedence: it.spec.precedence,
        action: action.into(),
        observes: it.spec.mode == PolicyMode::Observe,
        egress: egress.flatten().cloned().collect(),
        accounts: identity.map(|it| it.namespaces.clone()).unwrap_or_default(),
        pods: pods(&it.spec.matches),
        destinations: it.spec.matches.destination.as_ref().map(destinations).unwrap_or_default(),
        matched: it.status.as_ref().map(|it| it.pods),
        conditions: it.status.iter().flat_map(|status| conditions(&status.conditions)).collect(),
    }
}

fn conditions(of: &[crds::Condition]) -> Vec<Condition> {
    let read = |it: &crds::Condition| Condition {
        kind: it.type_.clone(),
        status: it.status.clone(),
        reason: it.reason.clone(),
        message: it.message.clone(),
        since: it.last_transition_time.0.as_second(),
    };
    of.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, from_value, json};

    fn address(text: &str, account: &str, holdings: Value) -> EgressAddress {
        from_value(json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressAddress", "metadata": {"name": "a"},
            "spec": {
                "address": text, "prefix": "lent", "epoch": 9, "holdings": holdings,
                "allocationRef": {"namespace": account, "name": "partner"},
            },
        }))
        .unwrap()
    }

    fn policy(name: &str, precedence: i32) -> EgressPolicy {
        from_value(json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": name},
            "spec": {
                "precedence": precedence, "action": "Egress", "egress": {"primary": "a", "secondary": "b"},
                "match": {"identity": {"namespaces": ["shop"]}},
            },
        }))
        .unwrap()
    }

    #[test]
    fn an_address_knows_its_allocation_and_its_nodes_sites() {
        let allocation: EgressAllocation = from_value(json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressAllocation",
            "metadata": {"name": "partner", "namespace": "shop"},
            "spec": {
                "prefixes": ["lent"], "ports": {"first": 32_768, "last": 65_535}, "capacity": {"targetPercent": 60},
                "sites": [
                    {"name": "west", "nodeSelector": {"disk": "ssd"}},
                    {"name": "east", "nodeSelector": {"zone": "e", "disk": "ssd"}},
                ],
            },
        }))
        .unwrap();
        let held = |node: &str| json!({"first": 128, "last": 130, "node": node, "epoch": 9, "state": "Held"});
        let both = address("192.0.2.7", "shop", json!([held("n1"), held("gone")]));
        let orphan = address("192.0.2.6", "other", json!([held("n1")]));
        let wide = address("2001:db8:1:2::/64", "shop", json!([]));
        let labels = |pairs: &[(&str, &str)]| -> Labels {
            pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
        };
        let nodes = BTreeMap::from([("n1".to_owned(), labels(&[("zone", "e"), ("disk", "ssd")]))]);
        let one = address("2001:db8::7", "shop", json!([held("n1")]));
        let objects = [both, orphan, wide, one];
        let known = cluster([&allocation].into_iter(), objects.iter(), [].into_iter(), &nodes);
        let of = |at: usize| &known.addresses[at];
        assert_eq!((of(0).target_percent, of(0).first, of(0).last), (None, 4, 255), "its allocation is gone");
        assert_eq!((of(1).target_percent, of(1).first, of(1).last), (Some(60), 128, 255));
        let sites: Vec<_> = of(1).holdings.iter().map(|it| &*it.site).collect();
        assert_eq!(
            sites,
            ["east", ""],
            "of two sites the first by name; nobody knows where a node was that is gone"
        );
        assert_eq!((of(3).range.to_string().as_str(), of(3).first), ("2001:db8:1:2::/64", 4));
        assert_eq!(
            (of(2).range.to_string().as_str(), of(2).first, of(2).last),
            ("2001:db8::7/128", 128, 255)
        );
        assert_eq!(known.allocations[0].account, "shop");
    }

    #[test]
    fn policies_are_in_their_order() {
        let objects = [policy("b", 10), policy("a", 10), policy("z", 1)];
        let known = cluster([].into_iter(), [].into_iter(), objects.iter(), &BTreeMap::new());
        let order: Vec<_> = known.policies.iter().map(|it| (it.order, it.name.as_str())).collect();
        assert_eq!(order, [(1, "z"), (2, "a"), (3, "b")]);
        assert_eq!(
            (&known.policies[0].egress, &known.policies[0].accounts),
            (&vec!["a".into(), "b".into()], &vec!["shop".into()])
        );
    }
}
