//! `kubectl aegis flows`: the live flows of nodes, of a pod, or towards an origin.

use crate::cluster::{Agent, Cluster, Live, Which};
use crate::output::{Answer, Table, notes, plural, sections};
use crate::state::{State, readable};
use crate::trace::{Protocol, Subject};
use aegis_core::policy::Packet;
use aegis_crds::{EgressAddressSpec, rules};
use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

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
    pub destination: IpAddr,
    /// To which port.
    pub port: u16,
    /// Address that it leaves from; left out where another node translates it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<IpAddr>,
    /// Port that it leaves from; over IPv6 it is the pod's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_port: Option<u16>,
    /// Seconds since its last packet out.
    pub idle: u32,
}

/// Which flows somebody means.
#[derive(Default)]
pub struct Wanted<'a> {
    /// Those of a pod.
    pub pod: Option<&'a Subject>,
    /// Those to `ADDRESS` or `ADDRESS:PORT`.
    pub to: Option<&'a str>,
    /// Those of a protocol.
    pub protocol: Option<Protocol>,
    /// Those that leave from an address.
    pub egress: Option<IpAddr>,
    /// Those that leave from an allocation, by namespace and name.
    pub allocation: Option<(&'a str, &'a str)>,
}

/// As agents are asked for them, and the node of the pod, if one is named.
///
/// # Errors
/// There is no such pod, it has no address, what they go to is none, or the allocation has no address.
pub fn which(state: &State, wanted: &Wanted<'_>) -> Result<(Which, Option<String>)> {
    let (to, port) = match wanted.to.map(|to| (to, to.parse::<SocketAddr>(), to.parse::<IpAddr>())) {
        None => (None, None),
        Some((_, Ok(to), _)) => (Some(to.ip()), Some(to.port())),
        Some((_, _, Ok(to))) => (Some(to), None),
        Some((to, ..)) => bail!("--to {to:?} is none of ADDRESS, ADDRESS:PORT and [ADDRESS]:PORT"),
    };
    let (which, node) = match wanted.pod {
        None => (Which { destination: to, ..Which::default() }, None),
        Some(Subject::ServiceAccount(..)) => bail!("flows are those of a pod: POD or NAMESPACE/POD"),
        Some(subject) => {
            let (pods, _) = subject.pods(state)?;
            let (pod, node) = pods.first().context("there is no such pod")?;
            (Which::of(pod, to)?, node.clone())
        }
    };
    let protocols = match wanted.protocol {
        None => Vec::new(),
        Some(Protocol::Tcp) => vec![6],
        Some(Protocol::Udp) => vec![17],
        // Of either IP version.
        Some(Protocol::Icmp) => vec![1, 58],
    };
    let egress = match wanted.allocation {
        None => wanted.egress.into_iter().collect(),
        Some((namespace, name)) => {
            let own = addresses(state, namespace, name);
            ensure!(!own.is_empty(), "EgressAllocation {namespace}/{name} has no address that you may see");
            own
        }
    };
    Ok((Which { port, protocols, egress, ..which }, node))
}

