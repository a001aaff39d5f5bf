//! Meters: what the programs count of flows, as the agent reads it.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aegis_core::policy::RuleName;
use aegis_node_agent::ebpf::{Dataplane, MapSizes};
use aegis_node_agent::meter::{Book, Maps, Step, Told};
use aegis_node_agent::{raw, test_run};
use aegis_usage_report::{Figures, Protocol, Row};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use support::gateway::*;
use support::meter::{Meters, Place, names, volume};
use support::packet::{ACK, Packet, RST, SYN};
use support::*;

fn place(port: u16, protocol: Protocol) -> Place {
    let origin = SocketAddr::new(ORIGIN.into(), port);
    (Some(EGRESS.into()), Some(origin), protocol, "policy/partners".into())
}

/// Sends a packet; gives the port that it leaves from.
fn out(world: &World, packet: &Packet) -> u16 {
    let out = world.out(&packet.frame());
    assert_eq!(out.verdict, TCX_NEXT);
    let at = if packet.protocol() == 1 { 38 } else { 34 };
    u16::from_be_bytes([out.frame[at], out.frame[at + 1]])
}

fn length(packet: &Packet) -> u64 {
    packet.bytes().len() as u64
}

#[test]
fn xdp_meter_counts_each_origin_apart_exactly() {
    let world = World::new();
    let mut meters = Meters::new(&world);
    let syn = |port| Packet::tcp((POD, port), (ORIGIN, 443), SYN);
    let data = |port| Packet::tcp((POD, port), (ORIGIN, 443), ACK).with_payload(700);
    let question = Packet::udp((POD, 5000), (ORIGIN, 53), b"question");
    let echo = Packet::echo(POD, ORIGIN, 9);
    for port in 10_000..10_005 {
        let from = out(&world, &syn(port));
        out(&world, &data(port));
        for _ in 0..2 {
            let reply = Packet::tcp((ORIGIN, 443), (EGRESS, from), ACK).with_payload(1000);
            assert_eq!(world.back(&reply.frame()).0, XDP_PASS);
        }
    }
    let from = out(&world, &question);
    let answer = Packet::udp((ORIGIN, 53), (EGRESS, from), b"an answer");
    assert_eq!(world.back(&answer.frame()).0, XDP_PASS);
    out(&world, &echo);
    let reply = Packet::tcp((ORIGIN, 443), (EGRESS, 1), ACK).with_payload(1000);
    let expected = BTreeMap::from([
        (
            place(443, Protocol::Tcp),
            Figures {
                in_use: 5,
                peak: 5,
                flows: 5,
                sent: volume(10, 5 * (length(&syn(1)) + length(&data(1)))),
                received: volume(10, 10 * length(&reply)),
                ..Figures::default()
            },
        ),
        (
            place(53, Protocol::Udp),
            Figures {
                in_use: 1,
                peak: 1,
                flows: 1,
                sent: volume(1, length(&question)),
                received: volume(1, length(&answer)),
                ..Figures::default()
            },
        ),
        (
            place(0, Protocol::Icmp),
            Figures { in_use: 1, peak: 1, flows: 1, sent: volume(1, length(&echo)), ..Figures::default() },
        ),
    ]);
    assert_eq!(meters.rows(), expected);
    // Nothing more has come; what is in use still is.
    let still =
        |figures: &Figures| Figures { in_use: figures.in_use, peak: figures.peak, ..Figures::default() };
    let quiet: BTreeMap<Place, Figures> = expected.iter().map(|(key, it)| (key.clone(), still(it))).collect();
    assert_eq!(meters.rows(), quiet);
}

#[test]
fn xdp_meter_what_is_dropped_is_not_counted() {
    let world = World::new();
    let mut meters = Meters::new(&world);
    let from = out(&world, &Packet::tcp((POD, 10_000), (ORIGIN, 443), SYN));
    meters.rows();
    // Nobody asked for these.
    let stranger = Packet::tcp((ORIGIN, 444), (EGRESS, from), ACK);
    assert_eq!(world.back(&stranger.frame()).0, XDP_DROP);
    assert_eq!(world.out(&Packet::tcp((POD, 10_001), (ORIGIN, 443), ACK).frame()).verdict, TCX_REDIRECT);
    let rows = meters.rows();
    let figures = Figures { in_use: 1, peak: 1, ..Figures::default() };
    assert_eq!(rows, [(place(443, Protocol::Tcp), figures)].into());
}

