//! The report of this node: the `EgressNode` object.

use crate::announce::Standing;
use crate::demand::Want;
use crate::desired::Desired;
use crate::limited::{PodId, Refusals};
use crate::metrics::Metrics;
use crate::nri::Hook;
use crate::observed::Observed;
use aegis_common::{RuleValue, WOULD_DENY, WOULD_LACK};
use aegis_core::egress::{Egress, Family};
use aegis_core::gateway::Load;
use aegis_core::model::AllocationName;
use aegis_core::policy::{Binding, EgressPolicy, Pod, RuleName};
use aegis_core::slice::SliceSet;
use aegis_crds::{
    AllocationRef, Condition, Demand, EgressNode, EgressNodeStatus, Limited, Observed as ObservedFlows,
    ProgrammedAddress, ProgrammedBinding, ProgrammedPolicy, SliceRange, UnresolvedHost, Uplink, type_,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, Resource};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Field manager of everything the agent applies.
pub const MANAGER: &str = "aegis-node-agent";
/// Shortest time between two writes.
const PAUSE: Duration = Duration::from_millis(500);
/// The same for what can wait, see [`can_wait`], for each node that there is: what one object changes on all nodes at once is
/// then told by 500 of them a second, however many there are.
const PAUSE_PER_NODE: Duration = Duration::from_millis(2);
/// A fill, in percent, that is this close to the one that was told is not told anew.
const FILL_STEP: u32 = 5;
/// Longest time of one call.
const TIMEOUT: Duration = Duration::from_secs(5);
/// What the schema takes of each list, and of a message.
const MAX_DEMAND: usize = 1024;
const MAX_BINDINGS: usize = 4096;
/// Entries of `status.policies`.
const MAX_POLICIES: usize = 1024;
const MAX_MESSAGE: usize = 4096;
/// Entries of `status.unresolved`, and bytes of why.
const MAX_UNRESOLVED: usize = 64;
const MAX_REASON: usize = 256;

/// Why the node is not ready, in the words of the condition.
pub mod reason {
    /// Everything is programmed.
    pub const READY: &str = "Ready";
    /// Not everything has been listed from the API server since the agent started.
    pub const WAITING: &str = "WaitingForObjects";
    /// The programs cannot be loaded.
    pub const LOAD_FAILED: &str = "DataplaneLoadFailed";
    /// No device leads out of the node, or the node has no internal IPv4 address.
    pub const NO_UPLINK: &str = "NoUplink";
    /// Nobody says which addresses pods of this node have, or too many ranges are named.
    pub const NO_POD_RANGE: &str = "NoPodRange";
    /// A program cannot be attached.
    pub const ATTACH_FAILED: &str = "AttachFailed";
    /// The nftables table cannot be written.
    pub const NFT_MISSING: &str = "NftMissing";
    /// A map write failed.
    pub const WRITE_FAILED: &str = "WriteFailed";
    /// Every table has room for what is wanted.
    pub const EVERYTHING_FITS: &str = "EverythingFits";
    /// A table has no room for what is wanted.
    pub const TABLE_FULL: &str = "TableFull";
    /// A policy cannot be read, and never could be.
    pub const POLICY_UNREADABLE: &str = "PolicyUnreadable";
    /// An application that a policy names cannot be read, and never could be.
    pub const APPLICATION_UNREADABLE: &str = "ApplicationUnreadable";
    /// A binding cannot be read, and never could be.
    pub const BINDING_UNREADABLE: &str = "BindingUnreadable";
    /// Flows that have ended cannot be removed.
    pub const SWEEP_FAILED: &str = "SweepFailed";
    /// The Lease is renewed.
    pub const RENEWED: &str = "Renewed";
    /// The Lease was taken over: this node counts as lost.
    pub const TAKEN_OVER: &str = "TakenOver";
    /// The Lease cannot be renewed.
    pub const NOT_RENEWED: &str = "NotRenewed";
    /// The Lease is there again; what the node held is being given up.
    pub const RETURNING: &str = "Returning";
    /// Established flows take the fast path.
    pub const FAST: &str = "EstablishedFlows";
    /// conntrack would take the end of a connection that it has not followed for invalid.
    pub const CONNTRACK_STRICT: &str = "ConntrackStrict";
    /// The container runtime waits for the data plane to know a pod.
    pub const RUNTIME_HOOK: &str = "RuntimeHook";
    /// The container runtime takes no plugins.
    pub const NO_RUNTIME_SOCKET: &str = "NoRuntimeSocket";
    /// There is no connection to the container runtime.
    pub const RUNTIME_LOST: &str = "RuntimeLost";
    /// Control groups of covered pods of the host network cannot be found.
    pub const GROUPS_UNKNOWN: &str = "GroupsUnknown";
    /// DNS queries of pods cannot be answered, or what is learned from answers cannot be kept.
    pub const NAMES_FAILED: &str = "NamesFailed";
    /// The kernel's network cannot be read.
    pub const NETWORK_UNKNOWN: &str = "NetworkUnknown";
}

