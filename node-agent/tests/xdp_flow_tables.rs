//! The flow tables: full buckets, full tables, and what is left when flows end.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aegis_node_agent::ebpf::{Dataplane, MapSizes};
use aegis_node_agent::live::{Question, live};
use std::net::IpAddr;
use support::packet::{ACK, Packet, SYN};
use support::*;

/// Five buckets, as is the least.
const SIZES: MapSizes = MapSizes {
    flows: 8,
    blocks: 1024,
    pods: 1 << 12,
    destinations: 1 << 16,
    ports: 1 << 16,
    verdicts: 1 << 17,
    meters: 1 << 12,
    metered: true,
};

fn segment(pod_port: u16, flags: u8) -> Packet {
    Packet::tcp((POD, pod_port), (ORIGIN, 443), flags)
}

/// Sends a segment of a connection; its egress port, or `None` if it is refused.
fn sent(world: &World, pod_port: u16, flags: u8) -> Option<u16> {
    let out = world.out(&segment(pod_port, flags).frame());
    assert!([TCX_NEXT, TCX_REDIRECT].contains(&out.verdict), "{pod_port}: verdict {}", out.verdict);
    (out.verdict == TCX_NEXT).then(|| u16::from_be_bytes([out.frame[34], out.frame[35]]))
}

/// Whether a reply reaches the pod.
fn arrives(world: &World, port: u16) -> bool {
    world.back(&Packet::tcp((ORIGIN, 443), (EGRESS, port), ACK).frame()).0 == XDP_PASS
}

/// Ends flows of these pod ports.
fn end(world: &World, pod_ports: &[u16]) {
    let keys: Vec<FlowKey> = pod_ports.iter().map(|port| flow(6, (POD, *port), (ORIGIN, 443))).collect();
    for key in &keys {
        let out = world.forward(key).unwrap();
        let back_key = FlowKey { local: out.egress, local_port: out.egress_port, ..*key };
        let back = world.reverse(&back_key).unwrap();
        world.set_forward(*key, ForwardValue { last_seen: 1, seen: SEEN_RST, ..out });
        world.set_reverse(back_key, ReverseValue { last_seen: 1, ..back });
    }
    assert_eq!(world.plane.sweeper().unwrap().flows(&keys).unwrap() as usize, keys.len());
}

/// Entries that went on from a bucket of FORWARD.
fn spilled(world: &mut World, bucket: u32) -> u32 {
    world.plane.array::<Bucket<ForwardValue>>("FORWARD").unwrap().get(&bucket, 0).unwrap().spilled
}

/// All flows have the same bucket, which is full after the fifteenth: the others are found all the same, also when there is
/// room again in it, and whichever of them end.
#[test]
fn xdp_flow_tables_flows_that_find_their_bucket_full_are_as_good_as_others() {
    let mut world = World::sized(&SIZES);
    world.shrink_tables(1, 4, 40);
    let ports: Vec<u16> = (0..40).map(|at| sent(&world, 10_000 + at, SYN).unwrap()).collect();
    let all_go_on = |world: &World, which: &[u16]| {
        for at in which {
            let port = ports[usize::from(*at)];
            assert_eq!(sent(world, 10_000 + at, ACK), Some(port), "flow {at}: out");
            assert!(arrives(world, port), "flow {at}: in");
        }
    };
    let all: Vec<u16> = (0..40).collect();
    all_go_on(&world, &all);
    assert_eq!((world.consistent(), spilled(&mut world, 0)), (40, 25));
    // Every third ends, in all buckets.
    let (over, live): (Vec<u16>, Vec<u16>) = all.iter().partition(|at| *at % 3 == 0);
    end(&world, &over.iter().map(|at| 10_000 + at).collect::<Vec<_>>());
    assert_eq!(world.consistent(), 40 - over.len());
    all_go_on(&world, &live);
    for at in &over {
        assert!(!arrives(&world, ports[usize::from(*at)]), "flow {at} is over");
        assert_eq!(sent(&world, 10_000 + at, ACK), None, "flow {at} is over");
    }
    // Their places are others' now.
    for at in &over {
        assert!(sent(&world, 20_000 + at, SYN).is_some());
    }
    all_go_on(&world, &live);
    assert_eq!(world.consistent(), 40);
    end(&world, &live.iter().map(|at| 10_000 + at).collect::<Vec<_>>());
    end(&world, &over.iter().map(|at| 20_000 + at).collect::<Vec<_>>());
    assert_eq!(world.consistent(), 0);
    assert_eq!([0, 1, 2, 3, 4].map(|bucket| spilled(&mut world, bucket)), [0; 5]);
}

