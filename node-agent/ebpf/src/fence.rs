//! Deadlines of addresses (see `LeaseValue`): whatever bears an egress address asks here before it leaves.

use crate::maps::{HOLDINGS, LEASE};
use aegis_common::{Deadline, LeaseValue, NEVER, passed};
use aya_ebpf::helpers::bpf_ktime_get_boot_ns;

/// No deadline of the address has passed.
const AHEAD: u32 = 0;
const SOFT: u32 = 1;
const HARD: u32 = 2;

/// Whether nothing may leave from the address any more.
#[inline(always)]
pub fn is_closed(egress: u32) -> bool {
    deadline(egress) == HARD
}

/// Whether no flow may be opened from the address any more.
#[inline(always)]
pub fn opens_nothing(egress: u32) -> bool {
    deadline(egress) != AHEAD
}

/// A function of its own for the verifier's sake, like `take` in `ports`: it would follow each outcome through the rest of
/// the program, at each of the many places that ask.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn deadline(egress: u32) -> u32 {
    let Some(lease) = LEASE.get_ptr(0) else { return HARD };
    // The usual case costs no more than this.
    if soonest(lease) == NEVER { AHEAD } else { find_deadline(egress) }
}

#[inline(always)]
fn soonest(lease: *const LeaseValue) -> u64 {
    // SAFETY: an aligned word in a map's value, which the agent may be writing.
    unsafe { (&raw const (*lease).soonest).read_volatile() }
}

/// A function of its own for the verifier's sake, like `take` in `ports`, and for that of the stack. The clock is read last:
/// an old lease only makes a deadline pass earlier.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_deadline(egress: u32) -> u32 {
    let Some(lease) = LEASE.get_ptr(0) else { return HARD };
    let soonest = soonest(lease);
    // SAFETY: no arguments.
    if unsafe { bpf_ktime_get_boot_ns() } <= soonest {
        return AHEAD;
    }
    // SAFETY: read at once; a fence changes together with the epoch that the agent reports afterwards.
    let Some(holding) = (unsafe { HOLDINGS.get(&egress) }) else { return AHEAD };
    // SAFETY: as in `soonest`.
    let renewed = unsafe { (&raw const (*lease).renewed).read_volatile() };
    // SAFETY: no arguments.
    match passed(holding, renewed, unsafe { bpf_ktime_get_boot_ns() }) {
        Deadline::Ahead => AHEAD,
        Deadline::Soft => SOFT,
        Deadline::Hard => HARD,
    }
}