#[test]
fn xdp_meter_a_peak_is_of_one_interval() {
    let mut world = World::new();
    let mut meters = Meters::new(&world);
    for port in 10_000..10_100 {
        out(&world, &Packet::tcp((POD, port), (ORIGIN, 443), SYN));
    }
    let keys: Vec<FlowKey> = (10_000..10_090).map(|port| flow(6, (POD, port), (ORIGIN, 443))).collect();
    for key in &keys {
        let over = ForwardValue { last_seen: 1, seen: SEEN_RST, ..world.forward(key).unwrap() };
        world.set_forward(*key, over);
    }
    assert_eq!(world.plane.sweeper().unwrap().flows(&keys).unwrap(), 90);
    let of = |meters: &mut Meters| {
        let figures = meters.rows().remove(&place(443, Protocol::Tcp)).unwrap_or_default();
        (figures.in_use, figures.peak, figures.flows)
    };
    assert_eq!(of(&mut meters), (10, 100, 100));
    assert_eq!(of(&mut meters), (10, 10, 0));
    out(&world, &Packet::tcp((POD, 20_000), (ORIGIN, 443), SYN));
    assert_eq!(of(&mut meters), (11, 11, 1));
    assert_eq!(world.consistent(), 11);
    world.counted();
}

#[test]
fn xdp_meter_segments_count_as_they_are_on_the_wire() {
    let world = World::new();
    let mut meters = Meters::new(&world);
    out(&world, &Packet::tcp((POD, 10_000), (ORIGIN, 443), SYN));
    meters.rows();
    let large = Packet::tcp((POD, 10_000), (ORIGIN, 443), ACK).with_payload(2500);
    let outcome = classify_segments(world.program("uplink_egress"), &large.frame(), MARK, 1400);
    assert_eq!(outcome.verdict, TCX_NEXT);
    let figures = meters.rows().remove(&place(443, Protocol::Tcp)).unwrap();
    // One of 1,400 bytes and one of 1,100, each with headers of its own.
    assert_eq!(figures.sent, volume(2, 2500 + 2 * 40));
}

#[test]
fn xdp_meter_counts_all_fragments() {
    let world = World::new();
    let mut meters = Meters::new(&world);
    let datagram = Packet::udp((POD, 5000), (ORIGIN, 53), b"").with_payload(3000).with_id(7);
    let fragments = datagram.fragments(1200);
    for frame in &fragments {
        assert_eq!(world.out(frame).verdict, TCX_NEXT);
    }
    let first = world.out(&fragments[0]);
    let from = u16::from_be_bytes([first.frame[34], first.frame[35]]);
    let answer = Packet::udp((ORIGIN, 53), (EGRESS, from), b"").with_payload(2000).with_id(9);
    let answers = answer.fragments(1200);
    for frame in &answers {
        assert_eq!(world.back(frame).0, XDP_PASS);
    }
    let bytes = |frames: &[Vec<u8>]| frames.iter().map(|frame| frame.len() as u64 - 14).sum::<u64>();
    let figures = meters.rows().remove(&place(53, Protocol::Udp)).unwrap();
    let again = fragments[0].len() as u64 - 14;
    assert_eq!(figures.sent, volume(fragments.len() as u64 + 1, bytes(&fragments) + again));
    assert_eq!(figures.received, volume(answers.len() as u64, bytes(&answers)));
    assert!(fragments.len() > 2 && answers.len() > 1);
}

#[test]
fn xdp_meter_without_a_number_an_address_has_one_for_the_rest() {
    let world = World::new();
    let mut meters = Meters::new(&world);
    // The address gets its own for the rest.
    meters.rows();
    meters.maps.withdraw().unwrap();
    for port in [443, 444] {
        out(&world, &Packet::tcp((POD, 10_000), (ORIGIN, port), SYN));
    }
    let rest: Place = (Some(EGRESS.into()), None, Protocol::Other, String::new());
    let bytes = 2 * length(&Packet::tcp((POD, 1), (ORIGIN, 443), SYN));
    let figures = Figures { in_use: 2, peak: 2, flows: 2, sent: volume(2, bytes), ..Figures::default() };
    assert_eq!(meters.rows(), [(rest, figures)].into());
}

#[test]
fn xdp_meter_before_numbers_are_given_out_all_is_the_rest_of_the_node() {
    let world = World::new();
    let mut maps = Maps::open(&world.plane).unwrap();
    out(&world, &Packet::tcp((POD, 10_000), (ORIGIN, 443), SYN));
    let mut book = Book::new(maps.told().unwrap());
    let look = maps.look(book.numbers()).unwrap();
    let (rows, _) = book.look(&look, Some(&names()));
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].key.address, rows[0].figures.in_use, rows[0].figures.flows), (None, 1, 1));
}

