//! Reports on their way to the collector's own service and store, over HTTPS, while things go wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

#[path = "support/server.rs"]
mod server;
mod support;

use aegis_delivery::{Boot, Bounds, Counters, Delivery, Loss, Outcome, Reporter, Settings, Timing, Wait};
use server::{Certificate, NOW, PATIENCE, Service, Step};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{NODE, T0, rows};
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// An agent that reports; it ends at once when it is dropped.
struct Agent {
    reporter: Reporter,
    running: JoinHandle<()>,
    handed: u64,
}

impl Agent {
    /// The start with a number, with files in a folder: `token`, `ca.crt`, and the backlog.
    fn start(service: &Service, folder: &Path, start: u64) -> Agent {
        let settings = Settings {
            node: NODE.into(),
            collector: format!("https://{}", service.address).parse().unwrap(),
            token: folder.join("token"),
            authority: folder.join("ca.crt"),
            folder: folder.join("usage"),
            bounds: Bounds { disk: 64 << 20, memory: 1 << 20, age: 100_000 },
            timing: Timing {
                spread: Duration::ZERO,
                pause: Duration::from_millis(1),
                backoff: Duration::from_millis(10),
                longest: Duration::from_secs(2),
                reports: 8,
            },
            wait: Wait { connect: PATIENCE, whole: PATIENCE },
        };
        Agent::with(settings, start)
    }

    fn with(settings: Settings, start: u64) -> Agent {
        let (reporter, delivery) = Delivery::new(settings, Boot::new(start, 7), Arc::new(|| NOW));
        Agent { reporter, running: tokio::spawn(delivery.run()), handed: 0 }
    }

    /// Reports of the slots with these numbers, each kept before the next is handed in.
    async fn report(&mut self, slots: std::ops::Range<i64>) {
        for slot in slots {
            let before = self.counters();
            let known = |it: &Counters| it.waiting + it.delivered + it.losses().map(|it| it.1).sum::<u64>();
            self.reporter.report(rows(3), T0 + 10 * slot, T0 + 10 * slot + 10);
            self.handed += 1;
            self.until(|it| known(it) > known(&before)).await;
        }
    }

    fn counters(&self) -> Counters {
        self.reporter.counters()
    }

