//! The event loop: whatever happened, look at everything, compute what should hold, write the difference, report.

mod announcing;
mod growing;
mod lease;
mod leaving;
mod naming;
mod plane;
mod report;
mod sandboxes;
mod settled;
mod sockets;
mod table;
mod tallying;

pub use plane::{Open, Tell};

use crate::announce::Keeper;
use crate::announce::health::Health;
use crate::announce::l2::L2;
use crate::apply::{self, Attached};
use crate::args::Args;
use crate::cni::{self, CniResult};
use crate::countries;
use crate::desired::{self, Desired, Inputs};
use crate::fast;
use crate::groups::{self, Groups};
use crate::lease::{Hold, Need};
use crate::metrics::Metrics;
use crate::names::Names;
use crate::neighbour::{self, Resolver};
use crate::network::{self, Network};
use crate::nft::Rules;
use crate::nft::six::Rules6;
use crate::nri::{Sandboxes, Told};
use crate::observed::{Observed, from_map, from_map6};
use crate::ops::{self, Known, Op};
use crate::probe::Prober;
use crate::refused;
use crate::rule;
use crate::snapshot::{self, Local, Memory};
use crate::status::{NotReady, Pending};
use crate::sweep::Usage;
use crate::tally::Tally;
use crate::uplink::{self, Devices};
use crate::watch::Shared;
use aegis_common::DESTINATION_INTERNAL;
use aegis_core::egress::Egress;
use aegis_core::model::AllocationName;
use aegis_core::policy::{Binding, EgressPolicy};
use growing::{Growing, POLL};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use naming::Naming;
use plane::Pinned;
use settled::Settled;
use sockets::Sockets;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use table::TableKeeper;
use tokio::sync::{Notify, watch};

/// Events that come within this time are dealt with at once.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// Longest time between two turns.
const TICK: Duration = Duration::from_secs(1);
/// Time after which the network is read again, in case a notification was lost.
const READ_NETWORK_AGAIN: Duration = Duration::from_secs(60);

/// Seconds for which a next hop that a program has asked for is spoken to.
const WANTED: u32 = 5;

/// What has happened since the last turn. Each flag is a level, not an event: setting it twice is the same.
#[derive(Debug, Default)]
pub struct Signals {
    /// Devices, addresses, routes or neighbours.
    pub network: AtomicBool,
    /// CNI results.
    pub cni: AtomicBool,
    /// What the container runtime says. It waits for an answer.
    pub runtime: AtomicBool,
    /// Control groups of pods.
    pub groups: AtomicBool,
    /// The nftables tables, of IPv4 and IPv6: each keeper takes its own.
    pub tables: [AtomicBool; 2],
    /// Gateways that have begun or ceased to answer.
    pub gateways: AtomicBool,
    /// The node's Lease was renewed, or lost.
    pub lease: AtomicBool,
    /// Host names have addresses that they did not have: somebody waits for it.
    pub names: AtomicBool,
    /// The agent is being taken off this node. Stays so.
    pub leaving: AtomicBool,
    /// Nothing depends on the agent any more. Stays so.
    pub left: AtomicBool,
    wake: Notify,
}

impl Signals {
    /// Sets a flag and wakes the loop.
    pub fn set(&self, flag: impl Fn(&Signals) -> &AtomicBool) {
        flag(self).store(true, Ordering::Release);
        self.wake.notify_one();
    }

    /// The container runtime has started or stopped a pod. The CNI library has written before, whether or not that has been noticed.
    pub fn runtime_said(&self) {
        self.cni.store(true, Ordering::Release);
        self.set(|signals| &signals.runtime);
    }

    /// Somebody has changed nftables.
    pub fn tables_changed(&self) {
        self.tables.iter().for_each(|flag| flag.store(true, Ordering::Release));
        self.wake.notify_one();
    }

    /// Wakes the loop, for what it looks at in each turn.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    fn take(flag: &AtomicBool) -> bool {
        flag.swap(false, Ordering::AcqRel)
    }
}

