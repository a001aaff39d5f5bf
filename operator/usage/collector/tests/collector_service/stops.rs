//! What remains when the API server or the collector stops.

use crate::collector::{Collector, eventually, program, report};
use crate::world::World;
use http::StatusCode;
use nix::sys::signal::Signal;
use serde_json::json;
use std::process::Command;
use std::sync::Arc;

#[tokio::test(flavor = "multi_thread")]
async fn while_the_api_server_is_away_strangers_wait_and_afterwards_all_is_well() {
    let world = World::start().await;
    let collector = Collector::start(&world, &[]).await;
    let (known, fresh) = (world.agent("n1").await, world.agent("n1").await);
    let (x, new) = (world.person("x").await, world.person("x").await);
    assert_eq!(collector.deliver(&known, &[report("n1", 1, &["x"])]).await.0, StatusCode::OK);
    assert_eq!(collector.sees(&x, "").await.len(), 1);
    world.api.suspend();
    // Who has just been here still is who they were.
    assert_eq!(collector.deliver(&known, &[report("n1", 2, &["x"])]).await.0, StatusCode::OK);
    let (status, said) = collector.deliver(&fresh, &[report("n1", 3, &["x"])]).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(said.contains("cannot be checked at the moment"), "{said}");
    let (status, said) = collector.ask(&new, "{ __typename }").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{said}");
    assert!(collector.metric("aegis_collector_reviews_total{kind=\"token\",result=\"failed\"}").await >= 2.0);
    assert!(collector.probe("/readyz").await.is_ok(), "it goes on");
    world.api.resume().expect("resume");
    eventually("they are known again", async || {
        match collector.deliver(&fresh, &[report("n1", 3, &["x"])]).await {
            (StatusCode::OK, _) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(collector.sees(&new, "").await, [("x".to_owned(), "x-pod".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_is_there_after_a_kill_and_after_an_end() {
    let world = World::start().await;
    let mut collector = Arc::new(Collector::start(&world, &[]).await);
    let agent = world.agent("n1").await;
    // Both ends, in the midst of deliveries.
    for (round, killed) in [(1, true), (2, false)] {
        let begin = round * 1_000;
        let reports: Vec<_> = (begin..begin + 200).map(|number| report("n1", number, &["x"])).collect();
        let mut tasks = Vec::new();
        for report in reports.clone() {
            let (collector, agent) = (collector.clone(), agent.clone());
            tasks.push(tokio::spawn(async move {
                let answer = collector.try_post("/v1/reports", &agent, json!([report])).await;
                answer.is_ok_and(|(status, told)| status == StatusCode::OK && told.contains("stored"))
            }));
        }
        eventually("some are stored", async || {
            let stored = collector.metric("aegis_collector_reports_total{outcome=\"stored\"}").await;
            if stored >= 5.0 { Ok(()) } else { Err(stored.to_string()) }
        })
        .await;
        collector.process.signal(if killed { Signal::SIGKILL } else { Signal::SIGTERM });
        let mut taken = Vec::new();
        for (task, report) in tasks.into_iter().zip(reports) {
            if task.await.expect("task") {
                taken.push(report);
            }
        }
        let Some(ended) = Arc::get_mut(&mut collector) else { panic!("nobody else has it") };
        assert_eq!(ended.process.wait(), !killed, "an end that was asked for is a good one");
        assert!(!taken.is_empty());
        let folder = collector.folder.clone();
        collector = Arc::new(Collector::start_in(&world, folder, &[]).await);
        let mut repeated = 0;
        for part in taken.chunks(50) {
            let (status, told) = collector.deliver(&agent, part).await;
            assert_eq!(status, StatusCode::OK, "{told}");
            repeated += told.matches("repeated").count();
        }
        assert_eq!(repeated, taken.len(), "each that was acknowledged is there");
    }
    let seen = collector.sees(&world.person("x").await, "").await;
    assert_eq!(seen, [("x".to_owned(), "x-pod".to_owned())]);

    // Nobody else gets at the store meanwhile.
    let kubeconfig = world.api.kubeconfig();
    let mut second = Command::new(program());
    second.env("KUBECONFIG", kubeconfig).env("AEGIS_DATABASE", collector.folder.join("use.db"));
    let output = second.args(["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"]).output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("another collector has"), "{text}");
}
