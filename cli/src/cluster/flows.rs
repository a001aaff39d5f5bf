//! Live flows, asked of nodes' agents.

use super::Cluster;
use super::ask::Agent;
use crate::state::State;
use aegis_core::policy::Pod;
use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Live flows of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Told")]
pub struct Live {
    /// How many there are.
    pub total: usize,
    /// Those with the most recent packets.
    pub flows: Vec<Flow>,
}

/// The same as an agent tells it: those over IPv6 apart, of which earlier versions tell none.
#[derive(Deserialize)]
struct Told {
    total: usize,
    flows: Vec<Flow>,
    #[serde(default)]
    total6: usize,
    #[serde(default)]
    flows6: Vec<Flow>,
}

impl From<Told> for Live {
    fn from(Told { total, mut flows, total6, flows6 }: Told) -> Live {
        flows.extend(flows6);
        flows.sort_by_key(|flow| flow.idle);
        Live { total: total + total6, flows }
    }
}

/// A flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// Address of the pod; agents of earlier versions do not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<IpAddr>,
    /// Where it goes, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<IpAddr>,
    /// The pod is another node's: this one is its gateway.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest: bool,
    /// IP protocol.
    pub protocol: u8,
    /// Port of the pod.
    pub pod_port: u16,
    /// Port that it goes to.
    pub port: u16,
    /// Address that it leaves from; left out where another node translates it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<IpAddr>,
    /// Port that it leaves from; over IPv6 it is the pod's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_port: Option<u16>,
    /// Seconds since its last packet out.
    pub idle: u32,
}

/// Which flows: those for which all holds that is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Which {
    /// Addresses of the pod, and its UID.
    pub pod: Option<(Vec<IpAddr>, String)>,
    /// Where they go.
    pub destination: Option<IpAddr>,
    /// To which port.
    pub port: Option<u16>,
    /// IP protocols; none = all.
    pub protocols: Vec<u8>,
    /// Addresses that they leave from; none = all.
    pub egress: Vec<IpAddr>,
    /// How many of a node, the most recent first; by default 20.
    pub most: Option<usize>,
}

impl Which {
    /// Those of a pod, to an address if one is given.
    ///
    /// # Errors
    /// It has no address, or none of that IP version.
    pub fn of(pod: &Pod, destination: Option<IpAddr>) -> Result<Which> {
        let alike = |own: &&IpAddr| destination.is_none_or(|to| to.is_ipv4() == own.is_ipv4());
        let own: Vec<IpAddr> = pod.addresses.iter().filter(alike).copied().collect();
        if own.is_empty() {
            let version = match destination {
                None => "",
                Some(IpAddr::V4(_)) => "IPv4 ",
                Some(IpAddr::V6(_)) => "IPv6 ",
            };
            bail!("pod {}/{} has no {version}address", pod.account, pod.name);
        }
        Ok(Which { pod: Some((own, pod.uid.clone())), destination, ..Which::default() })
    }

    /// As an agent's program is asked.
    pub fn question(&self) -> Vec<String> {
        let (addresses, uid) = self.pod.clone().unzip();
        let mut question = vec!["flows".to_owned()];
        question.extend(addresses.into_iter().flatten().map(|it| format!("--pod={it}")));
        question.extend(uid.map(|it| format!("--uid={it}")));
        question.extend(self.destination.map(|it| format!("--destination={it}")));
        question.extend(self.port.map(|it| format!("--port={it}")));
        question.extend(self.protocols.iter().map(|it| format!("--protocol={it}")));
        question.extend(self.egress.iter().map(|it| format!("--egress={it}")));
        question.extend(self.most.map(|it| format!("--most={it}")));
        question
    }
}

impl Cluster {
    /// Live flows of a pod to an address.
    pub async fn flows(
        &self,
        state: &State,
        pod: &Pod,
        node: &str,
        destination: IpAddr,
        port: Option<u16>,
    ) -> Result<Live> {
        let which = Which { port, ..Which::of(pod, Some(destination))? };
        self.ask(Agent::of(state, node)?, &which.question()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_over_both_ip_versions_are_one_list_and_earlier_agents_tell_of_one() {
        let flow = |pod: &str, idle| {
            format!(
                "{{\"pod\":\"{pod}\",\"destination\":\"{pod}\",\"protocol\":6,\"podPort\":1,\"port\":2,\"idle\":{idle}}}"
            )
        };
        let (four, six) = (flow("10.0.0.1", 9), flow("fd00::1", 3));
        let live = |text: String| serde_json::from_str::<Live>(&text).unwrap();
        let both = live(format!("{{\"total\":1,\"flows\":[{four}],\"total6\":4,\"flows6\":[{six}]}}"));
        assert_eq!((both.total, both.flows[0].idle, both.flows[1].idle), (5, 3, 9));
        let earlier = live(format!("{{\"total\":1,\"flows\":[{four}]}}"));
        assert_eq!((earlier.total, earlier.flows.len()), (1, 1));
    }

    #[test]
    fn a_pod_is_asked_about_by_its_addresses_of_the_destinations_version() {
        let addresses = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let mut pod = Pod { addresses, uid: "u".into(), ..Pod::default() };
        let which = Which { protocols: vec![1, 58], ..Which::of(&pod, None).unwrap() };
        let asked = ["flows", "--pod=10.0.0.1", "--pod=fd00::1", "--uid=u", "--protocol=1", "--protocol=58"];
        assert_eq!(which.question(), asked);
        let to = |to: &str| Some(to.parse().unwrap());
        let which = Which::of(&pod, to("2001:db8::1")).unwrap();
        assert_eq!(which.question(), ["flows", "--pod=fd00::1", "--uid=u", "--destination=2001:db8::1"]);
        pod.addresses.pop();
        assert!(Which::of(&pod, to("2001:db8::1")).unwrap_err().to_string().contains("no IPv6 address"));
    }
}
