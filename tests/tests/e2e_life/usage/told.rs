//! What is told of the load elsewhere than in GraphQL.

use aegis_cli::cluster::Pods;
use aegis_cli::top::{Use, top};
use aegis_tests::cluster::{Cluster, Origin, PATIENCE, wait_for};
use aegis_tests::lab::Lab;
use aegis_tests::lab::plan::NODES;
use anyhow::{Context, bail, ensure};
use clap::Parser;
use serde_json::Value;

use super::{CONNECTIONS, Counted, connections};
use crate::account::Account;
use crate::explained::reader;

/// What the agents' metrics say of an account's load, before any of them has begun anew.
pub async fn to_prometheus(cluster: &Cluster, account: &Account) -> anyhow::Result<()> {
    let all: usize = (0..2).map(|index| connections(index, NODES.len())).sum();
    let (address, namespace) = (account.address, account.namespace.name());
    let (address, namespace) = (format!("address=\"{address}\""), format!("namespace=\"{namespace}\""));
    wait_for("the agents' metrics", PATIENCE, async || {
        let metrics: Vec<_> = cluster.all_agent_metrics().await?.into_values().collect();
        let sum = |name: &str, labels: &[&str]| metrics.iter().map(|it| it.sum(name, labels)).sum::<f64>();
        let told = [
            sum("aegis_ports_in_use", &[&address]),
            sum("aegis_allocation_flows", &[&namespace]),
            sum("aegis_rule_flows_total", &[&namespace, "result=\"left\""]),
        ];
        Ok((told == [all as f64; 3]).then_some(()))
    })
    .await
}

/// What `kubectl aegis usage` says of the same, to whoever runs the cluster: by the collector's pod, whose port is forwarded.
pub async fn to_people(
    lab: &Lab,
    account: &str,
    since: i64,
    counted: &Counted<'_>,
    origin: &Origin,
) -> anyhow::Result<()> {
    let kubeconfig = lab.kubeconfig().display().to_string();
    let (from, to) = (jiff::Timestamp::from_second(since)?.to_string(), jiff::Timestamp::now().to_string());
    let line = [
        "kubectl-aegis",
        "--kubeconfig",
        &kubeconfig,
        "--namespace",
        account,
        "usage",
        "--by=origin",
        "--from",
        &from,
        "--to",
        &to,
        "--level=tens",
        "--output=json",
    ];
    let args = aegis_cli::args::Args::try_parse_from(line)?;
    let aegis_cli::args::Command::Usage(how) = args.command else { bail!("another command") };
    let told = aegis_cli::usage::run(&args.connection, &how).await?;
    let told: Value = serde_json::from_str(&told)?;
    let wire = counted.read()?;
    for index in 0..2 {
        let origin = origin.port(index).to_string();
        let row = told["rows"].as_array().into_iter().flatten().find(|row| row["group"]["origin"] == *origin);
        let figures = &row.with_context(|| format!("no {origin} in {told}"))?["figures"];
        let all = connections(index, NODES.len()) as f64;
        let (sent, received) = (wire[&format!("sent{index}")], wire[&format!("received{index}")]);
        for (name, happened) in [
            ("peak", all),
            ("flows", all),
            ("refused", 0.0),
            ("sentPackets", sent.0),
            ("sentBytes", sent.1),
            ("receivedPackets", received.0),
            ("receivedBytes", received.1),
        ] {
            ensure!(figures[name].as_f64() == Some(happened), "{origin}: {name} is {happened}: {figures}");
        }
    }
    Ok(())
}

/// Agents tell a fill anew when it is another one by so many percent.
const STEP: u32 = 5;

/// What `kubectl aegis top` says of the same: how full each node is towards the origin that it has most connections to.
pub async fn to_those_who_look(account: &Account) -> anyhow::Result<()> {
    let (reader, namespace) = (reader(account), account.namespace.name());
    let mut last = String::new();
    let told = wait_for("how full nodes are said to be", PATIENCE, async || {
        let state = reader.state(namespace, Pods::None).await?;
        let uses = top(&state, Some(namespace), None).uses;
        last = format!("{uses:?}");
        let mut nodes = NODES.iter().enumerate();
        let all = nodes.all(|(more, node)| {
            let told = uses.iter().find(|it| it.node == node.name());
            let in_use = (CONNECTIONS[0] + more) as u32;
            let fill = |it: &Use| in_use * 100 / (it.held * 256);
            told.is_some_and(|it| {
                it.held > 0 && it.fill_percent.is_some_and(|told| told.abs_diff(fill(it)) < STEP)
            })
        });
        Ok(all.then_some(()))
    });
    told.await.with_context(|| last.clone())
}
