//! Bindings as people write them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

use aegis_core::model::AllocationName;
use aegis_core::policy::*;
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

fn allocation(name: &str) -> AllocationName {
    AllocationName { account: "shop".into(), name: name.into() }
}

/// All pods of `shop`, to `cidr`, from the allocation of the same name.
fn binding(name: &str, cidr: &str) -> Binding {
    Binding {
        name: BindingName { account: "shop".into(), name: name.into() },
        allocation: allocation(name),
        enabled: true,
        workloads: Workloads { all: true, ..Workloads::default() },
        cidrs: vec![cidr.parse().unwrap()],
        ports: vec![],
        hosts: vec![],
        use_node_address: false,
        binds: false,
        generation: 1,
    }
}

fn inputs(bindings: Vec<Binding>) -> PolicyInputs {
    let pod = Pod {
        account: "shop".into(),
        name: "web".into(),
        uid: "1".into(),
        addresses: vec![Ipv4Addr::new(10, 244, 1, 1).into()],
        ..Pod::default()
    };
    PolicyInputs {
        usable: bindings.iter().map(|binding| binding.allocation.clone()).collect(),
        usable6: BTreeSet::new(),
        resolved: Default::default(),
        policies: Vec::new(),
        bindings,
        pods: vec![pod],
        internal: vec!["10.96.0.0/16".parse().unwrap()],
        ..PolicyInputs::default()
    }
}

fn tcp(first: u16, last: u16) -> PortRange {
    PortRange { protocol: 6, first, last }
}

fn allocate(name: &str, binding: usize) -> Action {
    Action::Allocate { allocation: allocation(name).into(), secondary: None, rule: binding }
}

#[test]
fn one_binding() {
    let policy = compile(&inputs(vec![binding("a", "203.0.113.0/24")]));
    assert_eq!(policy.pods.values().collect::<Vec<_>>(), [&1]);
    assert_eq!(policy.destinations[&"203.0.113.0/24".parse().unwrap()], Destination::Class(1));
    assert_eq!(policy.destinations[&"10.96.0.0/16".parse().unwrap()], Destination::Internal);
    assert!(policy.ports.is_empty());
    assert_eq!(policy.verdicts.into_iter().collect::<Vec<_>>(), [((1, 1, 0), allocate("a", 0))]);
}

#[test]
fn a_zone_inside_the_cluster_covers_nothing() {
    for range in ["10.96.0.0/16", "10.96.7.0/24", "10.96.7.1/32"] {
        let policy = compile(&inputs(vec![binding("a", range)]));
        assert_eq!(policy.destinations.len(), 1, "{range}");
        assert!(policy.verdicts.is_empty(), "{range}");
    }
}

/// A Service's port with what is behind it.
fn service(port: u16, endpoints: &[([u8; 4], u16)]) -> ServicePort {
    let endpoints = endpoints.iter().map(|(address, port)| ((*address).into(), *port)).collect();
    ServicePort { address: SERVICE.into(), protocol: 6, port, endpoints }
}

const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 7);

/// What happens to what is sent to the Service's address, by class of ports.
fn behind_service(inputs: &PolicyInputs) -> Vec<(u32, Action)> {
    let policy = compile(inputs);
    let class = match policy.destinations.get(&IpNet::from(IpAddr::from(SERVICE))) {
        Some(Destination::Class(class)) => *class,
        _ => return Vec::new(),
    };
    let of = policy.verdicts.into_iter().filter(|((_, destination, _), _)| *destination == class);
    of.map(|((_, _, port), action)| (port, action)).collect()
}

#[test]
fn the_address_of_a_service_stands_for_endpoints_outside() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24")]);
    for (endpoints, covered) in [
        (&[([203, 0, 113, 5], 8443)][..], true),
        // Uncovered, inside, and none.
        (&[([198, 51, 100, 5], 8443)], false),
        (&[([10, 96, 7, 7], 8443)], false),
        (&[], false),
        // It may get there.
        (&[([198, 51, 100, 5], 8443), ([203, 0, 113, 5], 8443)], true),
        (&[([10, 96, 7, 7], 8443), ([203, 0, 113, 5], 8443)], true),
    ] {
        inputs.services = vec![service(443, endpoints)];
        let expected = if covered { vec![(0, allocate("a", 0))] } else { vec![] };
        assert_eq!(behind_service(&inputs), expected, "{endpoints:?}");
    }
    inputs.pods[0].account = "bank".into();
    assert_eq!(behind_service(&inputs), [], "another account's pods");
}

