//! The nftables tables `ip aegis` ([`four`]) and `ip6 aegis` ([`six`]): which flows are Aegis's, and what must not leave.
//!
//! A flow is Aegis's if the first packet of its conntrack entry was marked by `pod_ingress`. Every later packet takes
//! the mark from the entry, set or cleared, so flows from before a binding and replies of inbound connections pass
//! untouched, and flows of a deleted binding keep their address. Marked packets are exempt from the CNI's masquerade
//! by an identity translation that comes before it.
//!
//! That is settled at the forward hook. Prerouting would be too early: with `bridge-nf-call-iptables`, which Kubernetes
//! nodes usually have on, it runs on the bridge's port, before `pod_ingress` on the bridge itself.
//!
//! One kind of flow must not go on as it began: a covered one that began while the table was missing. The CNI has
//! translated it, the uplink dropped it, and only conntrack keeps it. It has never had a reply, and its conntrack mark lacks
//! the "judged" bit that every flow's first packet gets here. What is covered and belongs to such a flow keeps its mark, and
//! the uplink goes on dropping it until conntrack forgets.
//!
//! Two things are dropped there, since the programs cannot see them: marked packets that leave through a device without program
//! (`outside`), and packets of new flows from a device to which `pod_ingress` is not attached yet (`unmarked`). Devices are named by index: one that
//! was made anew under an old name has no program yet.
//!
//! Nor must anything that is forwarded get to the tunnel port of a node: to that node it would look as if another one
//! had sent it, and it would send it on from any account's address. That is decided after destinations have been translated,
//! since a service may lead there too.
//!
//! What comes back is marked, too (XDP has translated it): a connection that it opens in conntrack is a flow's. And what the
//! node itself says about a packet of a flow is covered as what the pod says.
//!
//! DNS queries of pods that rules with host names may cover go to the agent instead of to the resolver: before kube-proxy translates
//! them, by a translation of our own. Those of connections from before are dropped, and conntrack forgets them.
//!
//! What the node's own sockets send passes the output hook. Whether it is covered is known only at the uplink, by its control
//! group; here it is only told apart what opens a flow and what answers one from outside or began before anything was looked at.

mod four;
pub mod six;

pub use four::{DROPS, Rules};

use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket, protocols::NETLINK_NETFILTER};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Name of the table.
pub const TABLE: &str = "aegis";
/// Longest time that one call of `nft` may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Chains that tables of earlier versions have.
const FORMER: [&str; 1] = ["guard"];
/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;

/// Why the table could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The program could not be started, or its pipes failed.
    #[error("cannot run nft: {0}")]
    Run(#[from] std::io::Error),
    /// It took too long.
    #[error("nft did not end in time")]
    Timeout,
    /// It refused.
    #[error("nft: {0}")]
    Refused(String),
}

/// The bit of a conntrack mark (not of a packet's) that says that the flow's first packet met the table: the one above
/// the mark's, or below where there is none above.
fn judged(mark: u32) -> u32 {
    if mark << 1 != 0 { mark << 1 } else { mark >> 1 }
}

/// The table: its sets with their elements, and its chains with their rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// `ip` or `ip6`.
    family: &'static str,
    drops: &'static [&'static str],
    /// Name and type.
    forms: &'static [(&'static str, &'static str)],
    /// Name and hook.
    hooks: &'static [(&'static str, &'static str)],
    sets: Vec<BTreeSet<String>>,
    chains: Vec<Vec<String>>,
}

