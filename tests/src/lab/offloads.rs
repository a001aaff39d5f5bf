//! Checksum and segmentation offloads of a node's uplink, its pods' links and the pods' own ends.

use std::path::{Path, PathBuf};

use super::plan::Node;
use super::process::{in_network, run};
use super::undo::Undo;
use super::{Lab, topology};

/// What is switched: the name that `ethtool -K` takes, and the one that `ethtool -k` shows.
const FEATURES: [(&str, &str); 4] = [
    ("tx", "tx-checksumming"),
    ("tso", "tcp-segmentation-offload"),
    ("gso", "generic-segmentation-offload"),
    ("gro", "generic-receive-offload"),
];

/// A device, and what was on: pairs of a feature and `on` or `off`.
struct Device {
    namespace: PathBuf,
    name: String,
    features: Vec<(&'static str, &'static str)>,
}

impl Device {
    fn set(&self, features: &[(&str, &str)]) -> anyhow::Result<()> {
        let mut arguments = vec!["-K", &self.name];
        arguments.extend(features.iter().flat_map(|(feature, value)| [*feature, *value]));
        in_network(&self.namespace, || run("ethtool", &arguments).map(drop))
    }
}

impl Lab {
    /// Switches the offloads of a node for good.
    pub fn set_offloads(&self, node: Node, on: bool) -> anyhow::Result<()> {
        let value = if on { "on" } else { "off" };
        self.devices(node)?.iter().try_for_each(|device| device.set(&FEATURES.map(|(name, _)| (name, value))))
    }

    /// No offloads for as long as the value lives; then each device has those again that it had.
    pub fn without_offloads(&self, node: Node) -> anyhow::Result<Undo<'_>> {
        let devices = self.devices(node)?;
        let restore = move || {
            // A pod that has ended took its devices along.
            let left = self.devices(node)?;
            let stays =
                |old: &&Device| left.iter().any(|now| now.name == old.name && now.namespace == old.namespace);
            devices.iter().filter(stays).try_for_each(|device| device.set(&device.features))
        };
        let undo = Undo::by(format!("offloads of {} switched off", node.name()), restore);
        self.set_offloads(node, false)?;
        Ok(undo)
    }

    fn devices(&self, node: Node) -> anyhow::Result<Vec<Device>> {
        let mut namespaces = vec![topology::namespace_path(&self.plan().namespace(&node.name()))];
        // Containerd keeps the pods' namespaces in the node's own /run.
        let pods = format!("/proc/{}/root/run/netns", self.init_of(node)?.pid);
        namespaces.extend(std::fs::read_dir(pods).into_iter().flatten().flatten().map(|entry| entry.path()));
        let mut devices = Vec::new();
        for namespace in namespaces {
            devices.extend(devices_of(&namespace)?);
        }
        Ok(devices)
    }
}

fn devices_of(namespace: &Path) -> anyhow::Result<Vec<Device>> {
    in_network(namespace, || {
        let links = run("ip", &["-o", "link", "show", "type", "veth"])?;
        let device = |name: &str| -> anyhow::Result<Device> {
            let features = features(&run("ethtool", &["-k", name])?);
            Ok(Device { namespace: namespace.to_owned(), name: name.to_owned(), features })
        };
        veth_names(&links).into_iter().map(device).collect()
    })
}

/// What the output of `ethtool -k` says of [`FEATURES`]: `tx-checksumming: on`.
fn features(listing: &str) -> Vec<(&'static str, &'static str)> {
    let state = |shown: &str| {
        let line = listing.lines().find_map(|line| line.trim().strip_prefix(shown)?.strip_prefix(": "))?;
        Some(if line.starts_with("on") { "on" } else { "off" })
    };
    FEATURES.into_iter().filter_map(|(name, shown)| Some((name, state(shown)?))).collect()
}

/// Device names in the output of `ip -o link`: `2: eth0@if5: <…`.
fn veth_names(listing: &str) -> Vec<&str> {
    let name = |line: &'_ str| -> Option<usize> { line.find(['@', ' ']) };
    listing
        .lines()
        .filter_map(|line| line.split_once(": ").map(|(_, rest)| rest))
        .map(|rest| &rest[..name(rest).unwrap_or(rest.len())])
        .map(|device| device.trim_end_matches(':'))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_found() {
        let listing = "2: eth0@if5: <BROADCAST> mtu 1500\n7: veth12ab@if2: <UP> mtu 1500\n9: plain: <UP>\n";
        assert_eq!(veth_names(listing), ["eth0", "veth12ab", "plain"]);
    }

    #[test]
    fn features_are_read_as_they_are() {
        let listing = "Features for eth0:\nrx-checksumming: on\ntx-checksumming: on\n\ttx-checksum-ipv4: off [fixed]\n\
                       tcp-segmentation-offload: off\n\ttx-tcp-segmentation: off [requested on]\n\
                       generic-segmentation-offload: off [requested on]\ngeneric-receive-offload: on\n";
        assert_eq!(features(listing), [("tx", "on"), ("tso", "off"), ("gso", "off"), ("gro", "on")]);
    }
}