/// Where all three buckets of a key are full its flow is refused as in a full table, and leaves nothing behind.
#[test]
fn xdp_flow_tables_without_a_place_a_flow_is_refused() {
    let mut world = World::sized(&SIZES);
    world.shrink_tables(1, 2, 1000);
    let opened: Vec<u16> = (10_000..10_100).filter(|port| sent(&world, *port, SYN).is_some()).collect();
    assert_eq!(opened.len(), 45, "three buckets");
    assert_eq!(world.consistent(), 45);
    let counted = world.counted();
    assert!(
        counted.contains(&("refuse_table_full", 55)) && counted.contains(&("new_flow", 45)),
        "{counted:?}"
    );
    for port in &opened {
        assert!(sent(&world, *port, ACK).is_some(), "live flows go on");
    }
    end(&world, &opened[7..8]);
    assert_eq!(sent(&world, 30_000, SYN).is_some(), sent(&world, 30_000, ACK).is_some());
    assert_eq!(world.consistent(), 45, "the place is another's");
}

/// A table that is pinned keeps what it is like, whatever the agent is told later; no two nodes have the same seed.
#[test]
fn xdp_flow_tables_are_set_up_once() {
    let mut world = World::sized(&MapSizes { flows: 1000, ..SIZES });
    let port = sent(&world, 10_000, SYN);
    let (forward, reverse) = (world.table(FORWARD_TABLE), world.table(REVERSE_TABLE));
    assert_eq!((forward.limit, forward.used, reverse.limit, reverse.used), (1000, 1, 1000, 1));
    assert_eq!(forward.own + forward.further, TableValue::buckets(1000));
    world.plane = Dataplane::load(world.root(), &MapSizes { flows: 50, ..SIZES }).unwrap();
    assert_eq!((world.table(FORWARD_TABLE), world.table(REVERSE_TABLE)), (forward, reverse));
    assert_eq!(sent(&world, 10_000, ACK), port, "and its flows");
    let other = World::sized(&SIZES);
    let seeds =
        [forward.seed, reverse.seed, other.table(FORWARD_TABLE).seed, other.table(REVERSE_TABLE).seed];
    for (at, seed) in seeds.iter().enumerate() {
        assert!(*seed != [0, 0] && !seeds[..at].contains(seed), "{seeds:x?}");
    }
}

/// What the agent enters and removes goes by the same rules.
#[test]
fn xdp_flow_tables_take_what_the_agent_enters() {
    let mut world = World::sized(&SIZES);
    world.shrink_tables(1, 4, 30);
    let enter = world.plane.enter().unwrap();
    let entry = |number: u16| {
        let key = flow(17, (POD, number), (ORIGIN, 53));
        (key, ReverseValue { digest: key.digest(), pod: u32::from(number), ..Default::default() })
    };
    let entries: Vec<_> = (0..200).map(entry).collect();
    assert_eq!(enter.set(&entries[..20]).unwrap(), 20);
    assert_eq!(enter.set(&entries).unwrap(), 30, "twenty replaced, ten more, and no room for others");
    let changed: Vec<_> =
        entries[..20].iter().map(|(key, value)| (*key, ReverseValue { seen: 5, ..*value })).collect();
    assert_eq!(enter.set(&changed).unwrap(), 20);
    let mut there: Vec<(FlowKey, ReverseValue)> = world.entries("REVERSE");
    there.sort_by_key(|(key, _)| key.local_port);
    assert_eq!(there[..20], changed);
    assert_eq!(there[20..], entries[20..30]);
    let keys: Vec<FlowKey> = entries.iter().map(|(key, _)| *key).collect();
    assert_eq!(enter.remove::<ReverseValue>(&keys).unwrap(), 30);
    assert_eq!(enter.remove::<ForwardValue>(&keys).unwrap(), 0);
    assert_eq!(world.consistent(), 0);
}

