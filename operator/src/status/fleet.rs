//! What the nodes have of what they should have: the "n of m nodes" of `Programmed`.

use super::View;
use super::conditions::Wanted;
use crate::report::{Enforced, Programmed, ReportStatus, rule_key};
use crate::watch::{Snapshot, by_name};
use crate::world::{agent_state, is_ready};
use aegis_core::egress::Egress;
use aegis_core::model::{Address, AllocationName, Site, State};
use aegis_core::selector::{Labels, site_of};
use aegis_crds::{
    AllocationRef, Demand, EgressAddress, HoldingState, Limited, Observed, UnresolvedHost, ZoneBinding,
    reason, type_,
};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Most nodes that a message names.
const NAMED: usize = 3;

/// All nodes, with what their agents report.
#[derive(Default)]
pub struct Fleet<'a> {
    nodes: BTreeMap<&'a str, Member<'a>>,
    demand: HashMap<&'a AllocationRef, Vec<(&'a str, &'a Demand)>>,
    limited: HashMap<&'a AllocationRef, Vec<(&'a str, &'a Limited)>>,
    /// The lists that nodes have of addresses, each once.
    addresses: HashMap<*const Programmed, &'a [Programmed]>,
    /// Those that they have of bindings and policies.
    rules: HashMap<*const Enforced, &'a [Enforced]>,
    /// Pods that each of these covers, over all nodes.
    pods: HashMap<&'a str, u32>,
    /// What policies that only observe would have done, over all nodes.
    observed: HashMap<&'a str, Observed>,
}

/// Which nodes an object concerns.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Concerns {
    /// Those that hold slices.
    Holders,
    /// Every node.
    All,
}

struct Member<'a> {
    /// Why its agent is not ready.
    state: Result<(), String>,
    /// New slices can be given to it.
    ready: bool,
    reported: bool,
    labels: &'a Labels,
    status: Option<&'a ReportStatus>,
}

/// What an allocation has once the plan is applied.
#[derive(Default)]
pub struct Share<'a> {
    /// Its addresses, ascending.
    pub addresses: Vec<&'a Address>,
    /// Which nodes hold slices: by node and address the epoch that the node needs.
    pub holders: BTreeMap<&'a str, BTreeMap<Egress, i64>>,
}

impl Share<'_> {
    /// Whether some node may start flows from one of its addresses.
    pub fn serves(&self) -> bool {
        self.addresses.iter().any(|it| it.is_held())
    }
}

/// What each allocation has, as planned or frozen.
pub fn shares(view: &View) -> HashMap<&AllocationName, Share<'_>> {
    let mut all: Vec<&Address> = view.plan.addresses.iter().chain(&view.world.frozen).collect();
    all.sort_by_key(|address| address.address);
    let mut shares: HashMap<&AllocationName, Share> = HashMap::new();
    for address in all {
        let share = shares.entry(&address.allocation).or_default();
        share.addresses.push(address);
        for holding in &address.holdings {
            if let State::Held | State::Draining = holding.state {
                let epochs = share.holders.entry(&holding.node).or_default();
                let epoch = epochs.entry(address.address).or_default();
                *epoch = holding.epoch.max(*epoch);
            }
        }
    }
    shares
}

/// Slices that nodes hold, live or draining.
pub fn slices_held(object: &EgressAddress) -> u32 {
    let held = object.spec.holdings.iter().filter(|holding| holding.state != HoldingState::Quarantined);
    held.map(|holding| (holding.last + 1).saturating_sub(holding.first)).sum()
}

/// The allocation that a binding names.
pub fn allocation_of(object: &ZoneBinding) -> AllocationName {
    AllocationName {
        account: object.namespace().unwrap_or_default(),
        name: object.spec.allocation_ref.name.clone(),
    }
}

