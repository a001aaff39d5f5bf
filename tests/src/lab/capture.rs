//! The packet recorder on the router's ports: what each node really sends.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, bail};
use serde::Deserialize;

use super::plan::NODES;
use super::{Lab, images};

/// A running recorder; it ends with the value.
pub struct Capture {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// What was recorded since the start or the last reset. On the router a node's name is its port's name.
#[derive(Clone, Debug, Deserialize)]
pub struct Report {
    /// Packets seen, both directions.
    pub packets: u64,
    /// Packets the recorder missed: [`Capture::report`] makes an error of any.
    pub dropped: u64,
    /// By node and direction.
    pub traffic: Vec<Traffic>,
    /// Who sent to the recorded destinations.
    pub sources: Vec<Source>,
    /// Distinct flows (5-tuples) to the recorded destinations.
    pub flows: u64,
    /// Distinct TCP flows of which the SYN was seen.
    pub tcp_starts: u64,
    /// Flows that more than one node sent: never, by invariant 1.
    pub shared: u64,
    /// Up to 20 of them.
    pub shared_flows: Vec<serde_json::Value>,
    /// TCP flows that began more than once, by another sequence number.
    pub reopened: u64,
    /// TCP resets to and from the recorded destinations.
    pub resets: Vec<Resets>,
}

/// TCP resets from one address to another that passed a node's port in one direction.
#[derive(Clone, Debug, Deserialize)]
pub struct Resets {
    /// Node.
    pub device: String,
    /// `in`: the node sent it; `out`: it was sent to the node.
    pub direction: String,
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
    pub examples: Vec<serde_json::Value>,
}

/// Packets of one node in one direction.
#[derive(Clone, Debug, Deserialize)]
pub struct Traffic {
    /// Node.
    pub device: String,
    /// `in`: the node sent it; `out`: it was sent to the node.
    pub direction: String,
    /// Packets.
    pub packets: u64,
    /// Bytes with Ethernet headers.
    pub bytes: u64,
    /// Packets in a Geneve tunnel.
    pub geneve: u64,
}

/// One node's use of one source address.
#[derive(Clone, Debug, Deserialize)]
pub struct Source {
    /// Source address.
    pub address: Ipv4Addr,
    /// Node.
    pub device: String,
    /// Its Ethernet address.
    pub mac: String,
    /// For ICMP errors: where the packets went that they are about.
    pub about: Option<Ipv4Addr>,
    /// How many packets.
    pub packets: u64,
    /// First, in milliseconds since the Unix epoch.
    pub first_ms: u64,
    /// Last, the same.
    pub last_ms: u64,
}

impl Report {
    /// Distinct source addresses towards the recorded destinations.
    pub fn addresses(&self) -> BTreeSet<Ipv4Addr> {
        self.sources.iter().map(|source| source.address).collect()
    }

    /// What came from anybody else than this egress address. Errors of nodes about packets for another one are left out: an origin
    /// may still send to an address that nobody has any more, and the router goes on handing that to the nodes.
    pub fn strangers(&self, egress: Ipv4Addr) -> Vec<&Source> {
        let other = |source: &&Source| {
            source.address != egress && source.about.is_none_or(|destination| destination == egress)
        };
        self.sources.iter().filter(other).collect()
    }

    /// Whether this egress address was seen, and nobody else.
    pub fn is_only(&self, egress: Ipv4Addr) -> bool {
        self.addresses().contains(&egress) && self.strangers(egress).is_empty()
    }

    /// Nodes that sent from this address.
    pub fn nodes(&self, address: Ipv4Addr) -> BTreeSet<String> {
        let of = self.sources.iter().filter(|source| source.address == address);
        of.map(|source| source.device.clone()).collect()
    }
}

impl Lab {
    /// Records what the nodes send to these destinations (`198.51.100.0/24`), and all traffic in figures.
    pub fn capture(&self, to: &[&str]) -> anyhow::Result<Capture> {
        self.capture_to_file(to, None)
    }

    /// The same, and every packet's head goes into a pcap file.
    pub fn capture_to_file(&self, to: &[&str], pcap: Option<&Path>) -> anyhow::Result<Capture> {
        let devices: Vec<String> = NODES.iter().map(|node| node.name()).collect();
        let mut command = self.command_in("router", &images::probe_binary().display().to_string());
        command.args(["capture", "--devices", &devices.join(","), "--to", &to.join(",")]);
        if let Some(path) = pcap {
            command.arg("--pcap").arg(path);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the packet recorder")?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("the recorder has no output")?);
        let mut capture = Capture { child, input, output };
        capture.read_line().context("the packet recorder does not start")?;
        Ok(capture)
    }
}

impl Capture {
    /// Everything recorded so far. An error if the recorder missed packets: then nothing could be concluded.
    pub fn report(&mut self) -> anyhow::Result<Report> {
        let report: Report = serde_json::from_str(&self.ask(r#"{"do":"report"}"#)?)?;
        if report.dropped > 0 {
            bail!("the recorder missed {} of {} packets", report.dropped, report.dropped + report.packets);
        }
        Ok(report)
    }

    /// Forgets what was recorded.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        self.ask(r#"{"do":"reset"}"#).map(drop)
    }

    fn ask(&mut self, request: &str) -> anyhow::Result<String> {
        let input = self.input.as_mut().context("the recorder has ended")?;
        writeln!(input, "{request}")?;
        input.flush()?;
        self.read_line()
    }

    fn read_line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the packet recorder has ended");
        }
        Ok(line)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // It ends with its input, after writing out its file.
        self.input = None;
        let _ = self.child.wait();
    }
}
