//! One node: its files, its start, and running commands in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use super::plan::{COLLECTOR, Node, PODS, PODS6, Plan, RESOLVER};
use super::process::{Daemon, Process, finish};
use super::state::State;
use super::{cgroup, pki, topology};

/// Folder with the node's configuration, as the node sees it.
pub const FILES: &str = "/var/lib/node";
/// Socket of the node's containerd, as the node sees it.
pub const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// In [`FILES`]: kubelet and kube-proxy start once this file is there.
pub const START_KUBELET: &str = "start-kubelet";
/// Folders of the node on disk: name in the data folder, place in the node.
pub const FOLDERS: [(&str, &str); 5] = [
    ("files", FILES),
    ("containerd", "/var/lib/containerd"),
    ("kubelet", "/var/lib/kubelet"),
    ("cni", "/var/lib/cni"),
    ("pods", "/var/log/pods"),
];

/// The node's control group below every hierarchy's root.
pub fn cgroup(plan: &Plan, node: Node) -> String {
    format!("{}/{}", plan.cgroup(), node.name())
}

/// The node's folder on disk.
pub fn data(plan: &Plan, node: Node) -> PathBuf {
    plan.data_dir().join(node.name())
}

/// Writes the node's files and starts its first process, which starts containerd.
pub fn start(plan: &Plan, state: &State, node: Node) -> anyhow::Result<Process> {
    let data = data(plan, node);
    for (folder, _) in FOLDERS {
        fs::create_dir_all(data.join(folder))?;
    }
    let files = data.join("files");
    fs::create_dir_all(files.join("net.d"))?;
    let write =
        |name: &str, text: String| fs::write(files.join(name), text).with_context(|| format!("write {name}"));
    write("containerd.toml", containerd(&state.pause_image))?;
    write("net.d/10-aegis.conflist", network(node))?;
    write("kubelet.yaml", kubelet(&cgroup(plan, node)))?;
    write("kube-proxy.yaml", kube_proxy(node))?;
    // Nobody answers there, but where a test has started somebody.
    write("resolv.conf", format!("nameserver {RESOLVER}\n"))?;
    write("hosts", format!("127.0.0.1 localhost\n{COLLECTOR} aegis-collector.aegis-system.svc\n"))?;
    let groups = cgroup::create(&cgroup(plan, node))?;
    Daemon {
        program: state.program.clone(),
        arguments: [
            "node-init".to_owned(),
            node.name(),
            data.display().to_string(),
            state.tools.display().to_string(),
            format!("{},{}", node.address(), node.address6()),
        ]
        .into(),
        network: &topology::namespace_path(&plan.namespace(&node.name())),
        cgroups: &groups,
        log: &files.join("init.log"),
        contained: true,
    }
    .spawn()
}

/// Hands the node its credentials and lets kubelet and kube-proxy start: the API server must answer by now.
pub fn join(plan: &Plan, node: Node) -> anyhow::Result<()> {
    let (pki, files) = (plan.state_dir().join("pki"), data(plan, node).join("files"));
    for (from, to) in [
        (pki::kubeconfig_name(&node.name()), "kubelet.kubeconfig"),
        (pki::kubeconfig_name("kube-proxy"), "kube-proxy.kubeconfig"),
        ("ca.crt".to_owned(), "ca.crt"),
    ] {
        fs::copy(pki.join(&from), files.join(to)).with_context(|| format!("copy {from}"))?;
    }
    fs::write(files.join(START_KUBELET), "").context("let kubelet start")
}

/// A command that runs in all of the node's namespaces but its control groups.
pub fn command(init: Process, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command
        .args(["--target", &init.pid.to_string(), "--mount", "--net", "--pid", "--uts", "--"])
        .arg(program);
    command
}

/// Imports an image archive into the node's containerd.
pub fn import(init: Process, tools: &Path, archive: &Path) -> anyhow::Result<()> {
    let file = fs::File::open(archive).with_context(|| format!("open {}", archive.display()))?;
    let mut ctr = command(init, &tools.join("ctr").display().to_string());
    ctr.args(["--address", CONTAINERD, "--namespace", "k8s.io", "images", "import", "--local", "-"]);
    // `finish` closes standard input, hence by hand.
    let output = ctr.stdin(file).output().context("run ctr")?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        anyhow::bail!("import {}: {}", archive.display(), error.trim());
    }
    Ok(())
}

/// Runs a command in the node to its end and returns its output.
pub fn exec(init: Process, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    finish(command(init, program).args(arguments), &format!("{program} {}", arguments.join(" ")))
}

fn containerd(pause_image: &str) -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/usr/lib/cni"]
  conf_dir = "{FILES}/net.d"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{pause_image}"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = false
[plugins.'io.containerd.nri.v1.nri']
  disable = false
  socket_path = "/var/run/nri/nri.sock"
"#
    )
}

fn network(node: Node) -> String {
    let (v4, v6) = (node.pods(), node.pods6());
    format!(
        r#"{{"cniVersion": "1.0.0", "name": "aegis", "plugins": [
  {{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
    "ipam": {{"type": "host-local", "ranges": [[{{"subnet": "{v4}"}}], [{{"subnet": "{v6}"}}]],
              "routes": [{{"dst": "0.0.0.0/0"}}, {{"dst": "::/0"}}]}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
]}}
"#
    )
}

fn kubelet(group: &str) -> String {
    format!(
        r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /{group}
enforceNodeAllocatable: []
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {FILES}/ca.crt}}}}
authorization: {{mode: Webhook}}
containerRuntimeEndpoint: unix://{CONTAINERD}
resolvConf: {FILES}/resolv.conf
failSwapOn: false
serializeImagePulls: false
oomScoreAdj: 0
maxPods: 200
# Tests kill containers many times over: the usual back-off of up to five minutes would be all they measure.
crashLoopBackOff: {{maxContainerRestartPeriod: 1s}}
# Images come from here once, and from no registry again: where a disk is nearly full, a kubelet would remove those that no container uses for
# the moment, and what a test has switched off would never come back.
imageGCHighThresholdPercent: 100
evictionHard: {{nodefs.available: "1%", imagefs.available: "1%", memory.available: "50Mi"}}
shutdownGracePeriod: 0s
"#
    )
}

fn kube_proxy(node: Node) -> String {
    // The conntrack limits belong to the host; zero leaves them alone.
    format!(
        r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {{kubeconfig: {FILES}/kube-proxy.kubeconfig}}
hostnameOverride: {}
mode: nftables
clusterCIDR: {PODS},{PODS6}
conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
oomScoreAdj: 0
"#,
        node.name()
    )
}
