//! The chart: lint, the objects that it renders, and whether an API server takes them.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use aegis_tests::apiserver::{ApiServer, KUBERNETES, NAMESPACE, repository};
use serde::Deserialize;
use serde_json::Value;
use std::fs;
use std::sync::Arc;

/// Sets of values that people use, as `--set` takes them.
const SETS: [&[&str]; 12] = [
    &[],
    &[
        "operator.image=registry.example/op:1",
        "agent.image=registry.example/agent:1",
        "imagePullPolicy=Never",
    ],
    &["agent.privileged=true", "agent.updateStrategy=OnDelete", "agent.unknownPods=Pass"],
    &[
        "agent.clusterCidrs={10.0.0.0/8,192.0.2.0/24}",
        "agent.podCidrs={10.1.0.0/16}",
        "agent.uplinks={eth0,eth1}",
    ],
    &[
        "admission.enabled=false",
        "crds.install=false",
        "metrics.scrapeAnnotations=false",
        "operator.replicas=1",
    ],
    &[
        "agent.countries.volume.configMap.name=geoip",
        "agent.countries.file=c.mmdb",
        "agent.maxDestinations=2000000",
    ],
    &["agent.announcement.routingDaemon=BIRD", "agent.announcement.socketFolder=/run/bird"],
    &[
        "agent.announcement.frr.enabled=true",
        "agent.announcement.frr.neighbors[0].address=192.0.2.1",
        "agent.announcement.frr.neighbors[0].asn=4200000000",
    ],
    &[
        "admission.exemptGroups={a,b}",
        "imagePullSecrets[0].name=registry",
        "agent.extraArgs={--log=debug}",
        "metrics.dashboards.enabled=true",
    ],
    &[
        "usage.enabled=true",
        "usage.storage.storageClass=fast",
        "usage.publicUrl=https://use.example.com:8443",
        "usage.priorityClassName=system-cluster-critical",
    ],
    &[
        "usage.enabled=true",
        "usage.postgres.existingSecret=database",
        "usage.tls.existingSecret=certificate",
        "usage.apiTokens=true",
        "usage.extraArgs={--log=debug}",
        "usage.backlog.size=1Gi",
        "usage.backlog.folder=/var/lib/reports",
        "metrics.scrapeAnnotations=false",
    ],
    &[
        "usage.enabled=true",
        "usage.postgres.existingSecret=database",
        "usage.postgres.sslMode=verify-ca",
        "usage.postgres.ca.configMap=authorities",
        "usage.postgres.ca.key=rds.pem",
        "usage.postgres.clientSecret=client",
    ],
];

fn server() -> Arc<ApiServer> {
    ApiServer::shared(&[]).expect("start the API server")
}

fn chart() -> String {
    repository().join("charts/aegis").display().to_string()
}

fn render(server: &ApiServer, namespace: &str, values: &[&str]) -> Result<String, String> {
    let chart = chart();
    let mut arguments =
        vec!["template", "aegis", &chart, "--namespace", namespace, "--kube-version", KUBERNETES];
    for value in values {
        arguments.extend(["--set", value]);
    }
    server.helm(&arguments).map_err(|error| error.to_string())
}

fn objects(rendered: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(rendered)
        .map(|document| Value::deserialize(document).expect("the chart renders YAML"))
        .filter(|object| !object.is_null())
        .collect()
}

fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name}"))
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

#[test]
fn the_chart_passes_the_strict_lint() {
    server().helm(&["lint", "--strict", &chart(), "--kube-version", KUBERNETES]).expect("helm lint");
}

#[test]
fn an_api_server_takes_what_is_rendered() {
    let server = server();
    // Not where the chart is installed: what is there would mix with what is rendered.
    server.kubectl(&["create", "namespace", "rendered"]).expect("create a namespace");
    for values in SETS {
        let rendered =
            render(&server, "rendered", values).unwrap_or_else(|error| panic!("{values:?}: {error}"));
        let arguments = [
            "apply",
            "--server-side",
            "--force-conflicts",
            "--dry-run=server",
            "--validate=strict",
            "-f",
            "-",
        ];
        server.kubectl_with(&arguments, &rendered).unwrap_or_else(|error| panic!("{values:?}: {error}"));
    }
}