#[test]
fn a_services_port_stands_for_that_of_the_endpoint() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24")]);
    inputs.bindings[0].ports = vec![tcp(443, 443)];
    let endpoint = |port| [([203, 0, 113, 5], port)];
    inputs.services = vec![service(443, &endpoint(443)), service(80, &endpoint(80))];
    assert_eq!(behind_service(&inputs), [(1, allocate("a", 0))], "port 80 passes");
    inputs.services = vec![service(8443, &endpoint(443))];
    assert_eq!(behind_service(&inputs), [(0, allocate("a", 0)), (1, Action::Pass)]);
    inputs.services = vec![service(443, &endpoint(8443))];
    assert_eq!(behind_service(&inputs), []);
}

#[test]
fn of_rules_about_an_endpoint_the_same_counts_as_if_it_were_sent_to() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24"), binding("b", "203.0.113.5/32")]);
    inputs.services = vec![service(443, &[([203, 0, 113, 5], 443)])];
    assert_eq!(behind_service(&inputs), [(0, allocate("b", 1))]);
    // One endpoint that passes doesn't let another one through.
    inputs.bindings[1].use_node_address = true;
    inputs.usable.remove(&allocation("b"));
    assert_eq!(behind_service(&inputs), []);
    inputs.services = vec![service(443, &[([203, 0, 113, 5], 443), ([203, 0, 113, 6], 443)])];
    assert_eq!(behind_service(&inputs), [(0, allocate("a", 0))]);
    inputs.usable.clear();
    assert_eq!(behind_service(&inputs), [(0, Action::Deny { rule: 0 })]);
}

#[test]
fn a_longer_zone_of_other_ports_does_not_hide_a_shorter_one() {
    let mut inputs = inputs(vec![binding("wide", "0.0.0.0/0"), binding("narrow", "203.0.113.0/24")]);
    inputs.bindings[1].ports = vec![tcp(443, 443)];
    let policy = compile(&inputs);
    // Bindings by name: narrow 0, wide 1. Destinations: 203.0.113.0/24, which both name, is class 1, and 0.0.0.0/0 class 2.
    assert_eq!(policy.verdicts[&(1, 1, 1)], allocate("narrow", 0));
    assert_eq!(policy.verdicts[&(1, 1, 0)], allocate("wide", 1), "other ports, and ICMP");
    assert_eq!(policy.verdicts[&(1, 1, 0)], allocate("wide", 1));
    assert_eq!(policy.verdicts.len(), 3, "a port that changes nothing has no entry of its own");
    let port = PortPrefix { protocol: 6, port: 443, length: 16 };
    assert_eq!(policy.ports.into_iter().collect::<Vec<_>>(), [(port, 1)]);
}

#[test]
fn equal_ranges_go_to_the_first_name() {
    let policy = compile(&inputs(vec![binding("b", "203.0.113.0/24"), binding("a", "203.0.113.0/24")]));
    assert_eq!(policy.verdicts[&(1, 1, 0)], allocate("a", 0));
}

#[test]
fn nothing_to_leave_from() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24"), binding("b", "0.0.0.0/0")]);
    inputs.usable.remove(&allocation("a"));
    assert_eq!(compile(&inputs).verdicts[&(1, 1, 0)], Action::Deny { rule: 0 });
    inputs.bindings[0].use_node_address = true;
    assert_eq!(compile(&inputs).verdicts[&(1, 1, 0)], Action::Pass, "stands in the way of the wider one");
    inputs.bindings.pop();
    assert!(compile(&inputs).verdicts.is_empty(), "nothing to stand in the way of");
}

#[test]
fn a_binding_that_is_switched_off_is_absent() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24"), binding("b", "0.0.0.0/0")]);
    inputs.bindings[0].enabled = false;
    let policy = compile(&inputs);
    inputs.bindings.remove(0);
    assert_eq!(policy, compile(&inputs));
}

#[test]
fn pods_that_are_not_covered_are_known_all_the_same() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24")]);
    inputs.pods[0].account = "bank".into();
    let policy = compile(&inputs);
    assert_eq!(policy.pods.values().collect::<Vec<_>>(), [&0]);
    assert!(policy.verdicts.is_empty());
    assert_eq!(policy.covered.values().collect::<Vec<_>>(), [&0]);
}

#[test]
fn pods_of_the_host_network_are_covered_by_what_they_are_not_by_an_address() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24")]);
    let with_address = compile(&inputs);
    inputs.pods[0].host_network = true;
    let policy = compile(&inputs);
    assert!(policy.pods.is_empty());
    assert_eq!(policy.hosts, [(inputs.pods[0].uid.clone(), 1)].into());
    assert_eq!((&policy.verdicts, &policy.covered), (&with_address.verdicts, &with_address.covered));
    inputs.pods[0].account = "bank".into();
    assert_eq!(compile(&inputs).hosts.values().collect::<Vec<_>>(), [&0]);
}

