//! The policy: which local pod leaves from where, as far as it fits into the tables.

use super::{Allocation, Inputs, internal};
use aegis_common::{
    ACTION_ALLOCATE, ACTION_DENY, ACTION_FORBID, ACTION_PASS, DESTINATION_INTERNAL, DESTINATION_OBSERVED,
    HOST_UNKNOWN, HostValue, POD_REFUSED, PodValue, VERDICT_BINDS, WOULD_DENY, WOULD_LACK, WOULD_LEAVE,
    WOULD_PASS, incarnation, observes, of_incarnation,
};
use aegis_core::egress::Family;
use aegis_core::model::AllocationName;
use aegis_core::policy::names::HostPattern;
use aegis_core::policy::{
    self, Action, BindingName, Destination, EgressPolicy, NodePolicy, Observed, Pod, PolicyInputs, RuleName,
};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// The policy with allocations by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Local pods by address.
    pub pods: BTreeMap<Ipv4Addr, PodValue>,
    /// Local pods by control group, once the data plane looks at these: see `HostKey`.
    pub hosts: BTreeMap<u64, HostValue>,
    /// The same by IPv6 address.
    pub pods6: BTreeMap<Ipv6Addr, PodValue>,
    /// Class of destinations.
    pub destinations: BTreeMap<IpNet, u32>,
    /// Class of ports.
    pub ports: BTreeMap<(u8, u16, u8), u32>,
    /// What happens.
    pub verdicts: BTreeMap<(u32, u32, u32), Verdict>,
}

/// What happens to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `ACTION_*`.
    pub action: u16,
    /// For `ACTION_ALLOCATE`: the allocation to leave from.
    pub allocation: Option<Arc<AllocationName>>,
    /// The one for what finds no port there.
    pub secondary: Option<Arc<AllocationName>>,
    /// Place of the rule among those that cover local pods, with `VERDICT_BINDS` where it says so, and what only observes.
    pub rule: u32,
}

impl Verdict {
    /// The allocations, in the order in which they are tried.
    pub fn allocations(&self) -> impl Iterator<Item = &AllocationName> {
        self.allocation.iter().chain(&self.secondary).map(Arc::as_ref)
    }
}

/// The policy, with what is told of it.
#[derive(Default)]
pub(super) struct Compiled {
    pub policy: Policy,
    /// Rules that cover local pods, in the order of their numbers.
    pub rules: Vec<RuleName>,
    /// Local pods that each enforced rule covers.
    pub covered: BTreeMap<RuleName, u32>,
    /// Allocations from which local pods are to leave.
    pub named: BTreeSet<AllocationName>,
    /// Local pods that some rule covers.
    pub covered_pods: u32,
    /// Allocations of which sockets of local pods have addresses.
    pub bound: BTreeSet<AllocationName>,
    /// See `Settings::host_levels`.
    pub host_levels: u32,
    /// Covered pods of the host network without group.
    pub groupless: u32,
    /// Accounts whose rules find no room: their covered pods are refused.
    pub refused: BTreeSet<String>,
    /// Policies that only observe find no room, and count nothing.
    pub unobserved: bool,
    /// Addresses of local pods that no rule with host names covers.
    pub nameless: BTreeSet<IpAddr>,
    /// Host names of rules that cover local pods.
    pub looked_up: BTreeSet<HostPattern>,
}

