//! What `tests/run.sh` says when things go wrong, and that it forgets no test.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use aegis_tests::apiserver::repository;
use aegis_tests::cluster::Cluster;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A shell in the repository that has all of its output in one stream.
fn bash(script: &str) -> Command {
    let mut command = Command::new("bash");
    command.current_dir(repository()).args(["-c", &format!("exec 2>&1; {script}")]);
    command
}

fn this_program() -> PathBuf {
    std::env::current_exe().expect("this program")
}

/// The output's lines, and whether it went well.
fn run(command: &mut Command) -> (Vec<String>, bool) {
    let output = command.output().expect("run bash");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    (text.lines().map(str::to_owned).collect(), output.status.success())
}

#[test]
fn suites_are_counted_to_the_last_line() {
    let suites = "suite good true; suite bad false; limit=1 suite hangs sleep 100
                  suite counts echo 'test result: FAILED. 3 passed; 2 failed; 0 ignored'
                  suite crashes sh -c 'echo test result: ok. 3 passed\\; 0 failed\\;; exit 1'
                  fail forgotten";
    let (lines, well) = run(&mut bash(&format!(". tests/suite.sh; {suites}")));
    assert!(!well);
    assert_eq!(lines.last().map(String::as_str), Some("7 passed, 6 failed"), "{lines:#?}");
    for name in ["bad", "hangs", "counts", "crashes", "forgotten"] {
        assert!(lines.contains(&format!("failed: {name}")), "{lines:#?}");
    }
    let (lines, well) = run(&mut bash(". tests/suite.sh; suite good true"));
    assert!(well);
    assert_eq!(lines.last().map(String::as_str), Some("1 passed, 0 failed"), "{lines:#?}");
}

#[tokio::test]
#[ignore = "the test below runs it"]
async fn fails_with_a_message() {
    println!("said before");
    let other = std::thread::spawn(|| panic!("the cause\n{}the last", "in between\n".repeat(30)));
    assert!(other.join().is_ok(), "the consequence");
}

#[tokio::test]
#[ignore = "the test below runs it"]
async fn fails_with_an_error() -> anyhow::Result<()> {
    Err(anyhow::anyhow!("the root").context("the error"))
}

#[test]
fn the_end_of_the_output_says_what_failed_and_why() {
    let this = this_program();
    let suites = format!(
        "suite tests {} --test-threads=1 --ignored fails_with_; suite good true
         suite compiles sh -c 'echo much; echo \"error: no such thing\"; echo \" --> here\"; exit 1'
         limit=1 suite hangs sh -c 'seq 100; sleep 100'",
        this.display()
    );
    let (lines, _) = run(bash(&format!(". tests/suite.sh; {suites}")).env("RUST_BACKTRACE", "1"));
    assert!(!lines.iter().any(|line| line.contains("stack backtrace")), "{lines:#?}");
    let last = lines.iter().rposition(|line| line.starts_with("--- hangs")).expect("the last suite's end");
    let text = lines[last..].join("\n");
    let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what:?} is not in {text}"));
    // In this order: the suite that failed first stands last, before the closing lines.
    let order = [
        "=== hangs\n",
        "  100\n",
        "=== compiles\n  error: no such thing\n   --> here\n",
        "=== tests\nfails_with_a_message\n  thread '<unnamed>'",
        "  the cause\n  in between\n",
        "fails_with_an_error\n  Error: the error\n  Caused by:\n      the root\n",
        "failed: tests\n",
    ];
    assert!(order.map(at).is_sorted(), "{text}");
    assert_eq!(text.matches("in between").count(), 13, "{text}");
    for not in ["said before", "much", "RUST_BACKTRACE", "  85\n", "=== good"] {
        assert!(!text.contains(not), "{not:?} is in {text}");
    }
}

#[test]
fn a_suite_that_runs_beside_others_is_counted_when_it_is_met() {
    for (command, last, fine) in [
        ("sh -c 'sleep 1; echo \"test result: ok. 3 passed; 0 failed\"'", "5 passed, 0 failed", true),
        (
            "sh -c 'sleep 1; echo \"test result: FAILED. 2 passed; 1 failed\"; exit 101'",
            "4 passed, 1 failed",
            false,
        ),
        ("sh -c 'sleep 1; exit 1'", "2 passed, 1 failed", false),
    ] {
        let script =
            format!(". tests/suite.sh; behind slow {command}; behind other true; suite quick true; meet");
        let (lines, well) = run(&mut bash(&script));
        assert_eq!((lines.last().map(String::as_str), well), (Some(last), fine), "{lines:#?}");
        let at = |line: &str| lines.iter().position(|other| other == line).expect("a heading");
        assert!(at("=== quick") < at("=== slow"), "{lines:#?}");
    }
}

#[test]
fn a_row_of_suites_that_runs_beside_others_counts_for_itself() {
    let row = "row() { suite one sleep 1; suite two sh -c 'echo \"test result: FAILED. 2 passed; 1 failed\"; exit 101'
                       absent+=('three (for want of it)'); fail forgotten; }";
    // What was met before is not counted again.
    let (lines, well) = run(&mut bash(&format!(
        ". tests/suite.sh; {row}; behind early true; meet; strand 'a row' row; suite bad false; meet"
    )));
    assert!(!well);
    let end = ["not run: three (for want of it)", "failed: bad", "failed: two", "failed: forgotten"];
    let from = lines.iter().position(|line| line == end[0]).expect("what was not run");
    assert_eq!(lines[from..from + end.len()], end, "{lines:#?}");
    assert_eq!(lines.last().map(String::as_str), Some("4 passed, 3 failed"), "{lines:#?}");
    // One that is killed has counted nothing, and is no success.
    let (lines, well) = run(&mut bash(
        ". tests/suite.sh; row() { kill -KILL $BASHPID; }; strand 'a row' row; suite good true; meet",
    ));
    assert!(!well && lines.contains(&"failed: a row".to_owned()), "{lines:#?}");
    assert_eq!(lines.last().map(String::as_str), Some("1 passed, 1 failed"), "{lines:#?}");
}

