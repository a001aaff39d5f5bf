//! `up`: from nothing to three Ready nodes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use k8s_openapi::api::core::v1::{Node as NodeObject, ServiceAccount};
use kube::api::{Api, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use serde_json::json;

use super::plan::{LINK_COUNT, Link, NODES, Node, ORIGIN_PORTS, ORIGINS, Plan};
use super::process::{Daemon, run};
use super::state::State;
use super::{cgroup, cleanup, control_plane, images, import_everywhere, node, pki, topology};

/// How long the API server of a lab that runs may take to say so.
const API_LIMIT: Duration = Duration::from_secs(10);
/// How long another process that changes the lab is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(30);
const TOOLS: [&str; 10] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "helm",
];

/// Prints a step with the time since the start.
pub struct Progress {
    begin: Instant,
}

impl Progress {
    /// Starts the clock.
    pub fn new() -> Self {
        Self { begin: Instant::now() }
    }

    /// One line.
    pub fn step(&self, what: &str) {
        println!("[{:6.2} s] {what}", self.begin.elapsed().as_secs_f64());
    }
}

/// Only one process changes an instance at a time; waits until no other does. The file stays, empty: removing it would race
/// with the next lock.
///
/// Commands that the holder runs inherit the lock: if it is killed, what it had begun goes on for a moment, and who cleans
/// up must not look before that is done. Daemons give it back ([`Daemon::spawn`]).
pub fn lock(plan: &Plan) -> anyhow::Result<Flock<File>> {
    let path = Path::new("/run/lock").join(format!("aegis-lab-{}", plan.instance()));
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let mut file = file.with_context(|| format!("open {} (the lab needs root)", path.display()))?;
    let end = Instant::now() + LOCK_LIMIT;
    let lock = loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => break lock,
            Err((same, Errno::EWOULDBLOCK)) if Instant::now() < end => file = same,
            Err((_, Errno::EWOULDBLOCK)) => {
                bail!("another process is changing lab {:?} right now", plan.instance());
            }
            Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    fcntl(&*lock, FcntlArg::F_SETFD(FdFlag::empty())).context("let commands inherit the lock")?;
    Ok(lock)
}

/// Starts the lab, unless it runs.
pub async fn up(plan: &Plan) -> anyhow::Result<()> {
    let progress = Progress::new();
    let tools = tools()?;
    let _lock = lock(plan)?;
    if let Some(state) = State::read(&plan.state_dir()) {
        let Some(problem) = ill(plan, &state).await else {
            progress.step("the lab runs already");
            return Ok(());
        };
        progress.step(&format!("{problem}: removing what is left of a lab"));
    }
    cleanup::remove(plan)?;
    let probe = images::probe().context("make the probe's image")?;

    let directory = plan.state_dir();
    fs::create_dir_all(directory.join("log"))?;
    let mut state = State {
        link: free_link(plan)?,
        complete: false,
        program: std::env::current_exe()?,
        tools,
        pause_image: probe.reference.clone(),
        archives: BTreeMap::from([(probe.repository().to_owned(), probe.path.clone())]),
        processes: BTreeMap::new(),
        nodes: BTreeMap::new(),
    };
    state.write(&directory)?;
    let link = Link::new(state.link);

    progress.step("namespaces, links and routes");
    topology::build(plan, link)?;
    for node in NODES {
        topology::build_node(plan, node)?;
    }
    topology::spread(plan, &NODES)?;

    progress.step("containerd on n1, n2, n3");
    for node in NODES {
        start_node(plan, &mut state, node)?;
    }
    progress.step("origins o1 and o2");
    for origin in ORIGINS {
        let process = Daemon {
            program: images::probe_binary(),
            arguments: vec![
                "serve".to_owned(),
                format!("--ports={ORIGIN_PORTS}"),
                format!("--control={}", directory.join(format!("{}.sock", origin.name)).display()),
            ],
            network: &topology::namespace_path(&plan.namespace(origin.name)),
            cgroups: &[],
            log: &control_plane::log(plan, origin.name),
            contained: false,
        }
        .spawn()?;
        state.processes.insert(origin.name.to_owned(), process);
    }
    state.write(&directory)?;

    progress.step("keys, etcd and API server");
    pki::create(&directory.join("pki"), link)?;
    fs::copy(directory.join("pki/admin.kubeconfig"), directory.join("kubeconfig"))?;
    for component in ["etcd", control_plane::API_SERVER] {
        start_component(plan, &mut state, component)?;
    }
    let client = client(&directory.join("kubeconfig")).await?;
    wait_api(&client, Duration::from_secs(60))
        .await
        .with_context(|| format!("see {}", control_plane::log(plan, control_plane::API_SERVER).display()))?;

    progress.step("API server answers; controllers, kubelets, kube-proxies");
    for component in ["kube-controller-manager", "kube-scheduler"] {
        start_component(plan, &mut state, component)?;
    }
    for node in NODES {
        declare(&client, node).await?;
        node::join(plan, node)?;
    }
    wait_containerd(plan).await?;
    import_everywhere(&state, &probe.path)?;
    progress.step("pause image on every node");
    for node in NODES {
        wait_ready(&client, node, Duration::from_secs(90))
            .await
            .with_context(|| format!("see the logs in {}", node::data(plan, node).join("files").display()))?;
        progress.step(&format!("{} is Ready", node.name()));
    }
    wait_default_account(&client).await?;
    state.complete = true;
    state.write(&directory)?;
    progress.step(&format!("the lab {:?} is up", plan.instance()));
    Ok(())
}