/// What the data plane was last brought to, with the rules it was made from.
#[derive(Default)]
struct InForce {
    wanted: Arc<Desired>,
    bindings: Vec<Binding>,
    policies: Vec<EgressPolicy>,
}

/// The controller of one node.
pub struct Controller {
    args: Args,
    shared: Shared,
    signals: Arc<Signals>,
    metrics: Metrics,
    netlink: rtnetlink::Handle,
    report: watch::Sender<Pending>,
    prober: Prober,
    health: Health,
    keeper: Keeper,
    l2: L2,
    need: watch::Sender<Option<Need>>,
    hold: watch::Receiver<Option<Hold>>,
    naming: Naming,
    /// Whether the fast path may be used, if it is wanted.
    fast: Option<Result<(), NotReady>>,
    born: Instant,

    network: Result<Network, String>,
    network_read: Option<Instant>,
    cni: Vec<CniResult>,
    sandboxes: Sandboxes,
    told: Told,
    groups: Groups,
    /// Why the control groups are not known.
    no_groups: Option<String>,
    pinned: Pinned,
    known: Known,
    table: TableKeeper,
    table6: TableKeeper,
    resolver: Resolver,
    growing: Growing,
    sockets: Sockets,
    /// Reads the database of countries.
    atlas: countries::Keeper,
    /// What is known of countries.
    countries: countries::State,
    tally: Tally,
    memory: Memory,
    settled: Settled,
    /// Numbers of the allocations.
    numbers: BTreeMap<AllocationName, u32>,
    /// Peers that are kept for the sake of flows.
    lingering: BTreeSet<u32>,
    /// Tunnel addresses of nodes through which flows leave or may.
    gateways: BTreeSet<Ipv4Addr>,
    devices: Devices,
    attach_errors: BTreeMap<String, String>,
    write_error: Option<String>,
    stale: BTreeSet<Egress>,
    orphaned: BTreeSet<Egress>,
    full: BTreeSet<&'static str>,
    /// What the data plane was last brought to.
    in_force: Option<Arc<InForce>>,
    /// Inputs of the last turn, good for as long as nothing is dirty.
    inputs: Option<Arc<Inputs>>,
    /// Whether they were made when everything had been listed: what is missing in others says nothing.
    synced: bool,
    refused: refused::Schedule,
    /// Since when writes wait for the node's first Lease.
    lease_wanted: Option<Instant>,
    /// The agent is being taken off this node.
    leaving: bool,
    /// Since when nothing depends on it.
    empty: Option<Instant>,
    dirty: bool,
    counts: (u64, u64),
}

impl Controller {
    /// Ready to run. `report` takes what is to be written to the API server, `hold` gives what is known of the node's Lease.
    #[expect(clippy::too_many_arguments, reason = "each is another part of the process")]
    pub fn new(
        args: Args,
        open: Open,
        tell: Tell,
        shared: Shared,
        signals: Arc<Signals>,
        metrics: Metrics,
        netlink: rtnetlink::Handle,
        report: watch::Sender<Pending>,
        hold: watch::Receiver<Option<Hold>>,
        names: Names,
    ) -> Controller {
        let now = Instant::now();
        let prober = Prober::default();
        let changed = Arc::clone(&signals);
        let l2 = L2::new(prober.clone(), move || changed.wake());
        Controller {
            table: TableKeeper::new(0, args.nft.clone(), now),
            table6: TableKeeper::new(1, args.nft.clone(), now),
            pinned: Pinned::new(open, tell, now),
            growing: Growing::new(Duration::from_secs(args.demand_window.into()), now),
            sockets: Sockets::new(Duration::from_secs(args.demand_window.into()), now),
            args,
            shared,
            signals,
            metrics,
            netlink,
            report,
            prober,
            health: Health::default(),
            keeper: Keeper::default(),
            l2,
            need: watch::Sender::new(None),
            hold,
            naming: Naming::new(names, now),
            fast: None,
            born: now,
            network: Err("not read yet".to_owned()),
            network_read: None,
            cni: Vec::new(),
            sandboxes: Sandboxes::default(),
            told: Told::default(),
            groups: Groups::default(),
            no_groups: None,
            known: Known::default(),
            resolver: Resolver::default(),
            atlas: countries::Keeper::default(),
            countries: countries::State::default(),
            tally: Tally::default(),
            memory: Memory::default(),
            settled: Settled::new(now),
            numbers: BTreeMap::new(),
            lingering: BTreeSet::new(),
            gateways: BTreeSet::new(),
            devices: Devices::default(),
            attach_errors: BTreeMap::new(),
            write_error: None,
            stale: BTreeSet::new(),
            orphaned: BTreeSet::new(),
            full: BTreeSet::new(),
            in_force: None,
            inputs: None,
            synced: false,
            refused: refused::Schedule::default(),
            lease_wanted: None,
            leaving: false,
            empty: None,
            dirty: true,
            counts: (0, 0),
        }
    }

