//! Where the fragments of a datagram meet. Later fragments carry no port, so no slice names their node; all nodes
//! therefore send every fragment of a datagram to the same home, which knows the ports once the first one is there.

use crate::model::{Address, State};
use crate::rendezvous::weight;
use std::collections::BTreeSet;

/// Homes of an address; a datagram's home is chosen by the low four bits of a hash of its identity.
pub const HOMES: usize = 16;

/// The node of each home: every node derives the same list from the same `EgressAddress`. By rendezvous hashing
/// over the nodes that send from the address (held or draining slices), so that a node that comes or goes moves only
/// the homes it gains or loses. Empty if nobody sends from the address.
pub fn fragment_homes(address: &Address) -> Vec<String> {
    let senders: BTreeSet<&str> = address
        .holdings
        .iter()
        .filter(|holding| matches!(holding.state, State::Held | State::Draining))
        .map(|holding| holding.node.as_str())
        .collect();
    (0..HOMES as u8)
        .filter_map(|home| {
            let rank =
                |node: &str| weight(address.address.bytes().into_iter().chain([home]).chain(node.bytes()));
            senders.iter().max_by_key(|node| (rank(node), **node))
        })
        .map(|node| (*node).to_owned())
        .collect()
}
