//! Translation of what the API server holds into what planning reads. Nothing is left out in silence: what cannot be
//! read or makes no sense becomes a [`Problem`] of that object, and what depends on it is left as it stands.

mod address;
mod allocation;
mod binding;
mod node;
mod prefix;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use address::{model as address, spec};
pub use allocation::sites;
pub use node::{Presence, agent_state, is_ready};

use crate::object::Target;
use crate::snapshot::{Guarded, Snapshot};
use aegis_core::egress::Egress;
use aegis_core::model::{Address, AllocationName, Inputs, Seconds, State};
use aegis_core::policy;
use aegis_crds::{EgressApplication, EgressPolicy, rules};
use kube::{Resource, ResourceExt};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;

/// Everything as planning sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct World {
    /// What a plan is made from.
    pub inputs: Inputs,
    /// `EgressAddress` objects that stand and may be changed: what a plan is compared with.
    pub observed: Vec<Address>,
    /// `EgressAddress` objects that planning neither sees nor changes, since the allocation or the prefix that they
    /// belong to cannot be read: live flows live on.
    pub frozen: Vec<Address>,
    /// Addresses whose object cannot be read at all. Nobody else gets them.
    pub unreadable: Vec<Egress>,
    /// Policies: planning does not need them, but their owners want to know which decides when.
    pub policies: Vec<policy::EgressPolicy>,
    /// Applications that they name.
    pub applications: policy::Applications,
    /// Bindings, of which planning needs nothing either.
    pub bindings: Vec<policy::Binding>,
    /// What is wrong with which object.
    pub problems: Vec<Problem>,
    /// `metadata.generation` of each object, by uid.
    pub generations: HashMap<String, i64>,
}

/// An object that cannot be read or makes no sense.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// The object.
    pub target: Target,
    /// Its generation.
    pub generation: Option<i64>,
    /// The field, what is wrong with it, and what to do.
    pub message: String,
}

/// Translates. `lost` are addresses whose object vanished without having been drained: they stand as they were last
/// known, so that a plan restores them.
pub fn translate(snapshot: &Snapshot, lost: &[Address], now: Seconds, quarantine: Seconds) -> World {
    let mut world = World {
        inputs: Inputs { now, quarantine, ..Inputs::default() },
        generations: generations(snapshot),
        ..World::default()
    };
    let mut prefixes = read(&snapshot.prefixes, prefix::model, &mut world.problems);
    let mut allocations = read(&snapshot.allocations, allocation::model, &mut world.problems);
    // That it is being deleted can be read of any object, and what it says otherwise does not matter any more.
    for object in snapshot.prefixes.iter().filter(|it| it.meta().deletion_timestamp.is_some()) {
        prefixes.bad.remove(&(None, object.name_any()));
    }
    for object in snapshot.allocations.iter().filter(|it| it.meta().deletion_timestamp.is_some()) {
        if allocations.bad.remove(&(object.namespace(), object.name_any())) {
            allocations.good.push(allocation::deleted(object.meta()));
        }
    }
    let addresses = read(&snapshot.addresses, address::model, &mut world.problems);
    world.bindings = read(&snapshot.bindings, binding::model, &mut world.problems).good;
    let policy = |object: &EgressPolicy| rules::policy(object).map_err(|error| error.to_string());
    world.policies = read(&snapshot.policies, policy, &mut world.problems).good;
    let application = |object: &EgressApplication| {
        let endpoints = rules::application(object).map_err(|error| error.to_string())?;
        Ok((object.name_any(), endpoints))
    };
    world.applications =
        read(&snapshot.applications, application, &mut world.problems).good.into_iter().collect();
    read(&snapshot.egress_nodes, |_| Ok(()), &mut world.problems);
    world.inputs.nodes = node::models(snapshot, &mut world.problems);
    world.inputs.prefixes = prefixes.good;
    world.inputs.allocations = allocations.good;
    world.unreadable = addresses.bad.iter().filter_map(|(_, name)| Egress::of_object(name)).collect();
    world.unreadable.sort_unstable();
    // What cannot be read serves nobody, so its allocation takes another in its place.
    for allocation in &mut world.inputs.allocations {
        allocation.listed.retain(|address| world.unreadable.binary_search(address).is_err());
    }
    (world.frozen, world.observed) = addresses.good.into_iter().partition(|address| {
        prefixes.bad.contains(&(None, address.prefix.clone()))
            || allocations.bad.contains(&key(&address.allocation))
    });
    world.observed.sort_by_key(|address| address.address);
    world.frozen.sort_by_key(|address| address.address);
    let untouchable = world.frozen.iter().map(|it| it.address).chain(world.unreadable.iter().copied());
    world.inputs.withheld = untouchable.map(|address| (address, None)).collect();
    world.inputs.addresses = world.observed.clone();
    world.inputs.frozen = world.frozen.clone();
    let asking = world.inputs.allocations.iter().map(|it| it.name.account.as_str());
    let having = world.observed.iter().chain(&world.frozen).map(|it| it.allocation.account.as_str());
    let accounts: BTreeSet<&str> = asking.chain(having).collect();
    // Of thousands of namespaces few are accounts.
    let namespaces = snapshot.namespaces.iter().filter(|it| accounts.contains(it.name_any().as_str()));
    world.inputs.namespaces = namespaces.map(|it| (it.name_any(), it.labels().clone())).collect();
    let services = snapshot.services.iter().filter_map(|it| it.0.as_ref().ok());
    world.inputs.services = services.flat_map(rules::service_ranges).collect();
    world.restore(lost);
    world
}

