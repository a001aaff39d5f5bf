//! Incoming fragments: all of a datagram meet at one node (its home), where the first one's port is remembered and the
//! others follow it.

use crate::flow;
use crate::maps::{self, FRAGMENTS_IN, HOMES};
use crate::reverse;
use crate::steer::{self, Inbound, Step, owner};
use crate::tunnel::{self, Arrival};
use aegis_common::*;
use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::programs::XdpContext;

#[inline(always)]
pub fn key(inbound: &Inbound) -> FragmentKey {
    FragmentKey {
        source: inbound.ip.source,
        destination: inbound.ip.destination,
        id: u16::from_be(inbound.ip.id),
        protocol: inbound.ip.protocol,
        pad: 0,
    }
}

/// The node where the datagram's fragments meet; 0 = nobody.
#[inline(always)]
fn home(inbound: &Inbound) -> u32 {
    let hash = mix(inbound.ip.source ^ u32::from(inbound.ip.id) << 8 ^ u32::from(inbound.ip.protocol));
    HOMES.get(inbound.address * HOMES_PER_ADDRESS + (hash & (HOMES_PER_ADDRESS - 1))).copied().unwrap_or(0)
}

/// A first fragment. `None`: go on like with a whole packet.
#[inline(always)]
pub fn first(ctx: &XdpContext, config: &Config, inbound: &Inbound, port: u16) -> Option<Step> {
    if inbound.arrival == Arrival::Wire {
        let home = home(inbound);
        if home != 0 && home != config.own_peer {
            return Some(tunnel::send(ctx, config, inbound, home, VNI_FRAGMENT));
        }
    }
    let (pod, peer) = pod_of(ctx, inbound).unwrap_or((0, 0));
    let value = FragmentValue { address: pod, port, peer, seen: maps::now() };
    let _ = FRAGMENTS_IN.insert(&key(inbound), &value, u64::from(BPF_ANY));
    None
}

/// A fragment without ports.
#[inline(always)]
pub fn later(ctx: &XdpContext, config: &Config, inbound: &Inbound) -> Step {
    if inbound.arrival == Arrival::Wire {
        let home = home(inbound);
        if home != 0 && home != config.own_peer {
            return tunnel::send(ctx, config, inbound, home, VNI_FRAGMENT);
        }
    }
    let Some(first) = maps::first_fragment(&FRAGMENTS_IN, &key(inbound)) else {
        return Step::Drop(Counter::DropFragmentIn);
    };
    if first.address == 0 {
        return forward(ctx, config, inbound, first.port);
    }
    let (pod, peer) = (first.address, first.peer);
    if peer != 0 && u32::from(inbound.ip.total_length()) > config.tunnel_mtu {
        return Step::Drop(Counter::DropTooBig);
    }
    match reverse::destination(ctx, inbound, pod) {
        Some(()) if peer != 0 => steer::to_pod_elsewhere(ctx, config, inbound, peer),
        Some(()) => {
            maps::count(Counter::Reverse, u32::from(inbound.ip.total_length()));
            Step::Done(XDP_PASS)
        }
        None => Step::Drop(Counter::DropMalformedIn),
    }
}

/// Sends a later fragment after its first one, to the owner of the port.
#[inline(always)]
fn forward(ctx: &XdpContext, config: &Config, inbound: &Inbound, port: u16) -> Step {
    let owner = owner(inbound.address, port);
    if owner == 0 || owner == config.own_peer || inbound.arrival == Arrival::Steered {
        return Step::Drop(Counter::DropFragmentIn);
    }
    tunnel::send(ctx, config, inbound, owner, VNI_STEER)
}

/// The pod whose flow a first fragment belongs to and the node it is on, if the flow is translated here.
#[inline(always)]
fn pod_of(ctx: &XdpContext, inbound: &Inbound) -> Option<(u32, u16)> {
    let key = reverse::key(ctx, inbound)?;
    let back = flow::find_back(&key);
    (back.exists() && back.value.buried == 0).then_some((back.value.pod, back.value.peer))
}
