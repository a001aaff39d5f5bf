//! The agent's process as the first of its container.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use netns_support::need_root;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Time for what should happen at once.
const SOON: Duration = Duration::from_secs(20);
/// Access to an API server that does not answer.
const KUBECONFIG: &str = "apiVersion: v1
kind: Config
current-context: none
contexts: [{name: none, context: {cluster: none, user: none}}]
clusters: [{name: none, cluster: {server: 'http://127.0.0.1:9'}}]
users: [{name: none, user: {}}]
";

/// A process with all that it has started, and its folder.
struct Container {
    process: Child,
    folder: PathBuf,
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < SOON, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_first_process_of_a_container_hears_that_it_is_to_end_while_it_still_starts() {
    need_root();
    let folder = std::env::temp_dir().join(format!("aegis-end-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let config = folder.join("kubeconfig");
    mkfifo(&config, Mode::S_IRWXU).unwrap();
    // In namespaces of its own it is the process 1, and has no network.
    let started = Command::new("unshare")
        .args(["--fork", "--pid", "--net", "--kill-child=KILL", "--"])
        .arg(env!("CARGO_BIN_EXE_aegis-node-agent"))
        .arg("--node-name=n1")
        .arg("--namespace=default")
        .arg("--uplinks=lo")
        .arg(format!("--pin-root={}", folder.join("bpf").display()))
        .env("KUBECONFIG", &config)
        .spawn();
    let mut container = Container { process: started.unwrap(), folder };
    let outside = container.process.id();
    let children = format!("/proc/{outside}/task/{outside}/children");
    let agent: i32 = eventually("the agent runs", || {
        let child = fs::read_to_string(&children).ok()?.trim().parse().ok()?;
        let program = fs::read_link(format!("/proc/{child}/exe")).ok()?;
        (program.file_name() == Path::new("aegis-node-agent").file_name()).then_some(child)
    });
    // Without waiting, a pipe can be opened once somebody reads it: the agent has got no further than how to reach the API server.
    let pipe = || fs::File::options().write(true).custom_flags(nix::libc::O_NONBLOCK).open(&config).ok();
    let mut access = eventually("the agent reads its access", pipe);
    kill(Pid::from_raw(agent), Signal::SIGTERM).unwrap();
    access.write_all(KUBECONFIG.as_bytes()).unwrap();
    drop(access);
    let status = eventually("the agent ends", || container.process.try_wait().unwrap());
    assert!(status.success(), "{status}");
}
