//! What each program costs per packet, what a flow costs in memory, and what a scan of all flows costs, by
//! `BPF_PROG_TEST_RUN`: `cargo run --release -p aegis-node-agent --example packet_cost` (as root).
//!
//! *each packet another flow*: one run per system call over random flows, so that caches are as cold as in life; what a
//! frame costs that the program lets pass at once (ARP) is taken off. *same packet*: a million runs in a row, where
//! the program leaves the packet as it was.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a tool for developers")]

#[path = "packet_cost/metering.rs"]
mod metering;
#[path = "../tests/support/mod.rs"]
mod support;

use aegis_common::*;
use aegis_node_agent::ebpf::MapSizes;
use aegis_node_agent::meter::Maps;
use aegis_node_agent::sweep::Usage;
use aegis_node_agent::test_run;
use nix::time::{ClockId, clock_gettime};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::packet::{ACK, Packet, SYN, ethernet};
use support::six::{self, Packet6};
use support::*;

/// Flows of the large table: these origins times these pod ports.
const ORIGINS: u8 = 20;
const PORTS: u16 = 50_000;
const RUNS: usize = 20_000;
const LOOP: u32 = 1_000_000;
/// Scans that are timed.
const SCANS: u32 = 10;

fn origin(at: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 10 + at)
}

fn packet(flow: usize, flags: u8) -> Packet {
    let origin = origin((flow % usize::from(ORIGINS)) as u8);
    Packet::tcp((POD, 2000 + (flow / usize::from(ORIGINS)) as u16), (origin, 443), flags).with_payload(100)
}

/// Nanoseconds of one run on each of the frames.
fn each(program: BorrowedFd<'_>, context: &[u8], frames: impl Iterator<Item = Vec<u8>>, verdict: u32) -> f64 {
    let (mut total, mut count) = (0u64, 0u64);
    for frame in frames {
        let outcome = test_run::run(program, &frame, context, 1).unwrap();
        assert_eq!(outcome.verdict, verdict);
        total += u64::from(outcome.nanoseconds);
        count += 1;
    }
    total as f64 / count as f64
}

/// Bytes that a map has.
fn memory(world: &World, map: &'static str) -> u64 {
    let path = format!("/proc/self/fdinfo/{}", world.plane.map_fd(map).unwrap().as_raw_fd());
    let info = std::fs::read_to_string(path).unwrap();
    let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:")).unwrap();
    bytes.trim().parse().unwrap()
}

/// What the agent does once a second: gives what it found.
fn scan(world: &World) -> Usage {
    let mut usage = Usage::default();
    world.plane.forward().unwrap().for_each(|key, value| usage.add_flow(key, value));
    usage
}

fn cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

/// Times scans of all flows while another thread sends packets of them. Prints both.
fn scans(world: &World, flows: usize) {
    let (stop, egress) =
        (AtomicBool::new(false), world.program("uplink_egress").try_clone_to_owned().unwrap());
    let (mut sent, mut dropped) = (0u64, 0u64);
    let (begun, before) = (Instant::now(), cpu());
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let (mut sent, mut dropped) = (0u64, 0u64);
            let context = context(MARK);
            while !stop.load(Ordering::Acquire) {
                let frame = packet((sent as usize).wrapping_mul(2_654_435_761) % flows, ACK).frame();
                let outcome = test_run::run(egress.as_fd(), &frame, &context, 1).unwrap();
                dropped += u64::from(outcome.verdict != TCX_NEXT);
                sent += 1;
            }
            (sent, dropped)
        });
        for _ in 0..SCANS {
            assert_eq!(scan(world).flows as usize, flows + 1);
        }
        stop.store(true, Ordering::Release);
        (sent, dropped) = sender.join().unwrap();
    });
    let each = |time: Duration| time.as_secs_f64() * 1000.0 / f64::from(SCANS);
    let (wall, busy) = (each(begun.elapsed()), each(cpu() - before));
    println!("scan of {flows} flows: {wall:.0} ms, of which {busy:.0} ms on a CPU");
    println!("packets during scans: {sent}, of which {dropped} dropped");
}

/// Flows over IPv6 that are remembered.
const REMEMBERED: usize = 50_000;

/// Nanoseconds of a packet over IPv6, out and in, each of another of so many flows.
fn over_ipv6(bases: [f64; 2]) {
    let mut world = World::new();
    six::six(&mut world);
    let (outside, marked) = (six::pod_outside(), context(MARK));
    let ends = |flow: usize| ((flow % REMEMBERED) as u16, 443 + (flow / REMEMBERED) as u16);
    let out = |flow, flags| {
        let (port, to) = ends(flow);
        Packet6::tcp((six::POD6, port), (six::ORIGIN6, to), flags, &[7; 100]).frame()
    };
    let back = |flow| {
        let (port, to) = ends(flow);
        Packet6::tcp((six::ORIGIN6, to), (outside, port), ACK, &[7; 100]).frame()
    };
    // Numbers of meters, as the agent gives them out.
    Maps::open(&world.plane).unwrap().give_out().unwrap();
    let (egress, xdp) = (world.program("uplink_egress"), world.program("uplink_ingress"));
    let mut made = 0;
    println!("nanoseconds per packet over IPv6   each packet another of so many flows");
    println!("{:>45} {:>10} {:>10}", 1, "1,000", "50,000");
    let columns = [1, 1000, REMEMBERED].map(|flows| {
        let new = each(egress, &marked, (made..flows).map(|at| out(at, SYN)), TCX_NEXT);
        made = flows;
        let some: Vec<usize> = (0..RUNS).map(|at| at.wrapping_mul(2_654_435_761) % flows).collect();
        [
            each(egress, &marked, some.iter().map(|at| out(*at, ACK)), TCX_NEXT) - bases[0],
            each(xdp, &[], some.iter().map(|at| back(*at)), XDP_PASS) - bases[1],
            new - bases[0],
        ]
    });
    let names = ["uplink_egress, established", "uplink_ingress, back", "uplink_egress, new flow"];
    for (at, name) in names.iter().enumerate() {
        let [one, thousand, all] = columns.map(|column| format!("{:.0}", column[at]));
        println!("{name:<34} {one:>10} {thousand:>10} {all:>10}");
    }
}

