//! TCP: every sequence of segments in which a connection begins and ends, and what no connection asked for (RFC 5382 REQ-2
//! and 4, RFC 7857 section 2, RFC 6146 section 3.5.2.2).
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use Step::{Back, Dropped, Out};
use aegis_common::*;
use support::exact::{age, arrives, flows, kept_out, leaves};
use support::packet::{ACK, Body, FIN, PSH, Packet, RST, SYN};
use support::*;

const URG: u8 = 32;
/// ECN: ECE and CWR.
const ECE: u8 = 64;
const CWR: u8 = 128;

/// A segment with these flags.
#[derive(Clone, Copy)]
enum Step {
    /// Of the pod.
    Out(u8),
    /// Of the origin.
    Back(u8),
    /// Of the origin; it does not get in and changes nothing.
    Dropped(u8),
}

/// What the steps come to.
fn sequences() -> Vec<(&'static str, Vec<Step>, Phase)> {
    let opened = |then: &[Step]| [&[Out(SYN), Back(SYN | ACK), Out(ACK)], then].concat();
    let closed = [Out(FIN | ACK), Back(FIN | ACK), Out(ACK)];
    vec![
        ("handshake", opened(&[]), Phase::Established),
        (
            "handshake that ends with data",
            vec![Out(SYN), Back(SYN | ACK), Out(ACK | PSH)],
            Phase::Established,
        ),
        (
            "handshake with ECN",
            vec![Out(SYN | ECE | CWR), Back(SYN | ACK | ECE), Out(ACK)],
            Phase::Established,
        ),
        ("SYN repeated", vec![Out(SYN), Out(SYN), Out(SYN)], Phase::Transitory),
        ("SYN-ACK repeated", vec![Out(SYN), Back(SYN | ACK), Back(SYN | ACK)], Phase::Transitory),
        ("SYN-ACK repeated after the ACK", opened(&[Back(SYN | ACK), Out(ACK)]), Phase::Established),
        (
            "simultaneous open",
            vec![Out(SYN), Back(SYN), Out(SYN | ACK), Back(SYN | ACK), Out(ACK)],
            Phase::Established,
        ),
        (
            "simultaneous open, the origin's SYN-ACK lost",
            vec![Out(SYN), Back(SYN), Out(SYN | ACK), Back(ACK), Out(ACK)],
            Phase::Established,
        ),
        ("simultaneous open, not yet through", vec![Out(SYN), Back(SYN), Out(SYN | ACK)], Phase::Transitory),
        ("a second SYN in a simultaneous open", vec![Out(SYN), Back(SYN), Dropped(SYN)], Phase::Transitory),
        ("SYN after a SYN-ACK", vec![Out(SYN), Back(SYN | ACK), Dropped(SYN)], Phase::Transitory),
        ("SYN into a connection", opened(&[Dropped(SYN)]), Phase::Established),
        ("SYN with FIN into a connection", opened(&[Dropped(SYN | FIN)]), Phase::Established),
        (
            "the origin has an old connection",
            vec![Out(SYN), Back(ACK), Out(RST), Out(SYN), Back(SYN | ACK), Out(ACK)],
            Phase::Established,
        ),
        ("refused", vec![Out(SYN), Back(RST | ACK)], Phase::Closed),
        (
            "refused, and taken at the second try",
            {
                let refused = [Out(SYN), Back(RST | ACK)];
                [&refused[..], &opened(&[])].concat()
            },
            Phase::Established,
        ),
        ("RST from outside", opened(&[Back(RST)]), Phase::Transitory),
        ("RST from outside, and the pod goes on", opened(&[Back(RST), Out(ACK)]), Phase::Transitory),
        (
            "RST from outside, and the origin goes on",
            opened(&[Back(RST), Out(ACK), Back(ACK)]),
            Phase::Established,
        ),
        ("RST of the pod", opened(&[Out(RST)]), Phase::Closed),
        ("RST of the pod, which goes on", opened(&[Out(RST | ACK), Out(ACK)]), Phase::Established),
        ("the pod closes", opened(&[Out(FIN | ACK), Back(ACK)]), Phase::Transitory),
        (
            "data after the pod has closed",
            opened(&[Out(FIN | ACK), Back(ACK | PSH), Out(ACK)]),
            Phase::Transitory,
        ),
        ("the origin closes", opened(&[Back(FIN | ACK), Out(ACK)]), Phase::Transitory),
        (
            "data after the origin has closed",
            opened(&[Back(FIN | ACK), Out(ACK | PSH), Back(ACK)]),
            Phase::Transitory,
        ),
        ("both close, the pod first", opened(&closed), Phase::Closed),
        (
            "both close, the origin first",
            opened(&[Back(FIN | ACK), Out(FIN | ACK), Back(ACK)]),
            Phase::Closed,
        ),
        (
            "both close at a time",
            opened(&[Out(FIN | ACK), Back(FIN | ACK), Out(ACK), Back(ACK)]),
            Phase::Closed,
        ),
        (
            "a FIN repeated, and its ACK",
            opened(&[closed[0], closed[1], Back(FIN | ACK), Out(ACK)]),
            Phase::Closed,
        ),
        ("FIN with data", opened(&[Out(FIN | PSH | ACK), Back(FIN | PSH | ACK)]), Phase::Closed),
        ("the pod closes, the origin resets", opened(&[Out(FIN | ACK), Back(RST)]), Phase::Closed),
        (
            "closed, and the port opened again",
            {
                let first = opened(&closed);
                [&first[..], &opened(&[])].concat()
            },
            Phase::Established,
        ),
        (
            "closed, and the port being opened again",
            opened(&[closed[0], closed[1], Out(SYN)]),
            Phase::Transitory,
        ),
        ("urgent data both ways", opened(&[Out(ACK | URG), Back(ACK | URG)]), Phase::Established),
        ("segments without flags", opened(&[Out(0), Back(0)]), Phase::Established),
    ]
}

