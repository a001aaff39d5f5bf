//! Which pod an address of this node belongs to.
//!
//! Two sources name addresses: the pod's status, which is late, and the results that the CNI library leaves on disk
//! before a container of the pod runs. Labels and service account come from the watched pod in both cases. Pods of the host network
//! have no address of their own, but a control group as every pod.

use crate::cni::CniResult;
use crate::groups::Group;
use crate::objects::PodRecord;
use aegis_core::model::Seconds;
use aegis_core::policy::Pod;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Who has which address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identities {
    /// The watched pods that still run, with the addresses that are their own now.
    pub pods: Vec<Pod>,
    /// MAC that belongs to each address, where the CNI has told it.
    pub macs: BTreeMap<IpAddr, [u8; 6]>,
    /// Control group of each pod, by UID.
    pub groups: BTreeMap<String, Group>,
}

/// Gives every watched pod that still runs the addresses that are its own now. Of several claims to an address the
/// newest counts; an address that was given to a sandbox whose pod is not watched yet belongs to nobody.
pub fn resolve(pods: &[PodRecord], cache: &[CniResult], groups: &BTreeMap<String, Group>) -> Identities {
    let running = || pods.iter().filter(|pod| !pod.finished);
    let groups =
        running().filter_map(|pod| Some((pod.uid.clone(), *groups.get(&pod.kubelet_uid)?))).collect();
    // Best claim to each address: (time, uid, MAC), the larger one wins.
    let mut claims: BTreeMap<IpAddr, (Seconds, &str, [u8; 6])> = BTreeMap::new();
    let mut claim = |address: IpAddr, time: Seconds, uid, mac| {
        let best = claims.entry(address).or_insert((time, uid, mac));
        *best = (*best).max((time, uid, mac));
    };
    for pod in running().filter(|pod| !pod.host_network) {
        pod.addresses.iter().for_each(|address| claim(*address, pod.created, &pod.uid, [0; 6]));
    }
    for result in cache {
        let owner = owner(pods, result);
        if owner.is_some_and(|pod| pod.finished) {
            continue;
        }
        // A sandbox may be made anew long after its pod was created: the file's own time counts.
        result.addresses.iter().for_each(|(address, mac)| {
            claim(*address, result.written, owner.map_or(result.uid.as_str(), |pod| &pod.uid), *mac);
        });
    }
    let pods = running()
        .map(|pod| {
            let won = claims.iter().filter(|(_, (_, uid, _))| !pod.host_network && *uid == pod.uid);
            Pod {
                account: pod.account.clone(),
                name: pod.name.clone(),
                uid: pod.uid.clone(),
                labels: pod.labels.clone(),
                service_account: pod.service_account.clone(),
                addresses: won.map(|(address, _)| *address).collect(),
                host_network: pod.host_network,
            }
        })
        .collect();
    let macs = claims.iter().map(|(address, (_, _, mac))| (*address, *mac)).filter(|(_, mac)| *mac != [0; 6]);
    Identities { pods, macs: macs.collect(), groups }
}

