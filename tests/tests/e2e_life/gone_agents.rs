//! Nodes whose agent is gone, though it never said so.

use std::collections::BTreeSet;

use aegis_crds::type_;
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::NODES;
use anyhow::Context;

use crate::account::{Account, ZONE, only};
use crate::agents;

#[tokio::test]
async fn a_node_without_agent_gets_no_new_slices_keeps_its_own_and_is_told() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let last = NODES[2];
    let before = Account::new(&cluster, "before", 4).await?;
    before.bind_and_wait().await?;
    let pod = before.pod_on("live", &last.name(), true).await?;
    pod.open("held", cluster.origin(0)?.port(0), 50).await?;
    let mut capture = lab.capture(&[ZONE])?;
    let holders = async |account: &Account| -> anyhow::Result<BTreeSet<String>> {
        let address = account.egress_address().await?.context("the address is gone")?;
        Ok(address.spec.holdings.into_iter().map(|holding| holding.node).collect())
    };
    let away = async {
        agents::forbid(&cluster, lab, last).await?;
        let after = Account::new(&cluster, "after", 4).await?;
        let expected = NODES[..2].iter().map(|node| node.name()).collect();
        assert_eq!(holders(&after).await?, expected, "{} has no agent", last.name());
        assert!(holders(&before).await?.contains(&last.name()), "what it has it keeps");
        pod.exchange("held", 50).await?;
        let told = before.bindings();
        wait_for("the condition to name it", PATIENCE, async || {
            // Nobody could enforce a change there.
            let selector = format!("{}: {}", crate::account::BOUND.0, crate::account::BOUND.1);
            before.apply_binding(&selector, &format!("{ZONE}, 192.0.2.128/29"), "").await?;
            let status = told.get("partners").await?.status.unwrap_or_default();
            let mut conditions = status.conditions.iter().filter(|it| it.type_ == type_::PROGRAMMED);
            Ok(conditions.any(|it| it.message.contains("pod is gone or not ready")).then_some(()))
        })
        .await?;
        anyhow::Ok(after)
    };
    let result = away.await;
    agents::allow(&cluster, lab, last).await?;
    let after = result?;
    wait_for("the node to get slices", 2 * PATIENCE, async || {
        Ok(holders(&after).await?.contains(&last.name()).then_some(()))
    })
    .await?;
    pod.exchange("held", 50).await?;
    only(&mut capture, before.address)?;
    after.end().await?;
    before.end().await
}