#[test]
fn xdp_tcp_states_every_sequence() {
    let mut world = World::new();
    for (at, (name, steps, expected)) in sequences().into_iter().enumerate() {
        let pod_port = 40_000 + at as u16;
        let mut port = None;
        let key = flow(6, (POD, pod_port), (ORIGIN, 443));
        for (step, segment) in steps.into_iter().enumerate() {
            let name = format!("{name}, step {step}");
            let data = |flags: u8| if flags & (SYN | RST) == 0 { step * 7 } else { 0 };
            let back = |flags, port: Option<u16>| {
                Packet::tcp((ORIGIN, 443), (EGRESS, port.unwrap()), flags).with_payload(data(flags))
            };
            match segment {
                Out(flags) => {
                    let packet = Packet::tcp((POD, pod_port), (ORIGIN, 443), flags).with_payload(data(flags));
                    let left = leaves(&mut world, &name, &packet);
                    assert_eq!(*port.get_or_insert(left), left, "{name}: it keeps its port");
                }
                Back(flags) => {
                    let packet = back(flags, port);
                    arrives(&mut world, &name, &packet, &packet.clone().to(POD, pod_port));
                }
                Dropped(flags) => {
                    age(&mut world);
                    let before = flows(&world);
                    kept_out(&mut world, &name, &back(flags, port).frame(), Counter::DropNoFlow);
                    assert_eq!(flows(&world), before, "{name}: it changes nothing");
                }
            }
        }
        let back = flow(6, (EGRESS, port.unwrap()), (ORIGIN, 443));
        let seen = (world.forward(&key).unwrap().seen, world.reverse(&back).unwrap().seen);
        assert_eq!(phase(6, seen.0, seen.1), expected, "{name}: {seen:?}");
    }
    assert_eq!(world.consistent(), sequences().len());
}

/// An established connection; its egress port.
fn established(world: &mut World, pod_port: u16) -> u16 {
    let out = |flags| Packet::tcp((POD, pod_port), (ORIGIN, 443), flags);
    let port = leaves(world, "SYN", &out(SYN));
    let answer = Packet::tcp((ORIGIN, 443), (EGRESS, port), SYN | ACK);
    arrives(world, "SYN-ACK", &answer, &answer.clone().to(POD, pod_port));
    leaves(world, "ACK", &out(ACK));
    port
}

