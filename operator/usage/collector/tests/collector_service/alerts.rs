//! Alerts from the object to the feed.

use crate::collector::{Collector, eventually, report};
use crate::world::World;
use aegis_usage_report::Report;
use feed_rs::model::Feed;
use http::StatusCode;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// An agent that reports every slot, those that it could not deliver before, too.
struct Node<'a> {
    token: &'a str,
    /// Whose ports it tells of.
    accounts: &'a [&'a str],
    number: AtomicU64,
    last: AtomicI64,
}

impl<'a> Node<'a> {
    /// One that told of all up to 20 seconds ago.
    fn new(token: &'a str, accounts: &'a [&'a str]) -> Node<'a> {
        let began = jiff::Timestamp::now().as_second() / 10 * 10 - 20;
        Node { token, accounts, number: AtomicU64::new(1), last: AtomicI64::new(began) }
    }

    /// Says of all slots of which nothing has been said yet how many ports of each account are in use.
    async fn says(&self, collector: &Collector, in_use: u64) -> Result<(), String> {
        let newest: Report = report("n1", 0, self.accounts);
        let last = self.last.swap(newest.from, Ordering::Relaxed);
        let slots = (last + 10..=newest.from).step_by(10);
        let reports = slots.map(|from| {
            let mut report = Report { from, to: from + 10, ..newest.clone() };
            report.sequence = self.number.fetch_add(1, Ordering::Relaxed);
            for row in &mut report.rows {
                (row.figures.in_use, row.figures.peak) = (in_use, in_use);
            }
            report
        });
        let reports: Vec<Report> = reports.collect();
        match collector.deliver(self.token, &reports).await {
            (StatusCode::OK, told) if told.matches("stored").count() == reports.len() => Ok(()),
            other => panic!("{other:?}"),
        }
    }
}

/// Events of an alert, the oldest first: reason and note.
fn events(world: &World, namespace: &str, alert: &str) -> Vec<(String, String)> {
    let get = ["get", "events.events.k8s.io", "-n", namespace, "-o", "json"];
    let list = world.api.kubectl(&get).expect("events");
    let list: Value = serde_json::from_str(&list).expect("JSON");
    let mut events: Vec<&Value> = list["items"].as_array().expect("items").iter().collect();
    events.retain(|event| event["regarding"]["kind"] == "UsageAlert" && event["regarding"]["name"] == alert);
    events.sort_by_key(|event| event["eventTime"].to_string());
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    events.iter().map(|event| (text(&event["reason"]), text(&event["note"]))).collect()
}

fn status(world: &World, namespace: &str, alert: &str) -> Value {
    let object =
        world.api.kubectl(&["get", "ualert", alert, "-n", namespace, "-o", "json"]).expect("the alert");
    serde_json::from_str::<Value>(&object).expect("JSON")["status"].clone()
}

fn condition<'a>(status: &'a Value, kind: &str) -> &'a Value {
    let all = status["conditions"].as_array();
    all.and_then(|all| all.iter().find(|it| it["type"] == kind)).unwrap_or(&Value::Null)
}

async fn feed(collector: &Collector, path: &str) -> Result<Feed, String> {
    match collector.get(path, "").await {
        (StatusCode::OK, body) => feed_rs::parser::parse(body.as_bytes()).map_err(|error| error.to_string()),
        other => Err(format!("{other:?}")),
    }
}

/// Path of the feed of x, as this person is told it.
async fn place(collector: &Collector, token: &str, form: &str) -> String {
    let (status, body) = collector.get("/v1/feeds/x", token).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let places: Value = serde_json::from_str(&body).expect("JSON");
    places[form].as_str().expect(form).strip_prefix("https://use.example").expect("the base").to_owned()
}

