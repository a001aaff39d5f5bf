//! What each command says, from files: the very program, its output and its exit code. `AEGIS_BLESS=1` writes the expected output anew.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-aegis"));
    // Neither a cluster nor a configuration of whoever tests.
    command.current_dir(data("")).env("KUBECONFIG", "/nonexistent").env_remove("KUBERNETES_SERVICE_HOST");
    // Allowlists tell when they were made.
    command.env("SOURCE_DATE_EPOCH", "1767225600");
    command.args(arguments).output().expect("run the program")
}

fn output(arguments: &[&str], code: i32) -> String {
    let Output { status, stdout, stderr } = run(arguments);
    let (out, err) = (String::from_utf8(stdout).expect("UTF-8"), String::from_utf8(stderr).expect("UTF-8"));
    assert_eq!(status.code(), Some(code), "{arguments:?}\n{out}{err}");
    out
}

/// Compares with `data/<name>`.
fn golden(name: &str, arguments: &[&str], code: i32) {
    let text = output(arguments, code);
    let path = data(name);
    if std::env::var_os("AEGIS_BLESS").is_some() {
        std::fs::write(&path, &text).expect("write");
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "{arguments:?} says other than {}:\n{text}", path.display());
}

/// An error's text.
fn error(arguments: &[&str], code: i32) -> String {
    let output = run(arguments);
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{text}");
    text
}

const STATE: [&str; 2] = ["--state", "cluster.yaml"];

fn with<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    arguments.iter().chain(&STATE).copied().collect()
}

#[test]
fn status() {
    golden("status.txt", &with(&["status"]), 1);
    golden("status.json", &with(&["status", "-o", "json"]), 1);
    let shop = output(&with(&["status", "-n", "shop"]), 1);
    assert!(shop.contains("shop/partners") && !shop.contains("vault"), "{shop}");
    assert!(error(&["status", "--state", "nowhere.yaml"], 2).contains("read nowhere.yaml"));
}

#[test]
fn policies() {
    golden("policies.txt", &with(&["policies"]), 0);
    golden("policies-of-pod.txt", &with(&["policies", "--pod", "shop/worker"]), 0);
    golden("policies.json", &with(&["policies", "-o", "json", "--pod", "shop/worker"]), 0);
}

#[test]
fn trace() {
    // From the secondary, since the primary does not exist, by slices of its own node.
    golden("trace-web.txt", &with(&["trace", "shop/web", "198.51.100.7:443"]), 0);
    golden("trace-web.json", &with(&["trace", "shop/web", "198.51.100.7:443", "-o", "json"]), 0);
    // Through a node that holds slices.
    golden("trace-worker.txt", &with(&["trace", "worker", "198.51.100.7:80", "-n", "shop"]), 0);
    golden("trace-denied.txt", &with(&["trace", "sa/worker", "198.51.100.200:443", "-n", "shop"]), 0);
    // Covered over IPv6, and the allocation has none.
    golden("trace-no-ipv6.txt", &with(&["trace", "shop/web", "[2001:db8:9::1]:443"]), 0);
    // It has one address by itself: by ports of the pod's own node, or not at all.
    let single = |pod| output(&with(&["trace", pod, "[2001:db8:9::1]:443", "--state", "single.yaml"]), 0);
    let text = single("shop/web");
    assert!(
        text.contains("it leaves from shop/partners\n   2001:db8::7: 1024-3071 (8 slices of the node"),
        "{text}"
    );
    let text = single("shop/other");
    assert!(text.contains("it is refused, since node n2 has no IPv6 ports of shop/partners"), "{text}");
    for (subject, destination, said) in [
        ("bank/teller", "192.0.2.99", "no rule matches: it leaves with the node's address"),
        ("bank/teller", "10.96.0.10:53", "10.96.0.0/16 is inside the cluster"),
        ("bank/teller", "172.20.1.1", "172.20.0.0/16 is inside the cluster"),
        ("bank/teller", "10.244.3.9", "10.244.3.0/24 is inside the cluster"),
        ("shop/web", "198.51.100.7", "no port is given, so no rule with ports matches"),
    ] {
        let text = output(&with(&["trace", subject, destination]), 0);
        assert!(text.contains(said), "{subject} to {destination}:\n{text}");
    }
    assert!(
        error(&with(&["trace", "shop/nobody", "192.0.2.1"]), 2).contains("no pod nobody in namespace shop")
    );
    assert!(error(&with(&["trace", "shop/web", "192.0.2.1:99999"]), 2).contains("no port"));
    let text = output(&with(&["trace", "sa/ghost", "198.51.100.7:443", "-n", "shop"]), 0);
    assert!(text.contains("no pod of namespace shop runs as ghost"), "{text}");
}

