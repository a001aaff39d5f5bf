//! Who may deliver.

use crate::collector::{Collector, report};
use crate::world::{AGENT, AUDIENCE, PEOPLE, World};
use aegis_tests::apiserver::NAMESPACE;
use http::StatusCode;

#[tokio::test(flavor = "multi_thread")]
async fn agents_deliver_for_their_own_node_and_nobody_else_does() {
    let world = World::start().await;
    let account = format!("{NAMESPACE}/{AGENT}");
    let gone = world.token(&account, AUDIENCE, Some("agent-gone")).await;
    let delete = ["delete", "pod", "agent-gone", "-n", NAMESPACE, "--force", "--grace-period=0"];
    world.api.kubectl(&delete).expect("delete");
    let collector = Collector::start(&world, &[]).await;
    let agent = world.agent("n1").await;
    let one = report("n1", 1, &["x", "y"]);
    let (status, told) = collector.deliver(&agent, std::slice::from_ref(&one)).await;
    assert_eq!((status, told.as_str()), (StatusCode::OK, r#"[{"outcome":"stored"}]"#));
    let other = collector.deliver(&agent, &[report("y-node", 1, &["x"])]).await;
    assert_eq!(other.0, StatusCode::FORBIDDEN, "{}", other.1);
    let mixed = collector.deliver(&agent, &[report("n1", 2, &["x"]), report("y-node", 2, &["x"])]).await;
    assert_eq!(mixed.0, StatusCode::FORBIDDEN, "{}", mixed.1);

    let attempts = [
        ("no token", String::new(), StatusCode::UNAUTHORIZED),
        ("garbage", "garbage".into(), StatusCode::UNAUTHORIZED),
        ("a token that somebody changed", format!("{agent}x"), StatusCode::UNAUTHORIZED),
        ("too long a token", "x".repeat(20_000), StatusCode::UNAUTHORIZED),
        ("one that is over", world.expired(&world.agent("n1").await), StatusCode::UNAUTHORIZED),
        (
            "one for the API server",
            world.token(&account, "", Some("agent-n1")).await,
            StatusCode::UNAUTHORIZED,
        ),
        ("one for others", world.token(&account, "vault", Some("agent-n1")).await, StatusCode::UNAUTHORIZED),
        ("an administrator's", "admin".into(), StatusCode::UNAUTHORIZED),
        ("of a pod that is gone", gone, StatusCode::UNAUTHORIZED),
        ("of no pod", world.token(&account, AUDIENCE, None).await, StatusCode::FORBIDDEN),
        (
            "of a namesake elsewhere",
            world.token(&format!("{PEOPLE}/{AGENT}"), AUDIENCE, Some("other-n1")).await,
            StatusCode::FORBIDDEN,
        ),
        ("an account's", world.person("x").await, StatusCode::FORBIDDEN),
        ("the platform's", world.person("platform").await, StatusCode::FORBIDDEN),
        ("of another node", world.agent("y-node").await, StatusCode::FORBIDDEN),
    ];
    let fresh = [report("n1", 3, &["x"])];
    for (what, token, expected) in &attempts {
        let (status, said) = collector.deliver(token, &fresh).await;
        assert_eq!(status, *expected, "{what}: {said}");
    }
    // None of them has left anything.
    let (_, told) = collector.deliver(&agent, &fresh).await;
    assert_eq!(told, r#"[{"outcome":"stored"}]"#);

    // A token that was refused is not asked about again, nor is one that is known.
    let reviews = "aegis_collector_reviews_total{kind=\"token\",result=\"answered\"}";
    collector.deliver("garbage-again", &fresh).await;
    let before = collector.metric(reviews).await;
    for _ in 0..20 {
        assert_eq!(collector.deliver("garbage-again", &fresh).await.0, StatusCode::UNAUTHORIZED);
    }
    assert!(collector.metric(reviews).await <= before + 3.0, "20 refusals of one token");
    let page = collector.probe("/metrics").await.expect("metrics");
    for line in [
        "aegis_collector_reports_total{outcome=\"stored\"} 2",
        "aegis_collector_rows_total 3",
        "aegis_collector_deliveries_waiting 0",
        "aegis_collector_deliveries_total{outcome=\"taken\"} 2",
    ] {
        assert!(page.contains(line), "{line}\n{page}");
    }
    let newest = collector.metric("aegis_collector_newest_report_seconds").await;
    assert!(newest >= one.to as f64, "{newest}");
    // Nothing that was sent as a token is in the log.
    let log = std::fs::read_to_string(&collector.log).expect("log");
    for (what, token, _) in attempts.iter().filter(|(_, token, _)| token.len() > 6) {
        assert!(!log.contains(token.as_str()), "{what}: {log}");
    }
}