#[test]
fn xdp_meter_a_number_is_given_again_when_its_flows_are_over() {
    let world = World::new();
    let mut meters = Meters::new(&world);
    out(&world, &Packet::tcp((POD, 10_000), (ORIGIN, 443), SYN));
    let key = flow(6, (POD, 10_000), (ORIGIN, 443));
    let number = u32::from(world.forward(&key).unwrap().meter);
    let look = meters.read();
    let linked = *look.linked.iter().find(|(_, it)| **it == number).unwrap().0;
    assert_eq!(meters.maps.fill(&look).in_use, 1);
    meters.rows();
    // Out of the index, but not free as long as it has a flow.
    meters.maps.follow(&[Step::Retire(linked, number)]).unwrap();
    let (address, origin, protocol, _) = place(443, Protocol::Tcp);
    // What its rule was, only who retires it knows.
    let retired = (address, origin, protocol, String::new());
    for _ in 0..3 {
        assert_eq!(meters.rows()[&retired].in_use, 1);
    }
    // A new flow to the same origin has another.
    out(&world, &Packet::tcp((POD, 10_001), (ORIGIN, 443), SYN));
    let other = world.forward(&flow(6, (POD, 10_001), (ORIGIN, 443))).unwrap().meter;
    assert_ne!(u32::from(other), number);
    let rows = meters.rows();
    assert_eq!((rows[&retired].in_use, rows[&place(443, Protocol::Tcp)].in_use), (1, 1));
    let over = ForwardValue { last_seen: 1, seen: SEEN_RST, ..world.forward(&key).unwrap() };
    world.set_forward(key, over);
    assert_eq!(world.plane.sweeper().unwrap().flows(&[key]).unwrap(), 1);
    let mut freed = false;
    for _ in 0..3 {
        let look = meters.read();
        let (_, steps) = meters.book.look(&look, Some(&names()));
        freed |= steps.iter().any(|step| matches!(step, Step::Free(_, free) if *free == number));
        meters.maps.follow(&steps).unwrap();
    }
    assert!(freed);
    assert!(meters.book.numbers().all(|it| it != number));
}

#[test]
fn xdp_meter_an_agent_begins_where_the_one_before_has_ended() {
    let world = World::new();
    let mut meters = Meters::new(&world);
    out(&world, &Packet::tcp((POD, 10_000), (ORIGIN, 443), SYN));
    world.out(&Packet::tcp((POD, 1), (DENIED, 443), SYN).frame());
    assert_eq!(meters.rows()[&place(443, Protocol::Tcp)].flows, 1);
    drop(meters);
    // What comes while there is none is told by the next, and nothing twice.
    out(&world, &Packet::tcp((POD, 10_001), (ORIGIN, 443), SYN));
    world.out(&Packet::tcp((POD, 2), (DENIED, 443), SYN).frame());
    let mut meters = Meters::new(&world);
    let rows = meters.rows();
    assert_eq!((rows[&place(443, Protocol::Tcp)].flows, rows[&place(443, Protocol::Tcp)].in_use), (1, 2));
    let refused: u64 = rows.values().flat_map(|figures| figures.refused.values()).sum();
    assert_eq!(refused, 1);
}

#[test]
fn xdp_meter_rules_that_get_new_numbers_take_nothing_over() {
    let world = World::new();
    let mut meters = Meters::new(&world);
    out(&world, &Packet::tcp((POD, 10_000), (ORIGIN, 443), SYN));
    // The agent before knew number 3 by another name.
    let rules = Arc::new([(3, RuleName::Policy("of before".into()))].into());
    let mut book = Book::new(Told { rules: Some(rules), ..meters.maps.told().unwrap() });
    let look = meters.read();
    let of =
        |rows: &[Row]| rows.iter().map(|row| (row.key.rule.clone(), row.figures.flows)).collect::<Vec<_>>();
    let (rows, steps) = book.look(&look, Some(&names()));
    assert_eq!(of(&rows), [("policy/of before".to_owned(), 1)]);
    meters.maps.follow(&steps).unwrap();
    out(&world, &Packet::tcp((POD, 10_001), (ORIGIN, 443), SYN));
    let look = meters.maps.look(book.numbers()).unwrap();
    let (rows, _) = book.look(&look, Some(&names()));
    assert_eq!(
        of(&rows),
        [("policy/of before".to_owned(), 0), ("policy/partners".to_owned(), 1)],
        "the flow from before stays what it was"
    );
}

