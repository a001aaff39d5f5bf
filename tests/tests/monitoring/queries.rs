//! Every query of every panel and rule against a real Prometheus that scrapes what operator, agents and collector serve: first while all
//! is well, then while much is wrong, at last when nobody is there any more.

use crate::dashboards::{self, queries};
use crate::exposition::{Agents, Collector, NODES, Operator};
use crate::prometheus::Prometheus;
use crate::rules;
use aegis_common::Counter;
use aegis_tests::apiserver::repository;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

/// More than a busy machine takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Alerts whose reasons this test does not bring about: no leader, or none that plans, a plan that breaks an invariant, objects that
/// are older than what nodes have, a node whose Lease is overdue, reports that no longer come, a store that fails, alerts of accounts that
/// cannot be told, a wrong certificate. That what they look at is there, the test sees; when they are raised, promtool's.
const NOT_RAISED: [&str; 9] = [
    "AegisOperatorWithoutLeader",
    "AegisOperatorStuck",
    "AegisPlanRefused",
    "AegisAddressesWithheld",
    "AegisNodeFenced",
    "AegisNobodyReports",
    "AegisUsageUpkeepFails",
    "AegisUsageAlertsFail",
    "AegisCertificateUnusable",
];

/// Alerts that say that there is nothing to scrape.
const NOBODY: [&str; 3] = ["AegisScrapeFails", "AegisAgentsAbsent", "AegisOperatorAbsent"];

/// Those that come when operator and collector have lost their rights.
const FAILING: [&str; 2] = ["AegisOperatorFailing", "AegisDeliveriesPutOff"];

/// What there are only figures of once something has failed.
const FAILED: [&str; 2] = ["aegis_operator_api_errors_total", "aegis_collector_deliveries_total{outcome"];

