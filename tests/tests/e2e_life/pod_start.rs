//! Pods that start: the container runtime waits for the data plane to know them, and what is still unknown is held.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use aegis_crds::{EgressNode, type_};
use aegis_tests::cluster::{Cluster, Metrics, PATIENCE, Pod, wait_for};
use aegis_tests::lab::plan::NODES;
use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Pod as PodObject;
use kube::api::{Api, ListParams};

use crate::account::{Account, BOUND, ZONE, only};
use crate::agents;
use crate::policies::Policies;

/// Pods that start at once unless `AEGIS_BURST` says otherwise. Two hundred take minutes where three nodes share two CPUs.
const BURST: usize = 18;
/// Time for each of them.
const EACH: Duration = Duration::from_secs(4);

/// Waits until so many pods of the account have ended, all of them well. Asked for together: one by one, hundreds would keep the API
/// server busy.
async fn ended(account: &Account, count: usize) -> anyhow::Result<()> {
    let pods: Api<PodObject> = account.namespace.api();
    let patience = PATIENCE + EACH * u32::try_from(count)?;
    wait_for(&format!("the end of {count} pods"), patience, async || {
        let listed = pods.list(&ListParams::default()).await?.items.into_iter();
        let phases: Vec<String> =
            listed.filter_map(|pod| pod.status.and_then(|status| status.phase)).collect();
        ensure!(!phases.iter().any(|phase| phase == "Failed"), "a pod has failed: {phases:?}");
        let ended = phases.iter().filter(|phase| *phase == "Succeeded").count();
        tokio::time::sleep(Duration::from_millis(200)).await;
        Ok((ended == count).then_some(()))
    })
    .await
}

/// Pods that connect with their first instruction, on all nodes by turns, bound or not: how long each took for it, in milliseconds.
async fn starts(account: &Account, name: &str, count: usize, bound: bool) -> anyhow::Result<Vec<f64>> {
    let origin = account.namespace.cluster().origin(0)?;
    let (to, port) = (origin.address().to_string(), origin.port(0).port().to_string());
    let before = account.namespace.api::<PodObject>().list(&ListParams::default()).await?.items.len();
    let command = ["whoami", "--time", &to, &port];
    let pods = (0..count).map(|index| {
        let node = NODES[index % NODES.len()].name();
        let pod = account.namespace.pod(&format!("{name}-{index}")).on(&node);
        if bound { pod.label(BOUND.0, BOUND.1) } else { pod }
    });
    let pods: Vec<Pod> = futures::future::try_join_all(pods.map(|pod| pod.begin(&command))).await?;
    ended(account, before + count).await?;
    let mut times = Vec::new();
    for pod in pods {
        // A kubelet with much to do has a pod's end before what it printed.
        let printed = wait_for("what a pod has printed", PATIENCE, async || {
            Ok(Some(pod.output().await?).filter(|output| !output.is_empty()))
        });
        let output = printed.await?;
        let dedicated = output.starts_with(&format!("{}:", account.address));
        ensure!(dedicated == bound, "{}: {output}", pod.name());
        let time = output.lines().find_map(|line| line.strip_prefix("connected in ")?.strip_suffix(" ms"));
        times.push(time.context("no time")?.parse()?);
    }
    Ok(times)
}

fn quantiles(mut times: Vec<f64>) -> String {
    times.sort_by(f64::total_cmp);
    let quantile = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1];
    format!("p50 {:.1} ms, p99 {:.1} ms of {}", quantile(50), quantile(99), times.len())
}

/// How often the runtime waited for the data plane before a pod's containers started, by outcome, and for how long.
fn waits(before: &[Metrics], after: &[Metrics]) -> String {
    let grown = |name: &str, labels: &[&str]| -> f64 {
        let sum = |all: &[Metrics]| all.iter().map(|it| it.sum(name, labels)).sum::<f64>();
        sum(after) - sum(before)
    };
    let run = "event=\"run\"";
    let count =
        |outcome: &str| grown("aegis_runtime_hook_seconds_count", &[run, &format!("outcome=\"{outcome}\"")]);
    let all = grown("aegis_runtime_hook_seconds_count", &[run]);
    let mut buckets = BTreeMap::<u64, f64>::new();
    for (all, sign) in [(before, -1.0), (after, 1.0)] {
        for (bound, count) in all.iter().flat_map(|it| it.buckets("aegis_runtime_hook_seconds", &[run])) {
            *buckets.entry(bound).or_default() += sign * count;
        }
    }
    let at_most = |share: f64| {
        let found = buckets.iter().find(|(_, count)| **count >= share * all);
        found.map_or_else(
            || "unknown".to_owned(),
            |(bound, _)| format!("at most {:.1} ms", *bound as f64 / 1e3),
        )
    };
    let mean = grown("aegis_runtime_hook_seconds_sum", &[run]) / all * 1e3;
    format!(
        "the runtime waited: {} in force, {} late, {} unable; mean {mean:.1} ms, p50 {}, p99 {}",
        count("in_force"),
        count("late"),
        count("unable"),
        at_most(0.5),
        at_most(0.99)
    )
}

