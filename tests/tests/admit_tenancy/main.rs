//! Accounts side by side on one prefix, whoever lends it, and a node's agent: what each may do, and what it may not. With real
//! tokens, and the chart's roles and policies.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod attempts;
mod people;
mod staff;

use people::{People, allocation, prefix_patch};
use serde_json::{Value, json};

#[tokio::test]
async fn nothing_that_is_not_permitted_succeeds() {
    let people = People::new().await;
    let table = attempts::all();
    assert!(table.len() >= 40, "only {} attempts", table.len());
    let mut failures = Vec::new();
    for attempt in &table {
        let error = match people.of(attempt.who).run(&attempt.request).await {
            Ok(_) => {
                failures.push(format!("{}: {} succeeded", attempt.who, attempt.request));
                continue;
            }
            Err(error) => error,
        };
        println!("{}: {}\n    {error}", attempt.who, attempt.request);
        if !error.contains(attempt.message) {
            failures.push(format!(
                "{}: {}: {:?} is not in: {error}",
                attempt.who, attempt.request, attempt.message
            ));
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), table.len(), failures.join("\n"));
    println!("{} attempts, all refused", table.len());
    // The refused ones left nothing behind.
    for (path, expected) in [("aegisprefixes", 5), ("egressaddresses", 0), ("egressallocations", 2)] {
        let found = people.admin().get(&format!("{}/{path}", people::GROUP)).await.expect(path);
        let names = found["items"].as_array().into_iter().flatten();
        let names = names.filter_map(|it| it["metadata"]["name"].as_str());
        // Another test's, at the same time.
        let names: Vec<&str> = names.filter(|name| *name != "passing").collect();
        assert_eq!(names.len(), expected, "{path}: {names:?}");
    }
}

#[tokio::test]
async fn what_is_permitted_succeeds() {
    let people = People::new().await;
    // By name, by label, by expressions, and as the owner. As dry runs: the other tests count what there is.
    for (who, account, prefixes) in [
        ("bank", "bank", json!(["leased"])),
        ("kiosk", "kiosk", json!(["leased"])),
        ("shop", "shop", json!(["leased", "private", "graded"])),
        ("gold", "gold", json!(["graded", "elsewhere"])),
        // A prefix that does not exist (yet) is a condition's affair.
        ("thief", "thief", json!(["later"])),
    ] {
        let path = format!("{}?dryRun=All", people::allocations(account));
        let body = allocation("fine", json!({"prefixes": prefixes}));
        people.of(who).create(&path, body).await.unwrap_or_else(|error| panic!("{who}: {error}"));
    }
    // An owner that was let read its prefix reads that one, and lists and watches it by name.
    let shop = people.of("shop");
    let leased = shop.get(&format!("{}/aegisprefixes/leased", people::GROUP)).await.expect("its own prefix");
    assert_eq!(leased["spec"]["account"], "shop");
    let by_name = format!("{}/aegisprefixes?fieldSelector=metadata.name%3Dleased", people::GROUP);
    let list = shop.get(&by_name).await.expect("its own prefix in a list");
    assert_eq!(list["items"].as_array().map(Vec::len), Some(1), "{list}");
    // Everybody reads their own.
    people.of("bank").get(&people::allocations("bank")).await.expect("its own allocations");
    people
        .of("agent")
        .get(&format!("{}/egressaddresses", people::GROUP))
        .await
        .expect("an agent reads addresses");
    let own = json!({"apiVersion": "aegis.dev/v1alpha1", "kind": "EgressNode", "metadata": {"name": "n1"}, "spec": {}});
    people.of("agent").apply(&format!("{}/egressnodes/n1", people::GROUP), own).await.expect("its own node");
    people.of("lender").get(&format!("{}/aegisprefixes", people::GROUP)).await.expect("all prefixes");
}