/// What is wrong with a lab, if anything: what runs only in part, or with a fault, would make nobody happy.
async fn ill(plan: &Plan, state: &State) -> Option<String> {
    if !state.complete {
        return Some("its start did not come to its end".to_owned());
    }
    let mut processes = state.processes.iter().chain(&state.nodes);
    if let Some((name, _)) = processes.find(|(_, process)| !process.is_alive()) {
        return Some(format!("{name} does not run"));
    }
    for node in NODES {
        let name = node.name();
        let healths = [
            (!state.nodes.contains_key(&name), "is not there"),
            (!topology::is_linked(plan, node), "has its link cut"),
            (cgroup::is_frozen(&node::cgroup(plan, node)), "is frozen"),
        ];
        if let Some((_, problem)) = healths.iter().find(|(ill, _)| *ill) {
            return Some(format!("{name} {problem}"));
        }
    }
    let answer = async { wait_api(&client(&plan.state_dir().join("kubeconfig")).await?, API_LIMIT).await };
    answer.await.err().map(|error| format!("{error:#}"))
}

/// Starts a node's first process and records it.
pub fn start_node(plan: &Plan, state: &mut State, node: Node) -> anyhow::Result<()> {
    let process = node::start(plan, state, node)?;
    state.nodes.insert(node.name(), process);
    state.write(&plan.state_dir())
}

/// Starts a control plane component and records it.
pub fn start_component(plan: &Plan, state: &mut State, component: &str) -> anyhow::Result<()> {
    let process = control_plane::start(plan, &state.tools, component)?;
    state.processes.insert(component.to_owned(), process);
    state.write(&plan.state_dir())
}

/// Folder of the Kubernetes tools; says what to do if one is missing.
fn tools() -> anyhow::Result<PathBuf> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the lab needs root: it makes network namespaces, mounts and groups"
    );
    let folder = match (std::env::var_os("AEGIS_TOOLS"), std::env::var_os("HOME")) {
        (Some(folder), _) => PathBuf::from(folder),
        (None, Some(home)) => PathBuf::from(home).join(".cache/aegis/tools"),
        (None, None) => bail!("neither AEGIS_TOOLS nor HOME is set"),
    }
    .join("bin");
    for tool in TOOLS {
        let path = folder.join(tool);
        ensure!(path.exists(), "{} is missing: run `make setup`", path.display());
    }
    Ok(folder)
}

/// The first /30, from the instance's preferred one on, that no address of the root namespace touches.
fn free_link(plan: &Plan) -> anyhow::Result<u16> {
    let used = run("ip", &["-4", "-o", "addr", "show"])?;
    let taken = |index: u16| {
        let link = Link::new(index);
        used.contains(&format!(" {}/", link.root)) || used.contains(&format!(" {}/", link.control_plane))
    };
    let preferred = plan.preferred_link();
    (0..LINK_COUNT)
        .map(|offset| (preferred + offset) % LINK_COUNT)
        .find(|index| !taken(*index))
        .context("no link subnet is free in 10.213.0.0/16")
}

