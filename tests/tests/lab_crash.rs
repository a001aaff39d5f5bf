//! A lab whose start is killed halfway leaves nothing after `down`, and touches no other lab.

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

fn aegis_lab(instance: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aegis-lab"));
    command.args(["--instance", instance]).args(arguments).stdout(Stdio::piped());
    command
}

#[test]
fn a_start_that_is_killed_leaves_nothing_after_down() {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        assert!(!lab::required(), "needs root");
        eprintln!("skipped: needs root");
        return;
    }
    // Of its own: another run of this test may go on beside.
    let instance = &format!("crash{}", std::process::id() % 1_000_000);
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
