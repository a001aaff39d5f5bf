//! Which pod an address of this node belongs to.
//!
//! Three sources name addresses: the container runtime, which waits until they are in force, the results that the CNI library leaves
//! on disk before a container of the pod runs, and the pod's status, which is late. Labels and service account come from the watched
//! pod in all cases. Pods of the host network have no address of their own, but a control group as every pod.

use crate::cni::CniResult;
use crate::groups::Group;
use crate::nri::Told;
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
/// newest counts; an address that was given to a sandbox whose pod is not watched yet belongs to nobody, and so does one of a
/// sandbox that the runtime has stopped.
pub fn resolve(
    pods: &[PodRecord],
    cache: &[CniResult],
    told: &Told,
    groups: &BTreeMap<String, Group>,
) -> Identities {
    let running = || pods.iter().filter(|pod| !pod.finished);
    let groups =
        running().filter_map(|pod| Some((pod.uid.clone(), *groups.get(&pod.kubelet_uid)?))).collect();
    // Best claim to each address: (time, uid, MAC), the larger one wins.
    let mut claims: BTreeMap<IpAddr, (Seconds, &str, [u8; 6])> = BTreeMap::new();
    let mut claim = |address: IpAddr, time: Seconds, uid, mac| {
        let best = claims.entry(address).or_insert((time, uid, mac));
        *best = (*best).max((time, uid, mac));
    };
    let is_over = |address: &IpAddr, uid: &String| told.ended.contains(&(*address, uid.clone()));
    for pod in running().filter(|pod| !pod.host_network) {
        let own =
            pod.addresses.iter().filter(|own| !is_over(own, &pod.uid) && !is_over(own, &pod.kubelet_uid));
        own.for_each(|address| claim(*address, pod.created, &pod.uid, [0; 6]));
    }
    for result in cache.iter().chain(&told.sandboxes) {
        let owner = owner(pods, result);
        if owner.is_some_and(|pod| pod.finished) {
            continue;
        }
        // A sandbox may be made anew long after its pod was created: the file's own time counts.
        for (address, mac) in result.addresses.iter().filter(|(address, _)| !is_over(address, &result.uid)) {
            let uid = owner.map_or(result.uid.as_str(), |pod| &pod.uid);
            // The runtime's word is a little younger than that of the CNI library, and has no MAC.
            let mac = if *mac == [0; 6] { mac_in(cache, address, &result.uid) } else { *mac };
            claim(*address, result.written, uid, mac);
        }
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
                conditions: pod.conditions.clone(),
                ..Pod::default()
            }
        })
        .collect();
    let macs = claims.iter().map(|(address, (_, _, mac))| (*address, *mac)).filter(|(_, mac)| *mac != [0; 6]);
    Identities { pods, macs: macs.collect(), groups }
}

/// MAC that the CNI library's result for the same pod has.
fn mac_in(cache: &[CniResult], address: &IpAddr, uid: &str) -> [u8; 6] {
    let same = cache.iter().filter(|result| !uid.is_empty() && result.uid == uid);
    same.filter_map(|result| Some((result.written, *result.addresses.get(address)?)))
        .max()
        .map_or([0; 6], |(_, mac)| mac)
}

/// The watched pod of a sandbox: by UID, or by name where the runtime passes none.
fn owner<'a>(pods: &'a [PodRecord], result: &CniResult) -> Option<&'a PodRecord> {
    let is = |pod: &&PodRecord| pod.uid == result.uid || pod.kubelet_uid == result.uid;
    let by_uid = pods.iter().find(|pod| !result.uid.is_empty() && is(pod));
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
        super::resolve(pods, cache, &Told::default(), &BTreeMap::new())
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
    fn the_runtime_names_a_pod_with_the_mac_that_the_cni_has_told() {
        let runtime = CniResult { addresses: [(A.into(), [0; 6])].into(), ..result("cart-0", "u1", 3, A) };
        let told = Told { sandboxes: vec![runtime.clone()], ..Told::default() };
        let pods = [record("cart-0", "u1", 1, &[])];
        for (cache, macs) in
            [(vec![], [].into()), (vec![result("cart-0", "u1", 2, A)], [(A.into(), MAC)].into())]
        {
            let known = super::resolve(&pods, &cache, &told, &BTreeMap::new());
            assert_eq!((addresses_of(&known.pods, "u1"), known.macs), ([IpAddr::from(A)].as_slice(), macs));
        }
        // Alone it names nobody: labels and service account are the API server's.
        let known = super::resolve(&[record("old", "u0", 1, &[A])], &[], &told, &BTreeMap::new());
        assert!(addresses_of(&known.pods, "u0").is_empty());
    }

    #[test]
    fn a_stopped_pod_has_no_claim_by_whatever_source() {
        let pods = [record("old", "u1", 1, &[A]), record("new", "u2", 0, &[])];
        let cache = [result("old", "u1", 9, A)];
        let ended: crate::nri::Ended = [(A.into(), "u1".to_owned())].into();
        let resolve = |told: &Told| super::resolve(&pods, &cache, told, &BTreeMap::new()).pods;
        let over = resolve(&Told { ended: ended.clone(), ..Told::default() });
        assert!(addresses_of(&over, "u1").is_empty());
        // Even in the same second the next one has it.
        let told = Told { sandboxes: vec![result("new", "u2", 9, A)], ended };
        assert_eq!(addresses_of(&resolve(&told), "u2"), [IpAddr::from(A)]);
    }

    #[test]
    fn a_pod_of_kubelets_own_is_known_by_the_uid_that_kubelet_gave_it() {
        let pods = [PodRecord { kubelet_uid: "hash".into(), ..record("static", "u1", 1, &[]) }];
        assert_eq!(
            addresses_of(&resolve(&pods, &[result("static", "hash", 2, A)]).pods, "u1"),
            [IpAddr::from(A)]
        );
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
        let known = super::resolve(&pods, &[], &Told::default(), &groups.into());
        assert_eq!(known.groups, [("u1".into(), group(11)), ("u2".into(), group(12))].into());
    }
}
