//! Meters of IPv6: what the programs count of flows that have no ports of their own, as the agent reads it.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aegis_node_agent::meter::{Book, Maps, Step, Told};
use aegis_node_agent::test_run;
use aegis_usage_report::{Figures, Protocol, Row};
use aya::maps::{HashMap, Map, MapData};
use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use support::meter::{Meters, Place, names, volume};
use support::packet::{ACK, SYN};
use support::six::*;
use support::*;

fn world() -> World {
    let mut world = World::new();
    six(&mut world);
    world
}

fn of(origin: Ipv6Addr, port: u16, protocol: Protocol) -> Place {
    let origin = SocketAddr::new(origin.into(), port);
    (Some(NETWORK.into()), Some(origin), protocol, "policy/partners".into())
}

fn place(port: u16, protocol: Protocol) -> Place {
    of(ORIGIN6, port, protocol)
}

/// What has no meter of its own.
fn rest() -> Place {
    (Some(NETWORK.into()), None, Protocol::Other, String::new())
}

fn bytes(frames: &[Vec<u8>]) -> u64 {
    frames.iter().map(|frame| frame.len() as u64 - 14).sum()
}

/// Frames that leave.
fn out(world: &World, frames: &[Vec<u8>]) -> (u64, u64) {
    for frame in frames {
        assert_eq!(world.out(frame).verdict, TCX_NEXT);
    }
    (frames.len() as u64, bytes(frames))
}

/// Frames that come in.
fn back(world: &World, frames: &[Vec<u8>]) -> (u64, u64) {
    for frame in frames {
        assert_eq!(world.back(frame).0, XDP_PASS);
    }
    (frames.len() as u64, bytes(frames))
}

fn figures(flows: u64, sent: (u64, u64), received: (u64, u64)) -> Figures {
    Figures {
        flows,
        sent: volume(sent.0, sent.1),
        received: volume(received.0, received.1),
        ..Figures::default()
    }
}

fn tcp(port: u16, to: u16, flags: u8, payload: usize) -> Vec<u8> {
    Packet6::tcp((POD6, port), (ORIGIN6, to), flags, &vec![7; payload]).frame()
}

fn reply(from: u16, port: u16, payload: usize) -> Vec<u8> {
    Packet6::tcp((ORIGIN6, from), (pod_outside(), port), ACK, &vec![9; payload]).frame()
}

fn flows(world: &World) -> HashMap<MapData, Flow6Key, Flow6Value> {
    world.plane.handle("FLOWS6", Map::LruHashMap).unwrap()
}

fn connection(port: u16, to: u16) -> Flow6Key {
    let ports = u32::from(port) << 16 | u32::from(to);
    Flow6Key { local: raw6(POD6), remote: raw6(ORIGIN6), ports, protocol: 6 }
}

/// Forgets a flow, as an LRU map does.
fn forget(world: &World, key: &Flow6Key) {
    flows(world).remove(key).unwrap();
}

#[test]
fn xdp_meter6_counts_each_origin_apart_exactly() {
    let world = world();
    let mut meters = Meters::new(&world);
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    for port in 10_000..10_005 {
        sent.extend([tcp(port, 443, SYN, 0), tcp(port, 443, ACK, 700)]);
        received.extend([reply(443, port, 1000), reply(443, port, 1)]);
    }
    let web = figures(5, out(&world, &sent), back(&world, &received));
    // Extension headers count too.
    let question = Packet6::udp((POD6, 5000), (ORIGIN6, 53), b"question").behind(60, 1);
    let answer = Packet6::udp((ORIGIN6, 53), (pod_outside(), 5000), b"an answer").behind(0, 0);
    let dns = figures(1, out(&world, &[question.frame()]), back(&world, &[answer.frame()]));
    let (ask, tell) = (Packet6::echo(POD6, ORIGIN6, 128), Packet6::echo(ORIGIN6, pod_outside(), 129));
    let echo = figures(1, out(&world, &[ask.frame()]), back(&world, &[tell.frame()]));
    // Protocols without ports: each is a flow, and reports have one name for all of them.
    let other = |source, destination| {
        [(50, 40), (132, 32), (253, 0)]
            .map(|(protocol, length)| Packet6::new(source, destination, protocol, vec![7; length]).frame())
    };
    let others = figures(3, out(&world, &other(POD6, ORIGIN6)), back(&world, &other(ORIGIN6, pod_outside())));
    // Another origin, and another pod with the same ports.
    let far = Packet6::tcp((FAR_POD6, 10_000), (WEB6, 443), SYN, b"");
    let far = figures(1, out(&world, &[far.frame()]), (0, 0));
    let expected = BTreeMap::from([
        (place(443, Protocol::Tcp), web),
        (place(53, Protocol::Udp), dns),
        (place(0, Protocol::Icmp), echo),
        (place(0, Protocol::Other), others),
        (of(WEB6, 443, Protocol::Tcp), far),
    ]);
    assert_eq!(meters.rows(), expected);
    assert_eq!(meters.rows(), BTreeMap::new(), "no ports are in use, so there is nothing to tell");
}

