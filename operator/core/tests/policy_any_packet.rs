//! The compiled tables give every packet the answer that walking the bindings one by one gives.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

use aegis_core::model::AllocationName;
use aegis_core::policy::names::{HostPattern, Learned, Patterns, Resolved};
use aegis_core::policy::*;
use aegis_core::selector::Selector;
use ipnet::IpNet;
use proptest::prelude::*;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// What the rules say, without any table: the first policy that covers the packet, by precedence and name; or the binding with the
/// longest matching range, then the first by name.
///
/// With the first policy that only observes and comes before what decides, and what that would do.
fn naive(inputs: &PolicyInputs, pod: &Pod, packet: Packet) -> (Action, Option<Observed>) {
    let mut observed = None;
    let action = decide(inputs, pod, packet, &mut observed);
    (action, observed)
}

fn decide(inputs: &PolicyInputs, pod: &Pod, packet: Packet, observed: &mut Option<Observed>) -> Action {
    if inputs.internal.iter().any(|range| range.contains(&packet.destination)) {
        return Action::Pass;
    }
    let usable = if packet.destination.is_ipv4() { &inputs.usable } else { &inputs.usable6 };
    let mut policies: Vec<&EgressPolicy> = inputs.policies.iter().collect();
    policies.sort_by_key(|policy| &policy.name);
    policies.sort_by_key(|policy| policy.precedence);
    for (number, policy) in policies.iter().enumerate() {
        let own = pod.addresses.iter().find(|it| it.is_ipv4() == packet.destination.is_ipv4());
        let from = match own {
            _ if policy.sources.is_empty() => true,
            Some(own) if !pod.host_network => policy.sources.iter().any(|range| range.contains(own)),
            _ => false,
        };
        let blind = is_blind(policy, inputs);
        let unknown = !policy.countries.is_empty() && inputs.countries.is_none();
        let named = unknown
            || ranges(&policy.cidrs, &policy.hosts, inputs).any(|range| range.contains(&packet.destination))
            || policy.countries.iter().any(|country| {
                let of = inputs.countries.as_ref().and_then(|table| table.get(country));
                of.is_some_and(|ranges| ranges.iter().any(|range| range.contains(&packet.destination)))
            });
        let is_part_of = |endpoint: &Endpoint| {
            ranges(&endpoint.cidrs, &endpoint.hosts, inputs).any(|range| range.contains(&packet.destination))
                && names(&endpoint.ports, packet)
        };
        let belongs = |name: &String| {
            inputs.applications.get(name).is_none_or(|endpoints| endpoints.iter().any(is_part_of))
        };
        let reaches = named && names(&policy.ports, packet) || policy.applications.iter().any(belongs);
        if !identifies(&policy.identity, pod)
            || !in_posture(&policy.posture, pod, &inputs.node)
            || !from
            || !reaches
            || blind && policy.observes
        {
            continue;
        }
        let names = match &policy.exit {
            Exit::Allocations { primary, secondary } => std::iter::once(primary).chain(secondary).collect(),
            _ => Vec::new(),
        };
        let own = |name: &&String| AllocationName { account: pod.account.clone(), name: (*name).clone() };
        let mut usable = names.iter().map(own).filter(|allocation| usable.contains(allocation)).map(Arc::new);
        let action = match usable.next() {
            _ if blind => Action::Deny { rule: number },
            Some(allocation) => Action::Allocate { allocation, secondary: usable.next(), rule: number },
            None if policy.exit == Exit::Default => Action::Pass,
            None => Action::Deny { rule: number },
        };
        match policy.observes {
            false => return action,
            true if observed.is_none() => *observed = Some(Observed { rule: number, action }),
            true => {}
        }
    }
    let mut numbered: Vec<&Binding> = inputs.bindings.iter().filter(|binding| binding.enabled).collect();
    numbered.sort_by_key(|binding| &binding.name);
    let mut best: Option<(Reverse<u8>, usize)> = None;
    for (number, binding) in numbered.iter().enumerate() {
        if binding.name.account != pod.account
            || !selects(&binding.workloads, pod)
            || !names(&binding.ports, packet)
        {
            continue;
        }
        let ranges = ranges(&binding.cidrs, &binding.hosts, inputs);
        for cidr in ranges.filter(|cidr| cidr.contains(&packet.destination)) {
            let candidate = (Reverse(cidr.prefix_len()), number);
            if best.is_none_or(|best| candidate < best) {
                best = Some(candidate);
            }
        }
    }
    let Some((_, number)) = best else { return Action::Pass };
    let (binding, rule) = (numbered[number], policies.len() + number);
    match (usable.contains(&binding.allocation), binding.use_node_address) {
        (true, _) => {
            Action::Allocate { allocation: binding.allocation.clone().into(), secondary: None, rule }
        }
        (false, true) => Action::Pass,
        (false, false) => Action::Deny { rule },
    }
}

