//! The word that XDP writes before a packet (metadata) which it has translated back, for the program at tcx ingress.

/// The packet goes to the host stack, and has to be marked.
pub const TRANSLATED_IN: u32 = 0xae91_0006;
/// The packet may go to the pod by the fast path.
pub const TRANSLATED_FAST: u32 = 0xae91_0007;