/// What `kubectl aegis trace --flows` is told: the pod's flows to the destination, and nobody else's.
#[test]
fn xdp_flow_tables_the_live_flows_of_a_pod_are_told() {
    let mut world = World::new();
    let uid = "0f3e";
    let value = PodValue { class: 1, incarnation: incarnation(uid), ..PodValue::default() };
    world.set_pod(1, POD, value);
    let ports: Vec<u16> = (0..3).map(|at| sent(&world, 10_000 + at, SYN).unwrap()).collect();
    // Of another pod, and to another port.
    assert_eq!(world.out(&Packet::tcp((POD_2, 10_000), (ORIGIN, 443), SYN).frame()).verdict, TCX_NEXT);
    assert_eq!(world.out(&Packet::tcp((POD, 10_000), (ORIGIN, 80), SYN).frame()).verdict, TCX_NEXT);
    let question = Question {
        pin_root: world.root().into(),
        pod: vec![POD.into()],
        uid: Some(uid.into()),
        destination: Some(ORIGIN.into()),
        port: Some(443),
        most: 2,
        ..Question::default()
    };
    let told = live(&world.plane.forward().unwrap(), &question, now() + 5);
    assert_eq!((told.total, told.flows.len()), (3, 2));
    let first = &told.flows[0];
    assert_eq!((first.protocol, first.pod_port, first.port), (6, 10_000, 443));
    assert_eq!((first.egress, first.egress_port), (Some(EGRESS.into()), Some(ports[0])));
    assert!((5..8).contains(&first.idle), "{} s", first.idle);
    // As it is asked: by a second run of the agent's program, which finds the pinned table.
    let asked = std::process::Command::new(env!("CARGO_BIN_EXE_aegis-node-agent"))
        .args(["flows", &format!("--pin-root={}", world.root().display())])
        .args([format!("--pod={POD}"), format!("--uid={uid}"), format!("--destination={ORIGIN}")])
        .args(["--port=443", "--most=2"])
        .output()
        .unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&asked.stdout).unwrap();
    assert_eq!((&answer["total"], &answer["flows"][0]["egress"]), (&3.into(), &EGRESS.to_string().into()));
    let any_port = Question { port: None, ..question.clone() };
    assert_eq!(live(&world.plane.forward().unwrap(), &any_port, now()).total, 4);
    let told = |question: Question| live(&world.plane.forward().unwrap(), &question, now());
    let earlier = Question { uid: Some("before".into()), ..question.clone() };
    assert_eq!(told(earlier).total, 0, "an earlier pod with its address");
    let all = told(Question { most: 10, ..Question::default() });
    assert_eq!(all.total, 5);
    assert!(all.flows.iter().any(|flow| flow.pod == IpAddr::from(POD_2)), "{all:?}");
    assert!(all.flows.iter().all(|flow| flow.destination == IpAddr::from(ORIGIN) && !flow.guest), "{all:?}");
    assert_eq!(told(Question { egress: vec![EGRESS.into()], ..Question::default() }).total, 5);
    assert_eq!(told(Question { egress: vec![ORIGIN.into()], ..Question::default() }).total, 0);
    assert_eq!(told(Question { protocol: vec![17, 6], ..Question::default() }).total, 5);
    assert_eq!(told(Question { protocol: vec![17], ..Question::default() }).total, 0);
}

/// What `kubectl aegis drops` is told.
#[test]
fn xdp_flow_tables_counters_are_told() {
    let world = World::new();
    let asked = || {
        let asked = std::process::Command::new(env!("CARGO_BIN_EXE_aegis-node-agent"))
            .args(["counters", &format!("--pin-root={}", world.root().display())])
            .output()
            .unwrap();
        serde_json::from_slice::<serde_json::Value>(&asked.stdout).unwrap()
    };
    let packets = |answer: &serde_json::Value, reason: &str| answer["packets"][reason].as_u64().unwrap();
    let before = asked();
    for at in 0..3 {
        sent(&world, 11_000 + at, SYN).unwrap();
    }
    let after = asked();
    assert_eq!(packets(&after, "new_flow") - packets(&before, "new_flow"), 3);
    assert_eq!(packets(&after, "drop_leak"), packets(&before, "drop_leak"));
    assert!(after["at"].as_u64() >= before["at"].as_u64() && before["at"].as_u64() > Some(0));
}