#[test]
fn wrong_values_are_refused_by_name() {
    let server = server();
    for (value, name) in [
        ("operator.replicas=0", "replicas"),
        ("agent.updateStrategy=Recreate", "updateStrategy"),
        ("agent.unknownPods=Maybe", "unknownPods"),
        ("agent.mark=0x1800", "mark"),
        ("agent.tunnelPort=0", "tunnelPort"),
        ("agent.clusterCidrs={nowhere}", "clusterCidrs"),
        ("agent.imagePolicy=Never", "imagePolicy"),
        ("operator.quarantineSeconds=0", "quarantineSeconds"),
        ("imagePullPolicy=Sometimes", "imagePullPolicy"),
        ("agent.limits.account.flows=-1", "flows"),
        ("agent.limits.account.newFlowsPerSecond=many", "newFlowsPerSecond"),
        ("agent.limits.account.leaveRoom=5", "leaveRoom"),
        ("agent.limits.pod.flows=5", "pod"),
        ("agent.countries.file=a/b", "file"),
        ("agent.maxDestinations=10", "maxDestinations"),
        ("agent.announcement.table=254", "table"),
        ("agent.announcement.routingDaemon=Quagga", "routingDaemon"),
        ("agent.announcement.frr.asn=0", "asn"),
        ("agent.announcement.frr.enabled=true", "neighbors"),
        ("agent.announcement.frr.neighbors[0].address=router", "address"),
        ("agent.announcement.frr.neighbors[0].password=two words", "password"),
        ("usage.storage.size=much", "size"),
        ("usage.retention.tensHours=0", "tensHours"),
        ("usage.enabled=true,usage.retention.minutesDays=500", "minutesDays"),
        ("usage.enabled=true,usage.retention.tensHours=500", "minutesDays"),
        ("usage.postgres.existingSecret=A B", "existingSecret"),
        ("usage.postgres.sslMode=allow", "sslMode"),
        ("usage.enabled=true,usage.postgres.sslMode=disable", "usage.postgres: without existingSecret"),
        (
            "usage.enabled=true,usage.postgres.existingSecret=a,usage.postgres.ca.configMap=a,usage.postgres.ca.secret=b",
            "usage.postgres.ca",
        ),
        ("usage.enabled=true,usage.extraArgs={--audience=mine}", "--audience=mine would shut out agents"),
        ("usage.enabled=true,usage.extraArgs={--audience,mine}", "--audience would shut out agents"),
        ("usage.enabled=true,usage.extraArgs={--agent-service-account=a/b}", "a/b would shut out agents"),
        ("usage.publicUrl=use.example", "publicUrl"),
        ("usage.replicas=2", "replicas"),
        ("usage.backlog.size=128", "size"),
        ("usage.backlog.size=1Ki", "size"),
        ("usage.backlog.folder=usage", "folder"),
    ] {
        let error = render(&server, NAMESPACE, &[value]).expect_err(value);
        assert!(error.contains(name), "{value}: {error}");
    }
}

