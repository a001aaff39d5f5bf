//! The store in PostgreSQL: a server of its own, which these tests need.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use proptest::test_runner::{Config, TestRunner};
use support::server::Server;
use support::{alerts, generate, model, scenarios};

/// One test, since it takes a server. What fails is named by its own message.
#[test]
fn postgresql_does_what_sqlite_does() {
    let mut server = Server::start();
    a_server_that_is_started_anew_is_used_again(&mut server);
    a_server_that_hangs_holds_nobody_for_long(&server);
    let store = || server.store();
    scenarios::a_report_counts_once(&store);
    scenarios::a_late_report_is_right_in_every_level(&store);
    scenarios::it_is_said_up_to_when_a_level_is_made(&store);
    scenarios::what_is_missing_is_seen(&store);
    scenarios::what_is_old_is_forgotten_level_by_level(&store);
    scenarios::a_clock_that_jumps_empties_nothing(&store);
    scenarios::a_long_interval_is_of_its_end(&store);
    scenarios::who_reports_too_often_is_not_heard(&store);
    scenarios::one_wrong_report_does_not_keep_others_out(&store);
    scenarios::pods_of_others_are_not_seen(&store);
    scenarios::words_of_users_are_values(&store);
    alerts::raised_and_cleared_at_the_right_second(&store);
    alerts::one_ipv6_address_has_ports_and_a_64_has_none(&store);
    alerts::what_nobody_reports_clears_nothing(&store);
    alerts::a_late_report_counts_while_it_is_waited_for(&store);
    alerts::a_clock_that_jumps_tells_nothing(&store);
    alerts::a_site_without_holders_is_told(&store);
    alerts::refusals_are_counted_within_a_window(&store);
    alerts::what_is_not_wanted_any_more_is_cleared(&store);
    alerts::a_bounded_number_of_items_is_kept_and_each_is_told_once(&store);
    alerts::accounts_are_told_in_turn(&store);
    alerts::feeds_have_tokens(&store);
    let url = server.database();
    let open = || aegis_usage::Store::postgres(&url, support::PATIENCE).unwrap();
    scenarios::figures_are_there_after_a_restart(&open);
    scenarios::a_new_owner_is_one_from_now_on(&open);
    one_collector_writes(&server);
    what_comes_while_minutes_are_made_is_in_them(&server);
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

/// A report that is being stored when its minute is made anew: whoever makes it waits for the report.
fn what_comes_while_minutes_are_made_is_in_them(server: &Server) {
    let url = server.database();
    let store = aegis_usage::Store::postgres(&url, support::PATIENCE).unwrap();
    let retention = aegis_usage::Retention::default();
    scenarios::fill(&store, 1);
    let mut other = postgres::Client::connect(&url, postgres::NoTls).unwrap();
    let mut look = postgres::Client::connect(&url, postgres::NoTls).unwrap();
    let mut waiting = |count: i64| {
        let text = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        look.query_one(text, &[]).unwrap().get::<_, i64>(0) >= count
    };
    // The last that a delivery does is to say what is newest.
    let mut held = other.transaction().unwrap();
    held.batch_execute("SELECT * FROM meta WHERE name = 'newest' FOR UPDATE").unwrap();
    std::thread::scope(|scope| {
        let more = support::report("node-a", 1, vec![(support::key("shop", 1), support::figures(300, 7))]);
        let stored = scope.spawn(|| store.ingest(&[more], support::T0 + 20).unwrap());
        while !waiting(1) {
            assert!(!stored.is_finished(), "it says what is newest");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let made = scope.spawn(|| store.maintain(support::T0 + 90, &retention).unwrap());
        while !waiting(2) && !made.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        held.rollback().unwrap();
    });
    store.maintain(support::T0 + 90, &retention).unwrap();
    let minutes = aegis_usage::Query { level: Some(aegis_usage::Level::Minutes), ..scenarios::ports() };
    let rows = store.query(&aegis_usage::Scope::All, &minutes).unwrap().rows;
    assert_eq!(rows[0].figures, [200.0, 302.0, 12.0]);
}

fn a_server_that_is_started_anew_is_used_again(server: &mut Server) {
    let url = server.database();
    let store = aegis_usage::Store::postgres(&url, support::PATIENCE).unwrap();
    scenarios::fill(&store, 6);
    let retention = aegis_usage::Retention::default();
    store.maintain(support::T0 + 90, &retention).unwrap();
    let newest = || store.contents().map(|it| it.newest);
    // Several connections that read, which all end with the server.
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..4).map(|_| scope.spawn(newest)).collect();
        asked.into_iter().for_each(|it| assert_eq!(it.join().unwrap().unwrap(), Some(support::T0 + 60)));
    });
    server.restart();
    // What was asked by a connection that ended fails once, and comes again.
    let report = support::report("node-a", 6, vec![(support::key("shop", 1), support::figures(100, 5))]);
    let again = |what: &str, done: &dyn Fn() -> bool| assert!(done() || done(), "{what}");
    again("a report is taken", &|| store.ingest(std::slice::from_ref(&report), support::T0 + 70).is_ok());
    again("a question is answered", &|| newest().is_ok_and(|it| it == Some(support::T0 + 70)));
    again("minutes are made", &|| store.maintain(support::T0 + 150, &retention).is_ok());
    let minutes = aegis_usage::Query { level: Some(aegis_usage::Level::Minutes), ..scenarios::ports() };
    let rows = store.query(&aegis_usage::Scope::All, &minutes).unwrap().rows;
    assert_eq!(rows[0].figures[2], 35.0);
}

/// Its processes stop where they are; its machine goes on, so that TCP notices nothing.
fn a_server_that_hangs_holds_nobody_for_long(server: &Server) {
    let url = server.database();
    let patience = std::time::Duration::from_secs(1);
    let store = aegis_usage::Store::postgres(&url, patience).unwrap();
    scenarios::fill(&store, 1);
    store.contents().unwrap();
    let report = |number| support::report("node-a", number, vec![]);
    server.frozen(|| {
        let begin = std::time::Instant::now();
        // By connections that are there, and by new ones.
        for number in [1, 2] {
            let stored = store.ingest(&[report(number)], support::T0 + 60);
            assert!(matches!(stored, Err(aegis_usage::Error::Silent(_))), "{stored:?}");
        }
        let asked = store.contents();
        assert!(matches!(asked, Err(aegis_usage::Error::Silent(_))), "{asked:?}");
        assert!(begin.elapsed() < std::time::Duration::from_secs(60), "{:?}", begin.elapsed());
    });
    // It goes on, and so does the store.
    let receipts = (0..100).find_map(|_| store.ingest(&[report(1)], support::T0 + 60).ok());
    assert!(receipts.is_some());
    assert_eq!(store.contents().unwrap().newest, Some(support::T0 + 20));
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