/// Without a table of countries, or an application, nobody knows what a policy that names it is about: it refuses, or observes nothing.
fn is_blind(policy: &EgressPolicy, inputs: &PolicyInputs) -> bool {
    let missing = |name: &String| !inputs.applications.contains_key(name);
    !policy.countries.is_empty() && inputs.countries.is_none() || policy.applications.iter().any(missing)
}

/// Ranges, and the addresses of names.
fn ranges<'a>(
    cidrs: &'a [IpNet],
    hosts: &'a [HostPattern],
    inputs: &'a PolicyInputs,
) -> impl Iterator<Item = IpNet> + 'a {
    cidrs.iter().copied().chain(inputs.resolved.of(hosts).map(|address| IpNet::from(*address)))
}

fn names(ports: &[PortRange], packet: Packet) -> bool {
    ports.is_empty()
        || port_of(packet).is_some_and(|port| {
            ports
                .iter()
                .any(|range| range.protocol == packet.protocol && range.first <= port && port <= range.last)
        })
}

fn identifies(identity: &Identity, pod: &Pod) -> bool {
    let Identity { namespaces, namespace_selector, labels, expressions, service_accounts, host_network } =
        identity.clone();
    let whole = labels.is_empty() && expressions.is_empty() && service_accounts.is_empty();
    let workloads = Workloads { labels, expressions, service_accounts, all: whole };
    (host_network || !pod.host_network)
        && (namespaces.is_empty() || namespaces.contains(&pod.account))
        && selected(&namespace_selector, &pod.namespace_labels)
        && selects(&workloads, pod)
}

fn selected(selector: &Option<Selector>, labels: &BTreeMap<String, String>) -> bool {
    let Some(Selector { labels: wanted, expressions }) = selector else { return true };
    !(wanted.is_empty() && expressions.is_empty())
        && wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
        && expressions.iter().all(|expression| satisfies(expression, labels))
}

fn in_posture(posture: &Posture, pod: &Pod, node: &NodeFacts) -> bool {
    let are = |wanted: &[ConditionIs], of: &Conditions| {
        wanted.iter().all(|it| match of.get(&it.kind) {
            Some(status) => *status == it.status,
            None => it.status == "Unknown",
        })
    };
    selected(&posture.node, &node.labels)
        && are(&posture.node_conditions, &node.conditions)
        && are(&posture.pod_conditions, &pod.conditions)
}

fn satisfies(expression: &Expression, labels: &BTreeMap<String, String>) -> bool {
    let listed = labels.get(&expression.key).map(|value| expression.values.contains(value));
    match expression.operator {
        Operator::In => listed == Some(true),
        Operator::NotIn => listed != Some(true),
        Operator::Exists => listed.is_some(),
        Operator::DoesNotExist => listed.is_none(),
    }
}

fn selects(workloads: &Workloads, pod: &Pod) -> bool {
    if workloads.all {
        return true;
    }
    if workloads.labels.is_empty()
        && workloads.expressions.is_empty()
        && workloads.service_accounts.is_empty()
    {
        return false;
    }
    for (key, value) in &workloads.labels {
        if pod.labels.get(key) != Some(value) {
            return false;
        }
    }
    if !workloads.expressions.iter().all(|expression| satisfies(expression, &pod.labels)) {
        return false;
    }
    workloads.service_accounts.is_empty() || workloads.service_accounts.contains(&pod.service_account)
}

