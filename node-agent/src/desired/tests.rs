use super::*;
use aegis_common::{
    ACTION_ALLOCATE, ACTION_DENY, ACTION_FORBID, ACTION_PASS, DESTINATION_INTERNAL, DESTINATION_OBSERVED,
    HOST_UNKNOWN, HostValue, POD_REFUSED, VERDICT_BINDS, WOULD_DENY, WOULD_PASS, incarnation, observed,
    of_incarnation,
};
use aegis_core::egress::Family;
use aegis_core::gateway::Load;
use aegis_core::model::{Fence, Holding, State};
use aegis_core::policy::{BindingName, Exit, Identity, PortRange, Posture, Workloads};
use aegis_core::slice::SliceSet;
use std::net::Ipv6Addr;

const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const EGRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

fn name() -> AllocationName {
    AllocationName { account: "shop".into(), name: "main".into() }
}

fn inputs(holdings: &[(u8, u8, &str, State)]) -> Inputs {
    let holdings = holdings.iter().map(|(first, last, node, state)| Holding {
        first: *first,
        last: *last,
        node: (*node).into(),
        epoch: 7,
        state: *state,
    });
    let address = Address {
        address: EGRESS.into(),
        prefix: "p".into(),
        allocation: name(),
        epoch: 9,
        holdings: holdings.collect(),
        fence: None,
    };
    Inputs {
        node: "own".into(),
        addresses: [(EGRESS, address)].into(),
        tunnels: [("far".to_owned(), FAR)].into(),
        tunnel_address: Some(OWN),
        ..Inputs::default()
    }
}

fn binding(enabled: bool) -> Binding {
    Binding {
        name: BindingName { account: "shop".into(), name: "b".into() },
        allocation: name(),
        enabled,
        workloads: Workloads { all: true, ..Workloads::default() },
        cidrs: vec!["0.0.0.0/0".parse().unwrap()],
        ports: Vec::new(),
        hosts: Vec::new(),
        use_node_address: false,
        binds: false,
        generation: 1,
    }
}

fn pod() -> Pod {
    Pod {
        account: "shop".into(),
        name: "p".into(),
        uid: "u".into(),
        addresses: vec![Ipv4Addr::new(10, 244, 1, 2).into()],
        ..Pod::default()
    }
}

#[test]
fn each_state_of_a_holding_means_what_it_says() {
    let quarantined = State::Quarantined { until: 0 };
    let wanted = desired(&inputs(&[
        (4, 5, "own", State::Held),
        (6, 7, "own", State::Draining),
        (8, 9, "own", quarantined),
        (10, 11, "far", State::Held),
        (12, 13, "far", State::Draining),
    ]));
    let address = &wanted.addresses[&EGRESS];
    assert_eq!(address.allowed, SliceSet::range(4, 5), "new flows");
    assert_eq!(address.draining, SliceSet::range(6, 7));
    let owners: Vec<(u8, Option<Ipv4Addr>)> =
        address.owners.iter().map(|(slice, owner)| (*slice, owner.peer)).collect();
    let own = [4, 5, 6, 7].map(|slice| (slice, Some(OWN)));
    let far = [10, 11, 12, 13].map(|slice| (slice, Some(FAR)));
    assert_eq!(owners, [own, far].concat(), "nobody owns what is quarantined");
    assert_eq!(address.homes.len(), 16);
}

#[test]
fn a_holder_that_nobody_has_heard_of_keeps_its_slots_unresolved() {
    let mut inputs = inputs(&[(4, 4, "lost", State::Held)]);
    assert_eq!(desired(&inputs).addresses[&EGRESS].owners[&4], Owner { peer: None, epoch: 7 });
    // The Node object tells where it is, even if its agent does not.
    let node = NodeRecord { addresses: vec![FAR], ..NodeRecord::default() };
    inputs.nodes.insert("lost".into(), node);
    let wanted = desired(&inputs);
    assert_eq!(wanted.addresses[&EGRESS].owners[&4].peer, Some(FAR));
    assert!(wanted.peers.contains_key(&FAR));
}