/// Why the node is not ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotReady {
    /// Of [`reason`].
    pub reason: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
}

/// Everything that a report is made from.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// Tunnel address.
    pub tunnel_address: Option<Ipv4Addr>,
    /// Uplinks.
    pub uplinks: Vec<Uplink>,
    /// What should hold.
    pub desired: &'a Desired,
    /// What holds.
    pub observed: &'a Observed,
    /// All bindings.
    pub bindings: &'a [Binding],
    /// All policies.
    pub policies: &'a [EgressPolicy],
    /// Demand.
    pub wants: &'a BTreeMap<AllocationName, Want>,
    /// What limits have refused during the last minute.
    pub limited: &'a BTreeMap<AllocationName, Refusals>,
    /// The pods of this node.
    pub pods: &'a [Pod],
    /// Draining slices without flow.
    pub drained: &'a BTreeMap<Egress, SliceSet>,
    /// Policy in the data plane is that of `bindings` and `policies`.
    pub policy_in_force: bool,
    /// Readiness.
    pub ready: &'a Result<(), NotReady>,
    /// Whether everything has room, or else what has not and what to do.
    pub room: &'a Result<(), String>,
    /// How far the announcement has come, if there is anything to announce.
    pub announced: Option<&'a Standing>,
    /// Programs that know of deadlines are in force, not those of a version before.
    pub keeps_deadlines: bool,
    /// Whether the node's Lease is held, if it is needed.
    pub lease: Option<Result<(), NotReady>>,
    /// Whether the fast path is taken, if it is wanted.
    pub fast: Option<&'a Result<(), NotReady>>,
    /// Whether the container runtime waits for this agent, if it is to.
    pub hook: &'a Hook,
    /// The agent is being taken off the node.
    pub leaving: bool,
    /// Whether countries are known, if anybody asks: message and reason.
    pub countries: Option<&'a Result<(String, &'static str), NotReady>>,
    /// New flows by rule.
    pub tally: &'a BTreeMap<RuleName, RuleValue>,
    /// Host names without an address.
    pub unresolved: Vec<UnresolvedHost>,
}

/// The report, with a condition whose time is not set yet.
pub fn report(facts: &Facts<'_>) -> EgressNodeStatus {
    let ranges = |slices: SliceSet| -> Vec<SliceRange> {
        let range = |(first, last): (u8, u8)| SliceRange { first: first.into(), last: last.into() };
        slices.runs().into_iter().map(range).collect()
    };
    let observed = facts.observed;
    let v4 = observed.holdings.iter().map(|(own, it)| (observed.egress(*own), it.epoch, it.hard));
    let v6 = observed.networks.iter().map(|(own, it)| (*own, it.epoch, it.hard));
    // While IPv6 packets are not looked at nothing leaves over it, and what drains is empty.
    let works = |own: &Egress| {
        own.family() == Family::V4 || observed.config6.active == 1 || facts.drained.contains_key(own)
    };
    let addresses = v4.chain(v6).filter(|(own, ..)| works(own)).map(|(own, epoch, hard)| ProgrammedAddress {
        address: own.to_string(),
        epoch: i64::try_from(epoch).unwrap_or(i64::MAX),
        fenced: facts.keeps_deadlines && hard != 0,
        drained: ranges(facts.drained.get(&own).copied().unwrap_or_default()),
    });
    let addresses = addresses.collect();
    let demand = facts.wants.iter().take(MAX_DEMAND).map(|(name, want)| Demand {
        allocation: AllocationRef { namespace: name.account.clone(), name: name.name.clone() },
        slices: want.slices,
        fill_percent: want.fill_percent,
        refused: want.refused,
        reason: want.reason.to_owned(),
    });
    let limited = facts.limited.iter().take(MAX_DEMAND).map(|(name, refusals)| Limited {
        allocation: AllocationRef { namespace: name.account.clone(), name: name.name.clone() },
        pod_flows: refusals.pod_flows,
        pod_new_flows: refusals.pod_rate,
        account_flows: refusals.account_flows,
        account_new_flows: refusals.account_rate,
        pod: refusals.pod.and_then(|pod| pod_name(facts.pods, pod)).unwrap_or_default(),
    });
    let (status, reason, message) = match facts.ready {
        Ok(()) => ("True", reason::READY, "programs, policy and slices are in force".to_owned()),
        Err(not_ready) => ("False", not_ready.reason, not_ready.message.clone()),
    };
    EgressNodeStatus {
        tunnel_address: facts.tunnel_address.map(|address| address.to_string()).unwrap_or_default(),
        uplinks: facts.uplinks.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        leaving: facts.leaving,
        covered_pods: facts.desired.covered_pods,
        demand: demand.collect(),
        limited: limited.collect(),
        addresses,
        bindings: if facts.policy_in_force { bindings(facts) } else { Vec::new() },
        policies: if facts.policy_in_force { policies(facts) } else { Vec::new() },
        unresolved: unresolved(facts),
        conditions: [condition(type_::READY, status, reason, message), room(facts)]
            .into_iter()
            .chain(facts.announced.map(announced))
            .chain(facts.lease.as_ref().map(lease))
            .chain(facts.fast.map(fast))
            .chain(facts.countries.map(countries))
            .chain(hook(facts.hook))
            .collect(),
    }
}