#[test]
fn values_reach_the_arguments() {
    let server = server();
    let rendered = render(
        &server,
        NAMESPACE,
        &[
            "agent.image=a:1",
            "agent.tunnelPort=7000",
            "agent.uplinks={eth0,eth1}",
            "agent.limits.account.flows=2000000",
            "agent.limits.account.newFlowsPerSecond=5000",
            "agent.limits.account.leaveRoom=false",
            "agent.maxDestinations=2000000",
            "agent.countries.volume.hostPath.path=/var/lib/geoip",
            "agent.countries.file=c.mmdb",
        ],
    );
    let rendered = objects(&rendered.expect("render"));
    let agent = object(&rendered, "DaemonSet", "aegis-node-agent");
    let pod = &agent["spec"]["template"]["spec"];
    let arguments = strings(&pod["containers"][0]["args"]);
    for argument in [
        "--tunnel-port=7000",
        "--uplinks=eth0,eth1",
        "--account-flows=2000000",
        "--account-new-flows=5000",
        "--account-leaves-room=false",
        "--max-destinations=2000000",
        "--countries=/run/aegis/countries/c.mmdb",
    ] {
        assert!(arguments.contains(&argument), "{argument}: {arguments:?}");
    }
    assert_eq!(pod["containers"][0]["image"], "a:1");
    assert_eq!(pod["hostNetwork"], true);
    let named =
        |list: &Value| list.as_array().into_iter().flatten().find(|it| it["name"] == "countries").cloned();
    assert_eq!(named(&pod["volumes"]).expect("a volume")["hostPath"]["path"], "/var/lib/geoip");
    let mount = named(&pod["containers"][0]["volumeMounts"]).expect("a mount");
    assert_eq!((&mount["mountPath"], &mount["readOnly"]), (&"/run/aegis/countries".into(), &true.into()));
    assert_eq!(pod["containers"][0]["env"][0]["valueFrom"]["fieldRef"]["fieldPath"], "spec.nodeName");
    assert_eq!(agent["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"], 1);
}

/// Kind and name of an object.
fn identity(object: &Value) -> (String, String) {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    (text(&object["kind"]), text(&object["metadata"]["name"]))
}

#[test]
fn the_collector_and_a_way_to_it_are_all_that_usage_adds() {
    let monitors = "metrics.serviceMonitor.enabled=true";
    let without = render(&server(), NAMESPACE, &[monitors]).expect("render");
    assert!(
        !without.contains("aegis-collector") && !without.contains("egressallocations/usage"),
        "off, there is nothing of it"
    );
    let without = objects(&without);
    let with = objects(&render(&server(), NAMESPACE, &[monitors, "usage.enabled=true"]).expect("render"));
    let mut added = Vec::new();
    for object in &with {
        let (kind, name) = identity(object);
        let Some(before) = without.iter().find(|it| identity(it) == (kind.clone(), name.clone())) else {
            assert!(name.starts_with("aegis-collector"), "{kind} {name}");
            added.push(kind);
            continue;
        };
        let mut object = object.clone();
        let right = match name.as_str() {
            "aegis-viewer" | "aegis-cluster-viewer" => Some("get"),
            "aegis-editor" => Some("update"),
            _ => None,
        };
        if let Some(verb) = right {
            let rules = object["rules"].as_array_mut().expect("rules");
            let last = rules.pop().expect("a rule");
            assert_eq!(strings(&last["resources"]), ["egressallocations/usage"]);
            assert_eq!(strings(&last["verbs"]), [verb]);
        }
        if (kind.as_str(), name.as_str()) == ("DaemonSet", "aegis-node-agent") {
            let pod = &mut object["spec"]["template"]["spec"];
            let list = |value: &mut Value, of: &dyn Fn(&Value) -> bool| {
                value.as_array_mut().expect("a list").retain(|it| !of(it));
            };
            let own = |it: &Value| ["collector", "usage"].map(Value::from).contains(&it["name"]);
            list(&mut pod["volumes"], &own);
            list(&mut pod["containers"][0]["volumeMounts"], &own);
            list(&mut pod["containers"][0]["args"], &|it| {
                it.as_str().is_some_and(|it| it.starts_with("--usage-"))
            });
        }
        assert_eq!(object, *before, "{kind} {name}");
    }
    added.sort();
    let expected = [
        "ClusterRole",
        "ClusterRole",
        "ClusterRoleBinding",
        "ClusterRoleBinding",
        "ConfigMap",
        "Deployment",
        "PersistentVolumeClaim",
        "Role",
        "Role",
        "Secret",
        "Service",
        "ServiceAccount",
        "ServiceAccount",
        "ServiceMonitor",
    ];
    assert_eq!(added, expected);
    assert_eq!(with.len(), without.len() + added.len(), "nothing is gone");
}