fn main() {
    let mut world = World::sized(&MapSizes { flows: 1 << 20, ..MapSizes::default() });
    let slices: Vec<u16> = (4..=255).filter(|slice| *slice != SLICE_2).collect();
    for slice in &slices {
        world.own(0, *slice, 1);
    }
    world.allow(EGRESS, &slices);
    let mut arp = ethernet([0xff; 6], [2; 6], &[0; 28]);
    arp[12..14].copy_from_slice(&[8, 6]);

    // One flow whose translation changes nothing, so that the same packet can run again and again.
    let still = Packet::tcp((POD_2, 7), (ORIGIN, 443), ACK).with_payload(100);
    let key = flow(6, (POD_2, 7), (ORIGIN, 443));
    let value = ForwardValue {
        life: ForwardValue::new_life(&key, 1),
        egress: raw(POD_2),
        egress_port: 7,
        incarnation: INCARNATION,
        ..Default::default()
    };
    world.set_forward(key, value);
    let still_back = Packet::tcp((ORIGIN, 443), (EGRESS, 2048), ACK).with_payload(100);
    let key = flow(6, (EGRESS, 2048), (ORIGIN, 443));
    let value = ReverseValue { digest: key.digest(), pod: raw(EGRESS), pod_port: 2048, ..Default::default() };
    world.set_reverse(key, value);

    let (tc, marked) = (context(0), context(MARK));
    let arps = || std::iter::repeat_n(arp.clone(), RUNS);
    let base_tc = each(world.program("uplink_egress"), &marked, arps(), TCX_NEXT);
    let base_xdp = each(world.program("uplink_ingress"), &[], arps(), XDP_PASS);
    over_ipv6([base_tc, base_xdp]);
    metering::metering([base_tc, base_xdp]);
    let same = |name, context: &[u8], packet: &Packet| {
        test_run::run(world.program(name), &packet.frame(), context, LOOP).unwrap().nanoseconds
    };
    let looped = [
        same("pod_ingress", &tc, &still),
        same("uplink_egress", &marked, &still),
        same("uplink_ingress", &[], &still_back),
    ];

    let egress = world.program("uplink_egress");
    let flows = usize::from(ORIGINS) * usize::from(PORTS);
    let mut made = Vec::new();
    let mut measure = |flows: usize| {
        // The flows are opened by the program; how it translated them says what their replies look like.
        let mut new = 0u64;
        let first = made.len();
        for at in first..flows {
            let outcome = test_run::run(egress, &packet(at, SYN).frame(), &marked, 1).unwrap();
            assert_eq!(outcome.verdict, TCX_NEXT);
            made.push(u16::from_be_bytes([outcome.packet[34], outcome.packet[35]]));
            new += u64::from(outcome.nanoseconds);
        }
        let new = new as f64 / (flows - first) as f64 - base_tc;
        // A fixed walk over all flows without an order that caches could foresee.
        let some: Vec<usize> = (0..RUNS).map(|at| at.wrapping_mul(2_654_435_761) % flows).collect();
        let out = || some.iter().map(|at| packet(*at, ACK).frame());
        let back = some.iter().map(|at| {
            let packet = packet(*at, ACK);
            Packet::tcp((packet.destination, 443), (EGRESS, made[*at]), ACK).with_payload(100).frame()
        });
        let other = some.iter().map(|at| {
            let port = SLICE_2 << 8 | (at % 256) as u16;
            Packet::tcp((packet(*at, ACK).destination, 443), (EGRESS, port), ACK).with_payload(100).frame()
        });
        let xdp = world.program("uplink_ingress");
        [
            each(world.program("pod_ingress"), &tc, out(), TCX_NEXT) - base_tc,
            each(egress, &marked, out(), TCX_NEXT) - base_tc,
            each(xdp, &[], back, XDP_PASS) - base_xdp,
            each(xdp, &[], other, XDP_TX) - base_xdp,
            new,
        ]
    };
    let columns = [1, 1000, flows].map(&mut measure);

    println!("nanoseconds per packet       same packet   each packet another of so many flows");
    println!("                                  1 flow          1      1,000  1,000,000");
    let names = [
        "pod_ingress, covered",
        "uplink_egress, established",
        "uplink_ingress, reverse",
        "uplink_ingress, steer",
        "uplink_egress, new flow",
    ];
    for (at, name) in names.iter().enumerate() {
        let same = looped.get(at).map_or("-".to_owned(), ToString::to_string);
        let column = |column: &[f64; 5]| format!("{:.0}", column[at]);
        let [one, thousand, million] = columns.each_ref().map(column);
        println!("{name:<28} {same:>11} {one:>10} {thousand:>10} {million:>10}");
    }
    let bytes = ["FORWARD", "REVERSE"].map(|map| memory(&world, map));
    let per_flow = bytes.iter().sum::<u64>() as f64 / flows as f64;
    println!("memory of {flows} flows: {bytes:?} bytes, {per_flow:.0} for each");
    scans(&world, flows);
}
