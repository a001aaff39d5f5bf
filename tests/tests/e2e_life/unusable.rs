//! Objects that the API server cannot know to be wrong: a condition names object, field and remedy, and what works
//! keeps working.

use aegis_crds::{AegisPrefix, Condition, EgressAllocation, ZoneBinding, reason, type_};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use kube::api::Api;

use crate::account::{Account, BOUND, ZONE, allocation, free_address, only, prefix};

/// Waits for a condition that is false for this reason, and checks that its message names all of these.
async fn says(
    what: &str,
    type_: &str,
    reason: &str,
    words: &[&str],
    conditions: impl AsyncFn() -> anyhow::Result<Vec<Condition>>,
) -> anyhow::Result<()> {
    let found = wait_for(what, PATIENCE, async || {
        let all = conditions().await?;
        Ok(all.into_iter().find(|it| it.type_ == type_ && it.status == "False" && it.reason == reason))
    })
    .await?;
    for word in words {
        assert!(found.message.contains(word), "{what}: {word:?} is not in {:?}", found.message);
    }
    Ok(())
}

#[tokio::test]
async fn conditions_name_object_field_and_remedy_and_what_works_keeps_working() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "works", 4).await?;
    account.bind_and_wait().await?;
    let [origin, other] = [cluster.origin(0)?, cluster.origin(1)?];
    let pods = account.pods_on_all_nodes("live").await?;
    let mut capture = lab.capture(&[ZONE])?;
    let mut nothing = lab.capture(&["192.0.2.0/24"])?;
    for pod in &pods {
        pod.open("held", origin.port(0), 100).await?;
        pod.churn("new", origin.port(1)).await?;
    }
    let (namespace, name) = (&account.namespace, account.namespace.name());
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let allocations: Api<EgressAllocation> = namespace.api();
    let bindings: Api<ZoneBinding> = namespace.api();
    let of_allocation = async |name: &str| -> anyhow::Result<Vec<Condition>> {
        Ok(allocations.get(name).await?.status.map(|status| status.conditions).unwrap_or_default())
    };

    let overlapping = format!("{name}-overlap");
    namespace.apply(&prefix(&overlapping, &format!("{}/32", account.address), name)).await?;
    says(
        "an overlap",
        type_::ACCEPTED,
        reason::OVERLAP,
        &["spec.cidr", name, "delete one of the two"],
        async || {
            Ok(prefixes.get(&overlapping).await?.status.map(|status| status.conditions).unwrap_or_default())
        },
    )
    .await?;

    let outside = free_address(&cluster).await?;
    let cases = [
        (
            "no-prefix",
            "{prefixes: [nowhere]}".to_owned(),
            reason::NOT_FOUND,
            ["spec.prefixes[0]", "\"nowhere\"", "create it or name another"],
        ),
        (
            "overlapped",
            format!("{{prefixes: [{overlapping}]}}"),
            reason::OVERLAP,
            ["spec.prefixes[0]", &overlapping, "repair it or name another"],
        ),
        (
            "outside",
            format!("{{prefixes: [{name}], addresses: {{explicit: [{outside}]}}}}"),
            reason::INVALID,
            ["spec.addresses.explicit[0]", name, "choose an address of these prefixes"],
        ),
    ];
    for (object, spec, reason, words) in &cases {
        namespace.apply(&allocation(object, spec)).await?;
        says(object, type_::ACCEPTED, reason, words, async || of_allocation(object).await).await?;
    }
    namespace
        .apply(&allocation(
            "in-use",
            &format!("{{prefixes: [{name}], addresses: {{explicit: [{}]}}}}", account.address),
        ))
        .await?;
    let words = ["spec.addresses.explicit[0]", &format!("{name}/partners"), "choose another address"];
    says("in use", type_::ALLOCATED, reason::NO_FREE_ADDRESS, &words, async || of_allocation("in-use").await)
        .await?;
    namespace
        .apply(&allocation("too-many", &format!("{{prefixes: [{name}], addresses: {{ipv4: 2}}}}")))
        .await?;
    let words = ["spec.addresses.ipv4", name, "add a prefix"];
    says("too many", type_::ALLOCATED, reason::NO_FREE_ADDRESS, &words, async || {
        of_allocation("too-many").await
    })
    .await?;

    // Covered by a binding that leads nowhere: refused, and never with another source.
    namespace
        .apply(&format!(
            "apiVersion: aegis.dev/v1alpha1\nkind: ZoneBinding\nmetadata: {{name: nowhere}}\nspec: {{allocationRef: \
             {{name: nobody}}, workloads: {{podSelector: {{matchLabels: {{{}: {}}}}}}}, zone: {{cidrs: [192.0.2.0/24]}}}}\n",
            BOUND.0, BOUND.1
        ))
        .await?;
    let words = ["spec.allocationRef.name", "\"nobody\"", name, "create it or name another"];
    says("no allocation", type_::ACCEPTED, reason::NOT_FOUND, &words, async || {
        Ok(bindings.get("nowhere").await?.status.map(|status| status.conditions).unwrap_or_default())
    })
    .await?;
    for pod in &pods {
        wait_for("the refusal", PATIENCE, async || {
            Ok((pod.source(other.port(0)).await? == Err("refused".to_owned())).then_some(()))
        })
        .await?;
    }
    nothing.reset()?;
    for pod in &pods {
        assert_eq!(pod.source(other.port(0)).await?, Err("refused".to_owned()));
        pod.exchange("held", 100).await?;
        pod.unbroken_churn("new").await?;
    }
    let report = nothing.report()?;
    assert!(report.sources.is_empty(), "{:?}", report.sources);
    only(&mut capture, account.address)?;
    account.end().await
}