/// An alert of 5 percent of the ports.
fn full(namespace: &str) -> Value {
    json!({
        "apiVersion": "aegis.dev/v1alpha1", "kind": "UsageAlert", "metadata": {"name": "full", "namespace": namespace},
        "spec": {
            "allocationRef": {"name": "partner"}, "origins": [{"cidr": "198.51.100.0/24", "port": 443}],
            "portUse": {"percent": 5, "forSeconds": 0, "clearBelowPercent": 4},
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alert_is_raised_told_once_and_cleared_over_a_restart() {
    const URL: [&str; 1] = ["--public-url=https://use.example"];
    let world = World::start().await;
    let object = full("x");
    let mut lost = object.clone();
    lost["metadata"]["name"] = "lost".into();
    lost["spec"]["allocationRef"]["name"] = "nowhere".into();
    world
        .api
        .provide(&json!({"apiVersion": "v1", "kind": "List", "items": [object, lost]}).to_string())
        .expect("alerts");
    let mut collector = Collector::start(&world, &URL).await;
    eventually("it is accepted, or says why not", async || {
        let (full, lost) = (status(&world, "x", "full"), status(&world, "x", "lost"));
        let told = (&condition(&full, "Accepted")["status"], &condition(&lost, "Accepted")["reason"]);
        if told == (&json!("True"), &json!("NotFound")) { Ok(()) } else { Err(format!("{full} {lost}")) }
    })
    .await;
    assert_eq!(condition(&status(&world, "x", "full"), "Firing")["status"], "False");

    let token = world.agent("n1").await;
    let node = Node::new(&token, &["x"]);
    let x = world.person("x").await;
    let (rss, atom) = (place(&collector, &x, "rss").await, place(&collector, &x, "atom").await);
    // 4,242 of 64,512 ports are 6 percent.
    let raised = eventually("it is raised", async || {
        node.says(&collector, 4_242).await?;
        let feed = feed(&collector, &rss).await?;
        if feed.entries.len() == 1 { Ok(feed) } else { Err(format!("{:?}", feed.entries)) }
    })
    .await;
    let title = raised.entries[0].title.clone().expect("a title").content;
    assert_eq!(title, "6 % of the ports of 192.0.2.1 towards 198.51.100.1:443 (tcp) are in use");
    let told = eventually("there are an event and a status", async || {
        let (events, status) = (events(&world, "x", "full"), status(&world, "x", "full"));
        if events.len() == 1 && status["firing"] == 1 {
            Ok((events, status))
        } else {
            Err(format!("{events:?} {status}"))
        }
    })
    .await;
    let (reason, note) = &told.0[0];
    assert!(reason == "AlertRaised" && note.contains(&title) && note.contains("add an address"), "{note}");
    let firing = condition(&told.1, "Firing");
    assert!(firing["status"] == "True" && firing["message"].to_string().contains("192.0.2.1"), "{firing}");
    const FIRING: &str = "aegis_collector_alert_firing{namespace=\"x\",alert=\"full\"}";
    assert_eq!(collector.metric(FIRING).await, 1.0);

    // The collector dies, and another one goes on.
    collector.process.signal(Signal::SIGKILL);
    collector.process.wait();
    let folder = collector.folder.clone();
    let collector = Collector::start_in(&world, folder, &URL).await;
    eventually("it looks at use again", async || {
        node.says(&collector, 4_243).await?;
        if collector.metric(FIRING).await == 1.0 { Ok(()) } else { Err("not yet".into()) }
    })
    .await;
    eventually("it is cleared", async || {
        node.says(&collector, 7).await?;
        let (events, status) = (events(&world, "x", "full"), status(&world, "x", "full"));
        if events.len() >= 2 && status["firing"] == 0 { Ok(()) } else { Err(format!("{events:?} {status}")) }
    })
    .await;
    let reasons: Vec<String> = events(&world, "x", "full").into_iter().map(|event| event.0).collect();
    assert_eq!(reasons, ["AlertRaised", "AlertCleared"], "each once");
    let (by_rss, by_atom) =
        (feed(&collector, &rss).await.expect("RSS"), feed(&collector, &atom).await.expect("Atom"));
    let ids = |feed: &Feed| feed.entries.iter().map(|it| it.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&by_rss).len(), 2, "{by_rss:?}");
    assert_eq!(ids(&by_rss), ids(&by_atom));
    assert_eq!(by_rss.entries[1].id, raised.entries[0].id, "it is the same item");
    assert_eq!(by_rss.entries[1].title.clone().expect("a title").content, title);
    strangers(&world, &collector, &x, &rss).await;
    for alert in ["full", "lost"] {
        world.api.kubectl(&["delete", "ualert", alert, "-n", "x"]).expect("delete");
    }
    // Nothing of the secret is in the log.
    let log = std::fs::read_to_string(&collector.log).expect("log");
    assert!(!log.contains(rss.split('/').nth(3).expect("a token")), "{log}");
}

/// A namespace that is being deleted takes no events any more, and those of others come all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_ends_holds_up_nobody() {
    let world = World::start().await;
    let allocation = json!({
        "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressAllocation",
        "metadata": {"name": "partner", "namespace": "ending"}, "spec": {"prefixes": ["later"]},
    });
    // By name before y.
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ending"}});
    let objects = [namespace, allocation, full("ending"), full("y")];
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    world.api.provide(&list.to_string()).expect("alerts");
    let collector = Collector::start(&world, &[]).await;
    eventually("both count", async || {
        let told =
            ["ending", "y"].map(|it| condition(&status(&world, it, "full"), "Accepted")["status"].clone());
        if told == ["True", "True"] { Ok(()) } else { Err(format!("{told:?}")) }
    })
    .await;
    // Nobody is there who would make an end of it.
    world.api.kubectl(&["delete", "namespace", "ending", "--wait=false"]).expect("delete");
    let token = world.agent("n1").await;
    let node = Node::new(&token, &["ending", "y"]);
    for (in_use, count) in [(4_242, 1), (7, 2)] {
        eventually("y is told", async || {
            node.says(&collector, in_use).await?;
            let (told, firing) =
                (events(&world, "y", "full"), status(&world, "ending", "full")["firing"].clone());
            if told.len() == count && firing == 2 - count {
                Ok(())
            } else {
                Err(format!("{told:?} {firing}"))
            }
        })
        .await;
    }
    assert_eq!(events(&world, "ending", "full"), [], "its alert was raised and cleared, too");
    assert_eq!(collector.metric("aegis_collector_alert_failures_total").await, 0.0);
    for object in ["ualert/full", "ealloc/partner"] {
        world.api.kubectl(&["delete", object, "-n", "ending"]).expect("delete");
    }
    world.api.kubectl(&["delete", "ualert/full", "-n", "y"]).expect("delete");
}

/// Who is told of the feed of x, and who may give it another address.
async fn strangers(world: &World, collector: &Collector, x: &str, rss: &str) {
    let platform = world.person("platform").await;
    assert_eq!(place(collector, &platform, "rss").await, rss);
    let (y, parent, agent) = (world.person("y").await, world.person("parent").await, world.agent("n1").await);
    for (token, expected) in [
        (y.as_str(), StatusCode::FORBIDDEN),
        (&parent, StatusCode::FORBIDDEN),
        (&agent, StatusCode::FORBIDDEN),
        ("garbage", StatusCode::UNAUTHORIZED),
        ("", StatusCode::UNAUTHORIZED),
    ] {
        let (status, body) = collector.get("/v1/feeds/x", token).await;
        assert_eq!(status, expected, "{body}");
        let (status, _) = collector.ask(token, "{ alerts(accounts: [\"x\"]) { account alert } }").await;
        assert!(status == StatusCode::OK || expected == StatusCode::UNAUTHORIZED, "{status}");
    }
    let (_, answer) = collector.ask(&y, "{ alerts(accounts: [\"x\"]) { account alert } }").await;
    assert_eq!(answer["data"]["alerts"], json!([]), "{answer}");
    let of_y = collector.get("/v1/feeds/y", &y).await.1;
    let of_y: Value = serde_json::from_str(&of_y).expect("JSON");
    let secret = of_y["rss"].as_str().and_then(|place| place.split('/').nth(5)).expect("a token");
    assert_eq!(collector.get(&format!("/feeds/x/{secret}/rss.xml"), "").await.0, StatusCode::NOT_FOUND);
    // Whoever may see it may not take it from others; who edits the account may.
    for token in [x, &platform, &y] {
        assert_eq!(collector.post("/v1/feeds/x", token, json!({})).await.0, StatusCode::FORBIDDEN);
    }
    let grant = [
        "create",
        "rolebinding",
        "edits",
        "--clusterrole=aegis-editor",
        "--serviceaccount=people:nobody",
        "-n",
        "x",
    ];
    world.api.kubectl(&grant).expect("grant");
    let new = eventually("the right counts", async || {
        // With a token that nothing is remembered of.
        match collector.post("/v1/feeds/x", &world.person("nobody").await, json!({})).await {
            (StatusCode::OK, body) => Ok(body),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert!(!new.contains(rss));
    assert_eq!(collector.get(rss, "").await.0, StatusCode::NOT_FOUND, "the old address is worth nothing");
    assert!(feed(collector, &place(collector, x, "atom").await).await.is_ok());
    world.api.kubectl(&["delete", "rolebinding", "edits", "-n", "x"]).expect("take it away");
}
