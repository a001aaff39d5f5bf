//! Policy: from policies, bindings and pods to the tables that a node's data plane looks up.
//!
//! IPv4 and IPv6 have tables of their own for pods and destinations, but classes in common, so that there is one table of verdicts.
//!
//! A packet costs three look-ups (pod -> class, destination -> class, port -> class) and one or two of the verdict: for the
//! three classes, or if there is none for its port, for whatever port. Everything that takes thought (which rule wins) is done
//! here, once for each combination of classes; a combination without a verdict passes with the node's address.

mod destinations;
mod explain;
mod impossible;
mod inside;
pub mod names;
mod ports;
mod posture;
mod rules;
mod services;
mod shadow;
mod terms;

use crate::egress::Family;
use crate::model::AllocationName;
use destinations::{Destinations, Members};
pub use explain::{Explanation, Miss, Packet, Step, explain};
pub use impossible::impossible;
pub use inside::never_covered;
use ipnet::IpNet;
use names::{HostPattern, Patterns, Resolved};
use ports::PortClasses;
pub use ports::{PortPrefix, PortRange};
pub use posture::{ConditionIs, Conditions, NodeFacts, Posture};
pub use rules::{
    Binding, BindingName, Countries, EgressPolicy, Exit, Expression, Identity, Operator, Pod, RuleName,
    Workloads, in_order,
};
use rules::{Rank, Rule};
pub use services::ServicePort;
pub use shadow::shadowed;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use terms::Term;
pub use terms::{Applications, Endpoint};

/// What a node's policy is made from. Order does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyInputs {
    /// All policies.
    pub policies: Vec<EgressPolicy>,
    /// All bindings.
    pub bindings: Vec<Binding>,
    /// The pods of this node.
    pub pods: Vec<Pod>,
    /// What the node is like.
    pub node: NodeFacts,
    /// Ranges of countries; `None` while nobody knows them: then policies that name countries refuse their pods whatever no policy
    /// before them decides, and those of them that only observe match nothing.
    pub countries: Option<Arc<Countries>>,
    /// Named applications. Policies that name one which is not among them are like those with countries that nobody knows.
    pub applications: Applications,
    /// Ranges inside the cluster (pods, services, nodes): never covered.
    pub internal: Vec<IpNet>,
    /// Ports of Services that have endpoints outside. What a pod sends to such an address is covered if something that it may get to
    /// is: which it is, is only decided afterwards.
    pub services: Vec<ServicePort>,
    /// Allocations that this node can send from over IPv4.
    pub usable: BTreeSet<AllocationName>,
    /// Those that it can send from over IPv6.
    pub usable6: BTreeSet<AllocationName>,
    /// Addresses that host names are known to have.
    pub resolved: Arc<Resolved>,
}

/// Most entries that each table of a [`NodePolicy`] may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// `destinations`, of each family.
    pub destinations: usize,
    /// `ports`.
    pub ports: usize,
    /// `verdicts`.
    pub verdicts: usize,
}

impl Default for Room {
    /// Room for everything.
    fn default() -> Room {
        Room { destinations: usize::MAX, ports: usize::MAX, verdicts: usize::MAX }
    }
}

/// What a node must enforce.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePolicy {
    /// Class of each local pod address; 0 = no rule covers it.
    pub pods: BTreeMap<IpAddr, u32>,
    /// Class of each pod of the host network, which has no address of its own, by its UID.
    pub hosts: BTreeMap<String, u32>,
    /// Longest-prefix table of destinations; no match = not covered.
    pub destinations: BTreeMap<IpNet, Destination>,
    /// Longest-prefix table of destination ports; no match (and ICMP) = class 0.
    pub ports: BTreeMap<PortPrefix, u32>,
    /// What happens, by pod, destination and port class; no entry for the port's class = as for port class 0; none there either =
    /// pass. `Pass` is present only where it stands in the way of something else.
    pub verdicts: BTreeMap<(u32, u32, u32), Action>,
    /// What would happen, by the keys of `verdicts`: the first policy that observes and comes before what decides.
    pub observed: BTreeMap<(u32, u32, u32), Observed>,
    /// Classes of destinations that only policies name which observe.
    pub only_observed: BTreeSet<u32>,
    /// Numbers of the rules that refuse because they say so, not for want of something to leave from.
    pub denying: BTreeSet<usize>,
    /// Rules that are switched on, in order; the index is the rule's number.
    pub rules: Vec<RuleName>,
    /// Local pods that each of them selects.
    pub covered: BTreeMap<RuleName, u32>,
    /// Allocations that selected pods are to leave from, whether they can or not.
    pub named: BTreeSet<AllocationName>,
    /// Local pod addresses that no rule with host names selects.
    pub nameless: BTreeSet<IpAddr>,
    /// Host names of the rules that select local pods.
    pub looked_up: BTreeSet<HostPattern>,
}

