//! What comes in for a single address: it goes to the node whose slice has the port, and there, translated back, to the pod whose flow
//! it is of.

use super::is;
use crate::checksum::{apply, difference, difference16};
use crate::fence;
use crate::flow::{self, Back};
use crate::headers::{ACK, ETH_LEN, ICMP, SYN, TCP, UDP};
use crate::maps::{self, ADDRESSES, HOMES, OPENING};
use crate::six::inbound::{self, ANSWER, DESTINATION, MEET, SEND, SOURCE, store};
use crate::six::lookup::{FRAGMENTED6_IN, SUFFIXES};
use crate::six::{
    FIRST, ICMPV6, IPV6_LEN, Ipv6, LATER, Layers, START, WHOLE, follow_headers_xdp, is_error, load, ports,
};
use crate::steer;
use crate::translated;
use crate::xdp;
use aegis_common::*;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::bindings::{BPF_ANY, xdp_md};
use aya_ebpf::helpers::{bpf_xdp_load_bytes, bpf_xdp_store_bytes};
use aya_ebpf::programs::XdpContext;

/// In place of a verdict: the packet is for no single address.
pub const NOT_OURS: u32 = 200;

const ECHO: u8 = 128;
const ECHO_REPLY: u8 = 129;

/// A packet for a single address, as far as it has been read.
#[repr(C)]
pub struct Inbound {
    /// Key in `REVERSE` of its flow.
    key: FlowKey,
    ip: Ipv6,
    layers: Layers,
    /// Where the packet begins that it quotes; 0 if it is no error.
    quoted: u32,
    /// The same of that packet.
    about: Ipv6,
    about_layers: Layers,
}

/// Whatever is to be done: a verdict, or one of those of `inbound`. `steered`: as there.
#[inline(always)]
pub fn to_single(context: *mut xdp_md, steered: u32) -> u32 {
    match find_owner_of_single(context, steered) {
        OWN => match find_pod_of_single(context) {
            NO_POD => XDP_DROP,
            pod => to_pod_of_single(context, (pod >> 16) as u32, pod as u32 & 0xffff),
        },
        verdict => verdict,
    }
}

/// In place of a verdict: the packet is for a flow of this node.
const OWN: u32 = 201;

/// Reads a packet, and finds out who owns its port. A function of its own for the stack's sake, like all of these.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_owner_of_single(context: *mut xdp_md, steered: u32) -> u32 {
    let ctx = &XdpContext::new(context);
    let (Some(config), Some(opening)) = (maps::config(), OPENING.get_ptr_mut(0)) else { return NOT_OURS };
    // SAFETY: a per-CPU value that only one program at a time uses; programs on one CPU do not nest here.
    let inbound = unsafe { &mut (*opening).inbound };
    if !load_into(ctx, ETH_LEN as u32, &mut inbound.ip) || !is(&inbound.ip.destination) {
        return NOT_OURS;
    }
    let bytes = inbound.ip.length();
    let owner = if !inbound.ip.is_sound() || ETH_LEN as u32 + bytes > xdp::length(ctx) as u32 {
        Err(Counter::DropMalformedIn)
    } else {
        to_owner(ctx, config, inbound, steered)
    };
    owner.unwrap_or_else(|reason| drop(bytes, reason))
}

/// Copies a part of a frame to where there is room.
#[inline(always)]
fn load_into<T: Copy>(ctx: &XdpContext, offset: u32, place: &mut T) -> bool {
    // SAFETY: the helper writes all of `place`, or fails; `T` is plain data.
    unsafe { bpf_xdp_load_bytes(ctx.ctx, offset, (&raw mut *place).cast(), size_of::<T>() as u32) == 0 }
}

#[inline(always)]
fn drop(bytes: u32, reason: Counter) -> u32 {
    maps::count(reason, bytes);
    XDP_DROP
}

