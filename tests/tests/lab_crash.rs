//! A lab whose start is killed halfway leaves nothing after `down`, and touches no other lab.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use aegis_tests::lab::Lab;

const INSTANCE: &str = "crash";
/// Progress lines of `up`; the lab is killed right after each of them appeared.
const STEPS: usize = 6;

fn aegis_lab(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aegis-lab"));
    command.args(["--instance", INSTANCE]).args(arguments).stdout(Stdio::piped());
    command
}

#[test]
fn a_start_that_is_killed_leaves_nothing_after_down() {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: needs root");
        return;
    }
    let other = Lab::attach();
    let before = other.as_ref().map(|lab| lab.status().unwrap());
    for step in 1..=STEPS {
        let mut start = aegis_lab(&["up", "--no-build"]).spawn().unwrap();
        let lines = BufReader::new(start.stdout.take().unwrap()).lines().map_while(Result::ok);
        let seen: Vec<String> = lines.take(step).collect();
        start.kill().unwrap();
        start.wait().unwrap();
        assert_eq!(seen.len(), step, "up ended by itself: {seen:?}");
        assert!(
            !Lab::leftovers(INSTANCE).unwrap().is_empty(),
            "killed at {seen:?}, there is nothing to clean up"
        );
        assert!(aegis_lab(&["down"]).output().unwrap().status.success(), "down after {seen:?}");
        let left = Lab::leftovers(INSTANCE).unwrap();
        assert!(left.is_empty(), "killed at {seen:?}: {left:#?}");
    }
    assert_eq!(other.map(|lab| lab.status().unwrap()), before, "the other lab is as it was");
}
