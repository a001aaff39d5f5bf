//! `kubectl aegis allowlist`: what to hand to the partner, in the form that his firewall takes.

mod forms;
mod label;

pub use forms::{Form, Rule, Transport, write};

use crate::state::{State, readable};
use crate::status::faults;
use aegis_core::egress::{Egress, Family};
use aegis_crds::EgressAllocation;
use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet};

/// IPv4 or IPv6, as somebody asks for it.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// IPv4.
    #[value(name = "4")]
    V4,
    /// IPv6.
    #[value(name = "6")]
    V6,
}

/// Of which allocations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Of these, by namespace and name.
    Named(BTreeSet<(String, String)>),
    /// Of all in a namespace, or anywhere.
    All(Option<String>),
}

impl Wanted {
    /// Reads `NAME` and `NAMESPACE/NAME`.
    pub fn named(names: &[String], namespace: &str) -> Wanted {
        let name = |text: &String| {
            let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
            (namespace.to_owned(), name.to_owned())
        };
        Wanted::Named(names.iter().map(name).collect())
    }

    /// Namespaces to look in; none stands for all.
    pub fn namespaces(&self) -> BTreeSet<&str> {
        match self {
            Wanted::Named(names) => names.iter().map(|(namespace, _)| namespace.as_str()).collect(),
            Wanted::All(namespace) => namespace.iter().map(String::as_str).collect(),
        }
    }
}

/// What a partner lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List {
    /// The addresses, in order.
    pub addresses: BTreeMap<Egress, Origin>,
    /// Context of the kubeconfig that they were read by.
    pub context: Option<String>,
    /// When.
    pub time: Timestamp,
}

/// Whose an address is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Allocation, as `NAMESPACE/NAME`.
    pub allocation: String,
    /// Prefix.
    pub prefix: String,
}

impl List {
    /// Allocations, as `NAMESPACE/NAME`.
    pub fn allocations(&self) -> BTreeSet<&str> {
        self.addresses.values().map(|it| it.allocation.as_str()).collect()
    }

    /// The addresses of a family as the fewest ranges that have all of them and no other.
    pub fn ranges(&self, family: Family) -> Vec<IpNet> {
        let own = self.addresses.keys().filter(|it| it.family() == family);
        IpNet::aggregate(&own.map(|it| it.range()).collect())
    }
}

/// All addresses that these allocations have, or may still send from; and what to warn of.
pub fn list(state: &State, wanted: &Wanted, only: Option<Only>) -> Result<(List, Vec<String>)> {
    state.require(&["egressallocations"])?;
    let (mut addresses, mut warnings) = (BTreeMap::new(), Vec::new());
    for object in chosen(state, wanted)? {
        let title = title(object);
        let found = addresses_of(state, object)?;
        let faults = faults(object);
        if found.is_empty() {
            let why: String = faults.first().map(|it| format!(" ({})", it.message)).unwrap_or_default();
            let message = format!("EgressAllocation {title} has no addresses{why}");
            match wanted {
                Wanted::Named(_) => bail!(message),
                Wanted::All(_) => warnings.push(message),
            }
        } else {
            let fault = faults.iter().map(|it| {
                format!("EgressAllocation {title}: {} ({}): {}", it.condition, it.reason, it.message)
            });
            warnings.extend(fault);
        }
        addresses.extend(found);
    }
    // It may be anybody's.
    let unreadable = state.snapshot.addresses.iter().filter(|it| it.0.is_err());
    warnings.extend(unreadable.map(|it| format!("EgressAddress {} cannot be read", it.name_any())));
    // The status of one that is as it should be has all; that of another may lag behind.
    if let (false, Some(why)) = (warnings.is_empty(), state.missing.get("egressaddresses")) {
        warnings.push(format!("egressaddresses: {why}, so the list is what the status says"));
    }
    if addresses.is_empty() {
        bail!("no EgressAllocation there has addresses");
    }
    if let Some(only) = only {
        let (family, word) = match only {
            Only::V4 => (Family::V4, "IPv4"),
            Only::V6 => (Family::V6, "IPv6"),
        };
        addresses.retain(|it: &Egress, _| it.family() == family);
        if addresses.is_empty() {
            bail!("there are no {word} addresses among them");
        }
    }
    Ok((List { addresses, context: None, time: Timestamp::from_second(state.now)? }, warnings))
}

fn title(object: &EgressAllocation) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

fn chosen<'a>(state: &'a State, wanted: &Wanted) -> Result<Vec<&'a EgressAllocation>> {
    let all = state.snapshot.allocations.iter();
    let mut all: BTreeMap<(String, String), _> =
        all.map(|it| ((it.namespace().unwrap_or_default(), it.name_any()), it)).collect();
    match wanted {
        Wanted::Named(names) => {
            if let Some((namespace, name)) = names.iter().find(|name| !all.contains_key(*name)) {
                bail!("there is no EgressAllocation {name} in namespace {namespace}");
            }
            all.retain(|name, _| names.contains(name));
        }
        Wanted::All(Some(wanted)) => all.retain(|(namespace, _), _| namespace == wanted),
        Wanted::All(None) => {}
    }
    let read = |((namespace, name), object): (_, &'a aegis_world::snapshot::Guarded<EgressAllocation>)| {
        let read = object.0.as_ref().map_err(|invalid| anyhow::anyhow!("{}", invalid.error));
        read.with_context(|| format!("EgressAllocation {namespace}/{name} cannot be read"))
    };
    all.into_iter().map(read).collect()
}

/// What the status lists, and what `EgressAddress` objects say, where they can be read: an address that is new, or that is
/// to be given back and still drains, may be in one of both only.
fn addresses_of(state: &State, object: &EgressAllocation) -> Result<BTreeMap<Egress, Origin>> {
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    let listed = object.status.iter().flat_map(|status| &status.addresses);
    let listed = listed.map(|it| (it.address.clone(), it.prefix.clone()));
    let given = readable(&state.snapshot.addresses).into_iter().map(|it| &it.spec);
    let given = given.filter(|it| it.allocation_ref.namespace == namespace && it.allocation_ref.name == name);
    let given = given.map(|it| (it.address.clone(), it.prefix.clone()));
    let read = |(address, prefix): (String, String)| {
        let egress: Egress =
            address.parse().with_context(|| format!("EgressAllocation {namespace}/{name}: {address:?}"))?;
        Ok((egress, Origin { allocation: format!("{namespace}/{name}"), prefix }))
    };
    listed.chain(given).map(read).collect()
}

#[cfg(test)]
mod tests;