/// Bindings that this node enforces. A report that is too long would be refused as a whole: those with pods here go first.
fn bindings(facts: &Facts<'_>) -> Vec<ProgrammedBinding> {
    let enforced = facts.bindings.iter().filter(|it| !facts.desired.refused.contains(&it.name.account));
    let programmed = enforced.map(|binding| ProgrammedBinding {
        namespace: binding.name.account.clone(),
        name: binding.name.name.clone(),
        generation: binding.generation,
        pods: pods(facts, &binding.name.clone().into()),
    });
    let mut bindings: Vec<ProgrammedBinding> = programmed.collect();
    if bindings.len() > MAX_BINDINGS {
        bindings.sort_by_key(|binding| binding.pods == 0);
        bindings.truncate(MAX_BINDINGS);
    }
    bindings
}

/// Policies that this node enforces.
fn policies(facts: &Facts<'_>) -> Vec<ProgrammedPolicy> {
    let programmed = facts.policies.iter().map(|policy| ProgrammedPolicy {
        name: policy.name.clone(),
        generation: policy.generation,
        pods: pods(facts, &RuleName::Policy(policy.name.clone())),
        observed: policy.observes.then(|| observed(facts, policy)),
    });
    let mut policies: Vec<ProgrammedPolicy> = programmed.collect();
    if policies.len() > MAX_POLICIES {
        policies.sort_by_key(|policy| policy.pods == 0);
        policies.truncate(MAX_POLICIES);
    }
    policies
}

/// What a policy that only observes would have done.
fn observed(facts: &Facts<'_>, policy: &EgressPolicy) -> ObservedFlows {
    let value = facts.tally.get(&RuleName::Policy(policy.name.clone())).copied().unwrap_or_default();
    let of = |what: u32| value.would[what as usize];
    ObservedFlows { flows: value.would.iter().sum(), refused: of(WOULD_LACK) + of(WOULD_DENY) }
}

/// Host names without an address; a report that is too long would be refused as a whole.
fn unresolved(facts: &Facts<'_>) -> Vec<UnresolvedHost> {
    let entry = |it: &UnresolvedHost| {
        let mut it = it.clone();
        it.message.truncate(it.message.floor_char_boundary(MAX_REASON));
        it
    };
    facts.unresolved.iter().take(MAX_UNRESOLVED).map(entry).collect()
}

/// Local pods that a rule covers.
fn pods(facts: &Facts<'_>, rule: &RuleName) -> u32 {
    facts.desired.covered.get(rule).copied().unwrap_or(0)
}

fn room(facts: &Facts<'_>) -> Condition {
    match facts.room {
        Ok(()) => {
            condition(type_::WITHIN_LIMITS, "True", reason::EVERYTHING_FITS, "everything has room".to_owned())
        }
        Err(message) => condition(type_::WITHIN_LIMITS, "False", reason::TABLE_FULL, message.clone()),
    }
}

fn announced(standing: &Standing) -> Condition {
    let status = if standing.good { "True" } else { "False" };
    condition(type_::ANNOUNCED, status, standing.reason, standing.message.clone())
}

fn lease(held: &Result<(), NotReady>) -> Condition {
    match held {
        Ok(()) => {
            condition(type_::LEASE_HELD, "True", reason::RENEWED, "the node's Lease is renewed".to_owned())
        }
        Err(why) => condition(type_::LEASE_HELD, "False", why.reason, why.message.clone()),
    }
}

fn fast(taken: &Result<(), NotReady>) -> Condition {
    match taken {
        Ok(()) => {
            let message = "packets of established IPv4 flows pass by the host stack";
            condition(type_::FAST_PATH, "True", reason::FAST, message.to_owned())
        }
        Err(why) => condition(type_::FAST_PATH, "False", why.reason, why.message.clone()),
    }
}

