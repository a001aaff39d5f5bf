//! Who gets addresses of whose prefix, what a withdrawal changes, and what the two sides are told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use aegis_core::egress::Egress;
use aegis_core::model::*;
use aegis_core::plan::AccountRight;
use aegis_core::policy::{Expression, Operator};
use aegis_core::selector::{Labels, Selector};
use aegis_core::{Plan, plan, reason};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use support::*;

fn to_account(name: &str, account: &str, max: u32) -> Delegation {
    Delegation { name: name.into(), to: Delegate::Account(account.into()), max }
}

fn to_team(name: &str, team: &str, max: u32) -> Delegation {
    let selector = Selector { labels: [("team".to_owned(), team.to_owned())].into(), expressions: vec![] };
    Delegation { name: name.into(), to: Delegate::Namespaces(selector), max }
}

fn team(team: &str) -> Labels {
    [("team".to_owned(), team.to_owned())].into()
}

/// An allocation of account `bank` of so many addresses.
fn of_bank(name: &str, count: u32) -> Allocation {
    Allocation { request: AddressRequest::Count(count), ..of("bank", name) }
}

fn of(account: &str, name: &str) -> Allocation {
    Allocation { name: AllocationName { account: account.into(), name: name.into() }, ..allocation(name) }
}

/// Prefix `p` of sixteen addresses that `shop` owns; `bank` asks for two.
fn lent(delegations: Vec<Delegation>) -> Inputs {
    Inputs {
        prefixes: vec![Prefix { delegations, ..prefix("p", "192.0.2.0/28") }],
        allocations: vec![of_bank("b", 2)],
        ..world()
    }
}

fn addresses(plan: &Plan, account: &str) -> Vec<Egress> {
    plan.addresses.iter().filter(|it| it.allocation.account == account).map(|it| it.address).collect()
}

fn told(plan: &Plan, allocation: &Allocation) -> [(&'static str, String); 3] {
    let outcome = &plan.allocations[&allocation.name];
    [&outcome.accepted, &outcome.delegated, &outcome.allocated]
        .map(|it| (it.reason(), it.message().to_owned()))
}

fn reasons(plan: &Plan, allocation: &Allocation) -> [&'static str; 3] {
    told(plan, allocation).map(|it| it.0)
}

#[test]
fn without_a_delegation_there_is_nothing_and_the_owner_is_not_named() {
    let mut inputs = lent(vec![to_account("other", "kiosk", 4), to_team("team", "money", 4)]);
    let plan = advance(&mut inputs);
    assert!(plan.addresses.is_empty());
    let told = told(&plan, &inputs.allocations[0]);
    assert_eq!([told[0].0, told[1].0, told[2].0], [reason::NOT_PERMITTED; 3]);
    assert!(
        told.iter().all(|(_, message)| !message.contains("shop") && !message.contains("kiosk")),
        "{told:?}"
    );
    assert!(told[0].1.starts_with("spec.prefixes[0]: AegisPrefix \"p\""), "{told:?}");
}

#[test]
fn an_account_gets_what_is_delegated_to_it_over_all_of_its_allocations() {
    let mut inputs = lent(vec![to_account("bank", "bank", 3)]);
    inputs.allocations.push(of_bank("c", 2));
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "bank").len(), 3, "older first: b has two, c one");
    assert_eq!(
        reasons(&plan, &inputs.allocations[0]),
        [reason::ACCEPTED, reason::DELEGATED, reason::ALLOCATED]
    );
    let [accepted, delegated, allocated] = told(&plan, &inputs.allocations[1]);
    assert_eq!([accepted.0, delegated.0], [reason::ACCEPTED, reason::DELEGATED]);
    assert_eq!(delegated.1, "account \"bank\" has 3 of at most 3 of AegisPrefix \"p\"");
    assert_eq!(allocated.0, reason::DELEGATION_LIMIT);
    let expected = "spec.addresses.ipv4: 1 of 2 addresses allocated: account \"bank\" has 3 of the 3 addresses of AegisPrefix \"p\" that are delegated to it; ";
    assert!(allocated.1.starts_with(expected), "{}", allocated.1);

    // The owner has no limit, and another account a number of its own.
    inputs.prefixes[0].delegations.push(to_team("money", "money", 3));
    inputs.namespaces.insert("kiosk".into(), team("money"));
    let many = AddressRequest::Count(16);
    inputs.allocations.push(Allocation { request: many.clone(), ..of("kiosk", "t") });
    inputs.allocations.push(Allocation { request: many, created: 9, ..of("shop", "s") });
    let plan = advance(&mut inputs);
    assert_eq!(["bank", "kiosk", "shop"].map(|it| addresses(&plan, it).len()), [3, 3, 10]);
    let outcome = &plan.prefixes["p"];
    assert_eq!((outcome.used, outcome.free, outcome.reserved, outcome.capacity), (16, 0, 0, 16));
    assert_eq!(outcome.delegated.message(), "2 accounts have 6 addresses by delegation");
    let by: Vec<(&str, u32, &AccountRight)> =
        outcome.accounts.iter().map(|it| (it.account.as_str(), it.used(), &it.right)).collect();
    let by_delegation = |name: &str| AccountRight::Delegated { delegation: name.into(), max: 3 };
    assert_eq!(
        by,
        [
            ("bank", 3, &by_delegation("bank")),
            ("kiosk", 3, &by_delegation("money")),
            ("shop", 10, &AccountRight::Owner)
        ]
    );
}

