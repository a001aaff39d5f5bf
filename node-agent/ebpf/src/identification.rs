//! Gives packets that can be fragmented an identification that no other node and no other pod gives to what it sends from the
//! same egress address to the same origin (RFC 6864 section 5.3.1).

use crate::atomics;
use crate::headers::{DF, ETH_LEN, Ipv4, MF, OFFSET};
use crate::maps::{self, HOLDINGS, IDENTIFICATIONS};
use aegis_common::{COUNTERS_OF_IDENTIFICATIONS, mix, nth_slice};
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;

/// Whether the identification of a packet can matter: it is a fragment, or may become some on its way (section 4: not "atomic").
#[inline(always)]
pub fn matters(ip: &Ipv4) -> bool {
    u16::from_be(ip.fragment) & (DF | MF | OFFSET) != DF
}

/// The identification of the next packet from an egress address to an origin, in host order; for one that is yet to be cut into
/// `count` segments, which are numbered onwards, that of the first. `port` is the flow's. A function of its own for the verifier's
/// sake, like `take` in `ports`, and for that of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn next_identification(egress: u32, remote: u32, port_protocol: u32, count: u32) -> u32 {
    let seed = maps::config().map_or(0, |config| config.seed);
    let pair = mix(egress ^ remote.rotate_left(16)) ^ port_protocol & 0xff;
    let Some(counter) = IDENTIFICATIONS.get_ptr_mut(mix(pair) & (COUNTERS_OF_IDENTIFICATIONS - 1)) else {
        return 0;
    };
    // From the outside nobody is to know where an origin's numbers begin (RFC 6864 does not ask for it, RFC 7739 says why).
    let start = mix(pair ^ seed);
    let count = if count == 0 { 1 } else { count };
    let mut number = 0;
    let mut attempt = 0;
    // Segments are to be of one slice.
    while attempt < 4 {
        number = atomics::fetch_add(counter, count).wrapping_add(start);
        if (number & 0xff) + count <= 256 {
            break;
        }
        attempt += 1;
    }
    // SAFETY: read at once; see `ports::step`.
    let slices = unsafe { HOLDINGS.get(&egress) };
    // Where all slices drain, the flow's own is still this node's.
    let slice =
        slices.and_then(|holding| nth_slice(&holding.allowed, number >> 8)).unwrap_or(port_protocol >> 24);
    slice << 8 | number & 0xff
}

/// Writes the identification of a packet, with the IP checksum.
#[inline(always)]
pub fn write(ctx: &TcContext, ip: &Ipv4, identification: u16) -> Result<(), i64> {
    let new = identification.to_be();
    ctx.l3_csum_replace(ETH_LEN + 10, u64::from(ip.id), u64::from(new), 2)?;
    ctx.store(ETH_LEN + 4, &new, 0)
}

/// Segments that a packet is yet to be cut into.
#[inline(always)]
pub fn segments(skb: *mut __sk_buff) -> u32 {
    // SAFETY: a field of the context.
    unsafe { (*skb).gso_segs }
}
