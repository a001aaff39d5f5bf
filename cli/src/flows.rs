//! `kubectl aegis flows`: the live flows of nodes, of a pod, or towards an origin.

use crate::cluster::{Agent, Cluster, Live, Which};
use crate::output::{Answer, Table, notes, plural, sections};
use crate::state::State;
use crate::trace::Subject;
use aegis_core::policy::Packet;
use aegis_crds::rules;
use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

/// The flows.
#[derive(Debug, Serialize)]
pub struct Flows {
    /// How many there are.
    pub total: usize,
    /// Those with the most recent packets.
    pub flows: Vec<Flow>,
    /// What could not be looked at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A flow as a node has it. One that leaves through a gateway is told twice: by the node of the pod, and by the gateway.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// The node.
    pub node: String,
    /// Namespace and name of the pod, or its address.
    pub pod: String,
    /// The pod is another node's: this one is its gateway.
    pub guest: bool,
    /// IP protocol.
    pub protocol: u8,
    /// Port of the pod.
    pub pod_port: u16,
    /// Where it goes.
    pub destination: Ipv4Addr,
    /// To which port.
    pub port: u16,
    /// Address that it leaves from; left out where another node translates it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Ipv4Addr>,
    /// Port that it leaves from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_port: Option<u16>,
    /// Seconds since its last packet out.
    pub idle: u32,
}

/// Which flows somebody means, and the node of the pod, if one is named.
///
/// # Errors
/// There is no such pod, it has no IPv4 address, or what they go to is none.
pub fn which(
    state: &State,
    pod: Option<&Subject>,
    to: Option<&str>,
    egress: Option<Ipv4Addr>,
) -> Result<(Which, Option<String>)> {
    let (mut which, node) = match pod {
        None => (Which::default(), None),
        Some(Subject::ServiceAccount(..)) => bail!("flows are those of a pod: POD or NAMESPACE/POD"),
        Some(subject) => {
            let (pods, _) = subject.pods(state)?;
            let (pod, node) = pods.first().context("there is no such pod")?;
            (Which::of(pod)?, node.clone())
        }
    };
    if let Some(to) = to {
        let told: Option<(Ipv4Addr, Option<u16>)> = match to.parse::<SocketAddrV4>() {
            Ok(to) => Some((*to.ip(), Some(to.port()))),
            Err(_) => to.parse().ok().map(|to| (to, None)),
        };
        let (address, port) =
            told.with_context(|| format!("--to {to:?} is neither ADDRESS nor ADDRESS:PORT (IPv4)"))?;
        (which.destination, which.port) = (Some(address), port);
    }
    Ok((Which { egress, ..which }, node))
}

