//! What a running lab consists of, kept in `state.json` so that another process can use it and end it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::plan::STATES;
use super::process::Process;

/// Contents of `state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// Index of the /30 that links the root namespace and the control plane.
    pub link: u16,
    /// Whether `up` came to its end.
    pub complete: bool,
    /// The `aegis-lab` program: node processes are started through it.
    pub program: PathBuf,
    /// Folder of the Kubernetes tools.
    pub tools: PathBuf,
    /// Reference of the pause image that the nodes' containerd is configured for.
    pub pause_image: String,
    /// Archives of the images that every node has and that a node which comes back gets, by repository.
    #[serde(default)]
    pub archives: BTreeMap<String, PathBuf>,
    /// Processes of control plane and origins by name (`etcd`, `kube-apiserver`, `o1`, …).
    pub processes: BTreeMap<String, Process>,
    /// First process of each node that is there.
    pub nodes: BTreeMap<String, Process>,
}

impl State {
    /// Reads the state, if there is one.
    pub fn read(directory: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(file(directory)).ok()?).ok()
    }

    /// The states of all labs of this machine.
    pub fn all() -> Vec<Self> {
        let folders = fs::read_dir(STATES).into_iter().flatten().flatten();
        folders.filter_map(|folder| Self::read(&folder.path())).collect()
    }

    /// Replaces the state on disk at once, so that a crash leaves the old or the new one.
    pub fn write(&self, directory: &Path) -> anyhow::Result<()> {
        let temporary = directory.join("state.json.new");
        fs::write(&temporary, serde_json::to_vec_pretty(self)?).context("write the lab's state")?;
        fs::rename(temporary, file(directory)).context("write the lab's state")
    }
}

fn file(directory: &Path) -> PathBuf {
    directory.join("state.json")
}
