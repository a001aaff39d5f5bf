//! What passed on the recorded devices, by sender and by flow.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;

use serde::Serialize;

use crate::packet::{Flow, Packet, protocol};

/// UDP port of Geneve.
const GENEVE: u16 = 6081;
/// At most so many examples in a report; the counts are complete.
const EXAMPLES: usize = 20;

/// Destinations of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    address: u32,
    mask: u32,
}

impl std::str::FromStr for Range {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (address, length) = text.split_once('/').unwrap_or((text, "32"));
        let length: u32 = length.parse()?;
        anyhow::ensure!(length <= 32, "{text}: the length is 0 to 32");
        let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
        Ok(Self { address: u32::from(address.parse::<Ipv4Addr>()?) & mask, mask })
    }
}

impl Range {
    fn contains(self, address: &Ipv4Addr) -> bool {
        u32::from(*address) & self.mask == self.address
    }
}

/// Which way a packet went past the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From the wire.
    In,
    /// To the wire.
    Out,
}

#[derive(Default)]
struct Seen {
    senders: BTreeSet<(usize, [u8; 6])>,
    /// Sequence numbers of SYNs: another one is another connection, the same one a retransmission.
    starts: BTreeSet<u32>,
}

/// Counts packets as they are handed in.
pub struct Recorder {
    devices: Vec<String>,
    to: Vec<Range>,
    packets: u64,
    unparsed: u64,
    traffic: BTreeMap<(usize, Direction), Traffic>,
    sources: BTreeMap<(Ipv4Addr, usize, [u8; 6], Option<Ipv4Addr>), Source>,
    resets: BTreeMap<(usize, Direction, Ipv4Addr, Ipv4Addr), Resets>,
    flows: HashMap<Flow, Seen>,
}

/// TCP resets from one address to another.
#[derive(Default)]
struct Resets {
    seen: Source,
    examples: Vec<Flow>,
}

#[derive(Clone, Copy, Default)]
struct Source {
    packets: u64,
    first_ms: u64,
    last_ms: u64,
}

impl Source {
    fn count(&mut self, now_ms: u64) {
        if self.packets == 0 {
            self.first_ms = now_ms;
        }
        self.packets += 1;
        self.last_ms = now_ms;
    }
}

#[derive(Clone, Copy, Default)]
struct Traffic {
    packets: u64,
    bytes: u64,
    geneve: u64,
}

/// Everything counted so far.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Packets seen at all, both directions.
    pub packets: u64,
    /// Packets that the kernel could not hand over: with any of them, nothing can be proved from the rest.
    pub dropped: u64,
    /// Frames that are no IPv4.
    pub unparsed: u64,
    /// By device and direction.
    pub traffic: Vec<DeviceTraffic>,
    /// Who sent to the destinations of interest, from the wire.
    pub sources: Vec<SourceReport>,
    /// Distinct flows to the destinations of interest.
    pub flows: usize,
    /// Distinct TCP flows of which a SYN was seen.
    pub tcp_starts: usize,
    /// Flows that came from more than one sender: what must never happen.
    pub shared: u64,
    /// Examples of them.
    pub shared_flows: Vec<SharedFlow>,
    /// TCP flows that began more than once, by other sequence numbers: ports used again.
    pub reopened: u64,
    /// TCP resets to and from the destinations of interest.
    pub resets: Vec<ResetReport>,
}

/// Resets from one address to another, on one device in one direction.
#[derive(Debug, Serialize)]
pub struct ResetReport {
    /// Device.
    pub device: String,
    /// `in` from the wire, `out` to it.
    pub direction: &'static str,
    /// Sender.
    pub source: Ipv4Addr,
    /// Receiver.
    pub destination: Ipv4Addr,
    /// How many.
    pub packets: u64,
    /// First, in milliseconds since the Unix epoch.
    pub first_ms: u64,
    /// Last, the same.
    pub last_ms: u64,
    /// Some of them.
    pub examples: Vec<Flow>,
}

/// Packets on one device in one direction.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct DeviceTraffic {
    /// Device.
    pub device: String,
    /// `in` from the wire, `out` to it.
    pub direction: &'static str,
    /// Packets.
    pub packets: u64,
    /// Bytes with Ethernet headers.
    pub bytes: u64,
    /// Packets in a Geneve tunnel.
    pub geneve: u64,
}

/// One sender of one source address.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct SourceReport {
    /// Source address.
    pub address: Ipv4Addr,
    /// Device it came in by.
    pub device: String,
    /// Ethernet source.
    pub mac: String,
    /// For ICMP errors: where the packets went that they are about.
    pub about: Option<Ipv4Addr>,
    /// How many.
    pub packets: u64,
    /// First, in milliseconds since the Unix epoch.
    pub first_ms: u64,
    /// Last, the same.
    pub last_ms: u64,
}

