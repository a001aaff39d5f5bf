//! Maps whose types only their sizes tell: those of another version of the data plane.

use std::io;
use std::mem::{size_of, size_of_val};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Entries that one call reads.
const BATCH: usize = 4096;
/// Commands of bpf(2).
const UPDATE: libc::c_long = 2;
const DELETE: libc::c_long = 3;
const LOOKUP_BATCH: libc::c_long = 24;

/// `union bpf_attr` of the batch commands.
#[repr(C)]
#[derive(Clone, Copy)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `union bpf_attr` of the commands for one entry.
#[repr(C)]
#[derive(Clone, Copy)]
struct EntryAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Sizes of a map's keys and values in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of a key.
    pub key: usize,
    /// Of a value.
    pub value: usize,
}

/// Calls `each` with every entry: a few system calls instead of two for each entry. Entries that come or go meanwhile may be
/// missed. `sizes` must be the map's.
pub fn for_each(map: BorrowedFd<'_>, sizes: Sizes, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    if sizes.key == 0 || sizes.value == 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (mut keys, mut values) = (vec![0; BATCH * sizes.key], vec![0; BATCH * sizes.value]);
    let mut position = [0u64; 8];
    let mut first = true;
    loop {
        let mut next = [0u64; 8];
        let mut attr = BatchAttr {
            in_batch: if first { 0 } else { position.as_ptr() as u64 },
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: (keys.len() / sizes.key) as u32,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel writes at most `count` keys and values of the map's sizes into buffers that have room for as many,
        // and at most a key of 64 bytes into `next`.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut attr, size_of::<BatchAttr>()) };
        let error = (result < 0).then(io::Error::last_os_error);
        let end = match error {
            None => false,
            Some(error) => match error.raw_os_error() {
                // No more; what `count` says was still delivered.
                Some(libc::ENOENT) => true,
                // One bucket holds more than fits.
                Some(libc::ENOSPC) => {
                    keys.resize(keys.len() * 2, 0);
                    values.resize(values.len() * 2, 0);
                    continue;
                }
                Some(libc::EINTR) => continue,
                _ => return Err(error),
            },
        };
        let entries = keys.chunks_exact(sizes.key).zip(values.chunks_exact(sizes.value));
        for (key, value) in entries.take(attr.count as usize) {
            each(key, value);
        }
        if end {
            return Ok(());
        }
        position = next;
        first = false;
    }
}

/// Writes an entry. Key and value must have the map's sizes.
pub fn update(map: BorrowedFd<'_>, sizes: Sizes, key: &[u8], value: &[u8]) -> io::Result<()> {
    if (key.len(), value.len()) != (sizes.key, sizes.value) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    command(map, UPDATE, key, value)
}

/// Removes an entry; what is not there is no failure.
pub fn delete(map: BorrowedFd<'_>, sizes: Sizes, key: &[u8]) -> io::Result<()> {
    if key.len() != sizes.key {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    match command(map, DELETE, key, &[]) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn command(map: BorrowedFd<'_>, command: libc::c_long, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = EntryAttr {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: key.as_ptr() as u64,
        value: if value.is_empty() { 0 } else { value.as_ptr() as u64 },
        flags: 0,
    };
    // SAFETY: the kernel reads a key and a value of the map's sizes, which the callers have checked.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr, size_of_val(&attr)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The bytes of a key or value.
pub fn bytes<T: aya::Pod>(it: &T) -> &[u8] {
    // SAFETY: plain data (aya::Pod) without padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(it).cast(), size_of::<T>()) }
}

/// A key or value from its bytes, if there are as many as it has.
pub fn from_bytes<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: plain data (aya::Pod), for which all bytes are a value, and as many as it needs.
    (bytes.len() == size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
