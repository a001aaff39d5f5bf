//! The rules of Aegis, without I/O: ports and slices, pools of addresses, planning who holds what, checking a plan,
//! and compiling bindings into what a node must enforce.
//!
//! Nothing here reads a clock, draws a random number or talks to anybody. Time is an argument (whole seconds since
//! the Unix epoch), ties are broken by name, and the same input gives the same output.
#![forbid(unsafe_code)]

pub mod model;
pub mod slice;
