//! `kubectl aegis`: who leaves from where, and why; what a change would do; and the same decisions as the operator and the agents make,
//! by the same code. Commands are pure functions of a [`state::State`], which comes from a cluster or from files.

pub mod allowlist;
pub mod args;
pub mod cluster;
pub mod completion;
pub mod decision;
pub mod describe;
pub mod drain;
pub mod drops;
pub mod files;
pub mod flows;
pub mod output;
pub mod plan;
pub mod policies;
pub mod schema;
pub mod state;
pub mod status;
pub mod top;
pub mod trace;
pub mod usage;
