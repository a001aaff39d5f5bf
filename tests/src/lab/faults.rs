//! What can go wrong on purpose.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::api::{Api, DeleteParams};

use super::plan::{NODES, Node};
use super::process::Process;
use super::{Lab, cgroup, cleanup, control_plane, node, start, topology};

impl Lab {
    /// SIGKILL to the agent's container on a node; kubelet starts it again. Returns the id that was killed.
    pub fn kill_agent(&self, node: Node) -> anyhow::Result<i32> {
        self.kill_program(node, "aegis-node-agent")
    }

    /// SIGKILL to the operator's container on a node; kubelet starts it again.
    pub fn kill_operator(&self, node: Node) -> anyhow::Result<i32> {
        self.kill_program(node, "aegis-operator")
    }

    /// The nodes on which an operator runs.
    pub fn operator_nodes(&self) -> anyhow::Result<Vec<Node>> {
        let mut found = Vec::new();
        for node in NODES {
            if !self.programs(node, "aegis-operator")?.is_empty() {
                found.push(node);
            }
        }
        Ok(found)
    }

    /// Processes of a node that run a program of this file name.
    pub fn programs(&self, node: Node, program: &str) -> anyhow::Result<Vec<i32>> {
        let group = node::cgroup(self.plan(), node);
        let runs = |process: &Process| {
            let executable = std::fs::read_link(format!("/proc/{}/exe", process.pid));
            executable.is_ok_and(|path| path.file_name() == Path::new(program).file_name())
        };
        Ok(cgroup::processes(&group)?.into_iter().filter(runs).map(|process| process.pid).collect())
    }

    fn kill_program(&self, node: Node, program: &str) -> anyhow::Result<i32> {
        let pid = self.only_program(node, program)?;
        Process::of(pid)?.signal(libc::SIGKILL);
        Ok(pid)
    }

    pub(super) fn only_program(&self, node: Node, program: &str) -> anyhow::Result<i32> {
        let pids = self.programs(node, program)?;
        let [pid] = pids[..] else {
            anyhow::bail!("{program} runs {} times on {}, not once", pids.len(), node.name());
        };
        Ok(pid)
    }

    /// Kills the API server.
    pub fn stop_api_server(&self) -> anyhow::Result<()> {
        let name = control_plane::API_SERVER;
        let process = *self.state()?.processes.get(name).context("the lab has no API server")?;
        process.kill()
    }

    /// Starts the API server again and waits until it answers.
    pub async fn start_api_server(&self) -> anyhow::Result<()> {
        let mut state = self.state()?;
        let running =
            state.processes.get(control_plane::API_SERVER).is_some_and(|process| process.is_alive());
        if !running {
            start::start_component(self.plan(), &mut state, control_plane::API_SERVER)?;
        }
        start::wait_api(&start::client(&self.kubeconfig()).await?, Duration::from_secs(60)).await
    }

    /// Cuts a node off the LAN, silently: every device keeps its carrier.
    pub fn cut_link(&self, node: Node) -> anyhow::Result<()> {
        topology::cut(self.plan(), node)
    }

    /// Undoes [`Lab::cut_link`].
    pub fn restore_link(&self, node: Node) -> anyhow::Result<()> {
        topology::restore(self.plan(), node)
    }

    /// Stops a node like a machine that hangs: no process runs and no packet passes.
    ///
    /// The link must go too, because the kernel, which all nodes share, would go on forwarding.
    pub fn freeze(&self, node: Node) -> anyhow::Result<()> {
        topology::cut(self.plan(), node)?;
        cgroup::freeze(&node::cgroup(self.plan(), node), true)
            .inspect_err(|_| drop(topology::restore(self.plan(), node)))
    }

    /// Undoes [`Lab::freeze`].
    pub fn thaw(&self, node: Node) -> anyhow::Result<()> {
        cgroup::freeze(&node::cgroup(self.plan(), node), false)?;
        topology::restore(self.plan(), node)
    }

    /// Takes a node away for good: its processes, its namespace, its disk and its Node object.
    pub async fn remove_node(&self, node: Node) -> anyhow::Result<()> {
        let _lock = start::lock(self.plan())?;
        self.destroy_node(node)?;
        let nodes: Api<NodeObject> = Api::all(start::client(&self.kubeconfig()).await?);
        match nodes.delete(&node.name(), &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            other => other.map(drop).context("delete the Node object"),
        }
    }

    /// Ends a node like a power cut: processes and namespace vanish, the Node object stays.
    pub fn destroy_node(&self, node: Node) -> anyhow::Result<()> {
        let init = self.init_of(node)?;
        // First the link: processes and programs do not end at one instant, and nothing may be sent in between.
        topology::unplug(self.plan(), node)?;
        init.kill()?;
        let group = node::cgroup(self.plan(), node);
        for process in cgroup::processes(&group)? {
            process.kill()?;
        }
        cgroup::remove(&group)?;
        cleanup::remove_namespace(&self.plan().namespace(&node.name()))?;
        let data = node::data(self.plan(), node);
        std::fs::remove_dir_all(&data).with_context(|| format!("remove {}", data.display()))?;
        self.change_state(|state| {
            state.nodes.remove(&node.name());
        })
    }

    /// Brings a node back, new and empty, and waits until it is Ready.
    pub async fn add_node(&self, node: Node) -> anyhow::Result<()> {
        let _lock = start::lock(self.plan())?;
        let mut state = self.state()?;
        ensure!(!state.nodes.contains_key(&node.name()), "node {} is there", node.name());
        topology::build_node(self.plan(), node)?;
        // The hop was dropped from the route when its device vanished.
        topology::spread(self.plan(), &NODES)?;
        start::start_node(self.plan(), &mut state, node)?;
        let client = start::client(&self.kubeconfig()).await?;
        start::declare(&client, node).await?;
        node::join(self.plan(), node)?;
        start::wait_containerd_of(&state, node).await?;
        for archive in state.archives.values() {
            node::import(self.init_of(node)?, &state.tools, archive)?;
        }
        start::wait_ready(&client, node, Duration::from_secs(60)).await
    }

    /// Sends one egress address to these nodes only; with none, it follows the range again.
    pub fn pin(&self, address: std::net::Ipv4Addr, nodes: &[Node]) -> anyhow::Result<()> {
        topology::pin(self.plan(), address, nodes)
    }

    /// Sends one /64 of the egress range to these nodes; with none, it follows the range again.
    pub fn pin6(&self, network: ipnet::Ipv6Net, nodes: &[Node]) -> anyhow::Result<()> {
        topology::pin6(self.plan(), network, nodes)
    }

    /// Spreads the egress range over these nodes.
    pub fn spread(&self, nodes: &[Node]) -> anyhow::Result<()> {
        topology::spread(self.plan(), nodes)
    }
}
