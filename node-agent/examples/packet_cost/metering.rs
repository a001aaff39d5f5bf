//! What it costs a packet that its use is metered: two data planes side by side, asked by turns.

use crate::support::packet::{ACK, Packet, SYN};
use crate::support::six::{self, Packet6};
use crate::support::*;
use crate::{each, origin};
use aegis_node_agent::ebpf::MapSizes;
use aegis_node_agent::meter::Maps;
use aegis_node_agent::test_run;
use std::net::Ipv6Addr;

/// Flows of each family.
const FLOWS: u16 = 1_000;
/// Turns, and packets of each.
const TURNS: usize = 20;
const PACKETS: u16 = 10_000;

/// What is measured, in the order of [`Plane::turn`].
const NAMES: [&str; 4] = ["IPv4, out", "IPv4, in", "IPv6, out", "IPv6, in"];

struct Plane {
    world: World,
    /// The outer port of each flow over IPv4.
    ports: Vec<u16>,
    /// The pod's address outside, which takes long to find.
    pod6: Ipv6Addr,
}

impl Plane {
    fn new(metered: bool) -> Plane {
        let mut world = World::sized(&MapSizes { metered, ..MapSizes::default() });
        six::six(&mut world);
        let slices: Vec<u16> = (4..=255).filter(|slice| *slice != SLICE_2).collect();
        for slice in &slices {
            world.own(0, *slice, 1);
        }
        world.allow(EGRESS, &slices);
        Maps::open(&world.plane).unwrap().give_out().unwrap();
        let (egress, marked) = (world.program("uplink_egress"), context(MARK));
        let ports = (0..FLOWS).map(|flow| {
            let opened = test_run::run(egress, &out(flow, SYN).frame(), &marked, 1).unwrap();
            assert_eq!(
                test_run::run(egress, &out6(flow, SYN).frame(), &marked, 1).unwrap().verdict,
                TCX_NEXT
            );
            u16::from_be_bytes([opened.packet[34], opened.packet[35]])
        });
        let ports = ports.collect();
        Plane { world, ports, pod6: six::pod_outside() }
    }

    /// Nanoseconds of a packet, each of another flow.
    fn turn(&self) -> [f64; 4] {
        let (egress, xdp) = (self.world.program("uplink_egress"), self.world.program("uplink_ingress"));
        let marked = context(MARK);
        let some = || (0..PACKETS).map(|at| at.wrapping_mul(40_503) % FLOWS);
        let back = |flow: u16| {
            let remote = out(flow, ACK).destination;
            Packet::tcp((remote, 443), (EGRESS, self.ports[usize::from(flow)]), ACK).with_payload(100).frame()
        };
        let pod = self.pod6;
        let back6 = |flow: u16| Packet6::tcp((six::ORIGIN6, 443), (pod, flow), ACK, &[7; 100]).frame();
        [
            each(egress, &marked, some().map(|flow| out(flow, ACK).frame()), TCX_NEXT),
            each(xdp, &[], some().map(back), XDP_PASS),
            each(egress, &marked, some().map(|flow| out6(flow, ACK).frame()), TCX_NEXT),
            each(xdp, &[], some().map(back6), XDP_PASS),
        ]
    }
}

fn out(flow: u16, flags: u8) -> Packet {
    Packet::tcp((POD, 2_000 + flow), (origin((flow % 20) as u8), 443), flags).with_payload(100)
}

fn out6(flow: u16, flags: u8) -> Packet6 {
    Packet6::tcp((six::POD6, flow), (six::ORIGIN6, 443), flags, &[7; 100])
}

/// Prints the medians of both, with what a packet costs that the program lets pass at once taken off.
pub fn metering([out, back]: [f64; 2]) {
    let planes = [Plane::new(true), Plane::new(false)];
    let mut turns: [Vec<[f64; 4]>; 2] = Default::default();
    for _ in 0..TURNS {
        for (plane, turns) in planes.iter().zip(&mut turns) {
            turns.push(plane.turn());
        }
    }
    let median = |turns: &[[f64; 4]], of: usize| {
        let mut times: Vec<f64> = turns.iter().map(|turn| turn[of]).collect();
        times.sort_unstable_by(f64::total_cmp);
        times[times.len() / 2] - [out, back][of % 2]
    };
    println!("nanoseconds per packet, each another of {FLOWS} flows       metered        not");
    for (at, name) in NAMES.iter().enumerate() {
        let [with, without] = turns.each_ref().map(|turns| median(turns, at));
        println!("{name:<54} {with:>10.0} {without:>10.0}");
    }
}
