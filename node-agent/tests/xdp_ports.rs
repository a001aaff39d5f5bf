//! Ports: every one is used, none twice, and what happens when there are none.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aegis_node_agent::ebpf::MapSizes;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use support::packet::{ACK, Packet, SYN};
use support::*;

/// Opens a flow from a pod port to the origin's port 443; the egress address and port, or `None` if it is refused.
fn open(world: &World, pod_port: u16) -> Option<(Ipv4Addr, u16)> {
    open_packet(world, &Packet::tcp((POD, pod_port), (ORIGIN, 443), SYN))
}

fn open_packet(world: &World, packet: &Packet) -> Option<(Ipv4Addr, u16)> {
    let out = world.out(&packet.frame());
    if out.verdict == TCX_REDIRECT {
        return None;
    }
    assert_eq!(out.verdict, TCX_NEXT);
    let address = Ipv4Addr::new(out.frame[26], out.frame[27], out.frame[28], out.frame[29]);
    Some((address, u16::from_be_bytes([out.frame[34], out.frame[35]])))
}

/// Opens `count` flows from pod ports from `first` on, each of which must succeed.
fn fill(world: &World, first: u16, count: u16) -> Vec<(Ipv4Addr, u16)> {
    let opened: Vec<_> = (first..first + count).map_while(|port| open(world, port)).collect();
    assert_eq!(opened.len(), usize::from(count), "flows opened");
    let distinct: BTreeSet<_> = opened.iter().collect();
    assert_eq!(distinct.len(), opened.len(), "no port twice");
    opened
}

/// Lets the flows of these pod ports end and sweeps them.
fn end(world: &mut World, pod_ports: std::ops::Range<u16>) {
    let keys: Vec<FlowKey> = pod_ports.map(|port| flow(6, (POD, port), (ORIGIN, 443))).collect();
    for key in &keys {
        let over = ForwardValue { last_seen: 1, seen: SEEN_RST, ..world.forward(key).unwrap() };
        world.set_forward(*key, over);
    }
    assert_eq!(world.plane.sweeper().unwrap().flows(&keys).unwrap() as usize, keys.len());
}

fn counted_refusals(world: &mut World) -> Vec<(&'static str, u64)> {
    world.counted().into_iter().filter(|(label, _)| label.starts_with("refuse_")).collect()
}

/// `PRESSURE` of an allocation.
fn pressure(world: &World, index: u32) -> PressureValue {
    let values = world.plane.per_cpu::<PressureValue>("PRESSURE").unwrap().get(&index, 0).unwrap();
    values.iter().fold(PressureValue::default(), |sum, value| PressureValue {
        refused: sum.refused + value.refused,
        waited: sum.waited + value.waited,
    })
}

