//! The live flows of a pod, for `kubectl aegis trace --flows`, which runs this program a second time in the agent's container. So no port
//! is open that would tell who talks to whom: whoever may run programs in the container may ask. The pinned table is only read.

use crate::flows::Flows;
use crate::links::Links;
use aegis_common::{ForwardValue, incarnation};
use anyhow::Context;
use aya::maps::MapData;
use clap::Parser;
use serde::Serialize;
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// First argument of the program that asks for this.
pub const COMMAND: &str = "flows";

/// Which flows.
#[derive(Parser, Clone, Debug)]
#[command(name = COMMAND)]
pub struct Question {
    /// Folder below which maps are pinned.
    #[arg(long)]
    pub pin_root: PathBuf,
    /// Address of the pod.
    #[arg(long)]
    pub pod: Ipv4Addr,
    /// UID of the pod: an earlier one with its address has no part in this.
    #[arg(long)]
    pub uid: String,
    /// Where they go.
    #[arg(long)]
    pub destination: Ipv4Addr,
    /// To which port; any if left out.
    #[arg(long)]
    pub port: Option<u16>,
    /// Flows to tell at most, the most recent first.
    #[arg(long, default_value_t = 20)]
    pub most: usize,
}

/// The flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Live {
    /// How many there are.
    pub total: usize,
    /// Some of them.
    pub flows: Vec<Flow>,
}

/// A flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// IP protocol.
    pub protocol: u8,
    /// Port of the pod, or identifier of a ping.
    pub pod_port: u16,
    /// Port that it goes to.
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

/// Answers on the standard output, from the arguments after the first.
pub fn answer() -> anyhow::Result<()> {
    let question = Question::parse_from(std::env::args_os().skip(1));
    let own = Links::new(&question.pin_root, aegis_common::SCHEMA);
    let path = own.maps().join("FORWARD");
    let map = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
    let table = Flows::open(&map).with_context(|| format!("read {}", path.display()))?;
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    let live = live(&table, &question, u32::try_from(time.tv_sec()).unwrap_or(u32::MAX));
    println!("{}", serde_json::to_string(&live)?);
    Ok(())
}

/// The flows, from the table, at a second since boot.
pub fn live(table: &Flows<ForwardValue>, question: &Question, now: u32) -> Live {
    let (pod, remote) = (number(question.pod), number(question.destination));
    let incarnation = incarnation(&question.uid);
    let mut flows = Vec::new();
    table.for_each(|key, value| {
        let asked = key.local == pod
            && key.remote == remote
            && value.incarnation == incarnation
            && question.port.is_none_or(|port| port == key.remote_port);
        if !asked || !value.is_of(key) {
            return;
        }
        let here = value.egress != key.local;
        flows.push(Flow {
            protocol: key.protocol,
            pod_port: key.local_port,
            port: key.remote_port,
            egress: here.then(|| Ipv4Addr::from(value.egress.to_ne_bytes())),
            egress_port: here.then_some(value.egress_port),
            idle: now.saturating_sub(value.last_seen),
        });
    });
    flows.sort_by_key(|flow| (flow.idle, flow.protocol, flow.pod_port));
    let total = flows.len();
    flows.truncate(question.most);
    Live { total, flows }
}

/// An address as maps hold it.
fn number(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}
