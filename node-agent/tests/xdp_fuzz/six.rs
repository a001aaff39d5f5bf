//! The same over IPv6: packets of every kind, cut, changed and nested, in both directions.

use crate::number;
use crate::random::Random;
use crate::support::packet::{ACK, SYN};
use crate::support::six::*;
use crate::support::*;
use aegis_common::{NdpKey, NdpValue, NetworkValue, network_of};
use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::sync::LazyLock;

const PODS: [(Ipv6Addr, u32); 3] = [(POD6, 5), (FAR_POD6, FAR_SUFFIX), (FREE_POD6, 7)];
const NETWORKS: [Ipv6Addr; 2] = [NETWORK, NETWORK_2];
/// First byte of the source address in a frame, and of the destination.
const SOURCE: usize = 14 + 8;
const DESTINATION: usize = 14 + 24;

fn address(frame: &[u8], at: usize) -> Ipv6Addr {
    Ipv6Addr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).unwrap())
}

/// Where pods are outside: found by trying, so once only.
static OUTSIDE: LazyLock<Vec<(Ipv6Addr, Ipv6Addr)>> = LazyLock::new(|| {
    let both = PODS.iter().flat_map(|it| NETWORKS.map(|network| (it, network)));
    both.map(|((pod, suffix), network)| (*pod, outside(*pod, network, SLICE, *suffix))).collect()
});

/// Whether an address is the pod's, outside.
fn is_of(pod: Ipv6Addr, address: Ipv6Addr) -> bool {
    OUTSIDE.contains(&(pod, address))
}

/// An address in the other node's part.
static OTHERS: LazyLock<Ipv6Addr> = LazyLock::new(|| outside(INSIDE6, NETWORK, SLICE_2, 9));

fn is_egress(address: Ipv6Addr) -> bool {
    address == SINGLE || NETWORKS.iter().any(|network| network.segments()[..4] == address.segments()[..4])
}

/// Whether a frame's checksum is right; `None` where there is none to be seen, or not all of it.
fn sound(frame: &[u8]) -> Option<bool> {
    let packet = frame.get(14..)?;
    let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    (packet[0] >> 4 == 6
        && [TCP, UDP, ICMP6].contains(&packet[6])
        && packet.len() == 40 + length
        && length >= 8)
        .then(|| is_sound(packet))
}

/// A packet from one side to the other, of any kind and in any state.
fn frame(random: &mut Random, source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
    let ports = [random.pick(&[40000u16, 5000]), random.pick(&[443u16, 53])];
    frame_between(random, (source, ports[0]), (destination, ports[1]), 0x1234)
}

/// The same between ports; `id` is that of echoes.
fn frame_between(
    random: &mut Random,
    (source, from): (Ipv6Addr, u16),
    (destination, to): (Ipv6Addr, u16),
    id: u16,
) -> Vec<u8> {
    let ports = [from, to];
    let payload = vec![7; random.pick(&[0usize, 1, 9, 100, 1400])];
    let tcp = |flags| Packet6::tcp((source, ports[0]), (destination, ports[1]), flags, &payload);
    let udp = Packet6::udp((source, ports[0]), (destination, ports[1]), &payload);
    let about = Packet6::udp((destination, ports[1]), (source, ports[0]), &payload);
    let mut packet = match random.pick(&[0, 1, 2, 3, 4, 5, 6]) {
        0 => tcp(SYN),
        1 => tcp(ACK),
        2 => tcp(ACK | 1),
        3 => {
            let mut echo = Packet6::echo(source, destination, random.pick(&[128, 129]));
            echo.body[4..6].copy_from_slice(&id.to_be_bytes());
            echo
        }
        4 => Packet6::error(source, &about, random.pick(&[1, 2, 3]), random.pick(&[8, 40, 48, 100]))
            .to(destination),
        5 => Packet6::new(source, destination, random.pick(&[47, 50, 132, 253]), payload),
        _ => udp,
    };
    for _ in 0..random.pick(&[0, 0, 0, 1, 2, 9]) {
        packet = packet.behind(random.pick(&[0, 43, 51, 60]), random.pick(&[0, 1, 3]));
    }
    packet.wrong_checksum = random.chance(10);
    let mut frame = match random.chance(20) && !packet.body.is_empty() {
        true => {
            let all = packet.fragments(random.pick(&[8, 64, 1232]), random.pick(&[1, 2]));
            let at = random.pick(&[0usize, 0, 1, 2]).min(all.len() - 1);
            all[at].clone()
        }
        false => packet.frame(),
    };
    if random.chance(10) {
        frame.truncate(54 + random.pick(&[0usize, 1, 7, 8, 20]).min(frame.len() - 54));
    }
    if random.chance(15) {
        // Never the addresses: they say what is right.
        let places: Vec<usize> = (14..22).chain(54..frame.len()).collect();
        let place = random.pick(&places);
        frame[place] ^= random.pick(&[1u8, 0x10, 0x80, 0xff]);
    }
    frame
}

