//! Prometheus metrics: a snapshot that the controller renews, encoded when somebody asks.

mod usage;

use crate::load::Taken;
use crate::meter::Fill;
use crate::names::Tally;
use crate::status::NotReady;
use aegis_common::{
    Counter as Reason, CounterValue, LimitedValue, RuleValue, WOULD_DENY, WOULD_LACK, WOULD_LEAVE, WOULD_PASS,
};
use aegis_core::egress::Egress;
pub use aegis_delivery::Counters;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// New flows about which a rule has decided, or would have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleCount {
    /// `policy` or `binding`.
    pub kind: &'static str,
    /// Namespace of a binding.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// It only observes.
    pub observes: bool,
    /// The counts.
    pub value: RuleValue,
}

/// What the metrics say.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// `COUNTERS`, by index, summed over the CPUs.
    pub counters: Vec<CounterValue>,
    /// Flows by rule, since the agent started.
    pub rules: Vec<RuleCount>,
    /// When the database of countries was built, and how many ranges it has.
    pub countries: Option<(u64, u64)>,
    /// How often a file with one could not be read.
    pub country_failures: u64,
    /// Entries and room, by table.
    pub tables: BTreeMap<&'static str, (u64, u64)>,
    /// Ports in use by egress address, over all origins.
    pub ports: BTreeMap<Egress, u32>,
    /// Connections of sockets that have an egress address themselves, by address.
    pub sockets: BTreeMap<Ipv4Addr, u32>,
    /// Slices held (for new flows) and draining by egress address.
    pub slices: BTreeMap<Egress, (u32, u32)>,
    /// Share of the ports towards the busiest origin by allocation, in percent.
    pub fill: BTreeMap<(String, String), u32>,
    /// New flows that limits have refused, by allocation.
    pub limited: BTreeMap<(String, String), LimitedValue>,
    /// Flows by allocation.
    pub taken: BTreeMap<(String, String), Taken>,
    /// Live generation of the policy.
    pub generation: u32,
    /// Local pods that a binding covers, and all.
    pub pods: (u64, u64),
    /// Covered pods of the host network without control group.
    pub groupless: u64,
    /// Egress addresses that this node announces.
    pub announced: usize,
    /// BGP sessions of the routing daemon that are established, and others.
    pub sessions: (usize, usize),
    /// The routing daemon answers, or there is none to ask.
    pub routing_daemon: bool,
    /// Times a route of an announced address was put back.
    pub route_repairs: u64,
    /// Egress addresses that one node is to answer for on the link, and whether this one does.
    pub answers: BTreeMap<Egress, bool>,
    /// Those for which nobody is known to answer.
    pub vacant: usize,
    /// Gateways that do not answer.
    pub silent_gateways: usize,
    /// Watches that do not work.
    pub watch_errors: u64,
    /// Objects that cannot be read.
    pub invalid_objects: u64,
    /// Egress addresses of which an object older than the data plane was offered.
    pub stale_addresses: u64,
    /// Egress addresses without object that still carry flows.
    pub orphaned_addresses: u64,
    /// Unknown addresses are held.
    pub holding_unknown: bool,
    /// The container runtime waits for this agent before it starts a pod; `None` where that is not wanted.
    pub runtime_hook: Option<bool>,
    /// Frames that a driver could not send back from XDP, by device.
    pub xdp_tx_errors: BTreeMap<String, u64>,
    /// Fragments that came before the first of their datagram: sent after it, and lost.
    pub early_fragments: (u64, u64),
    /// Meters in use, and those that fit; `None` while none are looked at.
    pub meters: Option<Fill>,
    /// Times the nftables table was put back.
    pub nft_repairs: u64,
    /// Packets that the nftables tables have dropped, by family and reason.
    pub nft_drops: BTreeMap<(&'static str, &'static str), u64>,
    /// Map writes, and those that failed.
    pub writes: (u64, u64),
    /// Seconds that the last scan of the flow table took.
    pub scan_seconds: f64,
    /// Seconds until nothing is sent from some address unless the Lease is renewed; `None` while no address has a deadline.
    pub lease_seconds_left: Option<f64>,
    /// Host names.
    pub names: Tally,
    /// Whether the node is ready.
    pub ready: Result<(), NotReady>,
    /// Last turn of the event loop.
    pub alive: Instant,
}

