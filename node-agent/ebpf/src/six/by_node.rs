//! ICMPv6 errors that the node itself sends about packets to a pod (it is gone, or its link is narrower): to the origin they are the
//! pod's, as over IPv4.

use super::{ICMPV6, Ipv6, START, is_error, lookup};
use crate::headers::ETH_LEN;
use aegis_common::Address6;
use aya_ebpf::bindings::{__sk_buff, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_csum_diff;
use aya_ebpf::programs::TcContext;

/// Offset of the source address from the start of the frame.
const SOURCE: usize = ETH_LEN + 8;

/// Gives a covered packet that is an error of the node's the address of the pod that it speaks for; 0 if it is no such packet. A
/// function of its own for the stack's sake.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn speak_for_pod6(skb: *mut __sk_buff) -> u32 {
    let ctx = TcContext::new(skb);
    // SAFETY: a field of the context. What the node itself sends came in nowhere.
    if unsafe { (*skb).ingress_ifindex } != 0 {
        return 0;
    }
    let (Some(config), Ok(ip)) = (lookup::config(), ctx.load::<Ipv6>(ETH_LEN)) else { return 0 };
    if ip.next != ICMPV6 || lookup::in_pod_range(config, &ip.source) {
        return 0;
    }
    let Ok(kind) = ctx.load::<u8>(START) else { return 0 };
    let Ok(pod) = ctx.load::<Address6>(START + 8 + 24) else { return 0 };
    if !is_error(kind) || !lookup::in_pod_range(config, &pod) {
        return 0;
    }
    const LENGTH: u32 = size_of::<Address6>() as u32;
    let (from, to) = ((&raw const ip.source).cast_mut().cast(), (&raw const pod).cast_mut().cast());
    // SAFETY: both are addresses, which the helper only reads.
    let change = unsafe { bpf_csum_diff(from, LENGTH, to, LENGTH, 0) };
    let changed = ctx
        .l4_csum_replace(START + 2, 0, change as u64, u64::from(BPF_F_PSEUDO_HDR))
        .and_then(|()| ctx.store(SOURCE, &pod, 0));
    u32::from(changed.is_ok())
}
