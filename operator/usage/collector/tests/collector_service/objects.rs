//! What is told of objects of the cluster, and the page that shows them.

use crate::collector::{Collector, client, eventually, get, said};
use crate::world::World;
use http::StatusCode;
use serde_json::{Value, json};

const QUESTION: &str = "{ allocations { account name } addresses { address account held targetPercent slices { first last node site state } } \
     policies { order name action accounts pods destinations } }";

/// Everything that says something of account y, and that account x must not get to see.
const SECRETS: [&str; 4] = ["203.0.113.77", "y-node", "first-of-all", "app=y"];

/// An EgressAddress as the operator writes it, of which a node holds some slices.
pub fn address(address: &str, account: &str, node: &str) -> Value {
    json!({
        "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressAddress", "metadata": {"name": address},
        "spec": {
            "address": address, "prefix": "lent", "epoch": 1,
            "allocationRef": {"namespace": account, "name": "partner"},
            "holdings": [{"first": 4, "last": 11, "node": node, "epoch": 1, "state": "Held"}],
        },
    })
}

fn policy(name: &str, precedence: i32, account: &str) -> Value {
    json!({
        "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": name},
        "spec": {
            "precedence": precedence, "action": "Deny", "mode": "Observe",
            "match": {
                "identity": {"namespaces": [account], "podSelector": {"matchLabels": {"app": account}}},
                "destination": {"cidrs": ["198.51.100.0/24"]},
            },
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_told_to_those_who_may_see_them() {
    let world = World::start().await;
    let objects = [
        address("192.0.2.1", "x", "n1"),
        address("203.0.113.77", "y", "y-node"),
        policy("of-x", 20, "x"),
        policy("first-of-all", 10, "y"),
    ];
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    world.api.provide(&list.to_string()).expect("objects");
    // Begun before or after the objects were made: watches tell of them.
    let collector = Collector::start(&world, &[]).await;
    let x = world.person("x").await;
    let answer = eventually("x's address is known", async || {
        let (status, answer) = collector.ask(&x, QUESTION).await;
        let known =
            status == StatusCode::OK && answer["data"]["policies"].as_array().is_some_and(|it| it.len() == 1);
        if known && answer["data"]["addresses"][0]["held"] == 8 {
            Ok(answer)
        } else {
            Err(answer.to_string())
        }
    })
    .await;
    let expected = json!({
        "allocations": [{"account": "x", "name": "partner"}],
        "addresses": [{
            "address": "192.0.2.1", "account": "x", "held": 8, "targetPercent": 80,
            "slices": [{"first": 4, "last": 11, "node": "n1", "site": "", "state": "HELD"}],
        }],
        "policies": [{
            "order": 2, "name": "of-x", "action": "Deny", "accounts": ["x"], "pods": "pods with app=x", "destinations": "198.51.100.0/24",
        }],
    });
    assert_eq!(answer["data"], expected);
    assert!(!SECRETS.iter().any(|secret| answer.to_string().contains(secret)), "{answer}");
    let (_, all) = collector.ask(&world.person("platform").await, QUESTION).await;
    for secret in SECRETS {
        assert!(all.to_string().contains(secret), "{secret}: {all}");
    }
    // The owner of the range sees what lies in it, whoever has it.
    let (_, lent) = collector.ask(&world.person("parent").await, QUESTION).await;
    assert_eq!(lent["data"]["addresses"][0]["account"], "x");
    assert_eq!(lent["data"]["policies"], json!([]));
    let (_, grabbed) = collector.ask(&world.person("grab").await, QUESTION).await;
    assert_eq!(
        grabbed["data"]["addresses"],
        json!([]),
        "a prefix that is not accepted shows its account nothing"
    );
    // The page needs no token, and what it shows needs one.
    let address = said(&collector.log, "reports are taken").expect("log")["address"].clone();
    let server = client(&format!("http://{}", address.as_str().expect("address")), None);
    let (status, page) = get(&server, "/").await.expect("the page");
    assert!(status == StatusCode::OK && page.contains("page/app.js"), "{status} {page}");
    assert_eq!(collector.ask("", QUESTION).await.0, StatusCode::UNAUTHORIZED);
    let delete = ["delete", "eaddr,epol", "--all", "--wait=false"];
    world.api.kubectl(&delete).expect("delete");
}