/// What a destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Inside the cluster.
    Internal,
    /// In what rules name; the class is at least 1.
    Class(u32),
}

/// What happens to a new flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It leaves with the node's address.
    Pass,
    /// It leaves from an address of the allocation.
    Allocate {
        /// The allocation; shared, since thousands of verdicts name the same.
        allocation: Arc<AllocationName>,
        /// Another one, that is left from where there is no port of the first towards a destination.
        secondary: Option<Arc<AllocationName>>,
        /// Number of the rule that says so.
        rule: usize,
    },
    /// It is refused: the rule says so, or there is nothing to leave from on this node.
    Deny {
        /// Number of the rule that says so.
        rule: usize,
    },
}

/// What a policy that observes would do to a new flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Its number.
    pub rule: usize,
    /// What it would do.
    pub action: Action,
}

/// Compiles. Of the rules that cover a packet the first policy counts (by precedence, then by name), else the binding with the
/// longest matching range, then the first by name.
pub fn compile(inputs: &PolicyInputs) -> NodePolicy {
    compile_within(inputs, &Room::default()).unwrap_or_default()
}

/// Compiles; `None` if it does not fit. A table that is too large is not made first.
pub fn compile_within(inputs: &PolicyInputs, room: &Room) -> Option<NodePolicy> {
    let rules = Rule::all(&inputs.policies, &inputs.bindings);
    let mut policy = NodePolicy {
        rules: rules.iter().map(|rule| rule.name()).collect(),
        covered: rules.iter().map(|rule| (rule.name(), 0)).collect(),
        denying: (0..rules.len())
            .filter(|number| rules[*number].denies() && !rules[*number].is_blind(inputs))
            .collect(),
        ..NodePolicy::default()
    };

    let pod_classes = classify_pods(inputs, &rules, &mut policy);
    // Only rules with a pod on this node take up room in its tables.
    let here: BTreeSet<usize> = pod_classes.iter().flat_map(|class| class.rules.iter().copied()).collect();
    let of_rule = |number: usize| {
        Term::of(rules[number], &inputs.applications).into_iter().map(move |term| (number, term))
    };
    let terms: Vec<(usize, Term<'_>)> = here.iter().copied().flat_map(of_rule).collect();
    let destinations = Destinations::new(&rules, &terms, inputs);
    policy.looked_up =
        here.iter().flat_map(|number| rules[*number].hosts(&inputs.applications)).cloned().collect();
    policy.destinations = destinations.table();
    let ports =
        PortClasses::new(terms.iter().enumerate().map(|(number, (_, term))| (number, &term.ports[..])));
    policy.ports = ports.prefixes();
    let six = policy.destinations.keys().filter(|range| Family::of(range) == Family::V6).count();
    if six.max(policy.destinations.len() - six) > room.destinations || policy.ports.len() > room.ports {
        return None;
    }

    // Which of several terms counts first does not depend on who sends.
    let by_rank = |covering: &[(usize, u8)]| -> Vec<usize> {
        let ranked = covering.iter().map(|(term, length)| {
            let rule = terms[*term].0;
            (rules[rule].rank(rule, *length), *term)
        });
        let mut ranked: Vec<(Rank, usize)> = ranked.collect();
        ranked.sort_unstable();
        ranked.into_iter().map(|(_, term)| term).collect()
    };
    let classes: Vec<(u32, &Members, Vec<usize>)> =
        destinations.classes().map(|(number, members)| (number, members, by_rank(&members.terms))).collect();
    let observes = |(term, _): &(usize, u8)| rules[terms[*term].0].observes();
    let only_observed =
        classes.iter().filter(|(_, it, _)| it.ways.is_empty() && it.terms.iter().all(observes));
    policy.only_observed = only_observed.map(|(number, ..)| *number).collect();

    // In the order of their keys: a tree is made from them at once, which takes a tenth of the time of as many insertions.
    let (mut verdicts, mut observed) = (Vec::new(), Vec::new());
    // Place of each rule among those of the class at hand.
    let mut places: Vec<Option<usize>> = vec![None; rules.len()];
    for (number, class) in (1..).zip(&pod_classes) {
        places.fill(None);
        for (place, rule) in class.rules.iter().enumerate() {
            places[*rule] = Some(place);
        }
        let actions: Vec<Actions> =
            class.rules.iter().map(|rule| Actions::of(inputs, &rules, *rule, class)).collect();
        let selecting = |term: &usize| Some((*term, &actions[places[terms[*term].0]?]));
        let mut candidates: Vec<(usize, &Actions)> = Vec::new();
        for (destination_class, members, in_rank) in &classes {
            // Terms of the rules that select these pods, the one that counts first, up to one that leaves nothing to others.
            candidates.clear();
            for (term, it) in in_rank.iter().filter_map(selecting) {
                candidates.push((term, it));
                let all = terms[term].1.ports.is_empty() && *it.over(members.family) != Action::Pass;
                if all && !rules[it.rule].observes() {
                    break;
                }
            }
            let behind = |port_class: u32| {
                let taken = members.ways.iter().filter(|way| way.takes(port_class, &ports));
                let mut first = taken.filter_map(|way| {
                    let order = by_rank(&way.terms);
                    let mut those = order.iter().filter_map(selecting);
                    let decides = those.find(|(_, it)| !rules[it.rule].observes());
                    decides.map(|(_, it)| it.over(members.family))
                });
                Verdict { action: first.find(|action| **action != Action::Pass), ..Verdict::default() }
            };
            let verdict = |port_class: u32| {
                if !members.ways.is_empty() {
                    return behind(port_class);
                }
                let covers = |term: usize| terms[term].1.ports.is_empty() || ports.has(port_class, term);
                let matching = candidates.iter().filter(|(term, _)| covers(*term));
                let mut verdict = Verdict::default();
                for (_, it) in matching {
                    let action = it.over(members.family);
                    match (rules[it.rule].observes(), verdict.action) {
                        (true, None) if verdict.observed.is_none() => {
                            verdict.observed = Some((it.rule, action));
                        }
                        (true, _) => {}
                        (false, None) => verdict.action = Some(action),
                        (false, Some(_)) => verdict.matters |= *action != Action::Pass,
                    }
                    if verdict.matters || verdict.action.is_some_and(|action| *action != Action::Pass) {
                        break;
                    }
                }
                // That something passes is said only where something else would not, or somebody wants to know.
                let matters = verdict.matters || verdict.action.is_some_and(|action| *action != Action::Pass);
                verdict.action = verdict.action.filter(|_| matters);
                verdict
            };
            let mut enter = |port_class: u32, verdict: &Verdict<'_>| {
                let key = (number, *destination_class, port_class);
                verdicts.push((key, verdict.action.cloned().unwrap_or(Action::Pass)));
                if let Some((rule, action)) = verdict.observed {
                    observed.push((key, Observed { rule, action: action.clone() }));
                }
            };
            let whatever_port = verdict(0);
            let by_port = !members.ways.is_empty()
                || candidates.iter().any(|(term, _)| !terms[*term].1.ports.is_empty());
            if whatever_port.told() != (None, None) {
                enter(0, &whatever_port);
            }
            for port_class in (1..=ports.count()).filter(|_| by_port) {
                let here = verdict(port_class);
                if here.told() != whatever_port.told() {
                    enter(port_class, &here);
                }
            }
            if verdicts.len() > room.verdicts {
                return None;
            }
        }
    }
    policy.verdicts = verdicts.into_iter().collect();
    policy.observed = observed.into_iter().collect();
    Some(policy)
}

