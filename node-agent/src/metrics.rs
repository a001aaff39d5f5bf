//! Prometheus metrics: a snapshot that the controller renews, encoded when somebody asks.

use crate::load::Taken;
use crate::status::NotReady;
use aegis_common::{Counter as Reason, CounterValue, LimitedValue};
use aegis_core::egress::Egress;
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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What the metrics say.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// `COUNTERS`, by index, summed over the CPUs.
    pub counters: Vec<CounterValue>,
    /// Entries and room, by table.
    pub tables: BTreeMap<&'static str, (u64, u64)>,
    /// Ports in use by egress address, over all origins.
    pub ports: BTreeMap<Ipv4Addr, u32>,
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
    /// Egress addresses that one node is to answer ARP for, and whether this one does.
    pub arp: BTreeMap<Ipv4Addr, bool>,
    /// Those for which nobody is known to answer.
    pub arp_vacant: usize,
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
    /// Frames that a driver could not send back from XDP, by device.
    pub xdp_tx_errors: BTreeMap<String, u64>,
    /// Fragments that came before the first of their datagram: sent after it, and lost.
    pub early_fragments: (u64, u64),
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
    /// Whether the node is ready.
    pub ready: Result<(), NotReady>,
    /// Last turn of the event loop.
    pub alive: Instant,
}

impl Default for Snapshot {
    fn default() -> Self {
        Snapshot {
            counters: Vec::new(),
            tables: BTreeMap::new(),
            ports: BTreeMap::new(),
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
            arp: BTreeMap::new(),
            arp_vacant: 0,
            silent_gateways: 0,
            watch_errors: 0,
            invalid_objects: 0,
            stale_addresses: 0,
            orphaned_addresses: 0,
            holding_unknown: false,
            xdp_tx_errors: BTreeMap::new(),
            early_fragments: (0, 0),
            nft_repairs: 0,
            nft_drops: BTreeMap::new(),
            writes: (0, 0),
            scan_seconds: 0.0,
            lease_seconds_left: None,
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
        registry.register_collector(Box::new(Encoder(Arc::clone(&snapshot))));
        Metrics { snapshot, reconcile, report_failures, lease_renewals, registry: Arc::new(registry) }
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

    /// The metrics in the OpenMetrics text format.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
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
        let address = |address: &Ipv4Addr| ("address", address.to_string());
        family(
            e,
            (
                "ports_in_use",
                "Ports in use on this node by egress address, over all origins",
                MetricType::Gauge,
            ),
            now.ports.iter().map(|(a, used)| ([address(a)], u64::from(*used))),
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
                "1: this node answers ARP for the egress address, 0: it may, and leaves it to another one",
                MetricType::Gauge,
            ),
            now.arp.iter().map(|(a, own)| ([address(a)], u64::from(*own))),
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
        gauge(e, "policy_generation", "Generation of the policy in force", f64::from(now.generation))?;
        gauge(e, "covered_pods", "Pods of this node that a binding covers", now.pods.0 as f64)?;
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
            "Egress addresses for which nobody is known to answer ARP",
            now.arp_vacant as f64,
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
        metrics.lock().ports.insert(Ipv4Addr::new(203, 0, 113, 1), 17);
        let text = metrics.encode().unwrap();
        for (index, counter) in Reason::ALL.iter().enumerate() {
            assert!(
                text.contains(&format!("aegis_packets_total{{reason=\"{}\"}} {index}\n", counter.label())),
                "{text}"
            );
        }
        assert!(text.contains("aegis_ports_in_use{address=\"203.0.113.1\"} 17\n"), "{text}");
        for line in [
            "aegis_allocation_flows{namespace=\"shop\",allocation=\"main\"} 12\n",
            "aegis_busiest_pod_flows{namespace=\"shop\",allocation=\"main\"} 7\n",
            "aegis_limited_flows_total{namespace=\"shop\",allocation=\"main\",limit=\"account_rate\"} 3\n",
            "aegis_limited_flows_total{namespace=\"shop\",allocation=\"main\",limit=\"pod_flows\"} 0\n",
        ] {
            assert!(text.contains(line), "{line} {text}");
        }
        assert!(text.contains("aegis_ready 0") && text.ends_with("# EOF\n"), "{text}");
    }
}
