//! Several CPUs open flows to one origin at once while flows are swept: every port stays accounted for.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use support::packet::{Packet, SYN};
use support::*;

const THREADS: u16 = 4;
const FLOWS: u16 = 6000;

/// Ends the loops of other threads with this one, also by a panic: the test would wait for them for ever.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn xdp_stress_ports_stay_accounted_for() {
    let mut world = World::new();
    // 512 ports in two blocks: the storm runs into exhaustion again and again.
    world.allow(EGRESS, &[8, 24]);
    // The slices are another node's, so that the sweeper ends whatever it is given.
    world.own(0, 8, 2);
    world.own(0, 24, 2);
    let (stop, opened, refused) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    let dropped = AtomicU32::new(0);
    let program = world.program("uplink_egress").try_clone_to_owned().unwrap();
    let sweeper = world.plane.sweeper().unwrap();
    let frame = |pod_port| Packet::tcp((POD, pod_port), (ORIGIN, 443), SYN).frame();
    let mut swept = 0;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (program, opened, refused, dropped) = (program.as_fd(), &opened, &refused, &dropped);
                scope.spawn(move || {
                    for at in 0..FLOWS {
                        // Every flow is tried by two threads, of which one may make it.
                        let port = 1024 + (thread / 2) * FLOWS + at;
                        match classify(program, &frame(port), MARK).verdict {
                            TCX_NEXT => opened.fetch_add(1, Ordering::Relaxed),
                            TCX_REDIRECT => refused.fetch_add(1, Ordering::Relaxed),
                            // The sweeper is ending what the other thread has just made.
                            TCX_DROP => dropped.fetch_add(1, Ordering::Relaxed),
                            verdict => panic!("verdict {verdict}"),
                        };
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let _stop = Stop(&stop);
            for worker in workers {
                worker.join().unwrap();
            }
        });
        while !stop.load(Ordering::Acquire) {
            let flows: Vec<(FlowKey, ForwardValue)> = world.entries("FORWARD");
            // Half of them end.
            let keys: Vec<_> =
                flows.iter().map(|(key, _)| *key).filter(|key| key.local_port % 2 == 0).collect();
            swept += sweeper.revoked(&keys).unwrap();
        }
    });
    let (opened, refused) = (opened.into_inner(), refused.into_inner());
    let counted = world.counted();
    let ending = counted.iter().find(|(label, _)| *label == Counter::DropEnding.label()).map_or(0, |it| it.1);
    assert_eq!(u64::from(dropped.into_inner()), ending, "{counted:?}");
    assert!(swept > 50 && opened > 500, "{swept} swept, {opened} opened, {refused} refused");
    let live = world.consistent();
    assert!(live <= 512);
    // No port is lost: all 512 can be filled, and not one more.
    let more =
        (40_000..42_000).filter(|port| classify(program.as_fd(), &frame(*port), MARK).verdict == TCX_NEXT);
    assert_eq!(live + more.count(), 512);
    assert_eq!(world.consistent(), 512);
}

/// The address of pods that come and go: packets of two pods with it fight for the same keys on all CPUs, while the sweeper
/// ends what it looked at before. No flow loses its way back, and no port is lost.
#[test]
fn xdp_stress_pods_change_while_their_flows_are_swept() {
    let mut world = World::new();
    // The slice is another node's, so that the sweeper ends whatever it is given.
    world.own(0, SLICE, 2);
    let stop = AtomicBool::new(false);
    let program = world.program("uplink_egress").try_clone_to_owned().unwrap();
    let sweeper = world.plane.sweeper().unwrap();
    let frame = |pod_port| Packet::udp((POD, pod_port), (ORIGIN, 53), b"x").frame();
    // Each many times over, so that the sweeper looks and ends as often as packets come.
    const KEYS: u16 = 2;
    let key = |at: usize| flow(17, (POD, 5000 + at as u16 % KEYS), (ORIGIN, 53));
    let keys: Vec<FlowKey> = (0..SWEEP_BATCH).map(key).collect();
    let mut swept = 0;
    let begun = std::time::Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let (program, stop) = (program.as_fd(), &stop);
            scope.spawn(move || {
                let frames: Vec<_> = (0..KEYS).map(|at| frame(5000 + at)).collect();
                while !stop.load(Ordering::Acquire) {
                    for frame in &frames {
                        let verdict = classify(program, frame, MARK).verdict;
                        assert!([TCX_NEXT, TCX_DROP].contains(&verdict), "verdict {verdict}");
                    }
                }
            });
        }
        let _stop = Stop(&stop);
        let mut incarnation = 0;
        // By what has happened, not by time: a machine may be busy with other things.
        while swept < 500 {
            assert!(begun.elapsed() < std::time::Duration::from_secs(120), "{swept} swept");
            incarnation += 1;
            let value = PodValue { class: 1, incarnation, ..PodValue::default() };
            world.set_pod(1, POD, value);
            swept += sweeper.revoked(&keys).unwrap();
        }
    });
    let live = world.consistent();
    let more =
        (40_000..41_000).filter(|port| classify(program.as_fd(), &frame(*port), MARK).verdict == TCX_NEXT);
    assert_eq!(live + more.count(), 256, "no port is lost");
}