#[test]
fn xdp_ports_a_flow_waits_for_slices_that_are_to_come_and_for_no_others() {
    let mut world = World::new();
    let pulse = |world: &mut World, age: u32| {
        let second = now() - age;
        world.plane.array::<u32>("PULSE").unwrap().set(0, second, 0).unwrap();
    };
    let grow = |world: &mut World, address: Ipv4Addr, grows: bool| {
        let mut growing = world.plane.hash::<u32, u32>("GROWING").unwrap();
        if grows {
            growing.insert(raw(address), 1, 0).unwrap()
        } else {
            growing.remove(&raw(address)).unwrap()
        }
    };
    let drops = |world: &World, port| {
        world.out(&Packet::tcp((POD, port), (ORIGIN, 443), SYN).frame()).verdict == TCX_DROP
    };
    pulse(&mut world, 0);
    grow(&mut world, EGRESS, true);
    // One packet in `counted` for each flow, be it that it opens or waits.
    fill(&world, 10_000, 153);
    assert_eq!(past_high_water(&mut world), 0, "153 of 256 are less than 60 %");
    fill(&world, 10_153, 103);
    assert_eq!(past_high_water(&mut world), 103);
    assert!(drops(&world, 20_000), "silently, so that the pod tries again");
    assert_eq!(world.counted(), [("drop_waiting_for_slice", 1)]);
    assert_eq!(pressure(&world, 0), PressureValue { waited: 1, refused: 0 });
    assert_eq!(world.consistent(), 256, "nothing is left behind");

    world.own(0, 16, 1);
    world.allow(EGRESS, &[SLICE, 16]);
    assert_eq!(open(&world, 20_000).unwrap().1 >> 8, 16, "more slices have come");
    fill(&world, 20_001, 255);
    // Two blocks, of which the first is full: that alone is not past 60 % of both.
    assert!((100..=255).contains(&past_high_water(&mut world)));
    assert!(drops(&world, 21_000));

    world.counted();
    pulse(&mut world, PULSE_LIFE + 1);
    assert_eq!(open(&world, 21_000), None, "no slices come without agent");
    assert_eq!(counted_refusals(&mut world), [("refuse_no_port", 1)]);
    pulse(&mut world, 0);
    assert!(drops(&world, 21_000));
    grow(&mut world, EGRESS, false);
    assert_eq!(open(&world, 21_000), None);
    assert_eq!(pressure(&world, 0), PressureValue { waited: 3, refused: 2 });
}

#[test]
fn xdp_ports_a_pod_leaves_its_address_only_when_that_is_full_for_good() {
    let mut world = World::new();
    world.own(1, SLICE, 1);
    world.allow(EGRESS_2, &[SLICE]);
    world.allocation(&[EGRESS, EGRESS_2], Timeouts::default());
    world.plane.array::<u32>("PULSE").unwrap().set(0, now(), 0).unwrap();
    for address in [EGRESS, EGRESS_2] {
        world.plane.hash::<u32, u32>("GROWING").unwrap().insert(raw(address), 1, 0).unwrap();
    }
    let own = fill(&world, 10_000, 256)[0].0;
    assert_eq!(world.out(&Packet::tcp((POD, 20_000), (ORIGIN, 443), SYN).frame()).verdict, TCX_DROP);
    world.plane.hash::<u32, u32>("GROWING").unwrap().remove(&raw(own)).unwrap();
    let spilled = open(&world, 20_000).unwrap().0;
    assert_ne!(spilled, own);
    fill(&world, 20_001, 255);
    assert_eq!(world.out(&Packet::tcp((POD, 30_000), (ORIGIN, 443), SYN).frame()).verdict, TCX_DROP);
}

fn past_high_water(world: &mut World) -> u64 {
    world.counted().into_iter().filter(|(label, _)| *label == "past_high_water").map(|(_, count)| count).sum()
}

#[test]
fn xdp_ports_every_port_of_a_slice_then_a_refusal_then_reuse() {
    let mut world = World::new();
    let opened = fill(&world, 10_000, 256);
    assert!(opened.iter().all(|(address, port)| *address == EGRESS && port >> 8 == SLICE));
    assert_eq!(world.consistent(), 256);
    let key = block(6, opened[0], (ORIGIN, 443));
    let value = world.block(&key).unwrap();
    assert_eq!((value.used, value.high, value.full), (256, 256, 0xf));
    let steps = opened.windows(2).filter(|pair| pair[1].1 == pair[0].1.wrapping_add(1)).count();
    assert!(steps < 32, "{steps} of 255 ports follow the one before: an observer could guess the next");

    world.counted();
    assert_eq!(open(&world, 20_000), None, "the 257th");
    assert_eq!(counted_refusals(&mut world), [("refuse_no_port", 1)]);
    assert_eq!(open(&world, 10_007), Some(opened[7]), "a live flow is untouched");
    let other = Packet::tcp((POD, 20_000), (ORIGIN, 444), SYN);
    assert!(open_packet(&world, &other).is_some(), "another origin has all ports");
    let udp = Packet::udp((POD, 20_000), (ORIGIN, 443), b"");
    assert!(open_packet(&world, &udp).is_some(), "another protocol too");
    assert_eq!(world.consistent(), 258);

    end(&mut world, 10_100..10_103);
    let freed: BTreeSet<_> = opened[100..103].iter().copied().collect();
    let value = world.block(&key).unwrap();
    assert_eq!((value.used, value.high), (253, 256), "high water stays");
    assert_eq!(world.consistent(), 255);
    let again: BTreeSet<_> = fill(&world, 20_000, 3).into_iter().collect();
    assert_eq!(again, freed);
    assert_eq!(open(&world, 20_003), None);
    assert_eq!(world.consistent(), 258);
}