impl Default for Snapshot {
    fn default() -> Self {
        Snapshot {
            counters: Vec::new(),
            rules: Vec::new(),
            countries: None,
            country_failures: 0,
            tables: BTreeMap::new(),
            ports: BTreeMap::new(),
            sockets: BTreeMap::new(),
            slices: BTreeMap::new(),
            fill: BTreeMap::new(),
            limited: BTreeMap::new(),
            taken: BTreeMap::new(),
            generation: 0,
            pods: (0, 0),
            groupless: 0,
            announced: 0,
            sessions: (0, 0),
            routing_daemon: true,
            route_repairs: 0,
            answers: BTreeMap::new(),
            vacant: 0,
            silent_gateways: 0,
            watch_errors: 0,
            invalid_objects: 0,
            stale_addresses: 0,
            orphaned_addresses: 0,
            holding_unknown: false,
            runtime_hook: None,
            xdp_tx_errors: BTreeMap::new(),
            early_fragments: (0, 0),
            meters: None,
            nft_repairs: 0,
            nft_drops: BTreeMap::new(),
            writes: (0, 0),
            scan_seconds: 0.0,
            lease_seconds_left: None,
            names: Tally::default(),
            ready: Err(NotReady {
                reason: crate::status::reason::WAITING,
                message: "the agent has just started".into(),
            }),
            alive: Instant::now(),
        }
    }
}

/// The metrics, shared by the controller and the server.
#[derive(Clone, Debug)]
pub struct Metrics {
    snapshot: Arc<Mutex<Snapshot>>,
    reconcile: Histogram,
    report_failures: Counter,
    lease_renewals: Family<[(&'static str, &'static str); 1], Counter>,
    runtime_waits: Family<[(&'static str, &'static str); 2], Histogram>,
    usage: Arc<OnceLock<usage::Source>>,
    registry: Arc<Registry>,
}

impl Default for Metrics {
    fn default() -> Self {
        let snapshot = Arc::new(Mutex::new(Snapshot::default()));
        let reconcile = Histogram::new(exponential_buckets(0.0005, 2.0, 14));
        let mut registry = Registry::with_prefix("aegis");
        registry.register(
            "reconcile_seconds",
            "Time from noticing a change to having written it to the data plane",
            reconcile.clone(),
        );
        let report_failures = Counter::default();
        registry.register(
            "report_failures",
            "Attempts to write the EgressNode status that failed",
            report_failures.clone(),
        );
        let lease_renewals = Family::default();
        registry.register(
            "lease_renewals",
            "Attempts to acquire or renew the node's Lease, by result",
            lease_renewals.clone(),
        );
        let runtime_waits = Family::new_with_constructor(waits as fn() -> Histogram);
        registry.register(
            "runtime_hook_seconds",
            "Time for which the container runtime waited for the data plane, by event (run: before a pod's containers start, stop: \
             before its address is given back) and outcome",
            runtime_waits.clone(),
        );
        registry.register_collector(Box::new(Encoder(Arc::clone(&snapshot))));
        let usage = Arc::new(OnceLock::new());
        registry.register_collector(Box::new(usage::Encoder(Arc::clone(&usage))));
        Metrics {
            snapshot,
            reconcile,
            report_failures,
            lease_renewals,
            runtime_waits,
            usage,
            registry: Arc::new(registry),
        }
    }
}

impl Metrics {
    /// Access to the snapshot; nothing is awaited while it is locked.
    pub fn lock(&self) -> MutexGuard<'_, Snapshot> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one reconciliation.
    pub fn reconciled(&self, seconds: f64) {
        self.reconcile.observe(seconds);
    }

