//! Metering: what flows of an egress address are used for. See `aegis_common`'s meters.

use crate::atomics;
use crate::headers::{ETH_LEN, TCP};
use crate::identification;
use crate::maps::{ADDRESSES, BOUND_METERS, FREE_METERS, METER_INDEX, METER_USE, METERS, REFUSALS};
use crate::opening::Opening;
use aegis_common::*;
use aya_ebpf::bindings::{__sk_buff, BPF_NOEXIST};
use aya_ebpf::programs::TcContext;

/// Races with other CPUs that raising a peak puts up with.
const ATTEMPTS: u32 = 8;

/// Whether use is metered: the loader's word (`MapSizes::metered`), a constant to the verifier, which leaves out what is not done.
#[unsafe(no_mangle)]
static METERED: u8 = 1;

/// Whether use is metered. Otherwise all flows are of [`REST_METER`], and only their ports are counted, which those that live when
/// metering begins will give back.
#[inline(always)]
pub fn metered() -> bool {
    // SAFETY: read-only data, into which the loader has written.
    unsafe { (&raw const METERED).read_volatile() != 0 }
}

/// Finds the meter of a flow that has taken a port, or makes it. A function of its own for the verifier's sake, like `take` in
/// `ports`, and for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_meter(opening: *mut Opening) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(opening) = (unsafe { opening.as_mut() }) else { return REST_METER };
    if !metered() {
        return REST_METER;
    }
    let (key, flow) = (&opening.claim.key, &opening.claim.flow);
    let mut protocol = key.protocol;
    let mut remote = mapped(key.remote);
    if is_stand_in(key.remote) {
        remote = opening.single.remote;
        protocol = protocol_of_single(protocol);
    }
    opening.meter = MeterKey {
        egress: metered_egress(flow.egress),
        remote,
        remote_port: key.remote_port,
        binding: flow.binding,
        allocation: flow.allocation,
        protocol,
        flags: if flow.peer != 0 { METER_OF_GUESTS } else { 0 },
    };
    number_of(&raw mut opening.meter)
}

/// The same of a flow over IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_meter6(
    flow: *const Flow6Key,
    way: *const Flow6Value,
    allocation: u32,
    binding: u32,
) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let (Some(flow), Some(way)) = (unsafe { (flow.as_ref(), way.as_ref()) }) else { return REST_METER };
    if !metered() {
        return REST_METER;
    }
    let mut meter = MeterKey {
        egress: way.network,
        remote: flow.remote,
        remote_port: flow.ports as u16,
        binding: binding as u16,
        allocation: allocation as u16,
        protocol: flow.protocol as u8,
        flags: 0,
    };
    number_of(&raw mut meter)
}

/// The number of a meter, which gets one if there is a free one; else that of the rest of its address, which becomes `meter`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn number_of(meter: *mut MeterKey) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(meter) = (unsafe { meter.as_mut() }) else { return REST_METER };
    // SAFETY: read at once.
    if let Some(number) = unsafe { METER_INDEX.get(&*meter) } {
        return *number;
    }
    if let Ok(Some(number)) = FREE_METERS.pop() {
        if METER_INDEX.insert(&*meter, &number, u64::from(BPF_NOEXIST)).is_ok() {
            return number;
        }
        // Another CPU was faster, or there is no room.
        let _ = FREE_METERS.push(number, 0);
        // SAFETY: as above.
        if let Some(number) = unsafe { METER_INDEX.get(&*meter) } {
            return *number;
        }
    }
    let allocation = if meter.egress[0] == 0 { meter.allocation } else { NO_ALLOCATION };
    (meter.remote, meter.remote_port, meter.binding) = ([0; 4], 0, 0);
    (meter.allocation, meter.protocol, meter.flags) = (allocation, 0, 0);
    // SAFETY: as above.
    unsafe { METER_INDEX.get(&*meter) }.map_or(REST_METER, |number| *number)
}

