//! Policies of the cluster: one case of each kind, on the wire.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use aegis_crds::{EgressPolicy, EgressPolicyStatus, reason, type_};
use aegis_tests::cluster::{Cluster, Namespace, PATIENCE, wait_for};
use anyhow::{Context, ensure};
use kube::api::{Api, DeleteParams};

use crate::account::{Account, ZONE, allocation, free_address, holds, only, prefix};
use crate::explained;
use crate::inside::Inside;

/// Edits in a row.
const EDITS: usize = 30;

/// Writes policies about the pods of one account only.
pub struct Policies<'a> {
    namespace: &'a Namespace,
    pub api: Api<EgressPolicy>,
}

impl<'a> Policies<'a> {
    pub fn of(account: &'a Account) -> Self {
        Self::about(&account.namespace)
    }

    /// About the pods of a namespace.
    pub fn about(namespace: &'a Namespace) -> Self {
        Self { namespace, api: Api::all(namespace.cluster().client()) }
    }

    pub fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.namespace.name())
    }

    async fn apply(&self, name: &str, precedence: u32, destination: &str, rest: &str) -> anyhow::Result<()> {
        self.apply_matching(name, precedence, "", &format!("destination: {{{destination}}}"), rest).await
    }

    /// With more of the identity, and of what is matched.
    async fn apply_matching(
        &self,
        name: &str,
        precedence: u32,
        identity: &str,
        matching: &str,
        rest: &str,
    ) -> anyhow::Result<()> {
        let (namespace, name) = (self.namespace.name(), self.name(name));
        let policy = format!(
            "apiVersion: aegis.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: {name}}}\n\
             spec: {{precedence: {precedence}, match: {{identity: {{namespaces: [{namespace}], {identity}}}, {matching}}}, {rest}}}\n"
        );
        self.namespace.apply(&policy).await.map(drop)
    }

    /// The same, and waits until every node enforces it. Gives its status.
    pub async fn enforce(
        &self,
        name: &str,
        precedence: u32,
        destination: &str,
        rest: &str,
    ) -> anyhow::Result<EgressPolicyStatus> {
        self.apply(name, precedence, destination, rest).await?;
        self.programmed(name).await
    }

    /// As [`Policies::apply_matching`], and waits.
    pub async fn enforce_matching(
        &self,
        name: &str,
        precedence: u32,
        identity: &str,
        matching: &str,
        rest: &str,
    ) -> anyhow::Result<EgressPolicyStatus> {
        self.apply_matching(name, precedence, identity, matching, rest).await?;
        self.programmed(name).await
    }

    async fn programmed(&self, name: &str) -> anyhow::Result<EgressPolicyStatus> {
        let name = self.name(name);
        wait_for(&format!("{name} to be programmed"), PATIENCE, async || {
            let policy = self.api.get(&name).await?;
            let status = policy.status.unwrap_or_default();
            Ok(holds(&status.conditions, type_::PROGRAMMED, policy.metadata.generation).then_some(status))
        })
        .await
    }

    pub async fn delete(&self, name: &str) -> anyhow::Result<()> {
        self.api.delete(&self.name(name), &DeleteParams::default()).await?;
        Ok(())
    }
}

pub async fn leaves(pod: &Inside, to: SocketAddrV4, from: Ipv4Addr, what: &str) -> anyhow::Result<()> {
    wait_for(what, Duration::from_secs(2), async || Ok((pod.source(to).await? == Ok(from)).then_some(())))
        .await
}

pub async fn is_refused(pod: &Inside, to: SocketAddrV4, what: &str) -> anyhow::Result<()> {
    let failure = pod.source(to).await?.err().context(what.to_owned())?;
    ensure!(failure == "refused", "{what}: {failure}");
    Ok(())
}