#[test]
fn xdp_ports_a_freed_port_is_the_last_to_be_used_again() {
    let mut world = World::new();
    for round in 0..3 {
        let first = 10_000 + round * 1000;
        let opened: BTreeSet<_> = fill(&world, first, 10).into_iter().collect();
        end(&mut world, first..first + 10);
        let others: BTreeSet<_> = fill(&world, first + 10, 246).into_iter().collect();
        assert!(opened.is_disjoint(&others), "round {round}");
        let last: BTreeSet<_> = fill(&world, first + 256, 10).into_iter().collect();
        assert_eq!(last, opened, "round {round}");
        end(&mut world, first + 10..first + 266);
        assert_eq!(world.consistent(), 0);
    }
}

#[test]
fn xdp_ports_draining() {
    let mut world = World::new();
    world.own(0, 9, 1);
    world.allow(EGRESS, &[8, 9]);
    let opened = fill(&world, 10_000, 300);
    // One of two slices drains: its flows go on, new ones come from the other.
    world.allow(EGRESS, &[9]);
    for (at, flow) in opened.iter().enumerate() {
        let packet = Packet::tcp((POD, 10_000 + at as u16), (ORIGIN, 443), ACK);
        assert_eq!(open_packet(&world, &packet), Some(*flow), "a live flow goes on");
    }
    let left = 256 - opened.iter().filter(|(_, port)| port >> 8 == 9).count() as u16;
    assert!(fill(&world, 11_000, left).iter().all(|(_, port)| port >> 8 == 9));
    world.counted();
    assert_eq!(open(&world, 20_000), None);
    assert_eq!(counted_refusals(&mut world), [("refuse_no_port", 1)], "the slice that is left is full");
    // All drain.
    world.allow(EGRESS, &[]);
    assert_eq!(open(&world, 20_001), None);
    assert_eq!(counted_refusals(&mut world), [("refuse_unavailable", 1)], "no slice is left");
    assert_eq!(open(&world, 10_000), Some(opened[0]), "a live flow goes on");
    world.allocation(&[], Timeouts::default());
    assert_eq!(open(&world, 20_002), None);
    assert_eq!(counted_refusals(&mut world), [("refuse_unavailable", 1)], "no address is left");
    world.allocation(&[Ipv4Addr::new(192, 0, 2, 99)], Timeouts::default());
    assert_eq!(open(&world, 20_003), None);
    assert_eq!(counted_refusals(&mut world), [("refuse_unavailable", 1)], "an address without holdings");
    assert_eq!(world.consistent(), usize::from(300 + left));
}

