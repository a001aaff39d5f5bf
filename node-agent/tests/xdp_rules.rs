//! New flows are counted by the rule that decides about them, and by the policy that only observes.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aegis_node_agent::raw as bytes;
use aya::maps::lpm_trie::Key;
use std::net::Ipv4Addr;
use support::packet::{ACK, Packet, SYN};
use support::six::{DENIED6, ELSEWHERE6, ORIGIN6, POD6, Packet6, WEB6, pod_outside, raw6, six};
use support::*;

/// The rule's own number in all verdicts of the world.
const RULE: u32 = 3;
/// That of a policy that only observes.
const OBSERVER: u32 = 5;
/// Class of destinations that nobody else names.
const ONLY_OBSERVED: u32 = 9 | DESTINATION_OBSERVED;

/// What is counted for a number of the generation that is in force.
fn counts(world: &World, number: u32) -> RuleValue {
    let map = world.plane.per_cpu::<RuleValue>("RULES").unwrap();
    let values = map.get(&rule_index(1, number).unwrap(), 0).unwrap();
    values.iter().fold(RuleValue::default(), |sum, value| sum.plus(value))
}

fn decided(world: &World) -> [u64; 3] {
    let RuleValue { left, lacked, denied, would } = counts(world, RULE);
    assert_eq!(would, [0; 4]);
    [left, lacked, denied]
}

fn observed_as(world: &World) -> [u64; 4] {
    let RuleValue { left, lacked, denied, would } = counts(world, OBSERVER);
    assert_eq!([left, lacked, denied], [0; 3]);
    would
}

fn set_verdict(world: &mut World, destination_class: u32, action: u16, binding: u32) {
    let key = VerdictKey { generation: 1, pod_class: 1, destination_class, port_class: 0 };
    let value = VerdictValue { action, binding, ..Default::default() };
    world.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
}

/// Whether a packet of a pod is covered; it is not held up here.
fn is_marked(world: &World, frame: &[u8]) -> bool {
    let out = world.pod(frame, 0);
    assert_eq!(out.verdict, TCX_NEXT);
    out.mark & MARK != 0
}

#[test]
fn xdp_rules_count_new_flows_by_what_becomes_of_them() {
    let mut world = World::new();
    let to = |port, destination| Packet::tcp((POD, port), (destination, 80), SYN).frame();
    assert_eq!(world.out(&to(1000, ORIGIN)).verdict, TCX_NEXT);
    assert_eq!(world.out(&to(1000, ORIGIN)).verdict, TCX_NEXT, "the same again");
    assert_eq!(world.out(&to(1001, ORIGIN)).verdict, TCX_NEXT);
    assert_eq!(decided(&world), [2, 0, 0]);
    world.counted();
    assert_eq!(world.out(&to(1000, DENIED)).verdict, TCX_REDIRECT, "an RST");
    assert_eq!(world.counted(), [("refusal_sent", 1), ("refuse_unavailable", 1)]);
    assert_eq!(decided(&world), [2, 1, 0]);

    set_verdict(&mut world, 2, ACTION_FORBID, RULE);
    assert!(is_marked(&world, &to(1000, DENIED)), "it is refused at the uplink");
    assert_eq!(world.out(&to(1000, DENIED)).verdict, TCX_REDIRECT, "an RST");
    assert_eq!(world.counted(), [("refusal_sent", 1), ("refuse_policy", 1)]);
    let datagram = Packet::udp((POD, 1000), (DENIED, 80), b"x").frame();
    let refusal = world.out(&datagram);
    assert_eq!(refusal.frame[14 + 20..14 + 22], [3, 13], "administratively prohibited");
    assert_eq!(decided(&world), [2, 1, 2]);
}

#[test]
fn xdp_rules_count_new_flows_over_ipv6_too() {
    let mut world = World::new();
    six(&mut world);
    let to = |port, destination| Packet6::tcp((POD6, port), (destination, 80), SYN, b"").frame();
    for _ in 0..2 {
        assert_eq!(world.out(&to(1000, ORIGIN6)).verdict, TCX_NEXT);
    }
    assert_eq!(world.out(&to(1000, DENIED6)).verdict, TCX_REDIRECT);
    assert_eq!(decided(&world), [1, 1, 0]);
    set_verdict(&mut world, 2, ACTION_FORBID, RULE);
    world.counted();
    assert_eq!(world.out(&to(1000, DENIED6)).verdict, TCX_REDIRECT);
    assert_eq!(world.counted(), [("refusal_sent", 1), ("refuse_policy", 1)]);
    assert_eq!(decided(&world), [1, 1, 1]);
}

