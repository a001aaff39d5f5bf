//! Counting new flows by the rule that has decided about them.

use crate::maps::RULES;
use aegis_common::*;

/// The flow has left from an allocation.
pub const LEFT: u32 = 0;
/// It was refused for want of something to leave from.
pub const LACKED: u32 = 1;
/// It was refused, as the rule says.
pub const DENIED: u32 = 2;
/// From here on: what a policy that only observes would have done (`WOULD_*`).
pub const WOULD: u32 = 3;

/// Counts a new flow for the rule that a verdict of this generation names. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn count_flow(generation: u32, number: u32, what: u32) -> u32 {
    let Some(index) = rule_index(generation, number) else { return 0 };
    let Some(value) = RULES.get_ptr_mut(index) else { return 0 };
    // SAFETY: a per-CPU value; see `maps::count`.
    let value = unsafe { &mut *value };
    match what {
        LEFT => value.left += 1,
        LACKED => value.lacked += 1,
        DENIED => value.denied += 1,
        other => value.would[(other - WOULD) as usize & 3] += 1,
    }
    0
}

/// The rule's own number.
#[inline(always)]
pub fn number(binding: u32) -> u32 {
    binding & 0xffff
}