#[test]
fn workloads_that_select_nothing_cover_nothing() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24")]);
    inputs.bindings[0].workloads = Workloads::default();
    assert_eq!(compile(&inputs).pods.values().collect::<Vec<_>>(), [&0]);
}

#[test]
fn host_bits_do_not_matter() {
    let policy = compile(&inputs(vec![binding("a", "203.0.113.77/24")]));
    assert_eq!(policy.destinations[&"203.0.113.0/24".parse().unwrap()], Destination::Class(1));
    assert_eq!(policy.verdicts.len(), 1);
}

#[test]
fn the_worst_port_range_takes_thirty_prefixes() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24")]);
    inputs.bindings[0].ports = vec![tcp(1, 65534)];
    assert_eq!(compile(&inputs).ports.len(), 30);
    inputs.bindings[0].ports = vec![tcp(0, 65535)];
    let all = PortPrefix { protocol: 6, port: 0, length: 0 };
    assert_eq!(compile(&inputs).ports.into_keys().collect::<Vec<_>>(), [all]);
    // Ranges that overlap or touch are one.
    inputs.bindings[0].ports = vec![tcp(0, 99), tcp(50, 40_000), tcp(40_001, 65535)];
    assert_eq!(compile(&inputs).ports.into_keys().collect::<Vec<_>>(), [all]);
}

#[test]
fn ports_that_the_same_bindings_name_share_a_class() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24"), binding("b", "198.51.100.0/24")]);
    let udp = |port| PortRange { protocol: 17, first: port, last: port };
    inputs.bindings[0].ports = vec![tcp(80, 80), tcp(443, 443), udp(443)];
    inputs.bindings[1].ports = vec![tcp(443, 443)];
    let ports = compile(&inputs).ports;
    let class = |protocol, port| ports[&PortPrefix { protocol, port, length: 16 }];
    assert_eq!(class(6, 80), class(17, 443));
    assert_ne!(class(6, 80), class(6, 443));
    assert_eq!(ports.len(), 3);
}

#[test]
fn neighbours_of_different_protocols_stay_apart() {
    let mut inputs = inputs(vec![binding("a", "203.0.113.0/24")]);
    inputs.bindings[0].ports = vec![tcp(80, 80), PortRange { protocol: 17, first: 81, last: 81 }];
    let ports: Vec<(u8, u16)> = compile(&inputs).ports.keys().map(|it| (it.protocol, it.port)).collect();
    assert_eq!(ports, [(6, 80), (17, 81)]);
}

#[test]
fn what_does_not_fit_is_not_made() {
    let inputs = inputs(vec![binding("a", "203.0.113.0/24"), binding("b", "198.51.100.0/24")]);
    let whole = compile(&inputs);
    let room = Room {
        destinations: whole.destinations.len(),
        ports: whole.ports.len(),
        verdicts: whole.verdicts.len(),
    };
    assert_eq!(compile_within(&inputs, &room), Some(whole));
    for less in
        [Room { destinations: room.destinations - 1, ..room }, Room { verdicts: room.verdicts - 1, ..room }]
    {
        assert_eq!(compile_within(&inputs, &less), None, "{less:?}");
    }
}

fn policy(name: &str, precedence: i32, exit: Exit) -> EgressPolicy {
    EgressPolicy {
        name: name.into(),
        precedence,
        identity: Identity::default(),
        posture: Posture::default(),
        countries: Vec::new(),
        applications: Vec::new(),
        observes: false,
        sources: Vec::new(),
        cidrs: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
        ports: Vec::new(),
        hosts: Vec::new(),
        exit,
        generation: 1,
    }
}

fn leaving_by(primary: &str, secondary: Option<&str>) -> Exit {
    Exit::Allocations { primary: primary.into(), secondary: secondary.map(Into::into) }
}

/// What happens to packets of the pod towards an address of no class but `0.0.0.0/0`.
fn verdict(inputs: &PolicyInputs) -> Option<Action> {
    let policy = compile(inputs);
    let class = policy.destinations.get(&"0.0.0.0/0".parse().unwrap());
    let Some(Destination::Class(class)) = class else { return None };
    policy.verdicts.get(&(1, *class, 0)).cloned()
}

#[test]
fn the_lowest_precedence_comes_first_then_the_first_name() {
    let mut inputs = inputs(vec![binding("a", "0.0.0.0/0")]);
    assert_eq!(verdict(&inputs), Some(allocate("a", 0)));
    inputs.policies.push(policy("late", 20, Exit::Deny));
    assert_eq!(verdict(&inputs), Some(Action::Deny { rule: 0 }), "before any binding");
    inputs.policies.push(policy("b", 10, leaving_by("b", None)));
    inputs.policies.push(policy("a", 10, leaving_by("a", None)));
    assert_eq!(verdict(&inputs), Some(allocate("a", 0)), "a, b, late, and then the binding");
    let names: Vec<RuleName> = compile(&inputs).rules;
    let policies = ["a", "b", "late"].map(|name| RuleName::Policy(name.into()));
    assert_eq!(names[..3], policies);
    assert_eq!(names[3].binding().map(|it| it.name.as_str()), Some("a"));
}

