//! Taking and giving back ports: one bitmap for each (egress address, origin, protocol) and 2,048 ports.
//!
//! The bit in the bitmap finds a free port in constant time; the entry in `REVERSE`, of which there is one
//! at most, decides. `used` counts bits exactly, under any interleaving.

use crate::atomics;
use crate::fence;
use crate::flow;
use crate::load;
use crate::maps::{self, BLOCKS, GROWING, HOLDINGS, OPENING, PULSE, SCRATCH};
use crate::meter;
use crate::opening::Opening;
use crate::table;
use aegis_common::*;
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_loop};
use core::ffi::c_void;

/// Races with other CPUs that one call puts up with before it looks elsewhere.
const ATTEMPTS: u32 = 8;
const EEXIST: i32 = -17;

/// What a new flow asks for, and what it got.
#[repr(C)]
pub struct Claim {
    /// Key of the flow in `FORWARD`.
    pub key: FlowKey,
    /// The flow. Its egress address and port are what is asked for; meanwhile `egress` is the present address.
    pub flow: ForwardValue,
    // Zeroes are not next to each other: the compiler would write them byte by byte.
    /// Addresses that have been begun with.
    pub address: u32,
    /// Where in an address's row of blocks to begin.
    pub start: u32,
    /// Blocks of the present address in which there is something to try, counted from `start`.
    pub left: u32,
    /// What came of it.
    pub outcome: u32,
    /// How many blocks there were at the beginning.
    pub blocks: u32,
    /// The one that was tried last.
    pub turn: u32,
}

/// This node holds no slice of the allocation from which new flows may be opened.
pub const UNAVAILABLE: u32 = 3;
/// All addresses in which it holds slices have passed their deadline for new flows.
pub const FENCED: u32 = 5;
/// No port is free, and none is to be expected.
pub const FULL: u32 = 0;
/// `egress` and `egress_port` are taken: after [`claim_port`] in the bitmap, after [`enter`] in `REVERSE` too.
pub const TAKEN: u32 = 1;
/// `REVERSE` or `BLOCKS` has no room.
pub const NO_ROOM: u32 = 2;

/// No bitmap has a free port, and the account has as many as leave others room.
pub const OVER_SHARE: u32 = 6;

/// No port is free, but more slices of the address are about to come.
pub const WAITING: u32 = 4;

/// Ports that the bitmap does not know to be taken, which one new flow tries.
pub const TRIES: u32 = 3;

/// Takes a port for a new flow, or the next one after one that turned out to be taken; by what `OPENING` says.
/// See [`take`] for why this is a function of its own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn claim_port() -> u32 {
    // One step for each address, one for each block in which there is something to take, and one at the end.
    let steps = ADDRESSES_PER_ALLOCATION as u32 * (BLOCKS_PER_ADDRESS + 1) + 1;
    // SAFETY: the callback needs nothing.
    unsafe {
        bpf_loop(steps, step as *mut c_void, core::ptr::null_mut(), 0);
    }
    0
}

/// Goes to the next address of the allocation, or tries the next block of this one. Returns 1 to stop.
unsafe extern "C" fn step(_: u64, _: *mut c_void) -> i64 {
    let Some(opening) = OPENING.get_ptr_mut(0) else { return 1 };
    // SAFETY: see `opening`: the caller's, who waits.
    let claim = unsafe { &mut (*opening).claim };
    if claim.left == 0 {
        // Compared here, so that the verifier sees a 0 or a 1.
        return i64::from(next_address(claim) == NO_MORE);
    }
    let egress = claim.flow.egress;
    // Blocks are counted from where this origin's flows begin.
    let turn = claim.left.trailing_zeros();
    claim.left &= claim.left - 1;
    claim.turn = turn;
    let block = (claim.start + turn) & (BLOCKS_PER_ADDRESS - 1);
    // SAFETY: the value is replaced as a whole by the agent; a torn read would mix two sets of this node's slices, both
    // of which it owns or owned until now with its slot still set.
    let Some(holding) = (unsafe { HOLDINGS.get(&egress) }) else { return 0 };
    let word = holding.allowed[(block >> 3) as usize & 3];
    let slices = (word >> ((block & 7) * 8)) as u32 & 0xff;
    if slices == 0 {
        return 0;
    }
    if claim.outcome == UNAVAILABLE || claim.outcome == FENCED {
        claim.outcome = FULL;
    }
    let key = BlockKey {
        egress,
        remote: claim.key.remote,
        remote_port: claim.key.remote_port,
        protocol: claim.key.protocol,
        block: block as u8,
    };
    // A second try where there was no block, or the sweeper was just removing it.
    let mut attempt = 0;
    while attempt < 4 {
        attempt += 1;
        let mut taken = take(&key, slices);
        if taken == MISSING {
            taken = make_missing(&key);
        }
        match taken {
            ALL_TAKEN => return 0,
            // Another block may exist already, and have room.
            NO_BLOCK => {
                claim.outcome = NO_ROOM;
                return 0;
            }
            NO_SHARE => {
                claim.outcome = OVER_SHARE;
                return 0;
            }
            LOST | MADE => (),
            port => {
                claim.flow.egress_port = port as u16;
                claim.outcome = TAKEN;
                note_water(claim.left, claim.blocks, port);
                return 1;
            }
        }
    }
    0
}

