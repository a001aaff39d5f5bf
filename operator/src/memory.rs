//! What the leader remembers of addresses, in case their objects vanish.

use aegis_core::egress::Egress;
use aegis_core::model::{Address, Seconds, State};
use std::collections::BTreeMap;

/// Addresses as last seen. If an `EgressAddress` that nodes still send from is deleted by somebody (or its CRD is),
/// the nodes go on sending. Planning without it would give the same ports to others, so it is remembered, and written
/// again.
#[derive(Default)]
pub struct Memory(BTreeMap<Egress, Address>);

impl Memory {
    /// Takes note of the addresses that stand now, and returns those that vanished with slices held or resting.
    pub fn observe(&mut self, standing: &BTreeMap<Egress, Address>, now: Seconds) -> Vec<Address> {
        self.0.retain(|address, known| standing.contains_key(address) || in_use(known, now));
        self.0.extend(standing.iter().map(|(address, known)| (*address, known.clone())));
        self.0.values().filter(|known| !standing.contains_key(&known.address)).cloned().collect()
    }

    /// Takes note of an address that was just written: it may be deleted before anybody looks again.
    pub fn wrote(&mut self, address: &Address) {
        self.0.insert(address.address, address.clone());
    }
}

fn in_use(address: &Address, now: Seconds) -> bool {
    address.holdings.iter().any(|holding| match holding.state {
        State::Held | State::Draining => true,
        State::Quarantined { until } => now < until,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_core::model::{AllocationName, Holding};

    fn address(last: u8, state: State) -> Address {
        Address {
            address: Egress::V4(std::net::Ipv4Addr::new(203, 0, 113, last)),
            prefix: "p".into(),
            allocation: AllocationName { account: "a".into(), name: "x".into() },
            epoch: 7,
            holdings: vec![Holding { first: 4, last: 11, node: "n1".into(), epoch: 7, state }],
            fence: None,
        }
    }

    fn standing(addresses: &[Address]) -> BTreeMap<Egress, Address> {
        addresses.iter().map(|address| (address.address, address.clone())).collect()
    }

    #[test]
    fn remembers_what_vanishes_in_use_until_it_is_back() {
        let held = address(1, State::Held);
        let mut memory = Memory::default();
        assert!(memory.observe(&standing(std::slice::from_ref(&held)), 0).is_empty());
        assert_eq!(memory.observe(&standing(&[]), 0), std::slice::from_ref(&held));
        assert_eq!(memory.observe(&standing(&[]), 1_000), std::slice::from_ref(&held), "as long as it takes");
        assert!(memory.observe(&standing(std::slice::from_ref(&held)), 1_000).is_empty());
    }

    #[test]
    fn forgets_what_has_rested() {
        let mut memory = Memory::default();
        memory.observe(&standing(&[address(1, State::Quarantined { until: 100 })]), 0);
        assert_eq!(memory.observe(&standing(&[]), 99).len(), 1);
        assert!(memory.observe(&standing(&[]), 100).is_empty());
    }

    #[test]
    fn knows_what_was_just_written() {
        let mut memory = Memory::default();
        memory.wrote(&address(1, State::Held));
        assert_eq!(memory.observe(&standing(&[]), 0).len(), 1);
    }
}