/// The meter for the rest of a /64. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn rest_of(network: *const Network) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(network) = (unsafe { network.as_ref() }) else { return REST_METER };
    let meter = MeterKey::rest_of(*network);
    // SAFETY: read at once.
    unsafe { METER_INDEX.get(&meter) }.map_or(REST_METER, |number| *number)
}

/// Counts a flow that begins and has no port. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn begins6(meter: u32) -> u32 {
    if metered()
        && let Some(value) = METERS.get_ptr_mut(meter)
    {
        // SAFETY: a per-CPU value; see `maps::count`.
        unsafe { (*value).flows += 1 };
    }
    0
}

/// Counts one that has taken a port. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn begins(meter: u32) -> u32 {
    if metered()
        && let Some(value) = METERS.get_ptr_mut(meter)
    {
        // SAFETY: as above.
        unsafe { (*value).flows += 1 };
    }
    let Some(used) = METER_USE.get_ptr_mut(meter) else { return 0 };
    // SAFETY: map values stay writable until the program ends.
    let used = unsafe { &mut *used };
    let now = atomics::fetch_add(&raw mut used.in_use, 1).wrapping_add(1);
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        let peak = used.peak;
        if now as i32 <= peak as i32 || atomics::compare_exchange(&raw mut used.peak, peak, now) {
            break;
        }
    }
    0
}

/// Counts that one has ended.
#[inline(always)]
pub fn ends(meter: u32) {
    if let Some(used) = METER_USE.get_ptr_mut(meter) {
        // SAFETY: as above.
        atomics::fetch_add(unsafe { &raw mut (*used).in_use }, u32::MAX);
    }
}

/// Counts a connection whose socket has got its address and port (`mode: Bind`), by the key that a flow would have.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn bound_begins(key: *const FlowKey, allocation: u32, binding: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    if !metered() {
        return 0;
    }
    let mut meter = MeterKey {
        egress: metered_egress(key.local),
        remote: mapped(key.remote),
        remote_port: key.remote_port,
        binding: binding as u16,
        allocation: allocation as u16,
        protocol: key.protocol,
        flags: 0,
    };
    let number = number_of(&raw mut meter);
    let mut attempt = 0;
    while attempt < 3 {
        attempt += 1;
        if BOUND_METERS.insert(key, &number, u64::from(BPF_NOEXIST)).is_ok() {
            return begins(number);
        }
        // SAFETY: read at once.
        let Some(before) = (unsafe { BOUND_METERS.get(key) }) else { break };
        let before = *before;
        // It had the same numbers and is over. Who removes it has ended it.
        if BOUND_METERS.remove(key).is_ok() {
            ends(before);
        }
    }
    // No room: what it sends counts with the rest of the address.
    begins6(number)
}

/// The meter of a connection whose socket has the egress address. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn meter_of_bound(key: *const FlowKey) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return REST_METER };
    // SAFETY: read at once.
    if let Some(number) = unsafe { BOUND_METERS.get(key) } {
        return *number;
    }
    // SAFETY: as above.
    let owner = unsafe { ADDRESSES.get(&key.local) }.map_or(0, |address| address.allocation);
    let allocation = if owner == 0 { NO_ALLOCATION } else { (owner - 1) as u16 };
    let rest = MeterKey::rest(metered_egress(key.local), allocation);
    // SAFETY: as above.
    unsafe { METER_INDEX.get(&rest) }.map_or(REST_METER, |number| *number)
}

/// Counts what its socket sends: see [`sends_segments`]. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn bound_sends(skb: *mut __sk_buff, key: *const FlowKey, bytes: u32, header: u32) -> u32 {
    if !metered() {
        return 0;
    }
    add_segments(skb, meter_of_bound(key), bytes, header)
}

/// Counts what comes for it. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn bound_receives(key: *const FlowKey, bytes: u32) -> u32 {
    if !metered() {
        return 0;
    }
    add_received(meter_of_bound(key), bytes)
}

/// Counts packets towards the origin.
#[inline(always)]
pub fn sends(meter: u32, packets: u32, bytes: u64) {
    if metered() {
        add_sent(meter, packets, bytes);
    }
}