    /// Waits until the counters are so.
    async fn until(&self, so: impl Fn(&Counters) -> bool) {
        let begin = Instant::now();
        while !so(&self.counters()) {
            assert!(begin.elapsed() < PATIENCE, "not within {PATIENCE:?}: {:?}", self.counters());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits until each that was handed in has come to its end.
    async fn delivered(&self) {
        let ended = |it: &Counters| it.delivered + it.losses().map(|it| it.1).sum::<u64>();
        self.until(|it| it.waiting == 0 && ended(it) >= self.handed).await;
    }

    async fn end(self) {
        self.running.abort();
        let _ = self.running.await;
    }
}

fn attempts(counters: &Counters, of: Outcome) -> u64 {
    counters.outcomes().find(|(outcome, _)| *outcome == of).unwrap().1
}

fn lost(counters: &Counters) -> Vec<(Loss, u64)> {
    counters.losses().filter(|(_, lost)| *lost > 0).collect()
}

/// Each of these slots has one report.
fn once(slots: impl IntoIterator<Item = i64>) -> Vec<(i64, i64)> {
    slots.into_iter().map(|slot| (T0 + 10 * slot, 1)).collect()
}

fn ready() -> (Service, Certificate, TempDir) {
    let (service, folder) = (Service::new(), support::folder("agent"));
    let certificate = service.certificate("one");
    fs::copy(&certificate.chain, folder.path().join("ca.crt")).unwrap();
    fs::write(folder.path().join("token"), "token\n").unwrap();
    (service, certificate, folder)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_report_arrives_once_whatever_the_answers_are() {
    let (mut service, certificate, folder) = ready();
    service.start(&certificate);
    let mut agent = Agent::start(&service, folder.path(), 1);
    service.script.then([
        Step::Say(503, None),
        Step::Say(429, Some("1")),
        Step::Say(500, None),
        Step::Lose,
        Step::Say(404, None),
        Step::Say(200, None),
        Step::Say(403, None),
        Step::Lose,
    ]);
    agent.report(0..40).await;
    agent.delivered().await;
    let counters = agent.counters();
    assert_eq!((counters.delivered, lost(&counters)), (40, vec![]));
    assert_eq!((service.covered(), service.gaps()), (once(0..40), vec![]));
    assert_eq!(attempts(&counters, Outcome::Busy), 2);
    assert_eq!(attempts(&counters, Outcome::Strange), 5);
    assert_eq!(attempts(&counters, Outcome::Unauthorized), 1);
    assert_eq!(counters.last_success, Some(NOW));
    assert!(
        fs::read_dir(folder.path().join("usage")).unwrap().next().is_none(),
        "nothing is left on the disk"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_was_away_gets_what_two_starts_of_the_agent_have_kept() {
    let (mut service, certificate, folder) = ready();
    let mut agent = Agent::start(&service, folder.path(), 1);
    agent.report(0..30).await;
    agent.until(|it| attempts(it, Outcome::Unreachable) >= 3).await;
    let counters = agent.counters();
    assert_eq!((counters.waiting, counters.in_memory, counters.delivered), (30, 0, 0));
    assert_eq!(counters.oldest, Some(T0 + 10));
    agent.end().await;
    let mut agent = Agent::start(&service, folder.path(), 2);
    agent.until(|it| it.waiting == 30).await;
    agent.report(30..60).await;
    assert_eq!(agent.counters().waiting, 60);
    // It comes, goes in the midst of it, and comes again.
    service.start(&certificate);
    agent.until(|it| it.delivered > 0).await;
    service.stop().await;
    let before = attempts(&agent.counters(), Outcome::Unreachable);
    agent.report(60..65).await;
    agent.until(|it| it.waiting == 0 || attempts(it, Outcome::Unreachable) > before).await;
    service.start(&certificate);
    agent.delivered().await;
    assert_eq!((agent.counters().delivered, lost(&agent.counters())), (65, vec![]));
    assert_eq!((service.covered(), service.gaps()), (once(0..65), vec![]));
    // The newest first, and then from the oldest on.
    let first = service.script.came.lock().unwrap()[0].1.clone();
    assert_eq!(first, [29, 0], "numbers of the second start and of the first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_read_for_each_delivery() {
    let (mut service, certificate, folder) = ready();
    let token = folder.path().join("token");
    fs::remove_file(&token).unwrap();
    service.start(&certificate);
    service.script.believe(&["old"]);
    let mut agent = Agent::start(&service, folder.path(), 1);
    agent.report(0..1).await;
    agent.until(|it| attempts(it, Outcome::Unauthorized) >= 2).await;
    assert!(service.script.came.lock().unwrap().is_empty(), "nothing goes out without a token");
    fs::write(&token, "old\n").unwrap();
    agent.delivered().await;
    service.script.believe(&["new"]);
    let before = attempts(&agent.counters(), Outcome::Unauthorized);
    agent.report(1..3).await;
    agent.until(|it| attempts(it, Outcome::Unauthorized) >= before + 2).await;
    assert_eq!(agent.counters().waiting, 2, "they wait for a token that is believed");
    fs::write(&token, "new\n").unwrap();
    agent.delivered().await;
    assert_eq!((service.covered(), lost(&agent.counters())), (once(0..3), vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_who_has_the_authoritys_certificate_gets_anything() {
    let (mut service, certificate, folder) = ready();
    let authority = folder.path().join("ca.crt");
    service.start(&certificate);
    let mut agent = Agent::start(&service, folder.path(), 1);
    agent.report(0..1).await;
    agent.delivered().await;
    service.stop().await;
    let other = service.certificate("two");
    service.start(&other);
    let unreachable = async |agent: &Agent| {
        let before = attempts(&agent.counters(), Outcome::Unreachable);
        agent.until(|it| attempts(it, Outcome::Unreachable) >= before + 2).await;
    };
    agent.report(1..2).await;
    unreachable(&agent).await;
    // While it is replaced.
    for text in ["", "-----BEGIN CERTIFICATE-----\nnonsense\n"] {
        fs::write(&authority, text).unwrap();
        unreachable(&agent).await;
    }
    fs::remove_file(&authority).unwrap();
    unreachable(&agent).await;
    assert_eq!((service.covered(), agent.counters().waiting), (once(0..1), 1));
    fs::copy(&other.chain, &authority).unwrap();
    agent.delivered().await;
    assert_eq!((service.covered(), lost(&agent.counters())), (once(0..2), vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_not_understood_takes_no_other_with_it() {
    let (mut service, certificate, folder) = ready();
    *service.script.poison.lock().unwrap() = Some(7);
    let mut agent = Agent::start(&service, folder.path(), 1);
    agent.report(0..20).await;
    service.start(&certificate);
    agent.delivered().await;
    assert_eq!(lost(&agent.counters()), [(Loss::Invalid, 1)]);
    assert_eq!(service.covered(), once((0..20).filter(|slot| *slot != 7)));
    assert_eq!(service.gaps(), [(7, 7)], "the collector sees that it is missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_a_gap() {
    let (mut service, certificate, folder) = ready();
    service.start(&certificate);
    let mut agent = Agent::start(&service, folder.path(), 1);
    agent.report(0..1).await;
    // A clock that was set: back, and far ahead, of which the collector keeps what was used.
    agent.reporter.report(rows(1), T0 + 20, T0 + 10);
    agent.reporter.report(rows(1), NOW + 9_000, NOW + 9_010);
    agent.handed += 2;
    agent.report(3..4).await;
    agent.delivered().await;
    assert_eq!(lost(&agent.counters()), [(Loss::Invalid, 1)]);
    assert_eq!((service.covered(), service.gaps()), (once([0, 3, 359]), vec![(1, 1)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_does_not_come_again_before_it_is_told() {
    let (mut service, certificate, folder) = ready();
    service.start(&certificate);
    service.script.then([Step::Say(429, Some("1")), Step::Say(503, Some("1"))]);
    let mut agent = Agent::start(&service, folder.path(), 1);
    agent.report(0..1).await;
    agent.delivered().await;
    let came: Vec<Instant> = service.script.came.lock().unwrap().iter().map(|it| it.0).collect();
    assert_eq!(came.len(), 3);
    assert!(came.windows(2).all(|two| two[1] - two[0] >= Duration::from_secs(1)), "{came:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_collector_keeps_no_report_from_the_disk() {
    let (mut service, certificate, folder) = ready();
    service.start(&certificate);
    let go = Arc::new(Notify::new());
    service.script.then([Step::Wait(go.clone())]);
    let mut agent = Agent::start(&service, folder.path(), 1);
    agent.report(0..30).await;
    assert_eq!((agent.counters().waiting, agent.counters().delivered), (30, 0));
    assert_eq!(fs::read_dir(folder.path().join("usage")).unwrap().count(), 30);
    go.notify_one();
    agent.delivered().await;
    assert_eq!((service.covered(), lost(&agent.counters())), (once(0..30), vec![]));
    // They become larger by and by.
    let sizes: Vec<usize> = service.script.came.lock().unwrap().iter().map(|it| it.1.len()).collect();
    assert_eq!(sizes[..4], [1, 2, 4, 8]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_never_answers_is_asked_again() {
    let (mut service, certificate, folder) = ready();
    service.start(&certificate);
    service.script.then([Step::Hang]);
    let settings = Settings {
        node: NODE.into(),
        collector: format!("https://{}", service.address).parse().unwrap(),
        token: folder.path().join("token"),
        authority: folder.path().join("ca.crt"),
        folder: folder.path().join("usage"),
        bounds: Bounds { disk: 1 << 20, memory: 1 << 20, age: 100_000 },
        timing: Timing { spread: Duration::ZERO, ..Timing::default() },
        wait: Wait { connect: PATIENCE, whole: Duration::from_secs(3) },
    };
    let mut agent = Agent::with(settings, 1);
    agent.report(0..2).await;
    agent.delivered().await;
    assert!(attempts(&agent.counters(), Outcome::Unreachable) >= 1);
    assert_eq!((service.covered(), lost(&agent.counters())), (once(0..2), vec![]));
}

/// Nobody hands in anything any more, and all of it is delivered: the delivery ends.
#[tokio::test(flavor = "multi_thread")]
async fn it_ends_with_the_last_report() {
    let (mut service, certificate, folder) = ready();
    let mut agent = Agent::start(&service, folder.path(), 1);
    agent.report(0..5).await;
    let Agent { reporter, running, .. } = agent;
    drop(reporter);
    service.start(&certificate);
    running.await.unwrap();
    assert_eq!(service.covered(), once(0..5));
}
