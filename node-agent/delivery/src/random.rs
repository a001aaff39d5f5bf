//! Numbers that differ from agent to agent. Nothing secret hangs on them.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Any number: the keys of the standard library's hash maps come from the operating system.
pub(crate) fn number() -> u64 {
    RandomState::new().build_hasher().finish()
}
