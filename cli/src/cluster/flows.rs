//! Live flows, asked of a node's agent: its own program, run a second time in its container.

use super::Cluster;
use crate::state::{AGENT, State, is_part};
use aegis_core::policy::Pod;
use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod as PodObject;
use kube::ResourceExt;
use kube::api::{Api, AttachParams};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tokio::io::AsyncReadExt;

/// Longest time that an agent may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer.
const MOST: u64 = 1 << 20;

/// Live flows of a pod to an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// How many there are.
    pub total: usize,
    /// Those with the most recent packets.
    pub flows: Vec<Flow>,
}

/// A flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// IP protocol.
    pub protocol: u8,
    /// Port of the pod.
    pub pod_port: u16,
    /// Port that it goes to.
    pub port: u16,
    /// Address that it leaves from; left out where another node translates it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Ipv4Addr>,
    /// Port that it leaves from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_port: Option<u16>,
    /// Seconds since its last packet out.
    pub idle: u32,
}

impl Cluster {
    /// Live flows of a pod. Over IPv6 there are none to tell: addresses are translated without state.
    pub async fn flows(
        &self,
        state: &State,
        pod: &Pod,
        node: &str,
        destination: IpAddr,
        port: Option<u16>,
    ) -> Result<Live> {
        let own =
            pod.addresses.iter().find_map(|it| if let IpAddr::V4(own) = it { Some(*own) } else { None });
        let (Some(own), IpAddr::V4(destination)) = (own, destination) else {
            bail!("flows over IPv6 are not kept anywhere");
        };
        let agent = agent(state, node)?;
        let root = pin_root(agent).unwrap_or("/sys/fs/bpf/aegis");
        let mut command = vec![
            // Wherever the image has it.
            "/proc/1/exe".to_owned(),
            "flows".to_owned(),
            format!("--pin-root={root}"),
            format!("--pod={own}"),
            format!("--uid={}", pod.uid),
            format!("--destination={destination}"),
        ];
        command.extend(port.map(|port| format!("--port={port}")));
        let answer = tokio::time::timeout(PATIENCE, self.run(&agent.name_any(), command)).await;
        let (output, errors) = answer.context("the agent does not answer")??;
        let live = serde_json::from_str(&output);
        live.with_context(|| format!("the agent of node {node} does not tell its flows: {}", errors.trim()))
    }

    async fn run(&self, pod: &str, command: Vec<String>) -> Result<(String, String)> {
        let api: Api<PodObject> = Api::namespaced(self.client.clone(), &self.system);
        let parameters = AttachParams::default().container("agent").stdout(true).stderr(true);
        let mut process = api.exec(pod, command, &parameters).await?;
        let (mut output, mut errors) = (String::new(), String::new());
        let (stdout, stderr) = (process.stdout(), process.stderr());
        let read_output = async {
            if let Some(stdout) = stdout {
                stdout.take(MOST).read_to_string(&mut output).await?;
            }
            std::io::Result::Ok(())
        };
        let read_errors = async {
            if let Some(stderr) = stderr {
                stderr.take(MOST).read_to_string(&mut errors).await?;
            }
            std::io::Result::Ok(())
        };
        tokio::try_join!(read_output, read_errors)?;
        process.join().await?;
        Ok((output, errors))
    }
}

fn agent<'a>(state: &'a State, node: &str) -> Result<&'a PodObject> {
    let on = |pod: &&PodObject| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node);
    let mut agents = state.system.iter().filter(|pod| is_part(pod, AGENT)).filter(on);
    agents.next().with_context(|| {
        format!(
            "there is no pod of an agent on node {node}, or pods of the system namespace may not be listed"
        )
    })
}

fn pin_root(agent: &PodObject) -> Option<&str> {
    let containers = agent.spec.iter().flat_map(|spec| &spec.containers);
    containers.flat_map(|it| it.args.iter().flatten()).find_map(|it| it.strip_prefix("--pin-root="))
}
