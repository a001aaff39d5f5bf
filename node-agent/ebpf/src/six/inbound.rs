//! `uplink_ingress`: an IPv6 packet for an egress /64 goes to the node whose slice it names, and there, translated back, to the
//! pod whose suffix it bears. Whether somebody there asked for it, conntrack knows: a word before the packet (metadata) lets
//! the program at tcx ingress set the mark by which nftables tells such packets from others.

use super::lookup::{self, FLOWS6, FRAGMENTED6_IN, SUFFIXES};
use super::single::arrive;
use super::{
    FIRST, ICMPV6, Ipv6, LATER, Layers, START, follow_headers_xdp, has_ports, is_error, load, ndp, ports,
    too_big,
};
use crate::headers::{ETH_LEN, Ethernet};
use crate::maps::{self, SLOTS};
use crate::meter;
use crate::steer::Step;
use crate::translated;
use crate::tunnel;
use crate::xdp;
use aegis_common::*;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::bindings::{BPF_ANY, xdp_md};
use aya_ebpf::helpers::bpf_xdp_store_bytes;
use aya_ebpf::programs::XdpContext;

/// Offset of the source address in the IPv6 header, and of the destination.
pub const SOURCE: u32 = 8;
pub const DESTINATION: u32 = 24;

/// The packet is not from outside, but from another node, which says that it is for this one.
pub const STEERED: u32 = 1;
/// The same, since this is where fragments of the datagram meet.
pub const FRAGMENT: u32 = 2;

/// Whether the frame has an IPv6 packet.
#[inline(always)]
pub fn is(ctx: &XdpContext) -> bool {
    // SAFETY: within the frame.
    xdp::at::<Ethernet>(ctx, 0).is_some_and(|ethernet| unsafe { (*ethernet).kind } == super::ETH_P_IPV6)
}

/// Whatever is to be done. Its parts are functions of their own beside each other, since the stack is nearly full here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn arrive6(context: *mut xdp_md, steered: u32) -> u32 {
    if steered == 0
        && let Some(verdict) = ndp::answer(context)
    {
        return verdict;
    }
    let mut verdict = arrive::to_single(context, steered);
    if verdict == arrive::NOT_OURS {
        verdict = judge6(context, steered);
    }
    match verdict {
        ANSWER => too_big::answer6(context),
        verdict if verdict >= MEET => meet6(context, verdict - MEET),
        verdict if verdict >= SEND => send6(context, verdict - SEND),
        verdict => verdict,
    }
}

/// It is too big for the tunnel.
pub const ANSWER: u32 = 100;
/// It is for the peer whose index is added to this.
pub const SEND: u32 = 0x1_0000;
/// Its fragments meet at the peer whose index is added to this.
pub const MEET: u32 = 0x2_0000;

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge6(context: *mut xdp_md, steered: u32) -> u32 {
    let ctx = &XdpContext::new(context);
    let (Some(config), Some(_), Some(ip)) = (maps::config(), lookup::config(), header(ctx)) else {
        return if steered != 0 { XDP_DROP } else { XDP_PASS };
    };
    let step = match lookup::network(&ip.destination) {
        None if steered == 0 => return XDP_PASS,
        None => Step::Drop(Counter::DropNotOwner),
        Some(_) if !ip.is_sound() || ETH_LEN as u32 + ip.length() > xdp::length(ctx) as u32 => {
            Step::Drop(Counter::DropMalformedIn)
        }
        Some(network) => to_owner(ctx, config, &ip, &network, steered),
    };
    match step {
        Step::Done(verdict) => verdict,
        Step::Drop(reason) => {
            maps::count(reason, ip.length());
            XDP_DROP
        }
    }
}

/// The IPv6 header of a frame that has one.
#[inline(always)]
pub fn header(ctx: &XdpContext) -> Option<Ipv6> {
    let ip = xdp::at::<Ipv6>(ctx, ETH_LEN)?;
    // SAFETY: within the frame.
    Some(unsafe { *ip })
}

