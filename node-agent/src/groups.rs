//! Control groups of pods: by them the data plane knows the sockets of pods that have the node's addresses.
//!
//! kubelet makes a group for each pod, named for its UID, before any container of it runs; what is in it or below is the pod's. The
//! kernel knows a group by the inode of its folder in cgroup2, on hosts with version 1 beside it too.

use futures::StreamExt;
use inotify::{Inotify, WatchMask};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How deep below the hierarchy's root kubelet's own group may be.
const DEPTH: u32 = 4;
/// Inode of the root of the whole hierarchy. That of a part of it, which is all that a node in a container sees, has another.
const ROOT: u64 = 1;
/// Time after which kubelet's group is looked for again.
const AGAIN: Duration = Duration::from_secs(2);

/// A group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// The number by which the kernel knows it.
    pub number: u64,
    /// Levels of the hierarchy at which it may be, a bit each: one where the whole hierarchy is seen.
    pub levels: u32,
}

/// The groups of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    /// Of each pod, by UID.
    pub pods: BTreeMap<String, Group>,
    /// Those in which kubelet makes them.
    pub roots: Vec<Group>,
}

/// Why they are not known.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {source}")]
pub struct GroupsError {
    path: String,
    source: io::Error,
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> GroupsError {
    move |source| GroupsError { path: path.display().to_string(), source }
}

/// The cgroup2 hierarchy below a mount of all of them.
pub fn hierarchy(mount: &Path) -> PathBuf {
    let hybrid = mount.join("unified");
    if hybrid.is_dir() { hybrid } else { mount.to_owned() }
}

/// A folder of the hierarchy.
struct Folder {
    path: PathBuf,
    depth: u32,
}

impl Folder {
    fn children(&self) -> Result<Vec<(String, Folder)>, GroupsError> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            // It has just been removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.depth > 0 => return Ok(Vec::new()),
            Err(error) => return Err(unreadable(&self.path)(error)),
        };
        let folders = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let child = |entry: fs::DirEntry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, Folder { path: entry.path(), depth: self.depth + 1 })
        };
        Ok(folders.map(child).collect())
    }

    fn group(&self, whole: bool) -> Option<Group> {
        let number = fs::metadata(&self.path).ok()?.ino();
        let level = 1u32.checked_shl(self.depth)?;
        // Of a part of the hierarchy nobody says at which level it begins.
        let levels = if whole { level } else { level.wrapping_neg() };
        Some(Group { number, levels: levels & ((1 << aegis_common::HOST_LEVELS) - 1) })
    }
}

/// Whether kubelet calls its own group so, with either of its drivers.
fn is_root(name: &str) -> bool {
    matches!(name, "kubepods" | "kubepods.slice") || name.ends_with("-kubepods.slice")
}

/// The UID of the pod whose group is called so: `pod<uid>`, or `kubepods-<class>-pod<uid>.slice` with underscores.
fn pod(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => name.strip_prefix("pod")?.to_owned(),
    };
    let like_one = uid.len() >= 32 && uid.chars().all(|c| c == '-' || c.is_ascii_hexdigit());
    like_one.then_some(uid)
}

/// Folders in which kubelet makes pods' groups: its own, and one for each class of service in it.
fn homes(mount: &Path) -> Result<(Vec<Folder>, Vec<Folder>), GroupsError> {
    let (mut roots, mut homes) = (Vec::new(), Vec::new());
    let mut next = vec![Folder { path: hierarchy(mount), depth: 0 }];
    while let Some(folder) = next.pop() {
        for (name, child) in folder.children()? {
            if is_root(&name) {
                let classes = child.children()?.into_iter().filter(|(name, _)| pod(name).is_none());
                homes.extend(classes.map(|(_, class)| class));
                roots.push(child);
            } else if child.depth < DEPTH {
                next.push(child);
            }
        }
    }
    Ok((roots, homes))
}

/// Reads the groups below a mount of the control group hierarchies (`/sys/fs/cgroup`).
pub fn read(mount: &Path) -> Result<Groups, GroupsError> {
    let top = hierarchy(mount);
    let whole = fs::metadata(&top).map_err(unreadable(&top))?.ino() == ROOT;
    let (roots, homes) = homes(mount)?;
    let mut groups = Groups::default();
    for folder in roots.iter().chain(&homes) {
        for (name, child) in folder.children()? {
            if let (Some(uid), Some(group)) = (pod(&name), child.group(whole)) {
                groups.pods.insert(uid, group);
            }
        }
    }
    groups.roots = roots.iter().filter_map(|root| root.group(whole)).collect();
    Ok(groups)
}