#[test]
fn unknown_addresses_are_held_while_a_binding_is_enabled() {
    let hold = |unknown_pods, enabled: Option<bool>| {
        let bindings = enabled.map(binding).into_iter().collect();
        desired(&Inputs { unknown_pods, bindings, ..inputs(&[]) }).settings.hold_unknown
    };
    assert!(hold(UnknownPods::Hold, Some(true)));
    assert!(!hold(UnknownPods::Hold, Some(false)) && !hold(UnknownPods::Hold, None));
    assert!(!hold(UnknownPods::Pass, Some(true)));
}

#[test]
fn covered_pods_without_slices_here_are_refused() {
    let verdicts = |holdings: &[(u8, u8, &str, State)]| {
        let wanted =
            desired(&Inputs { bindings: vec![binding(true)], pods: vec![pod()], ..inputs(holdings) });
        assert_eq!(wanted.covered_pods, 1);
        wanted.policy.verdicts.into_values().map(|verdict| verdict.action).collect::<Vec<_>>()
    };
    assert_eq!(verdicts(&[(4, 4, "far", State::Held)]), [ACTION_ALLOCATE], "through a gateway");
    assert_eq!(verdicts(&[(4, 4, "far", State::Draining)]), [ACTION_DENY]);
    assert_eq!(verdicts(&[(4, 4, "lost", State::Held)]), [ACTION_DENY], "nobody knows where it is");
    assert_eq!(verdicts(&[(4, 4, "own", State::Draining)]), [ACTION_DENY]);
    assert_eq!(verdicts(&[(4, 4, "own", State::Held)]), [ACTION_ALLOCATE]);
}

#[test]
fn pods_of_the_host_network_are_known_by_group_once_one_is_covered() {
    let group = |number, level: u32| Group { number, levels: 1 << level };
    let host = |name: &str, label: &str| Pod {
        name: name.into(),
        uid: name.into(),
        host_network: true,
        addresses: vec![OWN.into()],
        labels: [("app".to_owned(), label.to_owned())].into(),
        ..pod()
    };
    let labels = [("app".to_owned(), "proxy".to_owned())].into();
    let proxies = Workloads { labels, ..Workloads::default() };
    let mut inputs = Inputs {
        bindings: vec![Binding { workloads: proxies, ..binding(true) }],
        pods: vec![pod(), host("other", "x"), host("late", "proxy")],
        groups: [("u", group(11, 3)), ("other", group(12, 3))].map(|(uid, group)| (uid.into(), group)).into(),
        group_roots: vec![group(10, 1)],
        ..inputs(&[(4, 4, "own", State::Held)])
    };
    assert_eq!(desired(&inputs).settings.host_levels, 0b1010, "first it looks");
    assert!(desired(&inputs).policy.hosts.is_empty());
    inputs.host_levels = 0b10;
    let told = |inputs: &Inputs| {
        let wanted = desired(inputs);
        assert!(!wanted.policy.pods.contains_key(&OWN), "the node's address is no pod's");
        (wanted.settings.host_levels, wanted.covered_pods, wanted.groupless, wanted.policy.hosts)
    };
    let value = |class, uid| HostValue { class, incarnation: incarnation(uid) };
    let unknown = HostValue { class: HOST_UNKNOWN, incarnation: 0 };
    let there = |uid| of_incarnation(incarnation(uid));
    let mut hosts: BTreeMap<u64, HostValue> = [
        (10, unknown),
        (11, value(0, "u")),
        (12, value(0, "other")),
        (there("other"), value(0, "other")),
        (there("late"), value(1, "late")),
    ]
    .into();
    assert_eq!(told(&inputs), (0b1010, 1, 1, hosts.clone()), "without group");
    inputs.groups.insert("late".into(), group(13, 2));
    hosts.insert(13, value(1, "late"));
    assert_eq!(told(&inputs), (0b1110, 1, 0, hosts.clone()));
    // Who is not held is not told apart from what is no pod.
    inputs.unknown_pods = UnknownPods::Pass;
    hosts.remove(&10);
    assert_eq!(told(&inputs), (0b1110, 1, 0, hosts.clone()));
    // None is covered: nobody looks, unless somebody has.
    inputs.pods.pop();
    inputs.host_levels = 0;
    assert_eq!(told(&inputs), (0, 0, 0, BTreeMap::new()));
    inputs.host_levels = 0b1110;
    hosts.retain(|key, _| ![13, there("late")].contains(key));
    assert_eq!(told(&inputs), (0b1110, 0, 0, hosts));
}