/// Where the address begins that a neighbour asks for.
const TARGET: usize = 62;

/// What neighbours on the link say to each other, sound and not.
fn neighbour(random: &mut Random, source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let [.., a, b, c] = target.octets();
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
    let options = [1, 1, 2, 0, 0, 0, 0, 9, 14, 1, 1, 2, 3, 4, 5, 6, 1, 1, 2, 0, 0, 0, 0, 9, 14, 1];
    let message = [&target.octets()[..], &options[..random.pick(&[0usize, 8, 8, 8, 16, 24, 26])]].concat();
    let kind = random.pick(&[135, 135, 135, 136, 134]);
    let mut packet = Packet6::icmp(source, random.pick(&[group, target]), kind, [0; 4], &message);
    packet.wrong_checksum = random.chance(10);
    let mut frame = packet.frame();
    frame[21] = random.pick(&[255, 255, 255, 64]);
    if random.chance(15) {
        let places: Vec<usize> = (14..22).chain(54..TARGET).chain(TARGET + 16..frame.len()).collect();
        let place = random.pick(&places);
        frame[place] ^= random.pick(&[1u8, 0x10, 0x80, 0xff]);
    }
    if random.chance(10) {
        frame.truncate(frame.len() - random.pick(&[1usize, 4, 8]));
    }
    frame
}

struct Fuzz {
    world: World,
    random: Random,
    seen: BTreeMap<&'static str, u64>,
    /// Ports that flows have got of the single address.
    ports: Vec<u16>,
}

impl Fuzz {
    fn counted(&mut self) -> Vec<(&'static str, u64)> {
        let counted = self.world.counted();
        for (label, count) in &counted {
            *self.seen.entry(label).or_default() += count;
        }
        counted
    }

    fn change(&mut self) {
        for (at, network) in NETWORKS.into_iter().enumerate() {
            let own = self.random.chance(80);
            let open = own && self.random.chance(80);
            let now = self::network(&mut self.world, network);
            set_network(&mut self.world, network, NetworkValue { open: u16::from(open), ..now });
            self.world.own(2 + at as u32, SLICE, if own { 1 } else { 2 });
        }
        // Without a /64 what has ports leaves from the single address.
        let listed = self.random.pick(&[&NETWORKS[..], &NETWORKS[..1], &NETWORKS[1..], &[]]);
        set_allocation6(&mut self.world, listed);
        let own = self.random.chance(80);
        allow_single(&mut self.world, SINGLE, if own { &[SLICE] } else { &[] });
        self.world.own(INDEX, SLICE, if own { 1 } else { 2 });
        self.world.home(INDEX, self.random.pick(&[0, 1, 1, 2]));
    }