#[test]
fn the_secondary_is_left_from_where_the_primary_cannot_be() {
    let mut inputs = inputs(Vec::new());
    inputs.policies.push(policy("p", 1, leaving_by("missing", Some("b"))));
    inputs.usable.insert(allocation("b"));
    assert_eq!(verdict(&inputs), Some(allocate("b", 0)));
    inputs.usable.insert(allocation("missing"));
    let both = Action::Allocate {
        allocation: allocation("missing").into(),
        secondary: Some(allocation("b").into()),
        rule: 0,
    };
    assert_eq!(verdict(&inputs), Some(both), "the data plane knows which ports are left");
    inputs.usable.clear();
    assert_eq!(verdict(&inputs), Some(Action::Deny { rule: 0 }), "never with the node's address");
    let named: Vec<String> = compile(&inputs).named.into_iter().map(|name| name.name).collect();
    assert_eq!(named, ["b", "missing"], "the node asks for both");
}

#[test]
fn the_nodes_own_address_is_an_answer_too() {
    let mut inputs = inputs(vec![binding("a", "0.0.0.0/0")]);
    inputs.policies.push(policy("p", 1, Exit::Default));
    assert_eq!(verdict(&inputs), Some(Action::Pass), "stands in the way of the binding");
    inputs.bindings.clear();
    assert_eq!(verdict(&inputs), None, "nothing to stand in the way of");
}

#[test]
fn a_policy_names_allocations_of_the_pods_own_account() {
    let mut inputs = inputs(Vec::new());
    inputs.policies.push(policy("p", 1, leaving_by("a", None)));
    inputs.usable.insert(allocation("a"));
    let theirs =
        Pod { account: "bank".into(), name: "other".into(), uid: "2".into(), ..inputs.pods[0].clone() };
    inputs.pods.push(Pod { addresses: vec!["10.244.1.9".parse().unwrap()], ..theirs });
    let policy = compile(&inputs);
    let actions: Vec<&Action> = policy.verdicts.values().collect();
    // Over IPv4 and IPv6, of which nothing is usable over the latter.
    let classes: std::collections::BTreeSet<_> = policy.pods.values().collect();
    assert_eq!(classes.len(), 2);
    assert!(actions.contains(&&allocate("a", 0)));
    assert!(actions.contains(&&Action::Deny { rule: 0 }), "the other account has no such allocation");
}

#[test]
fn a_policy_that_can_never_decide_is_named_with_the_one_that_does() {
    let all = policy("all", 30, Exit::Deny);
    let web =
        EgressPolicy { ports: vec![tcp(1, 500), tcp(400, 1000)], ..policy("web", 10, leaving_by("a", None)) };
    let tls = EgressPolicy { ports: vec![tcp(443, 600)], ..policy("tls", 20, leaving_by("b", None)) };
    let more = EgressPolicy { ports: vec![tcp(443, 1001)], ..policy("more", 20, leaving_by("b", None)) };
    let late = policy("late", 31, Exit::Default);
    let hosts = Identity { host_network: true, ..Identity::default() };
    let host = EgressPolicy { identity: hosts, ..policy("nodes", 40, Exit::Default) };
    let policies = [all, web, tls, more, late, host];
    let shadowed: Vec<(&str, &str)> = shadowed(&policies, &Applications::new()).into_iter().collect();
    assert_eq!(shadowed, [("late", "all"), ("tls", "web")], "nodes is about pods of the host network too");
}

#[test]
fn ranges_that_the_same_rules_name_are_one_class() {
    let mut inputs = inputs(Vec::new());
    let countries = (0..200u32).map(|net| format!("20.{net}.0.0/16").parse().unwrap());
    inputs
        .policies
        .push(EgressPolicy { cidrs: countries.collect(), ..policy("p", 1, leaving_by("a", None)) });
    inputs.policies.push(policy("q", 2, Exit::Deny));
    let policy = compile(&inputs);
    let classes: std::collections::BTreeSet<_> = policy
        .destinations
        .values()
        .filter_map(|it| if let Destination::Class(class) = it { Some(*class) } else { None })
        .collect();
    assert_eq!(classes.len(), 3, "named by both rules, and by the second over IPv4 and IPv6");
    assert_eq!(policy.verdicts.len(), 3);
}