#[test]
fn gateways_are_for_those_who_hold_nothing() {
    let through = |holdings: &[(u8, u8, &str, State)]| {
        let usable = desired(&inputs(holdings)).allocations.remove(&name()).unwrap();
        (usable.addresses, usable.gateways, usable.near, usable.name)
    };
    assert_eq!(through(&[(4, 4, "far", State::Held)]), (vec![], vec![FAR], 1, Some(EGRESS)));
    assert_eq!(
        through(&[(4, 4, "far", State::Held), (5, 5, "own", State::Held)]),
        (vec![EGRESS], vec![], 0, Some(EGRESS))
    );
    assert_eq!(
        through(&[(4, 4, "far", State::Held), (5, 5, "own", State::Draining)]),
        (vec![], vec![FAR], 1, Some(EGRESS)),
        "what drains opens nothing any more"
    );
}

#[test]
fn gateways_of_the_first_site_come_first_while_they_have_room() {
    const NEXT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);
    let mut inputs = inputs(&[(4, 4, "far", State::Held), (5, 5, "next", State::Held)]);
    inputs.tunnels.insert("next".into(), NEXT);
    let label = |zone: &str| aegis_core::gateway::label("zone", zone);
    for (node, zone) in [("far", "a"), ("next", "b")] {
        let labels = [label(zone), label("any")].into();
        inputs.nodes.insert(node.into(), NodeRecord { labels, ..NodeRecord::default() });
    }
    let through = |inputs: &Inputs| {
        let usable = desired(inputs).allocations.remove(&name()).unwrap();
        (usable.gateways, usable.near)
    };
    let sites = |zones: [&str; 2]| {
        let sites = zones.map(|zone| vec![label(zone)]).to_vec();
        [(name(), objects::Allocation { sites, ..objects::Allocation::default() })].into()
    };
    assert_eq!(through(&inputs).1, 2, "without sites both are as near");
    inputs.allocations = sites(["a", "b"]);
    assert_eq!(through(&inputs), (vec![FAR, NEXT], 1));
    inputs.allocations = sites(["b", "a"]);
    assert_eq!(through(&inputs), (vec![NEXT, FAR], 1));
    inputs.full.follow([("next", &name(), Load::Full)].into_iter());
    assert_eq!(through(&inputs), (vec![FAR, NEXT], 1));
}

#[test]
fn an_address_with_a_fence_has_deadlines_and_others_to_send_through_when_they_have_passed() {
    let mut inputs = inputs(&[(4, 4, "far", State::Held), (5, 5, "own", State::Held)]);
    inputs.addresses.get_mut(&EGRESS).unwrap().fence = Some(Fence { after: 60, epoch: 9 });
    let wanted = desired(&inputs);
    assert_eq!(wanted.addresses[&EGRESS].deadlines, Some(Deadlines { soft: 45, hard: 60 }));
    let usable = &wanted.allocations[&name()];
    assert_eq!((&usable.addresses, &usable.gateways), (&vec![EGRESS], &vec![FAR]));
}

