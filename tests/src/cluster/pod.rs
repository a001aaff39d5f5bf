//! Pods that run the probe.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use k8s_openapi::api::core::v1::Pod as PodObject;
use kube::api::{Api, AttachParams, DeleteParams, LogParams, PostParams};
use serde_json::{Map, Value, json};
use tokio::io::AsyncReadExt;

use super::{Namespace, PATIENCE, wait_for};

/// Describes a pod that runs the probe.
pub struct PodBuilder<'a> {
    namespace: &'a Namespace,
    name: String,
    node: Option<String>,
    labels: Map<String, Value>,
    service_account: Option<String>,
    host_network: bool,
    lingers: Option<Duration>,
}

impl<'a> PodBuilder<'a> {
    pub(super) fn new(namespace: &'a Namespace, name: &str) -> Self {
        Self {
            namespace,
            name: name.to_owned(),
            node: None,
            labels: Map::from_iter([("app".to_owned(), name.into())]),
            service_account: None,
            host_network: false,
            lingers: None,
        }
    }

    /// On this node; without it, where the scheduler likes.
    pub fn on(mut self, node: &str) -> Self {
        self.node = Some(node.to_owned());
        self
    }

    /// With a label, besides `app`, which is the pod's name.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.into());
        self
    }

    /// With this ServiceAccount.
    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = Some(name.to_owned());
        self
    }

    /// In the node's network.
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// When it is deleted, it goes on for so long (in whole seconds).
    pub fn lingers(mut self, time: Duration) -> Self {
        self.lingers = Some(time);
        self
    }

    /// Starts the pod with the probe's `serve` (TCP and UDP port 8080 for inbound traffic) and waits until it runs.
    pub async fn start(self) -> anyhow::Result<Pod> {
        let pod = self.create(&["/probe", "serve"], true).await?;
        pod.wait_ready(PATIENCE).await
    }

    /// Creates such a pod and does not wait.
    pub async fn create_only(self) -> anyhow::Result<Pod> {
        self.create(&["/probe", "serve"], true).await
    }

    /// Runs a command of the probe from the pod's very start to its end, and returns whether it succeeded and what it
    /// printed: `&["whoami", "198.51.100.10", "7000"]` shows the source of the pod's first packets.
    pub async fn run(self, arguments: &[&str]) -> anyhow::Result<(bool, String)> {
        let pod = self.begin(arguments).await?;
        let phase = wait_for("the pod's end", PATIENCE, async || {
            let phase = pod.api.get(&pod.name).await?.status.and_then(|status| status.phase);
            Ok(phase.filter(|phase| matches!(phase.as_str(), "Succeeded" | "Failed")))
        });
        let succeeded = phase.await? == "Succeeded";
        Ok((succeeded, pod.output().await?))
    }

    /// The same, and does not wait.
    pub async fn begin(self, arguments: &[&str]) -> anyhow::Result<Pod> {
        let command: Vec<&str> = std::iter::once("/probe").chain(arguments.iter().copied()).collect();
        self.create(&command, false).await
    }

    async fn create(self, command: &[&str], serves: bool) -> anyhow::Result<Pod> {
        let mut container = json!({"name": "probe", "image": self.namespace.probe_image(), "command": command,
                                   "imagePullPolicy": "IfNotPresent"});
        if serves {
            // Ready means: commands are taken.
            container["readinessProbe"] = json!({"exec": {"command": ["/probe", "call", r#"{"do":"hello"}"#]},
                                                 "periodSeconds": 1, "timeoutSeconds": 5});
        }
        let mut grace = 1;
        if let Some(time) = self.lingers {
            container["lifecycle"] = json!({"preStop": {"sleep": {"seconds": time.as_secs()}}});
            grace += time.as_secs();
        }
        let object: PodObject = serde_json::from_value(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "labels": self.labels},
            "spec": {
                "nodeName": self.node,
                "serviceAccountName": self.service_account,
                "hostNetwork": self.host_network,
                "restartPolicy": if serves { "Always" } else { "Never" },
                "terminationGracePeriodSeconds": grace,
                "enableServiceLinks": false,
                "containers": [container],
            },
        }))?;
        let api: Api<PodObject> = self.namespace.api();
        api.create(&PostParams::default(), &object)
            .await
            .with_context(|| format!("create pod {}", self.name))?;
        let unknown = Ipv4Addr::UNSPECIFIED;
        Ok(Pod { api, name: self.name, address: unknown, node: String::new(), host: unknown })
    }
}

