//! `kubectl aegis usage` against the collector: through the API server and a node, or at its address, as whoever may.

use crate::collector::{Collector, eventually, report, said};
use crate::kubelet::Kubelet;
use crate::objects;
use crate::world::{AUDIENCE, PEOPLE, World};
use aegis_cli::args::{Args, Command};
use aegis_tests::apiserver::NAMESPACE;
use aegis_usage_report::{Figures, Protocol, Report, Row, Volume};
use clap::Parser;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;

/// Account of people who have nothing but what the page names.
const READER: &str = "aegis-collector-reader";

/// Figures of the command, and how GraphQL is asked for the same.
const FIGURES: [(&str, &str, &str); 9] = [
    ("peak", "PEAK", "MAX"),
    ("inUse", "IN_USE", "AVG"),
    ("inUseMax", "IN_USE_MAX", "MAX"),
    ("flows", "FLOWS", "SUM"),
    ("refused", "REFUSED", "SUM"),
    ("sentPackets", "SENT_PACKETS", "SUM"),
    ("sentBytes", "SENT_BYTES", "SUM"),
    ("receivedPackets", "RECEIVED_PACKETS", "SUM"),
    ("receivedBytes", "RECEIVED_BYTES", "SUM"),
];

/// What the command says to this line, with these credentials.
async fn try_usage(kubeconfig: &Path, line: &str) -> Result<String, String> {
    let kubeconfig = kubeconfig.to_str().expect("UTF-8");
    let words = ["kubectl-aegis", "--kubeconfig", kubeconfig, "usage"];
    let args = Args::try_parse_from(words.into_iter().chain(line.split_whitespace())).expect(line);
    let Command::Usage(how) = args.command else { panic!("{line}") };
    aegis_cli::usage::run(&args.connection, &how).await.map_err(|error| format!("{error:#}"))
}

async fn usage(kubeconfig: &Path, line: &str) -> String {
    try_usage(kubeconfig, line).await.unwrap_or_else(|error| panic!("{line}: {error}"))
}

async fn usage_json(kubeconfig: &Path, line: &str) -> Value {
    serde_json::from_str(&usage(kubeconfig, &format!("{line} -o json")).await).expect("JSON")
}

/// Slots of a window, of which each node reports all but the third. What is in them differs from row to row.
fn load(node: &str, accounts: &[&str], from: i64) -> Vec<Report> {
    let mut reports = Vec::new();
    for slot in (0..12_u64).filter(|slot| *slot != 3) {
        let mut of_slot = report(node, slot + 1, accounts);
        of_slot.from = from + 10 * i64::try_from(slot).expect("a slot");
        of_slot.to = of_slot.from + 10;
        let mut rows: Vec<Row> = Vec::new();
        for (number, row) in of_slot.rows.iter().enumerate() {
            for origin in 1..=3_u64 {
                let seed = (slot + 1) * 7 + origin * 31 + number as u64 * 101;
                let mut row = row.clone();
                row.key.origin = Some(SocketAddr::from(([198, 51, 100, origin as u8], 443)));
                row.key.protocol = if origin == 3 { Protocol::Udp } else { Protocol::Tcp };
                row.figures = Figures {
                    in_use: seed % 97,
                    peak: seed % 97 + origin,
                    flows: seed * 3,
                    refused: match seed % 3 {
                        0 => [("no_port".to_owned(), seed), ("pod_rate".to_owned(), 2)].into(),
                        _ => BTreeMap::new(),
                    },
                    sent: Volume { packets: seed * 10, bytes: seed * 12_345 },
                    received: Volume { packets: seed * 11, bytes: seed * 1_234_567 },
                };
                rows.push(row);
            }
        }
        of_slot.rows = rows;
        reports.push(of_slot);
    }
    reports
}

/// A figure to the last digit; a mean to more digits than there are reports, since reading it twice may change the last.
fn exactly(figure: &Value) -> String {
    format!("{:.9}", figure.as_f64().unwrap_or_else(|| panic!("{figure} is no figure")))
}

/// The collector's own answer to what the command asks: figures by group, and step if there are some.
async fn asked(collector: &Collector, token: &str, window: &str, by: &str, step: &str) -> BTreeSet<String> {
    let figures = FIGURES
        .map(|(_, measure, aggregation)| format!("{{measure: {measure}, aggregation: {aggregation}}}"));
    let question = format!(
        "{{ usage({window}, {step} by: [{by}], first: 1000, figures: [{}]) {{ nodes {{ by at slots figures }} }} }}",
        figures.join(", ")
    );
    let (_, answer) = collector.ask(token, &question).await;
    let nodes = answer["data"]["usage"]["nodes"].as_array().unwrap_or_else(|| panic!("{answer}"));
    let line = |node: &Value| {
        let at = if step.is_empty() { Value::Null } else { node["at"].clone() };
        let figures: Vec<String> = node["figures"].as_array().expect("figures").iter().map(exactly).collect();
        format!("{} {at} {} {figures:?}", node["by"], node["slots"])
    };
    nodes.iter().map(line).collect()
}