fn countries(known: &Result<(String, &'static str), NotReady>) -> Condition {
    match known {
        Ok((message, reason)) => condition(type_::COUNTRIES_KNOWN, "True", reason, message.clone()),
        Err(why) => condition(type_::COUNTRIES_KNOWN, "False", why.reason, why.message.clone()),
    }
}

fn hook(hook: &Hook) -> Option<Condition> {
    let until = "until the data plane knows a pod, what it sends out of the cluster is held (unknownPods)";
    let (status, reason, message) = match hook {
        Hook::Off => return None,
        Hook::Connected(runtime) => {
            ("True", reason::RUNTIME_HOOK, format!("{runtime} starts a pod once the data plane knows it"))
        }
        Hook::NoSocket => (
            "False",
            reason::NO_RUNTIME_SOCKET,
            format!(
                "the container runtime has no socket for plugins (NRI; agent.nri.socketPath): pods are named by the results of the CNI \
                 library, and do not wait; {until}"
            ),
        ),
        Hook::Lost(why) => (
            "False",
            reason::RUNTIME_LOST,
            format!(
                "no connection to the container runtime, trying again ({why}): pods are named by the results of the CNI library, and do \
                 not wait; {until}"
            ),
        ),
    };
    Some(condition(type_::PODS_WAIT, status, reason, message))
}

fn condition(type_: &str, status: &str, reason: &str, mut message: String) -> Condition {
    message.truncate(message.floor_char_boundary(MAX_MESSAGE));
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        observed_generation: None,
        last_transition_time: Time(Timestamp::UNIX_EPOCH),
    }
}

/// Gives each condition the time of its last change of status: the former one's if the status is the same.
fn date(mut status: EgressNodeStatus, former: Option<&EgressNodeStatus>, now: Timestamp) -> EgressNodeStatus {
    for condition in &mut status.conditions {
        let before =
            former.into_iter().flat_map(|former| &former.conditions).find(|c| c.type_ == condition.type_);
        let kept = before.filter(|before| before.status == condition.status);
        condition.last_transition_time = kept.map_or(Time(now), |before| before.last_transition_time.clone());
    }
    status
}

/// Tells usage as it was told before as long as that is near enough for those who read it: the operator tells it in coarse
/// steps, and other agents only want to know whether there is room.
fn settle(mut status: EgressNodeStatus, former: &EgressNodeStatus) -> EgressNodeStatus {
    let told: HashMap<_, _> = former.demand.iter().map(|it| (key(&it.allocation), it)).collect();
    for demand in &mut status.demand {
        let Some(told) = told.get(&key(&demand.allocation)) else { continue };
        let load = |it: &Demand| (Load::of(it.fill_percent, it.refused), it.fill_percent >= 100);
        let near = demand.fill_percent.abs_diff(told.fill_percent) < FILL_STEP
            && is_near(demand.refused, told.refused);
        if near && load(demand) == load(told) {
            (demand.fill_percent, demand.refused) = (told.fill_percent, told.refused);
        }
    }
    let told: HashMap<_, _> = former.limited.iter().map(|it| (key(&it.allocation), it)).collect();
    for limited in &mut status.limited {
        if let Some(told) = told.get(&key(&limited.allocation))
            && limited.pod == told.pod
            && counts(limited).into_iter().zip(counts(told)).all(|(now, told)| is_near(now, told))
        {
            *limited = (*told).clone();
        }
    }
    let told: HashMap<_, _> = former.policies.iter().map(|it| (&it.name, it.observed)).collect();
    for policy in &mut status.policies {
        if let Some(Some(told)) = told.get(&policy.name)
            && let Some(now) = policy.observed
            && is_near_count(now.flows, told.flows)
            && is_near_count(now.refused, told.refused)
        {
            policy.observed = Some(*told);
        }
    }
    status
}

/// Whether a count that only rises is near enough to the one that was told: the larger, the coarser.
fn is_near_count(now: u64, told: u64) -> bool {
    now >= told && now - told <= told / 4
}

/// Whether a number of refusals is near enough to the one that was told.
fn is_near(now: u32, told: u32) -> bool {
    now <= told.saturating_mul(2) && now >= told.div_ceil(2)
}

/// Namespace and name of the pod that the programs know by this. (It may just have gone.)
fn pod_name(pods: &[Pod], (address, incarnation): PodId) -> Option<String> {
    let is_it = |pod: &&Pod| {
        // In the host network it is the node's address, whatever the pod's status says.
        aegis_common::incarnation(&pod.uid) == incarnation
            // Over IPv6 it is no address, but the pod's suffix.
            && (pod.host_network
                || pod.addresses.contains(&IpAddr::V4(address))
                || pod.addresses.iter().any(IpAddr::is_ipv6))
    };
    pods.iter().find(is_it).map(|pod| format!("{}/{}", pod.account, pod.name))
}