#[test]
fn plan() {
    golden("plan.txt", &with(&["plan", "-f", "change.yaml"]), 3);
    golden("plan.json", &with(&["plan", "-f", "change.yaml", "-o", "json"]), 3);
    golden("plan-delete.txt", &with(&["plan", "--delete", "-f", "change.yaml"]), 3);
    let same = output(&with(&["plan", "-f", "cluster-policy.yaml"]), 0);
    assert!(same.contains("nothing would change"), "{same}");
    let wrong = error(&with(&["plan", "-f", "bad.yaml"]), 1);
    for fault in ["spec.precedence: must be at least 0", "spec.matches: there is no such field"] {
        assert!(wrong.contains(fault), "{wrong}");
    }
    let senseless = error(&with(&["plan", "-f", "bad-rule.yaml"]), 1);
    assert!(senseless.contains("EgressPolicy nowhere: spec.egress: "), "{senseless}");
}

#[test]
fn alerts() {
    golden("plan-alert.txt", &with(&["plan", "-f", "alert.yaml"]), 3);
    let json = output(&with(&["plan", "-f", "alert.yaml", "-o", "json"]), 3);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["alerts"].as_array().map(Vec::len), Some(3), "{json}");
    // As it stands it is no change; without its allocation it would not count.
    let state = ["--state", "cluster.yaml", "alert.yaml"];
    let same = output(&[&["plan", "-f", "alert.yaml"], &state[..]].concat(), 0);
    assert!(same.contains("nothing would change"), "{same}");
    let gone = output(&[&["plan", "--delete", "-f", "alert.yaml"], &state[..]].concat(), 3);
    assert!(gone.contains("UsageAlert shop/full") && gone.contains("deleted"), "{gone}");
    let wrong = error(&with(&["plan", "-f", "bad-alert.yaml"]), 1);
    for fault in [
        "spec: says nothing to look at",
        "spec.portUse.percent: must be at most 100",
        "spec.portUses: there is no such field",
        "spec.refusals.withinSeconds: must be a multiple of 10",
    ] {
        assert!(wrong.contains(fault), "{fault}: {wrong}");
    }
}

#[test]
fn usage_has_no_files() {
    for (arguments, said) in [
        (&["usage", "--token", "x", "--collector", "http://localhost:1"][..], "not sent in plain text"),
        (
            &["usage", "--token", "x", "--collector", "https://localhost:1"],
            "there is no connection to localhost:1",
        ),
        (&["usage", "--token-file", "nowhere"], "read nowhere"),
        (&["usage", "--account", "a", "-A"], "say one of them"),
        (&["usage", "--rule", "web"], "say binding/web or policy/web"),
        (&["usage", "--since", "soon"], "no length"),
        (&["usage", "--state", "cluster.yaml"], "unexpected argument"),
    ] {
        let text = error(arguments, 2);
        assert!(text.contains(said), "{arguments:?}: {text}");
    }
}

