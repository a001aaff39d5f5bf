//! The policy maps: a new generation, or single writes to the live one.

use super::edit::{Edit, edit, in_order, unmet};
use super::numbering::{Rules, follow, number_binding, number_rules};
use super::{Builder, Op};
use crate::desired::Policy;
use crate::observed::{DestinationEntry, Generation, VerdictEntry, to_map6};
use crate::suffix;
use aegis_common::{
    ACTION_DENY, ACTION_PASS, Config6, HOST_UNKNOWN, HostValue, MAC_LEAVING, MAX_POD_RANGES6, Pod6Value,
    PodRange6, PodValue, VerdictValue,
};
use aegis_core::model::AllocationName;
use ipnet::IpNet;
use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, Ipv6Addr};

/// How a policy follows another one.
enum Step {
    /// Nothing but pods or single addresses changes: each is judged by its own entry alone, so that each write is a whole step.
    Addresses,
    /// Verdicts change too, or what many addresses are.
    Edit(Edit),
    /// A new generation.
    Generation,
}

impl Builder<'_> {
    pub(super) fn write_policy(
        &mut self,
        peers: &BTreeMap<Ipv4Addr, u32>,
        numbers: &BTreeMap<AllocationName, u32>,
    ) {
        let observed = self.observed;
        let number = observed.config.generation;
        let nothing = Generation::default();
        let live = observed.generations.get(&number).unwrap_or(&nothing);
        let pods6 = self.desired.policy.pods6.keys().copied().collect();
        let suffixes = suffix::assign(&pods6, &observed.suffixes);
        let (wanted, step) = self.step(live, numbers, &suffixes);
        let next = if matches!(step, Step::Generation) { number.wrapping_add(1) } else { number };

        for (generation, contents) in &observed.generations {
            if *generation != number {
                self.remove_generation(*generation, contents);
            }
        }
        // An address goes from one pod to the next by way of nobody: neither inherits anything of the other.
        let stays = |address: &Ipv4Addr, pod: &PodValue| {
            wanted.pods.get(address).is_some_and(|next| next.incarnation == pod.incarnation)
        };
        for (address, pod) in live.pods.iter().filter(|(address, pod)| !stays(address, pod)) {
            // The map remembers what is still to be forgotten, should that fail or the agent end before.
            let (address, value) = (*address, PodValue { incarnation: 0, mac: MAC_LEAVING, ..*pod });
            if *pod != value {
                self.push(Op::SetPod { generation: number, address, value });
            }
            self.push(Op::ForgetConnections { address: address.into() });
            self.push(Op::RemovePod { generation: number, address });
        }
        let stays = |address: &Ipv6Addr, pod: &Pod6Value| {
            wanted.pods6.get(address).is_some_and(|next| next.incarnation == pod.incarnation)
        };
        for (address, pod) in live.pods6.iter().filter(|(address, pod)| !stays(address, pod)) {
            let (address, value) = (*address, Pod6Value { incarnation: 0, mac: MAC_LEAVING, ..*pod });
            if *pod != value {
                self.push(Op::SetPod6 { generation: number, address, value });
            }
            self.push(Op::ForgetConnections { address: address.into() });
            self.push(Op::RemovePod6 { generation: number, address });
        }
        self.write_suffixes(&suffixes);
        match &step {
            Step::Addresses => self.change_addresses(number, live, &wanted),
            Step::Edit(edit) => {
                for (verdict, value) in &edit.new {
                    self.push(Op::SetVerdict { generation: number, verdict: *verdict, value: *value });
                }
                self.change_addresses(number, live, &wanted);
            }
            Step::Generation => {
                // There is room for two generations, and not for what is left of an edit besides.
                let left = unmet(live);
                if !left.is_empty() {
                    self.push(Op::Settle);
                }
                for verdict in left {
                    self.push(Op::RemoveVerdict { generation: number, verdict });
                }
                self.write_generation(next, &wanted);
            }
        }
        let before = self.plan.ops.iter().rev().find_map(|op| match op {
            Op::SetConfig(config) => Some(*config),
            _ => None,
        });
        let config = self.config(peers, next);
        if before.unwrap_or(observed.config) != config {
            self.push(Op::SetConfig(config));
        }
        // What IPv6 packets are judged by is in force before they are looked at.
        let config6 = self.config6();
        if self.present_config6() != config6 {
            self.push(Op::SetConfig6(config6));
        }
        match step {
            Step::Addresses => {}
            Step::Edit(edit) => {
                // Nor may what verdicts named go before.
                self.push(Op::Settle);
                for verdict in edit.unused {
                    self.push(Op::RemoveVerdict { generation: number, verdict });
                }
            }
            Step::Generation => {
                self.push(Op::Settle);
                self.remove_generation(number, live);
            }
        }
    }

    /// The policy in the numbers of the maps, and how to come to it.
    fn step(
        &mut self,
        live: &Generation,
        numbers: &BTreeMap<AllocationName, u32>,
        suffixes: &BTreeMap<Ipv6Addr, u32>,
    ) -> (Generation, Step) {
        let known = self.known.rules.as_deref();
        let rules = number_rules(&self.desired.rules, known.unwrap_or(&Rules::new()));
        self.plan.rules = rules.iter().copied().zip(self.desired.rules.iter().cloned()).collect();
        let policy = &self.desired.policy;
        let verdicts = number_verdicts(policy, numbers, &rules);
        let wanted = follow(number_pods(policy, suffixes), verdicts, live);
        // Where both a pod and an address change their class, neither may do so before the other.
        let same_destinations = live.destinations == wanted.destinations
            || classes_stay(live, &wanted) && wide(&live.destinations).eq(wide(&wanted.destinations));
        if same_destinations && live.ports == wanted.ports && live.verdicts == wanted.verdicts {
            return (wanted, Step::Addresses);
        }
        if self.observed.config.generation == 0 {
            return (wanted, Step::Generation);
        }
        match edit(live, &wanted) {
            // Else nobody knows whose the numbers of rules are: counts of one must not become another's.
            Ok(edit) if known.is_some() || edit.new.is_empty() => (wanted, Step::Edit(edit)),
            _ => (wanted, Step::Generation),
        }
    }

    /// Single entries of the live generation: in each look-up, a packet meets what was there before or what is to be there. Pods come
    /// last, so that those that are new find everything.
    fn change_addresses(&mut self, generation: u32, live: &Generation, wanted: &Generation) {
        for (destination, class) in in_order(&live.destinations, &wanted.destinations, IpNet::prefix_len) {
            self.push(match class {
                Some(class) => Op::SetDestination { generation, destination, class },
                None => Op::RemoveDestination { generation, destination },
            });
        }
        for (port, class) in in_order(&live.ports, &wanted.ports, |(.., length)| *length) {
            self.push(match class {
                Some(class) => Op::SetPort { generation, port, class },
                None => Op::RemovePort { generation, port },
            });
        }
        for (address, pod) in wanted.pods.iter().filter(|(address, pod)| live.pods.get(address) != Some(pod))
        {
            self.push(Op::SetPod { generation, address: *address, value: *pod });
        }
        self.change_hosts(generation, &live.hosts, &wanted.hosts);
        let pods6 = wanted.pods6.iter();
        for (address, pod) in pods6.filter(|(address, pod)| live.pods6.get(address) != Some(pod)) {
            self.push(Op::SetPod6 { generation, address: *address, value: *pod });
        }
    }

    /// The group of those that nobody has named goes in last and out first.
    fn change_hosts(
        &mut self,
        generation: u32,
        before: &BTreeMap<u64, HostValue>,
        after: &BTreeMap<u64, HostValue>,
    ) {
        let mut gone: Vec<_> = before.iter().filter(|(group, _)| !after.contains_key(group)).collect();
        gone.sort_by_key(|(_, value)| value.class != HOST_UNKNOWN);
        for (group, _) in gone {
            self.push(Op::RemoveHost { generation, group: *group });
        }
        let mut new: Vec<_> =
            after.iter().filter(|(group, value)| before.get(group) != Some(value)).collect();
        new.sort_by_key(|(_, value)| value.class == HOST_UNKNOWN);
        for (group, value) in new {
            self.push(Op::SetHost { generation, group: *group, value: *value });
        }
    }

    /// A suffix is free when connections of the pod that had it are forgotten, and is there before a pod bears it.
    fn write_suffixes(&mut self, suffixes: &BTreeMap<Ipv6Addr, u32>) {
        let observed = self.observed;
        let former = observed.suffixes.iter();
        for (suffix, _) in former.filter(|(suffix, address)| suffixes.get(address) != Some(suffix)) {
            self.push(Op::RemoveSuffix { suffix: *suffix });
        }
        for (address, suffix) in suffixes {
            if observed.suffixes.get(suffix) != Some(address) {
                self.push(Op::SetSuffix { suffix: *suffix, address: *address });
            }
        }
    }

    /// Once IPv6 packets are looked at, they always are.
    /// `CONFIG6` as it is after the writes so far.
    pub(super) fn present_config6(&self) -> Config6 {
        let written = self.plan.ops.iter().rev().find_map(|op| match op {
            Op::SetConfig6(config) => Some(*config),
            _ => None,
        });
        written.unwrap_or(self.observed.config6)
    }

    fn config6(&self) -> Config6 {
        let settings = &self.desired.settings;
        let mut config = self.present_config6();
        if !settings.six {
            return config;
        }
        config.active = 1;
        let wanted = self.desired.addresses.values().any(|address| address.single.is_some());
        config.singles = u32::from(wanted || !self.observed.singles.is_empty());
        if !settings.pod_ranges6.is_empty() {
            config.pod_ranges = [PodRange6::default(); MAX_POD_RANGES6];
            for (slot, range) in config.pod_ranges.iter_mut().zip(&settings.pod_ranges6) {
                *slot = PodRange6 { network: to_map6(range.network()), mask: to_map6(range.netmask()) };
            }
            config.pod_range_count = settings.pod_ranges6.len().min(MAX_POD_RANGES6) as u32;
        }
        config
    }

    fn write_generation(&mut self, generation: u32, contents: &Generation) {
        for (verdict, value) in &contents.verdicts {
            self.push(Op::SetVerdict { generation, verdict: *verdict, value: *value });
        }
        for (port, class) in &contents.ports {
            self.push(Op::SetPort { generation, port: *port, class: *class });
        }
        for (destination, class) in &contents.destinations {
            self.push(Op::SetDestination { generation, destination: *destination, class: *class });
        }
        for (address, pod) in &contents.pods {
            self.push(Op::SetPod { generation, address: *address, value: *pod });
        }
        self.change_hosts(generation, &BTreeMap::new(), &contents.hosts);
        for (address, pod) in &contents.pods6 {
            self.push(Op::SetPod6 { generation, address: *address, value: *pod });
        }
    }

    fn remove_generation(&mut self, generation: u32, contents: &Generation) {
        for address in contents.pods.keys() {
            self.push(Op::RemovePod { generation, address: *address });
        }
        self.change_hosts(generation, &contents.hosts, &BTreeMap::new());
        for address in contents.pods6.keys() {
            self.push(Op::RemovePod6 { generation, address: *address });
        }
        for destination in contents.destinations.keys() {
            self.push(Op::RemoveDestination { generation, destination: *destination });
        }
        for port in contents.ports.keys() {
            self.push(Op::RemovePort { generation, port: *port });
        }
        for verdict in contents.verdicts.keys() {
            self.push(Op::RemoveVerdict { generation, verdict: *verdict });
        }
    }
}

