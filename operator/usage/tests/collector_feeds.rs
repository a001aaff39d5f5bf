//! Feeds: what they say to a parser of feeds, and to whom.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use aegis_usage::alert::{Account, Happening, Kind, Refusals, Rule};
use aegis_usage::{Access, Denied, Metrics, Pending, Prefix, Store, Viewer};
use aegis_usage_report::{Figures, Key};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode, header};
use quick_xml::events::Event;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use support::{T0, alerts, figures, key, report};
use tempfile::TempDir;
use tower::ServiceExt as _;

const NOW: i64 = T0 + 3_600;
const BASE: &str = "https://use.example:8443";

/// Tokens whose words say whose they are: `account-x` may do anything to account x, `viewer-x` see it.
struct Words;

impl Access for Words {
    fn node<'a>(&'a self, token: &'a str) -> Pending<'a, Result<String, Denied>> {
        Box::pin(async move { token.strip_prefix("agent-of-").map(String::from).ok_or(Denied::Unknown) })
    }

    fn viewer<'a>(&'a self, token: &'a str, _: &'a [String]) -> Pending<'a, Result<Viewer, Denied>> {
        let whose = token.strip_prefix("account-").or_else(|| token.strip_prefix("viewer-"));
        Box::pin(async move {
            match whose {
                _ if token == "admin" => Ok(Viewer { all: true, ..Viewer::default() }),
                _ if token == "lost" => Err(Denied::Unavailable),
                _ if token.starts_with("agent-of-") => Err(Denied::Forbidden),
                Some(account) => Ok(Viewer { all: false, accounts: [account.to_string()].into() }),
                None => Err(Denied::Unknown),
            }
        })
    }

    fn renews<'a>(&'a self, token: &'a str, account: &'a str) -> Pending<'a, Result<bool, Denied>> {
        Box::pin(async move {
            self.viewer(token, &[]).await?;
            Ok(token == "admin" || token == format!("account-{account}"))
        })
    }

    fn prefixes(&self) -> Vec<Prefix> {
        // Whose addresses x has.
        vec![Prefix { range: "192.0.2.0/28".parse().unwrap(), account: "parent".into(), since: Some(0) }]
    }
}

struct Service {
    router: Router,
    store: Arc<Store>,
    _folder: TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

/// Words of accounts, and of nodes, that mean something in XML and HTML.
const REASON: &str = "<b>&amp;\"']]>\u{7}</b>";

impl Service {
    fn new() -> Service {
        let (store, folder) = support::sqlite();
        let store = Arc::new(store);
        let clock: aegis_usage::Clock = Arc::new(|| NOW);
        let router = aegis_usage::router(store.clone(), Arc::new(Words), clock.clone(), Metrics::new());
        let feeds =
            aegis_usage::feeds(store.clone(), Arc::new(Words), clock, Metrics::new(), &format!("{BASE}/"));
        Service { router: router.merge(feeds), store, _folder: folder }
    }

    /// Accounts x and y: ports that were nearly used up, and are not any more; and connections of y that were refused.
    fn filled() -> Service {
        let service = Service::new();
        let refusals = Some(Refusals { more_than: 0, within: 60 });
        let rules = |refusals| vec![Rule { refusals, ..alerts::full() }];
        let mut accounts = [
            alerts::account("x", rules(None), &["node-a"]),
            alerts::account("y", rules(refusals), &["node-a"]),
        ];
        let allocation = accounts[1].allocations.remove("partner").unwrap();
        accounts[1].allocations.insert("y-allocation".into(), allocation);
        service.store.watch(&accounts, T0, T0).unwrap();
        for (number, ports) in (0..).zip([900, 900, 900, 100]) {
            let y = Key { allocation: "y-allocation".into(), pod: "y-pod".into(), ..key("y", 66) };
            let refused =
                Figures { refused: [(REASON.replace('\u{7}', ""), 4_242)].into(), ..figures(901, 1) };
            let rows = vec![(key("x", 1), figures(ports, 1)), (y, refused)];
            let now = T0 + 10 * (number as i64 + 1);
            service.store.ingest(&[report("node-a", number, rows)], now).unwrap();
            service.store.watch(&accounts, now, T0).unwrap();
        }
        service
    }

