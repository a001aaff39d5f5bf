//! The store in SQLite.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

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

#[test]
fn figures_are_there_after_a_restart() {
    let folder = support::Folder::new("usage");
    let path = folder.0.join("usage.db");
    scenarios::figures_are_there_after_a_restart(&|| {
        aegis_usage::Store::sqlite(&path, support::PATIENCE).unwrap()
    });
}

/// Without any patience a large question is ended, and a small one is answered before anybody looks at the clock.
#[test]
fn a_slow_question_is_ended() {
    let folder = support::Folder::new("usage");
    let store = aegis_usage::Store::sqlite(folder.0.join("usage.db"), std::time::Duration::ZERO).unwrap();
    scenarios::fill(&store, 6);
    assert_eq!(store.query(&aegis_usage::Scope::All, &scenarios::ports()).unwrap().rows.len(), 1);
    let keys = (0..20u8)
        .flat_map(|account| (0..200u8).map(move |origin| support::key(&account.to_string(), origin)));
    let rows = keys.map(|key| (key, support::figures(1, 1))).collect();
    store.ingest(&[support::report("node-a", 7, rows)], support::T0 + 80).unwrap();
    let slow = store.query(&aegis_usage::Scope::All, &scenarios::ports());
    assert!(matches!(slow, Err(aegis_usage::Error::TooSlow(0))), "{slow:?}");
}
