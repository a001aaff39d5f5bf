//! On a gateway: a packet of another node's pod is translated and sent on, without the host stack.

use crate::answer;
use crate::checksum::{apply, difference, difference16};
use crate::headers::{self, ACK, ETH_LEN, Ipv4, SYN, Transport};
use crate::maps::{self, ADDRESSES, FORWARD, FRAGMENTS_OUT};
use crate::refuse;
use crate::reverse::{replace_checksum, replace_word};
use crate::route;
use crate::snat::{self, Stop, fragment_key, remove};
use crate::steer::{Inbound, Step};
use crate::tunnel::{self, Arrival, Received};
use crate::xdp;
use aegis_common::*;
use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::programs::XdpContext;

const MALFORMED: Stop = Stop::Drop(Counter::DropMalformedIn);

/// Handles the packet, whose outer headers are gone.
#[inline(always)]
pub fn run(
    ctx: &XdpContext,
    config: &Config,
    ip: &Ipv4,
    transport_offset: usize,
    received: &Received,
) -> Step {
    match translate(ctx, ip, transport_offset, received) {
        Ok(egress) => match route::find(ctx, ip.protocol, egress, ip.destination) {
            Some(way) => {
                maps::count(Counter::Guest, u32::from(ip.total_length()));
                route::leave(ctx, &way)
            }
            None => Step::Drop(Counter::DropNoNeighbour),
        },
        Err(Stop::Drop(reason)) => Step::Drop(reason),
        Err(Stop::Refuse(reason)) => refuse(ctx, config, ip, transport_offset, received.peer, reason),
    }
}

/// Gives the egress address.
#[inline(always)]
fn translate(ctx: &XdpContext, ip: &Ipv4, transport_offset: usize, received: &Received) -> Result<u32, Stop> {
    // SAFETY: only presence matters.
    if unsafe { ADDRESSES.get(&ip.source) }.is_some() {
        return Err(Stop::Drop(Counter::DropForged));
    }
    if ip.is_later_fragment() {
        let first = maps::first_fragment(&FRAGMENTS_OUT, &fragment_key(ip));
        let first = first.ok_or(Stop::Drop(Counter::DropFragmentOut))?;
        source(ctx, ip, first.address).ok_or(MALFORMED)?;
        return Ok(first.address);
    }
    // SAFETY: read at once.
    let named = unsafe { ADDRESSES.get(&received.name) }.map_or(0, |address| address.allocation);
    let Some(allocation) = named.checked_sub(1) else {
        return Err(Stop::Refuse(Counter::RefuseUnavailable));
    };
    // SAFETY: within the frame.
    let transport = unsafe { *xdp::at::<Transport>(ctx, transport_offset).ok_or(MALFORMED)? };
    let flags = match ip.protocol {
        headers::TCP => {
            let header = xdp::at::<[u8; 20]>(ctx, transport_offset).ok_or(MALFORMED)?;
            // SAFETY: within the frame.
            unsafe { (*header)[13] }
        }
        headers::UDP => 0,
        // Errors about packets that came back through here: the gateway has no part in the pod's answers to them yet.
        headers::ICMP if transport.icmp_type() == headers::ICMP_ECHO => 0,
        headers::ICMP => return Err(Stop::Drop(Counter::RefuseNoFlow)),
        _ => return Err(Stop::Drop(Counter::RefuseProtocol)),
    };
    let key = snat::key(ip, &transport);
    let peer = received.peer as u16;
    let (egress, port) = match FORWARD.get_ptr_mut(&key) {
        // SAFETY: map values stay readable until the program ends.
        Some(flow) if belongs(unsafe { &*flow }, &key, allocation, peer) => {
            // SAFETY: as above.
            let flow = unsafe { &mut *flow };
            snat::touch(flow, &key, flags);
            (flow.egress, flow.egress_port)
        }
        other => {
            if ip.protocol == headers::TCP && flags & (SYN | ACK) != SYN {
                return Err(Stop::Refuse(Counter::RefuseNoFlow));
            }
            if let Some(flow) = other {
                // SAFETY: as above.
                remove(&key, unsafe { &*flow });
            }
            let flow = snat::claim(
                &key,
                allocation,
                peer,
                ForwardValue { peer, ..snat::fresh(&key, allocation, flags) },
            )?;
            (flow.egress, flow.egress_port)
        }
    };
    if ip.is_first_fragment() {
        let value = FragmentValue { address: egress, port, peer: 0, seen: maps::now() };
        let _ = FRAGMENTS_OUT.insert(&fragment_key(ip), &value, u64::from(BPF_ANY));
    }
    rewrite(ctx, ip, transport_offset, &transport, egress, port).ok_or(MALFORMED)?;
    Ok(egress)
}

