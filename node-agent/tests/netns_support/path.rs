//! A pod, its node and an origin: three network namespaces in a row, with the whole data plane on the node, or with a NAT of the
//! kernel's own in its place.

use super::plane::{Bpffs, bring};
use super::{Namespace, run};
use aegis_common::{ANY_NUMBER, Counter, LeaseValue, NEVER, Timeouts};
use aegis_core::model::{Address, AllocationName, Holding, State};
use aegis_core::policy::{Binding, BindingName, Pod, Workloads};
use aegis_core::slice::SliceSet;
use aegis_node_agent::apply::Plane;
use aegis_node_agent::desired::{Inputs, desired};
use aegis_node_agent::network;
use aegis_node_agent::nft::{Firewall, Outcome, Rules};
use aegis_node_agent::objects::{self, NodeRecord};
use aegis_node_agent::ops::{Known, Op};
use aegis_node_agent::sweep::Sweeper;
use aegis_node_agent::uplink::{Devices, devices};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use tokio::runtime::Runtime;

pub const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
pub const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const EGRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub const ORIGIN: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const POD_RANGE: &str = "10.244.1.0/24";
pub const MARK: u32 = 0x1000;

/// The three of them. Nothing translates yet.
pub struct Row {
    pub pod: Namespace,
    pub node: Namespace,
    pub origin: Namespace,
}

impl Row {
    pub fn new() -> Row {
        super::need_root();
        let (pod, node, origin) = (Namespace::new("pod"), Namespace::new("node"), Namespace::new("origin"));
        node.link("pod0", &pod, "eth0");
        node.link("eth0", &origin, "eth0");
        pod.run(&format!("ip addr add {POD}/24 dev eth0; ip route add default via 10.244.1.1"));
        node.run(&format!(
            "ip addr add 10.244.1.1/24 dev pod0; ip addr add {NODE}/24 dev eth0; ip route add default via 192.0.2.9"
        ));
        origin.run(&format!(
            "ip addr add 192.0.2.9/24 dev eth0; ip addr add {ORIGIN}/32 dev lo; ip route add 203.0.113.0/24 via {NODE}"
        ));
        Row { pod, node, origin }.without_limits()
    }

    /// Pod and origin without a node between them.
    pub fn of_ends() -> Row {
        super::need_root();
        let (pod, node, origin) = (Namespace::new("pod"), Namespace::new("node"), Namespace::new("origin"));
        origin.link("eth0", &pod, "eth0");
        pod.run(&format!("ip addr add {POD}/24 dev eth0; ip route add default via 10.244.1.1"));
        origin.run(&format!("ip addr add 10.244.1.1/24 dev eth0; ip addr add {ORIGIN}/32 dev lo"));
        Row { pod, node, origin }.without_limits()
    }

    /// No connection may fail for another reason than the one that is looked for.
    fn without_limits(self) -> Row {
        self.pod.run("sysctl -qw net.ipv4.ip_local_port_range=\"1024 65535\" net.ipv4.tcp_tw_reuse=1");
        self.origin.run("sysctl -qw net.core.somaxconn=65535 net.ipv4.tcp_max_syn_backlog=65535 net.ipv4.tcp_syncookies=0");
        self
    }

    /// Lets the kernel translate, by this statement of nftables, for TCP and UDP.
    pub fn translate_by(&self, statement: &str) {
        self.node.run(&format!(
            "nft \"table ip reference {{ chain post {{ type nat hook postrouting priority srcnat; oifname eth0 ip saddr {POD_RANGE} meta l4proto {{ tcp, udp }} {statement}; }}; }}\""
        ));
    }
}

/// The data plane of a node.
pub struct Aegis {
    bpffs: Bpffs,
    pub plane: Box<dyn Plane>,
    _sweeper: Sweeper,
    wrapper: std::path::PathBuf,
    firewall: Firewall,
    rules: Rules,
}

