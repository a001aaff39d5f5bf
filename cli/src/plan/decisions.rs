//! Pods whose packets leave in another way.
//!
//! A decision changes only where a rule that changed covers a packet, and is the same for all destinations between two bounds of
//! ranges and all ports between two bounds of ports: so a few packets for each pod tell it all.

use crate::decision::{Decider, full};
use crate::state::State;
use aegis_core::model::AllocationName;
use aegis_core::policy::{
    Action, Applications, Binding, EgressPolicy, Explanation, Packet, Pod, PolicyInputs, PortRange, RuleName,
    explain,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Pods whose packets leave in another way, and where to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DecisionChange {
    /// The pods, by namespace and name.
    pub pods: Vec<String>,
    /// Ranges and ports to which it is so.
    pub to: Vec<String>,
    /// How they leave without the objects.
    pub before: String,
    /// How with them.
    pub after: String,
}

/// Entries to name in a table before it is said how many more there are.
const FEW: usize = 3;

impl DecisionChange {
    /// The pods, in a few words.
    pub fn who(&self) -> String {
        few(&self.pods)
    }

    /// Where to, in a few words.
    pub fn whither(&self) -> String {
        few(&self.to)
    }
}

fn few(entries: &[String]) -> String {
    let more = match entries.len().saturating_sub(FEW) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}", entries.iter().take(FEW).cloned().collect::<Vec<_>>().join(", "))
}

/// Rules to ask for packets of one kind of pods, at most: a change of very many ranges would take minutes.
const MOST: usize = 20_000_000;

/// Pods that no rule can tell apart.
struct Alike {
    was: Pod,
    is: Pod,
    node: Option<String>,
    names: Vec<String>,
}

