//! IPv6: reading packets. What becomes of them is in the modules below.
//!
//! Each direction is a function of its own for the verifier's sake, and for that of the stack, which IPv4 fills.

mod by_node;
pub mod classify;
pub mod inbound;
pub mod leave;
pub mod lookup;
mod ndp;
mod refuse;
pub mod single;
mod too_big;

use crate::headers::{ETH_LEN, TCP, UDP};
use aegis_common::{Address6, Flow6Key};
use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::helpers::bpf_xdp_load_bytes;
use aya_ebpf::programs::{TcContext, XdpContext};

pub const ETH_P_IPV6: u16 = 0x86ddu16.to_be();
pub const IPV6_LEN: usize = 40;
/// Where the first header after the IPv6 header begins in a frame.
pub const START: usize = ETH_LEN + IPV6_LEN;
pub const ICMPV6: u8 = 58;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
/// Extension headers that are followed; RFC 8200 section 4.1 has each at most once, but for one.
const MAX_HEADERS: u32 = 8;

/// The packet is no fragment.
pub const WHOLE: u32 = 0;
/// It is the first of several.
pub const FIRST: u32 = 1;
/// It is another one: it has no transport header.
pub const LATER: u32 = 2;

/// IPv6 (RFC 8200 section 3).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv6 {
    pub version_flow: u32,
    pub payload_length: u16,
    pub next: u8,
    pub hop_limit: u8,
    pub source: Address6,
    pub destination: Address6,
}

impl Ipv6 {
    #[inline(always)]
    pub fn is_sound(&self) -> bool {
        self.version_flow.to_ne_bytes()[0] >> 4 == 6
    }

    /// Length of the packet.
    #[inline(always)]
    pub fn length(&self) -> u32 {
        IPV6_LEN as u32 + u32::from(u16::from_be(self.payload_length))
    }
}

/// What follows the IPv6 header.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Layers {
    /// Where the transport header begins, from the start of the frame.
    pub offset: u32,
    /// Its protocol number.
    pub protocol: u32,
    /// [`WHOLE`], [`FIRST`] or [`LATER`].
    pub fragment: u32,
    /// Identification of the datagram, if it is in fragments.
    pub id: u32,
}

/// Follows the extension headers of a packet whose first one is `next`, at `offset`; 0 if they are not sound. A function of its own, as
/// all of these.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn follow_headers(skb: *mut __sk_buff, next: u32, offset: u32, layers: *mut Layers) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(place) = (unsafe { layers.as_mut() }) else { return 0 };
    *place = Layers { offset, protocol: next, fragment: WHOLE, id: 0 };
    follow(|| next_header(skb, layers))
}

/// The same in XDP.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn follow_headers_xdp(xdp: *mut xdp_md, next: u32, offset: u32, layers: *mut Layers) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(place) = (unsafe { layers.as_mut() }) else { return 0 };
    *place = Layers { offset, protocol: next, fragment: WHOLE, id: 0 };
    follow(|| next_header_xdp(xdp, layers))
}

/// One header further, seen by the verifier once and not for each way through those before.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn next_header(skb: *mut __sk_buff, layers: *mut Layers) -> u32 {
    let ctx = TcContext::new(skb);
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(layers) = (unsafe { layers.as_mut() }) else { return UNSOUND };
    step(layers, |at| ctx.load(at as usize).ok())
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn next_header_xdp(xdp: *mut xdp_md, layers: *mut Layers) -> u32 {
    let ctx = XdpContext::new(xdp);
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(layers) = (unsafe { layers.as_mut() }) else { return UNSOUND };
    step(layers, |at| load(&ctx, at))
}

/// Copies a `T` out of a frame in XDP, at an offset that the verifier does not know.
#[inline(always)]
pub fn load<T: Copy>(ctx: &XdpContext, offset: u32) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes all of `value`, or fails.
    let failed =
        unsafe { bpf_xdp_load_bytes(ctx.ctx, offset, value.as_mut_ptr().cast(), size_of::<T>() as u32) != 0 };
    // SAFETY: as above; `T` is plain data.
    if failed { None } else { Some(unsafe { value.assume_init() }) }
}

const UNSOUND: u32 = 0;
const FOUND: u32 = 1;
const GOES_ON: u32 = 2;

#[inline(always)]
fn follow(mut next: impl FnMut() -> u32) -> u32 {
    let mut seen = 0;
    while seen < MAX_HEADERS {
        seen += 1;
        match next() {
            GOES_ON => {}
            FOUND => return 1,
            _ => return 0,
        }
    }
    0
}

#[inline(always)]
fn step(layers: &mut Layers, load: impl Fn(u32) -> Option<[u8; 8]>) -> u32 {
    let protocol = layers.protocol as u8;
    if layers.fragment == LATER
        || !matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT | AUTHENTICATION)
    {
        return FOUND;
    }
    // Each of these is at least this long.
    let Some(header) = load(layers.offset) else { return UNSOUND };
    layers.protocol = u32::from(header[0]);
    layers.offset += match protocol {
        FRAGMENT => {
            let place = u16::from_be_bytes([header[2], header[3]]);
            layers.id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            if place & 0xfff8 != 0 {
                layers.fragment = LATER;
            } else if place & 1 != 0 {
                // One that is neither is whole (RFC 6946).
                layers.fragment = FIRST;
            }
            8
        }
        AUTHENTICATION => (u32::from(header[1]) + 2) * 4,
        _ => (u32::from(header[1]) + 1) * 8,
    };
    GOES_ON
}

/// Whether its transport header has what tells flows apart.
#[inline(always)]
pub fn has_ports(protocol: u32) -> bool {
    protocol == u32::from(TCP) || protocol == u32::from(UDP) || protocol == u32::from(ICMPV6)
}

/// Ports of the first bytes of a transport header, as in [`Flow6Key`]; 0 of protocols without.
#[inline(always)]
pub fn ports(protocol: u8, header: [u8; 8]) -> u32 {
    let [a, b, c, d, e, f, ..] = header;
    match protocol {
        TCP | UDP => u32::from_be_bytes([a, b, c, d]),
        ICMPV6 => u32::from_be_bytes([e, f, 0, 0]),
        _ => 0,
    }
}

/// The same flow, as the other side's packets name it.
#[inline(always)]
pub fn turned(key: &Flow6Key) -> Flow6Key {
    let ports = match key.protocol as u8 {
        TCP | UDP => key.ports.rotate_left(16),
        _ => key.ports,
    };
    Flow6Key { local: key.remote, remote: key.local, ports, protocol: key.protocol }
}

/// Whether the ICMPv6 message is an error, which quotes the packet it is about (RFC 4443 section 2.1).
#[inline(always)]
pub fn is_error(kind: u8) -> bool {
    kind < 128
}