/// Calls `changed` whenever a pod's group has been made or removed.
pub async fn watch(mount: &Path, changed: impl Fn()) {
    loop {
        if let Err(error) = watch_once(mount, &changed).await {
            tracing::debug!(%error, "cannot watch the pods' control groups (yet)");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Ends when one of the folders is removed, or when others are there.
async fn watch_once(mount: &Path, changed: &impl Fn()) -> io::Result<()> {
    let (roots, classes) = homes(mount).map_err(io::Error::other)?;
    let inotify = Inotify::init()?;
    let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::DELETE_SELF | WatchMask::ONLYDIR;
    for folder in roots.iter().chain(&classes) {
        inotify.watches().add(&folder.path, mask)?;
    }
    let mut events = inotify.into_event_stream([0; 4096])?;
    changed();
    if roots.is_empty() {
        return Ok(());
    }
    while let Some(event) = events.next().await {
        let event = event?;
        changed();
        let class = event.name.is_some_and(|name| pod(&name.to_string_lossy()).is_none());
        if class || event.mask.contains(inotify::EventMask::IGNORED) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const UID: &str = "0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0";
    const STATIC: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn both_drivers_name_groups_for_the_pod() {
        let slice = format!("kubepods-besteffort-pod{}.slice", UID.replace('-', "_"));
        assert_eq!(pod(&slice).as_deref(), Some(UID));
        assert_eq!(pod(&format!("kubepods-pod{}.slice", UID.replace('-', "_"))).as_deref(), Some(UID));
        assert_eq!(pod(&format!("pod{UID}")).as_deref(), Some(UID));
        assert_eq!(pod(&format!("pod{STATIC}")).as_deref(), Some(STATIC), "of a file");
        for other in ["burstable", "kubepods-burstable.slice", "pod", "podman", "cri-containerd-0b1c.scope"] {
            assert_eq!(pod(other), None, "{other}");
        }
        for (name, root) in [
            ("kubepods", true),
            ("kubepods.slice", true),
            ("kubelet-kubepods.slice", true),
            ("kubepods-burstable.slice", false),
            ("system.slice", false),
        ] {
            assert_eq!(is_root(name), root, "{name}");
        }
    }

    /// Folders that stand for a hierarchy: their root is not the kernel's.
    fn made(folders: &[&str]) -> PathBuf {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mount = std::env::temp_dir().join(format!("aegis-groups-{}-{number}", std::process::id()));
        folders.iter().for_each(|folder| fs::create_dir_all(mount.join(folder)).unwrap());
        mount
    }

    #[test]
    fn groups_are_found_wherever_kubelets_own_is() {
        let burstable = format!("unified/a/n1/kubepods/burstable/pod{UID}/container");
        let mount = made(&["memory/kubepods", &burstable, &format!("unified/a/n2/kubepods/pod{STATIC}")]);
        let groups = read(&mount).unwrap();
        let number = |path: &str| fs::metadata(mount.join("unified").join(path)).unwrap().ino();
        let below = |depth: u32| 0xffff & (u32::MAX << depth);
        let of_static = Group { number: number(&format!("a/n2/kubepods/pod{STATIC}")), levels: below(4) };
        let of_uid = Group { number: number(&format!("a/n1/kubepods/burstable/pod{UID}")), levels: below(5) };
        assert_eq!(groups.pods, [(STATIC.into(), of_static), (UID.into(), of_uid)].into());
        let mut roots: Vec<u64> = groups.roots.iter().map(|root| root.number).collect();
        let mut expected = vec![number("a/n1/kubepods"), number("a/n2/kubepods")];
        roots.sort_unstable();
        expected.sort_unstable();
        assert_eq!(roots, expected);
        assert!(read(&mount.join("absent")).is_err());
        fs::remove_dir_all(&mount).unwrap();
    }

    #[test]
    fn a_new_group_is_noticed_also_in_a_new_class() {
        let mount = made(&["kubepods.slice/kubepods-besteffort.slice"]);
        let (seen, notified) = mpsc::channel();
        let watched = mount.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(watch(&watched, || _ = seen.send(())));
        });
        let slice = |class: &str, uid: &str| {
            let uid = uid.replace('-', "_");
            format!("kubepods.slice/kubepods-{class}.slice/kubepods-{class}-pod{uid}.slice")
        };
        for (pods, folder) in [(1, slice("besteffort", UID)), (2, slice("burstable", STATIC))] {
            notified.recv_timeout(Duration::from_secs(10)).unwrap();
            fs::create_dir_all(mount.join(folder)).unwrap();
            while read(&mount).unwrap().pods.len() < pods {
                notified.recv_timeout(Duration::from_secs(10)).unwrap();
            }
        }
        fs::remove_dir_all(&mount).unwrap();
    }
}
