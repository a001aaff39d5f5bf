//! The store in SQLite.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use aegis_usage::{Dimension, Level, Query};
use proptest::prelude::*;
use support::{each, generate, model, scenarios};

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes in whatever order, however often: every level answers every question as the interpreter does.
    #[test]
    fn any_question_is_answered_as_by_the_interpreter(run in generate::run()) {
        let (store, _folder) = support::sqlite();
        generate::deliver(&store, &run);
        model::compare(&store, &run.reports, &run.questions);
    }
}

#[test]
fn a_report_counts_once() {
    each(scenarios::a_report_counts_once);
}

#[test]
fn a_late_report_is_right_in_every_level() {
    each(scenarios::a_late_report_is_right_in_every_level);
}

#[test]
fn it_is_said_up_to_when_a_level_is_made() {
    each(scenarios::it_is_said_up_to_when_a_level_is_made);
}

#[test]
fn what_is_missing_is_seen() {
    each(scenarios::what_is_missing_is_seen);
}

#[test]
fn what_is_old_is_forgotten_level_by_level() {
    each(scenarios::what_is_old_is_forgotten_level_by_level);
}

#[test]
fn a_clock_that_jumps_empties_nothing() {
    each(scenarios::a_clock_that_jumps_empties_nothing);
}

#[test]
fn a_long_interval_is_of_its_end() {
    each(scenarios::a_long_interval_is_of_its_end);
}

#[test]
fn who_reports_too_often_is_not_heard() {
    each(scenarios::who_reports_too_often_is_not_heard);
}

#[test]
fn one_wrong_report_does_not_keep_others_out() {
    each(scenarios::one_wrong_report_does_not_keep_others_out);
}

#[test]
fn pods_of_others_are_not_seen() {
    each(scenarios::pods_of_others_are_not_seen);
}

#[test]
fn words_of_users_are_values() {
    each(scenarios::words_of_users_are_values);
}

/// With one file, opened as often as the scenario wants.
fn again(scenario: fn(&dyn Fn() -> aegis_usage::Store)) {
    let folder = support::folder("usage");
    let path = folder.path().join("usage.db");
    scenario(&|| aegis_usage::Store::sqlite(&path, support::PATIENCE).unwrap());
}

#[test]
fn figures_are_there_after_a_restart() {
    again(scenarios::figures_are_there_after_a_restart);
}

#[test]
fn a_new_owner_is_one_from_now_on() {
    again(scenarios::a_new_owner_is_one_from_now_on);
}

/// Questions that tell no origins, rules and pods apart are answered by totals, and by nothing else.
#[test]
fn few_rows_are_read_where_few_things_are_told_apart() {
    let folder = support::folder("usage");
    let path = folder.path().join("usage.db");
    let store = aegis_usage::Store::sqlite(&path, support::PATIENCE).unwrap();
    scenarios::fill(&store, 6);
    store.maintain(support::T0 + 7_300, &aegis_usage::Retention::default()).unwrap();
    let file = rusqlite::Connection::open(&path).unwrap();
    file.execute_batch("DELETE FROM usage_10; DELETE FROM usage_60; DELETE FROM usage_3600;").unwrap();
    for level in Level::ALL {
        let ask = |by: &[Dimension]| {
            let query = Query { level: Some(level), by: by.to_vec(), ..scenarios::ports() };
            store.query(&aegis_usage::Scope::All, &query).unwrap().rows
        };
        let few = [Dimension::Address, Dimension::Account, Dimension::Site, Dimension::Node];
        assert_eq!(ask(&few)[0].figures, [100.0, 102.0, 30.0], "{level:?}");
        for many in [Dimension::Origin, Dimension::Rule, Dimension::Pod] {
            assert_eq!(ask(&[many]), [], "{level:?} {many:?}");
        }
    }
}

