//! `uplink_egress` and what the node's own sockets send. A test run's packet has a socket of the process that runs it, so that it is of
//! the control group that this process is in.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use aya::maps::lpm_trie::Key;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use support::gateway::{back, gateway, network, pods_node, sent_on, way_to};
use support::packet::{ACK, FIN, Packet, SYN};
use support::*;

/// Levels of the group and of the one around it.
const LEVEL: u32 = 2;
const AROUND: u32 = 1;

/// While it lives, this process is in a container's group below a pod's.
struct Container {
    folder: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Container {
    fn enter() -> Container {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(nix::unistd::geteuid().is_root(), "this test makes control groups: run it as root");
        let folder = hierarchy().join(format!("aegis-xdp-hosts-{}/pod/container", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        join(&folder);
        Container { folder, _turn: turn }
    }

    /// The pod's group, or the one that all pods' are in.
    fn group(&self, level: u32) -> u64 {
        let above = (LEVEL + 1 - level) as usize;
        std::fs::metadata(self.folder.ancestors().nth(above).unwrap()).unwrap().ino()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        join(&hierarchy());
        for folder in self.folder.ancestors().take(3) {
            let _ = std::fs::remove_dir(folder);
        }
    }
}

fn hierarchy() -> PathBuf {
    let hybrid = PathBuf::from("/sys/fs/cgroup/unified");
    if hybrid.is_dir() { hybrid } else { "/sys/fs/cgroup".into() }
}

fn join(group: &std::path::Path) {
    std::fs::write(group.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

fn set_host(world: &mut World, group: u64, class: u32, incarnation: u32) {
    let key = HostKey { group, generation: 1, pad: 0 };
    world.plane.hash("HOSTS").unwrap().insert(key, HostValue { class, incarnation }, 0).unwrap();
}

/// The pod is of this class.
fn name(world: &mut World, container: &Container, class: u32, incarnation: u32) {
    let config: Config = world.plane.array("CONFIG").unwrap().get(&0, 0).unwrap();
    world.set_config(&Config { host_levels: 1 << LEVEL | 1 << AROUND, ..config });
    set_host(world, container.group(LEVEL), class, incarnation);
    set_host(world, container.group(AROUND), HOST_UNKNOWN, 0);
    set_host(world, of_incarnation(incarnation), class, incarnation);
}

fn covered(container: &Container) -> World {
    let mut world = World::new();
    name(&mut world, container, 1, INCARNATION);
    world
}

fn syn() -> Packet {
    Packet::tcp((NODE, 40000), (ORIGIN, 443), SYN)
}

/// A packet that leaves from the egress address, and nothing else of it changed. Gives the port.
fn leaves(world: &mut World, name: &str, packet: &Packet) -> u16 {
    world.counted();
    let out = world.out_unmarked(&packet.frame());
    assert_eq!(out.verdict, TCX_NEXT, "{name}: {:?}", world.counted());
    let transport = 14 + usize::from(out.frame[14] & 15) * 4;
    let at = if packet.protocol() == 1 { transport + 4 } else { transport };
    let port = u16::from_be_bytes([out.frame[at], out.frame[at + 1]]);
    assert_eq!(out.frame, packet.clone().from(EGRESS, port).frame(), "{name}");
    assert_eq!(port >> 8, SLICE, "{name}");
    port
}

/// A packet that leaves as it is, and is not counted.
fn passes(world: &mut World, name: &str, packet: &Packet, mark: u32) {
    world.counted();
    let frame = packet.frame();
    let out = classify(world.program("uplink_egress"), &frame, mark);
    assert_eq!(out.verdict, TCX_NEXT, "{name}: {:?}", world.counted());
    assert_eq!(out.packet, frame, "{name}");
    assert_eq!(world.counted(), [], "{name}");
}

/// What a socket of the node's sends, what the origin answers to it (by [`EGRESS`], port 0), and as what it comes back.
fn with_ports() -> [(&'static str, Packet, Packet, Packet); 2] {
    [
        (
            "TCP",
            syn(),
            Packet::tcp((ORIGIN, 443), (EGRESS, 0), SYN | ACK),
            Packet::tcp((ORIGIN, 443), (NODE, 40000), SYN | ACK),
        ),
        (
            "UDP",
            Packet::udp((NODE, 5000), (ORIGIN, 53), b"question"),
            Packet::udp((ORIGIN, 53), (EGRESS, 0), b"answer"),
            Packet::udp((ORIGIN, 53), (NODE, 5000), b"answer"),
        ),
    ]
}

#[test]
fn xdp_hosts_flows_there_and_back() {
    let container = Container::enter();
    let mut world = covered(&container);
    let echo = (
        "echo",
        Packet::echo(NODE, ORIGIN, 77),
        Packet::echo_reply(ORIGIN, EGRESS, 0),
        Packet::echo_reply(ORIGIN, NODE, 77),
    );
    for (flows, (name, packet, reply, to_host)) in with_ports().into_iter().chain([echo]).enumerate() {
        let port = leaves(&mut world, name, &packet);
        assert_eq!(world.counted(), [("translated", 1), ("new_flow", 1)], "{name}");
        let (verdict, frame) = world.back(&reply.clone().to(EGRESS, port).frame());
        assert_eq!((verdict, &frame), (XDP_PASS, &to_host.frame()), "{name}: back");
        assert_eq!(leaves(&mut world, name, &packet), port, "{name}: again");
        assert_eq!(world.consistent(), flows + 1);
        // nftables takes it for one that opens nothing: it goes on all the same.
        let out = world.out(&packet.frame());
        assert_eq!(out.frame, packet.from(EGRESS, port).frame(), "{name}: marked");
    }
    // What the pod's kernel says of what comes back, and what is said of what it sent.
    let port = leaves(&mut world, "TCP", &syn());
    let answer = |to: (Ipv4Addr, u16)| Packet::tcp((ORIGIN, 443), to, ACK);
    let error = Packet::error(NODE, &answer((NODE, 40000)), 3, 3, 8);
    let out = world.out_unmarked(&error.frame());
    assert_eq!(out.frame, Packet::error(EGRESS, &answer((EGRESS, port)), 3, 3, 8).frame());
    let router = Ipv4Addr::new(203, 0, 113, 1);
    let (verdict, frame) = world.back(&Packet::error(router, &syn().from(EGRESS, port), 3, 1, 8).frame());
    assert_eq!((verdict, frame), (XDP_PASS, Packet::error(router, &syn(), 3, 1, 8).frame()));
}

#[test]
fn xdp_hosts_what_is_not_covered_passes_untouched() {
    let container = Container::enter();
    let mut world = covered(&container);
    let inside = Ipv4Addr::new(10, 244, 2, 7);
    for (name, packet, mark) in [
        ("elsewhere", Packet::tcp((NODE, 1), (ELSEWHERE, 443), SYN), 0),
        ("to a pod", Packet::udp((NODE, 1), (inside, 53), b"x"), 0),
        ("another port", Packet::tcp((NODE, 1), (WEB, 80), SYN), 0),
        ("a connection from before", Packet::tcp((NODE, 2), (ORIGIN, 443), ACK), 0),
        ("an answer to one who connects", Packet::tcp((NODE, 80), (ORIGIN, 4000), SYN | ACK), 0),
        ("a datagram from before, or an answer", Packet::udp((NODE, 53), (ORIGIN, 4000), b"x"), MARK),
        ("a question from before", Packet::echo(NODE, ORIGIN, 5), MARK),
        ("an answer to a question", Packet::echo_reply(NODE, ORIGIN, 5), 0),
        (
            "an error about no flow",
            Packet::error(NODE, &Packet::udp((ORIGIN, 9), (NODE, 9), b"x"), 3, 3, 8),
            0,
        ),
        ("another protocol", Packet::raw(NODE, ELSEWHERE, 47, &[0; 20]), 0),
        ("to a gateway", Packet::udp((NODE, 0xc001), (NODE_2, 6081), b"tunnel"), 0),
    ] {
        passes(&mut world, name, &packet, mark);
    }
    // A pod that nothing covers: everything, also what nobody can read.
    name(&mut world, &container, 0, INCARNATION);
    for (name, packet) in [
        ("TCP", syn()),
        ("UDP", Packet::udp((NODE, 1), (ORIGIN, 53), b"x")),
        ("half a header", Packet::raw(NODE, ORIGIN, 17, &[0; 4])),
        ("another protocol", Packet::raw(NODE, ORIGIN, 47, &[0; 20])),
        ("the rest of a datagram", Packet::raw(NODE, ORIGIN, 17, &[0; 40]).with_fragment(100)),
    ] {
        passes(&mut world, name, &packet, 0);
    }
    // Nor is anything of another group, or that came in from elsewhere, whatever its source has become.
    name(&mut world, &container, 1, INCARNATION);
    let mut context = context(0);
    context[36..40].copy_from_slice(&1u32.to_ne_bytes());
    let frame = syn().frame();
    let forwarded =
        aegis_node_agent::test_run::run(world.program("uplink_egress"), &frame, &context, 1).unwrap();
    assert_eq!((forwarded.verdict, &forwarded.packet), (TCX_NEXT, &frame));
    context[8..12].copy_from_slice(&MARK.to_ne_bytes());
    let forwarded =
        aegis_node_agent::test_run::run(world.program("uplink_egress"), &frame, &context, 1).unwrap();
    assert_eq!(forwarded.verdict, TCX_DROP, "the leak guard stands");
    join(&hierarchy());
    passes(&mut world, "of no pod", &syn(), 0);
    join(&container.folder);
    leaves(&mut world, "of the pod", &syn());
}

#[test]
fn xdp_hosts_what_cannot_leave_right_does_not_leave() {
    let container = Container::enter();
    let mut world = covered(&container);
    for (name, packet, reason, answered) in [
        ("TCP", Packet::tcp((NODE, 1), (DENIED, 443), SYN), Counter::RefuseUnavailable, true),
        ("UDP", Packet::udp((NODE, 1), (DENIED, 53), b"x"), Counter::RefuseUnavailable, true),
        ("another protocol", Packet::raw(NODE, ORIGIN, 47, &[0; 20]), Counter::RefuseProtocol, true),
        (
            "a question for the time",
            Packet::icmp(NODE, ORIGIN, 13, 0, [0; 4], &[0; 12]),
            Counter::RefuseNoFlow,
            false,
        ),
        ("half a header", Packet::raw(NODE, ORIGIN, 17, &[0; 4]), Counter::DropMalformedOut, false),
        (
            "the rest of a datagram",
            Packet::raw(NODE, ORIGIN, 17, &[0; 40]).with_fragment(100),
            Counter::DropFragmentOut,
            false,
        ),
        (
            "an egress address as source",
            Packet::tcp((EGRESS, 1), (ORIGIN, 443), SYN),
            Counter::DropForged,
            false,
        ),
    ] {
        world.counted();
        let out = world.out_unmarked(&packet.frame());
        let mut counted = vec![(reason.label(), 1)];
        if answered {
            counted.insert(0, ("refusal_sent", 1));
        }
        assert_eq!(world.counted(), counted, "{name}");
        assert_eq!(out.verdict, if answered { TCX_REDIRECT } else { TCX_DROP }, "{name}");
    }
}

#[test]
fn xdp_hosts_fragments_follow_their_first() {
    let container = Container::enter();
    let world = covered(&container);
    let packet = Packet::udp((NODE, 5000), (ORIGIN, 53), b"").with_payload(3000).with_id(7);
    let fragments = packet.fragments(1480);
    for (at, fragment) in fragments.iter().enumerate() {
        let out = world.out_unmarked(fragment);
        assert_eq!(out.verdict, TCX_NEXT, "{at}");
        assert_eq!(out.frame[26..30], EGRESS.octets(), "{at}");
    }
    // One that is not covered: all of it passes.
    let other = Packet::udp((NODE, 5000), (WEB, 53), b"").with_payload(3000).with_id(8);
    for fragment in other.fragments(1480) {
        let out = world.out_unmarked(&fragment);
        assert_eq!((out.verdict, out.frame), (TCX_NEXT, fragment));
    }
    // One that is refused: nothing of it does.
    let refused = Packet::udp((NODE, 5000), (DENIED, 53), b"").with_payload(3000).with_id(9);
    let verdicts: Vec<u32> =
        refused.fragments(1480).iter().map(|fragment| world.out_unmarked(fragment).verdict).collect();
    assert!(verdicts.iter().all(|verdict| *verdict == TCX_DROP || *verdict == TCX_REDIRECT), "{verdicts:?}");
    assert_eq!(verdicts[1..], [TCX_DROP, TCX_DROP]);
}

#[test]
fn xdp_hosts_a_pod_that_nobody_has_named_is_held_from_what_is_covered() {
    let container = Container::enter();
    let mut world = covered(&container);
    let key = HostKey { group: container.group(LEVEL), generation: 1, pad: 0 };
    world.plane.hash::<_, HostValue>("HOSTS").unwrap().remove(&key).unwrap();
    assert_eq!(world.out_unmarked(&syn().frame()).verdict, TCX_DROP);
    assert_eq!(world.counted(), [("drop_unknown_pod", 1)]);
    passes(&mut world, "elsewhere", &Packet::tcp((NODE, 1), (ELSEWHERE, 443), SYN), 0);
    passes(&mut world, "inside", &Packet::tcp((NODE, 1), (Ipv4Addr::new(10, 244, 9, 9), 443), SYN), 0);
}

#[test]
fn xdp_hosts_the_next_pod_inherits_no_flow() {
    let container = Container::enter();
    let mut world = covered(&container);
    let udp = Packet::udp((NODE, 5000), (ORIGIN, 53), b"question");
    let key = flow(17, (NODE, 5000), (ORIGIN, 53));
    leaves(&mut world, "first", &udp);
    assert_eq!(world.plane.sweeper().unwrap().flows(&[key]).unwrap(), 0);
    assert_eq!(world.forward(&key).unwrap().buried, 0, "its pod is there");
    // The pod goes.
    let gone = HostKey { group: of_incarnation(INCARNATION), generation: 1, pad: 0 };
    world.plane.hash::<_, HostValue>("HOSTS").unwrap().remove(&gone).unwrap();
    assert_eq!(world.plane.sweeper().unwrap().flows(&[key]).unwrap(), 0, "the port rests");
    assert_eq!(world.forward(&key).unwrap().buried, 1);
    // Another comes and takes the same port.
    name(&mut world, &container, 1, INCARNATION + 1);
    leaves(&mut world, "second", &udp);
    assert_eq!(world.forward(&key).unwrap().incarnation, INCARNATION + 1);
    assert_eq!(world.consistent(), 1);
    // And one that nothing covers: what it opens is its own.
    let syn = syn();
    leaves(&mut world, "connection", &syn);
    name(&mut world, &container, 0, INCARNATION + 2);
    passes(&mut world, "connection of another", &syn, 0);
    assert!(world.forward(&flow(6, (NODE, 40000), (ORIGIN, 443))).is_none());
    passes(&mut world, "its next packet", &Packet::tcp((NODE, 40000), (ORIGIN, 443), ACK | FIN), 0);
}

#[test]
fn xdp_hosts_through_a_gateway() {
    let container = Container::enter();
    network();
    let (mut node, mut gateway) = (pods_node(), gateway());
    way_to(&mut gateway, 1);
    name(&mut node, &container, 1, INCARNATION);
    for (name, packet, reply, to_host) in with_ports() {
        node.counted();
        let out = node.out_unmarked(&packet.frame());
        assert_eq!(out.verdict, TCX_REDIRECT, "{name}");
        assert_eq!(node.counted(), [("new_flow", 1), ("to_gateway", 1)], "{name}");
        // It comes by once more, still with its socket.
        let again = node.out_unmarked(&out.frame);
        assert_eq!((again.verdict, &again.frame), (TCX_NEXT, &out.frame), "{name}");
        assert_eq!(node.counted(), [], "{name}");
        let port = sent_on(&mut gateway, name, &out.frame, &packet);
        back(&mut gateway, &mut node, name, &reply.to(EGRESS, port), &to_host);
    }
    assert_eq!((node.consistent(), gateway.consistent()), (2, 2));
}

#[test]
fn xdp_hosts_are_observed_as_they_pass() {
    const OBSERVER: u32 = 5;
    const CLASS: u32 = 9 | DESTINATION_OBSERVED;
    let container = Container::enter();
    let mut world = covered(&container);
    let key = Key::new(32 + 32, DestinationKey { generation: 1, address: raw(ELSEWHERE) });
    world.plane.trie("DESTINATIONS").unwrap().insert(&key, DestinationValue { class: CLASS }, 0).unwrap();
    let key = VerdictKey { generation: 1, pod_class: 1, destination_class: CLASS, port_class: 0 };
    let binding = observes(OBSERVER, WOULD_DENY);
    let value = VerdictValue { action: ACTION_PASS, binding, ..Default::default() };
    world.plane.hash("VERDICTS").unwrap().insert(key, value, 0).unwrap();
    for flags in [SYN, SYN, ACK] {
        passes(&mut world, "observed", &Packet::tcp((NODE, 40000), (ELSEWHERE, 443), flags), 0);
    }
    let counted = |world: &World| -> u64 {
        let map = world.plane.per_cpu::<RuleValue>("RULES").unwrap();
        let values = map.get(&rule_index(1, OBSERVER).unwrap(), 0).unwrap();
        values.iter().map(|value| value.would[WOULD_DENY as usize]).sum()
    };
    assert_eq!(counted(&world), 1);
    // A pod that nobody has named yet is not held for the sake of who only observes.
    let key = HostKey { group: container.group(LEVEL), generation: 1, pad: 0 };
    world.plane.hash::<HostKey, HostValue>("HOSTS").unwrap().remove(&key).unwrap();
    passes(&mut world, "unknown", &Packet::tcp((NODE, 40001), (ELSEWHERE, 443), SYN), 0);
    let held = Packet::tcp((NODE, 40001), (ORIGIN, 443), SYN).frame();
    assert_eq!(world.out_unmarked(&held).verdict, TCX_DROP);
    assert_eq!(counted(&world), 1);
}
