//! Real routing daemons: FRR on the router, n1 and n2, BIRD on n3. A test asks for them; otherwise the router's routes are static.
//!
//! What runs on n1 and n2 is what the chart gives its FRR container: configuration and start script. Everything is found by the
//! namespaces and control groups of the lab, so that the end of the lab is its end too, whatever happened to the test.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ipnet::IpNet;
use serde::Deserialize;
use serde_yaml_ng::Value;

use super::plan::{NODES, Node, ROUTER};
use super::process::{Daemon, Process, finish, in_network_namespaces, run};
use super::{Lab, Undo, cgroup, control_plane, images, node, topology};

/// Autonomous systems of the router and of the nodes.
const ASN: (u32, u32) = (65000, 65001);
const FRR: &str = "/usr/lib/frr";
/// Programs, in the order in which they are ended.
const PROGRAMS: [&str; 4] = ["bird", "bgpd", "bfdd", "zebra"];
/// Folder of the chart's files, as a node sees it.
const CHART_FILES: &str = "/run/aegis-frr";
/// How the chart's script starts zebra, and how it is started here: late, as on a busy node. A bgpd that is there before it names next
/// hops that nobody can use.
const ZEBRA: &str = "/usr/lib/frr/zebra -P 0 -f \"$sockets/zebra.conf\" &";
const SLOW_ZEBRA: &str = "(sleep 2; exec /usr/lib/frr/zebra -P 0 -f \"$sockets/zebra.conf\") &";
/// Folder of BIRD's files, as a node sees it.
const BIRD_FILES: &str = "/run/bird";
/// After how many packets of BFD, ten a second, a neighbour that is silent counts as gone: what the chart has for it.
pub const QUICK: u8 = 3;
/// The same for tests of anything else. A machine that stands still for a third of a second, as virtual ones do, would end every
/// session at once.
pub const PATIENT: u8 = 50;
/// The node that runs BIRD.
pub const BIRD: Node = NODES[2];

const ROUTER_BGPD: &str = "log stdout informational
router bgp ROUTER_ASN
 bgp router-id ROUTER
 no bgp ebgp-requires-policy
 bgp bestpath as-path multipath-relax
 timers bgp 3 9
NEIGHBORS address-family ipv4 unicast
  maximum-paths 64
 exit-address-family
 address-family ipv6 unicast
ACTIVATED  maximum-paths 64
 exit-address-family
exit
route-map GLOBAL permit 10
 set ipv6 next-hop prefer-global
exit
";

const BFDD: &str = "bfd
 profile lab
  detect-multiplier MULTIPLIER
  receive-interval 100
  transmit-interval 100
 exit
exit
";

const BIRD_CONF: &str = "log stderr { info, warning, error, fatal };
router id NODE;
ipv4 table aegis4;
ipv6 table aegis6;
protocol device {}
protocol kernel aegis { learn; kernel table 180; ipv4 { table aegis4; import all; export none; }; }
protocol kernel six { learn; kernel table 180; ipv6 { table aegis6; import all; export none; }; }
protocol bfd { interface \"*\" { min rx interval 100 ms; min tx interval 100 ms; multiplier MULTIPLIER; }; }
protocol bgp upstream {
  local as NODE_ASN; neighbor ROUTER as ROUTER_ASN;
  hold time 9; keepalive time 3; connect delay time 1; connect retry time 1; error wait time 1, 5;
  bfd on; graceful restart off;
  ipv4 { table aegis4; import none; export all; next hop self; };
  ipv6 { table aegis6; import none; export all; next hop self; };
}
";

impl Lab {
    /// Routing daemons instead of the router's static routes, for as long as the value lives; `multiplier` is [`QUICK`] or
    /// [`PATIENT`].
    pub fn routing(&self, multiplier: u8) -> anyhow::Result<Undo<'_>> {
        self.end_routing()?;
        let undo = Undo::by("the routing daemons", || {
            self.end_routing()?;
            self.spread(&NODES)
        });
        self.start_router(multiplier)?;
        let files = self.chart_files(multiplier)?;
        for node in NODES {
            if node == BIRD { self.start_bird(node, multiplier)? } else { self.start_frr(node, &files)? }
        }
        topology::spread(self.plan(), &[])?;
        Ok(undo)
    }

    /// Where the router sends a destination: addresses of nodes, sorted, by what the daemons have put into the kernel's table.
    pub fn next_hops(&self, destination: IpNet) -> anyhow::Result<Vec<IpAddr>> {
        let router = self.plan().namespace("router");
        let family = if destination.addr().is_ipv6() { "-6" } else { "-4" };
        let destination = destination.to_string();
        let words = ["-n", &router, family, "route", "show", "exact", &destination, "proto", "bgp"];
        let routes = run("ip", &words)?;
        let mut words = routes.split_ascii_whitespace();
        let mut hops = Vec::new();
        while let Some(word) = words.next() {
            if word == "via" {
                hops.push(words.next().context("via nothing")?.parse()?);
            }
        }
        hops.sort_unstable();
        Ok(hops)
    }

