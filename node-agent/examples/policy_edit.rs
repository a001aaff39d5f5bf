//! What an edit of a policy costs on a node with many: `cargo run --release -p aegis-node-agent --example policy_edit` (as root).
//! With 500 policies that name 500 hosts and the 20,000 ranges of 200 countries, on a node with 250 pods, in real maps. For each edit
//! how long it takes to compile, to find the writes, and to write until it is in force, and how many writes there are; then the
//! memory of the maps, and nanoseconds for the first packet of a flow beside the same with one policy.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a tool for developers")]

#[path = "../tests/support/mod.rs"]
mod support;

use aegis_core::model::{Address, AllocationName, Holding, State};
use aegis_core::policy::names::{HostPattern, Resolved};
use aegis_core::policy::{Countries, EgressPolicy, Exit, Identity, Pod, PortRange, Posture, Room, in_order};
use aegis_node_agent::apply::{Plane, apply};
use aegis_node_agent::args::Args;
use aegis_node_agent::desired::{Inputs, desired};
use aegis_node_agent::kernel;
use aegis_node_agent::objects::NodeRecord;
use aegis_node_agent::observed::Observed;
use aegis_node_agent::ops::{Known, Named, Op, transition};
use aegis_node_agent::test_run;
use clap::Parser;
use ipnet::{IpNet, Ipv4Net};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::packet::{Packet, SYN};
use support::{World, context};

/// As the agent has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const POLICIES: u32 = 500;
const PODS: u32 = 250;
const COUNTRIES: u32 = 200;
const RANGES: u32 = 20_000;
/// Policies are about one of so many teams each.
const TEAMS: u32 = 50;
const ACCOUNTS: u32 = 20;
/// Allocations of each account.
const ALLOCATIONS: u32 = 7;
/// Each edit is made and undone so many times.
const TURNS: usize = 5;
/// What the ranges are taken from (RFC 2544).
const FIRST: u32 = Ipv4Addr::new(198, 18, 0, 0).to_bits();

fn pod(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 244, 1, 2).to_bits() + number)
}

fn range(number: u32) -> IpNet {
    Ipv4Net::new(Ipv4Addr::from_bits(FIRST + number * 4), 30).unwrap().into()
}

/// An address in some country, or outside of all.
fn host(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(FIRST + number * 173)
}

/// What the hosts' names mean; one of them has another address beside its own.
fn resolved(more: Option<u32>) -> Resolved {
    let of = |number: u32| {
        let other = (more == Some(number)).then(|| host(POLICIES + number).into());
        (name(number), std::iter::once(host(number).into()).chain(other).collect::<BTreeSet<IpAddr>>())
    };
    (0..POLICIES).map(of).collect()
}

fn name(number: u32) -> HostPattern {
    HostPattern::new(&format!("h{number}.example")).unwrap()
}

fn country(number: u32) -> String {
    format!("{}", number % COUNTRIES)
}

fn policy(number: u32) -> EgressPolicy {
    EgressPolicy {
        name: format!("p{number:03}"),
        precedence: number as i32,
        identity: Identity {
            labels: [("team".to_owned(), format!("t{}", number % TEAMS))].into(),
            ..Identity::default()
        },
        posture: Posture::default(),
        countries: (0..4).map(|nth| country(number * 7 + nth * 31)).collect(),
        applications: Vec::new(),
        observes: number % 5 == 4,
        sources: Vec::new(),
        cidrs: Vec::new(),
        hosts: vec![name(number)],
        ports: match number % 10 {
            0 => vec![PortRange { protocol: 6, first: 8000 + number as u16, last: 8100 + number as u16 }],
            _ => Vec::new(),
        },
        exit: match number % 3 {
            0 => Exit::Deny,
            _ => Exit::Allocations { primary: format!("a{}", number % ALLOCATIONS), secondary: None },
        },
        generation: 1,
    }
}

/// Everything else is refused.
fn last() -> EgressPolicy {
    EgressPolicy {
        name: "the-rest".into(),
        precedence: i32::MAX,
        identity: Identity::default(),
        posture: Posture::default(),
        countries: Vec::new(),
        applications: Vec::new(),
        observes: false,
        sources: Vec::new(),
        cidrs: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
        hosts: Vec::new(),
        ports: Vec::new(),
        exit: Exit::Deny,
        generation: 1,
    }
}

