//! The rule files: promtool's verdict, and what every alert must have.

use crate::{files, folder, run};
use aegis_tests::apiserver::repository;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

/// A recording or an alert rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// What it is called, or what it records.
    pub name: String,
    /// The query.
    pub expr: String,
    /// All of it.
    pub value: Value,
}

impl Rule {
    /// It may raise an alert.
    pub fn is_alert(&self) -> bool {
        self.value["alert"].is_string()
    }

    fn annotation(&self, name: &str) -> &str {
        let text = self.value["annotations"][name].as_str();
        text.unwrap_or_else(|| panic!("{} has no annotation {name}", self.name))
    }
}

/// Groups of a rule file.
pub fn groups(text: &str) -> Vec<Value> {
    let file: Value = serde_yaml_ng::from_str(text).expect("rules are YAML");
    file["groups"].as_array().expect("groups").clone()
}

/// All rules of the chart.
pub fn all() -> Vec<Rule> {
    let mut found = Vec::new();
    for (file, text) in files("rules", ".yaml") {
        for group in groups(&text) {
            for value in group["rules"].as_array().unwrap_or_else(|| panic!("{file}: a group without rules"))
            {
                let name = value["alert"].as_str().or(value["record"].as_str()).expect("a name").to_owned();
                let expr = value["expr"].as_str().expect("a query").to_owned();
                found.push(Rule { name, expr, value: value.clone() });
            }
        }
    }
    found
}

/// The alerts alone.
pub fn alerts() -> Vec<Rule> {
    all().into_iter().filter(Rule::is_alert).collect()
}

fn promtool(arguments: &[&str], folder_name: &str) {
    let mut command = Command::new("promtool");
    command.current_dir(folder(folder_name)).args(arguments);
    command.args(files(folder_name, ".yaml").into_iter().map(|(name, _)| name));
    run(&mut command).unwrap_or_else(|said| panic!("promtool: {said}"));
}

#[test]
fn promtool_finds_no_fault_with_the_rules() {
    promtool(&["check", "rules", "--lint=all", "--lint-fatal"], "rules");
}

#[test]
fn alerts_are_raised_and_cleared_as_their_tests_say() {
    promtool(&["test", "rules"], "rules/tests");
}

/// A test file could leave an alert out, or look at it only while it is quiet.
#[test]
fn every_alert_has_a_test_that_sees_it_come_and_go() {
    let mut seen: BTreeMap<String, Vec<bool>> = BTreeMap::new();
    let mut recorded = BTreeSet::new();
    for (file, text) in files("rules/tests", ".yaml") {
        let tests: Value = serde_yaml_ng::from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        for test in tests["tests"].as_array().into_iter().flatten() {
            for look in test["alert_rule_test"].as_array().into_iter().flatten() {
                let name = look["alertname"].as_str().expect("the name of an alert").to_owned();
                let raised = !look["exp_alerts"].as_array().expect("what is raised").is_empty();
                seen.entry(name).or_default().push(raised);
            }
            for look in test["promql_expr_test"].as_array().into_iter().flatten() {
                recorded.insert(look["expr"].as_str().expect("a query").to_owned());
            }
        }
    }
    for rule in all() {
        if rule.is_alert() {
            let looks = seen.get(&rule.name).map(Vec::as_slice).unwrap_or_default();
            let ends = (looks.first(), looks.last());
            assert_eq!(ends, (Some(&false), Some(&false)), "{}: quiet before and after", rule.name);
            assert!(looks.contains(&true), "{} is never raised", rule.name);
        } else {
            assert!(recorded.contains(&rule.name), "no test looks at {}", rule.name);
        }
    }
}

/// Where a heading of a page is found, as the places where Markdown is shown make it.
fn anchor(heading: &str) -> String {
    let heading = heading.trim().to_lowercase();
    let kept = heading.chars().filter_map(|c| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || "-_".contains(c) => Some(c),
        _ => None,
    });
    kept.collect()
}

#[test]
fn every_alert_says_what_is_wrong_and_leads_to_a_heading() {
    let page = fs::read_to_string(repository().join("docs/operations.md")).expect("read the page");
    let headings: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("## ").or(line.strip_prefix("### ")))
        .map(anchor)
        .collect();
    let reference =
        fs::read_to_string(repository().join("docs/reference/metrics.md")).expect("read the page");
    let alerts = alerts();
    assert!(alerts.len() >= 20, "only {} alerts", alerts.len());
    for alert in &alerts {
        let name = &alert.name;
        let severity = alert.value["labels"]["severity"].as_str().unwrap_or_default();
        assert!(["critical", "warning", "info"].contains(&severity), "{name}: severity {severity:?}");
        let runbook = alert.annotation("runbook");
        let heading = runbook.strip_prefix("docs/operations.md#");
        let heading = heading.unwrap_or_else(|| panic!("{name}: the runbook {runbook}"));
        assert!(headings.contains(heading), "{name}: docs/operations.md has no heading {heading}");
        // Nothing to name where nothing is left to ask.
        let text = format!("{} {}", alert.annotation("summary"), alert.annotation("description"));
        assert!(
            alert.expr.starts_with("absent(") || text.contains("{{ $"),
            "{name} names no object and no figure"
        );
        let row = format!("| `{name}` | {severity} |");
        assert!(reference.contains(&row), "docs/reference/metrics.md: no row {row}");
    }
    let names: BTreeSet<&String> = alerts.iter().map(|alert| &alert.name).collect();
    assert_eq!(names.len(), alerts.len(), "two alerts of one name: `metrics.rules.disabled` would take both");
    let rows = reference.lines().filter(|line| line.starts_with("| `Aegis")).count();
    assert_eq!(rows, alerts.len(), "docs/reference/metrics.md has other alerts");
}