#[test]
fn the_collector_gets_its_values() {
    let pod = |values: &[&str]| {
        let rendered = render(&server(), NAMESPACE, &[&["usage.enabled=true"], values].concat());
        let rendered = objects(&rendered.expect("render"));
        let deployment = object(&rendered, "Deployment", "aegis-collector");
        assert_eq!(
            (&deployment["spec"]["replicas"], &deployment["spec"]["strategy"]["type"]),
            (&1.into(), &"Recreate".into())
        );
        let kinds: Vec<String> = rendered.iter().map(|it| identity(it).0).collect();
        (deployment["spec"]["template"]["spec"].clone(), kinds)
    };
    let (sqlite, kinds) = pod(&["usage.retention.tensHours=12"]);
    let container = &sqlite["containers"][0];
    let arguments = strings(&container["args"]);
    for argument in [
        "--agent-service-account=aegis-system/aegis-node-agent",
        "--keep-tens-hours=12",
        "--keep-hours-days=400",
        "--tls-cert=/etc/aegis/tls/tls.crt",
        "--public-url=https://aegis-collector.aegis-system.svc",
    ] {
        assert!(arguments.contains(&argument), "{argument}: {arguments:?}");
    }
    assert!(!arguments.contains(&"--api-tokens"));
    assert_eq!(container["env"][0]["value"], "/var/lib/aegis/use.db");
    assert_eq!(sqlite["volumes"][2]["persistentVolumeClaim"]["claimName"], "aegis-collector");
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert!(kinds.contains(&"Secret".into()) && kinds.contains(&"PersistentVolumeClaim".into()));

    let (postgres, kinds) = pod(SETS[10]);
    let container = &postgres["containers"][0];
    assert!(strings(&container["args"]).contains(&"--api-tokens"));
    // The password is neither in the arguments nor in the manifest.
    let from = &container["env"][0]["valueFrom"]["secretKeyRef"];
    assert_eq!((&from["name"], &from["key"]), (&"database".into(), &"url".into()));
    assert_eq!(postgres["volumes"].as_array().map(Vec::len), Some(2), "no volume for SQLite");
    assert_eq!(postgres["volumes"][0]["secret"]["secretName"], "certificate");
    assert!(!kinds.contains(&"Secret".into()) && !kinds.contains(&"PersistentVolumeClaim".into()));
    let options = |pod: &Value| {
        let env = pod["containers"][0]["env"].as_array().into_iter().flatten();
        let options = env.filter(|it| it["name"].as_str().is_some_and(|name| name.starts_with("PG")));
        options.map(|it| format!("{}={}", it["name"], it["value"]).replace('"', "")).collect::<Vec<_>>()
    };
    assert!(options(&postgres).is_empty(), "what is not said is verified in full");
    let (postgres, _) = pod(SETS[11]);
    let expected = [
        "PGSSLMODE=verify-ca",
        "PGSSLROOTCERT=/etc/aegis/postgres/rds.pem",
        "PGSSLCERT=/etc/aegis/postgres-client/tls.crt",
        "PGSSLKEY=/etc/aegis/postgres-client/tls.key",
    ];
    assert_eq!(options(&postgres), expected);
    let only = serde_json::json!([{"key": "rds.pem", "path": "rds.pem"}]);
    let authorities = serde_json::json!({"name": "authorities", "items": only});
    assert_eq!(postgres["volumes"][2]["configMap"], authorities);
    assert_eq!(postgres["volumes"][3]["secret"]["secretName"], "client");
    let mounts = postgres["containers"][0]["volumeMounts"].as_array().into_iter().flatten();
    let mounted: Vec<_> =
        mounts.filter(|it| it["readOnly"] == true).map(|it| it["mountPath"].clone()).collect();
    assert_eq!(mounted, ["/etc/aegis/tls", "/etc/aegis/postgres", "/etc/aegis/postgres-client"]);
    let secret = "usage.postgres.ca.secret=authority";
    let (postgres, _) = pod(&["usage.postgres.existingSecret=database", secret]);
    let authority =
        serde_json::json!({"secretName": "authority", "items": [{"key": "ca.crt", "path": "ca.crt"}]});
    assert_eq!(postgres["volumes"][2]["secret"], authority, "without its key");
    assert_eq!(options(&postgres), ["PGSSLROOTCERT=/etc/aegis/postgres/ca.crt"]);
    let (claimed, kinds) = pod(&["usage.storage.existingClaim=mine"]);
    assert_eq!(claimed["volumes"][2]["persistentVolumeClaim"]["claimName"], "mine");
    assert!(!kinds.contains(&"PersistentVolumeClaim".into()));
}