/// Counts a flow that leaves little room. Blocks are tried in a fixed order, so those that were passed are full: `left` are
/// those that were not, of `blocks`. See [`take`] for why this is a function of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note_water(left: u32, blocks: u32, port: u32) -> u32 {
    let passed = blocks.wrapping_sub(1).wrapping_sub(left.count_ones());
    let high = passed + u32::from(port & TIGHT != 0);
    if is_high(high, blocks) {
        maps::count(Counter::PastHighWater, 0);
    }
    0
}

/// Whether more slices of an address are about to come to this node: the agent expects it, and lives to see to it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn may_grow(egress: u32) -> u32 {
    let Some(pulse) = PULSE.get(0) else { return 0 };
    // SAFETY: only presence matters.
    let grows = unsafe { GROWING.get(&egress) }.is_some();
    u32::from(grows && maps::now().saturating_sub(*pulse) <= PULSE_LIFE)
}

/// There is no further address to look at.
const NO_MORE: u32 = 7;

/// Begins with the next address of the allocation. [`NO_MORE`] if there is none, or if the one before is not to be given up. See
/// [`take`] for why this is a function of its own: each outcome that it notes would be followed through all further steps.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn next_address(claim: *mut Claim) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's claim.
    let Some(claim) = (unsafe { claim.as_mut() }) else { return NO_MORE };
    // A pod goes on to another address only if the whole of its own is full, not just what this node has of it by now.
    if claim.outcome == FULL && may_grow(claim.flow.egress) != 0 {
        claim.outcome = WAITING;
        return NO_MORE;
    }
    let Some(allocation) = maps::ALLOCATIONS.get(u32::from(claim.flow.allocation)) else { return NO_MORE };
    let (first, count) = allocation.own(claim.key.remote);
    if count == 0 || claim.address >= count {
        return NO_MORE;
    }
    // A pod stays with its address while that has room (RFC 4787 REQ-2, "paired").
    let turn = (u64::from(mix(claim.key.local)) + u64::from(claim.address)) % u64::from(count);
    let at = (u64::from(first) + turn) as usize;
    claim.address += 1;
    // The verifier does not follow a remainder; in 64 bits it believes this check.
    if at >= ADDRESSES_PER_ALLOCATION {
        return NO_MORE;
    }
    let egress = allocation.addresses[at];
    claim.flow.egress = egress;
    // SAFETY: as in `step`.
    let Some(holding) = (unsafe { HOLDINGS.get(&egress) }) else { return 0 };
    let blocks = blocks_of(&holding.allowed);
    if blocks != 0 && fence::opens_nothing(egress) {
        if claim.outcome == UNAVAILABLE {
            claim.outcome = FENCED;
        }
        return 0;
    }
    claim.left = blocks.rotate_right(claim.start & (BLOCKS_PER_ADDRESS - 1));
    claim.blocks = claim.left.count_ones();
    0
}

/// Enters a flow that has taken a port into `REVERSE`. False if another port should be tried.
#[inline(always)]
pub fn enter(opening: &mut Opening) -> bool {
    opening.claim.flow.meter = meter::find_meter(opening) as u16;
    let Opening { claim, back_key, back, .. } = opening;
    *back_key = flow::reverse_key(&claim.key, &claim.flow);
    *back = flow::back(back_key, &claim.key, &claim.flow);
    match table::insert_reverse(back_key, back) {
        table::NEW => true,
        // The bitmap did not know of this flow (it was made anew while the flow lived): let the bit stand for it and
        // go on with the next port.
        table::KNOWN => {
            claim.left |= 1 << (claim.turn & 31);
            claim.outcome = FULL;
            false
        }
        _ => {
            let (egress, port) = (claim.flow.egress, claim.flow.egress_port);
            release(&flow::block_key(&claim.key, egress, port), port);
            claim.outcome = NO_ROOM;
            true
        }
    }
}

