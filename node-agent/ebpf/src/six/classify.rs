//! `pod_ingress`: is this IPv6 packet of a pod covered? As for IPv4, the mark is a wish for new flows only.

use super::lookup::{self, NETWORKS};
use super::single;
use super::{Ipv6, LATER, Layers, START, follow_headers, has_ports, ports};
use crate::headers::{self, ETH_LEN, Ethernet, TCP, UDP};
use crate::maps;
use crate::observe::observe6;
use aegis_common::*;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::tcx_action_base::{TCX_DROP, TCX_NEXT};
use aya_ebpf::programs::TcContext;

#[inline(always)]
pub fn run(ctx: &TcContext) -> i32 {
    let Some(config) = maps::config() else { return TCX_NEXT };
    let mark = headers::mark(ctx) & !config.mark;
    match judge(ctx.skb.skb) {
        COVERED => ctx.skb.set_mark(mark | config.mark),
        OTHER => ctx.skb.set_mark(mark),
        IGNORED => {}
        _ => return TCX_DROP,
    }
    TCX_NEXT
}

/// It passes, and its mark is nobody's business.
const IGNORED: u32 = 0;
const OTHER: u32 = 1;
const COVERED: u32 = 2;
const DROPPED: u32 = 3;

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge(skb: *mut __sk_buff) -> u32 {
    let ctx = &TcContext::new(skb);
    let (Some(config), Some(config6)) = (maps::config(), lookup::config()) else { return IGNORED };
    match covered(ctx, config, config6) {
        Ok(true) => COVERED,
        Ok(false) => OTHER,
        Err(reason) => {
            maps::count(reason, ctx.len().saturating_sub(ETH_LEN as u32));
            DROPPED
        }
    }
}

#[inline(always)]
fn covered(ctx: &TcContext, config: &Config, config6: &Config6) -> Result<bool, Counter> {
    let malformed = Counter::DropMalformedOut;
    let ip: Ipv6 = ctx.load(ETH_LEN).map_err(|_| malformed)?;
    if !ip.is_sound() {
        return Err(malformed);
    }
    // SAFETY: only presence matters.
    if unsafe { NETWORKS.get(&network_of(&ip.source)) }.is_some() || single::is(&ip.source) {
        return Err(Counter::DropForged);
    }
    let generation = maps::generation(config);
    let named = lookup::pod(generation, &ip.source);
    let Some(pod) = named.filter(|pod| is_sender(ctx, pod)) else {
        let held = config.hold_unknown != 0
            && (named.is_some() || lookup::in_pod_range(config6, &ip.source))
            && lookup::destination_class(generation, &ip.destination) != Some(DESTINATION_INTERNAL);
        return if held { Err(Counter::DropUnknownPod) } else { Ok(false) };
    };
    if pod.class == 0 {
        return Ok(false);
    }
    let mut layers = Layers::default();
    if follow_headers(ctx.skb.skb, u32::from(ip.next), START as u32, &raw mut layers) == 0 {
        return Err(malformed);
    }
    let mut flow = Flow6Key { local: ip.source, remote: ip.destination, ports: 0, protocol: layers.protocol };
    let protocol = layers.protocol as u8;
    // conntrack puts a datagram together before it looks at the mark, and takes the first fragment's.
    if layers.fragment != LATER && (protocol == TCP || protocol == UDP) {
        flow.ports = ports(protocol, ctx.load(layers.offset as usize).map_err(|_| malformed)?);
    }
    let any_port = layers.fragment == LATER || !has_ports(layers.protocol);
    let verdict = lookup::look_up_verdict6(generation, pod.class, &raw const flow, u32::from(any_port));
    let verdict = VerdictValue::unpacked(verdict);
    let binding = verdict.binding;
    if binding >> OBSERVED_SHIFT != 0 && layers.fragment != LATER {
        observe6(ctx.skb.skb, &raw const flow, layers.offset, generation, binding);
    }
    Ok(verdict.action != ACTION_PASS)
}

/// Whether the packet comes from the pod's own device, as for IPv4.
#[inline(always)]
fn is_sender(ctx: &TcContext, pod: &Pod6Value) -> bool {
    pod.mac == [0; 6] || ctx.load::<Ethernet>(0).is_ok_and(|ethernet| ethernet.source == pod.mac)
}