    /// What is to be run beside the controller for it to know which gateways answer.
    pub fn prober(&self) -> Prober {
        self.prober.clone()
    }

    /// What is to be run beside the controller for policies to know countries.
    pub fn atlas(&self) -> countries::Keeper {
        self.atlas.clone()
    }

    /// What is to be run beside the controller for somebody to answer ARP.
    pub fn l2(&self) -> L2 {
        self.l2.clone()
    }

    /// What is to be run beside the controller for it to know how the routing daemon is.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// What the container runtime and the controller know of pods' sandboxes, for a plugin of the runtime to be run beside it.
    pub fn sandboxes(&self) -> Sandboxes {
        self.sandboxes.clone()
    }

    /// What is needed of the node's Lease; nothing is known of that before the data plane has been read.
    pub fn need(&self) -> watch::Receiver<Option<Need>> {
        self.need.subscribe()
    }

    /// Turns until the future that this is gets dropped.
    pub async fn run(mut self) {
        for flag in [&self.signals.network, &self.signals.cni, &self.signals.groups] {
            flag.store(true, Ordering::Release);
        }
        loop {
            self.turn().await;
            // The runtime tells of one pod after the other: nothing is gained by waiting for the next.
            if self.event().await && !self.signals.runtime.load(Ordering::Acquire) {
                self.follow_gateways();
                if !self.signals.names.load(Ordering::Acquire) {
                    tokio::time::sleep(DEBOUNCE).await;
                }
            }
        }
    }