#[test]
fn xdp_meter6_what_leaves_from_a_single_address_counts_with_its_ports() {
    let mut world = world();
    single(&mut world);
    let mut meters = Meters::new(&world);
    let of = |port, protocol| {
        let origin = SocketAddr::new(ORIGIN6.into(), port);
        (Some(SINGLE.into()), Some(origin), protocol, "policy/partners".to_owned())
    };
    let (mut sent, mut received, mut ports) = ((0, 0), (0, 0), Vec::new());
    let add = |sum: &mut (u64, u64), more: (u64, u64)| (sum.0, sum.1) = (sum.0 + more.0, sum.1 + more.1);
    for port in 10_000..10_005 {
        let first = world.out(&tcp(port, 443, SYN, 0));
        let own = u16::from_be_bytes([first.frame[54], first.frame[55]]);
        ports.push(own);
        add(&mut sent, (1, first.frame.len() as u64 - 14));
        add(&mut sent, out(&world, &[tcp(port, 443, ACK, 700)]));
        let reply = Packet6::tcp((ORIGIN6, 443), (SINGLE, own), ACK, &[9; 1000]).frame();
        add(&mut received, back(&world, &[reply]));
    }
    let web = Figures { in_use: 5, peak: 5, ..figures(5, sent, received) };
    let datagram = Packet6::udp((POD6, 5000), (ORIGIN6, 53), &[3; 3000]).fragments(1232, 0xfeed);
    let first = world.out(&datagram[0]);
    let own = u16::from_be_bytes([first.frame[62], first.frame[63]]);
    let answer = Packet6::udp((ORIGIN6, 53), (SINGLE, own), &[4; 2600]).fragments(1232, 0xbeef);
    let rest = out(&world, &datagram[1..]);
    let all = (datagram.len() as u64, rest.1 + bytes(&datagram[..1]));
    let dns = Figures { in_use: 1, peak: 1, ..figures(1, all, back(&world, &answer)) };
    assert_eq!(meters.rows(), [(of(443, Protocol::Tcp), web), (of(53, Protocol::Udp), dns)].into());
    // What finds no port is counted with where it wanted to go.
    allow_single(&mut world, SINGLE, &[]);
    world.out(&tcp(20_000, 443, SYN, 0));
    let rows = meters.rows();
    let refused = rows.values().find(|figures| !figures.refused.is_empty()).unwrap();
    assert_eq!(refused.refused, [("unavailable".to_owned(), 1)].into());
}