#[test]
fn agents_get_a_token_for_the_collector_and_its_authority_but_not_its_key() {
    for (values, secret, more) in [
        (
            &["usage.enabled=true"][..],
            "aegis-collector-tls",
            ["--usage-backlog-size=128Mi", "--usage-backlog-hours=6"],
        ),
        (SETS[10], "certificate", ["--usage-backlog-size=1Gi", "--usage-backlog-hours=6"]),
    ] {
        let rendered = objects(&render(&server(), "elsewhere", values).expect("render"));
        let pod = &object(&rendered, "DaemonSet", "aegis-node-agent")["spec"]["template"]["spec"];
        let arguments = strings(&pod["containers"][0]["args"]);
        for argument in more.iter().chain(&["--usage-collector=https://aegis-collector.elsewhere.svc"]) {
            assert!(arguments.contains(argument), "{argument}: {arguments:?}");
        }
        let volume = |name: &str| {
            let volumes = pod["volumes"].as_array().into_iter().flatten();
            volumes.into_iter().find(|it| it["name"] == name).expect("a volume").clone()
        };
        let sources = &volume("collector")["projected"]["sources"];
        let token = &sources[0]["serviceAccountToken"];
        assert_eq!((&token["audience"], &token["path"]), (&"aegis-collector".into(), &"token".into()));
        let authority = &sources[1]["secret"];
        assert_eq!(authority["name"], secret);
        assert_eq!(authority["items"], serde_json::json!([{"key": "ca.crt", "path": "ca.crt"}]));
        assert_eq!(authority["optional"], true, "no agent waits for a certificate");
        assert_eq!(sources.as_array().map(Vec::len), Some(2));
        // Of all containers only the agent has them.
        let mounts =
            pod["containers"].as_array().into_iter().flatten().map(|it| it["volumeMounts"].to_string());
        assert_eq!(mounts.filter(|it| it.contains("/run/aegis/collector")).count(), 1);
    }
}

/// Renders with the FRR sidecar, two neighbours and further values.
fn render_frr(more: &[&str]) -> Result<String, String> {
    const FRR: [&str; 6] = [
        "agent.announcement.frr.enabled=true",
        "agent.announcement.frr.asn=4200000001",
        "agent.announcement.frr.neighbors[0].address=192.0.2.1,agent.announcement.frr.neighbors[0].asn=64500",
        "agent.announcement.frr.neighbors[1].address=192.0.2.2,agent.announcement.frr.neighbors[1].asn=64501",
        "agent.announcement.frr.neighbors[1].bfd=false",
        "agent.announcement.frr.neighbors[1].password=sesame$1/&",
    ];
    render(&server(), NAMESPACE, &[&FRR, more].concat())
}

