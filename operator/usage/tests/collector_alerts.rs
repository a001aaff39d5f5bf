//! Alerts, with SQLite.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use proptest::prelude::*;
use support::{PATIENCE, T0, alerts, each};

#[test]
fn raised_and_cleared_at_the_right_second() {
    each(alerts::raised_and_cleared_at_the_right_second);
}

#[test]
fn one_ipv6_address_has_ports_and_a_64_has_none() {
    each(alerts::one_ipv6_address_has_ports_and_a_64_has_none);
}

#[test]
fn what_nobody_reports_clears_nothing() {
    each(alerts::what_nobody_reports_clears_nothing);
}

#[test]
fn a_late_report_counts_while_it_is_waited_for() {
    each(alerts::a_late_report_counts_while_it_is_waited_for);
}

#[test]
fn a_clock_that_jumps_tells_nothing() {
    each(alerts::a_clock_that_jumps_tells_nothing);
}

#[test]
fn a_site_without_holders_is_told() {
    each(alerts::a_site_without_holders_is_told);
}

#[test]
fn refusals_are_counted_within_a_window() {
    each(alerts::refusals_are_counted_within_a_window);
}

#[test]
fn what_is_not_wanted_any_more_is_cleared() {
    each(alerts::what_is_not_wanted_any_more_is_cleared);
}

#[test]
fn a_bounded_number_of_items_is_kept_and_each_is_told_once() {
    each(alerts::a_bounded_number_of_items_is_kept_and_each_is_told_once);
}

#[test]
fn accounts_are_told_in_turn() {
    each(alerts::accounts_are_told_in_turn);
}

#[test]
fn feeds_have_tokens() {
    each(alerts::feeds_have_tokens);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whoever reports when, and however often the collector begins anew: the same items, and those that are right.
    #[test]
    fn restarts_change_nothing(story in alerts::story()) {
        let folders = [support::folder("usage"), support::folder("usage")];
        let open = |at: usize| aegis_usage::Store::sqlite(folders[at].path().join("usage.db"), PATIENCE).unwrap();
        alerts::compare(&|| open(0), &|| open(1), &story);
    }
}

/// A store of the first version has neither tables of alerts nor of owners, nor totals; they come, and nothing goes.
#[test]
fn an_older_store_gets_what_it_lacks() {
    let folder = support::folder("usage");
    let path = folder.path().join("usage.db");
    let open = || aegis_usage::Store::sqlite(&path, PATIENCE);
    support::scenarios::fill(&open().unwrap(), 3);
    let direct = rusqlite::Connection::open(&path).unwrap();
    let older = "DROP TABLE alert_states; DROP TABLE alert_items; DROP TABLE feed_tokens; DROP TABLE owners;
         DROP TABLE total_10; DROP TABLE total_60; DROP TABLE total_3600; DELETE FROM meta WHERE name LIKE 'total_%';
         UPDATE meta SET value = 1 WHERE name = 'schema';";
    direct.execute_batch(older).unwrap();
    let store = open().unwrap();
    assert_eq!(store.contents().unwrap().newest, Some(T0 + 30));
    assert_eq!(store.items("shop").unwrap(), []);
    drop(store);
    for newer in [5, -1] {
        direct.execute("UPDATE meta SET value = ?1 WHERE name = 'schema'", [newer]).unwrap();
        assert!(matches!(open(), Err(aegis_usage::Error::Schema { .. })), "{newer}");
    }
}
