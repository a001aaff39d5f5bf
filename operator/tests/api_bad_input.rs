//! Objects that are wrong in a way that no schema can tell, or that got past it. What works keeps working.

#![allow(clippy::expect_used)] // Helpers of tests fail the test.

mod cluster;

use aegis_crds::{
    AegisPrefix, AllocationRef, EgressAddress, EgressAddressSpec, EgressAllocation, EgressNode, ZoneBinding,
    reason, type_,
};
use cluster::objects::SOON;
use cluster::{Cluster, eventually};
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{CustomResourceExt, ResourceExt};
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn overlap_and_unknown_references_are_told() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &[]).await;
    cluster.nodes(["n1"]).await;
    cluster.namespace("shop").await;
    cluster.namespace("bank").await;
    cluster.prefix("older", "203.0.113.0/28", "shop").await;
    // Creation times have whole seconds; of equal ones the first by name counts.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    cluster.prefix("a-newer", "203.0.113.8/29", "shop").await;
    let prefixes: Api<AegisPrefix> = cluster.all();
    let overlap = cluster.condition(&prefixes, "a-newer", type_::ACCEPTED, "False", "203.0.113.8/29").await;
    assert_eq!(overlap.reason, reason::OVERLAP);
    assert!(
        overlap.message.contains("\"older\"") && overlap.message.contains("203.0.113.0/28"),
        "{overlap:?}"
    );
    cluster.condition(&prefixes, "older", type_::ACCEPTED, "True", "").await;

    let cases = [
        ("shop", "unknown-prefix", json!({"prefixes": ["nowhere"]}), reason::NOT_FOUND, "spec.prefixes[0]"),
        ("bank", "not-mine", json!({"prefixes": ["older"]}), reason::NOT_PERMITTED, "spec.prefixes[0]"),
        ("shop", "overlapping", json!({"prefixes": ["a-newer"]}), reason::OVERLAP, "spec.prefixes[0]"),
        (
            "shop",
            "outside",
            json!({"prefixes": ["older"], "addresses": {"explicit": ["203.0.113.77"]}}),
            reason::INVALID,
            "spec.addresses.explicit[0]",
        ),
    ];
    for (account, name, spec, _, _) in &cases {
        cluster.allocation(account, name, spec.clone()).await;
    }
    cluster.allocation("shop", "good", json!({"prefixes": ["older"]})).await;
    for (account, name, _, reason, field) in &cases {
        let api: Api<EgressAllocation> = cluster.in_account(account);
        let told = cluster.condition(&api, name, type_::ACCEPTED, "False", field).await;
        assert_eq!(told.reason, *reason, "{name}: {}", told.message);
        eventually("an Event says so", SOON, async || {
            let events = cluster.events(account, name).await;
            if events.iter().any(|(it, _)| it == reason) { Ok(()) } else { Err(events) }
        })
        .await;
    }
    cluster.addresses("shop", "good", 1).await;

    let api: Api<EgressAllocation> = cluster.in_account("shop");
    cluster.allocation("shop", "too-many", json!({"prefixes": ["older"], "addresses": {"ipv4": 16}})).await;
    let short = cluster.condition(&api, "too-many", type_::ALLOCATED, "False", "15 of 16").await;
    assert_eq!(short.reason, reason::NO_FREE_ADDRESS);
    let spec = json!({"prefixes": ["older"], "sites": [{"name": "b", "nodeSelector": {"zone": "b"}}]});
    cluster.allocation("shop", "no-node", spec).await;
    let nowhere = cluster.condition(&api, "no-node", type_::ALLOCATED, "False", "").await;
    assert!([reason::NO_NODE, reason::NO_FREE_ADDRESS].contains(&nowhere.reason.as_str()), "{nowhere:?}");
}

