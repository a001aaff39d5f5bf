//! What a turn tells: the report of the node, its readiness, and the metrics.

use super::{Controller, InForce};
use crate::demand::Want;
use crate::desired::{self, Desired, Inputs};
use crate::ethtool;
use crate::metrics::{RuleCount, Snapshot};
use crate::nri::Hook;
use crate::observed::Generation;
use crate::probe::Answer;
use crate::status::{self, Facts, NotReady, Pending, reason};
use crate::sweep::Usage;
use crate::uplink;
use crate::watch::Cluster;
use aegis_common::{CounterValue, MAX_ADDRESSES, MAX_ALLOCATIONS, MAX_PEERS, MAX_POD_RANGES};
use aegis_core::egress::Egress;
use aegis_core::model::AllocationName;
use aegis_core::slice::SliceSet;
use aegis_crds::Uplink;
use ipnet::{Ipv4Net, Ipv6Net};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Instant;

impl Controller {
    fn drained(&self, wanted: &Desired, usage: &Usage) -> BTreeMap<Egress, SliceSet> {
        let observed = &self.pinned.observed;
        let programmed = |address: &Ipv4Addr| i64::try_from(observed.holdings.get(address)?.epoch).ok();
        let busy = |address: &Ipv4Addr| {
            let settled = self.settled.address(*address, usage);
            settled.then(|| usage.slices.get(address).copied().unwrap_or(SliceSet::EMPTY))
        };
        let v4 = wanted.addresses.iter().map(|(address, object)| {
            let drained = object.rights().drained(object.epoch, programmed(address), busy(address));
            let sockets = observed.binds.get(address).map(|it| SliceSet::from_words(it.kept));
            let drained = drained.difference(sockets.unwrap_or_default());
            (object.egress(*address), drained)
        });
        let v6 = wanted.networks.iter().filter_map(|(network, object)| {
            let value = observed.networks.get(network)?;
            let settled = self.settled.address(*network, usage);
            let busy = usage.networks.get(&(*network, value.identity)).copied().unwrap_or_default();
            let programmed = i64::try_from(value.epoch).ok();
            Some((*network, object.rights().drained(object.epoch, programmed, settled.then_some(busy))))
        });
        v4.chain(v6).filter(|(_, slices)| !slices.is_empty()).collect()
    }

    /// Reports to the API server and to whoever reads the metrics.
    pub(super) fn tell(&mut self, inputs: &Inputs, usage: &Usage, synced: bool) {
        self.look_at_rules();
        let ready = self.ready(inputs, synced);
        // Not copied: policies may name thousands of ranges, and this is done every second.
        let force = self.in_force.clone().unwrap_or_default();
        let InForce { wanted, bindings, policies } = &*force;
        let counters = self.pinned.plane.as_ref().and_then(|plane| plane.counters().ok()).unwrap_or_default();
        let wants = self.sockets.add_to(self.growing.wants.clone());
        let limited = self.look_at_limits(&counters);
        let drained = self.drained(wanted, usage);
        let modes = self.attached().uplinks;
        let uplinks = self.devices.uplinks.iter().map(|(index, device)| Uplink {
            device: device.name.clone(),
            mtu: device.mtu,
            xdp_mode: modes.get(index).map_or_else(|| "None".to_owned(), |(_, mode)| mode.clone()),
        });
        let status = status::report(&Facts {
            tunnel_address: inputs.tunnel_address,
            uplinks: uplinks.collect(),
            desired: wanted,
            observed: &self.pinned.observed,
            bindings,
            policies,
            wants: &wants,
            limited: &limited,
            pods: &inputs.pods,
            drained: &drained,
            policy_in_force: self.in_force.is_some(),
            ready: &ready,
            room: &self.room(wanted),
            announced: self.standing().as_ref(),
            keeps_deadlines: self.pinned.plane.as_ref().is_some_and(|plane| !plane.inherits()),
            lease: self.lease(),
            fast: self.fast.as_ref(),
            hook: &self.sandboxes.hook(),
            leaving: self.leaving,
            countries: self.known_countries(policies).as_ref(),
            tally: self.tally.totals(),
            unresolved: self.unresolved(),
        });
        let (uid, present, nodes) = {
            let cluster = self.shared.lock();
            let key = (String::new(), self.args.node_name.clone());
            let uid = cluster.nodes.objects.get(&key).map(|node| node.uid.clone()).unwrap_or_default();
            (uid, cluster.reports.objects.contains_key(&key), cluster.nodes.objects.len())
        };
        let pending = Pending {
            identity: status::Identity { node: self.args.node_name.clone(), uid },
            present,
            // Before the first list the object may say more than the agent knows.
            status: synced.then_some(status),
            nodes,
        };
        self.report.send_if_modified(|current| {
            let changed = *current != pending;
            *current = pending;
            changed
        });
        let rules = self.rule_counts(wanted, policies);
        self.show(counters, usage, wanted, &wants, inputs, rules, ready);
    }

