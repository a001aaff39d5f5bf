//! Deadlines by which a node that can't renew its Lease stops sending, and what others may conclude from them.
//!
//! A node keeps one Lease for all addresses that have a fence. Its data plane counts from the moment at which the last
//! successful renewal was sent. Whoever wants its slices takes the Lease over first, so that no further renewal can
//! succeed, and then waits for longer than the data plane does.

mod leases;

pub use leases::{Burdens, Holder, Sighting, Sightings, Step, bearers, burdens};

use crate::model::{Address, Fence, Lease, Node, Seconds};
use crate::rendezvous::weight;
use std::time::Duration;

/// Label of the nodes' Leases, and its value.
pub const LABEL: (&str, &str) = ("app.kubernetes.io/component", "node-lease");
/// Holder of a Lease that was taken over. While the node renews it, the holder is the node's name; an empty one means
/// that the node may acquire it.
pub const TAKEN: &str = "aegis-operator";

/// Before every name of a Lease.
const NAME_PREFIX: &str = "aegis-node-";
/// Longest name of an object.
const NAME_LIMIT: usize = 253;

/// Time since the last renewal was sent after which no new flow starts, if nothing is sent after `after` seconds.
pub fn soft(after: Seconds) -> Seconds {
    after * 3 / 4
}

/// Time since the last renewal was sent after which nothing is sent.
pub fn hard(after: Seconds) -> Seconds {
    after
}

/// How long somebody else waits, from when the take-over of the Lease had succeeded, until the hard deadline has passed
/// on the node too, whose clock may run slower by up to one part in twenty.
pub fn wait(after: Seconds) -> Duration {
    Duration::from_millis(u64::try_from(hard(after)).unwrap_or(0) * 1_050)
}

/// Whether the node's data plane keeps the deadline that the address has: only then does time tell anything about it.
pub fn keeps_deadline(address: &Address, node: &Node) -> bool {
    let Some(fence) = address.fence else { return false };
    let report = node.programmed.get(&address.address);
    report.is_some_and(|report| report.fenced && report.epoch >= fence.epoch)
}

/// Whether the node sends nothing more from the address, as its deadline has passed and it can't get another one.
pub fn has_passed(address: &Address, node: &Node) -> bool {
    match (address.fence, node.lease) {
        (Some(fence), Lease::Taken { waited }) => {
            waited >= wait(fence.after) && keeps_deadline(address, node)
        }
        _ => false,
    }
}

/// Whether a node may be given slices of an address with this fence: one that does not hold its Lease would have to
/// return them.
pub fn admits(fence: Option<Fence>, node: &Node) -> bool {
    fence.is_none() || node.lease == Lease::Own
}

/// Name of a node's Lease.
pub fn lease_name(node: &str) -> String {
    let limit = NAME_LIMIT - NAME_PREFIX.len();
    if node.len() <= limit {
        return format!("{NAME_PREFIX}{node}");
    }
    // 16 digits and the dash before them.
    let head = &node[..node.floor_char_boundary(limit - 17)];
    format!("{NAME_PREFIX}{}-{:016x}", head.trim_end_matches(['.', '-']), weight(node.bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_waits_for_longer_than_the_node_sends() {
        for after in [15, 16, 60, 3600] {
            assert!(soft(after) < hard(after));
            assert!(wait(after) > Duration::from_secs(hard(after) as u64));
        }
        assert_eq!((soft(15), soft(60)), (11, 45));
        assert_eq!(wait(15), Duration::from_millis(15_750));
    }

    #[test]
    fn a_lease_bears_the_name_of_its_node() {
        assert_eq!(lease_name("worker-1.example.org"), "aegis-node-worker-1.example.org");
    }

    #[test]
    fn a_long_name_is_cut_and_stays_its_own() {
        let node = |last: &str| format!("{}{last}", "a234567890".repeat(25));
        let (one, other) = (lease_name(&node("x")), lease_name(&node("y")));
        assert_eq!((one.len(), other.len()), (NAME_LIMIT, NAME_LIMIT));
        assert_ne!(one, other);
        let dots = lease_name(&format!("{}.{}", "a".repeat(224), "b".repeat(28)));
        assert!(dots.starts_with(&format!("aegis-node-{}-", "a".repeat(224))), "{dots}");
    }
}
