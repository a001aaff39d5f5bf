//! Frames: sound ones of flows that come back again and again, and what chance makes of them.

use crate::random::Random;
use crate::support::packet::{ACK, DF, FIN, MF, NODE_MAC, Packet, ROUTER_MAC, RST, SYN, geneve};
use crate::support::*;
use aegis_common::*;
use std::net::Ipv4Addr;

/// An address of nobody that is of interest.
const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);
const OTHER_NODES_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 77);
const PODS: [Ipv4Addr; 4] = [POD, POD_2, FREE_POD, UNKNOWN_POD];
const REMOTES: [Ipv4Addr; 7] = [ORIGIN, DENIED, WEB, ELSEWHERE, EGRESS, NODE_2, Ipv4Addr::new(10, 244, 2, 9)];
const VNIS: [u32; 7] = [VNI_STEER, VNI_FRAGMENT, VNI_GATEWAY, VNI_RETURN, VNI_PROBE, VNI_PROBE_ANSWER, 7];

/// Makes frames, and remembers what has left, so that answers to it can be made.
pub struct Frames {
    /// IP packets that have left.
    left: Vec<Vec<u8>>,
}

impl Frames {
    pub fn new() -> Frames {
        Frames { left: Vec::new() }
    }

    /// A frame has left.
    pub fn note(&mut self, frame: &[u8], random: &mut Random) {
        let packet = frame[14..].to_vec();
        if self.left.len() < 64 {
            self.left.push(packet);
        } else {
            let at = random.below(64);
            self.left[at] = packet;
        }
    }

    /// A frame of a pod.
    pub fn out(&self, random: &mut Random) -> Vec<u8> {
        let source = match random.below(10) {
            0 => random.pick(&[NODE, EGRESS, STRANGER]),
            _ => random.pick(&PODS),
        };
        let packet = between(source, random.pick(&REMOTES), random);
        let mut frame = spoilt(one_of(&packet, random), random);
        // Kernels of 2025 and later run no classifier on an IP packet without a whole header.
        frame.resize(frame.len().max(34), 0);
        frame
    }

    /// A frame from outside, or from another node.
    pub fn back(&self, random: &mut Random) -> Vec<u8> {
        let frame = match random.below(4) {
            0 => {
                let to = random.pick(&[EGRESS, EGRESS_2, EGRESS, POD, NODE, STRANGER]);
                let packet = between(random.pick(&[ORIGIN, WEB, ELSEWHERE]), to, random);
                let port = random.pick(&[SLICE, SLICE_2, 3, 200]) << 8 | random.below(256) as u16;
                one_of(&packet.to(to, port), random)
            }
            1 => one_of(&between(OTHER_NODES_POD, random.pick(&REMOTES), random), random),
            _ if !self.left.is_empty() => answer(&random.pick(&self.left), random),
            _ => self.out(random),
        };
        let inside = frame.len() >= 34 && frame[26..30] == OTHER_NODES_POD.octets();
        if frame.len() >= 34 && random.chance(if inside { 90 } else { 40 }) {
            return spoilt(tunnelled(&frame[14..], random), random);
        }
        spoilt(frame, random)
    }
}

/// A packet between two addresses, with ports of which there are few.
fn between(from: Ipv4Addr, to: Ipv4Addr, random: &mut Random) -> Packet {
    let local = 40000 + random.below(6) as u16;
    let remote = random.pick(&[443, 440, 53, 80]);
    let length = random.pick(&[0, 1, 8, 100, 1400, 1460, 1472]);
    let packet = match random.below(8) {
        0..=2 => {
            let flags = random.pick(&[SYN, SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST, RST | ACK, 0, 0xff]);
            let packet = Packet::tcp((from, local), (to, remote), flags);
            match random.below(3) {
                0 => packet.with_tcp_options(&[2, 4, 5, 180]),
                1 => packet.with_tcp_options(&[1, 1, 2, 4, 0x23, 0, 0, 0]),
                _ => packet,
            }
        }
        3 | 4 => Packet::udp((from, local), (to, remote), b""),
        5 => Packet::echo(from, to, local),
        6 => {
            let about = match random.below(3) {
                0 => Packet::tcp((to, remote), (from, local), ACK).with_payload(40),
                1 => Packet::udp((to, remote), (from, local), b"some answer of the origin"),
                _ => Packet::echo_reply(to, from, local),
            };
            let error = Packet::error(from, &about, random.pick(&[3, 11, 12]), random.pick(&[0, 1, 4]), 8);
            return Packet { destination: to, ..error };
        }
        _ => Packet::raw(from, to, random.pick(&[47, 132, 200]), &[7; 24]),
    };
    let packet = if random.chance(60) { packet.with_payload(length) } else { packet };
    let packet = if random.chance(10) { packet.without_checksum() } else { packet };
    let packet = if random.chance(10) { packet.with_ip_options() } else { packet };
    packet.with_id(random.below(8) as u16).with_fragment(random.pick(&[DF, DF, 0]))
}

