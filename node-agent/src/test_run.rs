//! `BPF_PROG_TEST_RUN` (kernel 4.12): runs a loaded program on a packet of one's own.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `BPF_PROG_TEST_RUN`.
const TEST_RUN: libc::c_long = 10;

/// `union bpf_attr` of the command, kernel 5.18.
#[repr(C)]
#[derive(Default)]
struct Attr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// `BPF_F_TEST_XDP_LIVE_FRAMES`: what the program says is done with the frame.
const LIVE_FRAMES: u32 = 2;

/// `struct xdp_md`.
#[repr(C)]
struct XdpContext {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// What the program did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its return value.
    pub verdict: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// The context afterwards, as long as the one that was given.
    pub context: Vec<u8>,
    /// Mean time of one run in nanoseconds.
    pub nanoseconds: u32,
}

/// Lets a frame arrive at a device as far as an XDP program can tell: where that passes it, the host stack gets it (kernel 5.18).
pub fn inject(program: BorrowedFd<'_>, frame: &[u8], ifindex: u32) -> io::Result<()> {
    let context = XdpContext {
        data: 0,
        data_end: frame.len() as u32,
        data_meta: 0,
        ingress_ifindex: ifindex,
        rx_queue_index: 0,
        egress_ifindex: 0,
    };
    let mut attr = Attr {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat: 1,
        ctx_size_in: size_of::<XdpContext>() as u32,
        ctx_in: (&raw const context) as u64,
        flags: LIVE_FRAMES,
        batch_size: 1,
        ..Attr::default()
    };
    // SAFETY: frame and context outlive the call and have the sizes that are given with them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, TEST_RUN, &raw mut attr, size_of::<Attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Runs a program on `packet` with a context (`struct __sk_buff` or `struct xdp_md`; empty = the kernel's default),
/// `repeat` times (the packet is not reset between runs).
pub fn run(program: BorrowedFd<'_>, packet: &[u8], context: &[u8], repeat: u32) -> io::Result<Outcome> {
    let mut out = vec![0u8; packet.len() + 256];
    let mut context_out = context.to_vec();
    let mut attr = Attr {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        ctx_size_in: context.len() as u32,
        ctx_size_out: context_out.len() as u32,
        ctx_in: if context.is_empty() { 0 } else { context.as_ptr() as u64 },
        ctx_out: if context.is_empty() { 0 } else { context_out.as_mut_ptr() as u64 },
        ..Attr::default()
    };
    // SAFETY: all buffers outlive the call and have the sizes that are given with them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, TEST_RUN, &raw mut attr, size_of::<Attr>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    out.truncate(attr.data_size_out as usize);
    context_out.truncate(attr.ctx_size_out as usize);
    Ok(Outcome { verdict: attr.retval, packet: out, context: context_out, nanoseconds: attr.duration })
}