#[test]
fn frr_runs_beside_the_agent_with_what_the_values_say() {
    let rendered = objects(
        &render_frr(&["agent.announcement.table=181", "agent.announcement.frr.bfd.multiplier=5"])
            .expect("render"),
    );
    let files = &object(&rendered, "Secret", "aegis-frr")["stringData"];
    let lines = |file: &str| -> Vec<String> {
        files[file].as_str().expect(file).lines().map(|line| line.trim().to_owned()).collect()
    };
    assert!(lines("zebra.conf").contains(&"ip import-table 181".to_owned()));
    let bgpd = lines("bgpd.conf");
    for line in [
        "router bgp 4200000001",
        "redistribute table 181 route-map AEGIS-OWN",
        "neighbor 192.0.2.1 remote-as 64500",
        "neighbor 192.0.2.1 bfd profile aegis",
        "neighbor 192.0.2.2 password sesame$1/&",
        "neighbor 192.0.2.2 route-map AEGIS-OWN out",
        "neighbor 192.0.2.2 route-map AEGIS-NOTHING in",
        "ip prefix-list AEGIS-OWN seq 5 permit 0.0.0.0/0 ge 32",
        "bgp graceful-restart-disable",
        "redistribute kernel route-map AEGIS-KERNEL6",
        "match metric 16711680",
        "neighbor 192.0.2.2 route-map AEGIS-OWN6 out",
        "ipv6 prefix-list AEGIS-OWN6 seq 5 permit ::/0 ge 64 le 64",
    ] {
        assert!(bgpd.contains(&line.to_owned()), "no {line:?} in {bgpd:#?}");
    }
    let activated = bgpd.iter().filter(|line| *line == "neighbor 192.0.2.1 activate").count();
    assert_eq!(activated, 2, "both families: {bgpd:#?}");
    assert!(!bgpd.contains(&"neighbor 192.0.2.2 bfd profile aegis".to_owned()), "BFD is off: {bgpd:#?}");
    assert!(!bgpd.iter().any(|line| line.starts_with("neighbor 192.0.2.1 password")), "{bgpd:#?}");
    assert!(lines("bfdd.conf").contains(&"detect-multiplier 5".to_owned()));

    let pod =
        |rendered: &[Value]| object(rendered, "DaemonSet", "aegis-node-agent")["spec"]["template"].clone();
    let with = pod(&rendered);
    let (agent, frr) = (&with["spec"]["containers"][0], &with["spec"]["containers"][1]);
    let arguments = strings(&agent["args"]);
    for flag in ["--announcement-table=181", "--routing-daemon=FRR", "--routing-sockets=/var/run/frr"] {
        assert!(arguments.contains(&flag), "{arguments:?}");
    }
    assert!(strings(&agent["securityContext"]["capabilities"]["add"]).contains(&"DAC_OVERRIDE"));
    assert_eq!(frr["name"], "frr");
    // Another configuration means other pods.
    let other = pod(&objects(&render_frr(&["agent.announcement.table=182"]).expect("render")));
    assert_ne!(
        with["metadata"]["annotations"]["aegis.dev/frr"],
        other["metadata"]["annotations"]["aegis.dev/frr"]
    );

    let without = objects(&render(&server(), NAMESPACE, &[]).expect("render"));
    let containers = &pod(&without)["spec"]["containers"];
    assert_eq!(containers.as_array().map(Vec::len), Some(1));
    let added = strings(&containers[0]["securityContext"]["capabilities"]["add"]);
    assert!(!added.contains(&"DAC_OVERRIDE"), "{added:?}");
    assert!(!without.iter().any(|object| object["kind"] == "Secret"));
}

#[test]
fn frr_can_only_be_told_what_it_can_do() {
    for (value, message) in [
        ("agent.announcement.routingDaemon=BIRD", "routingDaemon can't be BIRD"),
        ("agent.announcement.table=0", "FRR reads tables 1 to 252"),
        ("agent.announcement.table=1000", "FRR reads tables 1 to 252"),
    ] {
        let error = render_frr(&[value]).expect_err(value);
        assert!(error.contains(message), "{value}: {error}");
    }
}

#[test]
fn definitions_survive_the_release() {
    let rendered = objects(&render(&server(), NAMESPACE, &[]).expect("render"));
    let definitions: Vec<&Value> =
        rendered.iter().filter(|object| object["kind"] == "CustomResourceDefinition").collect();
    assert_eq!(definitions.len(), 8);
    for definition in definitions {
        assert_eq!(definition["metadata"]["annotations"]["helm.sh/resource-policy"], "keep", "{definition}");
    }
    // A chart that templates its definitions must not hold objects of them: the first installation would fail.
    let versions: Vec<&str> = rendered.iter().filter_map(|object| object["apiVersion"].as_str()).collect();
    assert!(!versions.contains(&"aegis.dev/v1alpha1"), "{versions:?}");
}

