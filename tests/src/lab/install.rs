//! Installs Aegis the way a user does: images and the Helm chart.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::node::{self, FILES};
use super::plan::{COLLECTOR as COLLECTOR_ADDRESS, NODES, Node};
use super::process::finish;
use super::start::Progress;
use super::{Lab, images};

/// Namespace of the chart.
pub const NAMESPACE: &str = "aegis-system";

/// Value with which agents report use, and there is a collector.
const USAGE: &str = "usage.enabled=true";

/// User and group of the collector: see the chart.
const COLLECTOR: u32 = 65532;

/// Folder with the database of countries among the node's files.
const COUNTRIES: &str = "countries";

/// What was installed.
#[derive(Clone, Debug)]
pub struct Installed {
    /// Image of the operator.
    pub operator: String,
    /// Image of the agent.
    pub agent: String,
    /// Image of the collector, where it is wanted.
    pub collector: Option<String>,
}

impl Lab {
    /// Compiles, makes the images, brings them to every node and installs or upgrades the chart.
    ///
    /// `settings` are further Helm values, each as for `--set` (`a.b=c`).
    pub fn install(&self, settings: &[&str]) -> anyhow::Result<Installed> {
        let progress = Progress::new();
        let usage = settings.contains(&USAGE);
        let installed = self.load(usage)?;
        if usage {
            self.give_volume()?;
        }
        progress.step("helm upgrade --install aegis");
        let state = self.state()?;
        let mut helm = Command::new(state.tools.join("helm"));
        helm.env("KUBECONFIG", self.kubeconfig())
            .args(["upgrade", "--install", "aegis"])
            .arg(images::workspace().join("charts/aegis"))
            .args(["--namespace", NAMESPACE, "--create-namespace", "--wait", "--timeout", "120s"])
            .arg(format!("--set=operator.image={}", installed.operator))
            .arg(format!("--set=agent.image={}", installed.agent))
            .arg(format!("--set=agent.countries.volume.hostPath.path={FILES}/{COUNTRIES}"))
            .arg("--set=agent.countries.volume.hostPath.type=DirectoryOrCreate");
        if let Some(collector) = &installed.collector {
            helm.arg(format!("--set=usage.image={collector}"));
        }
        for setting in settings {
            helm.arg(format!("--set={setting}"));
        }
        finish(&mut helm, "helm upgrade --install aegis")?;
        progress.step("installed");
        Ok(installed)
    }

    /// Whether a node was given a database of countries.
    pub fn has_countries(&self, node: Node) -> bool {
        self.countries(node).exists()
    }

    /// Gives every node a database of countries, in place of the one that it has.
    pub fn give_countries(&self, database: &[u8]) -> anyhow::Result<()> {
        for node in NODES {
            let file = self.countries(node);
            let new = file.with_extension("new");
            fs::create_dir_all(file.parent().unwrap_or(&file))?;
            fs::write(&new, database)?;
            fs::rename(&new, &file)?;
        }
        Ok(())
    }

    fn countries(&self, node: Node) -> PathBuf {
        node::data(&self.plan, node).join("files").join(COUNTRIES).join("country.mmdb")
    }

    /// `helm upgrade` with one more value and the images that are installed; waits until all pods are replaced.
    pub fn upgrade(&self, setting: &str) -> anyhow::Result<()> {
        let mut helm = Command::new(self.state()?.tools.join("helm"));
        helm.env("KUBECONFIG", self.kubeconfig())
            .args(["upgrade", "aegis", "--reuse-values"])
            .arg(images::workspace().join("charts/aegis"))
            .args(["--namespace", NAMESPACE, "--wait", "--timeout", "180s"])
            .arg(format!("--set={setting}"));
        finish(&mut helm, "helm upgrade aegis")?;
        // Helm is content as soon as no more pods are missing than may be.
        let mut rollout = Command::new(self.state()?.tools.join("kubectl"));
        rollout
            .env("KUBECONFIG", self.kubeconfig())
            .args(["rollout", "status", "daemonset/aegis-node-agent", "--timeout", "180s"])
            .args(["--namespace", NAMESPACE]);
        finish(&mut rollout, "kubectl rollout status").map(drop)
    }

    /// Compiles, makes the images and brings them to every node.
    pub fn load_images(&self) -> anyhow::Result<Installed> {
        self.load(false)
    }

    /// The lab has nobody who makes volumes: a folder of the first node is the collector's. Nor has it a DNS: its Service gets the address that
    /// nodes know.
    fn give_volume(&self) -> anyhow::Result<()> {
        let labels = "labels: {app.kubernetes.io/managed-by: Helm}, \
                      annotations: {meta.helm.sh/release-name: aegis, meta.helm.sh/release-namespace: aegis-system}";
        let objects = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {{name: aegis-collector, namespace: {NAMESPACE}, {labels}}}\n\
             spec: {{clusterIP: {COLLECTOR_ADDRESS}, ports: [{{name: https, port: 443, targetPort: https}}]}}\n---\n\
             apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: aegis-collector}}\nspec:\n  \
             capacity: {{storage: 20Gi}}\n  accessModes: [ReadWriteOnce]\n  \
             claimRef: {{namespace: {NAMESPACE}, name: aegis-collector}}\n  \
             hostPath: {{path: {FILES}/collector, type: Directory}}\n  \
             nodeAffinity: {{required: {{nodeSelectorTerms: [{{matchExpressions: \
             [{{key: kubernetes.io/hostname, operator: In, values: [{}]}}]}}]}}}}\n",
            NODES[0].name()
        );
        let folder = node::data(&self.plan, NODES[0]).join("files/collector");
        fs::create_dir_all(&folder)?;
        // Volumes of the kubelet's own are given to the pod's group; a folder of the node is not.
        std::os::unix::fs::chown(&folder, Some(COLLECTOR), Some(COLLECTOR))?;
        let file = self.plan.state_dir().join("collector.yaml");
        fs::write(&file, objects)?;
        let mut kubectl = Command::new(self.state()?.tools.join("kubectl"));
        kubectl.env("KUBECONFIG", self.kubeconfig()).arg("apply").arg("--filename").arg(&file);
        finish(&mut kubectl, "kubectl apply").map(drop)
    }

    fn load(&self, usage: bool) -> anyhow::Result<Installed> {
        let progress = Progress::new();
        progress.step("compiling operator and agent");
        images::compile(&["aegis-operator", "aegis-node-agent"])?;
        let images = images::project(usage)?;
        for archive in [&images.operator, &images.agent].into_iter().chain(&images.collector) {
            progress.step(&format!("image {} on every node", archive.reference));
            self.load_image(archive)?;
        }
        Ok(Installed {
            operator: images.operator.reference,
            agent: images.agent.reference,
            collector: images.collector.map(|archive| archive.reference),
        })
    }
}