#[test]
fn explicit_addresses_count_and_say_nothing_of_other_accounts() {
    let mut inputs = lent(vec![to_account("bank", "bank", 2)]);
    inputs.allocations = vec![
        allocation("a"),
        Allocation {
            request: AddressRequest::Explicit(["192.0.2.9", "192.0.2.8", "192.0.2.7"].map(ip).to_vec()),
            ..of("bank", "b")
        },
        Allocation {
            request: AddressRequest::Explicit(vec![ip("192.0.2.0")]),
            created: 5,
            ..of("bank", "c")
        },
    ];
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "bank"), ["192.0.2.8", "192.0.2.9"].map(ip));
    let [_, _, allocated] = told(&plan, &inputs.allocations[1]);
    assert_eq!(allocated.0, reason::DELEGATION_LIMIT);
    assert!(
        allocated.1.starts_with("spec.addresses.explicit[2]: 192.0.2.7: account \"bank\" has 2 of the 2")
    );
    let [_, _, allocated] = told(&plan, &inputs.allocations[2]);
    assert_eq!(allocated.0, reason::NO_FREE_ADDRESS);
    assert!(allocated.1.starts_with("spec.addresses.explicit[0]: 192.0.2.0 is in use by another account; "));
    assert!(!allocated.1.contains("shop"), "{}", allocated.1);
}

#[test]
fn a_limit_of_one_prefix_does_not_stand_against_the_next() {
    let mut inputs = lent(vec![to_account("bank", "bank", 1)]);
    inputs.prefixes.push(Prefix { account: "bank".into(), ..prefix("q", "198.51.100.0/30") });
    inputs.allocations[0].prefixes = vec!["p".into(), "q".into()];
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "bank"), ["192.0.2.0", "198.51.100.0"].map(ip));
    assert_eq!(
        reasons(&plan, &inputs.allocations[0]),
        [reason::ACCEPTED, reason::DELEGATED, reason::ALLOCATED]
    );
}

#[test]
fn of_ipv6_a_64_counts_as_one() {
    let mut inputs = lent(vec![]);
    let delegations = vec![to_account("bank", "bank", 2)];
    inputs.prefixes = vec![Prefix { delegations, ..prefix("p", "2001:db8::/56") }];
    inputs.allocations = vec![Allocation { ipv6: 3, ..of_bank("b", 0) }];
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "bank"), ["2001:db8::/64", "2001:db8:0:1::/64"].map(ip));
    assert_eq!(reasons(&plan, &inputs.allocations[0])[2], reason::DELEGATION_LIMIT);
    assert_eq!((plan.prefixes["p"].used, plan.prefixes["p"].free), (2, 254));
}

