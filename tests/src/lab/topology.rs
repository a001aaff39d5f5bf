//! Namespaces, links and routes: written as `ip -batch` input by pure functions, then applied.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::plan::{
    CONTROL_PLANE, EGRESS, EGRESS6, LAN, LAN6, Link, NODES, Node, ORIGINS, Plan, ROUTER, ROUTER6,
};
use super::process::{in_network, run};

/// Path of a network namespace made by `ip netns add`.
pub fn namespace_path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

/// Control plane, router and origins, with the link to the root namespace.
pub fn build(plan: &Plan, link: Link) -> anyhow::Result<()> {
    let [router, cp] = ["router", "cp"].map(|part| plan.namespace(part));
    let mut root = vec![format!("netns add {router}"), format!("netns add {cp}")];
    let mut lines = vec![
        "link set lo up".to_owned(),
        // A bridge without an address of its own takes the lowest of its ports', and another one when that port goes:
        // nodes would then send to a gateway that is nobody.
        "link add lan address 02:00:0a:63:00:fe type bridge".to_owned(),
        format!("addr add {ROUTER}/{} dev lan", LAN.prefix_len()),
        format!("addr add {ROUTER6}/{} dev lan nodad", LAN6.prefix_len()),
        "link set lan up".to_owned(),
        format!("link add cp type veth peer name eth0 netns {cp}"),
        "link set cp master lan up".to_owned(),
    ];
    for origin in ORIGINS {
        let namespace = plan.namespace(origin.name);
        root.push(format!("netns add {namespace}"));
        lines.push(format!("link add {} type veth peer name eth0 netns {namespace}", origin.name));
        lines.push(format!("addr add {}/24 dev {}", origin.gateway, origin.name));
        lines.push(format!("addr add {}/64 dev {} nodad", origin.gateway6(), origin.name));
        lines.push(format!("link set {} up", origin.name));
    }
    root.push(format!("link add {} type veth peer name root netns {cp}", plan.root_device()));
    root.push(format!("addr add {}/30 dev {}", link.root, plan.root_device()));
    root.push(format!("link set {} up", plan.root_device()));
    batch(None, &root)?;
    batch(Some(&router), &lines)?;
    batch(
        Some(&cp),
        &[
            "link set lo up".to_owned(),
            format!("addr add {}/30 dev root", link.control_plane),
            "link set root up".to_owned(),
            format!("addr add {CONTROL_PLANE}/{} dev eth0", LAN.prefix_len()),
            "link set eth0 up".to_owned(),
            format!("route add default via {ROUTER}"),
        ],
    )?;
    for origin in ORIGINS {
        let lines = [
            "link set lo up".to_owned(),
            format!("addr add {}/24 dev eth0", origin.address),
            format!("addr add {}/64 dev eth0 nodad", origin.address6()),
            "link set eth0 up".to_owned(),
            format!("route add default via {}", origin.gateway),
            format!("route add default via {}", origin.gateway6()),
        ];
        batch(Some(&plan.namespace(origin.name)), &lines)?;
    }
    sysctl(
        plan,
        "router",
        &[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv4/fib_multipath_hash_policy", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/lan/send_redirects", "0"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv6/fib_multipath_hash_policy", "1"),
        ],
    )
}

/// One node's namespace, its uplink, its routes, and the router's way to its pods.
pub fn build_node(plan: &Plan, node: Node) -> anyhow::Result<()> {
    let name = node.name();
    let namespace = plan.namespace(&name);
    batch(None, &[format!("netns add {namespace}")])?;
    batch(
        Some(&plan.namespace("router")),
        &[
            format!("link add {name} type veth peer name eth0 netns {namespace}"),
            format!("link set {name} master lan up"),
            format!("route replace {} via {}", node.pods(), node.address()),
            format!("route replace {} via {}", node.pods6(), node.address6()),
        ],
    )?;
    batch(Some(&namespace), &node_lines(node))?;
    // One that comes back has another hardware address, and tells nobody by itself.
    let (router, address) = (plan.namespace("router"), node.address6().to_string());
    run("ip", &["-n", &router, "-6", "neigh", "flush", "dev", "lan", "to", &address])?;
    sysctl(
        plan,
        &name,
        &[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/eth0/rp_filter", "1"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
            ("net/ipv4/conf/eth0/send_redirects", "0"),
            ("net/ipv6/conf/all/forwarding", "1"),
        ],
    )?;
    like_a_wire(&namespace_path(&plan.namespace("router")), &name)
}

/// Makes a veth that faces a node's uplink behave as a real network's port does.
pub fn like_a_wire(network: &Path, port: &str) -> anyhow::Result<()> {
    // What leaves a veth has its checksum left to the device, and XDP cannot see that: the port must fill it in.
    in_network(network, || run("ethtool", &["-K", port, "tx", "off"]).map(drop))?;
    super::xdp::attach_pass(network, port)
}

/// What is configured inside a node.
fn node_lines(node: Node) -> Vec<String> {
    let mut lines = vec![
        "link set lo up".to_owned(),
        format!("addr add {}/{} dev eth0", node.address(), LAN.prefix_len()),
        format!("addr add {}/{} dev eth0 nodad", node.address6(), LAN6.prefix_len()),
        "link set eth0 up".to_owned(),
        format!("route add default via {ROUTER}"),
        format!("route add default via {ROUTER6}"),
    ];
    let others = NODES.into_iter().filter(|other| *other != node);
    lines.extend(others.flat_map(|other| {
        [
            format!("route add {} via {}", other.pods(), other.address()),
            format!("route add {} via {}", other.pods6(), other.address6()),
        ]
    }));
    lines
}