    /// What has no room. That is no reason to give this node less of everything else.
    fn room(&self, wanted: &Desired) -> Result<(), String> {
        let table = |table: &&str| match *table {
            "addresses" => format!(
                "a node knows at most {MAX_ADDRESSES} egress addresses: give up allocations or addresses that are not used"
            ),
            "allocations" => format!(
                "a node knows at most {MAX_ALLOCATIONS} allocations with an address: give up those that are not used"
            ),
            _ => format!("a node knows at most {MAX_PEERS} others"),
        };
        let account = |account: &String| {
            format!(
                "the rules for pods of {account} need too many entries on this node, so those that are covered open nothing \
                 outside: merge bindings and policies, name fewer CIDRs, countries and port ranges, or raise the chart's \
                 agent.maxDestinations"
            )
        };
        let unobserved = wanted.unobserved.then(|| {
            "policies with mode Observe need too many entries on this node, so they count nothing here: enforce or delete some"
                .to_owned()
        });
        let lacks: Vec<String> =
            self.full.iter().map(table).chain(wanted.refused.iter().map(account)).chain(unobserved).collect();
        let lacks: Vec<String> = lacks.into_iter().chain(self.naming.names.lacks_room()).collect();
        if lacks.is_empty() { Ok(()) } else { Err(lacks.join("; ")) }
    }

