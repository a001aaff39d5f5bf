//! Why a new flow leaves where it does: every rule in order, and what it makes of the packet.
//!
//! Which rule decides, and what follows, is told by the code that compiles the tables. What is added here are the reasons, for people:
//! a criterion that is missing here is told as "another criterion", and changes no answer.

use super::destinations::internal_around;
use super::posture::{ConditionIs, Conditions, NodeFacts, Posture};
use super::rules::{Binding, EgressPolicy, Expression, Operator, Pod, Rank, Rule, RuleName};
use super::terms::Term;
use super::{Action, Actions, PodClass, PolicyInputs, PortRange};
use crate::egress::Family;
use crate::model::AllocationName;
use crate::selector::{Labels, Selector};
use ipnet::IpNet;
use std::fmt;
use std::net::IpAddr;

/// A packet that opens a flow; `port` is `None` for protocols without ports and for later fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Destination.
    pub destination: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Destination port.
    pub port: Option<u16>,
}

/// A criterion of a rule that is not met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Miss {
    /// Stable word.
    pub criterion: &'static str,
    /// What is asked for, and what is there instead.
    pub message: String,
}

/// What one rule makes of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The rule.
    pub rule: RuleName,
    /// Its number; none while it is switched off.
    pub number: Option<usize>,
    /// The longest of its ranges that the destination is in.
    pub range: Option<IpNet>,
    /// Why it does not match; empty = it does.
    pub misses: Vec<Miss>,
    /// Allocations that it lets the pod leave from, in order, and whether this node can.
    pub allocations: Vec<(AllocationName, bool)>,
}

impl Step {
    /// Whether it matches.
    pub fn matches(&self) -> bool {
        self.misses.is_empty()
    }
}

/// Why a packet leaves where it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The range inside the cluster that the destination is in: no rule is asked.
    pub internal: Option<IpNet>,
    /// All policies, then the bindings of the pod's account, as they are asked: of the bindings that match the one with the longest
    /// range comes first.
    pub steps: Vec<Step>,
    /// Place of the one that decides.
    pub winner: Option<usize>,
    /// What happens.
    pub action: Action,
}

