//! Agents and operators that die.

use std::time::{Duration, Instant};

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::NODES;
use anyhow::ensure;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;

use crate::account::{Account, BOUND, ZONE, only};
use crate::agents;

/// Live flows of the node whose agent dies.
const LIVE: usize = 1000;
/// How often it dies.
const DEATHS: usize = 20;
/// How long a pod is watched that must not get out.
const HELD: Duration = Duration::from_secs(6);

#[tokio::test]
async fn an_agent_killed_twenty_times_breaks_no_flow() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "kill", 16).await?;
    account.bind_and_wait().await?;
    let origin = cluster.origin(0)?;
    let pod = account.pod_on("live", "n1", true).await?;
    let mut capture = lab.capture(&[ZONE])?;
    pod.open("held", origin.port(0), LIVE).await?;
    pod.churn("new", origin.port(1)).await?;
    for _ in 0..DEATHS {
        let killed = lab.kill_agent(NODES[0])?;
        pod.exchange("held", LIVE).await?;
        assert_eq!(pod.source(origin.port(2)).await?, Ok(account.address), "a new connection of a known pod");
        agents::back(&cluster, lab, NODES[0], &[killed]).await?;
    }
    pod.exchange("held", LIVE).await?;
    println!("{} new connections while the agent died {DEATHS} times", pod.unbroken_churn("new").await?);
    only(&mut capture, account.address)?;
    account.end().await
}

#[tokio::test]
async fn a_pod_that_starts_without_an_agent_is_held_until_it_is_back() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    // Ports of closed connections are swept by the agent: there must be enough for as long as it is away.
    let account = Account::new(&cluster, "held", 32).await?;
    account.bind_and_wait().await?;
    let origin = cluster.origin(0)?;
    let known = account.pod_on("known", "n1", true).await?;
    known.open("held", origin.port(0), 100).await?;
    known.churn("new", origin.port(1)).await?;
    let away = async {
        agents::forbid(&cluster, lab, NODES[0]).await?;
        origin.reset().await?;
        let mut capture = lab.capture(&[ZONE])?;
        let (to, port) = (origin.address().to_string(), origin.port(5).port().to_string());
        let command = ["whoami", &to, &port];
        let start = account.namespace.pod("unknown").on("n1").label(BOUND.0, BOUND.1).run(&command);
        let held = async {
            let pods: Api<Pod> = account.namespace.api();
            wait_for("the new pod to run", PATIENCE, async || {
                let phase = pods.get_opt("unknown").await?.and_then(|pod| pod.status?.phase);
                Ok(phase.filter(|phase| phase != "Pending"))
            })
            .await?;
            tokio::time::sleep(HELD).await;
            known.exchange("held", 100).await?;
            let came = origin.call(serde_json::json!({"do": "records"})).await?;
            let arrived =
                came["tcp"].as_array().into_iter().flatten().any(|it| it["port"] == origin.port(5).port());
            ensure!(!arrived, "a pod that nobody had named got out");
            only(&mut capture, account.address)?;
            agents::allow(&cluster, lab, NODES[0]).await
        };
        let ((succeeded, output), ()) = futures::future::try_join(start, held).await?;
        ensure!(succeeded && output.starts_with(&format!("{}:", account.address)), "{output}");
        only(&mut capture, account.address)
    };
    let result = away.await;
    agents::allow(&cluster, lab, NODES[0]).await?;
    result?;
    known.unbroken_churn("new").await?;
    known.exchange("held", 100).await?;
    account.end().await
}

#[tokio::test]
async fn killed_operators_break_nothing_and_changes_are_applied_after() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "operator", 4).await?;
    account.bind_and_wait().await?;
    let origin = cluster.origin(0)?;
    let pods = account.pods_on_all_nodes("live").await?;
    let mut capture = lab.capture(&[ZONE])?;
    for pod in &pods {
        pod.open("held", origin.port(0), 100).await?;
        pod.churn("new", origin.port(1)).await?;
    }
    let operators = lab.operator_nodes()?;
    assert!(operators.len() >= 2, "{operators:?}");
    for node in operators {
        lab.kill_operator(node)?;
        let begin = Instant::now();
        Account::new(&cluster, "after", 1).await?;
        println!(
            "operator on {} killed: a new allocation was ready after {:?}",
            node.name(),
            begin.elapsed()
        );
        for pod in &pods {
            pod.exchange("held", 100).await?;
        }
    }
    for pod in &pods {
        pod.unbroken_churn("new").await?;
    }
    only(&mut capture, account.address)?;
    account.end().await
}
