//! The rules of Aegis, without I/O: ports and slices, pools of addresses, planning who holds what, checking a plan,
//! and compiling bindings into what a node must enforce.
//!
//! Nothing here reads a clock, draws a random number or talks to anybody. Time is an argument (whole seconds since
//! the Unix epoch), ties are broken by name, and the same input gives the same output.
//!
//! | to change | look in |
//! |---|---|
//! | which prefix counts, which of its addresses are free | `prefix` |
//! | who may have addresses of a prefix, and how many | `delegation` |
//! | which addresses an allocation gets or gives back | `plan::addresses` |
//! | how many slices each node is to hold: minima, needs, fair shares | `plan::targets` |
//! | the share of a site | `site`, `selector` |
//! | which slices those are, and when a node loses them | `plan::holdings`, `plan::board` |
//! | what conditions say | `plan::outcomes`, `plan::delegated` |
//! | what a plan must never do | `audit` |
//! | what a node makes of what it is given: what it opens, follows, reports as drained | `holding` |
//! | how many slices a node wants, and for how long flows wait for them | `growth` |
//! | how long a slice has rested by a clock that nobody sets | `rests` |
//! | deadlines of nodes that do not answer | `fence` |
//! | which pod's packets are covered by which binding | `policy` |
//! | through whom a node without slices sends | `gateway` |
//! | which node answers ARP for an address when nobody does | `announcer` |
#![forbid(unsafe_code)]

pub mod announcer;
pub mod audit;
mod delegation;
pub mod diff;
pub mod egress;
pub mod fence;
pub mod fragment;
pub mod gateway;
pub mod growth;
pub mod holding;
pub mod model;
pub mod plan;
pub mod policy;
mod prefix;
pub mod reason;
mod rendezvous;
pub mod rests;
pub mod selector;
pub mod site;
pub mod slice;

pub use audit::{Violation, audit};
pub use diff::{Change, diff};
pub use egress::{Egress, Family, Kind};
pub use fragment::fragment_homes;
pub use plan::{AllocationOutcome, Plan, PrefixOutcome, Verdict, plan};
pub use policy::{NodePolicy, PolicyInputs, compile};
