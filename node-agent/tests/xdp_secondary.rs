//! A policy's secondary allocation: what finds no port of the primary towards its origin leaves from there, and nothing else does.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::net::{Ipv4Addr, Ipv6Addr};
use support::packet::{ACK, Packet, SYN};
use support::six::{NETWORK, NETWORK_2, ORIGIN6, POD6, Packet6, outside, set_allocation6, six};
use support::*;

/// The primary is allocation 0 with [`EGRESS`], the secondary allocation 1 with [`EGRESS_2`]; a slice of each.
fn world() -> World {
    let mut world = World::new();
    world.second_account();
    let key = VerdictKey { generation: 1, pod_class: 1, destination_class: 1, port_class: 0 };
    let value = VerdictValue { action: ACTION_ALLOCATE, secondary: 1, binding: 3, ..Default::default() };
    world.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
    world
}

fn send(world: &World, pod_port: u16, origin_port: u16, flags: u8) -> Option<Ipv4Addr> {
    let out = world.out(&Packet::tcp((POD, pod_port), (ORIGIN, origin_port), flags).frame());
    (out.verdict == TCX_NEXT)
        .then(|| Ipv4Addr::new(out.frame[26], out.frame[27], out.frame[28], out.frame[29]))
}

fn open(world: &World, pod_port: u16) -> Option<Ipv4Addr> {
    send(world, pod_port, 443, SYN)
}

/// Opens flows that must leave from this address.
fn fill(world: &World, pod_ports: std::ops::Range<u16>, from: Ipv4Addr) {
    for port in pod_ports {
        assert_eq!(open(world, port), Some(from), "pod port {port}");
    }
}

fn counted(world: &mut World, label: &str) -> u64 {
    world.counted().into_iter().filter(|(name, _)| *name == label).map(|(_, count)| count).sum()
}

#[test]
fn xdp_secondary_takes_what_the_full_primary_cannot() {
    let mut world = world();
    fill(&world, 10_000..10_256, EGRESS);
    fill(&world, 20_000..20_256, EGRESS_2);
    assert_eq!(open(&world, 30_000), None, "both are full");
    let refused = |(label, _): &(&str, u64)| label.starts_with("refuse_") || *label == "secondary_flow";
    let counted: Vec<_> = world.counted().into_iter().filter(refused).collect();
    assert_eq!(counted, [("refuse_no_port", 1), ("secondary_flow", 256)], "one packet, refused once");
    assert_eq!(world.consistent(), 512, "nothing is left behind");
    // Ports are scarce towards an origin, not as such.
    assert_eq!(send(&world, 30_000, 444, SYN), Some(EGRESS));
    // What is established stays where it is, also once there is room again.
    assert_eq!(send(&world, 10_000, 443, ACK), Some(EGRESS));
    assert_eq!(send(&world, 20_000, 443, ACK), Some(EGRESS_2));
    let key = flow(6, (POD, 10_007), (ORIGIN, 443));
    let over = ForwardValue { last_seen: 1, seen: SEEN_RST, ..world.forward(&key).unwrap() };
    world.set_forward(key, over);
    assert_eq!(world.plane.sweeper().unwrap().flows(&[key]).unwrap(), 1);
    assert_eq!(open(&world, 30_001), Some(EGRESS), "the primary comes first");
    assert_eq!(send(&world, 20_000, 443, ACK), Some(EGRESS_2));
    let flow = world.forward(&flow(6, (POD, 20_000), (ORIGIN, 443))).unwrap();
    assert_eq!((flow.allocation, flow.binding), (1, 3), "it counts for the secondary, and for the policy");
}

