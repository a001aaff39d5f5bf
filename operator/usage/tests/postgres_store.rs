//! The store in PostgreSQL: a server of its own, which these tests need.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use proptest::test_runner::{Config, TestRunner};
use support::server::Server;
use support::{alerts, generate, model, scenarios};

/// One test, since it takes a server. What fails is named by its own message.
#[test]
fn postgresql_does_what_sqlite_does() {
    let server = Server::start();
    let store = || server.store();
    scenarios::a_report_counts_once(&store);
    scenarios::a_late_report_is_right_in_every_level(&store);
    scenarios::it_is_said_up_to_when_a_level_is_made(&store);
    scenarios::what_is_missing_is_seen(&store);
    scenarios::what_is_old_is_forgotten_level_by_level(&store);
    scenarios::a_clock_that_jumps_empties_nothing(&store);
    scenarios::one_wrong_report_does_not_keep_others_out(&store);
    scenarios::pods_of_others_are_not_seen(&store);
    scenarios::words_of_users_are_values(&store);
    alerts::raised_and_cleared_at_the_right_second(&store);
    alerts::what_nobody_reports_clears_nothing(&store);
    alerts::a_late_report_counts_while_it_is_waited_for(&store);
    alerts::a_clock_that_jumps_tells_nothing(&store);
    alerts::a_site_without_holders_is_told(&store);
    alerts::refusals_are_counted_within_a_window(&store);
    alerts::what_is_not_wanted_any_more_is_cleared(&store);
    alerts::a_bounded_number_of_items_is_kept_and_each_is_told_once(&store);
    alerts::feeds_have_tokens(&store);
    let url = server.database();
    scenarios::figures_are_there_after_a_restart(&|| {
        aegis_usage::Store::postgres(&url, support::PATIENCE).unwrap()
    });
    one_collector_writes(&server);
    a_slow_question_is_ended(&server);
    let config = Config { cases: 12, failure_persistence: None, ..Config::default() };
    let compared = TestRunner::new(config).run(&generate::run(), |run| {
        let (postgres, (sqlite, _folder)) = (server.store(), support::sqlite());
        generate::deliver(&postgres, &run);
        generate::deliver(&sqlite, &run);
        model::compare(&postgres, &run.reports, &run.questions);
        for generate::Question { scope, query } in &run.questions {
            // Pages too, with their cursors.
            assert_eq!(postgres.query(scope, query).unwrap(), sqlite.query(scope, query).unwrap());
        }
        Ok(())
    });
    compared.unwrap();
    let config = Config { cases: 8, failure_persistence: None, ..Config::default() };
    let told = TestRunner::new(config).run(&alerts::story(), |story| {
        let urls = [server.database(), server.database()];
        let open = |at: usize| aegis_usage::Store::postgres(&urls[at], support::PATIENCE).unwrap();
        alerts::compare(&|| open(0), &|| open(1), &story);
        Ok(())
    });
    told.unwrap();
}

fn one_collector_writes(server: &Server) {
    let url = server.database();
    let first = aegis_usage::Store::postgres(&url, support::PATIENCE).unwrap();
    let second = aegis_usage::Store::postgres(&url, support::PATIENCE);
    assert!(matches!(second, Err(aegis_usage::Error::Taken)));
    drop(first);
    aegis_usage::Store::postgres(&url, support::PATIENCE).unwrap();
}

fn a_slow_question_is_ended(server: &Server) {
    let url = server.database();
    let store = aegis_usage::Store::postgres(&url, std::time::Duration::from_secs(1)).unwrap();
    scenarios::fill(&store, 1);
    let mut other = postgres::Client::connect(&url, postgres::NoTls).unwrap();
    let mut held = other.transaction().unwrap();
    held.batch_execute("LOCK TABLE series IN ACCESS EXCLUSIVE MODE").unwrap();
    let slow = store.query(&aegis_usage::Scope::All, &scenarios::ports());
    assert!(matches!(slow, Err(aegis_usage::Error::TooSlow(_))), "{slow:?}");
    held.rollback().unwrap();
    assert_eq!(store.query(&aegis_usage::Scope::All, &scenarios::ports()).unwrap().rows.len(), 1);
}
