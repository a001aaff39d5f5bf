//! `BPF_PROG_QUERY` (kernel 6.6 for tcx): which programs a hook runs, in order. Unlike a look-up by program id it needs no
//! more rights than attaching does.

use std::io;
use std::mem::size_of;

/// `BPF_PROG_QUERY`.
const QUERY: libc::c_long = 16;
/// Programs that a hook has room for (`BPF_MPROG_MAX`).
const MOST: usize = 64;

/// A tcx hook of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `BPF_TCX_INGRESS`.
    Ingress = 46,
    /// `BPF_TCX_EGRESS`.
    Egress = 47,
}

/// `union bpf_attr` of the command.
#[repr(C)]
#[derive(Default)]
struct Attr {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    pad: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Ids of the programs, the one that runs first first.
pub fn programs(ifindex: u32, hook: Hook) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; MOST];
    let mut attr = Attr {
        ifindex,
        attach_type: hook as u32,
        program_ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        ..Attr::default()
    };
    // SAFETY: the kernel writes at most `count` ids into a buffer that has room for as many and outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, QUERY, &raw mut attr, size_of::<Attr>()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        // Nothing was ever attached.
        return if error.raw_os_error() == Some(libc::ENOENT) { Ok(Vec::new()) } else { Err(error) };
    }
    Ok(ids.into_iter().take(attr.count as usize).collect())
}