/// Lets anything pass the schema of a kind, as an older version of it might have.
async fn loosen<K: CustomResourceExt>(cluster: &Cluster) {
    let crds: Api<CustomResourceDefinition> = cluster.all();
    let mut crd = crds.get(K::crd_name()).await.expect("CRD");
    for version in &mut crd.spec.versions {
        let anything = json!({"openAPIV3Schema": {
            "type": "object",
            "properties": {
                "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            },
        }});
        version.schema = serde_json::from_value(anything).expect("schema");
    }
    crds.replace(K::crd_name(), &PostParams::default(), &crd).await.expect("loosen");
}

/// Puts the schema back.
async fn tighten<K: CustomResourceExt>(cluster: &Cluster) {
    let crds: Api<CustomResourceDefinition> = cluster.all();
    let mut crd = crds.get(K::crd_name()).await.expect("CRD");
    crd.spec = K::crd().spec;
    crds.replace(K::crd_name(), &PostParams::default(), &crd).await.expect("tighten");
}

async fn force(api: &Api<DynamicObject>, name: &str, patch: Value) {
    eventually(&format!("{name} takes {patch}"), SOON, async || {
        api.patch(name, &PatchParams::default(), &Patch::Merge(patch.clone()))
            .await
            .map_err(|it| it.to_string())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_objects_do_not_stop_the_others() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator("a", &[]).await;
    operator.leads().await;
    let [_one, two] = cluster.nodes(["n1", "n2"]).await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    let any = json!({"allocationRef": {"name": "kept"}, "workloads": {"allPods": true}, "zone": {"cidrs": ["0.0.0.0/0"]}});
    cluster.binding("shop", "bound", any).await;
    cluster.allocation("shop", "kept", json!({"prefixes": ["leased"], "addresses": {"ipv4": 2}})).await;
    cluster.allocation("shop", "spoiled", json!({"prefixes": ["leased"]})).await;
    let kept = cluster.addresses("shop", "kept", 2).await;
    let spoiled = cluster.addresses("shop", "spoiled", 1).await;
    two.report(&cluster).await;

    loosen::<EgressAllocation>(&cluster).await;
    loosen::<EgressAddress>(&cluster).await;
    loosen::<ZoneBinding>(&cluster).await;
    let namespaced =
        |resource| Api::<DynamicObject>::namespaced_with(cluster.client.clone(), "shop", &resource);
    let allocations = namespaced(ApiResource::erase::<EgressAllocation>(&()));
    let addresses: Api<DynamicObject> =
        Api::all_with(cluster.client.clone(), &ApiResource::erase::<EgressAddress>(&()));
    let bindings = namespaced(ApiResource::erase::<ZoneBinding>(&()));
    force(&allocations, "spoiled", json!({"spec": {"prefixes": "no list"}})).await;
    force(&addresses, &kept[1].name_any(), json!({"spec": {"holdings": "no list"}})).await;
    force(&bindings, "bound", json!({"spec": {"zone": {"cidrs": ["203.0.113.1/24"]}}})).await;

    // Each broken object says so itself, as long as its schema lets it.
    let invalid = |object: DynamicObject| {
        let conditions = object.data.pointer("/status/conditions").cloned().unwrap_or_default();
        let found = conditions.as_array().into_iter().flatten().any(|it| it["reason"] == reason::INVALID);
        if found { Ok(()) } else { Err(conditions) }
    };
    eventually("the allocation says so", SOON, async || {
        invalid(allocations.get("spoiled").await.expect("get"))
    })
    .await;
    eventually("the binding says so", SOON, async || invalid(bindings.get("bound").await.expect("get")))
        .await;
    eventually("Events say so", SOON, async || {
        let about = [
            cluster.events("shop", "spoiled").await,
            cluster.events("shop", "bound").await,
            cluster.events("default", &kept[1].name_any()).await,
        ];
        let told = |events: &Vec<(String, String)>| events.iter().any(|(it, _)| it == reason::INVALID);
        if about.iter().all(told) { Ok(()) } else { Err(format!("{about:?}")) }
    })
    .await;
    assert_eq!(
        operator.metric(r#"aegis_operator_objects_invalid{kind="EgressAllocation"}"#).await,
        Some(1.0)
    );

    // The others are served, the broken ones' addresses stand, and nobody else gets them.
    cluster.allocation("shop", "later", json!({"prefixes": ["leased"]})).await;
    cluster.node("n3").await;
    eventually("the good ones go on", SOON, async || {
        let text = |error: kube::Error| error.to_string();
        let all = addresses.list(&ListParams::default()).await.map_err(text)?;
        let count = |name: &str| {
            let of = all.iter().filter(|it| it.data["spec"]["allocationRef"]["name"] == name);
            of.map(|it| it.data["spec"]["holdings"].as_array().map_or(0, Vec::len)).collect::<Vec<_>>()
        };
        // "kept" takes another address in the place of the one that cannot be read.
        let (kept, later) = (count("kept"), count("later"));
        if kept.iter().filter(|nodes| **nodes == 3).count() == 2 && later == [3] {
            Ok(())
        } else {
            Err(format!("kept {kept:?} later {later:?}"))
        }
    })
    .await;
    let frozen = addresses.get(&spoiled[0].name_any()).await.expect("get");
    assert_eq!(frozen.data["spec"], serde_json::to_value(&spoiled[0].spec).expect("spec"));
    assert!(addresses.get(&kept[1].name_any()).await.is_ok());

    // With the schemas back, the broken objects are repaired and served again.
    force(&allocations, "spoiled", json!({"spec": {"prefixes": ["leased"]}})).await;
    tighten::<EgressAllocation>(&cluster).await;
    eventually("it grows with the others", SOON, async || {
        let found =
            cluster.all::<EgressAddress>().get(&spoiled[0].name_any()).await.map_err(|it| it.to_string())?;
        let nodes = found.spec.holdings.len();
        if nodes == 3 { Ok(()) } else { Err(format!("{nodes} nodes")) }
    })
    .await;
    let api: Api<EgressAllocation> = cluster.in_account("shop");
    cluster.condition(&api, "spoiled", type_::ACCEPTED, "True", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn report_that_cannot_be_read_takes_nothing_away() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &[]).await;
    cluster.nodes(["n1", "n2"]).await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    cluster.allocation("shop", "one", json!({"prefixes": ["leased"]})).await;
    let before = cluster.addresses("shop", "one", 1).await;
    loosen::<EgressNode>(&cluster).await;
    let reports: Api<DynamicObject> =
        Api::all_with(cluster.client.clone(), &ApiResource::erase::<EgressNode>(&()));
    let patch = Patch::Merge(json!({"status": {"demand": "no list"}}));
    eventually("the report takes it", SOON, async || {
        reports.patch_status("n2", &PatchParams::default(), &patch).await.map_err(|it| it.to_string())
    })
    .await;
    eventually("an Event says so", SOON, async || {
        let events = cluster.events("default", "n2").await;
        if events.iter().any(|(it, _)| it == reason::INVALID) { Ok(()) } else { Err(events) }
    })
    .await;
    cluster.allocation("shop", "two", json!({"prefixes": ["leased"]})).await;
    let two = cluster.addresses("shop", "two", 1).await;
    assert!(two[0].spec.holdings.iter().all(|it| it.node == "n1"), "{two:?}");
    assert_eq!(cluster.addresses("shop", "one", 1).await[0].spec, before[0].spec);
}

/// What the API server refuses to store is told, and the others are served at once.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_cannot_be_written_is_told() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator("a", &[]).await;
    operator.leads().await;
    cluster.nodes(["n1"]).await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "no-first"},
        "spec": {
            "matchConstraints": {"resourceRules": [{
                "apiGroups": ["aegis.dev"], "apiVersions": ["*"], "operations": ["CREATE"], "resources": ["egressaddresses"],
            }]},
            "validations": [{"expression": "object.metadata.name != '203.0.113.0'", "message": "not the first"}],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "no-first"}, "spec": {"policyName": "no-first", "validationActions": ["Deny"]},
    });
    let policy: ValidatingAdmissionPolicy = serde_json::from_value(policy).expect("policy");
    let binding: ValidatingAdmissionPolicyBinding = serde_json::from_value(binding).expect("binding");
    cluster.all().create(&PostParams::default(), &policy).await.expect("policy");
    cluster.all().create(&PostParams::default(), &binding).await.expect("binding");
    let spec = EgressAddressSpec {
        address: "203.0.113.0".into(),
        prefix: "leased".into(),
        allocation_ref: AllocationRef { namespace: "shop".into(), name: "nobody".into() },
        epoch: 1,
        holdings: Vec::new(),
        fence: None,
    };
    let probe = EgressAddress::new("203.0.113.0", spec);
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    eventually("the policy is in force", SOON, async || {
        match cluster.all::<EgressAddress>().create(&dry_run, &probe).await {
            Err(error) if error.to_string().contains("not the first") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;

    cluster.allocation("shop", "blocked", json!({"prefixes": ["leased"]})).await;
    let api: Api<EgressAllocation> = cluster.in_account("shop");
    let told = cluster.condition(&api, "blocked", type_::ALLOCATED, "False", "not the first").await;
    assert_eq!(told.reason, reason::NOT_WRITTEN);
    assert!(!told.message.contains("Status {"), "the server's own words: {}", told.message);
    cluster.condition(&api, "blocked", type_::ACCEPTED, "True", "").await;
    cluster.allocation("shop", "good", json!({"prefixes": ["leased"]})).await;
    cluster.addresses("shop", "good", 1).await;

    // However busy the cluster is, what failed is not tried again before its time.
    let failures = async || operator.metric(r#"aegis_operator_api_errors_total{step="Address"}"#).await;
    let before = failures().await.expect("failures");
    for round in 0..30 {
        cluster.namespace(&format!("busy-{round}")).await;
        let binding = json!({"allocationRef": {"name": "x"}, "workloads": {"allPods": true}, "zone": {"cidrs": ["0.0.0.0/0"]}});
        cluster.binding("shop", &format!("busy-{round}"), binding).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let more = failures().await.expect("failures") - before;
    assert!(more <= 6.0, "tried {more} times more");
    cluster
        .all::<ValidatingAdmissionPolicyBinding>()
        .delete("no-first", &DeleteParams::default())
        .await
        .expect("delete");
    cluster.addresses("shop", "blocked", 1).await;
    cluster.condition(&api, "blocked", type_::ALLOCATED, "True", "").await;
}
