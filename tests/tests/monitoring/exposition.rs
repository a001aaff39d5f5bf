//! What is scraped. The operator and the collector are the real ones, as processes, with the rights that the chart gives them, before a
//! real API server.
//! The agents' pages come from the agent's own server, registry and encoder; what a data plane would count, the test writes into
//! the snapshot from which these are made, since a data plane needs a node of its own. The end-to-end tests read the same pages of real agents.

use crate::prometheus::{ask, get};
use aegis_common::{Counter, CounterValue, LimitedValue, RuleValue};
use aegis_core::fence::{LABEL, lease_name};
use aegis_node_agent::load::Taken;
use aegis_node_agent::meter::Fill;
use aegis_node_agent::metrics::{Counters, Metrics, RuleCount, Snapshot};
use aegis_node_agent::names::Tally;
use aegis_node_agent::server;
use aegis_node_agent::status::{NotReady, reason};
use aegis_tests::apiserver::{ApiServer, NAMESPACE, free_ports, spawn};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::runtime::Runtime;

/// Nodes of the cluster.
pub const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// Allocations of the account `shop`, each with an address.
const ALLOCATIONS: [(&str, Ipv4Addr); 2] =
    [("partners", Ipv4Addr::new(203, 0, 113, 4)), ("fenced", Ipv4Addr::new(203, 0, 113, 5))];

/// What grows while all is well. Everything else stands still.
const WELL: [Counter; 17] = [
    Counter::Translated,
    Counter::NewFlow,
    Counter::PastHighWater,
    Counter::Reverse,
    Counter::Steered,
    Counter::SteeredHere,
    Counter::ToGateway,
    Counter::Guest,
    Counter::Returned,
    Counter::FromGateway,
    Counter::Probed,
    Counter::RefuseNoFlow,
    Counter::DropNoOwner,
    Counter::DropNoFlow,
    Counter::DropWaiting,
    Counter::Expired,
    Counter::TooBig,
];

/// The agents of three nodes, each with a server of its own.
pub struct Agents {
    /// A port for each node.
    pub ports: [u16; 3],
    ill: Arc<AtomicBool>,
    _runtime: Runtime,
}

