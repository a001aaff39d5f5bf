//! `enter`: enters and removes flows for the agent, one by one by the rules by which packets do it.
//!
//! The agent runs it through `BPF_PROG_TEST_RUN` while it takes flows over from another version; the packet is a list of them.

use crate::table;
use crate::xdp;
use aegis_common::*;
use aya_ebpf::programs::XdpContext;

/// Returns for how many it was done.
pub fn run(ctx: &XdpContext) -> u32 {
    let Some(kind) = xdp::at::<u32>(ctx, 0) else { return 0 };
    // SAFETY: within the frame.
    let kind = unsafe { *kind };
    let mut done = 0;
    let mut at = 0;
    while at < ENTER_BATCH {
        let result = match kind {
            ENTER_FORWARD => entry(ctx, at).map(|way| table::set_forward(&way)),
            ENTER_REVERSE => entry(ctx, at).map(|way| table::set_reverse(&way)),
            LEAVE_FORWARD => entry(ctx, at).map(|key| table::remove_forward(&key)),
            LEAVE_REVERSE => entry(ctx, at).map(|key| table::remove_reverse(&key)),
            _ => None,
        };
        let Some(result) = result else { break };
        done += result;
        at += 1;
    }
    done
}

/// An entry of the list, `None` at its end.
#[inline(always)]
fn entry<E: Copy>(ctx: &XdpContext, at: usize) -> Option<E> {
    let entry = xdp::at::<E>(ctx, ENTER_HEADER + at * size_of::<E>())?;
    // SAFETY: within the frame.
    Some(unsafe { entry.read_unaligned() })
}
