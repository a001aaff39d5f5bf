//! What is served, and to whom.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use aegis_usage::{Access, Denied, Level, Metrics, Pending, Prefix, Store, Viewer};
use aegis_usage_report::{Figures, Key, Report};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use serde_json::{Value, json};
use std::sync::Arc;
use support::{T0, figures, key, report};
use tempfile::TempDir;
use tower::ServiceExt as _;

const NOW: i64 = T0 + 3_600;

/// Tokens whose words say whose they are.
struct Words;

impl Access for Words {
    fn node<'a>(&'a self, token: &'a str) -> Pending<'a, Result<String, Denied>> {
        Box::pin(async move {
            match token.strip_prefix("agent-of-") {
                Some(node) => Ok(node.into()),
                None if token == "lost" => Err(Denied::Unavailable),
                None if token.starts_with("account-") => Err(Denied::Forbidden),
                None => Err(Denied::Unknown),
            }
        })
    }

    fn viewer<'a>(&'a self, token: &'a str, accounts: &'a [String]) -> Pending<'a, Result<Viewer, Denied>> {
        Box::pin(async move {
            match token.strip_prefix("account-") {
                _ if token == "admin" => Ok(Viewer { all: true, ..Viewer::default() }),
                // May see two accounts, if they are asked for.
                _ if token == "auditor" => {
                    let asked = accounts.iter().filter(|it| ["x", "y"].contains(&it.as_str())).cloned();
                    Ok(Viewer { all: false, accounts: asked.collect() })
                }
                Some(account) => Ok(Viewer { all: false, accounts: [account.to_string()].into() }),
                None if token == "lost" => Err(Denied::Unavailable),
                None if token.starts_with("agent-of-") => Err(Denied::Forbidden),
                None => Err(Denied::Unknown),
            }
        })
    }

    fn renews<'a>(&'a self, _: &'a str, _: &'a str) -> Pending<'a, Result<bool, Denied>> {
        Box::pin(async { Err(Denied::Unknown) })
    }

    fn prefixes(&self) -> Vec<Prefix> {
        vec![Prefix { range: "192.0.2.0/28".parse().unwrap(), account: "parent".into(), since: Some(0) }]
    }
}

struct Service {
    router: Router,
    store: Arc<Store>,
    folder: TempDir,
}

impl Service {
    fn new() -> Service {
        let (store, folder) = support::sqlite();
        let store = Arc::new(store);
        let router = aegis_usage::router(store.clone(), Arc::new(Words), Arc::new(|| NOW), Metrics::new());
        Service { router, store, folder }
    }

    async fn send(&self, request: Request<Body>) -> (StatusCode, String) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let body = to_bytes(response.into_body(), 1 << 24).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn post(&self, path: &str, token: &str, body: String) -> (StatusCode, String) {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        let request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        self.send(request.body(Body::from(body)).unwrap()).await
    }

    async fn deliver(&self, token: &str, reports: &[Report]) -> (StatusCode, String) {
        self.post("/v1/reports", token, serde_json::to_string(reports).unwrap()).await
    }

    async fn ask(&self, token: &str, question: &str) -> (StatusCode, Value) {
        let (status, body) = self.post("/v1/graphql", token, json!({ "query": question }).to_string()).await;
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }
}

/// Selects of the hour of T0.
fn usage(arguments: &str) -> String {
    let window = r#"from: "2023-11-14T23:00:00Z", to: "2023-11-15T00:00:00Z", level: TENS"#;
    format!(
        "{{ usage({window}, {arguments}) {{ nodes {{ by at slots figures }} pageInfo {{ endCursor hasNextPage }} }} }}"
    )
}

/// What a question selects.
fn field(question: &str) -> &str {
    question.strip_prefix("{ ").and_then(|it| it.strip_suffix(" }")).unwrap()
}

const IN_USE: &str = "figures: [{measure: IN_USE, aggregation: MAX}]";