/// What a policy that only observes would do with what goes to `ELSEWHERE`, which no rule covers.
fn observing(would: u32) -> World {
    let mut world = World::new();
    six(&mut world);
    let class = DestinationValue { class: ONLY_OBSERVED };
    let key = Key::new(32 + 24, DestinationKey { generation: 1, address: raw(ELSEWHERE) });
    world.plane.trie("DESTINATIONS").unwrap().insert(&key, class, 0).unwrap();
    let key = Key::new(32 + 48, Destination6Key { generation: 1, address: raw6(ELSEWHERE6) });
    world.plane.trie("DESTINATIONS6").unwrap().insert(&key, class, 0).unwrap();
    set_verdict(&mut world, ONLY_OBSERVED, ACTION_PASS, observes(OBSERVER, would));
    world
}

#[test]
fn xdp_rules_that_observe_count_each_flow_once_and_cover_nothing() {
    let world = observing(WOULD_DENY);
    let tcp = |port, flags| Packet::tcp((POD, port), (ELSEWHERE, 80), flags).frame();
    let udp = |port| Packet::udp((POD, port), (ELSEWHERE, 80), b"x").frame();
    for frame in [tcp(1000, SYN), tcp(1000, SYN), tcp(1000, ACK), tcp(1001, ACK), udp(1000), udp(1000)] {
        assert!(!is_marked(&world, &frame));
    }
    assert_eq!(observed_as(&world), [0, 0, 0, 2], "a connection and a datagram");
    for frame in [tcp(1001, SYN), Packet::echo(POD, ELSEWHERE, 9).frame()] {
        assert!(!is_marked(&world, &frame));
    }
    assert!(!is_marked(&world, &Packet::echo_reply(POD, ELSEWHERE, 10).frame()));
    assert_eq!(observed_as(&world), [0, 0, 0, 4]);
    // From the node's address they leave as they are.
    let frame = tcp(1002, SYN);
    assert_eq!(world.out_unmarked(&frame).frame, frame);
    let free = Packet::tcp((FREE_POD, 1000), (ELSEWHERE, 80), SYN).frame();
    assert!(!is_marked(&world, &free));
    assert_eq!(observed_as(&world), [0, 0, 0, 4], "another pod is none of the policy's business");
}

#[test]
fn xdp_rules_that_observe_see_ipv6_too() {
    let world = observing(WOULD_PASS);
    let tcp = |port, flags| Packet6::tcp((POD6, port), (ELSEWHERE6, 80), flags, b"").frame();
    for frame in [tcp(1000, SYN), tcp(1000, SYN), tcp(1000, ACK), tcp(1001, SYN)] {
        assert!(!is_marked(&world, &frame));
    }
    for kind in [128, 128, 129] {
        assert!(!is_marked(&world, &Packet6::echo(POD6, ELSEWHERE6, kind).frame()));
    }
    assert_eq!(observed_as(&world), [0, 0, 3, 0]);
}

#[test]
fn xdp_rules_that_observe_leave_what_decides_alone() {
    let mut world = World::new();
    let frame = |port| Packet::tcp((POD, port), (ORIGIN, 80), SYN).frame();
    for (would, port) in [(WOULD_LEAVE, 1000), (WOULD_LACK, 1001)] {
        set_verdict(&mut world, 1, ACTION_ALLOCATE, RULE | observes(OBSERVER, would));
        for _ in 0..2 {
            assert!(is_marked(&world, &frame(port)));
            assert_eq!(world.out(&frame(port)).verdict, TCX_NEXT);
        }
        let key = FlowKey {
            local: raw(POD),
            remote: raw(ORIGIN),
            local_port: port,
            remote_port: 80,
            protocol: 6,
            pad: [0; 3],
        };
        assert_eq!(
            world.forward(&key).unwrap().binding,
            RULE as u16,
            "of a flow the rule's own number is known"
        );
    }
    assert_eq!(observed_as(&world), [1, 1, 0, 0]);
    assert_eq!(decided(&world), [2, 0, 0]);
}

#[test]
fn xdp_rules_that_observe_forget_a_flow_after_a_while() {
    let mut world = observing(WOULD_DENY);
    let frame = Packet::udp((POD, 1000), (ELSEWHERE, 80), b"x").frame();
    let elsewhere = Ipv4Addr::new(198, 51, 101, 2);
    is_marked(&world, &frame);
    for (seconds, counted) in [(200, 1), (301, 2)] {
        let seen: Vec<(ObservedKey, u32)> = world.entries("OBSERVED");
        for (key, second) in seen {
            world.plane.hash("OBSERVED").unwrap().insert(key, second - seconds, 0).unwrap();
        }
        is_marked(&world, &frame);
        assert_eq!(observed_as(&world), [0, 0, 0, counted], "{seconds}");
    }
    is_marked(&world, &Packet::udp((POD, 1000), (elsewhere, 80), b"x").frame());
    assert_eq!(observed_as(&world), [0, 0, 0, 3]);
}

