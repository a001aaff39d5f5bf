//! The first process of a node: arranges the node's mounts, runs its daemons, reaps what is orphaned.
//!
//! It runs in mount, pid, host-name and network namespaces of its own. When it dies, the kernel ends everything in
//! the node and drops its mounts: a node cannot leave anything behind but folders on disk and control groups.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::node::{CONTAINERD, FILES, FOLDERS, START_KUBELET};

/// Becomes a node's first process if this program was started as one, by `PROGRAM node-init NAME DATA TOOLS ADDRESS`: every
/// program that starts a lab calls this before anything else.
pub fn run_if_asked() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["node-init", name, data, tools, address] => run(name, data.as_ref(), tools.as_ref(), address),
        _ => Ok(()),
    }
}

/// Runs a node until it is killed.
pub fn run(name: &str, data: &Path, tools: &Path, address: &str) -> anyhow::Result<()> {
    arrange_mounts(data)?;
    // SAFETY: the pointer and the length describe the name.
    if unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) } != 0 {
        return Err(std::io::Error::last_os_error()).context("set the host name");
    }
    let path = format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", tools.display());
    let service = |program: &str, arguments: &[String]| Service {
        program: tools.join(program),
        arguments: arguments.to_vec(),
        log: Path::new(FILES).join(format!("{program}.log")),
        path: path.clone(),
        child: None,
        not_before: Instant::now(),
    };
    let mut waiting = vec![
        service(
            "kubelet",
            &[
                format!("--config={FILES}/kubelet.yaml"),
                format!("--kubeconfig={FILES}/kubelet.kubeconfig"),
                format!("--hostname-override={name}"),
                format!("--node-ip={address}"),
            ],
        ),
        service("kube-proxy", &[format!("--config={FILES}/kube-proxy.yaml")]),
    ];
    let mut services =
        vec![service("containerd", &["--config".to_owned(), format!("{FILES}/containerd.toml")])];
    let begin = Path::new(FILES).join(START_KUBELET);
    loop {
        if !waiting.is_empty() && begin.exists() && Path::new(CONTAINERD).exists() {
            services.append(&mut waiting);
        }
        for service in &mut services {
            service.keep_running()?;
        }
        reap_orphans(&mut services);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A private view of the host: own /proc, /sys, /run, /var/lib, /var/log and bpffs.
fn arrange_mounts(data: &Path) -> anyhow::Result<()> {
    let none = None::<&str>;
    let simple = |source: &str, target: &str, kind: &str| {
        mount(Some(source), target, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("mount {target}"))
    };
    let bind = |source: &str, target: &str| {
        mount(Some(source), target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .with_context(|| format!("bind {source} to {target}"))
    };
    // The folders are about to be hidden below new mounts; descriptors still reach them.
    let folders = FOLDERS
        .into_iter()
        .map(|(name, target)| Ok((File::open(data.join(name))?, target)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
    drop_foreign_mounts()?;
    simple("proc", "/proc", "proc")?;
    for target in ["/run", "/var/lib", "/var/log"] {
        simple("tmpfs", target, "tmpfs")?;
    }
    for (folder, target) in folders {
        fs::create_dir_all(target)?;
        bind(&format!("/proc/self/fd/{}", folder.as_raw_fd()), target)?;
    }
    bind(&format!("{FILES}/hosts"), "/etc/hosts")?;
    fs::create_dir_all("/run/lock")?;
    // A new sysfs shows this namespace's devices, but hides the control groups: carry them over.
    fs::create_dir_all("/run/cgroup")?;
    bind("/sys/fs/cgroup", "/run/cgroup")?;
    simple("sysfs", "/sys", "sysfs")?;
    mount(Some("/run/cgroup"), "/sys/fs/cgroup", none, MsFlags::MS_MOVE, none)
        .context("move the control groups")?;
    fs::remove_dir("/run/cgroup")?;
    // Pins of two nodes never meet.
    simple("bpf", "/sys/fs/bpf", "bpf")?;
    // Pods may mount into /sys/fs/bpf and the kubelet's folder (mountPropagation: Bidirectional).
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none)
        .context("share the node's mounts with pods")
}

/// The copy of the host's mounts would keep other network namespaces and other bpffs alive after their end.
fn drop_foreign_mounts() -> anyhow::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let of_kind = |line: &str| line.split(' ').nth(2).is_some_and(|kind| matches!(kind, "nsfs" | "bpf"));
    for target in mounts.lines().rev().filter(|line| of_kind(line)).filter_map(|line| line.split(' ').nth(1))
    {
        umount2(target, MntFlags::MNT_DETACH).with_context(|| format!("unmount {target}"))?;
    }
    Ok(())
}

struct Service {
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    path: String,
    child: Option<Child>,
    not_before: Instant,
}

impl Service {
    /// Starts the service, again one second after it ended.
    fn keep_running(&mut self) -> anyhow::Result<()> {
        if self.child.is_some() || Instant::now() < self.not_before {
            return Ok(());
        }
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .env_clear()
            .env("PATH", &self.path)
            .env("HOME", "/root")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }
}

/// Waits for every ended child; a service among them is started again.
fn reap_orphans(services: &mut [Service]) {
    loop {
        // SAFETY: a null status pointer; all children of process 1 are ours to reap, `Child` is never waited for.
        let pid = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        if pid <= 0 {
            return;
        }
        let ended =
            services.iter_mut().find(|s| s.child.as_ref().is_some_and(|c| c.id() == pid.unsigned_abs()));
        if let Some(service) = ended {
            service.child = None;
            service.not_before = Instant::now() + Duration::from_secs(1);
        }
    }
}
