//! What a store has to do, told step by step. Each is done with SQLite and with PostgreSQL.

use super::{T0, all, figures, key, report};
use aegis_usage::{
    Aggregation, Coverage, Dimension, Figure, Filter, Gap, Level, Measure, Order, OriginFilter, Owned,
    Prefix, Query, QueryError, Receipt, Retention, Scope, Store,
};
use aegis_usage_report::{Figures, Invalid, MAX_COUNT, MAX_GAUGE, Report};
use std::collections::{BTreeMap, BTreeSet};

/// Makes an empty store, or opens the same again.
type Make<'a> = &'a dyn Fn() -> Store;

const DAY: i64 = 86_400;

fn figure(measure: Measure, aggregation: Aggregation) -> Figure {
    Figure { measure, aggregation }
}

/// Mean and greatest number of ports, flows: of the first two hours.
pub fn ports() -> Query {
    Query {
        from: T0,
        to: T0 + 7_200,
        level: Some(Level::Tens),
        figures: vec![
            figure(Measure::InUse, Aggregation::Avg),
            figure(Measure::Peak, Aggregation::Max),
            figure(Measure::Flows, Aggregation::Sum),
        ],
        first: 100,
        ..Query::default()
    }
}

fn numbers(store: &Store, level: Level) -> Vec<f64> {
    let rows = all(store, &Scope::All, &Query { level: Some(level), ..ports() });
    rows.first().map(|row| row.figures.clone()).unwrap_or_default()
}

/// Reports 0 to `count` of one node: 100 ports each.
pub fn fill(store: &Store, count: u64) {
    let reports: Vec<Report> =
        (0..count).map(|number| report("node-a", number, vec![(key("shop", 1), figures(100, 5))])).collect();
    let receipts = store.ingest(&reports, T0 + 10 * count as i64).unwrap();
    assert!(receipts.iter().all(|it| *it == Receipt::Stored));
}

pub fn a_report_counts_once(make: Make) {
    let store = make();
    let of = |node, number, in_use| report(node, number, vec![(key("shop", 1), figures(in_use, 3))]);
    let first = [of("node-a", 1, 40), of("node-b", 1, 2), of("node-a", 1, 40)];
    let receipts = store.ingest(&first, T0 + 30).unwrap();
    assert_eq!(receipts, [Receipt::Stored, Receipt::Stored, Receipt::Repeated]);
    // The first one counts, also if another says something else under its number.
    assert_eq!(store.ingest(&[of("node-a", 1, 900)], T0 + 90).unwrap(), [Receipt::Repeated]);
    assert_eq!(numbers(&store, Level::Tens), [42.0, 46.0, 6.0]);
    let contents = store.contents().unwrap();
    assert_eq!((contents.newest, contents.series), (Some(T0 + 20), 2));
    assert!(contents.bytes > 0);
    let done = store.maintain(T0 + 80, &Retention::default()).unwrap();
    assert_eq!(done.rolled, 2);
    assert_eq!(numbers(&store, Level::Minutes), [42.0, 46.0, 6.0]);
    // Nothing is left to do, and doing it again changes nothing.
    assert_eq!(store.maintain(T0 + 80, &Retention::default()).unwrap().rolled, 0);
    assert_eq!(numbers(&store, Level::Minutes), [42.0, 46.0, 6.0]);
}

pub fn a_late_report_is_right_in_every_level(make: Make) {
    let store = make();
    let of = |number, in_use| report("node-a", number, vec![(key("shop", 1), figures(in_use, 6))]);
    store.ingest(&[of(0, 10), of(1, 20), of(3, 60)], T0 + 40).unwrap();
    // A slot of which the end has not come yet is not made.
    assert_eq!(store.maintain(T0 + 60, &Retention::default()).unwrap().rolled, 0);
    let later = T0 + 3_600 + 60;
    store.maintain(later, &Retention::default()).unwrap();
    for level in Level::ALL {
        assert_eq!(numbers(&store, level), [30.0, 62.0, 18.0], "{level:?}");
    }
    assert_eq!(store.ingest(&[of(2, 130)], later).unwrap(), [Receipt::Stored]);
    store.maintain(later, &Retention::default()).unwrap();
    for level in Level::ALL {
        assert_eq!(numbers(&store, level), [55.0, 132.0, 24.0], "{level:?}");
    }
    // A report in which a key has no row says that it is not in use.
    let none = report("node-a", 4, vec![]);
    store.ingest(&[none], later).unwrap();
    store.maintain(later, &Retention::default()).unwrap();
    assert_eq!(numbers(&store, Level::Minutes), [44.0, 132.0, 24.0]);
    assert_eq!(numbers(&store, Level::Hours), [44.0, 132.0, 24.0]);
}

