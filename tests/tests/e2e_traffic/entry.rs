//! Where the replies to an egress address enter the cluster.

use std::net::Ipv4Addr;

use aegis_tests::lab::Lab;
use aegis_tests::lab::plan::Node;

/// The router sends one address to one node, until the value's end.
pub struct Entry<'a> {
    lab: &'a Lab,
    address: Ipv4Addr,
}

impl<'a> Entry<'a> {
    /// Pins the address to a node.
    pub fn at(lab: &'a Lab, address: Ipv4Addr, node: Node) -> anyhow::Result<Self> {
        lab.pin(address, &[node])?;
        Ok(Self { lab, address })
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.lab.pin(self.address, &[]) {
            eprintln!("the route to {} stays: {error:#}", self.address);
        }
    }
}
