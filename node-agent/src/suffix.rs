//! Suffixes: the last 32 bits by which a pod is known in every egress /64 of its node.
//!
//! A pod has the last 32 bits of its own address, or, where another pod of the node has the same, others that are free.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

/// The last 32 bits of an address.
pub fn natural(address: Ipv6Addr) -> u32 {
    address.to_bits() as u32
}

/// The suffix of each pod. `taken` is what the data plane has: a pod keeps what it has, and what is not free yet, since
/// connections of a pod that is gone are still to be forgotten, is nobody else's. The rest is a matter of the addresses alone.
pub fn assign(pods: &BTreeSet<Ipv6Addr>, taken: &BTreeMap<u32, Ipv6Addr>) -> BTreeMap<Ipv6Addr, u32> {
    let mut used: BTreeSet<u32> = taken.keys().copied().collect();
    let mut suffixes = BTreeMap::new();
    for (suffix, pod) in taken {
        if pods.contains(pod) {
            suffixes.entry(*pod).or_insert(*suffix);
        }
    }
    // Those who can have their own bits come first: otherwise one that is chosen could be another's.
    let new: Vec<Ipv6Addr> = pods.iter().copied().filter(|pod| !suffixes.contains_key(pod)).collect();
    let mut others = Vec::new();
    for pod in new {
        match used.insert(natural(pod)) {
            true => _ = suffixes.insert(pod, natural(pod)),
            false => others.push(pod),
        }
    }
    for pod in others {
        let mut suffix = first_choice(pod);
        while !used.insert(suffix) {
            suffix = suffix.wrapping_add(1);
        }
        suffixes.insert(pod, suffix);
    }
    suffixes
}

/// Where the search for a pod's suffix begins: all of its address counts (FNV-1a).
fn first_choice(pod: Ipv6Addr) -> u32 {
    pod.octets()
        .iter()
        .fold(0x811c_9dc5_u32, |digest, byte| (digest ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Few addresses, of which many end alike.
    fn pod() -> impl Strategy<Value = Ipv6Addr> {
        (0u16..4, 0u16..4).prop_map(|(middle, last)| Ipv6Addr::new(0xfd00, 0, 0, 1, middle, 0, 0, last))
    }

    #[test]
    fn a_pod_has_the_end_of_its_own_address_unless_another_has_it() {
        let [a, b] = [0, 1].map(|middle| Ipv6Addr::new(0xfd00, 0, 0, 1, middle, 0, 0, 5));
        let both = assign(&[a, b].into(), &BTreeMap::new());
        assert_eq!(both[&a], 5);
        assert_ne!(both[&b], 5);
        assert_eq!(assign(&[b].into(), &BTreeMap::new())[&b], 5);
        // Who was there first keeps it, and what a pod that is gone had is not free yet.
        assert_eq!(assign(&[a, b].into(), &[(5, b)].into())[&b], 5);
        assert_ne!(assign(&[b].into(), &[(5, a)].into())[&b], 5);
    }

    proptest! {
        #[test]
        fn no_two_pods_have_one_suffix_and_each_keeps_its_own(
            changes in prop::collection::vec((prop::collection::btree_set(pod(), 0..8), any::<bool>()), 1..8),
        ) {
            let mut taken: BTreeMap<u32, Ipv6Addr> = BTreeMap::new();
            for (pods, forgotten) in changes {
                let suffixes = assign(&pods, &taken);
                prop_assert_eq!(suffixes.keys().copied().collect::<BTreeSet<_>>(), pods.clone());
                for (pod, suffix) in &suffixes {
                    prop_assert!(taken.get(suffix).is_none_or(|owner| owner == pod), "{} is taken", suffix);
                    prop_assert!(!taken.values().any(|owner| owner == pod) || taken.get(suffix) == Some(pod));
                }
                let owners: BTreeSet<u32> = suffixes.values().copied().collect();
                prop_assert_eq!(owners.len(), suffixes.len(), "two pods have one suffix");
                prop_assert_eq!(&assign(&pods, &taken), &suffixes, "the same inputs");
                taken.extend(suffixes.iter().map(|(pod, suffix)| (*suffix, *pod)));
                if forgotten {
                    taken.retain(|_, pod| pods.contains(pod));
                }
            }
        }
    }
}