impl World {
    /// Plans with addresses whose object vanished as they were last known.
    pub fn restore(&mut self, lost: &[Address]) {
        let standing: BTreeSet<Egress> = self.observed.iter().map(|it| it.address).collect();
        let lost = lost
            .iter()
            .filter(|it| !standing.contains(&it.address) && !self.inputs.withheld.contains_key(&it.address));
        self.inputs.addresses.extend(lost.cloned());
    }

    /// Nodes that hold slices and that a plan would take for gone. The copies may be behind those that a former
    /// leader planned from, so nothing is taken from such a node before the API server has confirmed it.
    pub fn absent(&self) -> BTreeSet<String> {
        let known: BTreeSet<&str> = self.inputs.nodes.iter().map(|node| node.name.as_str()).collect();
        let addresses =
            self.inputs.addresses.iter().filter(|it| !self.inputs.withheld.contains_key(&it.address));
        let holdings = addresses.flat_map(|address| &address.holdings);
        let held = holdings.filter(|it| matches!(it.state, State::Held | State::Draining));
        held.filter(|it| !known.contains(it.node.as_str())).map(|it| it.node.clone()).collect()
    }

    /// Plans with what the API server says of nodes that seemed to be absent. Addresses of which one holds slices
    /// that nothing is known of stay as they are.
    pub fn confirm(&mut self, presences: &BTreeMap<String, Presence>, snapshot: &Snapshot) {
        for (name, presence) in presences {
            match presence {
                Presence::Gone => {}
                Presence::There(node) => {
                    self.inputs.nodes.extend(node::confirmed(node, snapshot, &mut self.problems));
                }
                Presence::Unknown => {
                    let held = self.inputs.addresses.iter();
                    let held = held.filter(|it| it.holdings.iter().any(|holding| holding.node == *name));
                    for address in held {
                        self.inputs.withheld.entry(address.address).or_default();
                    }
                }
            }
        }
        self.inputs.nodes.sort_by(|a, b| a.name.cmp(&b.name));
    }
}

fn key(name: &AllocationName) -> (Option<String>, String) {
    (Some(name.account.clone()), name.name.clone())
}

/// Translated objects, and namespace and name of those that could not be.
struct Read<M> {
    good: Vec<M>,
    bad: BTreeSet<(Option<String>, String)>,
}

/// Translates all objects of a kind, in the order of their names.
fn read<K, M>(
    objects: &[Guarded<K>],
    model: impl Fn(&K) -> Result<M, String>,
    problems: &mut Vec<Problem>,
) -> Read<M>
where
    K: Resource<DynamicType = ()> + Clone + Debug,
{
    let mut sorted: Vec<&Guarded<K>> = objects.iter().collect();
    sorted.sort_by_key(|object| (object.namespace(), object.name_any()));
    let mut read = Read { good: Vec::new(), bad: BTreeSet::new() };
    for object in sorted {
        let translated = match &object.0 {
            Ok(object) => model(object),
            Err(invalid) => Err(format!("cannot be read: {}; repair or delete it", invalid.error)),
        };
        match translated {
            Ok(translated) => read.good.push(translated),
            Err(message) => {
                read.bad.insert((object.namespace(), object.name_any()));
                problems.push(Problem {
                    target: Target::of::<K>(object.meta()),
                    generation: object.meta().generation,
                    message,
                });
            }
        }
    }
    read
}

fn generations(snapshot: &Snapshot) -> HashMap<String, i64> {
    fn of<K: Resource>(objects: &[Guarded<K>]) -> impl Iterator<Item = (String, i64)> {
        objects.iter().filter_map(|object| Some((object.meta().uid.clone()?, object.meta().generation?)))
    }
    of(&snapshot.prefixes)
        .chain(of(&snapshot.allocations))
        .chain(of(&snapshot.bindings))
        .chain(of(&snapshot.policies))
        .chain(of(&snapshot.applications))
        .chain(of(&snapshot.addresses))
        .collect()
}