pub fn it_is_said_up_to_when_a_level_is_made(make: Make) {
    let store = make();
    let until = |level| store.query(&Scope::All, &Query { level: Some(level), ..ports() }).unwrap().until;
    assert_eq!(Level::ALL.map(until), [0, 0, 0]);
    fill(&store, 9);
    assert_eq!(Level::ALL.map(until), [T0 + 90, T0, T0]);
    store.maintain(T0 + 90, &Retention::default()).unwrap();
    assert_eq!(Level::ALL.map(until), [T0 + 90, T0 + 60, T0]);
    store.maintain(T0 + 4_000, &Retention::default()).unwrap();
    assert_eq!(Level::ALL.map(until), [T0 + 90; 3]);
}

pub fn what_is_missing_is_seen(make: Make) {
    let store = make();
    let of = |number| report("node-a", number, vec![]);
    store.ingest(&[of(7), of(2), of(3), report("node-b", 0, vec![])], T0 + 100).unwrap();
    let gap = |first, last| Gap {
        node: "node-a".into(),
        boot: "boot".into(),
        first,
        last,
        from: T0 + 10 * first,
        to: T0 + 10 * (last + 1),
    };
    assert_eq!(store.gaps(T0, T0 + 3_600, 10).unwrap(), [gap(4, 6)]);
    store.ingest(&[of(5)], T0 + 200).unwrap();
    assert_eq!(store.gaps(T0, T0 + 3_600, 10).unwrap(), [gap(4, 4), gap(6, 6)]);
    assert_eq!(store.gaps(T0, T0 + 3_600, 1).unwrap(), [gap(4, 4)]);
    assert_eq!(store.gaps(T0 + 60, T0 + 3_600, 10).unwrap(), [gap(6, 6)]);
    store.maintain(T0 + 7_300, &Retention::default()).unwrap();
    let covered =
        |node: &str, slot, samples| Coverage { node: node.into(), slot, samples, seconds: 10 * samples };
    let minutes = store.coverage(Level::Minutes, T0, T0 + 3_600, 10).unwrap();
    assert_eq!(minutes, [covered("node-a", T0, 3), covered("node-b", T0, 1), covered("node-a", T0 + 60, 1)]);
    let hours = store.coverage(Level::Hours, T0, T0 + 3_600, 10).unwrap();
    assert_eq!(hours, [covered("node-a", T0, 4), covered("node-b", T0, 1)]);
}

pub fn what_is_old_is_forgotten_level_by_level(make: Make) {
    let store = make();
    let retention = Retention::new(3_600, 2 * DAY, 30 * DAY).unwrap();
    fill(&store, 6);
    let at = |now: i64, sequence: u64, account: &str| Report {
        from: now - 10,
        to: now,
        ..report("node-a", sequence, vec![(key(account, 1), figures(1, 1))])
    };
    // Two hours later something else is reported, and the 10 seconds are gone.
    let now = T0 + 3 * 3_600;
    store.ingest(&[at(now, 1_000, "bank")], now).unwrap();
    store.maintain(now, &retention).unwrap();
    assert_eq!(numbers(&store, Level::Tens), Vec::<f64>::new());
    assert_eq!(numbers(&store, Level::Minutes), [100.0, 102.0, 30.0]);
    assert_eq!(store.ingest(&[report("node-a", 3, vec![])], now).unwrap(), [Receipt::TooOld]);
    // Also by a clock that went back: it could not be summed any more.
    assert_eq!(store.ingest(&[report("node-a", 3, vec![])], T0 + 100).unwrap(), [Receipt::TooOld]);
    let chosen = store.query(&Scope::All, &Query { level: None, to: T0 + 600, ..ports() }).unwrap();
    assert_eq!((chosen.level, chosen.rows.len()), (Level::Minutes, 1));
    let now = T0 + 5 * DAY;
    store.ingest(&[at(now, 2_000, "bank")], now).unwrap();
    store.maintain(now, &retention).unwrap();
    assert_eq!(numbers(&store, Level::Minutes), Vec::<f64>::new());
    assert_eq!(numbers(&store, Level::Hours), [100.0, 102.0, 30.0]);
    let now = T0 + 90 * DAY;
    store.ingest(&[at(now, 3_000, "bank")], now).unwrap();
    let done = store.maintain(now, &retention).unwrap();
    assert_eq!(numbers(&store, Level::Hours), Vec::<f64>::new());
    assert_eq!(done.dropped, 1, "the series of the account that is gone");
    // What is still reported is still there, and its series is known.
    store.ingest(&[at(now + 10, 3_001, "bank"), at(now + 20, 3_002, "shop")], now + 20).unwrap();
    let recent = Query { from: now - 60, to: now + 60, by: vec![Dimension::Account], ..ports() };
    let rows = all(&store, &Scope::All, &recent);
    let counted: Vec<(&str, i64)> = rows.iter().map(|row| (row.by[0].as_str(), row.slots)).collect();
    assert_eq!(counted, [("bank", 2), ("shop", 1)]);
}

