//! The eBPF programs of Aegis.
//!
//! | program | hook | what it does |
//! |---|---|---|
//! | `pod_ingress` | tcx ingress, pod-facing device | marks covered packets, holds unknown pods, drops forged sources |
//! | `uplink_egress` | tcx egress, uplink | gives marked packets a port and the egress address; leak guard |
//! | `uplink_ingress` | XDP, uplink | steers replies to the owner of the port, translates them back there; answers ARP |
//! | `uplink_mark` | tcx ingress, uplink | marks packets that `uplink_ingress` has translated back, or gives them to the pod |
//! | `socket_connect` | cgroup `connect4`, root of the hierarchy | gives sockets of pods of the host network address and port |
//! | `sweep` | none: run by the agent through `BPF_PROG_TEST_RUN` | removes flows and blocks that are over |
//! | `enter` | none: as `sweep` | enters and removes flows that are taken over from another version |
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]

#[cfg(target_arch = "bpf")]
mod answer;
#[cfg(target_arch = "bpf")]
mod arp;
#[cfg(target_arch = "bpf")]
mod atomics;
#[cfg(target_arch = "bpf")]
mod bind;
#[cfg(any(target_arch = "bpf", test))]
mod checksum;
#[cfg(target_arch = "bpf")]
mod classify;
#[cfg(target_arch = "bpf")]
mod enter;
#[cfg(target_arch = "bpf")]
mod fast;
#[cfg(target_arch = "bpf")]
mod fence;
#[cfg(target_arch = "bpf")]
mod flow;
#[cfg(target_arch = "bpf")]
mod fragment;
#[cfg(target_arch = "bpf")]
mod guest;
#[cfg(target_arch = "bpf")]
mod headers;
#[cfg(target_arch = "bpf")]
mod host;
#[cfg(target_arch = "bpf")]
mod icmp_out;
#[cfg(target_arch = "bpf")]
mod identification;
#[cfg(target_arch = "bpf")]
mod load;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod meter;
#[cfg(any(target_arch = "bpf", test))]
mod mss;
#[cfg(target_arch = "bpf")]
mod observe;
#[cfg(target_arch = "bpf")]
mod opening;
#[cfg(target_arch = "bpf")]
mod ports;
#[cfg(target_arch = "bpf")]
mod refuse;
#[cfg(target_arch = "bpf")]
mod returned;
#[cfg(target_arch = "bpf")]
mod reverse;
#[cfg(target_arch = "bpf")]
mod route;
#[cfg(target_arch = "bpf")]
mod rule;
#[cfg(target_arch = "bpf")]
mod six;
#[cfg(target_arch = "bpf")]
mod snat;
#[cfg(target_arch = "bpf")]
mod split;
#[cfg(target_arch = "bpf")]
mod steer;
#[cfg(target_arch = "bpf")]
mod sweep;
#[cfg(target_arch = "bpf")]
mod table;
#[cfg(target_arch = "bpf")]
mod translated;
#[cfg(target_arch = "bpf")]
mod tunnel;
#[cfg(target_arch = "bpf")]
mod via;
#[cfg(target_arch = "bpf")]
mod xdp;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::macros::{cgroup_sock_addr, classifier, xdp};
    use aya_ebpf::programs::{SockAddrContext, TcContext, XdpContext};

    #[classifier]
    pub fn pod_ingress(ctx: TcContext) -> i32 {
        crate::classify::run(&ctx)
    }

    #[classifier]
    pub fn uplink_egress(ctx: TcContext) -> i32 {
        crate::snat::run(&ctx)
    }

    #[classifier]
    pub fn uplink_mark(ctx: TcContext) -> i32 {
        crate::translated::run(&ctx)
    }

    #[xdp]
    #[inline(always)]
    pub fn uplink_ingress(ctx: XdpContext) -> u32 {
        crate::steer::run(&ctx)
    }

    #[cgroup_sock_addr(connect4)]
    pub fn socket_connect(ctx: SockAddrContext) -> i32 {
        crate::bind::connect(&ctx)
    }

    #[xdp]
    pub fn enter(ctx: XdpContext) -> u32 {
        crate::enter::run(&ctx)
    }

    #[xdp]
    pub fn sweep(ctx: XdpContext) -> u32 {
        crate::sweep::run(&ctx)
    }
}

/// The helpers that rewrite checksums and clone packets are for GPL-compatible programs only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The host build only type-checks what is shared; the programs exist for the BPF target.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
