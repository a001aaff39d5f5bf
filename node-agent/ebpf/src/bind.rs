//! Sockets that have the egress address themselves (`mode: Bind`): giving it to them when they connect, and telling their packets
//! from forged ones, on the way out and on the way in.
//!
//! Only TCP: the kernel sees to it that no two connections have the same four numbers, which it does not for datagrams.

use crate::atomics;
use crate::fence;
use crate::headers::{self, ACK, Packet, SYN};
use crate::host;
use crate::maps::{self, ADDRESSES, ALLOCATIONS, BINDS};
use crate::meter;
use crate::rule;
use crate::xdp;
use aegis_common::*;
use aya_ebpf::bindings::{__sk_buff, BPF_NOEXIST, bpf_sock_addr, bpf_sock_tuple, xdp_md};
use aya_ebpf::helpers::generated::{
    bpf_bind, bpf_get_current_ancestor_cgroup_id, bpf_get_prandom_u32, bpf_ktime_get_boot_ns, bpf_loop,
    bpf_set_retval, bpf_setsockopt, bpf_sk_fullsock, bpf_sk_release, bpf_skb_ancestor_cgroup_id,
    bpf_skc_lookup_tcp,
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::{SockAddrContext, XdpContext};
use core::ffi::c_void;

const AF_INET: u16 = 2;
const SOCK_STREAM: u32 = 1;
const SOL_SOCKET: i32 = 1;
const SO_REUSEADDR: i32 = 2;
const SOL_TCP: i32 = 6;
const TCP_MAXSEG: i32 = 2;
const EADDRINUSE: i64 = -98;
const EADDRNOTAVAIL: i32 = -99;
/// States of a socket.
const TCP_SYN_SENT: u32 = 2;
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;
/// Look for sockets in the network namespace of the context.
const OWN_NAMESPACE: u64 = u64::MAX;

/// What a look-up of sockets asks for, as if by a packet that comes in.
#[repr(C)]
struct Tuple {
    remote: u32,
    local: u32,
    remote_port: u16,
    local_port: u16,
}

/// State of the socket that has these numbers, ports in host order; [`NO_SOCKET`] if none has.
#[inline(always)]
fn state_of(context: *mut c_void, local: u32, local_port: u16, remote: u32, remote_port: u16) -> u32 {
    let mut tuple = Tuple { remote, local, remote_port: remote_port.to_be(), local_port: local_port.to_be() };
    let place: *mut bpf_sock_tuple = (&raw mut tuple).cast();
    // SAFETY: the tuple has the size that is told; what is found is given back.
    unsafe {
        let socket = bpf_skc_lookup_tcp(context, place, size_of::<Tuple>() as u32, OWN_NAMESPACE, 0);
        if socket.is_null() {
            return NO_SOCKET;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        state
    }
}

const NO_SOCKET: u32 = 0;

/// Whether the socket is one end of a connection, or of what is left of one. One that listens is not.
#[inline(always)]
fn is_connection(state: u32) -> bool {
    state != NO_SOCKET && state != TCP_LISTEN && state != TCP_NEW_SYN_RECV
}

/// Whether a port is in a slice of this node's that is for sockets.
#[inline(always)]
fn is_kept(address: u32, port: u16) -> bool {
    // SAFETY: read at once; a torn read mixes two sets, and a slice changes its use only when it is empty.
    let Some(slices) = (unsafe { BINDS.get(&address) }) else { return false };
    slices.kept[usize::from(port >> 14)] >> (port >> 8 & 63) & 1 == 1
}

const ALLOW: i32 = 1;
const DENY: i32 = 0;

/// `connect`: gives a covered connection its address and port, unless the application has chosen for itself.
#[inline(always)]
pub fn connect(context: &SockAddrContext) -> i32 {
    let ctx = context.sock_addr;
    let Some(config) = maps::config() else { return ALLOW };
    if config.host_levels == 0 || maps::taking_over() {
        return ALLOW;
    }
    // SAFETY: fields of the context, which is valid while the program runs.
    let (kind, protocol, socket) = unsafe { ((*ctx).type_, (*ctx).protocol, (*ctx).__bindgen_anon_1.sk) };
    if protocol != u32::from(headers::TCP) || kind != SOCK_STREAM || socket.is_null() {
        return ALLOW;
    }
    // SAFETY: not null.
    if unsafe { (*socket).src_port != 0 || (*socket).src_ip4 != 0 } {
        return ALLOW;
    }
    let generation = maps::generation(config);
    let caller = caller(config.host_levels, generation);
    let class = (caller >> 32) as u32;
    if class == 0 || class == HOST_UNKNOWN {
        return ALLOW;
    }
    // SAFETY: as above.
    let (remote, port) = unsafe { ((*ctx).user_ip4, u16::from_be((*ctx).user_port as u16)) };
    let Some(verdict) = maps::verdict(generation, class, remote, headers::TCP, u32::from(port)) else {
        return ALLOW;
    };
    if verdict.action != ACTION_ALLOCATE || verdict.binding & VERDICT_BINDS == 0 {
        return ALLOW;
    }
    let allocation = u32::from(verdict.allocation);
    let binding = rule::number(verdict.binding);
    let mut key =
        FlowKey { local: 0, remote, local_port: 0, remote_port: port, protocol: headers::TCP, pad: [0; 3] };
    match seek(ctx, allocation, caller as u32, u32::from(port)) {
        BOUND => {
            maps::count(Counter::Bound, 0);
            rule::count_flow(generation, binding, rule::LEFT);
            // SAFETY: fields of the socket, which is valid while the program runs.
            unsafe { (key.local, key.local_port) = ((*socket).src_ip4, (*socket).src_port as u16) };
            meter::bound_begins(&key, allocation, binding);
            ALLOW
        }
        FULL => {
            maps::count(Counter::RefuseNoSocketPort, 0);
            maps::count_pressure(allocation, PressureValue { waited: 0, refused: 1 });
            meter::refuses(&key, allocation, binding, Counter::RefuseNoSocketPort as u32);
            // SAFETY: a number.
            unsafe { bpf_set_retval(EADDRNOTAVAIL) };
            DENY
        }
        // It is translated.
        _ => ALLOW,
    }
}

/// Class (upper half) and incarnation of the pod of the host network that the calling process belongs to; 0 = of none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn caller(levels: u32, generation: u32) -> u64 {
    let mut level = HOST_LEVELS;
    while level > 1 {
        level -= 1;
        if levels >> level & 1 == 0 {
            continue;
        }
        // SAFETY: a number.
        let group = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
        if group == 0 {
            continue;
        }
        if let Some(host) = maps::host(generation, group) {
            return u64::from(host.class) << 32 | u64::from(host.incarnation);
        }
    }
    0
}

/// The node has no slice for sockets of the allocation.
const NOWHERE: u32 = 0;
/// The socket is bound.
const BOUND: u32 = 1;
/// No port is free towards the destination.
const FULL: u32 = 2;
/// The socket can't be bound.
const UNFIT: u32 = 3;

/// How long a claim holds whose connection has not begun, in nanoseconds: the system call that it is made in has come to nothing
/// then, or is unbelievably late.
const CLAIM_NANOSECONDS: u64 = 1_000_000_000;

/// Ports that a `connect` has chosen and that the kernel does not yet know as a connection's, with when that was. Two that choose
/// at the same time would both be given the port, and the kernel refuse the second one's connection. An LRU map: its size is that
/// of system calls under way, and a forgotten claim matters only to another one at that moment.
#[map]
static CLAIMS: LruHashMap<FlowKey, u64> = LruHashMap::with_max_entries(4096, 0);

const EEXIST: i32 = -17;

/// Claims a port towards a destination; false if another has done so.
#[inline(always)]
fn claim(key: &FlowKey) -> bool {
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    if CLAIMS.insert(key, &now, u64::from(BPF_NOEXIST)) != Err(EEXIST) {
        return true;
    }
    let Some(claimed) = CLAIMS.get_ptr_mut(key) else { return false };
    // SAFETY: a value of the map; whoever else changes it does so as here.
    let since = unsafe { claimed.read_volatile() };
    now.saturating_sub(since) > CLAIM_NANOSECONDS && atomics::compare_exchange_u64(claimed, since, now)
}

/// Binds the socket to a free port of one of the allocation's addresses: a pod begins with the same one each time.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn seek(ctx: *mut bpf_sock_addr, allocation: u32, incarnation: u32, port: u32) -> u32 {
    let Some(value) = ALLOCATIONS.get(allocation) else { return NOWHERE };
    let count = value.count;
    let mut at = (u64::from(incarnation) * u64::from(count) >> 32) as u32;
    let (mut tried, mut outcome) = (0, NOWHERE);
    while tried < ADDRESSES_PER_ALLOCATION as u32 {
        if tried >= count {
            break;
        }
        tried += 1;
        let egress = value.addresses[at as usize & (ADDRESSES_PER_ALLOCATION - 1)];
        at += 1;
        if at >= count {
            at = 0;
        }
        match seek_at(ctx, egress, port) {
            NOWHERE => (),
            FULL => outcome = FULL,
            other => return other,
        }
    }
    outcome
}

