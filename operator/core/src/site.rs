//! Sites: how an allocation's slices are shared among them.

use crate::model::Site;
use crate::slice::{FIRST, LAST, SliceSet};
use std::collections::BTreeMap;

/// Of these slices of an address, how many the nodes of each site may hold together, in the order of the sites' names: in
/// proportion to the weights, what is left over by the largest remainder, then by name. They are numbers, not ranges, so
/// that an edit of the weights moves no more than it must. Without sites one number for all nodes.
pub fn quotas(sites: &BTreeMap<String, Site>, slices: SliceSet) -> Vec<u32> {
    let usable = slices.intersection(SliceSet::range(FIRST, LAST)).len();
    if sites.is_empty() {
        return vec![usable];
    }
    let weights: Vec<u64> = sites.values().map(|site| site.weight.into()).collect();
    let sum = weights.iter().sum::<u64>().max(1);
    let exact = |weight: u64| u64::from(usable) * weight;
    let mut quotas: Vec<u32> =
        weights.iter().map(|weight| u32::try_from(exact(*weight) / sum).unwrap_or(usable)).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|at| (std::cmp::Reverse(exact(weights[*at]) % sum), *at));
    let left = usable.saturating_sub(quotas.iter().sum());
    for at in order.into_iter().filter(|at| weights[*at] > 0).take(left as usize) {
        quotas[at] += 1;
    }
    quotas
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(slices: SliceSet, weights: &[u32]) -> Vec<u32> {
        let site = |(at, weight): (usize, &u32)| {
            (format!("s{at}"), Site { selector: BTreeMap::new(), weight: *weight })
        };
        quotas(&weights.iter().enumerate().map(site).collect(), slices)
    }

    #[test]
    fn every_slice_is_some_sites_in_proportion_to_the_weights() {
        let all = SliceSet::range(4, 255);
        assert_eq!(shares(all, &[]), [252]);
        assert_eq!(shares(all, &[7]), [252]);
        assert_eq!(shares(all, &[1, 3]), [63, 189]);
        assert_eq!(shares(all, &[1, 1, 1, 1]), [63; 4]);
        assert_eq!(shares(all, &[1000, 1]), [252, 0], "0.25 of a slice is none");
        assert_eq!(shares(SliceSet::range(4, 13), &[1, 1, 1]), [4, 3, 3], "ties by name");
        assert_eq!(shares(SliceSet::range(4, 13), &[1, 1, 2]), [3, 2, 5], "of 2.5, 2.5 and 5");
        assert_eq!(shares(SliceSet::range(4, 4), &[1, 2]), [0, 1]);
        assert_eq!(shares(SliceSet::range(0, 7), &[1]), [4], "the first four are no slices");
    }
}
