//! Completion in a real bash, and as kubectl asks for it.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use std::path::Path;
use std::process::Command;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_kubectl-aegis"))
}

fn run(arguments: &[&str]) -> String {
    let output = Command::new(program()).args(arguments).output().expect("run the program");
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// What bash would offer for the last of these words.
fn offered(words: &[&str]) -> Vec<String> {
    let script = r#"
        source <(kubectl-aegis completion bash)
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        complete=$(complete -p kubectl-aegis) || exit 1
        [[ $complete =~ -F\ ([^ ]+) ]] || exit 1
        "${BASH_REMATCH[1]}" kubectl-aegis "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let path = std::env::var("PATH").expect("PATH");
    let folder = program().parent().expect("a folder").display();
    let output = Command::new("bash")
        .env("PATH", format!("{folder}:{path}"))
        .args(["--norc", "-c", script, "bash"])
        .args(words)
        .output()
        .expect("run bash");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8").lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes() {
    assert_eq!(offered(&["kubectl-aegis", "tra"]), ["trace"]);
    assert!(offered(&["kubectl-aegis", "status", "--out"]).contains(&"--output".to_owned()));
    assert!(offered(&["kubectl-aegis", "status", "--output", "j"]).contains(&"json".to_owned()));
    assert_eq!(offered(&["kubectl-aegis", "allowlist", "--output", "te"]), ["text", "terraform"]);
    assert_eq!(offered(&["kubectl-aegis", "flows", "--wa"]), ["--watch"]);
    assert_eq!(offered(&["kubectl-aegis", "flows", "--protocol", "t"]), ["tcp"]);
}

#[test]
fn other_shells_have_a_script() {
    for (shell, part) in [("zsh", "#compdef kubectl-aegis"), ("fish", "complete -c kubectl-aegis")] {
        assert!(run(&["completion", shell]).contains(part), "{shell}");
    }
}

#[test]
fn kubectl_completes() {
    let ask = |words: &[&str]| run(&[&["__complete"], words].concat());
    assert_eq!(ask(&["tra"]), "trace\n:4\n");
    let commands = ask(&[""]);
    for command in [
        "status",
        "policies",
        "trace",
        "plan",
        "drain",
        "allowlist",
        "top",
        "flows",
        "drops",
        "usage",
        "completion",
    ] {
        assert!(commands.contains(&format!("{command}\n")), "{commands}");
    }
    assert!(!commands.contains("__complete") && !commands.contains("help"), "{commands}");
    assert!(ask(&["trace", "pod", "192.0.2.1", "--pro"]).contains("--protocol\n"));
    assert_eq!(ask(&["trace", "--protocol", "u"]), "udp\n:4\n");
    assert_eq!(ask(&["flows", "--protocol", ""]), "tcp\nudp\nicmp\n:4\n");
    for (words, option) in [
        (["flows", "--w"], "--watch\n"),
        (["flows", "--al"], "--allocation\n"),
        (["drops", "--w"], "--watch\n"),
    ] {
        assert!(ask(&words).contains(option), "{words:?}");
    }
    assert_eq!(ask(&["plan", "-f", ""]), ":0\n", "files");
    // Forms of a list are others than those of an answer.
    assert_eq!(ask(&["allowlist", "-o", "n"]), "nftables\n:4\n");
    assert_eq!(ask(&["allowlist", "--family", ""]), "4\n6\n:4\n");
    assert_eq!(ask(&["status", "-o", ""]), "table\njson\nyaml\n:4\n");
    assert_eq!(ask(&["usage", "-o", ""]), "table\nwide\njson\nyaml\ncsv\n:4\n");
    assert_eq!(ask(&["usage", "--by", "node,or"]), "node,origin\n:4\n", "the next of a list");
    assert_eq!(ask(&["usage", "--ca-file", ""]), ":0\n", "files");
    // The script that kubectl runs passes its words on.
    assert!(run(&["completion", "--kubectl"]).contains("exec kubectl-aegis __complete \"$@\""));
}
