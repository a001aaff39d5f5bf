//! Keys and values of the eBPF maps, shared by the programs and the agent.
//!
//! Every type is `repr(C)`, has no implicit padding and an asserted size, because the kernel compares map keys
//! byte by byte and because pinned maps outlive the agent that made them: a change of any layout here must raise
//! [`SCHEMA`], so that an upgraded agent pins new maps beside the old ones instead of misreading them, and add a step to
//! `node-agent/src/carry/translate.rs`, which says what becomes of the old ones' entries.
//!
//! Conventions: IPv4 addresses are `u32` holding the four octets in network byte order (what the packet holds when
//! read natively); ports and ICMP identifiers are `u16` in **host** order; times are whole seconds of
//! `CLOCK_BOOTTIME`, which survives suspension and never jumps with the wall clock.
#![no_std]

mod arp;
mod config;
mod counter;
mod devices;
mod early;
mod enter;
mod expiry;
mod fence;
mod flow;
mod identification;
mod limiter;
mod load;
mod metadata;
mod meter;
mod ndp;
mod permutation;
mod policy;
mod ports;
mod single;
mod six;
mod slots;
mod sweep;
mod table;

pub use arp::*;
pub use config::*;
pub use counter::*;
pub use devices::*;
pub use early::*;
pub use enter::*;
pub use expiry::*;
pub use fence::*;
pub use flow::*;
pub use identification::*;
pub use limiter::*;
pub use load::*;
pub use metadata::*;
pub use meter::*;
pub use ndp::*;
pub use permutation::*;
pub use policy::*;
pub use ports::*;
pub use single::*;
pub use six::*;
pub use slots::*;
pub use sweep::*;
pub use table::*;

/// Version of the layout of all maps; part of the path under which they are pinned.
pub const SCHEMA: u32 = 7;

/// Asserts a type's size at compile time and, for the agent, makes it usable as a map key or value.
macro_rules! map_type {
    ($name:ty, $size:expr) => {
        const _: () = assert!(core::mem::size_of::<$name>() == $size);
        // SAFETY: repr(C), only integers and arrays of integers, no padding (the size is asserted above).
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    };
}
pub(crate) use map_type;