#[tokio::test]
async fn a_zone_is_switched_without_touching_the_rest() {
    let people = People::new().await;
    let bank = people.of("bank");
    let all = people::bindings("bank");
    for name in ["one", "two"] {
        let body = json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "ZoneBinding", "metadata": {"name": name},
            "spec": {
                "allocationRef": {"name": "standing"}, "workloads": {"podSelector": {"matchLabels": {"app": name}}},
                "zone": {"cidrs": ["198.51.100.0/24"], "ports": [{"port": 443}]}, "whenUnavailable": "UseNodeAddress",
            },
        });
        bank.create(&all, body).await.expect("a binding");
    }
    let read = async |name: &str| bank.get(&format!("{all}/{name}")).await.expect(name);
    let (one, two) = (read("one").await, read("two").await);
    for enabled in [false, true] {
        let patch = json!({"spec": {"enabled": enabled}});
        let switched = bank.patch(&format!("{all}/one"), patch).await.expect("its own binding");
        let mut expected = one["spec"].clone();
        expected["enabled"] = json!(enabled);
        assert_eq!(switched["spec"], expected);
        assert_eq!(read("two").await, two, "the other one is as it was");
    }
    for name in ["one", "two"] {
        bank.delete(&format!("{all}/{name}")).await.expect("delete");
    }
}

#[tokio::test]
async fn a_withdrawal_stands_in_the_way_of_no_other_change() {
    let people = People::new().await;
    let (lender, bank) = (people.of("lender"), people.of("bank"));
    // A prefix of its own: the other tests run at the same time.
    let path = format!("{}/aegisprefixes", people::GROUP);
    let prefix = |delegations: Value| {
        json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "AegisPrefix", "metadata": {"name": "passing"},
            "spec": {"cidr": "198.51.100.0/28", "account": "shop", "delegations": delegations},
        })
    };
    let given = json!([{"name": "bank", "account": "bank", "maxAddresses": 2}]);
    lender.create(&path, prefix(given.clone())).await.expect("a prefix");
    let own = people::allocations("bank");
    let spec = json!({"prefixes": ["passing"], "addresses": {"ipv4": 1}});
    people
        .eventually("the delegation is known", async || {
            bank.create(&own, allocation("passing", spec.clone())).await
        })
        .await;
    lender.patch(&format!("{path}/passing"), prefix_patch(json!([]))).await.expect("withdraw");
    let again = format!("{own}?dryRun=All");
    let refused = people.eventually("the withdrawal is known", async || {
        match bank.create(&again, allocation("again", spec.clone())).await {
            Ok(_) => Err("accepted".to_owned()),
            Err(error) => Ok(error),
        }
    });
    assert!(refused.await.contains("AegisPrefix passing is not delegated to account bank"));
    // What stands can be changed, grow, be read and get another prefix beside it; the API can't count, so that is a condition's.
    for change in [
        json!({"spec": {"addresses": {"ipv4": 2}}}),
        json!({"metadata": {"labels": {"a": "b"}}}),
        json!({"metadata": {"finalizers": ["aegis.dev/in-use"]}}),
        json!({"spec": {"prefixes": ["passing", "leased"]}}),
        json!({"spec": {"prefixes": ["leased", "passing"]}}),
        json!({"metadata": {"finalizers": []}}),
    ] {
        let changed = bank.patch(&format!("{own}/passing"), change.clone()).await;
        changed.unwrap_or_else(|error| panic!("{change}: {error}"));
    }
    // A prefix that was given up is not taken up again.
    bank.patch(&format!("{own}/passing"), json!({"spec": {"prefixes": ["leased"]}})).await.expect("give up");
    let error = bank.patch(&format!("{own}/passing"), json!({"spec": {"prefixes": ["passing"]}})).await;
    assert!(
        error
            .expect_err("refused")
            .contains("EgressAllocation bank/passing spec.prefixes: AegisPrefix passing")
    );
    bank.delete(&format!("{own}/passing")).await.expect("delete");
    lender.patch(&format!("{path}/passing"), prefix_patch(given)).await.expect("delegate again");
    people
        .eventually("the delegation is back", async || {
            bank.create(&again, allocation("again", spec.clone())).await
        })
        .await;
    lender.delete(&format!("{path}/passing")).await.expect("delete");
}