/// The watched pod of a CNI result: by UID, or by name where the runtime passes none.
fn owner<'a>(pods: &'a [PodRecord], result: &CniResult) -> Option<&'a PodRecord> {
    let by_uid = pods.iter().find(|pod| !result.uid.is_empty() && pod.uid == result.uid);
    let by_name = || {
        pods.iter().find(|pod| {
            result.uid.is_empty()
                && pod.account == result.account
                && pod.name == result.name
                && pod.created <= result.written
        })
    };
    by_uid.or_else(by_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(pods: &[PodRecord], cache: &[CniResult]) -> Identities {
        super::resolve(pods, cache, &BTreeMap::new())
    }

    fn record(name: &str, uid: &str, created: Seconds, addresses: &[[u8; 4]]) -> PodRecord {
        PodRecord {
            account: "shop".into(),
            name: name.into(),
            uid: uid.into(),
            addresses: addresses.iter().map(|octets| IpAddr::from(*octets)).collect(),
            created,
            ..PodRecord::default()
        }
    }

    fn result(name: &str, uid: &str, written: Seconds, address: [u8; 4]) -> CniResult {
        CniResult {
            account: "shop".into(),
            name: name.into(),
            uid: uid.into(),
            addresses: [(address.into(), MAC)].into(),
            written,
        }
    }

    fn addresses_of<'a>(pods: &'a [Pod], uid: &str) -> &'a [IpAddr] {
        pods.iter().find(|pod| pod.uid == uid).map(|pod| pod.addresses.as_slice()).unwrap()
    }

    const A: [u8; 4] = [10, 244, 1, 7];
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn the_mac_is_that_of_the_claim_that_won() {
        // Status and CNI of the same pod, also within one second: the CNI's word has the MAC.
        for written in [1, 2] {
            let known = resolve(&[record("cart-0", "u1", 1, &[A])], &[result("cart-0", "u1", written, A)]);
            assert_eq!(known.macs, [(A.into(), MAC)].into());
        }
        let known = resolve(&[record("new", "u2", 5, &[A])], &[result("gone", "u1", 2, A)]);
        assert!(known.macs.is_empty(), "that of an earlier pod");
    }

    #[test]
    fn the_cache_names_a_pod_before_its_status_does() {
        let pods = resolve(&[record("cart-0", "u1", 1, &[])], &[result("cart-0", "u1", 2, A)]).pods;
        assert_eq!(addresses_of(&pods, "u1"), [IpAddr::from(A)]);
    }

    #[test]
    fn without_uid_the_name_decides_but_never_for_a_younger_pod() {
        let old = resolve(&[record("cart-0", "u1", 1, &[])], &[result("cart-0", "", 2, A)]).pods;
        assert_eq!(addresses_of(&old, "u1"), [IpAddr::from(A)]);
        let young = resolve(&[record("cart-0", "u2", 9, &[])], &[result("cart-0", "", 2, A)]).pods;
        assert!(addresses_of(&young, "u2").is_empty());
    }

    #[test]
    fn a_reused_address_belongs_to_the_newer_pod() {
        let pods = [record("old", "u1", 1, &[A]), record("new", "u2", 5, &[A])];
        let pods = resolve(&pods, &[]).pods;
        assert!(addresses_of(&pods, "u1").is_empty());
        assert_eq!(addresses_of(&pods, "u2"), [IpAddr::from(A)]);
    }

    #[test]
    fn an_address_given_to_a_pod_not_yet_watched_is_nobodys() {
        let pods = resolve(&[record("old", "u1", 1, &[A])], &[result("new", "u2", 5, A)]).pods;
        assert!(addresses_of(&pods, "u1").is_empty());
    }

    #[test]
    fn a_result_that_was_left_behind_does_not_take_the_address_of_a_later_pod() {
        let pods = resolve(&[record("new", "u2", 5, &[A])], &[result("gone", "u1", 2, A)]).pods;
        assert_eq!(addresses_of(&pods, "u2"), [IpAddr::from(A)]);
    }

    #[test]
    fn a_finished_pod_frees_its_address() {
        let finished = PodRecord { finished: true, ..record("job", "u1", 9, &[A]) };
        let pods = resolve(&[finished, record("new", "u2", 5, &[A])], &[result("job", "u1", 9, A)]).pods;
        assert_eq!(pods.len(), 1);
        assert_eq!(addresses_of(&pods, "u2"), [IpAddr::from(A)]);
    }

    #[test]
    fn pods_of_the_host_network_own_no_address() {
        let host = PodRecord { host_network: true, ..record("agent", "u1", 1, &[[192, 0, 2, 1]]) };
        assert!(addresses_of(&resolve(&[host], &[]).pods, "u1").is_empty());
    }

    #[test]
    fn a_group_is_the_pods_by_the_uid_that_kubelet_knows() {
        let group = |number| Group { number, levels: 8 };
        let groups =
            [("u1".to_owned(), group(11)), ("hash".to_owned(), group(12)), ("gone".to_owned(), group(13))];
        let pods = ["u1", "u2", "u3"].map(|uid| PodRecord {
            kubelet_uid: if uid == "u2" { "hash" } else { uid }.into(),
            host_network: true,
            ..record(uid, uid, 1, &[])
        });
        let known = super::resolve(&pods, &[], &groups.into());
        assert_eq!(known.groups, [("u1".into(), group(11)), ("u2".into(), group(12))].into());
    }
}