impl Table {
    /// `ip` or `ip6`.
    pub fn family(&self) -> &'static str {
        self.family
    }

    /// Everything, whatever a table of this name holds. Its chains stay hooked: a packet meets the old rules or the new.
    fn whole(&self) -> String {
        let family = self.family;
        let mut script = String::new();
        for name in FORMER {
            let _ = writeln!(script, "table {family} {TABLE} {{ chain {name} {{ }}; }}");
        }
        let _ = writeln!(script, "table {family} {TABLE} {{");
        for name in self.drops {
            let _ = writeln!(script, "  counter {name} {{ }}");
        }
        for (name, form) in self.forms {
            let _ = writeln!(script, "  set {name} {{ {form}; }}");
        }
        for (name, hook) in self.hooks {
            let _ = writeln!(script, "  chain {name} {{ {hook} }}");
        }
        let _ = writeln!(script, "}}\nflush table {family} {TABLE}");
        for name in FORMER {
            let _ = writeln!(script, "delete chain {family} {TABLE} {name}");
        }
        for ((name, _), elements) in self.forms.iter().zip(&self.sets) {
            let _ = writeln!(script, "flush set {family} {TABLE} {name}");
            self.change_elements(&mut script, "add", name, elements.iter());
        }
        for ((name, _), rules) in self.hooks.iter().zip(&self.chains) {
            self.add_rules(&mut script, name, rules);
        }
        script
    }

    /// What differs from a table that is there.
    fn since(&self, before: &Table) -> String {
        let mut script = String::new();
        for ((name, _), (old, new)) in self.forms.iter().zip(before.sets.iter().zip(&self.sets)) {
            self.change_elements(&mut script, "delete", name, old.difference(new));
            self.change_elements(&mut script, "add", name, new.difference(old));
        }
        for ((name, _), (old, new)) in self.hooks.iter().zip(before.chains.iter().zip(&self.chains)) {
            if old != new {
                let _ = writeln!(script, "flush chain {} {TABLE} {name}", self.family);
                self.add_rules(&mut script, name, new);
            }
        }
        script
    }

    fn change_elements<'a>(
        &self,
        script: &mut String,
        verb: &str,
        set: &str,
        elements: impl Iterator<Item = &'a String>,
    ) {
        let elements: Vec<&str> = elements.map(String::as_str).collect();
        if !elements.is_empty() {
            let family = self.family;
            let _ = writeln!(script, "{verb} element {family} {TABLE} {set} {{ {} }}", elements.join(", "));
        }
    }

    fn add_rules(&self, script: &mut String, chain: &str, rules: &[String]) {
        for rule in rules {
            let _ = writeln!(script, "add rule {} {TABLE} {chain} {rule}", self.family);
        }
    }
}

/// Rules that send what comes from an uplink to `arrived`.
fn arrival(uplinks: &BTreeMap<u32, String>) -> Vec<String> {
    uplinks.keys().map(|index| format!("iif {index} goto arrived")).collect()
}

/// Rules for what arrives marked: it was translated back. Afterwards the mark would say that a flow leaves. (Marked packets
/// from elsewhere are pods' own.) `unusual` is for those that belong to no connection.
fn arrived(mark: u32, unusual: impl IntoIterator<Item = String>) -> Vec<String> {
    let clear = format!("meta mark set meta mark & {:#x}", !mark);
    [format!("meta mark {} return", is_clear(mark)), format!("ct state established,related {clear} return")]
        .into_iter()
        .chain(unusual)
        .chain([clear])
        .collect()
}

/// Rules by which an error that the node itself sends about a packet of a covered flow (the pod is gone, or its link is
/// narrower) is covered too. To the pod it goes as it is.
fn output(mark: u32, destination: &str, errors: &str, pods: &BTreeSet<String>) -> Vec<String> {
    let is_set = is_set(mark);
    let to_pods = pods.iter().map(|range| format!("{destination} {range} return"));
    let covered = format!(
        "{errors} ct state related ct mark {is_set} meta mark set meta mark | {mark:#x} jump outside"
    );
    to_pods.chain([covered]).collect()
}

/// A rule's words for "the mark is set".
fn is_set(mark: u32) -> String {
    format!("& {mark:#x} == {mark:#x}")
}

/// A rule's words for "the mark is clear".
fn is_clear(mark: u32) -> String {
    format!("& {mark:#x} == 0")
}

/// Rules by which packets of a pod take the mark of their flow. Those that most packets meet come first.
fn decide(mark: u32) -> Vec<String> {
    let judged = judged(mark);
    let is_set = is_set(mark);
    vec![
        "ct status & confirmed == 0 goto first".to_owned(),
        format!("ct mark {is_set} meta mark set meta mark | {mark:#x} goto outside"),
        format!("meta mark {is_set} ct mark & {judged:#x} == 0 ct status & seen-reply == 0 goto outside"),
        format!("meta mark set meta mark & {:#x}", !mark),
        "ct state new goto unmarked".to_owned(),
    ]
}

