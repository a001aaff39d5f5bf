//! `sweep`: removes flows and blocks that are over.
//!
//! The agent finds candidates by reading the maps from outside, since a scan inside BPF would hold up packets. What it found
//! may have changed meanwhile, so each candidate is judged again here. The agent runs this program through
//! `BPF_PROG_TEST_RUN`; the packet is a list of candidates.

use crate::atomics;
use crate::flow::{self, Back};
use crate::load;
use crate::maps::{self, ADDRESSES, ALLOCATIONS, BLOCKS};
use crate::ports;
use crate::six::single;
use crate::steer;
use crate::table;
use crate::xdp;
use aegis_common::*;
use aya_ebpf::programs::XdpContext;

/// Returns for how many candidates there was something to do.
pub fn run(ctx: &XdpContext) -> u32 {
    let Some(kind) = xdp::at::<u32>(ctx, 0) else { return 0 };
    // SAFETY: within the frame.
    let kind = unsafe { *kind };
    let now = maps::now();
    let mut removed = 0;
    let mut at = 0;
    while at < SWEEP_BATCH {
        let done = match kind {
            SWEEP_FLOWS | SWEEP_RESTING | SWEEP_CUT_SHORT => {
                candidate(ctx, at).map(|key| ended(&key, now, kind))
            }
            SWEEP_BLOCKS => candidate(ctx, at).map(|key| block(&key, now)),
            SWEEP_REVERSE => candidate(ctx, at).map(|key| orphan(&key, now)),
            SWEEP_PEAKS => candidate(ctx, at).map(|read| peak(&read)),
            SWEEP_LOADS => candidate(ctx, at).map(|fix| settled(&fix, now)),
            SWEEP_REVOKED => candidate(ctx, at).map(|key| revoked(&key)),
            _ => None,
        };
        let Some(done) = done else { break };
        removed += done;
        at += 1;
    }
    removed
}

/// A candidate of the list, `None` at its end.
#[inline(always)]
fn candidate<K: Copy>(ctx: &XdpContext, at: usize) -> Option<K> {
    let key = xdp::at::<K>(ctx, SWEEP_HEADER + at * size_of::<K>())?;
    // SAFETY: within the frame.
    Some(unsafe { *key })
}

// Functions of their own for the verifier's sake, like `take` in `ports`.

/// Removes a flow that is over, or, by the kind of the sweep, one whose port rests, or only looks whether it does.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ended(key: *const FlowKey, now: u32, kind: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let found = flow::find(key);
    if !found.exists() {
        return 0;
    }
    let forward = &found.value;
    let back = flow::find_back(&flow::reverse_key(key, forward)).value;
    let Some(allocation) = ALLOCATIONS.get(u32::from(forward.allocation)) else { return 0 };
    let rest = if kind == SWEEP_FLOWS { allocation.timeouts.rest } else { 0 };
    let timeouts = Timeouts { rest, ..allocation.timeouts };
    let over = if abandoned(key, forward) {
        found.bury(key);
        now.saturating_sub(forward.last_seen) > rest
    } else {
        false
    };
    if !over && !expired(key.protocol, forward, &back, &timeouts, now) {
        return 0;
    }
    if kind == SWEEP_RESTING {
        return 1;
    }
    // A packet that comes right now makes the flow anew, with another port: after this much silence that is what
    // the origin expects as well.
    let removed = found.end(key);
    if removed {
        maps::count(if kind == SWEEP_FLOWS { Counter::Expired } else { Counter::RestCutShort }, 0);
    }
    u32::from(removed)
}

/// Whether the pod that made the flow is gone.
#[inline(always)]
fn abandoned(key: &FlowKey, forward: &ForwardValue) -> bool {
    if forward.is_guest(key) {
        // Its node judges.
        return false;
    }
    let Some(config) = maps::config() else { return false };
    let generation = maps::generation(config);
    let is_there = match is_stand_in(key.remote) {
        true => single::has_pod(generation, key.local, forward.incarnation),
        false => pod_or_host(generation, key.local, forward.incarnation),
    };
    if is_there != 0 {
        return false;
    }
    // Or the policy was switched between the look-ups, and its pods are gone with it.
    maps::generation(config) == generation
}

