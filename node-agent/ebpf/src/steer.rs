//! `uplink_ingress`: whose reply is this?

use crate::arp;
use crate::fence;
use crate::fragment;
use crate::guest;
use crate::headers::{self, ETH_LEN, ETH_P_IP, Ethernet, Ipv4, Transport};
use crate::maps::{self, ADDRESSES, SLOTS};
use crate::returned;
use crate::reverse;
use crate::six::inbound as six;
use crate::translated;
use crate::tunnel::{self, Arrival, Outer, Received};
use crate::xdp;
use aegis_common::*;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::programs::XdpContext;

/// In place of a verdict: the packet is for a pod of this node, by the fast path.
const PASS_FAST: u32 = 100;
/// The same, for a socket of this node.
const PASS_BOUND: u32 = 101;

/// What is to happen to a packet for an egress address.
pub enum Step {
    /// The program ends with this verdict.
    Done(u32),
    /// Dropped, with its reason.
    Drop(Counter),
}

/// A packet for an egress address, as far as it has been read.
pub struct Inbound {
    pub ip: Ipv4,
    /// Offset of the transport header from the start of the frame.
    pub transport_offset: usize,
    /// Index of the egress address.
    pub address: u32,
    /// How the packet got here.
    pub arrival: Arrival,
}

#[inline(always)]
pub fn run(ctx: &XdpContext) -> u32 {
    let Some(config) = maps::config() else { return XDP_PASS };
    let Some(ip) = ipv4(ctx) else {
        return if six::is(ctx) { six::arrive6(ctx.ctx, 0) } else { arp::answer(ctx) };
    };
    let wire = Received { arrival: Arrival::Wire, peer: 0, name: 0 };
    let received = if ip.destination == config.tunnel_address {
        match tunnel::receive(ctx, config, &ip) {
            Ok(Outer::Inner(received)) => received,
            Ok(Outer::Foreign) => return XDP_PASS,
            Ok(Outer::Answered(verdict)) => return verdict,
            Err(reason) => {
                maps::count(reason, u32::from(ip.total_length()));
                return XDP_DROP;
            }
        }
    } else {
        wire
    };
    let arrival = received.arrival;
    if (arrival == Arrival::Steered || arrival == Arrival::Fragment) && six::is(ctx) {
        return six::arrive6(ctx.ctx, if arrival == Arrival::Steered { six::STEERED } else { six::FRAGMENT });
    }
    let Some(ip) = ipv4(ctx) else {
        maps::count(Counter::DropMalformedIn, 0);
        return XDP_DROP;
    };
    // SAFETY: read at once.
    let address = match unsafe { ADDRESSES.get(&ip.destination) } {
        Some(address) => address.index,
        None if arrival == Arrival::Wire => return XDP_PASS,
        None if matches!(arrival, Arrival::Guest | Arrival::Returned | Arrival::Refused) => 0,
        None => {
            maps::count(Counter::DropNotOwner, u32::from(ip.total_length()));
            return XDP_DROP;
        }
    };
    let bytes = u32::from(ip.total_length());
    let step = match ip.header_length() {
        Some(length)
            if usize::from(ip.total_length()) >= length
                && ETH_LEN + usize::from(ip.total_length()) <= xdp::length(ctx) =>
        {
            let inbound = Inbound { ip, transport_offset: ETH_LEN + length, address, arrival };
            match arrival {
                Arrival::Guest => guest::run(ctx, config, &ip, inbound.transport_offset, &received),
                Arrival::Returned | Arrival::Refused => returned::run(ctx, &inbound, received.peer),
                _ => handle(ctx, config, &inbound),
            }
        }
        _ => Step::Drop(Counter::DropMalformedIn),
    };
    match step {
        // For a pod of this node, translated back.
        Step::Done(XDP_PASS) => {
            translated::tell(ctx.ctx, TRANSLATED_IN);
            XDP_PASS
        }
        Step::Done(PASS_FAST) => {
            translated::tell(ctx.ctx, TRANSLATED_FAST);
            XDP_PASS
        }
        Step::Done(PASS_BOUND) => XDP_PASS,
        Step::Done(verdict) => verdict,
        Step::Drop(reason) => {
            maps::count(reason, bytes);
            XDP_DROP
        }
    }
}