/// Waits until nothing is missing any more.
fn wait_until_nothing_lacks(what: &str, lacking: impl Fn() -> Vec<String>) {
    let limit = Instant::now() + PATIENCE;
    loop {
        let lacks = lacking();
        if lacks.is_empty() {
            return;
        }
        assert!(Instant::now() < limit, "{what}, not after {} s:\n{}", PATIENCE.as_secs(), lacks.join("\n"));
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Fails if Prometheus cannot make sense of the query.
fn ask(prometheus: &Prometheus, what: &str, expr: &str) -> Vec<(Value, f64)> {
    prometheus.query(expr).unwrap_or_else(|error| panic!("{what}: {expr}: {error}"))
}

/// A query as Grafana sends it, for each value of the dashboard's variables: none while there is nothing to choose.
fn substituted(prometheus: &Prometheus, board: &dashboards::Dashboard, expr: &str) -> Vec<String> {
    let mut all = vec![expr.replace("$__rate_interval", "5m")];
    for (name, metric, label) in board.variables() {
        let values = prometheus.label_values(&metric, &label);
        let with = |expr: &String| {
            values.iter().map(|value| expr.replace(&format!("${name}"), value)).collect::<Vec<_>>()
        };
        all = all.iter().flat_map(with).collect::<BTreeSet<_>>().into_iter().collect();
    }
    assert!(!all.iter().any(|expr| expr.contains('$')), "{}: an unknown variable in {all:?}", board.file);
    all
}

/// Queries of panels that find nothing, or no number.
fn empty_panels(prometheus: &Prometheus) -> Vec<String> {
    let mut empty = Vec::new();
    for board in dashboards::all() {
        for panel in board.panels() {
            let (title, exprs) = queries(panel);
            for expr in exprs {
                let sent = substituted(prometheus, &board, expr);
                if sent.is_empty() {
                    empty.push(format!("{}: nothing to choose", board.file));
                }
                for expr in sent {
                    let found = ask(prometheus, &format!("{}, {title:?}", board.file), &expr);
                    if !found.iter().any(|(_, value)| value.is_finite()) {
                        empty.push(format!("{}, {title:?}: {expr}", board.file));
                    }
                }
            }
        }
    }
    empty
}

/// Alerts whose query finds something now, whether or not for long enough.
fn raised(prometheus: &Prometheus) -> BTreeSet<String> {
    let alerts = rules::alerts().into_iter();
    alerts.filter(|it| !ask(prometheus, &it.name, &it.expr).is_empty()).map(|it| it.name).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Metrics that a query asks for, each with its labels as they stand there.
fn selectors(expr: &str) -> Vec<(String, String)> {
    let letter = |c: char| c.is_ascii_alphanumeric() || "_:".contains(c);
    let mut found = Vec::new();
    let mut rest = expr;
    while let Some(at) = rest.find("aegis_") {
        let inside = rest[..at].ends_with(letter);
        let name: String = rest[at..].chars().take_while(|c| letter(*c)).collect();
        rest = &rest[at + name.len()..];
        let labels =
            rest.strip_prefix('{').and_then(|labels| labels.split_once('}')).map_or("", |(labels, _)| labels);
        if !inside {
            found.push((name, labels.to_owned()));
        }
    }
    found
}

/// A metric with its labels, whatever is chosen in the dashboard.
fn chosen((name, labels): (String, String)) -> String {
    let labels = ["node", "address"].iter().fold(labels, |labels, variable| {
        labels
            .replace(&format!("{variable}=\"${variable}\""), "")
            .replace(&format!("{variable}=~\"${variable}\""), "")
    });
    format!("{name}{{{}}}", labels.trim_start_matches(','))
}

/// All queries: what they are of, and they themselves.
fn all_queries() -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> =
        rules::all().into_iter().map(|rule| (rule.name, rule.expr)).collect();
    for board in dashboards::all() {
        for panel in board.panels() {
            let (title, exprs) = queries(panel);
            all.extend(exprs.into_iter().map(|expr| (format!("{}, {title:?}", board.file), expr.to_owned())));
        }
    }
    all
}

#[test]
fn selectors_are_found_in_queries() {
    let expr = "sum(rate(aegis_packets_total{reason=~\"a|b\"}[5m])) / (aegis_table_size > 0) + address:aegis_ports_in_use:sum";
    let found = selectors(expr);
    let found: Vec<(&str, &str)> =
        found.iter().map(|(name, labels)| (name.as_str(), labels.as_str())).collect();
    assert_eq!(found, [("aegis_packets_total", "reason=~\"a|b\""), ("aegis_table_size", "")]);
}

/// A reason that there is not finds nothing, and nobody notices: rates of nothing raise no alert.
#[test]
fn reasons_that_queries_name_exist() {
    let known: BTreeSet<&str> = Counter::ALL.iter().map(|counter| counter.label()).collect();
    let mut named = 0;
    for (what, expr) in all_queries() {
        for (name, labels) in selectors(&expr) {
            let words = labels.split_once("reason=").map(|(_, rest)| rest.trim_start_matches('~'));
            let Some(words) = words.and_then(|words| words.strip_prefix('"')?.split('"').next()) else {
                continue;
            };
            let plain = words.chars().all(|c| c.is_ascii_lowercase() || "_|".contains(c));
            if !plain || !["aegis_packets_total", "aegis_bytes_total"].contains(&name.as_str()) {
                continue;
            }
            for word in words.split('|') {
                named += 1;
                assert!(known.contains(word), "{what}: there is no reason {word}");
            }
        }
    }
    assert!(named > 20, "only {named} reasons found");
}

#[test]
fn metrics_that_queries_name_are_in_the_reference() {
    let page = fs::read_to_string(repository().join("docs/reference/metrics.md")).expect("read the page");
    let section = |text: &'static str, page: &str| -> [String; 2] {
        let (before, after) = page.split_once(text).expect("a section for each program");
        [before, after].map(str::to_owned)
    };
    let [agent, rest] = section("\n## Operator", &page);
    let [operator, collector] = section("\n## Collector", &rest);
    let ends = ["", "_total", "_bucket"];
    for (what, expr) in all_queries() {
        for (metric, _) in selectors(&expr) {
            let of = [("aegis_operator_", &operator), ("aegis_collector_", &collector), ("aegis_", &agent)];
            let mut of =
                of.into_iter().filter_map(|(prefix, page)| Some((page, metric.strip_prefix(prefix)?)));
            let (section, name) = of.next().expect("a metric of ours");
            let listed = ends
                .iter()
                .filter_map(|end| name.strip_suffix(end))
                .any(|name| section.contains(&format!("| `{name}` |")));
            assert!(listed, "{what}: docs/reference/metrics.md lacks {metric}");
        }
    }
}

#[test]
fn every_query_finds_something_and_alerts_only_what_is_wrong() {
    let agents = Agents::start();
    let operator = Operator::start();
    let collector = Collector::start(&operator);
    let mut targets = vec![
        ("aegis-operator", NODES[0].to_owned(), operator.port()),
        ("aegis-collector", NODES[1].to_owned(), collector.port()),
    ];
    targets.extend(
        NODES.into_iter().zip(agents.ports).map(|(node, port)| ("aegis-node-agent", node.to_owned(), port)),
    );
    let prometheus = Prometheus::start(&targets);
    // What happens from now on is what rates are made of.
    wait_until_nothing_lacks("everybody is scraped", || {
        let scraped = ask(&prometheus, "targets", "up == 1").len();
        if scraped == targets.len() { Vec::new() } else { vec![format!("{scraped} of {}", targets.len())] }
    });
    operator.has_work();

    // All is well: no panel is empty, whatever is chosen in it, each record has a value, and no alert finds anything.
    wait_until_nothing_lacks("panels show something", || empty_panels(&prometheus));
    let known = rules::all();
    let records = known.iter().filter(|rule| !rule.is_alert());
    let records: Vec<&str> = records.map(|rule| rule.name.as_str()).collect();
    wait_until_nothing_lacks("records are made", || {
        let empty = records.iter().filter(|name| ask(&prometheus, name, name).is_empty());
        empty.map(|name| (*name).to_owned()).collect()
    });
    // The last scrape may be of a moment in which slices had just been asked for.
    wait_until_nothing_lacks("false alarms end", || raised(&prometheus).into_iter().collect());
    let mut loaded = prometheus.rules();
    loaded.sort();
    let mut expected: Vec<(String, String)> =
        known.iter().map(|rule| (rule.name.clone(), String::new())).collect();
    expected.sort();
    assert_eq!(loaded, expected, "rules that Prometheus evaluates, and their errors");

    // What is asked for is there, also where it means that nothing is wrong. An error that never came about is not.
    let asked = all_queries().into_iter().filter(|(_, expr)| !FAILED.iter().any(|name| expr.contains(name)));
    let selectors: Vec<String> = asked.flat_map(|(_, expr)| selectors(&expr)).map(chosen).collect();
    wait_until_nothing_lacks("there is something to look at", || {
        let empty = selectors.iter().filter(|selector| ask(&prometheus, "a selector", selector).is_empty());
        empty.cloned().collect()
    });
    no_reason_is_forgotten(&prometheus);

    // Much is wrong.
    agents.fall_ill();
    operator.run_short();
    let mut wrong: BTreeSet<String> = rules::alerts().into_iter().map(|alert| alert.name).collect();
    let quiet: BTreeSet<String> = &(&set(&NOT_RAISED) | &set(&NOBODY)) | &set(&FAILING);
    wrong.retain(|name| !quiet.contains(name));
    wait_until_nothing_lacks("alerts are raised", || (&wrong - &raised(&prometheus)).into_iter().collect());
    assert_eq!(&raised(&prometheus) - &wrong, BTreeSet::new(), "false alarms");
    operator.lose_rights();
    wait_until_nothing_lacks("alerts are raised", || {
        let _ = collector.deliver();
        (&set(&FAILING) - &raised(&prometheus)).into_iter().collect()
    });

    // Nobody is there.
    drop((agents, collector, operator));
    wait_until_nothing_lacks("alerts are raised", || {
        (&set(&NOBODY) - &raised(&prometheus)).into_iter().collect()
    });
}

/// Every reason for which packets are refused or dropped is in some panel of the dashboard about them.
fn no_reason_is_forgotten(prometheus: &Prometheus) {
    let boards = dashboards::all();
    let board = boards.iter().find(|board| board.file == "drops.json").expect("the dashboard of drops");
    let mut shown = BTreeSet::new();
    for panel in board.panels() {
        // Those for single nodes and rules show the worst alone.
        for expr in queries(panel).1.into_iter().filter(|expr| !expr.contains("topk")) {
            for expr in substituted(prometheus, board, expr) {
                let found = ask(prometheus, "drops.json", &expr);
                shown.extend(
                    found.iter().filter_map(|(labels, _)| labels["reason"].as_str().map(str::to_owned)),
                );
            }
        }
    }
    let lost = |label: &&str| label.starts_with("drop_") || label.starts_with("refuse_");
    for label in Counter::ALL.iter().map(|counter| counter.label()).filter(lost) {
        assert!(shown.contains(label), "drops.json does not show {label}");
    }
}
