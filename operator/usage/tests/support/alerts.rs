//! What alerts have to do, told step by step. Each is done with SQLite and with PostgreSQL.

use super::{T0, figures, key, report};
use aegis_usage::alert::{
    Account, Allocation, Happening, Item, Kind, MOST_ITEMS, MOST_RULES, PortUse, Refusals, Rule, Token,
};
use aegis_usage::{Retention, Store};
use aegis_usage_report::{Figures, Key, Report};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Makes an empty store, or opens the same again.
type Make<'a> = &'a dyn Fn() -> Store;

/// Ports of the address of tests.
const PORTS: i64 = 1_000;

/// 80 percent for 30 seconds, cleared below 70.
pub fn full() -> Rule {
    let port_use = Some(PortUse { percent: 80, clear_below: 70, wait: 30 });
    Rule { name: "full".into(), uid: "1".into(), port_use, ..Rule::default() }
}

/// An account with one allocation, whose address these nodes hold.
pub fn account(name: &str, rules: Vec<Rule>, holders: &[&str]) -> Account {
    let holders: BTreeSet<String> = holders.iter().map(|it| (*it).into()).collect();
    let allocation = Allocation {
        ports: PORTS,
        singles: BTreeSet::new(),
        addresses: [([192, 0, 2, 1].into(), holders)].into(),
        sites: [("east".into(), 8)].into(),
    };
    Account { name: name.into(), rules, allocations: [("partner".into(), allocation)].into() }
}

/// The report with a number, of one key with so many ports in use.
pub fn uses(node: &str, number: u64, in_use: u64) -> Report {
    report(node, number, vec![(key("shop", 1), figures(in_use, 0))])
}

fn watch(store: &Store, account: &Account, now: i64) -> Vec<Item> {
    store.watch(std::slice::from_ref(account), now, T0).unwrap().1
}

/// What happened, and when.
fn told(items: &[Item]) -> Vec<(Happening, i64, i64)> {
    items.iter().map(|item| (item.happening, item.since - T0, item.at - T0)).collect()
}

/// Delivers one slot after the other, of one node, and looks after each: what is told, each with the seconds since T0 after which it was.
fn run(store: &Store, account: &Account, ports: &[u64]) -> Vec<(i64, Item)> {
    let mut items: Vec<(i64, Item)> = watch(store, account, T0).into_iter().map(|item| (0, item)).collect();
    for (number, in_use) in (0..).zip(ports) {
        let now = T0 + 10 * (number as i64 + 1);
        store.ingest(&[uses("node-a", number, *in_use)], now).unwrap();
        items.extend(watch(store, account, now).into_iter().map(|item| (now - T0, item)));
    }
    items
}