#[test]
fn xdp_ports_of_several_blocks_and_addresses() {
    let mut world = World::new();
    // Slices 8 and 255 are in the second and in the last block of 2,048 ports.
    world.allow(EGRESS, &[8, 255]);
    world.allow(EGRESS_2, &[100]);
    world.allocation(&[EGRESS, EGRESS_2], Timeouts::default());
    let opened = fill(&world, 10_000, 768);
    for (address, slice) in [(EGRESS, 8), (EGRESS, 255), (EGRESS_2, 100)] {
        let count = opened.iter().filter(|(from, port)| (*from, port >> 8) == (address, slice)).count();
        assert_eq!(count, 256, "{address}, slice {slice}");
    }
    // A pod keeps one address while that has room: 256 or 512 flows before the first from the other.
    let changes = opened.windows(2).filter(|pair| pair[0].0 != pair[1].0).count();
    assert_eq!(changes, 1);
    assert_eq!(open(&world, 20_000), None);
    assert_eq!(world.consistent(), 768);
    // Pods differ in the address they begin with.
    let firsts: BTreeSet<_> = (1..=20)
        .map(|host| {
            let pod = Ipv4Addr::new(10, 244, 1, 100 + host);
            world.pod_class(1, pod, 1);
            open_packet(&world, &Packet::tcp((pod, 1000), (ORIGIN, 80), SYN)).unwrap().0
        })
        .collect();
    assert_eq!(firsts.len(), 2);
}

#[test]
fn xdp_ports_full_tables() {
    let mut world = World::sized(&MapSizes { flows: 8, blocks: 2, ..MapSizes::default() });
    let to = |pod_port, port| Packet::tcp((POD, pod_port), (ORIGIN, port), SYN);
    assert!(open_packet(&world, &to(1, 441)).is_some());
    assert!(open_packet(&world, &to(1, 442)).is_some());
    world.counted();
    assert!(open_packet(&world, &to(1, 443)).is_none(), "no room for a third bitmap");
    assert_eq!(counted_refusals(&mut world), [("refuse_table_full", 1)]);
    for pod_port in 2..8 {
        assert!(open_packet(&world, &to(pod_port, 441)).is_some(), "the bitmaps that exist serve");
    }
    world.counted();
    assert!(open_packet(&world, &to(8, 441)).is_none(), "no room for a ninth flow");
    assert_eq!(counted_refusals(&mut world), [("refuse_table_full", 1)]);
    assert_eq!(world.consistent(), 8);
    assert!(open_packet(&world, &to(7, 441)).is_some(), "live flows go on");

    // FORWARD is full while REVERSE has room: what was entered there is taken back.
    let mut world = World::sized(&MapSizes { flows: 8, blocks: 2, ..MapSizes::default() });
    for port in 0..8 {
        let key = flow(17, (POD_2, port), (ELSEWHERE, 1));
        world.set_forward(key, ForwardValue::default());
    }
    assert!(open_packet(&world, &to(1, 441)).is_none());
    assert_eq!(counted_refusals(&mut world), [("refuse_table_full", 1)]);
    assert_eq!(world.entries::<FlowKey, ReverseValue>("REVERSE"), []);
    let blocks = world.entries::<BlockKey, BlockValue>("BLOCKS");
    assert_eq!((blocks.len(), blocks[0].1.used, blocks[0].1.words), (1, 0, [0; WORDS_PER_BLOCK]));
}

/// All addresses that have slices are tried, in whichever blocks these are, and what finds nothing is counted by allocation.
#[test]
fn xdp_ports_every_address_and_block_is_tried_and_refusals_are_counted() {
    let mut world = World::new();
    let nowhere = Ipv4Addr::new(192, 0, 2, 9);
    world.allocation(&[nowhere, EGRESS, nowhere, EGRESS_2], Timeouts::default());
    let slices = [4, 15, 16, 63, 64, 255];
    for slice in slices {
        for address in [0, 1] {
            world.own(address, slice, 1);
        }
    }
    world.allow(EGRESS, &slices);
    world.allow(EGRESS_2, &[255]);
    let opened = fill(&world, 10_000, 7 * 256);
    assert_eq!(opened.iter().filter(|(address, _)| *address == EGRESS_2).count(), 256);
    assert_eq!(world.consistent(), 7 * 256);
    world.counted();
    for port in 0..3 {
        assert_eq!(open(&world, 30_000 + port), None);
    }
    assert_eq!(counted_refusals(&mut world), [("refuse_no_port", 3)]);
    let refusals = |world: &World, index: u32| pressure(world, index).refused;
    assert_eq!((refusals(&world, 0), refusals(&world, 1)), (3, 0));
    world.allow(EGRESS, &[]);
    world.allow(EGRESS_2, &[]);
    assert_eq!(open(&world, 30_000), None);
    assert_eq!(refusals(&world, 0), 3, "nothing held is no want of ports");
}