#[test]
fn xdp_meter6_all_fragments_count_for_the_flow_of_their_first() {
    let world = world();
    let mut meters = Meters::new(&world);
    let datagram = Packet6::udp((POD6, 5000), (ORIGIN6, 53), &[3; 3000]).fragments(1232, 0xfeed);
    let answer = Packet6::udp((ORIGIN6, 53), (pod_outside(), 5000), &[4; 2600]).fragments(1232, 0xbeef);
    assert!(datagram.len() > 2 && answer.len() > 2);
    let dns = figures(1, out(&world, &datagram), back(&world, &answer));
    // Whoever comes before the first is nobody's.
    let early = Packet6::udp((ORIGIN6, 53), (pod_outside(), 5000), &[5; 2600]).fragments(1232, 0xcafe);
    let lost = figures(0, (0, 0), back(&world, &early[1..]));
    let rows = meters.rows();
    // The /64 gets its own for the rest with the first look.
    let node: Place = (None, None, Protocol::Other, String::new());
    assert_eq!(rows, [(place(53, Protocol::Udp), dns), (node, lost)].into());
    // What is whole after all is no datagram in fragments.
    let atomic = Packet6::udp((ORIGIN6, 53), (pod_outside(), 5000), b"whole").fragments(1232, 3);
    let whole = figures(0, (0, 0), back(&world, &atomic));
    assert_eq!(meters.rows(), [(place(53, Protocol::Udp), whole)].into());
}

#[test]
fn xdp_meter6_segments_count_as_they_are_on_the_wire() {
    let world = world();
    let mut meters = Meters::new(&world);
    out(&world, &[tcp(10_000, 443, SYN, 0)]);
    meters.rows();
    let large = Packet6::tcp((POD6, 10_000), (ORIGIN6, 443), ACK, &[1; 2500]);
    for (packet, headers) in [(large.clone(), 60), (large.behind(60, 1), 60 + 16)] {
        let outcome = classify_segments(world.program("uplink_egress"), &packet.frame(), MARK, 1400);
        assert_eq!(outcome.verdict, TCX_NEXT);
        // One of 1,400 bytes and one of 1,100, each with headers of its own.
        assert_eq!(meters.rows()[&place(443, Protocol::Tcp)].sent, volume(2, 2500 + 2 * headers));
    }
}

#[test]
fn xdp_meter6_errors_and_what_is_dropped_are_not_counted() {
    let mut world = world();
    let mut meters = Meters::new(&world);
    let question = Packet6::udp((POD6, 5000), (ORIGIN6, 53), b"question");
    let answer = Packet6::udp((ORIGIN6, 53), (pod_outside(), 5000), b"answer");
    out(&world, &[question.frame()]);
    meters.rows();
    out(&world, &[Packet6::error(POD6, &answer.clone().to(POD6), 1, 200).frame()]);
    back(&world, &[Packet6::error(ORIGIN6, &question.from(pod_outside()), 1, 200).frame()]);
    let mut nobody = answer.clone();
    nobody.destination = outside(POD6, NETWORK, SLICE, 6);
    assert_eq!(world.back(&nobody.frame()).0, XDP_DROP);
    let value = network(&mut world, NETWORK);
    set_network(&mut world, NETWORK, NetworkValue { soft: 45, hard: 60, ..value });
    world.renewed(61, 45);
    assert_eq!(world.back(&answer.frame()).0, XDP_DROP);
    assert_eq!(meters.rows(), BTreeMap::new());
}

#[test]
fn xdp_meter6_what_no_flow_is_known_of_is_the_rest_of_its_64() {
    let world = world();
    let mut meters = Meters::new(&world);
    out(&world, &[tcp(10_000, 443, SYN, 0)]);
    meters.rows();
    // Nobody has asked for these: conntrack will say so. The last is for another /64 than the flow has.
    let asked = back(&world, &[reply(443, 10_000, 10)]);
    let unasked = back(&world, &[reply(444, 10_000, 10), reply(443, 10_001, 0)]);
    let other = outside(POD6, NETWORK_2, SLICE, 5);
    let elsewhere = Packet6::tcp((ORIGIN6, 443), (other, 10_000), ACK, b"").frame();
    let node = back(&world, &[elsewhere]);
    let expected = [
        (place(443, Protocol::Tcp), figures(0, (0, 0), asked)),
        (rest(), figures(0, (0, 0), unasked)),
        // Of that one the agent has not been told.
        ((None, None, Protocol::Other, String::new()), figures(0, (0, 0), node)),
    ];
    assert_eq!(meters.rows(), expected.into());
    let look = meters.read();
    let (rows, _) = meters.book.look(&look, Some(&names()));
    assert!(rows.is_empty(), "{rows:?}");
}

