//! Removes everything that an instance made, whatever state it is in.
//!
//! Nothing here depends on how far `up` came: what lies outside the lab's namespaces has names derived from the
//! instance, and processes are found by the namespaces and control groups they are in.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::cgroup;
use super::plan::Plan;
use super::process::{Process, in_network_namespaces, run};
use super::state::State;
use super::topology::namespace_path;

/// Removes an instance's processes, namespaces, devices, control groups and folders.
pub fn remove(plan: &Plan) -> anyhow::Result<()> {
    let state = State::read(&plan.state_dir());
    let me = std::process::id().cast_signed();
    // A frozen node cannot die.
    for node in super::plan::NODES {
        let group = super::node::cgroup(plan, node);
        // A start that was killed may have made the group in some hierarchies only.
        if cgroup::has_freezer(&group) {
            cgroup::freeze(&group, false)?;
        }
    }
    // A node's first process ends only when all others of its namespace have been waited for, also by a parent outside that is
    // stopped (as `nsenter` is with its child): nobody is waited for before all have been told.
    let recorded =
        state.iter().flat_map(|state| state.processes.values().chain(state.nodes.values()).copied());
    let recorded: Vec<Process> = recorded.collect();
    recorded.iter().for_each(|process| process.signal(libc::SIGKILL));
    // Until there are none, because a process may fork while the list is made.
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let mut found = in_network_namespaces(&inodes(&plan.namespaces()));
        found.extend(cgroup::processes(&plan.cgroup())?);
        found.retain(|process| process.pid != me && process.is_alive());
        if found.is_empty() {
            break;
        }
        ensure!(Instant::now() < end, "new processes appear while those of the lab are ended: {found:?}");
        kill(found)?;
    }
    kill(recorded)?;
    // Before the namespaces: the kernel takes the device away with its other end, at a moment of its own.
    let device = plan.root_device();
    if run("ip", &["link", "show", "dev", &device]).is_ok() {
        run("ip", &["link", "del", "dev", &device])?;
    }
    for namespace in plan.namespaces() {
        remove_namespace(&namespace)?;
    }
    cgroup::remove(&plan.cgroup())?;
    for folder in [plan.data_dir(), plan.state_dir()] {
        remove_folder(&folder)?;
    }
    Ok(())
}

/// Deletes a network namespace if it is there.
pub fn remove_namespace(name: &str) -> anyhow::Result<()> {
    if namespace_path(name).exists() {
        // `ip` killed between making the file and mounting on it leaves a plain file: `ip netns del` removes it too.
        run("ip", &["netns", "del", name])?;
    }
    Ok(())
}

fn inodes(namespaces: &[String]) -> Vec<u64> {
    let inode = |name: &String| fs::metadata(namespace_path(name)).ok().map(|file| file.ino());
    namespaces.iter().filter_map(inode).collect()
}

fn kill(processes: Vec<Process>) -> anyhow::Result<()> {
    for process in &processes {
        process.signal(libc::SIGKILL);
    }
    for process in processes {
        process.wait_gone(Duration::from_secs(20))?;
    }
    Ok(())
}

fn remove_folder(folder: &std::path::Path) -> anyhow::Result<()> {
    // A node's mount namespace is torn down shortly after its last process; until then folders may be busy.
    let end = Instant::now() + Duration::from_secs(10);
    while let Err(error) = fs::remove_dir_all(folder) {
        if error.kind() == std::io::ErrorKind::NotFound {
            break;
        }
        if Instant::now() > end {
            return Err(error).with_context(|| format!("remove {}", folder.display()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    if let Some(parent) = folder.parent() {
        // The last instance takes the common folder with it; others keep it from being empty.
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

/// What is left of an instance, in words: nothing after [`remove`].
pub fn leftovers(plan: &Plan) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let namespaces = plan.namespaces().into_iter().filter(|name| namespace_path(name).exists());
    found.extend(namespaces.map(|name| format!("namespace {name}")));
    if run("ip", &["link", "show", "dev", &plan.root_device()]).is_ok() {
        found.push(format!("device {}", plan.root_device()));
    }
    if cgroup::exists(&plan.cgroup()) {
        found.push(format!("control group {}", plan.cgroup()));
    }
    let folders = [plan.data_dir(), plan.state_dir()];
    found.extend(
        folders.iter().filter(|folder| folder.exists()).map(|folder| format!("folder {}", folder.display())),
    );
    // Every daemon of the lab has a path in one of its folders among its arguments.
    let names = folders.map(|folder| format!("{}/", folder.display()));
    let mentions = |text: &str| names.iter().any(|name| text.contains(name.as_str()));
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    found.extend(mounts.lines().filter(|line| mentions(line)).map(|line| format!("mount {line}")));
    for entry in fs::read_dir("/proc")?.flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if mentions(&command) {
            found.push(format!("process {}: {command}", entry.file_name().display()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_groups_that_were_made_in_part_are_removed() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let plan = Plan::new(&format!("part{}", std::process::id() % 1_000_000)).unwrap();
        // As left by a start that was killed after the first of several hierarchies.
        let group = super::super::node::cgroup(&plan, super::super::plan::NODES[0]);
        fs::create_dir_all(cgroup::hierarchies().unwrap()[0].join(&group)).unwrap();
        assert_eq!(leftovers(&plan).unwrap().len(), 1);
        remove(&plan).unwrap();
        assert_eq!(leftovers(&plan).unwrap(), Vec::<String>::new());
    }
}