/// Compiles the policy of the local pods.
pub(super) fn compile(
    inputs: &Inputs,
    allocations: &BTreeMap<AllocationName, Allocation>,
    hold_unknown: bool,
) -> Compiled {
    let usable = |family| -> BTreeSet<AllocationName> {
        let usable = allocations.iter().filter(|(_, allocation)| allocation.is_usable(family));
        usable.map(|(name, _)| name.clone()).collect()
    };
    let all = PolicyInputs {
        policies: inputs.policies.clone(),
        bindings: inputs.bindings.clone(),
        pods: inputs.pods.clone(),
        node: inputs.facts.clone(),
        countries: inputs.countries.clone(),
        applications: inputs.applications.clone(),
        internal: internal(inputs),
        services: inputs.services.clone(),
        usable: usable(Family::V4),
        usable6: usable(Family::V6),
        resolved: Arc::clone(&inputs.resolved.1),
    };
    let (mut rules, refused, unobserved) = fitting(all, inputs);
    for pod in refused_pods(inputs, &refused) {
        if pod.host_network {
            rules.hosts.insert(pod.uid.clone(), POD_REFUSED);
        }
        rules.pods.extend(own_addresses(pod).map(|address| (*address, POD_REFUSED)));
    }

    let classes = rules.verdicts.iter().filter(|(_, action)| !matches!(action, Action::Pass));
    let covered: BTreeSet<u32> = classes.map(|((pod, _, _), _)| *pod).chain([POD_REFUSED]).collect();
    let is_covered = |class: Option<&u32>| class.is_some_and(|class| covered.contains(class));
    let covered_pods = inputs.pods.iter().filter(|pod| {
        is_covered(rules.hosts.get(&pod.uid)) || own_addresses(pod).any(|own| is_covered(rules.pods.get(own)))
    });
    let covered_pods = covered_pods.count();
    let covered_hosts = rules.hosts.iter().filter(|(_, class)| is_covered(Some(class)));
    let (mut covers_hosts, mut groupless) = (false, 0);
    for (uid, _) in covered_hosts {
        covers_hosts = true;
        groupless += u32::from(!inputs.groups.contains_key(uid));
    }
    // First the programs look, then nftables tells them what opens nothing, then somebody is covered: see `nft`.
    let (found, levels) = hosts(&rules.hosts, inputs, hold_unknown);
    let host_levels = inputs.host_levels | if covers_hosts || inputs.host_levels != 0 { levels } else { 0 };
    let hosts = if inputs.host_levels != 0 { found } else { BTreeMap::new() };

    // Numbers are of those rules only that have a pod here, so that others may come and go without a new policy.
    let bound_by: BTreeSet<&BindingName> =
        inputs.bindings.iter().filter(|it| it.binds).map(|it| &it.name).collect();
    let binds = |name: &RuleName| matches!(name, RuleName::Binding(name) if bound_by.contains(name));
    let mut numbers = vec![NO_NUMBER; rules.rules.len()];
    let mut covering = Vec::new();
    for (number, name) in rules.rules.iter().enumerate() {
        if rules.covered.get(name).is_some_and(|pods| *pods > 0) {
            let flag = if binds(name) { VERDICT_BINDS } else { 0 };
            numbers[number] = flag | u32::try_from(covering.len()).unwrap_or(NO_NUMBER);
            covering.push(name.clone());
        }
    }
    let numbered = |class: u32| {
        if rules.only_observed.contains(&class) { class | DESTINATION_OBSERVED } else { class }
    };
    let mut observed = rules.observed.iter().peekable();
    let verdicts = rules.verdicts.iter().map(|(key, action)| {
        let mut verdict = verdict(action, &numbers, &rules.denying);
        // Both are in order, and whatever is observed has a verdict.
        if let Some((_, observed)) = observed.next_if(|(other, _)| *other == key) {
            verdict.rule |= observing(observed, &numbers, &rules.denying);
        }
        let (pod, destination, port) = *key;
        ((pod, numbered(destination), port), verdict)
    });
    let verdicts = verdicts.collect();
    let destinations = rules.destinations.iter().map(|(network, destination)| {
        let class = match destination {
            Destination::Internal => DESTINATION_INTERNAL,
            Destination::Class(class) => numbered(*class),
        };
        (*network, class)
    });
    let ports = rules.ports.iter();
    let ports = ports.map(|(prefix, class)| ((prefix.protocol, prefix.port, prefix.length), *class));
    let (mut pods4, mut pods6) = (BTreeMap::new(), BTreeMap::new());
    for (address, pod) in pods(&rules.pods, inputs) {
        match address {
            IpAddr::V4(address) => _ = pods4.insert(address, pod),
            IpAddr::V6(address) => _ = pods6.insert(address, pod),
        }
    }
    Compiled {
        policy: Policy {
            pods: pods4,
            pods6,
            hosts,
            destinations: destinations.collect(),
            ports: ports.collect(),
            verdicts,
        },
        rules: covering,
        covered: rules.covered,
        // A binding that cannot be read names none.
        named: rules.named.into_iter().filter(|allocation| !allocation.name.is_empty()).collect(),
        covered_pods: u32::try_from(covered_pods).unwrap_or(u32::MAX),
        bound: bound(inputs),
        host_levels,
        groupless,
        refused,
        unobserved,
        nameless: rules.nameless,
        looked_up: rules.looked_up,
    }
}