#[inline(always)]
fn to_owner(ctx: &XdpContext, config: &Config, inbound: &mut Inbound, steered: u32) -> Result<u32, Counter> {
    let ip = &inbound.ip;
    let egress = stand_in(&ip.destination, 0);
    // SAFETY: read at once.
    let address = unsafe { ADDRESSES.get(&egress) }.ok_or(Counter::DropNoOwner)?.index;
    inbound.key = FlowKey { local: egress, remote: stand_in(&ip.source, config.seed), ..NO_KEY };
    inbound.quoted = 0;
    if follow_headers_xdp(ctx.ctx, u32::from(ip.next), START as u32, &raw mut inbound.layers) == 0 {
        return Err(Counter::DropMalformedIn);
    }
    let too_big = ip.length() > config.tunnel_mtu;
    if inbound.layers.fragment != WHOLE {
        let home = home(address, ip, inbound.layers.id);
        if steered == 0 && home != 0 && home != config.own_peer {
            return Ok(if too_big { ANSWER } else { MEET + home });
        }
    }
    match read_inbound(ctx.ctx, config.seed) {
        READ => {}
        reason => return Err(Counter::from_index(reason).unwrap_or(Counter::DropMalformedIn)),
    }
    let owner = steer::owner(address, inbound.key.local_port);
    if owner == 0 {
        return Err(Counter::DropNoOwner);
    }
    if owner == config.own_peer {
        return if fence::is_closed(egress) { Err(Counter::DropFenced) } else { Ok(OWN) };
    }
    // Two nodes whose tables disagree would play ping-pong.
    if steered == inbound::STEERED {
        return Err(Counter::DropNotOwner);
    }
    Ok(if too_big { ANSWER } else { SEND + owner })
}

/// In place of a pod: the packet is for no flow, and was counted.
const NO_POD: u64 = u64::MAX;

/// Suffix of the pod whose flow the packet is of that `find_owner_of_single` has read, and in the lower 16 bits its port.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_pod_of_single(context: *mut xdp_md) -> u64 {
    let ctx = &XdpContext::new(context);
    let Some(opening) = OPENING.get_ptr_mut(0) else { return NO_POD };
    // SAFETY: as above.
    let inbound = unsafe { &(*opening).inbound };
    let bytes = inbound.ip.length();
    let back = flow::find_back(&inbound.key);
    let mut noted = Err(Counter::DropNoFlow);
    if back.exists() && back.value.buried == 0 {
        noted = if inbound.quoted == 0 { note(ctx, &back, inbound, bytes) } else { Ok(()) };
    }
    if let Err(reason) = noted {
        drop(bytes, reason);
        return NO_POD;
    }
    u64::from(back.value.pod) << 16 | u64::from(back.value.pod_port)
}

/// Translates the packet back.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn to_pod_of_single(context: *mut xdp_md, suffix: u32, port: u32) -> u32 {
    let ctx = &XdpContext::new(context);
    let Some(opening) = OPENING.get_ptr_mut(0) else { return XDP_DROP };
    // SAFETY: as above.
    let inbound = unsafe { &(*opening).inbound };
    let written = match (inbound.quoted, inbound.layers.fragment) {
        (_, LATER) => pod_with(suffix).map_or(0, |pod| u32::from(store(ctx, TO, &pod))),
        (0, _) => translate_single(context, suffix, port),
        _ => translate_error_single(context, suffix, port),
    };
    if written == 0 {
        return drop(inbound.ip.length(), Counter::DropMalformedIn);
    }
    maps::count(Counter::Reverse, inbound.ip.length());
    // Where there is no room for the word the flow is what was asked for, as over IPv4.
    translated::write_word(context, TRANSLATED_IN);
    XDP_PASS
}

/// Where the destination address is, from the start of the frame.
const TO: u32 = ETH_LEN as u32 + DESTINATION;

const NO_KEY: FlowKey =
    FlowKey { local: 0, remote: 0, local_port: 0, remote_port: 0, protocol: 0, pad: [0; 3] };

/// The node where the datagram's fragments meet; 0 = nobody.
#[inline(always)]
fn home(address: u32, ip: &Ipv6, id: u32) -> u32 {
    let hash = mix(stand_in(&ip.source, id));
    HOMES.get(address * HOMES_PER_ADDRESS + (hash & (HOMES_PER_ADDRESS - 1))).copied().unwrap_or(0)
}

/// In place of a reason to drop a packet.
const READ: u32 = u32::MAX;