    /// What the router's daemons know of their sessions and of IPv6, for a failure that tells no more than that a route is missing.
    pub fn router_tells(&self) -> String {
        let socket = self.router_folder().display().to_string();
        let ask = |daemon: &str, question: &str| {
            let output =
                Command::new("vtysh").args(["--vty_socket", &socket, "-d", daemon, "-c", question]).output();
            let said = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            format!("{daemon}: {question}\n{}\n", said.unwrap_or_else(|error| error.to_string()))
        };
        [
            ("bfdd", "show bfd peers counters"),
            ("bgpd", "show bgp summary failed"),
            ("bgpd", "show bgp ipv6 unicast"),
            ("bgpd", "show bgp nexthop"),
            ("zebra", "show ipv6 route"),
        ]
        .map(|(daemon, question)| ask(daemon, question))
        .concat()
    }

    /// Commands for the router's bgpd, inside `router bgp`.
    pub fn configure_router(&self, commands: &[&str]) -> anyhow::Result<()> {
        let socket = self.router_folder().display().to_string();
        let mut vtysh = Command::new("vtysh");
        vtysh.args(["--vty_socket", &socket, "-d", "bgpd", "-c", "configure terminal"]);
        vtysh.args(["-c", &format!("router bgp {}", ASN.0)]);
        for command in commands {
            vtysh.args(["-c", command]);
        }
        finish(&mut vtysh, &format!("vtysh: {}", commands.join("; "))).map(drop)
    }