    fn ready(&self, inputs: &Inputs, synced: bool) -> Result<(), NotReady> {
        let not = |reason, message: String| Err(NotReady { reason, message });
        if self.pinned.plane.is_none() {
            return not(
                reason::LOAD_FAILED,
                format!("cannot load the eBPF programs: {}", self.pinned.failure),
            );
        }
        if let Err(error) = &self.network {
            return not(reason::NETWORK_UNKNOWN, format!("cannot read the node's network: {error}"));
        }
        if !synced {
            let message = waiting(&self.shared.lock(), self.countries.tried);
            return not(reason::WAITING, message);
        }
        if inputs.tunnel_address.is_none() {
            return not(
                reason::NO_UPLINK,
                "the Node object has no IPv4 InternalIP: set the kubelet's --node-ip".into(),
            );
        }
        let network = self.network.as_ref().ok();
        let absent = network.map(|network| uplink::absent(network, &self.args.uplinks)).unwrap_or_default();
        if !absent.is_empty() {
            return not(
                reason::NO_UPLINK,
                format!("--uplinks names {}, which this node does not have", absent.join(", ")),
            );
        }
        if self.devices.uplinks.is_empty() {
            return not(
                reason::NO_UPLINK,
                "no default route and no device with the node's address: name one with --uplinks".into(),
            );
        }
        if inputs.pod_ranges.is_empty() {
            return not(
                reason::NO_POD_RANGE,
                "the Node object has no podCIDRs: name the node's range with --pod-cidrs".into(),
            );
        }
        let v4 = Ipv4Net::aggregate(&desired::of_v4(&inputs.pod_ranges)).len();
        let v6 = Ipv6Net::aggregate(&desired::of_v6(&inputs.pod_ranges)).len();
        let ranges = v4.max(v6);
        if ranges > MAX_POD_RANGES {
            return not(
                reason::NO_POD_RANGE,
                format!(
                    "pods that start in the last {} of {ranges} ranges are not held: name at most {MAX_POD_RANGES}, \
                     larger ones, with --pod-cidrs",
                    ranges - MAX_POD_RANGES
                ),
            );
        }
        if let Some((device, error)) = self.attach_errors.first_key_value() {
            return not(reason::ATTACH_FAILED, format!("{device}: {error}"));
        }
        if let Err(error) = &self.table.state {
            return not(
                reason::NFT_MISSING,
                format!("covered traffic is held until the table can be written: {error}"),
            );
        }
        let groupless = self.in_force.as_ref().map_or(0, |force| force.wanted.groupless);
        if groupless > 0 && self.groups.roots.is_empty() {
            let why = self.no_groups.clone().unwrap_or_else(|| "kubelet's is not there".to_owned());
            return not(
                reason::GROUPS_UNKNOWN,
                format!(
                    "{groupless} covered pods of the host network leave with the node's address, as their control groups are not \
                     known ({why}): name the folder with --cgroups"
                ),
            );
        }
        if let Some(error) = &self.sockets.failure {
            return not(
                reason::ATTACH_FAILED,
                format!("sockets get no addresses, and are translated: {error}"),
            );
        }
        if let Err(error) = &self.table6.state
            && desired::needs_six(inputs)
        {
            return not(
                reason::NFT_MISSING,
                format!(
                    "IPv6 packets pass as if there were no binding until the table ip6 can be written: {error}"
                ),
            );
        }
        if let Some(error) = self.naming.names.failure() {
            return not(reason::NAMES_FAILED, error);
        }
        if let Some(error) = &self.naming.failure {
            return not(
                reason::NAMES_FAILED,
                format!("pods whose queries went to a resolver before cannot ask it: {error}"),
            );
        }
        if let Some(error) = &self.write_error {
            return not(reason::WRITE_FAILED, error.clone());
        }
        if let Some(error) = self.pinned.sweep_failure() {
            return not(
                reason::SWEEP_FAILED,
                format!("flows that have ended keep their ports, until none is free: {error}"),
            );
        }
        let cluster = self.shared.lock();
        if let Some(((_, name), error)) = cluster.policies.unreadable().next() {
            return not(
                reason::POLICY_UNREADABLE,
                format!(
                    "EgressPolicy {name} cannot be read ({error}): until it is changed or deleted, or this agent is upgraded, pods \
                     open nothing outside but what other policies and bindings cover"
                ),
            );
        }
        let named = |name: &String| {
            cluster.policies.objects.values().any(|policy| policy.applications.contains(name))
        };
        if let Some(((_, name), error)) = cluster.applications.unreadable().find(|((_, name), _)| named(name))
        {
            return not(
                reason::APPLICATION_UNREADABLE,
                format!(
                    "EgressApplication {name} cannot be read ({error}): until it is changed, or this agent is upgraded, pods that a \
                     policy with it matches otherwise are refused whatever no policy before it decides"
                ),
            );
        }
        if let Some(((account, name), error)) = cluster.bindings.unreadable().next() {
            return not(
                reason::BINDING_UNREADABLE,
                format!(
                    "ZoneBinding {account}/{name} cannot be read ({error}): until it is changed or deleted, or this agent is \
                     upgraded, pods of {account} open nothing outside but what other bindings cover"
                ),
            );
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "each is told apart")]
    fn show(
        &self,
        counters: Vec<CounterValue>,
        usage: &Usage,
        wanted: &Desired,
        wants: &BTreeMap<AllocationName, Want>,
        inputs: &Inputs,
        rules: Vec<RuleCount>,
        ready: Result<(), NotReady>,
    ) {
        let (watch_errors, invalid_objects) = {
            let cluster = self.shared.lock();
            (cluster.errors().len() as u64, cluster.invalid().len() as u64)
        };
        let nothing = Generation::default();
        let live = self.pinned.observed.generations.get(&self.pinned.observed.config.generation);
        let count = |entries: usize| entries as u64;
        let look = self.health.look(self.keeper.routed());
        let on_link = self.l2.outcome();
        let mut tables = BTreeMap::from([
            ("addresses", (count(self.pinned.observed.addresses.len()), aegis_common::MAX_ADDRESSES.into())),
            ("peers", (count(self.pinned.observed.peers.len()), aegis_common::MAX_PEERS.into())),
            (
                "allocations",
                (count(self.pinned.observed.allocations.len()), aegis_common::MAX_ALLOCATIONS.into()),
            ),
        ]);
        if let (live, Some(plane)) = (live.unwrap_or(&nothing), &self.pinned.plane) {
            tables.extend(plane.sizes().into_iter().map(|(name, size)| {
                let used = match name {
                    "flows" => usage.flows,
                    "blocks" => usage.blocks,
                    "pods" => count(live.pods.len()),
                    "hosts" => count(live.hosts.len()),
                    "pods6" => count(live.pods6.len()),
                    "flows6" => usage.flows6,
                    "destinations" => count(live.destinations.len()),
                    "ports" => count(live.ports.len()),
                    _ => count(live.verdicts.len()),
                };
                (name, (used, size))
            }));
        }
        *self.metrics.lock() = Snapshot {
            counters,
            rules,
            countries: self.countries.database.as_ref().map(|it| (it.built, it.ranges as u64)),
            country_failures: self.countries.failures,
            tables,
            ports: {
                let ports = usage.ports.by_address.iter();
                ports.map(|(own, used)| (self.pinned.observed.egress(*own), *used)).collect()
            },
            sockets: self.sockets.by_address().clone(),
            slices: {
                let v4 = wanted.addresses.iter().map(|(own, it)| (it.egress(*own), it));
                let all = v4.chain(wanted.networks.iter().map(|(own, it)| (*own, it)));
                all.map(|(own, it)| (own, (it.allowed.union(it.bound).len(), it.draining.len()))).collect()
            },
            fill: wants.iter().map(|(name, want)| (labels(name), want.fill_percent)).collect(),
            limited: self.growing.counted.iter().map(|(name, count)| (labels(name), count.limits)).collect(),
            taken: self
                .numbers
                .iter()
                .map(|(name, number)| (labels(name), usage.taken.get(number).copied().unwrap_or_default()))
                .collect(),
            generation: self.pinned.observed.config.generation,
            groupless: wanted.groupless.into(),
            pods: (
                u64::from(wanted.covered_pods),
                inputs.pods.iter().map(|pod| pod.addresses.len()).sum::<usize>() as u64,
            ),
            announced: self.keeper.routed().len(),
            sessions: (look.up(), look.sessions.len() - look.up()),
            routing_daemon: look.failure.is_none(),
            route_repairs: self.keeper.repairs,
            answers: [(&on_link.answering, true), (&on_link.followed, false), (&on_link.vacant, false)]
                .into_iter()
                .flat_map(|(addresses, own)| addresses.iter().map(move |address| (*address, own)))
                .collect(),
            vacant: on_link.vacant.len(),
            silent_gateways: inputs
                .answers
                .iter()
                .filter(|(node, answer)| self.gateways.contains(node) && **answer != Answer::Prompt)
                .count(),
            watch_errors,
            invalid_objects,
            stale_addresses: count(self.stale.len()),
            orphaned_addresses: count(self.orphaned.len()),
            holding_unknown: self.pinned.observed.config.hold_unknown == 1,
            runtime_hook: match self.sandboxes.hook() {
                Hook::Off => None,
                hook => Some(matches!(hook, Hook::Connected(_))),
            },
            xdp_tx_errors: self.xdp_tx_errors(),
            early_fragments: self.pinned.early_fragments(),
            meters: self.pinned.meters(),
            nft_repairs: self.table.repairs + self.table6.repairs,
            nft_drops: [("ip", &self.table), ("ip6", &self.table6)]
                .into_iter()
                .flat_map(|(family, table)| table.drops().iter().map(move |(why, n)| ((family, *why), *n)))
                .collect(),
            writes: self.counts,
            scan_seconds: usage.scan.as_secs_f64(),
            lease_seconds_left: self.lease_seconds_left(),
            names: self.naming.names.tally(),
            ready,
            alive: Instant::now(),
        };
    }

