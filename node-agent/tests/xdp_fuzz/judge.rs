//! What no packet may ever see, whatever it is and whatever the maps hold. Reads frames by itself, with nothing of the programs'.

use crate::state::State;
use crate::support::packet::{DF, SYN};
use crate::support::*;
use std::net::Ipv4Addr;

/// An IPv4 packet in an Ethernet frame, as far as it is sound.
#[derive(Debug)]
pub struct Ip<'f> {
    pub header: &'f [u8],
    pub payload: &'f [u8],
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub protocol: u8,
    pub fragment: u16,
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn address(bytes: &[u8], at: usize) -> Ipv4Addr {
    Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3])
}

impl Ip<'_> {
    pub fn of(frame: &[u8]) -> Option<Ip<'_>> {
        let packet = frame.strip_prefix(&frame[..12])?.strip_prefix(&[8, 0])?;
        let header = usize::from(packet.first()? & 15) * 4;
        let sound = packet[0] >> 4 == 4 && header >= 20 && packet.len() >= header;
        let total = usize::from(word(packet.get(..20).filter(|_| sound)?, 2));
        Some(Ip {
            header: &packet[..header],
            payload: packet.get(header..total)?,
            source: address(packet, 12),
            destination: address(packet, 16),
            protocol: packet[9],
            fragment: word(packet, 6),
        })
    }

    fn is_whole(&self) -> bool {
        self.fragment & 0x3fff == 0
    }

    fn is_later(&self) -> bool {
        self.fragment & 0x1fff != 0
    }

    /// Port, or identifier, at one of the ends.
    fn port(&self, of_source: bool) -> Option<u16> {
        match self.protocol {
            6 | 17 => self.payload.get(..4).map(|ports| word(ports, if of_source { 0 } else { 2 })),
            1 if matches!(self.payload.first(), Some(0 | 8)) => {
                self.payload.get(..6).map(|echo| word(echo, 4))
            }
            _ => None,
        }
    }

    /// How far the transport checksum is off; 0 = it is right. `None` where there is none.
    fn residue(&self) -> Option<u16> {
        if !self.is_whole() {
            return None;
        }
        match self.protocol {
            1 => Some(sum(&[self.payload])),
            17 if word(self.payload.get(..8)?, 6) == 0 => None,
            6 | 17 => {
                let length = (self.payload.len() as u16).to_be_bytes();
                let pseudo = [&self.header[12..20], &[0, self.protocol], &length].concat();
                Some(sum(&[&pseudo, self.payload]))
            }
            _ => None,
        }
    }
}

/// Sum of 16-bit words in ones' complement, where both zeroes are 0.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        sum += part
            .chunks(2)
            .map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)))
            .sum::<u64>();
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    if sum == 0xffff { 0 } else { sum as u16 }
}

/// What a program did with a frame.
pub struct Run<'r> {
    pub before: &'r [u8],
    pub after: &'r [u8],
    pub verdict: u32,
    pub counted: &'r [(&'static str, u64)],
}

pub type Judgement = Result<(), String>;

fn hold(holds: bool, what: &str) -> Judgement {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

/// Counters that say something beside what became of a packet.
const BESIDE: [&str; 4] = ["new_flow", "past_high_water", "steered_here", "refusal_sent"];

impl Run<'_> {
    /// What became of the packet by the counters.
    fn outcomes(&self) -> Vec<(&'static str, u64)> {
        let of_packet = self.counted.iter().filter(|(label, _)| !BESIDE.contains(label));
        let all: Vec<_> = of_packet.copied().collect();
        // A gateway's refusal goes back through the tunnel, which counts it.
        let refused: Vec<_> = all.iter().filter(|(label, _)| label.starts_with("refuse_")).copied().collect();
        if refused.is_empty() { all } else { refused }
    }

    fn untouched(&self) -> Judgement {
        hold(self.before == self.after, "a packet that is none of ours is changed")?;
        hold(self.outcomes().is_empty(), "a packet that is none of ours is counted")
    }

    fn one_outcome(&self) -> Judgement {
        hold(
            self.outcomes().iter().map(|(_, count)| count).sum::<u64>() == 1,
            "not exactly one thing became of it",
        )
    }

    fn dropped(&self) -> Judgement {
        self.one_outcome()?;
        let [(label, _)] = self.outcomes()[..] else { return Err("no reason".to_owned()) };
        // An answer may find no way.
        let says_so =
            ["drop_", "refuse_", "fragment_kept", "too_big"].iter().any(|start| label.starts_with(start));
        hold(says_so, "dropped, and counted as something else")
    }
}

fn is_egress(address: Ipv4Addr) -> bool {
    address == EGRESS || address == EGRESS_2
}