#[test]
fn the_cluster_itself_is_never_covered() {
    let mut inputs = inputs(&[]);
    let node = NodeRecord {
        addresses: vec![FAR],
        addresses6: vec!["2001:db8:99::2".parse().unwrap()],
        pod_ranges: vec!["10.244.2.0/24".parse().unwrap()],
        ..NodeRecord::default()
    };
    inputs.nodes.insert("far".into(), node);
    inputs.internal = ["10.96.0.0/16", "fd00:10:96::/112"].map(|range| range.parse().unwrap()).into();
    let wanted = desired(&Inputs { bindings: vec![binding(true)], pods: vec![pod()], ..inputs });
    let internal: Vec<String> = wanted
        .policy
        .destinations
        .iter()
        .filter(|(_, class)| **class == DESTINATION_INTERNAL)
        .map(|(range, _)| range.to_string())
        .collect();
    for range in [
        "10.244.2.0/24",
        "192.0.2.2/32",
        "2001:db8:99::2/128",
        "10.96.0.0/16",
        "fd00:10:96::/112",
        "169.254.0.0/16",
        "127.0.0.0/8",
        "224.0.0.0/4",
        "fe80::/10",
        "ff00::/8",
        "::1/128",
    ] {
        assert!(internal.iter().any(|found| found == range), "{range} in {internal:?}");
    }
}

#[test]
fn what_drains_everywhere_is_known_but_not_usable() {
    let wanted = desired(&inputs(&[(4, 4, "far", State::Draining), (5, 5, "own", State::Draining)]));
    let allocation = &wanted.allocations[&name()];
    assert!(!allocation.is_usable(Family::V4));
    assert_eq!(allocation.name, Some(EGRESS));
}

#[test]
fn bindings_without_pods_here_change_nothing() {
    let with = |others: &[&str]| {
        let mut inputs = Inputs { bindings: vec![binding(true)], pods: vec![pod()], ..inputs(&[]) };
        for other in others {
            let name = BindingName { account: (*other).into(), name: "a".into() };
            inputs.bindings.push(Binding { name, ..binding(true) });
        }
        desired(&inputs)
    };
    let (alone, among) = (with(&[]), with(&["aaa", "zzz"]));
    assert_eq!(alone.policy, among.policy);
    assert_eq!(alone.rules, among.rules);
}

#[test]
fn rules_without_room_refuse_the_pods_of_the_largest_account_only() {
    let account = |account: &str, cidrs: usize, last: u8| {
        let cidrs =
            (0..cidrs).map(|net| Ipv4Net::new_assert(Ipv4Addr::new(198, 18, net as u8, 0), 24).into());
        let binding = Binding {
            name: BindingName { account: account.into(), name: "b".into() },
            cidrs: cidrs.collect(),
            ports: vec![PortRange { protocol: 6, first: 443, last: 443 }],
            ..binding(true)
        };
        let addresses = vec![Ipv4Addr::new(10, 244, 1, last).into()];
        (binding, Pod { account: account.into(), addresses, ..pod() })
    };
    let with = |room| {
        let all = [account("big", 50, 2), account("bog", 50, 3), account("small", 3, 4)];
        let (bindings, pods) = all.into_iter().unzip();
        desired(&Inputs { bindings, pods, room, ..inputs(&[]) })
    };
    let class = |wanted: &Desired, last| wanted.policy.pods[&Ipv4Addr::new(10, 244, 1, last)].class;
    let all = with(Room::default());
    assert_eq!(all.refused, [].into());
    let needed = all.policy.verdicts.len();
    assert_eq!(with(Room { verdicts: needed, ..Room::default() }).refused, [].into());
    let one = with(Room { verdicts: needed - 1, ..Room::default() });
    assert_eq!(one.refused, ["bog".to_owned()].into(), "of two that need as much, the first by name stays");
    assert_eq!([2, 3, 4].map(|last| class(&one, last) == POD_REFUSED), [false, true, false]);
    assert!([2, 4].iter().all(|last| class(&one, *last) != 0));
    assert_eq!(one.covered_pods, 3);
    let none = with(Room { verdicts: 0, ..Room::default() });
    assert_eq!(none.refused.len(), 3);
    assert!([2, 3, 4].iter().all(|last| class(&none, *last) == POD_REFUSED), "nothing is let out instead");
}

