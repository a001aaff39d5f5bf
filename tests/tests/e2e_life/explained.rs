//! What `kubectl aegis trace` says of a pod is what the origin sees.

use std::net::{IpAddr, SocketAddrV4};

use aegis_cli::cluster::{Cluster as Reader, Pods};
use aegis_cli::trace::{Destination, Outcome, Protocol, Subject, traces};
use aegis_tests::apiserver::NAMESPACE;
use aegis_tests::cluster::{PATIENCE, wait_for};
use anyhow::{Context, ensure};

use crate::account::Account;
use crate::inside::Inside;

/// Connections that are live while somebody asks for them.
const LIVE: usize = 5;

/// Asks where the packets of a pod ([`Account::pod_on`]) leave, and compares with what the origin sees; and how many flows are live.
pub async fn names_what_the_origin_sees(
    account: &Account,
    name: &str,
    pod: &Inside,
    to: SocketAddrV4,
) -> anyhow::Result<()> {
    let namespace = account.namespace.name();
    let client = account.namespace.cluster().client();
    let reader = Reader { client, namespace: namespace.to_owned(), system: NAMESPACE.to_owned() };
    let state = reader.state(namespace, Pods::Of(namespace)).await?;
    let subject = Subject::parse(&format!("{name}-{}", pod.node()), namespace)?;
    let destination = Destination::parse(&to.to_string())?;
    let told = traces(&state, &subject, &destination.find(&state, namespace, Protocol::Tcp)?)?;
    let trace = told.traces.first().context("no answer")?;
    ensure!(trace.outcome == Outcome::Egress, "{}", trace.message);
    ensure!(trace.node.as_deref() == Some(pod.node()), "{:?}", trace.node);
    let egress = trace.egress.as_ref().context("no allocation")?;
    let seen = pod.source(to).await?.map_err(anyhow::Error::msg)?;
    let said: Vec<&str> = egress.way.addresses.iter().map(|it| it.address.as_str()).collect();
    ensure!(said == [seen.to_string()], "{said:?} is said, and {seen} seen");

    let (pods, _) = subject.pods(&state)?;
    let (asked, _) = pods.first().context("no pod")?;
    pod.open("asked", to, LIVE).await?;
    wait_for("the agent to tell the live flows", PATIENCE, async || {
        let live = reader.flows(&state, asked, pod.node(), IpAddr::V4(*to.ip()), Some(to.port())).await?;
        let from_there = live.flows.iter().all(|flow| flow.egress == Some(seen));
        ensure!(from_there, "{live:?}");
        Ok((live.total >= LIVE).then_some(()))
    })
    .await
}