/// What is to happen to packets, and what would.
#[derive(Clone, Copy, Default)]
struct Verdict<'a> {
    /// Of the first rule that decides.
    action: Option<&'a Action>,
    /// Some other one would not let them pass.
    matters: bool,
    /// The first one before it that observes, with what it would do.
    observed: Option<(usize, &'a Action)>,
}

impl<'a> Verdict<'a> {
    /// What the table says of it.
    fn told(&self) -> (Option<&'a Action>, Option<(usize, &'a Action)>) {
        (self.action, self.observed)
    }
}

/// What a rule says about packets of a class of pods.
struct Actions {
    /// Number of the rule.
    rule: usize,
    /// Over IPv4 and IPv6.
    actions: [Action; 2],
}

impl Actions {
    fn of(inputs: &PolicyInputs, rules: &[Rule<'_>], number: usize, class: &PodClass<'_>) -> Actions {
        let rule = rules[number];
        let blind = rule.is_blind(inputs);
        let actions = Family::ALL.map(|family| {
            if blind {
                return Action::Deny { rule: number };
            }
            let allocations = rule.allocations(class.account).into_iter();
            let mut usable = allocations.filter(|name| inputs.is_usable(name, family)).map(Arc::new);
            match usable.next() {
                Some(allocation) => Action::Allocate { allocation, secondary: usable.next(), rule: number },
                None if rule.passes_without() => Action::Pass,
                None => Action::Deny { rule: number },
            }
        });
        Actions { rule: number, actions }
    }

    fn over(&self, family: Family) -> &Action {
        &self.actions[family as usize]
    }
}

/// Pods to which the same rules apply in the same way.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct PodClass<'a> {
    /// Numbers of the rules, ascending.
    rules: Vec<usize>,
    /// Policies name allocations of the pod's own account.
    account: &'a str,
}

