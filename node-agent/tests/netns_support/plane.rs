//! The data plane of a node in a network namespace.

use super::need_root;
use aegis_node_agent::apply::{Plane, apply};
use aegis_node_agent::args::Args;
use aegis_node_agent::desired::Desired;
use aegis_node_agent::kernel;
use aegis_node_agent::observed::Observed;
use aegis_node_agent::ops::{Known, transition};
use clap::Parser;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A BPF file system of its own.
pub struct Bpffs(pub PathBuf);

impl Bpffs {
    /// Mounts it.
    pub fn new(name: &str) -> Bpffs {
        need_root();
        let path = std::env::temp_dir().join(format!("aegis-bpf-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        Bpffs(path)
    }

    /// A path below the agent's pins.
    pub fn folder(&self, path: &str) -> PathBuf {
        self.0.join(format!("aegis/v{}", aegis_common::SCHEMA)).join(path)
    }

    /// Loads the programs, or finds them pinned.
    pub fn open(&self) -> Box<dyn Plane> {
        self.open_sized(16384, 1024)
    }

    /// The same with so many flows and blocks.
    pub fn open_sized(&self, flows: u32, blocks: u32) -> Box<dyn Plane> {
        let (flows, blocks) = (flows.to_string(), blocks.to_string());
        self.open_with(&["--max-flows", &flows, "--max-blocks", &blocks])
    }

    /// The same with these flags of the agent.
    pub fn open_with(&self, flags: &[&str]) -> Box<dyn Plane> {
        let root = self.0.join("aegis");
        let args = ["x", "--node-name", "n0", "--pin-root", root.to_str().unwrap()];
        kernel::open(&Args::parse_from(args.iter().chain(flags))).unwrap()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Writes what is wanted. Gives what the maps hold then, and how many writes it took for how long.
pub fn bring(plane: &mut dyn Plane, wanted: &Desired, known: &Known) -> (Observed, usize, Duration) {
    let mut observed = plane.read().unwrap();
    let started = Instant::now();
    let change = transition(wanted, &observed, known);
    apply(plane, &change.ops, &mut observed, &mut (0, 0)).unwrap();
    let took = started.elapsed();
    (observed, change.ops.len(), took)
}
