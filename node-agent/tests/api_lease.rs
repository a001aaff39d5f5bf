//! The keeper of the node's Lease against a real API server: it acquires, reads, renews, and gives way.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what they are for")]

use aegis_node_agent::lease::{Access, Hold, Need, Trouble, keep};
use aegis_node_agent::metrics::Metrics;
use aegis_tests::apiserver::{ApiServer, NAMESPACE};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use std::net::Ipv4Addr;
use std::time::Duration;
use tokio::sync::watch;

const ADDRESS: &str = "
apiVersion: aegis.dev/v1alpha1
kind: EgressAddress
metadata: {name: 203.0.113.1}
spec: {address: 203.0.113.1, prefix: p, allocationRef: {namespace: shop, name: main}, epoch: 7}
";

/// What the controller would be told, waited for.
async fn told(hold: &mut watch::Receiver<Option<Hold>>, what: &str, check: impl Fn(&Hold) -> bool) -> Hold {
    let wanted = hold.wait_for(|hold| hold.as_ref().is_some_and(&check));
    let found = tokio::time::timeout(Duration::from_secs(20), wanted).await;
    found.unwrap_or_else(|_| panic!("{what}: not within 20 s")).unwrap().clone().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_acquired_renewed_lost_and_acquired_anew() {
    let server = ApiServer::start().unwrap();
    server.install_definitions().unwrap();
    server.kubectl(&["create", "namespace", NAMESPACE]).unwrap();
    server.kubectl_with(&["create", "-f", "-"], ADDRESS).unwrap();
    server
        .kubectl_with(&["create", "-f", "-"], "{apiVersion: v1, kind: Node, metadata: {name: n1}}")
        .unwrap();
    let uid = server.kubectl(&["get", "node", "n1", "-o", "jsonpath={.metadata.uid}"]).unwrap();
    let client = server.client().await.unwrap();
    let leases: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let hand_to = async |who: Option<&str>| {
        let patch = json!({"spec": {"holderIdentity": who}});
        leases.patch("aegis-node-n1", &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    };

    let mut need = Need { uid, after: Some(15), renewed: 0, followed: None };
    let (needs, needed) = watch::channel(Some(need.clone()));
    let (holds, mut hold) = watch::channel(None);
    let access = Access { client, namespace: NAMESPACE.into(), node: "n1".into() };
    tokio::spawn(keep(access, needed, holds, Metrics::default(), || {}));
    let read = told(&mut hold, "a read", |hold| hold.read.is_some()).await.read.unwrap();
    assert_eq!(read.epochs.get(&Ipv4Addr::new(203, 0, 113, 1).into()), Some(&7));
    let lease = leases.get("aegis-node-n1").await.unwrap();
    assert_eq!(lease.spec.unwrap().holder_identity.as_deref(), Some("n1"));
    assert_eq!(lease.metadata.owner_references.unwrap()[0].name, "n1");
    assert_eq!(hold.borrow().as_ref().unwrap().renewed, 0, "nothing was followed yet");

    need.followed = Some(read.round);
    needs.send_replace(Some(need.clone()));
    let armed = told(&mut hold, "a renewal to count by", |hold| hold.renewed != 0).await.renewed;
    let later = told(&mut hold, "the next renewal", |hold| hold.renewed > armed).await.renewed;
    assert!((2..8).contains(&((later - armed) / 1_000_000_000)), "{} ns", later - armed);

    // Away for a while, and nobody has taken anything: it goes on where it was.
    server.suspend();
    let failed = told(&mut hold, "trouble", |hold| matches!(hold.trouble, Some(Trouble::Failed(_)))).await;
    server.resume().unwrap();
    let again = told(&mut hold, "renewals again", |hold| hold.renewed > failed.renewed).await;
    assert_eq!((again.trouble, again.read.unwrap().round), (None, read.round));

    // Taken over: by whatever the programs still count, it gives way.
    need.renewed = again.renewed;
    needs.send_replace(Some(need.clone()));
    hand_to(Some("aegis-operator")).await;
    let lost = told(&mut hold, "the loss", |hold| hold.renewed == 0).await;
    assert_eq!((lost.trouble, lost.read), (Some(Trouble::TakenBy("aegis-operator".into())), None));
    hand_to(None).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let holder = leases.get("aegis-node-n1").await.unwrap().spec.unwrap().holder_identity;
    assert_eq!(holder, None, "not before the programs are disarmed");
    need.renewed = 0;
    needs.send_replace(Some(need.clone()));
    let anew = told(&mut hold, "another read", |hold| hold.read.is_some()).await;
    assert_eq!(
        (anew.renewed, anew.read.unwrap().round),
        (0, read.round + 1),
        "the former one does not count"
    );
    need.followed = Some(read.round + 1);
    needs.send_replace(Some(need));
    told(&mut hold, "renewals to count by", |hold| hold.renewed != 0).await;
}
