//! `pod_ingress`: which packets of pods are marked, which are held or dropped. Each scenario: packet in, verdict, mark
//! out, counters. The frame itself is never touched.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod support;

use aegis_common::*;
use std::net::Ipv4Addr;
use support::packet::{ACK, MF, NODE_MAC, Packet, ROUTER_MAC, SYN, ethernet};
use support::*;

struct Scenario {
    name: &'static str,
    frame: Vec<u8>,
    verdict: u32,
    covered: bool,
    counted: Option<&'static str>,
}

fn passes(name: &'static str, frame: Vec<u8>) -> Scenario {
    Scenario { name, frame, verdict: TCX_NEXT, covered: false, counted: None }
}

fn covered(name: &'static str, frame: Vec<u8>) -> Scenario {
    Scenario { name, frame, verdict: TCX_NEXT, covered: true, counted: None }
}

fn dropped(name: &'static str, frame: Vec<u8>, reason: Counter) -> Scenario {
    Scenario { name, frame, verdict: TCX_DROP, covered: false, counted: Some(reason.label()) }
}

fn syn(source: Ipv4Addr, destination: Ipv4Addr, port: u16) -> Vec<u8> {
    Packet::tcp((source, 40000), (destination, port), SYN).frame()
}

fn check(world: &mut World, scenario: &Scenario) {
    let name = scenario.name;
    // Whatever the mark was before: our bit is decided, other bits stay.
    for before in [OTHER_MARK, OTHER_MARK | MARK] {
        let out = world.pod(&scenario.frame, before);
        assert_eq!(out.verdict, scenario.verdict, "{name}: verdict");
        assert_eq!(out.frame, scenario.frame, "{name}: the frame is untouched");
        if scenario.verdict == TCX_NEXT && scenario.frame[12..14] == [8, 0] {
            let expected = if scenario.covered { OTHER_MARK | MARK } else { OTHER_MARK };
            assert_eq!(out.mark, expected, "{name}: mark");
        }
    }
    let expected: Vec<_> = scenario.counted.iter().map(|label| (*label, 2)).collect();
    assert_eq!(world.counted(), expected, "{name}: counters");
}

#[test]
fn xdp_pod_ingress_table() {
    let mut world = World::new();
    let udp = |source, destination, port| Packet::udp((source, 5000), (destination, port), b"hello").frame();
    let inside = Ipv4Addr::new(10, 244, 2, 9);
    let node_neighbour = Ipv4Addr::new(10, 0, 0, 77);
    let mut arp = ethernet(NODE_MAC, ROUTER_MAC, &[0; 28]);
    arp[12..14].copy_from_slice(&[8, 6]);
    let mut six = ethernet(NODE_MAC, ROUTER_MAC, &[0x60; 40]);
    six[12..14].copy_from_slice(&[0x86, 0xdd]);
    let mut version = syn(POD, ORIGIN, 443);
    version[14] = 0x65;
    let mut short_header = syn(POD, ORIGIN, 443);
    short_header[14] = 0x44;
    let mut short_total = syn(POD, ORIGIN, 443);
    short_total[16..18].copy_from_slice(&[0, 19]);
    let cut = syn(POD, ORIGIN, 443)[..14 + 20 + 4].to_vec();
    let scenarios = [
        passes("a pod without binding", syn(FREE_POD, ORIGIN, 443)),
        covered("TCP to a covered destination", syn(POD, ORIGIN, 443)),
        covered("a mid-stream segment too", Packet::tcp((POD, 1), (ORIGIN, 443), ACK).frame()),
        covered("UDP to a covered destination", udp(POD, ORIGIN, 53)),
        covered("echo to a covered destination", Packet::echo(POD, ORIGIN, 9).frame()),
        covered("a protocol without ports", Packet::raw(POD, ORIGIN, 47, &[0; 24]).frame()),
        covered(
            "IP options do not hide it",
            Packet::tcp((POD, 1), (ORIGIN, 443), SYN).with_ip_options().frame(),
        ),
        covered("denied: marked, refused at the uplink", syn(POD, DENIED, 443)),
        passes("a destination that no binding names", syn(POD, ELSEWHERE, 443)),
        passes("inside the cluster", syn(POD, inside, 443)),
        covered("a class with ports, first of the range", syn(POD, WEB, 440)),
        covered("a class with ports, last of the range", syn(POD, WEB, 443)),
        passes("a port before the range", syn(POD, WEB, 439)),
        passes("a port after the range", syn(POD, WEB, 444)),
        passes("the same port of another protocol", udp(POD, WEB, 443)),
        passes("echo where only ports are covered", Packet::echo(POD, WEB, 9).frame()),
        covered("a later fragment", Packet::raw(POD, ORIGIN, 17, &[1; 16]).with_fragment(5).frame()),
        covered("a first fragment", Packet::udp((POD, 1), (ORIGIN, 2), &[0; 16]).with_fragment(MF).frame()),
        dropped("an unknown pod is held", syn(UNKNOWN_POD, ORIGIN, 443), Counter::DropUnknownPod),
        dropped("wherever it goes outside", syn(UNKNOWN_POD, ELSEWHERE, 443), Counter::DropUnknownPod),
        passes("an unknown pod reaches the cluster", syn(UNKNOWN_POD, inside, 53)),
        passes("a source outside the pod range", syn(node_neighbour, ORIGIN, 443)),
        dropped("a forged egress address", syn(EGRESS, ORIGIN, 443), Counter::DropForged),
        dropped("a forged one, inside the cluster", syn(EGRESS_2, inside, 443), Counter::DropForged),
        passes("ARP", arp),
        passes("IPv6", six),
        dropped("not version 4", version, Counter::DropMalformedOut),
        dropped("a header of 16 bytes", short_header, Counter::DropMalformedOut),
        dropped("a total shorter than the header", short_total, Counter::DropMalformedOut),
        dropped("no whole transport header", cut, Counter::DropMalformedOut),
    ];
    for scenario in &scenarios {
        check(&mut world, scenario);
    }
}