#[test]
fn xdp_meter6_a_flow_that_was_forgotten_begins_again() {
    let world = world();
    let mut meters = Meters::new(&world);
    out(&world, &[tcp(10_000, 443, SYN, 0)]);
    meters.rows();
    forget(&world, &connection(10_000, 443));
    let meanwhile = back(&world, &[reply(443, 10_000, 100)]);
    let again = out(&world, &[tcp(10_000, 443, ACK, 10)]);
    let then = back(&world, &[reply(443, 10_000, 200)]);
    let expected =
        [(place(443, Protocol::Tcp), figures(1, again, then)), (rest(), figures(0, (0, 0), meanwhile))];
    assert_eq!(meters.rows(), expected.into());
}

#[test]
fn xdp_meter6_without_a_number_a_64_has_one_for_the_rest() {
    let world = world();
    let mut meters = Meters::new(&world);
    meters.rows();
    meters.maps.withdraw().unwrap();
    let sent = out(&world, &[tcp(10_000, 443, SYN, 0), tcp(10_000, 444, SYN, 0)]);
    let received = back(&world, &[reply(443, 10_000, 5), reply(444, 10_000, 6), reply(445, 10_000, 7)]);
    let (rows, _) = meters.look();
    assert_eq!(rows.len(), 1);
    let key = &rows[0].key;
    assert_eq!((key.address, key.origin, &key.rule), (Some(NETWORK.into()), None, &String::new()));
    assert_eq!((&*key.account, &*key.allocation), ("shop", "first"), "whose it is, is known");
    assert_eq!(rows[0].figures, figures(2, sent, received));
}

#[test]
fn xdp_meter6_before_numbers_are_given_out_all_is_the_rest_of_the_node() {
    let world = world();
    let mut maps = Maps::open(&world.plane).unwrap();
    let sent = out(&world, &[tcp(10_000, 443, SYN, 0)]);
    let received = back(&world, &[reply(443, 10_000, 5), reply(444, 10_000, 5)]);
    let mut book = Book::new(maps.told().unwrap());
    let look = maps.look(book.numbers()).unwrap();
    let (rows, _) = book.look(&look, Some(&names()));
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].key.address, &rows[0].figures), (None, &figures(1, sent, received)));
}

#[test]
fn xdp_meter6_a_number_is_given_again_when_no_flow_is_known_that_has_it() {
    let world = world();
    let mut meters = Meters::new(&world);
    out(&world, &[tcp(10_000, 443, SYN, 0)]);
    let key = connection(10_000, 443);
    let number = flows(&world).get(&key, 0).unwrap().meter;
    let linked = *meters.read().linked.iter().find(|(_, it)| **it == number).unwrap().0;
    meters.rows();
    // Out of the index, but not free for as long as a flow has it, however quiet that is.
    meters.maps.follow(&[Step::Retire(linked, number)]).unwrap();
    let frees = |meters: &mut Meters| {
        let (_, steps) = meters.look();
        steps.iter().any(|step| matches!(step, Step::Free(_, free) if *free == number))
    };
    for _ in 0..40 {
        assert!(!frees(&mut meters));
    }
    // A new flow to the same origin has another, and those of the old one still count for it.
    out(&world, &[tcp(10_001, 443, SYN, 0)]);
    assert_ne!(flows(&world).get(&connection(10_001, 443), 0).unwrap().meter, number);
    let late = back(&world, &[reply(443, 10_000, 77)]);
    let (address, origin, protocol, _) = place(443, Protocol::Tcp);
    let retired = (address, origin, protocol, String::new());
    assert_eq!(meters.rows()[&retired], figures(0, (0, 0), late));
    forget(&world, &key);
    // A program may have had it in hand.
    assert!(!frees(&mut meters));
    assert!(frees(&mut meters));
    assert!(meters.book.numbers().all(|it| it != number));
}