    async fn ask(&self, method: Method, path: &str, fields: &[(header::HeaderName, &str)]) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in fields {
            request = request.header(name, *value);
        }
        let response = self.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let body = to_bytes(response.into_body(), 1 << 24).await.unwrap();
        Answer { status, headers, body: String::from_utf8(body.to_vec()).unwrap() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask(Method::GET, path, &[]).await
    }

    async fn with(&self, method: Method, path: &str, token: &str) -> Answer {
        self.ask(method, path, &[(header::AUTHORIZATION, &format!("Bearer {token}"))]).await
    }

    /// Paths of the feeds of an account, RSS and Atom.
    async fn feeds(&self, account: &str) -> [String; 2] {
        let answer =
            self.with(Method::GET, &format!("/v1/feeds/{account}"), &format!("account-{account}")).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
        places(&answer.body)
    }

    async fn graphql(&self, token: &str, question: &str) -> Value {
        let request = Request::post("/v1/graphql").header(header::CONTENT_TYPE, "application/json");
        let request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        let body = Body::from(json!({ "query": question }).to_string());
        let response = self.router.clone().oneshot(request.body(body).unwrap()).await.unwrap();
        let body = to_bytes(response.into_body(), 1 << 24).await.unwrap();
        serde_json::from_slice(&body).unwrap()
    }
}

fn places(body: &str) -> [String; 2] {
    let places: Value = serde_json::from_str(body).unwrap();
    ["rss", "atom"].map(|form| places[form].as_str().unwrap().strip_prefix(BASE).unwrap().to_owned())
}

#[tokio::test]
async fn a_parser_of_feeds_reads_both_forms() {
    let service = Service::filled();
    let mut ids = Vec::new();
    for (path, kind) in
        service.feeds("x").await.iter().zip([feed_rs::model::FeedType::RSS2, feed_rs::model::FeedType::Atom])
    {
        let answer = service.get(path).await;
        assert_eq!(answer.status, StatusCode::OK);
        let feed = feed_rs::parser::parse(answer.body.as_bytes()).unwrap();
        assert_eq!(feed.feed_type, kind);
        assert_eq!(feed.title.unwrap().content, "Egress alerts of x");
        assert!(feed.links.iter().any(|link| link.href == format!("{BASE}{path}")), "{:?}", feed.links);
        assert_eq!(feed.updated.unwrap().timestamp(), T0 + 40);
        let titles: Vec<String> = feed.entries.iter().map(|it| it.title.clone().unwrap().content).collect();
        assert!(titles[0].starts_with("Cleared: ") && titles[1].contains("192.0.2.1"), "{titles:?}");
        let raised = &feed.entries[1];
        let text =
            raised.summary.clone().map(|it| it.content).or(raised.content.clone().and_then(|it| it.body));
        let text = text.unwrap();
        for part in
            ["198.51.100.1:443", "900 of the 1000 ports", "2023-11-14T23:00:00Z", "add an address", "x-pod"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(raised.published.unwrap().timestamp(), T0 + 30);
        ids.push(feed.entries.iter().map(|it| it.id.clone()).collect::<Vec<_>>());
    }
    assert_eq!(ids[0], ids[1], "the same happening has the same identity");
    assert_eq!(ids[0].iter().collect::<BTreeSet<_>>().len(), 2);
    assert!(ids[0].iter().all(|id| id.starts_with("tag:aegis.dev,2026:usage-alert/x/")), "{ids:?}");
}

/// Elements and how many there are of each, by path; fails where XML is not well formed.
fn elements(text: &str) -> Vec<String> {
    let mut reader = quick_xml::Reader::from_str(text);
    let (mut path, mut found) = (Vec::new(), Vec::new());
    loop {
        match reader.read_event().unwrap() {
            Event::Start(element) => {
                path.push(element.name().as_ref().to_owned());
                found.push(path.join("/"));
            }
            Event::Empty(element) => {
                found.push(format!("{}/{}", path.join("/"), element.name().as_ref()));
            }
            Event::End(_) => drop(path.pop()),
            Event::Eof => return found,
            _ => {}
        }
    }
}

#[tokio::test]
async fn each_form_has_what_its_specification_asks_for() {
    let service = Service::filled();
    let [rss, atom] = service.feeds("y").await;
    let (rss, atom) = (service.get(&rss).await, service.get(&atom).await);
    assert_eq!(rss.headers[header::CONTENT_TYPE], "application/rss+xml; charset=utf-8");
    assert_eq!(atom.headers[header::CONTENT_TYPE], "application/atom+xml; charset=utf-8");
    let items = service.store.items("y").unwrap();
    assert_eq!(items.len(), 2);
    let found = elements(&rss.body);
    let count = |path: &str| found.iter().filter(|it| *it == path).count();
    for once in ["title", "link", "description", "lastBuildDate", "atom:link"] {
        assert_eq!(count(&format!("rss/channel/{once}")), 1, "{once}: {found:?}");
    }
    for each in ["title", "description", "guid", "pubDate"] {
        assert_eq!(count(&format!("rss/channel/item/{each}")), 2, "{each}");
    }
    assert!(rss.body.contains("<guid isPermaLink=\"false\">tag:"), "{}", rss.body);
    assert!(rss.body.contains("<pubDate>Tue, 14 Nov 2023 23:00:30 GMT</pubDate>"), "{}", rss.body);
    let found = elements(&atom.body);
    let count = |path: &str| found.iter().filter(|it| *it == path).count();
    for once in ["id", "title", "updated", "author", "author/name", "link"] {
        assert_eq!(count(&format!("feed/{once}")), 1, "{once}: {found:?}");
    }
    for each in ["id", "title", "updated", "content"] {
        assert_eq!(count(&format!("feed/entry/{each}")), 2, "{each}");
    }
    // What somebody else has named is text, in XML and in the HTML that is in it.
    for body in [&rss.body, &atom.body] {
        assert!(!body.contains("<b>") && body.contains("&amp;lt;b&amp;gt;"), "{body}");
        let feed = feed_rs::parser::parse(body.as_bytes()).unwrap();
        let titles: Vec<_> = feed.entries.iter().map(|it| it.title.clone().unwrap().content).collect();
        assert!(titles.iter().any(|it| it.contains("were refused")), "{titles:?}");
    }
}

#[tokio::test]
async fn who_has_it_already_is_told_so() {
    let service = Service::filled();
    for path in service.feeds("x").await {
        let first = service.get(&path).await;
        let tag = first.headers[header::ETAG].to_str().unwrap().to_owned();
        let modified = first.headers[header::LAST_MODIFIED].to_str().unwrap().to_owned();
        assert_eq!(modified, "Tue, 14 Nov 2023 23:00:40 GMT");
        assert_eq!(first.headers[header::CACHE_CONTROL], "private, no-cache");
        assert_eq!(first.headers[header::REFERRER_POLICY], "no-referrer");
        assert_eq!(service.get(&path).await.body, first.body, "the same bytes each time");
        let (listed, weak) = (format!("\"other\", {tag}"), format!("W/{tag}"));
        let cases: [(&[(header::HeaderName, &str)], StatusCode); 8] = [
            (&[(header::IF_NONE_MATCH, &tag)], StatusCode::NOT_MODIFIED),
            (&[(header::IF_NONE_MATCH, &listed)], StatusCode::NOT_MODIFIED),
            (&[(header::IF_NONE_MATCH, &weak)], StatusCode::NOT_MODIFIED),
            (&[(header::IF_NONE_MATCH, "\"other\"")], StatusCode::OK),
            (&[(header::IF_MODIFIED_SINCE, &modified)], StatusCode::NOT_MODIFIED),
            (&[(header::IF_MODIFIED_SINCE, "Tue, 14 Nov 2023 23:00:39 GMT")], StatusCode::OK),
            (&[(header::IF_MODIFIED_SINCE, "yesterday")], StatusCode::OK),
            // The tag knows better.
            (&[(header::IF_NONE_MATCH, "\"other\""), (header::IF_MODIFIED_SINCE, &modified)], StatusCode::OK),
        ];
        for (fields, expected) in cases {
            let answer = service.ask(Method::GET, &path, fields).await;
            assert_eq!(answer.status, expected, "{fields:?}");
            assert_eq!(answer.headers[header::ETAG], tag);
            assert_eq!(answer.body.is_empty(), expected == StatusCode::NOT_MODIFIED);
        }
        let head = service.ask(Method::HEAD, &path, &[]).await;
        assert_eq!((head.status, head.body.as_str()), (StatusCode::OK, ""));
    }
}

/// Everything that says something of account y.
const SECRETS: [&str; 4] = ["y-allocation", "y-pod", "198.51.100.66", "4242"];

#[tokio::test]
async fn nobody_reads_the_feed_of_another_account() {
    let service = Service::filled();
    let ([x, _], [y, y_atom]) = (service.feeds("x").await, service.feeds("y").await);
    for path in [&y, &y_atom] {
        let body = service.get(path).await.body;
        for secret in SECRETS {
            assert!(body.contains(secret), "{secret} is there to be found: {body}");
        }
    }
    let token = |path: &str| path.split('/').nth(3).unwrap().to_owned();
    let (of_x, of_y) = (token(&x), token(&y));
    let mut attempts = vec![
        format!("/feeds/y/{of_x}/rss.xml"),
        format!("/feeds/y/{}/rss.xml", of_y.to_uppercase()),
        format!("/feeds/y/{}/rss.xml", &of_y[..63]),
        format!("/feeds/y/{of_y}0/rss.xml"),
        format!("/feeds/y/{}/rss.xml", "0".repeat(64)),
        "/feeds/y/rss.xml".into(),
        "/feeds/y//rss.xml".into(),
        "/feeds/y/%00/rss.xml".into(),
        "/feeds/y/*/atom.xml".into(),
        "/feeds/y/' OR '1'='1/rss.xml".replace(' ', "%20"),
        format!("/feeds/Y/{of_y}/rss.xml"),
        format!("/feeds/y%00/{of_y}/rss.xml"),
        format!("/feeds/x%2F..%2Fy/{of_x}/rss.xml"),
        format!("/feeds/x/../y/{of_x}/rss.xml"),
        format!("/feeds/x/{of_x}/../../y/rss.xml"),
        format!("/feeds/x/{of_x}/..%2f..%2fy%2frss.xml"),
        format!("/feeds/x/{of_x}/rss.xml/../../../y"),
        format!("/feeds/nobody/{of_y}/rss.xml"),
        format!("/feeds/x/{of_y}/rss.xml"),
        format!("/feeds/y/{of_y}/feed.json"),
        format!("/feeds/y/{of_y}/rss.xml%00"),
        format!("/feeds/%ff/{of_y}/rss.xml"),
        format!("/feeds//{of_y}/rss.xml"),
        "/feeds/".into(),
    ];
    // Rotated: what was told before is worth nothing.
    let renewed = service.with(Method::POST, "/v1/feeds/y", "account-y").await;
    assert_eq!(renewed.status, StatusCode::OK, "{}", renewed.body);
    let [new, _] = places(&renewed.body);
    assert_ne!(new, y);
    attempts.extend([y, y_atom]);
    let mut told = BTreeSet::new();
    for attempt in &attempts {
        let answer = service.get(attempt).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{attempt}");
        assert!(!SECRETS.iter().any(|secret| answer.body.contains(secret)), "{attempt}");
        told.insert(answer.body);
    }
    // Nobody is told which part was wrong: of what looks like a feed's address nothing but this, or nothing.
    let known: BTreeSet<String> = ["there is no such feed\n", ""].map(String::from).into();
    assert!(told.is_subset(&known), "{told:?}");
    assert_eq!(service.get(&new).await.status, StatusCode::OK);
    assert_eq!(service.get(&x).await.status, StatusCode::OK, "that of x stays");
    // A token of Kubernetes is none of the feed, nor the other way about.
    let with = service.with(Method::GET, &format!("/feeds/y/{of_x}/rss.xml"), "account-y").await;
    assert_eq!(with.status, StatusCode::NOT_FOUND);
    for method in [Method::POST, Method::PUT, Method::DELETE] {
        assert_eq!(service.ask(method, &new, &[]).await.status, StatusCode::METHOD_NOT_ALLOWED);
    }
}

#[tokio::test]
async fn addresses_are_told_to_those_who_may_see_the_use() {
    let service = Service::filled();
    let [first, _] = service.feeds("y").await;
    let seen = service.with(Method::GET, "/v1/feeds/y", "viewer-y").await;
    assert_eq!(places(&seen.body)[0], first, "it stays the same");
    assert_eq!(seen.headers[header::CACHE_CONTROL], "no-store");
    let seen = service.with(Method::GET, "/v1/feeds/y", "admin").await;
    assert_eq!(places(&seen.body)[0], first);
    let attempts = [
        (Method::GET, "/v1/feeds/y", "account-x", StatusCode::FORBIDDEN),
        (Method::GET, "/v1/feeds/x", "account-parent", StatusCode::FORBIDDEN),
        (Method::GET, "/v1/feeds/y", "agent-of-node-a", StatusCode::FORBIDDEN),
        (Method::GET, "/v1/feeds/y", "expired", StatusCode::UNAUTHORIZED),
        (Method::GET, "/v1/feeds/y", "", StatusCode::UNAUTHORIZED),
        (Method::GET, "/v1/feeds/y", "lost", StatusCode::SERVICE_UNAVAILABLE),
        (Method::GET, "/v1/feeds/%2A", "admin", StatusCode::FORBIDDEN),
        (Method::GET, "/v1/feeds/y%00", "admin", StatusCode::FORBIDDEN),
        (Method::GET, "/v1/feeds/nobody", "account-x", StatusCode::FORBIDDEN),
        (Method::POST, "/v1/feeds/y", "account-x", StatusCode::FORBIDDEN),
        (Method::POST, "/v1/feeds/y", "viewer-y", StatusCode::FORBIDDEN),
        (Method::POST, "/v1/feeds/y", "expired", StatusCode::UNAUTHORIZED),
        (Method::POST, "/v1/feeds/Y", "admin", StatusCode::FORBIDDEN),
    ];
    for (method, path, token, expected) in attempts {
        let answer = service.with(method.clone(), path, token).await;
        assert_eq!(answer.status, expected, "{method} {path} {token}: {}", answer.body);
        assert!(!answer.body.contains(first.split('/').nth(3).unwrap()), "{path} {token}");
    }
    assert_eq!(service.ask(Method::GET, "/v1/feeds/y", &[]).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(service.get(&first).await.status, StatusCode::OK, "none of them changed it");
}

#[tokio::test]
async fn alerts_are_asked_for_and_only_ones_own_are_answered() {
    let service = Service::filled();
    let field = "alerts { account alert kind allocation address origin protocol reason site since raised figure highest silentNodes }";
    let own = service.graphql("account-y", &format!("{{ {field} }}")).await;
    let alerts = own["data"]["alerts"].as_array().unwrap();
    assert_eq!(alerts.len(), 2, "{own}");
    assert_eq!(alerts[0]["kind"], "PORT_USE");
    assert_eq!((&alerts[0]["figure"], &alerts[0]["origin"]), (&json!(901), &json!("198.51.100.66:443")));
    assert_eq!(alerts[0]["raised"], "2023-11-14T23:00:30Z");
    assert!(own.to_string().contains("y-allocation"), "{own}");
    let all = service.graphql("admin", &format!("{{ {field} }}")).await;
    assert_eq!(all["data"]["alerts"].as_array().unwrap().len(), 2, "that of x is cleared: {all}");
    let named = field.replacen("alerts", "alerts(accounts: [\"y\"])", 1);
    assert_eq!(
        service.graphql("admin", &format!("{{ {named} }}")).await["data"]["alerts"].as_array().unwrap().len(),
        2
    );
    // Page by page.
    let mut paged = Vec::new();
    let mut after = Value::Null;
    loop {
        let page = format!("{{ alerts(first: 1, after: {after}) {{ cursor kind }} }}");
        let page = service.graphql("account-y", &page).await["data"]["alerts"].clone();
        let Some(one) = page.as_array().unwrap().first() else { break };
        paged.push(one["kind"].clone());
        after = one["cursor"].clone();
    }
    assert_eq!(paged, ["PORT_USE", "REFUSALS"]);
    let wrong = service.graphql("account-y", "{ alerts(after: \"zz\") { kind } }").await;
    assert!(wrong["errors"].to_string().contains("cursor"), "{wrong}");
    let first = field.replacen("alerts", "alerts(first: 1)", 1);
    assert_eq!(
        service.graphql("admin", &format!("{{ {first} }}")).await["data"]["alerts"].as_array().unwrap().len(),
        1
    );
    let attempts = [
        format!("{{ {field} }}"),
        format!("{{ {named} }}"),
        format!("{{ {} }}", field.replacen("alerts", "alerts(accounts: [\"x\", \"y\"])", 1)),
        format!("{{ {} }}", field.replacen("alerts", "alerts(accounts: [\"\"])", 1)),
        format!("{{ {} }}", field.replacen("alerts", "alerts(accounts: [\"y\\u0000\"])", 1)),
        format!("{{ a: {named} b: {named} }}"),
        format!("query Mine {{ ...All }} fragment All on Query {{ {named} }}"),
        format!("{{ ... on Query {{ {named} }} }}"),
        format!("{{ {} }}", named.replace(") {", ") @include(if: true) {")),
        "{ __type(name: \"Alert\") { fields { name description } } }".into(),
        "mutation { alerts { account } }".into(),
    ];
    // Neither another account, nor the owner of the prefix whose addresses they are.
    for token in ["account-x", "account-parent"] {
        for attempt in &attempts {
            let answer = service.graphql(token, attempt).await.to_string();
            assert!(!SECRETS.iter().any(|secret| answer.contains(secret)), "{token}: {attempt}\n{answer}");
        }
    }
}

/// Words that no name may have come through a store all the same: the document stays one.
#[tokio::test]
async fn characters_that_xml_does_not_know_are_replaced() {
    let mut item = Service::filled().store.items("y").unwrap().remove(0);
    assert_eq!(item.happening, Happening::Raised);
    item.key.kind = Kind::Refusals;
    item.key.reason = REASON.into();
    item.key.alert = "\u{1}\u{fffe}".into();
    let account = Account::default().name;
    let feed = aegis_usage::alert::Feed {
        account,
        base: BASE.into(),
        address: BASE.into(),
        updated: T0,
        items: vec![item],
    };
    for form in [aegis_usage::alert::Form::Rss, aegis_usage::alert::Form::Atom] {
        let text = String::from_utf8(feed.write(form).unwrap()).unwrap();
        assert_eq!(feed_rs::parser::parse(text.as_bytes()).unwrap().entries.len(), 1);
        assert!(!text.contains(['\u{1}', '\u{7}', '\u{fffe}']), "{text}");
        elements(&text);
    }
}