#[tokio::test]
async fn policies_decide_in_order_and_before_bindings() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let account = Account::new(&cluster, "policies", 4).await?;
    let nodes = cluster.nodes().await?;
    let pod = account.pod_on("ruled", &nodes[1 % nodes.len()], true).await?;
    let (node, origin) = (pod.host(), cluster.origin(0)?);
    let (first, second) = (origin.port(0), origin.port(1));
    let zone = format!("cidrs: [{}]", account.zone);
    account.bind_and_wait().await?;
    leaves(&pod, first, account.address, "by the binding").await?;
    explained::names_what_the_origin_sees(&account, "ruled", &pod, second).await?;
    pod.open("bound", first, 20).await?;

    let policies = Policies::of(&account);
    let status = policies.enforce("deny", 30, &zone, "action: Deny").await?;
    ensure!(status.pods == 1, "{status:?}");
    is_refused(&pod, first, "a policy comes before the binding").await?;
    explained::names_what_is_refused(&account, pod.node()).await?;
    policies.enforce("default", 20, &zone, "action: Default").await?;
    leaves(&pod, first, node, "with the node's address").await?;
    pod.open("plain", first, 20).await?;
    let port = format!("{zone}, ports: [{{port: {}}}]", first.port());
    policies.enforce("egress", 10, &port, "egress: {primary: partners}").await?;
    leaves(&pod, first, account.address, "from the primary").await?;
    leaves(&pod, second, node, "another port goes by the next policy").await?;
    pod.open("ruled", first, 20).await?;

    // Ping alone: what comes after is no longer asked about it.
    let ping = async || {
        let to = origin.address().to_string();
        anyhow::Ok(pod.program("ping", &["-c", "1", "-W", "2", &to]).await?.0)
    };
    if cluster.lab().is_some() {
        ensure!(ping().await?, "with the node's address");
        let icmp = format!("{zone}, ports: [{{protocol: ICMP}}]");
        policies.enforce("ping", 5, &icmp, "action: Deny").await?;
        ensure!(!ping().await?, "ping is denied");
        leaves(&pod, second, node, "and nothing else").await?;
        policies.delete("ping").await?;
    }

    // Nothing is there to leave from: the secondary, or else nothing, but never by what comes after.
    policies.enforce("egress", 10, &port, "egress: {primary: missing, secondary: partners}").await?;
    leaves(&pod, first, account.address, "from the secondary").await?;
    policies.enforce("egress", 10, &port, "egress: {primary: missing}").await?;
    is_refused(&pod, first, "from nothing").await?;
    let object = policies.api.get(&policies.name("egress")).await?;
    let conditions = object.status.context("no status")?.conditions;
    let accepted = conditions.iter().find(|it| it.type_ == type_::ACCEPTED).context("not judged")?;
    ensure!(accepted.reason == reason::NOT_FOUND, "{accepted:?}");
    // It comes to exist, with nothing to leave from.
    let spec = format!("{{prefixes: [{}], addresses: {{ipv4: 1}}}}", account.namespace.name());
    account.namespace.apply(&allocation("missing", &spec)).await?;
    is_refused(&pod, first, "the prefix has one address only").await?;

    // Everything that a later policy matches is matched by an earlier one.
    let status = policies.enforce("late", 40, &zone, "action: Default").await?;
    let effective = status.conditions.iter().find(|it| it.type_ == type_::EFFECTIVE).context("not judged")?;
    ensure!(effective.reason == reason::SHADOWED, "{effective:?}");
    ensure!(effective.message.contains(&policies.name("default")), "{effective:?}");
    let order = async |name: &str| -> anyhow::Result<u32> {
        Ok(policies.api.get(&policies.name(name)).await?.status.context("no status")?.order)
    };
    let places =
        [order("egress").await?, order("default").await?, order("deny").await?, order("late").await?];
    ensure!(places.is_sorted(), "{places:?}");

    for name in ["egress", "default", "deny", "late"] {
        policies.delete(name).await?;
    }
    leaves(&pod, first, account.address, "by the binding again").await?;
    for group in ["bound", "plain", "ruled"] {
        pod.exchange(group, 20).await?;
    }
    account.end().await
}

