//! Command line and environment.

use aegis_core::policy::names::Limits;
use aegis_delivery::Collector;
use clap::{Parser, ValueEnum};
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// Programs the data plane of one Aegis node: decides which pods leave from which egress address, steers replies to
/// the node that owns their port, and reports what it has done as the EgressNode object of its node.
#[derive(Clone, Debug, Parser)]
#[command(name = "aegis-node-agent", version, about, long_about = None)]
// Of a flag that is given twice the last counts: the chart's extraArgs come last.
#[command(args_override_self = true)]
pub struct Args {
    /// Name of the node (downward API: spec.nodeName).
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,

    /// Namespace of the node's Lease (downward API: metadata.namespace).
    #[arg(long, env = "POD_NAMESPACE", default_value = "aegis-system")]
    pub namespace: String,

    /// DaemonSet of the agent, in the same namespace. An agent that is told to end asks whether it still wants one on this node, and
    /// if not stays until the node's slices are empty. Empty: it always ends at once.
    #[arg(long, env = "AEGIS_DAEMON_SET", default_value = "")]
    pub daemon_set: String,

    /// Folder of a BPF file system under which maps and links are pinned. State there survives the agent.
    #[arg(long, env = "AEGIS_PIN_ROOT", default_value = "/sys/fs/bpf/aegis")]
    pub pin_root: PathBuf,

    /// Agents of different series pin apart though their maps have the same layout: an upgrade from one to another does all that
    /// one across layouts does. For tests of upgrades.
    #[arg(long, default_value_t = 0, hide = true, value_parser = clap::value_parser!(u32).range(..1000))]
    pub pin_series: u32,

    /// Bit of the packet mark and of the conntrack mark that says "this flow is Aegis's". One bit; kube-proxy uses
    /// 0x4000 and 0x8000, the portmap plugin 0x2000.
    #[arg(long, env = "AEGIS_MARK", default_value = "0x1000", value_parser = parse_mark)]
    pub mark: u32,

    /// UDP port of the tunnel between the nodes (Geneve). All agents of a cluster must agree.
    #[arg(long, env = "AEGIS_TUNNEL_PORT", default_value_t = 6081)]
    pub tunnel_port: u16,

    /// Ranges inside the cluster beside what Node and ServiceCIDR objects tell, comma-separated. Traffic to them is
    /// never covered by a binding.
    #[arg(long, env = "AEGIS_CLUSTER_CIDRS", value_delimiter = ',', action = clap::ArgAction::Set)]
    pub cluster_cidrs: Vec<IpNet>,

    /// Ranges of this node's pods, comma-separated, where the Node object's podCIDRs do not tell them.
    #[arg(long, env = "AEGIS_POD_CIDRS", value_delimiter = ',', action = clap::ArgAction::Set)]
    pub pod_cidrs: Vec<IpNet>,

    /// Devices through which traffic leaves, comma-separated. Default: those of the default routes and of the node's
    /// internal address.
    #[arg(long, env = "AEGIS_UPLINKS", value_delimiter = ',', action = clap::ArgAction::Set)]
    pub uplinks: Vec<String>,

    /// What happens to packets from an address of the node's pod ranges that no pod is known to have (yet), once any
    /// binding is enabled.
    #[arg(long, env = "AEGIS_UNKNOWN_PODS", value_enum, ignore_case = true, default_value = "Hold")]
    pub unknown_pods: UnknownPods,

    /// Flows that fit into the flow tables (each takes about 130 bytes of locked memory in use).
    #[arg(long, env = "AEGIS_MAX_FLOWS", default_value_t = 1 << 20)]
    pub max_flows: u32,

    /// Port bitmaps that fit: one for each egress address, origin and 2,048 ports in use (about 350 bytes each).
    #[arg(long, env = "AEGIS_MAX_BLOCKS", default_value_t = 1 << 16)]
    pub max_blocks: u32,

    /// Ranges of IPv4 and of IPv6 that fit into the tables of destinations, of which one policy while it follows another one has half:
    /// policies that name large countries need more than the default.
    #[arg(long, env = "AEGIS_MAX_DESTINATIONS", default_value_t = 1 << 16)]
    pub max_destinations: u32,

