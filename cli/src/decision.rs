//! Where packets of a pod leave: by the code of the agents (`aegis_core::policy`), from the addresses as they stand or as they are
//! planned.

use crate::state::State;
use aegis_core::egress::{Egress, Family};
use aegis_core::gateway::{self, Holder, Load};
use aegis_core::holding::Rights;
use aegis_core::model::{Address, AllocationName, State as Holds};
use aegis_core::policy::names::{Learned, Resolved};
use aegis_core::policy::{
    Applications, Binding, EgressPolicy, Explanation, Packet, Pod, PolicyInputs, explain, patterns,
};
use aegis_core::selector::site_of;
use aegis_core::slice::{PORTS, SliceSet};
use aegis_crds::{reason, rules, type_};
use aegis_world::report::Report;
use aegis_world::snapshot::by_name;
use aegis_world::world::sites;
use ipnet::{IpNet, Ipv6Net};
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// Everything that decisions are made from.
pub struct Decider<'a> {
    /// Policies.
    pub policies: Vec<EgressPolicy>,
    /// Applications that they name.
    pub applications: Applications,
    /// Bindings, with what stands for rules that cannot be read.
    pub bindings: Vec<Binding>,
    /// Ranges inside the cluster.
    pub internal: Vec<IpNet>,
    /// Addresses.
    pub addresses: Vec<Address>,
    /// What host names have as addresses, as far as somebody says so.
    resolved: Arc<Resolved>,
    nodes: HashMap<String, &'a Node>,
    reports: HashMap<String, &'a Report>,
    allocations: HashMap<AllocationName, &'a aegis_crds::EgressAllocation>,
}

/// How packets leave from an allocation.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Way {
    /// The node's own slices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Slices>,
    /// Nodes to send through, best first, where the node has no slices of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub through: Vec<Gateway>,
}

/// Slices of an address.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Slices {
    /// The address, or the /64.
    pub address: String,
    /// Its ports, as ranges; of a /64 the range of addresses of the node.
    pub ports: Vec<String>,
    /// How many slices that are.
    pub slices: u32,
    /// The node has programmed them; left out if that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub programmed: Option<bool>,
}

/// A node to send through.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Gateway {
    /// Its name.
    pub node: String,
    /// Nearer than the rest: others are used only while none of these answers.
    pub near: bool,
    /// What it sends from.
    pub addresses: Vec<String>,
}

impl<'a> Decider<'a> {
    /// From what stands.
    pub fn of(state: &'a State) -> Decider<'a> {
        let rules = state.rules();
        let world = state.world();
        let allocations = state.snapshot.allocations.iter().filter_map(|object| object.0.as_ref().ok());
        let named = allocations.map(|it| {
            (AllocationName { account: it.namespace().unwrap_or_default(), name: it.name_any() }, it)
        });
        Decider {
            policies: rules.policies().to_vec(),
            applications: rules.applications().clone(),
            bindings: rules.bindings(),
            internal: state.internal(),
            addresses: world.observed.into_iter().chain(world.frozen).collect(),
            resolved: Arc::default(),
            nodes: by_name(&state.snapshot.nodes),
            reports: by_name(&state.snapshot.egress_nodes),
            allocations: named.collect(),
        }
    }

    /// The same with other addresses.
    pub fn with_addresses(self, addresses: Vec<Address>) -> Decider<'a> {
        Decider { addresses, ..self }
    }

