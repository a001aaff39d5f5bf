//! The agents' side: reports wait while the collector is away, and each is counted once.

use crate::collector::{Collector, PATIENCE, eventually, said};
use crate::world::World;
use aegis_delivery::{Boot, Bounds, Counters, Delivery, Outcome, Reporter, Settings, Timing, Wait, now};
use aegis_usage_report::{Figures, Key, Row};
use http::StatusCode;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

/// An address that stays the same while collectors come and go, as that of a Service.
struct Door {
    address: SocketAddr,
    behind: Arc<Mutex<Option<SocketAddr>>>,
}

impl Door {
    async fn open() -> Door {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = listener.local_addr().expect("address");
        let behind: Arc<Mutex<Option<SocketAddr>>> = Arc::default();
        let to = behind.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let to = *to.lock().expect("lock");
                tokio::spawn(async move {
                    // Nobody behind it: the connection ends.
                    if let Some(to) = to
                        && let Ok(mut collector) = TcpStream::connect(to).await
                    {
                        let _ = copy_bidirectional(&mut stream, &mut collector).await;
                    }
                });
            }
        });
        Door { address, behind }
    }

    fn leads_to(&self, collector: Option<&Collector>) {
        let address = collector.map(|collector| {
            let line = said(&collector.log, "reports are taken").expect("log");
            line["address"].as_str().expect("address").parse().expect("an address")
        });
        *self.behind.lock().expect("lock") = address;
    }
}

/// What the agent hands in: one interval after the other, from half an hour ago on.
struct Agent {
    reporter: Reporter,
    begin: i64,
    handed: i64,
}

impl Agent {
    async fn report(&mut self, intervals: i64) {
        for _ in 0..intervals {
            let from = self.begin + 10 * self.handed;
            let key = Key { account: "x".into(), ..Key::default() };
            let figures = Figures { flows: 1, ..Figures::default() };
            self.reporter.report(vec![Row { key, figures }], from, from + 10);
            self.handed += 1;
            let all = self.handed as u64;
            self.until("it is kept", |it| it.waiting + it.delivered >= all).await;
        }
    }

    async fn until(&self, what: &str, so: impl Fn(&Counters) -> bool) {
        eventually(what, async || {
            let counters = self.reporter.counters();
            if so(&counters) { Ok(()) } else { Err(format!("{counters:?}")) }
        })
        .await;
    }

    fn unreachable(&self) -> u64 {
        let counters = self.reporter.counters();
        counters.outcomes().find(|(outcome, _)| *outcome == Outcome::Unreachable).expect("counted").1
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_report_is_counted_once_though_the_collector_comes_and_goes() {
    let world = World::start().await;
    let (folder, arguments) = world.certificate("delivery").await;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    std::fs::write(folder.join("token"), world.agent("n1").await).expect("write");
    let door = Door::open().await;
    let settings = Settings {
        node: "n1".into(),
        collector: format!("https://{}", door.address).parse().expect("address"),
        token: folder.join("token"),
        authority: folder.join("ca.crt"),
        folder: folder.join("usage"),
        bounds: Bounds { disk: 16 << 20, memory: 1 << 20, age: 3_600 },
        timing: Timing {
            spread: Duration::ZERO,
            pause: Duration::from_millis(20),
            backoff: Duration::from_millis(50),
            longest: Duration::from_secs(1),
            reports: 4,
        },
        wait: Wait { connect: PATIENCE, whole: PATIENCE },
    };
    let (reporter, delivery) = Delivery::new(settings, Boot::now(), Arc::new(now));
    let running = tokio::spawn(delivery.run());
    let mut agent = Agent { reporter, begin: now() / 10 * 10 - 1_800, handed: 0 };

    // Before there is any; then one, that is ended while reports come; one that is killed in the midst of a delivery; and one more.
    agent.report(5).await;
    let mut collector = Collector::start(&world, &arguments).await;
    let store = collector.folder.clone();
    for end in [Signal::SIGTERM, Signal::SIGKILL] {
        let before = agent.reporter.counters().delivered;
        door.leads_to(Some(&collector));
        agent.until("some are delivered", |it| it.delivered > before).await;
        agent.report(20).await;
        collector.process.signal(end);
        assert_eq!(collector.process.wait(), end == Signal::SIGTERM);
        door.leads_to(None);
        agent.report(20).await;
        let failures = agent.unreachable();
        agent.until("it is away", |_| agent.unreachable() > failures).await;
        // The kubelet replaces the token now and then.
        std::fs::write(folder.join("token"), world.agent("n1").await).expect("write");
        collector = Collector::start_in(&world, store.clone(), &arguments).await;
    }
    door.leads_to(Some(&collector));
    let all = agent.handed as u64;
    agent.until("all are delivered", |it| it.delivered == all && it.waiting == 0).await;
    let counters = agent.reporter.counters();
    assert!(counters.losses().all(|(_, lost)| lost == 0), "{counters:?}");
    running.abort();
    collector.process.signal(Signal::SIGTERM);
    assert!(collector.process.wait());

    // What the store says, asked in plain text.
    let collector = Collector::start_in(&world, store, &[]).await;
    let at = |second: i64| jiff::Timestamp::from_second(second).expect("time");
    let window = format!("from: \"{}\", to: \"{}\"", at(agent.begin), at(agent.begin + 10 * agent.handed));
    let question = format!(
        "{{ coverage(level: TENS, first: 1000, {window}) {{ node seconds samples }} gaps({window}) {{ first last }} \
         usage(level: TENS, {window}, by: [NODE], figures: [{{measure: FLOWS, aggregation: SUM}}]) {{ nodes {{ by figures }} }} }}"
    );
    let (status, answer) = collector.ask(&world.person("platform").await, &question).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let covered = answer["data"]["coverage"].as_array().unwrap_or_else(|| panic!("{answer}"));
    assert_eq!(covered.len() as u64, all, "{answer}");
    assert!(covered.iter().all(|slot| slot["samples"] == 1 && slot["seconds"] == 10), "{answer}");
    assert_eq!(answer["data"]["gaps"], Value::Array(Vec::new()));
    let node = &answer["data"]["usage"]["nodes"][0];
    assert_eq!((&node["by"][0], node["figures"][0].as_f64()), (&"n1".into(), Some(all as f64)), "{answer}");
}
