//! Prometheus metrics.

use crate::watch::Snapshot;
use aegis_core::model::{Address, State};
use aegis_core::plan::{AccountRight, PrefixOutcome};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// All metrics; clones share them.
#[derive(Clone)]
pub struct Metrics {
    /// Held while families are replaced, so that a scrape sees all of one moment.
    registry: Arc<Mutex<Registry>>,
    plans: Counter,
    plan_seconds: Histogram,
    refusals: Counter,
    conflicts: Counter,
    errors: Family<StepLabel, Counter>,
    vanished: Counter,
    withheld: Gauge,
    leader: Gauge,
    objects: Family<KindLabel, Gauge>,
    invalid: Family<KindLabel, Gauge>,
    slices: Family<SliceLabels, Gauge>,
    addresses: Family<UseLabels, Gauge>,
    prefix_addresses: Family<PrefixLabels, Gauge>,
    capacity_low: Family<AllocationLabels, Gauge>,
    node_leases: Family<StateLabel, Gauge>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StepLabel {
    step: Step,
}

/// A step whose API calls can fail.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum Step {
    /// Writing an `EgressAddress`.
    Address,
    /// Writing the Lease of a node.
    Lease,
    /// Writing a finalizer.
    Finalizer,
    /// Writing a status.
    Status,
    /// Publishing an Event.
    Event,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SliceLabels {
    address: String,
    namespace: String,
    allocation: String,
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct UseLabels {
    prefix: String,
    namespace: String,
    right: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PrefixLabels {
    prefix: String,
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct AllocationLabels {
    namespace: String,
    allocation: String,
}

/// Slices of one address by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SliceCounts {
    /// Held.
    pub held: u32,
    /// Draining.
    pub draining: u32,
    /// Quarantined.
    pub quarantined: u32,
}

impl SliceCounts {
    /// Counts.
    pub fn of(address: &Address) -> SliceCounts {
        let mut counts = SliceCounts::default();
        for holding in &address.holdings {
            let slices = u32::from(holding.last.saturating_sub(holding.first)) + 1;
            match holding.state {
                State::Held => counts.held += slices,
                State::Draining => counts.draining += slices,
                State::Quarantined { .. } => counts.quarantined += slices,
            }
        }
        counts
    }

    /// How many of `usable` slices nobody has.
    pub fn free(&self, usable: u32) -> u32 {
        usable.saturating_sub(self.held + self.draining + self.quarantined)
    }
}

impl Metrics {
    /// All zero.
    pub fn new() -> Metrics {
        let metrics = Metrics {
            registry: Arc::new(Mutex::new(Registry::with_prefix("aegis_operator"))),
            plans: Counter::default(),
            plan_seconds: Histogram::new(exponential_buckets(0.000_1, 2.0, 16)),
            refusals: Counter::default(),
            conflicts: Counter::default(),
            errors: Family::default(),
            vanished: Counter::default(),
            withheld: Gauge::default(),
            leader: Gauge::default(),
            objects: Family::default(),
            invalid: Family::default(),
            slices: Family::default(),
            addresses: Family::default(),
            prefix_addresses: Family::default(),
            capacity_low: Family::default(),
            node_leases: Family::default(),
        };
        let mut registry = metrics.lock();
        registry.register("plans", "Plans made", metrics.plans.clone());
        registry.register(
            "plan_duration_seconds",
            "Time to translate, plan and check",
            metrics.plan_seconds.clone(),
        );
        registry.register(
            "audit_refusals",
            "Plans not applied, as they break an invariant",
            metrics.refusals.clone(),
        );
        registry.register(
            "conflicts",
            "Writes that met a newer object and were planned again",
            metrics.conflicts.clone(),
        );
        registry.register("api_errors", "API calls that failed otherwise, by step", metrics.errors.clone());
        registry.register(
            "addresses_vanished",
            "EgressAddress objects that somebody deleted while slices were held; they are written again",
            metrics.vanished.clone(),
        );
        registry.register(
            "addresses_withheld",
            "Addresses that nodes send from though no object, or only an older one, says so; nobody gets them",
            metrics.withheld.clone(),
        );
        registry.register("leader", "1 on the replica that leads", metrics.leader.clone());
        registry.register("objects", "Objects in the local copies, by kind", metrics.objects.clone());
        registry.register(
            "objects_invalid",
            "Objects that cannot be read or make no sense, by kind",
            metrics.invalid.clone(),
        );
        registry.register(
            "slices",
            "Slices (256 ports each) of an address, by state",
            metrics.slices.clone(),
        );
        registry.register(
            "addresses",
            "Addresses of a prefix that an account has, by right: owner, delegated, withdrawn",
            metrics.addresses.clone(),
        );
        registry.register(
            "prefix_addresses",
            "Addresses of a prefix, by state: used, free, reserved",
            metrics.prefix_addresses.clone(),
        );
        registry.register(
            "capacity_low",
            "1 while the condition CapacityLow of an allocation is true",
            metrics.capacity_low.clone(),
        );
        registry.register(
            "node_leases",
            "Nodes by who holds their Lease: the node (own), the operator (taken), nobody (free)",
            metrics.node_leases.clone(),
        );
        drop(registry);
        metrics
    }

    /// In the OpenMetrics text format.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut page = String::new();
        text::encode(&mut page, &self.lock())?;
        Ok(page)
    }

    /// A plan was made.
    pub fn planned(&self, took: Duration) {
        self.plans.inc();
        self.plan_seconds.observe(took.as_secs_f64());
    }

    /// A plan was refused.
    pub fn refused(&self) {
        self.refusals.inc();
    }

    /// A write met a newer object.
    pub fn conflict(&self) {
        self.conflicts.inc();
    }

    /// An API call failed.
    pub fn error(&self, step: Step) {
        self.errors.get_or_create(&StepLabel { step }).inc();
    }

    /// Addresses vanished.
    pub fn vanished(&self, count: usize) {
        self.vanished.inc_by(count as u64);
    }

    /// Addresses that nobody gets are being told of.
    pub fn withheld(&self, count: usize) {
        self.withheld.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// This replica does not lead (any more): what is known of allocations and addresses is the leader's to tell.
    pub fn follow(&self) {
        let _one_moment = self.lock();
        self.slices.clear();
        self.addresses.clear();
        self.prefix_addresses.clear();
        self.capacity_low.clear();
        self.node_leases.clear();
        self.withheld.set(0);
    }

    /// Whether this replica leads.
    pub fn leading(&self, leading: bool) {
        self.leader.set(leading.into());
    }

    /// Counts objects.
    pub fn objects(&self, snapshot: &Snapshot, problems: &BTreeMap<String, i64>) {
        let counts = [
            ("AegisPrefix", snapshot.prefixes.len()),
            ("EgressAllocation", snapshot.allocations.len()),
            ("ZoneBinding", snapshot.bindings.len()),
            ("EgressAddress", snapshot.addresses.len()),
            ("EgressNode", snapshot.egress_nodes.len()),
            ("Node", snapshot.nodes.len()),
            ("Namespace", snapshot.namespaces.len()),
        ];
        let _one_moment = self.lock();
        for (kind, count) in counts {
            let label = KindLabel { kind: kind.to_owned() };
            self.invalid.get_or_create(&label).set(problems.get(kind).copied().unwrap_or_default());
            self.objects.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Counts nodes by who holds their Lease.
    pub fn node_leases(&self, counts: [(&'static str, i64); 3]) {
        let _one_moment = self.lock();
        for (state, count) in counts {
            self.node_leases.get_or_create(&StateLabel { state }).set(count);
        }
    }

    /// Counts slices of each address, given with the number of slices that its allocation uses.
    pub fn slices<'a>(&self, addresses: impl Iterator<Item = (&'a Address, u32)>) {
        let _one_moment = self.lock();
        self.slices.clear();
        for (address, usable) in addresses {
            let counts = SliceCounts::of(address);
            let states = [
                ("held", counts.held),
                ("draining", counts.draining),
                ("quarantined", counts.quarantined),
                ("free", counts.free(usable)),
            ];
            for (state, count) in states {
                let labels = SliceLabels {
                    address: address.address.to_string(),
                    namespace: address.allocation.account.clone(),
                    allocation: address.allocation.name.clone(),
                    state,
                };
                self.slices.get_or_create(&labels).set(count.into());
            }
        }
    }

    /// Counts addresses of each prefix, by account and by state.
    pub fn prefixes(&self, prefixes: &BTreeMap<String, PrefixOutcome>) {
        let _one_moment = self.lock();
        self.addresses.clear();
        self.prefix_addresses.clear();
        for (name, outcome) in prefixes {
            for (state, count) in
                [("used", outcome.used), ("free", outcome.free), ("reserved", outcome.reserved)]
            {
                let labels = PrefixLabels { prefix: name.clone(), state };
                self.prefix_addresses.get_or_create(&labels).set(count.into());
            }
            for account in &outcome.accounts {
                let right = match account.right {
                    AccountRight::Owner => "owner",
                    AccountRight::Delegated { .. } => "delegated",
                    AccountRight::Withdrawn => "withdrawn",
                };
                let labels = UseLabels { prefix: name.clone(), namespace: account.account.clone(), right };
                self.addresses.get_or_create(&labels).set(account.used().into());
            }
        }
    }

    /// Replaces what is known of each allocation's `CapacityLow`.
    pub fn capacity_low(&self, allocations: impl Iterator<Item = (String, String, bool)>) {
        let _one_moment = self.lock();
        self.capacity_low.clear();
        for (namespace, allocation, low) in allocations {
            self.capacity_low.get_or_create(&AllocationLabels { namespace, allocation }).set(low.into());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_core::model::AllocationName;

    #[test]
    fn a_replica_that_leads_no_longer_tells_nothing_of_allocations() {
        let metrics = Metrics::new();
        let address = Address {
            address: "203.0.113.1".parse().unwrap(),
            prefix: "p".into(),
            allocation: AllocationName { account: "shop".into(), name: "partner".into() },
            epoch: 1,
            holdings: Vec::new(),
            fence: None,
        };
        metrics.slices([(&address, 252)].into_iter());
        metrics.capacity_low([("shop".to_owned(), "partner".to_owned(), true)].into_iter());
        metrics.withheld(1);
        let plan = aegis_core::plan(&aegis_core::model::Inputs {
            prefixes: vec![aegis_core::model::Prefix {
                name: "partner-prefix".into(),
                created: 1,
                cidr: "203.0.113.0/28".parse().unwrap(),
                reserved: vec!["203.0.113.0/32".parse().unwrap()],
                account: "shop".into(),
                delegations: Vec::new(),
                deleting: false,
            }],
            addresses: vec![Address { prefix: "partner-prefix".into(), ..address.clone() }],
            ..Default::default()
        });
        metrics.prefixes(&plan.prefixes);
        assert!(metrics.encode().unwrap().contains("{prefix=\"partner-prefix\",state=\"reserved\"} 1"));
        let page = || metrics.encode().unwrap();
        assert!(page().contains("partner") && page().contains("addresses_withheld 1"));
        metrics.follow();
        assert!(!page().contains("partner") && page().contains("addresses_withheld 0"), "{}", page());
    }
}
