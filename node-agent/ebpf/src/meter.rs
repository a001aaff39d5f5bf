//! Metering: what flows of an egress address are used for. See `aegis_common`'s meters.

use crate::atomics;
use crate::identification;
use crate::maps::{FREE_METERS, METER_INDEX, METER_USE, METERS, REFUSALS};
use crate::opening::Opening;
use aegis_common::*;
use aya_ebpf::bindings::{__sk_buff, BPF_NOEXIST};
use aya_ebpf::programs::TcContext;

/// Races with other CPUs that raising a peak puts up with.
const ATTEMPTS: u32 = 8;

/// Finds the meter of a flow that has taken a port, or makes it. A function of its own for the verifier's sake, like `take` in
/// `ports`, and for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_meter(opening: *mut Opening) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(opening) = (unsafe { opening.as_mut() }) else { return REST_METER };
    let (key, flow) = (&opening.claim.key, &opening.claim.flow);
    let mut meter = MeterKey {
        egress: flow.egress,
        remote: key.remote,
        remote_port: key.remote_port,
        binding: flow.binding,
        allocation: flow.allocation,
        protocol: key.protocol,
        flags: if flow.peer != 0 { METER_OF_GUESTS } else { 0 },
    };
    // SAFETY: read at once.
    if let Some(number) = unsafe { METER_INDEX.get(&meter) } {
        return *number;
    }
    if let Ok(Some(number)) = FREE_METERS.pop() {
        if METER_INDEX.insert(&meter, &number, u64::from(BPF_NOEXIST)).is_ok() {
            return number;
        }
        // Another CPU was faster, or there is no room.
        let _ = FREE_METERS.push(number, 0);
        // SAFETY: as above.
        if let Some(number) = unsafe { METER_INDEX.get(&meter) } {
            return *number;
        }
    }
    meter = MeterKey { egress: meter.egress, allocation: meter.allocation, ..MeterKey::default() };
    // SAFETY: as above.
    unsafe { METER_INDEX.get(&meter) }.map_or(REST_METER, |number| *number)
}

/// Counts a flow that begins. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn begins(meter: u32) -> u32 {
    if let Some(value) = METERS.get_ptr_mut(meter) {
        // SAFETY: a per-CPU value; see `maps::count`.
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

/// Counts a packet towards the origin. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sends(meter: u32, packets: u32, bytes: u64) -> u32 {
    if let Some(value) = METERS.get_ptr_mut(meter) {
        // SAFETY: a per-CPU value; see `maps::count`.
        unsafe {
            (*value).sent_packets += u64::from(packets);
            (*value).sent_bytes += bytes;
        }
    }
    0
}

/// Counts one from the origin. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn receives(meter: u32, bytes: u32) -> u32 {
    if let Some(value) = METERS.get_ptr_mut(meter) {
        // SAFETY: as above.
        unsafe {
            (*value).received_packets += 1;
            (*value).received_bytes += u64::from(bytes);
        }
    }
    0
}

/// Counts a packet towards the origin that may still have to be cut into segments, each with headers of its own. A function of its
/// own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sends_segments(skb: *mut __sk_buff, meter: u32, bytes: u32, header: u32) -> u32 {
    let segments = identification::segments(skb).max(1);
    let mut more = 0;
    if segments > 1 {
        // Of TCP the upper half of this byte says how long the header is, in words (RFC 9293 section 3.1).
        let (ip, transport, is_tcp) = (header & 0xff, header >> 8 & 0xff, header >> 16 != 0);
        let length = match TcContext::new(skb).load::<u8>((transport + 12) as usize) {
            Ok(offset) if is_tcp => u32::from(offset >> 4) * 4,
            _ => 8,
        };
        more = (segments - 1) * (ip + length);
    }
    sends(meter, segments, u64::from(bytes) + u64::from(more));
    0
}

/// Counts a new flow that is refused. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn refuses(key: *const FlowKey, allocation: u32, binding: u32, reason: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let mut refusal = RefusalKey {
        remote: key.remote,
        remote_port: key.remote_port,
        binding: binding as u16,
        allocation: allocation as u16,
        protocol: key.protocol,
        reason: reason as u8,
    };
    let mut attempt = 0;
    while attempt < 3 {
        attempt += 1;
        if let Some(count) = REFUSALS.get_ptr_mut(&refusal) {
            // SAFETY: map values stay writable until the program ends.
            atomics::fetch_add_u64(count, 1);
            return 0;
        }
        if REFUSALS.insert(&refusal, &0, u64::from(BPF_NOEXIST)).is_err() && attempt == 2 {
            // No room: it is counted without its destination.
            (refusal.remote, refusal.remote_port) = (0, 0);
        }
    }
    0
}