/// Compares.
pub fn changes(
    [(before_state, before), (after_state, after)]: [(&State, &Decider<'_>); 2],
    notes: &mut Vec<String>,
) -> Vec<DecisionChange> {
    // Pods that no rule can tell apart are asked about once.
    let by_source = before.policies.iter().chain(&after.policies).any(|policy| !policy.sources.is_empty());
    let mut alike: BTreeMap<String, Alike> = BTreeMap::new();
    for object in after_state.pods.iter().filter(|pod| !aegis_crds::rules::is_finished(pod)) {
        let (pod, node) = crate::trace::with_node(after_state, object);
        let name = format!("{}/{}", pod.account, pod.name);
        let families: Vec<String> = pod
            .addresses
            .iter()
            .map(|it| if by_source { it.to_string() } else { it.is_ipv4().to_string() })
            .collect();
        let key = format!(
            "{} {:?} {} {} {:?} {node:?} {families:?}",
            pod.account, pod.labels, pod.service_account, pod.host_network, pod.conditions
        );
        let as_it_was = || before_state.read(object);
        let new = || Alike { was: as_it_was(), is: pod, node, names: Vec::new() };
        alike.entry(key).or_insert_with(new).names.push(name);
    }
    let mut inputs: BTreeMap<Option<String>, (PolicyInputs, PolicyInputs)> = BTreeMap::new();
    let mut found: BTreeMap<(String, String, Vec<String>), BTreeSet<String>> = BTreeMap::new();
    for Alike { was, is, node, names } in alike.into_values() {
        let (old, new) = inputs
            .entry(node.clone())
            .or_insert_with(|| (before.inputs(node.as_deref()), after.inputs(node.as_deref())));
        match compare(old, new, [&was, &is]) {
            Some(changes) => {
                for ((was, is), to) in changes {
                    found.entry((was, is, to)).or_default().extend(names.iter().cloned());
                }
            }
            None => notes.push(format!(
                "decisions about {} were not compared: too many ranges change at a time",
                few(&names)
            )),
        }
    }
    let change = |((before, after, to), pods): ((String, String, Vec<String>), BTreeSet<String>)| {
        DecisionChange { pods: pods.into_iter().collect(), to, before, after }
    };
    let mut changes: Vec<DecisionChange> = found.into_iter().map(change).collect();
    changes.sort_by(|a, b| (&a.pods, &a.to).cmp(&(&b.pods, &b.to)));
    changes
}

type Found = BTreeMap<(String, String), Vec<String>>;

/// Where packets of a pod, as it was and is, leave in another way; `None` if that is too much to look at.
fn compare(old: &PolicyInputs, new: &PolicyInputs, [was, pod]: [&Pod; 2]) -> Option<Found> {
    let mut changed = changed(old, new, pod);
    if was.namespace_labels != pod.namespace_labels {
        changed.extend(everything());
    }
    if changed.is_empty() {
        return Some(Found::new());
    }
    let rules = Ranges::of(old, was).with(Ranges::of(new, pod));
    let points = rules.points(&new.internal).filter(|it| changed.iter().any(|range| range.contains(it)));
    let points: BTreeSet<IpAddr> = points.collect();
    let packets = rules.packets();
    let work = points
        .len()
        .saturating_mul(packets.len())
        .saturating_mul(new.policies.len() + new.bindings.len() + 1);
    if work > MOST {
        return None;
    }
    let mut found = Found::new();
    for destination in points {
        let has = pod.host_network || pod.addresses.iter().any(|it| it.is_ipv4() == destination.is_ipv4());
        if !has && !pod.addresses.is_empty() {
            continue;
        }
        let mut ports: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
        for (protocol, port, label) in &packets {
            let packet = Packet { destination, protocol: *protocol, port: *port };
            let (before, after) = (explain(old, was, packet), explain(new, pod, packet));
            let (was, is) = (words(&before), words(&after));
            if was.0 != is.0 {
                ports.entry((was.1, is.1)).or_default().push(label.clone());
            }
        }
        for (key, labels) in ports {
            let range = rules.around(destination);
            let text = if labels.len() == packets.len() {
                range
            } else {
                format!("{range} ({})", labels.join(", "))
            };
            let to = found.entry(key).or_default();
            // What lies on both sides of a range inside it is the same range.
            if !to.contains(&text) {
                to.push(text);
            }
        }
    }
    Some(found)
}

/// What happens: without and with the rule that says so.
fn words(told: &Explanation) -> (String, String) {
    let rule = told.winner.map(|place| match &told.steps[place].rule {
        RuleName::Policy(name) => format!("policy {name}"),
        RuleName::Binding(name) => format!("binding {}", name.name),
    });
    let what = match &told.action {
        Action::Pass => "node's address".to_owned(),
        Action::Allocate { allocation, secondary: None, .. } => full(allocation),
        Action::Allocate { allocation, secondary: Some(secondary), .. } => {
            format!("{}, else {}", full(allocation), full(secondary))
        }
        Action::Deny { .. } => "refused".to_owned(),
    };
    let by = rule.map(|rule| format!("{what} ({rule})"));
    (what.clone(), by.unwrap_or(what))
}

/// Ranges of rules that changed, or that can leave from something else than before.
fn changed(old: &PolicyInputs, new: &PolicyInputs, pod: &Pod) -> Vec<IpNet> {
    // With the applications that it names, as far as they are known.
    let policies = |inputs: &PolicyInputs| -> BTreeMap<String, (EgressPolicy, Applications)> {
        let plain = inputs.policies.iter().map(|it| EgressPolicy { generation: 0, ..it.clone() });
        let known = |policy: &EgressPolicy| {
            let named = inputs.applications.iter().filter(|(name, _)| policy.applications.contains(name));
            named.map(|(name, endpoints)| (name.clone(), endpoints.clone())).collect()
        };
        plain.map(|it| (it.name.clone(), (it.clone(), known(&it)))).collect()
    };
    let bindings = |inputs: &PolicyInputs| -> BTreeMap<String, Binding> {
        let own = inputs.bindings.iter().filter(|it| it.name.account == pod.account);
        let plain = own.map(|it| Binding { generation: 0, ..it.clone() });
        plain.map(|it| (it.name.name.clone(), it)).collect()
    };
    let mut ranges = Vec::new();
    // Of whatever rule: few allocations change.
    let own = |usable: &BTreeSet<AllocationName>| -> BTreeSet<String> {
        usable.iter().filter(|it| it.account == pod.account).map(|it| it.name.clone()).collect()
    };
    if own(&old.usable) != own(&new.usable) || own(&old.usable6) != own(&new.usable6) {
        ranges.extend(everything());
    }
    let (before, after) = (policies(old), policies(new));
    for name in before.keys().chain(after.keys()) {
        let pair = [before.get(name), after.get(name)];
        if pair[0] != pair[1] {
            let told = pair.into_iter().zip([old, new]);
            let told = told.filter_map(|(it, inputs)| Some((it?, inputs.countries.is_some())));
            ranges.extend(told.flat_map(|((policy, known), countries)| places(policy, known, countries).0));
        }
    }
    let (before, after) = (bindings(old), bindings(new));
    for name in before.keys().chain(after.keys()) {
        let pair = [before.get(name), after.get(name)];
        if pair[0] != pair[1] {
            ranges.extend(pair.into_iter().flatten().flat_map(|it| it.cidrs.iter().copied()));
        }
    }
    ranges
}

fn everything() -> [IpNet; 2] {
    [Ipv4Net::default().into(), Ipv6Net::default().into()]
}

/// Ranges and ports that a policy names, itself and by applications. An application that is missing may be anything, and so may be
/// countries where there is no database of them.
fn places(
    policy: &EgressPolicy,
    applications: &Applications,
    countries: bool,
) -> (Vec<IpNet>, Vec<PortRange>) {
    let (mut ranges, mut ports) = (policy.cidrs.clone(), policy.ports.clone());
    if !countries && !policy.countries.is_empty() {
        ranges.extend(everything());
    }
    for name in &policy.applications {
        let Some(endpoints) = applications.get(name) else {
            ranges.extend(everything());
            continue;
        };
        for endpoint in endpoints {
            ranges.extend(&endpoint.cidrs);
            ports.extend(&endpoint.ports);
        }
    }
    (ranges, ports)
}

/// What the rules that can be about a pod name.
struct Ranges {
    ranges: BTreeSet<IpNet>,
    ports: BTreeSet<PortRange>,
}

impl Ranges {
    fn of(inputs: &PolicyInputs, pod: &Pod) -> Ranges {
        let policies = inputs.policies.iter().filter(|it| it.identity.matches(pod));
        let bindings = inputs.bindings.iter().filter(|it| it.name.account == pod.account && it.enabled);
        let (mut ranges, mut ports) = (BTreeSet::new(), BTreeSet::new());
        for policy in policies {
            let (own, own_ports) = places(policy, &inputs.applications, inputs.countries.is_some());
            ranges.extend(own.iter().map(IpNet::trunc));
            ports.extend(own_ports);
        }
        for binding in bindings {
            ranges.extend(binding.cidrs.iter().map(IpNet::trunc));
            ports.extend(binding.ports.iter().copied());
        }
        Ranges { ranges, ports }
    }

    fn with(mut self, other: Ranges) -> Ranges {
        self.ranges.extend(other.ranges);
        self.ports.extend(other.ports);
        self
    }

    /// One address at least of every part into which the ranges divide one another: where one begins, and after where one ends.
    fn points<'a>(&'a self, internal: &'a [IpNet]) -> impl Iterator<Item = IpAddr> + 'a {
        let bounds = |range: &IpNet| [Some(range.network()), after(range.broadcast())];
        self.ranges.iter().chain(internal).flat_map(bounds).flatten()
    }

    /// One packet at least for every part into which the ports divide one another: protocol, port, and in words.
    fn packets(&self) -> Vec<(u8, Option<u16>, String)> {
        let mut bounds: BTreeSet<(u8, u16)> = BTreeSet::new();
        for range in &self.ports {
            bounds.insert((range.protocol, range.first));
            bounds.extend(range.last.checked_add(1).map(|next| (range.protocol, next)));
        }
        let mut packets = vec![(1, None, "ICMP".to_owned())];
        for (protocol, name) in [(6, "TCP"), (17, "UDP")] {
            let own: Vec<u16> = bounds.iter().filter(|it| it.0 == protocol).map(|it| it.1).collect();
            let starts: Vec<u16> =
                std::iter::once(0).chain(own).collect::<BTreeSet<u16>>().into_iter().collect();
            for (place, start) in starts.iter().enumerate() {
                let end = starts.get(place + 1).map_or(u16::MAX, |next| next - 1);
                let label = match (*start, end) {
                    (0, u16::MAX) => name.to_owned(),
                    (start, end) if start == end => format!("{name} {start}"),
                    (start, end) => format!("{name} {start}-{end}"),
                };
                packets.push((protocol, Some(*start), label));
            }
        }
        packets
    }

    /// The longest range that an address is in.
    fn around(&self, address: IpAddr) -> String {
        let found = self.ranges.iter().filter(|range| range.contains(&address));
        let longest = found.max_by_key(|range| range.prefix_len());
        longest.map_or_else(|| address.to_string(), ToString::to_string)
    }
}

fn after(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => address.to_bits().checked_add(1).map(|bits| Ipv4Addr::from_bits(bits).into()),
        IpAddr::V6(address) => address.to_bits().checked_add(1).map(|bits| Ipv6Addr::from_bits(bits).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_core::policy::{BindingName, Endpoint, Exit, Workloads};

    /// Numbers that look random and are the same in each run.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, most: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % most
        }

        fn of<T: Clone>(&mut self, choice: &[T]) -> T {
            choice[self.below(choice.len())].clone()
        }
    }

    const RANGES: [&str; 7] = [
        "0.0.0.0/0",
        "198.51.100.0/24",
        "198.51.100.64/26",
        "198.51.100.77/32",
        "203.0.113.0/25",
        "2001:db8::/32",
        "::/0",
    ];
    const PORTS: [(u8, u16, u16); 5] =
        [(6, 443, 443), (6, 400, 500), (17, 53, 53), (6, 0, 65535), (17, 60000, 65535)];

    fn ranges(dice: &mut Dice) -> Vec<IpNet> {
        (0..=dice.below(2)).map(|_| dice.of(&RANGES).parse().unwrap()).collect()
    }

    fn ports(dice: &mut Dice) -> Vec<PortRange> {
        (0..dice.below(3))
            .map(|_| {
                let (protocol, first, last) = dice.of(&PORTS);
                PortRange { protocol, first, last }
            })
            .collect()
    }

    fn endpoints(dice: &mut Dice) -> Vec<Endpoint> {
        let endpoint =
            |dice: &mut Dice| Endpoint { cidrs: ranges(dice), hosts: Vec::new(), ports: ports(dice) };
        (0..=dice.below(2)).map(|_| endpoint(dice)).collect()
    }

    fn policy(dice: &mut Dice, name: usize) -> EgressPolicy {
        let allocation = |dice: &mut Dice| format!("x{}", dice.below(3));
        EgressPolicy {
            name: format!("p{name}"),
            precedence: dice.below(3) as i32,
            identity: Default::default(),
            posture: Default::default(),
            sources: Vec::new(),
            countries: Vec::new(),
            applications: (0..dice.below(6) / 4).map(|_| dice.of(&["crm", "erp"]).to_owned()).collect(),
            hosts: Vec::new(),
            observes: false,
            cidrs: ranges(dice),
            ports: ports(dice),
            exit: match dice.below(3) {
                0 => Exit::Deny,
                1 => Exit::Default,
                _ => Exit::Allocations { primary: allocation(dice), secondary: Some(allocation(dice)) },
            },
            generation: 1,
        }
    }

    fn binding(dice: &mut Dice, name: usize) -> Binding {
        Binding {
            name: BindingName { account: "shop".into(), name: format!("b{name}") },
            allocation: AllocationName { account: "shop".into(), name: format!("x{}", dice.below(3)) },
            enabled: dice.below(4) > 0,
            workloads: Workloads { all: true, ..Workloads::default() },
            hosts: Vec::new(),
            cidrs: ranges(dice),
            ports: ports(dice),
            use_node_address: dice.below(2) == 0,
            binds: false,
            generation: 1,
        }
    }

    fn usable(dice: &mut Dice) -> BTreeSet<AllocationName> {
        let names = (0..3).filter(|_| dice.below(2) == 0);
        names.map(|at| AllocationName { account: "shop".into(), name: format!("x{at}") }).collect()
    }

    #[test]
    fn whatever_packet_leaves_in_another_way_is_told() {
        let dice = &mut Dice(7);
        let pod = Pod {
            account: "shop".into(),
            addresses: vec!["10.244.1.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            ..Pod::default()
        };
        let mut changed = 0;
        for _ in 0..2_000 {
            let old = PolicyInputs {
                policies: (0..dice.below(4)).map(|name| policy(dice, name)).collect(),
                applications: [("crm".to_owned(), endpoints(dice))].into(),
                bindings: (0..dice.below(4)).map(|name| binding(dice, name)).collect(),
                pods: Vec::new(),
                internal: vec!["10.0.0.0/8".parse().unwrap()],
                usable: usable(dice),
                usable6: usable(dice),
                ..PolicyInputs::default()
            };
            let mut new = old.clone();
            match dice.below(5) {
                0 => new.usable = usable(dice),
                4 => new.applications = [(dice.of(&["crm", "erp"]).to_owned(), endpoints(dice))].into(),
                1 if !new.bindings.is_empty() => _ = new.bindings.pop(),
                2 => new.bindings.push(binding(dice, 9)),
                _ => new.policies.push(policy(dice, 9)),
            }
            let told = compare(&old, &new, [&pod, &pod]).unwrap();
            for _ in 0..40 {
                let destination = match dice.below(3) {
                    0 => Ipv4Addr::from_bits(dice.below(1 << 31) as u32 * 2).into(),
                    1 => Ipv4Addr::new(198, 51, 100, dice.below(256) as u8).into(),
                    _ => dice
                        .of(&["203.0.113.1", "203.0.113.200", "2001:db8::1", "2001:db9::1"])
                        .parse()
                        .unwrap(),
                };
                let protocol = dice.of(&[1u8, 6, 17]);
                let port = (protocol != 1).then(|| dice.of(&[53u16, 80, 400, 443, 501, 61_000]));
                let packet = Packet { destination, protocol, port };
                let (was, is) = (explain(&old, &pod, packet), explain(&new, &pod, packet));
                let (was, is) = (words(&was), words(&is));
                if was.0 != is.0 {
                    changed += 1;
                    assert!(told.contains_key(&(was.1, is.1)), "{packet:?}\n{told:#?}\n{old:#?}\n{new:#?}");
                }
            }
            if old == new {
                assert!(told.is_empty());
            }
        }
        assert!(changed > 1_000, "only {changed} packets");
    }
}
