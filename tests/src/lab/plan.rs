//! Names and addresses of one lab, derived from its instance name.
//!
//! Everything inside the lab's network namespaces is the same for every instance (nothing of it is visible outside);
//! what lies outside carries the instance's name, and the one link to the root namespace has a subnet of its own.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::ensure;
use ipnet::{Ipv4Net, Ipv6Net};

/// Instance used when neither `--instance` nor `AEGIS_LAB` names one.
pub const DEFAULT_INSTANCE: &str = "aegis";
/// Longest instance name: `<instance>-cp` must fit into the 15 bytes of a device name.
pub const MAX_INSTANCE: usize = 12;
/// The network of nodes, control plane and router.
pub const LAN: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 99, 0, 0), 24);
/// The same over IPv6.
pub const LAN6: Ipv6Net = v6([0x2001, 0xdb8, 0x99, 0], 64);
/// The range that the router spreads over the nodes; egress addresses are taken from it.
pub const EGRESS: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(203, 0, 113, 0), 24);
/// The same over IPv6: egress /64s are taken from it.
pub const EGRESS6: Ipv6Net = v6([0x2001, 0xdb8, 0x203, 0], 48);
/// All pod ranges together.
pub const PODS: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);
/// The same over IPv6.
pub const PODS6: Ipv6Net = v6([0xfd00, 0x10, 0x244, 0], 48);
/// Addresses of services.
pub const SERVICES: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16);
/// Address of the collector's Service. The lab has no DNS of a cluster: nodes know it from their hosts file.
pub const COLLECTOR: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 200);
/// The same over IPv6.
pub const SERVICES6: Ipv6Net = v6([0xfd00, 0x10, 0x96, 0], 112);
/// The router on the LAN: default gateway of nodes and control plane.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 254);
/// The same over IPv6, for nodes.
pub const ROUTER6: Ipv6Addr = host(LAN6, 0xfe);
/// The control plane on the LAN.
pub const CONTROL_PLANE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 250);
/// Port of the API server.
pub const API_PORT: u16 = 6443;
/// The nodes, in order.
pub const NODES: [Node; 3] = [Node { index: 1 }, Node { index: 2 }, Node { index: 3 }];
/// The origins, in order.
pub const ORIGINS: [Origin; 2] = [
    Origin {
        name: "o1",
        address: Ipv4Addr::new(198, 51, 100, 10),
        gateway: Ipv4Addr::new(198, 51, 100, 1),
        range6: v6([0x2001, 0xdb8, 0x51, 0], 64),
    },
    Origin {
        name: "o2",
        address: Ipv4Addr::new(192, 0, 2, 10),
        gateway: Ipv4Addr::new(192, 0, 2, 1),
        range6: v6([0x2001, 0xdb8, 0x52, 0], 64),
    },
];
/// The resolver that nodes give their pods: the second origin, where a test that needs one starts it.
pub const RESOLVER: Ipv4Addr = ORIGINS[1].address;
/// TCP and UDP ports on which the origins serve.
pub const ORIGIN_PORTS: &str = "7000-7009";

/// Folder with one folder for each lab that runs.
pub const STATES: &str = "/run/aegis-lab";
/// Link subnets to the root namespace are /30 of this range.
const LINKS: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 0);
/// Number of /30 in the range of [`LINKS`] (a /16).
pub const LINK_COUNT: u16 = 1 << 14;

const fn v6([a, b, c, d]: [u16; 4], length: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0), length)
}

/// An address of a /64.
const fn host(range: Ipv6Net, last: u16) -> Ipv6Addr {
    Ipv6Addr::from_bits(range.addr().to_bits() | last as u128)
}

/// One node of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// 1, 2 or 3.
    pub index: u8,
}

impl Node {
    /// The node with this name (`n1`..`n3`).
    pub fn named(name: &str) -> anyhow::Result<Self> {
        NODES
            .into_iter()
            .find(|node| node.name() == name)
            .ok_or_else(|| anyhow::anyhow!("no node {name:?}: the lab has n1, n2 and n3"))
    }

    /// Name of the Node object, and of the router's port that faces the node.
    pub fn name(self) -> String {
        format!("n{}", self.index)
    }

    /// Address of the node's uplink `eth0` on the LAN.
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, self.index)
    }

    /// The same over IPv6.
    pub fn address6(self) -> Ipv6Addr {
        host(LAN6, self.index.into())
    }

    /// Range of the node's pods over IPv6.
    pub fn pods6(self) -> Ipv6Net {
        v6([0xfd00, 0x10, 0x244, self.index.into()], 64)
    }

    /// Range of the node's pods.
    pub fn pods(self) -> Ipv4Net {
        Ipv4Net::new_assert(Ipv4Addr::new(10, 244, self.index, 0), 24)
    }

    /// Value of the label `topology.kubernetes.io/zone`.
    pub fn zone(self) -> &'static str {
        ["a", "b", "c"][usize::from(self.index - 1) % 3]
    }
}

/// One origin: a server outside the cluster, behind the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// `o1` or `o2`; also the router's port that faces it.
    pub name: &'static str,
    /// Its address, on a /24 of its own.
    pub address: Ipv4Addr,
    /// The router on that /24.
    pub gateway: Ipv4Addr,
    /// Its /64, of which it and the router have an address.
    pub range6: Ipv6Net,
}

impl Origin {
    /// Its IPv6 address.
    pub fn address6(self) -> Ipv6Addr {
        host(self.range6, 0x10)
    }

    /// The router's, on the same link.
    pub fn gateway6(self) -> Ipv6Addr {
        host(self.range6, 1)
    }

    /// The origin with this name.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        ORIGINS
            .into_iter()
            .find(|origin| origin.name == name)
            .ok_or_else(|| anyhow::anyhow!("no origin {name:?}: the lab has o1 and o2"))
    }
}