#[tokio::test]
async fn a_full_primary_gives_way_to_the_secondary_and_of_two_alike_the_first_by_name_decides()
-> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let account = Account::with_ports(&cluster, "full", "perNode: {min: 1, max: 1}", "").await?;
    let spare = free_address(&cluster).await?;
    let name = format!("{}-spare", account.namespace.name());
    account.namespace.apply(&prefix(&name, &format!("{spare}/32"), account.namespace.name())).await?;
    account.namespace.apply(&allocation("spare", &format!("{{prefixes: [{name}]}}"))).await?;
    let nodes = cluster.nodes().await?;
    let pod = account.pod_on("ruled", &nodes[0], false).await?;
    let origin = cluster.origin(0)?;
    let policies = Policies::of(&account);
    let zone = format!("cidrs: [{}]", account.zone);
    policies.enforce("out", 10, &zone, "egress: {primary: partners, secondary: spare}").await?;
    leaves(&pod, origin.port(1), account.address, "from the primary").await?;
    // All that the node has of it, towards one origin.
    pod.open("primary", origin.port(0), 256).await?;
    leaves(&pod, origin.port(0), spare, "from the secondary").await?;
    pod.open("secondary", origin.port(0), 20).await?;
    leaves(&pod, origin.port(1), account.address, "where the primary has ports, from that").await?;
    pod.exchange("primary", 256).await?;

    policies.enforce("tie-b", 5, &zone, "action: Default").await?;
    leaves(&pod, origin.port(0), pod.host(), "by the one that is there").await?;
    policies.enforce("tie-a", 5, &zone, "action: Deny").await?;
    is_refused(&pod, origin.port(0), "of two with one precedence the first by name decides").await?;
    policies.delete("tie-a").await?;
    leaves(&pod, origin.port(0), pod.host(), "by the other again").await?;
    policies.delete("tie-b").await?;
    for (group, count) in [("primary", 256), ("secondary", 20)] {
        pod.exchange(group, count).await?;
    }
    account.end().await
}

#[tokio::test]
async fn edits_of_policies_leak_nothing() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "rulings", 8).await?;
    let policies = Policies::of(&account);
    // Pods that no binding covers: the policies alone do.
    let everything = "cidrs: [0.0.0.0/0]";
    policies.enforce("last", 1000, everything, "action: Deny").await?;
    let nodes = cluster.nodes().await?;
    let mut pods = Vec::new();
    for node in &nodes {
        pods.push(account.pod_on("busy", node, false).await?);
    }
    let origin = cluster.origin(0)?;
    policies.enforce("some", 10, everything, "egress: {primary: partners}").await?;
    let mut capture = lab.capture(&[ZONE])?;
    for pod in &pods {
        pod.open("held", origin.port(1), 50).await?;
        pod.churn("new", origin.port(0)).await?;
    }
    let destinations = [
        "cidrs: [0.0.0.0/0]",
        "cidrs: [198.51.100.0/24]",
        "cidrs: [198.51.100.0/25, 192.0.2.0/24], ports: [{port: 7000}]",
    ];
    let exits =
        ["egress: {primary: partners}", "action: Deny", "egress: {primary: missing, secondary: partners}"];
    for edit in 0..EDITS {
        let precedence = [10, 500, 2000][edit / 3 % 3];
        policies.apply("some", precedence, destinations[edit % 3], exits[edit / 2 % 3]).await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    policies.enforce("some", 10, everything, "egress: {primary: partners}").await?;
    for pod in &pods {
        leaves(pod, origin.port(0), account.address, "at last").await?;
        pod.exchange("held", 50).await?;
    }
    only(&mut capture, account.address)?;
    // The pods end first: without policies they would leave with their nodes' addresses.
    account.end().await
}