impl<'a> Fleet<'a> {
    /// Gathers. A report without a Node is of a node that is gone.
    pub fn of(snapshot: &'a Snapshot) -> Fleet<'a> {
        let reports = by_name(&snapshot.egress_nodes);
        let mut fleet = Fleet::default();
        for node in snapshot.nodes.iter().filter_map(|node| node.0.as_ref().ok()) {
            let Some(name) = node.metadata.name.as_deref() else { continue };
            let report = reports.get(name).copied();
            let status = report.and_then(|report| report.status.as_ref());
            let member = Member {
                state: agent_state(report, snapshot.agent(name)),
                ready: is_ready(node, report, snapshot.agent(name)),
                reported: report.is_some(),
                labels: node.labels(),
                status,
            };
            fleet.nodes.insert(name, member);
            let Some(status) = status else { continue };
            for demand in &status.told.demand {
                fleet.demand.entry(&demand.allocation).or_default().push((name, demand));
            }
            for limited in &status.told.limited {
                fleet.limited.entry(&limited.allocation).or_default().push((name, limited));
            }
            fleet.addresses.insert(status.addresses.as_ptr(), &status.addresses);
            fleet.rules.insert(status.rules.as_ptr(), &status.rules);
            for (policy, observed) in &status.observed {
                let sum = fleet.observed.entry(policy.as_str()).or_default();
                sum.flows = sum.flows.saturating_add(observed.flows);
                sum.refused = sum.refused.saturating_add(observed.refused);
            }
            for (place, pods) in &status.pods {
                if let Some(entry) = status.rules.get(*place) {
                    *fleet.pods.entry(&entry.rule).or_default() += pods;
                }
            }
        }
        fleet
    }

    /// What each node wants of an allocation.
    pub fn demand(&self, allocation: &AllocationName) -> &[(&'a str, &'a Demand)] {
        let name = AllocationRef { namespace: allocation.account.clone(), name: allocation.name.clone() };
        self.demand.get(&name).map(Vec::as_slice).unwrap_or_default()
    }

    /// What limits of an allocation refuse on each node.
    pub fn limited(&self, allocation: &AllocationName) -> &[(&'a str, &'a Limited)] {
        let name = AllocationRef { namespace: allocation.account.clone(), name: allocation.name.clone() };
        self.limited.get(&name).map(Vec::as_slice).unwrap_or_default()
    }

    /// Host names that have no address, by the nodes that have looked.
    pub fn unresolved(&self) -> impl Iterator<Item = (&'a str, &'a UnresolvedHost)> {
        self.nodes.iter().flat_map(|(name, member)| {
            let unresolved = member.status.into_iter().flat_map(|status| &status.told.unresolved);
            unresolved.map(|entry| (*name, entry))
        })
    }

    /// The site that a node belongs to, as its place among their names.
    pub fn site(&self, sites: &BTreeMap<String, Site>, node: &str) -> Option<usize> {
        site_of(sites, self.nodes.get(node)?.labels)
    }

    /// Pods that a binding or a policy covers, over all nodes.
    pub fn pods(&self, object: &impl ResourceExt) -> u32 {
        self.pods.get(key(object).as_str()).copied().unwrap_or_default()
    }

    /// What a policy that only observes would have done, over all nodes.
    pub fn observed(&self, policy: &str) -> Observed {
        self.observed.get(policy).copied().unwrap_or_default()
    }

    /// Whether all nodes know countries, or else which do not, and why.
    pub fn knows_countries(&self) -> Wanted {
        let asked = self.nodes.iter().filter_map(|(name, member)| {
            let conditions = &member.status?.told.conditions;
            Some((*name, conditions.iter().find(|it| it.type_ == type_::COUNTRIES_KNOWN)?))
        });
        let (known, not): (Vec<_>, Vec<_>) = asked.partition(|(_, condition)| condition.status == "True");
        let all = known.len() + not.len();
        if all == 0 {
            return Wanted::bad(
                type_::COUNTRIES_KNOWN,
                reason::PENDING,
                "no node has said yet whether it knows countries",
            );
        }
        let mut message = format!("{} of {all} nodes have read their database of countries", known.len());
        let Some((_, first)) = not.first() else {
            return Wanted::good(type_::COUNTRIES_KNOWN, reason::DATABASE_READ, &message);
        };
        let reason = match first.reason.as_str() {
            reason::NO_DATABASE => reason::NO_DATABASE,
            _ => reason::DATABASE_UNREADABLE,
        };
        append(&mut message, "not", not.iter().map(|(name, _)| (*name).to_owned()).collect());
        message += &format!(": {}", first.message);
        Wanted { type_: type_::COUNTRIES_KNOWN, status: false, reason, message }
    }

    /// Whether the holders of an allocation send from what they hold.
    pub fn programmed_allocation<'n>(&'n self, share: &'n Share, addresses: &str) -> Wanted {
        let holders = &share.holders;
        if holders.is_empty() {
            return Wanted::bad(type_::PROGRAMMED, reason::PENDING, "no node holds slices yet");
        }
        let has = |node: &str, member: Option<&Member>| {
            let needed = holders.get(node).into_iter().flatten();
            let list = member.and_then(|it| it.status).map(|status| &*status.addresses).unwrap_or_default();
            needed.into_iter().all(|(address, needed)| epoch(list, *address) >= Some(*needed))
        };
        self.programmed(holders.keys().copied().collect(), has, addresses, Concerns::Holders)
    }

