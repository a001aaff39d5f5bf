//! XDP programs of a few instructions: what passes or drops everything, and what sends frames.

use aegis_node_agent::raw;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Attached until it is dropped.
pub struct Attached {
    _program: OwnedFd,
    _link: OwnedFd,
}

const MAP_CREATE: libc::c_long = 0;
const PROG_LOAD: libc::c_long = 5;
const TEST_RUN: libc::c_long = 10;
const LINK_CREATE: libc::c_long = 28;
const MAP_TYPE_ARRAY: u32 = 2;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_TYPE_XDP: u32 = 37;
/// In the driver (`XDP_FLAGS_DRV_MODE`).
const DRIVER: u32 = 4;
/// `BPF_F_TEST_XDP_LIVE_FRAMES`.
const LIVE_FRAMES: u32 = 2;
pub const DROP: u64 = 1;
pub const PASS: u64 = 2;

fn call(command: libc::c_long, attributes: &mut [u32; 32]) -> i64 {
    // SAFETY: the attributes outlive the call, and what they point to does so too.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(attributes)) };
    assert!(result >= 0, "bpf command {command}: {}", io::Error::last_os_error());
    result
}

fn bpf(command: libc::c_long, attributes: &mut [u32; 32]) -> OwnedFd {
    // SAFETY: a descriptor that nobody else has.
    unsafe { OwnedFd::from_raw_fd(call(command, attributes) as i32) }
}

fn halves(pointer: u64) -> [u32; 2] {
    [pointer as u32, (pointer >> 32) as u32]
}

fn load(instructions: &[u64]) -> OwnedFd {
    let mut load = [0u32; 32];
    load[0] = PROG_TYPE_XDP;
    load[1] = instructions.len() as u32;
    load[2..4].copy_from_slice(&halves(instructions.as_ptr() as u64));
    load[4..6].copy_from_slice(&halves(c"GPL".as_ptr() as u64));
    bpf(PROG_LOAD, &mut load)
}

/// Attaches a program that does this with every frame to a device of this namespace.
pub fn on(device: &str, verdict: u64) -> Attached {
    // r0 = verdict; exit
    let program = load(&[verdict << 32 | 0xb7, 0x95]);
    let mut create = [0u32; 32];
    create[0] = program.as_raw_fd() as u32;
    create[1] = nix::net::if_::if_nametoindex(device).unwrap();
    create[2] = ATTACH_TYPE_XDP;
    create[3] = DRIVER;
    let link = bpf(LINK_CREATE, &mut create);
    Attached { _program: program, _link: link }
}

/// Sends frames, one of several by chance each time, as fast as the kernel can.
pub struct Sender {
    program: OwnedFd,
    _frames: OwnedFd,
    ifindex: u32,
    length: u32,
}

impl Sender {
    /// Through a device of this namespace. All frames are of one length, and there are a power of two of them.
    pub fn through(device: &str, frames: &[Vec<u8>]) -> Sender {
        let (ifindex, length) = (nix::net::if_::if_nametoindex(device).unwrap(), frames[0].len() as u32);
        let mut create = [0u32; 32];
        create[..4].copy_from_slice(&[MAP_TYPE_ARRAY, 4, length, frames.len() as u32]);
        let map = bpf(MAP_CREATE, &mut create);
        let entries = raw::Map::of(map.as_fd()).unwrap();
        for (at, frame) in (0u32..).zip(frames) {
            entries.update(&at.to_ne_bytes(), frame).unwrap();
        }
        let imm = |value: u32| u64::from(value) << 32;
        let program = load(&[
            0x16bf,                               // r6 = r1
            imm(7) | 0x85,                        // call bpf_get_prandom_u32
            imm(frames.len() as u32 - 1) | 0x54,  // w0 &= number of frames - 1
            0xfffc_0a63,                          // *(u32 *)(r10 - 4) = w0
            0xa2bf,                               // r2 = r10
            imm(-4i32 as u32) | 0x207,            // r2 += -4
            imm(map.as_raw_fd() as u32) | 0x1118, // r1 = map
            0,
            imm(1) | 0x85,        // call bpf_map_lookup_elem
            8 << 16 | 0x15,       // if r0 == 0, end
            0x3bf,                // r3 = r0
            0x61bf,               // r1 = r6
            0x2b7,                // r2 = 0
            imm(length) | 0x4b7,  // r4 = length
            imm(190) | 0x85,      // call bpf_xdp_store_bytes: others have written there
            imm(ifindex) | 0x1b7, // r1 = device
            0x2b7,                // r2 = 0
            imm(23) | 0x85,       // call bpf_redirect
            0x95,                 // end
        ]);
        Sender { program, _frames: map, ifindex, length }
    }

    /// Sends so many.
    pub fn send(&self, count: u32) {
        let frame = vec![0u8; self.length as usize];
        // struct xdp_md
        let context = [0, self.length, 0, self.ifindex, 0, 0];
        let mut run = [0u32; 32];
        run[0] = self.program.as_raw_fd() as u32;
        run[2] = self.length;
        run[4..6].copy_from_slice(&halves(frame.as_ptr() as u64));
        run[8] = count;
        run[10] = size_of_val(&context) as u32;
        run[12..14].copy_from_slice(&halves(context.as_ptr() as u64));
        run[16] = LIVE_FRAMES;
        run[18] = 64;
        call(TEST_RUN, &mut run);
    }
}