/// `pod_ingress`. `mark` is before and after.
pub fn pod_ingress(run: &Run<'_>, mark: (u32, u32), state: &State) -> Judgement {
    hold(run.before == run.after, "a classifier changes no frame")?;
    hold((mark.0 ^ mark.1) & !MARK == 0, "another bit of the mark is changed")?;
    match run.verdict {
        TCX_NEXT => hold(run.counted.is_empty(), "a packet that passes is counted")?,
        TCX_DROP => return run.dropped(),
        _ => return Err("an unknown verdict".to_owned()),
    }
    let Some(ip) = Ip::of(run.before) else { return Ok(()) };
    hold(!is_egress(ip.source), "a forged source passes")?;
    let covered = state.covered.contains(&ip.source) && [ORIGIN, DENIED].contains(&ip.destination);
    hold(!covered || mark.1 & MARK != 0, "a covered packet is not marked")
}

/// `uplink_egress`.
pub fn uplink_egress(run: &Run<'_>, mark: u32, state: &State, world: &mut World) -> Judgement {
    let source =
        run.before.get(26..30).filter(|_| run.before[12..14] == [8, 0]).map(|bytes| address(bytes, 0));
    if mark & MARK == 0 {
        return match run.verdict {
            TCX_NEXT => {
                hold(Ip::of(run.before).is_none_or(|ip| !is_egress(ip.source)), "a forged source leaves")?;
                run.untouched()
            }
            TCX_DROP => {
                hold(source.is_some_and(is_egress), "a foreign packet is dropped")?;
                run.dropped()
            }
            _ => Err("a foreign packet is sent elsewhere".to_owned()),
        };
    }
    match run.verdict {
        TCX_NEXT if run.before[12..14] != [8, 0] => run.untouched(),
        // The host stack lets none of these get here. If one did, it would show nobody's address.
        _ if Ip::of(run.before).is_none() => {
            let hidden = run.verdict != TCX_NEXT || is_egress(address(run.after, 26));
            hold(hidden, "what is not sound leaves with its own source").and_then(|()| run.one_outcome())
        }
        TCX_NEXT => leaves(run, state, world),
        TCX_DROP => run.dropped(),
        TCX_REDIRECT => redirected(run),
        _ => Err("an unknown verdict".to_owned()),
    }
}

/// A packet from an egress address.
fn leaves(run: &Run<'_>, state: &State, world: &mut World) -> Judgement {
    run.one_outcome()?;
    let (Some(before), Some(after)) = (Ip::of(run.before), Ip::of(run.after)) else {
        return Err("what is not sound leaves".to_owned());
    };
    hold(is_egress(after.source), "a packet leaves from another address")?;
    sends(&before, &after, run.counted.iter().any(|(label, _)| *label == "new_flow"), state)?;
    hold(run.before.len() == run.after.len(), "its length is changed")?;
    let Some((local, port)) = before.port(true).zip(after.port(true)).filter(|_| !before.is_later()) else {
        return Ok(());
    };
    let remote_port = if before.protocol == 1 { 0 } else { before.port(false).unwrap_or(0) };
    let key = flow(before.protocol, (before.source, local), (before.destination, remote_port));
    let flow = world.forward(&key).ok_or("it has no flow")?;
    hold((flow.egress, flow.egress_port) == (raw(after.source), port), "it does not leave as its flow does")
}

/// A packet that got an egress address and port: nothing else of it may be changed.
fn sends(before: &Ip<'_>, after: &Ip<'_>, new: bool, state: &State) -> Judgement {
    hold(before.destination == after.destination, "its destination is changed")?;
    hold(sum(&[before.header]) == sum(&[after.header]), "the header's checksum is made wrong")?;
    hold(before.residue() == after.residue(), "the transport's checksum is made wrong")?;
    let mut expected = before.header.to_vec();
    expected[10..16].copy_from_slice(&after.header[10..16]);
    if before.fragment & 0x7fff != DF {
        expected[4..6].copy_from_slice(&after.header[4..6]);
    }
    hold(expected == after.header, "something else of its header is changed")?;
    if before.is_later() {
        return hold(before.payload == after.payload, "the payload is changed");
    }
    let port = after.port(true);
    if let (true, Some(port)) = (new, port) {
        let own = &state.own[usize::from(after.source == EGRESS_2)];
        hold(own.contains(&(port >> 8)), "a flow begins from a port that is another node's")?;
    }
    let echo = before.protocol == 1 && port.is_some();
    let mut expected = before.payload.to_vec();
    match before.protocol {
        6 => {
            expected[..2].copy_from_slice(&after.payload[..2]);
            expected[16..18].copy_from_slice(&after.payload[16..18]);
            if before.payload[13] & SYN != 0 {
                // The MSS may be lowered, which the sum has judged.
                expected = after.payload.to_vec();
            }
        }
        17 => {
            expected[..2].copy_from_slice(&after.payload[..2]);
            expected[6..8].copy_from_slice(&after.payload[6..8]);
        }
        _ if echo => {
            expected[2..6].copy_from_slice(&after.payload[2..6]);
        }
        // The packet that an error quotes: the sum has judged it.
        _ => expected = after.payload.to_vec(),
    }
    hold(expected == after.payload, "something else of its payload is changed")
}

