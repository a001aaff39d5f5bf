//! Which of several nodes is to answer for an address when nobody does.

use crate::egress::Egress;
use crate::rendezvous::weight;

/// Whether `node` comes before `other` for an address (rendezvous hashing, so that many addresses are spread over the nodes).
/// Of two different nodes exactly one comes before the other, whoever asks.
pub fn outranks(address: Egress, node: &str, other: &str) -> bool {
    let rank = |name: &str| weight(address.bytes().into_iter().chain(name.bytes()));
    (rank(node), node) > (rank(other), other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn addresses_are_spread_and_all_agree_on_the_order() {
        let nodes = ["n1", "n2", "n3", "n4"];
        let mut first = [0; 4];
        for last in 0..200 {
            let address = Ipv4Addr::new(203, 0, 113, last).into();
            let before = |node: &str| nodes.iter().filter(|other| outranks(address, other, node)).count();
            let mut places = nodes.map(before);
            first[places.iter().position(|place| *place == 0).unwrap()] += 1;
            places.sort_unstable();
            assert_eq!(places, [0, 1, 2, 3]);
        }
        assert!(first.iter().all(|count| *count > 25), "{first:?}");
    }
}
