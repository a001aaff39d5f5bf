//! A real Kubernetes of three nodes in network namespaces of this machine, with a router and two origins.
//!
//! ```text
//!                              router ── o1 198.51.100.10
//!   n1 10.99.0.1 ──┐             │    └─ o2 192.0.2.10
//!   n2 10.99.0.2 ──┼── bridge "lan" 10.99.0.254 ── cp 10.99.0.250 ── root namespace (kubectl)
//!   n3 10.99.0.3 ──┘    203.0.113.0/24 by ECMP over the nodes
//! ```

pub mod archive;
mod arp;
pub mod capture;
mod cgroup;
mod cleanup;
mod control_plane;
mod faults;
pub mod images;
mod install;
mod node;
pub mod node_init;
mod offloads;
mod pki;
pub mod plan;
mod process;
pub mod routing;
mod start;
mod state;
mod topology;
mod undo;
mod xdp;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use self::archive::Archive;
pub use self::install::{Installed, NAMESPACE};
use self::plan::{DEFAULT_INSTANCE, Node, Plan};
use self::process::Process;
pub use self::start::client;
use self::state::State;
pub use self::topology::like_a_wire;
pub use self::undo::Undo;

/// Whether a test that finds no lab must fail instead of being skipped: `tests/run.sh` sets `AEGIS_REQUIRE_LAB`, because it
/// has started one.
pub fn required() -> bool {
    std::env::var_os("AEGIS_REQUIRE_LAB").is_some_and(|value| value != "0")
}

/// A running lab.
#[derive(Clone, Debug)]
pub struct Lab {
    plan: Plan,
}

impl Lab {
    /// Name of the instance that the environment (`AEGIS_LAB`) names, or the default.
    pub fn instance_name() -> String {
        std::env::var("AEGIS_LAB")
            .ok()
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| DEFAULT_INSTANCE.to_owned())
    }

    /// The lab that the environment names, if it runs: `None` means the tests run on another cluster.
    pub fn attach() -> Option<Self> {
        Self::attach_to(&Self::instance_name())
    }

    /// The lab of this name, if it runs.
    pub fn attach_to(instance: &str) -> Option<Self> {
        let lab = Self { plan: Plan::new(instance).ok()? };
        lab.state().is_ok_and(|state| state.complete).then_some(lab)
    }

    /// Starts a lab, or returns the one that already runs under this name.
    pub async fn up(instance: &str) -> anyhow::Result<Self> {
        let plan = Plan::new(instance)?;
        start::up(&plan).await?;
        Ok(Self { plan })
    }

    /// Ends a lab and removes everything it made, also what a crashed or half-made one left. An error if anything stays.
    pub fn down(instance: &str) -> anyhow::Result<()> {
        let plan = Plan::new(instance)?;
        let _lock = start::lock(&plan)?;
        cleanup::remove(&plan)?;
        let left = cleanup::leftovers(&plan)?;
        ensure!(left.is_empty(), "lab {instance:?} is down, but there is still {}", left.join("; "));
        Ok(())
    }

    /// What is left of an instance that is down: nothing, unless something is wrong.
    pub fn leftovers(instance: &str) -> anyhow::Result<Vec<String>> {
        cleanup::leftovers(&Plan::new(instance)?)
    }

    /// Names and addresses.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.plan.state_dir().join("kubeconfig")
    }

    /// Unix socket of an origin's control port (`o1`, `o2`).
    pub fn origin_socket(&self, name: &str) -> PathBuf {
        self.plan.state_dir().join(format!("{name}.sock"))
    }

    /// Sends one line of JSON to an origin's control socket and returns the line it answers.
    pub fn ask_origin(&self, name: &str, request: &str) -> anyhow::Result<String> {
        let path = self.origin_socket(plan::Origin::named(name)?.name);
        let mut stream =
            UnixStream::connect(&path).with_context(|| format!("connect to {}", path.display()))?;
        stream.write_all(format!("{}\n", request.trim()).as_bytes())?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer.trim_end().to_owned())
    }

    /// Folder of the Kubernetes tools the lab was started with.
    pub fn tools(&self) -> anyhow::Result<PathBuf> {
        Ok(self.state()?.tools)
    }

    /// Reference of the probe's image, which every node has.
    pub fn probe_image(&self) -> anyhow::Result<String> {
        Ok(self.state()?.pause_image)
    }

    /// Runs a command in a node's namespaces and returns its output.
    pub fn exec(&self, node: Node, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        node::exec(self.init_of(node)?, program, arguments)
    }

    /// A command in a node's namespaces, to be run by the caller.
    pub fn command(&self, node: Node, program: &str) -> anyhow::Result<std::process::Command> {
        Ok(node::command(self.init_of(node)?, program))
    }

    /// A command in the network namespace of a part: `router`, `cp`, `o1`, `o2`.
    pub fn command_in(&self, part: &str, program: &str) -> std::process::Command {
        let mut command = std::process::Command::new("nsenter");
        let path = topology::namespace_path(&self.plan.namespace(part));
        command.arg(format!("--net={}", path.display())).arg("--").arg(program);
        command
    }

    /// Imports an image archive on every node that is there, and later on those that come back.
    pub fn load_image(&self, archive: &Archive) -> anyhow::Result<()> {
        import_everywhere(&self.state()?, &archive.path)?;
        self.change_state(|state| {
            state.archives.insert(archive.repository().to_owned(), archive.path.clone());
        })
    }

    /// Name and whether it runs, of every process the lab keeps.
    pub fn status(&self) -> anyhow::Result<Vec<(String, bool)>> {
        let state = self.state()?;
        let nodes = state.nodes.iter().map(|(name, process)| (format!("node {name}"), process.is_alive()));
        let others = state.processes.iter().map(|(name, process)| (name.clone(), process.is_alive()));
        Ok(others.chain(nodes).collect())
    }

    /// Operators and agents that run: node, program, resident memory in KiB.
    pub fn memory(&self) -> anyhow::Result<Vec<(Node, &'static str, u64)>> {
        let mut found = Vec::new();
        for program in ["aegis-operator", "aegis-node-agent"] {
            for node in plan::NODES {
                let processes =
                    self.programs(node, program)?.into_iter().filter_map(|it| Process::of(it).ok());
                found.extend(processes.filter_map(|it| Some((node, program, it.resident()?))));
            }
        }
        Ok(found)
    }

    fn init_of(&self, node: Node) -> anyhow::Result<Process> {
        let state = self.state()?;
        let process = state.nodes.get(&node.name()).copied();
        process.filter(|p| p.is_alive()).with_context(|| format!("node {} is not there", node.name()))
    }

    fn state(&self) -> anyhow::Result<State> {
        State::read(&self.plan.state_dir())
            .with_context(|| format!("lab {:?} does not run; `make lab` starts it", self.plan.instance()))
    }

    fn change_state(&self, change: impl FnOnce(&mut State)) -> anyhow::Result<()> {
        let mut state = self.state()?;
        change(&mut state);
        state.write(&self.plan.state_dir())
    }
}

/// Imports an image archive on all nodes at once.
fn import_everywhere(state: &State, archive: &Path) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = state
            .nodes
            .values()
            .map(|init| scope.spawn(|| node::import(*init, &state.tools, archive)))
            .collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("an import crashed"))??;
        }
        Ok(())
    })
}