fn inputs(policies: u32) -> Inputs {
    let countries: Countries = (0..COUNTRIES)
        .map(|it| {
            let of = RANGES / COUNTRIES;
            (country(it), (it * of..(it + 1) * of).map(range).collect())
        })
        .collect();
    let names = (0..ACCOUNTS).flat_map(|account| (0..ALLOCATIONS).map(move |number| (account, number)));
    let addresses = names.enumerate().map(|(at, (account, number))| {
        let own = Ipv4Addr::from_bits(Ipv4Addr::new(203, 0, 113, 0).to_bits() + at as u32);
        let holding = Holding { first: 8, last: 15, node: "n0".into(), epoch: 1, state: State::Held };
        let address = Address {
            address: own.into(),
            prefix: "p".into(),
            allocation: AllocationName { account: format!("shop{account}"), name: format!("a{number}") },
            epoch: 1,
            holdings: vec![holding],
            fence: None,
        };
        (own, address)
    });
    let nodes = (0..100u8).map(|node| {
        let record = NodeRecord {
            addresses: vec![Ipv4Addr::new(192, 0, 2, node + 1)],
            pod_ranges: vec![Ipv4Net::new(Ipv4Addr::new(10, 244, node + 1, 0), 24).unwrap().into()],
            ..NodeRecord::default()
        };
        (format!("n{node}"), record)
    });
    Inputs {
        node: "n0".into(),
        pods: (0..PODS)
            .map(|number| Pod {
                account: format!("shop{}", number % ACCOUNTS),
                name: format!("pod{number}"),
                uid: format!("{number}"),
                labels: [("team".to_owned(), format!("t{}", number % TEAMS))].into(),
                addresses: vec![pod(number).into()],
                ..Pod::default()
            })
            .collect(),
        policies: (0..policies).map(policy).chain([last()]).collect(),
        countries: Some(Arc::new(countries)),
        resolved: (1, Arc::new(resolved(None))),
        addresses: addresses.collect(),
        nodes: nodes.collect(),
        tunnel_address: Some(Ipv4Addr::new(192, 0, 2, 1)),
        pod_ranges: vec!["10.244.1.0/24".parse().unwrap()],
        uplink_mtu: Some(1500),
        mark: support::MARK,
        tunnel_port: 6081,
        refusals_per_second: 100,
        room: Room { destinations: 1 << 15, ports: 1 << 15, verdicts: 1 << 17 },
        ..Inputs::default()
    }
}

/// A node's maps, and what is in them.
struct Node {
    world: World,
    plane: Box<dyn Plane>,
    observed: Observed,
    known: Known,
}

/// How long the steps of a change took.
#[derive(Clone, Copy, Default)]
struct Times {
    compile: Duration,
    transition: Duration,
    /// Until the last write that changes what becomes of a packet.
    in_force: Duration,
    /// Until what is no longer used is gone, too.
    clean: Duration,
    writes: usize,
    switched: bool,
}

impl Node {
    fn new() -> Node {
        let world = World::new();
        let root = world.root().to_str().unwrap().to_owned();
        let args = Args::parse_from(["x", "--node-name", "n0", "--pin-root", &root]);
        let mut plane = kernel::open(&args).unwrap();
        let observed = plane.read().unwrap();
        let known = Known { flows: Some(Named::default()), ..Known::default() };
        Node { world, plane, observed, known }
    }

    /// The same by a new generation, its entries written in batches or one by one.
    fn bring_anew(&mut self, inputs: &Inputs, batches: bool) -> Times {
        // As an agent does that does not know whose the numbers of rules are.
        self.known.rules = None;
        self.bring_by(inputs, batches)
    }

    fn bring(&mut self, inputs: &Inputs) -> Times {
        self.bring_by(inputs, true)
    }

    fn bring_by(&mut self, inputs: &Inputs, batches: bool) -> Times {
        let begun = Instant::now();
        let wanted = desired(inputs);
        assert!(wanted.refused.is_empty() && !wanted.unobserved);
        let compile = begun.elapsed();
        let begun = Instant::now();
        let change = transition(&wanted, &self.observed, &self.known);
        let transition = begun.elapsed();
        let (generation, writes) = (self.observed.config.generation, change.ops.len());
        let last = change.ops.iter().rposition(|op| *op == Op::Settle).unwrap_or(change.ops.len());
        let (first, rest) = change.ops.split_at(last);
        let begun = Instant::now();
        self.write(first, batches);
        let in_force = begun.elapsed();
        self.write(rest, batches);
        let clean = begun.elapsed();
        self.known.rules = Some(Arc::new(change.rules));
        let switched = self.observed.config.generation != generation;
        Times { compile, transition, in_force, clean, writes, switched }
    }
}