    fn xdp_tx_errors(&self) -> BTreeMap<String, u64> {
        let names = self.devices.uplinks.values().map(|device| &device.name);
        // Drivers without such a counter, or devices that have just gone, are not worth a word.
        names.filter_map(|name| Some((name.clone(), ethtool::sum(name, "xdp_tx_errors").ok()?))).collect()
    }
}

/// Namespace and name.
fn labels(name: &AllocationName) -> (String, String) {
    (name.account.clone(), name.name.clone())
}

/// What has not been listed yet, and why not.
fn waiting(cluster: &Cluster, countries: bool) -> String {
    if cluster.listed() && !countries {
        return "reading the database of countries; what is pinned stays in force".to_owned();
    }
    let errors = cluster.errors();
    let missing = cluster.missing().map(|kind| match errors.get(kind) {
        Some(error) => format!("{kind} ({error})"),
        None => kind.to_owned(),
    });
    let missing: Vec<String> = missing.collect();
    format!("waiting for {} from the API server; what is pinned stays in force", missing.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_comes_with_the_reason() {
        let mut cluster = Cluster::default();
        cluster.pods.listed = true;
        cluster.nodes.error = Some("forbidden".to_owned());
        let message = waiting(&cluster, false);
        assert!(message.contains("ZoneBinding, ") && message.contains("Node (forbidden)"), "{message}");
        assert!(!message.contains("Pod"), "{message}");
    }
}
