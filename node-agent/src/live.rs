//! What `kubectl aegis` asks of a node: its live flows and its counters. It runs this program a second time in the agent's container, so no
//! port is open that would tell who talks to whom: whoever may run programs in the container may ask. What is pinned is only read.

use crate::ebpf;
use crate::flows::Flows;
use crate::links::Links;
use crate::observed::from_map6;
use crate::sweep;
use aegis_common::{
    Address6, Counter, CounterValue, FRAGMENTED, Flow6Key, Flow6Value, FlowKey, ForwardValue, Pod6Key,
    Pod6Value, SingleValue, SuffixValue, egress_address, incarnation, is_stand_in, protocol_of_single,
};
use anyhow::Context;
use aya::maps::{Map, MapData, PerCpuArray};
use clap::Parser;
use serde::Serialize;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
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
    /// Addresses of the pod.
    #[arg(long)]
    pub pod: Vec<IpAddr>,
    /// UID of the pod: an earlier one with its address has no part in this.
    #[arg(long, requires = "pod")]
    pub uid: Option<String>,
    /// Where they go.
    #[arg(long)]
    pub destination: Option<IpAddr>,
    /// To which port.
    #[arg(long)]
    pub port: Option<u16>,
    /// IP protocols.
    #[arg(long)]
    pub protocol: Vec<u8>,
    /// Addresses that they leave from here; the first one of a /64 is all of it.
    #[arg(long)]
    pub egress: Vec<IpAddr>,
    /// Flows to tell at most of each IP version, the most recent first.
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

/// The flows. Those over IPv6 are apart: earlier versions of who asks know of the others alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Live {
    /// How many there are over IPv4.
    pub total: usize,
    /// Some of them.
    pub flows: Vec<Flow>,
    /// How many there are over IPv6.
    pub total6: usize,
    /// Some of them.
    pub flows6: Vec<Flow>,
}

/// A flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// Address of the pod.
    pub pod: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
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
    pub egress: Option<IpAddr>,
    /// Port that it leaves from; from a /64 it is the pod's.
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
    let map6 = |name| open(&question.pin_root, name, Ok::<_, Infallible>);
    let (flows6, pods6) = (map6("FLOWS6")?, map6("PODS6")?);
    let seconds = u32::try_from(since_boot()?.as_secs()).unwrap_or(u32::MAX);
    let mut found = live6(&flows6, &pods6, question, seconds)?;
    let singles = Known::read(&map6("SINGLES")?, &map6("ORIGINS6")?, &map6("SUFFIXES")?)?;
    found.extend(singles.live(&table, question, seconds));
    let (total6, flows6) = question.most_recent(found);
    tell(&Live { total6, flows6, ..live(&table, question, seconds) })
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

impl Question {
    /// Whether a flow of a pod with this incarnation is asked for.
    fn is_about(&self, flow: &Flow, pod: u32) -> bool {
        let egress = |asked: &IpAddr| flow.egress.is_some_and(|egress| is_within(egress, *asked));
        (self.pod.is_empty() || self.pod.contains(&flow.pod))
            && self.destination.is_none_or(|asked| asked == flow.destination)
            && self.port.is_none_or(|asked| asked == flow.port)
            && (self.protocol.is_empty() || self.protocol.contains(&flow.protocol))
            && (self.egress.is_empty() || self.egress.iter().any(egress))
            && self.uid.as_deref().is_none_or(|uid| incarnation(uid) == pod)
    }

    /// The flows that are told, and how many there are.
    fn most_recent(&self, mut flows: Vec<Flow>) -> (usize, Vec<Flow>) {
        flows.sort_by_key(|flow| (flow.idle, flow.pod, flow.protocol, flow.pod_port));
        let total = flows.len();
        flows.truncate(self.most);
        (total, flows)
    }
}

