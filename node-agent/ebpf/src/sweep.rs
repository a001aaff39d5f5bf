//! `sweep`: removes flows and blocks that are over.
//!
//! The agent finds candidates by reading the maps from outside, since a scan inside BPF would hold up packets. What it found
//! may have changed meanwhile, so each candidate is judged again here. The agent runs this program through
//! `BPF_PROG_TEST_RUN`; the packet is a list of candidates.

use crate::atomics;
use crate::maps::{self, ALLOCATIONS, BLOCKS, FORWARD, REVERSE};
use crate::snat::{remove, reverse_key};
use crate::xdp;
use aegis_common::*;
use aya_ebpf::programs::XdpContext;

/// Returns how many candidates were removed.
pub fn run(ctx: &XdpContext) -> u32 {
    let Some(kind) = xdp::at::<u32>(ctx, 0) else { return 0 };
    // SAFETY: within the frame.
    let kind = unsafe { *kind };
    let now = maps::now();
    let mut removed = 0;
    let mut at = 0;
    while at < SWEEP_BATCH {
        let gone = match kind {
            SWEEP_FLOWS => match xdp::at::<FlowKey>(ctx, SWEEP_HEADER + at * size_of::<FlowKey>()) {
                // SAFETY: within the frame.
                Some(key) => flow(unsafe { *key }, now),
                None => break,
            },
            _ => match xdp::at::<BlockKey>(ctx, SWEEP_HEADER + at * size_of::<BlockKey>()) {
                // SAFETY: within the frame.
                Some(key) => block(unsafe { *key }, now),
                None => break,
            },
        };
        removed += u32::from(gone);
        at += 1;
    }
    removed
}

/// Removes a flow that is over.
#[inline(never)]
fn flow(key: FlowKey, now: u32) -> bool {
    // SAFETY: copied at once; the last packet may come while we judge, see below.
    let Some(forward) = (unsafe { FORWARD.get(&key) }).copied() else { return false };
    let reverse_key = reverse_key(&key, forward.egress, forward.egress_port);
    // SAFETY: copied at once.
    let reverse = (unsafe { REVERSE.get(&reverse_key) }).copied().unwrap_or_default();
    let Some(allocation) = ALLOCATIONS.get(u32::from(forward.allocation)) else { return false };
    let over = if abandoned(&key, &forward) {
        bury(&reverse_key);
        now.saturating_sub(forward.last_seen) > REST
    } else {
        false
    };
    if !over && !expired(key.protocol, &forward, &reverse, &allocation.timeouts, now) {
        return false;
    }
    // A packet that comes right now makes the flow anew, with another port: after this much silence that is what
    // the origin expects as well.
    remove(&key, &forward);
    maps::count(Counter::Expired, 0);
    true
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
    match maps::pod(generation, key.local) {
        Some(pod) => pod.incarnation != forward.incarnation,
        // Or the policy was switched between the two look-ups, and its pods are gone with it.
        None => maps::generation(config) == generation,
    }
}

/// What arrives for the flow from now on is dropped: the next pod with the address has not asked for it.
#[inline(always)]
fn bury(key: &FlowKey) {
    let Some(flow) = REVERSE.get_ptr_mut(key) else { return };
    // SAFETY: an aligned word in a map's value, which stays readable until the program ends.
    unsafe { (&raw mut (*flow).pod).write_volatile(0) };
}

/// Removes a block without ports in use.
#[inline(never)]
fn block(key: BlockKey, now: u32) -> bool {
    let Some(block) = BLOCKS.get_ptr_mut(&key) else { return false };
    // SAFETY: map values stay readable until the program ends.
    let value = unsafe { &mut *block };
    if now.saturating_sub(value.last_used) < BLOCK_IDLE {
        return false;
    }
    // From here on whoever wants a port of it sees the flag, waits for the next look-up, and makes a new block.
    atomics::compare_exchange(&raw mut value.used, 0, BLOCK_DEAD) && BLOCKS.remove(&key).is_ok()
}