#[test]
fn applications() {
    golden("plan-application.txt", &with(&["plan", "-f", "application.yaml"]), 3);
    let with = |file: &'static str, arguments: &[&'static str]| {
        let state = ["--state", "cluster.yaml", "--state", file];
        output(&arguments.iter().copied().chain(state).collect::<Vec<_>>(), 0)
    };
    let policies = with("application.yaml", &["policies"]);
    assert!(policies.contains("namespace shop; to application ledger"), "{policies}");
    let trace = |file, to| with(file, &["trace", "shop/worker", to]);
    let (inside, outside) =
        (trace("application.yaml", "192.0.2.65:22"), trace("application.yaml", "198.51.100.7:22"));
    assert!(inside.contains("policy ledger: it leaves from shop/partners"), "{inside}");
    assert!(outside.contains("no: ports: TCP 22 is none of TCP 7000-7009"), "{outside}");
    let missing = trace("application-missing.yaml", "203.0.113.200:80");
    for said in [
        "policy ledger: it is refused, since EgressApplication ledger is not known",
        "EgressPolicy ledger names EgressApplication ledger, which does not exist; so pods that it matches otherwise are refused",
    ] {
        assert!(missing.contains(said), "{missing}");
    }
}

#[test]
fn services() {
    let trace = |to| {
        let state = ["--state", "cluster.yaml", "--state", "service.yaml"];
        output(&["trace", "shop/web", to].into_iter().chain(state).collect::<Vec<_>>(), 0)
    };
    for to in ["10.96.0.7:443", "partner:443", "partner.shop.svc.cluster.local:443"] {
        let text = trace(to);
        assert!(text.contains("to 198.51.100.9, TCP 443"), "{text}");
        assert!(text.contains("policy web-out: it leaves from shop/partners"), "{text}");
        assert!(text.contains("10.96.0.7 is a Service's"), "{text}");
    }
    // It has no such port.
    assert!(trace("10.96.0.7:80").contains("10.96.0.0/16 is inside the cluster"));
}

#[test]
fn top() {
    golden("top.txt", &with(&["top"]), 0);
    golden("top.json", &with(&["top", "-o", "json"]), 0);
    assert!(
        output(&with(&["top", "-n", "shop", "--node", "n3"]), 0).contains("nobody holds or wants a slice")
    );
    assert!(error(&with(&["top", "--watch"]), 2).contains("cannot be used with"));
}

