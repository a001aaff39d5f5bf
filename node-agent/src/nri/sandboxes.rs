//! What the runtime says of sandboxes, and what the data plane knows of them. The session writes the former, the controller the
//! latter; who has to wait compares.

use super::messages::PodSandbox;
use crate::cni::CniResult;
use aegis_common::incarnation;
use aegis_core::model::Seconds;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Annotation that kubelet gives pods: where their manifest comes from.
const SOURCE: &str = "kubernetes.io/config.source";
/// For so long it is remembered at least that an address is a pod's no more: the API server may name it late.
const REMEMBERED: Seconds = 60;

/// An address, and the UID of a pod whose own it is no more.
pub type Ended = BTreeSet<(IpAddr, String)>;

/// What the runtime says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Sandboxes with addresses.
    pub sandboxes: Vec<CniResult>,
    /// Addresses that pods have no longer.
    pub ended: Ended,
}

/// Whether the runtime waits for this agent before it starts a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Hook {
    /// That is not wanted.
    #[default]
    Off,
    /// Its socket is not there, as with runtimes that have no such interface, or where it is switched off.
    NoSocket,
    /// There is no connection, with the reason.
    Lost(String),
    /// It does; with its name and version.
    Connected(String),
}

/// A pod's right to addresses, as the data plane would know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Naming {
    addresses: Vec<IpAddr>,
    incarnation: u32,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The data plane knows.
    InForce,
    /// It did not in time.
    Late,
    /// Nothing will come of waiting: the programs are not loaded, or pods cannot be watched.
    Unable,
}

impl Outcome {
    /// In the words of the metric.
    pub fn word(self) -> &'static str {
        match self {
            Outcome::InForce => "in_force",
            Outcome::Late => "late",
            Outcome::Unable => "unable",
        }
    }
}

/// What the data plane knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Which incarnation each address of a local pod belongs to.
    pub addresses: BTreeMap<IpAddr, u32>,
    /// It can come to know more at present.
    pub able: bool,
}

impl Known {
    fn has(&self, naming: &Naming) -> bool {
        naming.addresses.iter().all(|own| self.addresses.get(own) == Some(&naming.incarnation))
    }

    fn has_nothing_of(&self, naming: &Naming) -> bool {
        naming.addresses.iter().all(|own| self.addresses.get(own) != Some(&naming.incarnation))
    }
}

#[derive(Debug, Default)]
struct State {
    /// By the sandbox's id.
    sandboxes: BTreeMap<String, CniResult>,
    ended: BTreeMap<(IpAddr, String), Seconds>,
    hook: Hook,
}

impl State {
    fn claimed(&self, address: IpAddr, uid: &str) -> bool {
        self.sandboxes.values().any(|it| it.uid == uid && it.addresses.contains_key(&address))
    }

    fn start(&mut self, pod: &PodSandbox, addresses: &[IpAddr], now: Seconds) {
        for address in addresses {
            self.ended.remove(&(*address, pod.uid.clone()));
        }
        let result = CniResult {
            account: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            // The runtime does not tell the device's: the cache of the CNI library may.
            addresses: addresses.iter().map(|address| (*address, [0; 6])).collect(),
            written: now,
        };
        self.sandboxes.insert(pod.id.clone(), result);
    }
}

/// Shared by the session, the controller and whoever waits.
#[derive(Clone, Debug)]
pub struct Sandboxes {
    state: Arc<Mutex<State>>,
    known: Arc<watch::Sender<Known>>,
}

impl Default for Sandboxes {
    fn default() -> Sandboxes {
        Sandboxes { state: Arc::default(), known: Arc::new(watch::Sender::new(Known::default())) }
    }
}