#[test]
fn xdp_secondary_is_not_for_what_waits_or_is_over_a_limit() {
    let mut world = world();
    fill(&world, 10_000..10_256, EGRESS);
    world.plane.array::<u32>("PULSE").unwrap().set(0, now(), 0).unwrap();
    world.plane.hash::<u32, u32>("GROWING").unwrap().insert(raw(EGRESS), 1, 0).unwrap();
    assert_eq!(open(&world, 20_000), None);
    assert_eq!(counted(&mut world, "drop_waiting_for_slice"), 1, "slices of the primary are to come");
    world.plane.hash::<u32, u32>("GROWING").unwrap().remove(&raw(EGRESS)).unwrap();
    assert_eq!(open(&world, 20_000), Some(EGRESS_2));

    let mut allocations = world.plane.array::<AllocationValue>("ALLOCATIONS").unwrap();
    let value = allocations.get(&0, 0).unwrap();
    allocations.set(0, AllocationValue { pod_flows: 256, ..value }, 0).unwrap();
    assert_eq!(open(&world, 20_001), None);
    assert_eq!(counted(&mut world, "refuse_pod_flows"), 1, "the limit is of the pod, not of the address");
}

#[test]
fn xdp_secondary_takes_over_where_no_node_can_send_from_the_primary() {
    let mut world = world();
    world.allocation(&[], Timeouts::default());
    assert_eq!(open(&world, 10_000), Some(EGRESS_2), "no slice here, and no gateway");
    world.allocation(&[EGRESS], Timeouts::default());
    assert_eq!(open(&world, 10_001), Some(EGRESS));
    world.allow(EGRESS, &[]);
    assert_eq!(open(&world, 10_002), Some(EGRESS_2), "the slice drains");
    assert_eq!(send(&world, 10_001, 443, ACK), Some(EGRESS), "its flows go on");
    world.allow(EGRESS, &[SLICE]);
    world.fence(EGRESS, 10, 20);
    world.renewed(11, 10);
    assert_eq!(open(&world, 10_003), Some(EGRESS_2), "the lease has lapsed");
    assert_eq!(send(&world, 10_001, 443, ACK), Some(EGRESS));
}

#[test]
fn xdp_secondary_is_none_where_the_policy_names_none() {
    let mut world = World::new();
    world.second_account();
    fill(&world, 10_000..10_256, EGRESS);
    assert_eq!(open(&world, 20_000), None);
    assert_eq!(counted(&mut world, "refuse_no_port"), 1);
}

#[test]
fn xdp_secondary_takes_over_where_the_primary_has_no_64() {
    let mut world = world();
    six(&mut world);
    // What is set for the one is then the other's.
    set_allocation6(&mut world, &[NETWORK_2]);
    let mut allocations = world.plane.array::<Allocation6Value>("ALLOCATIONS6").unwrap();
    let secondary = allocations.get(&0, 0).unwrap();
    allocations.set(1, secondary, 0).unwrap();
    set_allocation6(&mut world, &[NETWORK]);
    let send = |world: &mut World, port: u16, flags: u8| -> Option<Ipv6Addr> {
        let out = world.out(&Packet6::tcp((POD6, port), (ORIGIN6, 443), flags, b"").frame());
        let source: [u8; 16] = out.frame[22..38].try_into().unwrap();
        (out.verdict == TCX_NEXT).then(|| Ipv6Addr::from(source))
    };
    let [first, second] = [NETWORK, NETWORK_2].map(|network| outside(POD6, network, SLICE, 5));
    assert_eq!(send(&mut world, 1000, SYN), Some(first));
    assert_eq!(counted(&mut world, "secondary_flow"), 0);
    set_allocation6(&mut world, &[]);
    assert_eq!(send(&mut world, 1001, SYN), Some(second));
    assert_eq!(counted(&mut world, "secondary_flow"), 1);
    assert_eq!(send(&mut world, 1000, ACK), Some(first), "what is established stays where it is");
    world.plane.array("ALLOCATIONS6").unwrap().set(1, Allocation6Value::default(), 0).unwrap();
    assert_eq!(send(&mut world, 1002, SYN), None, "neither has one");
    assert_eq!(send(&mut world, 1001, ACK), Some(second));
    set_allocation6(&mut world, &[NETWORK]);
    assert_eq!(send(&mut world, 1003, SYN), Some(first), "the primary comes first");
}