/// The IP header of an IPv4 frame.
#[inline(always)]
fn ipv4(ctx: &XdpContext) -> Option<Ipv4> {
    let ethernet = xdp::at::<Ethernet>(ctx, 0)?;
    // SAFETY: within the frame.
    if unsafe { (*ethernet).kind } != ETH_P_IP {
        return None;
    }
    let ip = xdp::at::<Ipv4>(ctx, ETH_LEN)?;
    // SAFETY: within the frame.
    Some(unsafe { *ip })
}

#[inline(always)]
fn handle(ctx: &XdpContext, config: &Config, inbound: &Inbound) -> Step {
    if inbound.ip.is_later_fragment() {
        return fragment::later(ctx, config, inbound);
    }
    let port = match egress_port(ctx, inbound) {
        Ok(port) => port,
        Err(reason) => return Step::Drop(reason),
    };
    if inbound.ip.is_first_fragment() {
        if let Some(step) = fragment::first(ctx, config, inbound, port) {
            return step;
        }
    }
    to_owner(ctx, config, inbound, port)
}

/// The port (or identifier) of the egress address that the packet is for.
#[inline(always)]
fn egress_port(ctx: &XdpContext, inbound: &Inbound) -> Result<u16, Counter> {
    let malformed = Counter::DropMalformedIn;
    let transport = xdp::at::<Transport>(ctx, inbound.transport_offset).ok_or(malformed)?;
    // What follows the packet in the frame is padding.
    let needed = if inbound.ip.protocol == headers::TCP { 20 } else { size_of::<Transport>() };
    if inbound.transport_offset + needed > ETH_LEN + usize::from(inbound.ip.total_length()) {
        return Err(malformed);
    }
    // SAFETY: within the frame.
    let transport = unsafe { *transport };
    match inbound.ip.protocol {
        headers::TCP | headers::UDP => Ok(transport.destination_port()),
        headers::ICMP if transport.icmp_type() == headers::ICMP_ECHO_REPLY => Ok(transport.icmp_id()),
        headers::ICMP if headers::is_icmp_error(transport.icmp_type()) => {
            reverse::quoted(ctx, inbound).map(|quoted| quoted.key.local_port).ok_or(malformed)
        }
        // Echo requests and the like: nobody here asked for them.
        headers::ICMP => Err(Counter::DropNoFlow),
        _ => Err(malformed),
    }
}

/// Translates the packet if the port is ours, and sends it on if it is another node's.
#[inline(always)]
pub fn to_owner(ctx: &XdpContext, config: &Config, inbound: &Inbound, port: u16) -> Step {
    let owner = owner(inbound.address, port);
    if owner == 0 {
        return Step::Drop(Counter::DropNoOwner);
    }
    if owner == config.own_peer {
        // It may be for the node that has the slice by now, and whatever the pod answered could not leave.
        if fence::is_closed(inbound.ip.destination) {
            return Step::Drop(Counter::DropFenced);
        }
        return match reverse::translate(ctx, config, inbound) {
            0 => {
                maps::count(Counter::Reverse, u32::from(inbound.ip.total_length()));
                Step::Done(XDP_PASS)
            }
            reverse::FAST => {
                maps::count(Counter::Reverse, u32::from(inbound.ip.total_length()));
                Step::Done(PASS_FAST)
            }
            reverse::BOUND => {
                maps::count(Counter::BoundIn, u32::from(inbound.ip.total_length()));
                Step::Done(PASS_BOUND)
            }
            reverse::DROPPED => Step::Done(XDP_DROP),
            reverse::TOO_BIG => tunnel::too_big(ctx, config, inbound),
            peer => to_pod_elsewhere(ctx, config, inbound, peer as u16),
        };
    }
    // A steered packet is never steered again: two nodes whose tables disagree would play ping-pong.
    if inbound.arrival == Arrival::Steered {
        return Step::Drop(Counter::DropNotOwner);
    }
    tunnel::send(ctx, config, inbound, owner, VNI_STEER)
}

/// Sends a packet, translated back, to the node of its pod.
#[inline(always)]
pub fn to_pod_elsewhere(ctx: &XdpContext, config: &Config, inbound: &Inbound, peer: u16) -> Step {
    tunnel::send(ctx, config, inbound, u32::from(peer), VNI_RETURN)
}

/// The peer that owns a port of an address; 0 = nobody.
#[inline(always)]
pub fn owner(address: u32, port: u16) -> u32 {
    let slice = u32::from(port >> 8);
    if slice < FIRST_SLICE {
        return 0;
    }
    SLOTS.get(address * SLOTS_PER_ADDRESS + slice).map_or(0, |slot| slot.peer)
}
