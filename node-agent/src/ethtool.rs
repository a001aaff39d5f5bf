//! Counters that only a device's driver keeps (`ethtool -S`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const GET_STRINGS: u32 = 0x1b;
const GET_STATISTICS: u32 = 0x1d;
const GET_SET_INFO: u32 = 0x37;
/// The set of strings that name the statistics.
const STATISTICS: u32 = 1;
/// Bytes of one name.
const NAME: usize = 32;
/// More than any driver has.
const MOST: usize = 65_536;

/// Sum of all statistics of a device whose name ends with `suffix` (drivers count by queue).
pub fn sum(device: &str, suffix: &str) -> io::Result<u64> {
    // SAFETY: no pointers; the descriptor is checked before it is owned.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };

    // struct ethtool_sset_info: cmd, reserved, mask of sets (u64), then one length for each set in the mask.
    let mut info = [GET_SET_INFO, 0, 1 << STATISTICS, 0, 0];
    call(&socket, device, &mut info)?;
    let count = if info[2] == 0 { 0 } else { info[4] as usize };
    if count == 0 || count > MOST {
        return Ok(0);
    }
    // struct ethtool_gstrings: cmd, set, length, names.
    let mut names = vec![0u32; 3 + count * NAME / 4];
    names[..3].copy_from_slice(&[GET_STRINGS, STATISTICS, count as u32]);
    call(&socket, device, &mut names)?;
    // struct ethtool_stats: cmd, length, values (u64).
    let mut values = vec![0u32; 2 + count * 2];
    values[..2].copy_from_slice(&[GET_STATISTICS, count as u32]);
    call(&socket, device, &mut values)?;

    let names: Vec<u8> = names[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let matching = names.chunks(NAME).zip(values[2..].chunks(2)).filter(|(name, _)| {
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME);
        name[..end].ends_with(suffix.as_bytes())
    });
    Ok(matching.map(|(_, value)| join(value)).sum())
}

fn join(halves: &[u32]) -> u64 {
    let mut bytes = [0; 8];
    for (to, half) in bytes.chunks_mut(4).zip(halves) {
        to.copy_from_slice(&half.to_ne_bytes());
    }
    u64::from_ne_bytes(bytes)
}

fn call(socket: &OwnedFd, device: &str, buffer: &mut [u32]) -> io::Result<()> {
    // SAFETY: ifreq is plain data, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if device.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
    // SAFETY: the kernel reads and writes the request and, behind it, a buffer that is as long as its header says.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