impl Node {
    fn write(&mut self, ops: &[Op], batches: bool) {
        for ops in ops.chunks(if batches { ops.len().max(1) } else { 1 }) {
            apply(self.plane.as_mut(), ops, &mut self.observed, &mut (0, 0)).unwrap();
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print(what: &str, times: &[Times]) {
    let of = |part: fn(&Times) -> Duration| {
        median(times.iter().map(|it| part(it).as_secs_f64() * 1000.0).collect())
    };
    let whole = |it: &Times| it.compile + it.transition + it.in_force;
    let worst = times.iter().map(whole).max().unwrap_or_default();
    println!(
        "{what:<26} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>8}{}",
        of(|it| it.compile),
        of(|it| it.transition),
        of(|it| it.in_force),
        of(|it| it.compile + it.transition + it.in_force),
        worst.as_secs_f64() * 1000.0,
        of(|it| it.clean),
        times.iter().map(|it| it.writes).max().unwrap_or_default(),
        if times.iter().any(|it| it.switched) { "  a new generation" } else { "" },
    );
}

type Edit = fn(&mut Inputs);

fn edits() -> Vec<(&'static str, Edit)> {
    fn at(inputs: &mut Inputs, number: usize) -> &mut EgressPolicy {
        &mut inputs.policies[number]
    }
    vec![
        ("another allocation", |it| {
            at(it, 7).exit = Exit::Allocations { primary: "a5".into(), secondary: None };
        }),
        ("refused", |it| at(it, 7).exit = Exit::Deny),
        ("a range more", |it| at(it, 8).cidrs.push("192.0.2.128/25".parse().unwrap())),
        ("a range around others", |it| at(it, 8).cidrs.push("198.18.0.0/20".parse().unwrap())),
        ("a country more", |it| at(it, 12).countries.push(country(77))),
        ("a country less", |it| _ = at(it, 12).countries.pop()),
        ("other ports", |it| {
            at(it, 20).ports = vec![PortRange { protocol: 6, first: 443, last: 443 }];
        }),
        ("precedence", |it| at(it, 21).precedence = 371),
        ("a new policy", |it| {
            let number = POLICIES / TEAMS * TEAMS + 11;
            it.policies.push(EgressPolicy {
                precedence: 2,
                countries: vec![country(3), country(4)],
                ..policy(number)
            });
        }),
        ("a policy less", |it| _ = it.policies.remove(33)),
        ("labels of a pod", |it| _ = it.pods[3].labels.insert("team".into(), "t9".into())),
        ("another address of a name", |it| {
            it.resolved = (2, Arc::new(resolved(Some(3))));
        }),
    ]
}

/// Nanoseconds for the first packet of a flow, by turns: caches as warm as they get, and another destination each time.
fn new_flows(nodes: [&Node; 2]) -> [[f64; 2]; 2] {
    const TURNS: u32 = 201;
    const LOOP: u32 = 20_000;
    let mut found = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
    for turn in 0..TURNS {
        for (node, found) in nodes.iter().zip(&mut found) {
            let program = node.world.program("pod_ingress");
            let frame = |at: u32| {
                let destination = Ipv4Addr::from_bits(FIRST + at.wrapping_mul(2_654_435_761) % (RANGES * 4));
                Packet::tcp((pod(at % PODS), 2000), (destination, 443), SYN).frame()
            };
            let warm = test_run::run(program, &frame(turn), &context(0), LOOP).unwrap();
            found[0].push(f64::from(warm.nanoseconds));
            let cold: u32 = (0..500)
                .map(|at| {
                    let outcome = test_run::run(program, &frame(turn * 500 + at), &context(0), 1).unwrap();
                    outcome.nanoseconds
                })
                .sum();
            found[1].push(f64::from(cold) / 500.0);
        }
    }
    found.map(|found| found.map(median))
}

/// Bytes that a map has.
fn memory(node: &Node, map: &'static str) -> u64 {
    let path = format!("/proc/self/fdinfo/{}", node.world.plane.map_fd(map).unwrap().as_raw_fd());
    let info = std::fs::read_to_string(path).unwrap();
    let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:")).unwrap();
    bytes.trim().parse().unwrap()
}

fn main() {
    let base = inputs(POLICIES);
    assert_eq!(in_order(&base.policies).len() as u32, POLICIES + 1);
    let mut node = Node::new();
    println!("milliseconds (median of {TURNS}, worst), and writes");
    println!(
        "{:<26} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "", "compile", "diff", "write", "in force", "worst", "clean", "writes"
    );
    let first = node.bring(&base);
    print("the first", &[first]);
    // What the world had before is gone after a while.
    (0..3).for_each(|_| _ = node.bring(&base));
    print("nothing", &[node.bring(&base)]);
    for (what, edit) in edits() {
        let mut edited = base.clone();
        edit(&mut edited);
        let (mut made, mut undone) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            made.push(node.bring(&edited));
            undone.push(node.bring(&base));
        }
        print(what, &made);
        print("  undone", &undone);
    }
    let mut edited = base.clone();
    edits()[0].1(&mut edited);
    for (what, batches) in [("a whole generation", true), ("  one write at a time", false)] {
        let times: Vec<Times> = (0..TURNS)
            .map(|_| {
                let times = node.bring_anew(&edited, batches);
                node.bring(&base);
                times
            })
            .collect();
        print(what, &times);
    }
    println!("\nentries and memory of the maps");
    let live = &node.observed.generations[&node.observed.config.generation];
    for (map, entries) in [
        ("PODS", live.pods.len()),
        ("DESTINATIONS", live.destinations.len()),
        ("PORTS", live.ports.len()),
        ("VERDICTS", live.verdicts.len()),
    ] {
        println!("{map:<14} {entries:>8} {:>10} KiB", memory(&node, map) / 1024);
    }
    let mut one = Node::new();
    one.bring(&inputs(0));
    let [many, one] = new_flows([&node, &one]);
    println!("\nnanoseconds for the first packet of a flow, {POLICIES} policies and one");
    for (what, many, one) in [("the same again", many[0], one[0]), ("another each time", many[1], one[1])] {
        println!("{what:<18} {many:>6.0} {one:>6.0} {:>6.2}", many / one);
    }
}