/// Looks the packet up as the data plane does: hash, two longest-prefix tries, hash, and once more for whatever port. The tries know nothing but
/// bits and lengths.
fn look_up(policy: &NodePolicy, pod_class: u32, packet: Packet) -> (Action, Option<Observed>) {
    let same = |a: u32, b: u32, length: u32| length == 0 || (a ^ b) >> (32 - length) == 0;
    // As wide as the wider ones.
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    };
    let inside = |net: &IpNet| {
        let (a, b, length) = (bits(net.addr()), bits(packet.destination), net.prefix_len());
        net.addr().is_ipv4() == packet.destination.is_ipv4()
            && (length == 0 || (a ^ b) >> (128 - u32::from(length)) == 0)
    };
    let destination =
        policy.destinations.iter().filter(|(net, _)| inside(net)).max_by_key(|(net, _)| net.prefix_len());
    let destination_class = match destination {
        None | Some((_, Destination::Internal)) => return (Action::Pass, None),
        Some((_, Destination::Class(class))) => *class,
    };
    let port_key = |protocol: u8, port: u16| u32::from(protocol) << 16 | u32::from(port);
    let port_class = port_of(packet).and_then(|port| {
        policy
            .ports
            .iter()
            .filter(|(prefix, _)| {
                // As in the trie: protocol (16 bits), then the leading bits of the port.
                let length = 16 + u32::from(prefix.length);
                same(port_key(prefix.protocol, prefix.port), port_key(packet.protocol, port), length)
            })
            .max_by_key(|(prefix, _)| prefix.length)
            .map(|(_, class)| *class)
    });
    let keys = [port_class.unwrap_or(0), 0].map(|port_class| (pod_class, destination_class, port_class));
    let key = keys.iter().find(|key| policy.verdicts.contains_key(*key));
    let Some(key) = key else { return (Action::Pass, None) };
    (policy.verdicts[key].clone(), policy.observed.get(key).cloned())
}

/// Class of a pod, by what the data plane knows it by.
fn class(policy: &NodePolicy, pod: &Pod, family: usize) -> Option<u32> {
    match pod.host_network {
        true => policy.hosts.get(&pod.uid).copied(),
        false => policy.pods.get(&pod.addresses[family]).copied(),
    }
}

const ACCOUNTS: [&str; 2] = ["bank", "shop"];
// Nested ranges, some of them inside or around the internal ones.
const RANGES: [&str; 15] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.96.0.0/16",
    "10.96.3.0/24",
    "198.51.100.0/24",
    "198.51.100.0/25",
    "198.51.100.64/26",
    "198.51.100.77/32",
    "203.0.113.0/24",
    "203.0.113.8/29",
    "::/0",
    "2001:db8::/32",
    "2001:db8:1::/48",
    "2001:db8:1::7/128",
    "fd00:10::/32",
];
const DESTINATIONS: [&str; 14] = [
    "192.0.2.1",
    "10.1.2.3",
    "10.96.0.1",
    "10.96.3.7",
    "198.51.100.1",
    "198.51.100.70",
    "198.51.100.77",
    "198.51.100.200",
    "203.0.113.9",
    "203.0.113.77",
    "2001:db8:1::7",
    "2001:db8:1::8",
    "2001:db8:2::1",
    "fd00:10:1::1",
];
const PATTERNS: [&str; 5] = ["a.x.test", "*.x.test", "*.a.x.test", "b.a.x.test", "y.test"];
const NAMES: [&str; 4] = ["a.x.test", "b.a.x.test", "z.x.test", "y.test"];
const PORTS: [u16; 12] = [0, 1, 80, 81, 442, 443, 444, 8000, 8191, 8192, 65534, 65535];

fn any_range() -> impl Strategy<Value = IpNet> {
    prop::sample::select(&RANGES[..]).prop_map(|range| range.parse().unwrap())
}

fn any_labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map("[kl]", "[vw]", 0..3)
}

fn any_expression() -> impl Strategy<Value = Expression> {
    let operator =
        prop::sample::select(vec![Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist]);
    ("[kl]", operator, prop::collection::vec("[vw]", 1..3)).prop_map(|(key, operator, values)| Expression {
        key,
        operator,
        values,
    })
}

fn any_workloads() -> impl Strategy<Value = Workloads> {
    let some =
        (any_labels(), prop::collection::vec(any_expression(), 0..2), prop::collection::vec("s[12]", 0..2));
    prop_oneof![
        1 => Just(Workloads { all: true, ..Workloads::default() }),
        3 => some.prop_map(|(labels, expressions, service_accounts)| Workloads {
            labels, expressions, service_accounts, all: false
        }),
    ]
}

/// What rules compare: ICMP is the port 0.
fn port_of(packet: Packet) -> Option<u16> {
    packet.port.or((packet.protocol == 1).then_some(0))
}

