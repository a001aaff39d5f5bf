//! What passing packets tell of a flow.

use crate::headers::{ACK, FIN, RST, SYN};
use aegis_common::{SEEN_ACK, SEEN_FIN, SEEN_RST, SEEN_SYN};

/// What a direction has seen after a segment with these flags. A segment that goes on after an RST shows that the RST
/// did not end the connection.
#[inline(always)]
pub fn seen_after(seen: u32, flags: u8) -> u32 {
    let mut seen = seen;
    if flags & RST != 0 {
        return seen | SEEN_RST;
    }
    seen &= !SEEN_RST;
    if flags & SYN != 0 {
        // The direction begins anew: a FIN that came late from the connection before says nothing of this one.
        seen = seen & !SEEN_FIN | SEEN_SYN;
    } else if flags & ACK != 0 {
        seen |= SEEN_ACK;
    }
    if flags & FIN != 0 {
        seen |= SEEN_FIN;
    }
    seen
}