/// A flow with several senders.
#[derive(Debug, Serialize)]
pub struct SharedFlow {
    /// The flow.
    pub flow: Flow,
    /// `device/mac` of each sender.
    pub senders: Vec<String>,
}

impl Recorder {
    /// Nothing seen yet.
    pub fn new(devices: Vec<String>, to: Vec<Range>) -> Self {
        Self {
            devices,
            to,
            packets: 0,
            unparsed: 0,
            traffic: BTreeMap::new(),
            sources: BTreeMap::new(),
            resets: BTreeMap::new(),
            flows: HashMap::new(),
        }
    }

    /// One frame on a device (an index into the list of devices).
    pub fn record(
        &mut self,
        device: usize,
        direction: Direction,
        packet: Option<Packet>,
        bytes: u64,
        now_ms: u64,
    ) {
        self.packets += 1;
        let Some(packet) = packet else {
            self.unparsed += 1;
            return;
        };
        let traffic = self.traffic.entry((device, direction)).or_default();
        traffic.packets += 1;
        traffic.bytes += bytes;
        let geneve = packet.flow.protocol == protocol::UDP && packet.flow.destination.port() == GENEVE;
        traffic.geneve += u64::from(geneve);
        let (source, destination) = (*packet.flow.source.ip(), *packet.flow.destination.ip());
        let of_interest = |address: &Ipv4Addr| self.to.iter().any(|range| range.contains(address));
        if packet.reset && (of_interest(&source) || of_interest(&destination)) {
            let resets = self.resets.entry((device, direction, source, destination)).or_default();
            resets.seen.count(now_ms);
            if resets.examples.len() < EXAMPLES {
                resets.examples.push(packet.flow);
            }
        }
        if direction == Direction::Out || !of_interest(&destination) {
            return;
        }
        let key = (source, device, packet.source_mac, packet.about);
        self.sources.entry(key).or_default().count(now_ms);
        if !packet.portless {
            let seen = self.flows.entry(packet.flow).or_default();
            seen.senders.insert((device, packet.source_mac));
            seen.starts.extend(packet.syn);
        }
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        *self = Self::new(std::mem::take(&mut self.devices), std::mem::take(&mut self.to));
    }

    /// Everything counted; `dropped` is what the kernel says.
    pub fn report(&self, dropped: u64) -> Report {
        let device = |index: usize| self.devices[index].clone();
        let way = |direction: Direction| if direction == Direction::In { "in" } else { "out" };
        let shared: Vec<_> = self.flows.iter().filter(|(_, seen)| seen.senders.len() > 1).collect();
        let example = |(flow, seen): &(&Flow, &Seen)| SharedFlow {
            flow: **flow,
            senders: seen
                .senders
                .iter()
                .map(|(index, mac)| format!("{}/{}", device(*index), mac_text(mac)))
                .collect(),
        };
        Report {
            packets: self.packets,
            dropped,
            unparsed: self.unparsed,
            traffic: self
                .traffic
                .iter()
                .map(|((index, direction), traffic)| DeviceTraffic {
                    device: device(*index),
                    direction: way(*direction),
                    packets: traffic.packets,
                    bytes: traffic.bytes,
                    geneve: traffic.geneve,
                })
                .collect(),
            sources: self
                .sources
                .iter()
                .map(|((address, index, mac, about), source)| SourceReport {
                    address: *address,
                    device: device(*index),
                    mac: mac_text(mac),
                    about: *about,
                    packets: source.packets,
                    first_ms: source.first_ms,
                    last_ms: source.last_ms,
                })
                .collect(),
            flows: self.flows.len(),
            tcp_starts: self.flows.values().filter(|seen| !seen.starts.is_empty()).count(),
            shared: shared.len() as u64,
            shared_flows: shared.iter().take(EXAMPLES).map(example).collect(),
            reopened: self.flows.values().filter(|seen| seen.starts.len() > 1).count() as u64,
            resets: self
                .resets
                .iter()
                .map(|((index, direction, source, destination), resets)| ResetReport {
                    device: device(*index),
                    direction: way(*direction),
                    source: *source,
                    destination: *destination,
                    packets: resets.seen.packets,
                    first_ms: resets.seen.first_ms,
                    last_ms: resets.seen.last_ms,
                    examples: resets.examples.clone(),
                })
                .collect(),
        }
    }
}

fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Payload, build, parse};

    fn syn(source: &str, mac: u8, number: u16) -> Option<Packet> {
        let packet = build(
            source.parse().unwrap(),
            "198.51.100.10:7000".parse().unwrap(),
            Payload::Tcp { syn: true, ack: false },
            number,
        );
        parse(&[&[9, 9, 9, 9, 9, 9, mac, mac, mac, mac, mac, mac, 8, 0][..], &packet].concat())
    }

    fn recorder() -> Recorder {
        Recorder::new(vec!["n1".into(), "n2".into()], vec!["198.51.100.0/24".parse().unwrap()])
    }

    #[test]
    fn one_sender_per_flow_is_clean() {
        let mut recorder = recorder();
        recorder.record(0, Direction::In, syn("203.0.113.1:2000", 1, 5), 60, 10);
        recorder.record(0, Direction::In, syn("203.0.113.1:2000", 1, 5), 60, 11);
        recorder.record(1, Direction::In, syn("203.0.113.1:3000", 2, 5), 60, 12);
        let report = recorder.report(0);
        assert_eq!((report.flows, report.shared, report.reopened), (2, 0, 0));
        let sources: BTreeSet<Ipv4Addr> = report.sources.iter().map(|source| source.address).collect();
        assert_eq!(sources, ["203.0.113.1".parse().unwrap()].into());
        assert_eq!(
            (report.sources[0].packets, report.sources[0].first_ms, report.sources[0].last_ms),
            (2, 10, 11)
        );
    }

    #[test]
    fn the_same_flow_from_two_nodes_is_found() {
        let mut recorder = recorder();
        recorder.record(0, Direction::In, syn("203.0.113.1:2000", 1, 5), 60, 10);
        recorder.record(1, Direction::In, syn("203.0.113.1:2000", 2, 9), 60, 10);
        let report = recorder.report(0);
        assert_eq!((report.shared, report.reopened), (1, 1));
        assert_eq!(report.shared_flows[0].senders, ["n1/01:01:01:01:01:01", "n2/02:02:02:02:02:02"]);
    }

    #[test]
    fn icmp_errors_are_no_flow_of_their_own() {
        let mut recorder = recorder();
        for (device, mac) in [(0, 1), (1, 2)] {
            let [from, to] = ["203.0.113.1:7", "198.51.100.10:0"].map(|it| it.parse().unwrap());
            let quoted = build(to, "203.0.113.9:7".parse().unwrap(), Payload::Udp, 1);
            let mut packet = [build(from, to, Payload::Echo, 1)[..28].to_vec(), quoted].concat();
            // Port unreachable, in place of echo.
            packet[20..22].copy_from_slice(&[3, 3]);
            let frame = [&[9, 9, 9, 9, 9, 9, mac, mac, mac, mac, mac, mac, 8, 0][..], &packet].concat();
            recorder.record(device, Direction::In, parse(&frame), 60, 1);
        }
        let report = recorder.report(0);
        assert_eq!((report.flows, report.shared, report.sources.len()), (0, 0, 2));
        assert_eq!(report.sources[0].about, Some("203.0.113.9".parse().unwrap()));
    }

    #[test]
    fn resets_are_told_by_who_sent_them() {
        let mut recorder = recorder();
        for (direction, source, destination) in [
            (Direction::In, "203.0.113.1:2000", "198.51.100.10:7000"),
            (Direction::Out, "198.51.100.10:7000", "203.0.113.1:2000"),
            (Direction::Out, "192.0.2.1:7000", "203.0.113.1:2000"),
        ] {
            let [from, to] = [source, destination].map(|it| it.parse().unwrap());
            let mut packet = build(from, to, Payload::Tcp { syn: false, ack: true }, 1);
            packet[20 + 13] |= 0x04;
            let frame = [&[9, 9, 9, 9, 9, 9, 1, 1, 1, 1, 1, 1, 8, 0][..], &packet].concat();
            recorder.record(0, direction, parse(&frame), 60, 7);
        }
        let report = recorder.report(0);
        let told: Vec<_> = report
            .resets
            .iter()
            .map(|it| (it.direction, it.packets, it.first_ms, it.examples.len()))
            .collect();
        assert_eq!(told, [("in", 1, 7, 1), ("out", 1, 7, 1)]);
    }

    #[test]
    fn what_goes_out_or_elsewhere_is_no_source() {
        let mut recorder = Recorder::new(vec!["n1".into()], vec!["192.0.2.0/24".parse().unwrap()]);
        recorder.record(0, Direction::In, syn("203.0.113.1:2000", 1, 5), 60, 1);
        recorder.record(0, Direction::Out, syn("203.0.113.1:2000", 1, 5), 60, 1);
        recorder.record(0, Direction::In, None, 42, 1);
        let report = recorder.report(3);
        assert!(report.sources.is_empty());
        assert_eq!((report.packets, report.unparsed, report.dropped, report.traffic.len()), (3, 1, 3, 2));
        recorder.reset();
        assert_eq!(recorder.report(0).packets, 0);
    }

    #[test]
    fn ranges() {
        let range: Range = "10.0.0.0/8".parse().unwrap();
        assert!(range.contains(&Ipv4Addr::new(10, 9, 9, 9)) && !range.contains(&Ipv4Addr::new(11, 0, 0, 0)));
        let all: Range = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains(&Ipv4Addr::new(255, 0, 0, 1)));
        assert!("10.0.0.0/33".parse::<Range>().is_err());
    }
}