/// Whether there is a pod of this incarnation that has this address, or the node's. A function of its own for the verifier's sake,
/// like `take` in `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pod_or_host(generation: u32, address: u32, incarnation: u32) -> u32 {
    let is_pod = maps::pod(generation, address).is_some_and(|pod| pod.incarnation == incarnation);
    u32::from(is_pod || maps::has_host(generation, incarnation))
}

/// Ends a flow whose slice is not this node's any more. Slices are taken from a node only when they are empty or the node
/// is taken for dead, so there is none of these unless two things failed at once; then it is what keeps two nodes from
/// sending from one port: a slice rests for longer than it takes to notice. An address that is not known at all says
/// nothing: its object may have vanished, and its flows go on.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn revoked(key: *const FlowKey) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let found = flow::find(key);
    if !found.exists() {
        return 0;
    }
    let forward = &found.value;
    let Some(config) = maps::config() else { return 0 };
    // A flow through a gateway has the pod's own address, which is none of these.
    // SAFETY: read at once.
    let Some(address) = (unsafe { ADDRESSES.get(&forward.egress) }) else { return 0 };
    if config.own_peer == 0 || steer::owner(address.index, forward.egress_port) == config.own_peer {
        return 0;
    }
    let removed = found.end(key);
    if removed {
        maps::count(Counter::Revoked, 0);
    }
    u32::from(removed)
}

/// Removes an entry of `REVERSE` that no flow has. There should be none, but nothing else would ever give its port back.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn orphan(key: *const FlowKey, now: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let back = flow::find_back(key);
    if !back.exists() {
        return 0;
    }
    let value = &back.value;
    // A flow enters its way back first and itself a moment later.
    if now.saturating_sub(value.made) <= REST || has_flow(key, &back) {
        return 0;
    }
    back.bury();
    if now.saturating_sub(value.last_seen) <= REST {
        return 0;
    }
    if table::remove_reverse(key) == 0 {
        return 0;
    }
    ports::release(&flow::block_key(key, key.local, key.local_port), key.local_port);
    maps::count(Counter::Orphaned, 0);
    1
}

/// Whether the flow of an entry of `REVERSE` exists.
#[inline(always)]
fn has_flow(key: &FlowKey, back: &Back) -> bool {
    let forward = flow::find(&back.value.forward_key(key));
    forward.exists() && (forward.value.egress, forward.value.egress_port) == (key.local, key.local_port)
}

/// Lets a high-water mark that has been read begin anew at what is in use.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn peak(read: *const PeakKey) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(read) = (unsafe { read.as_ref() }) else { return 0 };
    let Some(block) = BLOCKS.get_ptr_mut(&read.block) else { return 0 };
    // SAFETY: map values stay readable until the program ends.
    let value = unsafe { &mut *block };
    let used = value.used & !BLOCK_DEAD;
    if used >= read.high || !atomics::compare_exchange(&raw mut value.high, read.high, used) {
        return 0;
    }
    // Whoever took a port just before may have seen the old mark, and has counted the port already.
    ports::note_high(value);
    1
}

/// See `load::settle`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn settled(fix: *const LoadFix, now: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    unsafe { fix.as_ref() }.map_or(0, |fix| load::settle(fix, now))
}

/// Removes a block without ports in use.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn block(key: *const BlockKey, now: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    let Some(block) = BLOCKS.get_ptr_mut(key) else { return 0 };
    // SAFETY: map values stay readable until the program ends.
    let value = unsafe { &mut *block };
    if now.saturating_sub(value.last_used) < BLOCK_IDLE {
        return 0;
    }
    // From here on whoever wants a port of it sees the flag, waits for the next look-up, and makes a new block.
    if !atomics::compare_exchange(&raw mut value.used, 0, BLOCK_DEAD) || BLOCKS.remove(key).is_err() {
        return 0;
    }
    load::discharge_block(key.egress);
    1
}
