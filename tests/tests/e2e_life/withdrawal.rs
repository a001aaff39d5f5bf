//! A prefix that another account lends, and takes back.

use aegis_crds::{AegisPrefix, EgressAllocation, reason};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use anyhow::ensure;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

use crate::account::{Account, ZONE, only};

#[tokio::test]
async fn what_is_in_use_when_a_delegation_is_withdrawn_goes_on() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "withdrawn", 8).await?;
    account.bind_and_wait().await?;
    let pods = account.pods_on_all_nodes("live").await?;
    let origin = cluster.origin(0)?;
    let mut capture = lab.capture(&[ZONE])?;
    for pod in &pods {
        pod.open("held", origin.port(0), 100).await?;
        pod.churn("new", origin.port(1)).await?;
    }
    let name = account.namespace.name();
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let allocations: Api<EgressAllocation> = account.allocations();
    let change = async |spec: Value| {
        let patch = Patch::Merge(json!({"spec": spec}));
        prefixes.patch(name, &PatchParams::default(), &patch).await
    };
    let holdings = account.holdings().await?;

    // The prefix changes hands, is lent to the account that had it, and is taken back.
    let lent = json!([{"name": "lent", "account": name, "maxAddresses": 1}]);
    change(json!({"account": "lender", "delegations": lent})).await?;
    wait_for("the delegation to be told", PATIENCE, async || {
        let status = allocations.get("partners").await?.status.unwrap_or_default();
        Ok(status.conditions.iter().any(|it| it.message.contains("1 of at most 1")).then_some(()))
    })
    .await?;
    change(json!({"delegations": []})).await?;
    account.told_of_its_right("False", reason::DELEGATION_WITHDRAWN).await?;
    ensure!(account.holdings().await? == holdings, "the slices are as they were");
    for pod in &pods {
        pod.exchange("held", 100).await?;
        ensure!(pod.source(origin.port(0)).await? == Ok(account.address), "new flows leave as before");
        pod.open("later", origin.port(0), 20).await?;
    }
    change(json!({"delegations": lent})).await?;
    account.told_of_its_right("True", reason::DELEGATED).await?;
    for pod in &pods {
        let made = pod.unbroken_churn("new").await?;
        println!("{}: {made} connections meanwhile", pod.pod.name());
        pod.exchange("held", 100).await?;
        pod.exchange("later", 20).await?;
    }
    only(&mut capture, account.address)?;
    account.end().await
}