#[test]
fn an_upgrade_and_an_uninstall_keep_what_people_wrote() {
    // A server of its own, since the release goes.
    let server = ApiServer::start().expect("start the API server");
    server.install_chart(&["usage.enabled=true"]).expect("install");
    let prefix = repository().join("examples/quickstart.yaml").display().to_string();
    server.kubectl(&["apply", "-f", &prefix]).expect("apply the quickstart");
    let certificate = || {
        let get = ["get", "secret", "aegis-collector-tls", "-n", NAMESPACE, "-o", "jsonpath={.data}"];
        server.kubectl(&get).expect("the certificate of the collector")
    };
    let before = certificate();
    server.install_chart(&["usage.enabled=true", "agent.logFormat=Text"]).expect("upgrade");
    assert_eq!(certificate(), before, "clients that trust it go on");
    server.helm(&["uninstall", "aegis", "--namespace", NAMESPACE]).expect("uninstall");
    server.kubectl(&["get", "apfx", "documentation"]).expect("the prefix is still there");
    let claim = ["get", "persistentvolumeclaim", "aegis-collector", "-n", NAMESPACE];
    server.kubectl(&claim).expect("what is known of use is still there");
    server.install_chart(&[]).expect("install again");
    server.kubectl(&["get", "zbind", "partners", "-n", "shop"]).expect("the binding is still there");
}

#[test]
fn every_right_says_why() {
    let folder = repository().join("charts/aegis/templates");
    let mut rules = 0;
    for file in ["rbac-operator.yaml", "rbac-node-agent.yaml", "rbac-accounts.yaml", "rbac-collector.yaml"] {
        let text = fs::read_to_string(folder.join(file)).expect(file);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (number, line) in lines.iter().enumerate().filter(|(_, line)| line.starts_with("- apiGroups:")) {
            rules += 1;
            let comment: Vec<&str> =
                lines[..number].iter().rev().take_while(|line| line.starts_with('#')).copied().collect();
            let comment = comment.join(" ");
            let verbs = lines[number..].iter().find_map(|line| line.strip_prefix("verbs: [")).expect("verbs");
            for verb in verbs.trim_end_matches(']').split(", ") {
                let said = comment.split(|c: char| !c.is_alphanumeric()).any(|word| word == verb);
                assert!(said, "{file}:{}: no comment says why {verb:?} is needed: {line}", number + 1);
                assert_ne!(verb, "*", "{file}:{}", number + 1);
            }
        }
    }
    assert!(rules >= 10, "only {rules} rules found");
}

#[test]
fn every_value_is_described() {
    let chart = repository().join("charts/aegis");
    let values = fs::read_to_string(chart.join("values.yaml")).expect("values.yaml");
    let schema = fs::read_to_string(chart.join("values.schema.json")).expect("values.schema.json");
    let schema: Value = serde_json::from_str(&schema).expect("the schema is JSON");
    let reference = fs::read_to_string(repository().join("docs/reference/chart.md")).expect("chart.md");
    let parsed: Value = serde_yaml_ng::from_str(&values).expect("values.yaml is YAML");
    let mut paths = Vec::new();
    leaves("", &parsed, &schema, &mut paths);
    assert!(paths.len() > 30, "{paths:?}");
    for path in paths {
        assert!(reference.contains(&format!("`{path}`")), "docs/reference/chart.md lacks {path}");
    }
    let lines: Vec<&str> = values.lines().map(str::trim_start).collect();
    for (number, line) in lines.iter().enumerate().skip(1) {
        let is_value = !line.is_empty() && !line.starts_with(['#', '-']) && !line.ends_with(':');
        let in_group = lines[number - 1].starts_with('#');
        let nested = line.starts_with("requests:") || line.starts_with("limits:");
        assert!(!is_value || in_group || nested, "values.yaml:{}: no comment above {line:?}", number + 1);
    }
}

/// Paths of all values that are not groups, each of which the schema must know.
fn leaves(path: &str, values: &Value, schema: &Value, paths: &mut Vec<String>) {
    let Some(members) = values.as_object() else { return };
    assert_eq!(schema["additionalProperties"], false, "the schema lets unknown values below {path:?} pass");
    for (name, value) in members {
        let path = format!("{path}{}{name}", if path.is_empty() { "" } else { "." });
        let schema = &schema["properties"][name];
        assert!(schema.is_object(), "the schema lacks {path}");
        if schema["properties"].is_object() {
            leaves(&path, value, schema, paths);
        } else {
            paths.push(path);
        }
    }
}