/// Whether an egress address is the one that is asked for, or of the /64.
fn is_within(egress: IpAddr, asked: IpAddr) -> bool {
    match (egress, asked) {
        (IpAddr::V6(egress), IpAddr::V6(asked)) if asked.to_bits() as u64 == 0 => {
            egress.to_bits() >> 64 == asked.to_bits() >> 64
        }
        _ => egress == asked,
    }
}

/// The flows over IPv4, from the table, at a second since boot.
pub fn live(table: &Flows<ForwardValue>, question: &Question, now: u32) -> Live {
    let mut flows = Vec::new();
    table.for_each(|key, value| {
        if is_stand_in(key.remote) {
            return;
        }
        let here = value.egress != key.local;
        let flow = Flow {
            pod: address(key.local).into(),
            destination: address(key.remote).into(),
            guest: value.is_guest(key),
            protocol: key.protocol,
            pod_port: key.local_port,
            port: key.remote_port,
            egress: here.then(|| address(value.egress).into()),
            egress_port: here.then_some(value.egress_port),
            idle: now.saturating_sub(value.last_seen),
        };
        if value.is_of(key) && question.is_about(&flow, value.incarnation) {
            flows.push(flow);
        }
    });
    let (total, flows) = question.most_recent(flows);
    Live { total, flows, total6: 0, flows6: Vec::new() }
}

/// Flows over IPv6 that leave from /64s, from the maps `FLOWS6` and `PODS6`.
fn live6(flows: &MapData, pods: &MapData, question: &Question, now: u32) -> anyhow::Result<Vec<Flow>> {
    let mut suffixes = BTreeMap::new();
    let known =
        |key: &Pod6Key, pod: &Pod6Value| _ = suffixes.insert((key.address, pod.incarnation), pod.suffix);
    sweep::for_each(pods.fd().as_fd(), known).context("read PODS6")?;
    let mut found = Vec::new();
    let each = |key: &Flow6Key, value: &Flow6Value| {
        let suffix = suffixes.get(&(key.local, value.incarnation)).copied();
        let flow = flow6(key, value, suffix, now);
        // The first fragment of a datagram is a packet of a flow, too, which has an entry of its own.
        if key.protocol != FRAGMENTED && question.is_about(&flow, value.incarnation) {
            found.push(flow);
        }
    };
    sweep::for_each(flows.fd().as_fd(), each).context("read FLOWS6")?;
    Ok(found)
}

/// Addresses for which there are others in the keys of flows that leave from single addresses.
#[derive(Default)]
struct Known {
    egress: BTreeMap<u32, Address6>,
    origins: BTreeMap<u32, Address6>,
    pods: BTreeMap<u32, Address6>,
}

impl Known {
    fn read(egress: &MapData, origins: &MapData, pods: &MapData) -> anyhow::Result<Known> {
        let mut known = Known::default();
        let of = |known: &mut BTreeMap<u32, Address6>, map: &MapData, name: &'static str| {
            let each = |stand_in: &u32, value: &SingleValue| _ = known.insert(*stand_in, value.address);
            sweep::for_each(map.fd().as_fd(), each).with_context(|| format!("read {name}"))
        };
        of(&mut known.egress, egress, "SINGLES")?;
        of(&mut known.origins, origins, "ORIGINS6")?;
        let each = |suffix: &u32, value: &SuffixValue| _ = known.pods.insert(*suffix, value.address);
        sweep::for_each(pods.fd().as_fd(), each).context("read SUFFIXES")?;
        Ok(known)
    }

    /// Flows that leave from single addresses. What is not known any more is told as `::`.
    fn live(&self, table: &Flows<ForwardValue>, question: &Question, now: u32) -> Vec<Flow> {
        let mut flows = Vec::new();
        table.for_each(|key, value| {
            if !is_stand_in(key.remote) || !value.is_of(key) {
                return;
            }
            let flow = self.flow(key, value, now);
            if question.is_about(&flow, value.incarnation) {
                flows.push(flow);
            }
        });
        flows
    }

    fn flow(&self, key: &FlowKey, value: &ForwardValue, now: u32) -> Flow {
        let of = |known: &BTreeMap<u32, Address6>, number| {
            IpAddr::V6(from_map6(known.get(&number).copied().unwrap_or_default()))
        };
        Flow {
            pod: of(&self.pods, key.local),
            destination: of(&self.origins, key.remote),
            guest: false,
            protocol: protocol_of_single(key.protocol),
            pod_port: key.local_port,
            port: key.remote_port,
            egress: Some(of(&self.egress, value.egress)),
            egress_port: Some(value.egress_port),
            idle: now.saturating_sub(value.last_seen),
        }
    }
}

