//! Bindings as people write them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

use aegis_core::model::AllocationName;
use aegis_core::policy::*;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

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
        use_node_address: false,
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
        bindings,
        pods: vec![pod],
        internal: vec!["10.96.0.0/16".parse().unwrap()],
    }
}

fn tcp(first: u16, last: u16) -> PortRange {
    PortRange { protocol: 6, first, last }
}

fn allocate(name: &str, binding: usize) -> Action {
    Action::Allocate { allocation: allocation(name), binding }
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

#[test]
fn a_longer_zone_of_other_ports_does_not_hide_a_shorter_one() {
    let mut inputs = inputs(vec![binding("wide", "0.0.0.0/0"), binding("narrow", "203.0.113.0/24")]);
    inputs.bindings[1].ports = vec![tcp(443, 443)];
    let policy = compile(&inputs);
    // Bindings by name: narrow 0, wide 1. Destinations: 0.0.0.0/0 is class 1, 203.0.113.0/24 class 2.
    assert_eq!(policy.verdicts[&(1, 2, 1)], allocate("narrow", 0));
    assert_eq!(policy.verdicts[&(1, 2, 0)], allocate("wide", 1), "other ports, and ICMP");
    assert_eq!(policy.verdicts[&(1, 1, 1)], allocate("wide", 1));
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
    assert_eq!(compile(&inputs).verdicts[&(1, 2, 0)], Action::Deny { binding: 0 });
    inputs.bindings[0].use_node_address = true;
    assert_eq!(compile(&inputs).verdicts[&(1, 2, 0)], Action::Pass, "stands in the way of the wider one");
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