impl Agents {
    /// Begins to serve, and to count.
    pub fn start() -> Agents {
        let runtime = Runtime::new().expect("a runtime");
        let ill = Arc::new(AtomicBool::new(false));
        let ports = free_ports().expect("find free ports");
        for (number, port) in ports.into_iter().enumerate() {
            let (metrics, ill) = (Metrics::default(), Arc::clone(&ill));
            let served = metrics.clone();
            let reports = Arc::new(Mutex::new(waiting(0, false)));
            let counted = Arc::clone(&reports);
            metrics.follow_usage(move || *counted.lock().expect("nobody fails while it is locked"));
            runtime.spawn(async move {
                let address = SocketAddr::from(([127, 0, 0, 1], port));
                server::serve(address, served).await.expect("serve metrics");
            });
            runtime.spawn(async move {
                // Turns, and those of them in which the last node was ill.
                let (mut turns, mut ills) = (0, 0);
                loop {
                    let now_ill = number == NODES.len() - 1 && ill.load(Ordering::Relaxed);
                    turns += 1;
                    ills += u64::from(now_ill);
                    *metrics.lock() = figures(turns, ills, now_ill);
                    *reports.lock().expect("nobody fails while it is locked") = waiting(ills, now_ill);
                    metrics.reconciled(0.004);
                    metrics.runtime_waited("run", "in_force", 0.02);
                    metrics.lease_renewed("success");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
        }
        Agents { ports, ill, _runtime: runtime }
    }

    /// From now on everything that an alert looks for is wrong with the last node.
    pub fn fall_ill(&self) {
        self.ill.store(true, Ordering::Relaxed);
    }
}

/// Reports of use: one that has just been made, or many for a while already.
fn waiting(ills: u64, ill: bool) -> Counters {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() as i64;
    let (waiting, age) = if ill { (120, 1_200) } else { (1, 5) };
    Counters { waiting, oldest: Some(now - age), lost: [5 * ills, 0, 0, 0, 0, 0], ..Counters::default() }
}

fn figures(turns: u64, ills: u64, ill: bool) -> Snapshot {
    let count = |counter: &Counter| {
        let packets = if WELL.contains(counter) { 10 * turns } else { 5 * ills };
        CounterValue { packets, bytes: 900 * packets }
    };
    let of_allocations = || ALLOCATIONS.iter().map(|(name, _)| ("shop".to_owned(), (*name).to_owned()));
    let rule = |kind, name: &str, observes| RuleCount {
        kind,
        namespace: if kind == "binding" { "shop".to_owned() } else { String::new() },
        name: name.to_owned(),
        observes,
        value: RuleValue { left: 10 * turns, lacked: 5 * ills, denied: 0, would: [turns; 4] },
    };
    let size = |room: u64| (room * if ill { 9 } else { 1 } / 10, room);
    let day = 86_400;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    Snapshot {
        counters: Counter::ALL.iter().map(count).collect(),
        rules: vec![
            rule("binding", "partners", false),
            rule("policy", "cards", false),
            rule("policy", "tried", true),
        ],
        countries: Some((now - if ill { 40 * day } else { 3 * day }, 400_000)),
        country_failures: ills,
        tables: [
            ("flows", size(1 << 20)),
            ("blocks", size(1 << 16)),
            ("verdicts", size(1 << 17)),
            ("hosts", (0, 0)),
        ]
        .into(),
        ports: ALLOCATIONS.map(|(_, address)| (address.into(), 1200)).into(),
        sockets: ALLOCATIONS.map(|(_, address)| (address, 40)).into(),
        slices: ALLOCATIONS.map(|(_, address)| (address.into(), (16, 1))).into(),
        fill: of_allocations().map(|name| (name, if ill { 93 } else { 30 })).collect(),
        limited: of_allocations()
            .map(|name| (name, LimitedValue { pod_flows: 5 * ills, ..Default::default() }))
            .collect(),
        taken: of_allocations().map(|name| (name, Taken { flows: 1200, busiest_pod: 300 })).collect(),
        generation: 7,
        pods: (12, 30),
        groupless: 0,
        announced: 2,
        sessions: if ill { (1, 1) } else { (2, 0) },
        routing_daemon: !ill,
        route_repairs: 0,
        answers: ALLOCATIONS.map(|(_, address)| (address.into(), true)).into(),
        vacant: usize::from(ill),
        silent_gateways: usize::from(ill),
        watch_errors: ill.into(),
        invalid_objects: 0,
        stale_addresses: 0,
        orphaned_addresses: 0,
        holding_unknown: true,
        runtime_hook: Some(true),
        xdp_tx_errors: [("eth0".to_owned(), 5 * ills)].into(),
        early_fragments: (turns, 0),
        meters: Some(Fill { in_use: 900, size: 16_383 }),
        nft_repairs: 0,
        nft_drops: [(("ip", "tunnel"), 5 * ills), (("ip", "invalid"), turns), (("ip6", "unasked"), turns)]
            .into(),
        writes: (3 * turns, 0),
        scan_seconds: 0.02,
        lease_seconds_left: Some(if ill { 0.0 } else { 55.0 }),
        names: Tally { known: (20, 8192), refused: BTreeMap::from([("full", 5 * ills)]), ..Tally::default() },
        ready: if ill {
            Err(NotReady { reason: reason::WRITE_FAILED, message: "a test".into() })
        } else {
            Ok(())
        },
        alive: Instant::now(),
    }
}

/// A program of the chart as a process, with the rights of its service account.
struct Program {
    /// Where it serves its metrics.
    port: u16,
    child: Child,
}

impl Program {
    /// The one of this name that was compiled beside this test, which is named so in the chart, too.
    fn start(server: &ApiServer, name: &str, port: u16, arguments: &[String]) -> Program {
        let token = server.kubectl(&["create", "token", name, "--namespace", NAMESPACE]).expect("a token");
        let kubeconfig = server.kubeconfig_of(name, token.trim()).expect("write a kubeconfig");
        let mut command = Command::new(program(name));
        command.env("KUBECONFIG", kubeconfig).args(arguments);
        let child = spawn(command, &server.folder().join(format!("{name}.log"))).expect("start the program");
        Program { port, child }
    }

    fn wait_until(&self, what: &str, line: impl Fn(&str) -> bool) {
        let limit = Instant::now() + Duration::from_secs(60);
        loop {
            let page = get(self.port, "/metrics").unwrap_or_default();
            if page.lines().any(&line) {
                return;
            }
            assert!(Instant::now() < limit, "after 60 s not so: {what}\n{page}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The collector, with a store of its own.
pub struct Collector {
    program: Program,
    /// Where reports are delivered.
    reports: u16,
    /// Deliveries so far.
    count: AtomicU32,
}

impl Collector {
    /// Starts it before the operator's API server.
    pub fn start(operator: &Operator) -> Collector {
        let [port, reports] = free_ports().expect("find free ports");
        let server = &operator.server;
        let arguments = [
            format!("--listen=127.0.0.1:{reports}"),
            format!("--metrics-listen=127.0.0.1:{port}"),
            format!("--database={}", server.folder().join("use.db").display()),
        ];
        let program = Program::start(server, "aegis-collector", port, &arguments);
        let limit = Instant::now() + Duration::from_secs(60);
        while let Err(answer) = get(port, "/readyz") {
            assert!(Instant::now() < limit, "it is not ready: {answer}");
            std::thread::sleep(Duration::from_millis(100));
        }
        let collector = Collector { program, reports, count: AtomicU32::new(0) };
        // Only what has happened once has a figure.
        let answer = collector.deliver().expect_err("nobody's token");
        assert!(answer.contains("not valid"), "{answer}");
        collector
    }

    /// Where it serves its metrics.
    pub fn port(&self) -> u16 {
        self.program.port
    }

    /// Delivers nothing, with a token that it has not seen yet and which is nobody's.
    pub fn deliver(&self) -> Result<String, String> {
        let token = self.count.fetch_add(1, Ordering::Relaxed);
        let head = format!("Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nContent-Length: 2");
        ask(
            self.reports,
            &format!("POST /v1/reports HTTP/1.0\r\n{head}\r\nContent-Type: application/json\r\n\r\n[]"),
        )
    }
}

/// The operator, and the API server before which it runs.
pub struct Operator {
    // It ends first.
    program: Program,
    server: ApiServer,
}

impl Operator {
    /// Starts both.
    pub fn start() -> Operator {
        let server = ApiServer::start().expect("start the API server");
        // Its admission policies would let nobody but agents speak for nodes.
        server.install_chart(&["admission.enabled=false", "usage.enabled=true"]).expect("install the chart");
        let [port] = free_ports().expect("find a free port");
        let arguments = [
            format!("--listen=127.0.0.1:{port}"),
            format!("--namespace={NAMESPACE}"),
            "--identity=replica-1".to_owned(),
        ];
        let program = Program::start(&server, "aegis-operator", port, &arguments);
        program.wait_until("it leads", |line| line == "aegis_operator_leader 1");
        Operator { server, program }
    }

    /// Where it serves.
    pub fn port(&self) -> u16 {
        self.program.port
    }

    /// There are nodes that are ready and two allocations; waits until slices of both addresses are given out.
    pub fn has_work(&self) {
        self.apply(&everything());
        NODES.iter().for_each(|node| self.report(node, 30));
        for (_, address) in ALLOCATIONS {
            let of_address = format!("aegis_operator_slices{{address=\"{address}\"");
            self.program.wait_until("slices are held", |line| {
                line.starts_with(&of_address) && line.contains("\"held\"") && !line.ends_with(" 0")
            });
        }
    }

    /// Ports come to an end, and an allocation gets no node.
    pub fn run_short(&self) {
        NODES.iter().for_each(|node| self.report(node, 95));
        let sites = json!([{"name": "nowhere", "nodeSelector": {"zone": "nowhere"}}]);
        self.apply(&[allocation("lost", json!({"prefixes": ["documentation"], "sites": sites}))]);
    }

    /// Takes the rights from operator and collector, and gives the operator something to do.
    pub fn lose_rights(&self) {
        let bindings = ["delete", "clusterrolebinding", "aegis-operator", "aegis-collector"];
        self.server.kubectl(&bindings).expect("delete the bindings");
        self.apply(&[allocation("late", json!({"prefixes": ["documentation"]}))]);
    }

    fn apply(&self, objects: &[Value]) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string();
        self.server.kubectl_with(&["apply", "-f", "-"], &list).expect("apply objects");
    }

    /// What the agent of a node reports.
    fn report(&self, node: &str, fill: u32) {
        let partners = json!({"namespace": "shop", "name": "partners"});
        let status = json!({"status": {
            "tunnelAddress": "192.0.2.1",
            "version": "test",
            "addresses": [],
            "bindings": [],
            "demand": [{"allocation": partners, "slices": 16, "fillPercent": fill, "refused": 0, "reason": ""}],
            "conditions": [{
                "type": "Ready", "status": "True", "reason": "Test", "message": "",
                "lastTransitionTime": "2020-01-01T00:00:00Z",
            }],
        }});
        let patch = status.to_string();
        let arguments = ["patch", "enode", node, "--subresource=status", "--type=merge", "--patch", &patch];
        self.server.kubectl(&arguments).expect("report");
    }
}

/// The program that was compiled beside this test.
fn program(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("this program");
    let program = this.ancestors().nth(2).expect("a folder").join(name);
    assert!(program.is_file(), "{} is missing: run `cargo build --workspace --bins`", program.display());
    program
}

fn allocation(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressAllocation",
        "metadata": {"name": name, "namespace": "shop"}, "spec": spec,
    })
}

fn everything() -> Vec<Value> {
    let cluster_wide = |version: &str, kind: &str, name: &str| json!({"apiVersion": version, "kind": kind, "metadata": {"name": name}});
    let own = "aegis.dev/v1alpha1";
    let mut objects =
        vec![cluster_wide("v1", "Namespace", "shop"), cluster_wide(own, "AegisPrefix", "documentation")];
    objects[1]["spec"] = json!({"cidr": "203.0.113.0/28", "account": "shop"});
    for (name, address) in ALLOCATIONS {
        let mut spec = json!({"prefixes": ["documentation"], "addresses": {"explicit": [address]}});
        if name == "fenced" {
            // Longer than any test, so that a Lease need not be renewed.
            spec["fence"] = json!({"mode": "Time", "afterSeconds": 3600});
        }
        objects.push(allocation(name, spec));
    }
    for node in NODES {
        objects.push(cluster_wide("v1", "Node", node));
        let mut report = cluster_wide(own, "EgressNode", node);
        report["spec"] = json!({});
        objects.push(report);
        objects.push(json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": lease_name(node), "namespace": NAMESPACE, "labels": {LABEL.0: LABEL.1}},
            "spec": {"holderIdentity": node, "leaseDurationSeconds": 3600, "renewTime": "2020-01-01T00:00:00.000000Z"},
        }));
    }
    objects
}
