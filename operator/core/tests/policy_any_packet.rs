//! The compiled tables give every packet the answer that walking the bindings one by one gives.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

use aegis_core::model::AllocationName;
use aegis_core::policy::*;
use ipnet::IpNet;
use proptest::prelude::*;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A packet that opens a flow; `port` is `None` for protocols without ports and for later fragments.
#[derive(Clone, Copy, Debug)]
struct Packet {
    destination: IpAddr,
    protocol: u8,
    port: Option<u16>,
}

/// What the rules say, without any table: the covering binding with the longest matching range, then the first by
/// name.
fn naive(inputs: &PolicyInputs, pod: &Pod, packet: Packet) -> Action {
    if inputs.internal.iter().any(|range| range.contains(&packet.destination)) {
        return Action::Pass;
    }
    let mut numbered: Vec<&Binding> = inputs.bindings.iter().filter(|binding| binding.enabled).collect();
    numbered.sort_by_key(|binding| &binding.name);
    let mut best: Option<(Reverse<u8>, usize)> = None;
    for (number, binding) in numbered.iter().enumerate() {
        let port_matches = binding.ports.is_empty()
            || packet.port.is_some_and(|port| {
                let named = |range: &PortRange| {
                    range.protocol == packet.protocol && range.first <= port && port <= range.last
                };
                binding.ports.iter().any(named)
            });
        if binding.name.account != pod.account || !selects(&binding.workloads, pod) || !port_matches {
            continue;
        }
        for cidr in binding.cidrs.iter().filter(|cidr| cidr.contains(&packet.destination)) {
            let candidate = (Reverse(cidr.prefix_len()), number);
            if best.is_none_or(|best| candidate < best) {
                best = Some(candidate);
            }
        }
    }
    let Some((_, number)) = best else { return Action::Pass };
    let binding = numbered[number];
    let usable = if packet.destination.is_ipv4() { &inputs.usable } else { &inputs.usable6 };
    match (usable.contains(&binding.allocation), binding.use_node_address) {
        (true, _) => Action::Allocate { allocation: binding.allocation.clone(), binding: number },
        (false, true) => Action::Pass,
        (false, false) => Action::Deny { binding: number },
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
    for Expression { key, operator, values } in &workloads.expressions {
        let listed = pod.labels.get(key).map(|value| values.contains(value));
        let holds = match operator {
            Operator::In => listed == Some(true),
            Operator::NotIn => listed != Some(true),
            Operator::Exists => listed.is_some(),
            Operator::DoesNotExist => listed.is_none(),
        };
        if !holds {
            return false;
        }
    }
    workloads.service_accounts.is_empty() || workloads.service_accounts.contains(&pod.service_account)
}

/// Looks the packet up as the data plane does: hash, two longest-prefix tries, hash. The tries know nothing but
/// bits and lengths.
fn look_up(policy: &NodePolicy, pod_class: u32, packet: Packet) -> Action {
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
        None | Some((_, Destination::Internal)) => return Action::Pass,
        Some((_, Destination::Class(class))) => *class,
    };
    let port_key = |protocol: u8, port: u16| u32::from(protocol) << 16 | u32::from(port);
    let port_class = packet.port.and_then(|port| {
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
    let key = (pod_class, destination_class, port_class.unwrap_or(0));
    policy.verdicts.get(&key).cloned().unwrap_or(Action::Pass)
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

fn any_ports() -> impl Strategy<Value = Vec<PortRange>> {
    let range = (
        prop::sample::select(vec![6u8, 17]),
        prop::sample::select(&PORTS[..]),
        prop::sample::select(&PORTS[..]),
    );
    let range = range.prop_map(|(protocol, a, b)| PortRange { protocol, first: a.min(b), last: a.max(b) });
    prop_oneof![1 => Just(vec![]), 2 => prop::collection::vec(range, 1..4)]
}

fn any_binding() -> impl Strategy<Value = Binding> {
    let name = (prop::sample::select(&ACCOUNTS[..]), "[a-f]");
    (
        name,
        0..3usize,
        prop::bool::weighted(0.9),
        any_workloads(),
        prop::collection::vec(any_range(), 1..4),
        any_ports(),
        any::<bool>(),
    )
        .prop_map(|((account, name), allocation, enabled, workloads, cidrs, ports, use_node_address)| {
            Binding {
                name: BindingName { account: account.into(), name },
                allocation: AllocationName { account: account.into(), name: format!("x{allocation}") },
                enabled,
                workloads,
                cidrs,
                ports,
                use_node_address,
                generation: 1,
            }
        })
}

fn any_inputs() -> impl Strategy<Value = PolicyInputs> {
    let pod = (prop::sample::select(&ACCOUNTS[..]), any_labels(), "s[12]", prop::bool::weighted(0.1));
    let usable = || prop::collection::btree_set((prop::sample::select(&ACCOUNTS[..]), 0..3usize), 0..5);
    let usable = (usable(), usable());
    let internal = prop::collection::btree_set(
        prop::sample::select(vec!["10.96.0.0/16", "198.51.100.64/26", "fd00:10:1::/48"]),
        0..3,
    );
    (prop::collection::vec(any_binding(), 0..8), prop::collection::vec(pod, 0..8), internal, usable).prop_map(
        |(bindings, pods, internal, (usable, usable6))| {
            // Names are unique in the API.
            let bindings: BTreeMap<BindingName, Binding> =
                bindings.into_iter().map(|binding| (binding.name.clone(), binding)).collect();
            let pods =
                pods.into_iter().zip(1..).map(|((account, labels, service_account, host_network), index)| {
                    Pod {
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
                    }
                });
            let named = |names: BTreeSet<(&str, usize)>| {
                let name = |(account, index): (&str, usize)| AllocationName {
                    account: account.into(),
                    name: format!("x{index}"),
                };
                names.into_iter().map(name).collect()
            };
            PolicyInputs {
                bindings: bindings.into_values().collect(),
                pods: pods.collect(),
                internal: internal.into_iter().map(|range| range.parse().unwrap()).collect(),
                usable: named(usable),
                usable6: named(usable6),
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

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tables_answer_as_the_rules_do(inputs in any_inputs(), packets in prop::collection::vec(any_packet(), 40)) {
        let policy = compile(&inputs);
        for pod in &inputs.pods {
            for packet in &packets {
                let class = class(&policy, pod, usize::from(packet.destination.is_ipv6()));
                let answer = class.map(|class| look_up(&policy, class, *packet));
                prop_assert_eq!(answer, Some(naive(&inputs, pod, *packet)), "{:?} {:?}\n{:#?}", pod, packet, policy);
            }
        }
    }

    #[test]
    fn order_does_not_matter(inputs in any_inputs(), seed in 0..7usize) {
        let mut other = inputs.clone();
        other.pods.reverse();
        other.internal.reverse();
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
        prop_assert_eq!(policy.covered.len(), enabled.len());
        for binding in &enabled {
            let covers = |pod: &&&Pod| pod.account == binding.name.account && selects(&binding.workloads, pod);
            prop_assert_eq!(policy.covered[&binding.name] as usize, local.iter().filter(covers).count());
        }
        // Two pods share a class exactly if the same bindings cover them.
        let members = |pod: &Pod| -> BTreeSet<&BindingName> {
            let covers = |it: &&&Binding| pod.account == it.name.account && selects(&it.workloads, pod);
            enabled.iter().filter(covers).map(|binding| &binding.name).collect()
        };
        for (a, b) in local.iter().zip(local.iter().skip(1)) {
            let [class_a, class_b] = [a, b].map(|pod| class(&policy, pod, 0).unwrap_or(u32::MAX));
            prop_assert_eq!(class_a == class_b, members(a) == members(b));
            prop_assert_eq!(class_a == 0, members(a).is_empty());
        }
        // Verdicts name classes that exist; 0 never has one.
        for (pod, destination, port) in policy.verdicts.keys() {
            prop_assert!(*pod > 0 && policy.pods.values().chain(policy.hosts.values()).any(|class| class == pod));
            prop_assert!(policy.destinations.values().any(|it| *it == Destination::Class(*destination)));
            prop_assert!(*port == 0 || policy.ports.values().any(|class| class == port));
        }
        prop_assert!(policy.ports.values().all(|class| *class > 0));
    }
}