/// Fills `pods`, `hosts`, `covered` and `named`. Gives class 1, 2, ...
fn classify_pods<'a>(
    inputs: &'a PolicyInputs,
    rules: &[Rule<'_>],
    policy: &mut NodePolicy,
) -> Vec<PodClass<'a>> {
    let mut pods: Vec<&Pod> = inputs.pods.iter().collect();
    pods.sort_by(|a, b| (&a.account, &a.name, &a.uid).cmp(&(&b.account, &b.name, &b.uid)));
    let mut of_account: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    let (mut addresses, mut hosts) = (Vec::new(), Vec::new());
    let selects = |number: usize, pod: &Pod, address| {
        let rule = rules[number];
        // What matches it is not known: that is no reason to count anything.
        let counts_nothing = rule.observes() && rule.is_blind(inputs);
        !counts_nothing && rule.selects(pod, address, &inputs.node)
    };
    for pod in pods {
        let possible = of_account.entry(&pod.account).or_insert_with(|| {
            let possible =
                |number: &usize| rules[*number].account().is_none_or(|account| account == pod.account);
            (0..rules.len()).filter(possible).collect()
        });
        let class = |address: Option<IpAddr>| PodClass {
            rules: possible.iter().copied().filter(|number| selects(*number, pod, address)).collect(),
            account: &pod.account,
        };
        let mut selecting = BTreeSet::new();
        if pod.host_network {
            let class = class(None);
            selecting.extend(class.rules.iter().copied());
            hosts.push((pod.uid.clone(), class));
        }
        for address in pod.addresses.iter().filter(|_| !pod.host_network) {
            let class = class(Some(*address));
            selecting.extend(class.rules.iter().copied());
            if class.rules.iter().all(|number| rules[*number].hosts(&inputs.applications).next().is_none()) {
                policy.nameless.insert(*address);
            }
            addresses.push((*address, class));
        }
        for number in selecting {
            *policy.covered.entry(rules[number].name()).or_default() += 1;
            if !rules[number].observes() {
                policy.named.extend(rules[number].allocations(&pod.account));
            }
        }
    }
    let all = hosts.iter().map(|(_, class)| class).chain(addresses.iter().map(|(_, class)| class));
    let classes: BTreeSet<PodClass<'_>> = all.filter(|class| !class.rules.is_empty()).cloned().collect();
    let classes: Vec<PodClass<'_>> = classes.into_iter().collect();
    // Class 0 has no rules, and so is not found.
    let number = |class: &PodClass<'_>| classes.binary_search(class).map_or(0, |place| place as u32 + 1);
    policy.hosts = hosts.iter().map(|(uid, class)| (uid.clone(), number(class))).collect();
    for (address, class) in &addresses {
        policy.pods.entry(*address).or_insert(number(class));
    }
    classes
}

/// Host names of all rules that are switched on, with the account of each.
pub fn patterns(policies: &[EgressPolicy], bindings: &[Binding], applications: &Applications) -> Patterns {
    let of = |rule: Rule<'_>| {
        let owner = rule.account().unwrap_or_default().to_owned();
        rule.hosts(applications).map(move |host| (host.clone(), owner.clone())).collect::<Vec<_>>()
    };
    Rule::all(policies, bindings).into_iter().flat_map(of).collect()
}

impl PolicyInputs {
    /// Ranges of a country; none while nobody knows them.
    fn ranges_of(&self, country: &str) -> &[IpNet] {
        self.countries.as_deref().and_then(|table| table.get(country)).map_or(&[], Vec::as_slice)
    }

    fn is_usable(&self, allocation: &AllocationName, family: Family) -> bool {
        match family {
            Family::V4 => self.usable.contains(allocation),
            Family::V6 => self.usable6.contains(allocation),
        }
    }
}
