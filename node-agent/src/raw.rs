//! Maps by raw system calls, many entries at a time, and those whose types only their sizes tell: of another version of the data
//! plane.

use std::io;
use std::mem::{size_of, size_of_val};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Entries that one call reads.
const BATCH: usize = 4096;
/// Commands of bpf(2).
const UPDATE: libc::c_long = 2;
const DELETE: libc::c_long = 3;
/// `BPF_MAP_LOOKUP_AND_DELETE_ELEM`.
const TAKE: libc::c_long = 21;
const INFO: libc::c_long = 15;
const LOOKUP_BATCH: libc::c_long = 24;
const UPDATE_BATCH: libc::c_long = 26;
const DELETE_BATCH: libc::c_long = 27;
/// `BPF_NOEXIST`.
const NOEXIST: u64 = 1;

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

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
}

/// `union bpf_attr` of the question for it.
#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// Kinds of maps that have a value for each CPU: hash, array, LRU hash, and local storage of cgroups.
const PER_CPU: [u32; 4] = [5, 6, 10, 21];

/// A map with the sizes that the kernel says it has. It copies as many bytes as these are, whatever the buffer: so nobody else says
/// how large a buffer is.
#[derive(Clone, Copy, Debug)]
pub struct Map<'m> {
    fd: BorrowedFd<'m>,
    sizes: Sizes,
}

impl<'m> Map<'m> {
    /// Asks the kernel for the sizes. Maps with a value for each CPU are refused: they are read otherwise.
    pub fn of(fd: BorrowedFd<'m>) -> io::Result<Map<'m>> {
        let mut info = Info::default();
        let mut attr = InfoAttr {
            fd: fd.as_raw_fd() as u32,
            length: size_of::<Info>() as u32,
            info: (&raw mut info) as u64,
        };
        // SAFETY: the kernel writes at most `length` bytes into `info`.
        let result = unsafe { libc::syscall(libc::SYS_bpf, INFO, &raw mut attr, size_of_val(&attr)) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let sizes = Sizes { key: info.key_size as usize, value: info.value_size as usize };
        if PER_CPU.contains(&info.kind) || sizes.key == 0 || sizes.value == 0 {
            let odd = format!("a map of kind {} has no single value for each key", info.kind);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, odd));
        }
        Ok(Map { fd, sizes })
    }

    /// Its sizes.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Calls `each` with every entry: a few system calls instead of two for each entry. Entries that come or go meanwhile may be
    /// missed.
    pub fn for_each(&self, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let sizes = self.sizes;
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
                map_fd: self.fd.as_raw_fd() as u32,
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

    /// Writes an entry.
    pub fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        if (key.len(), value.len()) != (self.sizes.key, self.sizes.value) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.command(UPDATE, key, value, 0)
    }

    /// Writes an entry unless there is one with this key, which is no failure either.
    pub fn insert(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.insert_new(key, value).map(drop)
    }

    /// The same; says whether it was written.
    pub fn insert_new(&self, key: &[u8], value: &[u8]) -> io::Result<bool> {
        if (key.len(), value.len()) != (self.sizes.key, self.sizes.value) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match self.command(UPDATE, key, value, NOEXIST) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Removes an entry of a hash and gives its value, in one step (Linux 5.14); `None` if there is none.
    pub fn take<V: aya::Pod>(&self, key: &[u8]) -> io::Result<Option<V>> {
        let mut value = vec![0; self.sizes.value];
        if key.len() != self.sizes.key || size_of::<V>() != self.sizes.value {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut attr = EntryAttr {
            map_fd: self.fd.as_raw_fd() as u32,
            pad: 0,
            key: key.as_ptr() as u64,
            value: value.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the kernel reads a key and writes a value of the map's sizes, which both buffers have.
        let result = unsafe { libc::syscall(libc::SYS_bpf, TAKE, &raw mut attr, size_of_val(&attr)) };
        if result < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error) };
        }
        Ok(from_bytes(&value))
    }

    /// Removes an entry; what is not there is no failure.
    pub fn delete(&self, key: &[u8]) -> io::Result<()> {
        if key.len() != self.sizes.key {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match self.command(DELETE, key, &[], 0) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// Writes entries, in order, of which keys and values follow each other. Gives how many, and why no more.
    pub fn update_many(&self, keys: &[u8], values: &[u8]) -> (usize, io::Result<()>) {
        let Sizes { key, value } = self.sizes;
        if !keys.len().is_multiple_of(key) || keys.len() / key * value != values.len() {
            return (0, Err(io::ErrorKind::InvalidInput.into()));
        }
        let mut done = 0;
        for (keys, values) in keys.chunks(BATCH * key).zip(values.chunks(BATCH * value)) {
            let (written, result) = self.batch(UPDATE_BATCH, keys, values);
            done += written;
            if result.is_err() {
                return (done, result);
            }
        }
        (done, Ok(()))
    }

    /// Removes entries, in order, of which the keys follow each other; what is not there is no failure. Gives how many, and why no more.
    pub fn delete_many(&self, keys: &[u8]) -> (usize, io::Result<()>) {
        let size = self.sizes.key;
        if !keys.len().is_multiple_of(size) {
            return (0, Err(io::ErrorKind::InvalidInput.into()));
        }
        let mut done = 0;
        while done * size < keys.len() {
            let end = keys.len().min((done + BATCH) * size);
            let (removed, result) = self.batch(DELETE_BATCH, &keys[done * size..end], &[]);
            done += removed;
            match result {
                // The next one is not there.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => done += 1,
                Err(error) => return (done, Err(error)),
                Ok(()) => {}
            }
        }
        (done, Ok(()))
    }

    /// One call for as many entries as there are keys; gives how many it has dealt with.
    fn batch(&self, command: libc::c_long, keys: &[u8], values: &[u8]) -> (usize, io::Result<()>) {
        let mut attr = BatchAttr {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values: if values.is_empty() { 0 } else { values.as_ptr() as u64 },
            count: (keys.len() / self.sizes.key) as u32,
            map_fd: self.fd.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        let all = attr.count;
        // SAFETY: the kernel reads `count` keys, and values where it writes, of the map's sizes: the callers have checked each.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr, size_of::<BatchAttr>()) };
        if result < 0 {
            let error = io::Error::last_os_error();
            // It fails before it looks at anything, and then does not say how many.
            let told = !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM | libc::EFAULT));
            return (if told { attr.count.min(all) as usize } else { 0 }, Err(error));
        }
        (attr.count as usize, Ok(()))
    }

    fn command(&self, command: libc::c_long, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        let mut attr = EntryAttr {
            map_fd: self.fd.as_raw_fd() as u32,
            pad: 0,
            key: key.as_ptr() as u64,
            value: if value.is_empty() { 0 } else { value.as_ptr() as u64 },
            flags,
        };
        // SAFETY: the kernel reads a key and a value of the map's sizes, which the callers have checked.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr, size_of_val(&attr)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
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