#[test]
fn pod_ranges_are_as_few_as_say_the_same() {
    let pod_ranges = vec!["10.244.0.0/25".parse().unwrap(), "10.244.0.128/25".parse().unwrap()];
    let wanted = desired(&Inputs { pod_ranges, ..inputs(&[]) });
    assert_eq!(wanted.settings.pod_ranges, ["10.244.0.0/24".parse().unwrap()]);
}

#[test]
fn a_pod_is_known_by_the_mac_that_the_cni_tells() {
    let address = pod().addresses[0];
    let mac = |macs: BTreeMap<IpAddr, [u8; 6]>| {
        let pods = desired(&Inputs { pods: vec![pod()], macs, ..inputs(&[]) }).policy.pods;
        pods[&Ipv4Addr::new(10, 244, 1, 2)].mac
    };
    assert_eq!(mac([(address, [2, 0, 0, 0, 0, 7])].into()), [2, 0, 0, 0, 0, 7]);
    assert_eq!(mac(BTreeMap::new()), [0; 6], "nobody told it: it is not compared");
}

#[test]
fn flows_wait_for_slices_while_some_can_come() {
    let mut inputs = inputs(&[(4, 5, "own", State::Held), (6, 9, "far", State::Held)]);
    let growing = |inputs: &Inputs| desired(inputs).addresses[&EGRESS].growing;
    assert!(!growing(&inputs), "nothing is known of the allocation");
    let limits =
        objects::Allocation { slices: SliceSet::range(4, 11), per_node_max: 4, ..Default::default() };
    inputs.allocations.insert(name(), limits);
    assert!(growing(&inputs));
    assert_eq!(desired(&inputs).allocations[&name()].most, 4);
    inputs.in_vain.insert(EGRESS);
    assert!(!growing(&inputs), "it has been asked for in vain");
    inputs.unsettled.insert(EGRESS, SliceSet::range(5, 6));
    let address = &desired(&inputs).addresses[&EGRESS];
    assert!(address.growing, "one is about to be opened");
    assert_eq!((address.allowed, address.held()), (SliceSet::range(4, 4), 2));
}

#[test]
fn an_address_is_used_for_as_long_as_the_node_has_a_slice_of_it_whatever_for() {
    let used = |inputs: &Inputs| desired(inputs).addresses[&EGRESS].is_used();
    assert!(used(&inputs(&[(4, 5, "own", State::Held)])));
    assert!(used(&inputs(&[(4, 5, "own", State::Draining)])));
    assert!(!used(&inputs(&[(4, 5, "far", State::Held)])));
    let mut inputs = inputs(&[(4, 4, "own", State::Held)]);
    inputs.unsettled.insert(EGRESS, SliceSet::range(4, 4));
    assert!(used(&inputs), "it is about to be opened");
    let uses = Uses { open: SliceSet::EMPTY, kept: SliceSet::range(4, 4), leaving: SliceSet::EMPTY };
    inputs.uses.insert(EGRESS, uses);
    assert!(used(&inputs), "sockets are left");
    let network: Egress = "2001:db8:1:2::/64".parse().unwrap();
    let used = |node| desired(&dual(&[(4, node, State::Held)])).networks[&network].is_used();
    assert!(used("own") && !used("far"));
}

const POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 2);

