//! The way out of the node for a frame in XDP.

use crate::headers::{ETH_P_IP, Ethernet};
use crate::maps::{self, UNRESOLVED};
use crate::steer::Step;
use crate::xdp;
use aegis_common::Counter;
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::xdp_action::XDP_TX;
use aya_ebpf::bindings::{BPF_ANY, BPF_FIB_LKUP_RET_NO_NEIGH, bpf_fib_lookup as FibLookup, xdp_md};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_redirect};
use aya_ebpf::programs::XdpContext;

const AF_INET: u8 = 2;

/// Next hop of a frame.
#[repr(C)]
#[derive(Default)]
pub struct Way {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ifindex: u32,
}

/// The kernel's way for a packet with these addresses; `None` if there is no route or the neighbour is not resolved.
#[inline(always)]
pub fn find(ctx: &XdpContext, protocol: u8, source: u32, destination: u32) -> Option<Way> {
    let mut way = Way::default();
    (look_up(ctx.ctx, u32::from(protocol), source, destination, &raw mut way) != 0).then_some(way)
}

/// A function of its own for the stack's sake, like `take` in `ports`; 0 if there is no way.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn look_up(ctx: *mut xdp_md, protocol: u32, source: u32, destination: u32, way: *mut Way) -> u32 {
    let ctx = &XdpContext::new(ctx);
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let Some(way) = (unsafe { way.as_mut() }) else { return 0 };
    // SAFETY: all-zero is a valid value of this plain C structure.
    let mut fib: FibLookup = unsafe { core::mem::zeroed() };
    fib.family = AF_INET;
    fib.l4_protocol = protocol as u8;
    fib.ifindex = ctx.ingress_ifindex() as u32;
    fib.__bindgen_anon_3.ipv4_src = source;
    fib.__bindgen_anon_4.ipv4_dst = destination;
    let size = size_of::<FibLookup>() as i32;
    // SAFETY: context and structure are valid for the call.
    let outcome = unsafe { bpf_fib_lookup(ctx.as_ptr(), &raw mut fib, size, 0) };
    if outcome == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
        // SAFETY: the kernel has put the next hop here.
        ask_for(unsafe { fib.__bindgen_anon_4.ipv4_dst });
    }
    if outcome != 0 {
        return 0;
    }
    *way = Way { destination: fib.dmac, source: fib.smac, ifindex: fib.ifindex };
    1
}

/// Lets the agent know that the MAC of a next hop is wanted.
#[inline(always)]
fn ask_for(next_hop: u32) {
    let now = maps::now();
    // SAFETY: read at once.
    if unsafe { UNRESOLVED.get(&next_hop) }.is_none_or(|wanted| *wanted != now) {
        let _ = UNRESOLVED.insert(&next_hop, &now, u64::from(BPF_ANY));
    }
}

/// Gives the frame its Ethernet header and sends it.
#[inline(always)]
pub fn leave(ctx: &XdpContext, way: &Way) -> Step {
    let Some(ethernet) = xdp::at::<Ethernet>(ctx, 0) else { return Step::Drop(Counter::DropMalformedIn) };
    // SAFETY: within the frame.
    unsafe { *ethernet = Ethernet { destination: way.destination, source: way.source, kind: ETH_P_IP } };
    if way.ifindex == ctx.ingress_ifindex() as u32 {
        return Step::Done(XDP_TX);
    }
    // SAFETY: plain arguments.
    Step::Done(unsafe { bpf_redirect(way.ifindex, 0) } as u32)
}
