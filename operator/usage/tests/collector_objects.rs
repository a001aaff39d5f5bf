//! What is told of allocations, addresses, policies and nodes, and to whom.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

mod support;

use aegis_usage::{Metrics, Retention, Store};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use serde_json::{Value, json};
use std::sync::Arc;
use support::objects::{People, cluster};
use support::{T0, figures, key, report};
use tempfile::TempDir;
use tower::ServiceExt as _;

const NOW: i64 = T0 + 3_600;

struct Service {
    router: Router,
    store: Arc<Store>,
    _folder: TempDir,
}

impl Service {
    fn new(people: People) -> Service {
        let (store, folder) = support::sqlite();
        let store = Arc::new(store);
        let router = aegis_usage::router(store.clone(), Arc::new(people), Arc::new(|| NOW), Metrics::new());
        Service { router, store, _folder: folder }
    }

    async fn ask(&self, token: &str, question: &str) -> Value {
        let request = Request::post("/v1/graphql").header(header::CONTENT_TYPE, "application/json");
        let request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        let body = Body::from(json!({ "query": question }).to_string());
        let response = self.router.clone().oneshot(request.body(body).unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        serde_json::from_slice(&to_bytes(response.into_body(), 1 << 24).await.unwrap()).unwrap()
    }
}

fn service() -> Service {
    Service::new(People(Some(Arc::new(cluster()))))
}

/// Of a list, one field of each.
fn each(answer: &Value, list: &str, field: &str) -> Vec<Value> {
    let nodes = answer["data"][list].as_array().unwrap_or_else(|| panic!("{answer}"));
    nodes.iter().map(|it| it[field].clone()).collect()
}

#[tokio::test]
async fn objects_are_told() {
    let service = service();
    let question = "{ now
        allocations { account name addresses firstPort lastPort targetPercent sites { name held } conditions { type since } }
        addresses { address account epoch first last held draining quarantined targetPercent
            holders { node held draining } slices { first last node site state until } }
        policies { order name action observes egress accounts matched destinations conditions { type reason } } }";
    let all = service.ask("admin", question).await;
    assert_eq!(all["data"]["now"], "2023-11-15T00:00:00Z", "{all}");
    assert_eq!(each(&all, "allocations", "account"), ["x", "y", "z"]);
    assert_eq!(each(&all, "addresses", "address"), ["192.0.2.1", "203.0.113.77", "2001:db8:1:2::/64"]);
    let first = &all["data"]["addresses"][0];
    assert_eq!(
        (&first["held"], &first["draining"], &first["quarantined"]),
        (&json!(22), &json!(2), &json!(1))
    );
    assert_eq!(first["holders"][2], json!({"node": "n2", "held": 8, "draining": 2}));
    let expected = json!({
        "first": 22, "last": 22, "node": "n3", "site": "x-site", "state": "QUARANTINED", "until": "2023-11-15T00:06:40Z",
    });
    assert_eq!(first["slices"][3], expected);
    assert_eq!(each(&all, "policies", "order"), [1, 2, 3, 4]);
    // Some of them.
    let some =
        service.ask("admin", "{ addresses(ranges: [\"2001:db8::/32\", \"192.0.2.1\"]) { address } }").await;
    assert_eq!(each(&some, "addresses", "address"), ["192.0.2.1", "2001:db8:1:2::/64"]);
    let some = service.ask("admin", "{ addresses(first: 1, after: \"192.0.2.1\") { address } }").await;
    assert_eq!(each(&some, "addresses", "address"), ["203.0.113.77"]);
    let some = service.ask("admin", "{ allocations(accounts: [\"z\"]) { account } }").await;
    assert_eq!(each(&some, "allocations", "account"), ["z"]);
    // Page by page.
    let some = service.ask("admin", "{ allocations(first: 1, after: \"x/partner\") { account } policies(first: 2, after: 1) { order } }").await;
    assert_eq!(each(&some, "allocations", "account"), ["y"]);
    assert_eq!(each(&some, "policies", "order"), [2, 3]);
    let wrong = service.ask("admin", "{ allocations(after: \"x\") { account } }").await;
    assert!(wrong["errors"].to_string().contains("not ACCOUNT/NAME"), "{wrong}");
    let wrong = service.ask("admin", "{ addresses(ranges: [\"here\"]) { address } }").await;
    assert!(wrong["errors"][0]["message"].as_str().unwrap().contains("no address"), "{wrong}");
    // A thousand with all of their slices would be more than anybody reads.
    let wide = service.ask("admin", "{ addresses(first: 1000) { slices { first last node } } }").await;
    assert!(wide["errors"].to_string().contains("complex"), "{wide}");
}

