//! The flow tables, `FORWARD` and `REVERSE`, as the agent sees them: it reads them in its own memory, without a system call, and
//! writes by the `enter` program, so that the rules of `aegis_common`'s table are in one place.

use crate::ebpf::EbpfError;
use crate::raw;
use crate::test_run;
use aegis_common::{
    ENTER_BATCH, ENTER_FORWARD, ENTER_HEADER, ENTER_REVERSE, FlowKey, ForwardValue, LEAVE_FORWARD,
    LEAVE_REVERSE, PENDING, ReverseValue, TAG, WAYS,
};
use aya::maps::MapData;
use aya::programs::ProgramFd;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Bytes of a key.
const KEY: usize = size_of::<FlowKey>();
/// Bytes of a bucket before its first place: the tags and a counter.
const HEAD: usize = (WAYS as usize + 1) * 4;

/// A table whose types only their sizes tell: also one of another version of the data plane.
#[derive(Debug)]
pub struct Table {
    memory: NonNull<u8>,
    length: usize,
    buckets: usize,
    /// Bytes of a bucket, and of a value.
    bucket: usize,
    value: usize,
}

// SAFETY: the memory belongs to this alone, and is only read, in a way that bears others who write it.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl Table {
    /// Maps the buckets into memory.
    pub fn open(map: &MapData) -> io::Result<Table> {
        let info = map.info().map_err(io::Error::other)?;
        let (buckets, bucket) = (info.max_entries() as usize, info.value_size() as usize);
        let ways = WAYS as usize;
        let value = bucket.checked_sub(HEAD).filter(|places| places % ways == 0);
        let value = value.and_then(|places| (places / ways).checked_sub(KEY));
        let odd =
            || io::Error::new(io::ErrorKind::InvalidData, format!("no table has buckets of {bucket} bytes"));
        let value = value.filter(|value| bucket % 8 == 0 && value % 8 == 0).ok_or_else(odd)?;
        let length = buckets * bucket;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Table { memory, length, buckets, bucket, value })
    }

    /// Whether a map is such a table. (Until schema 5 the flows were in hashes.)
    pub fn is_one(map: &MapData) -> io::Result<bool> {
        let kind = map.info().and_then(|info| info.map_type()).map_err(io::Error::other)?;
        Ok(kind == aya::maps::MapType::Array)
    }

    /// Calls `each` with every entry. What comes or goes meanwhile may be missed; what stays is not.
    pub fn for_each(&self, mut each: impl FnMut(&[u8], &[u8])) {
        let size = KEY + self.value;
        let mut words = vec![0u64; size / 8];
        for bucket in 0..self.buckets {
            for way in 0..WAYS as usize {
                // SAFETY: within the mapping, as all offsets below; buckets and places begin at multiples of eight.
                let (tag, place) = unsafe {
                    let bucket = self.memory.as_ptr().add(bucket * self.bucket);
                    (AtomicU32::from_ptr(bucket.cast::<u32>().add(way)), bucket.add(HEAD + way * size))
                };
                // (Other loads than relaxed ones may not be made from memory that is read-only.)
                let word = tag.load(Ordering::Relaxed);
                fence(Ordering::Acquire);
                if word & TAG == 0 || word & PENDING != 0 {
                    continue;
                }
                for (at, copy) in words.iter_mut().enumerate() {
                    // In words in which programs write: half of a life is nobody's.
                    // SAFETY: see above.
                    *copy =
                        unsafe { AtomicU64::from_ptr(place.cast::<u64>().add(at)) }.load(Ordering::Relaxed);
                }
                fence(Ordering::Acquire);
                if tag.load(Ordering::Relaxed) != word {
                    // It has become another's.
                    continue;
                }
                // SAFETY: words are bytes.
                let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), size) };
                let (key, value) = bytes.split_at(KEY);
                each(key, value);
            }
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: the mapping that `open` made; nothing refers to it any more.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.length) };
    }
}

/// One of this version's tables.
#[derive(Debug)]
pub struct Flows<V> {
    table: Table,
    value: PhantomData<V>,
}

impl<V: aya::Pod> Flows<V> {
    /// Maps the table into memory.
    pub fn open(map: &MapData) -> io::Result<Flows<V>> {
        let table = Table::open(map)?;
        if table.value != size_of::<V>() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "another table's values"));
        }
        Ok(Flows { table, value: PhantomData })
    }

    /// Calls `each` with every entry: see [`Table::for_each`].
    pub fn for_each(&self, mut each: impl FnMut(&FlowKey, &V)) {
        self.table.for_each(|key, value| {
            if let (Some(key), Some(value)) = (raw::from_bytes(key), raw::from_bytes(value)) {
                each(&key, &value);
            }
        });
    }
}

/// A value of one of the tables.
pub trait FlowValue: aya::Pod {
    /// What the `enter` program is to do with entries, and with keys.
    const KINDS: (u32, u32);
}

impl FlowValue for ForwardValue {
    const KINDS: (u32, u32) = (ENTER_FORWARD, LEAVE_FORWARD);
}

impl FlowValue for ReverseValue {
    const KINDS: (u32, u32) = (ENTER_REVERSE, LEAVE_REVERSE);
}

/// The `enter` program.
pub struct EnterProgram {
    fd: ProgramFd,
}

impl EnterProgram {
    pub(crate) fn new(fd: ProgramFd) -> EnterProgram {
        EnterProgram { fd }
    }

    /// Enters these, or replaces those that are in. Gives how many found room.
    pub fn set<V: FlowValue>(&self, entries: &[(FlowKey, V)]) -> Result<u32, EbpfError> {
        let entries = entries.iter().map(|(key, value)| [raw::bytes(key), raw::bytes(value)].concat());
        self.run(V::KINDS.0, entries)
    }

    /// Removes these keys from the table with such values. Gives how many were in.
    pub fn remove<V: FlowValue>(&self, keys: &[FlowKey]) -> Result<u32, EbpfError> {
        self.run(V::KINDS.1, keys.iter().map(|key| raw::bytes(key).to_vec()))
    }

    fn run(&self, kind: u32, entries: impl Iterator<Item = Vec<u8>>) -> Result<u32, EbpfError> {
        let (mut done, mut entries) = (0, entries.peekable());
        while entries.peek().is_some() {
            let mut packet = vec![0; ENTER_HEADER];
            packet[..4].copy_from_slice(&kind.to_ne_bytes());
            packet.extend(entries.by_ref().take(ENTER_BATCH).flatten());
            let outcome = test_run::run(self.fd.as_fd(), &packet, &[], 1);
            done += outcome.map_err(EbpfError::Enter)?.verdict;
        }
        Ok(done)
    }
}
