//! Allowlists as the partner uses them: the kernel takes them, in a network namespace of its own, once and again; what no tool here can
//! read is read by a shell, and by its structure.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// The list of the test's allocation in a form.
fn list(form: &str, arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_kubectl-aegis"))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data"))
        .args(["allowlist", "mill/feed", "--state", "allowlist.yaml", "-o", form])
        .args(arguments)
        .output()
        .expect("run the program");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// What a program says of its standard input.
fn pipe(command: &[&str], input: &str) -> String {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start it");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("write");
    let output = child.wait_with_output().expect("wait");
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && err.is_empty(), "{command:?}: {err}\n{input}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs a script in a network namespace of its own.
fn apart(script: &str) -> String {
    pipe(&["unshare", "--net", "sh", "-eu"], script)
}

#[test]
fn nft_takes_it_again_and_again() {
    let (more, less) = (list("nftables", &[]), list("nftables", &["--family", "4", "--port", "443,8443"]));
    let host = "table inet filter { chain input { type filter hook input priority 0; policy drop; }; }";
    let said = apart(&format!(
        "load() {{ nft $1 -f /dev/stdin; }}\n\
         load -c <<'END'\n{more}END\n\
         load '' <<'END'\n{host}\nEND\n\
         load '' <<'END'\n{more}END\n\
         nft insert rule inet filter input jump egress_mill_feed_in\n\
         nft add element inet filter egress_mill_feed_ipv4 {{ 192.0.2.1 }}\n\
         load '' <<'END'\n{less}END\n\
         nft list table inet filter\n"
    ));
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "set egress_mill_feed_ipv4 { type ipv4_addr flags interval elements = { 203.0.113.20/31, 203.0.113.22 } }",
        "policy drop; jump egress_mill_feed_in }",
        "chain egress_mill_feed_in { ip saddr @egress_mill_feed_ipv4 tcp dport { 443, 8443 } accept }",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    apart(&format!("nft -f /dev/stdin <<'END'\n{}END\n", list("nftables", &["--protocol", "udp"])));
}

#[test]
fn iptables_takes_it_again_and_again() {
    let script = list("iptables", &["--port", "443,8443"]);
    let stale = "iptables -A egress-mill-feed -s 192.0.2.1 -j ACCEPT\n";
    let said = apart(&format!("{script}{stale}{script}iptables-save\nip6tables-save\n"));
    let rules: Vec<&str> = said.lines().filter(|line| line.starts_with("-A")).collect();
    let rule =
        |source| format!("-A egress-mill-feed -s {source} -p tcp -m multiport --dports 443,8443 -j ACCEPT");
    let jump = "-A INPUT -j egress-mill-feed";
    let four = [jump.to_owned(), rule("203.0.113.20/31"), rule("203.0.113.22/32")];
    assert_eq!(rules, [&four[..], &[jump.to_owned(), rule("2001:db8:1:4::/63")]].concat());
}

/// Arguments of each call of a command in a script.
fn calls(script: &str, command: &str) -> Vec<Vec<String>> {
    let spy = format!("GROUP='a group' NSG=nsg\n{command}() {{ printf '%s\\n' \"$@\" END; }}\n{script}");
    let said = pipe(&["sh", "-eu"], &spy);
    let calls = said.split_terminator("END\n");
    calls.map(|call| call.lines().map(str::to_owned).collect()).collect()
}

/// The words after a flag, up to the next one.
fn after<'a>(call: &'a [String], flag: &str) -> Vec<&'a str> {
    let rest = call.iter().skip_while(|it| *it != flag).skip(1);
    rest.take_while(|it| !it.starts_with("--")).map(String::as_str).collect()
}

#[test]
fn a_shell_hands_each_cloud_one_call_a_family() {
    let [four, six] = <[_; 2]>::try_from(calls(&list("aws", &[]), "aws")).expect("two calls");
    for (call, family, cidrs) in
        [(four, "IPv4", &["203.0.113.20/31", "203.0.113.22/32"][..]), (six, "IPv6", &["2001:db8:1:4::/63"])]
    {
        assert_eq!(after(&call, "--address-family"), [family]);
        assert_eq!(after(&call, "--max-entries"), [cidrs.len().to_string()]);
        let entries: Value = serde_json::from_str(after(&call, "--entries")[0]).expect("JSON");
        let found: Vec<&str> =
            entries.as_array().expect("a list").iter().filter_map(|it| it["Cidr"].as_str()).collect();
        assert_eq!(found, cidrs);
    }
    let [four, six] = <[_; 2]>::try_from(calls(&list("azure", &[]), "az")).expect("two calls");
    assert_eq!(after(&four, "--resource-group"), ["a group"]);
    assert_eq!(after(&four, "--source-address-prefixes"), ["203.0.113.20/31", "203.0.113.22/32"]);
    assert_eq!(after(&six, "--source-address-prefixes"), ["2001:db8:1:4::/63"]);
    assert_ne!(after(&four, "--priority"), after(&six, "--priority"));
    let [four, six] = <[_; 2]>::try_from(calls(&list("gcp", &[]), "gcloud")).expect("two calls");
    assert!(four.contains(&"--source-ranges=203.0.113.20/31,203.0.113.22/32".to_owned()), "{four:?}");
    assert!(four.contains(&"--network=default".to_owned()), "{four:?}");
    assert!(six.contains(&"--source-ranges=2001:db8:1:4::/63".to_owned()), "{six:?}");
}

/// Of HCL what is used here: comments, a block, attributes that are lists of strings.
#[test]
fn terraform_has_a_list_of_each_family() {
    for (arguments, four, six) in [
        (&[][..], &["203.0.113.20/31", "203.0.113.22/32"][..], &["2001:db8:1:4::/63"][..]),
        (&["--family", "6"], &[], &["2001:db8:1:4::/63"]),
    ] {
        let text = list("terraform", arguments);
        let code: String = text.lines().filter(|line| !line.starts_with('#')).collect();
        let body = code.strip_prefix("locals {").and_then(|it| it.strip_suffix('}')).expect("a block");
        let mut attributes = body.split_inclusive(']').map(|it| it.split_once('=').expect("an attribute"));
        for (name, wanted) in [("egress_mill_feed_ipv4", four), ("egress_mill_feed_ipv6", six)] {
            let (found, value) = attributes.next().expect("two attributes");
            // Lists are JSON's, but for the comma at the end.
            let value = value.replace(",  ]", "]");
            assert_eq!(found.trim(), name);
            assert_eq!(serde_json::from_str::<Vec<String>>(&value).expect("a list"), wanted);
        }
        assert!(attributes.next().is_none(), "{text}");
    }
}
