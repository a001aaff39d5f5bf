//! What other nodes report is long, and an agent keeps hardly anything of it: it must not take much memory to read either.
#![allow(clippy::expect_used, reason = "helpers of tests fail the test")]

use aegis_node_agent::watch::{self, Shared};
use axum::Router;
use axum::extract::Request;
use kube::Client;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// More than the API server sends at a time unless it is asked for fewer.
const NODES: usize = 600;
const ADDRESSES: usize = 1_000;
/// Most that the watches may take, in KiB. Of 500 reports at a time it would be about 100 MiB.
const LIMIT: u64 = 48 * 1024;

/// A report about as long as that of a node which has been told of a thousand addresses. As text: what it takes to serve it
/// must not hide what it takes to read it.
fn report(index: usize, addresses: &str) -> String {
    let last = index % 256;
    format!(
        r#"{{"metadata":{{"name":"node-{index:04}","resourceVersion":"5"}},"spec":{{}},"status":{{"tunnelAddress":"192.0.2.{last}","addresses":[{addresses}]}}}}"#
    )
}

/// Pages of a list, as the API server cuts them.
fn list(query: &HashMap<String, String>, addresses: &str) -> String {
    let number = |name: &str| query.get(name).and_then(|text| text.parse::<usize>().ok());
    let first = number("continue").unwrap_or(0);
    let last = (first + number("limit").unwrap_or(NODES)).min(NODES);
    let more = if last < NODES { last.to_string() } else { String::new() };
    let items: Vec<String> = (first..last).map(|index| report(index, addresses)).collect();
    let items = items.join(",");
    format!(
        r#"{{"apiVersion":"aegis.dev/v1alpha1","kind":"EgressNodeList","metadata":{{"resourceVersion":"5","continue":"{more}"}},"items":[{items}]}}"#
    )
}

/// An API server that has these reports and nothing else.
fn server() -> Client {
    let addresses = (0..ADDRESSES).map(|it| {
        format!(r#"{{"address":"203.0.{}.{}","epoch":{}}}"#, it / 256, it % 256, 1_760_000_000 + it)
    });
    let addresses: Arc<str> = addresses.collect::<Vec<_>>().join(",").into();
    let answer = move |request: Request| {
        let addresses = Arc::clone(&addresses);
        async move {
            let query = request.uri().query().unwrap_or_default();
            let query: HashMap<String, String> = query
                .split('&')
                .filter_map(|it| it.split_once('='))
                .map(|(a, b)| (a.into(), b.into()))
                .collect();
            if query.contains_key("watch") {
                std::future::pending::<()>().await;
            }
            match request.uri().path().ends_with("/egressnodes") {
                true => list(&query, &addresses),
                false => r#"{"apiVersion":"v1","kind":"List","metadata":{"resourceVersion":"5"},"items":[]}"#
                    .into(),
            }
        }
    };
    Client::new(Router::new().fallback(answer), "default")
}

/// Resident memory at its highest, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse().expect("number")
}

#[tokio::test]
async fn reports_of_other_nodes_are_read_a_few_at_a_time() {
    let client = server();
    let before = peak();
    let shared = Shared::default();
    let _watches = watch::start(&client, "node-0000", &shared);
    for _ in 0..6_000 {
        if shared.lock().reports.listed {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(shared.lock().reports.objects.len(), NODES);
    let taken = peak() - before;
    println!("{taken} KiB");
    assert!(taken < LIMIT, "{taken} KiB for {NODES} reports");
}
