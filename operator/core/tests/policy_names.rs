//! Host names: what they mean, what is remembered of them, and for how long.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is a test")]

use aegis_core::policy::names::*;
use aegis_core::policy::{Destination, PolicyInputs, compile};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

const LIMITS: Limits = Limits { per_name: 8, total: 20, grace: 300 };

fn pattern(text: &str) -> HostPattern {
    HostPattern::new(text).unwrap()
}

fn address(last: u8) -> IpAddr {
    Ipv4Addr::new(198, 51, 100, last).into()
}

fn answer(
    name: &str,
    lasts: impl IntoIterator<Item = u8>,
    ttl: u32,
) -> BTreeMap<String, BTreeMap<IpAddr, u32>> {
    told(&lasts.into_iter().map(|last| Record::Address(name.into(), address(last), ttl)).collect::<Vec<_>>())
}

#[test]
fn a_wildcard_means_all_names_below_and_not_the_name_itself() {
    let wild = pattern("*.Example.com.");
    assert_eq!(wild.as_str(), "*.example.com");
    for (name, meant) in [
        ("api.example.com", true),
        ("v1.api.example.com", true),
        ("_dns.example.com", true),
        ("example.com", false),
        (".example.com", false),
        ("badexample.com", false),
        ("api.example.com.evil.test", false),
        ("api.example.org", false),
    ] {
        assert_eq!(wild.matches(name), meant, "{name}");
    }
    let exact = pattern("api.example.com");
    assert!(exact.matches("api.example.com") && !exact.matches("v1.api.example.com"));
    assert!(wild.contains(&exact) && wild.contains(&pattern("*.api.example.com")) && wild.contains(&wild));
    assert!(!wild.contains(&pattern("example.com")) && !exact.contains(&wild));
    assert!(!pattern("*.api.example.com").contains(&wild));
}

#[test]
fn what_is_no_host_name_is_no_pattern() {
    let long = format!("{}.test", "a".repeat(64));
    let whole = format!("{}a.test", "a.".repeat(125));
    for text in [
        "", "*", "*.", ".", "a..b", "-a.test", "a-.test", "a.*.test", "**.test", "a*.test", "a b", "é.test",
        &long, &whole,
    ] {
        assert_eq!(HostPattern::new(text), None, "{text}");
    }
    assert!(HostPattern::new("_sip._tcp.x-1.test").is_some());
}

#[test]
fn an_alias_has_the_addresses_at_the_end_of_its_chain() {
    let alias = |name: &str, of: &str| Record::Alias(name.into(), of.into());
    let at = |name: &str, last, ttl| Record::Address(name.into(), address(last), ttl);
    let records = [
        alias("a.test", "b.test"),
        at("c.test", 1, 5),
        alias("b.test", "c.test"),
        at("c.test", 2, 9),
        // A loop, as an attacker might send it.
        alias("c.test", "a.test"),
        at("other.test", 3, 5),
    ];
    let told = told(&records);
    let both = BTreeMap::from([(address(1), 5), (address(2), 9)]);
    for name in ["a.test", "b.test", "c.test"] {
        assert_eq!(told[name], both, "{name}");
    }
    assert_eq!(told["other.test"], [(address(3), 5)].into());
    assert_eq!(told.len(), 4);
}

