//! Limits: what pods and accounts take of this node is counted where a flow is made and where it ends. See `aegis_common::load`.

use crate::atomics;
use crate::maps::{self, ADDRESSES, ALL_LOADS, ALLOCATIONS, LIMITED, LOADS};
use aegis_common::*;
use aya_ebpf::bindings::BPF_NOEXIST;

/// The flow may be made, and is counted.
pub const ADMITTED: u32 = 0;
/// It is refused: there are as many as there may be, of the pod's or of the account's.
pub const POD_FLOWS: u32 = 1;
pub const ACCOUNT_FLOWS: u32 = 2;
/// It is refused: in this second as many were asked for as may be.
pub const POD_RATE: u32 = 3;
pub const ACCOUNT_RATE: u32 = 4;
/// There is no room to count it.
pub const NO_COUNT: u32 = 5;
/// What counted is just being removed: it comes again.
pub const LOST: u32 = 6;

/// Entries that one call sees removed under its hands before it gives up.
const ATTEMPTS: u32 = 3;

/// In place of a pod: one of another node, which keeps its limits.
pub const GUEST: u64 = 0;

/// Counts a new flow, unless it is over a limit. `pod` is the `id` of [`LoadKey::pod`], or [`GUEST`]. A function of its own for
/// the verifier's sake, like `take` in `ports`, as are those below.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn admit(pod: u64, allocation: u32) -> u32 {
    let (Some(limits), Some(all)) = (ALLOCATIONS.get(allocation), ALL_LOADS.get_ptr_mut(0)) else {
        return NO_COUNT;
    };
    // The pod first: what it asks for in vain is not counted for its account.
    if pod != GUEST {
        match more(pod, allocation, limit(limits.pod_flows, 0, 0), limits.pod_rate) {
            ADMITTED => (),
            refused => return refused,
        }
    }
    // SAFETY: map values stay writable until the program ends.
    let all = count(atomics::fetch_add_u64(unsafe { &raw mut (*all).flows }, MORE));
    let most = limit(limits.account_flows, limits.room_flows, all);
    let outcome = match limits.account {
        0 => ADMITTED,
        account => more(account, WHOLE_ACCOUNT, most, limits.account_rate),
    };
    if outcome != ADMITTED {
        all_less();
        if pod != GUEST {
            less(pod, allocation);
        }
    }
    match outcome {
        POD_FLOWS => ACCOUNT_FLOWS,
        POD_RATE => ACCOUNT_RATE,
        other => other,
    }
}

/// Takes back what [`admit`] has counted: the flow was not made, or is gone.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn discharge(pod: u64, allocation: u32) -> u32 {
    if pod != GUEST {
        less(pod, allocation);
    }
    if let Some(limits) = ALLOCATIONS.get(allocation)
        && limits.account != 0
    {
        less(limits.account, WHOLE_ACCOUNT);
    }
    all_less();
    0
}

/// One flow more of a pod or an account. Gives an outcome as for a pod.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn more(id: u64, allocation: u32, most: u32, rate: u32) -> u32 {
    let key = LoadKey { id, allocation, pad: 0 };
    let now = maps::now();
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        let Some(place) = find_or_make(&key, now) else { return NO_COUNT };
        // SAFETY: map values stay readable and writable until the program ends.
        let value = unsafe { &mut *place };
        let before = atomics::fetch_add_u64(&raw mut value.flows, MORE);
        if is_dead(before) {
            // Not taken back: nobody reads the count of an entry that is being removed, and the memory may be another's by now.
            continue;
        }
        if value.key != key {
            atomics::fetch_add_u64(&raw mut value.flows, LESS);
            continue;
        }
        // From here on the entry stays: it counts something.
        let refused = if is_full(count(before), most) {
            POD_FLOWS
        } else if is_too_fast(&mut value.opened, rate, now) {
            POD_RATE
        } else {
            return ADMITTED;
        };
        atomics::fetch_add_u64(&raw mut value.flows, LESS);
        return refused;
    }
    LOST
}

/// Notes that a flow was asked for in this second. Whether there were as many as may be before.
#[inline(always)]
fn is_too_fast(opened: &mut u64, rate: u32, now: u32) -> bool {
    // SAFETY: an aligned word in a map's value, which other CPUs are writing.
    let seen = unsafe { (&raw const *opened).read_volatile() };
    // Whoever is first begins the second; a CPU whose clock was read just before it ended counts in the next one.
    if ((seen >> 32) as u32) < now {
        atomics::compare_exchange_u64(opened, seen, u64::from(now) << 32);
    }
    let before = atomics::fetch_add_u64(opened, 1) as u32;
    rate != 0 && before >= rate
}

#[inline(always)]
fn find_or_make(key: &LoadKey, now: u32) -> Option<*mut LoadValue> {
    if let Some(place) = LOADS.get_ptr_mut(key) {
        return Some(place);
    }
    let fresh = LoadValue { key: *key, flows: 0, blocks: 0, opened: u64::from(now) << 32, refused: 0 };
    // Another CPU may be faster.
    let _ = LOADS.insert(key, &fresh, u64::from(BPF_NOEXIST));
    LOADS.get_ptr_mut(key)
}

