//! A binding that comes and goes again and again under load: how soon the first packet has the dedicated address, and
//! that no connection that begins right then is left hanging.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::NODES;
use kube::api::DeleteParams;

use crate::account::{Account, ZONE};

const ROUNDS: usize = 50;

/// `cargo test -p aegis-tests --test e2e_life latency -- --nocapture` prints the figures.
#[tokio::test]
async fn a_binding_that_comes_and_goes_leaves_no_connection_hanging() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "latency", 16).await?;
    let origin = cluster.origin(0)?;
    let pods = account.pods_on_all_nodes("busy").await?;
    let mut capture = lab.capture(&[ZONE])?;
    for pod in &pods {
        let churn = serde_json::json!({"do": "churn", "name": "new", "to": origin.port(0), "pause_ms": 2});
        pod.call(churn).await?;
    }
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        capture.reset()?;
        let begin = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
        account.bind().await?;
        let times = wait_for("every node", PATIENCE, async || {
            let report = capture.report()?;
            let dedicated = report.sources.iter().filter(|source| source.address == account.address);
            let seen: Vec<_> = dedicated.map(|source| (source.device.clone(), source.first_ms)).collect();
            let nodes: BTreeSet<_> = seen.iter().map(|(device, _)| device.clone()).collect();
            let times: Vec<u64> = seen.into_iter().map(|(_, time)| time.saturating_sub(begin)).collect();
            Ok((nodes.len() == NODES.len()).then_some(times))
        })
        .await?;
        first.extend(times.iter().min().copied());
        last.extend(times.iter().max().copied());
        account.bindings().delete("partners", &DeleteParams::default()).await?;
        for pod in &pods {
            wait_for("the node's address", PATIENCE, async || {
                Ok((pod.source(origin.port(1)).await? == Ok(pod.host())).then_some(()))
            })
            .await?;
        }
        // Connections that began just before the deletion end.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    for pod in &pods {
        let end = pod.call(serde_json::json!({"do": "stop", "name": "new"})).await?;
        println!("{}: {end}", pod.pod.name());
        // What is just under way when the binding goes may be refused, at once.
        let hanging =
            end["failed"].as_object().is_none_or(|failed| failed.keys().any(|kind| kind != "refused"));
        assert!(!hanging, "{}: {end}", pod.pod.name());
    }
    for (name, times) in [("the first node", &mut first), ("every node", &mut last)] {
        times.sort_unstable();
        let quantile = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1];
        println!(
            "first dedicated packet on {name}: p50 {} ms, p99 {} ms of {ROUNDS}",
            quantile(50),
            quantile(99)
        );
    }
    account.end().await
}