#[tokio::test]
async fn agents_report_for_their_own_node() {
    let service = Service::new();
    let one = report("node-a", 0, vec![(key("x", 1), figures(7, 1))]);
    let newer = Report { version: 9, ..one.clone() };
    let ahead = Report { sequence: 3, from: NOW + 9_000, to: NOW + 9_010, ..one.clone() };
    let (status, told) = service.deliver("agent-of-node-a", &[one.clone(), one.clone(), newer, ahead]).await;
    assert_eq!(status, StatusCode::OK);
    let told: Vec<Value> = serde_json::from_str(&told).unwrap();
    let outcomes: Vec<&str> = told.iter().map(|it| it["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["stored", "repeated", "invalid", "stored"]);
    assert!(told[2]["reason"].as_str().unwrap().contains("update the collector"));
    for (token, expected) in [
        ("agent-of-node-b", StatusCode::FORBIDDEN),
        ("account-x", StatusCode::FORBIDDEN),
        ("expired", StatusCode::UNAUTHORIZED),
        ("", StatusCode::UNAUTHORIZED),
        ("lost", StatusCode::SERVICE_UNAVAILABLE),
    ] {
        assert_eq!(service.deliver(token, std::slice::from_ref(&one)).await.0, expected, "{token}");
    }
    // Nobody sends much before it is known who they are.
    let much = || "x".repeat(17 << 20);
    assert_eq!(service.post("/v1/reports", "expired", much()).await.0, StatusCode::UNAUTHORIZED);
    let (status, _) = service.post("/v1/reports", "agent-of-node-a", much()).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    let many = vec![one; 65];
    assert_eq!(service.deliver("agent-of-node-a", &many).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    let text = service.post("/v1/reports", "agent-of-node-a", "{}".into()).await;
    assert_eq!(text.0, StatusCode::BAD_REQUEST);
}

/// While the store cannot be written, a bounded number of deliveries waits, and the others are told to come again.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_store_pushes_back() {
    let service = Arc::new(Service::new());
    let other = rusqlite::Connection::open(service.folder.path().join("usage.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let deliver = |number| {
        let service = service.clone();
        let report = Report { from: T0, to: T0 + 10, ..report("node-a", number, vec![]) };
        tokio::spawn(async move { service.deliver("agent-of-node-a", &[report]).await.0 })
    };
    let mut tasks: Vec<_> = (0..500).map(deliver).collect();
    // Some are sent away at once, while all that wait still do.
    while !tasks.iter().any(tokio::task::JoinHandle::is_finished) {
        tokio::task::yield_now().await;
    }
    let at = tasks.iter().position(tokio::task::JoinHandle::is_finished).unwrap();
    assert_eq!(tasks.remove(at).await.unwrap(), StatusCode::SERVICE_UNAVAILABLE);
    other.execute_batch("COMMIT").unwrap();
    let mut taken = 0;
    for task in tasks {
        taken += i64::from(task.await.unwrap() == StatusCode::OK);
    }
    let stored = service.store.coverage(Level::Tens, T0, T0 + 10, 1).unwrap();
    assert_eq!(stored[0].samples, taken, "what was taken is stored, and nothing else");
}

/// Deliveries take room until they are stored, whether somebody waits for the answer or not; those that don't say how much they are as much as they
/// may be. Without room they are sent away.
#[tokio::test(flavor = "multi_thread")]
async fn deliveries_that_wait_are_bounded_by_bytes() {
    let service = Service::new();
    let other = rusqlite::Connection::open(service.folder.path().join("usage.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let text = |number| serde_json::to_string(&[report("node-a", number, vec![])]).unwrap();
    let send = |body: Body| {
        let request = Request::post("/v1/reports").header(header::AUTHORIZATION, "Bearer agent-of-node-a");
        service.router.clone().oneshot(request.body(body).unwrap())
    };
    let mut waiting = Vec::new();
    for number in 0..8 {
        let part = futures::stream::once(std::future::ready(Ok::<_, std::convert::Infallible>(text(number))));
        let mut sent = Box::pin(send(Body::from_stream(part)));
        assert!(futures::poll!(&mut sent).is_pending(), "16 MiB of 128");
        waiting.push(sent);
    }
    // Some hang up.
    waiting.truncate(3);
    let refused = send(Body::from(text(8))).await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers().contains_key(header::RETRY_AFTER));
    other.execute_batch("COMMIT").unwrap();
    for sent in waiting {
        assert_eq!(sent.await.unwrap().status(), StatusCode::OK);
    }
    // There is room again once the last of them are stored.
    while send(Body::from(text(8))).await.unwrap().status() != StatusCode::OK {
        tokio::task::yield_now().await;
    }
    let stored = service.store.coverage(Level::Tens, T0, T0 + 90, 100).unwrap();
    assert_eq!(stored.len(), 9);
}

#[tokio::test]
async fn questions_are_answered() {
    let service = Service::new();
    let rows =
        vec![(key("x", 1), figures(7, 1)), (key("x", 2), figures(30, 1)), (key("y", 1), figures(4, 1))];
    service.deliver("agent-of-node-a", &[report("node-a", 0, rows)]).await;
    let arguments = format!("by: [ACCOUNT, ORIGIN], order: HIGHEST, first: 2, {IN_USE}");
    let (status, answer) = service.ask("admin", &usage(&arguments)).await;
    assert_eq!(status, StatusCode::OK);
    let nodes = &answer["data"]["usage"]["nodes"];
    let expected = json!([
        { "by": ["x", "198.51.100.2:443"], "at": "2023-11-14T23:00:00Z", "slots": 1, "figures": [30.0] },
        { "by": ["x", "198.51.100.1:443"], "at": "2023-11-14T23:00:00Z", "slots": 1, "figures": [7.0] },
    ]);
    assert_eq!(nodes, &expected, "{answer}");
    let cursor = answer["data"]["usage"]["pageInfo"]["endCursor"].as_str().unwrap();
    let (_, answer) = service.ask("admin", &usage(&format!("after: \"{cursor}\", {arguments}"))).await;
    assert_eq!(answer["data"]["usage"]["nodes"][0]["by"], json!(["y", "198.51.100.1:443"]));
    assert_eq!(answer["data"]["usage"]["pageInfo"]["hasNextPage"], json!(false));
    // Those who may see several accounts name them.
    let both = format!("by: [ACCOUNT], filter: {{accounts: [\"x\", \"y\", \"z\"]}}, {IN_USE}");
    let (_, answer) = service.ask("auditor", &usage(&both)).await;
    assert_eq!(answer["data"]["usage"]["nodes"].as_array().unwrap().len(), 2);
    let (_, answer) = service.ask("auditor", &usage(&format!("by: [ACCOUNT], {IN_USE}"))).await;
    assert_eq!(answer["data"]["usage"]["nodes"], json!([]));
    let window = r#"from: "2023-11-14T23:00:00Z", to: "2023-11-15T00:00:00Z""#;
    let (_, answer) = service
        .ask(
            "admin",
            &format!(
                "{{ coverage(level: TENS, {window}) {{ node at seconds }} gaps({window}) {{ first }} }}"
            ),
        )
        .await;
    assert_eq!(answer["data"]["coverage"][0]["seconds"], json!(10), "{answer}");
    // What is wrong is said.
    for (arguments, said) in [
        (format!("step: 7, {IN_USE}"), "multiple"),
        ("figures: []".into(), "figures are asked"),
        ("figures: [{measure: PEAK, aggregation: QUANTILE}]".into(), "thousandths"),
        (format!("filter: {{addresses: [\"here\"]}}, {IN_USE}"), "no address"),
        (format!("first: 1001, {IN_USE}"), "1 to 1000"),
    ] {
        let (_, answer) = service.ask("admin", &usage(&arguments)).await;
        assert!(answer["errors"][0]["message"].as_str().unwrap().contains(said), "{answer}");
    }
}

#[tokio::test]
async fn the_parent_sees_use_of_its_prefix_without_pods() {
    let service = Service::new();
    let elsewhere = Key { address: Some([203, 0, 113, 9].into()), ..key("tenant", 9) };
    let rows = vec![(key("tenant", 1), figures(7, 1)), (elsewhere, figures(9, 1))];
    service.deliver("agent-of-node-a", &[report("node-a", 0, rows)]).await;
    let (_, answer) =
        service.ask("account-parent", &usage(&format!("by: [ACCOUNT, ADDRESS, POD], {IN_USE}"))).await;
    let nodes = answer["data"]["usage"]["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 1, "{answer}");
    assert_eq!(nodes[0]["by"], json!(["tenant", "192.0.2.1", ""]));
    let named = format!("by: [ACCOUNT], filter: {{accounts: [\"tenant\"]}}, {IN_USE}");
    let (_, answer) = service.ask("account-parent", &usage(&named)).await;
    assert_eq!(answer["data"]["usage"]["nodes"][0]["figures"], json!([7.0]));
}

/// Everything that says something of account y, and that account x must not get to see.
const SECRETS: [&str; 6] = ["y-pod", "203.0.113.77", "198.51.100.66", "y-rule", "y-node", "4242"];

fn of_y() -> (Key, Figures) {
    let key = Key {
        address: Some([203, 0, 113, 77].into()),
        origin: Some(([198, 51, 100, 66], 443).into()),
        rule: "binding/y-rule".into(),
        ..key("y", 1)
    };
    (key, Figures { refused: [("y-reason".to_string(), 4_242)].into(), ..figures(4_242, 4_242) })
}

#[tokio::test]
async fn an_account_does_not_see_another() {
    let service = Service::new();
    service.deliver("agent-of-node-a", &[report("node-a", 0, vec![(key("x", 1), figures(7, 1))])]).await;
    service.deliver("agent-of-y-node", &[report("y-node", 0, vec![of_y()])]).await;
    let (_, whole) =
        service.ask("account-y", &usage(&format!("by: [POD, ADDRESS, ORIGIN, RULE, NODE], {IN_USE}"))).await;
    for secret in SECRETS {
        assert!(whole.to_string().contains(secret), "{secret} is there to be found: {whole}");
    }
    let next = usage(&format!("by: [ACCOUNT, POD, NODE], first: 1, {IN_USE}"));
    let cursor = service.ask("admin", &next).await.1["data"]["usage"]["pageInfo"]["endCursor"].to_string();

    let every = "by: [ADDRESS, ACCOUNT, ALLOCATION, RULE, SITE, NODE, ORIGIN, PROTOCOL, POD, REASON]";
    let mut attempts: Vec<String> = Vec::new();
    let filters = [
        "accounts: [\"y\"]",
        "accounts: [\"x\", \"y\"]",
        "accounts: [\"x\\u0000\", \"y\"]",
        "accounts: [\"y' OR '1'='1\"]",
        "accounts: [\"\"]",
        "accounts: [\"*\"]",
        "accounts: [\"%\"]",
        "addresses: [\"203.0.113.77\"]",
        "addresses: [\"0.0.0.0/0\"]",
        "addresses: [\"::/0\"]",
        "addresses: [\"::ffff:203.0.113.77\"]",
        "origins: [\"198.51.100.66:443\"]",
        "origins: [\"other\"]",
        "origins: [\"0.0.0.0/0\"]",
        "rules: [\"binding/y-rule\"]",
        "nodes: [\"y-node\"]",
        "pods: [\"y-pod\"]",
        "pods: [\"\"]",
        "reasons: [\"y-reason\"]",
        "reasons: [\"\"]",
        "allocations: [\"partner\"]",
        "sites: [\"east\"]",
        "protocols: [TCP]",
    ];
    attempts.extend(filters.iter().map(|filter| usage(&format!("{every}, filter: {{{filter}}}, {IN_USE}"))));
    for measure in ["IN_USE", "IN_USE_MAX", "PEAK", "FLOWS", "REFUSED", "SENT_BYTES", "RECEIVED_BYTES"] {
        attempts.push(usage(&format!("figures: [{{measure: {measure}, aggregation: SUM}}]")));
        let highest =
            "order: HIGHEST, by: [REASON], figures: [{measure: M, aggregation: QUANTILE, thousandths: 1000}]";
        attempts.push(usage(&highest.replace("measure: M", &format!("measure: {measure}"))));
    }
    attempts.push(usage(&format!("{every}, step: 10, {IN_USE}")));
    attempts.push(usage(&format!("{every}, level: MINUTES, {IN_USE}").replace("level: TENS, ", "")));
    attempts.push(usage(&format!("by: [ACCOUNT, POD, NODE], first: 1, after: {cursor}, {IN_USE}")));
    let inner = usage(&format!("{every}, filter: {{accounts: [\"y\"]}}, {IN_USE}"));
    let field = field(&inner);
    attempts.push(format!("{{ x: {field} y: {field} }} "));
    attempts.push(format!("query Mine {{ ...All }} fragment All on Query {{ {field} }}"));
    attempts.push(format!("{{ ... on Query {{ {field} }} }}"));
    attempts.push(format!("query {{ {} }}", field.replace(") { nodes", ") @include(if: true) { nodes")));
    attempts.push("{ __schema { types { name fields { name args { name defaultValue } } } } }".into());
    attempts.push("{ __type(name: \"Usage\") { fields { name description } } }".into());
    attempts.push("mutation { usage }".into());
    attempts.push("subscription { usage }".into());
    let window = r#"from: "2023-11-14T23:00:00Z", to: "2023-11-15T00:00:00Z""#;
    attempts.push(format!("{{ coverage(level: TENS, {window}) {{ node }} }}"));
    attempts.push(format!("{{ gaps({window}) {{ node }} }}"));
    assert!(attempts.len() >= 40);
    for attempt in &attempts {
        let (_, answer) = service.ask("account-x", attempt).await;
        let text = answer.to_string();
        assert!(!text.contains("-->"), "a question that can be read: {text}");
        assert!(!SECRETS.iter().any(|secret| text.contains(secret)), "{attempt}\n{text}");
    }
    // Nor without a token that is good for questions.
    for (token, expected) in [
        ("expired", StatusCode::UNAUTHORIZED),
        ("", StatusCode::UNAUTHORIZED),
        ("agent-of-y-node", StatusCode::FORBIDDEN),
        ("lost", StatusCode::SERVICE_UNAVAILABLE),
    ] {
        for question in [inner.as_str(), "{ __typename }"] {
            assert_eq!(service.ask(token, question).await.0, expected, "{token}");
        }
    }
    for value in ["account-y", "Basic account-y", "Bearer", "Bearer\taccount-y"] {
        let request = Request::post("/v1/graphql").header(header::CONTENT_TYPE, "application/json");
        let request = request.header(header::AUTHORIZATION, value);
        let body = Body::from(json!({ "query": inner }).to_string());
        assert_eq!(service.send(request.body(body).unwrap()).await.0, StatusCode::UNAUTHORIZED, "{value}");
    }
    let batch = json!([{ "query": inner }, { "query": inner }]).to_string();
    let (status, _) = service.post("/v1/graphql", "account-x", batch).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "one question at a time, so that limits are of all");
}

#[tokio::test]
async fn what_is_too_deep_or_too_wide_is_refused() {
    let service = Service::new();
    let question = usage(IN_USE);
    let field = field(&question);
    let aliases = |count: usize| (0..count).map(|at| format!("a{at}: {field}")).collect::<Vec<_>>().join(" ");
    let nested = |depth: usize| format!("{}name{}", "ofType { ".repeat(depth), " }".repeat(depth));
    let wide = service.ask("admin", &format!("{{ {} }}", aliases(9))).await.1;
    assert_eq!(wide["errors"], Value::Null, "{wide}");
    let refused = [
        (format!("{{ {} }}", aliases(12)), "complex"),
        (format!("{{ ...A }} fragment A on Query {{ {} }}", aliases(12)), "complex"),
        (format!("{{ __schema {{ types {{ {} }} }} }}", nested(20)), "deep"),
        ("{ ...A } fragment A on Query { ...A }".into(), "recursion"),
    ];
    for (question, word) in refused {
        let (_, answer) = service.ask("admin", &question).await;
        assert_eq!(answer["data"], Value::Null);
        let message = answer["errors"].to_string();
        assert!(message.contains(word), "{message}");
    }
    let (status, _) = service.ask("admin", &format!("{{ {} }}", aliases(400))).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    let many: Vec<String> = (0..21).map(|at| format!("\"n{at}\"")).collect();
    let (_, answer) =
        service.ask("admin", &usage(&format!("filter: {{accounts: [{}]}}, {IN_USE}", many.join(", ")))).await;
    assert!(answer["errors"][0]["message"].as_str().unwrap().contains("accounts"), "{answer}");
}

/// The schema in the repository is the one that is served. AEGIS_WRITE=1 writes it.
#[test]
fn the_schema_is_the_one_in_the_repository() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/schema.graphql");
    if std::env::var_os("AEGIS_WRITE").is_some() {
        std::fs::write(path, aegis_usage::sdl()).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        written == aegis_usage::sdl(),
        "{path} is old: AEGIS_WRITE=1 cargo test --test collector_http schema"
    );
}
