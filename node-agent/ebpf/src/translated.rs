//! What XDP has translated back is known to nftables by the mark: XDP writes a word before the packet (metadata), and the program
//! at the uplink's tcx ingress turns it into the mark.

use crate::fast;
use crate::flow;
use crate::headers::{self, ETH_P_IP, Packet};
use crate::icmp_out::key_to_pod;
use crate::maps;
use aegis_common::{TO_POD, TRANSLATED_FAST, TRANSLATED_IN};
use aya_ebpf::bindings::tcx_action_base::TCX_NEXT;
use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::helpers::bpf_xdp_adjust_meta;
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use aya_ebpf::programs::TcContext;

/// 1 once a driver had no room for the word.
#[map]
pub static NO_METADATA: Array<u32> = Array::with_max_entries(1, 0);

/// Writes the word before the packet; 0 if the driver has no room for it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn write_word(context: *mut xdp_md, word: u32) -> u32 {
    // SAFETY: the context is valid; the pointer into the metadata is made anew below.
    if unsafe { bpf_xdp_adjust_meta(context, -(size_of::<u32>() as i32)) } != 0 {
        return 0;
    }
    // SAFETY: fields of the context.
    let (meta, data) = unsafe { ((*context).data_meta as usize, (*context).data as usize) };
    if meta + size_of::<u32>() > data {
        return 0;
    }
    // SAFETY: within the metadata.
    unsafe { *(meta as *mut u32) = word };
    1
}

/// Writes the word before an IPv4 packet, or sees to it that `uplink_mark` looks flows up.
#[inline(always)]
pub fn tell(context: *mut xdp_md, word: u32) {
    if write_word(context, word) == 0
        && let Some(missing) = NO_METADATA.get_ptr_mut(0)
    {
        // SAFETY: a word of a map's value, to which nobody writes anything else.
        unsafe { missing.write_volatile(1) };
    }
}

/// `uplink_mark` (tcx ingress, uplink): gives what was translated back the mark, or to the pod.
#[inline(always)]
pub fn run(ctx: &TcContext) -> i32 {
    let Some(config) = maps::config() else { return TCX_NEXT };
    let word = word(ctx.skb.skb);
    if word == TRANSLATED_FAST {
        match fast::pass_on(ctx.skb.skb, TO_POD) {
            0 => {}
            verdict => return verdict as i32,
        }
    }
    if word == TRANSLATED_IN || word == TRANSLATED_FAST || is_of_flow(ctx.skb.skb) != 0 {
        ctx.skb.set_mark(headers::mark(ctx) | config.mark);
    }
    TCX_NEXT
}

/// The word before a packet; 0 = there is none.
#[inline(always)]
fn word(skb: *mut __sk_buff) -> u32 {
    // SAFETY: fields of the context.
    let (meta, data) = unsafe { ((*skb).data_meta as usize, (*skb).data as usize) };
    if meta + size_of::<u32>() > data {
        return 0;
    }
    // SAFETY: within the metadata.
    unsafe { *(meta as *const u32) }
}

/// Where the driver has no metadata: whether an IPv4 packet belongs to a flow of a pod, so that XDP has translated it. (Of a later
/// fragment that cannot be told, and need not: conntrack puts them together under the mark of the first.)
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_of_flow(skb: *mut __sk_buff) -> u32 {
    let ctx = &TcContext::new(skb);
    // SAFETY: a word of a map's value.
    let missing =
        NO_METADATA.get(0).is_some_and(|word| unsafe { core::ptr::from_ref(word).read_volatile() } != 0);
    if !missing || ctx.skb.protocol() != u32::from(ETH_P_IP) {
        return 0;
    }
    let Some(packet) = Packet::read(ctx) else { return 0 };
    if packet.ip.is_later_fragment() {
        return 0;
    }
    let Some(transport) = packet.transport(ctx) else { return 0 };
    let is_error = packet.ip.protocol == headers::ICMP && headers::is_icmp_error(transport.icmp_type());
    // An error that nobody asked for is no connection to conntrack either.
    u32::from(!is_error && flow::find(&key_to_pod(&packet.ip, &transport)).exists())
}
