//! `pod_ingress`: is this packet of a pod covered?
//!
//! The mark set here is a wish for new flows only: nftables gives packets of flows that conntrack knows the mark that
//! their first packet had. So a covered flow that may not leave is not dropped here but at the uplink, where flows
//! from before the binding can be told apart.

use crate::fast;
use crate::flow;
use crate::headers::{self, ETH_P_IP, Ethernet, Packet};
use crate::maps::{self, ADDRESSES, PEER_INDEX};
use crate::{observe, six};
use aegis_common::{
    ACTION_PASS, Config, Counter, DESTINATION_INTERNAL, FlowKey, OBSERVED_SHIFT, PodValue, TO_UPLINK,
    VerdictValue,
};
use aya_ebpf::bindings::tcx_action_base::{TCX_DROP, TCX_NEXT};
use aya_ebpf::programs::TcContext;

pub fn run(ctx: &TcContext) -> i32 {
    if ctx.skb.protocol() == u32::from(six::ETH_P_IPV6) {
        return six::classify::run(ctx);
    }
    if ctx.skb.protocol() != u32::from(ETH_P_IP) {
        return TCX_NEXT;
    }
    let Some(config) = maps::config() else { return TCX_NEXT };
    let Some(packet) = Packet::read(ctx) else {
        maps::count(Counter::DropMalformedOut, ctx.len());
        return TCX_DROP;
    };
    let bytes = packet.length;
    let (source, destination) = (packet.ip.source, packet.ip.destination);
    // SAFETY: only presence matters.
    if unsafe { ADDRESSES.get(&source) }.is_some() || enters_tunnel(ctx, config, &packet) {
        maps::count(Counter::DropForged, bytes);
        return TCX_DROP;
    }
    let generation = maps::generation(config);
    let named = maps::pod(generation, source);
    let covered = match named.filter(|pod| is_sender(ctx, pod)) {
        Some(pod) if pod.class == 0 => Covered::No,
        Some(pod) => match covered(ctx, config, generation, &packet, &pod) {
            Some(covered) => covered,
            None => {
                maps::count(Counter::DropMalformedOut, bytes);
                return TCX_DROP;
            }
        },
        None => {
            let held = config.hold_unknown != 0
                && (named.is_some() || maps::in_pod_range(config, source))
                && maps::destination_class(generation, destination) != Some(DESTINATION_INTERNAL);
            if held {
                maps::count(Counter::DropUnknownPod, bytes);
                return TCX_DROP;
            }
            Covered::No
        }
    };
    let mark = headers::mark(ctx) & !config.mark;
    ctx.skb.set_mark(if matches!(covered, Covered::No) { mark } else { mark | config.mark });
    match covered {
        Covered::Fast => match fast::pass_on(ctx.skb.skb, TO_UPLINK) {
            0 => TCX_NEXT,
            verdict => verdict as i32,
        },
        _ => TCX_NEXT,
    }
}

/// Whether a packet is Aegis's.
#[derive(Clone, Copy)]
enum Covered {
    No,
    /// It is of a flow, or begins one.
    Yes,
    /// It is of a flow, and may take the fast path.
    Fast,
}

impl Covered {
    #[inline(always)]
    fn by(verdict: Option<VerdictValue>) -> Covered {
        if verdict.is_some() { Covered::Yes } else { Covered::No }
    }
}

/// Whether the packet comes from the pod's own device. Otherwise another pod has its address by now, of which the agent does
/// not know yet, and must inherit nothing.
#[inline(always)]
fn is_sender(ctx: &TcContext, pod: &PodValue) -> bool {
    pod.mac == [0; 6] || headers::read::<Ethernet>(ctx, 0).is_some_and(|ethernet| ethernet.source == pod.mac)
}

/// Whether a node would take the packet for one that another node has sent through the tunnel: whoever can send such
/// packets can send from every account's addresses.
#[inline(always)]
fn enters_tunnel(ctx: &TcContext, config: &Config, packet: &Packet) -> bool {
    // Fragments are not taken out of the tunnel.
    if packet.ip.protocol != headers::UDP || packet.ip.is_later_fragment() {
        return false;
    }
    let Some(transport) = packet.transport(ctx) else { return false };
    // SAFETY: only presence matters.
    u32::from(transport.destination_port()) == config.tunnel_port
        && unsafe { PEER_INDEX.get(&packet.ip.destination) }.is_some()
}

/// Whether the packet belongs to a flow of ours, or would begin one. `None` if it can't be parsed.
#[inline(always)]
fn covered(
    ctx: &TcContext,
    config: &Config,
    generation: u32,
    packet: &Packet,
    pod: &PodValue,
) -> Option<Covered> {
    let (source, destination, protocol) = (packet.ip.source, packet.ip.destination, packet.ip.protocol);
    if packet.ip.is_later_fragment() {
        // conntrack reassembles before it looks at the mark, and takes the first fragment's.
        let verdict = maps::verdict(generation, pod.class, destination, protocol, maps::NO_PORT);
        return Some(Covered::by(verdict));
    }
    let (mut local_port, mut remote_port, mut port) = (0, 0, maps::NO_PORT);
    if protocol == headers::TCP || protocol == headers::UDP {
        let transport = packet.transport(ctx)?;
        local_port = transport.source_port();
        remote_port = transport.destination_port();
        port = u32::from(remote_port);
    } else if protocol == headers::ICMP {
        local_port = packet.transport(ctx)?.icmp_id();
        port = 0;
    }
    let key = FlowKey { local: source, remote: destination, local_port, remote_port, protocol, pad: [0; 3] };
    let flow = flow::find(&key);
    if flow.exists() && flow.value.incarnation == pod.incarnation {
        if config.fast == 0 {
            return Some(Covered::Yes);
        }
        let flags = if protocol == headers::TCP { packet.tcp_flags(ctx)? } else { 0 };
        let fast = fast::may(&flow, &key, &packet.ip, flags);
        return Some(if fast { Covered::Fast } else { Covered::Yes });
    }
    let verdict = maps::whole_verdict(generation, pod.class, destination, protocol, port);
    if verdict.binding >> OBSERVED_SHIFT != 0 {
        observe::observe(ctx.skb.skb, generation, verdict.binding);
    }
    Some(if verdict.action == ACTION_PASS { Covered::No } else { Covered::Yes })
}
