//! Atomic operations that BPF has (cpu v3) and `core::sync::atomic` does not offer on this target.
//!
//! Always AcqRel: with `Relaxed` LLVM picks the instruction that does not fetch, and the call silently returns its
//! operand instead of the old value.

use core::intrinsics::{self, AtomicOrdering::AcqRel, AtomicOrdering::Acquire};

/// Adds, and returns the old value.
#[inline(always)]
pub fn fetch_add(cell: *mut u32, value: u32) -> u32 {
    // SAFETY: callers pass a pointer into a map value, which stays valid while the program runs (RCU).
    unsafe { intrinsics::atomic_xadd::<u32, u32, { AcqRel }>(cell, value) }
}

/// Adds to a 64-bit cell, and returns the old value.
#[inline(always)]
pub fn fetch_add_u64(cell: *mut u64, value: u64) -> u64 {
    // SAFETY: as in `fetch_add`.
    unsafe { intrinsics::atomic_xadd::<u64, u64, { AcqRel }>(cell, value) }
}

/// Sets bits, and returns the old value.
#[inline(always)]
pub fn fetch_or(cell: *mut u64, bits: u64) -> u64 {
    // SAFETY: as in `fetch_add`.
    unsafe { intrinsics::atomic_or::<u64, u64, { AcqRel }>(cell, bits) }
}

/// Keeps only the given bits, and returns the old value.
#[inline(always)]
pub fn fetch_and(cell: *mut u64, bits: u64) -> u64 {
    // SAFETY: as in `fetch_add`.
    unsafe { intrinsics::atomic_and::<u64, u64, { AcqRel }>(cell, bits) }
}

/// Sets bits of a 32-bit cell, and returns the old value.
#[inline(always)]
pub fn fetch_or_u32(cell: *mut u32, bits: u32) -> u32 {
    // SAFETY: as in `fetch_add`.
    unsafe { intrinsics::atomic_or::<u32, u32, { AcqRel }>(cell, bits) }
}

/// Keeps only the given bits of a 32-bit cell, and returns the old value.
#[inline(always)]
pub fn fetch_and_u32(cell: *mut u32, bits: u32) -> u32 {
    // SAFETY: as in `fetch_add`.
    unsafe { intrinsics::atomic_and::<u32, u32, { AcqRel }>(cell, bits) }
}

/// Stores `new` if the cell holds `old`; true if it did.
#[inline(always)]
pub fn compare_exchange(cell: *mut u32, old: u32, new: u32) -> bool {
    // SAFETY: as in `fetch_add`.
    unsafe { intrinsics::atomic_cxchg::<u32, { AcqRel }, { Acquire }>(cell, old, new).0 == old }
}

/// Stores `new` if the cell holds `old`; true if it did.
#[inline(always)]
pub fn compare_exchange_u64(cell: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: as in `fetch_add`.
    unsafe { intrinsics::atomic_cxchg::<u64, { AcqRel }, { Acquire }>(cell, old, new).0 == old }
}