/// Ranges that others may be in: which one counts for an address depends on all of them.
fn wide(destinations: &BTreeMap<DestinationEntry, u32>) -> impl Iterator<Item = (&DestinationEntry, &u32)> {
    destinations.iter().filter(|(range, _)| range.prefix_len() < range.max_prefix_len())
}

/// Whether every pod that stays has the class that it had.
fn classes_stay(before: &Generation, after: &Generation) -> bool {
    let v4 = before.pods.iter().all(|(own, pod)| after.pods.get(own).is_none_or(|it| it.class == pod.class));
    let v6 =
        before.pods6.iter().all(|(own, pod)| after.pods6.get(own).is_none_or(|it| it.class == pod.class));
    let mut hosts = before.hosts.iter();
    v4 && v6 && hosts.all(|(own, pod)| after.hosts.get(own).is_none_or(|it| it.class == pod.class))
}

/// The verdicts in numbers. An allocation without number (its table is full) becomes a refusal.
fn number_verdicts(
    policy: &Policy,
    numbers: &BTreeMap<AllocationName, u32>,
    rules: &[u32],
) -> Vec<(VerdictEntry, VerdictValue)> {
    let number = |name: &AllocationName| numbers.get(name).and_then(|number| u16::try_from(*number).ok());
    // Thousands of verdicts share an allocation.
    let mut known: HashMap<*const AllocationName, Option<u16>> = HashMap::new();
    let mut of = |name: &AllocationName| *known.entry(name).or_insert_with(|| number(name));
    let verdicts = policy.verdicts.iter().map(|(key, verdict)| {
        let action = verdict.action;
        let binding = number_binding(verdict.rule, action == ACTION_PASS, rules);
        let value = VerdictValue { action, binding, ..Default::default() };
        let mut numbered = verdict.allocations().filter_map(&mut of);
        let value = match numbered.next() {
            None if verdict.allocation.is_none() => value,
            None => VerdictValue { action: ACTION_DENY, ..value },
            Some(allocation) => {
                VerdictValue { allocation, secondary: numbered.next().unwrap_or(allocation), ..value }
            }
        };
        (*key, value)
    });
    verdicts.collect()
}

/// All but the verdicts, in numbers.
fn number_pods(policy: &Policy, suffixes: &BTreeMap<Ipv6Addr, u32>) -> Generation {
    let pods6 = policy.pods6.iter().map(|(address, pod)| {
        let PodValue { class, incarnation, mac, .. } = *pod;
        let suffix = suffixes.get(address).copied().unwrap_or_default().to_be();
        (*address, Pod6Value { class, incarnation, suffix, mac, pad: 0 })
    });
    Generation {
        pods6: pods6.collect(),
        pods: policy.pods.clone(),
        hosts: policy.hosts.clone(),
        destinations: policy.destinations.clone(),
        ports: policy.ports.clone(),
        verdicts: BTreeMap::new(),
    }
}