/// The rules, if need be without those that only observe, and without the accounts that need the most room: by what an account's
/// rules need alone, then by name, so that one account cannot crowd out the others and the same inputs refuse the same ones. With
/// whether something that only observes has found no room.
fn fitting(mut all: PolicyInputs, inputs: &Inputs) -> (NodePolicy, BTreeSet<String>, bool) {
    if let Some(rules) = policy::compile_within(&all, &inputs.room) {
        return (rules, BTreeSet::new(), false);
    }
    let unobserved = all.policies.iter().any(|policy| policy.observes);
    if unobserved {
        all.policies.retain(|policy| !policy.observes);
        if let Some(rules) = policy::compile_within(&all, &inputs.room) {
            return (rules, BTreeSet::new(), true);
        }
    }
    let of = |accounts: &[(usize, &str)]| {
        let named = |account: &str| accounts.iter().any(|(_, name)| *name == account);
        let bindings = all.bindings.iter().filter(|binding| named(&binding.name.account));
        let pods = all.pods.iter().filter(|pod| named(&pod.account));
        let some = PolicyInputs {
            bindings: bindings.cloned().collect(),
            pods: pods.cloned().collect(),
            ..all.clone()
        };
        policy::compile_within(&some, &inputs.room)
    };
    let local: BTreeSet<&str> = inputs.pods.iter().map(|pod| pod.account.as_str()).collect();
    let size = |account| {
        let alone = of(&[(0, account)]);
        alone.map_or(usize::MAX, |rules| rules.verdicts.len() + rules.destinations.len() + rules.ports.len())
    };
    let mut accounts: Vec<(usize, &str)> =
        local.into_iter().map(|account| (size(account), account)).collect();
    accounts.sort_unstable();
    // The more accounts, the more entries: so the largest number that fits can be found by halving.
    let numbers: Vec<usize> = (1..=accounts.len()).collect();
    let fit = numbers.partition_point(|number| of(&accounts[..*number]).is_some());
    let mut rules = of(&accounts[..fit]).unwrap_or_default();
    for pod in &inputs.pods {
        if pod.host_network {
            rules.hosts.entry(pod.uid.clone()).or_insert(0);
        }
        for address in own_addresses(pod) {
            rules.pods.entry(*address).or_insert(0);
        }
    }
    (rules, accounts[fit..].iter().map(|(_, account)| (*account).to_owned()).collect(), unobserved)
}

/// Addresses that nobody else has.
fn own_addresses(pod: &Pod) -> impl Iterator<Item = &IpAddr> {
    pod.addresses.iter().filter(|_| !pod.host_network)
}

/// Allocations that enabled bindings name for the sockets of local pods of the host network.
fn bound(inputs: &Inputs) -> BTreeSet<AllocationName> {
    let binds = inputs.bindings.iter().filter(|binding| binding.binds && binding.enabled);
    let local = binds.filter(|binding| {
        let covers = |pod: &&Pod| binding.name.account == pod.account && binding.workloads.matches(pod);
        inputs.pods.iter().filter(covers).any(|pod| pod.host_network)
    });
    local.map(|binding| binding.allocation.clone()).collect()
}

