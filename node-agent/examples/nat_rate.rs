//! What one node translates, beside what the kernel's own NAT does on the same topology, by turns: `cargo run --release -p
//! aegis-node-agent --example nat_rate -- RESULTS.json TABLE.md` (as root; wants the machine for itself, takes five minutes).
//!
//! Pod, node and origin are network namespaces joined by veth pairs. The references are nftables with masquerade and with SNAT
//! onto the same address and ports, with an XDP program on the uplink that passes everything: a veth without any is another
//! device.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a tool for developers")]

#[path = "nat_rate/gateway.rs"]
mod gateway;
#[path = "nat_rate/measure.rs"]
mod measure;
#[path = "../tests/netns_support/mod.rs"]
mod netns_support;
#[path = "../tests/support/packet.rs"]
#[allow(dead_code, reason = "shared with tests, which use all of it")]
mod packet;
#[path = "nat_rate/tiny.rs"]
mod tiny;

use aegis_common::Timeouts;
use gateway::Through;
use measure::{Fill, Rates};
use netns_support::path::{Aegis, EGRESS, Row};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Turns of the rates, of which the median counts.
const TURNS: usize = 5;

/// A figure of ours and of a reference.
struct Figure {
    name: String,
    ours: f64,
    reference: f64,
    unit: &'static str,
}

/// Name, unit, and where it is found.
type Kind<T> = (&'static str, &'static str, fn(&T) -> f64);

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (results, table) = (arguments.next(), arguments.next());
    netns_support::traffic::many_files();
    let mut figures = rates();
    figures.extend(through_gateways());
    figures.extend(last_port());
    for figure in &figures {
        println!("{}", line(figure));
    }
    if let Some(path) = results {
        let all: BTreeMap<&str, serde_json::Value> = figures
            .iter()
            .map(|figure| {
                let value = serde_json::json!({
                    "ours": figure.ours, "reference": figure.reference,
                    "ratio": figure.ours / figure.reference, "unit": figure.unit,
                });
                (figure.name.as_str(), value)
            })
            .collect();
        std::fs::write(path, serde_json::to_string_pretty(&all).unwrap() + "\n").unwrap();
    }
    if let Some(path) = table {
        let lines: String = figures.iter().fold(String::new(), |mut text, figure| {
            let _ = writeln!(text, "{}", line(figure));
            text
        });
        std::fs::write(path, lines).unwrap();
    }
}

fn line(figure: &Figure) -> String {
    let number = |value: f64| if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") };
    format!(
        "| {} | {} | {} | {} | {:.2} |",
        figure.name,
        number(figure.ours),
        number(figure.reference),
        figure.unit,
        figure.ours / figure.reference
    )
}