/// Rules by which a flow's first packet decides for all that follow.
fn first(mark: u32) -> Vec<String> {
    let judged = judged(mark);
    vec![
        format!("meta mark {} ct mark set ct mark | {:#x} goto outside", is_set(mark), mark | judged),
        format!("ct mark set ct mark & {:#x} | {judged:#x}", !mark),
        "ct state new goto unmarked".to_owned(),
    ]
}

/// Rules for new flows that no program has marked, in the words of a family: a device may have none yet.
fn unmarked(family: &str, drop: &str) -> Vec<String> {
    vec![
        format!("{family} saddr @uncovered return"),
        format!("{family} saddr @held iif != @pod_devices {family} daddr != @internal {drop}"),
    ]
}

/// Rules by which marked packets leave through devices with a program only.
fn outside<'a>(programmed: impl Iterator<Item = &'a u32>, drop: String) -> Vec<String> {
    programmed.map(|index| format!("oif {index} return")).chain([drop]).collect()
}

/// Rules that send what comes from pods to `decide`.
fn from_pods(family: &str, pods: &BTreeSet<String>, uplinks: &BTreeMap<u32, String>) -> Vec<String> {
    let ranges = pods.iter().map(|range| format!("{family} saddr {range} goto decide"));
    // A look-up in a set is dear, and behind an uplink there is no pod.
    let uplinks = uplinks.keys().map(|index| format!("iif {index} return"));
    // Pods whose address is in none of the ranges.
    ranges.chain(uplinks).chain(["iif @pod_devices goto decide".to_owned()]).collect()
}

/// DNS queries that the agent answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queries {
    /// Where those to each resolver go. None: none do.
    pub listening: BTreeMap<IpAddr, SocketAddr>,
    /// Pods whose queries go where they ask. Others are pods that rules with host names cover, or such as nobody knows yet.
    pub nameless: BTreeSet<IpAddr>,
}

/// The chain by which they get there.
const QUERIES: &str = "type nat hook prerouting priority dstnat - 1; policy accept;";

impl Queries {
    fn of(&self, family: &str) -> impl Iterator<Item = (&IpAddr, &SocketAddr)> {
        let v4 = family == "ip";
        self.listening.iter().filter(move |(resolver, own)| resolver.is_ipv4() == v4 && own.is_ipv4() == v4)
    }

    fn returns(&self, family: &str) -> impl Iterator<Item = String> {
        let v4 = family == "ip";
        // Not a set, in which nothing may be found while something else is being committed.
        let pods = self.nameless.iter().filter(move |pod| pod.is_ipv4() == v4);
        pods.map(move |pod| format!("{} saddr {pod} return", if v4 { "ip" } else { "ip6" }))
    }

    /// Rules of the chains `queries`, `asked` and `undirected`.
    fn chains(&self, family: &str, pods: &BTreeSet<String>, undirected: &str) -> [Vec<String>; 3] {
        if self.of(family).next().is_none() {
            return Default::default();
        }
        let redirected = self.of(family).flat_map(|(resolver, own)| {
            let to = move |(range, protocol): (&String, &str)| {
                format!("{family} saddr {range} {family} daddr {resolver} {protocol} dport 53 dnat to {own}")
            };
            pods.iter().flat_map(|range| [(range, "udp"), (range, "tcp")]).map(to)
        });
        let dropped = pods.iter().map(|range| format!("{family} saddr {range} {undirected}"));
        [
            ["udp", "tcp"].map(|protocol| format!("{protocol} dport 53 goto asked")).into(),
            self.returns(family).chain(redirected).collect(),
            self.returns(family).chain(dropped).collect(),
        ]
    }

