//! Policies that only observe: counting the flows that they would have decided about.
//!
//! Most of these are flows of nobody's: they are told by what opens one, and by being remembered for a while.

use crate::headers::{self, ACK, ETH_LEN, Packet, SYN, TCP};
use crate::maps::{self, OBSERVED};
use crate::rule::{self, WOULD};
use aegis_common::*;
use aya_ebpf::bindings::{__sk_buff, BPF_ANY};
use aya_ebpf::programs::TcContext;

/// Seconds after which a packet that could open a flow does: a SYN is sent again after half of this at most.
const QUIET_TCP: u32 = 60;
const QUIET: u32 = 300;

/// Counts an IPv4 packet that opens a flow, by what the verdict about it says. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn observe(skb: *mut __sk_buff, generation: u32, binding: u32) -> u32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = Packet::read(ctx) else { return 0 };
    let ip = &packet.ip;
    let Some(transport) = packet.transport(ctx) else { return 0 };
    let (opens, ports) = match ip.protocol {
        headers::TCP => {
            let flags = packet.tcp_flags(ctx).unwrap_or(0);
            (flags & (SYN | ACK) == SYN, pair(transport.source_port(), transport.destination_port()))
        }
        headers::UDP => (true, pair(transport.source_port(), transport.destination_port())),
        headers::ICMP => (transport.icmp_type() == headers::ICMP_ECHO, u32::from(transport.icmp_id())),
        _ => (true, 0),
    };
    let key = ObservedKey { addresses: [ip.source, ip.destination], ports, protocol: ip.protocol.into() };
    if opens { note(&key, generation, binding) } else { 0 }
}

#[inline(always)]
fn pair(local: u16, remote: u16) -> u32 {
    u32::from(local) << 16 | u32::from(remote)
}

/// The same of an IPv6 packet. `offset` is where its transport header is; 0 = it has none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn observe6(
    skb: *mut __sk_buff,
    flow: *const Flow6Key,
    offset: u32,
    generation: u32,
    binding: u32,
) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return 0 };
    let ctx = TcContext::new(skb);
    let byte = |at: usize| ctx.load::<u8>(offset as usize + at).unwrap_or(0);
    const TCP6: u32 = TCP as u32;
    const ICMPV6: u32 = 58;
    let opens = match flow.protocol {
        TCP6 => offset as usize > ETH_LEN && byte(13) & (SYN | ACK) == SYN,
        ICMPV6 => offset as usize > ETH_LEN && byte(0) == 128,
        _ => true,
    };
    let (local, remote) = (&flow.local, &flow.remote);
    let key = ObservedKey {
        addresses: [
            mix(local[0] ^ mix(local[1])) ^ mix(local[2] ^ mix(local[3] ^ remote[0])),
            mix(remote[1] ^ mix(remote[2] ^ mix(remote[3]))) ^ local[3],
        ],
        ports: flow.ports,
        // Apart from IPv4.
        protocol: flow.protocol | 1 << 16,
    };
    if opens { note(&key, generation, binding) } else { 0 }
}

#[inline(always)]
fn note(key: &ObservedKey, generation: u32, binding: u32) -> u32 {
    let Some((number, would)) = observed(binding) else { return 0 };
    let now = maps::now();
    let quiet = if key.protocol & 0xff == u32::from(TCP) { QUIET_TCP } else { QUIET };
    // No `Option`, for the verifier's sake: see `maps::NO_PORT`.
    // SAFETY: copied at once.
    let long_ago = now.wrapping_sub(quiet);
    let seen = unsafe { OBSERVED.get(key) }.copied().unwrap_or(long_ago);
    if seen != now {
        let _ = OBSERVED.insert(key, &now, u64::from(BPF_ANY));
    }
    if now.wrapping_sub(seen) < quiet {
        return 0;
    }
    rule::count_flow(generation, number, WOULD + would)
}