pub fn a_clock_that_jumps_empties_nothing(make: Make) {
    let store = make();
    fill(&store, 6);
    // The collector's clock is a year ahead.
    store.maintain(T0 + 365 * DAY, &Retention::default()).unwrap();
    for level in Level::ALL {
        assert_eq!(numbers(&store, level), [100.0, 102.0, 30.0], "{level:?}");
    }
    // A node's clock is: what it says of a later time counts as of now, once. A few minutes are left as they are.
    let ahead = |number, from| Report {
        from,
        to: from + 10,
        ..report("node-b", number, vec![(key("shop", 3), figures(8, 2))])
    };
    let two = [ahead(1, T0 + DAY), ahead(2, T0 + DAY + 10)];
    assert_eq!(store.ingest(&two, T0 + 65).unwrap(), [Receipt::Moved, Receipt::Moved]);
    assert_eq!(store.ingest(&two[..1], T0 + 95).unwrap(), [Receipt::Repeated]);
    assert_eq!(store.ingest(&[ahead(3, T0 + 349)], T0 + 60).unwrap(), [Receipt::Stored]);
    assert_eq!(store.contents().unwrap().newest, Some(T0 + 359));
    let of_b = Filter { nodes: vec!["node-b".into()], ..Filter::default() };
    let slots = |level: Level| {
        let query =
            Query { level: Some(level), step: Some(level.resolution()), filter: of_b.clone(), ..ports() };
        let rows = all(&store, &Scope::All, &query);
        rows.into_iter().map(|row| (row.at - T0, row.figures)).collect::<Vec<_>>()
    };
    assert_eq!(slots(Level::Tens), [(60, vec![8.0, 10.0, 4.0]), (350, vec![8.0, 10.0, 2.0])]);
    // It starts anew in the same 10 seconds: two reports of one slot are its mean, not its sum.
    let again = |boot: &str, in_use| Report {
        boot: boot.into(),
        from: T0 + 70,
        to: T0 + 72,
        ..report("node-c", 0, vec![(key("shop", 2), figures(in_use, 1))])
    };
    store.ingest(&[again("b1", 10), again("b2", 30)], T0 + 80).unwrap();
    store.maintain(T0 + 7_300, &Retention::default()).unwrap();
    assert_eq!(slots(Level::Hours), [(0, vec![8.0, 10.0, 6.0])]);
    let filter = Filter { nodes: vec!["node-c".into()], ..Filter::default() };
    for level in Level::ALL {
        let rows = all(&store, &Scope::All, &Query { level: Some(level), filter: filter.clone(), ..ports() });
        assert_eq!(rows[0].figures, [20.0, 32.0, 2.0], "{level:?}");
    }
}

/// After an absence an agent tells of a long time at once: what it says is in use is so at its end.
pub fn a_long_interval_is_of_its_end(make: Make) {
    let store = make();
    let long = Report { from: T0, ..report("node-a", 359, vec![(key("shop", 1), figures(100, 5))]) };
    assert_eq!(store.ingest(std::slice::from_ref(&long), T0 + 3_600).unwrap(), [Receipt::Stored]);
    let tens =
        store.query(&Scope::All, &Query { level: Some(Level::Tens), step: Some(10), ..ports() }).unwrap();
    assert_eq!(tens.rows.iter().map(|row| row.at - T0).collect::<Vec<_>>(), [3_590]);
    // It is known for as long as its slot is, though it began before that.
    let retention = Retention::new(3_600, DAY, DAY).unwrap();
    let now = T0 + 3_600 + 3_000;
    store.ingest(&[Report { from: now - 10, to: now, ..report("node-b", 0, vec![]) }], now).unwrap();
    store.maintain(now, &retention).unwrap();
    assert_eq!(store.ingest(&[long], now).unwrap(), [Receipt::Repeated]);
    assert_eq!(numbers(&store, Level::Tens), [100.0, 102.0, 5.0]);
}

