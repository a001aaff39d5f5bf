//! The dashboards: their queries, and what Grafana needs to show them.

use crate::files;
use serde_json::Value;
use std::collections::BTreeSet;

/// A dashboard.
#[derive(Debug)]
pub struct Dashboard {
    /// Name of its file.
    pub file: String,
    /// All of it.
    pub value: Value,
}

impl Dashboard {
    /// Its panels.
    pub fn panels(&self) -> &[Value] {
        self.value["panels"].as_array().map(Vec::as_slice).unwrap_or_default()
    }

    /// Variables that a query fills: name, and the metric and the label that it asks for.
    pub fn variables(&self) -> Vec<(String, String, String)> {
        let list = self.value["templating"]["list"].as_array().into_iter().flatten();
        let asked = list.filter(|variable| variable["type"] == "query").map(|variable| {
            let text = |value: &Value| value.as_str().map(str::to_owned).expect("a text");
            let query = text(&variable["query"]["query"]);
            let inner = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
            let (metric, label) =
                inner.and_then(|inner| inner.split_once(", ")).expect("label_values(metric, label)");
            (text(&variable["name"]), metric.to_owned(), label.to_owned())
        });
        asked.collect()
    }
}

/// All dashboards of the chart.
pub fn all() -> Vec<Dashboard> {
    let read = |(file, text): (String, String)| {
        let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        Dashboard { file, value }
    };
    files("dashboards", ".json").into_iter().map(read).collect()
}

/// Title of a panel and its queries.
pub fn queries(panel: &Value) -> (&str, Vec<&str>) {
    let targets = panel["targets"].as_array().into_iter().flatten();
    let exprs = targets.map(|target| target["expr"].as_str().expect("a query")).collect();
    (panel["title"].as_str().expect("a title"), exprs)
}

#[test]
fn every_panel_has_what_it_takes_to_be_read() {
    let mut uids = BTreeSet::new();
    for Dashboard { file, value } in &all() {
        assert!(
            value["schemaVersion"].as_u64().is_some_and(|version| version >= 39),
            "{file}: schemaVersion"
        );
        assert!(
            uids.insert(value["uid"].as_str().expect("a uid").to_owned()),
            "{file}: a uid that another one has"
        );
        let source = &value["templating"]["list"][0];
        assert_eq!(
            (&source["name"], &source["type"]),
            (&"datasource".into(), &"datasource".into()),
            "{file}"
        );
        let mut ids = BTreeSet::new();
        let mut places: Vec<[u64; 4]> = Vec::new();
        for panel in value["panels"].as_array().expect("panels") {
            let (title, exprs) = queries(panel);
            let what = format!("{file}, {title:?}");
            assert!(!exprs.is_empty(), "{what}: no query");
            assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{what}: an id that another one has");
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{what}");
            assert!(
                panel["description"].as_str().is_some_and(|text| text.len() > 10),
                "{what}: no description"
            );
            let unit = panel["fieldConfig"]["defaults"]["unit"].as_str();
            assert!(unit.is_some_and(|unit| !unit.is_empty()), "{what}: no unit");
            let [x, y, w, h] =
                ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().expect("a place"));
            assert!(w > 0 && h > 0 && x + w <= 24, "{what}: outside of the 24 columns");
            let over = places
                .iter()
                .find(|[x2, y2, w2, h2]| x < x2 + w2 && *x2 < x + w && y < y2 + h2 && *y2 < y + h);
            assert_eq!(over, None, "{what} lies over another panel");
            places.push([x, y, w, h]);
        }
    }
    assert_eq!(uids.len(), 4, "{uids:?}");
}