fn any_ports() -> impl Strategy<Value = Vec<PortRange>> {
    let icmp = Just(PortRange { protocol: 1, first: 0, last: 0 });
    let range = (
        prop::sample::select(vec![6u8, 17]),
        prop::sample::select(&PORTS[..]),
        prop::sample::select(&PORTS[..]),
    );
    let range = range.prop_map(|(protocol, a, b)| PortRange { protocol, first: a.min(b), last: a.max(b) });
    let range = prop_oneof![6 => range, 1 => icmp];
    prop_oneof![1 => Just(vec![]), 2 => prop::collection::vec(range, 1..4)]
}

fn any_hosts() -> impl Strategy<Value = Vec<HostPattern>> {
    let pattern = prop::sample::select(&PATTERNS[..]).prop_map(|it| HostPattern::new(it).unwrap());
    prop_oneof![2 => Just(vec![]), 1 => prop::collection::vec(pattern, 1..3)]
}

/// Names that have been looked up.
fn any_resolved() -> impl Strategy<Value = Resolved> {
    let address = prop::sample::select(&DESTINATIONS[..]).prop_map(|it| it.parse().unwrap());
    let name = prop::sample::select(&NAMES[..]).prop_map(str::to_owned);
    prop::collection::vec((name, address, Just(0)), 0..8).prop_map(|entries| {
        let patterns: Patterns = PATTERNS.iter().map(|it| HostPattern::new(it).unwrap()).collect();
        Learned::restore(entries).resolve(&patterns)
    })
}

fn any_binding() -> impl Strategy<Value = Binding> {
    let name = (prop::sample::select(&ACCOUNTS[..]), "[a-f]");
    (
        name,
        0..3usize,
        prop::bool::weighted(0.9),
        any_workloads(),
        (prop::collection::vec(any_range(), 0..4), any_hosts()),
        any_ports(),
        any::<bool>(),
    )
        .prop_map(
            |((account, name), allocation, enabled, workloads, (cidrs, hosts), ports, use_node_address)| {
                Binding {
                    name: BindingName { account: account.into(), name },
                    allocation: AllocationName { account: account.into(), name: format!("x{allocation}") },
                    enabled,
                    workloads,
                    cidrs,
                    ports,
                    hosts,
                    use_node_address,
                    binds: false,
                    generation: 1,
                }
            },
        )
}

fn any_selector() -> impl Strategy<Value = Option<Selector>> {
    let some = (any_labels(), prop::collection::vec(any_expression(), 0..2));
    let some = some.prop_map(|(labels, expressions)| Some(Selector { labels, expressions }));
    prop_oneof![3 => Just(None), 1 => some]
}

fn any_conditions() -> impl Strategy<Value = Conditions> {
    prop::collection::btree_map("[CD]", any_status(), 0..3)
}

fn any_status() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["True", "False", "Unknown"]).prop_map(str::to_owned)
}

fn any_posture() -> impl Strategy<Value = Posture> {
    let condition = || ("[CD]", any_status()).prop_map(|(kind, status)| ConditionIs { kind, status });
    let conditions = || prop::collection::vec(condition(), 0..2);
    let some = (any_selector(), conditions(), conditions());
    let some = some.prop_map(|(node, node_conditions, pod_conditions)| Posture {
        node,
        node_conditions,
        pod_conditions,
    });
    prop_oneof![2 => Just(Posture::default()), 1 => some]
}

/// Applications that there may be. Policies also name another one.
fn any_applications() -> impl Strategy<Value = Applications> {
    let endpoint = (prop::collection::vec(any_range(), 0..3), any_hosts(), any_ports());
    let endpoint = endpoint.prop_map(|(cidrs, hosts, ports)| Endpoint { cidrs, hosts, ports });
    prop::collection::btree_map("crm|erp", prop::collection::vec(endpoint, 1..4), 0..3)
}

/// What there is to a policy's destinations: ranges, countries, names and applications.
type Destinations = ((Vec<IpNet>, Vec<String>), Vec<HostPattern>, Vec<String>);

fn any_destination() -> impl Strategy<Value = Destinations> {
    let applications = prop::collection::vec("crm|crm|erp|gone", 1..3);
    prop_oneof![
        3 => (any_place(), any_hosts(), Just(Vec::new())),
        1 => (any_place(), any_hosts(), applications.clone()),
        1 => (Just((Vec::new(), Vec::new())), Just(Vec::new()), applications),
    ]
}