/// Names of what an instance makes outside its namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    instance: String,
}

impl Plan {
    /// Checks the instance name: a lower-case letter, then letters, digits and dashes, 12 characters at most.
    pub fn new(instance: &str) -> anyhow::Result<Self> {
        let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        ensure!(
            instance.len() <= MAX_INSTANCE
                && instance.starts_with(|c: char| c.is_ascii_lowercase())
                && instance.chars().all(letters),
            "lab instance {instance:?}: use a lower-case letter, then letters, digits and dashes, at most \
             {MAX_INSTANCE} characters"
        );
        Ok(Self { instance: instance.to_owned() })
    }

    /// The instance's name.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Network namespace of a part: `n1`..`n3`, `router`, `cp`, `o1`, `o2`.
    pub fn namespace(&self, part: &str) -> String {
        format!("{}-{part}", self.instance)
    }

    /// All network namespaces of the instance.
    pub fn namespaces(&self) -> Vec<String> {
        let nodes = NODES.iter().map(|node| node.name());
        let others = ["router", "cp", "o1", "o2"].into_iter().map(str::to_owned);
        others.chain(nodes).map(|part| self.namespace(&part)).collect()
    }

    /// The root namespace's end of the link to the control plane.
    pub fn root_device(&self) -> String {
        format!("{}-cp", self.instance)
    }

    /// State, keys, kubeconfig, logs and sockets. Gone after a boot, like what it describes.
    pub fn state_dir(&self) -> PathBuf {
        PathBuf::from(STATES).join(&self.instance)
    }

    /// Bulk data (images, containers, volumes): needs a disk file system, which /run often is not.
    pub fn data_dir(&self) -> PathBuf {
        PathBuf::from("/var/lib/aegis-lab").join(&self.instance)
    }

    /// Path of the instance's control group, below every hierarchy's root.
    pub fn cgroup(&self) -> String {
        format!("aegis-lab-{}", self.instance)
    }

    /// Where the search for a free link subnet starts: a hash of the name, so that an instance usually keeps its own.
    pub fn preferred_link(&self) -> u16 {
        let hash =
            self.instance.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
        ((hash ^ (hash >> 16)) % u32::from(LINK_COUNT)) as u16
    }
}

/// The two ends of a link to the root namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Root namespace's address.
    pub root: Ipv4Addr,
    /// Control plane's address: what kubeconfig names.
    pub control_plane: Ipv4Addr,
}

impl Link {
    /// The `index`-th /30 of 10.213.0.0/16 (index below [`LINK_COUNT`]).
    pub fn new(index: u16) -> Self {
        let base = u32::from(LINKS) + u32::from(index % LINK_COUNT) * 4;
        Self { root: Ipv4Addr::from(base + 1), control_plane: Ipv4Addr::from(base + 2) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn two_instances_share_no_name_outside() {
        let (a, b) = (Plan::new("aegis").unwrap(), Plan::new("aegis-2").unwrap());
        let names = |plan: &Plan| -> BTreeSet<String> {
            let mut names: BTreeSet<String> = plan.namespaces().into_iter().collect();
            names.extend([plan.cgroup(), plan.root_device()]);
            names.extend([plan.state_dir(), plan.data_dir()].map(|p| p.display().to_string()));
            names
        };
        assert_eq!(
            names(&a).len(),
            10,
            "seven namespaces, two folders, one name for device and cp namespace"
        );
        assert!(names(&a).is_disjoint(&names(&b)));
    }

    #[test]
    fn instance_names_are_checked() {
        for good in ["a", "aegis", "ci-12", "abcdefghijkl"] {
            assert!(Plan::new(good).is_ok(), "{good}");
        }
        for bad in ["", "Aegis", "1a", "-a", "a/b", "a.b", "abcdefghijklm", "a b"] {
            assert!(Plan::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn device_names_fit_the_kernel() {
        assert!(Plan::new("abcdefghijkl").unwrap().root_device().len() <= 15);
    }

    #[test]
    fn links_are_disjoint_and_inside_the_range() {
        let range: Ipv4Net = "10.213.0.0/16".parse().unwrap();
        let all: BTreeSet<Ipv4Addr> =
            (0..LINK_COUNT).flat_map(|i| [Link::new(i).root, Link::new(i).control_plane]).collect();
        assert_eq!(all.len(), usize::from(LINK_COUNT) * 2);
        assert!(all.iter().all(|address| range.contains(address)));
        assert!(Plan::new("aegis").unwrap().preferred_link() < LINK_COUNT);
    }

    #[test]
    fn ranges_do_not_overlap() {
        let origins = ORIGINS.map(|o| Ipv4Net::new(o.gateway, 24).unwrap().trunc());
        let ranges = [LAN, EGRESS, PODS, SERVICES, origins[0], origins[1], "10.213.0.0/16".parse().unwrap()];
        for (i, a) in ranges.iter().enumerate() {
            for b in &ranges[i + 1..] {
                assert!(!a.contains(b) && !b.contains(a), "{a} overlaps {b}");
            }
        }
        let ranges = [LAN6, EGRESS6, PODS6, SERVICES6, ORIGINS[0].range6, ORIGINS[1].range6];
        for (i, a) in ranges.iter().enumerate() {
            for b in &ranges[i + 1..] {
                assert!(!a.contains(b) && !b.contains(a), "{a} overlaps {b}");
            }
        }
        for node in NODES {
            assert!(PODS.contains(&node.pods()) && LAN.contains(&node.address()));
            assert!(PODS6.contains(&node.pods6()) && LAN6.contains(&node.address6()));
            assert_eq!(Node::named(&node.name()).unwrap(), node);
        }
        assert!(Node::named("n4").is_err());
    }
}