    /// Rules for queries that are forwarded, which none that was redirected is.
    fn forwarded(&self, family: &str) -> Vec<String> {
        let of = |(resolver, _): (&IpAddr, _)| {
            ["udp", "tcp"].map(|protocol| {
                format!(
                    "meta l4proto {protocol} ct original proto-dst 53 ct direction original ct original {family} daddr {resolver} \
                     jump undirected"
                )
            })
        };
        self.of(family).flat_map(of).collect()
    }

    /// Rules for queries that nothing can translate, since somebody keeps them from conntrack.
    fn untracked(&self, family: &str) -> Vec<String> {
        let of = |(resolver, _): (&IpAddr, _)| {
            ["udp", "tcp"].map(|protocol| {
                format!("ct state untracked {protocol} dport 53 {family} daddr {resolver} jump undirected")
            })
        };
        self.of(family).flat_map(of).collect()
    }
}

/// Rules of one of the tables.
pub trait Ruleset {
    /// Devices with the uplink programs: index and name.
    fn uplinks(&self) -> &BTreeMap<u32, String>;
    /// Devices with `pod_ingress`.
    fn pod_devices(&self) -> &BTreeMap<u32, String>;
    /// The table.
    fn table(&self) -> Table;
}

impl Ruleset for Rules {
    fn uplinks(&self) -> &BTreeMap<u32, String> {
        &self.uplinks
    }

    fn pod_devices(&self) -> &BTreeMap<u32, String> {
        &self.pod_devices
    }

    fn table(&self) -> Table {
        four::table(self)
    }
}

/// What [`Firewall::ensure`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The table was right.
    Unchanged,
    /// Other rules were wanted.
    Written,
    /// Somebody had changed or removed the table.
    Repaired,
}

/// Keeps the table as it should be.
#[derive(Debug)]
pub struct Firewall {
    nft: PathBuf,
    /// What was written last, and how nft lists it.
    written: Option<(Table, String)>,
    /// Index of each device that the rules are about, by name.
    devices: BTreeMap<String, u32>,
    drops: BTreeMap<&'static str, u64>,
}

impl Firewall {
    /// With the program to call.
    pub fn new(nft: PathBuf) -> Firewall {
        Firewall { nft, written: None, devices: BTreeMap::new(), drops: BTreeMap::new() }
    }

    /// Packets that the table had dropped when it was looked at last, by reason.
    pub fn drops(&self) -> &BTreeMap<&'static str, u64> {
        &self.drops
    }

    /// Writes what differs, of the table of either family; one firewall keeps one table. Whether somebody else has changed it
    /// is looked at only with `check`.
    pub async fn ensure(&mut self, rules: &impl Ruleset, check: bool) -> Result<Outcome, NftError> {
        let devices = rules.pod_devices().iter().chain(rules.uplinks());
        self.devices = devices.map(|(index, name)| (name.clone(), *index)).collect();
        self.bring(rules.table(), check).await
    }

    async fn bring(&mut self, wanted: Table, check: bool) -> Result<Outcome, NftError> {
        let standing = self.written.take();
        let intact = match &standing {
            Some((_, listing)) if check => match self.list(&wanted).await {
                Ok(now) => now == *listing,
                Err(NftError::Refused(_)) => false,
                Err(error) => return Err(error),
            },
            _ => true,
        };
        match standing {
            Some(standing) if intact && standing.0 == wanted => {
                self.written = Some(standing);
                return Ok(Outcome::Unchanged);
            }
            Some((before, _)) if intact => match self.write(&wanted.since(&before)).await {
                // It is not what it was: somebody else was here.
                Err(NftError::Refused(_)) => self.write_whole(&wanted).await?,
                written => written?,
            },
            _ => self.write_whole(&wanted).await?,
        }
        let listing = self.list(&wanted).await?;
        self.written = Some((wanted, listing));
        Ok(if intact { Outcome::Written } else { Outcome::Repaired })
    }

    async fn write_whole(&self, wanted: &Table) -> Result<(), NftError> {
        let script = wanted.whole();
        match self.write(&script).await {
            // A table of our name with a chain or set of another kind.
            Err(NftError::Refused(reason)) => {
                tracing::warn!(reason, "the nftables table cannot be changed in place; making it anew");
                let family = wanted.family;
                self.write(&format!("table {family} {TABLE}\ndelete table {family} {TABLE}\n{script}")).await
            }
            written => written,
        }
    }

    async fn write(&self, script: &str) -> Result<(), NftError> {
        self.run(&["-f", "-"], script).await.map(drop)
    }

    /// The table without what changes by itself: counters, which are noted, and names of devices.
    async fn list(&mut self, table: &Table) -> Result<String, NftError> {
        let listing = self.run(&["list", "table", table.family, TABLE], "").await?;
        self.drops = drops(&listing, table.drops);
        let lines = listing.lines().filter(|line| !line.trim_start().starts_with("packets "));
        Ok(lines.map(|line| numbered(line, &self.devices) + "\n").collect())
    }

    async fn run(&self, arguments: &[&str], input: &str) -> Result<String, NftError> {
        let mut child = Command::new(&self.nft)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdin = child.stdin.take();
        let work = async {
            if let Some(mut stdin) = stdin {
                stdin.write_all(input.as_bytes()).await?;
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(TIMEOUT, work).await.map_err(|_| NftError::Timeout)??;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(NftError::Refused(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
        }
    }
}

/// Values of the named counters of a listing.
fn drops(listing: &str, names: &'static [&'static str]) -> BTreeMap<&'static str, u64> {
    let counter = |name: &&'static str| {
        let (_, block) = listing.split_once(&format!("counter {name} {{"))?;
        let packets = block.split_whitespace().skip_while(|word| *word != "packets").nth(1)?;
        Some((*name, packets.parse().ok()?))
    };
    names.iter().filter_map(counter).collect()
}