async fn metrics(cluster: &Cluster) -> anyhow::Result<Vec<Metrics>> {
    Ok(cluster.all_agent_metrics().await?.into_values().collect())
}

/// Waits until every node says whether its runtime waits.
async fn waits_on_every_node(cluster: &Cluster, status: &str) -> anyhow::Result<()> {
    let nodes: Api<EgressNode> = Api::all(cluster.client());
    wait_for(&format!("PodsWait {status} on every node"), PATIENCE, async || {
        for node in NODES {
            let conditions = nodes.get_status(&node.name()).await?.status.unwrap_or_default().conditions;
            if !conditions.iter().any(|it| it.type_ == type_::PODS_WAIT && it.status == status) {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })
    .await
}

/// `AEGIS_BURST=200 cargo test -p aegis-tests --test e2e_life pods_that_start_at_once -- --nocapture` prints the figures.
#[tokio::test]
async fn pods_that_start_at_once_under_a_policy_leave_from_its_address_alone() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let count = std::env::var("AEGIS_BURST").map_or(Ok(BURST), |count| count.parse())?;
    let account = Account::new(&cluster, "burst", 4).await?;
    let zone = format!("cidrs: [{}]", account.zone);
    Policies::of(&account).enforce("burst", 10, &zone, "egress: {primary: partners}").await?;
    waits_on_every_node(&cluster, "True").await?;
    let mut capture = lab.capture(&[ZONE])?;
    let (before, begin) = (metrics(&cluster).await?, Instant::now());
    let times = starts(&account, "burst", count, true).await?;
    let took = begin.elapsed().as_secs_f64();
    let after = metrics(&cluster).await?;
    println!("burst: {count} pods in {took:.1} s; first connection {}", quantiles(times));
    println!("burst: {}", waits(&before, &after));
    let hooked = |all: &[Metrics]| -> f64 {
        all.iter().map(|it| it.sum("aegis_runtime_hook_seconds_count", &["event=\"run\""])).sum()
    };
    // Not for all where the machine is so busy that an agent answers too late: these are held.
    ensure!(hooked(&after) > hooked(&before), "the runtime has not waited");
    let report = only(&mut capture, account.address)?;
    ensure!(report.tcp_starts as usize == count, "{report:?}");
    account.end().await
}

/// `AEGIS_POD_STARTS=10 cargo test -p aegis-tests --test e2e_life what_the_wait_costs -- --nocapture` prints the figures.
#[tokio::test]
async fn what_the_wait_costs() -> anyhow::Result<()> {
    let Ok(alone) = std::env::var("AEGIS_POD_STARTS") else { return Ok(()) };
    let alone: usize = alone.parse()?;
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    for nri in [false, true] {
        lab.upgrade(&format!("agent.nri.enabled={nri}"))?;
        let account = Account::new(&cluster, "costs", 4).await?;
        account.bind_and_wait().await?;
        for bound in [false, true] {
            for (name, rounds, count) in [("alone", alone, 1), ("twenty", 1, 20)] {
                let (before, begin) = (metrics(&cluster).await?, Instant::now());
                let mut times = Vec::new();
                for round in 0..rounds {
                    times.extend(starts(&account, &format!("{name}-{bound}-{round}"), count, bound).await?);
                }
                let took = begin.elapsed().as_secs_f64() / rounds as f64;
                println!(
                    "nri {nri}, bound {bound}, {name}: {took:.1} s until the end of all; first connection {}",
                    quantiles(times)
                );
                if nri {
                    println!("    {}", waits(&before, &metrics(&cluster).await?));
                }
            }
        }
        account.end().await?;
    }
    Ok(())
}

/// An agent that hangs costs a pod what the runtime waits, and then nothing; its pods are held all the same.
#[tokio::test]
async fn pods_start_though_the_agent_hangs_and_are_held() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "hangs", 4).await?;
    account.bind_and_wait().await?;
    waits_on_every_node(&cluster, "True").await?;
    let mut capture = lab.capture(&[ZONE])?;
    let agent = agents::process(lab, NODES[0])?.context("no agent")?;
    let signal = |signal: &str| {
        let done = std::process::Command::new("kill").args([signal, &agent.to_string()]).status()?;
        ensure!(done.success(), "kill {signal} {agent}");
        anyhow::Ok(())
    };
    signal("-STOP")?;
    let origin = cluster.origin(0)?;
    let (to, port) = (origin.address().to_string(), origin.port(0).port().to_string());
    let pod = account.namespace.pod("held").on(&NODES[0].name()).label(BOUND.0, BOUND.1);
    let held = async {
        let pod = pod.begin(&["whoami", "--time", &to, &port]).await?;
        let api: Api<PodObject> = account.namespace.api();
        wait_for("the pod to run", Duration::from_secs(30), async || {
            let phase = api.get("held").await?.status.and_then(|status| status.phase);
            Ok((phase.as_deref() == Some("Running")).then_some(()))
        })
        .await?;
        anyhow::Ok(pod)
    }
    .await;
    let silent = capture.report().map(|report| report.sources.is_empty());
    signal("-CONT")?;
    let pod = held?;
    ensure!(silent?, "a pod that nobody knows has sent something out");
    ended(&account, 1).await?;
    let output = pod.output().await?;
    ensure!(output.starts_with(&format!("{}:", account.address)), "{output}");
    only(&mut capture, account.address)?;
    // The runtime has closed the connection, and there is another.
    waits_on_every_node(&cluster, "True").await?;
    wait_for("the hook of the agent that hung", PATIENCE, async || {
        let metrics = cluster.agent_metrics(&NODES[0].name()).await?;
        Ok((metrics.sum("aegis_runtime_hook", &[]) == 1.0).then_some(()))
    })
    .await?;
    account.end().await
}