/// A packet of `uplink_egress` that goes another way: back to the pod as a refusal, or to a gateway.
fn redirected(run: &Run<'_>) -> Judgement {
    run.one_outcome()?;
    let (Some(before), Some(after)) = (Ip::of(run.before), Ip::of(run.after)) else {
        return Err("what is not sound is sent elsewhere".to_owned());
    };
    if after.source == NODE {
        hold(run.counted.iter().any(|(label, _)| *label == "to_gateway"), "it is not counted")?;
        return hold(after.destination == NODE_2, "the tunnel leads elsewhere");
    }
    hold(run.counted.contains(&("refusal_sent", 1)), "a refusal is not counted")?;
    hold(
        (after.source, after.destination) == (before.destination, before.source),
        "a refusal is somebody else's",
    )?;
    hold(
        sum(&[after.header]) == sum(&[before.header]) || sum(&[after.header]) == 0,
        "a refusal's header is wrong",
    )?;
    // A reset keeps what was wrong with the segment.
    let residue = after.residue();
    hold(residue == Some(0) || residue == before.residue(), "a refusal's checksum is wrong")
}

/// `uplink_ingress`.
pub fn uplink_ingress(run: &Run<'_>, state: &State, world: &mut World) -> Judgement {
    let to =
        run.before.get(14..34).filter(|_| run.before[12..14] == [8, 0]).map(|header| address(header, 16));
    let (ours, tunnel) = (to.is_some_and(is_egress), to == Some(NODE));
    if !ours && !tunnel {
        hold(run.verdict == XDP_PASS, "a foreign packet does not pass")?;
        return run.untouched();
    }
    match run.verdict {
        XDP_PASS if run.before == run.after => {
            hold(tunnel, "a packet for an egress address passes as it is")?;
            run.untouched()
        }
        XDP_PASS => arrives(run, ours, world),
        XDP_DROP => run.dropped(),
        XDP_TX | gateway::XDP_REDIRECT => sent_on(run, state),
        _ => Err("an unknown verdict".to_owned()),
    }
}

/// A packet that goes up the host stack: to a pod whose flow asked for it.
fn arrives(run: &Run<'_>, from_wire: bool, world: &mut World) -> Judgement {
    run.one_outcome()?;
    hold(run.after[..12] == run.before[..12], "its Ethernet header is changed")?;
    let after = Ip::of(run.after).ok_or("what is not sound arrives")?;
    hold([POD, POD_2, FREE_POD, UNKNOWN_POD].contains(&after.destination), "it is for no pod")?;
    let inner = if from_wire { run.before.to_vec() } else { [&run.before[..14], &run.before[50..]].concat() };
    let before = Ip::of(&inner).ok_or("what was not sound arrives")?;
    hold(sum(&[before.header]) == sum(&[after.header]), "the header's checksum is made wrong")?;
    hold(before.residue() == after.residue(), "the transport's checksum is made wrong")?;
    hold(before.source == after.source, "its source is changed")?;
    let ends = before.port(false).zip(after.port(false)).filter(|_| !before.is_later());
    let Some((port, local)) = ends else { return Ok(()) };
    let remote_port = if before.protocol == 1 { 0 } else { before.port(true).unwrap_or(0) };
    let key = flow(before.protocol, (before.destination, port), (before.source, remote_port));
    let back = world.reverse(&key).ok_or("nobody asked for it")?;
    hold(back.buried == 0, "its pod is gone")?;
    hold((back.pod, back.pod_port) == (raw(after.destination), local), "it goes to another pod's port")
}

/// A packet that `uplink_ingress` sends out again.
fn sent_on(run: &Run<'_>, state: &State) -> Judgement {
    run.one_outcome()?;
    let after = Ip::of(run.after).ok_or("what is not sound is sent on")?;
    // A probe is answered with what it came with.
    let (sound, probed) = (sum(&[after.header]) == 0, run.counted == [("probed", 1)]);
    hold(sound || probed || is_egress(after.source), "the header's checksum is wrong")?;
    if after.source == NODE {
        let port = after.port(false).filter(|_| after.protocol == 17);
        return hold(after.destination == NODE_2 && port == Some(6081) || probed, "it goes to no peer");
    }
    hold(is_egress(after.source), "it leaves from another address")?;
    if run.counted.iter().any(|(label, _)| *label == "too_big") {
        hold(after.protocol == 1 && after.residue() == Some(0), "an answer's checksum is wrong")?;
        let tunnelled = address(run.before, 30) == NODE;
        let start = if tunnelled { 50 } else { 14 };
        let inner = [&run.before[..14], &run.before[start..]].concat();
        let before = Ip::of(&inner).ok_or("what is not sound is answered")?;
        return hold(
            (after.source, after.destination) == (before.destination, before.source),
            "an answer is somebody else's",
        );
    }
    // For another node's pod, behind 44 bytes of headers.
    let inner = [&run.before[..14], run.before.get(58..).unwrap_or_default()].concat();
    let before = Ip::of(&inner).ok_or("what was not sound is sent on")?;
    sends(&before, &after, run.counted.iter().any(|(label, _)| *label == "new_flow"), state)
}