/// Packets, connections and bytes per second, by turns.
fn rates() -> Vec<Figure> {
    let [ours, fast, masquerade, snat, metered] = [(); 5].map(|()| Row::new());
    let ends = Row::of_ends();
    let _aegis = (
        Aegis::on(&ours, 255, Timeouts::default()),
        Aegis::fast_on(&fast, 255),
        Aegis::metered_on(&metered, 255),
    );
    masquerade.translate_by("masquerade to :1024-65535");
    snat.translate_by(&format!("snat to {EGRESS}:1024-65535"));
    let _pass: Vec<tiny::Attached> =
        [&masquerade, &snat].map(|row| row.node.enter(|| tiny::on("eth0", tiny::PASS))).into();
    let rows = [&ours, &fast, &masquerade, &snat, &ends, &metered];
    let mut all: [Vec<Rates>; 6] = Default::default();
    for turn in 0..TURNS {
        // Nobody is always the first.
        for place in 0..rows.len() {
            let which = (turn + place) % rows.len();
            let rates = measure::rates(rows[which]);
            eprintln!("{}: {rates:?}", ["aegis", "fast", "masquerade", "snat", "ends", "metered"][which]);
            all[which].push(rates);
        }
    }
    let of = |which: usize, figure: fn(&Rates) -> f64| median(all[which].iter().map(figure).collect());
    let kinds: [Kind<Rates>; 7] = [
        ("small UDP packets of one flow", "packets/s", |rates| rates.one_flow),
        ("small UDP packets of 16 flows", "packets/s", |rates| rates.packets),
        ("CPU time for a small UDP packet, both ends included", "ns", |rates| rates.packet_ns),
        ("new TCP connections", "1/s", |rates| rates.connections),
        ("CPU time for a connection, both ends included", "us", |rates| rates.connection_us),
        ("bulk TCP from the pod", "Gbit/s", |rates| rates.bulk_out),
        ("bulk TCP to the pod", "Gbit/s", |rates| rates.bulk_in),
    ];
    let references = [
        (0, 2, "to masquerade"),
        (0, 3, "to SNAT"),
        (1, 2, "fast path, to masquerade"),
        (5, 0, "with use metered, to without"),
    ];
    // What is left is the node's.
    let ends_ns = of(4, |rates| rates.packet_ns);
    let of_node = references.map(|(which, other, reference)| Figure {
        name: format!("CPU time for a small UDP packet on the node alone, {reference}"),
        ours: of(which, |rates| rates.packet_ns) - ends_ns,
        reference: of(other, |rates| rates.packet_ns) - ends_ns,
        unit: "ns",
    });
    kinds
        .iter()
        .flat_map(|(name, unit, figure)| {
            references.map(|(which, other, reference)| Figure {
                name: format!("{name}, {reference}"),
                ours: of(which, *figure),
                reference: of(other, *figure),
                unit,
            })
        })
        .chain(of_node)
        .collect()
}

/// What a node forwards for others.
fn through_gateways() -> Vec<Figure> {
    let (mut ours, mut kernels) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        ours.push(gateway::ours());
        kernels.push(gateway::masquerade());
        eprintln!("gateway: {:?}, masquerade: {:?}", ours.last(), kernels.last());
    }
    let kinds: [Kind<Through>; 2] = [
        ("small UDP packets through a gateway", "packets/s", |through| through.packets),
        ("CPU time for one, sender included", "ns", |through| through.packet_ns),
    ];
    let of = |all: &[Through], figure: fn(&Through) -> f64| median(all.iter().map(figure).collect());
    let figure = |(name, unit, figure): &Kind<Through>| Figure {
        name: format!("{name}, to a gateway that masquerades"),
        ours: of(&ours, *figure),
        reference: of(&kernels, *figure),
        unit,
    };
    kinds.iter().map(figure).collect()
}

/// 4,096 connections with 4,096 ports: what connecting costs when few are left, and what fails.
fn last_port() -> Vec<Figure> {
    let timeouts = Timeouts { tcp_closed: 1, ..Timeouts::default() };
    let fill = |translate: &dyn Fn(&Row) -> Option<Aegis>| {
        let row = Row::new();
        let _aegis = translate(&row);
        let _pass = _aegis.is_none().then(|| row.node.enter(|| tiny::on("eth0", tiny::PASS)));
        measure::fill(&row)
    };
    let ours = fill(&|row| Some(Aegis::on(row, 4 + 15, timeouts)));
    eprintln!("aegis: {ours:?}");
    let reference = fill(&|row| {
        row.translate_by(&format!("snat to {EGRESS}:1024-5119"));
        None
    });
    eprintln!("snat: {reference:?}");
    let kinds: [Kind<Fill>; 6] = [
        ("connections that succeed of 4,096 with 4,096 ports", "", |fill| fill.opened),
        ("time to connect with 10 % of the ports in use, median", "us", |fill| fill.early_us),
        ("time to connect with 99 % of the ports in use, median", "us", |fill| fill.late_us),
        ("time to connect with 99 % of the ports in use, slowest", "us", |fill| fill.slowest_us),
        ("time until the next connection fails", "ms", |fill| fill.refused_ms),
        ("connections that fail in a minute of change at 99 %", "", |fill| fill.failed),
    ];
    kinds
        .iter()
        .map(|(name, unit, figure)| Figure {
            name: format!("{name}, to SNAT"),
            ours: figure(&ours),
            reference: figure(&reference),
            unit,
        })
        .collect()
}