#[test]
fn what_was_never_looked_up_matches_nothing_and_one_more_address_renumbers_nothing() {
    let mut learned = Learned::default();
    let patterns: Patterns = [pattern("*.x.test")].into_iter().collect();
    let binding = |name: &str, cidrs: &[&str], hosts: Vec<HostPattern>| aegis_core::policy::Binding {
        name: aegis_core::policy::BindingName { account: "shop".into(), name: name.into() },
        allocation: aegis_core::model::AllocationName { account: "shop".into(), name: "a".into() },
        enabled: true,
        workloads: aegis_core::policy::Workloads { all: true, ..Default::default() },
        cidrs: cidrs.iter().map(|it| it.parse().unwrap()).collect(),
        ports: vec![],
        hosts,
        use_node_address: false,
        binds: false,
        generation: 1,
    };
    let compiled = |learned: &Learned| {
        let pod = aegis_core::policy::Pod {
            account: "shop".into(),
            addresses: vec![Ipv4Addr::new(10, 244, 1, 1).into()],
            ..Default::default()
        };
        compile(&PolicyInputs {
            bindings: vec![
                binding("named", &[], vec![pattern("*.x.test")]),
                binding("z", &["198.51.100.0/25"], vec![]),
            ],
            pods: vec![
                pod.clone(),
                aegis_core::policy::Pod { account: "else".into(), addresses: vec![address(99)], ..pod },
            ],
            resolved: Arc::new(learned.resolve(&patterns)),
            ..PolicyInputs::default()
        })
    };
    assert_eq!(compiled(&learned).destinations.len(), 1);
    learned.learn(&answer("a.x.test", [200], 5), &patterns, &LIMITS, 0).unwrap();
    let one = compiled(&learned);
    learned.learn(&answer("b.x.test", [150, 220], 5), &patterns, &LIMITS, 0).unwrap();
    let three = compiled(&learned);
    let class = |last: u8| three.destinations[&address(last).into()];
    assert_eq!((class(150), class(220)), (class(200), class(200)));
    assert_eq!(one.destinations[&address(200).into()], class(200));
    assert_eq!((one.verdicts, one.pods), (three.verdicts.clone(), three.pods.clone()));
    // Inside of a range of another binding it is of another class.
    learned.learn(&answer("c.x.test", [7], 5), &patterns, &LIMITS, 0).unwrap();
    assert!(matches!(compiled(&learned).destinations[&address(7).into()], Destination::Class(_)));
    assert_eq!(three.looked_up, [pattern("*.x.test")].into());
    assert_eq!(three.nameless, [address(99)].into(), "no rule with names selects it");
}

#[test]
fn an_address_is_kept_for_its_time_and_grace_and_while_a_flow_leads_there() {
    let mut learned = Learned::default();
    let patterns: Patterns = [pattern("a.test")].into_iter().collect();
    assert_eq!(
        learned.learn(&answer("b.test", [1], 60), &patterns, &LIMITS, 0),
        Ok(false),
        "nobody means it"
    );
    assert_eq!(learned.learn(&answer("a.test", [1, 2], 60), &patterns, &LIMITS, 0), Ok(true));
    assert_eq!(learned.learn(&answer("a.test", [1], 100), &patterns, &LIMITS, 10), Ok(false));
    let nobody = |_: &IpAddr| false;
    assert!(!learned.expire(&patterns, &LIMITS, nobody, 360));
    assert!(!learned.expire(&patterns, &LIMITS, |it| *it == address(2), 361));
    assert!(learned.expire(&patterns, &LIMITS, nobody, 361));
    assert_eq!(learned.of("a.test").collect::<Vec<_>>(), [&address(1)]);
    assert!(learned.expire(&patterns, &LIMITS, nobody, 411) && learned.is_empty());
    learned.learn(&answer("a.test", [1], u32::MAX), &patterns, &LIMITS, 0).unwrap();
    let (_, _, until) = learned.entries().next().unwrap();
    assert_eq!(until, 7 * 86_400);
    assert!(learned.expire(&Patterns::default(), &LIMITS, |_| true, 1), "nobody means it any more");
}

#[test]
fn what_does_not_fit_is_not_learned_in_part_and_what_is_over_makes_room() {
    let mut learned = Learned::default();
    let patterns: Patterns = ["a.test", "b.test", "c.test"].map(pattern).into_iter().collect();
    assert_eq!(learned.learn(&answer("a.test", 0..9, 60), &patterns, &LIMITS, 0), Err(Full::Name));
    assert!(learned.is_empty());
    assert_eq!(learned.learn(&answer("a.test", 0..8, 60), &patterns, &LIMITS, 0), Ok(true));
    assert_eq!(
        learned.learn(&answer("a.test", [8], 60), &patterns, &LIMITS, 60),
        Err(Full::Name),
        "all are believed"
    );
    assert_eq!(learned.learn(&answer("a.test", [8], 60), &patterns, &LIMITS, 61), Ok(true));
    assert_eq!((learned.of("a.test").count(), learned.hurried), (8, 1));
    learned.learn(&answer("b.test", 20..28, 60), &patterns, &LIMITS, 61).unwrap();
    assert_eq!(learned.learn(&answer("c.test", 40..45, 60), &patterns, &LIMITS, 61), Ok(true));
    assert_eq!(learned.len(), 20, "one of a's was over");
    assert_eq!(learned.learn(&answer("c.test", 45..48, 60), &patterns, &LIMITS, 61), Ok(true));
    assert!(learned.len() <= 20);
}

