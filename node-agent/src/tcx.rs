//! What aya lacks of tcx (kernel 6.6): which programs a hook runs, in order, and ending a link here and now. Neither needs
//! more rights than attaching does.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `BPF_OBJ_GET`.
const GET: libc::c_long = 7;
/// `BPF_PROG_QUERY`.
const QUERY: libc::c_long = 16;
/// `BPF_LINK_DETACH`.
const DETACH: libc::c_long = 34;
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

/// `union bpf_attr` of [`QUERY`].
#[repr(C)]
#[derive(Default)]
struct Query {
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
    let mut attr = Query {
        ifindex,
        attach_type: hook as u32,
        program_ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        ..Query::default()
    };
    // SAFETY: the kernel writes at most `count` ids into a buffer that has room for as many and outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, QUERY, &raw mut attr, size_of::<Query>()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        // Nothing was ever attached.
        return if error.raw_os_error() == Some(libc::ENOENT) { Ok(Vec::new()) } else { Err(error) };
    }
    Ok(ids.into_iter().take(attr.count as usize).collect())
}

/// A link that was found pinned.
#[derive(Debug)]
pub struct Pinned(OwnedFd);

impl Pinned {
    /// The link that is pinned there, if any is.
    pub fn open(path: &Path) -> io::Result<Option<Pinned>> {
        /// `union bpf_attr` of the command.
        #[repr(C)]
        struct Get {
            path: u64,
            fd: u32,
            flags: u32,
        }
        let path = CString::new(path.as_os_str().as_bytes())?;
        let attr = Get { path: path.as_ptr() as u64, fd: 0, flags: 0 };
        // SAFETY: the kernel reads the attributes and the path, which ends in a zero; both outlive the call.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, GET, &raw const attr, size_of::<Get>()) };
        match i32::try_from(fd) {
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(fd @ 0..) => Ok(Some(Pinned(unsafe { OwnedFd::from_raw_fd(fd) }))),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::NotFound { Ok(None) } else { Err(error) }
            }
        }
    }

    /// Its program has left the hook when this returns. When its last pin and descriptor go it leaves too, but later: the
    /// kernel puts that off.
    pub fn detach(self) -> io::Result<()> {
        let fd = self.0.as_raw_fd();
        // SAFETY: the kernel reads the attributes, which are the descriptor alone; it outlives the call.
        let result = unsafe { libc::syscall(libc::SYS_bpf, DETACH, &raw const fd, size_of_val(&fd)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
