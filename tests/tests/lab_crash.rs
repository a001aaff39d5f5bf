//! A lab whose start is killed halfway leaves nothing after `down`, and touches no other lab; a lab with a fault is no lab.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use aegis_tests::lab::{self, Lab};

/// Progress lines of `up`; the lab is killed right after each of them appeared.
const STEPS: usize = 6;

/// Nothing stays, also when the test fails halfway.
struct Down<'a>(&'a str);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        if let Err(error) = Lab::down(self.0) {
            eprintln!("{error:#}");
        }
    }
}

/// A name of its own: another run of these tests may go on beside.
fn instance(prefix: &str) -> String {
    format!("{prefix}{}", std::process::id() % 1_000_000)
}

fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    assert!(root || !lab::required(), "needs root");
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

fn aegis_lab(instance: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aegis-lab"));
    command.args(["--instance", instance]).args(arguments).stdout(Stdio::piped());
    command
}

#[test]
fn a_start_that_is_killed_leaves_nothing_after_down() {
    if !is_root() {
        return;
    }
    let instance = &instance("crash");
    let _down = Down(instance);
    let other = Lab::attach();
    let before = other.as_ref().map(|lab| lab.status().unwrap());
    for step in 1..=STEPS {
        let mut start = aegis_lab(instance, &["up", "--no-build"]).spawn().unwrap();
        let lines = BufReader::new(start.stdout.take().unwrap()).lines().map_while(Result::ok);
        let seen: Vec<String> = lines.take(step).collect();
        start.kill().unwrap();
        start.wait().unwrap();
        assert_eq!(seen.len(), step, "up ended by itself: {seen:?}");
        assert!(
            !Lab::leftovers(instance).unwrap().is_empty(),
            "killed at {seen:?}, there is nothing to clean up"
        );
        assert!(aegis_lab(instance, &["down"]).output().unwrap().status.success(), "down after {seen:?}");
        let left = Lab::leftovers(instance).unwrap();
        assert!(left.is_empty(), "killed at {seen:?}: {left:#?}");
    }
    assert_eq!(other.map(|lab| lab.status().unwrap()), before, "the other lab is as it was");
}

#[test]
fn a_lab_with_a_fault_is_started_anew() {
    if !is_root() {
        return;
    }
    let instance = &instance("ill");
    let _down = Down(instance);
    assert!(aegis_lab(instance, &["up", "--no-build"]).output().unwrap().status.success());
    let up = || {
        let mut start = aegis_lab(instance, &["up", "--no-build"]).spawn().unwrap();
        let first = BufReader::new(start.stdout.take().unwrap()).lines().map_while(Result::ok).next();
        start.kill().unwrap();
        start.wait().unwrap();
        first.unwrap()
    };
    assert!(up().ends_with("the lab runs already"));
    assert!(aegis_lab(instance, &["fault", "cut", "n2"]).output().unwrap().status.success());
    let said = up();
    assert!(said.contains("n2 has its link cut"), "{said}");
}
