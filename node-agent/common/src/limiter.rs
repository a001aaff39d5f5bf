//! Limiting what is answered.

use crate::map_type;

/// Value of `LIMITER` (per-CPU array of one): answers given in the current second.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimiterValue {
    /// Second of boot time.
    pub second: u32,
    /// Answers given in it.
    pub answered: u32,
}
map_type!(LimiterValue, 8);