/// A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn add_sent(meter: u32, packets: u32, bytes: u64) -> u32 {
    if let Some(value) = METERS.get_ptr_mut(meter) {
        // SAFETY: a per-CPU value; see `maps::count`.
        unsafe {
            (*value).sent_packets += u64::from(packets);
            (*value).sent_bytes += bytes;
        }
    }
    0
}

/// Counts one from the origin.
#[inline(always)]
pub fn receives(meter: u32, bytes: u32) {
    if metered() {
        add_received(meter, bytes);
    }
}

/// A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn add_received(meter: u32, bytes: u32) -> u32 {
    if let Some(value) = METERS.get_ptr_mut(meter) {
        // SAFETY: as above.
        unsafe {
            (*value).received_packets += 1;
            (*value).received_bytes += u64::from(bytes);
        }
    }
    0
}

/// Counts a packet towards the origin that may still have to be cut into segments, each with headers of its own. `header` says where
/// the transport header begins, from the start of the frame, and in bit 16 whether it is TCP's.
#[inline(always)]
pub fn sends_segments(skb: *mut __sk_buff, meter: u32, bytes: u32, header: u32) {
    if metered() {
        add_segments(skb, meter, bytes, header);
    }
}

/// A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn add_segments(skb: *mut __sk_buff, meter: u32, bytes: u32, header: u32) -> u32 {
    let segments = identification::segments(skb).max(1);
    let mut more = 0;
    if segments > 1 {
        // Of TCP the upper half of this byte says how long the header is, in words (RFC 9293 section 3.1).
        let (transport, is_tcp) = (header & 0xffff, header >> 16 != 0);
        let length = match TcContext::new(skb).load::<u8>((transport + 12) as usize) {
            Ok(offset) if is_tcp => u32::from(offset >> 4) * 4,
            _ => 8,
        };
        more = (segments - 1) * (transport.saturating_sub(ETH_LEN as u32) + length);
    }
    add_sent(meter, segments, u64::from(bytes) + u64::from(more))
}

/// Where the transport header begins and whether it is TCP's, as [`sends_segments`] wants it.
#[inline(always)]
pub fn header(transport: u32, protocol: u8) -> u32 {
    transport & 0xffff | u32::from(protocol == TCP) << 16
}

/// Counts a new flow that is refused. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn refuses(key: *const FlowKey, allocation: u32, binding: u32, reason: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    if !metered() {
        return 0;
    }
    let mut refusal = RefusalKey {
        remote: mapped(key.remote),
        remote_port: key.remote_port,
        binding: binding as u16,
        allocation: allocation as u16,
        protocol: key.protocol,
        reason: reason as u8,
    };
    count(&mut refusal, mapped(0))
}

/// The same over IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn refuses6(key: *const Flow6Key, allocation: u32, binding: u32, reason: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    if !metered() {
        return 0;
    }
    let mut refusal = RefusalKey {
        remote: key.remote,
        remote_port: key.ports as u16,
        binding: binding as u16,
        allocation: allocation as u16,
        protocol: key.protocol as u8,
        reason: reason as u8,
    };
    count(&mut refusal, [0; 4])
}

#[inline(always)]
fn count(refusal: &mut RefusalKey, nowhere: Address6) -> u32 {
    let mut attempt = 0;
    while attempt < 4 {
        attempt += 1;
        if let Some(count) = REFUSALS.get_ptr_mut(&*refusal) {
            // SAFETY: map values stay writable until the program ends.
            atomics::fetch_add_u64(count, 1);
            return 0;
        }
        if REFUSALS.insert(&*refusal, &0, u64::from(BPF_NOEXIST)).is_err() {
            // No room, unless another CPU was faster: it is counted without its destination, or at least with its reason.
            match attempt {
                2 => (refusal.remote, refusal.remote_port) = (nowhere, 0),
                3 => *refusal = RefusalKey::rest_of(refusal.reason),
                _ => (),
            }
        }
    }
    0
}