    /// Waits until there is a reason for a turn. False if that is only time, or that ports run short.
    async fn event(&mut self) -> bool {
        let end = Instant::now() + self.until_settled().unwrap_or(TICK).clamp(DEBOUNCE, TICK);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            tokio::select! {
                () = self.shared.changed() => {
                    self.dirty = true;
                    return true;
                }
                () = self.signals.wake.notified() => return true,
                () = self.pinned.scanned() => return true,
                () = tokio::time::sleep(left.min(POLL)) => {}
            }
            if self.poll() || Instant::now() >= end {
                return false;
            }
        }
    }

    async fn turn(&mut self) {
        let started = Instant::now();
        self.look_at_network().await;
        self.look_at_cni();
        self.look_at_sandboxes();
        self.look_at_groups();
        self.look_at_countries();
        self.follow_gateways();
        Signals::take(&self.signals.lease);
        self.dirty |= Signals::take(&self.signals.names);
        self.look_whether_to_leave();
        self.open(started);
        self.heed_lease();
        self.look_at_fast_path();
        self.poll();
        let usage = self.pinned.usage();
        self.look_at_demand(&usage);
        self.look_at_names(&usage, started);
        self.look_at_sockets(&usage);

        let mut inputs = match (&self.inputs, self.dirty) {
            (Some(inputs), false) => Arc::clone(inputs),
            _ => Arc::new(self.inputs()),
        };
        if self.find_devices(&inputs) {
            inputs = Arc::new(self.inputs());
        }
        self.inputs = Some(Arc::clone(&inputs));
        self.attach();

        let synced = self.synced;
        let mut wanted = match (&self.in_force, self.dirty, synced) {
            (_, _, false) => None,
            (Some(force), false, _) => Some(Arc::clone(&force.wanted)),
            _ => Some(Arc::new(desired::desired(&inputs))),
        };
        self.keep_tables(wanted.as_deref(), &inputs).await;
        if self.six() != inputs.six {
            inputs = Arc::new(Inputs { six: self.six(), ..(*inputs).clone() });
            self.inputs = Some(Arc::clone(&inputs));
            wanted = wanted.map(|_| Arc::new(desired::desired(&inputs)));
            self.dirty = true;
        }
        self.stand_for_sockets(wanted.as_deref()).await;
        if self.write_lease(wanted.as_deref()) {
            self.write(wanted.as_ref(), &inputs, &usage, started);
            self.write_lease(None);
        }
        self.publish_known();
        self.ask_for_lease(wanted.as_deref(), &usage);
        if self.pinned.plane.as_ref().is_some_and(|plane| plane.inherits()) {
            // Programs of another version wait for the first policy.
            self.attach();
        }
        self.announce(&inputs, synced).await;
        self.forget_refused(started);
        self.keep_peers_resolved(&inputs);
        self.gateways = gateways(&self.pinned.observed, &usage);
        let probed = self.gateways.iter().copied().chain(self.l2.outcome().peers);
        self.prober.watch(&probed.collect());
        self.tell(&inputs, &usage, synced);
        self.look_whether_left(&inputs, started);
    }

    /// Looks whether the fast path, if it is wanted, may be used at present.
    fn look_at_fast_path(&mut self) {
        let fast = self.args.fast_path.then(|| fast::check(Path::new("/proc/sys")));
        if fast != self.fast {
            if let Some(Err(why)) = &fast {
                tracing::warn!("no fast path: {}", why.message);
            }
            self.fast = fast;
            self.dirty = true;
        }
    }

    /// Enters which gateways answer as soon as that has changed: flows wait for it, and a turn may take long.
    fn follow_gateways(&mut self) {
        if Signals::take(&self.signals.gateways) {
            self.dirty = true;
            self.refresh_peers(&BTreeMap::new());
        }
    }

    /// Brings peers to what is known of them, and nothing else.
    fn refresh_peers(&mut self, links: &BTreeMap<Ipv4Addr, desired::PeerLink>) {
        let Some(plane) = &mut self.pinned.plane else { return };
        let ops = ops::refresh_peers(&self.pinned.observed, links, &self.prober.answers());
        if let Err(error) = apply::apply(plane.as_mut(), &ops, &mut self.pinned.observed, &mut self.counts) {
            tracing::error!(%error, "cannot write");
        }
    }

    async fn look_at_network(&mut self) {
        let due = self.network_read.is_none_or(|read| read.elapsed() >= READ_NETWORK_AGAIN);
        if !Signals::take(&self.signals.network) && self.network.is_ok() && !due {
            return;
        }
        self.network_read = Some(Instant::now());
        let network = network::read(&self.netlink).await.map_err(|error| error.to_string());
        if let Err(error) = &network {
            tracing::warn!(error, "cannot read the network");
        }
        self.dirty |= network != self.network;
        self.network = network;
    }

    fn look_at_cni(&mut self) {
        if !Signals::take(&self.signals.cni) {
            return;
        }
        match cni::read_cache(&self.args.cni_cache) {
            Ok(results) => {
                self.dirty |= results != self.cni;
                self.cni = results;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read the CNI results; pods wait for the API server's word")
            }
        }
    }

    fn look_at_groups(&mut self) {
        if !Signals::take(&self.signals.groups) {
            return;
        }
        match groups::read(&self.args.cgroups) {
            Ok(groups) => {
                self.dirty |= groups != self.groups;
                self.groups = groups;
                self.no_groups = None;
            }
            Err(error) => self.no_groups = Some(error.to_string()),
        }
    }

    fn open(&mut self, now: Instant) {
        self.dirty |= self.pinned.open(&self.args, self.write_error.is_some(), now);
        self.settled.read(&self.pinned.observed, now);
    }

    /// What is known now. Before everything has been listed, what the data plane remembers stands in.
    fn inputs(&mut self) -> Inputs {
        let cluster = self.shared.lock();
        // Under the same lock: lists that come in a moment later are not in these inputs.
        // Nor does anybody know what is meant by countries before the first attempt to read them.
        self.synced = cluster.listed() && self.countries.tried;
        let config = self.pinned.observed.config;
        let own = cluster.nodes.objects.get(&(String::new(), self.args.node_name.clone()));
        let tunnel_address = own.and_then(|node| node.addresses.first().copied());
        let remembered = (config.tunnel_address != 0).then(|| from_map(config.tunnel_address));
        let tunnel_address = tunnel_address.or(remembered);
        let pod_ranges = if self.args.pod_cidrs.is_empty() {
            own.map(|node| node.pod_ranges.clone()).filter(|ranges| !ranges.is_empty())
        } else {
            Some(self.args.pod_cidrs.clone())
        };
        let local = Local {
            tunnel_address,
            pod_ranges: pod_ranges.unwrap_or_else(|| remembered_ranges(&self.pinned.observed)),
            cni: &self.cni,
            told: self.told.clone(),
            groups: self.groups.clone(),
            host_levels: config.host_levels,
            network: self.network.as_ref().ok(),
            uplink_mtu: self.devices.uplink_mtu(),
            fast_path: matches!(self.fast, Some(Ok(()))),
            answers: self.prober.answers(),
            room: self.pinned.room(),
            shared: self.pinned.shared(),
            leaving: self.leaving,
            six: self.six(),
            countries: self.countries.database.as_ref().map(|it| Arc::clone(&it.countries)),
        };
        let mut inputs = snapshot::inputs(&self.args, &cluster, &local, &mut self.memory);
        drop(cluster);
        self.name(&mut inputs);
        self.time(&mut inputs);
        inputs
    }

    /// True if uplinks or pod-facing devices have changed.
    fn find_devices(&mut self, inputs: &Inputs) -> bool {
        let Ok(network) = &self.network else { return false };
        let addresses = inputs.pods.iter().flat_map(|pod| &pod.addresses);
        let pods: Vec<Ipv4Addr> = addresses.filter_map(v4).collect();
        let ranges = desired::of_v4(&inputs.pod_ranges);
        let found = uplink::devices(network, &self.args.uplinks, inputs.tunnel_address, &ranges, &pods);
        let changed = found != self.devices;
        self.devices = found;
        self.dirty |= changed;
        changed
    }

    /// Attaches programs to devices that lack them: uplinks first, since pods' packets are marked for them.
    fn attach(&mut self) {
        let (Some(plane), Ok(network)) = (&mut self.pinned.plane, &self.network) else { return };
        let errors = plane.attach(&self.devices, &network.devices.keys().copied().collect());
        for (device, error) in &errors {
            if self.attach_errors.get(device) != Some(error) {
                tracing::error!(device, error, "cannot attach programs");
            }
        }
        self.attach_errors = errors;
    }

    fn attached(&self) -> Attached {
        self.pinned.attached(&self.args, self.network.as_ref().ok())
    }

    /// Whether IPv6 packets may be looked at: what carries the policy out has once stood.
    fn six(&self) -> bool {
        self.table6.state.is_ok() || self.pinned.observed.config6.active == 1
    }

    /// Drops what comes from these uplinks and has not been looked at, from when the table looks on. What there is stays when it is
    /// in doubt.
    async fn keep_rules(&mut self, uplinks: &BTreeMap<u32, String>, mark: u32) {
        let Ok(network) = &self.network else { return };
        if self.table6.state.is_err() {
            return;
        }
        let wanted = uplinks.values().map(|name| (name.clone(), mark)).collect();
        if wanted == network.rules {
            return;
        }
        for ((device, _), error) in rule::bring(&self.netlink, &wanted, &network.rules).await {
            tracing::error!(device, error, "cannot drop what the table ip6 aegis would not have looked at");
        }
        // Read back before the next comparison.
        self.signals.network.store(true, Ordering::Release);
    }

    async fn keep_tables(&mut self, wanted: Option<&Desired>, inputs: &Inputs) {
        let (hold, internal) = match wanted {
            Some(wanted) => (wanted.settings.hold_unknown, desired::internal(inputs)),
            None => {
                (self.pinned.observed.config.hold_unknown == 1, remembered_internal(&self.pinned.observed))
            }
        };
        let Attached { uplinks, pods } = self.attached();
        let unprogrammed =
            self.pinned.plane.is_none() || self.devices.pods.keys().any(|index| !pods.contains_key(index));
        let policy = wanted.filter(|_| unprogrammed).map(|wanted| &wanted.policy);
        let known = policy.into_iter().flat_map(|policy| &policy.pods);
        let uncovered = known.filter(|(_, pod)| pod.class == 0).map(|(pod, _)| Ipv4Net::from(*pod)).collect();
        let known = policy.into_iter().flat_map(|policy| &policy.pods6);
        let uncovered6 =
            known.filter(|(_, pod)| pod.class == 0).map(|(pod, _)| Ipv6Net::from(*pod)).collect();
        if wanted.is_none() && self.pinned.plane.is_none() {
            // Nothing is known: whatever table there is, is better than what could be made up.
            return;
        }
        let mark = if wanted.is_none() && self.pinned.observed.config.mark != 0 {
            self.pinned.observed.config.mark
        } else {
            self.args.mark
        };
        let uplinks: BTreeMap<u32, String> =
            uplinks.into_iter().map(|(index, (name, _))| (index, name)).collect();
        let queries = self.queries(wanted, inputs);
        if self.pinned.observed.config6.active == 1 || desired::needs_six(inputs) {
            let rules = Rules6 {
                mark,
                pods: desired::of_v6(&inputs.pod_ranges),
                pod_devices: pods.clone(),
                uplinks: uplinks.clone(),
                hold,
                internal: desired::of_v6(&internal),
                uncovered: uncovered6,
                queries: queries.clone(),
            };
            self.table6.keep(&rules, self.dirty, &self.signals).await;
            self.keep_rules(&uplinks, mark).await;
        }
        let rules = Rules {
            mark,
            pods: desired::of_v4(&inputs.pod_ranges),
            pod_devices: pods,
            uplinks,
            hold,
            internal: desired::of_v4(&internal),
            uncovered,
            // Not before the programs look: they would take what is marked for a leak.
            hosts: self.pinned.observed.config.host_levels != 0,
            tunnel_port: self.args.tunnel_port,
            nodes: self.tunnel_ends(inputs),
            queries: queries.clone(),
        };
        self.table.keep(&rules, self.dirty, &self.signals).await;
        self.direct(queries);
    }

    /// Where a tunnel ends or may end: addresses of nodes, as they are known and as the data plane remembers them.
    fn tunnel_ends(&self, inputs: &Inputs) -> BTreeSet<Ipv4Addr> {
        let nodes = inputs.nodes.values().flat_map(|node| node.addresses.iter());
        nodes.chain(inputs.tunnels.values()).chain(self.pinned.observed.peer_index.keys()).copied().collect()
    }

    /// Brings the data plane to what is wanted.
    fn write(&mut self, wanted: Option<&Arc<Desired>>, inputs: &Inputs, usage: &Usage, started: Instant) {
        self.look_at_flows(wanted.map(Arc::as_ref), usage);
        let waits = wanted.is_some_and(|wanted| self.waits_for_lease(wanted));
        let Some(wanted) = wanted else {
            return self.refresh_peers(&inputs_links(inputs, &self.network, &self.pinned.observed));
        };
        let Some(plane) = &mut self.pinned.plane else { return };
        if waits || !self.dirty && self.write_error.is_none() {
            return;
        }
        // Before the first policy goes live, what carries it out must be there.
        let first = self.pinned.observed.config.generation == 0;
        if first
            && (self.table.state.is_err()
                || !self.attach_errors.is_empty()
                || self.devices.uplinks.is_empty())
        {
            return;
        }
        let change = ops::transition(wanted, &self.pinned.observed, &self.known);
        for address in change.stale.difference(&self.stale) {
            tracing::warn!(%address, "its object is older than what the data plane has; it is not followed");
        }
        let host_levels = self.pinned.observed.config.host_levels;
        let switches = change.ops.iter().any(|op| matches!(op, Op::SetConfig(_)));
        if switches || self.known.rules.as_deref() != Some(&change.rules) {
            // Numbers may get other names.
            let highest = change.rules.last_key_value().map_or(0, |(number, _)| *number as usize + 1);
            self.tally.take(plane.as_ref(), highest);
        }
        // Until all of it is written.
        let rules = Arc::new(change.rules);
        self.known.rules = None;
        let result = tokio::task::block_in_place(|| {
            apply::apply(plane.as_mut(), &change.ops, &mut self.pinned.observed, &mut self.counts)
        });
        self.settled.wrote(&change.ops, Instant::now());
        (self.stale, self.orphaned, self.full) = (change.stale, change.orphaned, change.full);
        self.lingering = change.lingering;
        match result {
            Ok(()) => {
                if !change.ops.is_empty() {
                    let milliseconds = started.elapsed().as_secs_f64() * 1000.0;
                    tracing::info!(
                        writes = change.ops.len(),
                        generation = self.pinned.observed.config.generation,
                        milliseconds,
                        "data plane follows"
                    );
                    self.metrics.reconciled(started.elapsed().as_secs_f64());
                }
                self.numbers = change.numbers;
                self.pinned.names.set(tallying::names(&rules, &self.numbers, wanted, inputs));
                self.tally.name(
                    self.pinned.observed.config.generation,
                    &rules,
                    &wanted.covered.keys().collect(),
                );
                self.known.rules = Some(rules);
                self.write_error = None;
                self.naming.in_force(inputs, wanted);
                // Now that the programs look at the node's own sockets, the table and the policy follow.
                self.dirty = self.pinned.observed.config.host_levels != host_levels;
                if self.dirty {
                    self.signals.wake();
                }
                let before = self.in_force.as_ref().map(|before| &before.wanted.policy);
                if before.is_none_or(|before| refused::may_uncover(before, &wanted.policy)) {
                    self.refused.request();
                }
                // Those without allocation stand for bindings that cannot be read: there is nothing to report of them.
                let readable = inputs.bindings.iter().filter(|binding| !binding.allocation.name.is_empty());
                self.in_force = Some(Arc::new(InForce {
                    wanted: Arc::clone(wanted),
                    bindings: readable.cloned().collect(),
                    policies: inputs.policies.clone(),
                }));
            }
            Err(error) => {
                tracing::error!(%error, "cannot write to the data plane; reading it anew");
                self.write_error = Some(error.to_string());
            }
        }
    }

    /// Beside everything else, since it may take long.
    fn forget_refused(&mut self, now: Instant) {
        let Some(plane) = self.pinned.plane.as_ref().filter(|_| self.refused.take(now)) else { return };
        match plane.forget_refused(self.pinned.observed.config.mark) {
            Ok(forget) => drop(tokio::task::spawn_blocking(move || match forget() {
                Ok(0) => {}
                Ok(connections) => tracing::info!(connections, "refused before: judged anew"),
                Err(error) => tracing::warn!(%error, "what was refused before may stay so"),
            })),
            Err(error) => tracing::warn!(%error, "what was refused before may stay so"),
        }
    }

    /// Egress addresses that no longer have an object and, by a scan that began after their right to open flows had
    /// ended, carry no flow; and what else no flow needs.
    fn look_at_flows(&mut self, wanted: Option<&Desired>, usage: &Usage) {
        let Some(wanted) = wanted else { return };
        let observed = &self.pinned.observed;
        let gone = observed.addresses.keys().filter(|address| !wanted.addresses.contains_key(address));
        let v4 = gone
            .filter(|address| self.settled.address(**address, usage) && !usage.slices.contains_key(address));
        let gone = observed.networks.iter().filter(|(network, _)| !wanted.networks.contains_key(network));
        let v6 = gone.filter(|(network, value)| {
            self.settled.address(**network, usage)
                && !usage.networks.contains_key(&(**network, value.identity))
        });
        let idle: BTreeSet<Egress> =
            v4.map(|own| observed.egress(*own)).chain(v6.map(|(network, _)| *network)).collect();
        self.dirty |= idle != self.known.idle;
        self.known.idle = idle;
        self.known.flows = self.settled.named(usage);
        let goes = |flows: &ops::Named| self.lingering.iter().any(|peer| !flows.peers.contains(peer));
        self.dirty |= self.known.flows.as_ref().is_some_and(goes);
    }

    fn keep_peers_resolved(&mut self, inputs: &Inputs) {
        let peers: Vec<Ipv4Addr> = self
            .pinned
            .observed
            .peer_index
            .keys()
            .copied()
            .filter(|peer| Some(*peer) != inputs.tunnel_address)
            .collect();
        let Ok(network) = &self.network else { return };
        let links = neighbour::links(network, peers.iter().copied());
        // Also the next hops of what a gateway sends on for others, which never passes the kernel's own stack.
        let wanted =
            self.pinned.plane.as_ref().and_then(|plane| plane.unresolved(WANTED).ok()).unwrap_or_default();
        let peers = peers.into_iter().chain(wanted);
        if let Err(error) = self.resolver.provoke(peers, &links, Instant::now()) {
            tracing::warn!(%error, "cannot speak to peers");
        }
    }
}