/// A flow over IPv6, of the pod with this suffix. Of one that is gone the /64 is told.
fn flow6(key: &Flow6Key, value: &Flow6Value, suffix: Option<u32>, now: u32) -> Flow {
    let [first, second] = value.network;
    let egress: Address6 = match suffix {
        Some(suffix) => egress_address(&key.local, value.network, value.slice, suffix),
        None => [first, second, 0, 0],
    };
    let pod_port = (key.ports >> 16) as u16;
    Flow {
        pod: from_map6(key.local).into(),
        destination: from_map6(key.remote).into(),
        guest: false,
        protocol: key.protocol as u8,
        pod_port,
        port: key.ports as u16,
        egress: Some(from_map6(egress).into()),
        egress_port: Some(pod_port),
        idle: now.saturating_sub(value.last_seen),
    }
}

/// An address from how maps hold it.
fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(number.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observed::to_map6;

    #[test]
    fn a_flow_over_ipv6_leaves_from_the_pods_address_in_the_64() {
        let address = |text: &str| to_map6(text.parse().unwrap());
        let [first, second, ..] = address("2001:db8:1:4::");
        let key = Flow6Key {
            local: address("fd00:10:1::7"),
            remote: address("2001:db8:9::1"),
            ports: 40_000 << 16 | 443,
            protocol: 6,
        };
        let value = Flow6Value {
            incarnation: incarnation("uid"),
            last_seen: 90,
            network: [first, second],
            slice: 5,
            ..Flow6Value::default()
        };
        let suffix = key.local[3];
        let flow = flow6(&key, &value, Some(suffix), 100);
        let egress = from_map6(egress_address(&key.local, value.network, 5, suffix));
        assert_eq!(egress.segments()[..5], [0x2001, 0xdb8, 1, 4, 5]);
        assert_eq!(
            flow,
            Flow {
                pod: "fd00:10:1::7".parse().unwrap(),
                destination: "2001:db8:9::1".parse().unwrap(),
                guest: false,
                protocol: 6,
                pod_port: 40_000,
                port: 443,
                egress: Some(egress.into()),
                egress_port: Some(40_000),
                idle: 10,
            }
        );
        let told = |arguments: &[&str]| {
            let all = ["flows", "--pin-root=/x"].iter().chain(arguments);
            Question::try_parse_from(all).unwrap().is_about(&flow, value.incarnation)
        };
        for (arguments, is) in [
            (&["--most=1"][..], true),
            (&["--pod=10.0.0.1", "--pod=fd00:10:1::7", "--uid=uid"], true),
            (&["--pod=fd00:10:1::7", "--uid=earlier"], false),
            (&["--pod=10.0.0.1"], false),
            (&["--destination=2001:db8:9::1", "--port=443"], true),
            (&["--port=80"], false),
            (&["--protocol=17", "--protocol=6"], true),
            (&["--protocol=1", "--protocol=58"], false),
            (&["--egress=2001:db8:1:4::"], true),
            (&["--egress=2001:db8:1:5::"], false),
            (&["--egress=2001:db8:1:4::1"], false),
            (&["--egress=203.0.113.1", &format!("--egress={egress}")], true),
        ] {
            assert_eq!(told(arguments), is, "{arguments:?}");
        }
        let gone = flow6(&key, &value, None, 100);
        assert_eq!(gone.egress, Some("2001:db8:1:4::".parse().unwrap()), "its pod is gone");
    }
}