/// A running pod.
#[derive(Clone)]
pub struct Pod {
    api: Api<PodObject>,
    name: String,
    address: Ipv4Addr,
    node: String,
    host: Ipv4Addr,
}

impl Pod {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it has printed.
    pub async fn output(&self) -> anyhow::Result<String> {
        Ok(self.api.logs(&self.name, &LogParams::default()).await?)
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its node's address: the source of what nothing covers.
    pub fn host(&self) -> Ipv4Addr {
        self.host
    }

    /// Waits until the pod is Ready.
    pub async fn wait_ready(mut self, limit: Duration) -> anyhow::Result<Self> {
        let what = format!("pod {} to be Ready", self.name);
        let ready = wait_for(&what, limit, async || {
            let pod = self.api.get(&self.name).await?;
            let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
            let ready =
                conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"));
            Ok(ready.then_some(pod))
        });
        let object = ready.await?;
        let status = object.status.unwrap_or_default();
        self.address = status.pod_ip.context("the pod has no address")?.parse()?;
        self.host = status.host_ip.context("the pod's node has no address")?.parse()?;
        self.node = object.spec.and_then(|spec| spec.node_name).context("the pod has no node")?;
        Ok(self)
    }

    /// Has the probe carry out a command (`tests/probe/src/command.rs` lists them) and returns its answer.
    pub async fn call(&self, command: Value) -> anyhow::Result<Value> {
        let (output, errors) = self.exec(&["/probe", "call", &command.to_string()]).await?;
        let answer: Value = serde_json::from_str(output.trim())
            .with_context(|| format!("pod {}: {command}: {errors}", self.name))?;
        if let Some(error) = answer.get("error") {
            bail!("pod {}: {command}: {error}", self.name);
        }
        Ok(answer)
    }

    /// Runs a command in the pod, and returns its output and its error output.
    pub async fn exec(&self, command: &[&str]) -> anyhow::Result<(String, String)> {
        let parameters = AttachParams::default().stdout(true).stderr(true);
        let mut process = self.api.exec(&self.name, command.to_vec(), &parameters).await?;
        let (mut output, mut errors) = (String::new(), String::new());
        let mut stdout = process.stdout().context("no standard output")?;
        let mut stderr = process.stderr().context("no standard error")?;
        let (first, second) =
            tokio::join!(stdout.read_to_string(&mut output), stderr.read_to_string(&mut errors));
        first?;
        second?;
        Ok((output, errors))
    }

    /// Changes a label, or removes it.
    pub async fn set_label(&self, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let patch = json!({"metadata": {"labels": {key: value}}});
        self.api
            .patch(&self.name, &kube::api::PatchParams::default(), &kube::api::Patch::Merge(patch))
            .await?;
        Ok(())
    }

    /// Deletes the pod and waits until it is gone.
    pub async fn delete(self) -> anyhow::Result<()> {
        self.api.delete(&self.name, &DeleteParams::default().grace_period(0)).await?;
        let name = &self.name;
        wait_for("the pod's end", PATIENCE, async || {
            Ok(self.api.get_opt(name).await?.is_none().then_some(()))
        })
        .await
    }

    /// Opens connections to a server and holds them under a name; all must come about.
    pub async fn open(
        &self,
        name: &str,
        to: impl Into<std::net::SocketAddr>,
        count: usize,
    ) -> anyhow::Result<()> {
        let to: std::net::SocketAddr = to.into();
        let answer = self.call(json!({"do": "open", "name": name, "to": to, "count": count})).await?;
        ensure!(answer["opened"] == count, "pod {}: opened of {count}: {answer}", self.name);
        Ok(())
    }

    /// A byte there and back on every connection of a name; all must answer.
    pub async fn exchange(&self, name: &str, count: usize) -> anyhow::Result<()> {
        let answer = self.call(json!({"do": "exchange", "name": name})).await?;
        ensure!(answer["answered"] == count, "pod {}: answered of {count}: {answer}", self.name);
        Ok(())
    }

    /// The source that a server sees on a new connection, or the failure's kind.
    pub async fn source(&self, to: std::net::SocketAddrV4) -> anyhow::Result<Result<Ipv4Addr, String>> {
        let answer = self.call(json!({"do": "connect", "to": to})).await?;
        Ok(match answer["source"].as_str() {
            Some(source) => Ok(*source.parse::<std::net::SocketAddrV4>()?.ip()),
            None => Err(answer["failure"].as_str().unwrap_or("no failure named").to_owned()),
        })
    }
}