#[test]
fn xdp_meter6_an_agent_begins_where_the_one_before_has_ended() {
    let world = world();
    let mut meters = Meters::new(&world);
    let refused = |port| Packet6::tcp((POD6, port), (DENIED6, 443), SYN, b"").frame();
    out(&world, &[tcp(10_000, 443, SYN, 0)]);
    world.out(&refused(1));
    back(&world, &[reply(443, 10_000, 9)]);
    assert_eq!(meters.rows()[&place(443, Protocol::Tcp)].flows, 1);
    drop(meters);
    // What comes while there is none is told by the next, and nothing twice.
    let sent = out(&world, &[tcp(10_001, 443, SYN, 0)]);
    let received = back(&world, &[reply(443, 10_000, 8)]);
    let unasked = back(&world, &[reply(444, 1, 8)]);
    world.out(&refused(2));
    let mut meters = Meters::new(&world);
    let denied = Figures { refused: [("unavailable".to_owned(), 1)].into(), ..Figures::default() };
    let (_, origin, protocol, rule) = of(DENIED6, 443, Protocol::Tcp);
    let expected = [
        (place(443, Protocol::Tcp), figures(1, sent, received)),
        (rest(), figures(0, (0, 0), unasked)),
        ((None, origin, protocol, rule), denied),
    ];
    assert_eq!(meters.rows(), expected.into());
}

#[test]
fn xdp_meter6_refusals_say_why_and_where_to() {
    let mut world = world();
    let mut meters = Meters::new(&world);
    let refused = |world: &World, packet: &Packet6| {
        assert_ne!(world.out(&packet.frame()).verdict, TCX_NEXT);
    };
    let reasons = |meters: &mut Meters| {
        let rows = meters.rows().into_iter();
        rows.map(|(place, figures)| (place, figures.refused)).collect::<BTreeMap<_, _>>()
    };
    let counted = |reason: &str, count| BTreeMap::from([(reason.to_owned(), count)]);
    // Nothing to leave from, and none of an allocation.
    let denied = Packet6::udp((POD6, 1), (DENIED6, 53), b"");
    (0..3).for_each(|_| refused(&world, &denied));
    let (_, origin, protocol, rule) = of(DENIED6, 53, Protocol::Udp);
    let nothing: Place = (None, origin, protocol, rule);
    assert_eq!(reasons(&mut meters), [(nothing, counted("unavailable", 3))].into());
    // The policy says so.
    let key = VerdictKey { generation: 1, pod_class: 1, destination_class: 2, port_class: 0 };
    let value = VerdictValue { action: ACTION_FORBID, binding: 3, ..Default::default() };
    world.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
    refused(&world, &Packet6::new(POD6, DENIED6, 50, vec![1; 8]));
    let (_, origin, protocol, rule) = of(DENIED6, 0, Protocol::Other);
    assert_eq!(reasons(&mut meters), [((None, origin, protocol, rule), counted("policy", 1))].into());
    // The allocation has one that opens nothing: it is named, since there is no other.
    let value = network(&mut world, NETWORK);
    set_network(&mut world, NETWORK, NetworkValue { open: 0, ..value });
    let syn = Packet6::tcp((POD6, 10_000), (ORIGIN6, 443), SYN, b"");
    refused(&world, &syn);
    assert_eq!(reasons(&mut meters), [(place(443, Protocol::Tcp), counted("unavailable", 1))].into());
    set_network(&mut world, NETWORK, NetworkValue { soft: 45, hard: 60, ..value });
    world.renewed(50, 45);
    refused(&world, &syn);
    // What opens nothing is no new flow, nor is an error.
    refused(&world, &Packet6::tcp((POD6, 10_000), (ORIGIN6, 443), ACK, b""));
    let about = Packet6::udp((ORIGIN6, 53), (POD6, 5000), b"answer");
    refused(&world, &Packet6::error(POD6, &about, 1, 200));
    assert_eq!(reasons(&mut meters), [(place(443, Protocol::Tcp), counted("fenced", 1))].into());
    assert_eq!(reasons(&mut meters), BTreeMap::new(), "told once");
    world.counted();
}