/// Ranges, countries, or both.
fn any_place() -> impl Strategy<Value = (Vec<IpNet>, Vec<String>)> {
    let countries = || prop::collection::vec(prop::sample::select(vec!["FR", "NZ", "AQ"]), 1..3);
    let named = |countries: Vec<&str>| countries.into_iter().map(str::to_owned).collect();
    prop_oneof![
        3 => prop::collection::vec(any_range(), 1..4).prop_map(|cidrs| (cidrs, Vec::new())),
        1 => (prop::collection::vec(any_range(), 0..2), countries())
            .prop_map(move |(cidrs, countries)| (cidrs, named(countries))),
    ]
}

fn any_countries() -> impl Strategy<Value = Option<Arc<Countries>>> {
    let table = |ranges: &[(&str, &[&str])]| -> Countries {
        let of = |ranges: &[&str]| ranges.iter().map(|range| range.parse().unwrap()).collect();
        ranges.iter().map(|(country, ranges)| ((*country).to_owned(), of(ranges))).collect()
    };
    let table = table(&[
        ("FR", &["198.51.100.0/25", "203.0.113.8/29", "2001:db8:1::/48"]),
        ("NZ", &["198.51.100.128/25", "192.0.2.0/24", "2001:db8:2::/47"]),
    ]);
    prop_oneof![1 => Just(None), 4 => Just(Some(Arc::new(table)))]
}

fn any_policy() -> impl Strategy<Value = EgressPolicy> {
    let identity = (
        prop::collection::vec(prop::sample::select(&ACCOUNTS[..]), 0..2),
        any_labels(),
        prop::collection::vec(any_expression(), 0..2),
        prop::collection::vec("s[12]", 0..2),
        any::<bool>(),
        any_selector(),
    );
    let identity = identity.prop_map(
        |(namespaces, labels, expressions, service_accounts, host_network, namespace_selector)| Identity {
            namespaces: namespaces.into_iter().map(str::to_owned).collect(),
            namespace_selector,
            labels,
            expressions,
            service_accounts,
            host_network,
        },
    );
    let exit = prop_oneof![
        3 => ("x[0-3]", prop::option::of("x[0-3]"))
            .prop_map(|(primary, secondary)| Exit::Allocations { primary, secondary }),
        1 => Just(Exit::Default),
        1 => Just(Exit::Deny),
    ];
    let sources = prop::sample::select(vec!["10.244.1.0/30", "10.244.1.2/32", "fd00:10:1:1::/126", "::/0"]);
    let sources = sources.prop_map(|range| range.parse().unwrap());
    (
        "[a-f]",
        0..3i32,
        prop_oneof![1 => Just(Identity::default()), 3 => identity],
        prop_oneof![2 => Just(vec![]), 1 => prop::collection::vec(sources, 1..3)],
        any_destination(),
        any_ports(),
        exit,
        any_posture(),
        prop::bool::weighted(0.3),
    )
        .prop_map(
            |(
                name,
                precedence,
                identity,
                sources,
                ((cidrs, countries), hosts, applications),
                ports,
                exit,
                posture,
                observes,
            )| {
                EgressPolicy {
                    name,
                    precedence,
                    identity,
                    posture,
                    sources,
                    cidrs,
                    countries,
                    hosts,
                    applications,
                    ports,
                    exit,
                    observes,
                    generation: 1,
                }
            },
        )
}