/// A client from a kubeconfig file.
pub async fn client(kubeconfig: &Path) -> anyhow::Result<kube::Client> {
    let file = Kubeconfig::read_from(kubeconfig).with_context(|| format!("read {}", kubeconfig.display()))?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    Ok(kube::Client::try_from(config)?)
}

/// Waits until the API server says it is ready.
pub async fn wait_api(client: &kube::Client, limit: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + limit;
    loop {
        let request = http::Request::get("/readyz").body(Vec::new())?;
        let attempt = async { client.request_text(request).await.map_err(anyhow::Error::from) };
        match tokio::time::timeout(Duration::from_secs(2), attempt).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) if Instant::now() > end => {
                return Err(error.context("the API server does not get ready"));
            }
            Err(_) if Instant::now() > end => bail!("the API server does not answer"),
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Declares a node with its pod range and zone; kubelet adopts it, or has been first.
pub async fn declare(client: &kube::Client, node: Node) -> anyhow::Result<()> {
    let (v4, v6) = (node.pods().to_string(), node.pods6().to_string());
    let object = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name(), "labels": {"topology.kubernetes.io/zone": node.zone()}},
        "spec": {"podCIDR": v4, "podCIDRs": [v4, v6]},
    });
    let parameters = PatchParams::apply("aegis-lab").force();
    Api::<NodeObject>::all(client.clone())
        .patch(&node.name(), &parameters, &Patch::Apply(object))
        .await
        .with_context(|| format!("declare node {}", node.name()))?;
    Ok(())
}

/// Waits until a node is Ready.
pub async fn wait_ready(client: &kube::Client, node: Node, limit: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + limit;
    let nodes: Api<NodeObject> = Api::all(client.clone());
    loop {
        let object = nodes.get(&node.name()).await?;
        let conditions = object.status.and_then(|status| status.conditions).unwrap_or_default();
        if conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True") {
            return Ok(());
        }
        ensure!(Instant::now() < end, "node {} does not get Ready", node.name());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn wait_containerd(plan: &Plan) -> anyhow::Result<()> {
    let state = State::read(&plan.state_dir()).context("the lab has no state")?;
    for node in NODES {
        wait_containerd_of(&state, node).await?;
    }
    Ok(())
}

/// Waits until a node's containerd answers.
pub async fn wait_containerd_of(state: &State, node: Node) -> anyhow::Result<()> {
    let init =
        *state.nodes.get(&node.name()).with_context(|| format!("node {} is not there", node.name()))?;
    let ctr = state.tools.join("ctr").display().to_string();
    let end = Instant::now() + Duration::from_secs(30);
    while let Err(error) = node::exec(init, &ctr, &["--address", node::CONTAINERD, "version"]) {
        ensure!(init.is_alive() && Instant::now() < end, "containerd on {}: {error:#}", node.name());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Pods need the namespace's ServiceAccount, which the controller manager makes.
async fn wait_default_account(client: &kube::Client) -> anyhow::Result<()> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    let end = Instant::now() + Duration::from_secs(30);
    while accounts.get_opt("default").await?.is_none() {
        ensure!(Instant::now() < end, "the controller manager makes no ServiceAccount");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    #[test]
    fn the_lock_of_a_process_that_was_killed_is_taken_until_its_commands_have_ended() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let plan = Plan::new(&format!("lock{}", std::process::id() % 1_000_000)).unwrap();
        let done = std::env::temp_dir().join(format!("aegis-{}-done", plan.instance()));
        let first = lock(&plan).unwrap();
        let mut command = Command::new("sh").args(["-c", "sleep 0.5; : >\"$0\""]).arg(&done).spawn().unwrap();
        // As at the end of a process: closed, not given back.
        nix::unistd::close(first.as_raw_fd()).unwrap();
        std::mem::forget(first);
        drop(lock(&plan).unwrap());
        assert!(done.exists(), "the command still runs");
        command.wait().unwrap();
        fs::remove_file(done).unwrap();
        fs::remove_file(format!("/run/lock/aegis-lab-{}", plan.instance())).unwrap();
    }
}