/// Few buckets, nearly all full, in which flows of the same keys begin and end on all CPUs while the agent reads them: nothing
/// is there twice or lost, no reader sees a mixture of two, and all counts are exact afterwards.
#[test]
fn xdp_stress_flow_tables_with_few_buckets() {
    const KEYS: u16 = 60;
    const ROUNDS: u16 = 250;
    let mut world = World::new();
    world.shrink_tables(2, 3, 48);
    // The slice is another node's, so that the sweeper ends whatever it is given.
    world.own(0, SLICE, 2);
    let (stop, swept) = (AtomicBool::new(false), AtomicU32::new(0));
    let (opened, dropped, refused) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    let program = world.program("uplink_egress").try_clone_to_owned().unwrap();
    let (sweeper, forward, reverse) =
        (world.plane.sweeper().unwrap(), world.plane.forward().unwrap(), world.plane.reverse().unwrap());
    let keys: Vec<FlowKey> = (0..KEYS).map(|at| flow(17, (POD, 5000 + at), (ORIGIN, 53))).collect();
    let mut read = 0;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (program, opened, refused, dropped) = (program.as_fd(), &opened, &refused, &dropped);
                let (swept, sweeper, keys) = (&swept, &sweeper, &keys);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        for at in 0..KEYS {
                            let packet =
                                Packet::udp((POD, 5000 + (at * 7 + thread) % KEYS), (ORIGIN, 53), b"x");
                            match classify(program, &packet.frame(), MARK).verdict {
                                TCX_NEXT => opened.fetch_add(1, Ordering::Relaxed),
                                TCX_REDIRECT => refused.fetch_add(1, Ordering::Relaxed),
                                TCX_DROP => dropped.fetch_add(1, Ordering::Relaxed),
                                verdict => panic!("verdict {verdict}"),
                            };
                        }
                        let some = usize::from(round % 3) * 20;
                        swept.fetch_add(sweeper.revoked(&keys[some..some + 20]).unwrap(), Ordering::Relaxed);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let _stop = Stop(&stop);
            for worker in workers {
                worker.join().unwrap();
            }
        });
        while !stop.load(Ordering::Acquire) {
            let mut seen = std::collections::HashSet::new();
            forward.for_each(|key, value| {
                // One that is just being ended has no life any more.
                assert!(value.is_of(key) || value.life == 0, "{key:?}: {value:?}");
                assert!(keys.contains(key));
                seen.insert(*key);
            });
            reverse.for_each(|key, value| assert_eq!(value.digest, key.digest(), "{key:?}"));
            read += seen.len();
        }
    });
    let (opened, refused, swept) = (opened.into_inner(), refused.into_inner(), swept.into_inner());
    assert!(read > 500 && swept > 1000 && opened > 5000 && refused > 50, "{read} {swept} {opened} {refused}");
    let counted: std::collections::BTreeMap<_, _> = world.counted().into_iter().collect();
    assert_eq!(counted.get("drop_ending").copied().unwrap_or(0), u64::from(dropped.into_inner()));
    assert_eq!(counted.get("refuse_table_full").copied().unwrap_or(0), u64::from(refused), "{counted:?}");
    let live = world.consistent();
    assert!(live <= 48);
    assert_eq!(counted["new_flow"], u64::from(swept) + live as u64, "what was made has ended or is there");
    assert_eq!(sweeper.revoked(&keys).unwrap() as usize, live);
    assert_eq!(world.consistent(), 0);
}

/// Without exhaustion no flow may be refused, however many CPUs ask at once.
#[test]
fn xdp_stress_nothing_is_refused_while_there_is_room() {
    let mut world = World::sized(&aegis_node_agent::ebpf::MapSizes {
        flows: 1 << 16,
        blocks: 1024,
        ..Default::default()
    });
    let slices: Vec<u16> = (4..104).collect();
    for slice in &slices {
        world.own(0, *slice, 1);
    }
    world.allow(EGRESS, &slices);
    let program = world.program("uplink_egress").try_clone_to_owned().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let program = program.as_fd();
            scope.spawn(move || {
                for at in 0..FLOWS {
                    let packet = Packet::tcp((POD, 1024 + thread * FLOWS + at), (ORIGIN, 443), SYN);
                    assert_eq!(classify(program, &packet.frame(), MARK).verdict, TCX_NEXT, "{thread}/{at}");
                }
            });
        }
    });
    assert_eq!(world.consistent(), usize::from(THREADS * FLOWS));
    let used: u32 = world.entries::<BlockKey, BlockValue>("BLOCKS").iter().map(|(_, value)| value.used).sum();
    assert_eq!(used, u32::from(THREADS * FLOWS));
    let mut counted = world.counted();
    // Of 25,600 ports.
    counted.retain(|(label, _)| *label != "past_high_water");
    assert_eq!(counted, [("translated", 24_000), ("new_flow", 24_000)]);
}

/// Other kernels' verifiers follow more or fewer ways through the same program: there must be room.
#[test]
fn xdp_programs_are_far_from_the_verifiers_limit() {
    let world = World::new();
    let verified = world.plane.verified();
    println!("instructions that the verifier followed: {verified:?}");
    assert_eq!(verified.len(), 7);
    for (program, instructions) in verified {
        assert!(instructions < 150_000, "{program}: {instructions} of 1,000,000");
    }
}