    /// The same where these names have these addresses, as an agent takes it from the answer that a pod gets.
    pub fn with_names(self, names: &[String], addresses: &[IpAddr]) -> Decider<'a> {
        let entries =
            names.iter().flat_map(|name| addresses.iter().map(|address| (name.clone(), *address, 0)));
        let inputs = self.inputs(None);
        let patterns = patterns(&inputs.policies, &inputs.bindings, &inputs.applications);
        let resolved = Arc::new(Learned::restore(entries).resolve(&patterns));
        Decider { resolved, ..self }
    }

    /// What the agent of a node compiles. Of a pod that is on no node, as on a node with slices.
    pub fn inputs(&self, node: Option<&str>) -> PolicyInputs {
        let usable = |family: Family| -> BTreeSet<AllocationName> {
            let addresses = self.addresses.iter().filter(|it| it.address.family() == family);
            let open = addresses.filter(|address| match (family, node) {
                // Of an IPv4 address slices of another node will do.
                (Family::V6, Some(node)) => !Rights::of(address, node).open.is_empty(),
                _ => address.is_held(),
            });
            open.map(|address| address.allocation.clone()).collect()
        };
        PolicyInputs {
            policies: self.policies.clone(),
            applications: self.applications.clone(),
            bindings: self.bindings.clone(),
            pods: Vec::new(),
            internal: self.internal.clone(),
            usable: usable(Family::V4),
            usable6: usable(Family::V6),
            node: node
                .and_then(|node| self.nodes.get(node))
                .map(|node| rules::node_facts(node))
                .unwrap_or_default(),
            // What is in its database only the agent knows: see `Rules::notes`.
            countries: self.knows_countries(node).then(Default::default),
            resolved: Arc::clone(&self.resolved),
            // An address of a Service is inside the cluster here: where it leads is asked by the endpoint's address.
            services: Vec::new(),
        }
    }

    /// Whether a node has a database of countries. Its agent tells of one that it has, and that it has none where policies ask for it.
    /// Of a node of which nobody knows it is taken for granted.
    pub fn knows_countries(&self, node: Option<&str>) -> bool {
        let report = node.and_then(|node| self.reports.get(node));
        report.and_then(|report| report.status.as_ref()).is_none_or(|status| {
            let known = status.told.conditions.iter().find(|it| it.type_ == type_::COUNTRIES_KNOWN);
            known.is_some_and(|it| it.reason != reason::NO_DATABASE)
        })
    }

    /// Walks the rules.
    pub fn explain(&self, pod: &Pod, node: Option<&str>, packet: Packet) -> Explanation {
        explain(&self.inputs(node), pod, packet)
    }

    /// How packets of a family leave a node from an allocation.
    pub fn way(&self, name: &AllocationName, node: &str, family: Family) -> Way {
        let addresses: Vec<&Address> = self.addresses.iter().filter(|it| it.allocation == *name).collect();
        let addresses: Vec<&Address> =
            addresses.into_iter().filter(|it| it.address.family() == family).collect();
        let own = addresses.iter().filter_map(|address| {
            let open = Rights::of(address, node).open;
            (!open.is_empty()).then(|| self.slices(address, node, open))
        });
        let own: Vec<Slices> = own.collect();
        let through = match own.is_empty() && family == Family::V4 {
            true => self.gateways(name, node, &addresses),
            false => Vec::new(),
        };
        Way { addresses: own, through }
    }

    fn slices(&self, address: &Address, node: &str, open: SliceSet) -> Slices {
        let report = self.reports.get(node).and_then(|report| report.status.as_ref());
        let epoch = report.map(|status| {
            let found = status.addresses.iter().find(|it| it.address == address.address);
            found.map_or(i64::MIN, |it| it.epoch)
        });
        Slices {
            address: address.address.to_string(),
            ports: open.runs().into_iter().map(|run| ports(address.address, run)).collect(),
            slices: open.len(),
            programmed: epoch.map(|epoch| epoch >= address.epoch),
        }
    }

    fn gateways(&self, name: &AllocationName, node: &str, addresses: &[&Address]) -> Vec<Gateway> {
        let place = |node: &str| self.nodes.get(node).map(|node| rules::place(node)).unwrap_or_default();
        let sites = self.allocations.get(name).map(|it| sites(&it.spec)).unwrap_or_default();
        let site = |node: &str| {
            let labels = self.nodes.get(node).map(|node| node.labels().clone()).unwrap_or_default();
            site_of(&sites, &labels).unwrap_or(sites.len())
        };
        let full = |node: &str| {
            let status = self.reports.get(node).and_then(|report| report.status.as_ref());
            let demand = status
                .iter()
                .flat_map(|status| &status.told.demand)
                .find(|it| it.allocation.namespace == name.account && it.allocation.name == name.name);
            demand.is_some_and(|it| Load::of(it.fill_percent, it.refused) == Load::Full)
        };
        let mut holds: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for address in addresses {
            let held = address.holdings.iter().filter(|it| it.state == Holds::Held);
            for holder in held.map(|it| it.node.as_str()).collect::<BTreeSet<&str>>() {
                holds.entry(holder).or_default().push(address.address.to_string());
            }
        }
        let holders = holds
            .keys()
            .map(|holder| (*holder, Holder { place: place(holder), site: site(holder), full: full(holder) }));
        let chosen = gateway::choose(node, &place(node), &holders.collect());
        let gateway = |(number, node): (usize, String)| Gateway {
            addresses: holds.get(node.as_str()).cloned().unwrap_or_default(),
            near: number < chosen.near,
            node,
        };
        chosen.nodes.into_iter().enumerate().map(gateway).collect()
    }
}

/// Namespace and name.
pub fn full(name: &AllocationName) -> String {
    format!("{}/{}", name.account, name.name)
}

/// A run of slices as ports; of a /64 as the range of addresses.
pub fn ports(address: Egress, (first, last): (u8, u8)) -> String {
    match address {
        Egress::V4(_) | Egress::Single(_) => {
            format!("{}-{}", u32::from(first) * PORTS, u32::from(last) * PORTS + PORTS - 1)
        }
        Egress::V6(network) => {
            let bits = u128::from(network) << 64 | u128::from(first) << 48;
            Ipv6Net::new_assert(bits.into(), 80).to_string()
        }
    }
}