/// The same of what the command says; steps in which there was nothing are left out, as the collector leaves them out.
fn told(answer: &Value, by: &[&str]) -> BTreeSet<String> {
    let rows = answer["rows"].as_array().unwrap_or_else(|| panic!("{answer}"));
    let line = |row: &Value| {
        let group: Vec<&Value> = by.iter().map(|name| &row["group"][*name]).collect();
        let figures: Vec<String> = FIGURES.iter().map(|(name, ..)| exactly(&row["figures"][name])).collect();
        format!("{} {} {} {figures:?}", json!(group), row["at"], row["slots"])
    };
    rows.iter().filter(|row| row["slots"] != 0).map(line).collect()
}

/// Makes a node of which the API server reaches the kubelet, with the collector's pod on it.
fn node_and_pod(world: &World, kubelet: &Kubelet) {
    let status = json!({"status": {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet.port}},
    }});
    let patch = |arguments: &[&str], patch: &Value| {
        let text = patch.to_string();
        let arguments =
            [&["patch"], arguments, &["--subresource=status", "--type=merge", "-p", &text]].concat();
        world.api.kubectl(&arguments).expect("status");
    };
    patch(&["node", "n1"], &status);
    let labels = json!({"app.kubernetes.io/name": "aegis-collector"});
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "aegis-collector-0", "namespace": NAMESPACE, "labels": labels},
        "spec": {
            "nodeName": "n1", "automountServiceAccountToken": false, "serviceAccountName": "aegis-collector",
            "containers": [{"name": "collector", "image": "collector", "ports": [{"name": "https", "containerPort": 8443}]}],
        },
    });
    world.api.provide(&pod.to_string()).expect("pod");
    let ready = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    patch(&["pod", "aegis-collector-0", "-n", NAMESPACE], &ready);
}

/// Addresses with nodes that hold their slices, for as long as this is there.
struct Addresses<'a>(&'a World);

impl<'a> Addresses<'a> {
    fn make(world: &'a World) -> Addresses<'a> {
        let items =
            [objects::address("192.0.2.1", "x", "n1"), objects::address("203.0.113.77", "y", "y-node")];
        world
            .api
            .provide(&json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string())
            .expect("addresses");
        Addresses(world)
    }
}

impl Drop for Addresses<'_> {
    fn drop(&mut self) {
        let _ = self.0.api.kubectl(&["delete", "eaddr", "--all", "--wait=false"]);
    }
}

