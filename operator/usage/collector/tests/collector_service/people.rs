//! Who sees what.

use crate::collector::{Collector, eventually, report, usage};
use crate::world::World;
use aegis_usage_report::Report;
use http::StatusCode;

/// Everything that says something of account y, and that account x must not get to see.
const SECRETS: [&str; 4] = ["y-pod", "203.0.113.77", "y-rule", "y-node"];

/// Everything that can be told apart.
const EVERY: &str = "by: [ADDRESS, ACCOUNT, ALLOCATION, RULE, SITE, NODE, ORIGIN, PROTOCOL, POD, REASON]";

fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(account, pod)| ((*account).into(), (*pod).into())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn people_see_their_accounts_and_no_others() {
    let world = World::start().await;
    let collector = Collector::start(&world, &[]).await;
    for (node, account) in [("n1", "x"), ("y-node", "y")] {
        // Of a slot that begins when the prefix has an owner; a clock may be ahead by so much.
        let report = report(node, 1, &[account]);
        let report = Report { from: report.from + 30, to: report.to + 30, ..report };
        let (status, told) = collector.deliver(&world.agent(node).await, &[report]).await;
        assert_eq!(status, StatusCode::OK, "{told}");
    }
    let (x, y, platform) = (world.person("x").await, world.person("y").await, world.person("platform").await);
    assert_eq!(collector.sees(&x, "").await, pairs(&[("x", "x-pod")]));
    assert_eq!(collector.sees(&y, "").await, pairs(&[("y", "y-pod")]));
    let both = pairs(&[("x", "x-pod"), ("y", "y-pod")]);
    assert_eq!(collector.sees(&platform, "").await, both);
    assert_eq!(collector.sees(&world.person("auditor").await, "").await, both);
    assert_eq!(collector.sees(&world.person("nobody").await, "").await, []);
    // Of what leaves from their prefix owners see whose it is, but not which pod's; and nothing where the operator has not accepted it.
    let parent = world.person("parent").await;
    assert_eq!(collector.sees(&parent, "").await, pairs(&[("x", "")]));
    assert_eq!(collector.sees(&parent, ", filter: {pods: [\"x-pod\"]}").await, []);
    let grab = world.person("grab").await;
    assert_eq!(collector.sees(&grab, ", filter: {accounts: [\"grab\", \"y\"]}").await, []);
    // Agents are nobody's account.
    assert_eq!(collector.sees(&world.agent("n1").await, "").await, []);
    for stranger in ["", "garbage", "admin", &world.expired(&x)] {
        for question in [usage("by: [ACCOUNT]").as_str(), "{ __typename }", "{ __schema { types { name } } }"]
        {
            assert_eq!(collector.ask(stranger, question).await.0, StatusCode::UNAUTHORIZED, "{stranger}");
        }
    }

    let (_, whole) = collector.ask(&y, &usage(EVERY)).await;
    for secret in SECRETS {
        assert!(whole.to_string().contains(secret), "{secret} is there to be found: {whole}");
    }
    let named = usage(&format!("{EVERY}, filter: {{accounts: [\"y\"]}}"));
    let field = named.strip_prefix("{ ").and_then(|it| it.strip_suffix(" }")).expect("a field");
    let (_, page) = collector.ask(&platform, &usage("by: [ACCOUNT, POD], first: 1")).await;
    let cursor = &page["data"]["usage"]["pageInfo"]["endCursor"];
    assert!(cursor.is_string(), "{page}");
    let window = "from: \"2026-01-01T00:00:00Z\", to: \"2026-01-01T01:00:00Z\"";
    let mut attempts = vec![
        usage(EVERY),
        usage(&format!("by: [ACCOUNT, POD], first: 1, after: {cursor}")),
        named.clone(),
        format!("{{ a: {field} b: {field} }}"),
        format!("query Mine {{ ...All }} fragment All on Query {{ {field} }}"),
        format!("{{ ... on Query {{ {field} }} }}"),
        format!("query {{ {} }}", field.replace(") { nodes", ") @include(if: true) { nodes")),
        "{ __schema { types { name fields { name args { name defaultValue } } } } }".into(),
        "{ __type(name: \"Usage\") { fields { name description } } }".into(),
        format!("{{ coverage(level: TENS, {window}) {{ node }} }}"),
        format!("{{ gaps({window}) {{ node }} }}"),
    ];
    for filter in [
        "accounts: [\"x\", \"y\"]",
        "accounts: [\"\"]",
        "accounts: [\"*\"]",
        "accounts: [\"y\\u0000\", \"y/../y\"]",
        "addresses: [\"203.0.113.77\"]",
        "addresses: [\"0.0.0.0/0\"]",
        "pods: [\"y-pod\"]",
        "nodes: [\"y-node\"]",
        "rules: [\"binding/y-rule\"]",
    ] {
        attempts.push(usage(&format!("{EVERY}, filter: {{{filter}}}")));
    }
    for attempt in &attempts {
        let (_, answer) = collector.ask(&x, attempt).await;
        let text = answer.to_string();
        assert!(!text.contains("-->"), "a question that can be read: {attempt}\n{text}");
        assert!(!SECRETS.iter().any(|secret| text.contains(secret)), "{attempt}\n{text}");
    }

    // What is given counts.
    let nobody = world.person("nobody").await;
    assert_eq!(collector.sees(&nobody, ", filter: {accounts: [\"y\"]}").await, []);
    let grant =
        ["create", "rolebinding", "lent", "--clusterrole=aegis-viewer", "--serviceaccount=people:nobody"];
    world.api.kubectl(&[grant.as_slice(), &["-n", "y"]].concat()).expect("grant");
    eventually("the right counts", async || {
        // With a token that nothing is remembered of.
        match collector.sees(&world.person("nobody").await, "").await {
            seen if seen == pairs(&[("y", "y-pod")]) => Ok(()),
            seen => Err(format!("{seen:?}")),
        }
    })
    .await;
}

/// Where people sign in by something that knows nothing of audiences.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_for_the_api_server_ask_where_that_is_allowed_and_never_deliver() {
    let world = World::start().await;
    let collector = Collector::start(&world, &["--api-tokens"]).await;
    let agent = world.agent("n1").await;
    collector.deliver(&agent, &[report("n1", 1, &["x", "y"])]).await;
    assert_eq!(collector.sees("admin", "").await, pairs(&[("x", "x-pod"), ("y", "y-pod")]));
    let x = world.token("people/x", "", None).await;
    assert_eq!(collector.sees(&x, "").await, pairs(&[("x", "x-pod")]));
    let account = "aegis-system/aegis-node-agent";
    let direct = world.token(account, "", Some("agent-n1")).await;
    for (token, expected) in [
        ("admin", StatusCode::FORBIDDEN),
        (direct.as_str(), StatusCode::FORBIDDEN),
        ("garbage", StatusCode::UNAUTHORIZED),
    ] {
        assert_eq!(collector.deliver(token, &[report("n1", 2, &["x"])]).await.0, expected, "{token}");
    }
    let foreign = world.token("people/x", "vault", None).await;
    assert_eq!(collector.ask(&foreign, "{ __typename }").await.0, StatusCode::UNAUTHORIZED);
}