/// Finds out of which flow a packet is: [`READ`], or the counter of why it is of none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_inbound(context: *mut xdp_md, seed: u32) -> u32 {
    let ctx = &XdpContext::new(context);
    let malformed = Counter::DropMalformedIn as u32;
    let Some(opening) = OPENING.get_ptr_mut(0) else { return malformed };
    // SAFETY: as in `find_owner_of_single`.
    let inbound = unsafe { &mut (*opening).inbound };
    let ip = &inbound.ip;
    let Layers { offset, protocol, fragment, id } = inbound.layers;
    let datagram = Flow6Key { local: ip.destination, remote: ip.source, ports: id, protocol: FRAGMENTED };
    if fragment == LATER {
        // SAFETY: copied at once.
        let Some(first) = (unsafe { FRAGMENTED6_IN.get(&datagram) }).copied() else {
            return Counter::DropFragmentIn as u32;
        };
        if maps::now().saturating_sub(first.seen) > FRAGMENT_LIFE {
            return Counter::DropFragmentIn as u32;
        }
        name(&mut inbound.key, first.ports, first.protocol);
        return READ;
    }
    if protocol != u32::from(TCP) && protocol != u32::from(UDP) && protocol != u32::from(ICMPV6) {
        return Counter::DropNoFlow as u32;
    }
    let Some(first) = load::<[u8; 8]>(ctx, offset) else { return malformed };
    if protocol == u32::from(ICMPV6) && is_error(first[0]) {
        return read_quoted(context, seed);
    }
    if protocol == u32::from(ICMPV6) && first[0] != ECHO_REPLY {
        // Echo requests and the like: nobody here asked for them.
        return Counter::DropNoFlow as u32;
    }
    let mut both = ports(protocol as u8, first);
    if protocol != u32::from(ICMPV6) {
        both = both.rotate_left(16);
    }
    name(&mut inbound.key, both, protocol);
    if fragment == FIRST {
        let flow = Datagram6Value { ports: both, protocol, seen: maps::now() };
        let _ = FRAGMENTED6_IN.insert(&datagram, &flow, u64::from(BPF_ANY));
    }
    READ
}

/// Puts ports, ours in the upper half, and the protocol into a key.
#[inline(always)]
fn name(key: &mut FlowKey, ports: u32, protocol: u32) {
    (key.local_port, key.remote_port) = ((ports >> 16) as u16, ports as u16);
    key.protocol = single_protocol(protocol);
}

/// Of an ICMPv6 error, the flow whose packet it quotes. It must be one that left from the address. See [`read_inbound`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_quoted(context: *mut xdp_md, seed: u32) -> u32 {
    let ctx = &XdpContext::new(context);
    let malformed = Counter::DropMalformedIn as u32;
    let Some(opening) = OPENING.get_ptr_mut(0) else { return malformed };
    // SAFETY: as in `find_owner_of_single`.
    let inbound = unsafe { &mut (*opening).inbound };
    let start = inbound.layers.offset + 8;
    let (about, layers) = (&mut inbound.about, &mut inbound.about_layers);
    if !load_into(ctx, start, about) || !about.is_sound() || about.source != inbound.ip.destination {
        return malformed;
    }
    let (next, behind) = (u32::from(about.next), start + IPV6_LEN as u32);
    if follow_headers_xdp(context, next, behind, &raw mut *layers) == 0 || layers.fragment == LATER {
        return malformed;
    }
    let Some(first) = load::<[u8; 8]>(ctx, layers.offset) else { return malformed };
    match layers.protocol as u8 {
        TCP | UDP => {}
        ICMPV6 if first[0] == ECHO => {}
        _ => return Counter::DropNoFlow as u32,
    }
    inbound.quoted = start;
    inbound.key.remote = stand_in(&about.destination, seed);
    name(&mut inbound.key, ports(layers.protocol as u8, first), layers.protocol);
    READ
}

