//! Programs that everybody uses, from a pod: what they do that ours do not (options, sizes, time-outs, what they make of errors).

use std::net::IpAddr;
use std::process::{Child, Stdio};
use std::time::Duration;

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::Lab;
use aegis_tests::lab::plan::{NODES, ROUTER};
use anyhow::{Context, ensure};

use crate::account::{Account, ZONE, only};
use crate::inside::Inside;

/// What the name server at the origin answers.
const NAME: (&str, &str) = ("partner.example", "192.0.2.80");

/// Where a program talks to, and what is on the way.
pub struct Way<'a> {
    pub lab: &'a Lab,
    pub pod: &'a Inside,
    /// The first origin.
    pub to: IpAddr,
    /// Whom the origin must see.
    pub source: IpAddr,
    pub router: IpAddr,
    /// For messages.
    pub place: String,
}

/// A server at the origin that ends with the value.
struct Server(Child);

impl Server {
    async fn start(lab: &Lab, program: &str, arguments: &[&str]) -> anyhow::Result<Server> {
        let mut command = lab.command_in("o1", program);
        let child = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok(Server(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Way<'_> {
    async fn works(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let (good, text) = self.pod.program(program, arguments).await?;
        ensure!(good, "{program} {arguments:?}, {}: {text}", self.place);
        Ok(text)
    }

    /// Runs all of them; fails with what the first that does not work says.
    pub async fn all(&self) -> anyhow::Result<()> {
        let to = self.to.to_string();
        let (family, host) = match self.to {
            IpAddr::V4(_) => ("-4", to.clone()),
            IpAddr::V6(_) => ("-6", format!("[{to}]")),
        };
        let to = to.as_str();
        let body = self.works("curl", &[family, "-sS", "-m", "5", &format!("http://{host}:7000/")]).await?;
        ensure!(body.contains(&self.source.to_string()), "{}: {body}", self.place);
        self.works("ping", &[family, "-c", "3", "-W", "2", to]).await?;
        self.trace(family, to).await?;
        self.ask_name(family, to).await?;
        self.measure(family, to).await
    }

    /// What a router says about packets of the pod comes back to it. (One at a time, and again if need be: routers send few errors
    /// a second.)
    async fn trace(&self, family: &str, to: &str) -> anyhow::Result<()> {
        let router = self.router.to_string();
        let trace = [family, "-n", "-m", "4", "-w", "2", "-q", "1", "-N", "1"];
        for (program, more) in [
            ("traceroute", &[to][..]),
            ("traceroute", &["-T", "-p", "7000", to]),
            ("traceroute", &["-I", to]),
            ("tracepath", &[to]),
        ] {
            let arguments = [if program == "tracepath" { &trace[..4] } else { &trace[..] }, more].concat();
            wait_for("a trace of the way", PATIENCE, async || {
                let text = self.works(program, &arguments).await?;
                let arrives = text.lines().skip(1).any(|line| line.contains(to) || line.contains("reached"));
                Ok((text.contains(&router) && arrives).then_some(()))
            })
            .await
            .with_context(|| format!("{program} {arguments:?}, {}", self.place))?;
        }
        Ok(())
    }

    async fn ask_name(&self, family: &str, to: &str) -> anyhow::Result<()> {
        let answer = format!("--address=/{}/{}", NAME.0, NAME.1);
        let listen = format!("--listen-address={to}");
        let arguments =
            ["--keep-in-foreground", "--conf-file=/dev/null", "--pid-file", "--no-resolv", "--no-hosts"];
        let own = ["--bind-interfaces", &listen, &answer];
        let _server = Server::start(self.lab, "dnsmasq", &[&arguments[..], &own].concat()).await?;
        for transport in ["+notcp", "+tcp"] {
            let server = format!("@{to}");
            let arguments = [family, "+short", "+timeout=3", "+tries=1", transport, &server, NAME.0];
            let text = self.works("dig", &arguments).await?;
            ensure!(text.trim() == NAME.1, "dig {transport}, {}: {text}", self.place);
        }
        Ok(())
    }

    async fn measure(&self, family: &str, to: &str) -> anyhow::Result<()> {
        let datagrams = ["-u", "-b", "20M", "-l", "1200"];
        for more in [&[][..], &["-R"], &datagrams, &[&datagrams[..], &["-R"]].concat()] {
            let _server = Server::start(self.lab, "iperf3", &["-s", family, "-1", "-p", "5210"]).await?;
            let arguments = [family, "-c", to, "-p", "5210", "-t", "1", "--connect-timeout", "3000"];
            self.works("iperf3", &[&arguments[..], more].concat()).await?;
        }
        Ok(())
    }
}

#[tokio::test]
async fn programs_that_everybody_uses_work() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "programs", 4).await?;
    account.bind_and_wait().await?;
    let pod = account.pod_on("bound", &NODES[0].name(), true).await?;
    let mut capture = lab.capture(&[ZONE])?;
    // What comes back enters at the pod's own node, and at another.
    for node in [NODES[0], NODES[2]] {
        let _entry = lab.entry(account.address, node)?;
        let way = Way {
            lab,
            pod: &pod,
            to: cluster.origin(0)?.address().into(),
            source: account.address.into(),
            router: ROUTER.into(),
            place: format!("entering at {}", node.name()),
        };
        way.all().await?;
    }
    only(&mut capture, account.address)?;
    account.end().await
}