/// One flow less.
#[inline(always)]
fn less(id: u64, allocation: u32) {
    if let Some(place) = LOADS.get_ptr_mut(&LoadKey { id, allocation, pad: 0 }) {
        // SAFETY: as in `more`; what counts something is not removed.
        atomics::fetch_add_u64(unsafe { &raw mut (*place).flows }, LESS);
    }
}

#[inline(always)]
fn all_less() {
    if let Some(all) = ALL_LOADS.get_ptr_mut(0) {
        // SAFETY: as in `more`.
        atomics::fetch_add_u64(unsafe { &raw mut (*all).flows }, LESS);
    }
}

/// Counts a new bitmap of ports of an egress address, unless its account has as many as leave the others room.
/// Gives 0 if not.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn admit_block(egress: u32) -> u32 {
    let Some(all) = ALL_LOADS.get_ptr_mut(0) else { return 0 };
    // SAFETY: as in `more`.
    let all = unsafe { &raw mut (*all).blocks };
    let taken = count(atomics::fetch_add_u64(all, MORE));
    let Some(limits) = limits_of(egress) else { return 1 };
    // It is there: the flow that wants the block is counted.
    let Some(place) = LOADS.get_ptr_mut(&LoadKey::account(limits.account)) else { return 1 };
    // SAFETY: as in `more`.
    let blocks = unsafe { &raw mut (*place).blocks };
    if !is_full(count(atomics::fetch_add_u64(blocks, MORE)), limit(0, limits.room_blocks, taken)) {
        return 1;
    }
    atomics::fetch_add_u64(blocks, LESS);
    atomics::fetch_add_u64(all, LESS);
    0
}

/// Takes back what [`admit_block`] has counted.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn discharge_block(egress: u32) -> u32 {
    if let Some(all) = ALL_LOADS.get_ptr_mut(0) {
        // SAFETY: as in `more`.
        atomics::fetch_add_u64(unsafe { &raw mut (*all).blocks }, LESS);
    }
    if let Some(limits) = limits_of(egress)
        && let Some(place) = LOADS.get_ptr_mut(&LoadKey::account(limits.account))
    {
        // SAFETY: as in `more`.
        atomics::fetch_add_u64(unsafe { &raw mut (*place).blocks }, LESS);
    }
    0
}

/// The entry of the allocation that an egress address is of, if its account is known.
#[inline(always)]
fn limits_of(egress: u32) -> Option<&'static AllocationValue> {
    // SAFETY: read at once.
    let address = unsafe { ADDRESSES.get(&egress) }?;
    ALLOCATIONS.get(address.allocation.wrapping_sub(1)).filter(|limits| limits.account != 0)
}

/// Takes an error out of a count, and removes what has counted nothing for a while. Gives how much was done.
pub fn settle(fix: &LoadFix, now: u32) -> u32 {
    let (flows, blocks, opened) = if fix.key == LoadKey::account(0) {
        let Some(all) = ALL_LOADS.get_ptr_mut(0) else { return 0 };
        // SAFETY: as in `more`.
        unsafe { (&raw mut (*all).flows, &raw mut (*all).blocks, core::ptr::null_mut()) }
    } else {
        let Some(place) = find_or_make(&fix.key, now) else { return 0 };
        // SAFETY: as in `more`.
        unsafe { (&raw mut (*place).flows, &raw mut (*place).blocks, &raw mut (*place).opened) }
    };
    if (fix.flows, fix.blocks) != (0, 0) {
        atomics::fetch_add_u64(flows, correction(fix.flows));
        atomics::fetch_add_u64(blocks, correction(fix.blocks));
        return 1;
    }
    if opened.is_null() {
        return 0;
    }
    // SAFETY: aligned words in a map's value, which other CPUs may be writing.
    let (seen, blocks, opened) =
        unsafe { (flows.read_volatile(), blocks.read_volatile(), opened.read_volatile()) };
    let idle = now.saturating_sub((opened >> 32) as u32) > LOAD_IDLE;
    if !idle || count(seen) != 0 || count(blocks) != 0 {
        return 0;
    }
    // From here on whoever wants to count there sees the mark and looks again.
    u32::from(atomics::compare_exchange_u64(flows, seen, seen | DEAD) && LOADS.remove(&fix.key).is_ok())
}

/// Counts a new flow that a limit has refused, for its allocation and its pod.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn count_limited(pod: u64, allocation: u32, outcome: u32) -> u32 {
    let Some(value) = LIMITED.get_ptr_mut(allocation) else { return 0 };
    // SAFETY: as in `maps::count`.
    unsafe {
        match outcome {
            POD_FLOWS => (*value).pod_flows += 1,
            POD_RATE => (*value).pod_rate += 1,
            ACCOUNT_FLOWS => (*value).account_flows += 1,
            ACCOUNT_RATE => (*value).account_rate += 1,
            _ => return 0,
        }
    }
    if pod != GUEST
        && let Some(place) = LOADS.get_ptr_mut(&LoadKey { id: pod, allocation, pad: 0 })
    {
        // SAFETY: as in `more`.
        atomics::fetch_add_u64(unsafe { &raw mut (*place).refused }, 1);
    }
    0
}
