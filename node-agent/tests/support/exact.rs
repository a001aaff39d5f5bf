//! What must come out of the programs of one node, byte for byte.

use super::packet::{DF, Packet};
use super::*;

/// Runs a packet of a pod that must leave as it is, but from a port (or with an identifier) of the held slice, which this gives.
pub fn leaves(world: &mut World, name: &str, packet: &Packet) -> u16 {
    let out = world.out(&packet.frame());
    assert_eq!(out.verdict, TCX_NEXT, "{name}: verdict out; {:?}", world.counted());
    let at = 14 + 20 + packet.options.len() + if packet.protocol() == 1 { 4 } else { 0 };
    let port = u16::from_be_bytes([out.frame[at], out.frame[at + 1]]);
    let expected = renumbered(packet.clone().from(EGRESS, port), &out.frame);
    assert_eq!(out.frame, expected.frame(), "{name}: frame out");
    assert_eq!(port >> 8, SLICE, "{name}: a port of the held slice");
    let mut counted = world.counted();
    counted.retain(|(label, _)| *label != "past_high_water");
    assert!(
        counted == [("translated", 1)] || counted == [("translated", 1), ("new_flow", 1)],
        "{name}: {counted:?}"
    );
    port
}

/// The packet with the identification of the frame, if it is one that gets a new one: one of the held slice.
pub fn renumbered(packet: Packet, frame: &[u8]) -> Packet {
    if packet.fragment & 0x7fff == DF {
        return packet;
    }
    assert_eq!(u16::from(frame[18]), SLICE, "an identification of the held slice");
    packet.with_id(u16::from_be_bytes([frame[18], frame[19]]))
}

/// Runs a packet from outside that must reach the host stack as `expected`.
pub fn arrives(world: &mut World, name: &str, packet: &Packet, expected: &Packet) {
    let (verdict, frame) = world.back(&packet.frame());
    assert_eq!(verdict, XDP_PASS, "{name}: verdict in; {:?}", world.counted());
    assert_eq!(frame, expected.frame(), "{name}: frame in");
    assert_eq!(world.counted(), [("reverse", 1)], "{name}: counters");
}

/// Runs a frame from outside that must be dropped in silence, for this reason.
pub fn kept_out(world: &mut World, name: &str, frame: &[u8], reason: Counter) {
    assert_eq!(world.back(frame).0, XDP_DROP, "{name}: verdict in");
    assert_eq!(world.counted(), [(reason.label(), 1)], "{name}: counters");
}

/// Runs a frame of a pod that must be dropped without an answer, for this reason.
pub fn kept_in(world: &mut World, name: &str, frame: &[u8], reason: Counter) {
    assert_eq!(world.out(frame).verdict, TCX_DROP, "{name}: verdict out");
    assert_eq!(world.counted(), [(reason.label(), 1)], "{name}: counters");
}

/// All that is known of flows.
#[derive(Debug, PartialEq, Eq)]
pub struct Flows {
    forward: Vec<(FlowKey, ForwardValue)>,
    reverse: Vec<(FlowKey, ReverseValue)>,
}

/// What is known now, to compare.
pub fn flows(world: &World) -> Flows {
    let order = |key: &FlowKey| (key.protocol, key.local, key.local_port, key.remote, key.remote_port);
    let mut flows = Flows { forward: world.entries("FORWARD"), reverse: world.entries("REVERSE") };
    flows.forward.sort_by_key(|(key, _)| order(key));
    flows.reverse.sort_by_key(|(key, _)| order(key));
    flows
}

/// Makes the last packets of all flows a few seconds older, so that one that is noted shows.
pub fn age(world: &mut World) {
    let entries: Vec<(FlowKey, ForwardValue)> = world.entries("FORWARD");
    for (key, value) in entries {
        let value = ForwardValue { last_seen: value.last_seen - 5, ..value };
        world.set_forward(key, value);
    }
}
