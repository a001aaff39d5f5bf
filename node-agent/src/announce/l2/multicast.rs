//! Whether a device takes in all multicast frames. Questions for an IPv6 address are sent to one of 2^24 groups, and a device
//! takes in only those of the groups that somebody on the node is in. The flag is the device's: it stays when the agent goes.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Switches it on or off; true if it was not so before.
pub fn set(ifindex: u32, on: bool) -> io::Result<bool> {
    // SAFETY: plain arguments.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that has just been opened, and is nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all-zero is a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_ifindex = libc::c_int::try_from(ifindex).unwrap_or(0);
    call(&socket, libc::SIOCGIFNAME, &mut request)?;
    call(&socket, libc::SIOCGIFFLAGS, &mut request)?;
    let flag = libc::IFF_ALLMULTI as libc::c_short;
    // SAFETY: the request before has filled this member of the union.
    let before = unsafe { request.ifr_ifru.ifru_flags };
    let wanted = if on { before | flag } else { before & !flag };
    if wanted == before {
        return Ok(false);
    }
    request.ifr_ifru.ifru_flags = wanted;
    call(&socket, libc::SIOCSIFFLAGS, &mut request)?;
    Ok(true)
}

fn call(socket: &OwnedFd, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the request outlives the call, and is what these calls take.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), number as libc::Ioctl, &raw mut *request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
