//! Control groups of a lab, on version 1, hybrid and version 2 hosts.
//!
//! `<root>/aegis-lab-<instance>/<node>/system` holds a node's daemons, kubelet makes `…/<node>/kubepods` beside it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::process::Process;

/// Folder of the daemons below a node's group: version 2 allows processes in leaves only.
const SYSTEM: &str = "system";

/// The mounted hierarchies: one on version 2, one for each controller on version 1.
pub(super) fn hierarchies() -> anyhow::Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read mounts")?;
    let found: Vec<PathBuf> = hierarchies_in(&mounts);
    if found.is_empty() {
        bail!("no control groups are mounted below /sys/fs/cgroup");
    }
    Ok(found)
}

fn hierarchies_in(mounts: &str) -> Vec<PathBuf> {
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .filter(|fields| fields.len() > 3 && fields[1].starts_with("/sys/fs/cgroup"))
        .filter(|fields| matches!(fields[2], "cgroup" | "cgroup2"))
        .map(|fields| PathBuf::from(fields[1]))
        .collect()
}

/// Makes a group in every hierarchy with all its parents, and returns its `system` leaves.
pub fn create(group: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut leaves = Vec::new();
    for hierarchy in hierarchies()? {
        let mut path = hierarchy.clone();
        for part in Path::new(group).components() {
            enable_controllers(&path)?;
            let parent = path.clone();
            path.push(part);
            make(&parent, &path)?;
        }
        enable_controllers(&path)?;
        let leaf = path.join(SYSTEM);
        make(&path, &leaf)?;
        leaves.push(leaf);
    }
    Ok(leaves)
}

fn make(parent: &Path, path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path).with_context(|| format!("make control group {}", path.display()))?;
    // A new version 1 cpuset is empty, and no process may join it so.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if !path.join("cgroup.controllers").exists() && path.join(file).exists() {
            fs::write(path.join(file), fs::read(parent.join(file))?)
                .with_context(|| format!("fill {file} of {}", path.display()))?;
        }
    }
    Ok(())
}

/// Version 2 only: children get every controller there is.
fn enable_controllers(path: &Path) -> anyhow::Result<()> {
    let Ok(controllers) = fs::read_to_string(path.join("cgroup.controllers")) else { return Ok(()) };
    for controller in controllers.split_ascii_whitespace() {
        fs::write(path.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("enable controller {controller} below {}", path.display()))?;
    }
    Ok(())
}

/// Whether the group is there in any hierarchy.
pub fn exists(group: &str) -> bool {
    hierarchies().is_ok_and(|all| all.iter().any(|hierarchy| hierarchy.join(group).exists()))
}

/// All processes in a group and below it, in any hierarchy.
pub fn processes(group: &str) -> anyhow::Result<Vec<Process>> {
    let mut pids = BTreeSet::new();
    for hierarchy in hierarchies()? {
        for folder in folders(&hierarchy.join(group)) {
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
    }
    Ok(pids.into_iter().filter(|pid| *pid > 0).filter_map(|pid| Process::of(pid).ok()).collect())
}

/// A folder and all below it, children first.
fn folders(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Ok(entries) = fs::read_dir(root) {
        let children = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        for child in children {
            found.extend(folders(&child.path()));
        }
        found.push(root.to_owned());
    }
    found
}

/// Folder and file that freeze a group. On a hybrid host there are two; the version 1 freezer is the one that container
/// runtimes use there.
fn freezer(group: &str) -> Option<(PathBuf, &'static str)> {
    let folders: Vec<PathBuf> =
        hierarchies().ok()?.into_iter().map(|hierarchy| hierarchy.join(group)).collect();
    ["freezer.state", "cgroup.freeze"].into_iter().find_map(|file| {
        let folder = folders.iter().find(|folder| folder.join(file).exists())?;
        Some((folder.clone(), file))
    })
}

/// Whether a group is there that can be frozen.
pub fn has_freezer(group: &str) -> bool {
    freezer(group).is_some()
}

/// Freezes or thaws everything in a group.
pub fn freeze(group: &str, frozen: bool) -> anyhow::Result<()> {
    let (folder, file) = freezer(group).with_context(|| format!("control group {group} has no freezer"))?;
    let value = match (file, frozen) {
        ("freezer.state", true) => "FROZEN",
        ("freezer.state", false) => "THAWED",
        (_, true) => "1",
        (_, false) => "0",
    };
    fs::write(folder.join(file), value)
        .with_context(|| format!("write {value} to {}/{file}", folder.display()))?;
    wait_frozen(&folder, frozen)
}

/// Whether a group is frozen.
pub fn is_frozen(group: &str) -> bool {
    hierarchies().is_ok_and(|all| all.iter().any(|hierarchy| has_state(&hierarchy.join(group), true)))
}

fn has_state(folder: &Path, frozen: bool) -> bool {
    match fs::read_to_string(folder.join("freezer.state")) {
        Ok(state) => state.trim() == if frozen { "FROZEN" } else { "THAWED" },
        Err(_) => fs::read_to_string(folder.join("cgroup.events")).is_ok_and(|events| {
            events.lines().any(|line| line == if frozen { "frozen 1" } else { "frozen 0" })
        }),
    }
}

fn wait_frozen(folder: &Path, frozen: bool) -> anyhow::Result<()> {
    // What waits for a disk that is busy cannot be frozen before it has its answer.
    let end = Instant::now() + Duration::from_secs(60);
    while !has_state(folder, frozen) {
        if Instant::now() > end {
            bail!("{} does not become {}", folder.display(), if frozen { "frozen" } else { "thawed" });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Removes a group and all below it from every hierarchy. It must be empty of processes.
pub fn remove(group: &str) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    for hierarchy in hierarchies()? {
        for folder in folders(&hierarchy.join(group)) {
            // A group stays busy for a moment after its last process ended.
            while let Err(error) = fs::remove_dir(&folder) {
                if error.kind() == io::ErrorKind::NotFound {
                    break;
                }
                if Instant::now() > end {
                    return Err(error).with_context(|| format!("remove control group {}", folder.display()));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_both_kinds() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nproc /proc proc rw 0 0\n";
        let paths = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        assert_eq!(hierarchies_in(hybrid), paths);
        assert_eq!(
            hierarchies_in("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            [PathBuf::from("/sys/fs/cgroup")]
        );
    }
}
