//! The nftables table `ip aegis`: which flows are Aegis's, and what must not leave.
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
//! The guard is for what the programs cannot see: marked packets that leave through a device without program, and
//! packets of new flows from a device to which `pod_ingress` is not attached yet.

use ipnet::Ipv4Net;
use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket, protocols::NETLINK_NETFILTER};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Name of the table.
pub const TABLE: &str = "aegis";
/// Longest time that one call of `nft` may take.
const TIMEOUT: Duration = Duration::from_secs(5);
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

/// What the table is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Mark bit.
    pub mark: u32,
    /// Ranges of this node's pods.
    pub pods: Vec<Ipv4Net>,
    /// Devices with `pod_ingress`.
    pub pod_devices: BTreeSet<String>,
    /// Devices with the uplink programs.
    pub uplinks: BTreeSet<String>,
    /// Unknown sources are held.
    pub hold: bool,
    /// Ranges inside the cluster.
    pub internal: Vec<Ipv4Net>,
    /// Pods known to be uncovered, which are not held although their device has no program. Only needed while
    /// programs cannot be attached.
    pub uncovered: Vec<Ipv4Net>,
}

fn set(text: &mut String, name: &str, form: &str, elements: &[String]) {
    let _ = write!(text, "  set {name} {{ {form}");
    if !elements.is_empty() {
        let _ = write!(text, "; elements = {{ {} }}", elements.join(", "));
    }
    text.push_str("; }\n");
}

/// The bit of a conntrack mark (not of a packet's) that says that the flow's first packet met the table: the one above
/// the mark's, or below where there is none above.
fn judged(mark: u32) -> u32 {
    if mark << 1 != 0 { mark << 1 } else { mark >> 1 }
}

/// The whole transaction: whatever table there is goes, this one comes, in one commit.
pub fn render(rules: &Rules) -> String {
    let mark = rules.mark;
    let is_set = format!("& {mark:#x} == {mark:#x}");
    let is_clear = format!("& {mark:#x} == 0");
    let set_bit = format!("| {mark:#x}");
    let clear_bit = format!("& {:#x}", !mark);
    let judged = judged(mark);
    let (judge_covered, judge_other) =
        (format!("| {:#x}", mark | judged), format!("& {:#x} | {judged:#x}", !mark));
    let names =
        |devices: &BTreeSet<String>| devices.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>();
    let ranges = |ranges: &[Ipv4Net]| {
        Ipv4Net::aggregate(&ranges.to_vec()).iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let pods = ranges(&rules.pods);
    let inside: BTreeSet<String> = rules.uplinks.union(&rules.pod_devices).cloned().collect();

    let mut text = format!("table ip {TABLE}\ndelete table ip {TABLE}\ntable ip {TABLE} {{\n");
    set(&mut text, "pods", "type ipv4_addr; flags interval", &pods);
    set(&mut text, "internal", "type ipv4_addr; flags interval", &ranges(&rules.internal));
    set(&mut text, "uncovered", "type ipv4_addr; flags interval", &ranges(&rules.uncovered));
    set(&mut text, "pod_devices", "type ifname", &names(&rules.pod_devices));
    set(&mut text, "programmed", "type ifname", &names(&inside));
    let _ = write!(
        text,
        "  chain decide {{
    ct status & confirmed == 0 meta mark {is_set} ct mark set ct mark {judge_covered} return
    ct status & confirmed == 0 ct mark set ct mark {judge_other} return
    ct mark {is_set} meta mark set meta mark {set_bit} return
    meta mark {is_set} ct mark & {judged:#x} == 0 ct status & seen-reply == 0 return
    ct mark {is_clear} meta mark set meta mark {clear_bit}
  }}
  chain forward {{
    type filter hook forward priority mangle; policy accept;
    iifname @pod_devices goto decide
    ip saddr @pods goto decide
  }}
  chain guard {{
    type filter hook forward priority filter - 10; policy accept;
    meta mark {is_set} oifname != @programmed counter drop
"
    );
    if rules.hold {
        text.push_str("    ip saddr @uncovered accept\n");
        text.push_str(
            "    ip saddr @pods iifname != @pod_devices ip daddr != @internal ct state new counter drop\n",
        );
    }
    text.push_str("  }\n");
    if !pods.is_empty() {
        let identity: Vec<String> = pods.iter().map(|range| format!("{range} : {range}")).collect();
        let _ = write!(
            text,
            "  chain postrouting {{
    type nat hook postrouting priority srcnat - 10; policy accept;
    meta mark {is_set} snat ip prefix to ip saddr map {{ {} }}
  }}
",
            identity.join(", ")
        );
    }
    text.push_str("}\n");
    text
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
    written: Option<(String, String)>,
}

impl Firewall {
    /// With the program to call.
    pub fn new(nft: PathBuf) -> Firewall {
        Firewall { nft, written: None }
    }

    /// Writes the table unless it is there already. Whether somebody else has changed it is looked at only with `check`.
    pub async fn ensure(&mut self, wanted: &str, check: bool) -> Result<Outcome, NftError> {
        let mut outcome = Outcome::Written;
        if let Some((written, listing)) = &self.written
            && written == wanted
        {
            if !check {
                return Ok(Outcome::Unchanged);
            }
            match self.list().await {
                Ok(now) if now == *listing => return Ok(Outcome::Unchanged),
                Ok(_) | Err(NftError::Refused(_)) => outcome = Outcome::Repaired,
                Err(error) => return Err(error),
            }
        }
        self.written = None;
        self.run(&["-f", "-"], wanted).await?;
        let listing = self.list().await?;
        self.written = Some((wanted.to_owned(), listing));
        Ok(outcome)
    }

    /// The table without what changes by itself (the guard's counters).
    async fn list(&self) -> Result<String, NftError> {
        self.run(&["-s", "list", "table", "ip", TABLE], "").await
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