    /// Meters that fit: one for each egress address, origin, protocol and rule in use. What finds none is counted by address only.
    #[arg(long, env = "AEGIS_MAX_METERS", default_value_t = 1 << 14, value_parser = clap::value_parser!(u32).range(16..=65_536))]
    pub max_meters: u32,

    /// Database by which policies know countries, in MaxMind's format (`.mmdb`). It is read again when it changes.
    #[arg(long, env = "AEGIS_COUNTRIES")]
    pub countries: Option<PathBuf>,

    /// Flows that one account (a namespace) may have at a time on this node, over all of its allocations and including those of
    /// other nodes' pods that leave through this one. 0: no limit.
    #[arg(long, env = "AEGIS_ACCOUNT_FLOWS", default_value_t = 0)]
    pub account_flows: u32,

    /// New flows that one account may begin on this node in each second, attempts in vain included. 0: no limit.
    #[arg(long, env = "AEGIS_ACCOUNT_NEW_FLOWS", default_value_t = 0)]
    pub account_new_flows: u32,

    /// Where several accounts have allocations, one opens no flow on this node while it has more than there is room left for: it
    /// can't fill the tables before another comes.
    #[arg(long, env = "AEGIS_ACCOUNT_LEAVES_ROOM", default_value_t = true, action = clap::ArgAction::Set)]
    pub account_leaves_room: bool,

    /// Refusals (RST, ICMP) per second and CPU that are answered to pods; further ones are dropped silently.
    #[arg(long, env = "AEGIS_REFUSALS_PER_SECOND", default_value_t = 1000)]
    pub refusals_per_second: u32,

    /// Packets of established IPv4 flows go between pod and uplink without the host stack. They pass by network policies, conntrack and
    /// nftables: see docs/operations.md. A node on which that is not safe does not do it, and says so.
    #[arg(long, env = "AEGIS_FAST_PATH", default_value_t = false, action = clap::ArgAction::Set)]
    pub fast_path: bool,

    /// Routing table of the kernel in which the addresses of prefixes with `announcement: {mode: BGP}` are put, for a routing
    /// daemon to announce. Not one that somebody else uses; FRR before 9 reads 1 to 252. 0: none are.
    #[arg(long, env = "AEGIS_ANNOUNCEMENT_TABLE", default_value_t = 180, value_parser = parse_table)]
    pub announcement_table: u32,

    /// Routing daemon of this node, which is asked whether it announces what is in that table.
    #[arg(long, env = "AEGIS_ROUTING_DAEMON", value_enum, ignore_case = true, default_value = "None")]
    pub routing_daemon: RoutingDaemon,

    /// Folder of the routing daemon's sockets: `zebra.vty`, `bgpd.vty` and `bfdd.vty` of FRR, `bird.ctl` of BIRD.
    #[arg(long, env = "AEGIS_ROUTING_SOCKETS", default_value = "/run/frr")]
    pub routing_sockets: PathBuf,

    /// Resolvers that pods ask, at most three, comma-separated: names in rules have the addresses that pods are told by these. Default:
    /// the nameservers of /etc/resolv.conf, which are those of the cluster's pods where the agent's own pod has dnsPolicy
    /// ClusterFirstWithHostNet.
    #[arg(long, env = "AEGIS_DNS_SERVERS", value_delimiter = ',', action = clap::ArgAction::Set)]
    pub dns_servers: Vec<IpAddr>,

    /// Port of the node at which DNS queries of pods that rules with host names cover are answered (UDP and TCP); those above it are
    /// for the second resolver and the third.
    #[arg(long, env = "AEGIS_DNS_PORT", default_value_t = 9412)]
    pub dns_port: u16,

    /// Addresses that are remembered of all host names of rules together. What pods ask for beyond is not told them.
    #[arg(long, env = "AEGIS_DNS_ADDRESSES", default_value_t = 8192)]
    pub dns_addresses: u32,

    /// Those of one name.
    #[arg(long, env = "AEGIS_DNS_ADDRESSES_PER_NAME", default_value_t = 1024)]
    pub dns_addresses_per_name: u32,

