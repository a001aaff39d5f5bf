//! etcd, API server, controller manager and scheduler, in the namespace `cp`.

use std::path::PathBuf;

use super::plan::{API_PORT, CONTROL_PLANE, Plan, SERVICES, SERVICES6};
use super::process::{Daemon, Process};
use super::topology::namespace_path;

/// Name of the API server among the state's processes.
pub const API_SERVER: &str = "kube-apiserver";

/// Starts one component; `etcd` and the API server first, the others when it answers.
pub fn start(plan: &Plan, tools: &std::path::Path, component: &str) -> anyhow::Result<Process> {
    let state = plan.state_dir();
    Daemon {
        program: tools.join(component),
        arguments: arguments(
            &state.join("pki").display().to_string(),
            &state.display().to_string(),
            component,
        ),
        network: &namespace_path(&plan.namespace("cp")),
        cgroups: &[],
        log: &log(plan, component),
        contained: false,
    }
    .spawn()
}

/// Where a control plane component or an origin logs.
pub fn log(plan: &Plan, component: &str) -> PathBuf {
    plan.state_dir().join("log").join(format!("{component}.log"))
}

fn arguments(pki: &str, state: &str, component: &str) -> Vec<String> {
    match component {
        // A lab's data need not survive the host: no waiting for the disk.
        "etcd" => vec![
            format!("--data-dir={state}/etcd"),
            "--unsafe-no-fsync".to_owned(),
            "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
            "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
            "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
        ],
        API_SERVER => vec![
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={pki}/sa.pub"),
            format!("--service-account-signing-key-file={pki}/sa.key"),
            format!("--service-cluster-ip-range={SERVICES},{SERVICES6}"),
            format!("--tls-cert-file={pki}/apiserver.crt"),
            format!("--tls-private-key-file={pki}/apiserver.key"),
            format!("--client-ca-file={pki}/ca.crt"),
            format!("--token-auth-file={pki}/tokens.csv"),
            format!("--kubelet-client-certificate={pki}/kubelet-client.crt"),
            format!("--kubelet-client-key={pki}/kubelet-client.key"),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--bind-address=0.0.0.0".to_owned(),
            format!("--secure-port={API_PORT}"),
            format!("--advertise-address={CONTROL_PLANE}"),
            "--profiling=false".to_owned(),
        ],
        "kube-controller-manager" => vec![
            format!("--kubeconfig={pki}/kube-controller-manager.kubeconfig"),
            format!("--authentication-kubeconfig={pki}/kube-controller-manager.kubeconfig"),
            format!("--authorization-kubeconfig={pki}/kube-controller-manager.kubeconfig"),
            format!("--service-account-private-key-file={pki}/sa.key"),
            format!("--root-ca-file={pki}/ca.crt"),
            "--use-service-account-credentials=true".to_owned(),
            // The usual limit of 20 requests a second makes its start take seconds longer.
            "--kube-api-qps=500".to_owned(),
            "--kube-api-burst=1000".to_owned(),
            "--leader-elect=false".to_owned(),
        ],
        "kube-scheduler" => vec![
            format!("--kubeconfig={pki}/kube-scheduler.kubeconfig"),
            format!("--authentication-kubeconfig={pki}/kube-scheduler.kubeconfig"),
            format!("--authorization-kubeconfig={pki}/kube-scheduler.kubeconfig"),
            "--leader-elect=false".to_owned(),
        ],
        _ => Vec::new(),
    }
}