/// So many reports of the same 10 seconds, each with as much as may be said, that their sum fits; what comes on top is refused.
pub fn who_reports_too_often_is_not_heard(make: Make) {
    let store = make();
    let most = Figures { in_use: MAX_GAUGE, peak: MAX_GAUGE, flows: MAX_COUNT, ..Figures::default() };
    let report = |boot: u64, slot: u64| Report {
        boot: format!("b{boot}"),
        ..report("node-a", slot, vec![(key("shop", 1), most.clone())])
    };
    let slots = [0, 1];
    for boots in (0..1_000).collect::<Vec<_>>().chunks(50) {
        let reports: Vec<Report> =
            slots.iter().flat_map(|slot| boots.iter().map(|boot| report(*boot, *slot))).collect();
        let receipts = store.ingest(&reports, T0 + 60).unwrap();
        assert!(receipts.iter().all(|it| *it == Receipt::Stored));
    }
    let other = super::report("node-b", 0, vec![(key("bank", 1), figures(1, 1))]);
    let receipts = store.ingest(&[report(1_000, 0), other], T0 + 60).unwrap();
    assert_eq!(receipts, [Receipt::Invalid(Invalid::Crowded), Receipt::Stored]);
    let done = store.maintain(T0 + 4_000, &Retention::default()).unwrap();
    assert_eq!(done.skipped, 0);
    let flows = (2_000 * MAX_COUNT + 1) as f64;
    for level in Level::ALL {
        assert_eq!(numbers(&store, level)[2], flows, "{level:?}");
    }
}

pub fn one_wrong_report_does_not_keep_others_out(make: Make) {
    let store = make();
    let wrong = Report { version: 9, ..report("node-a", 1, vec![]) };
    let right = report("node-a", 2, vec![(key("shop", 1), figures(7, 1))]);
    let receipts = store.ingest(&[wrong, right], T0 + 60).unwrap();
    assert_eq!(receipts, [Receipt::Invalid(Invalid::Version(9)), Receipt::Stored]);
    assert_eq!(numbers(&store, Level::Tens), [7.0, 9.0, 1.0]);
}

pub fn pods_of_others_are_not_seen(make: Make) {
    let store = make();
    let refused =
        aegis_usage_report::Figures { refused: BTreeMap::from([("no_port".into(), 4)]), ..figures(1, 1) };
    let rows = vec![
        (key("parent", 1), figures(1, 1)),
        (key("tenant", 1), figures(2, 1)),
        (key("other", 2), refused),
    ];
    let mut rows = rows;
    rows[2].0.address = Some([203, 0, 113, 1].into());
    store.ingest(&[report("node-a", 0, rows)], T0 + 60).unwrap();
    let by = vec![Dimension::Account, Dimension::Pod];
    let seen = |scope: &Scope, filter: Filter| {
        let rows = all(&store, scope, &Query { by: by.clone(), filter, first: 1, ..ports() });
        rows.into_iter().map(|row| row.by.join("/")).collect::<Vec<_>>()
    };
    let parent_since = |since| Scope::Part {
        accounts: BTreeSet::from(["parent".to_string()]),
        prefixes: vec![Owned { range: "192.0.2.0/24".parse().unwrap(), account: "parent".into(), since }],
    };
    let parent = parent_since(T0);
    let none = Scope::Part { accounts: BTreeSet::new(), prefixes: Vec::new() };
    assert_eq!(
        seen(&Scope::All, Filter::default()),
        ["other/other-pod", "parent/parent-pod", "tenant/tenant-pod"]
    );
    assert_eq!(seen(&parent, Filter::default()), ["parent/parent-pod", "tenant/"]);
    // What was before it was the parent's is not.
    assert_eq!(seen(&parent_since(T0 + 1), Filter::default()), ["parent/parent-pod"]);
    assert_eq!(seen(&Scope::account("tenant"), Filter::default()), ["tenant/tenant-pod"]);
    assert_eq!(seen(&none, Filter::default()), Vec::<String>::new());
    // Nor found out by asking for them.
    let pods = |name: &str| Filter { pods: vec![name.into()], ..Filter::default() };
    assert_eq!(seen(&parent, pods("tenant-pod")), Vec::<String>::new());
    assert_eq!(seen(&parent, pods("parent-pod")), ["parent/parent-pod"]);
    let accounts = Filter { accounts: vec!["other".into(), "tenant".into()], ..Filter::default() };
    assert_eq!(seen(&Scope::account("parent"), accounts), Vec::<String>::new());
    // A cursor of somebody else gives no more than one's own question.
    let query = Query { by, first: 1, ..ports() };
    let next = store.query(&Scope::All, &query).unwrap().next.unwrap();
    let rows = store.query(&Scope::account("tenant"), &Query { after: Some(next), ..query }).unwrap().rows;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].by, ["tenant", "tenant-pod"]);
}