/// A Service with an endpoint that nobody but this test has written. Gives the Service's address.
async fn service(
    account: &Account,
    name: &str,
    selector: &str,
    endpoint: std::net::SocketAddrV4,
) -> anyhow::Result<std::net::SocketAddrV4> {
    let port = endpoint.port();
    let manifest = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{{selector}ports: [{{name: it, port: 443, targetPort: {port}}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\n\
         ports: [{{name: it, port: {port}, protocol: TCP}}]\nendpoints: [{{addresses: [{}]}}]\n",
        endpoint.ip()
    );
    let applied = account.namespace.apply(&manifest).await?;
    let address = applied[0].data["spec"]["clusterIP"].as_str().context("no address")?.parse()?;
    Ok(std::net::SocketAddrV4::new(address, 443))
}

#[tokio::test]
async fn what_goes_by_a_service_counts_as_sent_to_its_endpoint() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "service", 4).await?;
    account.bind_and_wait().await?;
    let pod = account.pod_on("client", &NODES[0].name(), true).await?;
    let other = account.pod_on("other", &NODES[0].name(), false).await?;
    let covered = service(&account, "partner", "", cluster.origin(0)?.port(0)).await?;
    let uncovered = service(&account, "elsewhere", "", cluster.origin(1)?.port(0)).await?;
    // It has no pods: all that the proxy knows of is the endpoint that is written beside them.
    let selects = "selector: {app: nobody}, ";
    let beside = service(&account, "beside", selects, cluster.origin(0)?.port(0)).await?;
    // Whether nothing leaked before is not asked: until the agent knows of the Service, it goes as what is inside the cluster.
    wait_for("the Service's traffic to be covered", PATIENCE, async || {
        let sources = [pod.source(covered).await?, pod.source(beside).await?];
        Ok((sources == [Ok(account.address), Ok(account.address)]).then_some(()))
    })
    .await?;
    let mut capture = lab.capture(&[ZONE])?;
    pod.open("by the service", covered, 50).await?;
    pod.exchange("by the service", 50).await?;
    only(&mut capture, account.address)?;
    ensure!(pod.source(uncovered).await? == Ok(pod.host()), "the other Service's endpoint is not covered");
    ensure!(other.source(covered).await? == Ok(other.host()), "nor is another pod");
    // The endpoint moves out of what is covered.
    account
        .namespace
        .apply(&format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: partner-1, labels: {{kubernetes.io/service-name: partner}}}}\naddressType: IPv4\n\
         ports: [{{name: it, port: {}, protocol: TCP}}]\nendpoints: [{{addresses: [{}]}}]\n",
            cluster.origin(1)?.port(0).port(),
            cluster.origin(1)?.address()
        ))
        .await?;
    wait_for("the Service's traffic to pass", PATIENCE, async || {
        Ok((pod.source(covered).await? == Ok(pod.host())).then_some(()))
    })
    .await?;
    ensure!(pod.source(beside).await? == Ok(account.address), "a Service that selects pods");
    account.end().await
}