fn v4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    }
}

/// Nodes through which flows leave or may: what the data plane goes by, whether or not the API server can be reached.
fn gateways(observed: &Observed, usage: &Usage) -> BTreeSet<Ipv4Addr> {
    let listed = observed.allocations.values().flat_map(|entry| entry.gateways).map(u32::from);
    let peers = listed.chain(usage.gateways.iter().copied());
    peers.filter_map(|index| Some(from_map(observed.peers.get(&index)?.address))).collect()
}

fn remembered_ranges(observed: &Observed) -> Vec<IpNet> {
    let (config, config6) = (&observed.config, &observed.config6);
    let v4 = config.pod_ranges.iter().take(config.pod_range_count as usize);
    let v4 = v4
        .filter_map(|range| Ipv4Net::with_netmask(from_map(range.network), from_map(range.mask)).ok())
        .map(IpNet::from);
    let v6 = config6.pod_ranges.iter().take(config6.pod_range_count as usize);
    let v6 = v6
        .filter_map(|range| Ipv6Net::with_netmask(from_map6(range.network), from_map6(range.mask)).ok())
        .map(IpNet::from);
    v4.chain(v6).collect()
}

fn remembered_internal(observed: &Observed) -> Vec<IpNet> {
    let live = observed.generations.get(&observed.config.generation);
    let destinations = live.into_iter().flat_map(|live| &live.destinations);
    destinations.filter(|(_, class)| **class == DESTINATION_INTERNAL).map(|(range, _)| *range).collect()
}

fn inputs_links(
    inputs: &Inputs,
    network: &Result<Network, String>,
    observed: &Observed,
) -> BTreeMap<Ipv4Addr, desired::PeerLink> {
    let peers = observed.peer_index.keys().copied().filter(|peer| Some(*peer) != inputs.tunnel_address);
    network.as_ref().map(|network| neighbour::links(network, peers)).unwrap_or_default()
}
