//! On the node of a pod whose flow leaves through a gateway: what comes back.

use crate::flow;
use crate::headers::{self, Ipv4};
use crate::maps::{self, FRAGMENTS_IN};
use crate::reverse;
use crate::steer::{Inbound, Step};
use crate::tunnel::Arrival;
use crate::via;
use crate::xdp;
use aegis_common::*;
use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::programs::XdpContext;

/// Takes a packet in if a live flow of a pod of this node, that leaves through this gateway, asked for it.
#[inline(always)]
pub fn run(ctx: &XdpContext, inbound: &Inbound, gateway: u32) -> Step {
    let ip = &inbound.ip;
    if ip.is_later_fragment() {
        return match maps::first_fragment(&FRAGMENTS_IN, &crate::fragment::key(inbound)) {
            Some(first) if first.address == ip.destination && u32::from(first.peer) == gateway => pass(ip),
            _ => Step::Drop(Counter::DropFragmentIn),
        };
    }
    let Some((key, answers)) = key(ctx, inbound) else { return Step::Drop(Counter::DropMalformedIn) };
    let back = flow::find_back(&key);
    let flow = back.value;
    // Only flows that leave through a gateway are entered under the pod's own address, and only theirs may answer.
    if !back.exists() || flow.pod != ip.destination || flow.buried != 0 || u32::from(flow.peer) != gateway {
        return Step::Drop(Counter::DropNoFlow);
    }
    let refused = inbound.arrival == Arrival::Refused;
    if refused && via::may_turn(&raw const key) != 0 && via::turn(&raw const key) != 0 {
        return Step::Drop(Counter::DropGatewayFull);
    }
    let seen = match ip.protocol {
        headers::TCP => match xdp::at::<[u8; 20]>(ctx, inbound.transport_offset) {
            // SAFETY: within the frame.
            Some(header) => seen_after(flow.seen, unsafe { (*header)[13] }),
            None => return Step::Drop(Counter::DropMalformedIn),
        },
        _ => flow.seen,
    };
    if answers {
        back.touch(seen);
    }
    if ip.is_first_fragment() {
        let value = FragmentValue {
            address: ip.destination,
            port: key.local_port,
            peer: flow.peer,
            seen: maps::now(),
            ..Default::default()
        };
        let _ = FRAGMENTS_IN.insert(&crate::fragment::key(inbound), &value, u64::from(BPF_ANY));
    }
    pass(ip)
}

#[inline(always)]
fn pass(ip: &Ipv4) -> Step {
    maps::count(Counter::FromGateway, u32::from(ip.total_length()));
    Step::Done(XDP_PASS)
}

/// Key of the flow that the packet, or the one that it quotes, belongs to; and whether it is one of the flow's own: an error
/// says nothing of the flow's life (RFC 5508 REQ-6).
#[inline(always)]
fn key(ctx: &XdpContext, inbound: &Inbound) -> Option<(FlowKey, bool)> {
    if inbound.ip.protocol == headers::ICMP {
        // SAFETY: within the frame.
        let kind = unsafe { (*xdp::at::<headers::Transport>(ctx, inbound.transport_offset)?).icmp_type() };
        if headers::is_icmp_error(kind) {
            return reverse::quoted(ctx, inbound).map(|quoted| (quoted.key, false));
        }
        if kind != headers::ICMP_ECHO_REPLY {
            return None;
        }
    }
    reverse::key(ctx, inbound).map(|key| (key, true))
}