fn counts(limited: &Limited) -> [u32; 4] {
    [limited.pod_flows, limited.pod_new_flows, limited.account_flows, limited.account_new_flows]
}

fn key(allocation: &AllocationRef) -> (&str, &str) {
    (&allocation.namespace, &allocation.name)
}

/// Whether nobody waits for what is new in a report: how full ports are, and up to which epoch addresses are programmed. (Of
/// slices that are to go to others it is told at once that they are empty.)
fn can_wait(a: &EgressNodeStatus, b: &EgressNodeStatus) -> bool {
    let demand = |it: &Demand| (it.allocation.clone(), it.slices, it.reason.clone(), it.refused > 0);
    let limited = |it: &Limited| (it.allocation.clone(), counts(it).map(|count| count > 0));
    let address = |it: &ProgrammedAddress| (it.address.clone(), it.fenced, it.drained.clone());
    let policy =
        |it: &ProgrammedPolicy| (it.name.clone(), it.generation, it.pods, it.observed.map(|it| it.flows > 0));
    let rest = |it: &EgressNodeStatus| EgressNodeStatus {
        policies: Vec::new(),
        demand: Vec::new(),
        limited: Vec::new(),
        addresses: Vec::new(),
        ..it.clone()
    };
    a.limited.iter().map(limited).eq(b.limited.iter().map(limited))
        && a.demand.iter().map(demand).eq(b.demand.iter().map(demand))
        && a.policies.iter().map(policy).eq(b.policies.iter().map(policy))
        && a.addresses.iter().map(address).eq(b.addresses.iter().map(address))
        && rest(a) == rest(b)
}

/// Shortest time between two writes, by what is new and how many nodes there are.
fn pause(can_wait: bool, nodes: usize) -> Duration {
    let long = PAUSE_PER_NODE.saturating_mul(u32::try_from(nodes).unwrap_or(u32::MAX));
    if can_wait { long.max(PAUSE) } else { PAUSE }
}

/// Who the report belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Name of the node.
    pub node: String,
    /// UID of the Node object, once known.
    pub uid: String,
}

/// A report to be written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pending {
    /// Whose.
    pub identity: Identity,
    /// The object is there, as far as the watch has told.
    pub present: bool,
    /// What; its conditions carry no time yet. `None` until the agent knows enough.
    pub status: Option<EgressNodeStatus>,
    /// How many nodes there are.
    pub nodes: usize,
}

/// Writes reports as they come: only changes, at most about two a second, the latest one only; changes for which nobody waits
/// less often. Ends with the sender.
pub async fn write(client: Client, metrics: Metrics, mut pending: watch::Receiver<Pending>) {
    let api: Api<EgressNode> = Api::all(client);
    let mut written: Option<EgressNodeStatus> = None;
    let mut last: Option<Instant> = None;
    let mut failures = 0u32;
    while pending.changed().await.is_ok() {
        loop {
            let Pending { identity, present, status: Some(status), nodes } =
                pending.borrow_and_update().clone()
            else {
                break;
            };
            if identity.uid.is_empty() {
                break;
            }
            if !present {
                written = None;
            }
            let status = match &written {
                Some(written) => settle(status, written),
                None => status,
            };
            let status = date(status, written.as_ref(), Timestamp::now());
            if written.as_ref() == Some(&status) {
                break;
            }
            let can_wait = written.as_ref().is_some_and(|written| can_wait(written, &status));
            if let Some(at) = last.map(|last| last + pause(can_wait, nodes))
                && Instant::now() < at
            {
                // Something newer, and perhaps urgent, may come meanwhile.
                tokio::select! {
                    () = tokio::time::sleep_until(at) => {}
                    changed = pending.changed() => {
                        if changed.is_err() { return }
                        continue;
                    }
                }
            }
            let result =
                tokio::time::timeout(TIMEOUT, write_once(&api, &identity, &status, written.is_none())).await;
            last = Some(Instant::now());
            match result {
                Ok(Ok(status)) => {
                    failures = 0;
                    written = Some(status);
                    break;
                }
                failure => {
                    let error = match failure {
                        Ok(Err(error)) => error.to_string(),
                        _ => "no answer in time".to_owned(),
                    };
                    if failures == 0 {
                        tracing::warn!(error, "cannot write the EgressNode status; trying again");
                    }
                    failures = failures.saturating_add(1);
                    metrics.report_failed();
                    // Whatever was written last may be gone with the object.
                    written = None;
                    tokio::time::sleep(Duration::from_millis(500 * u64::from(failures.min(6)))).await;
                }
            }
        }
    }
}