fn any_inputs() -> impl Strategy<Value = PolicyInputs> {
    let pod = (
        prop::sample::select(&ACCOUNTS[..]),
        any_labels(),
        "s[12]",
        prop::bool::weighted(0.1),
        any_conditions(),
    );
    let node =
        (any_labels(), any_conditions()).prop_map(|(labels, conditions)| NodeFacts { labels, conditions });
    let around = (node, any_countries(), prop::collection::vec(any_labels(), ACCOUNTS.len()));
    let usable = || prop::collection::btree_set((prop::sample::select(&ACCOUNTS[..]), 0..3usize), 0..5);
    let usable = (usable(), usable());
    let internal = prop::collection::btree_set(
        prop::sample::select(vec!["10.96.0.0/16", "198.51.100.64/26", "fd00:10:1::/48"]),
        0..3,
    );
    let rules = (prop::collection::vec(any_policy(), 0..6), prop::collection::vec(any_binding(), 0..8));
    let around = (around, any_resolved(), any_applications());
    (rules, prop::collection::vec(pod, 0..8), internal, usable, around).prop_map(
        |(
            (policies, bindings),
            pods,
            internal,
            (usable, usable6),
            ((node, countries, namespaces), resolved, applications),
        )| {
            let namespaces: BTreeMap<&str, _> = ACCOUNTS.into_iter().zip(namespaces).collect();
            let policies: BTreeMap<String, EgressPolicy> =
                policies.into_iter().map(|policy| (policy.name.clone(), policy)).collect();
            // Names are unique in the API.
            let bindings: BTreeMap<BindingName, Binding> =
                bindings.into_iter().map(|binding| (binding.name.clone(), binding)).collect();
            let pods = pods.into_iter().zip(1..).map(
                |((account, labels, service_account, host_network, conditions), index)| Pod {
                    account: account.into(),
                    name: format!("pod{index}"),
                    uid: format!("uid{index}"),
                    labels,
                    service_account,
                    addresses: vec![
                        Ipv4Addr::new(10, 244, 1, index).into(),
                        Ipv6Addr::new(0xfd00, 0x10, 1, 1, 0, 0, 0, index.into()).into(),
                    ],
                    host_network,
                    namespace_labels: namespaces[account].clone(),
                    conditions,
                },
            );
            let named = |names: BTreeSet<(&str, usize)>| {
                let name = |(account, index): (&str, usize)| AllocationName {
                    account: account.into(),
                    name: format!("x{index}"),
                };
                names.into_iter().map(name).collect()
            };
            PolicyInputs {
                policies: policies.into_values().collect(),
                bindings: bindings.into_values().collect(),
                pods: pods.collect(),
                internal: internal.into_iter().map(|range| range.parse().unwrap()).collect(),
                services: Vec::new(),
                usable: named(usable),
                usable6: named(usable6),
                node,
                countries,
                applications,
                resolved: Arc::new(resolved),
            }
        },
    )
}

fn any_packet() -> impl Strategy<Value = Packet> {
    let destination = prop_oneof![
        4 => prop::sample::select(&DESTINATIONS[..]).prop_map(|it| it.parse().unwrap()),
        1 => any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
        1 => any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
    ];
    let port = prop_oneof![4 => prop::sample::select(&PORTS[..]), 1 => any::<u16>()];
    (destination, prop::sample::select(vec![1u8, 6, 6, 17]), port).prop_map(
        |(destination, protocol, port)| Packet {
            destination,
            protocol,
            port: (protocol != 1).then_some(port),
        },
    )
}