    /// A routing daemon of a node is stopped, not ended, for as long as the value lives.
    pub fn frozen_daemon(&self, node: Node, program: &str) -> anyhow::Result<Undo<'_>> {
        let process = Process::of(self.only_program(node, program)?)?;
        process.signal(libc::SIGSTOP);
        let go_on = move || {
            process.signal(libc::SIGCONT);
            Ok(())
        };
        Ok(Undo::by(format!("the frozen {program} of {}", node.name()), go_on))
    }

    fn router_folder(&self) -> PathBuf {
        self.plan().state_dir().join("router")
    }

    fn start_router(&self, multiplier: u8) -> anyhow::Result<()> {
        let folder = self.router_folder();
        fs::create_dir_all(&folder)?;
        let neighbors: String = NODES
            .iter()
            .map(|node| {
                let address = node.address();
                format!(
                    " neighbor {address} remote-as {}\n neighbor {address} passive\n neighbor {address} bfd profile lab\n",
                    ASN.1
                )
            })
            .collect();
        let activated: String = NODES
            .iter()
            .map(|node| node.address())
            .map(|address| {
                format!("  neighbor {address} activate\n  neighbor {address} route-map GLOBAL in\n")
            })
            .collect();
        let bgpd = ROUTER_BGPD.replace("NEIGHBORS", &neighbors).replace("ACTIVATED", &activated);
        for (name, text) in
            [("zebra", String::new()), ("bgpd", filled(&bgpd, ROUTER)), ("bfdd", detecting(BFDD, multiplier))]
        {
            fs::write(folder.join(format!("{name}.conf")), text)?;
        }
        run("chown", &["-R", "frr:frr", &folder.display().to_string()])?;
        let path = |name: &str| folder.join(name).display().to_string();
        for program in ["zebra", "bgpd", "bfdd"] {
            let mut arguments: Vec<String> =
                ["-P", "0", "-z", &path("zserv.api"), "--vty_socket", &path("")].map(str::to_owned).into();
            arguments.extend(["-i".to_owned(), path(&format!("{program}.pid"))]);
            arguments.extend(["-f".to_owned(), path(&format!("{program}.conf"))]);
            if program == "bfdd" {
                arguments.extend(["--bfdctl".to_owned(), path("bfdd.sock")]);
            }
            Daemon {
                program: Path::new(FRR).join(program),
                arguments,
                network: &topology::namespace_path(&self.plan().namespace("router")),
                cgroups: &[],
                log: &control_plane::log(self.plan(), &format!("router-{program}")),
                contained: false,
            }
            .spawn()
            .context("FRR is installed by `make setup`")?;
            wait_for_file(&folder.join(format!("{program}.vty")))?;
        }
        Ok(())
    }

    /// The files of the chart's FRR container, for this lab's router.
    fn chart_files(&self, multiplier: u8) -> anyhow::Result<Vec<(String, String)>> {
        let mut helm = Command::new(self.tools()?.join("helm"));
        helm.env("KUBECONFIG", self.kubeconfig())
            .args(["template", "aegis"])
            .arg(images::workspace().join("charts/aegis"))
            .args(["--show-only", "templates/frr.yaml", "--kube-version", "1.36.0"])
            .arg("--set=agent.announcement.frr.enabled=true")
            .arg(format!("--set=agent.announcement.frr.asn={}", ASN.1))
            .arg(format!("--set=agent.announcement.frr.bfd.multiplier={multiplier}"))
            .arg(format!("--set=agent.announcement.frr.neighbors[0].address={ROUTER}"))
            .arg(format!("--set=agent.announcement.frr.neighbors[0].asn={}", ASN.0));
        let rendered = finish(&mut helm, "helm template")?;
        let secret = serde_yaml_ng::Deserializer::from_str(&rendered)
            .map(Value::deserialize)
            .find_map(|object| object.ok().filter(|object| !object["stringData"].is_null()))
            .context("the chart renders no Secret for FRR")?;
        let files = secret["stringData"].as_mapping().context("no files")?;
        let start = files.get("start").and_then(|text| text.as_str());
        ensure!(start.is_some_and(|text| text.contains(ZEBRA)), "the chart starts zebra in another way");
        Ok(files
            .iter()
            .filter_map(|(name, text)| Some((name.as_str()?.to_owned(), text.as_str()?.to_owned())))
            .collect())
    }

    fn start_frr(&self, node: Node, files: &[(String, String)]) -> anyhow::Result<()> {
        for (name, text) in files {
            self.write(node, &format!("{CHART_FILES}/{name}"), &text.replace(ZEBRA, SLOW_ZEBRA))?;
        }
        let address = format!("NODE_ADDRESS={}", node.address());
        self.start_inside(node, "frr", &["env", &address, "sh", &format!("{CHART_FILES}/start")])
    }

    fn start_bird(&self, node: Node, multiplier: u8) -> anyhow::Result<()> {
        let configuration = format!("{BIRD_FILES}/bird.conf");
        self.write(node, &configuration, &detecting(&filled(BIRD_CONF, node.address()), multiplier))?;
        let socket = format!("{BIRD_FILES}/bird.ctl");
        self.start_inside(node, "bird", &["bird", "-f", "-c", &configuration, "-s", &socket])
    }

    /// Writes a file of a node's own /run.
    fn write(&self, node: Node, path: &str, text: &str) -> anyhow::Result<()> {
        let path = PathBuf::from(format!("/proc/{}/root{path}", self.init_of(node)?.pid));
        fs::create_dir_all(path.parent().unwrap_or(&path))?;
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Starts a daemon in all of a node's namespaces and in its control group.
    fn start_inside(&self, node: Node, name: &str, command: &[&str]) -> anyhow::Result<()> {
        let init = self.init_of(node)?.pid.to_string();
        let mut arguments: Vec<String> =
            ["--target", &init, "--mount", "--pid", "--uts", "--"].map(str::to_owned).into();
        arguments.extend(command.iter().map(|word| (*word).to_owned()));
        Daemon {
            program: "nsenter".into(),
            arguments,
            network: &topology::namespace_path(&self.plan().namespace(&node.name())),
            cgroups: &cgroup::create(&node::cgroup(self.plan(), node))?,
            log: &node::data(self.plan(), node).join(format!("files/{name}.log")),
            contained: false,
        }
        .spawn()
        .map(drop)
    }

    /// Ends all routing daemons of the lab; they take their routes with them.
    fn end_routing(&self) -> anyhow::Result<()> {
        let mut found = Vec::new();
        for node in NODES {
            // A node that is away has none.
            found.extend(PROGRAMS.iter().filter_map(|program| self.programs(node, program).ok()).flatten());
        }
        let router = fs::metadata(topology::namespace_path(&self.plan().namespace("router")))?.ino();
        let of_router = in_network_namespaces(&[router]).into_iter().filter(|process| {
            let program = fs::read_link(format!("/proc/{}/exe", process.pid)).unwrap_or_default();
            PROGRAMS.iter().any(|name| program.file_name() == Some(name.as_ref()))
        });
        let found: Vec<Process> =
            found.into_iter().filter_map(|pid| Process::of(pid).ok()).chain(of_router).collect();
        for process in &found {
            process.signal(libc::SIGCONT);
            process.signal(libc::SIGTERM);
        }
        for process in found {
            process.wait_gone(Duration::from_secs(10))?;
        }
        Ok(())
    }
}

fn filled(text: &str, own: Ipv4Addr) -> String {
    text.replace("ROUTER_ASN", &ASN.0.to_string())
        .replace("NODE_ASN", &ASN.1.to_string())
        .replace("ROUTER", &ROUTER.to_string())
        .replace("NODE", &own.to_string())
}

fn detecting(text: &str, multiplier: u8) -> String {
    text.replace("MULTIPLIER", &multiplier.to_string())
}

fn wait_for_file(path: &Path) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    while !path.exists() {
        ensure!(Instant::now() < end, "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_are_filled_in() {
        let bird = filled(BIRD_CONF, BIRD.address());
        assert!(bird.contains("local as 65001; neighbor 10.99.0.254 as 65000;"), "{bird}");
        assert!(bird.contains("router id 10.99.0.3;"), "{bird}");
        assert!(
            detecting(&bird, QUICK).contains("multiplier 3;") && !detecting(&bird, QUICK).contains("MULT")
        );
        assert!(filled(ROUTER_BGPD, ROUTER).contains("router bgp 65000\n bgp router-id 10.99.0.254\n"));
    }
}