/// The packet's frame, or one of its fragments.
fn one_of(packet: &Packet, random: &mut Random) -> Vec<u8> {
    if random.chance(20) {
        let fragments = packet.clone().with_fragment(0).fragments(random.pick(&[8, 24, 512, 1400]));
        if !fragments.is_empty() {
            return random.pick(&fragments);
        }
    }
    packet.frame()
}

/// What the origin, or a router on the way, sends to something that has left.
fn answer(left: &[u8], random: &mut Random) -> Vec<u8> {
    let header = usize::from(left[0] & 15) * 4;
    let mut packet = left.to_vec();
    let (source, destination) = (left[12..16].to_vec(), left[16..20].to_vec());
    packet[12..16].copy_from_slice(&destination);
    packet[16..20].copy_from_slice(&source);
    match left[9] {
        // The ports change places, and no sum notices.
        6 | 17 if packet.len() >= header + 20 => {
            packet.copy_within(header..header + 4, header);
            let ports: [u8; 4] = [left[header + 2], left[header + 3], left[header], left[header + 1]];
            packet[header..header + 4].copy_from_slice(&ports);
            if left[9] == 6 {
                // Not the sum of what is there, which is one more thing that must not be made worse.
                packet[header + 13] = random.pick(&[SYN | ACK, ACK, FIN | ACK, RST]);
            }
        }
        1 if packet.len() >= header + 8 && left[header] == 8 => {
            packet[header] = 0;
            let sum = u32::from(u16::from_be_bytes([packet[header + 2], packet[header + 3]])) + 0x0800;
            let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
            packet[header + 2..header + 4].copy_from_slice(&sum.to_be_bytes());
        }
        _ => (),
    }
    if random.chance(25) && left.len() >= header + 8 {
        let about = &left[..(header + random.pick(&[8, 20])).min(left.len())];
        let egress = Ipv4Addr::new(left[12], left[13], left[14], left[15]);
        let kind = random.pick(&[3, 11]);
        return Packet::icmp(ELSEWHERE, egress, kind, random.pick(&[0, 3, 4]), [0; 4], about).frame();
    }
    support_frame(&packet)
}

fn support_frame(packet: &[u8]) -> Vec<u8> {
    crate::support::packet::ethernet(NODE_MAC, ROUTER_MAC, packet)
}

/// In the tunnel, from a node or from somebody who would like to be one.
fn tunnelled(packet: &[u8], random: &mut Random) -> Vec<u8> {
    let fits = match (&packet[12..15], &packet[16..19]) {
        (_, [10, 244, 1]) => VNI_RETURN,
        ([10, 244, 2], _) => VNI_GATEWAY,
        _ => random.pick(&[VNI_STEER, VNI_FRAGMENT]),
    };
    let vni = if random.chance(70) { fits } else { random.pick(&VNIS) };
    let from = random.pick(&[NODE_2, NODE_2, NODE_2, STRANGER]);
    let macs = (MAC_2, NODE_MAC);
    if vni != VNI_GATEWAY {
        return geneve((from, NODE), macs, 0xc001, vni, packet);
    }
    let name = random.pick(&[EGRESS, EGRESS, EGRESS_2, STRANGER]);
    let inner = [&[0xff, 0x91, 0x81, 0x01][..], &name.octets(), packet].concat();
    let mut frame = geneve((from, NODE), macs, 0xc001, vni, &inner);
    frame[42..44].copy_from_slice(&[2, 0x40]);
    frame
}

/// The frame, in half of all cases with something wrong.
fn spoilt(mut frame: Vec<u8>, random: &mut Random) -> Vec<u8> {
    if random.chance(50) {
        return frame;
    }
    for _ in 0..=random.below(3) {
        let length = frame.len();
        // Nearer to the front more often: that is where headers are.
        let reach = random.pick(&[34, 54, 90, length]).min(length);
        let at = random.below(reach);
        match random.below(8) {
            0 => frame[at] ^= 1 << random.below(8),
            1 => frame[at] = random.next() as u8,
            2 => frame.truncate(random.below(length).max(14)),
            3 => frame.extend((0..random.below(40)).map(|at| at as u8)),
            4 if length >= 34 => {
                let total = random.pick(&[0, 19, 20, 27, 28, 39, 40, 1500, 0xffff]);
                frame[16..18].copy_from_slice(&(total as u16).to_be_bytes());
            }
            5 if length >= 34 => {
                let fragment = random.pick(&[0, MF, MF | 1, 1, 185, 0x1fff, 0x8000, DF | MF]);
                frame[20..22].copy_from_slice(&fragment.to_be_bytes());
            }
            6 if length >= 34 => frame[14] = random.pick(&[0x44, 0x45, 0x46, 0x4f, 0x65, 0x05]),
            7 if length >= 34 => frame[23] = random.pick(&[1, 6, 17, 0, 50, 255]),
            _ => (),
        }
    }
    frame
}