/// A search through the ports of one address.
#[repr(C)]
struct Search {
    ctx: *mut bpf_sock_addr,
    egress: u32,
    remote: u32,
    /// The port that is tried next.
    port: u32,
    /// How many are left to be tried.
    left: u32,
    /// Slices that are passed over first.
    skip: u32,
    remote_port: u32,
    outcome: u32,
    /// Where in its slice the search begins.
    start: u32,
}

/// Tries the ports of one address, all in a row from a random one on.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn seek_at(ctx: *mut bpf_sock_addr, egress: u32, port: u32) -> u32 {
    // SAFETY: read at once; see `is_kept`.
    let Some(slices) = (unsafe { BINDS.get(&egress) }) else { return NOWHERE };
    let [a, b, c, d] = slices.open;
    let count = a.count_ones() + b.count_ones() + c.count_ones() + d.count_ones();
    if count == 0 || fence::opens_nothing(egress) {
        return NOWHERE;
    }
    // SAFETY: no arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    let mut search = Search {
        ctx,
        egress,
        // SAFETY: a field of the context.
        remote: unsafe { (*ctx).user_ip4 },
        // Anywhere: of a number that it knows the verifier would follow each step.
        port: random >> 16 & 0xff00,
        left: count * PORTS_PER_SLICE,
        // The upper bits choose the slice, the lower ones where in it to begin.
        skip: (u64::from(random) * u64::from(count) >> 32) as u32,
        remote_port: port,
        outcome: FULL,
        start: random & (PORTS_PER_SLICE - 1),
    };
    // A step for each port, and for each slice that is passed over: once to where the search begins, and once around.
    let steps = SLOTS_PER_ADDRESS * PORTS_PER_SLICE + 2 * SLOTS_PER_ADDRESS;
    // SAFETY: the callback is given what it expects.
    unsafe { bpf_loop(steps, try_port as *mut c_void, (&raw mut search).cast(), 0) };
    search.outcome
}