    /// Seconds for which an address is kept beyond its time to live, for applications that keep it for longer than they should.
    #[arg(long, env = "AEGIS_DNS_GRACE", default_value_t = 300)]
    pub dns_grace: u32,

    /// Folder that outlives the agent, but not the node's boot, for what is known of host names. Default: the next agent knows nothing.
    #[arg(long, env = "AEGIS_STATE")]
    pub state: Option<PathBuf>,

    /// Collector of use that this agent reports to, `https://HOST` or `https://HOST:PORT`. Not given: it does not report.
    #[arg(long, env = "AEGIS_USAGE_COLLECTOR")]
    pub usage_collector: Option<Collector>,

    /// File of the token with which it reports: a projected one, for the collector's audience. It is read anew for each delivery.
    #[arg(long, env = "AEGIS_USAGE_TOKEN", default_value = "/run/aegis/collector/token")]
    pub usage_token: PathBuf,

    /// File of the authority that the collector's certificate is by, in PEM. It is read again when it changes.
    #[arg(long, env = "AEGIS_USAGE_CA", default_value = "/run/aegis/collector/ca.crt")]
    pub usage_ca: PathBuf,

    /// Folder for reports that the collector has not taken yet. Nobody else's; better one that outlives the node's boot.
    #[arg(long, env = "AEGIS_USAGE_BACKLOG", default_value = "/var/lib/aegis/usage")]
    pub usage_backlog: PathBuf,

    /// Bytes that they may take, as `134217728` or `128Mi`. When they are used up the oldest go.
    #[arg(long, env = "AEGIS_USAGE_BACKLOG_SIZE", default_value = "128Mi", value_parser = parse_size)]
    pub usage_backlog_size: u64,

    /// Hours after which they go, since the collector would not take them any more: for as long as it keeps figures of 10 seconds.
    #[arg(long, env = "AEGIS_USAGE_BACKLOG_HOURS", default_value_t = 6, value_parser = clap::value_parser!(i64).range(1..=8_760))]
    pub usage_backlog_hours: i64,

    /// Seconds without need after which this node gives back half of the slices that it wanted beyond the least.
    #[arg(long, env = "AEGIS_DEMAND_WINDOW", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub demand_window: u32,

    /// Folder in which the container runtime's CNI library keeps its results. Pods' addresses appear there before
    /// the API server knows them.
    #[arg(long, env = "AEGIS_CNI_CACHE", default_value = "/var/lib/cni/results")]
    pub cni_cache: PathBuf,

    /// Socket on which the container runtime takes plugins (NRI: containerd 2, CRI-O). Pods then start once the data plane knows
    /// them. Where it is not there, they are named by the CNI results alone. Not given: it is not asked for.
    #[arg(long, env = "AEGIS_NRI_SOCKET")]
    pub nri_socket: Option<PathBuf>,

    /// Milliseconds for which a pod waits at most, in case the data plane does not come to know it. At most three quarters of what the
    /// runtime itself waits for a plugin (containerd: 2 seconds), which would close the connection then.
    #[arg(long, env = "AEGIS_NRI_WAIT", default_value_t = 1500, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub nri_wait: u64,

    /// Folder where the node's control group hierarchies are mounted: sockets of pods with the host network are known by their
    /// pod's group.
    #[arg(long, env = "AEGIS_CGROUPS", default_value = "/sys/fs/cgroup")]
    pub cgroups: PathBuf,

    /// UID of the agent's own pod (downward API: metadata.uid).
    #[arg(long, env = "POD_UID", default_value = "")]
    pub pod_uid: String,

    /// Program that writes nftables.
    #[arg(long, env = "AEGIS_NFT", default_value = "nft")]
    pub nft: PathBuf,

    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, env = "AEGIS_METRICS_ADDRESS", default_value = "0.0.0.0:9411")]
    pub metrics_address: SocketAddr,

    /// What is logged (levels by module, as in RUST_LOG).
    #[arg(long, env = "RUST_LOG", default_value = "info,kube_client::client=off")]
    pub log: String,

    /// Form of the log.
    #[arg(long, env = "AEGIS_LOG_FORMAT", value_enum, ignore_case = true, default_value = "Json")]
    pub log_format: LogFormat,
}