/// A listing's line with indices of devices instead of their names: nft prints a name only for as long as the device exists.
fn numbered(line: &str, devices: &BTreeMap<String, u32>) -> String {
    let mut text = String::with_capacity(line.len());
    for (place, part) in line.split('"').enumerate() {
        match devices.get(part) {
            _ if place % 2 == 0 => text.push_str(part),
            Some(index) if !text.ends_with("name ") => _ = write!(text, "{index}"),
            _ => _ = write!(text, "\"{part}\""),
        }
    }
    text
}

/// Calls `changed` whenever a table of our name is touched, or notifications were lost. Ends only with an error.
pub async fn watch(mut changed: impl FnMut()) -> std::io::Error {
    let socket = TokioSocket::new(NETLINK_NETFILTER).and_then(|mut socket| {
        socket.socket_mut().bind_auto()?;
        socket.socket_mut().add_membership(GROUP)?;
        Ok(socket)
    });
    let socket = match socket {
        Ok(socket) => socket,
        Err(error) => return error,
    };
    changed();
    let name = [TABLE.as_bytes(), b"\0"].concat();
    loop {
        match socket.recv_from_full().await {
            // Every message about a table or its parts carries the table's name; a false match costs one look.
            Ok((message, _)) => {
                if message.windows(name.len()).any(|window| window == name) {
                    changed();
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => changed(),
            Err(error) => return error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_names_devices_by_index_and_tells_what_was_dropped() {
        let devices = BTreeMap::from([("pod0".to_owned(), 7), ("tunnel".to_owned(), 8)]);
        for (line, expected) in [
            ("\t\toif \"pod0\" return", "\t\toif 7 return"),
            ("\t\telements = { \"pod0\", 9, \"tunnel\",", "\t\telements = { 7, 9, 8,"),
            (
                "\t\tiif \"other\" counter name \"tunnel\" drop",
                "\t\tiif \"other\" counter name \"tunnel\" drop",
            ),
        ] {
            assert_eq!(numbered(line, &devices), expected);
        }
        let listing = "table ip aegis {\n\tcounter no_program_out {\n\t\tpackets 3 bytes 84\n\t}\n\n\tcounter tunnel {\n\t\tpackets 5 bytes 1\n\t}\n}\n";
        assert_eq!(drops(listing, &DROPS), [("no_program_out", 3), ("tunnel", 5)].into());
    }
}