#[test]
fn xdp_tcp_states_keep_alives_hold_a_connection() {
    assert!(now() > 200, "the machine must run for 200 s before a connection can have been idle that long");
    let mut world = World::new();
    let timeouts = Timeouts { tcp_established: 20, ..Timeouts::default() };
    world.allocation(&[EGRESS], timeouts);
    let port = established(&mut world, 40_000);
    let (key, back_key) = (flow(6, (POD, 40_000), (ORIGIN, 443)), flow(6, (EGRESS, port), (ORIGIN, 443)));
    // A keep-alive repeats what has been acknowledged: one number less, with one byte or none.
    let keep_alive = |packet: Packet, bytes| {
        let mut packet = packet.with_payload(bytes);
        let Body::Tcp(tcp) = &mut packet.body else { unreachable!() };
        tcp.sequence -= 1;
        packet
    };
    for (name, out, bytes) in [
        ("of the pod", true, 0),
        ("of the pod, with a byte", true, 1),
        ("of the origin", false, 0),
        ("of the origin, with a byte", false, 1),
    ] {
        let long_ago = now() - 20 - REST - 1;
        let forward = ForwardValue { last_seen: long_ago, ..world.forward(&key).unwrap() };
        let reverse = ReverseValue { last_seen: long_ago, ..world.reverse(&back_key).unwrap() };
        assert!(expired(6, &forward, &reverse, &timeouts, now()), "{name}: it would be over");
        world.set_forward(key, forward);
        world.set_reverse(back_key, reverse);
        if out {
            let packet = keep_alive(Packet::tcp((POD, 40_000), (ORIGIN, 443), ACK), bytes);
            assert_eq!(leaves(&mut world, name, &packet), port, "{name}");
        } else {
            let packet = keep_alive(Packet::tcp((ORIGIN, 443), (EGRESS, port), ACK), bytes);
            arrives(&mut world, name, &packet, &packet.clone().to(POD, 40_000));
        }
        assert_eq!(world.plane.sweeper().unwrap().flows(&[key]).unwrap(), 0, "{name}: it lives");
    }
    assert_eq!(world.consistent(), 1);
}

#[test]
fn xdp_tcp_states_what_no_connection_asked_for_gets_no_answer() {
    let mut world = World::new();
    let port = established(&mut world, 40_000);
    let free = if port & 0xff == 7 { SLICE << 8 | 8 } else { SLICE << 8 | 7 };
    age(&mut world);
    let before = flows(&world);
    for flags in [
        SYN,
        SYN | ACK,
        SYN | FIN,
        SYN | ECE | CWR,
        ACK,
        ACK | PSH,
        FIN,
        FIN | ACK,
        RST,
        RST | ACK,
        0,
        FIN | PSH | URG,
        0xff,
    ] {
        for (name, origin, to) in [
            ("a port without flow", (ORIGIN, 443), free),
            ("another port of the origin", (ORIGIN, 444), port),
            ("another address", (ELSEWHERE, 443), port),
            ("the node", (NODE, 443), port),
            ("the egress address itself", (EGRESS, 443), port),
        ] {
            let packet = Packet::tcp(origin, (EGRESS, to), flags);
            let name = format!("flags {flags:#x}, {name}");
            kept_out(&mut world, &name, &packet.frame(), Counter::DropNoFlow);
        }
    }
    assert_eq!(flows(&world), before, "nothing was noted");
}

#[test]
fn xdp_tcp_states_half_open_connections_evict_nobody() {
    let mut world = World::new();
    let port = established(&mut world, 40_000);
    let syn = |pod_port| Packet::tcp((POD_2, pod_port), (ORIGIN, 443), SYN);
    for pod_port in 1..=255 {
        leaves(&mut world, "one of the flood", &syn(pod_port));
    }
    let full = flows(&world);
    for pod_port in 256..300 {
        assert_eq!(world.out(&syn(pod_port).frame()).verdict, TCX_REDIRECT, "no port is left");
        let counted: Vec<_> = world.counted().into_iter().map(|(label, _)| label).collect();
        assert_eq!(counted, ["refusal_sent", "refuse_no_port"]);
    }
    assert_eq!(flows(&world), full, "every flow stays as it was");
    let packet = Packet::tcp((ORIGIN, 443), (EGRESS, port), ACK);
    arrives(&mut world, "the connection lives", &packet, &packet.clone().to(POD, 40_000));
    assert_eq!(leaves(&mut world, "and sends", &Packet::tcp((POD, 40_000), (ORIGIN, 443), ACK)), port);
    assert_eq!(world.consistent(), 256);
}