/// However a delegation ends, what it gave stays in full service, nothing is added, both sides are told, and it heals.
#[test]
fn a_withdrawal_takes_nothing_and_gives_nothing() {
    let expressions = |operator| {
        let expression = Expression { key: "team".into(), operator, values: vec!["money".into()] };
        let selector = Selector { labels: Labels::new(), expressions: vec![expression] };
        Delegation { name: "d".into(), to: Delegate::Namespaces(selector), max: 2 }
    };
    type Change = fn(&mut Inputs);
    let ways: [(&str, Delegation, Change); 6] = [
        ("it is removed", to_account("d", "bank", 2), |it| it.prefixes[0].delegations.clear()),
        ("it names another", to_account("d", "bank", 2), |it| {
            it.prefixes[0].delegations = vec![to_account("d", "kiosk", 2)];
        }),
        ("a lower number", to_account("d", "bank", 2), |it| it.prefixes[0].delegations[0].max = 1),
        ("a label changes", to_team("d", "money", 2), |it| {
            it.namespaces.insert("bank".into(), team("other"));
        }),
        ("labels go", expressions(Operator::In), |it| {
            it.namespaces.insert("bank".into(), Labels::new());
        }),
        ("the namespace is unknown", expressions(Operator::In), |it| it.namespaces.clear()),
    ];
    for (way, delegation, withdraw) in ways {
        let mut inputs = lent(vec![delegation]);
        inputs.namespaces.insert("bank".into(), team("money"));
        let had = addresses(&advance(&mut inputs), "bank");
        assert_eq!(had.len(), 2, "{way}");
        let healthy = inputs.clone();
        withdraw(&mut inputs);
        // It asks for more, and demand grows.
        inputs.allocations[0].request = AddressRequest::Count(3);
        inputs.allocations.push(of_bank("more", 1));
        inputs.nodes[0].demand.insert(inputs.allocations[0].name.clone(), 20);
        let plan = advance(&mut inputs);
        assert_eq!(addresses(&plan, "bank"), had, "{way}");
        assert_eq!(held(&plan.addresses[0], "n1").len(), 20, "{way}: slices grow as ever");
        assert_eq!(advance(&mut inputs).addresses, plan.addresses, "{way}");
        for allocation in &inputs.allocations {
            let [accepted, delegated, allocated] = told(&plan, allocation);
            assert_eq!(delegated.0, reason::DELEGATION_WITHDRAWN, "{way}");
            if way == "a lower number" {
                assert_eq!([accepted.0, allocated.0], [reason::ACCEPTED, reason::DELEGATION_LIMIT], "{way}");
            } else {
                assert_eq!([accepted.0, allocated.0], [reason::DELEGATION_WITHDRAWN; 2], "{way}");
            }
        }
        let outcome = &plan.prefixes["p"];
        assert_eq!(outcome.delegated.reason(), reason::DELEGATION_WITHDRAWN, "{way}");
        let message = outcome.delegated.message();
        assert!(message.contains("account \"bank\" has 2 addresses (bank/b)"), "{way}: {message}");
        assert!(outcome.accepted.is_good(), "{way}: others may go on taking");

        (inputs.prefixes, inputs.namespaces) = (healthy.prefixes, healthy.namespaces);
        inputs.prefixes[0].delegations[0].max = 4;
        let plan = advance(&mut inputs);
        assert_eq!(addresses(&plan, "bank").len(), 4, "{way}: re-delegation heals");
        for allocation in &inputs.allocations {
            assert_eq!(
                reasons(&plan, allocation),
                [reason::ACCEPTED, reason::DELEGATED, reason::ALLOCATED],
                "{way}"
            );
        }
        assert!(plan.prefixes["p"].delegated.is_good(), "{way}");
    }
}

#[test]
fn whoever_moves_away_from_a_withdrawn_prefix_can() {
    let mut inputs = lent(vec![to_account("bank", "bank", 2)]);
    inputs.prefixes.push(Prefix { account: "bank".into(), ..prefix("q", "198.51.100.0/30") });
    inputs.allocations[0].request = AddressRequest::Count(1);
    advance(&mut inputs);
    inputs.prefixes[0].delegations.clear();
    inputs.allocations[0].prefixes = vec!["q".into()];
    inputs.allocations[0].request = AddressRequest::Count(2);
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "bank"), ["192.0.2.0", "198.51.100.0"].map(ip));
    let found = reasons(&plan, &inputs.allocations[0]);
    assert_eq!(found, [reason::ACCEPTED, reason::DELEGATION_WITHDRAWN, reason::ALLOCATED]);
    inputs.allocations[0].request = AddressRequest::Count(1);
    advance(&mut inputs);
    let addresses_now = inputs.addresses.clone();
    inputs.nodes.iter_mut().for_each(|node| report_drained(node, &addresses_now));
    advance(&mut inputs);
    inputs.now += QUARANTINE;
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "bank"), [ip("198.51.100.0")]);
    assert_eq!(plan.prefixes["p"].used, 0);
    assert_eq!(reasons(&plan, &inputs.allocations[0])[1], reason::DELEGATED);
}