/// The summary may miss that a word is full (a release that races with the last take clears it late): places in other
/// words must be found all the same.
#[test]
fn xdp_ports_a_summary_that_is_behind_hides_no_port() {
    let mut world = World::new();
    for (at, cursor) in [0, 63, 100, 200, 255, 256, 2047].into_iter().enumerate() {
        let remote_port = 1000 + at as u16;
        let key = block(6, (EGRESS, SLICE << 8), (ORIGIN, remote_port));
        let mut words = [0; WORDS_PER_BLOCK];
        words[..3].fill(u64::MAX);
        let value = BlockValue { key, cursor, used: 192, high: 192, full: 0, last_used: now(), words };
        world.plane.hash("BLOCKS").unwrap().insert(key, value, 0).unwrap();
        let packet = Packet::tcp((POD, 10_000), (ORIGIN, remote_port), SYN);
        assert!(open_packet(&world, &packet).is_some(), "cursor {cursor}");
        let value = world.block(&key).unwrap();
        assert_eq!(value.words[3].count_ones(), 1, "cursor {cursor}");
        assert_eq!((value.used, value.full & !7), (193, 0), "cursor {cursor}");
    }
}

/// `take` adds first and looks at what was there before: with the operand instead of the old value it would take from
/// a bitmap that is being removed.
#[test]
fn xdp_ports_atomics_return_the_old_value() {
    let mut world = World::new();
    let (_, port) = open(&world, 10_000).unwrap();
    end(&mut world, 10_000..10_001);
    let key = block(6, (EGRESS, port), (ORIGIN, 443));
    let dead = BlockValue { used: BLOCK_DEAD, ..world.block(&key).unwrap() };
    world.plane.hash("BLOCKS").unwrap().insert(key, dead, 0).unwrap();
    world.counted();
    assert_eq!(open(&world, 10_001), None);
    assert_eq!(counted_refusals(&mut world), [("refuse_no_port", 1)]);
    assert_eq!(world.block(&key).unwrap().words, [0; WORDS_PER_BLOCK]);
    world.plane.hash::<BlockKey, BlockValue>("BLOCKS").unwrap().remove(&key).unwrap();
    assert!(open(&world, 10_001).is_some());
    // A block that went this way is still counted, until the agent counts itself.
    world.recount();
    assert_eq!(world.consistent(), 1);
}

/// Entries of REVERSE decide: a bitmap that does not know of a flow gives no port away that the flow has.
#[test]
fn xdp_ports_a_flow_that_the_bitmap_does_not_know_keeps_its_port() {
    let mut world = World::new();
    let spared = SLICE << 8 | 17;
    for port in (SLICE << 8..(SLICE + 1) << 8).filter(|port| *port != spared) {
        let value = ReverseValue { pod: raw(POD_2), pod_port: port, ..Default::default() };
        world.set_reverse(flow(6, (EGRESS, port), (ORIGIN, 443)), value);
    }
    let got = (0..90).find_map(|_| open(&world, 10_000)).unwrap();
    assert_eq!(got, (EGRESS, spared));
    let others = world.entries::<FlowKey, ReverseValue>("REVERSE");
    assert_eq!(others.iter().filter(|(_, value)| value.pod == raw(POD_2)).count(), 255);
    let value = world.block(&block(6, got, (ORIGIN, 443))).unwrap();
    assert_eq!(value.used, value.words.iter().map(|word| word.count_ones()).sum::<u32>());
}