#[test]
fn one_account_leaves_room_for_the_next() {
    let named = |text: &str, owner: &str| (pattern(text), owner.to_owned());
    let patterns: Patterns =
        [named("*.x.test", "shop"), named("a.test", "bank"), named("a.test", "shop")].into_iter().collect();
    let limits = Limits { per_name: 20, ..LIMITS };
    let mut learned = Learned::default();
    assert_eq!(learned.learn(&answer("b.x.test", 0..10, 60), &patterns, &limits, 0), Ok(true), "half");
    assert_eq!(learned.learn(&answer("c.x.test", [10], 60), &patterns, &limits, 0), Err(Full::Share));
    assert_eq!(
        learned.learn(&answer("a.test", 20..25, 60), &patterns, &limits, 0),
        Ok(true),
        "the other's too"
    );
    let alone: Patterns = [named("*.x.test", "shop")].into_iter().collect();
    assert_eq!(learned.learn(&answer("c.x.test", [10], 60), &alone, &limits, 0), Ok(true));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// The look-up by labels against going through all patterns.
    #[test]
    fn patterns_that_mean_a_name_are_those_that_match_it(
        patterns in prop::collection::vec("(\\*\\.)?[ab](\\.[ab]){0,3}", 0..12),
        name in "[ab](\\.[ab]){0,4}",
    ) {
        let all: BTreeSet<HostPattern> = patterns.iter().map(|it| pattern(it)).collect();
        let by_labels: Patterns = all.iter().cloned().collect();
        let found: BTreeSet<&HostPattern> = by_labels.matching(&name).collect();
        let expected: BTreeSet<&HostPattern> = all.iter().filter(|it| it.matches(&name)).collect();
        prop_assert_eq!(by_labels.mean(&name), !expected.is_empty());
        prop_assert_eq!(found, expected);
    }

    /// Whatever is answered and whenever: what was told and is believed is known, unless the answer was refused; and the limits hold.
    #[test]
    fn nothing_that_was_told_is_forgotten_before_its_time(
        steps in prop::collection::vec((0..3u8, prop::collection::btree_set(0..30u8, 1..6), 1..50u32, 0..40i64), 1..40),
    ) {
        let names = ["a.test", "b.x.test", "c.x.test"];
        let patterns: Patterns = ["a.test", "*.x.test"].map(pattern).into_iter().collect();
        let (mut learned, mut now) = (Learned::default(), 0);
        let mut believed: BTreeMap<(&str, IpAddr), i64> = BTreeMap::new();
        for (name, lasts, ttl, pause) in steps {
            let name = names[usize::from(name)];
            now += pause;
            if learned.learn(&answer(name, lasts.iter().copied(), ttl), &patterns, &LIMITS, now).is_ok() {
                for last in lasts {
                    let until = believed.entry((name, address(last))).or_default();
                    *until = (*until).max(now + i64::from(ttl));
                }
            }
            learned.expire(&patterns, &LIMITS, |_| false, now);
            prop_assert!(learned.len() <= LIMITS.total);
            prop_assert!(names.iter().all(|name| learned.of(name).count() <= LIMITS.per_name));
            let resolved = learned.resolve(&patterns);
            for ((name, address), _) in believed.iter().filter(|(_, until)| **until >= now) {
                prop_assert!(learned.of(name).any(|known| known == address), "{name} {address} at {now}");
                let pattern = if *name == "a.test" { pattern("a.test") } else { pattern("*.x.test") };
                prop_assert!(resolved.of(&[pattern]).any(|known| known == address));
            }
            // As the next agent would know it.
            let entries = learned.entries().map(|(name, address, until)| (name.to_owned(), address, until));
            prop_assert_eq!(Learned::restore(entries).resolve(&patterns), resolved);
        }
    }
}
