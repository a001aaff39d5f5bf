//! Two accounts on one prefix, of which one lends a part to the other.

use aegis_crds::reason;
use aegis_tests::cluster::{Cluster, Namespace};
use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Namespace as NamespaceObject;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

use crate::account::{Account, free_pair};
use crate::policies::is_refused;

/// Ports of an address towards one origin that a node has: one slice.
const SLICE: usize = 256;
/// Label by which the one account is chosen to be lent to, while it has it.
const LENT: &str = "aegis.test/lent-to";

/// Lets the pods of a namespace leave from an address of the prefix, a slice on each node.
async fn party(namespace: Namespace, prefix: &str) -> anyhow::Result<Account> {
    let account = Account::on_prefix(namespace, prefix, "perNode: {min: 1, max: 1}", "").await?;
    account.bind_and_wait().await?;
    Ok(account)
}

#[tokio::test]
async fn two_accounts_of_one_prefix_have_nothing_of_each_other_and_labels_decide_who_may_have_more()
-> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let (owner, tenant) = (cluster.namespace("owner").await?, cluster.namespace("tenant").await?);
    let prefix = owner.name().to_owned();
    let namespaces: Api<NamespaceObject> = Api::all(cluster.client());
    let tenant_name = tenant.name().to_owned();
    let label = async |value: Value| {
        let patch = Patch::Merge(json!({"metadata": {"labels": {LENT: value}}}));
        namespaces.patch(&tenant_name, &PatchParams::default(), &patch).await
    };
    label(json!(prefix)).await?;
    owner
        .apply(&format!(
            "apiVersion: aegis.dev/v1alpha1\nkind: AegisPrefix\nmetadata: {{name: {prefix}}}\n\
             spec: {{cidr: {}/31, account: {prefix}, delegations: [{{name: tenants, maxAddresses: 1, \
             namespaceSelector: {{matchLabels: {{{LENT}: {prefix}}}}}}}]}}\n",
            free_pair(&cluster).await?
        ))
        .await?;
    let (owner, tenant) = (party(owner, &prefix).await?, party(tenant, &prefix).await?);
    ensure!(owner.address != tenant.address, "both have {}", owner.address);

    let node = cluster.nodes().await?.into_iter().next().context("no node")?;
    let origin = cluster.origin(0)?;
    let owners = owner.pod_on("client", &node, true).await?;
    let tenants = tenant.pod_on("client", &node, true).await?;
    // One uses up what its node has of its address towards an origin; the other does not notice.
    tenants.open("all", origin.port(0), SLICE).await?;
    is_refused(&tenants, origin.port(0), "its ports are used up").await?;
    ensure!(owners.source(origin.port(0)).await? == Ok(owner.address), "the other's are not");
    owners.open("some", origin.port(0), 20).await?;
    ensure!(
        tenants.source(origin.port(1)).await? == Ok(tenant.address),
        "towards another port they are free"
    );

    // A label that is taken away takes nothing that is in use.
    label(Value::Null).await?;
    tenant.told_of_its_right("False", reason::DELEGATION_WITHDRAWN).await?;
    tenants.exchange("all", SLICE).await?;
    ensure!(tenants.source(origin.port(1)).await? == Ok(tenant.address), "new flows leave as before");
    label(json!(prefix)).await?;
    tenant.told_of_its_right("True", reason::DELEGATED).await?;
    owners.exchange("some", 20).await?;
    Ok(())
}
