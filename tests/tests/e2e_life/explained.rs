//! What `kubectl aegis` says of a pod is what the origin sees: `trace`, `flows` and `drops`.

use std::net::{IpAddr, SocketAddrV4};
use std::time::Duration;

use aegis_cli::cluster::{Agent, Cluster as Reader, Pods, Which};
use aegis_cli::drops::drops;
use aegis_cli::flows::flows;
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
    let reader = reader(account);
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
        let from_there = live.flows.iter().all(|flow| flow.egress == Some(seen.into()));
        ensure!(from_there, "{live:?}");
        Ok((live.total >= LIVE).then_some(()))
    })
    .await?;
    let agents = Agent::of_node_or_all(&state, None)?;
    let which = Which { destination: Some(IpAddr::V4(*to.ip())), port: Some(to.port()), ..Which::default() };
    let all = flows(&reader, &state, &agents, &which, 1_000).await?;
    let own = all.flows.iter().filter(|it| it.pod == format!("{namespace}/{}", asked.name));
    let own: Vec<_> = own.filter(|it| it.node == pod.node() && it.egress == Some(seen.into())).collect();
    ensure!(own.len() >= LIVE && all.notes.is_empty(), "{all:?}");
    Ok(())
}

/// Looks for flows that a policy has refused on a node.
pub async fn names_what_is_refused(account: &Account, node: &str) -> anyhow::Result<()> {
    let reader = reader(account);
    let state = reader.state(account.namespace.name(), Pods::None).await?;
    let agents = Agent::of_node_or_all(&state, Some(node))?;
    let told = drops(&reader, &state, &agents, Duration::ZERO).await?;
    let refused = told.drops.iter().find(|it| it.reason == "refuse_policy" && it.node == node);
    ensure!(refused.is_some_and(|it| it.total > 0), "{told:?}");
    Ok(())
}

/// Asks the API server what `kubectl aegis` asks it about an account.
pub fn reader(account: &Account) -> Reader {
    let (client, namespace) = (account.namespace.cluster().client(), account.namespace.name().to_owned());
    Reader { client, context: None, namespace, system: NAMESPACE.to_owned() }
}