impl Sandboxes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sandbox has its network, and no container yet. What there is to wait for, if anything.
    pub fn started(&self, pod: &PodSandbox, now: Seconds) -> Option<Naming> {
        let addresses = addresses(pod);
        if addresses.is_empty() {
            // It has the host's, and is known by its control group.
            return None;
        }
        self.lock().start(pod, &addresses, now);
        // The API knows a pod of kubelet's own by another UID, and perhaps after it has started: until then it is held.
        let of_api = pod.annotations.get(SOURCE).is_none_or(|source| source == "api");
        of_api.then(|| Naming { addresses, incarnation: incarnation(&pod.uid) })
    }

    /// A sandbox has ended and its addresses are about to be given back. What there is to wait for, if anything.
    pub fn stopped(&self, pod: &PodSandbox, now: Seconds) -> Option<Naming> {
        let mut state = self.lock();
        let last = state.sandboxes.remove(&pod.id);
        let mut own = addresses(pod);
        own.extend(last.iter().flat_map(|it| it.addresses.keys()));
        own.sort_unstable();
        own.dedup();
        // A stop may be told again when the pod has another sandbox.
        own.retain(|address| !state.claimed(*address, &pod.uid));
        for address in &own {
            state.ended.insert((*address, pod.uid.clone()), now);
        }
        (!own.is_empty()).then(|| Naming { addresses: own, incarnation: incarnation(&pod.uid) })
    }

    /// A sandbox is gone.
    pub fn removed(&self, pod: &PodSandbox) {
        self.lock().sandboxes.remove(&pod.id);
    }

    /// These are all sandboxes that there are.
    pub fn replaced(&self, pods: &[PodSandbox], now: Seconds) {
        let mut state = self.lock();
        let before = std::mem::take(&mut state.sandboxes);
        for pod in pods.iter().filter(|pod| pod.lives()) {
            let addresses = addresses(pod);
            if !addresses.is_empty() {
                let since = before.get(&pod.id).map_or(now, |it| it.written);
                state.start(pod, &addresses, since);
            }
        }
    }

    /// How the connection to the runtime is.
    pub fn set_hook(&self, hook: Hook) {
        self.lock().hook = hook;
    }

    /// How the connection to the runtime is.
    pub fn hook(&self) -> Hook {
        self.lock().hook.clone()
    }

    /// What the runtime says. `is_named` tells of a UID whether anybody else still speaks of the pod: if not, there is no
    /// claim to an address that would have to be denied.
    pub fn told(&self, is_named: impl Fn(&str) -> bool, now: Seconds) -> Told {
        let mut state = self.lock();
        state.ended.retain(|(_, uid), since| now.saturating_sub(*since) < REMEMBERED || is_named(uid));
        Told {
            sandboxes: state.sandboxes.values().cloned().collect(),
            ended: state.ended.keys().cloned().collect(),
        }
    }

    /// Says what the data plane knows now.
    pub fn publish(&self, known: impl FnOnce(&mut Known) -> bool) {
        self.known.send_if_modified(known);
    }

    /// Waits until the data plane knows that the pod has its addresses.
    pub async fn in_force(&self, naming: &Naming, limit: Duration) -> Outcome {
        self.wait(|known| known.has(naming), limit).await
    }

    /// Waits until it knows that the pod does not have them any more.
    pub async fn over(&self, naming: &Naming, limit: Duration) -> Outcome {
        self.wait(|known| known.has_nothing_of(naming), limit).await
    }

    async fn wait(&self, done: impl Fn(&Known) -> bool, limit: Duration) -> Outcome {
        let mut known = self.known.subscribe();
        let end = known.wait_for(|known| done(known) || !known.able);
        match tokio::time::timeout(limit, end).await {
            Ok(Ok(known)) if done(&known) => Outcome::InForce,
            Ok(_) => Outcome::Unable,
            Err(_) => Outcome::Late,
        }
    }
}