#[test]
fn xdp_meter_refusals_of_which_there_are_too_many_kinds_say_why() {
    let mut world = World::new();
    let mut meters = Meters::new(&world);
    meters.maps.keep_rest_of_refusals().unwrap();
    let refusals = raw::Map::of(world.plane.map_fd("REFUSALS").unwrap()).unwrap();
    let full = (1..u32::MAX).find(|number| {
        let key = RefusalKey { remote: mapped(*number), protocol: 6, ..RefusalKey::default() };
        refusals.insert(raw::bytes(&key), raw::bytes(&0u64)).is_err()
    });
    assert!(full.is_some_and(|count| count > MAX_REFUSALS / 2), "{full:?}");
    for port in 1..4 {
        assert_ne!(world.out(&Packet::udp((POD, port), (DENIED, 53), b"").frame()).verdict, TCX_NEXT);
    }
    let rows = meters.rows();
    let told: Vec<_> = rows.iter().filter(|(_, figures)| !figures.refused.is_empty()).collect();
    let nowhere: Place = (None, None, Protocol::Other, String::new());
    assert_eq!(
        told,
        [(&nowhere, &Figures { refused: [("unavailable".to_owned(), 3)].into(), ..Figures::default() })]
    );
    // However long nothing comes, there stays room for them.
    let steps: Vec<Step> = (0..40).flat_map(|_| meters.look().1).collect();
    let rest = |step: &Step| matches!(step, Step::Forget(key) if *key == RefusalKey::rest_of(key.reason));
    assert!(steps.iter().any(|step| matches!(step, Step::Forget(_))) && !steps.iter().any(rest));
    world.counted();
}

#[test]
fn xdp_meter_refusals_say_why_and_where_to() {
    let mut world = World::new();
    let mut meters = Meters::new(&world);
    for port in 10_000..10_256 {
        out(&world, &Packet::tcp((POD, port), (ORIGIN, 443), SYN));
    }
    for port in 20_000..20_007 {
        assert_ne!(world.out(&Packet::tcp((POD, port), (ORIGIN, 443), SYN).frame()).verdict, TCX_NEXT);
    }
    assert_ne!(world.out(&Packet::udp((POD, 1), (DENIED, 53), b"").frame()).verdict, TCX_NEXT);
    // What opens nothing is no new flow.
    assert_ne!(world.out(&Packet::tcp((POD, 30_000), (ORIGIN, 443), ACK).frame()).verdict, TCX_NEXT);
    let rows = meters.rows();
    let full = &rows[&place(443, Protocol::Tcp)];
    assert_eq!((full.in_use, full.flows), (256, 256));
    assert_eq!(full.refused, [("no_port".to_owned(), 7)].into());
    let nothing: Place =
        (None, Some(SocketAddr::new(DENIED.into(), 53)), Protocol::Udp, "policy/partners".into());
    assert_eq!(rows[&nothing].refused, [("unavailable".to_owned(), 1)].into());
    assert!(meters.rows().values().all(|figures| figures.refused.is_empty()), "told once");
    world.counted();
}

#[test]
fn xdp_meter_a_gateway_meters_what_it_translates_and_the_pods_node_does_not() {
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    let (mut here, mut there) = (Meters::new(&node), Meters::new(&gateway));
    let question = Packet::udp((POD, 5000), (ORIGIN, 53), b"question");
    let frame = encapsulated(&mut node, "question", &question, NODE_2);
    let port = sent_on(&mut gateway, "question", &frame, &question);
    let reply = Packet::udp((ORIGIN, 53), (EGRESS, port), b"answer");
    let to_pod = reply.clone().to(POD, 5000);
    back(&mut gateway, &mut node, "answer", &reply, &to_pod);
    assert_eq!(here.rows(), BTreeMap::new());
    let (address, origin, protocol, _) = place(53, Protocol::Udp);
    let figures = Figures {
        in_use: 1,
        peak: 1,
        flows: 1,
        sent: volume(1, length(&question)),
        received: volume(1, length(&reply)),
        ..Figures::default()
    };
    assert_eq!(there.rows(), [((address, origin, protocol, String::new()), figures)].into());
    // What it refuses for want of a port, the pod's node counts, by its rule: another may have taken it.
    let syn = Packet::tcp((POD, 40_000), (ORIGIN, 443), SYN);
    gateway.allow(EGRESS, &[]);
    let frame = encapsulated(&mut node, "refused", &syn, NODE_2);
    let (verdict, frame) = gateway.back(&frame);
    assert_eq!(verdict, XDP_REDIRECT);
    assert_eq!(node.back(&frame).0, XDP_PASS);
    assert!(there.rows().values().all(|figures| figures.refused.is_empty()));
    assert_eq!(here.rows()[&place(443, Protocol::Tcp)].refused, [("no_port".to_owned(), 1)].into());
}