impl Aegis {
    /// Lets all of the pod's flows leave from [`EGRESS`], of which the node holds the slices 4 to `last`.
    pub fn on(row: &Row, last: u8, timeouts: Timeouts) -> Aegis {
        Aegis::with(row, &inputs(vec![holding(4, last, "n0")], timeouts))
    }

    /// As [`Aegis::on`], with established flows on the fast path.
    pub fn fast_on(row: &Row, last: u8) -> Aegis {
        row.node.run("sysctl -qw net.netfilter.nf_conntrack_tcp_be_liberal=1");
        let inputs = inputs(vec![holding(4, last, "n0")], Timeouts::default());
        Aegis::with(row, &Inputs { fast_path: true, ..inputs })
    }

    /// As [`Aegis::on`], with use metered, as where it is reported.
    #[allow(dead_code, reason = "for benchmarks")]
    pub fn metered_on(row: &Row, last: u8) -> Aegis {
        Aegis::metered_with(row, &inputs(vec![holding(4, last, "n0")], Timeouts::default()))
    }

    /// As [`Aegis::with`], with use metered.
    pub fn metered_with(row: &Row, inputs: &Inputs) -> Aegis {
        Aegis::with_flags(row, inputs, &["--usage-collector", "https://192.0.2.9"])
    }

    /// Does on the node what these say.
    pub fn with(row: &Row, inputs: &Inputs) -> Aegis {
        Aegis::with_flags(row, inputs, &[])
    }

    fn with_flags(row: &Row, inputs: &Inputs, flags: &[&str]) -> Aegis {
        let name = row.node.name.clone();
        let wrapper = std::env::temp_dir().join(format!("{name}-nft"));
        std::fs::write(&wrapper, format!("#!/bin/sh\nexec nsenter --net=/run/netns/{name} nft \"$@\"\n"))
            .unwrap();
        run(&format!("chmod +x {}", wrapper.display()));
        let bpffs = Bpffs::new(&name);
        let (plane, sweeper, firewall, rules) = row.node.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let large = ["--max-flows", "1048576", "--max-blocks", "16384"];
            let mut plane = bpffs.open_with(&[&large, flags].concat());
            let hosts = look(plane.as_mut(), inputs);
            bring(plane.as_mut(), &desired(&hosts), &Known::default());
            // As the agent does where no allocation has a fence.
            plane.write(&Op::SetLease(LeaseValue { renewed: 0, soonest: NEVER })).unwrap();
            let found = attach(plane.as_mut(), &runtime);
            let name_of = |devices: &BTreeMap<u32, network::Device>| {
                devices.iter().map(|(index, device)| (*index, device.name.clone())).collect()
            };
            let rules = Rules {
                mark: MARK,
                pods: vec![POD_RANGE.parse().unwrap()],
                pod_devices: name_of(&found.pods),
                uplinks: name_of(&found.uplinks),
                hold: true,
                internal: vec!["10.244.0.0/16".parse().unwrap()],
                uncovered: Vec::new(),
                hosts: hosts.host_levels != 0,
                tunnel_port: 6081,
                nodes: [NODE].into(),
                queries: Default::default(),
            };
            let mut firewall = Firewall::new(wrapper.clone());
            assert_eq!(runtime.block_on(firewall.ensure(&rules, false)).unwrap(), Outcome::Written);
            let sweeper = plane.sweeper().unwrap();
            (plane, sweeper, firewall, rules)
        });
        Aegis { bpffs, plane, _sweeper: sweeper, wrapper, firewall, rules }
    }

    /// Does from now on what these say.
    pub fn follow(&mut self, inputs: &Inputs) {
        let inputs = look(self.plane.as_mut(), inputs);
        self.rules.hosts = inputs.host_levels != 0;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(self.firewall.ensure(&self.rules, false)).unwrap();
        bring(self.plane.as_mut(), &desired(&inputs), &Known::default());
    }

    /// Sends pods' DNS queries to where these say.
    pub fn direct(&mut self, queries: aegis_node_agent::nft::Queries) {
        self.rules.queries = queries;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(self.firewall.ensure(&self.rules, false)).unwrap();
    }

    /// As if another agent began with what is pinned.
    pub fn restart(&mut self, row: &Row) {
        let bpffs = &self.bpffs;
        let (plane, sweeper) = row.node.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let mut plane = bpffs.open_sized(1 << 20, 1 << 14);
            attach(plane.as_mut(), &runtime);
            let sweeper = plane.sweeper().unwrap();
            (plane, sweeper)
        });
        (self.plane, self._sweeper) = (plane, sweeper);
    }

    /// Packets to which this has happened.
    pub fn count(&self, counter: Counter) -> u64 {
        self.plane.counters().unwrap()[counter as usize].packets
    }
}