#[test]
fn xdp_pod_ingress_unknown_pods_pass_when_not_held() {
    let mut world = World::new();
    world.set_config(&Config { hold_unknown: 0, ..config() });
    check(&mut world, &passes("not held", syn(UNKNOWN_POD, ORIGIN, 443)));
}

#[test]
fn xdp_pod_ingress_switches_the_generation_in_one_store() {
    let mut world = World::new();
    check(&mut world, &covered("generation 1", syn(POD, ORIGIN, 443)));
    // Generation 2 is being written: nothing of it counts yet, and its end is that the pod is not covered.
    world.pod_class(2, POD, 0);
    world.pod_class(2, UNKNOWN_POD, 0);
    check(&mut world, &covered("still generation 1", syn(POD, ORIGIN, 443)));
    check(&mut world, &dropped("still unknown", syn(UNKNOWN_POD, ORIGIN, 443), Counter::DropUnknownPod));
    world.set_config(&Config { generation: 2, ..config() });
    check(&mut world, &passes("generation 2", syn(POD, ORIGIN, 443)));
    check(&mut world, &passes("known in generation 2", syn(UNKNOWN_POD, ORIGIN, 443)));
    check(&mut world, &dropped("gone in generation 2", syn(POD_2, ORIGIN, 443), Counter::DropUnknownPod));
}

#[test]
fn xdp_pod_ingress_a_live_flow_stays_covered() {
    let mut world = World::new();
    let key = flow(6, (POD, 40000), (ELSEWHERE, 443));
    let life = ForwardValue::new_life(&key, 1);
    let value = ForwardValue { life, incarnation: INCARNATION, ..Default::default() };
    world.set_forward(key, value);
    check(&mut world, &covered("a flow from before the binding lost it", syn(POD, ELSEWHERE, 443)));
    check(&mut world, &passes("another port is none of it", syn(POD, ELSEWHERE, 444)));
    check(&mut world, &passes("nor is another pod", syn(POD_2, ELSEWHERE, 443)));
}

#[test]
fn xdp_pod_ingress_a_flow_of_an_earlier_pod_covers_nothing() {
    let mut world = World::new();
    let frame = syn(POD, ORIGIN, 443);
    assert_eq!(world.out(&frame).verdict, TCX_NEXT);
    world.counted();
    let later = Packet::tcp((POD, 40000), (ORIGIN, 443), ACK).frame();
    check(&mut world, &covered("the pod that opened it", later.clone()));
    // A class of its own, towards which no verdict leads.
    world.next_pod(POD, 9);
    check(&mut world, &passes("the next pod with its address", later));
}

#[test]
fn xdp_pod_ingress_a_pod_whose_rules_have_no_room_opens_nothing_outside() {
    let mut world = World::new();
    world.pod_class(1, POD, POD_REFUSED);
    let inside = Ipv4Addr::new(10, 244, 2, 9);
    for (destination, covered) in [(ORIGIN, true), (ELSEWHERE, true), (inside, false)] {
        let out = world.pod(&syn(POD, destination, 443), 0);
        assert_eq!((out.verdict, out.mark & MARK != 0), (TCX_NEXT, covered), "{destination}");
    }
    world.counted();
    world.out(&syn(POD, ELSEWHERE, 443));
    assert_eq!(world.counted(), [("refusal_sent", 1), ("refuse_unavailable", 1)]);
}

#[test]
fn xdp_pod_ingress_an_address_with_another_mac_is_a_stranger() {
    let mut world = World::new();
    let inside = Ipv4Addr::new(10, 244, 2, 9);
    let named = |mac| PodValue { class: 1, incarnation: INCARNATION, mac, pad: 0 };
    // Frames of these tests come from ROUTER_MAC.
    world.set_pod(1, POD, named(ROUTER_MAC));
    check(&mut world, &covered("the pod's own device", syn(POD, ORIGIN, 443)));
    for mac in [NODE_MAC, MAC_LEAVING] {
        world.set_pod(1, POD, named(mac));
        check(&mut world, &dropped("another device", syn(POD, ORIGIN, 443), Counter::DropUnknownPod));
        check(&mut world, &dropped("uncovered too", syn(POD, ELSEWHERE, 443), Counter::DropUnknownPod));
        check(&mut world, &passes("inside the cluster", syn(POD, inside, 53)));
    }
    // Also where the address is in no known range.
    let outside = Ipv4Addr::new(10, 9, 9, 9);
    world.set_pod(1, outside, named(NODE_MAC));
    check(&mut world, &dropped("in no range", syn(outside, ORIGIN, 443), Counter::DropUnknownPod));
    world.set_config(&Config { hold_unknown: 0, ..config() });
    check(&mut world, &passes("where strangers pass it is no pod's", syn(POD, ORIGIN, 443)));
}
