//! The policy maps: a new generation, or single pods of the live one.

use super::{Builder, Op};
use crate::desired::Policy;
use crate::observed::{Generation, to_map6};
use crate::suffix;
use aegis_common::{
    ACTION_DENY, Config6, HOST_UNKNOWN, HostValue, MAC_LEAVING, MAX_POD_RANGES6, Pod6Value, PodRange6,
    PodValue, VerdictValue,
};
use aegis_core::model::AllocationName;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

impl Builder<'_> {
    pub(super) fn write_policy(
        &mut self,
        peers: &BTreeMap<Ipv4Addr, u32>,
        numbers: &BTreeMap<AllocationName, u32>,
    ) {
        let observed = self.observed;
        let number = observed.config.generation;
        let mut live = observed.live();
        let pods6 = self.desired.policy.pods6.keys().copied().collect();
        let suffixes = suffix::assign(&pods6, &observed.suffixes);
        let wanted = number_policy(&self.desired.policy, numbers, &suffixes);
        let same_rules = live.destinations == wanted.destinations
            && live.ports == wanted.ports
            && live.verdicts == wanted.verdicts;
        let next = if same_rules { number } else { number.wrapping_add(1) };

        for (generation, contents) in &observed.generations {
            if *generation != number {
                self.remove_generation(*generation, contents);
            }
        }
        // An address goes from one pod to the next by way of nobody: neither inherits anything of the other.
        let stays = |address: &Ipv4Addr, pod: &PodValue| {
            wanted.pods.get(address).is_some_and(|next| next.incarnation == pod.incarnation)
        };
        for (address, pod) in live.pods.extract_if(.., |address, pod| !stays(address, pod)) {
            // The map remembers what is still to be forgotten, should that fail or the agent end before.
            let value = PodValue { incarnation: 0, mac: MAC_LEAVING, ..pod };
            if pod != value {
                self.push(Op::SetPod { generation: number, address, value });
            }
            self.push(Op::ForgetConnections { address: address.into() });
            self.push(Op::RemovePod { generation: number, address });
        }
        let stays = |address: &Ipv6Addr, pod: &Pod6Value| {
            wanted.pods6.get(address).is_some_and(|next| next.incarnation == pod.incarnation)
        };
        for (address, pod) in live.pods6.extract_if(.., |address, pod| !stays(address, pod)) {
            let value = Pod6Value { incarnation: 0, mac: MAC_LEAVING, ..pod };
            if pod != value {
                self.push(Op::SetPod6 { generation: number, address, value });
            }
            self.push(Op::ForgetConnections { address: address.into() });
            self.push(Op::RemovePod6 { generation: number, address });
        }
        self.write_suffixes(&suffixes);
        if same_rules {
            for (address, pod) in
                wanted.pods.iter().filter(|(address, pod)| live.pods.get(address) != Some(pod))
            {
                self.push(Op::SetPod { generation: number, address: *address, value: *pod });
            }
            self.change_hosts(number, &live.hosts, &wanted.hosts);
            for (address, pod) in
                wanted.pods6.iter().filter(|(address, pod)| live.pods6.get(address) != Some(pod))
            {
                self.push(Op::SetPod6 { generation: number, address: *address, value: *pod });
            }
        } else {
            self.write_generation(next, &wanted);
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
        if observed.config6 != config6 {
            self.push(Op::SetConfig6(config6));
        }
        if !same_rules {
            self.push(Op::Settle);
            self.remove_generation(number, &live);
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
    fn config6(&self) -> Config6 {
        let settings = &self.desired.settings;
        let mut config = self.observed.config6;
        if !settings.six {
            return config;
        }
        config.active = 1;
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

/// The policy in numbers. An allocation without number (its table is full) becomes a refusal.
fn number_policy(
    policy: &Policy,
    numbers: &BTreeMap<AllocationName, u32>,
    suffixes: &BTreeMap<Ipv6Addr, u32>,
) -> Generation {
    let verdicts = policy.verdicts.iter().map(|(key, verdict)| {
        let number =
            verdict.allocation.as_ref().map(|name| numbers.get(name).and_then(|n| u16::try_from(*n).ok()));
        let value = match number {
            None => VerdictValue { action: verdict.action, allocation: 0, binding: verdict.binding },
            Some(Some(allocation)) => {
                VerdictValue { action: verdict.action, allocation, binding: verdict.binding }
            }
            Some(None) => VerdictValue { action: ACTION_DENY, allocation: 0, binding: verdict.binding },
        };
        (*key, value)
    });
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
        verdicts: verdicts.collect(),
    }
}