/// Whether a flow is the one that the node speaks of: the pod's address may have been another pod's, of another account or
/// on another node.
#[inline(always)]
fn belongs(flow: &ForwardValue, key: &FlowKey, allocation: u32, peer: u16) -> bool {
    flow.is_guest(key) && u32::from(flow.allocation) == allocation && flow.peer == peer
}

/// Writes source address and port, with all checksums.
#[inline(always)]
fn rewrite(
    ctx: &XdpContext,
    ip: &Ipv4,
    offset: usize,
    transport: &Transport,
    egress: u32,
    port: u16,
) -> Option<()> {
    let ports = difference16(transport.source_port().to_be(), port.to_be());
    match ip.protocol {
        headers::TCP => {
            replace_checksum(ctx, offset + 16, difference(ip.source, egress) + ports)?;
            replace_word(ctx, offset, port.to_be())?;
        }
        headers::UDP => {
            // SAFETY: within the frame.
            let checksum = unsafe { *xdp::at::<u16>(ctx, offset + 6)? };
            if checksum != 0 {
                let updated = apply(checksum, difference(ip.source, egress) + ports);
                replace_word(ctx, offset + 6, if updated == 0 { 0xffff } else { updated })?;
            }
            replace_word(ctx, offset, port.to_be())?;
        }
        _ => {
            let id = difference16(transport.icmp_id().to_be(), port.to_be());
            replace_checksum(ctx, offset + 2, id)?;
            replace_word(ctx, offset + 4, port.to_be())?;
        }
    }
    source(ctx, ip, egress)
}

/// Writes the source address, with the IP checksum.
#[inline(always)]
fn source(ctx: &XdpContext, ip: &Ipv4, egress: u32) -> Option<()> {
    let place = xdp::at::<Ipv4>(ctx, ETH_LEN)?;
    // SAFETY: within the frame.
    unsafe {
        (*place).checksum = apply((*place).checksum, difference(ip.source, egress));
        (*place).source = egress;
    }
    Some(())
}

/// Answers the pod in the origin's place, through its node.
#[inline(always)]
fn refuse(
    ctx: &XdpContext,
    config: &Config,
    ip: &Ipv4,
    transport_offset: usize,
    peer: u32,
    reason: Counter,
) -> Step {
    if !refuse::allowed(config) || (ip.protocol != headers::TCP && transport_offset != ETH_LEN + 20) {
        return Step::Drop(reason);
    }
    maps::count(reason, u32::from(ip.total_length()));
    let answer = match ip.protocol {
        headers::TCP => answer::reset(ctx, ip, transport_offset),
        _ => answer::unreachable(ctx, ip, refuse::code(reason), 0),
    };
    let Some(ip) = answer else { return Step::Drop(Counter::DropMalformedIn) };
    maps::count(Counter::RefusalSent, 0);
    let inbound = Inbound { ip, transport_offset: ETH_LEN + 20, address: 0, arrival: Arrival::Guest };
    tunnel::send(ctx, config, &inbound, peer, VNI_RETURN)
}