/// Tries one port, or goes on to the next slice. Returns 1 to stop.
unsafe extern "C" fn try_port(_: u64, search: *mut c_void) -> i64 {
    // SAFETY: that of `seek_at`, which waits.
    let search = unsafe { &mut *search.cast::<Search>() };
    if search.left == 0 {
        return 1;
    }
    let port = search.port & 0xffff;
    let slice = port >> 8;
    // SAFETY: read at once.
    let Some(slices) = (unsafe { BINDS.get(&search.egress) }) else { return 1 };
    let open = slices.open[(slice >> 6) as usize & 3] >> (slice & 63) & 1 == 1;
    if !open || search.skip > 0 {
        search.skip -= u32::from(open);
        search.port = (port | (PORTS_PER_SLICE - 1)) + 1;
        return 0;
    }
    let port = port + search.start;
    search.start = 0;
    search.port = port + 1;
    search.left -= 1;
    let (egress, port, remote_port) = (search.egress, port as u16, search.remote_port as u16);
    let remote = search.remote;
    let is_free = || state_of(search.ctx.cast(), egress, port, remote, remote_port) == NO_SOCKET;
    let key =
        FlowKey { local: egress, remote, local_port: port, remote_port, protocol: headers::TCP, pad: [0; 3] };
    if !is_free() || !claim(&key) {
        return 0;
    }
    // Who had claimed it may have begun its connection since.
    if !is_free() {
        let _ = CLAIMS.remove(&key);
        return 0;
    }
    match bind(search.ctx, egress, port) {
        0 => search.outcome = BOUND,
        // Somebody listens there.
        EADDRINUSE => return 0,
        _ => search.outcome = UNFIT,
    }
    1
}

/// `struct sockaddr_in`.
#[repr(C)]
struct SocketAddress {
    family: u16,
    port: u16,
    address: u32,
    zero: [u32; 2],
}

#[inline(always)]
fn bind(ctx: *mut bpf_sock_addr, egress: u32, port: u16) -> i64 {
    let mut yes = 1i32;
    let mut to = SocketAddress { family: AF_INET, port: port.to_be(), address: egress, zero: [0; 2] };
    // SAFETY: sizes are told as they are; the kernel copies.
    unsafe {
        // Others may have the same port towards other destinations.
        bpf_setsockopt(ctx.cast(), SOL_SOCKET, SO_REUSEADDR, (&raw mut yes).cast(), 4);
        if let Some(config) = maps::config()
            && config.mss != 0
        {
            // What comes back may have to fit into the tunnel.
            let mut most = config.mss as i32;
            bpf_setsockopt(ctx.cast(), SOL_TCP, TCP_MAXSEG, (&raw mut most).cast(), 4);
        }
        bpf_bind(ctx, (&raw mut to).cast(), size_of::<SocketAddress>() as i32)
    }
}

/// The packet is of a socket that has its source.
pub const PASSES: u32 = 0;
/// Somebody has forged its source.
pub const FORGED: u32 = 1;
/// The node may not send from there at present.
pub const FENCED: u32 = 2;
/// The kernel answers for a socket that is gone.
pub const SOCKETLESS: u32 = 3;

