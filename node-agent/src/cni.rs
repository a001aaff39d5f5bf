//! The cache of the CNI library: one file for each network of each sandbox, written before a container of the pod runs.

use aegis_core::model::Seconds;
use futures::StreamExt;
use inotify::{Inotify, WatchMask};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

/// A result of the CNI library: a sandbox was given addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CniResult {
    /// Namespace of the pod.
    pub account: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the pod; empty where the runtime does not pass it.
    pub uid: String,
    /// IPv4 addresses, with the MAC of the pod's device; all zero where the plugins do not tell it.
    pub addresses: BTreeMap<IpAddr, [u8; 6]>,
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
    interfaces: Vec<CacheInterface>,
    #[serde(default)]
    ips: Vec<CacheAddress>,
}

#[derive(Deserialize)]
struct CacheInterface {
    #[serde(default)]
    mac: String,
    /// Empty for devices on the node's side.
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct CacheAddress {
    address: String,
    /// Which of the interfaces has it.
    #[serde(default)]
    interface: Option<usize>,
}

impl CacheResult {
    fn mac(&self, ip: &CacheAddress) -> [u8; 6] {
        let interface = ip.interface.and_then(|index| self.interfaces.get(index));
        let inside = interface.filter(|interface| !interface.sandbox.is_empty());
        inside.and_then(|interface| parse_mac(&interface.mac)).unwrap_or_default()
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let octets: Option<Vec<u8>> = text.split(':').map(|octet| u8::from_str_radix(octet, 16).ok()).collect();
    octets?.try_into().ok()
}

/// Reads one cache file. `None` if it does not belong to a pod or gives it no address.
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
            .flat_map(|result| result.ips.iter().map(|ip| (ip, result.mac(ip))))
            .filter_map(|(ip, mac)| Some((ip.address.split('/').next()?.parse().ok()?, mac)))
            .filter(|(address, _): &(IpAddr, _)| !address.is_loopback())
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
    results.sort_by(|a, b| {
        (&a.account, &a.name, &a.uid, a.written).cmp(&(&b.account, &b.name, &b.uid, b.written))
    });
    Ok(results)
}

/// Calls `changed` whenever a file of the folder has been written or removed. Waits for the folder if need be.
pub async fn watch_cache(folder: &Path, changed: impl Fn()) {
    loop {
        if let Err(error) = watch_once(folder, &changed).await {
            tracing::debug!(folder = %folder.display(), %error, "cannot watch the CNI results (yet)");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        changed();
    }
}

/// Ends when the folder is removed.
async fn watch_once(folder: &Path, changed: &impl Fn()) -> std::io::Result<()> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::DELETE | WatchMask::DELETE_SELF;
    inotify.watches().add(folder, mask | WatchMask::ONLYDIR)?;
    let mut events = inotify.into_event_stream([0; 4096])?;
    changed();
    while let Some(event) = events.next().await {
        let event = event?;
        changed();
        if event.mask.contains(inotify::EventMask::IGNORED) {
            break;
        }
    }
    Ok(())
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

    #[test]
    fn reads_what_containerd_writes() {
        let expected = CniResult {
            account: "shop".into(),
            name: "cart-0".into(),
            uid: "u1".into(),
            addresses: ["10.244.1.7", "2001:db8::7"]
                .map(|it| (it.parse().unwrap(), [0xee, 0, 0, 0, 0, 3]))
                .into(),
            written: 5,
        };
        assert_eq!(parse(CONTAINERD.as_bytes(), 5).unwrap(), Some(expected));
        assert_eq!(parse(LOOPBACK.as_bytes(), 5).unwrap(), None);
        assert!(parse(&CONTAINERD.as_bytes()[..300], 5).is_err());
        assert_eq!(parse(br#"{"kind":"cniCacheV1"}"#, 5).unwrap(), None);
    }

    /// MAC of a pod's only address according to these parts of a result.
    fn mac(interfaces: &str, ip: &str) -> [u8; 6] {
        let file = format!(
            r#"{{"cniArgs":[["K8S_POD_NAME","cart-0"]],"result":{{{interfaces}"ips":[{{"address":"10.244.1.7/32"{ip}}}]}}}}"#
        );
        let result = parse(file.as_bytes(), 5).unwrap().unwrap();
        result.addresses[&IpAddr::from([10, 244, 1, 7])]
    }

    #[test]
    fn a_mac_counts_only_if_it_is_that_of_the_pods_own_device() {
        let inside = r#""interfaces":[{"mac":"ee:00:00:00:00:03","name":"eth0","sandbox":"/run/netns/a"}],"#;
        let outside = r#""interfaces":[{"mac":"ee:00:00:00:00:03","name":"cali7"}],"#;
        let without = r#""interfaces":[{"name":"eth0","sandbox":"/run/netns/a"}],"#;
        assert_eq!(mac(inside, r#","interface":0"#), [0xee, 0, 0, 0, 0, 3]);
        for (interfaces, ip) in [
            (inside, ""),
            (inside, r#","interface":1"#),
            (outside, r#","interface":0"#),
            (without, r#","interface":0"#),
            ("", r#","interface":0"#),
        ] {
            assert_eq!(mac(interfaces, ip), [0; 6], "{interfaces} {ip}");
        }
    }

    #[test]
    fn a_missing_folder_is_an_empty_cache() {
        assert!(read_cache(Path::new("/nonexistent/cni")).unwrap().is_empty());
    }

    #[test]
    fn a_new_file_is_noticed_also_if_the_folder_comes_later() {
        let folder = std::env::temp_dir().join(format!("aegis-cni-{}", std::process::id()));
        let (seen, notified) = std::sync::mpsc::channel();
        let watched = folder.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(watch_cache(&watched, || _ = seen.send(())));
        });
        std::fs::create_dir(&folder).unwrap();
        let patience = Duration::from_secs(10);
        notified.recv_timeout(patience).unwrap();
        std::fs::write(folder.join("lab-6b1d-eth0"), CONTAINERD).unwrap();
        loop {
            notified.recv_timeout(patience).unwrap();
            if read_cache(&folder).unwrap().len() == 1 {
                break;
            }
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
