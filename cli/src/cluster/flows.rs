//! Live flows, asked of nodes' agents. Over IPv6 there are none to tell: a /64 is translated without state.

use super::Cluster;
use super::ask::Agent;
use crate::state::State;
use aegis_core::policy::Pod;
use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// Live flows of a node.
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
    /// Address of the pod; agents of earlier versions do not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Ipv4Addr>,
    /// Where it goes, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<Ipv4Addr>,
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
    pub egress: Option<Ipv4Addr>,
    /// Port that it leaves from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_port: Option<u16>,
    /// Seconds since its last packet out.
    pub idle: u32,
}

/// Which flows: those for which all holds that is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Which {
    /// Address of the pod, and its UID.
    pub pod: Option<(Ipv4Addr, String)>,
    /// Where they go.
    pub destination: Option<Ipv4Addr>,
    /// To which port.
    pub port: Option<u16>,
    /// Address that they leave from.
    pub egress: Option<Ipv4Addr>,
    /// How many of a node, the most recent first; by default 20.
    pub most: Option<usize>,
}

impl Which {
    /// Those of a pod.
    ///
    /// # Errors
    /// It has no IPv4 address.
    pub fn of(pod: &Pod) -> Result<Which> {
        let own = pod.addresses.iter().find_map(|it| match it {
            IpAddr::V4(own) => Some(*own),
            IpAddr::V6(_) => None,
        });
        let Some(own) = own else { bail!("flows over IPv6 are not kept anywhere") };
        Ok(Which { pod: Some((own, pod.uid.clone())), ..Which::default() })
    }

    /// As an agent's program is asked.
    pub fn question(&self) -> Vec<String> {
        let (address, uid) = self.pod.clone().unzip();
        let mut question = vec!["flows".to_owned()];
        question.extend(address.map(|it| format!("--pod={it}")));
        question.extend(uid.map(|it| format!("--uid={it}")));
        question.extend(self.destination.map(|it| format!("--destination={it}")));
        question.extend(self.port.map(|it| format!("--port={it}")));
        question.extend(self.egress.map(|it| format!("--egress={it}")));
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
        let IpAddr::V4(destination) = destination else { bail!("flows over IPv6 are not kept anywhere") };
        let which = Which { destination: Some(destination), port, ..Which::of(pod)? };
        self.ask(Agent::of(state, node)?, &which.question()).await
    }
}