/// Spreads the egress ranges over these nodes by ECMP; with none, the router has no route to them.
pub fn spread(plan: &Plan, nodes: &[Node]) -> anyhow::Result<()> {
    route(plan, &EGRESS.to_string(), nodes)?;
    route6(plan, &EGRESS6.to_string(), nodes)
}

/// Sends one /64 to these nodes; with none, it follows the range again.
pub fn pin6(plan: &Plan, network: ipnet::Ipv6Net, nodes: &[Node]) -> anyhow::Result<()> {
    route6(plan, &network.to_string(), nodes)
}

/// Sends one address (`203.0.113.7`) to these nodes; with none, the address follows the range again.
pub fn pin(plan: &Plan, address: std::net::Ipv4Addr, nodes: &[Node]) -> anyhow::Result<()> {
    route(plan, &format!("{address}/32"), nodes)
}

/// Puts a range on the router's link to the nodes; [`pin`] or [`pin6`] without nodes undoes it.
pub fn on_link(plan: &Plan, range: ipnet::IpNet) -> anyhow::Result<()> {
    batch(Some(&plan.namespace("router")), &[format!("route replace {range} dev lan")])
}

/// Hardware address of a node's uplink.
pub fn mac(plan: &Plan, node: Node) -> anyhow::Result<String> {
    let link = run("ip", &["-n", &plan.namespace(&node.name()), "-o", "link", "show", "dev", "eth0"])?;
    let mac = link.split_once("link/ether ").and_then(|(_, rest)| rest.split_whitespace().next());
    mac.map(str::to_owned).with_context(|| format!("{} has no MAC: {link}", node.name()))
}

fn route(plan: &Plan, destination: &str, nodes: &[Node]) -> anyhow::Result<()> {
    let hops: Vec<String> = nodes.iter().map(|node| node.address().to_string()).collect();
    route_by(plan, "-4", destination, &hops)
}

fn route6(plan: &Plan, destination: &str, nodes: &[Node]) -> anyhow::Result<()> {
    let hops: Vec<String> = nodes.iter().map(|node| node.address6().to_string()).collect();
    route_by(plan, "-6", destination, &hops)
}

fn route_by(plan: &Plan, family: &str, destination: &str, hops: &[String]) -> anyhow::Result<()> {
    let router = plan.namespace("router");
    let present = || run("ip", &["-n", &router, family, "route", "show", "exact", destination]);
    if !hops.is_empty() {
        // Replacing would add to the next hops of IPv6.
        let replaced = match family == "-6" && !present()?.is_empty() {
            true => vec![format!("route del {destination}")],
            false => Vec::new(),
        };
        let lines = [replaced, vec![route_line(destination, hops)]].concat();
        return batch(Some(&router), &lines);
    }
    if present()?.is_empty() {
        return Ok(());
    }
    batch(Some(&router), &[format!("route del {destination}")])
}

fn route_line(destination: &str, hops: &[String]) -> String {
    let hops: String = hops.iter().map(|hop| format!(" nexthop via {hop}")).collect();
    format!("route replace {destination}{hops}")
}

/// Takes a node's port out of the LAN, silently: both ends keep their carrier.
pub fn cut(plan: &Plan, node: Node) -> anyhow::Result<()> {
    batch(Some(&plan.namespace("router")), &[format!("link set {} nomaster", node.name())])
}

/// Whether a node's port is in the LAN.
pub fn is_linked(plan: &Plan, node: Node) -> bool {
    let router = plan.namespace("router");
    run("ip", &["-n", &router, "-o", "link", "show", "dev", &node.name()])
        .is_ok_and(|link| link.contains(" master lan "))
}

/// Undoes [`cut`].
pub fn restore(plan: &Plan, node: Node) -> anyhow::Result<()> {
    batch(Some(&plan.namespace("router")), &[format!("link set {} master lan", node.name())])
}

/// Removes a node's link, both ends of it.
pub fn unplug(plan: &Plan, node: Node) -> anyhow::Result<()> {
    batch(Some(&plan.namespace("router")), &[format!("link del {}", node.name())])
}

/// Sets kernel parameters of a part's network namespace; keys are paths below /proc/sys.
fn sysctl(plan: &Plan, part: &str, values: &[(&str, &str)]) -> anyhow::Result<()> {
    in_network(&namespace_path(&plan.namespace(part)), || {
        for (key, value) in values {
            std::fs::write(format!("/proc/sys/{key}"), value)
                .with_context(|| format!("set {key}={value}"))?;
        }
        Ok(())
    })
}

/// Gives `ip` many commands at once.
fn batch(namespace: Option<&str>, lines: &[String]) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run ip (package iproute2)")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all((lines.join("\n") + "\n").as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!(
            "ip in {}: {error}; the commands were: {}",
            namespace.unwrap_or("the root namespace"),
            lines.join("; ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_knows_the_way_to_the_others_pods_only() {
        let lines = node_lines(NODES[1]);
        assert!(lines.contains(&"addr add 10.99.0.2/24 dev eth0".to_owned()));
        assert!(lines.contains(&"route add 10.244.1.0/24 via 10.99.0.1".to_owned()));
        assert!(lines.contains(&"route add 10.244.3.0/24 via 10.99.0.3".to_owned()));
        assert!(!lines.iter().any(|line| line.contains("10.244.2.0")));
    }

    #[test]
    fn ecmp_names_every_hop_once() {
        assert_eq!(
            route_line("203.0.113.0/24", &["10.99.0.1", "10.99.0.2"].map(str::to_owned)),
            "route replace 203.0.113.0/24 nexthop via 10.99.0.1 nexthop via 10.99.0.2"
        );
    }
}
