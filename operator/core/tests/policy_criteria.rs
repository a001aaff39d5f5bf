//! What policies go by beside identity and destination, and policies that only observe.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

use aegis_core::model::AllocationName;
use aegis_core::policy::names::HostPattern;
use aegis_core::policy::*;
use aegis_core::selector::{Labels, Selector};
use ipnet::IpNet;
use std::net::Ipv4Addr;
use std::sync::Arc;

fn policy(name: &str, precedence: i32, exit: Exit) -> EgressPolicy {
    EgressPolicy {
        name: name.into(),
        precedence,
        identity: Identity::default(),
        posture: Posture::default(),
        sources: Vec::new(),
        hosts: Vec::new(),
        cidrs: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
        countries: Vec::new(),
        applications: Vec::new(),
        ports: Vec::new(),
        exit,
        observes: false,
        generation: 1,
    }
}

fn labels(labels: &[(&str, &str)]) -> Labels {
    labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn leaving() -> Exit {
    Exit::Allocations { primary: "a".into(), secondary: None }
}

/// One pod of `shop`, which has the allocation `a`.
fn inputs(policies: Vec<EgressPolicy>) -> PolicyInputs {
    let pod = Pod {
        account: "shop".into(),
        name: "web".into(),
        uid: "1".into(),
        addresses: vec![Ipv4Addr::new(10, 244, 1, 1).into()],
        ..Pod::default()
    };
    PolicyInputs {
        usable: [AllocationName { account: "shop".into(), name: "a".into() }].into(),
        policies,
        pods: vec![pod],
        ..PolicyInputs::default()
    }
}

/// What happens to packets of the pod towards a range, and what would.
fn towards(inputs: &PolicyInputs, range: &str) -> (Option<Action>, Option<Observed>) {
    let policy = compile(inputs);
    let pod = policy.pods[&Ipv4Addr::new(10, 244, 1, 1).into()];
    let range: IpNet = range.parse().unwrap();
    let around = policy.destinations.iter().filter(|(around, _)| around.contains(&range));
    let Some((_, Destination::Class(class))) = around.max_by_key(|(around, _)| around.prefix_len()) else {
        return (None, None);
    };
    let key = (pod, *class, 0);
    (policy.verdicts.get(&key).cloned(), policy.observed.get(&key).cloned())
}

fn is_denied(inputs: &PolicyInputs) -> bool {
    towards(inputs, "192.0.2.0/24").0 == Some(Action::Deny { rule: 0 })
}

#[test]
fn labels_of_the_namespace_count_together_with_its_name() {
    let selector = Selector { labels: labels(&[("tier", "regulated")]), ..Selector::default() };
    let identity = Identity { namespace_selector: Some(selector), ..Identity::default() };
    let mut inputs = inputs(vec![EgressPolicy { identity, ..policy("p", 1, Exit::Deny) }]);
    assert!(!is_denied(&inputs), "it has no labels");
    inputs.pods[0].namespace_labels = labels(&[("tier", "regulated"), ("team", "web")]);
    assert!(is_denied(&inputs));
    inputs.policies[0].identity.namespaces = vec!["bank".into()];
    assert!(!is_denied(&inputs), "both must match");
    inputs.policies[0].identity.namespaces.push("shop".into());
    assert!(is_denied(&inputs));
}

#[test]
fn a_node_that_is_not_attested_is_one_without_the_label() {
    let missing =
        Expression { key: "attested".into(), operator: Operator::NotIn, values: vec!["yes".into()] };
    let selector = Selector { expressions: vec![missing], ..Selector::default() };
    let posture = Posture { node: Some(selector), ..Posture::default() };
    let mut inputs = inputs(vec![EgressPolicy { posture, ..policy("p", 1, Exit::Deny) }]);
    assert!(is_denied(&inputs));
    for (value, denied) in [("yes", false), ("no", true)] {
        inputs.node.labels = labels(&[("attested", value)]);
        assert_eq!(is_denied(&inputs), denied, "{value}");
    }
}

#[test]
fn a_condition_that_is_not_there_is_unknown() {
    for status in ["True", "False", "Unknown"] {
        let wanted = || vec![ConditionIs { kind: "Attested".into(), status: status.into() }];
        let of_node = Posture { node_conditions: wanted(), ..Posture::default() };
        let of_pod = Posture { pod_conditions: wanted(), ..Posture::default() };
        for (posture, is_node) in [(of_node, true), (of_pod, false)] {
            let mut inputs = inputs(vec![EgressPolicy { posture, ..policy("p", 1, Exit::Deny) }]);
            assert_eq!(is_denied(&inputs), status == "Unknown");
            for is in ["True", "False", "Unknown"] {
                let conditions = labels(&[("Attested", is)]);
                match is_node {
                    true => inputs.node.conditions = conditions,
                    false => inputs.pods[0].conditions = conditions,
                }
                assert_eq!(is_denied(&inputs), is == status, "{is} {status}");
            }
        }
    }
}

fn to_new_zealand(exit: Exit) -> EgressPolicy {
    EgressPolicy { cidrs: Vec::new(), countries: vec!["NZ".into()], ..policy("p", 1, exit) }
}

fn countries() -> Option<Arc<Countries>> {
    let ranges = ["192.0.2.0/24", "2001:db8:2::/48"].map(|range| range.parse().unwrap());
    Some(Arc::new([("NZ".to_owned(), ranges.to_vec())].into()))
}

#[test]
fn a_country_is_its_ranges() {
    let mut inputs = inputs(vec![to_new_zealand(Exit::Deny), policy("rest", 2, leaving())]);
    inputs.countries = countries();
    assert!(is_denied(&inputs));
    let (elsewhere, _) = towards(&inputs, "198.51.100.0/24");
    assert!(matches!(elsewhere, Some(Action::Allocate { rule: 1, .. })), "{elsewhere:?}");
    inputs.policies[0].cidrs = vec!["198.51.100.0/24".parse().unwrap()];
    assert_eq!(
        towards(&inputs, "198.51.100.0/24").0,
        Some(Action::Deny { rule: 0 }),
        "one of them is enough"
    );
    assert_eq!(compile(&inputs).denying, [0].into());
    inputs.policies[0].countries = vec!["AQ".into()];
    assert!(!is_denied(&inputs), "a country without ranges is nowhere");
}

/// Nobody knows what the second of three policies is about: it refuses, behind the first and before the last, and where it only observes it
/// does nothing.
fn refuses_in_place(mut inputs: PolicyInputs) {
    assert_eq!(towards(&inputs, "192.0.2.0/24").0, Some(Action::Deny { rule: 1 }));
    let (before, _) = towards(&inputs, "198.51.100.0/24");
    assert!(matches!(before, Some(Action::Allocate { rule: 0, .. })), "{before:?}");
    assert!(compile(&inputs).denying.is_empty(), "that is not what it says");
    inputs.policies[1].observes = true;
    let (action, observed) = towards(&inputs, "192.0.2.0/24");
    assert!(matches!(action, Some(Action::Allocate { rule: 2, .. })), "{action:?}");
    assert_eq!(observed, None);
}

#[test]
fn without_a_table_of_countries_whatever_may_be_meant_is_refused() {
    for exit in [Exit::Deny, Exit::Default, leaving()] {
        let policies =
            vec![policy("first", 0, leaving()), to_new_zealand(exit), policy("rest", 2, leaving())];
        let mut inputs = inputs(policies);
        inputs.policies[0].cidrs = vec!["198.51.100.0/24".parse().unwrap()];
        assert_eq!(towards(&inputs, "203.0.113.0/24").0, Some(Action::Deny { rule: 1 }), "it might be there");
        refuses_in_place(inputs);
    }
}

#[test]
fn the_first_policy_that_observes_before_what_decides_is_named() {
    let mut inputs = inputs(vec![
        EgressPolicy { observes: true, ..policy("a", 1, Exit::Deny) },
        EgressPolicy { observes: true, ..policy("b", 2, Exit::Default) },
        policy("c", 3, leaving()),
        EgressPolicy { observes: true, ..policy("d", 4, Exit::Deny) },
    ]);
    let (action, observed) = towards(&inputs, "192.0.2.0/24");
    assert!(matches!(action, Some(Action::Allocate { rule: 2, .. })), "{action:?}");
    assert_eq!(observed, Some(Observed { rule: 0, action: Action::Deny { rule: 0 } }));
    inputs.policies.remove(0);
    let (_, observed) = towards(&inputs, "192.0.2.0/24");
    assert_eq!(observed, Some(Observed { rule: 0, action: Action::Pass }));
    inputs.policies.remove(0);
    assert_eq!(towards(&inputs, "192.0.2.0/24").1, None, "what comes after decides nothing");
    inputs.policies.remove(0);
    let (action, observed) = towards(&inputs, "192.0.2.0/24");
    assert_eq!(
        (action, observed.map(|it| it.rule)),
        (Some(Action::Pass), Some(0)),
        "where nothing else is said"
    );
}

#[test]
fn nobody_asks_for_an_allocation_that_is_only_observed() {
    let mut inputs = inputs(vec![EgressPolicy { observes: true, ..policy("p", 1, leaving()) }]);
    let policy = compile(&inputs);
    assert!(policy.named.is_empty());
    assert_eq!(policy.covered[&RuleName::Policy("p".into())], 1, "it matches all the same");
    inputs.policies[0].observes = false;
    assert_eq!(compile(&inputs).named.len(), 1);
}

#[test]
fn what_shadows_asks_for_no_more() {
    let names = |policies: &[EgressPolicy]| -> Vec<(String, String)> {
        let own = |(name, by): (&str, &str)| (name.to_owned(), by.to_owned());
        shadowed(policies, &Applications::new()).into_iter().map(own).collect()
    };
    let all = policy("all", 1, Exit::Deny);
    let selector = |value| Selector { labels: labels(&[("k", value)]), ..Selector::default() };
    let on = |value| Posture { node: Some(selector(value)), ..Posture::default() };
    let attested = EgressPolicy { posture: on("v"), ..policy("attested", 2, Exit::Default) };
    let country = EgressPolicy { precedence: 2, name: "country".into(), ..to_new_zealand(Exit::Default) };
    let by_all = ("attested".to_owned(), "all".to_owned());
    assert_eq!(names(&[all.clone(), attested.clone()]), [by_all]);
    assert_eq!(names(&[all.clone(), country.clone()]), [("country".to_owned(), "all".to_owned())]);
    let observing = EgressPolicy { observes: true, ..all.clone() };
    assert!(names(&[observing, attested.clone(), country.clone()]).is_empty());
    let elsewhere = EgressPolicy { posture: on("w"), ..all.clone() };
    assert!(names(&[elsewhere, attested.clone()]).is_empty());
    let same = EgressPolicy { posture: on("v"), ..all };
    assert_eq!(names(&[same.clone(), attested]).len(), 1);
    assert!(names(&[same, country.clone()]).is_empty());
    let same = EgressPolicy { precedence: 1, name: "same".into(), ..to_new_zealand(Exit::Deny) };
    assert_eq!(names(&[same.clone(), country.clone()]).len(), 1);
    assert!(names(&[same, EgressPolicy { countries: vec!["FR".into()], ..country }]).is_empty());
}

#[test]
fn what_is_asked_of_labels_and_conditions_is_told_with_what_is_there() {
    let selector =
        |key: &str, value: &str| Selector { labels: labels(&[(key, value)]), ..Selector::default() };
    let is = |kind: &str, status: &str| ConditionIs { kind: kind.into(), status: status.into() };
    let identity =
        Identity { namespace_selector: Some(selector("tier", "regulated")), ..Identity::default() };
    let posture = Posture {
        node: Some(selector("zone", "a")),
        node_conditions: vec![is("Attested", "True"), is("Ready", "True")],
        pod_conditions: vec![is("Scanned", "True")],
    };
    let mut inputs = inputs(vec![EgressPolicy { identity, posture, ..policy("p", 1, Exit::Deny) }]);
    inputs.pods[0].namespace_labels = labels(&[("tier", "open")]);
    inputs.pods[0].conditions = labels(&[("Scanned", "False")]);
    inputs.node = NodeFacts { conditions: labels(&[("Ready", "True")]), ..NodeFacts::default() };
    let packet = Packet { destination: Ipv4Addr::new(192, 0, 2, 7).into(), protocol: 6, port: Some(443) };
    let told = |inputs: &PolicyInputs| -> Vec<String> {
        let told = explain(inputs, &inputs.pods[0], packet);
        told.steps[0].misses.iter().map(|miss| format!("{}: {}", miss.criterion, miss.message)).collect()
    };
    assert_eq!(
        told(&inputs),
        [
            "namespaceSelector: tier=regulated is wanted, and namespace shop has tier=open",
            "posture: zone=a is wanted, and the node has no label zone",
            "posture: condition Attested=True is wanted, and the node has Attested=Unknown",
            "posture: condition Scanned=True is wanted, and the pod has Scanned=False",
        ]
    );
    inputs.policies[0].posture = Posture::default();
    inputs.policies[0].identity.namespace_selector = Some(Selector::default());
    assert_eq!(told(&inputs), ["namespaceSelector: it asks for no label, and so selects nothing"]);
}

fn of_application(name: &str, precedence: i32, exit: Exit) -> EgressPolicy {
    let policy = policy(&format!("to-{name}-{precedence}"), precedence, exit);
    EgressPolicy { cidrs: Vec::new(), applications: vec![name.into()], ..policy }
}

fn tls() -> Vec<PortRange> {
    vec![PortRange { protocol: 6, first: 443, last: 443 }]
}

/// One with a range at a port, and a range and a name at whatever port.
fn crm() -> Applications {
    let endpoint = |range: &str, hosts: &[&str], ports| Endpoint {
        cidrs: vec![range.parse().unwrap()],
        hosts: hosts.iter().map(|host| HostPattern::new(host).unwrap()).collect(),
        ports,
    };
    let endpoints =
        vec![endpoint("198.51.100.0/24", &[], tls()), endpoint("203.0.113.0/25", &["crm.test"], Vec::new())];
    [("crm".to_owned(), endpoints)].into()
}

#[test]
fn an_application_is_each_of_its_parts_at_the_ports_of_that() {
    let policies = vec![of_application("crm", 1, Exit::Deny), policy("rest", 2, leaving())];
    let mut inputs = PolicyInputs { applications: crm(), ..inputs(policies) };
    inputs.policies[0].cidrs = vec!["192.0.2.0/28".parse().unwrap()];
    let denied = |destination: &str, port| {
        let packet = Packet { destination: destination.parse().unwrap(), protocol: 6, port: Some(port) };
        let told = explain(&inputs, &inputs.pods[0], packet);
        let misses = told.steps[0].misses.iter().map(|miss| format!("{}: {}", miss.criterion, miss.message));
        (told.action == Action::Deny { rule: 0 }, misses.collect::<Vec<_>>().join("; "))
    };
    assert!(denied("198.51.100.7", 443).0 && denied("203.0.113.7", 80).0);
    assert!(denied("192.0.2.7", 80).0, "or what the policy names itself");
    assert_eq!(denied("198.51.100.7", 80), (false, "ports: TCP 80 is none of TCP 443".to_owned()));
    assert_eq!(
        denied("203.0.113.200", 443),
        (false, "destination: 203.0.113.200 is in none of 192.0.2.0/28, application crm".to_owned())
    );
    assert!(is_denied(&PolicyInputs { applications: Applications::new(), ..inputs.clone() }));
    // So it is in the tables.
    assert_eq!(towards(&inputs, "203.0.113.0/25").0, Some(Action::Deny { rule: 0 }));
    let (without_port, _) = towards(&inputs, "198.51.100.0/24");
    assert!(matches!(without_port, Some(Action::Allocate { rule: 1, .. })), "{without_port:?}");
}

#[test]
fn names_of_an_application_are_looked_up_like_those_of_policies() {
    let address = "192.0.2.9".parse().unwrap();
    let name = HostPattern::new("crm.test").unwrap();
    let mut inputs =
        PolicyInputs { applications: crm(), ..inputs(vec![of_application("crm", 1, Exit::Deny)]) };
    assert!(patterns(&inputs.policies, &inputs.bindings, &inputs.applications).mean("crm.test"));
    let policy = compile(&inputs);
    assert_eq!(policy.looked_up, [name.clone()].into());
    assert!(policy.nameless.is_empty(), "the pod's queries matter");
    assert_eq!(towards(&inputs, "192.0.2.9/32").0, None);
    inputs.resolved = Arc::new([(name, [address].into())].into());
    assert_eq!(towards(&inputs, "192.0.2.9/32").0, Some(Action::Deny { rule: 0 }));
}

#[test]
fn a_policy_whose_application_is_missing_refuses_at_its_place() {
    for exit in [Exit::Deny, Exit::Default, leaving()] {
        let policies = vec![
            policy("first", 0, leaving()),
            of_application("gone", 1, exit),
            policy("rest", 2, leaving()),
        ];
        let mut inputs = PolicyInputs { applications: crm(), ..inputs(policies) };
        inputs.policies[0].cidrs = vec!["198.51.100.0/24".parse().unwrap()];
        // That the other is known does not help.
        inputs.policies[1].applications.push("crm".into());
        refuses_in_place(inputs);
    }
}

#[test]
fn parts_with_the_same_ports_count_as_one_where_policies_are_compared() {
    let names =
        |policies: &[EgressPolicy], applications: &Applications| shadowed(policies, applications).len();
    let narrow = EgressPolicy {
        cidrs: vec!["198.51.100.0/25".parse().unwrap(), "203.0.113.0/26".parse().unwrap()],
        ports: tls(),
        ..policy("narrow", 2, Exit::Default)
    };
    let mut applications = crm();
    let policies = [of_application("crm", 1, Exit::Deny), narrow];
    assert_eq!(names(&policies, &applications), 0, "by no part alone");
    applications.get_mut("crm").unwrap()[1].ports = tls();
    assert_eq!(names(&policies, &applications), 1);
    let again = [of_application("crm", 1, Exit::Deny), of_application("crm", 2, Exit::Default)];
    assert_eq!((names(&again, &applications), names(&again, &Applications::new())), (1, 1));
    let other = [of_application("crm", 1, Exit::Deny), of_application("erp", 2, Exit::Default)];
    assert_eq!(names(&other, &applications), 0, "what is missing may be anything");
}
