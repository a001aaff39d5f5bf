//! A lab whose start is killed halfway leaves nothing after `down`, and touches no other lab.

use std::process::{Command, Stdio};
use std::time::Duration;

use aegis_tests::lab::Lab;

const INSTANCE: &str = "crash";

fn aegis_lab(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aegis-lab"));
    command.args(["--instance", INSTANCE]).args(arguments).stdout(Stdio::null());
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
    for milliseconds in [50, 400, 900, 1500, 4000, 8000] {
        let mut start = aegis_lab(&["up", "--no-build"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        start.kill().unwrap();
        start.wait().unwrap();
        let made = Lab::leftovers(INSTANCE).unwrap();
        assert!(
            !made.is_empty() || milliseconds < 400,
            "after {milliseconds} ms there is nothing to clean up"
        );
        assert!(aegis_lab(&["down"]).status().unwrap().success(), "down after {milliseconds} ms");
        let left = Lab::leftovers(INSTANCE).unwrap();
        assert!(left.is_empty(), "killed after {milliseconds} ms: {left:#?}");
    }
    assert_eq!(other.map(|lab| lab.status().unwrap()), before, "the other lab is as it was");
}
