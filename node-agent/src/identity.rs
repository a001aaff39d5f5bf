//! Which pod an address of this node belongs to.
//!
//! Two sources name addresses: the pod's status, which is late, and the results that the CNI library leaves on disk
//! before a container of the pod runs. Labels and service account come from the watched pod in both cases.

use crate::objects::PodRecord;
use aegis_core::model::Seconds;
use aegis_core::policy::Pod;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;

/// A result of the CNI library: a sandbox was given addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CniResult {
    /// Namespace of the pod.
    pub account: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the pod; empty where the runtime does not pass it.
    pub uid: String,
    /// IPv4 addresses.
    pub addresses: Vec<Ipv4Addr>,
    /// When the file was written.
    pub written: Seconds,
}

/// Why a file of the cache was not used.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The folder or a file in it cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Folder or file.
        path: String,
        /// Reason.
        source: std::io::Error,
    },
    /// Not a result of the CNI library (or one that is still being written).
    #[error("not a CNI result: {0}")]
    Parse(#[from] serde_json::Error),
}

/// libcni's cache file (`cniCacheV1`): the call's arguments and the plugins' result.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CacheFile {
    #[serde(default)]
    cni_args: Vec<(String, String)>,
    #[serde(default)]
    result: Option<CacheResult>,
}

#[derive(Deserialize)]
struct CacheResult {
    #[serde(default)]
    ips: Vec<CacheAddress>,
}

#[derive(Deserialize)]
struct CacheAddress {
    address: String,
}

/// Reads one cache file. `None` if it does not belong to a pod or gives it no IPv4 address.
pub fn parse(contents: &[u8], written: Seconds) -> Result<Option<CniResult>, CniError> {
    let file: CacheFile = serde_json::from_slice(contents)?;
    let argument = |key: &str| {
        file.cni_args.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone()).unwrap_or_default()
    };
    let result = CniResult {
        account: argument("K8S_POD_NAMESPACE"),
        name: argument("K8S_POD_NAME"),
        uid: argument("K8S_POD_UID"),
        addresses: file
            .result
            .iter()
            .flat_map(|result| &result.ips)
            .filter_map(|ip| ip.address.split('/').next()?.parse().ok())
            .filter(|address: &Ipv4Addr| !address.is_loopback())
            .collect(),
        written,
    };
    Ok((!result.name.is_empty() && !result.addresses.is_empty()).then_some(result))
}

/// Reads the whole cache folder. A folder that does not exist (yet) is empty; a file that vanishes or is being
/// written is left out, as its next event will bring it.
pub fn read_cache(folder: &Path) -> Result<Vec<CniResult>, CniError> {
    let unreadable = |source| CniError::Read { path: folder.display().to_string(), source };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut results = Vec::new();
    for entry in entries {
        let entry = entry.map_err(unreadable)?;
        let written = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        let written = written.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        let written = written.map_or(0, |age| Seconds::try_from(age.as_secs()).unwrap_or(0));
        let Ok(contents) = std::fs::read(entry.path()) else { continue };
        match parse(&contents, written) {
            Ok(result) => results.extend(result),
            Err(error) => tracing::debug!(file = %entry.path().display(), %error, "skipped a CNI result"),
        }
    }
    results.sort_by(|a, b| (&a.account, &a.name, &a.uid, a.written).cmp(&(&b.account, &b.name, &b.uid, b.written)));
    Ok(results)
}