/// The pods of these accounts that some rule covers.
fn refused_pods<'a>(inputs: &'a Inputs, refused: &BTreeSet<String>) -> Vec<&'a Pod> {
    let covers = |pod: &&Pod| {
        let bound = inputs.bindings.iter().any(|binding| {
            binding.enabled && binding.name.account == pod.account && binding.workloads.matches(pod)
        });
        let selects = |policy: &EgressPolicy| !policy.observes && policy.selects(pod, &inputs.facts);
        bound || inputs.policies.iter().any(selects)
    };
    inputs.pods.iter().filter(|pod| refused.contains(&pod.account)).filter(covers).collect()
}

/// Class and incarnation by control group, with the levels at which the groups are. A group that is in none of the pods' is held
/// like an address that nobody has named.
fn hosts(
    classes: &BTreeMap<String, u32>,
    inputs: &Inputs,
    hold_unknown: bool,
) -> (BTreeMap<u64, HostValue>, u32) {
    let (mut hosts, mut levels) = (BTreeMap::new(), 0);
    for root in inputs.group_roots.iter().filter(|_| hold_unknown) {
        hosts.insert(root.number, HostValue { class: HOST_UNKNOWN, incarnation: 0 });
        levels |= root.levels;
    }
    for pod in &inputs.pods {
        let incarnation = incarnation(&pod.uid);
        // Others may have a process in the node's network, too: nothing covers that.
        let class = classes.get(&pod.uid).copied().unwrap_or(0);
        let value = HostValue { class, incarnation };
        if pod.host_network {
            hosts.insert(of_incarnation(incarnation), value);
        }
        if let Some(group) = inputs.groups.get(&pod.uid) {
            hosts.insert(group.number, value);
            levels |= group.levels;
        }
    }
    (hosts, levels)
}

/// Class, incarnation and MAC of each address; no two pods have the same one.
fn pods(classes: &BTreeMap<IpAddr, u32>, inputs: &Inputs) -> Vec<(IpAddr, PodValue)> {
    let owners = inputs.pods.iter().filter(|pod| !pod.host_network).flat_map(|pod| {
        let incarnation = incarnation(&pod.uid);
        pod.addresses.iter().map(move |address| (*address, incarnation))
    });
    let owners: BTreeMap<IpAddr, u32> = owners.collect();
    classes
        .iter()
        .map(|(address, class)| {
            let incarnation = owners.get(address).copied().unwrap_or_default();
            let mac = inputs.macs.get(address).copied().unwrap_or_default();
            (*address, PodValue { class: *class, incarnation, mac, ..PodValue::default() })
        })
        .collect()
}

/// In place of a rule's number.
const NO_NUMBER: u32 = u16::MAX as u32;

fn verdict(action: &Action, numbers: &[u32], denying: &BTreeSet<usize>) -> Verdict {
    let number = |rule: &usize| numbers.get(*rule).copied().unwrap_or(NO_NUMBER);
    match action {
        Action::Pass => Verdict { action: ACTION_PASS, allocation: None, secondary: None, rule: 0 },
        Action::Deny { rule } => {
            let action = if denying.contains(rule) { ACTION_FORBID } else { ACTION_DENY };
            Verdict { action, allocation: None, secondary: None, rule: number(rule) }
        }
        Action::Allocate { allocation, secondary, rule } => Verdict {
            action: ACTION_ALLOCATE,
            allocation: Some(Arc::clone(allocation)),
            secondary: secondary.clone(),
            rule: number(rule),
        },
    }
}

/// What a verdict says of a policy that only observes.
fn observing(observed: &Observed, numbers: &[u32], denying: &BTreeSet<usize>) -> u32 {
    let would = match &observed.action {
        Action::Allocate { .. } => WOULD_LEAVE,
        Action::Pass => WOULD_PASS,
        Action::Deny { .. } if denying.contains(&observed.rule) => WOULD_DENY,
        Action::Deny { .. } => WOULD_LACK,
    };
    observes(numbers.get(observed.rule).copied().unwrap_or(NO_NUMBER), would)
}
