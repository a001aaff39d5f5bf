//! Ports in use by meter, which programs count, and of connections of sockets the agent.

use aegis_common::MeterUse;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// `METER_USE` in the agent's memory, so that a peak can be taken in one piece while programs raise it.
#[derive(Debug)]
pub(super) struct Uses {
    memory: NonNull<AtomicU32>,
    length: u32,
}

// SAFETY: the memory belongs to this alone, and all access is atomic.
unsafe impl Send for Uses {}

impl Uses {
    pub(super) fn open(map: BorrowedFd<'_>, length: u32) -> io::Result<Uses> {
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::bytes(length),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Uses { memory: NonNull::new(memory.cast()).ok_or(io::ErrorKind::InvalidData)?, length })
    }

    fn bytes(length: u32) -> usize {
        length as usize * size_of::<MeterUse>()
    }

    fn words(&self, number: u32) -> Option<[&AtomicU32; 2]> {
        let at = (number < self.length).then_some(number as usize * 2)?;
        // SAFETY: within the mapping.
        Some(unsafe { [self.memory.add(at).as_ref(), self.memory.add(at + 1).as_ref()] })
    }

    fn get(&self, number: u32) -> MeterUse {
        self.words(number).map_or_else(MeterUse::default, |[in_use, peak]| MeterUse {
            in_use: in_use.load(Ordering::Acquire),
            peak: peak.load(Ordering::Acquire),
        })
    }

    /// The same, and lets the peak begin anew at what is in use.
    pub(super) fn take(&self, number: u32) -> MeterUse {
        let Some([in_use, peak]) = self.words(number) else { return MeterUse::default() };
        let before = self.get(number);
        let highest = peak.swap(before.in_use, Ordering::AcqRel);
        // What began in between has counted itself against the old peak.
        let now = in_use.load(Ordering::Acquire);
        peak.fetch_max(now, Ordering::AcqRel);
        MeterUse { in_use: now, peak: highest }
    }

    /// Counts a port more.
    pub(super) fn begin(&self, number: u32) {
        let Some([in_use, peak]) = self.words(number) else { return };
        let now = in_use.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        // Signed, as to the programs: of a flow the end may have been counted first.
        if now.cast_signed() > 0 {
            peak.fetch_max(now, Ordering::AcqRel);
        }
    }

    /// Counts one less.
    pub(super) fn end(&self, number: u32) {
        if let Some([in_use, _]) = self.words(number) {
            in_use.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Uses {
    fn drop(&mut self) {
        // SAFETY: the mapping that `open` made; nothing refers to it any more.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), Self::bytes(self.length)) };
    }
}