/// Gives every watched pod that still runs the addresses that are its own now. Of several claims to an address the
/// newest counts; an address that was given to a sandbox whose pod is not watched yet belongs to nobody.
pub fn resolve(pods: &[PodRecord], cache: &[CniResult]) -> Vec<Pod> {
    let running = || pods.iter().filter(|pod| !pod.finished);
    // Best claim to each address: (time, uid), the larger one wins.
    let mut claims: BTreeMap<Ipv4Addr, (Seconds, &str)> = BTreeMap::new();
    let mut claim = |address: Ipv4Addr, time: Seconds, uid| {
        let best = claims.entry(address).or_insert((time, uid));
        *best = (*best).max((time, uid));
    };
    for pod in running().filter(|pod| !pod.host_network) {
        pod.addresses.iter().for_each(|address| claim(*address, pod.created, &pod.uid));
    }
    for result in cache {
        let owner = owner(pods, result);
        if owner.is_some_and(|pod| pod.finished) {
            continue;
        }
        // A sandbox may be made anew long after its pod was created: the file's own time counts.
        result.addresses.iter().for_each(|address| {
            claim(*address, result.written, owner.map_or(result.uid.as_str(), |pod| &pod.uid));
        });
    }
    running()
        .map(|pod| {
            let won = claims.iter().filter(|(_, (_, uid))| !pod.host_network && *uid == pod.uid);
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
        .collect()
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

    /// As containerd 2 leaves it (the base64 configuration shortened).
    const CONTAINERD: &str = r#"{"kind":"cniCacheV1","containerId":"6b1d","config":"eyJjbmlWZXJzaW9uIjoiMS4wLjAifQ==",
        "ifName":"eth0","networkName":"lab","netns":"/var/run/netns/cni-9f5c",
        "cniArgs":[["IgnoreUnknown","1"],["K8S_POD_NAMESPACE","shop"],["K8S_POD_NAME","cart-0"],
                   ["K8S_POD_INFRA_CONTAINER_ID","6b1d"],["K8S_POD_UID","u1"]],
        "capabilityArgs":{"dns":{},"portMappings":null},
        "result":{"cniVersion":"1.0.0","dns":{},
            "interfaces":[{"mac":"ee:00:00:00:00:01","name":"cni0"},{"mac":"ee:00:00:00:00:02","name":"veth1"},
                          {"mac":"ee:00:00:00:00:03","name":"eth0","sandbox":"/var/run/netns/cni-9f5c"}],
            "ips":[{"address":"10.244.1.7/24","gateway":"10.244.1.1","interface":2},
                   {"address":"2001:db8::7/64","interface":2}],
            "routes":[{"dst":"0.0.0.0/0"}]}}"#;

    /// The loopback network that containerd adds to every sandbox.
    const LOOPBACK: &str = r#"{"kind":"cniCacheV1","containerId":"6b1d","config":"","ifName":"lo",
        "networkName":"cni-loopback","cniArgs":[["K8S_POD_NAMESPACE","shop"],["K8S_POD_NAME","cart-0"]],
        "result":{"cniVersion":"1.0.0","ips":[{"address":"127.0.0.1/8"},{"address":"::1/128"}]}}"#;

    fn record(name: &str, uid: &str, created: Seconds, addresses: &[[u8; 4]]) -> PodRecord {
        PodRecord {
            account: "shop".into(),
            name: name.into(),
            uid: uid.into(),
            addresses: addresses.iter().map(|octets| Ipv4Addr::from(*octets)).collect(),
            created,
            ..PodRecord::default()
        }
    }

    fn result(name: &str, uid: &str, written: Seconds, address: [u8; 4]) -> CniResult {
        CniResult {
            account: "shop".into(),
            name: name.into(),
            uid: uid.into(),
            addresses: vec![address.into()],
            written,
        }
    }

    fn addresses_of<'a>(pods: &'a [Pod], uid: &str) -> &'a [Ipv4Addr] {
        pods.iter().find(|pod| pod.uid == uid).map(|pod| pod.addresses.as_slice()).unwrap()
    }

    const A: [u8; 4] = [10, 244, 1, 7];

    #[test]
    fn reads_what_containerd_writes() {
        assert_eq!(parse(CONTAINERD.as_bytes(), 5).unwrap(), Some(result("cart-0", "u1", 5, A)));
        assert_eq!(parse(LOOPBACK.as_bytes(), 5).unwrap(), None);
        assert!(parse(&CONTAINERD.as_bytes()[..300], 5).is_err());
        assert_eq!(parse(br#"{"kind":"cniCacheV1"}"#, 5).unwrap(), None);
    }

    #[test]
    fn the_cache_names_a_pod_before_its_status_does() {
        let pods = resolve(&[record("cart-0", "u1", 1, &[])], &[result("cart-0", "u1", 2, A)]);
        assert_eq!(addresses_of(&pods, "u1"), [Ipv4Addr::from(A)]);
    }

    #[test]
    fn without_uid_the_name_decides_but_never_for_a_younger_pod() {
        let old = resolve(&[record("cart-0", "u1", 1, &[])], &[result("cart-0", "", 2, A)]);
        assert_eq!(addresses_of(&old, "u1"), [Ipv4Addr::from(A)]);
        let young = resolve(&[record("cart-0", "u2", 9, &[])], &[result("cart-0", "", 2, A)]);
        assert!(addresses_of(&young, "u2").is_empty());
    }

    #[test]
    fn a_reused_address_belongs_to_the_newer_pod() {
        let pods = [record("old", "u1", 1, &[A]), record("new", "u2", 5, &[A])];
        let pods = resolve(&pods, &[]);
        assert!(addresses_of(&pods, "u1").is_empty());
        assert_eq!(addresses_of(&pods, "u2"), [Ipv4Addr::from(A)]);
    }

    #[test]
    fn an_address_given_to_a_pod_not_yet_watched_is_nobodys() {
        let pods = resolve(&[record("old", "u1", 1, &[A])], &[result("new", "u2", 5, A)]);
        assert!(addresses_of(&pods, "u1").is_empty());
    }

    #[test]
    fn a_result_that_was_left_behind_does_not_take_the_address_of_a_later_pod() {
        let pods = resolve(&[record("new", "u2", 5, &[A])], &[result("gone", "u1", 2, A)]);
        assert_eq!(addresses_of(&pods, "u2"), [Ipv4Addr::from(A)]);
    }

    #[test]
    fn a_finished_pod_frees_its_address() {
        let finished = PodRecord { finished: true, ..record("job", "u1", 9, &[A]) };
        let pods = resolve(&[finished, record("new", "u2", 5, &[A])], &[result("job", "u1", 9, A)]);
        assert_eq!(pods.len(), 1);
        assert_eq!(addresses_of(&pods, "u2"), [Ipv4Addr::from(A)]);
    }

    #[test]
    fn pods_of_the_host_network_own_no_address() {
        let host = PodRecord { host_network: true, ..record("agent", "u1", 1, &[[192, 0, 2, 1]]) };
        assert!(addresses_of(&resolve(&[host], &[]), "u1").is_empty());
    }

    #[test]
    fn a_missing_folder_is_an_empty_cache() {
        assert!(read_cache(Path::new("/nonexistent/cni")).unwrap().is_empty());
    }
}