    /// Counts an attempt to report that failed.
    pub fn report_failed(&self) {
        self.report_failures.inc();
    }

    /// Counts an attempt to acquire or renew the Lease.
    pub fn lease_renewed(&self, result: &'static str) {
        self.lease_renewals.get_or_create(&[("result", result)]).inc();
    }

    /// Counts a wait of the container runtime.
    pub fn runtime_waited(&self, event: &'static str, outcome: &'static str, seconds: f64) {
        self.runtime_waits.get_or_create(&[("event", event), ("outcome", outcome)]).observe(seconds);
    }

    /// From now on they say what becomes of the reports of use; of the first reporter, if there are several.
    pub fn follow_usage(&self, counters: impl Fn() -> Counters + Send + Sync + 'static) {
        let _ = self.usage.set(usage::Source(Box::new(counters)));
    }

    /// The metrics in the OpenMetrics text format.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn waits() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 1.5, 20))
}

#[derive(Debug)]
struct Encoder(Arc<Mutex<Snapshot>>);

type Encoded = Result<(), std::fmt::Error>;

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> Encoded {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Encoded {
    let counter = ConstCounter::new(value);
    counter.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
}

/// One series for each (labels, value).
fn family<const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, form): (&str, &str, MetricType),
    series: impl IntoIterator<Item = ([(&'static str, String); N], u64)>,
) -> Encoded {
    let mut family = encoder.encode_descriptor(name, help, None, form)?;
    for (labels, value) in series {
        let metric = family.encode_family(&labels)?;
        match form {
            MetricType::Counter => ConstCounter::new(value).encode(metric)?,
            _ => ConstGauge::new(value).encode(metric)?,
        }
    }
    Ok(())
}

impl Collector for Encoder {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Encoded {
        let now = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let e = &mut encoder;
        let reasons = || Reason::ALL.iter().zip(&now.counters);
        let by_reason = |c: &Reason| [("reason", c.label().to_owned())];
        family(
            e,
            ("packets", "Packets by what happened to them", MetricType::Counter),
            reasons().map(|(c, value)| (by_reason(c), value.packets)),
        )?;
        family(
            e,
            ("bytes", "Bytes of IP packets by what happened to them", MetricType::Counter),
            reasons().map(|(c, value)| (by_reason(c), value.bytes)),
        )?;
        let decided = now.rules.iter().filter(|rule| !rule.observes).flat_map(|rule| {
            let RuleValue { left, lacked, denied, .. } = rule.value;
            [("left", left), ("unavailable", lacked), ("denied", denied)].map(|(result, count)| {
                let labels = [
                    ("kind", rule.kind.to_owned()),
                    ("namespace", rule.namespace.clone()),
                    ("name", rule.name.clone()),
                    ("result", result.to_owned()),
                ];
                (labels, count)
            })
        });
        family(
            e,
            ("rule_flows", "New flows about which a policy or a binding has decided", MetricType::Counter),
            decided,
        )?;
        let observed = now.rules.iter().filter(|rule| rule.observes).flat_map(|rule| {
            let results = [
                ("left", WOULD_LEAVE),
                ("unavailable", WOULD_LACK),
                ("default", WOULD_PASS),
                ("denied", WOULD_DENY),
            ];
            results.map(|(result, at)| {
                let labels = [("policy", rule.name.clone()), ("result", result.to_owned())];
                (labels, rule.value.would[at as usize])
            })
        });
        family(
            e,
            (
                "policy_observed_flows",
                "New flows about which a policy with mode Observe would have decided, by what would have become of them",
                MetricType::Counter,
            ),
            observed,
        )?;
        let table = |name: &str| [("table", name.to_owned())];
        family(
            e,
            ("table_entries", "Entries of a table of the data plane", MetricType::Gauge),
            now.tables.iter().map(|(name, (used, _))| (table(name), *used)),
        )?;
        family(
            e,
            ("table_size", "Entries that fit into a table of the data plane", MetricType::Gauge),
            now.tables.iter().map(|(name, (_, size))| (table(name), *size)),
        )?;
        if let Some(Fill { in_use, size }) = now.meters {
            gauge(e, "meters_in_use", "Meters of use in use", in_use.into())?;
            gauge(e, "meters_size", "Meters of use that fit", size.into())?;
        }
        let names = &now.names;
        gauge(e, "names_addresses", "Addresses of host names of rules, pairs of both", names.known.0 as f64)?;
        gauge(e, "names_addresses_size", "Such pairs that may be known", names.known.1 as f64)?;
        gauge(
            e,
            "names_unresolved",
            "Host names of rules with pods here that have no address",
            names.unresolved as f64,
        )?;
        family(
            e,
            ("names_refused", "DNS answers that pods were not told, by why", MetricType::Counter),
            names.refused.iter().map(|(why, count)| ([("reason", (*why).to_owned())], *count)),
        )?;
        counter(
            e,
            "names_forgotten_early",
            "Addresses of host names that were given up before their grace was over, to make room",
            names.hurried,
        )?;
        counter(
            e,
            "names_unheard",
            "DNS queries that were not heard: too many of one pod at a time, or of no pod",
            names.unheard,
        )?;
        counter(
            e,
            "names_held",
            "DNS answers that waited until the data plane knew their addresses",
            names.held.0,
        )?;
        gauge(e, "names_held_seconds_sum", "Seconds that these have waited, together", names.held.1)?;
        let address = |address: &Ipv4Addr| ("address", address.to_string());
        family(
            e,
            (
                "ports_in_use",
                "Ports in use on this node by egress address, over all origins",
                MetricType::Gauge,
            ),
            now.ports.iter().map(|(a, used)| ([("address", a.to_string())], u64::from(*used))),
        )?;
        family(
            e,
            (
                "sockets",
                "Connections on this node by egress address, of sockets that have it themselves",
                MetricType::Gauge,
            ),
            now.sockets.iter().map(|(a, count)| ([address(a)], u64::from(*count))),
        )?;
        let egress = |own: &Egress| ("address", own.to_string());
        let slices = now.slices.iter().flat_map(|(a, (held, draining))| {
            [("held", held), ("draining", draining)]
                .map(|(state, count)| ([egress(a), ("state", state.to_owned())], u64::from(*count)))
        });
        family(
            e,
            (
                "slices",
                "Slices of this node by egress address (256 ports each, or its part of a /64)",
                MetricType::Gauge,
            ),
            slices,
        )?;
        let fill = now.fill.iter().map(|((namespace, name), percent)| {
            ([("namespace", namespace.clone()), ("allocation", name.clone())], u64::from(*percent))
        });
        family(
            e,
            (
                "busiest_origin_percent",
                "Ports in use towards the busiest origin, of those held",
                MetricType::Gauge,
            ),
            fill,
        )?;
        let of = |(namespace, name): &(String, String)| {
            [("namespace", namespace.clone()), ("allocation", name.clone())]
        };
        family(
            e,
            ("allocation_flows", "Flows on this node by allocation", MetricType::Gauge),
            now.taken.iter().map(|(name, taken)| (of(name), taken.flows)),
        )?;
        family(
            e,
            (
                "busiest_pod_flows",
                "Flows of the pod of this node that has most, by allocation",
                MetricType::Gauge,
            ),
            now.taken.iter().map(|(name, taken)| (of(name), u64::from(taken.busiest_pod))),
        )?;
        let limited = now.limited.iter().flat_map(|((namespace, name), count)| {
            let limits = [
                ("pod_flows", count.pod_flows),
                ("pod_rate", count.pod_rate),
                ("account_flows", count.account_flows),
                ("account_rate", count.account_rate),
            ];
            limits.map(|(limit, refused)| {
                let labels = [
                    ("namespace", namespace.clone()),
                    ("allocation", name.clone()),
                    ("limit", limit.to_owned()),
                ];
                (labels, refused)
            })
        });
        family(
            e,
            ("limited_flows", "New flows that a limit has refused, by allocation", MetricType::Counter),
            limited,
        )?;
        family(
            e,
            ("xdp_tx_errors", "Frames that the driver could not send back from XDP", MetricType::Counter),
            now.xdp_tx_errors.iter().map(|(device, count)| ([("device", device.clone())], *count)),
        )?;

        let early = [("delivered", now.early_fragments.0), ("lost", now.early_fragments.1)];
        family(
            e,
            (
                "early_fragments",
                "Fragments that came before the first of their datagram, by what became of them",
                MetricType::Counter,
            ),
            early.map(|(result, count)| ([("result", result.to_owned())], count)),
        )?;

        family(
            e,
            ("nft_drops", "Packets that the nftables tables have dropped", MetricType::Counter),
            now.nft_drops.iter().map(|((family, reason), count)| {
                ([("family", (*family).to_owned()), ("reason", (*reason).to_owned())], *count)
            }),
        )?;

        let sessions = [("up", now.sessions.0), ("down", now.sessions.1)];
        family(
            e,
            ("bgp_sessions", "BGP sessions of the node's routing daemon", MetricType::Gauge),
            sessions.map(|(state, count)| ([("state", state.to_owned())], count as u64)),
        )?;

        family(
            e,
            (
                "answers_arp",
                "1: this node answers for the egress address on the link (ARP, or neighbour solicitations), 0: it may, and leaves it to another \
                 one",
                MetricType::Gauge,
            ),
            now.answers.iter().map(|(a, own)| ([("address", a.to_string())], u64::from(*own))),
        )?;

        let flag = |value: bool| f64::from(u8::from(value));
        gauge(e, "ready", "1: everything is programmed", flag(now.ready.is_ok()))?;
        gauge(e, "api_connected", "1: every watch works", flag(now.watch_errors == 0))?;
        gauge(
            e,
            "holding_unknown",
            "1: packets of unknown pod addresses are held",
            flag(now.holding_unknown),
        )?;
        if let Some(connected) = now.runtime_hook {
            gauge(
                e,
                "runtime_hook",
                "1: the container runtime waits for the agent before it starts a pod, 0: it has no socket for plugins, or no connection",
                flag(connected),
            )?;
        }
        gauge(e, "policy_generation", "Generation of the policy in force", f64::from(now.generation))?;
        gauge(e, "covered_pods", "Pods of this node that a binding or policy covers", now.pods.0 as f64)?;
        gauge(
            e,
            "groupless_pods",
            "Covered pods of the host network whose control group is not known (yet)",
            now.groupless as f64,
        )?;
        gauge(e, "known_pods", "Addresses of pods of this node", now.pods.1 as f64)?;
        gauge(
            e,
            "announced_addresses",
            "Egress addresses for which this node has put up a route to be announced",
            now.announced as f64,
        )?;
        gauge(
            e,
            "routing_daemon_answers",
            "1: the routing daemon answers, or the agent knows of none",
            flag(now.routing_daemon),
        )?;
        counter(e, "route_repairs", "Routes of announced addresses that were put back", now.route_repairs)?;
        gauge(
            e,
            "vacant_addresses",
            "Egress addresses for which nobody is known to answer on the link",
            now.vacant as f64,
        )?;
        gauge(
            e,
            "silent_gateways",
            "Nodes through which this one sends that do not answer its probes",
            now.silent_gateways as f64,
        )?;
        gauge(
            e,
            "invalid_objects",
            "Objects that cannot be read; their last form stays",
            now.invalid_objects as f64,
        )?;
        gauge(
            e,
            "stale_addresses",
            "Egress addresses whose object is older than the data plane",
            now.stale_addresses as f64,
        )?;
        gauge(
            e,
            "orphaned_addresses",
            "Egress addresses without object that carry flows",
            now.orphaned_addresses as f64,
        )?;
        gauge(e, "scan_seconds", "Time that the last scan of the flow table took", now.scan_seconds)?;
        if let Some(left) = now.lease_seconds_left {
            gauge(
                e,
                "lease_seconds_left",
                "Time until this node sends nothing more from some address unless it renews its Lease",
                left,
            )?;
        }
        if let Some((built, ranges)) = now.countries {
            gauge(
                e,
                "countries_built_seconds",
                "When the database of countries that is in use was built, in seconds since 1970",
                built as f64,
            )?;
            gauge(
                e,
                "countries_ranges",
                "Ranges in the database of countries that is in use",
                ranges as f64,
            )?;
        }
        counter(
            e,
            "countries_failures",
            "Attempts to read the database of countries that failed",
            now.country_failures,
        )?;
        counter(e, "nft_repairs", "Times the nftables table was put back", now.nft_repairs)?;
        counter(e, "map_writes", "Writes to the data plane's maps", now.writes.0)?;
        counter(e, "map_write_failures", "Writes that the kernel refused", now.writes.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_a_series_and_the_text_ends_as_openmetrics_wants() {
        let metrics = Metrics::default();
        metrics.lock().counters =
            (0..Reason::ALL.len() as u64).map(|i| CounterValue { packets: i, bytes: 2 * i }).collect();
        let name = || ("shop".to_owned(), "main".to_owned());
        metrics.lock().taken.insert(name(), Taken { flows: 12, busiest_pod: 7 });
        metrics.lock().limited.insert(name(), LimitedValue { account_rate: 3, ..LimitedValue::default() });
        metrics.lock().ports.insert(Ipv4Addr::new(203, 0, 113, 1).into(), 17);
        metrics.lock().meters = Some(Fill { in_use: 60, size: 63 });
        let value = RuleValue { left: 4, denied: 5, would: [0, 0, 0, 6], ..RuleValue::default() };
        for (kind, namespace, observes) in [("policy", "", true), ("binding", "shop", false)] {
            let (namespace, name) = (namespace.to_owned(), format!("a {kind}"));
            metrics.lock().rules.push(RuleCount { kind, namespace, name, observes, value });
        }
        let text = metrics.encode().unwrap();
        for (index, counter) in Reason::ALL.iter().enumerate() {
            assert!(
                text.contains(&format!("aegis_packets_total{{reason=\"{}\"}} {index}\n", counter.label())),
                "{text}"
            );
        }
        assert!(text.contains("aegis_ports_in_use{address=\"203.0.113.1\"} 17\n"), "{text}");
        assert!(
            text.contains("aegis_meters_in_use 60.0\n") && text.contains("aegis_meters_size 63.0\n"),
            "{text}"
        );
        for line in [
            "aegis_rule_flows_total{kind=\"binding\",namespace=\"shop\",name=\"a binding\",result=\"left\"} 4\n",
            "aegis_rule_flows_total{kind=\"binding\",namespace=\"shop\",name=\"a binding\",result=\"denied\"} 5\n",
            "aegis_policy_observed_flows_total{policy=\"a policy\",result=\"denied\"} 6\n",
            "aegis_allocation_flows{namespace=\"shop\",allocation=\"main\"} 12\n",
            "aegis_busiest_pod_flows{namespace=\"shop\",allocation=\"main\"} 7\n",
            "aegis_limited_flows_total{namespace=\"shop\",allocation=\"main\",limit=\"account_rate\"} 3\n",
            "aegis_limited_flows_total{namespace=\"shop\",allocation=\"main\",limit=\"pod_flows\"} 0\n",
        ] {
            assert!(text.contains(line), "{line} {text}");
        }
        assert!(!text.contains("rule_flows_total{kind=\"policy\""), "it decides nothing: {text}");
        assert!(text.contains("aegis_ready 0") && text.ends_with("# EOF\n"), "{text}");
    }
}