#[inline(always)]
fn to_owner(ctx: &XdpContext, config: &Config, ip: &Ipv6, network: &NetworkValue, steered: u32) -> Step {
    let slice = u32::from(slice_of(&ip.destination));
    let owner = match slice {
        FIRST_SLICE..SLOTS_PER_ADDRESS => {
            SLOTS.get(network.index * SLOTS_PER_ADDRESS + slice).map_or(0, |slot| slot.peer)
        }
        _ => 0,
    };
    if owner == 0 {
        return Step::Drop(Counter::DropNoOwner);
    }
    if owner == config.own_peer {
        if lookup::deadline(network) == Deadline::Hard {
            return Step::Drop(Counter::DropFenced);
        }
        let mut layers = Layers::default();
        return match to_pod(ctx.ctx, &raw const ip.destination, &raw mut layers) {
            verdict @ (TAKEN | ERROR) => {
                maps::count(Counter::Reverse, ip.length());
                if verdict == TAKEN && meter::metered() {
                    received6(ctx.ctx, &raw const ip.destination, &raw const layers, ip.length());
                }
                Step::Done(XDP_PASS)
            }
            UNSOUND => Step::Drop(Counter::DropMalformedIn),
            NO_METADATA => Step::Drop(Counter::DropNoMetadata),
            _ => Step::Drop(Counter::DropNoFlow),
        };
    }
    // Two nodes whose tables disagree would play ping-pong.
    if steered != 0 {
        return Step::Drop(Counter::DropNotOwner);
    }
    Step::Done(if ip.length() > config.tunnel_mtu { ANSWER } else { SEND + owner })
}

/// Sends a packet to the peer that owns its slice.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn send6(context: *mut xdp_md, owner: u32) -> u32 {
    send(context, owner, VNI_STEER)
}

/// Sends a fragment to the peer where those of its datagram meet. (Two functions, since the stack has no room for the identifier.)
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn meet6(context: *mut xdp_md, home: u32) -> u32 {
    send(context, home, VNI_FRAGMENT)
}

#[inline(always)]
fn send(context: *mut xdp_md, peer: u32, vni: u32) -> u32 {
    let ctx = &XdpContext::new(context);
    let (Some(config), Some(ip)) = (maps::config(), xdp::at::<Ipv6>(ctx, ETH_LEN)) else { return XDP_DROP };
    // Not copied, for the sake of the stack.
    // SAFETY: within the frame.
    let (ip, length) = unsafe { (&*ip, (*ip).length()) };
    let hash = ip.source[0] ^ ip.source[1] ^ ip.source[2] ^ ip.source[3];
    let port = tunnel::source_port(hash, ip.destination[3], ip.destination[2]);
    match tunnel::send_ipv6(ctx, config, peer, port, length, vni) {
        Step::Done(verdict) => verdict,
        Step::Drop(reason) => {
            maps::count(reason, length);
            XDP_DROP
        }
    }
}

const TAKEN: u32 = 0;
const NOBODY: u32 = 1;
const UNSOUND: u32 = 2;
const NO_METADATA: u32 = 3;
/// As [`TAKEN`]: an ICMPv6 error, which is not metered.
const ERROR: u32 = 4;