#[test]
fn each_program_of_a_suite_runs_whatever_became_of_those_before() {
    let script =
        "tests/each.sh tests \"$0\" /nonexistent/program \"$0\" -- --exact fails_with_an_error --ignored";
    let output =
        Command::new("bash").current_dir(repository()).args(["-c", script]).arg(this_program()).output();
    let output = output.expect("run bash");
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.matches("test result: FAILED. 0 passed; 1 failed").count(), 2, "{text}");
    let fine = "tests/each.sh tests \"$0\" -- --exact fails_with_nothing";
    let fine = Command::new("bash").current_dir(repository()).args(["-c", fine]).arg(this_program()).output();
    assert!(fine.expect("run bash").status.success());
}

#[test]
fn an_interrupted_run_ends_what_it_started_and_still_counts() {
    interrupted("suite slow sleep 98765.4321");
    interrupted("behind slow sleep 98765.4321; suite slower sleep 30");
    // What a strand made is removed as well: it would be the second lab.
    let made = std::env::temp_dir().join(format!("aegis-scripts-made-{}", std::process::id()));
    fs::write(&made, "").expect("write");
    interrupted(&format!(
        "row() {{ cleanup() {{ rm {}; }}; suite slow sleep 98765.4321; }}; strand row row; suite slower sleep 30",
        made.display()
    ));
    assert!(!made.exists());
}

fn interrupted(slow: &str) {
    let begin = Instant::now();
    let script = format!(". tests/suite.sh; suite good true; {slow}");
    let child = bash(&script).stdout(Stdio::piped()).spawn().expect("run bash");
    let sleeps = || {
        let pgrep = Command::new("pgrep").args(["-f", "^sleep 98765.4321"]).stdout(Stdio::null()).status();
        pgrep.expect("run pgrep").success()
    };
    while !sleeps() {
        assert!(begin.elapsed() < Duration::from_secs(30), "the suite does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    // SAFETY: kill(2) takes no pointers; the child has not been waited for.
    unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) };
    let output = child.wait_with_output().expect("wait");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success());
    assert_eq!(text.lines().last(), Some("1 passed, 1 failed"), "{text}");
    assert!(!sleeps(), "the suite goes on");
}

#[test]
fn a_setup_that_fails_is_a_failure_in_the_last_line() {
    let folder = std::env::temp_dir().join(format!("aegis-scripts-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("make a folder");
    let uname = folder.join("uname");
    fs::write(&uname, "#!/bin/sh\necho abacus\n").expect("write");
    fs::set_permissions(&uname, fs::Permissions::from_mode(0o755)).expect("set the mode");
    let path = std::env::var("PATH").unwrap_or_default();
    let (lines, well) = run(bash(".ci/run").env("PATH", format!("{}:{path}", folder.display())));
    fs::remove_dir_all(folder).expect("remove the folder");
    assert!(!well);
    assert!(lines.iter().any(|line| line.contains("an x86_64 machine")), "{lines:#?}");
    assert_eq!(lines.last().map(String::as_str), Some("0 passed, 1 failed"), "{lines:#?}");
}

#[test]
fn every_test_of_this_folder_is_in_a_suite() {
    let script = fs::read_to_string(repository().join("tests/run.sh")).expect("read run.sh");
    let prefixes: Vec<&str> = script
        .lines()
        .filter_map(|line| line.split_once(" aegis-tests ")?.1.split_ascii_whitespace().next())
        .collect();
    assert!(prefixes.len() > 4, "{prefixes:?}");
    for entry in fs::read_dir(repository().join("tests/tests")).expect("list tests") {
        let name = entry.expect("list tests").file_name().into_string().expect("UTF-8");
        assert!(prefixes.iter().any(|prefix| name.starts_with(prefix)), "no suite of run.sh runs {name}");
    }
}

#[tokio::test]
#[ignore = "the test below runs it"]
async fn needs_a_lab() -> anyhow::Result<()> {
    Cluster::connect().await.map(drop)
}

#[test]
fn a_test_without_a_lab_is_skipped_unless_one_is_required() {
    for (required, passes) in [("0", true), ("1", false)] {
        let mut test = Command::new(this_program());
        test.args(["--exact", "needs_a_lab", "--ignored"]).env_remove("KUBECONFIG");
        let output = test.env("AEGIS_LAB", "nobody").env("AEGIS_REQUIRE_LAB", required).output();
        assert_eq!(output.expect("run the test").status.success(), passes, "AEGIS_REQUIRE_LAB={required}");
    }
}

#[test]
fn what_a_killed_packet_test_left_is_found_and_removed() {
    // No process has this number: it is beyond the greatest that the kernel gives.
    let name = "aegis-scripts-4194305-0";
    let make = format!("ip netns add {name}; tests/left.sh; first=$?; tests/left.sh; echo $first $?");
    let (lines, _) = run(&mut bash(&make));
    assert!(lines.iter().any(|line| line.contains(name)), "{lines:#?}");
    assert_eq!(lines.last().map(String::as_str), Some("1 0"), "{lines:#?}");
}