/// Notes a packet of a flow.
#[inline(always)]
fn note(ctx: &XdpContext, back: &Back, inbound: &Inbound, bytes: u32) -> Result<(), Counter> {
    let mut seen = back.value.seen;
    if inbound.layers.protocol == u32::from(TCP) && inbound.layers.fragment == WHOLE {
        let flags: u8 = load(ctx, inbound.layers.offset + 13).ok_or(Counter::DropMalformedIn)?;
        // Only a connection that is being opened from our side too can meet a SYN (RFC 5382 REQ-2).
        if flags & (SYN | ACK) == SYN && seen != 0 {
            return Err(Counter::DropNoFlow);
        }
        seen = seen_after(seen, flags);
    }
    back.receive(seen, bytes);
    Ok(())
}

/// The address of the pod with a suffix.
#[inline(always)]
fn pod_with(suffix: u32) -> Option<Address6> {
    // SAFETY: copied at once.
    unsafe { SUFFIXES.get(&suffix) }.map(|pod| pod.address)
}

/// What replacing an address makes of a sum, as [`apply`] wants it.
#[inline(always)]
fn change(from: &Address6, to: &Address6) -> u32 {
    let word = |at: usize| difference(from[at], to[at]);
    word(0) + word(1) + word(2) + word(3)
}

/// Writes destination address and port, with all checksums; 0 if that is not possible. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn translate_single(context: *mut xdp_md, suffix: u32, port: u32) -> u32 {
    let ctx = &XdpContext::new(context);
    let (Some(pod), Some(opening)) = (pod_with(suffix), OPENING.get_ptr_mut(0)) else { return 0 };
    // SAFETY: as in `find_owner_of_single`.
    let inbound = unsafe { &(*opening).inbound };
    let at = inbound.layers.offset;
    let protocol = inbound.layers.protocol as u8;
    let (checksum, place) = match protocol {
        TCP => (at + 16, at + 2),
        UDP => (at + 6, at + 2),
        _ => (at + 2, at + 4),
    };
    let (Some(sum), Some(old)) = (load::<u16>(ctx, checksum), load::<u16>(ctx, place)) else { return 0 };
    let new = (port as u16).to_be();
    let mut updated = apply(sum, change(&inbound.ip.destination, &pod) + difference16(old, new));
    if protocol == UDP {
        // Zero means "no checksum", so a computed zero is sent as ones (RFC 8200 section 8.1, RFC 6935).
        updated = match (sum, updated) {
            (0, _) => 0,
            (_, 0) => 0xffff,
            _ => updated,
        };
    }
    let written = store(ctx, TO, &pod) && store_word(ctx, checksum, updated) && store_word(ctx, place, new);
    u32::from(written)
}

/// Writes the pod into an ICMPv6 error, and into the packet that it quotes, which the pod must see as its own; 0 if that is not
/// possible. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn translate_error_single(context: *mut xdp_md, suffix: u32, port: u32) -> u32 {
    let ctx = &XdpContext::new(context);
    let (Some(pod), Some(opening)) = (pod_with(suffix), OPENING.get_ptr_mut(0)) else { return 0 };
    // SAFETY: as in `find_owner_of_single`.
    let inbound = unsafe { &(*opening).inbound };
    let checksum = inbound.layers.offset + 2;
    let place = inbound.about_layers.offset + if inbound.key.protocol == ICMP { 4 } else { 0 };
    let (Some(sum), Some(old)) = (load::<u16>(ctx, checksum), load::<u16>(ctx, place)) else { return 0 };
    let new = (port as u16).to_be();
    // Once as a part of what is quoted, and once as that of the pseudo-header: both were the egress address.
    let once = apply(sum, change(&inbound.ip.destination, &pod) + difference16(old, new));
    let updated = apply(once, change(&inbound.ip.destination, &pod));
    let written = store(ctx, TO, &pod)
        && store(ctx, inbound.quoted + SOURCE, &pod)
        && store_word(ctx, place, new)
        && store_word(ctx, checksum, updated);
    u32::from(written)
}

#[inline(always)]
fn store_word(ctx: &XdpContext, offset: u32, word: u16) -> bool {
    let from = (&raw const word).cast_mut().cast();
    // SAFETY: the helper reads the word only.
    unsafe { bpf_xdp_store_bytes(ctx.ctx, offset, from, size_of::<u16>() as u32) == 0 }
}