    /// What slices that drain (and, of an allocation that is being deleted, those that rest) wait for: which nodes,
    /// why, until when, and what to do. Nothing if none does.
    pub fn drain(&self, addresses: &[&Address], deleting: bool) -> Option<String> {
        let holdings = addresses.iter().flat_map(|address| &address.holdings);
        let (mut draining, mut rested) = (BTreeSet::new(), None);
        for holding in holdings {
            match holding.state {
                State::Held => {}
                State::Draining => drop(draining.insert(holding.node.as_str())),
                State::Quarantined { until } => rested = Some(rested.map_or(until, |it: i64| it.min(until))),
            }
        }
        let mut message = String::new();
        if !draining.is_empty() {
            let nodes =
                if draining.len() == 1 { "1 node has" } else { &format!("{} nodes have", draining.len()) };
            message = format!("{nodes} ports to drain");
            let why = |node: &&str| match self.why(node) {
                Some(why) => format!("{node} ({why})"),
                None => format!("{node} (live flows)"),
            };
            append(&mut message, "waiting for", draining.iter().map(why).collect());
            message += "; flows end by themselves or with their pods; of a node that is off for good, delete the Node or taint it node.kubernetes.io/out-of-service";
        }
        let rested = rested.filter(|_| deleting).and_then(|until| Timestamp::from_second(until).ok());
        if let Some(until) = rested {
            let more = if message.is_empty() { "" } else { "; " };
            message += &format!("{more}the first ports have rested at {until}");
        }
        (!message.is_empty()).then_some(message)
    }