/// Of inputs, with some four pods and forty packets each. `AEGIS_CASES` asks for more.
fn cases() -> u32 {
    std::env::var("AEGIS_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(1024)
}

/// The inputs without the rules of a pod that are said not to match.
fn without_misses(inputs: &PolicyInputs, pod: &Pod, told: &Explanation) -> PolicyInputs {
    let matches = |name: RuleName| told.steps.iter().any(|step| step.rule == name && step.matches());
    let policies = inputs.policies.iter().filter(|it| matches(RuleName::Policy(it.name.clone())));
    let bindings = inputs.bindings.iter().filter(|it| it.name.account == pod.account);
    let bindings = bindings.filter(|it| matches(it.name.clone().into()));
    PolicyInputs {
        policies: policies.cloned().collect(),
        bindings: bindings.cloned().collect(),
        ..inputs.clone()
    }
}

/// What an action does, without the number of the rule.
fn does(action: &Action) -> (bool, Option<AllocationName>) {
    match action {
        Action::Pass => (true, None),
        Action::Allocate { allocation, .. } => (true, Some((**allocation).clone())),
        Action::Deny { .. } => (false, None),
    }
}

/// A port of one of two Services of the internal range, with up to three IPv4 endpoints inside or outside.
fn any_service_port() -> impl Strategy<Value = ServicePort> {
    let endpoint = (prop::sample::select(&DESTINATIONS[..10]), prop::sample::select(&PORTS[..]))
        .prop_map(|(address, port)| (address.parse().unwrap(), port));
    let endpoints = prop::collection::vec(endpoint, 0..4);
    let address = prop::sample::select(vec![[10, 96, 7, 1], [10, 96, 7, 2]]);
    (address, prop::sample::select(vec![6u8, 17]), prop::sample::select(&PORTS[..]), endpoints).prop_map(
        |(address, protocol, port, endpoints)| ServicePort {
            address: address.into(),
            protocol,
            port,
            endpoints,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn tables_answer_as_the_rules_do(inputs in any_inputs(), packets in prop::collection::vec(any_packet(), 40)) {
        let policy = compile(&inputs);
        for pod in &inputs.pods {
            for packet in &packets {
                let class = class(&policy, pod, usize::from(packet.destination.is_ipv6()));
                let answer = class.map(|class| look_up(&policy, class, *packet));
                prop_assert_eq!(answer.as_ref(), Some(&naive(&inputs, pod, *packet)), "{:?} {:?}\n{:#?}", pod, packet, policy);
                // What people are told is the same.
                let told = explain(&inputs, pod, *packet);
                prop_assert_eq!(Some(&told.action), answer.as_ref().map(|(action, _)| action), "{:?} {:?}\n{:#?}", pod, packet, told);
                let decides = told.winner.map(|place| &told.steps[place]);
                if let Action::Allocate { rule, .. } | Action::Deny { rule } = &told.action {
                    prop_assert_eq!(decides.and_then(|step| step.number), Some(*rule));
                }
                prop_assert!(decides.is_none_or(Step::matches));
                prop_assert!(told.steps.iter().all(|step| step.misses.iter().all(|miss| miss.criterion != "other")));
            }
        }
    }

    #[test]
    fn a_shadowed_policy_never_decides(inputs in any_inputs(), packets in prop::collection::vec(any_packet(), 40)) {
        let shadowed = shadowed(&inputs.policies, &inputs.applications);
        // What decides whether a packet is matched, not what is made of it.
        let order: Vec<&EgressPolicy> = in_order(&inputs.policies);
        let with = |number: usize| {
            let policies = order.iter().enumerate().map(|(place, policy)| EgressPolicy {
                exit: if place == number { Exit::Deny } else { Exit::Default },
                // Of one that observes it is to be seen whether it would be asked.
                observes: policy.observes && place != number,
                ..(*policy).clone()
            });
            PolicyInputs { policies: policies.collect(), bindings: Vec::new(), ..inputs.clone() }
        };
        for (number, policy) in order.iter().enumerate().filter(|(_, policy)| shadowed.contains_key(policy.name.as_str())) {
            let inputs = with(number);
            for pod in &inputs.pods {
                for packet in &packets {
                    let (action, _) = naive(&inputs, pod, *packet);
                    let decides = action == Action::Deny { rule: number };
                    prop_assert!(!decides, "{:?} {:#?}", policy, inputs.policies);
                }
            }
        }
    }

    /// The proxy decides afterwards where a packet goes, so none passes that it might send to something covered.
    #[test]
    fn what_a_service_may_get_to_is_never_let_pass(inputs in any_inputs(), ports in prop::collection::vec(any_service_port(), 1..6)) {
        let inputs = PolicyInputs { services: ports, ..inputs };
        let policy = compile(&inputs);
        for pod in &inputs.pods {
            let direct = |port: &ServicePort| {
                let packet = |(destination, target): &(IpAddr, u16)| {
                    Packet { destination: *destination, protocol: port.protocol, port: Some(*target) }
                };
                let mut actions = port.endpoints.iter().map(|endpoint| naive(&inputs, pod, packet(endpoint)));
                actions.any(|(action, _)| action != Action::Pass)
            };
            for port in &inputs.services {
                let packet = Packet { destination: port.address, protocol: port.protocol, port: Some(port.port) };
                let covered = look_up(&policy, class(&policy, pod, 0).unwrap(), packet).0 != Action::Pass;
                let behind = inputs.services.iter().filter(|other| other.address == port.address).any(direct);
                // If nothing stands behind it, it is an address like any.
                let behind = behind || naive(&inputs, pod, packet).0 != Action::Pass;
                prop_assert!(covered || !direct(port), "{:?} {:?}\n{:#?}", pod, port, policy);
                prop_assert!(!covered || behind, "{:?} {:?}\n{:#?}", pod, port, policy);
            }
        }
    }

    #[test]
    fn what_only_observes_changes_nothing(inputs in any_inputs(), packets in prop::collection::vec(any_packet(), 40)) {
        let enforced = inputs.policies.iter().filter(|policy| !policy.observes);
        let without = compile(&PolicyInputs { policies: enforced.cloned().collect(), ..inputs.clone() });
        let policy = compile(&inputs);
        prop_assert_eq!(&policy.named, &without.named);
        let name = |policy: &NodePolicy, action: Action| match action {
            Action::Pass => None,
            Action::Allocate { allocation, rule, .. } => Some((policy.rules[rule].clone(), Some(allocation))),
            Action::Deny { rule } => Some((policy.rules[rule].clone(), None)),
        };
        for pod in &inputs.pods {
            for packet in &packets {
                let of = |policy: &NodePolicy| {
                    let class = class(policy, pod, usize::from(packet.destination.is_ipv6()));
                    class.map(|class| name(policy, look_up(policy, class, *packet).0))
                };
                prop_assert_eq!(of(&policy), of(&without));
            }
        }
        // Nor is anybody held for the sake of where such a policy alone looks.
        for (range, class) in &policy.destinations {
            let Destination::Class(class) = class else { continue };
            let known = without.destinations.iter().any(|(around, it)| {
                matches!(it, Destination::Class(_)) && around.contains(range)
            });
            prop_assert_eq!(policy.only_observed.contains(class), !known, "{} {:#?}", range, policy);
        }
    }

    #[test]
    fn order_does_not_matter(inputs in any_inputs(), seed in 0..7usize) {
        let mut other = inputs.clone();
        other.pods.reverse();
        other.internal.reverse();
        other.policies.reverse();
        let length = other.bindings.len().max(1);
        other.bindings.rotate_left(seed % length);
        prop_assert_eq!(compile(&other), compile(&inputs));
    }

    #[test]
    fn classes_are_few_and_counts_right(inputs in any_inputs()) {
        let policy = compile(&inputs);
        let local: Vec<&Pod> = inputs.pods.iter().collect();
        let hosts = local.iter().filter(|pod| pod.host_network).count();
        prop_assert_eq!((policy.pods.len(), policy.hosts.len()), (2 * (local.len() - hosts), hosts));
        let enabled: Vec<&Binding> = inputs.bindings.iter().filter(|binding| binding.enabled).collect();
        prop_assert_eq!(policy.covered.len(), inputs.policies.len() + enabled.len());
        for binding in &enabled {
            let covers = |pod: &&&Pod| pod.account == binding.name.account && selects(&binding.workloads, pod);
            let name = RuleName::from(binding.name.clone());
            prop_assert_eq!(policy.covered[&name] as usize, local.iter().filter(covers).count());
        }
        // Two pods share a class exactly if the same rules cover them, and the same account's allocations are theirs.
        let members = |pod: &Pod| -> (BTreeSet<RuleName>, Option<String>) {
            let covers = |it: &&&Binding| pod.account == it.name.account && selects(&it.workloads, pod);
            let bindings = enabled.iter().filter(covers).map(|binding| binding.name.clone().into());
            let from = |policy: &&EgressPolicy| {
                let own = pod.addresses.first().filter(|_| !pod.host_network);
                policy.sources.is_empty()
                    || own.is_some_and(|own| policy.sources.iter().any(|range| range.contains(own)))
            };
            let counts = |policy: &&EgressPolicy| !(policy.observes && is_blind(policy, &inputs));
            let covers = |policy: &&EgressPolicy| {
                identifies(&policy.identity, pod)
                    && in_posture(&policy.posture, pod, &inputs.node)
                    && from(policy)
                    && counts(policy)
            };
            let policies = inputs.policies.iter().filter(covers).map(|it| RuleName::Policy(it.name.clone()));
            let rules: BTreeSet<RuleName> = policies.chain(bindings).collect();
            let account = (!rules.is_empty()).then(|| pod.account.clone());
            (rules, account)
        };
        for (a, b) in local.iter().zip(local.iter().skip(1)) {
            let [class_a, class_b] = [a, b].map(|pod| class(&policy, pod, 0).unwrap_or(u32::MAX));
            prop_assert_eq!(class_a == class_b, members(a) == members(b));
            prop_assert_eq!(class_a == 0, members(a).0.is_empty());
        }
        // Verdicts name classes that exist; 0 never has one.
        for (pod, destination, port) in policy.verdicts.keys() {
            prop_assert!(*pod > 0 && policy.pods.values().chain(policy.hosts.values()).any(|class| class == pod));
            prop_assert!(policy.destinations.values().any(|it| *it == Destination::Class(*destination)));
            prop_assert!(*port == 0 || policy.ports.values().any(|class| class == port));
        }
        prop_assert!(policy.ports.values().all(|class| *class > 0));
    }

    #[test]
    fn rules_that_are_said_not_to_match_change_nothing(inputs in any_inputs(), packet in any_packet()) {
        for pod in &inputs.pods {
            let told = explain(&inputs, pod, packet);
            let kept = without_misses(&inputs, pod, &told);
            prop_assert_eq!(does(&naive(&kept, pod, packet).0), does(&told.action), "{:#?}", told);
            let first = told.steps.iter().position(Step::matches);
            prop_assert!(told.internal.is_some() || told.winner == first, "the first that matches decides: {:#?}", told);
        }
    }
}
