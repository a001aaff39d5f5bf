//! Processes: started inside a network namespace, known by id and start time, ended by id.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// A process: the id alone may mean another one tomorrow, together with the start time it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the host's pid namespace.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start: u64,
}

impl Process {
    /// The process that has this id now.
    pub fn of(pid: i32) -> anyhow::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
            .with_context(|| format!("process {pid} is gone"))?;
        let start = start_time(&stat).with_context(|| format!("/proc/{pid}/stat has no start time"))?;
        Ok(Self { pid, start })
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .is_ok_and(|stat| start_time(&stat) == Some(self.start) && !is_zombie(&stat))
    }

    /// Resident memory in KiB, if it runs.
    pub fn resident(self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix(" kB")?.parse().ok().filter(|_| self.is_alive())
    }

    /// Sends a signal if it still is the same process.
    pub fn signal(self, signal: i32) {
        if self.is_alive() {
            // SAFETY: kill(2) takes no pointers.
            unsafe { libc::kill(self.pid, signal) };
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(self) -> anyhow::Result<()> {
        self.signal(libc::SIGKILL);
        self.wait_gone(Duration::from_secs(10))
    }

    /// Waits until the process is gone.
    pub fn wait_gone(self, limit: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() > end {
                bail!("process {} does not end", self.pid);
            }
            reap();
            std::thread::sleep(Duration::from_millis(5));
        }
        reap();
        Ok(())
    }
}

/// Field 22 of a stat line; the name in field 2 may hold blanks and parentheses, so count after the last one.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn is_zombie(stat: &str) -> bool {
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// Reaps daemons that this process itself started, so that they do not stay zombies while a test lives.
/// Only ids that [`Daemon::spawn`] made are waited for: a blanket wait would steal other code's children.
fn reap() {
    let mut spawned = SPAWNED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // SAFETY: waitpid with a null status pointer touches no memory of ours.
    spawned.retain(|pid| unsafe { libc::waitpid(*pid, std::ptr::null_mut(), libc::WNOHANG) } == 0);
}

static SPAWNED: std::sync::Mutex<Vec<i32>> = std::sync::Mutex::new(Vec::new());

/// A long-lived process to start.
pub struct Daemon<'a> {
    /// Program to run.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Path of the network namespace to run in.
    pub network: &'a Path,
    /// Control group folders to join.
    pub cgroups: &'a [PathBuf],
    /// File that receives its output.
    pub log: &'a Path,
    /// Give it new mount, pid and host-name namespaces; it becomes process 1 there.
    pub contained: bool,
}

impl Daemon<'_> {
    /// Starts it in a session of its own, so that it outlives the caller and its terminal.
    pub fn spawn(self) -> anyhow::Result<Process> {
        let network = File::open(self.network).with_context(|| format!("open {}", self.network.display()))?;
        let cgroups = self
            .cgroups
            .iter()
            .map(|path| OpenOptions::new().write(true).open(path.join("cgroup.procs")))
            .collect::<io::Result<Vec<File>>>()
            .context("open cgroup.procs")?;
        let log = OpenOptions::new().create(true).append(true).open(self.log)?;
        let (read_end, write_end) = pipe()?;
        let contained = self.contained;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // SAFETY: between fork and exec only async-signal-safe system calls are made, on descriptors that were
        // opened before; nothing is allocated.
        unsafe {
            command.pre_exec(move || enter(&network, &cgroups, contained, &write_end));
        }
        let mut child = command.spawn().with_context(|| format!("start {}", self.program.display()))?;
        drop(command);
        let pid = if contained {
            // The direct child forked once more, into the new pid namespace, told us that id and ended.
            child.wait()?;
            read_pid(read_end)?
        } else {
            let pid = child.id().cast_signed();
            SPAWNED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(pid);
            pid
        };
        Process::of(pid)
            .with_context(|| format!("{} ended at once, see {}", self.program.display(), self.log.display()))
    }
}

fn pipe() -> anyhow::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// Runs in the forked child. See [`Daemon::spawn`].
fn enter(network: &File, cgroups: &[File], contained: bool, pid_pipe: &OwnedFd) -> io::Result<()> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: only system calls on open descriptors and on stack memory.
    unsafe {
        check(libc::setsid())?;
        // The program keeps nothing open that is not its own, the lab's lock above all.
        let all = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
        check(libc::close_range(3, libc::c_uint::MAX, all))?;
        for cgroup in cgroups {
            if libc::write(cgroup.as_raw_fd(), c"0".as_ptr().cast(), 1) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        check(libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET))?;
        if contained {
            check(libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS))?;
            match libc::fork() {
                -1 => return Err(io::Error::last_os_error()),
                0 => {}
                pid => {
                    let bytes = pid.to_ne_bytes();
                    let written = libc::write(pid_pipe.as_raw_fd(), bytes.as_ptr().cast(), bytes.len());
                    libc::_exit(i32::from(written != 4));
                }
            }
        }
    }
    Ok(())
}

fn read_pid(pipe: OwnedFd) -> anyhow::Result<i32> {
    let mut bytes = [0; 4];
    io::Read::read_exact(&mut File::from(pipe), &mut bytes).context("the contained process did not start")?;
    Ok(i32::from_ne_bytes(bytes))
}

/// Every process whose network namespace is one of these (given as the inode that `stat` shows).
pub fn in_network_namespaces(inodes: &[u64]) -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| inodes.contains(&ns.ino())))
        .filter_map(|pid| Process::of(pid).ok())
        .collect()
}

/// Runs a short command to its end; its error output is the error.
pub fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    finish(Command::new(program).args(arguments), &format!("{program} {}", arguments.join(" ")))
}

/// Runs a prepared command to its end; its error output is the error.
pub fn finish(command: &mut Command, title: &str) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {title}"))?;
    if !output.status.success() {
        let text = [output.stderr, output.stdout].concat();
        bail!("{title}: {}: {}", output.status, String::from_utf8_lossy(&text).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a closure on a thread that is inside another network namespace.
pub fn in_network<T: Send>(
    network: &Path,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let file = File::open(network).with_context(|| format!("open {}", network.display()))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET)
                .context("enter network namespace")?;
            work()
        });
        thread.join().unwrap_or_else(|_| bail!("a thread in {} crashed", network.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_survives_odd_names() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(start_time(&format!("12 (a) b (c) {tail}")), Some(4242));
        assert_eq!(start_time("12 (short) S 1"), None);
        assert!(is_zombie("12 (x) Z 1") && !is_zombie("12 (Z) S 1"));
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let me = Process::of(std::process::id().cast_signed()).unwrap();
        assert!(me.is_alive());
        assert!(me.resident().is_some_and(|kib| kib > 100));
        assert_eq!(Process { start: me.start + 1, ..me }.resident(), None);
        assert!(!Process { start: me.start + 1, ..me }.is_alive());
    }
}