    /// Whether all nodes know who holds which slice of an address.
    pub fn programmed_address<'n>(&'n self, object: &'n EgressAddress) -> Wanted {
        let address: Option<Egress> = object.spec.address.parse().ok();
        let lists = self
            .addresses
            .iter()
            .filter(|(_, list)| address.and_then(|address| epoch(list, address)) >= Some(object.spec.epoch));
        let lists: HashSet<_> = lists.map(|(list, _)| *list).collect();
        let has = |_: &str, member: Option<&Member>| {
            member.and_then(|it| it.status).is_some_and(|it| lists.contains(&it.addresses.as_ptr()))
        };
        let mut concerned = self.ready();
        let held = object.spec.holdings.iter().filter(|holding| holding.state != HoldingState::Quarantined);
        concerned.extend(held.map(|holding| holding.node.as_str()));
        self.programmed(concerned, has, &format!("epoch {}", object.spec.epoch), Concerns::All)
    }

    /// Whether all nodes enforce a binding or a policy.
    pub fn programmed_rule(&self, object: &impl ResourceExt) -> Wanted {
        let rule = key(object);
        let generation = object.meta().generation.unwrap_or_default();
        let lists = lists_with(&self.rules, |list| {
            let at = list.binary_search_by(|entry| (*entry.rule).cmp(&rule)).ok();
            at.and_then(|at| list.get(at)).is_some_and(|entry| entry.generation >= generation)
        });
        let has = |_: &str, member: Option<&Member>| {
            member.and_then(|it| it.status).is_some_and(|it| lists.contains(&it.rules.as_ptr()))
        };
        self.programmed(self.ready(), has, "it", Concerns::All)
    }

    fn ready(&self) -> BTreeSet<&str> {
        self.nodes.iter().filter(|(_, member)| member.ready).map(|(name, _)| *name).collect()
    }

    /// Counts, and names the nodes that are behind and the agents that are not ready.
    ///
    /// A node that has it counts whether its agent is ready or not: agents come and go, what is programmed stays, and a
    /// restart must not change the status of every object.
    fn programmed<'n>(
        &'n self,
        mut concerned: BTreeSet<&'n str>,
        has: impl Fn(&str, Option<&Member>) -> bool,
        what: &str,
        concerns: Concerns,
    ) -> Wanted {
        let mut unready = Vec::new();
        if concerns == Concerns::All {
            for (name, member) in &self.nodes {
                if concerned.contains(name) {
                    continue;
                }
                if has(name, Some(member)) {
                    concerned.insert(name);
                } else if member.reported {
                    unready.push(format!("{name} ({})", self.why(name).unwrap_or_default()));
                }
            }
        }
        let (done, behind): (Vec<&str>, Vec<&str>) =
            concerned.iter().partition(|node| has(node, self.nodes.get(*node)));
        let mut message = format!("{} of {} nodes have {what}", done.len(), concerned.len());
        if concerned.is_empty() {
            message =
                "no node has a ready agent: see `kubectl get egressnodes` and the agents' pods".to_owned();
        }
        let waiting = behind.iter().map(|node| match self.why(node) {
            Some(why) => format!("{node} ({why})"),
            None => (*node).to_owned(),
        });
        append(&mut message, "waiting for", waiting.collect());
        append(&mut message, "not ready:", unready);
        let all = behind.is_empty() && !concerned.is_empty();
        Wanted {
            type_: type_::PROGRAMMED,
            status: all,
            reason: if all { reason::PROGRAMMED } else { reason::PENDING },
            message,
        }
    }

    fn why(&self, node: &str) -> Option<String> {
        match self.nodes.get(node) {
            None => Some("the node is gone".to_owned()),
            Some(Member { state: Err(why), .. }) => Some(why.clone()),
            Some(Member { ready: false, .. }) => {
                Some("the cluster says that the node is not ready".to_owned())
            }
            Some(_) => None,
        }
    }
}

/// Those of the lists that have something.
fn lists_with<T>(lists: &HashMap<*const T, &[T]>, has: impl Fn(&[T]) -> bool) -> HashSet<*const T> {
    lists.iter().filter(|(_, list)| has(list)).map(|(list, _)| *list).collect()
}

/// Epoch that a node with this list has of an address.
fn epoch(list: &[Programmed], address: Egress) -> Option<i64> {
    let at = list.binary_search_by_key(&address, |entry| entry.address).ok()?;
    list.get(at).map(|entry| entry.epoch)
}

fn key(object: &impl ResourceExt) -> String {
    rule_key(&object.namespace().unwrap_or_default(), &object.name_any())
}

fn append(message: &mut String, what: &str, nodes: Vec<String>) {
    if nodes.is_empty() {
        return;
    }
    *message += &format!("; {what} {}", list(&nodes));
}

/// The first few names, and how many more there are.
pub fn list<S: AsRef<str>>(names: &[S]) -> String {
    let mut text = names.iter().take(NAMED).map(AsRef::as_ref).collect::<Vec<&str>>().join(", ");
    if names.len() > NAMED {
        text += &format!(" and {} more", names.len() - NAMED);
    }
    text
}