/// In place of a port: no port of these slices is free.
const ALL_TAKEN: u32 = 1 << 16;
/// There is none, and no room for one.
const NO_BLOCK: u32 = 2 << 16;
/// There is no bitmap: one has to be made.
const MISSING: u32 = 4 << 16;
/// There is one now, made by this call, or by another CPU.
const MADE: u32 = 5 << 16;
const THERE: u32 = 7 << 16;
/// There is none, and the account has as many as leave others room.
const NO_SHARE: u32 = 6 << 16;
/// Too many races lost, or the bitmap is just being removed: worth another try.
const LOST: u32 = 3 << 16;

/// Beside a port: these slices are past their high-water mark.
const TIGHT: u32 = 1 << 20;

/// Takes a free port of the given slices (bit s = slice s of the block).
///
/// A global function in the verifier's sense, like [`give_back`]: it is verified once by itself, not once more for each
/// state in which it is called. That is the difference between a load of milliseconds and one that exceeds the
/// verifier's limit.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take(key: *const BlockKey, slices: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's key.
    let Some(key) = (unsafe { key.as_ref() }) else { return NO_BLOCK };
    let Some(block) = BLOCKS.get_ptr_mut(key) else { return MISSING };
    // SAFETY: map values stay readable until the program ends; should this one be reused for another block
    // meanwhile, the check of its key below undoes what was done.
    let value = unsafe { &mut *block };
    if atomics::fetch_add(&raw mut value.used, 1) & BLOCK_DEAD != 0 {
        // Not taken back: nobody reads the count of a dead block, and the memory may be another's by now.
        return LOST;
    }
    let words = words_of(slices);
    let mut attempt = 0;
    let mut outcome = LOST;
    while attempt < ATTEMPTS {
        attempt += 1;
        let place = search(value, words);
        if place == NO_PLACE {
            outcome = ALL_TAKEN;
            break;
        }
        let at = (place >> 6) as usize & (WORDS_PER_BLOCK - 1);
        let bit = 1u64 << (place & 63);
        if atomics::fetch_or(&raw mut value.words[at], bit) & bit != 0 {
            // Another CPU was faster, or the summary did not know yet that the word is full.
            note_full(value, at);
            continue;
        }
        if is_others(&value.key, key) {
            atomics::fetch_and(&raw mut value.words[at], !bit);
            break;
        }
        note_full(value, at);
        value.cursor = (place + 1) & (PORTS_PER_BLOCK - 1);
        note_high(value);
        value.last_used = maps::now();
        let slice = u32::from(key.block) << 3 | place >> 8;
        // Looked up here, and not kept meanwhile, for the sake of the stack: it is there since the node has a slice.
        let seed = maps::config().map_or(0, |config| config.seed);
        let low = port_of_place(place as u8, permutation_key(seed, key, slice));
        let tight = is_high(value.used, (slices & 0xff).count_ones() * PORTS_PER_SLICE);
        return if tight { TIGHT } else { 0 } | slice << 8 | u32::from(low);
    }
    atomics::fetch_add(&raw mut value.used, u32::MAX);
    outcome
}

/// Whether two keys differ: without the call that comparing them would be, which the stack has no room for.
#[inline(always)]
fn is_others(a: &BlockKey, b: &BlockKey) -> bool {
    let ports = u32::from(a.remote_port ^ b.remote_port);
    let rest = u32::from(a.protocol ^ b.protocol) | u32::from(a.block ^ b.block);
    (a.egress ^ b.egress) | (a.remote ^ b.remote) | ports | rest != 0
}

/// Raises the high-water mark to what is in use.
#[inline(always)]
pub fn note_high(value: &mut BlockValue) {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        let (used, high) = (value.used, value.high);
        if used <= high || atomics::compare_exchange(&raw mut value.high, high, used) {
            return;
        }
    }
}

/// No word of those asked for has room.
const NO_PLACE: u32 = u32::MAX;

/// The lowest free place after the cursor, in the words whose bit is set in `words`; it wraps. A word that is full
/// although the summary does not say so yields a place that is taken.
#[inline(always)]
fn search(value: &BlockValue, words: u32) -> u32 {
    let cursor = value.cursor & (PORTS_PER_BLOCK - 1);
    let (first, bit) = (cursor >> 6, cursor & 63);
    let open = words & !value.full;
    if open == 0 {
        return NO_PLACE;
    }
    if open >> first & 1 != 0 {
        let free = !value.words[first as usize & (WORDS_PER_BLOCK - 1)] & (u64::MAX << bit);
        if free != 0 {
            return first << 6 | free.trailing_zeros() & 63;
        }
    }
    // The rest in order, ending with the first word again (its places before the cursor).
    let turned = open.rotate_right(first + 1 & 31);
    let word = (first + 1 + turned.trailing_zeros()) & 31;
    let free = !value.words[word as usize & (WORDS_PER_BLOCK - 1)];
    word << 6 | free.trailing_zeros() & 63
}

