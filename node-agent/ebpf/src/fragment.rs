//! Incoming fragments: all of a datagram meet at one node (its home), where the first one's port is remembered and the
//! others follow it. One that comes before the first is given to the agent, which sends it after that.

use crate::flow;
use crate::headers::{self, ETH_LEN};
use crate::maps::{self, EARLY, EARLY_SCRATCH, FRAGMENTS_IN, HOMES};
use crate::meter;
use crate::reverse;
use crate::steer::{self, Inbound, Step, owner};
use crate::tunnel::{self, Arrival};
use aegis_common::*;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::bindings::{BPF_ANY, xdp_md};
use aya_ebpf::helpers::bpf_xdp_load_bytes;
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
    let (pod, peer, meter) = pod_of(ctx, inbound).unwrap_or((0, 0, 0));
    let value = FragmentValue { address: pod, port, peer, seen: maps::now(), meter, ..Default::default() };
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
    let key = key(inbound);
    let Some(first) = maps::first_fragment(&FRAGMENTS_IN, &key) else {
        let length = ETH_LEN as u64 + u64::from(inbound.ip.total_length());
        return match keep(ctx.ctx, &raw const key, inbound.address, length) {
            0 => Step::Drop(Counter::DropFragmentIn),
            _ => Step::Done(XDP_DROP),
        };
    };
    if first.address == 0 {
        return forward(ctx, config, inbound, first.port);
    }
    let (pod, peer) = (first.address, first.peer);
    if peer != 0 && u32::from(inbound.ip.total_length()) > config.tunnel_mtu {
        return Step::Drop(Counter::DropTooBig);
    }
    meter::receives(u32::from(first.meter), u32::from(inbound.ip.total_length()));
    match reverse::destination(ctx, inbound, pod) {
        Some(()) if peer != 0 => steer::to_pod_elsewhere(ctx, config, inbound, peer),
        Some(()) => {
            maps::count(Counter::Reverse, u32::from(inbound.ip.total_length()));
            Step::Done(XDP_PASS)
        }
        None => Step::Drop(Counter::DropMalformedIn),
    }
}

/// Gives the agent a frame of `length` bytes, a fragment whose first one is not here yet. 0 = it is not
/// kept. A function of its own for the verifier's sake, like `take` in `ports`, and for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn keep(ctx: *mut xdp_md, key: *const FragmentKey, address: u32, length: u64) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    // The first one of another protocol would lead nowhere.
    if key.protocol != headers::TCP && key.protocol != headers::UDP && key.protocol != headers::ICMP {
        return 0;
    }
    let Some(scratch) = EARLY_SCRATCH.get_ptr_mut(0) else { return 0 };
    // SAFETY: a per-CPU value that only this function uses; programs on one CPU do not nest here.
    let scratch = unsafe { &mut *scratch };
    let now = maps::now();
    if scratch.second != now {
        scratch.second = now;
        scratch.kept = 0;
    }
    if scratch.kept >= EARLY_PER_SECOND || length < ETH_LEN as u64 || length > EARLY_FRAME as u64 {
        return 0;
    }
    // SAFETY: a field of the context.
    let ifindex = unsafe { (*ctx).ingress_ifindex };
    scratch.header = EarlyHeader { key: *key, address, ifindex, seen: now, length: length as u32 };
    // SAFETY: `length` bytes have room.
    if unsafe { bpf_xdp_load_bytes(ctx, 0, scratch.frame.as_mut_ptr().cast(), length as u32) } != 0 {
        return 0;
    }
    let record = (&raw const scratch.header).cast::<u8>();
    // SAFETY: the frame follows the header.
    let record = unsafe { core::slice::from_raw_parts(record, size_of::<EarlyHeader>() + length as usize) };
    if EARLY.output::<[u8]>(record, 0).is_err() {
        return 0;
    }
    scratch.kept += 1;
    maps::count(Counter::FragmentKept, length as u32 - ETH_LEN as u32);
    1
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

/// The pod whose flow a first fragment belongs to, the node it is on, and the flow's meter, if the flow is translated here.
#[inline(always)]
fn pod_of(ctx: &XdpContext, inbound: &Inbound) -> Option<(u32, u16, u16)> {
    let key = reverse::key(ctx, inbound)?;
    let back = flow::find_back(&key);
    (back.exists() && back.value.buried == 0).then(|| (back.value.pod, back.value.peer, back.meter()))
}