#[test]
fn allowlist() {
    let with = |arguments: &[&'static str]| {
        let state = [&STATE[..], &["--state", "allowlist.yaml"]].concat();
        [&["allowlist"], arguments, &state].concat()
    };
    for form in ["text", "json", "csv", "terraform", "iptables", "nftables", "aws", "gcp", "azure"] {
        golden(&format!("allowlist-{form}.txt"), &with(&["feed", "-n", "mill", "-o", form]), 0);
    }
    for (arguments, said) in [
        (&["shop/partners", "bank/vault"][..], "203.0.113.0/31\n"),
        (&["-n", "shop", "partners", "bank/vault", "mill/young"], "203.0.113.0/31\n203.0.113.25/32\n"),
        (&["mill/feed", "mill/feed", "--family", "4"], "203.0.113.20/31\n203.0.113.22/32\n"),
        (&["mill/feed", "--family", "6"], "2001:db8:1:4::/63\n"),
        (&["--all", "-n", "shop"], "203.0.113.0/32\n"),
        (
            &["--all", "-A", "--family", "4"],
            "203.0.113.0/31\n203.0.113.20/31\n203.0.113.22/32\n203.0.113.25/32\n",
        ),
    ] {
        assert_eq!(output(&with(arguments), 0), said, "{arguments:?}");
    }
    for (arguments, said) in [
        (&["shop/missing"][..], "there is no EgressAllocation missing in namespace shop"),
        (&["shop/partners", "mill/idle"], "mill/idle has no addresses (the prefixes have no free address)"),
        (&["shop/partners", "--family", "6"], "there are no IPv6 addresses among them"),
        (&["--all", "-n", "nobody"], "no EgressAllocation there has addresses"),
        (&["--all", "shop/partners"], "cannot be used with"),
        (&[], "required"),
        (
            &["mill/feed", "-o", "gcp", "--name", "Partner"],
            "--name \"Partner\": a name is of lowercase letters",
        ),
        (&["mill/feed", "--port", "0"], "invalid value '0'"),
    ] {
        assert!(output(&with(arguments), 2).is_empty(), "{arguments:?}");
        let text = error(&with(arguments), 2);
        assert!(text.contains(said), "{arguments:?}: {text}");
    }
    // What has not come to its end is told beside the list.
    assert_eq!(error(&with(&["mill/feed"]), 0), "");
    let pending = "EgressAllocation mill/young: Programmed (Pending): 2 of 3 nodes; n2 does not have it yet";
    assert_eq!(error(&with(&["mill/young"]), 0), format!("warning: {pending}\n"));
    let idle = "EgressAllocation mill/idle has no addresses (the prefixes have no free address)";
    assert_eq!(error(&with(&["--all", "-n", "mill"]), 0), format!("warning: {idle}\nwarning: {pending}\n"));
    // Ports, protocol and name.
    let rule =
        ["mill/feed", "--family", "4", "--port", "8443,443,443", "--protocol", "udp", "--name", "from-mill"];
    for (form, said) in [
        ("terraform", "\"from_mill_ipv4_8443\""),
        ("iptables", "-A from-mill -s 203.0.113.22/32 -p udp -m multiport --dports 443,8443 -j ACCEPT"),
        ("nftables", "ip saddr @from_mill_ipv4 udp dport { 443, 8443 } accept"),
        ("aws", "--prefix-list-name from-mill-ipv4"),
        ("gcp", "create from-mill-ipv4"),
        ("gcp", "--rules=udp:443,udp:8443"),
        ("azure", "--protocol Udp --destination-port-ranges 443 8443"),
    ] {
        let text = output(&with(&[&rule[..], &["-o", form]].concat()), 0);
        assert!(text.contains(said), "{form}: {text}");
    }
}

/// Every example of the page is what the program says of the test's cluster.
#[test]
fn examples_of_the_page_are_real() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    let page = std::fs::read_to_string(&path).expect("read the page");
    let mut parts: Vec<String> = page.split("```").map(str::to_owned).collect();
    let mut examples = 0;
    for block in parts.iter_mut().skip(1).step_by(2) {
        let Some(rest) = block.strip_prefix("console\n$ kubectl aegis ") else { continue };
        let command = rest.lines().next().expect("a command").to_owned();
        let arguments: Vec<&str> = command.split_whitespace().collect();
        let more = ["--state", "allowlist.yaml"];
        let more = if command.starts_with("allowlist") { &more[..] } else { &[] };
        let said = String::from_utf8(run(&[&with(&arguments), more].concat()).stdout).expect("UTF-8");
        let wanted = format!("console\n$ kubectl aegis {command}\n{said}");
        if std::env::var_os("AEGIS_BLESS").is_some() {
            *block = wanted;
        } else {
            assert!(
                *block == wanted,
                "docs/cli.md: `kubectl aegis {command}` says other than the page:\n{said}"
            );
        }
        examples += 1;
    }
    assert!(examples >= 5, "only {examples} examples");
    if std::env::var_os("AEGIS_BLESS").is_some() {
        std::fs::write(path, parts.join("```")).expect("write the page");
    }
}

#[test]
fn every_form_of_an_answer_says_the_same() {
    let yaml = output(&with(&["status", "-o", "yaml"]), 1);
    let json = output(&with(&["status", "-o", "json"]), 1);
    let yaml: serde_json::Value = serde_yaml_ng::from_str(&yaml).expect("YAML");
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(yaml, json);
}