pub fn raised_and_cleared_at_the_right_second(make: Make) {
    let store = make();
    let shop = account("shop", vec![full()], &["node-a"]);
    let items = run(&store, &shop, &[700, 799, 800, 900, 850, 780, 700, 699, 900, 900]);
    let happened: Vec<_> =
        items.iter().map(|(now, item)| (*now, told(std::slice::from_ref(item))[0])).collect();
    assert_eq!(
        happened,
        [(50, (Happening::Raised, 20, 50)), (80, (Happening::Cleared, 20, 70))],
        "{items:?}"
    );
    let raised = &items[0].1;
    assert_eq!((raised.figure, raised.highest, raised.limit.capacity), (850, 900, PORTS));
    assert_eq!(raised.pod.as_ref().map(|pod| (pod.name.as_str(), pod.figure)), Some(("shop-pod", 850)));
    let cleared = &items[1].1;
    assert_eq!((cleared.figure, cleared.highest), (699, 900));
    // It tells address, origin, figures, since when, and what to do.
    let text = format!("{} {}", raised.title(), raised.text().join(" "));
    for part in [
        "192.0.2.1",
        "198.51.100.1:443",
        "(tcp)",
        "850 of the 1000 ports",
        "85 %",
        "2023-11-14T23:00:20Z",
        "add an address",
        "kubectl aegis flows --egress 192.0.2.1 --to 198.51.100.1:443)",
        "shop-pod",
        "UsageAlert shop/full",
        "EgressAllocation shop/partner",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(cleared.title().starts_with("Cleared: "), "{}", cleared.title());
    // Of another allocation, and towards others, nothing is told. One store at a time.
    drop(store);
    let other = Rule { name: "b".into(), uid: "2".into(), allocation: Some("other".into()), ..full() };
    let elsewhere = |range: &str, port| Rule {
        name: "c".into(),
        uid: "3".into(),
        origins: vec![(range.parse().unwrap(), port)],
        ..full()
    };
    let rules = [other, elsewhere("198.51.100.0/31", Some(80)), elsewhere("203.0.113.0/24", None)];
    for rule in rules {
        let store = make();
        assert_eq!(run(&store, &account("shop", vec![rule], &["node-a"]), &[900; 6]), []);
    }
    let store = make();
    let items =
        run(&store, &account("shop", vec![elsewhere("198.51.100.0/31", Some(443))], &["node-a"]), &[900; 6]);
    assert_eq!(items.len(), 1);
    assert_eq!(store.standings(None).unwrap()[0].tracks.len(), 1);
}

pub fn one_ipv6_address_has_ports_and_a_64_has_none(make: Make) {
    let address: std::net::IpAddr = "2001:db8::7".parse().unwrap();
    for single in [true, false] {
        let store = make();
        let mut shop = account("shop", vec![full()], &["node-a"]);
        let partner = shop.allocations.get_mut("partner").unwrap();
        partner.addresses = [(address, BTreeSet::from(["node-a".to_owned()]))].into();
        partner.singles.extend(single.then_some(address));
        let mut items = watch(&store, &shop, T0);
        for number in 0..6 {
            let own = Key { address: Some(address), ..key("shop", 1) };
            let now = T0 + 10 * (number as i64 + 1);
            store.ingest(&[report("node-a", number, vec![(own, figures(900, 0))])], now).unwrap();
            items.extend(watch(&store, &shop, now));
        }
        assert_eq!(items.len(), usize::from(single), "{items:?}");
        for text in items.iter().map(|it| it.text().join(" ")) {
            assert!(text.contains("gives out of 2001:db8::7 towards"), "{text}");
            assert!(text.contains("spec.addresses.ipv6"), "{text}");
        }
    }
}

pub fn what_nobody_reports_clears_nothing(make: Make) {
    let store = make();
    let both = account("shop", vec![full()], &["node-a", "node-b"]);
    assert_eq!(watch(&store, &both, T0), []);
    let mut items = Vec::new();
    for number in 0..40 {
        let now = T0 + 10 * (number + 1);
        let mut reports = vec![uses("node-a", number as u64, 100)];
        if number < 5 {
            reports.push(uses("node-b", number as u64, 800));
        }
        store.ingest(&reports, now).unwrap();
        items.extend(watch(&store, &both, now));
    }
    assert_eq!(told(&items), [(Happening::Raised, 0, 30)], "five minutes without node-b");
    let standing = &store.standings(None).unwrap()[0];
    assert_eq!(standing.silent, 1);
    // Nobody reports: nothing is known of any slot.
    for now in (T0 + 410..T0 + 5_000).step_by(100) {
        assert_eq!(watch(&store, &both, now), []);
    }
    // It holds nothing any more, so it has nothing in use.
    let one = account("shop", vec![full()], &["node-a"]);
    store.ingest(&[uses("node-a", 600, 100)], T0 + 6_010).unwrap();
    let mut items = Vec::new();
    for _ in 0..12 {
        items.extend(watch(&store, &one, T0 + 6_200));
    }
    assert_eq!(items.len(), 1, "{items:?}");
    assert_eq!((items[0].happening, items[0].figure), (Happening::Cleared, 100));
}

pub fn a_late_report_counts_while_it_is_waited_for(make: Make) {
    let store = make();
    let both = account("shop", vec![full()], &["node-a", "node-b"]);
    watch(&store, &both, T0);
    for number in 0..6 {
        store.ingest(&[uses("node-a", number, 500)], T0 + 10 * (number as i64 + 1)).unwrap();
        assert_eq!(watch(&store, &both, T0 + 10 * (number as i64 + 1)), []);
    }
    let late: Vec<Report> = (0..6).map(|number| uses("node-b", number, 400)).collect();
    store.ingest(&late, T0 + 61).unwrap();
    assert_eq!(told(&watch(&store, &both, T0 + 61)), [(Happening::Raised, 0, 30)]);
    // One that comes after that changes nothing: what was not known then counts for nothing.
    drop(store);
    let store = make();
    watch(&store, &both, T0);
    let reports: Vec<Report> = (0..6).map(|number| uses("node-a", number, 500)).collect();
    store.ingest(&reports, T0 + 60).unwrap();
    assert_eq!(watch(&store, &both, T0 + 200), []);
    store.ingest(&late, T0 + 201).unwrap();
    assert_eq!(watch(&store, &both, T0 + 201), []);
    assert_eq!(store.standings(None).unwrap()[0].tracks, BTreeMap::new());
}

pub fn a_clock_that_jumps_tells_nothing(make: Make) {
    let store = make();
    let shop = account("shop", vec![full(), site(60)], &["node-a"]);
    assert_eq!(
        told(&run(&store, &shop, &[900; 4]).into_iter().map(|it| it.1).collect::<Vec<_>>()),
        [(Happening::Raised, 0, 30)]
    );
    for now in [T0 + 86_400, T0 + 50, T0 - 86_400, T0 + 10 * 86_400, T0 + 60] {
        assert_eq!(watch(&store, &shop, now), [], "{}", now - T0);
    }
    store.ingest(&[uses("node-a", 4, 100)], T0 + 60).unwrap();
    // Slots that came again are gone through first.
    let items: Vec<Item> = (0..8).flat_map(|_| watch(&store, &shop, T0 + 60)).collect();
    assert_eq!(told(&items), [(Happening::Cleared, 0, 40)]);
    assert_eq!(store.items("shop").unwrap().len(), 2);
}

/// An alert of sites that nobody holds anything of.
fn site(wait: i64) -> Rule {
    Rule { name: "site".into(), uid: "9".into(), site_without_holders: Some(wait), ..Rule::default() }
}

pub fn a_site_without_holders_is_told(make: Make) {
    let store = make();
    let with = |held| {
        let mut shop = account("shop", vec![site(60)], &[]);
        shop.allocations.get_mut("partner").unwrap().sites = held;
        shop
    };
    let held = |east, west| with([("east".to_string(), east), ("west".to_string(), west)].into());
    for now in (T0..T0 + 50).step_by(10) {
        assert_eq!(watch(&store, &held(3, 3), now), []);
    }
    let mut items = Vec::new();
    for now in (T0 + 50..T0 + 150).step_by(10) {
        items.extend(watch(&store, &held(3, 0), now));
    }
    assert_eq!(told(&items), [(Happening::Raised, 50, 110)]);
    assert_eq!((items[0].key.kind, items[0].key.site.as_str()), (Kind::SiteWithoutHolders, "west"));
    assert!(items[0].title().contains("site west"), "{}", items[0].title());
    // While nobody knows, nothing is told; an hour in which the collector was away is none.
    assert_eq!(watch(&store, &with(BTreeMap::new()), T0 + 160), []);
    assert_eq!(watch(&store, &held(0, 0), T0 + 3_760), []);
    assert_eq!(watch(&store, &held(0, 0), T0 + 7_360), []);
    let items = watch(&store, &held(1, 2), T0 + 7_370);
    assert_eq!(told(&items), [(Happening::Cleared, 50, 7_370)]);
    assert_eq!(items[0].figure, 2);
}

pub fn refusals_are_counted_within_a_window(make: Make) {
    let store = make();
    let refusals = Some(Refusals { more_than: 10, within: 30 });
    let rule = Rule { name: "refused".into(), uid: "2".into(), refusals, ..Rule::default() };
    let shop = account("shop", vec![rule], &["node-a"]);
    watch(&store, &shop, T0);
    let mut items = Vec::new();
    for (number, count) in (0..).zip([5, 5, 1, 0, 6, 4, 0, 0, 0]) {
        let refused = Figures { refused: [("no_port".to_string(), count)].into(), ..Figures::default() };
        let nowhere = Key { address: None, origin: None, ..key("shop", 1) };
        let rows = match count {
            0 => vec![],
            _ => vec![(key("shop", 1), refused.clone()), (nowhere, refused)],
        };
        let now = T0 + 10 * (number as i64 + 1);
        store.ingest(&[report("node-a", number, rows)], now).unwrap();
        items.extend(watch(&store, &shop, now));
    }
    // 11 within the third slot, 6 in the fourth; 10 at most later.
    let expected = [
        (Happening::Raised, 20, 30),
        (Happening::Raised, 20, 30),
        (Happening::Cleared, 20, 30),
        (Happening::Cleared, 20, 30),
    ];
    assert_eq!(told(&items), expected, "one with an address and an origin, one without");
    assert_eq!((items[0].figure, items[2].figure, items[2].highest), (11, 6, 11));
    assert_eq!(items[0].key.reason, "no_port");
    let text = items[1].text().join(" ");
    assert!(
        text.contains(
            "11 connections from 192.0.2.1 towards 198.51.100.1:443 (tcp) were refused within 30 s"
        ) && text.contains("wait for growth"),
        "{text}"
    );
}

pub fn what_is_not_wanted_any_more_is_cleared(make: Make) {
    let store = make();
    let shop = account("shop", vec![full()], &["node-a"]);
    assert_eq!(run(&store, &shop, &[900; 4]).len(), 1);
    let none = account("shop", vec![], &["node-a"]);
    let items = watch(&store, &none, T0 + 50);
    assert_eq!(told(&items), [(Happening::Cleared, 0, 50)]);
    assert!(items[0].unwatched && items[0].text().join(" ").contains("is no more"));
    assert_eq!(watch(&store, &none, T0 + 60), []);
    // Another one of the same name begins anew, with items of its own.
    let again = account("shop", vec![Rule { uid: "2".into(), ..full() }], &["node-a"]);
    let mut items = Vec::new();
    for number in 4..9 {
        store.ingest(&[uses("node-a", number, 900)], T0 + 10 * number as i64 + 10).unwrap();
        items.extend(watch(&store, &again, T0 + 10 * number as i64 + 10));
    }
    assert_eq!(items.len(), 1);
    let ids: BTreeSet<String> = store.items("shop").unwrap().into_iter().map(|item| item.id).collect();
    assert_eq!(ids.len(), 3, "all are different");
    // More than count do not.
    let many = (0..MOST_RULES + 5).map(|number| Rule {
        name: format!("r{number:03}"),
        uid: number.to_string(),
        ..full()
    });
    drop(store);
    let store = make();
    let shop = account("shop", many.collect(), &["node-a"]);
    assert_eq!(run(&store, &shop, &[900; 4]).len(), MOST_RULES);
}

pub fn a_bounded_number_of_items_is_kept_and_each_is_told_once(make: Make) {
    let store = make();
    let quick = Rule { port_use: Some(PortUse { percent: 80, clear_below: 80, wait: 0 }), ..full() };
    let shop = account("shop", vec![quick], &["node-a"]);
    let swings: Vec<u64> =
        (0..MOST_ITEMS as u64 + 20).map(|number| if number % 2 == 0 { 900 } else { 100 }).collect();
    let told = run(&store, &shop, &swings).len() as i64;
    assert_eq!(told, MOST_ITEMS + 20);
    let items = store.items("shop").unwrap();
    assert_eq!(items.len() as i64, MOST_ITEMS);
    assert!(items.windows(2).all(|pair| pair[0].published >= pair[1].published), "the newest first");
    let first = store.untold(3).unwrap();
    assert_eq!(first.len(), 3);
    assert_eq!(store.untold(3).unwrap(), first, "until it is said that they were told");
    for told in &first {
        store.tell(told).unwrap();
    }
    store.tell(&first[0]).unwrap();
    let next = store.untold(1).unwrap();
    assert_eq!(next[0].number, first[2].number + 1, "it never goes back");
    let other = account("other", vec![full()], &[]);
    store.watch(std::slice::from_ref(&other), T0 + 9_000, T0).unwrap();
    // An account that is no more leaves nothing to another one of its name.
    assert_eq!((store.items("shop").unwrap(), store.untold(3).unwrap()), (vec![], vec![]));
}

/// An account with much to tell keeps no other waiting.
pub fn accounts_are_told_in_turn(make: Make) {
    let store = make();
    let quick = Rule { port_use: Some(PortUse { percent: 80, clear_below: 80, wait: 0 }), ..full() };
    let both = ["bank", "shop"].map(|name| account(name, vec![quick.clone()], &["node-a"]));
    store.watch(&both, T0, T0).unwrap();
    for (number, ports) in (0..).zip([900, 100, 900, 100]) {
        let rows = ["bank", "shop"].map(|name| (key(name, 1), figures(ports, 0)));
        let now = T0 + 10 * (number as i64 + 1);
        store.ingest(&[report("node-a", number, rows.into())], now).unwrap();
        store.watch(&both, now, T0).unwrap();
    }
    let first = store.untold(5).unwrap();
    let told: Vec<(&str, i64)> = first.iter().map(|it| (it.item.account.as_str(), it.number)).collect();
    assert_eq!(told, [("bank", 0), ("shop", 0), ("bank", 1), ("shop", 1), ("bank", 2)]);
}

pub fn feeds_have_tokens(make: Make) {
    let store = make();
    let (one, two) = (Token::random().unwrap(), Token::random().unwrap());
    assert_eq!(store.token("shop").unwrap(), None);
    assert_eq!(store.give_token("shop", &one, false, T0).unwrap(), one);
    assert_eq!(store.give_token("shop", &two, false, T0 + 1).unwrap(), one, "it has one");
    assert_eq!(store.token("shop").unwrap(), Some((one.clone(), T0)));
    assert_eq!(store.give_token("shop", &two, true, T0 + 2).unwrap(), two);
    assert_eq!(store.token("shop").unwrap(), Some((two, T0 + 2)));
    assert_eq!(store.token("x' OR '1'='1").unwrap(), None);
    store.watch(&[account("shop", vec![], &[])], T0, T0).unwrap();
    assert!(store.token("shop").unwrap().is_some(), "also without alerts");
    store.watch(&[], T0, T0).unwrap();
    assert_eq!(store.token("shop").unwrap(), None);
}

/// What each node reports of each slot; None: nothing. And before which slots the collector begins anew.
#[derive(Clone, Debug)]
pub struct Story {
    slots: Vec<[Option<u64>; 2]>,
    restarts: BTreeSet<usize>,
}

pub fn story() -> impl Strategy<Value = Story> {
    let ports = prop_oneof![
        Just(Some(400)),
        Just(Some(420)),
        Just(Some(360)),
        Just(Some(300)),
        Just(Some(820)),
        Just(None)
    ];
    let slots = prop::collection::vec([ports.clone(), ports], 1..40);
    (slots, prop::collection::btree_set(0usize..40, 0..6)).prop_map(|(mut slots, restarts)| {
        // A last one, up to which all is looked at.
        slots.push([Some(0), Some(0)]);
        Story { slots, restarts }
    })
}

/// Items of a story, and how each would be told by who goes through it from begin to end.
pub fn tell(open: Make, story: &Story, restarts: bool) -> Vec<Item> {
    let both = account("shop", vec![full()], &["node-a", "node-b"]);
    let (mut store, mut began) = (open(), T0);
    let look = |store: &Store, now, began| store.watch(std::slice::from_ref(&both), now, began).unwrap();
    look(&store, T0, began);
    for (number, slot) in story.slots.iter().enumerate() {
        let now = T0 + 10 * (number as i64 + 1);
        if restarts && story.restarts.contains(&number) {
            drop(store);
            (store, began) = (open(), now);
        }
        let reports = ["node-a", "node-b"].iter().zip(slot);
        let reports: Vec<Report> =
            reports.filter_map(|(node, ports)| Some(uses(node, number as u64, (*ports)?))).collect();
        store.ingest(&reports, now).unwrap();
        look(&store, now, began);
        store.maintain(now, &Retention::default()).unwrap();
    }
    let end = T0 + 10 * story.slots.len() as i64 + 200;
    look(&store, end, began);
    let mut items = store.items("shop").unwrap();
    items.reverse();
    items.iter_mut().for_each(|item| item.published = 0);
    items
}

/// The same by who goes through the story from begin to end.
pub fn expected(story: &Story) -> Vec<(Happening, i64, i64)> {
    let (mut since, mut held, mut raised, mut told) = (None, 0, false, Vec::new());
    for (begin, [a, b]) in (0..).step_by(10).zip(&story.slots) {
        let known = a.unwrap_or(0) + b.unwrap_or(0);
        let all = a.is_some() && b.is_some();
        if known >= 800 {
            since = since.or(Some(begin));
            held += 10;
            if held >= 30 && !raised {
                raised = true;
                told.push((Happening::Raised, since.unwrap(), begin + 10));
            }
        } else if all && raised && known < 700 {
            told.push((Happening::Cleared, since.unwrap(), begin));
            (since, held, raised) = (None, 0, false);
        } else if all && !raised {
            (since, held) = (None, 0);
        }
    }
    told
}

/// With and without restarts the same is told, and it is what happened.
pub fn compare(open: Make, other: Make, story: &Story) {
    let without = tell(open, story, false);
    assert_eq!(told(&without), expected(story));
    assert_eq!(tell(other, story, true), without);
}