/// A /64 of which these nodes hold slices, a pod with both addresses, and a binding for both families.
fn dual(holdings: &[(u8, &str, State)]) -> Inputs {
    let network: Egress = "2001:db8:1:2::/64".parse().unwrap();
    let slices: Vec<_> =
        holdings.iter().map(|(slice, node, state)| (*slice, *slice, *node, *state)).collect();
    let mut inputs = inputs(&slices);
    let address = inputs.addresses.remove(&EGRESS).unwrap();
    inputs.networks = [(network, Address { address: network, ..address })].into();
    let mut both = pod();
    both.addresses.push(POD6.into());
    let cidrs = ["0.0.0.0/0", "2000::/3"].map(|range| range.parse().unwrap()).into();
    Inputs { pods: vec![both], bindings: vec![Binding { cidrs, ..binding(true) }], six: true, ..inputs }
}

#[test]
fn a_node_opens_ipv6_flows_from_its_own_slice_only() {
    let network: Egress = "2001:db8:1:2::/64".parse().unwrap();
    let actions = |holdings: &[(u8, &str, State)]| {
        let wanted = desired(&dual(holdings));
        assert!(wanted.settings.six);
        let of = |range: &str| {
            let class = wanted.policy.destinations[&range.parse().unwrap()];
            wanted.policy.verdicts[&(wanted.policy.pods6[&POD6].class, class, 0)].action
        };
        assert_eq!(wanted.networks[&network].owners.len(), holdings.len());
        assert_eq!(of("0.0.0.0/0"), ACTION_DENY, "there is no IPv4 address");
        of("2000::/3")
    };
    assert_eq!(actions(&[(4, "own", State::Held), (5, "far", State::Held)]), ACTION_ALLOCATE);
    assert_eq!(actions(&[(4, "own", State::Draining)]), ACTION_DENY);
    assert_eq!(actions(&[(5, "far", State::Held)]), ACTION_DENY, "nobody sends for another node");
    let inputs = dual(&[(4, "own", State::Held), (5, "far", State::Held)]);
    assert!(desired(&inputs).peers.contains_key(&FAR), "what is for it is sent there");
    let allocation = &desired(&inputs).allocations[&name()];
    assert_eq!((allocation.name, &allocation.networks), (None, &vec![network]));
}

#[test]
fn ipv6_is_looked_at_when_there_is_something_to_look_at_and_the_table_stands() {
    let six = |inputs: Inputs| desired(&inputs).settings.six;
    assert!(!six(Inputs { six: true, pods: vec![pod()], bindings: vec![binding(true)], ..inputs(&[]) }));
    assert!(six(dual(&[])) && !six(Inputs { six: false, ..dual(&[]) }));
    let pod_ranges = vec!["fd00:10:244:1::/64".parse().unwrap()];
    assert!(six(Inputs { six: true, pod_ranges, ..inputs(&[]) }), "pods are held before they are known");
}

#[test]
fn a_slice_is_for_flows_or_for_sockets_and_nothing_gives_a_port_of_one_that_changes() {
    let mut inputs = inputs(&[(4, 7, "own", State::Held), (8, 9, "own", State::Draining)]);
    let set = |slices: &[u8]| slices.iter().copied().collect::<SliceSet>();
    // Slice 10 was this node's when the uses were thought of.
    let uses = Uses { open: set(&[6, 8, 10]), kept: set(&[6, 8, 9, 10]), leaving: set(&[5]) };
    inputs.uses = [(EGRESS, uses)].into();
    inputs.unsettled = [(EGRESS, set(&[6, 7]))].into();
    let address = &desired(&inputs).addresses[&EGRESS];
    assert_eq!((address.allowed, address.unsettled), (set(&[4]), set(&[7])));
    assert_eq!((address.bound, address.kept), (set(&[6]), set(&[6, 8, 9])));
    assert_eq!((address.draining, address.held()), (set(&[8, 9]), 2));
}