fn address(collector: &Collector) -> SocketAddr {
    let line = said(&collector.log, "reports are taken").expect("log");
    line["address"].as_str().expect("address").parse().expect("an address")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_says_what_graphql_says_to_those_who_may_know() {
    let world = World::start().await;
    let kubelet = Kubelet::start(&world.folder()).await;
    node_and_pod(&world, &kubelet);
    let _addresses = Addresses::make(&world);
    let mut plain = Collector::start(&world, &[]).await;
    let now = jiff::Timestamp::now().as_second();
    let from = now / 60 * 60 - 600;
    for (node, accounts) in [("n1", &["x", "y"][..]), ("y-node", &["y"])] {
        let (status, answer) = plain.deliver(&world.agent(node).await, &load(node, accounts, from)).await;
        assert_eq!(answer.matches("stored").count(), 11, "{status} {answer}");
    }
    let at = |second: i64| jiff::Timestamp::from_second(second).expect("time");
    let window = format!("from: \"{}\", to: \"{}\"", at(from), at(from + 120));
    let platform = world.person("platform").await;
    let by = "ACCOUNT, ALLOCATION, ADDRESS, ORIGIN, PROTOCOL";
    let groups = asked(&plain, &platform, &window, by, "").await;
    let steps = asked(&plain, &platform, &window, "NODE", "step: 10,").await;
    let of_x = asked(
        &plain,
        &platform,
        &format!("{window}, filter: {{accounts: [\"x\"], origins: [\"198.51.100.0/31\"]}}"),
        "RULE, NODE",
        "",
    )
    .await;
    assert_eq!((groups.len(), steps.len(), of_x.len()), (6, 22, 1));
    let store = plain.folder.clone();
    plain.process.signal(Signal::SIGTERM);
    assert!(plain.process.wait());

    let (tls, arguments) = world.certificate("usage-tls").await;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(["--api-tokens"]).collect();
    let collector = Collector::start_in(&world, store, &arguments).await;
    let to = address(&collector);
    *kubelet.behind.lock().expect("lock") = Some(to);
    let admin = world.api.kubeconfig();
    let line = format!("--from {} --to {}", at(from), at(from + 120));

    // Somebody with all rights, as the chart's reader, through the API server and the node.
    let names = ["account", "allocation", "address", "origin", "protocol"];
    let answer = eventually("addresses are known", async || {
        let answer = usage_json(&admin, &format!("-A {line}")).await;
        if answer["coverage"]["nodes"] == 2 { Ok(answer) } else { Err(answer.to_string()) }
    })
    .await;
    assert_eq!(told(&answer, &names), groups, "{answer}");
    assert!(
        kubelet
            .asked
            .lock()
            .expect("lock")
            .iter()
            .all(|it| it == "/portForward/aegis-system/aegis-collector-0?port=8443")
    );
    let coverage = &answer["coverage"];
    assert_eq!(
        (&coverage["reportedSeconds"], &coverage["wantedSeconds"]),
        (&220.into(), &240.into()),
        "{coverage}"
    );
    let unknown = json!([{"from": at(from + 30).to_string(), "to": at(from + 40).to_string()}]);
    assert_eq!(coverage["unknown"], unknown, "nobody reported the fourth slot");
    let row = &answer["rows"][0];
    assert!(row["ports"] == 64_512 && row["fillPercent"].as_f64().is_some_and(|it| it > 0.0), "{row}");
    let whole: u64 = answer["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .filter_map(|row| row["figures"]["refused"].as_u64())
        .sum();
    let by_reason = |row: &Value| -> u64 {
        row["refusedBy"].as_object().map_or(0, |it| it.values().filter_map(Value::as_u64).sum())
    };
    let reasons: u64 = answer["rows"].as_array().expect("rows").iter().map(by_reason).sum();
    assert!(whole > 0 && whole == reasons, "{whole} refusals, {reasons} with a reason");

    // Time told apart: the slot of which nobody knows is no rest.
    let answer = usage_json(&admin, &format!("-A {line} --by node --step 10s")).await;
    assert_eq!(told_known(&answer, &["node"]), steps, "{answer}");
    let missing: Vec<&Value> =
        answer["rows"].as_array().expect("rows").iter().filter(|row| row["figures"].is_null()).collect();
    assert!(
        missing.len() == 2 && missing.iter().all(|row| row["at"] == at(from + 30).to_string()),
        "{answer}"
    );
    let table = usage(&admin, &format!("-A {line} --by node --step 10s")).await;
    assert!(table.contains("nothing") && table.contains("not known, since no node reported"), "{table}");

    // Filters are the collector's.
    let answer = usage_json(&admin, &format!("-n x {line} --by rule,node --origin 198.51.100.0/31")).await;
    assert_eq!(told(&answer, &["rule", "node"]), of_x, "{answer}");
    people(&world, &kubelet, &collector, &tls, &line).await;
    let log = std::fs::read_to_string(&collector.log).expect("log");
    assert!(!log.contains("eyJ"), "no token is in the log: {log}");
}

/// As [`told`], of rows that are known.
fn told_known(answer: &Value, by: &[&str]) -> BTreeSet<String> {
    let mut known = answer.clone();
    known["rows"].as_array_mut().expect("rows").retain(|row| !row["figures"].is_null());
    told(&known, by)
}

async fn people(world: &World, kubelet: &Kubelet, collector: &Collector, tls: &Path, line: &str) {
    let kubectl = |arguments: &[&str]| world.api.kubectl(arguments).expect("kubectl");
    // The owner of an account with the rights that the page names, and no others.
    let direct = world.token(&format!("{PEOPLE}/x"), "", None).await;
    let x = world.api.kubeconfig_of("usage-x", &direct).expect("kubeconfig");
    let own = format!("-n x {line}");
    let refused = try_usage(&x, &own).await.expect_err("no right to reach it");
    assert!(
        refused.contains("pods may not be listed") && refused.contains("Role aegis-collector-client"),
        "{refused}"
    );
    kubectl(&[
        "create",
        "rolebinding",
        "usage-x",
        "-n",
        NAMESPACE,
        "--role=aegis-collector-client",
        "--serviceaccount=people:x",
    ]);
    let no_token = eventually("the right counts", async || match try_usage(&x, &own).await {
        Err(error) if error.contains("there is no token for the collector") => Ok(error),
        other => Err(format!("{other:?}")),
    })
    .await;
    for way in [
        "you may not create serviceaccounts/token",
        "kubectl create serviceaccount",
        "--token-file",
        "usage.apiTokens",
    ] {
        assert!(no_token.contains(way), "{way}: {no_token}");
    }
    // What that error proposes.
    kubectl(&["create", "serviceaccount", READER, "-n", "x"]);
    kubectl(&[
        "create",
        "rolebinding",
        READER,
        "-n",
        "x",
        "--clusterrole=aegis-viewer",
        "--serviceaccount=x:aegis-collector-reader",
    ]);
    kubectl(&[
        "create",
        "role",
        "asks",
        "-n",
        "x",
        "--verb=create",
        "--resource=serviceaccounts/token",
        &format!("--resource-name={READER}"),
    ]);
    kubectl(&["create", "rolebinding", "asks", "-n", "x", "--role=asks", "--serviceaccount=people:x"]);
    let seen = eventually("the account's reader sees it", async || {
        match try_usage(&x, &format!("{own} -o json")).await {
            Ok(text) if text.contains("198.51.100.1:443") => Ok(text),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert!(!seen.contains("203.0.113.77"), "nothing of y: {seen}");
    let others = try_usage(&x, &format!("-n y {line}")).await.expect_err("there is no reader of y for x");
    assert!(others.contains("there is no token for the collector"), "{others}");
    let others = usage(&x, &format!("-n y {line} --service-account x/{READER}")).await;
    assert!(others.contains("nothing of it is yours to see"), "{others}");

    // With the token that one has anyway, where the platform lets the collector take it.
    let told = json!({"data": {"apiTokens": "true"}}).to_string();
    kubectl(&["patch", "configmap", "aegis-collector", "-n", NAMESPACE, "--type=merge", "-p", &told]);
    let own_token = usage(&x, &format!("{own} --by account")).await;
    assert!(own_token.contains("\nx "), "{own_token}");
    kubectl(&[
        "patch",
        "configmap",
        "aegis-collector",
        "-n",
        NAMESPACE,
        "--type=merge",
        "-p",
        &told.replace("true", "false"),
    ]);

    // At its address, with a token in a file, without any cluster.
    let nowhere = Path::new("/nonexistent");
    let (token, authority) = (tls.join("token"), tls.join("ca.crt"));
    std::fs::write(&token, world.token(&format!("{PEOPLE}/platform"), AUDIENCE, None).await).expect("write");
    let url = format!("https://{}", address(collector));
    let by_address = format!("-A {line} --by account --collector {url} --token-file {}", token.display());
    let trusted = format!("{by_address} --ca-file {}", authority.display());
    let both = usage(nowhere, &trusted).await;
    assert!(both.contains("\nx ") && both.contains("\ny "), "{both}");
    let untrusted = try_usage(nowhere, &by_address).await.expect_err("not by an authority of the system");
    assert!(untrusted.contains("cannot be trusted") && untrusted.contains("--ca-file"), "{untrusted}");
    std::fs::write(&token, world.expired(&world.person("platform").await)).expect("write");
    let expired = try_usage(nowhere, &trusted).await.expect_err("it is over");
    assert!(
        expired.contains("does not take the token of") && expired.contains("kubectl create token"),
        "{expired}"
    );

    // What is wrong on the way.
    let admin = world.api.kubeconfig();
    let other = tls.join("tls.crt");
    let stranger = try_usage(&admin, &format!("{own} --ca-file {}", other.display())).await;
    assert!(
        stranger
            .as_ref()
            .is_err_and(|it| it.contains("is not the aegis-collector.aegis-system.svc that is trusted")),
        "{stranger:?}"
    );
    *kubelet.behind.lock().expect("lock") = None;
    let nobody = try_usage(&admin, &own).await.expect_err("nobody listens");
    assert!(nobody.contains("is not forwarded: nobody listens in the pod"), "{nobody}");
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}).to_string();
    kubectl(&[
        "patch",
        "pod",
        "aegis-collector-0",
        "-n",
        NAMESPACE,
        "--subresource=status",
        "--type=merge",
        "-p",
        &unready,
    ]);
    let unready = try_usage(&admin, &own).await.expect_err("it is not ready");
    assert!(unready.contains("pod aegis-collector-0 is not ready"), "{unready}");
    kubectl(&["delete", "pod", "aegis-collector-0", "-n", NAMESPACE, "--force", "--grace-period=0"]);
    let gone = try_usage(&admin, &own).await.expect_err("there is none");
    assert!(gone.contains("usage.enabled=true"), "{gone}");
    for (kind, name, namespace) in [
        ("rolebinding", "usage-x", NAMESPACE),
        ("serviceaccount", READER, "x"),
        ("rolebinding", READER, "x"),
        ("rolebinding", "asks", "x"),
        ("role", "asks", "x"),
    ] {
        kubectl(&["delete", kind, name, "-n", namespace]);
    }
}