#[test]
fn xdp_meter6_a_flow_keeps_its_meter_whatever_the_policy_has_become() {
    let mut world = world();
    let mut meters = Meters::new(&world);
    out(&world, &[tcp(10_000, 443, SYN, 0)]);
    meters.rows();
    // The destination is another rule's now, and new flows leave from another /64.
    let key = VerdictKey { generation: 1, pod_class: 1, destination_class: 1, port_class: 0 };
    let value = VerdictValue { action: ACTION_ALLOCATE, binding: 4, ..Default::default() };
    world.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
    set_allocation6(&mut world, &[NETWORK_2]);
    let sent = out(&world, &[tcp(10_000, 443, ACK, 5), tcp(10_000, 443, ACK, 6)]);
    let received = back(&world, &[reply(443, 10_000, 7)]);
    let new = out(&world, &[tcp(10_001, 443, SYN, 0)]);
    let (_, origin, protocol, _) = place(443, Protocol::Tcp);
    let expected = [
        (place(443, Protocol::Tcp), figures(0, sent, received)),
        ((Some(NETWORK_2.into()), origin, protocol, String::new()), figures(1, new, (0, 0))),
    ];
    assert_eq!(meters.rows(), expected.into());
}

#[test]
fn xdp_meter6_rules_that_get_new_numbers_take_nothing_over() {
    let world = world();
    let mut meters = Meters::new(&world);
    out(&world, &[tcp(10_000, 443, SYN, 0)]);
    // The agent before knew number 3 by another name.
    let rules = Arc::new([(3, aegis_core::policy::RuleName::Policy("of before".into()))].into());
    let mut book = Book::new(Told { rules: Some(rules), ..meters.maps.told().unwrap() });
    let of =
        |rows: &[Row]| rows.iter().map(|row| (row.key.rule.clone(), row.figures.flows)).collect::<Vec<_>>();
    let look = meters.read();
    let (rows, steps) = book.look(&look, Some(&names()));
    assert_eq!(of(&rows), [("policy/of before".to_owned(), 1)]);
    meters.maps.follow(&steps).unwrap();
    out(&world, &[tcp(10_001, 443, SYN, 0), tcp(10_000, 443, ACK, 0)]);
    let look = meters.maps.look(book.numbers()).unwrap();
    let (rows, _) = book.look(&look, Some(&names()));
    assert_eq!(of(&rows), [("policy/of before".to_owned(), 0), ("policy/partners".to_owned(), 1)]);
}

#[test]
fn xdp_meter6_nothing_is_lost_or_told_twice_whatever_comes_in_between() {
    let world = world();
    let mut meters = Meters::new(&world);
    let program = world.program("uplink_egress");
    let inbound = world.program("uplink_ingress");
    const ROUNDS: u64 = 40;
    let frames: Vec<_> = (10_000..10_100).map(|port| tcp(port, 443, SYN, 0)).collect();
    let replies: Vec<_> = (10_000..10_100).map(|port| reply(443, port, 3)).collect();
    let (context, mut told) = (context(MARK), Figures::default());
    let mut tell = |meters: &mut Meters| {
        let (rows, _) = meters.look();
        rows.iter().for_each(|row| told.add(&row.figures));
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    for (frame, reply) in frames.iter().zip(&replies) {
                        test_run::run(program, frame, &context, 1).unwrap();
                        test_run::run(inbound, reply, &[], 1).unwrap();
                    }
                }
            });
        }
        for _ in 0..20 {
            tell(&mut meters);
        }
    });
    tell(&mut meters);
    let count = 4 * ROUNDS * frames.len() as u64;
    // Two CPUs that see a flow first at once have one between them.
    assert_eq!(told.flows, frames.len() as u64);
    assert_eq!(told.sent, volume(count, 4 * ROUNDS * bytes(&frames)));
    assert_eq!(told.received, volume(count, 4 * ROUNDS * bytes(&replies)));
}