/// Only where it is asked for: its scripts come from elsewhere.
#[tokio::test]
async fn graphiql_is_for_developers() {
    let ask = |router: Router| async {
        let request = Request::get("/graphiql").body(Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        let status = response.status();
        let body = to_bytes(response.into_body(), 1 << 24).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    };
    let service = service();
    assert_eq!(ask(service.router.clone()).await.0, StatusCode::NOT_FOUND);
    let (status, page) = ask(service.router.merge(aegis_usage::graphiql())).await;
    assert!(status == StatusCode::OK && page.contains("url: \"v1/graphql\""), "{page}");
}

#[tokio::test]
async fn who_knows_nothing_says_so() {
    let service = Service::new(People(None));
    for question in ["{ allocations { name } }", "{ addresses { address } }", "{ policies { name } }"] {
        let answer = service.ask("admin", question).await;
        assert_eq!(answer["data"], Value::Null);
        assert!(answer["errors"].to_string().contains("not known at the moment"), "{answer}");
    }
}

#[tokio::test]
async fn silence_is_told_from_rest() {
    let service = service();
    let long = |node: &str, from: i64| aegis_usage_report::Report {
        from,
        to: from + 10,
        ..report(node, from as u64, vec![])
    };
    let rows = vec![(key("x", 1), figures(7, 1))];
    let mut reports = vec![report("n1", 357, rows), report("n1", 358, vec![]), report("n2", 300, vec![])];
    reports.extend([long("n4", T0 - 3 * 3_600), long("other", NOW - 10)]);
    service.store.ingest(&reports, NOW).unwrap();
    service.store.maintain(NOW, &Retention::default()).unwrap();
    let question = "{ reports(ranges: [\"192.0.2.1\"]) { node last } }";
    let answer = service.ask("account-x", question).await;
    let told: Vec<(Value, Value)> =
        each(&answer, "reports", "node").into_iter().zip(each(&answer, "reports", "last")).collect();
    let expected = [
        (support::objects::NASTY, Value::Null),
        ("n1", json!("2023-11-14T23:59:50Z")),
        ("n2", json!("2023-11-14T23:50:10Z")),
        ("n3", Value::Null),
        // To the minute, since it is long ago.
        ("n4", json!("2023-11-14T20:01:00Z")),
    ];
    assert_eq!(told, expected.map(|(node, last)| (json!(node), last)));
    let window = "level: TENS, from: \"2023-11-14T23:59:00Z\", to: \"2023-11-15T00:00:00Z\"";
    let asked = |more: &str| format!("{{ reported({window}, {more}) {{ at nodes seconds }} }}");
    let answer = service.ask("account-x", &asked("step: 60")).await;
    let expected = json!([{"at": "2023-11-14T23:59:00Z", "nodes": 1, "seconds": 20}]);
    assert_eq!(
        answer["data"]["reported"], expected,
        "n1 twice, and nothing of a node that x has nothing to do with"
    );
    let answer = service.ask("account-x", &asked("step: 10, nodes: [\"n2\", \"other\"]")).await;
    assert_eq!(answer["data"]["reported"], json!([]));
    for (more, said) in [("step: 7", "multiple"), ("step: 0", "multiple")] {
        let answer = service.ask("account-x", &asked(more)).await;
        assert!(answer["errors"][0]["message"].as_str().unwrap().contains(said), "{answer}");
    }
}

#[tokio::test]
async fn the_owner_of_a_prefix_sees_its_addresses_and_no_more() {
    let service = service();
    let question =
        "{ allocations { name } policies { name } addresses { address account holders { node } } }";
    let answer = service.ask("account-parent", question).await;
    assert_eq!(each(&answer, "addresses", "address"), ["192.0.2.1"]);
    assert_eq!(each(&answer, "addresses", "account"), ["x"]);
    assert_eq!((&answer["data"]["allocations"], &answer["data"]["policies"]), (&json!([]), &json!([])));
    // Those who may see several accounts name them.
    let both = service
        .ask("auditor", "{ addresses(accounts: [\"x\", \"y\", \"z\"]) { account } allocations { name } }")
        .await;
    assert_eq!(each(&both, "addresses", "account"), ["x", "y", "x"]);
    assert_eq!(both["data"]["allocations"], json!([]));
}

/// Everything that says something of account y, or of what is about everybody, and that account x must not get to see.
const SECRETS: [&str; 9] =
    ["203.0.113.77", "y-node", "y-site", "y-prefix", "y-policy", "y-app", "y-message", "no-mail", "\"y\""];

#[tokio::test]
async fn an_account_does_not_see_anothers_objects() {
    let service = service();
    service.store.ingest(&[report("y-node", 358, vec![])], NOW).unwrap();
    let condition = "conditions { type status reason message since }";
    let allocation =
        format!("{{ account name addresses sites {{ name nodes slices held }} targetPercent {condition} }}");
    let address = format!(
        "{{ address account allocation prefix epoch holders {{ node site held }} slices {{ first last node site state until }} {condition} }}"
    );
    let policy =
        format!("{{ order name precedence action egress accounts pods destinations matched {condition} }}");
    let window = "level: TENS, from: \"2023-11-14T23:59:00Z\", to: \"2023-11-15T00:00:00Z\", step: 10";
    let whole = format!(
        "allocations {allocation} addresses {address} policies {policy} reports {{ node last }} reported({window}) {{ at nodes seconds }}"
    );
    let all = service.ask("admin", &format!("{{ {whole} }}")).await.to_string();
    for secret in SECRETS {
        assert!(all.contains(secret), "{secret} is there to be found: {all}");
    }
    let mut attempts = vec![
        format!("{{ {whole} }}"),
        format!(
            "{{ a: allocations {allocation} b: allocations(accounts: [\"y\"]) {allocation} c: policies {policy} }}"
        ),
        format!("query Mine {{ ...All }} fragment All on Query {{ {whole} }}"),
        format!("{{ ... on Query {{ ... on Query {{ {whole} }} }} }}"),
        format!("{{ addresses {{ ...A }} }} fragment A on Address {address}"),
        format!("{{ policies {{ ...P }} }} fragment P on Policy {policy}"),
        format!(
            "{{ allocations {{ ...S conditions {{ ...C }} }} }} fragment S on Allocation {{ sites {{ name }} }} fragment C on Condition {{ message }}"
        ),
        format!(
            "query($it: [String!]! = [\"y\"]) {{ addresses(accounts: $it) {address} allocations(accounts: $it) {allocation} }}"
        ),
        format!("{{ addresses(after: \"192.0.2.1\", first: 1) {address} }}"),
        format!("{{ addresses(accounts: [\"x\"], ranges: [\"203.0.113.77\"]) {address} }}"),
        format!("{{ addresses @include(if: true) {address} policies @skip(if: false) {policy} }}"),
        format!("{{ reported({window}, nodes: [\"y-no\\u0064e\"]) {{ at nodes seconds }} }}"),
        "{ __type(name: \"Address\") { fields { name description args { name defaultValue } } } }".into(),
    ];
    for account in ["y", "x\\u0000y", "*", "", "Y", "x\\\", \\\"y"] {
        attempts.push(format!("{{ addresses(accounts: [\"{account}\"]) {address} }}"));
        attempts.push(format!("{{ allocations(accounts: [\"x\", \"{account}\"]) {allocation} }}"));
        attempts.push(format!("{{ policies(accounts: [\"{account}\"]) {policy} }}"));
        attempts.push(format!("{{ reports(accounts: [\"{account}\"]) {{ node last }} }}"));
    }
    for range in ["203.0.113.77", "203.0.113.0/24", "0.0.0.0/0", "::/0", "::ffff:203.0.113.77"] {
        attempts.push(format!("{{ addresses(ranges: [\"{range}\"]) {address} }}"));
        attempts.push(format!("{{ reports(ranges: [\"{range}\"]) {{ node last }} }}"));
        attempts.push(format!("{{ reported({window}, ranges: [\"{range}\"]) {{ nodes seconds }} }}"));
    }
    assert!(attempts.len() >= 50);
    for attempt in &attempts {
        let answer = service.ask("account-x", attempt).await;
        let text = answer.to_string();
        assert!(!text.contains("-->"), "a question that can be read: {text}");
        assert!(!SECRETS.iter().any(|secret| text.contains(secret)), "{attempt}\n{text}");
        let covered = answer["data"]["reported"].as_array().map_or(0, Vec::len);
        assert_eq!(covered, 0, "the only report is of the other's node: {attempt}\n{text}");
    }
    let shared = service.ask("account-x", &format!("{{ policies {policy} }}")).await;
    assert_eq!(each(&shared, "policies", "accounts"), [json!(["x"]), json!(["x"])]);
}
