//! The fast path: packets of established flows go between the pod-facing device and the uplink without the host stack (routing,
//! conntrack, nftables). Who may send, from where and to whom is decided by the same programs as ever: that at the uplink translates,
//! and XDP lets in only what a flow asked for.
//!
//! What the stack has to see goes through it: packets that open or close a connection, for conntrack; what is in fragments, has
//! options, is too large, or whose next hop is not known, for it to answer or resolve.

use crate::atomics;
use crate::checksum;
use crate::flow::{self, Found};
use crate::headers::{self, ETH_LEN, ETH_P_IP, Ethernet, FIN, Ipv4, MF, OFFSET, Packet, RST, SYN, TCP, UDP};
use crate::maps;
use aegis_common::{Counter, FlowKey, Phase, SEEN_ACK, SEEN_FAST, SEEN_FIN, SEEN_RST, TO_UPLINK, phase};
use aya_ebpf::bindings::{__sk_buff, bpf_fib_lookup as FibLookup};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_redirect};
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::TcContext;

/// Devices with programs: [`TO_UPLINK`] or [`TO_POD`](aegis_common::TO_POD), by interface index. Not pinned: it says what these very
/// programs are attached to.
#[map]
pub static DEVICES: HashMap<u32, u32> = HashMap::with_max_entries(1024, 0);

const AF_INET: u8 = 2;
const DNS: u16 = 53;
/// Version 4, and a header without options.
const PLAIN: u8 = 0x45;

/// Whether a packet of a flow that saw this in its direction neither opens nor closes it.
#[inline(always)]
pub fn goes_on(seen: u8, flags: u8) -> bool {
    flags & (SYN | FIN | RST) == 0 && seen & (SEEN_FIN | SEEN_RST) == 0
}

/// Whether the packet is whole, has no options, and may be forwarded.
#[inline(always)]
pub fn is_plain(ip: &Ipv4) -> bool {
    ip.version_length == PLAIN && u16::from_be(ip.fragment) & (OFFSET | MF) == 0 && ip.ttl > 1
}

/// Whether a packet from a pod may take the fast path. The first one that may lets its flow's answers take it too.
#[inline(always)]
pub fn may(found: &Found, key: &FlowKey, ip: &Ipv4, flags: u8) -> bool {
    let flow = &found.value;
    // DNS goes through the tables: nftables tells whose answers are looked at first.
    if flow.peer != 0 || key.remote_port == DNS || !is_plain(ip) || !goes_on(flow.seen, flags) {
        return false;
    }
    flow.seen & SEEN_FAST != 0 || learn(found, key)
}

/// Whether conntrack has seen packets of both sides, and over TCP the whole handshake; then it is noted.
#[inline(always)]
fn learn(found: &Found, key: &FlowKey) -> bool {
    let back = flow::find_back(&flow::reverse_key(key, &found.value));
    let established = match key.protocol {
        // An acknowledgement, so that nothing more changes what the way back has seen until the connection ends.
        TCP => {
            back.value.seen & SEEN_ACK != 0
                && matches!(phase(TCP, found.value.seen, back.value.seen), Phase::Established)
        }
        UDP => back.value.last_seen != 0,
        _ => false,
    };
    if !back.exists() || !established {
        return false;
    }
    // Answers first: while the flow itself lacks it, it is set again.
    atomics::fetch_or_u32(back.seen_cell(), u32::from(SEEN_FAST));
    atomics::fetch_or_u32(found.seen_cell(), u32::from(SEEN_FAST));
    true
}

/// Does what the host stack does when it forwards, towards a device of this kind. Gives the verdict; 0 = the host stack has to have
/// the packet. A function of its own for the verifier's sake, like `take` in `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn pass_on(skb: *mut __sk_buff, kind: u32) -> u32 {
    let ctx = &TcContext::new(skb);
    let Some(packet) = Packet::read(ctx) else { return 0 };
    let Some(ports) = packet.transport(ctx) else { return 0 };
    let ip = &packet.ip;
    if !is_plain(ip) {
        return 0;
    }
    // SAFETY: all-zero is a valid value of this plain C structure.
    let mut fib: FibLookup = unsafe { core::mem::zeroed() };
    fib.family = AF_INET;
    fib.l4_protocol = ip.protocol;
    fib.sport = ports.source_port().to_be();
    fib.dport = ports.destination_port().to_be();
    // SAFETY: a field of the context.
    fib.ifindex = unsafe { (*skb).ifindex };
    fib.__bindgen_anon_1.tot_len = headers::largest(ctx, &packet, 0).min(u32::from(u16::MAX)) as u16;
    fib.__bindgen_anon_2.tos = ip.tos;
    fib.__bindgen_anon_3.ipv4_src = ip.source;
    fib.__bindgen_anon_4.ipv4_dst = ip.destination;
    let size = size_of::<FibLookup>() as i32;
    // SAFETY: context and structure are valid for the call.
    if unsafe { bpf_fib_lookup(skb.cast(), &raw mut fib, size, 0) } != 0 {
        return 0;
    }
    // SAFETY: read at once.
    if unsafe { DEVICES.get(&fib.ifindex) }.is_none_or(|other| *other != kind) {
        return 0;
    }
    match rewrite(ctx, ip, &fib) {
        Ok(()) => {
            let counter = if kind == TO_UPLINK { Counter::FastOut } else { Counter::FastIn };
            maps::count(counter, packet.length);
            // SAFETY: plain arguments.
            unsafe { bpf_redirect(fib.ifindex, 0) as u32 }
        }
        Err(_) => 0,
    }
}

/// The Ethernet header, and a hop less, in one write.
#[inline(always)]
fn rewrite(ctx: &TcContext, ip: &Ipv4, fib: &FibLookup) -> Result<(), i64> {
    let word = |ttl| u16::from_be_bytes([ttl, ip.protocol]).to_be();
    let change = checksum::difference16(word(ip.ttl), word(ip.ttl - 1));
    let head = Head {
        ethernet: Ethernet { destination: fib.dmac, source: fib.smac, kind: ETH_P_IP },
        version_length: ip.version_length,
        tos: ip.tos,
        total_length: ip.total_length,
        id: ip.id,
        fragment: ip.fragment,
        ttl: ip.ttl - 1,
        protocol: ip.protocol,
        checksum: checksum::apply(ip.checksum, change),
    };
    ctx.store(0, &head, 0)
}

/// A frame up to the addresses of its IP header.
#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    ethernet: Ethernet,
    version_length: u8,
    tos: u8,
    total_length: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
}
const _: () = assert!(size_of::<Head>() == ETH_LEN + 12);