/// Addresses of an allocation; of a /64 the first one.
fn addresses(state: &State, namespace: &str, name: &str) -> Vec<IpAddr> {
    let all = readable(&state.snapshot.addresses).into_iter().map(|it| &it.spec);
    let of = |it: &&EgressAddressSpec| {
        (it.allocation_ref.namespace.as_str(), it.allocation_ref.name.as_str()) == (namespace, name)
    };
    let first = |text: &str| text.split('/').next().and_then(|address| address.parse().ok());
    all.filter(of).filter_map(|it| first(&it.address)).collect()
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
    names: &BTreeMap<IpAddr, String>,
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
fn names(pods: &[Pod]) -> BTreeMap<IpAddr, String> {
    let living = pods.iter().filter(|pod| !rules::is_finished(pod)).map(|pod| (rules::pod(pod), pod));
    let own = living.filter(|(read, _)| !read.host_network);
    own.flat_map(|(read, pod)| {
        let name = format!("{}/{}", read.account, pod.name_any());
        read.addresses.into_iter().map(move |address| (address, name.clone()))
    })
    .collect()
}

/// Where a flow leaves, in a table.
pub(crate) fn leaves_from(egress: Option<IpAddr>, port: Option<u16>) -> String {
    match egress.zip(port) {
        Some(from) => SocketAddr::from(from).to_string(),
        None => "another node".to_owned(),
    }
}

impl Answer for Flows {
    fn table(&self) -> String {
        let mut table = Table::new(["NODE", "POD", "PROTOCOL", "FROM PORT", "TO", "LEAVES FROM", "IDLE"]);
        for flow in &self.flows {
            let protocol = Packet { destination: flow.destination, protocol: flow.protocol, port: None };
            table.row([
                flow.node.clone(),
                if flow.guest { format!("{} (of another node)", flow.pod) } else { flow.pod.clone() },
                protocol.to_string(),
                flow.pod_port.to_string(),
                SocketAddr::new(flow.destination, flow.port).to_string(),
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
    use crate::files::state_of;
    use anyhow::anyhow;

    fn told(pod: [u8; 4], pod_port: u16, idle: u32) -> Told {
        Told {
            pod: Some(IpAddr::from(pod)),
            destination: Some(IpAddr::from([198, 51, 100, 7])),
            guest: pod_port == 3,
            protocol: 6,
            pod_port,
            port: 443,
            egress: (pod_port != 2).then(|| IpAddr::from([203, 0, 113, 1])),
            egress_port: (pod_port != 2).then_some(2048),
            idle,
        }
    }

    #[test]
    fn the_most_recent_of_all_nodes_come_first_and_what_fails_is_said() {
        let names = [(IpAddr::from([10, 0, 0, 1]), "shop/web".to_owned())].into();
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

    #[test]
    fn a_flow_over_ipv6_leaves_with_its_port_from_the_pods_own_address() {
        let flow = Told {
            pod: Some("fd00::7".parse().unwrap()),
            destination: Some("2001:db8:9::1".parse().unwrap()),
            egress: Some("2001:db8:1:4:5::7".parse().unwrap()),
            protocol: 58,
            ..told([10, 0, 0, 1], 1, 0)
        };
        let live = Ok(Live { total: 1, flows: vec![flow] });
        let table = gather([("n1", live)].into_iter(), &BTreeMap::new(), 9, Vec::new()).table();
        for cell in ["fd00::7", "ICMP", "[2001:db8:9::1]:443", "[2001:db8:1:4:5::7]:2048"] {
            assert!(table.contains(cell), "{cell}: {table}");
        }
    }

    #[test]
    fn what_somebody_means_is_what_agents_are_asked_for() {
        let state = state_of(
            "
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, uid: u}, spec: {nodeName: n1, containers: []},
 status: {podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressAddress, metadata: {name: 203.0.113.1}, spec: {address: 203.0.113.1, prefix: x,
 allocationRef: {namespace: shop, name: main}, epoch: 1, holdings: []}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressAddress, metadata: {name: six}, spec: {address: '2001:db8:1:4::/64', prefix: x,
 allocationRef: {namespace: shop, name: main}, epoch: 1, holdings: []}}
",
        );
        let pod = Subject::Pod("shop".into(), "web".into());
        let asked = |wanted: &Wanted<'_>| {
            which(&state, wanted).map(|(which, node)| (which.question().join(" "), node))
        };
        let own = Wanted { pod: Some(&pod), to: Some("[2001:db8::1]:443"), ..Wanted::default() };
        let question = "flows --pod=fd00::1 --uid=u --destination=2001:db8::1 --port=443";
        assert_eq!(asked(&own).unwrap(), (question.to_owned(), Some("n1".to_owned())));
        let of = |allocation| Wanted {
            protocol: Some(Protocol::Icmp),
            allocation: Some(("shop", allocation)),
            ..Wanted::default()
        };
        let (question, node) = asked(&of("main")).unwrap();
        assert_eq!(question, "flows --protocol=1 --protocol=58 --egress=203.0.113.1 --egress=2001:db8:1:4::");
        assert_eq!(node, None);
        assert!(asked(&of("none")).unwrap_err().to_string().contains("shop/none has no address"));
        let nowhere = Wanted { to: Some("partner.example"), ..Wanted::default() };
        assert!(asked(&nowhere).unwrap_err().to_string().contains("is none of ADDRESS"));
    }
}
