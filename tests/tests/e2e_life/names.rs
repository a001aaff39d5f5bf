//! Host names: pods ask the cluster's resolver, and the wire shows whom the addresses see that they are told.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use aegis_crds::{reason, type_};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::Lab;
use aegis_tests::lab::plan::{NODES, RESOLVER};
use anyhow::{Context, ensure};

use crate::account::{Account, BOUND, ZONE, only};
use crate::inside::Inside;

/// Changes of a name's address.
const CHANGES: u8 = 30;

/// The resolver that the lab's nodes give their pods, on the second origin.
struct Resolver {
    process: Child,
    hosts: PathBuf,
}

impl Resolver {
    async fn start(lab: &Lab) -> anyhow::Result<Resolver> {
        let hosts = std::env::temp_dir().join(format!("aegis-names-{}", std::process::id()));
        fs::write(&hosts, "")?;
        let mut command = lab.command_in("o2", "dnsmasq");
        command
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--pid-file",
                "--no-resolv",
                "--no-hosts",
            ])
            .args(["--bind-interfaces", "--user=root", "--local-ttl=1", "--local=/example/"])
            .arg(format!("--listen-address={RESOLVER}"))
            .arg(format!("--addn-hosts={}", hosts.display()));
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok(Resolver { process, hosts })
    }

    /// Names have this address from now on.
    async fn set(&self, names: &[&str], address: Ipv4Addr) -> anyhow::Result<()> {
        fs::write(&self.hosts, format!("{address} {}\n", names.join(" ")))?;
        let pid = nix::unistd::Pid::from_raw(self.process.id().try_into()?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP)?;
        tokio::time::sleep(Duration::from_millis(50)).await;
        Ok(())
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.hosts);
    }
}

async fn look_up(pod: &Inside, name: &str) -> anyhow::Result<Ipv4Addr> {
    let server = format!("@{RESOLVER}");
    let (good, text) = pod.program("dig", &["+short", "+timeout=3", "+tries=2", &server, name]).await?;
    ensure!(good, "dig {name}: {text}");
    text.trim().parse().with_context(|| format!("dig {name}: {text:?}"))
}

#[tokio::test]
async fn names_are_covered_from_the_first_packet_on() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "names", 4).await?;
    let origin = cluster.origin(0)?;
    let resolver = Resolver::start(lab).await?;
    // Addresses of the first origin that nothing else uses.
    let address = |change: u8| Ipv4Addr::new(198, 51, 100, 100 + change);
    for change in 0..CHANGES {
        let device = ["addr", "add", &format!("{}/24", address(change)), "dev", "eth0"].map(str::to_owned);
        ensure!(lab.command_in("o1", "ip").args(device).status()?.success(), "another address of the origin");
    }
    let workloads = format!("podSelector: {{matchLabels: {{{}: {}}}}}", BOUND.0, BOUND.1);
    let zone = "hosts: [api.partner.example, '*.files.partner.example', absent.partner.example]";
    resolver.set(&["api.partner.example"], address(0)).await?;
    account.apply_binding_with(&workloads, zone, "").await?;
    account.programmed_binding().await?;
    let mut pods = Vec::new();
    for node in NODES {
        pods.push(account.pod_on("asks", &node.name(), true).await?);
    }
    let mut capture = lab.capture(&[ZONE])?;
    for change in 0..CHANGES {
        let below = format!("n{change}.files.partner.example");
        resolver.set(&["api.partner.example", &below], address(change)).await?;
        let pod = &pods[usize::from(change) % pods.len()];
        let name = if change % 2 == 0 { "api.partner.example" } else { below.as_str() };
        let told = look_up(pod, name).await?;
        ensure!(told == address(change), "{name} is {told}");
        let source = pod.source(SocketAddrV4::new(told, origin.port(0).port())).await?;
        ensure!(source == Ok(account.address), "{told} of {name} has seen {source:?}");
    }
    only(&mut capture, account.address)?;
    let bindings = account.bindings();
    wait_for("the name that is none to be named", PATIENCE, async || {
        let status = bindings.get("partners").await?.status.unwrap_or_default();
        let resolved = status.conditions.into_iter().find(|it| it.type_ == type_::RESOLVED);
        let told = |it: &aegis_crds::Condition| {
            it.status == "False"
                && it.reason == reason::HOST_NOT_FOUND
                && it.message.contains("\"absent.partner.example\"")
        };
        Ok(resolved.filter(told).map(drop))
    })
    .await?;
    for change in 0..CHANGES {
        let device = ["addr", "del", &format!("{}/24", address(change)), "dev", "eth0"].map(str::to_owned);
        lab.command_in("o1", "ip").args(device).status()?;
    }
    account.end().await
}