/// Sets the word's bit in the summary if the word is full. A release clears its bit first and the summary after, so
/// looking once more after setting it leaves no full bit over a word with room.
#[inline(always)]
fn note_full(value: &mut BlockValue, at: usize) {
    if value.words[at & (WORDS_PER_BLOCK - 1)] != u64::MAX {
        return;
    }
    atomics::fetch_or_u32(&raw mut value.full, 1 << (at as u32 & 31));
    // A fetching operation, so that neither compiler nor CPU answers from before the summary was set.
    if atomics::fetch_or(&raw mut value.words[at & (WORDS_PER_BLOCK - 1)], 0) != u64::MAX {
        atomics::fetch_and_u32(&raw mut value.full, !(1 << (at as u32 & 31)));
    }
}

/// Gives a port back.
#[inline(always)]
pub fn release(key: &BlockKey, port: u16) {
    give_back(key, u32::from(port));
}

/// See [`take`] for why this is a function of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn give_back(key: *const BlockKey, port: u32) -> u32 {
    // SAFETY: as in `take`.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let port = port as u16;
    let Some(config) = maps::config() else { return 0 };
    let Some(block) = BLOCKS.get_ptr_mut(key) else { return 0 };
    // SAFETY: as in `take`; the sweeper, the only one to remove blocks, does not run beside itself, and a block with a
    // port in use is not removed.
    let value = unsafe { &mut *block };
    let slice = u32::from(port >> 8);
    let place =
        (slice & 7) << 8 | u32::from(place_of_port(port as u8, permutation_key(config.seed, key, slice)));
    let at = (place >> 6) as usize & (WORDS_PER_BLOCK - 1);
    let bit = 1u64 << (place & 63);
    if atomics::fetch_and(&raw mut value.words[at], !bit) & bit != 0 {
        atomics::fetch_and_u32(&raw mut value.full, !(1 << (at as u32 & 31)));
        atomics::fetch_add(&raw mut value.used, u32::MAX);
        value.last_used = maps::now();
    }
    0
}

/// Makes a block that is missing: [`MADE`], or [`NO_BLOCK`]. See [`take`] for why this is a function of its own, and not called by
/// that: the stack would not do for one in the other.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn make_block(key: *const BlockKey) -> u32 {
    // SAFETY: as in `take`.
    let Some(key) = (unsafe { key.as_ref() }) else { return NO_BLOCK };
    let Some(fresh) = SCRATCH.get_ptr_mut(0) else { return NO_BLOCK };
    // SAFETY: a per-CPU value that only this function uses; programs on one CPU do not nest here.
    let fresh = unsafe { &mut *fresh };
    // Field by field: a copy of the whole would be a call, which the stack has no room for.
    fresh.key.egress = key.egress;
    fresh.key.remote = key.remote;
    fresh.key.remote_port = key.remote_port;
    fresh.key.protocol = key.protocol;
    fresh.key.block = key.block;
    // A random start: a counter that began at the same place after a restart would hand out the newest ports first.
    // SAFETY: no arguments.
    fresh.cursor = unsafe { bpf_get_prandom_u32() } & (PORTS_PER_BLOCK - 1);
    fresh.used = 0;
    fresh.high = 0;
    fresh.full = 0;
    fresh.last_used = maps::now();
    // Words are never written in the scratch: they are zero from the start.
    match BLOCKS.insert(key, &*fresh, u64::from(BPF_NOEXIST)) {
        Ok(()) => MADE,
        // Another CPU was faster.
        Err(EEXIST) => THERE,
        Err(_) => NO_BLOCK,
    }
}

/// Makes a block that is missing, if its account may have one more: [`MADE`], [`NO_BLOCK`] or [`NO_SHARE`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn make_missing(key: *const BlockKey) -> u32 {
    // SAFETY: as in `take`.
    let Some(key) = (unsafe { key.as_ref() }) else { return NO_BLOCK };
    if load::admit_block(key.egress) == 0 {
        return NO_SHARE;
    }
    let made = make_block(key);
    if made == MADE {
        return MADE;
    }
    load::discharge_block(key.egress);
    if made == THERE { MADE } else { NO_BLOCK }
}