#[test]
fn addresses_that_cannot_be_planned_with_count_too() {
    let mut inputs = lent(vec![to_account("bank", "bank", 2)]);
    let frozen = Address {
        address: ip("192.0.2.0"),
        prefix: "p".into(),
        allocation: AllocationName { account: "bank".into(), name: "unreadable".into() },
        epoch: 1,
        holdings: vec![],
        fence: None,
    };
    inputs.withheld.insert(frozen.address, None);
    inputs.frozen = vec![frozen];
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "bank"), [ip("192.0.2.1")]);
    assert_eq!((plan.prefixes["p"].used, plan.prefixes["p"].free), (2, 14));
}

#[test]
fn capacity_tells_what_is_reserved_used_and_free() {
    let mut inputs = lent(vec![to_account("bank", "bank", 2)]);
    inputs.prefixes[0].reserved = vec!["192.0.2.8/30".parse().unwrap()];
    inputs.nodes[0].addresses = vec!["192.0.2.15".parse().unwrap()];
    let plan = advance(&mut inputs);
    let outcome = &plan.prefixes["p"];
    assert_eq!((outcome.capacity, outcome.reserved, outcome.used, outcome.free), (11, 5, 2, 9));
    // One that is in use and reserved later counts as used and as reserved; what is free does not shrink for it twice.
    inputs.prefixes[0].reserved.push("192.0.2.0/32".parse().unwrap());
    let plan = advance(&mut inputs);
    let outcome = &plan.prefixes["p"];
    assert_eq!((outcome.capacity, outcome.reserved, outcome.used, outcome.free), (10, 6, 2, 9));
}

const ACCOUNTS: [&str; 4] = ["shop", "bank", "kiosk", "acme"];

/// What people do about delegations.
#[derive(Clone, Debug)]
enum Act {
    Delegate(Vec<(usize, u32)>),
    Label(usize, usize),
    Forget(usize),
    Ask {
        account: usize,
        name: usize,
        count: u32,
    },
    List {
        account: usize,
        name: usize,
        low: Vec<u8>,
    },
    Delete {
        account: usize,
        name: usize,
    },
    /// Flows end, agents report, the quarantine passes.
    Rest,
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => prop::collection::vec((0..6usize, 1..5u32), 0..4).prop_map(Act::Delegate),
        2 => (0..4usize, 0..2usize).prop_map(|(account, team)| Act::Label(account, team)),
        1 => (0..4usize).prop_map(Act::Forget),
        5 => (0..4usize, 0..2usize, 0..6u32)
            .prop_map(|(account, name, count)| Act::Ask { account, name, count }),
        2 => (0..4usize, 0..2usize, prop::collection::vec(0..16u8, 1..4))
            .prop_map(|(account, name, low)| Act::List { account, name, low }),
        2 => (0..4usize, 0..2usize).prop_map(|(account, name)| Act::Delete { account, name }),
        2 => Just(Act::Rest),
    ]
}

fn delegation(index: usize, max: u32) -> Delegation {
    match index {
        0..=2 => to_account(&format!("d{index}"), ACCOUNTS[index + 1], max),
        _ => to_team(&format!("d{index}"), ["red", "blue", "none"][index - 3], max),
    }
}

/// What an account may have, worked out in the most obvious way.
fn most(inputs: &Inputs, account: &str) -> u32 {
    let mut most = if account == "shop" { u32::MAX } else { 0 };
    for delegation in &inputs.prefixes[0].delegations {
        let applies = match &delegation.to {
            Delegate::Account(name) => name == account,
            Delegate::Namespaces(selector) => inputs
                .namespaces
                .get(account)
                .is_some_and(|labels| labels.get("team") == selector.labels.get("team")),
        };
        if applies && delegation.max > most {
            most = delegation.max;
        }
    }
    most
}

fn rest(inputs: &mut Inputs) {
    for _ in 0..2 {
        let addresses = inputs.addresses.clone();
        inputs.nodes.iter_mut().for_each(|node| report_drained(node, &addresses));
        advance(inputs);
        inputs.now += QUARANTINE;
    }
    advance(inputs);
    let left: BTreeSet<&AllocationName> = inputs.addresses.iter().map(|it| &it.allocation).collect();
    inputs.allocations.retain(|it| !it.deleting || left.contains(&it.name));
}