#[test]
fn sockets_of_an_allocation_are_wanted_where_a_pod_of_the_host_network_has_some() {
    let wanted = |host_network, binds, enabled| {
        let pod = Pod { host_network, ..pod() };
        let bindings = vec![Binding { binds, ..binding(enabled) }];
        let held = [(4, 5, "own", State::Held)];
        desired(&Inputs { pods: vec![pod], bindings, host_levels: 2, ..inputs(&held) })
    };
    let numbers =
        |wanted: &Desired| wanted.policy.verdicts.values().map(|verdict| verdict.rule).collect::<Vec<_>>();
    let binds = wanted(true, true, true);
    assert_eq!((binds.bound.clone(), numbers(&binds)), ([name()].into(), vec![VERDICT_BINDS]));
    for other in [wanted(false, true, true), wanted(true, false, true), wanted(true, true, false)] {
        assert_eq!(other.bound, BTreeSet::new());
    }
    assert_eq!(numbers(&wanted(true, false, true)), [0]);
}

fn policy(name: &str, observes: bool, exit: Exit) -> EgressPolicy {
    EgressPolicy {
        name: name.into(),
        precedence: 1,
        identity: Identity::default(),
        posture: Posture::default(),
        sources: Vec::new(),
        hosts: Vec::new(),
        cidrs: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
        countries: Vec::new(),
        applications: Vec::new(),
        ports: Vec::new(),
        exit,
        observes,
        generation: 1,
    }
}

/// A pod to which policies say something.
fn ruled(policies: Vec<EgressPolicy>) -> Inputs {
    Inputs { pods: vec![pod()], policies, six: true, unknown_pods: UnknownPods::Hold, ..inputs(&[]) }
}

#[test]
fn what_a_policy_says_is_told_from_what_is_wanting() {
    let exits = [Exit::Deny, Exit::Allocations { primary: "none".into(), secondary: None }];
    let actions = exits.map(|exit| {
        let policy = desired(&ruled(vec![policy("p", false, exit)])).policy;
        policy.verdicts.into_values().map(|verdict| verdict.action).collect::<Vec<_>>()
    });
    assert_eq!(actions, [vec![ACTION_FORBID; 2], vec![ACTION_DENY; 2]], "of both families");
}

#[test]
fn a_policy_that_only_observes_changes_nothing_but_what_is_counted() {
    let without = desired(&ruled(Vec::new()));
    let with = desired(&ruled(vec![policy("p", true, Exit::Deny)]));
    assert_eq!(with.settings, without.settings, "nobody is held, and IPv6 is not looked at for its sake");
    assert_eq!((with.covered_pods, with.covered[&RuleName::Policy("p".into())]), (0, 1));
    for ((_, class, _), verdict) in &with.policy.verdicts {
        assert_eq!((verdict.action, verdict.allocations().next()), (ACTION_PASS, None));
        assert_eq!(observed(verdict.rule), Some((0, WOULD_DENY)));
        assert_ne!(class & DESTINATION_OBSERVED, 0);
    }
    assert_eq!(with.policy.verdicts.len(), 2);
    // Beside a policy that decides.
    let policies = vec![policy("a", true, Exit::Default), policy("b", false, Exit::Deny)];
    for verdict in desired(&ruled(policies)).policy.verdicts.values() {
        assert_eq!((verdict.action, verdict.rule & 0xffff), (ACTION_FORBID, 1));
        assert_eq!(observed(verdict.rule), Some((0, WOULD_PASS)));
    }
}

#[test]
fn who_only_observes_gives_way_where_there_is_no_room() {
    let decides = policy("b", false, Exit::Deny);
    let observes = EgressPolicy {
        cidrs: (0..9).map(|net| format!("20.{net}.0.0/16").parse().unwrap()).collect(),
        ..policy("a", true, Exit::Default)
    };
    let inputs = ruled(vec![observes, decides.clone()]);
    let room = Room { verdicts: 2, ..Room::default() };
    let wanted = desired(&Inputs { room, ..inputs.clone() });
    assert!(wanted.unobserved && wanted.refused.is_empty());
    assert_eq!(wanted.policy.verdicts.len(), 2);
    assert!(wanted.policy.verdicts.values().all(|verdict| observed(verdict.rule).is_none()));
    assert!(!desired(&inputs).unobserved);
}
