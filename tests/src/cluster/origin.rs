//! Servers outside the cluster.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, SocketAddrV6, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::lab::plan::ORIGINS;

/// First of the ten ports that an origin serves by TCP and UDP.
const PORT: u16 = 7000;

/// A server outside the cluster that records every source. It takes the same commands as a pod's probe, so it can
/// also send: to node ports, to pods, to egress addresses.
#[derive(Clone, Debug)]
pub struct Origin {
    address: Ipv4Addr,
    control: Control,
}

#[derive(Clone, Debug)]
enum Control {
    Unix(PathBuf),
    Tcp(String),
}

/// Figures over one protocol since the last reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Summary {
    /// Connections, or datagrams.
    pub total: u64,
    /// Connections that are open (TCP).
    pub open: u64,
    /// By source address, of IPv4.
    #[serde(deserialize_with = "of_v4")]
    pub sources: BTreeMap<Ipv4Addr, u64>,
    /// Distinct source addresses and ports, with the port they came to.
    pub tuples: u64,
    /// Of those, how many came with more than one connection.
    pub twice: u64,
}

/// Figures of an origin since the last reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Summaries {
    /// TCP connections.
    pub tcp: Summary,
    /// UDP datagrams.
    pub udp: Summary,
}

impl Origin {
    /// In the lab o1 and o2; elsewhere those that `AEGIS_ORIGINS=address@control-host:port,…` names. A control socket of this
    /// machine is given by its path.
    pub(super) fn find(lab: Option<&Lab>, index: usize) -> anyhow::Result<Self> {
        if let Some(lab) = lab {
            let origin = ORIGINS.get(index).context("the lab has two origins")?;
            let control = Control::Unix(lab.origin_socket(origin.name));
            return Ok(Self { address: origin.address, control });
        }
        let all = std::env::var("AEGIS_ORIGINS")
            .context("no lab: set AEGIS_ORIGINS=address@control-host:port,…")?;
        Self::parse(&all, index)
    }

    fn parse(all: &str, index: usize) -> anyhow::Result<Self> {
        let one =
            all.split(',').nth(index).with_context(|| format!("AEGIS_ORIGINS names no origin {index}"))?;
        let (address, control) =
            one.split_once('@').with_context(|| format!("{one:?} is no address@host:port"))?;
        let control = match control.trim() {
            path if path.starts_with('/') => Control::Unix(path.into()),
            address => Control::Tcp(address.to_owned()),
        };
        Ok(Self { address: address.trim().parse()?, control })
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// One of its ten ports, by TCP and UDP.
    pub fn port(&self, index: u16) -> SocketAddrV4 {
        SocketAddrV4::new(self.address, PORT + index % 10)
    }

    /// One of its ten ports over IPv6. Only in the lab.
    pub fn port6(&self, index: u16) -> anyhow::Result<SocketAddrV6> {
        let origin = ORIGINS.into_iter().find(|origin| origin.address == self.address);
        let address = origin.context("needs the lab")?.address6();
        Ok(SocketAddrV6::new(address, PORT + index % 10, 0, 0))
    }

    /// Has the origin carry out a command (`tests/probe/src/command.rs` lists them).
    pub async fn call(&self, command: Value) -> anyhow::Result<Value> {
        let origin = self.clone();
        let text = command.to_string();
        let answer = tokio::task::spawn_blocking(move || match &origin.control {
            Control::Unix(path) => ask(UnixStream::connect(path)?, &text),
            Control::Tcp(address) => ask(TcpStream::connect(address)?, &text),
        })
        .await?
        .with_context(|| format!("origin {}", self.address))?;
        if let Some(error) = answer.get("error") {
            bail!("origin {}: {command}: {error}", self.address);
        }
        Ok(answer)
    }

    /// Who came since the last reset, in figures.
    pub async fn summary(&self) -> anyhow::Result<Summaries> {
        Ok(serde_json::from_value(self.call(json!({"do": "summary"})).await?)?)
    }

    /// Forgets who came.
    pub async fn reset(&self) -> anyhow::Result<()> {
        self.call(json!({"do": "reset"})).await.map(drop)
    }
}

/// An origin serves both families, and tells of both.
fn of_v4<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<Ipv4Addr, u64>, D::Error> {
    let all = BTreeMap::<IpAddr, u64>::deserialize(from)?;
    let v4 = all.into_iter().filter_map(|(source, count)| match source {
        IpAddr::V4(source) => Some((source, count)),
        IpAddr::V6(_) => None,
    });
    Ok(v4.collect())
}

fn ask(mut stream: impl Read + Write, line: &str) -> anyhow::Result<Value> {
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    serde_json::from_str(&answer).context("the answer is no JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_of_another_cluster() {
        let origin = Origin::parse("172.18.0.9@127.0.0.1:7099, 172.18.0.8@127.0.0.1:7098", 1).unwrap();
        assert_eq!(origin.address(), Ipv4Addr::new(172, 18, 0, 8));
        assert_eq!(origin.port(3), "172.18.0.8:7003".parse().unwrap());
        assert!(Origin::parse("172.18.0.9", 0).is_err());
        assert!(Origin::parse("172.18.0.9@x", 1).is_err());
    }
}