pub fn words_of_users_are_values(make: Make) {
    let store = make();
    let name = "x'; DROP TABLE series; -- $1 ?1 \"%";
    store.ingest(&[report("node-a", 0, vec![(key(name, 1), figures(1, 1))])], T0 + 60).unwrap();
    let filter = Filter { accounts: vec![name.into(), "nul\0".into()], ..Filter::default() };
    let query = Query { filter, by: vec![Dimension::Account], ..ports() };
    assert_eq!(all(&store, &Scope::account(name), &query)[0].by, [name]);
    let wrong = Query { after: Some("00".into()), ..query.clone() };
    assert!(matches!(store.query(&Scope::All, &wrong), Err(aegis_usage::Error::Query(QueryError::Cursor))));
    let origins = vec![OriginFilter::Range("198.51.100.0/24".parse().unwrap(), Some(80))];
    let other = Query { filter: Filter { origins, ..Filter::default() }, order: Order::Group, ..query };
    assert_eq!(all(&store, &Scope::All, &other), []);
}

pub fn figures_are_there_after_a_restart(open: Make) {
    let store = open();
    fill(&store, 6);
    drop(store);
    let store = open();
    // Minutes that were not made are made now; what was known of series is asked for.
    store.maintain(T0 + 120, &Retention::default()).unwrap();
    assert_eq!(numbers(&store, Level::Minutes), [100.0, 102.0, 30.0]);
    let again = report("node-a", 5, vec![]);
    assert_eq!(store.ingest(&[again], T0 + 120).unwrap(), [Receipt::Repeated]);
    store.ingest(&[report("node-a", 6, vec![(key("shop", 1), figures(30, 0))])], T0 + 120).unwrap();
    assert_eq!(numbers(&store, Level::Tens), [90.0, 102.0, 30.0]);
}

pub fn a_new_owner_is_one_from_now_on(open: Make) {
    let prefix = |range: &str, account: &str, since| Prefix {
        range: range.parse().unwrap(),
        account: account.into(),
        since,
    };
    let since = |store: &Store, prefixes: &[Prefix], now| {
        let owned = store.owned(prefixes, now).unwrap();
        owned.into_iter().map(|it| (it.account, it.since)).collect::<Vec<_>>()
    };
    let store = open();
    let (first, six) = (prefix("192.0.2.0/24", "a", Some(T0)), prefix("2001:db8:1::/48", "a", None));
    let both = [first, six];
    // It says so itself, or nobody knows.
    assert_eq!(since(&store, &both, T0 + 100), [("a".into(), T0), ("a".into(), T0 + 100)]);
    assert_eq!(since(&store, &both, T0 + 200), [("a".into(), T0), ("a".into(), T0 + 100)]);
    drop(store);
    let store = open();
    assert_eq!(since(&store, &both, T0 + 300), [("a".into(), T0), ("a".into(), T0 + 100)]);
    // Another object of the same range was made before the first one went.
    let next = [prefix("192.0.2.0/24", "b", Some(T0 + 50))];
    assert_eq!(since(&store, &next, T0 + 400), [("b".into(), T0 + 400)]);
    // Nor does the first owner see what was the second one's.
    assert_eq!(since(&store, &both, T0 + 500), [("a".into(), T0 + 500), ("a".into(), T0 + 100)]);
}