/// A generation is written and removed by few system calls. What is not there is no obstacle.
#[test]
fn xdp_rules_are_written_and_removed_many_at_a_time() {
    let world = World::new();
    let fd = world.plane.map_fd("VERDICTS").unwrap();
    let map = bytes::Map::of(fd).unwrap();
    let key =
        |number: u32| VerdictKey { generation: 7, pod_class: number, destination_class: 1, port_class: 0 };
    let value = |number: u32| VerdictValue { action: ACTION_DENY, binding: number, ..Default::default() };
    let keys = |numbers: &[u32]| -> Vec<u8> {
        numbers.iter().flat_map(|number| bytes::bytes(&key(*number)).to_vec()).collect()
    };
    let there = || {
        let mut found = std::collections::BTreeMap::new();
        let each = |key: &VerdictKey, value: &VerdictValue| {
            if key.generation == 7 {
                found.insert(key.pod_class, value.binding);
            }
        };
        aegis_node_agent::sweep::for_each(fd, each).unwrap();
        found
    };
    let numbers: Vec<u32> = (0..10_000).collect();
    let values: Vec<u8> = numbers.iter().flat_map(|number| bytes::bytes(&value(*number)).to_vec()).collect();
    let (done, result) = map.update_many(&keys(&numbers), &values);
    assert_eq!((done, result.is_ok()), (10_000, true));
    assert_eq!(there(), numbers.iter().map(|number| (*number, *number)).collect());
    // Some are there, some are not, at the beginning, in between and at the end.
    let some: Vec<u32> = (0..20_000).filter(|number| number % 3 == 1).chain([5, 20_001]).collect();
    let (done, result) = map.delete_many(&keys(&some));
    assert_eq!((done, result.is_ok()), (some.len(), true));
    let left: Vec<u32> = numbers.iter().copied().filter(|number| number % 3 != 1 && *number != 5).collect();
    assert_eq!(there().into_keys().collect::<Vec<_>>(), left);
    assert!(map.update_many(&keys(&[1]), &[]).1.is_err(), "a value for each key");
}

#[test]
fn xdp_rules_ping_alone_can_be_named() {
    let mut world = World::new();
    six(&mut world);
    // Of these destinations only some TCP ports are covered.
    let (ping, ping6) = (Packet::echo(POD, WEB, 9).frame(), Packet6::echo(POD6, WEB6, 128).frame());
    assert!(!is_marked(&world, &ping) && !is_marked(&world, &ping6));
    // The class of what is named: ICMP is the port 0.
    const PING: u32 = 2;
    for protocol in [1, 58] {
        let key = PortKey { generation: 1, protocol, port: 0 };
        world.plane.trie("PORTS").unwrap().insert(&Key::new(64, key), PING, 0).unwrap();
    }
    let key = VerdictKey { generation: 1, pod_class: 1, destination_class: 3, port_class: PING };
    let value = VerdictValue { action: ACTION_ALLOCATE, binding: RULE, ..Default::default() };
    world.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
    assert!(is_marked(&world, &ping) && is_marked(&world, &ping6));
    let (out, out6) = (world.out(&ping), world.out(&ping6));
    assert_eq!((out.verdict, &out.frame[26..30]), (TCX_NEXT, &EGRESS.octets()[..]));
    assert_eq!((out6.verdict, &out6.frame[22..38]), (TCX_NEXT, &pod_outside().octets()[..]));
    // What has the port 0 or no ports at all is something else.
    for frame in [Packet::udp((POD, 1), (WEB, 0), b"").frame(), Packet::tcp((POD, 1), (WEB, 0), SYN).frame()]
    {
        assert!(!is_marked(&world, &frame));
    }
    assert!(!is_marked(&world, &Packet6::udp((POD6, 1), (WEB6, 0), b"").frame()));
    assert!(!is_marked(&world, &Packet6::new(POD6, WEB6, 47, vec![0; 8]).frame()));
    // Where it alone is denied, the rest goes on.
    let value = VerdictValue { action: ACTION_FORBID, binding: RULE, ..Default::default() };
    world.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
    assert_ne!(world.out(&Packet::echo(POD, WEB, 10).frame()).verdict, TCX_NEXT);
    let another = Packet6::icmp(POD6, WEB6, 128, [0x77, 0x77, 0, 1], b"ping").frame();
    assert_ne!(world.out(&another).verdict, TCX_NEXT);
    assert_eq!(world.out(&Packet::tcp((POD, 1), (WEB, 443), SYN).frame()).verdict, TCX_NEXT);
}