    fn out(&mut self) -> (Vec<u8>, Result<(), String>) {
        let pods = [POD6, FAR_POD6, FREE_POD6, UNKNOWN_POD6, OUTSIDE[0].1, ELSEWHERE6];
        let (source, destination) = (
            self.random.pick(&pods),
            self.random.pick(&[ORIGIN6, ORIGIN6, WEB6, DENIED6, ELSEWHERE6, INSIDE6]),
        );
        let frame = frame(&mut self.random, source, destination);
        let result = self.world.pod(&frame, 0);
        let counted = self.counted();
        let judged = pod_ingress(&frame, &result, &counted);
        if judged.is_err() || result.verdict != TCX_NEXT && self.random.chance(90) {
            return (frame, judged);
        }
        let marked = result.mark & MARK != 0 || self.random.chance(5);
        let result = if marked { self.world.out(&frame) } else { self.world.out_unmarked(&frame) };
        let counted = self.counted();
        let judged = uplink_egress(&frame, &result, marked, &counted);
        // Where the port is if there is nothing between the headers.
        let place = match frame[20] {
            TCP | UDP => 54,
            _ => 58,
        };
        if marked
            && (result.verdict, address(&result.frame, SOURCE)) == (TCX_NEXT, SINGLE)
            && let Some(port) = result.frame.get(place..place + 2)
            && self.ports.len() < 500
        {
            self.ports.push(u16::from_be_bytes([port[0], port[1]]));
        }
        (frame, judged)
    }

    fn back(&mut self) -> (Vec<u8>, Result<(), String>) {
        let mut all: Vec<Ipv6Addr> = OUTSIDE.iter().map(|(_, outside)| *outside).collect();
        all.extend([*OTHERS, NETWORK, POD6, ELSEWHERE6]);
        all.extend([SINGLE; 6]);
        let destination = self.random.pick(&all);
        let source = self.random.pick(&[ORIGIN6, ELSEWHERE6]);
        let frame = match self.random.chance(20) {
            true => {
                let source = self.random.pick(&[ORIGIN6, Ipv6Addr::UNSPECIFIED, destination]);
                neighbour(&mut self.random, source, destination)
            }
            false if destination == SINGLE && !self.ports.is_empty() => {
                let from = self.random.pick(&[443, 53]);
                let port = self.random.pick(&self.ports);
                frame_between(&mut self.random, (ORIGIN6, from), (SINGLE, port), port)
            }
            false => frame(&mut self.random, source, destination),
        };
        let (verdict, after) = self.world.back(&frame);
        let counted = self.counted();
        let judged = uplink_ingress(&frame, &after, verdict, &counted);
        (frame, judged)
    }
}

fn right(what: &str, holds: bool) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