fn addresses(pod: &PodSandbox) -> Vec<IpAddr> {
    pod.ips.iter().filter_map(|address| address.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const A: &str = "10.244.1.7";

    fn pod(id: &str, uid: &str, ips: &[&str]) -> PodSandbox {
        PodSandbox {
            id: id.into(),
            uid: uid.into(),
            name: "cart-0".into(),
            namespace: "shop".into(),
            pid: 7,
            ips: ips.iter().map(|ip| (*ip).to_owned()).collect(),
            ..PodSandbox::default()
        }
    }

    fn told(sandboxes: &Sandboxes) -> (Vec<String>, Vec<String>) {
        let told = sandboxes.told(|_| true, 0);
        (
            told.sandboxes.into_iter().map(|it| it.uid).collect(),
            told.ended.into_iter().map(|(_, uid)| uid).collect(),
        )
    }

    fn knows(uid: Option<&str>, able: bool) -> impl FnOnce(&mut Known) -> bool {
        let addresses = uid.map(|uid| (A.parse().unwrap(), incarnation(uid))).into_iter().collect();
        move |known| {
            *known = Known { addresses, able };
            true
        }
    }

    #[test]
    fn a_stopped_pod_has_no_claim_until_it_starts_again() {
        let sandboxes = Sandboxes::default();
        assert!(sandboxes.started(&pod("s1", "u1", &[A]), 5).is_some());
        assert_eq!(told(&sandboxes), (vec!["u1".into()], vec![]));
        assert!(sandboxes.stopped(&pod("s1", "u1", &[A]), 6).is_some());
        assert_eq!(told(&sandboxes), (vec![], vec!["u1".into()]));
        sandboxes.started(&pod("s2", "u1", &[A]), 7);
        assert_eq!(told(&sandboxes), (vec!["u1".into()], vec![]));
        // The first one's stop, told once more, and its end.
        assert_eq!(sandboxes.stopped(&pod("s1", "u1", &[A]), 8), None);
        sandboxes.removed(&pod("s1", "u1", &[A]));
        assert_eq!(told(&sandboxes), (vec!["u1".into()], vec![]));
    }

    #[test]
    fn the_addresses_of_a_stopped_pod_are_those_that_it_started_with() {
        let sandboxes = Sandboxes::default();
        let started = sandboxes.started(&pod("s1", "u1", &[A]), 5);
        assert_eq!(sandboxes.stopped(&pod("s1", "u1", &[]), 6), started);
        assert_eq!(sandboxes.stopped(&pod("s9", "u9", &[]), 6), None);
    }

    #[test]
    fn what_has_ended_is_forgotten_when_nobody_speaks_of_it() {
        let sandboxes = Sandboxes::default();
        sandboxes.stopped(&pod("s1", "u1", &[A]), 100);
        assert_eq!(sandboxes.told(|_| false, 100 + REMEMBERED - 1).ended.len(), 1);
        assert_eq!(sandboxes.told(|uid| uid == "u1", 100 + REMEMBERED).ended.len(), 1);
        assert_eq!(sandboxes.told(|_| false, 100 + REMEMBERED).ended.len(), 0);
    }

    #[test]
    fn a_list_of_all_leaves_out_the_dead_and_forgets_the_rest() {
        let sandboxes = Sandboxes::default();
        sandboxes.started(&pod("s1", "u1", &[A]), 5);
        sandboxes.started(&pod("s2", "u2", &["10.244.1.8"]), 6);
        let dead = PodSandbox { pid: 0, ..pod("s3", "u3", &["10.244.1.8"]) };
        sandboxes.replaced(&[pod("s2", "u2", &["10.244.1.8"]), dead, pod("host", "u4", &[])], 9);
        let told = sandboxes.told(|_| true, 9).sandboxes;
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].uid.as_str(), told[0].written), ("u2", 6), "it has not begun anew");
    }

    #[test]
    fn nobody_waits_for_pods_of_the_host_network_nor_for_those_of_kubelet() {
        let sandboxes = Sandboxes::default();
        assert_eq!(sandboxes.started(&pod("s1", "u1", &[]), 5), None);
        let from = |source: &str| PodSandbox {
            annotations: HashMap::from([(SOURCE.into(), source.into())]),
            ..pod("s2", "u2", &[A])
        };
        assert_eq!(sandboxes.started(&from("file"), 5), None);
        assert!(sandboxes.started(&from("api"), 5).is_some());
    }

    #[tokio::test]
    async fn a_wait_ends_when_the_data_plane_knows_or_cannot_or_in_time() {
        let sandboxes = Sandboxes::default();
        let (limit, long) = (Duration::from_millis(20), Duration::from_secs(60));
        let naming = sandboxes.started(&pod("s1", "u1", &[A]), 5).unwrap();
        assert_eq!(sandboxes.in_force(&naming, long).await, Outcome::Unable);
        sandboxes.publish(knows(Some("u0"), true));
        assert_eq!(sandboxes.in_force(&naming, limit).await, Outcome::Late, "that is another pod's");
        let waiting = tokio::spawn({
            let (sandboxes, naming) = (sandboxes.clone(), naming.clone());
            async move { sandboxes.in_force(&naming, long).await }
        });
        tokio::time::sleep(limit).await;
        assert!(!waiting.is_finished());
        sandboxes.publish(knows(Some("u1"), true));
        assert_eq!(waiting.await.unwrap(), Outcome::InForce);
        assert_eq!(sandboxes.over(&naming, limit).await, Outcome::Late);
        sandboxes.publish(knows(None, false));
        assert_eq!(sandboxes.over(&naming, limit).await, Outcome::InForce);
    }
}