async fn write_once(
    api: &Api<EgressNode>,
    identity: &Identity,
    status: &EgressNodeStatus,
    first: bool,
) -> Result<EgressNodeStatus, kube::Error> {
    let parameters = PatchParams::apply(MANAGER).force();
    let mut status = status.clone();
    if first {
        let object = json!({
            "apiVersion": EgressNode::api_version(&()),
            "kind": EgressNode::kind(&()),
            "metadata": { "name": identity.node, "ownerReferences": [{
                "apiVersion": "v1", "kind": "Node", "name": identity.node, "uid": identity.uid,
            }]},
            "spec": {},
        });
        let existing = api.patch(&identity.node, &parameters, &Patch::Apply(object)).await?;
        // A restarted agent keeps the times that the object has.
        status = date(status, existing.status.as_ref(), Timestamp::now());
        if existing.status.as_ref() == Some(&status) {
            return Ok(status);
        }
    }
    let object = json!({
        "apiVersion": EgressNode::api_version(&()),
        "kind": EgressNode::kind(&()),
        "status": status,
    });
    api.patch_status(&identity.node, &parameters, &Patch::Apply(object)).await?;
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_common::{HoldingValue, NetworkValue};
    use aegis_core::policy::BindingName;
    use std::sync::LazyLock;

    fn status(ready: &Result<(), NotReady>) -> EgressNodeStatus {
        report(&facts(ready))
    }

    fn facts(ready: &Result<(), NotReady>) -> Facts<'_> {
        type Nothing = (
            Desired,
            Observed,
            BTreeMap<AllocationName, Want>,
            BTreeMap<Egress, SliceSet>,
            BTreeMap<AllocationName, Refusals>,
            BTreeMap<RuleName, RuleValue>,
        );
        static NOTHING: LazyLock<Nothing> = LazyLock::new(Default::default);
        Facts {
            tunnel_address: Some(Ipv4Addr::new(192, 0, 2, 1)),
            uplinks: Vec::new(),
            desired: &NOTHING.0,
            observed: &NOTHING.1,
            bindings: &[],
            policies: &[],
            wants: &NOTHING.2,
            limited: &NOTHING.4,
            pods: &[],
            drained: &NOTHING.3,
            policy_in_force: true,
            ready,
            room: &Ok(()),
            announced: None,
            keeps_deadlines: true,
            lease: None,
            fast: None,
            hook: &Hook::Off,
            leaving: false,
            countries: None,
            tally: &NOTHING.5,
            unresolved: Vec::new(),
        }
    }

    #[test]
    fn what_is_observed_is_told_in_coarse_steps() {
        let policy = |observes| EgressPolicy {
            name: "p".into(),
            precedence: 1,
            identity: Default::default(),
            posture: Default::default(),
            sources: Vec::new(),
            cidrs: Vec::new(),
            countries: Vec::new(),
            applications: Vec::new(),
            hosts: Vec::new(),
            ports: Vec::new(),
            exit: aegis_core::policy::Exit::Deny,
            observes,
            generation: 3,
        };
        let told = |observes, would| {
            let value = RuleValue { would, ..RuleValue::default() };
            let tally = [(RuleName::Policy("p".into()), value)].into();
            report(&Facts { policies: &[policy(observes)], tally: &tally, ..facts(&Ok(())) })
        };
        assert_eq!(told(false, [1, 2, 3, 4]).policies[0].observed, None, "it decides");
        let before = told(true, [10, 20, 30, 40]);
        let observed =
            |status: &EgressNodeStatus| status.policies[0].observed.map(|it| (it.flows, it.refused));
        assert_eq!(observed(&before), Some((100, 60)));
        for (would, expected) in
            [([10, 20, 30, 50], (100, 60)), ([10, 20, 30, 70], (130, 90)), ([0, 0, 0, 1], (1, 1))]
        {
            assert_eq!(observed(&settle(told(true, would), &before)), Some(expected));
        }
        assert!(can_wait(&before, &told(true, [10, 20, 30, 70])));
    }

    #[test]
    fn countries_have_a_condition_where_somebody_asks() {
        let of = |countries| {
            let conditions = report(&Facts { countries, ..facts(&Ok(())) }).conditions;
            let found = conditions.into_iter().find(|it| it.type_ == type_::COUNTRIES_KNOWN);
            found.map(|it| (it.status, it.reason, it.message))
        };
        assert_eq!(of(None), None);
        let text = |texts: [&str; 3]| Some((texts[0].into(), texts[1].into(), texts[2].into()));
        let read = Ok(("built".to_owned(), aegis_crds::reason::DATABASE_READ));
        assert_eq!(of(Some(&read)), text(["True", "DatabaseRead", "built"]));
        let not = NotReady { reason: aegis_crds::reason::NO_DATABASE, message: "why".into() };
        assert_eq!(of(Some(&Err(not))), text(["False", "NoDatabase", "why"]));
    }

    fn binding(account: &str, name: String) -> Binding {
        Binding {
            name: BindingName { account: account.into(), name },
            allocation: AllocationName { account: account.into(), name: "main".into() },
            enabled: true,
            workloads: Default::default(),
            cidrs: Vec::new(),
            ports: Vec::new(),
            hosts: Vec::new(),
            use_node_address: false,
            binds: false,
            generation: 3,
        }
    }

    #[test]
    fn a_report_is_never_longer_than_the_schema_takes() {
        let bindings: Vec<Binding> =
            (0..5000).map(|number| binding("shop", format!("b{number:04}"))).collect();
        let covered = [(bindings[4999].name.clone().into(), 2)].into();
        let desired = Desired { covered, ..Desired::default() };
        let message = Err("ä".repeat(5000));
        let status =
            report(&Facts { desired: &desired, bindings: &bindings, room: &message, ..facts(&Ok(())) });
        assert_eq!(status.bindings.len(), 4096);
        assert_eq!((status.bindings[0].name.as_str(), status.bindings[0].pods), ("b4999", 2));
        assert_eq!(status.bindings[1].name, "b0000");
        assert_eq!(status.conditions[1].message.len(), 4096);
    }

    #[test]
    fn a_64_is_programmed_when_packets_are_looked_at() {
        let network: Egress = "2001:db8:1:2::/64".parse().unwrap();
        let value = NetworkValue { epoch: 7, hard: 60, ..NetworkValue::default() };
        let mut observed = Observed { networks: [(network, value)].into(), ..Observed::default() };
        let told = |observed: &Observed, drained: &BTreeMap<Egress, SliceSet>| {
            report(&Facts { observed, drained, ..facts(&Ok(())) }).addresses
        };
        let drained = [(network, SliceSet::range(5, 5))].into();
        let expected = |drained: &[SliceRange]| ProgrammedAddress {
            address: "2001:db8:1:2::/64".into(),
            epoch: 7,
            fenced: true,
            drained: drained.to_vec(),
        };
        let empty = [SliceRange { first: 5, last: 5 }];
        assert_eq!(told(&observed, &BTreeMap::new()), []);
        assert_eq!(told(&observed, &drained), [expected(&empty)], "nothing leaves from it");
        observed.config6.active = 1;
        assert_eq!(told(&observed, &BTreeMap::new()), [expected(&[])]);
        assert_eq!(told(&observed, &drained), [expected(&empty)]);
    }

    #[test]
    fn only_programs_that_know_of_deadlines_keep_them() {
        let mut observed = Observed::default();
        for (last, hard) in [(1, 0), (2, 60)] {
            let holding = HoldingValue { hard, ..HoldingValue::default() };
            observed.holdings.insert(Ipv4Addr::new(203, 0, 113, last), holding);
        }
        for (keeps_deadlines, expected) in [(true, [false, true]), (false, [false, false])] {
            let status = report(&Facts { observed: &observed, keeps_deadlines, ..facts(&Ok(())) });
            let fenced: Vec<bool> = status.addresses.iter().map(|address| address.fenced).collect();
            assert_eq!(fenced, expected);
        }
    }

    #[test]
    fn what_has_no_room_is_told_and_leaves_the_node_ready() {
        let bindings = [binding("big", "a".into()), binding("small", "b".into())];
        let desired = Desired { refused: ["big".to_owned()].into(), ..Desired::default() };
        let full = Err("big".to_owned());
        let status = report(&Facts { desired: &desired, bindings: &bindings, room: &full, ..facts(&Ok(())) });
        let conditions: Vec<_> =
            status.conditions.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect();
        assert_eq!(conditions, [("Ready", "True"), ("WithinLimits", "False")]);
        let enforced: Vec<_> = status.bindings.iter().map(|it| it.namespace.as_str()).collect();
        assert_eq!(enforced, ["small"]);
    }

    #[test]
    fn a_condition_keeps_its_time_until_its_status_changes() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let bad = |message: &str| Err(NotReady { reason: reason::NO_UPLINK, message: message.into() });
        let first = date(status(&bad("a")), None, at(1));
        let second = date(status(&bad("b")), Some(&first), at(2));
        assert_eq!(second.conditions[0].last_transition_time.0, at(1));
        let third = date(status(&Ok(())), Some(&second), at(3));
        assert_eq!(third.conditions[0].last_transition_time.0, at(3));
        assert_eq!(date(status(&Ok(())), Some(&third), at(4)), third, "nothing to write");
    }

    fn with_usage(fill_percent: u32, refused: u32) -> EgressNodeStatus {
        let allocation = AllocationRef { namespace: "shop".into(), name: "main".into() };
        let demand = Demand { allocation, slices: 1, fill_percent, refused, reason: String::new() };
        let address =
            ProgrammedAddress { address: "203.0.113.1".into(), epoch: 7, fenced: false, drained: vec![] };
        let allocation = AllocationRef { namespace: "shop".into(), name: "main".into() };
        let limited = vec![Limited { allocation, pod_flows: 50, ..Limited::default() }];
        EgressNodeStatus { demand: vec![demand], limited, addresses: vec![address], ..status(&Ok(())) }
    }

    #[test]
    fn what_nobody_waits_for_is_told_less_often_the_more_nodes_there_are() {
        let before = with_usage(10, 0);
        let other = |change: fn(&mut EgressNodeStatus)| {
            let mut after = before.clone();
            change(&mut after);
            can_wait(&before, &after)
        };
        assert!(other(|it| it.demand[0].fill_percent = 90));
        assert!(other(|it| it.addresses[0].epoch = 8));
        assert!(other(|it| it.limited[0].pod_flows = 100));
        assert!(!other(|it| it.limited[0].pod_new_flows = 1), "another limit is met");
        assert!(!other(|it| it.limited.clear()));
        assert!(other(|it| it.limited[0].pod = "shop/b".into()));
        assert!(!other(|it| it.demand[0].slices = 2), "growth");
        assert!(!other(|it| it.demand[0].refused = 1), "flows are refused");
        assert!(!other(|it| it.addresses[0].drained.push(SliceRange { first: 4, last: 4 })));
        assert!(!other(|it| it.addresses[0].fenced = true));
        assert!(!other(|it| it.addresses.clear()));
        assert!(!other(|it| it.leaving = true));
        assert!(!other(|it| it.tunnel_address.clear()));
        assert!(!other(|it| it.conditions.clear()));
        assert_eq!(
            [3, 250, 1_000, 5_000].map(|nodes| pause(true, nodes).as_millis()),
            [500, 500, 2_000, 10_000]
        );
        assert_eq!([3, 5_000].map(|nodes| pause(false, nodes).as_millis()), [500, 500]);
    }

    #[test]
    fn usage_is_told_anew_when_it_matters() {
        let told = |before: (u32, u32), now: (u32, u32)| {
            let status = settle(with_usage(now.0, now.1), &with_usage(before.0, before.1));
            (status.demand[0].fill_percent, status.demand[0].refused)
        };
        assert_eq!(told((40, 0), (44, 0)), (40, 0));
        assert_eq!(told((40, 0), (36, 0)), (40, 0));
        assert_eq!(told((40, 0), (45, 0)), (45, 0));
        assert_eq!(told((78, 0), (80, 0)), (80, 0), "others may send elsewhere");
        assert_eq!(told((94, 0), (95, 0)), (95, 0));
        assert_eq!(told((97, 0), (100, 0)), (100, 0), "the next flow is refused");
        assert_eq!(told((100, 0), (100, 1)), (100, 1));
        assert_eq!(told((100, 100), (100, 60)), (100, 100));
        assert_eq!(told((100, 100), (100, 49)), (100, 49));
        assert_eq!(told((100, 1), (100, 0)), (100, 0));
        let limited = |pod_flows| {
            let mut status = with_usage(0, 0);
            status.limited[0].pod_flows = pod_flows;
            settle(status, &with_usage(0, 0)).limited[0].pod_flows
        };
        assert_eq!([25, 50, 100, 24, 101].map(limited), [50, 50, 50, 24, 101]);
        let mut status = with_usage(0, 0);
        status.limited[0].pod = "shop/b".into();
        assert_eq!(settle(status.clone(), &with_usage(0, 0)).limited, status.limited, "another pod is news");
    }

    #[test]
    fn the_pod_is_named_that_is_refused_most() {
        let address = Ipv4Addr::new(10, 0, 0, 1);
        let pod = |name: &str, uid: &str| Pod {
            account: "shop".into(),
            name: name.into(),
            uid: uid.into(),
            addresses: vec![IpAddr::V4(address)],
            ..Pod::default()
        };
        // One after the other with the same address.
        let pods = [pod("before", "u1"), pod("now", "u2")];
        let named = |uid: &str| {
            let name = AllocationName { account: "shop".into(), name: "main".into() };
            let pod = Some((address, aegis_common::incarnation(uid)));
            let limited = [(name, Refusals { pod_flows: 3, pod, ..Refusals::default() })].into();
            let status = report(&Facts { limited: &limited, pods: &pods, ..facts(&Ok(())) });
            (status.limited[0].pod.clone(), status.limited[0].pod_flows)
        };
        assert_eq!(named("u2"), ("shop/now".to_owned(), 3));
        assert_eq!(named("u1"), ("shop/before".to_owned(), 3));
        assert_eq!(named("u3"), (String::new(), 3), "gone");
    }
}