impl Aegis {
    /// Packets by what happened to them.
    pub fn counted(&self, counter: Counter) -> u64 {
        self.plane.counters().unwrap()[counter as usize].packets
    }
}

impl Drop for Aegis {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.wrapper);
    }
}

/// Lets the programs look at the node's own sockets if that is wanted. Gives what is wanted then.
fn look(plane: &mut dyn Plane, inputs: &Inputs) -> Inputs {
    let mut inputs = inputs.clone();
    for _ in 0..2 {
        inputs.host_levels = plane.read().unwrap().config.host_levels;
        if inputs.host_levels == 0 {
            bring(plane, &desired(&inputs), &Known::default());
        }
    }
    inputs
}

/// Attaches the programs to the devices of this namespace.
pub fn attach(plane: &mut dyn Plane, runtime: &Runtime) -> Devices {
    let (found, existing) = runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let network = network::read(&handle).await.unwrap();
        let found = devices(&network, &[], Some(NODE), &[POD_RANGE.parse().unwrap()], &[]);
        (found, network.devices.keys().copied().collect())
    });
    assert_eq!(plane.attach(&found, &existing), [].into());
    found
}

/// Slices that a node holds.
pub fn holding(first: u8, last: u8, node: &str) -> Holding {
    Holding { first, last, node: node.into(), epoch: 1, state: State::Held }
}

/// What the node is to do: let a pod's flows leave from [`EGRESS`], of which nodes hold these slices.
pub fn inputs(holdings: Vec<Holding>, timeouts: Timeouts) -> Inputs {
    let slices: SliceSet = holdings.iter().flat_map(|holding| holding.first..=holding.last).collect();
    let allocation = AllocationName { account: "shop".into(), name: "a".into() };
    let labels: BTreeMap<String, String> = [("app".to_owned(), "shop".to_owned())].into();
    let address = Address {
        address: EGRESS.into(),
        prefix: "p".into(),
        allocation: allocation.clone(),
        epoch: 1,
        holdings,
        fence: None,
    };
    let limits = objects::Allocation {
        sites: Vec::new(),
        site_names: Vec::new(),
        timeouts,
        max_resting: ANY_NUMBER,
        per_pod: Default::default(),
        slices,
        per_node_max: 252,
    };
    Inputs {
        node: "n0".into(),
        allocations: [(allocation.clone(), limits)].into(),
        bindings: vec![Binding {
            name: BindingName { account: "shop".into(), name: "b".into() },
            allocation,
            enabled: true,
            workloads: Workloads { labels: labels.clone(), ..Workloads::default() },
            cidrs: vec!["198.51.100.0/24".parse().unwrap()],
            ports: vec![],
            hosts: vec![],
            use_node_address: false,
            binds: false,
            generation: 1,
        }],
        pods: vec![Pod {
            account: "shop".into(),
            name: "pod".into(),
            uid: "u".into(),
            labels,
            addresses: vec![POD.into()],
            ..Pod::default()
        }],
        addresses: [(EGRESS, address)].into(),
        nodes: [("n0".to_owned(), NodeRecord { addresses: vec![NODE], ..NodeRecord::default() })].into(),
        tunnel_address: Some(NODE),
        pod_ranges: vec![POD_RANGE.parse().unwrap()],
        uplink_mtu: Some(1500),
        mark: MARK,
        tunnel_port: 6081,
        refusals_per_second: 1000,
        ..Inputs::default()
    }
}