/// A store of an earlier version, which had no totals: what it has is answered by its rows.
#[test]
fn what_is_older_than_totals_is_still_answered() {
    let folder = support::folder("usage");
    let path = folder.path().join("usage.db");
    let open = || aegis_usage::Store::sqlite(&path, support::PATIENCE).unwrap();
    let retention = aegis_usage::Retention::default();
    let store = open();
    scenarios::fill(&store, 6);
    store.maintain(support::T0 + 7_300, &retention).unwrap();
    drop(store);
    let file = rusqlite::Connection::open(&path).unwrap();
    file.execute_batch(
        "DROP TABLE total_10; DROP TABLE total_60; DROP TABLE total_3600; DROP TABLE owners;
         DELETE FROM meta WHERE name LIKE 'total%'; UPDATE meta SET value = 2 WHERE name = 'schema';",
    )
    .unwrap();
    drop(file);
    let store = open();
    let ask = |level, from| {
        let query = Query { level: Some(level), from, to: support::T0 + 10_800, ..scenarios::ports() };
        store.query(&aegis_usage::Scope::All, &query).unwrap().rows[0].figures.clone()
    };
    for level in Level::ALL {
        assert_eq!(ask(level, support::T0), [100.0, 102.0, 30.0], "{level:?}");
    }
    // What comes has totals; a window over both has all of both.
    let hour = 3_600;
    let more = support::report("node-a", 360, vec![(support::key("shop", 1), support::figures(300, 7))]);
    store.ingest(&[more], support::T0 + hour + 10).unwrap();
    store.maintain(support::T0 + 3 * hour, &retention).unwrap();
    for level in Level::ALL {
        assert_eq!(ask(level, support::T0)[1..], [302.0, 37.0], "{level:?}");
        assert_eq!(ask(level, support::T0 + hour), [300.0, 302.0, 7.0], "{level:?}");
    }
}

/// Figures whose sum does not fit: their minutes are not made, and everything else is, as is forgetting.
#[test]
fn a_slot_that_cannot_be_made_holds_up_nothing() {
    let folder = support::folder("usage");
    let path = folder.path().join("usage.db");
    let store = aegis_usage::Store::sqlite(&path, support::PATIENCE).unwrap();
    let of = |node: &str, number: u64| {
        let rows = (1..3).map(|origin| (support::key("shop", origin), support::figures(50, 5)));
        support::report(node, number, rows.collect())
    };
    // By name before the others, and in their midst.
    let nodes = ["bad", "node-a", "node-b"];
    let reports: Vec<_> = nodes.iter().flat_map(|node| (0..12).map(|number| of(node, number))).collect();
    store.ingest(&reports, support::T0 + 120).unwrap();
    let file = rusqlite::Connection::open(&path).unwrap();
    let spoil = "UPDATE usage_10 SET flows = 9223372036854775807 WHERE series IN (SELECT id FROM series WHERE node = 'bad')";
    file.execute_batch(&format!("{spoil} AND slot < {}", support::T0 + 60)).unwrap();
    let retention = aegis_usage::Retention::new(3_600, 3_600, 86_400).unwrap();
    let done = store.maintain(support::T0 + 200, &retention).unwrap();
    assert_eq!((done.rolled, done.skipped), (5, 1));
    let flows = |node: &str, level| {
        let filter = aegis_usage::Filter { nodes: vec![node.into()], ..Default::default() };
        let query =
            Query { level: Some(level), filter, step: Some(level.resolution()), ..scenarios::ports() };
        let rows = store.query(&aegis_usage::Scope::All, &query).unwrap().rows;
        rows.iter().map(|row| (row.at - support::T0, row.figures[2])).collect::<Vec<_>>()
    };
    for node in ["node-a", "node-b"] {
        assert_eq!(flows(node, Level::Minutes), [(0, 60.0), (60, 60.0)], "{node}");
    }
    assert_eq!(flows("bad", Level::Minutes), [(60, 60.0)]);
    // What is old goes, the marks of what was never made with it.
    let later = support::T0 + 4 * 3_600;
    store.ingest(&[support::report("node-a", 4 * 360 - 1, vec![])], later).unwrap();
    let done = store.maintain(later, &retention).unwrap();
    assert_eq!(done.skipped, 1);
    assert_eq!(flows("node-a", Level::Hours), [(0, 120.0)]);
    let done = store.maintain(later, &retention).unwrap();
    assert_eq!((done.skipped, store.maintain(later, &retention).unwrap().skipped), (0, 0));
}

/// Without any patience a large question is ended, and a small one is answered before anybody looks at the clock.
#[test]
fn a_slow_question_is_ended() {
    let folder = support::folder("usage");
    let store =
        aegis_usage::Store::sqlite(folder.path().join("usage.db"), std::time::Duration::ZERO).unwrap();
    scenarios::fill(&store, 6);
    assert_eq!(store.query(&aegis_usage::Scope::All, &scenarios::ports()).unwrap().rows.len(), 1);
    let keys = (0..20u8)
        .flat_map(|account| (0..200u8).map(move |origin| support::key(&account.to_string(), origin)));
    let rows = keys.map(|key| (key, support::figures(1, 1))).collect();
    store.ingest(&[support::report("node-a", 7, rows)], support::T0 + 80).unwrap();
    let origins = Query { by: vec![Dimension::Origin], ..scenarios::ports() };
    let slow = store.query(&aegis_usage::Scope::All, &origins);
    assert!(matches!(slow, Err(aegis_usage::Error::TooSlow(0))), "{slow:?}");
}