/// Something was counted that says why.
fn why(counted: &[(&'static str, u64)]) -> bool {
    counted.iter().any(|(label, _)| label.starts_with("drop_") || label.starts_with("refuse_"))
}

fn pod_ingress(frame: &[u8], result: &Classified, counted: &[(&'static str, u64)]) -> Result<(), String> {
    let source = address(frame, SOURCE);
    right("the frame is changed", result.frame == frame)?;
    if result.verdict != TCX_NEXT {
        return right("dropped without a reason", result.verdict == TCX_DROP && why(counted));
    }
    right("a forged source passes", !is_egress(source))?;
    right("an unknown pod passes", source != UNKNOWN_POD6 || address(frame, DESTINATION) == INSIDE6)?;
    right("covered, and no pod", result.mark & MARK == 0 || [POD6, FAR_POD6].contains(&source))
}

fn uplink_egress(
    frame: &[u8],
    result: &Classified,
    marked: bool,
    counted: &[(&'static str, u64)],
) -> Result<(), String> {
    let (source, destination) = (address(frame, SOURCE), address(frame, DESTINATION));
    match result.verdict {
        TCX_NEXT if !marked => {
            // What is no IPv6 has no source.
            let foreign = !is_egress(source) || frame[14] >> 4 != 6;
            right("changed", result.frame == frame && foreign)
        }
        TCX_NEXT => {
            let now = address(&result.frame, SOURCE);
            let own = now == SINGLE && [POD6, FAR_POD6].contains(&source);
            right("not the pod's address", own || is_of(source, now))?;
            right("another length", result.frame.len() == frame.len())?;
            right("another destination", address(&result.frame, DESTINATION) == destination)?;
            right("a checksum is wrong now", sound(frame) != Some(true) || sound(&result.frame) == Some(true))
        }
        TCX_REDIRECT => {
            right("not an answer", why(counted))?;
            let ends = (address(&result.frame, SOURCE), address(&result.frame, DESTINATION));
            right("an answer to somebody else", ends == (destination, source))
        }
        _ => right("dropped without a reason", why(counted)),
    }
}

fn uplink_ingress(
    frame: &[u8],
    after: &[u8],
    verdict: u32,
    counted: &[(&'static str, u64)],
) -> Result<(), String> {
    let destination = address(frame, DESTINATION);
    match verdict {
        XDP_PASS if after == frame => right("it gets in as it is", !is_egress(destination)),
        XDP_PASS => {
            let pod = address(after, DESTINATION);
            let own = destination == SINGLE && [POD6, FAR_POD6].contains(&pod);
            right("not for this pod", own || is_of(pod, destination))?;
            right("another length", after.len() == frame.len())?;
            right("another source", address(after, SOURCE) == address(frame, SOURCE))?;
            right("a checksum is wrong now", sound(frame) != Some(true) || sound(after) == Some(true))
        }
        XDP_TX if counted.contains(&("ndp_answered", 1)) => {
            let target = address(frame, TARGET);
            let own = target == SINGLE || target.segments()[3] == NETWORK.segments()[3];
            right("nobody's address", is_egress(target) && own)?;
            right("what it answers is not sound", sound(frame) == Some(true) && frame[54] == 135)?;
            right("not sound", sound(after) == Some(true) && address(after, TARGET) == target)?;
            let (source, to) = (address(frame, SOURCE), address(after, DESTINATION));
            let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            right("an answer to somebody else", to == if source.is_unspecified() { all } else { source })
        }
        XDP_TX if counted.contains(&("steered", 1)) => {
            right("changed on its way", after.ends_with(&frame[14..]) && is_egress(destination))
        }
        XDP_TX => {
            let ends = (address(after, SOURCE), address(after, DESTINATION));
            right("an answer to somebody else", ends == (destination, address(frame, SOURCE)))
        }
        _ => right("dropped without a reason", why(counted)),
    }
}

#[test]
fn xdp_fuzz_whatever_comes_over_ipv6() {
    let (count, seed) = (number("AEGIS_FUZZ", 20_000), number("AEGIS_FUZZ_SEED", 1));
    let mut world = World::new();
    six(&mut world);
    let key = NdpKey { network: network_of(&raw6(NETWORK)), ifindex: 1 };
    world.plane.hash("NDP_ANSWERS").unwrap().insert(key, NdpValue::default(), 0).unwrap();
    single(&mut world);
    let key = NdpKey { network: [0, single_key(SINGLE)], ifindex: 1 };
    world.plane.hash("NDP_ANSWERS").unwrap().insert(key, NdpValue::default(), 0).unwrap();
    let mut fuzz = Fuzz { world, random: Random::new(seed), seen: BTreeMap::new(), ports: Vec::new() };
    for number in 0..count {
        if number % 20 == 0 {
            fuzz.change();
        }
        let (frame, judged) = if fuzz.random.chance(50) { fuzz.out() } else { fuzz.back() };
        if let Err(what) = judged {
            let bytes: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
            panic!("{what}: frame {number} of seed {seed}, {bytes}\n{:?}", fuzz.world.counted());
        }
    }
    println!("{count} frames of seed {seed}: {:#?}", fuzz.seen);
    assert!(fuzz.ports.len() > 10, "{:?}", fuzz.ports);
    assert!(fuzz.world.consistent() > 10);
    for label in [
        "translated",
        "reverse",
        "steered",
        "drop_forged",
        "drop_unknown_pod",
        "refuse_unavailable",
        "drop_fragment_out",
        "drop_malformed_out",
        "drop_malformed_in",
        "drop_no_flow",
        "drop_no_owner",
        "drop_fragment_in",
        "refuse_protocol",
        "refuse_no_flow",
        "drop_leak",
        "ndp_answered",
    ] {
        assert!(fuzz.seen.contains_key(label), "never counted {label}: {:#?}", fuzz.seen);
    }
}