/// Judges a packet of this node's own whose source is an egress address. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn bound_leaves(skb: *mut __sk_buff) -> u32 {
    let ctx = &aya_ebpf::programs::TcContext::new(skb);
    let Some(config) = maps::config() else { return FORGED };
    let Some(packet) = Packet::read(ctx) else { return FORGED };
    let ip = &packet.ip;
    if ip.protocol != headers::TCP || ip.is_later_fragment() {
        return FORGED;
    }
    let Some(transport) = packet.transport(ctx) else { return FORGED };
    let Some(flags) = packet.tcp_flags(ctx) else { return FORGED };
    let (port, remote_port) = (transport.source_port(), transport.destination_port());
    if !is_kept(ip.source, port) {
        return FORGED;
    }
    if fence::is_closed(ip.source) {
        return FENCED;
    }
    let (local, remote) = (ip.source, ip.destination);
    let key = FlowKey { local, remote, local_port: port, remote_port, protocol: headers::TCP, pad: [0; 3] };
    let header = meter::header(packet.transport_offset as u32, headers::TCP);
    let passes = || {
        meter::bound_sends(skb, &key, packet.length, header);
        PASSES
    };
    if !is_sender(skb, ip.source, port) {
        // Its socket is not a connection's: the kernel's own that answers for others, or one that is made to forge.
        // SAFETY: the context is valid while the program runs.
        if unsafe { bpf_skb_ancestor_cgroup_id(skb, 1) } != 0 {
            return FORGED;
        }
        let state = state_of(skb.cast(), ip.source, port, ip.destination, remote_port);
        return if is_connection(state) { passes() } else { SOCKETLESS };
    }
    if flags & SYN == 0 {
        return passes();
    }
    // The kernel knows the connection now.
    let _ = CLAIMS.remove(&key);
    // What was opened goes on, but only what is covered at present opens.
    let generation = maps::generation(config);
    let class = (host::sender_of(skb, config.host_levels, generation) >> 32) as u32;
    if class == 0 || class == HOST_UNKNOWN || class == POD_REFUSED {
        return FORGED;
    }
    let verdict = maps::verdict(generation, class, ip.destination, headers::TCP, u32::from(remote_port));
    let Some(verdict) = verdict else { return FORGED };
    // SAFETY: read at once.
    let owner = unsafe { ADDRESSES.get(&ip.source) }.map_or(0, |address| address.allocation);
    if verdict.action != ACTION_ALLOCATE
        || verdict.binding & VERDICT_BINDS == 0
        || owner != u32::from(verdict.allocation) + 1
    {
        return FORGED;
    }
    if fence::opens_nothing(ip.source) { FENCED } else { passes() }
}

/// Whether the packet's socket is one of TCP that has this address and port: the kernel has made the packet then.
#[inline(always)]
fn is_sender(skb: *mut __sk_buff, address: u32, port: u16) -> bool {
    // SAFETY: a field of the context; null is looked for, and fields are read of whole sockets only.
    unsafe {
        let socket = (*skb).__bindgen_anon_2.sk;
        if socket.is_null() {
            return false;
        }
        let socket = bpf_sk_fullsock(socket);
        if socket.is_null() {
            return false;
        }
        (*socket).type_ == SOCK_STREAM
            && (*socket).protocol == u32::from(headers::TCP)
            && (*socket).src_ip4 == address
            && (*socket).src_port == u32::from(port)
    }
}

/// Whether a packet that is for no flow is for the connection of a socket, by the key that a flow would have; `offset` is where the TCP
/// header is, 0 = the packet tells of an error. 0 = it is not. A function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn bound_arrives(ctx: *mut xdp_md, key: *const FlowKey, offset: u32) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    if key.protocol != headers::TCP || !is_kept(key.local, key.local_port) {
        return 0;
    }
    let mut flags = ACK;
    if offset != 0 {
        let at = (offset as usize & 0x7f) + 12;
        let Some(bytes) = xdp::at::<[u8; 2]>(&XdpContext::new(ctx), at) else { return 0 };
        // SAFETY: within the frame.
        flags = unsafe { (*bytes)[1] };
    }
    let state = state_of(ctx.cast(), key.local, key.local_port, key.remote, key.remote_port);
    // A SYN could find somebody who listens behind a connection that is over.
    let opens = flags & (SYN | ACK) == SYN;
    if !is_connection(state) || opens && state != TCP_SYN_SENT {
        return 0;
    }
    // An error is about a packet, not one of the connection.
    if offset != 0
        && let Some(length) = xdp::at::<[u8; 2]>(&XdpContext::new(ctx), headers::ETH_LEN + 2)
    {
        // SAFETY: within the frame.
        meter::bound_receives(key, u32::from(u16::from_be_bytes(unsafe { *length })));
    }
    1
}