#[test]
fn xdp_meter_ports_in_use_are_exact_whatever_comes_in_between() {
    let world = World::sized(&MapSizes { flows: 4096, blocks: 1024, ..MapSizes::default() });
    let mut meters = Meters::new(&world);
    let keys: Vec<FlowKey> = (10_000..10_200).map(|port| flow(6, (POD, port), (ORIGIN, 443))).collect();
    let program = world.program("uplink_egress");
    std::thread::scope(|scope| {
        for turn in 0..4u16 {
            scope.spawn(move || {
                for round in 0..40 {
                    for port in 10_000..10_200 {
                        let flags = if (port + turn + round) % 3 == 0 { RST } else { SYN };
                        let packet = Packet::tcp((POD, port), (ORIGIN, 443), flags);
                        test_run::run(program, &packet.frame(), &context(MARK), 1).unwrap();
                    }
                }
            });
        }
        let sweeper = world.plane.sweeper().unwrap();
        let keys = &keys;
        scope.spawn(move || {
            for _ in 0..200 {
                sweeper.cut_short(keys).unwrap();
            }
        });
        for _ in 0..20 {
            let look = meters.read();
            let (_, steps) = meters.book.look(&look, Some(&names()));
            meters.maps.follow(&steps).unwrap();
        }
    });
    let live = world.consistent() as u64;
    let figures = meters.rows().remove(&place(443, Protocol::Tcp)).unwrap_or_default();
    assert_eq!(figures.in_use, live);
}

#[test]
fn xdp_meter_counts_nothing_where_nobody_is_told_and_begins_when_somebody_is() {
    let sizes = MapSizes { flows: 4096, blocks: 1024, ..MapSizes::default() };
    let mut world = World::sized(&MapSizes { metered: false, ..sizes.clone() });
    let syn = |port| Packet::tcp((POD, port), (ORIGIN, 443), SYN);
    let from = out(&world, &syn(10_000));
    out(&world, &syn(9_999));
    let reply = |from| Packet::tcp((ORIGIN, 443), (EGRESS, from), ACK).with_payload(1000);
    assert_eq!(world.back(&reply(from).frame()).0, XDP_PASS);
    world.allow(EGRESS, &[]);
    assert_ne!(world.out(&syn(10_001).frame()).verdict, TCX_NEXT);
    world.allow(EGRESS, &[SLICE]);
    let mut meters = Meters::new(&world);
    let rest = |in_use| Figures { in_use, peak: in_use, ..Figures::default() };
    let of_node = || (None, None, Protocol::Other, String::new());
    assert_eq!(meters.rows(), [(of_node(), rest(2))].into());

    // The agent starts anew, and use is reported: flows that live are counted together, new ones apart.
    world.plane = Dataplane::load(world.root(), &sizes).unwrap();
    let mut meters = Meters::new(&world);
    let new = out(&world, &syn(10_002));
    assert_eq!(world.back(&reply(from).frame()).0, XDP_PASS);
    assert_eq!(world.back(&reply(new).frame()).0, XDP_PASS);
    let received = volume(1, length(&reply(new)));
    let apart = Figures {
        in_use: 1,
        peak: 1,
        flows: 1,
        sent: volume(1, length(&syn(0))),
        received,
        ..Figures::default()
    };
    let together = Figures { received, ..rest(2) };
    assert_eq!(meters.rows(), [(of_node(), together), (place(443, Protocol::Tcp), apart)].into());
    // What ends gives back what it had taken when nobody was told.
    let key = flow(6, (POD, 9_999), (ORIGIN, 443));
    let over = ForwardValue { last_seen: 1, seen: SEEN_RST, ..world.forward(&key).unwrap() };
    world.set_forward(key, over);
    assert_eq!(world.plane.sweeper().unwrap().flows(&[key]).unwrap(), 1);
    let in_use: Vec<u64> = meters.rows().into_values().map(|figures| figures.in_use).collect();
    assert_eq!(in_use, [1, 1]);
}