/// Walks the rules for a packet of a pod of this node.
pub fn explain(inputs: &PolicyInputs, pod: &Pod, packet: Packet) -> Explanation {
    let family = if packet.destination.is_ipv4() { Family::V4 } else { Family::V6 };
    let own = pod.addresses.iter().copied().find(|it| it.is_ipv4() == packet.destination.is_ipv4());
    let own = own.filter(|_| !pod.host_network);
    let rules = Rule::all(&inputs.policies, &inputs.bindings);
    let class = PodClass { rules: Vec::new(), account: &pod.account };
    let mut steps: Vec<(Option<Rank>, Step)> = Vec::new();
    for (number, rule) in rules.iter().enumerate() {
        if rule.account().is_some_and(|account| account != pod.account) {
            continue;
        }
        let terms: Vec<(Term<'_>, Option<IpNet>)> = Term::of(*rule, &inputs.applications)
            .into_iter()
            .map(|term| {
                let range = longest(term.ranges(inputs), packet.destination);
                (term, range)
            })
            .collect();
        let range = longest(terms.iter().filter_map(|(_, range)| *range), packet.destination);
        let covers = terms.iter().any(|(term, range)| range.is_some() && takes(&term.ports, packet));
        let matches = rule.selects(pod, own, &inputs.node) && covers && !rule.observes();
        let mut misses = if matches { Vec::new() } else { misses(*rule, &terms, inputs, pod, own, packet) };
        if !matches && misses.is_empty() {
            misses.push(Miss { criterion: "other", message: "another criterion".to_owned() });
        }
        let rank = range.filter(|_| matches).map(|range| rule.rank(number, range.prefix_len()));
        let usable = |name: AllocationName| (name.clone(), inputs.is_usable(&name, family));
        let allocations = rule.allocations(&pod.account).into_iter().map(usable).collect();
        steps.push((rank, Step { rule: rule.name(), number: Some(number), range, misses, allocations }));
    }
    for binding in inputs.bindings.iter().filter(|it| !it.enabled && it.name.account == pod.account) {
        let misses =
            vec![Miss { criterion: "enabled", message: "it is switched off by spec.enabled: false".into() }];
        let rule = RuleName::Binding(binding.name.clone());
        let range = longest(binding.cidrs.iter().copied(), packet.destination);
        steps.push((None, Step { rule, number: None, range, misses, allocations: Vec::new() }));
    }
    // Policies stand in order. Of the bindings those that match come first, as they count.
    steps.sort_by_cached_key(|(rank, step)| match &step.rule {
        RuleName::Policy(_) => (0, None, step.number, String::new()),
        RuleName::Binding(name) => (if rank.is_some() { 1 } else { 2 }, *rank, None, name.name.clone()),
    });
    let internal = internal_around(&inputs.internal, packet.destination);
    let ranked = steps.iter().enumerate().filter_map(|(place, (rank, _))| Some(((*rank)?, place)));
    let winner = ranked.min().map(|(_, place)| place).filter(|_| internal.is_none());
    let steps: Vec<Step> = steps.into_iter().map(|(_, step)| step).collect();
    let action = match winner.and_then(|place| steps[place].number) {
        Some(number) => Actions::of(inputs, &rules, number, &class).over(family).clone(),
        None => Action::Pass,
    };
    Explanation { internal, steps, winner, action }
}

fn longest(ranges: impl Iterator<Item = IpNet>, destination: IpAddr) -> Option<IpNet> {
    ranges.filter(|range| range.contains(&destination)).max_by_key(IpNet::prefix_len)
}

fn takes(ports: &[PortRange], packet: Packet) -> bool {
    ports.is_empty() || ports.iter().any(|ports| ports.contains(&packet))
}

/// Every criterion of a rule that is not met. One line for each. With its terms comes the longest range of each that leads to the
/// destination.
fn misses(
    rule: Rule<'_>,
    terms: &[(Term<'_>, Option<IpNet>)],
    inputs: &PolicyInputs,
    pod: &Pod,
    own: Option<IpAddr>,
    packet: Packet,
) -> Vec<Miss> {
    let mut list = List(Vec::new());
    match rule {
        Rule::Policy(policy) => of_policy(&mut list, policy, inputs, pod, own),
        Rule::Binding(binding) => of_binding(&mut list, binding, pod),
    }
    let to = packet.destination;
    let covered = terms.iter().any(|(_, range)| range.is_some());
    list.unless(covered, "destination", || format!("{to} is in none of {}", few(&rule.destinations())));
    // Ports that go with what is there, if anything is.
    let there = || terms.iter().filter(|(_, range)| range.is_some() || !covered).map(|(term, _)| term);
    let taken = terms.is_empty() || there().any(|term| takes(&term.ports, packet));
    list.unless(taken, "ports", || {
        format!("{packet} is none of {}", few(&there().flat_map(|term| &term.ports).collect::<Vec<_>>()))
    });
    list.0
}

fn of_policy(list: &mut List, policy: &EgressPolicy, inputs: &PolicyInputs, pod: &Pod, own: Option<IpAddr>) {
    let identity = &policy.identity;
    let (hosts, namespaces) = (identity.host_network, &identity.namespaces);
    list.unless(hosts || !pod.host_network, "hostNetwork", || {
        "the pod has the node's network, and the policy does not say hostNetwork: true".into()
    });
    let named = namespaces.is_empty() || namespaces.contains(&pod.account);
    list.unless(named, "namespaces", || format!("{} is none of {}", pod.account, few(namespaces)));
    if let Some(wanted) = &identity.namespace_selector {
        let namespace =
            Labelled("namespaceSelector", &format!("namespace {}", pod.account), &pod.namespace_labels);
        selector(list, wanted, &namespace);
    }
    labels(list, &identity.labels, &identity.expressions, &of_pod(pod));
    service_accounts(list, &identity.service_accounts, pod);
    posture(list, &policy.posture, pod, &inputs.node);
    list.unless(!policy.observes, "mode", || "it only observes (spec.mode: Observe)".into());
    let sources = &policy.sources;
    let from = sources.is_empty() || own.is_some_and(|own| sources.iter().any(|range| range.contains(&own)));
    list.unless(from, "sources", || match own {
        Some(own) => format!("{own} is in none of {}", few(sources)),
        None => format!("the pod has no address of its own that could be in {}", few(sources)),
    });
}

fn of_binding(list: &mut List, binding: &Binding, pod: &Pod) {
    if !binding.workloads.all {
        labels(list, &binding.workloads.labels, &binding.workloads.expressions, &of_pod(pod));
        service_accounts(list, &binding.workloads.service_accounts, pod);
    }
    let selects = binding.workloads.matches(pod) || !list.0.is_empty();
    list.unless(selects, "workloads", || "it selects no pods".into());
}

fn posture(list: &mut List, wanted: &Posture, pod: &Pod, node: &NodeFacts) {
    if let Some(wanted) = &wanted.node {
        selector(list, wanted, &Labelled("posture", "the node", &node.labels));
    }
    conditions(list, &wanted.node_conditions, "the node", &node.conditions);
    conditions(list, &wanted.pod_conditions, "the pod", &pod.conditions);
}

fn conditions(list: &mut List, wanted: &[ConditionIs], whose: &str, conditions: &Conditions) {
    for condition in wanted {
        let (ConditionIs { kind, status }, found) = (condition, condition.found(conditions));
        list.unless(found == status, "posture", || {
            format!("condition {kind}={status} is wanted, and {whose} has {kind}={found}")
        });
    }
}

/// Labels of something: the criterion that asks for them, whose they are, and they themselves.
struct Labelled<'a>(&'static str, &'a str, &'a Labels);

fn of_pod(pod: &Pod) -> Labelled<'_> {
    Labelled("podSelector", "the pod", &pod.labels)
}

fn selector(list: &mut List, wanted: &Selector, found: &Labelled<'_>) {
    let Selector { labels: equal, expressions } = wanted;
    let asks = !(equal.is_empty() && expressions.is_empty());
    list.unless(asks, found.0, || "it asks for no label, and so selects nothing".into());
    labels(list, equal, expressions, found);
}

fn labels(list: &mut List, wanted: &Labels, expressions: &[Expression], found: &Labelled<'_>) {
    let Labelled(criterion, whose, found) = *found;
    let has = |key: &String| match found.get(key) {
        Some(value) => format!("{whose} has {key}={value}"),
        None => format!("{whose} has no label {key}"),
    };
    for (key, value) in wanted {
        list.unless(found.get(key) == Some(value), criterion, || {
            format!("{key}={value} is wanted, and {}", has(key))
        });
    }
    for expression in expressions {
        list.unless(expression.matches(found), criterion, || {
            let key = &expression.key;
            let wanted = match expression.operator {
                Operator::In => format!("{key} in {} is wanted", few(&expression.values)),
                Operator::NotIn => format!("{key} not in {} is wanted", few(&expression.values)),
                Operator::Exists => format!("a label {key} is wanted"),
                Operator::DoesNotExist => format!("no label {key} is wanted"),
            };
            format!("{wanted}, and {}", has(key))
        });
    }
}

fn service_accounts(list: &mut List, wanted: &[String], pod: &Pod) {
    let runs = wanted.is_empty() || wanted.contains(&pod.service_account);
    list.unless(runs, "serviceAccounts", || format!("{} is none of {}", pod.service_account, few(wanted)));
}

struct List(Vec<Miss>);

impl List {
    fn unless(&mut self, met: bool, criterion: &'static str, message: impl FnOnce() -> String) {
        if !met {
            self.0.push(Miss { criterion, message: message() });
        }
    }
}

/// Entries to name before it is said how many more there are.
const FEW: usize = 4;

fn few<T: ToString>(entries: &[T]) -> String {
    let named: Vec<String> = entries.iter().take(FEW).map(ToString::to_string).collect();
    let more = entries.len().saturating_sub(FEW);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", named.join(", "))
}

/// Name of an IP protocol.
fn protocol(number: u8) -> String {
    match number {
        1 | 58 => "ICMP".to_owned(),
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        other => format!("protocol {other}"),
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&protocol(self.protocol))?;
        self.port.map_or(Ok(()), |port| write!(f, " {port}"))
    }
}

impl PortRange {
    /// Whether the packet goes to one of the ports.
    fn contains(&self, packet: &Packet) -> bool {
        // Of protocols without ports only ICMP can be named.
        let port = packet.port.or(matches!(packet.protocol, 1 | 58).then_some(0));
        self.protocol == packet.protocol && port.is_some_and(|port| (self.first..=self.last).contains(&port))
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&protocol(self.protocol))?;
        match (self.protocol, self.first, self.last) {
            (1 | 58, ..) | (_, 0, u16::MAX) => Ok(()),
            (_, first, last) if first == last => write!(f, " {first}"),
            (_, first, last) => write!(f, " {first}-{last}"),
        }
    }
}