fn act(inputs: &mut Inputs, act: Act) {
    let named = |account: usize, name: usize| AllocationName {
        account: ACCOUNTS[account].into(),
        name: format!("a{name}"),
    };
    let ask = |inputs: &mut Inputs, name: AllocationName, request: AddressRequest| match inputs
        .allocations
        .iter_mut()
        .find(|it| it.name == name)
    {
        Some(allocation) => allocation.request = request,
        None => inputs.allocations.push(Allocation { name, request, ..allocation("a") }),
    };
    match act {
        Act::Delegate(all) => {
            let all: BTreeMap<usize, u32> = all.into_iter().collect();
            inputs.prefixes[0].delegations = all.into_iter().map(|(at, max)| delegation(at, max)).collect();
        }
        Act::Label(account, of) => {
            inputs.namespaces.insert(ACCOUNTS[account].into(), team(["red", "blue"][of]));
        }
        Act::Forget(account) => drop(inputs.namespaces.remove(ACCOUNTS[account])),
        Act::Ask { account, name, count } => ask(inputs, named(account, name), AddressRequest::Count(count)),
        Act::List { account, name, low } => {
            let list = low.into_iter().map(|it| ip(&format!("192.0.2.{it}"))).collect();
            ask(inputs, named(account, name), AddressRequest::Explicit(list));
        }
        Act::Delete { account, name } => {
            let name = named(account, name);
            inputs.allocations.iter_mut().filter(|it| it.name == name).for_each(|it| it.deleting = true);
        }
        Act::Rest => rest(inputs),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_delegations(acts in prop::collection::vec(any_act(), 1..40)) {
        let mut inputs = lent(vec![]);
        inputs.allocations.clear();
        for one in acts {
            act(&mut inputs, one);
            let before = inputs.clone();
            // Audited.
            let plan = advance(&mut inputs);
            let has = |of: &[Address], account: &str| of.iter().filter(|it| it.allocation.account == account).count();
            for account in ACCOUNTS {
                let (had, has, most) =
                    (has(&before.addresses, account), has(&plan.addresses, account), most(&before, account) as usize);
                prop_assert!(has <= most.max(had), "{account} had {had}, has {has}, may have {most}");
                // Everybody is told, and nobody who has a right hears of a withdrawal.
                let over = has > most;
                for (name, outcome) in plan.allocations.iter().filter(|(name, _)| name.account == account) {
                    let withdrawn = outcome.delegated.reason() == reason::DELEGATION_WITHDRAWN;
                    prop_assert_eq!(withdrawn, over, "{:?}: {:?}", name, outcome);
                    // An account reads nothing of any other.
                    for verdict in [&outcome.accepted, &outcome.delegated, &outcome.allocated] {
                        for other in ACCOUNTS.into_iter().filter(|it| *it != account) {
                            prop_assert!(!verdict.message().contains(other), "{verdict:?}");
                        }
                    }
                }
                let shown = plan.prefixes["p"].accounts.iter().find(|it| it.account == account);
                prop_assert_eq!(shown.map_or(0, |it| it.used() as usize), has);
                let names = |it: &aegis_core::Verdict| it.message().contains(&format!("account {account:?} has"));
                prop_assert!(!over || !plan.prefixes["p"].delegated.is_good());
                prop_assert!(over || !names(&plan.prefixes["p"].delegated));
            }
            // What stood and was asked for stays, whatever became of the right to it.
            for address in &before.addresses {
                prop_assert!(
                    plan.addresses.iter().any(|it| (it.address, &it.allocation) == (address.address, &address.allocation))
                        || address.holdings.iter().all(|it| it.state != State::Held)
                );
            }
            let outcome = &plan.prefixes["p"];
            prop_assert_eq!(outcome.used + outcome.free, outcome.capacity, "none is lost");
        }
        // All come back.
        inputs.allocations.iter_mut().for_each(|it| it.deleting = true);
        advance(&mut inputs);
        rest(&mut inputs);
        prop_assert!(inputs.addresses.is_empty() && inputs.allocations.is_empty(), "{:#?}", inputs.addresses);
        prop_assert_eq!(plan(&inputs).prefixes["p"].free, 16);
    }
}
