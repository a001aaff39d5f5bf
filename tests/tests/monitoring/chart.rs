//! What the chart makes of the files.

use crate::dashboards;
use crate::rules::groups;
use crate::{files, folder, run};
use aegis_tests::apiserver::{KUBERNETES, NAMESPACE, tool};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs;
use std::process::Command;

const RULES: &str = "metrics.rules.enabled=true";
const DASHBOARDS: &str = "metrics.dashboards.enabled=true";

fn helm(arguments: &[&str]) -> Command {
    let mut command = Command::new(tool("helm").expect("helm"));
    for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(variable, std::env::temp_dir().join("aegis-monitoring-helm"));
    }
    command.args(arguments);
    command
}

/// The objects that the chart renders with these values.
fn render(values: &[&str]) -> Result<Vec<Value>, String> {
    let chart = folder("").display().to_string();
    let mut command =
        helm(&["template", "aegis", &chart, "--namespace", NAMESPACE, "--kube-version", KUBERNETES]);
    for value in values {
        command.args(["--set", value]);
    }
    let documents = run(&mut command)?;
    let objects = serde_yaml_ng::Deserializer::from_str(&documents)
        .map(|document| Value::deserialize(document).expect("the chart renders YAML"));
    Ok(objects.filter(|object| !object.is_null()).collect())
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

/// Groups of all rule files, by name of the file.
fn written() -> Vec<Value> {
    files("rules", ".yaml").iter().flat_map(|(_, text)| groups(text)).collect()
}

#[test]
fn the_objects_hold_what_is_in_the_files_and_nothing_else_changes() {
    let before = render(&[]).expect("render");
    let after = render(&[RULES, DASHBOARDS, "metrics.rules.labels.release=monitoring"]).expect("render");
    let (added, rest): (Vec<Value>, Vec<Value>) = after.into_iter().partition(|object| {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        object["kind"] == "PrometheusRule" || name.starts_with("aegis-dashboard-")
    });
    assert_eq!(rest, before);

    let rules = of_kind(&added, "PrometheusRule");
    assert_eq!(rules.len(), 1);
    assert_eq!(rules[0]["apiVersion"], "monitoring.coreos.com/v1");
    assert_eq!(rules[0]["metadata"]["namespace"], NAMESPACE);
    assert_eq!(rules[0]["metadata"]["labels"]["release"], "monitoring");
    assert_eq!(rules[0]["spec"], json!({"groups": written()}));

    let maps = of_kind(&added, "ConfigMap");
    let known = files("dashboards", ".json");
    assert_eq!(maps.len(), known.len());
    for (map, (file, text)) in maps.iter().zip(known) {
        assert_eq!(map["data"], json!({format!("aegis-{file}"): text}));
        assert_eq!(map["metadata"]["name"], format!("aegis-dashboard-{}", file.trim_end_matches(".json")));
        assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
        assert_eq!(map["metadata"]["annotations"], json!({"grafana_folder": "Aegis"}));
    }
    assert_eq!(dashboards::all().len(), maps.len());
}

#[test]
fn alerts_can_be_left_out_by_name() {
    let without = "metrics.rules.disabled={AegisFlowsLimited,AegisCountriesOld,AegisCountriesUnreadable}";
    let rendered = render(&[RULES, without]).expect("render");
    let mut expected = written();
    for group in &mut expected {
        group["rules"].as_array_mut().expect("rules").retain(|rule| {
            let name = rule["alert"].as_str().unwrap_or_default();
            !["AegisFlowsLimited", "AegisCountriesOld", "AegisCountriesUnreadable"].contains(&name)
        });
    }
    // A group without rules is none.
    expected.retain(|group| group["name"] != "aegis-countries");
    assert_eq!(of_kind(&rendered, "PrometheusRule")[0]["spec"]["groups"], json!(expected));

    let error = render(&[RULES, "metrics.rules.disabled={AegisFlowLimited}"]).expect_err("no such alert");
    assert!(error.contains("there is no alert AegisFlowLimited"), "{error}");
}

#[test]
fn the_sidecar_finds_dashboards_by_labels_of_ones_own() {
    let own = ["metrics.dashboards.labels.grafana_dashboard=null", "metrics.dashboards.labels.shown=yes"];
    let rendered =
        render(&[DASHBOARDS, own[0], own[1], "metrics.dashboards.annotations=null"]).expect("render");
    for map in of_kind(&rendered, "ConfigMap").iter().filter(|map| map["data"].to_string().contains("panels"))
    {
        let metadata = &map["metadata"];
        assert_eq!(metadata["labels"]["shown"], "yes", "{metadata}");
        assert_eq!(metadata["labels"].get("grafana_dashboard"), None, "{metadata}");
        assert_eq!(metadata.get("annotations"), None, "{metadata}");
    }
    assert!(of_kind(&rendered, "PrometheusRule").is_empty());
}

/// Metrics have a label `namespace`, an account's. Where a scrape puts that of the pod in its place, rules and dashboards name the
/// wrong one; and they name nodes by the label `node`.
#[test]
fn service_monitors_give_the_labels_that_rules_and_dashboards_go_by() {
    let (with_usage, monitored) = ("usage.enabled=true", "metrics.serviceMonitor.enabled=true");
    let without = render(&[monitored]).expect("render");
    assert_eq!(of_kind(&without, "ServiceMonitor").len(), 2);
    let rendered = render(&[monitored, with_usage]).expect("render");
    let monitors = of_kind(&rendered, "ServiceMonitor");
    let services = of_kind(&rendered, "Service");
    let names: Vec<&Value> = monitors.iter().map(|monitor| &monitor["metadata"]["name"]).collect();
    assert_eq!(names, ["aegis-operator", "aegis-node-agent", "aegis-collector"]);
    for monitor in monitors {
        // By which rules know the job.
        let service = services.iter().find(|it| it["metadata"]["name"] == monitor["metadata"]["name"]);
        let ports = service.expect("a Service of that name")["spec"]["ports"].as_array().expect("ports");
        assert!(ports.iter().any(|port| port["name"] == "metrics"), "{ports:?}");
        let endpoint = &monitor["spec"]["endpoints"][0];
        assert_eq!(endpoint["honorLabels"], true, "{endpoint}");
        let node = json!([{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "node"}]);
        assert_eq!(endpoint["relabelings"], node);
    }
}

#[test]
fn the_package_has_the_files_without_their_tests() {
    let place = std::env::temp_dir().join(format!("aegis-monitoring-package-{}", std::process::id()));
    let (chart, to) = (folder("").display().to_string(), place.display().to_string());
    run(&mut helm(&["package", &chart, "--destination", &to])).expect("helm package");
    let package = fs::read_dir(&place).expect("list").next().expect("a package").expect("list").path();
    let listed = run(Command::new("tar").arg("-tzf").arg(&package)).expect("tar");
    fs::remove_dir_all(&place).expect("remove the package");
    let count = |part: &str| listed.lines().filter(|line| line.contains(part)).count();
    assert_eq!(count("aegis/rules/"), files("rules", ".yaml").len(), "{listed}");
    assert_eq!(count("aegis/dashboards/"), files("dashboards", ".json").len(), "{listed}");
}
