//! What `kubectl aegis` asks of a node: its live flows and its counters. It runs this program a second time in the agent's container, so no
//! port is open that would tell who talks to whom: whoever may run programs in the container may ask. What is pinned is only read.

use crate::ebpf;
use crate::flows::Flows;
use crate::links::Links;
use aegis_common::{Counter, CounterValue, ForwardValue, incarnation};
use anyhow::Context;
use aya::maps::{Map, MapData, PerCpuArray};
use clap::Parser;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// First argument of the program that asks for flows.
const FLOWS: &str = "flows";
/// The same for counters.
const COUNTERS: &str = "counters";

/// Which flows: those for which all holds that is said.
#[derive(Parser, Clone, Debug, Default)]
#[command(name = FLOWS)]
pub struct Question {
    /// Folder below which maps are pinned.
    #[arg(long)]
    pub pin_root: PathBuf,
    /// Address of the pod.
    #[arg(long)]
    pub pod: Option<Ipv4Addr>,
    /// UID of the pod: an earlier one with its address has no part in this.
    #[arg(long, requires = "pod")]
    pub uid: Option<String>,
    /// Where they go.
    #[arg(long)]
    pub destination: Option<Ipv4Addr>,
    /// To which port.
    #[arg(long)]
    pub port: Option<u16>,
    /// Address that they leave from here.
    #[arg(long)]
    pub egress: Option<Ipv4Addr>,
    /// Flows to tell at most, the most recent first.
    #[arg(long, default_value_t = 20)]
    pub most: usize,
}

/// Whose counters.
#[derive(Parser, Clone, Debug)]
#[command(name = COUNTERS)]
struct Place {
    /// Folder below which maps are pinned.
    #[arg(long)]
    pin_root: PathBuf,
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
    /// Address of the pod.
    pub pod: Ipv4Addr,
    /// Where it goes.
    pub destination: Ipv4Addr,
    /// The pod is another node's: this one is its gateway.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub guest: bool,
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

/// Counters of the data plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Milliseconds since the node has booted.
    pub at: u64,
    /// Packets by what happened to them ([`Counter::label`]), since the data plane was loaded.
    pub packets: BTreeMap<&'static str, u64>,
}

/// Answers on the standard output what the first argument asks for; `None` if it asks for nothing.
pub fn answer() -> Option<anyhow::Result<()>> {
    let mut arguments = std::env::args_os().skip(1).peekable();
    match arguments.peek()?.to_str()? {
        FLOWS => Some(flows(&Question::parse_from(arguments))),
        COUNTERS => Some(counters(&Place::parse_from(arguments).pin_root)),
        _ => None,
    }
}

fn flows(question: &Question) -> anyhow::Result<()> {
    let table = open(&question.pin_root, "FORWARD", |map| Flows::open(&map))?;
    let seconds = u32::try_from(since_boot()?.as_secs()).unwrap_or(u32::MAX);
    tell(&live(&table, question, seconds))
}

fn counters(root: &Path) -> anyhow::Result<()> {
    let map = open(root, "COUNTERS", |map| PerCpuArray::<_, CounterValue>::try_from(Map::PerCpuArray(map)))?;
    let sums = ebpf::sums(&map).context("read COUNTERS")?;
    let packets = Counter::ALL.iter().zip(sums).map(|(counter, sum)| (counter.label(), sum.packets));
    let at = u64::try_from(since_boot()?.as_millis()).unwrap_or(u64::MAX);
    tell(&Counters { at, packets: packets.collect() })
}

/// A pinned map of this version of the data plane.
fn open<T, E>(root: &Path, map: &str, read: impl FnOnce(MapData) -> Result<T, E>) -> anyhow::Result<T>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let path = Links::new(root, aegis_common::SCHEMA).maps().join(map);
    let data = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
    read(data).with_context(|| format!("read {}", path.display()))
}

fn since_boot() -> anyhow::Result<Duration> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?.into())
}

fn tell(answer: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(answer)?);
    Ok(())
}

/// The flows, from the table, at a second since boot.
pub fn live(table: &Flows<ForwardValue>, question: &Question, now: u32) -> Live {
    let is = |asked: Option<Ipv4Addr>, found: u32| asked.is_none_or(|asked| number(asked) == found);
    let whose = question.uid.as_deref().map(incarnation);
    let mut flows = Vec::new();
    table.for_each(|key, value| {
        let asked = is(question.pod, key.local)
            && is(question.destination, key.remote)
            && is(question.egress, value.egress)
            && whose.is_none_or(|whose| whose == value.incarnation)
            && question.port.is_none_or(|port| port == key.remote_port);
        if !asked || !value.is_of(key) {
            return;
        }
        let here = value.egress != key.local;
        flows.push(Flow {
            pod: address(key.local),
            destination: address(key.remote),
            guest: value.is_guest(key),
            protocol: key.protocol,
            pod_port: key.local_port,
            port: key.remote_port,
            egress: here.then(|| address(value.egress)),
            egress_port: here.then_some(value.egress_port),
            idle: now.saturating_sub(value.last_seen),
        });
    });
    flows.sort_by_key(|flow| (flow.idle, flow.pod, flow.protocol, flow.pod_port));
    let total = flows.len();
    flows.truncate(question.most);
    Live { total, flows }
}

/// An address from how maps hold it.
fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(number.to_ne_bytes())
}

/// An address as maps hold it.
fn number(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}