/// Asks agents for flows, at most so many in all as of each node.
///
/// # Errors
/// None of them answers.
pub async fn flows(
    online: &Cluster,
    state: &State,
    agents: &[Agent<'_>],
    which: &Which,
    most: usize,
) -> Result<Flows> {
    let which = Which { most: Some(most), ..which.clone() };
    let answers: Vec<Result<Live>> = online.ask_all(agents, &which.question()).await?;
    let told = agents.iter().map(|agent| agent.node).zip(answers);
    Ok(gather(told, &names(&state.pods), most, state.notes()))
}

/// Puts together what nodes have told.
fn gather<'a>(
    told: impl Iterator<Item = (&'a str, Result<Live>)>,
    names: &BTreeMap<Ipv4Addr, String>,
    most: usize,
    notes: Vec<String>,
) -> Flows {
    let mut all = Flows { total: 0, flows: Vec::new(), notes };
    for (node, answer) in told {
        let live = match answer {
            Ok(live) => live,
            Err(error) => {
                all.notes.push(format!("{error:#}"));
                continue;
            }
        };
        all.total += live.total;
        let shown = live.flows.into_iter().filter_map(|flow| {
            let (pod, destination) = (flow.pod?, flow.destination?);
            Some(Flow {
                node: node.to_owned(),
                pod: names.get(&pod).cloned().unwrap_or_else(|| pod.to_string()),
                guest: flow.guest,
                protocol: flow.protocol,
                pod_port: flow.pod_port,
                destination,
                port: flow.port,
                egress: flow.egress,
                egress_port: flow.egress_port,
                idle: flow.idle,
            })
        });
        all.flows.extend(shown);
    }
    all.flows.sort_by(|a, b| (a.idle, &a.pod, a.pod_port).cmp(&(b.idle, &b.pod, b.pod_port)));
    all.flows.truncate(most);
    all
}

/// Pods that are there, by address.
fn names(pods: &[Pod]) -> BTreeMap<Ipv4Addr, String> {
    let living = pods.iter().filter(|pod| !rules::is_finished(pod)).map(|pod| (rules::pod(pod), pod));
    let own = living.filter(|(read, _)| !read.host_network);
    own.flat_map(|(read, pod)| {
        let name = format!("{}/{}", read.account, pod.name_any());
        read.addresses.into_iter().filter_map(move |address| match address {
            IpAddr::V4(address) => Some((address, name.clone())),
            IpAddr::V6(_) => None,
        })
    })
    .collect()
}

/// Where a flow leaves, in a table.
pub(crate) fn leaves_from(egress: Option<Ipv4Addr>, port: Option<u16>) -> String {
    match egress.zip(port) {
        Some((egress, port)) => format!("{egress}:{port}"),
        None => "another node".to_owned(),
    }
}

impl Answer for Flows {
    fn table(&self) -> String {
        let mut table = Table::new(["NODE", "POD", "PROTOCOL", "FROM PORT", "TO", "LEAVES FROM", "IDLE"]);
        for flow in &self.flows {
            let destination = IpAddr::from(flow.destination);
            let protocol = Packet { destination, protocol: flow.protocol, port: None };
            table.row([
                flow.node.clone(),
                if flow.guest { format!("{} (of another node)", flow.pod) } else { flow.pod.clone() },
                protocol.to_string(),
                flow.pod_port.to_string(),
                format!("{}:{}", flow.destination, flow.port),
                leaves_from(flow.egress, flow.egress_port),
                format!("{} s", flow.idle),
            ]);
        }
        let shown = match self.total - self.flows.len().min(self.total) {
            0 => String::new(),
            left => format!(", {left} of them not shown"),
        };
        let head = plural(self.total, "live flow", "live flows") + &shown;
        sections([head, table.text(), notes(&self.notes)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Flow as Told;
    use anyhow::anyhow;

    fn told(pod: [u8; 4], pod_port: u16, idle: u32) -> Told {
        Told {
            pod: Some(pod.into()),
            destination: Some([198, 51, 100, 7].into()),
            guest: pod_port == 3,
            protocol: 6,
            pod_port,
            port: 443,
            egress: (pod_port != 2).then_some([203, 0, 113, 1].into()),
            egress_port: (pod_port != 2).then_some(2048),
            idle,
        }
    }

    #[test]
    fn the_most_recent_of_all_nodes_come_first_and_what_fails_is_said() {
        let names = [(Ipv4Addr::new(10, 0, 0, 1), "shop/web".to_owned())].into();
        let nodes = [
            ("n1", Ok(Live { total: 5, flows: vec![told([10, 0, 0, 1], 1, 4), told([10, 0, 0, 1], 2, 9)] })),
            ("n2", Err(anyhow!("the agent of node n2 does not answer"))),
            ("n3", Ok(Live { total: 1, flows: vec![told([10, 0, 0, 9], 3, 0)] })),
        ];
        let all = gather(nodes.into_iter(), &names, 2, Vec::new());
        let head = ["NODE", "POD", "PROTOCOL", "FROM PORT", "TO", "LEAVES FROM", "IDLE"];
        let row = |node, pod, port| {
            [
                node,
                pod,
                "TCP",
                port,
                "198.51.100.7:443",
                "203.0.113.1:2048",
                if port == "3" { "0 s" } else { "4 s" },
            ]
        };
        let mut table = Table::new(head);
        table.row(row("n3", "10.0.0.9 (of another node)", "3").map(str::to_owned));
        table.row(row("n1", "shop/web", "1").map(str::to_owned));
        assert_eq!(
            all.table(),
            format!(
                "6 live flows, 4 of them not shown\n\n{}\nnote: the agent of node n2 does not answer\n",
                table.text()
            )
        );
    }
}