impl Args {
    /// How much of host names is remembered.
    pub fn dns_limits(&self) -> Limits {
        let count = |limit: u32| usize::try_from(limit).unwrap_or(usize::MAX);
        Limits {
            per_name: count(self.dns_addresses_per_name),
            total: count(self.dns_addresses),
            grace: self.dns_grace.into(),
        }
    }

    /// Number of the schema under which maps and links are pinned.
    pub fn schema(&self) -> u32 {
        aegis_common::SCHEMA + self.pin_series * crate::carry::SERIES
    }
}

/// What happens to addresses of the pod ranges that nobody has named yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum UnknownPods {
    /// Their packets to the outside are dropped, since they might be covered.
    #[default]
    Hold,
    /// Their packets leave with the node's address.
    Pass,
}

/// Who announces the routes of the agent's table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "verbatim")]
pub enum RoutingDaemon {
    /// Nobody that the agent could ask.
    #[default]
    None,
    /// FRR: zebra, bgpd, bfdd.
    FRR,
    /// BIRD 2.
    BIRD,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

fn parse_table(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(253..=255) => Err("is a table of the kernel's own".to_owned()),
        Ok(table) => Ok(table),
        Err(error) => Err(error.to_string()),
    }
}

/// A number of bytes, or of KiB, MiB or GiB as Kubernetes writes them.
fn parse_size(text: &str) -> Result<u64, String> {
    let units = [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1u64 << 30)];
    let unit = units.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)));
    let (number, bytes) = unit.unwrap_or((text, 1));
    let number: u64 = number.parse().map_err(|_| "must be a number, or one with Ki, Mi or Gi".to_owned())?;
    number.checked_mul(bytes).filter(|size| *size >= 1 << 20).ok_or_else(|| "must be 1Mi at least".to_owned())
}

fn parse_mark(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    match parsed {
        Ok(mark) if mark.is_power_of_two() => Ok(mark),
        Ok(_) => Err("must have exactly one bit set".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_one_bit() {
        assert_eq!(parse_mark("0x1000"), Ok(0x1000));
        assert_eq!(parse_mark("4096"), Ok(0x1000));
        for wrong in ["0", "0x1800", "0x", "mark", "0x100000000"] {
            assert!(parse_mark(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_bytes_or_have_a_unit() {
        assert_eq!([parse_size("1048576"), parse_size("2048Ki")], [Ok(1 << 20), Ok(2 << 20)]);
        assert_eq!([parse_size("128Mi"), parse_size("3Gi")], [Ok(128 << 20), Ok(3 << 30)]);
        for wrong in ["", "Mi", "1MB", "1.5Gi", "-1", "1Ki", "0", "99999999999Gi"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn reports_of_use_go_nowhere_in_plain_text() {
        let parse =
            |url: &str| Args::try_parse_from(["x", "--node-name=n1", &format!("--usage-collector={url}")]);
        assert!(parse("https://aegis-collector.aegis-system.svc").is_ok());
        assert!(parse("http://aegis-collector.aegis-system.svc").is_err());
    }

    #[test]
    fn routes_go_to_no_table_of_the_kernels_own() {
        assert_eq!([parse_table("0"), parse_table("180"), parse_table("1000")], [Ok(0), Ok(180), Ok(1000)]);
        for wrong in ["main", "-1", "253", "254", "255"] {
            assert!(parse_table(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn defaults_need_nothing_but_the_node_name() {
        let args = Args::parse_from(["aegis-node-agent", "--node-name", "n1"]);
        assert_eq!((args.mark, args.tunnel_port, args.unknown_pods), (0x1000, 6081, UnknownPods::Hold));
        assert!(Args::try_parse_from(["x", "--node-name", "n1", "--unknown-pods", "maybe"]).is_err());
    }

    #[test]
    fn of_a_flag_given_twice_the_last_counts() {
        let twice = ["--mark", "0x1000", "--mark=0x2000", "--uplinks=eth0,eth1", "--uplinks", "eth2"];
        let args = Args::parse_from(["x", "--node-name", "n1"].into_iter().chain(twice));
        assert_eq!((args.mark, args.uplinks), (0x2000, vec!["eth2".to_owned()]));
    }
}