/// Translates a packet back, and gives its layers.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn to_pod(context: *mut xdp_md, destination: *const Address6, layers: *mut Layers) -> u32 {
    let ctx = &XdpContext::new(context);
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let (Some(egress), false) = (unsafe { destination.as_ref() }, layers.is_null()) else { return UNSOUND };
    // SAFETY: copied at once.
    let Some(pod) = (unsafe { SUFFIXES.get(&egress[3]) }).copied() else { return NOBODY };
    let pod = pod.address;
    // No pod has any other address here.
    if egress_address(&pod, network_of(egress), slice_of(egress), egress[3]) != *egress {
        return NOBODY;
    }
    let Some(ip) = header(ctx) else { return UNSOUND };
    if follow_headers_xdp(context, u32::from(ip.next), START as u32, layers) == 0 {
        return UNSOUND;
    }
    // SAFETY: not null, see above.
    let layers = unsafe { &*layers };
    let mut taken = TAKEN;
    if layers.protocol == u32::from(ICMPV6) && layers.fragment != LATER {
        let Some(kind) = load::<u8>(ctx, layers.offset) else { return UNSOUND };
        if is_error(kind) {
            taken = ERROR;
            // It quotes what the pod has sent, as it was outside.
            let source = layers.offset + 8 + SOURCE;
            match load::<Address6>(ctx, source) {
                None => return UNSOUND,
                Some(quoted) if quoted != *egress => return NOBODY,
                Some(_) if !store(ctx, source, &pod) => return UNSOUND,
                Some(_) => {}
            }
        }
    }
    if !store(ctx, ETH_LEN as u32 + DESTINATION, &pod) {
        return UNSOUND;
    }
    if translated::write_word(context, TRANSLATED_IN) == 0 {
        return NO_METADATA;
    }
    taken
}

/// Counts a packet that was translated back by its flow, or for the rest of the /64 if none is known: it was forgotten, nobody has
/// asked for the packet, or a later fragment has come before the first.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn received6(
    context: *mut xdp_md,
    destination: *const Address6,
    layers: *const Layers,
    bytes: u32,
) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(egress) = (unsafe { destination.as_ref() }) else { return 0 };
    let network = network_of(egress);
    let number = match meter_of(context, network, layers) {
        NO_METER => meter::rest_of(&raw const network),
        number => number,
    };
    meter::receives(number, bytes);
    0
}

/// In place of a number: none.
const NO_METER: u32 = u32::MAX;

/// The meter of the flow of a packet that was translated back.
#[inline(always)]
fn meter_of(context: *mut xdp_md, network: Network, layers: *const Layers) -> u32 {
    let ctx = &XdpContext::new(context);
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let (Some(layers), Some(ip)) = (unsafe { layers.as_ref() }, header(ctx)) else { return NO_METER };
    let mut key = Flow6Key { local: ip.destination, remote: ip.source, ports: 0, protocol: layers.protocol };
    if layers.fragment == LATER {
        (key.ports, key.protocol) = (layers.id, FRAGMENTED);
        // SAFETY: copied at once; a mixture of two leads to another flow of the same pod at worst.
        let Some(first) = (unsafe { FRAGMENTED6_IN.get(&key) }).copied() else { return NO_METER };
        (key.ports, key.protocol) = (first.ports, first.protocol);
    } else if has_ports(layers.protocol) {
        let Some(first) = load(ctx, layers.offset) else { return NO_METER };
        key.ports = ports(layers.protocol as u8, first);
        if layers.protocol != u32::from(ICMPV6) {
            key.ports = key.ports.rotate_left(16);
        }
    }
    // SAFETY: read at once.
    let Some(flow) = (unsafe { FLOWS6.get(&key) }) else { return NO_METER };
    let (meter, of) = (flow.meter, flow.network);
    if of != network {
        return NO_METER;
    }
    if layers.fragment == FIRST {
        let flow = Datagram6Value { ports: key.ports, protocol: key.protocol, seen: maps::now() };
        (key.ports, key.protocol) = (layers.id, FRAGMENTED);
        let _ = FRAGMENTED6_IN.insert(&key, &flow, u64::from(BPF_ANY));
    }
    meter
}

#[inline(always)]
pub fn store(ctx: &XdpContext, offset: u32, address: &Address6) -> bool {
    let from = core::ptr::from_ref(address).cast_mut().cast();
    // SAFETY: the helper reads the address only.
    unsafe { bpf_xdp_store_bytes(ctx.ctx, offset, from, size_of::<Address6>() as u32) == 0 }
}
