//! An XDP program that passes everything.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Attached until it is dropped.
pub struct Attached {
    _program: OwnedFd,
    _link: OwnedFd,
}

const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_TYPE_XDP: u32 = 37;
/// In the driver (`XDP_FLAGS_DRV_MODE`).
const DRIVER: u32 = 4;

fn bpf(command: libc::c_long, attributes: &[u32; 32]) -> OwnedFd {
    // SAFETY: the attributes outlive the call, and what they point to does so too.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    assert!(fd >= 0, "bpf command {command}: {}", io::Error::last_os_error());
    // SAFETY: a descriptor that nobody else has.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// Attaches it to a device of this namespace.
pub fn on(device: &str) -> Attached {
    // r0 = XDP_PASS; exit
    let instructions: [u64; 2] = [2 << 32 | 0xb7, 0x95];
    let halves = |pointer: u64| [pointer as u32, (pointer >> 32) as u32];
    let mut load = [0u32; 32];
    load[0] = PROG_TYPE_XDP;
    load[1] = instructions.len() as u32;
    load[2..4].copy_from_slice(&halves(instructions.as_ptr() as u64));
    load[4..6].copy_from_slice(&halves(c"GPL".as_ptr() as u64));
    let program = bpf(PROG_LOAD, &load);
    let mut create = [0u32; 32];
    create[0] = program.as_raw_fd() as u32;
    create[1] = nix::net::if_::if_nametoindex(device).unwrap();
    create[2] = ATTACH_TYPE_XDP;
    create[3] = DRIVER;
    let link = bpf(LINK_CREATE, &create);
    Attached { _program: program, _link: link }
}
