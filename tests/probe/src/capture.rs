//! The packet recorder: packet sockets on several devices, read by one thread.
//!
//! Commands come on standard input, one JSON object a line, and are answered on standard output after everything that
//! had arrived by then was counted: `{"do":"report"}`, `{"do":"reset"}`. It ends with its input, so it cannot outlive
//! the test that started it. The first line it writes is `{"ready":true}`.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::json;

use crate::listener::now_ms;
use crate::packet::parse;
use crate::recorder::{Direction, Recorder};

/// Bytes kept of each packet: Ethernet, IPv4 with options, and TCP.
const SNAPSHOT: usize = 192;
/// Packets read by one system call.
const BATCH: usize = 64;
/// Room in the kernel for packets not yet read.
const BUFFER: libc::c_int = 256 << 20;

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
enum Request {
    Report,
    Reset,
}

/// Records until standard input ends.
pub fn run(devices: &[String], to: &[String], pcap: Option<&Path>) -> anyhow::Result<()> {
    let ranges = to.iter().map(|text| text.parse()).collect::<anyhow::Result<Vec<_>>>()?;
    let mut sockets = devices
        .iter()
        .map(|device| PacketSocket::open(device).with_context(|| format!("record on {device}")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut recorder = Recorder::new(devices.to_vec(), ranges);
    let mut pcap = pcap.map(PcapFile::create).transpose()?;
    say(&json!({"ready": true}))?;
    let mut input = Vec::new();
    loop {
        let mut waiting: Vec<libc::pollfd> = sockets
            .iter()
            .map(|socket| socket.descriptor.as_raw_fd())
            .chain([libc::STDIN_FILENO])
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        // SAFETY: the array lives across the call and its length is passed.
        if unsafe { libc::poll(waiting.as_mut_ptr(), waiting.len() as libc::nfds_t, -1) } < 0 {
            return Err(io::Error::last_os_error()).context("poll");
        }
        for (index, socket) in sockets.iter_mut().enumerate() {
            socket.drain(index, &mut recorder, pcap.as_mut())?;
        }
        if waiting.last().is_some_and(|stdin| stdin.revents != 0) {
            let mut chunk = [0; 4096];
            let count = io::stdin().read(&mut chunk)?;
            if count == 0 {
                return pcap.map_or(Ok(()), PcapFile::finish);
            }
            input.extend_from_slice(&chunk[..count]);
            while let Some(end) = input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = input.drain(..=end).collect();
                answer(&line, &mut sockets, &mut recorder)?;
            }
        }
    }
}

fn answer(line: &[u8], sockets: &mut [PacketSocket], recorder: &mut Recorder) -> anyhow::Result<()> {
    match serde_json::from_slice(line) {
        Ok(Request::Report) => {
            let mut dropped = 0;
            for socket in sockets {
                dropped += socket.dropped()?;
            }
            say(&recorder.report(dropped))
        }
        Ok(Request::Reset) => {
            recorder.reset();
            for socket in sockets {
                socket.dropped()?;
                socket.drops = 0;
            }
            say(&json!({}))
        }
        Err(error) => say(&json!({"error": error.to_string()})),
    }
}

fn say(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    serde_json::to_writer(&mut output, value)?;
    output.write_all(b"\n")?;
    Ok(output.flush()?)
}

struct PacketSocket {
    descriptor: OwnedFd,
    drops: u64,
}

impl PacketSocket {
    fn open(device: &str) -> anyhow::Result<Self> {
        let name = std::ffi::CString::new(device)?;
        // SAFETY: a C string that outlives the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            bail!("there is no such device here");
        }
        // Protocol 0 receives nothing: no packet of another device slips in before the socket is bound.
        // SAFETY: plain system call.
        let raw = unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
        };
        if raw < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: just made, owned by nobody else.
        let descriptor = unsafe { OwnedFd::from_raw_fd(raw) };
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the option is an int; all zero is a valid sockaddr_ll, and its size is passed.
        unsafe {
            let buffer = BUFFER;
            let option = (&raw const buffer).cast();
            if libc::setsockopt(raw, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, option, size) < 0 {
                libc::setsockopt(raw, libc::SOL_SOCKET, libc::SO_RCVBUF, option, size);
            }
            let mut address: libc::sockaddr_ll = zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            address.sll_ifindex = index as i32;
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            if libc::bind(raw, (&raw const address).cast(), length) < 0 {
                return Err(io::Error::last_os_error().into());
            }
        }
        Ok(Self { descriptor, drops: 0 })
    }

    /// Reads all that has arrived.
    fn drain(
        &mut self,
        index: usize,
        recorder: &mut Recorder,
        mut pcap: Option<&mut PcapFile>,
    ) -> anyhow::Result<()> {
        let mut buffers = [[0_u8; SNAPSHOT]; BATCH];
        loop {
            // SAFETY: all zero is a valid value of these C structures.
            let mut addresses: [libc::sockaddr_ll; BATCH] = unsafe { zeroed() };
            // SAFETY: the same.
            let mut vectors: [libc::iovec; BATCH] = unsafe { zeroed() };
            // SAFETY: the same.
            let mut messages: [libc::mmsghdr; BATCH] = unsafe { zeroed() };
            for slot in 0..BATCH {
                vectors[slot] =
                    libc::iovec { iov_base: buffers[slot].as_mut_ptr().cast(), iov_len: SNAPSHOT };
                messages[slot].msg_hdr.msg_iov = &raw mut vectors[slot];
                messages[slot].msg_hdr.msg_iovlen = 1;
                messages[slot].msg_hdr.msg_name = (&raw mut addresses[slot]).cast();
                messages[slot].msg_hdr.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            }
            // SAFETY: every message points to a buffer, an iovec and an address that outlive the call. MSG_TRUNC makes
            // msg_len the packet's true length.
            let count = unsafe {
                libc::recvmmsg(
                    self.descriptor.as_raw_fd(),
                    messages.as_mut_ptr(),
                    BATCH as libc::c_uint,
                    libc::MSG_TRUNC as _,
                    std::ptr::null_mut(),
                )
            };
            if count < 0 {
                let error = io::Error::last_os_error();
                return match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR | libc::ENETDOWN) => Ok(()),
                    _ => Err(error).context("receive packets"),
                };
            }
            let now = now_ms();
            for slot in 0..count as usize {
                let length = messages[slot].msg_len as usize;
                let bytes = &buffers[slot][..length.min(SNAPSHOT)];
                let outgoing = addresses[slot].sll_pkttype == libc::PACKET_OUTGOING;
                let direction = if outgoing { Direction::Out } else { Direction::In };
                recorder.record(index, direction, parse(bytes), length as u64, now);
                if let Some(file) = pcap.as_mut() {
                    file.write(bytes, length, now)?;
                }
            }
            if (count as usize) < BATCH {
                return Ok(());
            }
        }
    }

    /// Packets lost since the start or reset. Reading the kernel's counter clears it.
    fn dropped(&mut self) -> anyhow::Result<u64> {
        // SAFETY: all zero is a valid value.
        let mut statistics: libc::tpacket_stats = unsafe { zeroed() };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the structure and its length are passed and outlive the call.
        let result = unsafe {
            libc::getsockopt(
                self.descriptor.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error()).context("read packet statistics");
        }
        self.drops += u64::from(statistics.tp_drops);
        Ok(self.drops)
    }
}

/// A pcap file (Ethernet, microseconds).
struct PcapFile {
    file: BufWriter<File>,
}

impl PcapFile {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&pcap_header())?;
        Ok(Self { file })
    }

    fn write(&mut self, bytes: &[u8], length: usize, now_ms: u64) -> anyhow::Result<()> {
        self.file.write_all(&pcap_record(bytes.len(), length, now_ms))?;
        Ok(self.file.write_all(bytes)?)
    }

    fn finish(mut self) -> anyhow::Result<()> {
        Ok(self.file.flush()?)
    }
}

fn pcap_header() -> Vec<u8> {
    let mut header = 0xa1b2_c3d4_u32.to_le_bytes().to_vec();
    header.extend([2, 0, 4, 0]);
    header.extend([0; 8]);
    header.extend((SNAPSHOT as u32).to_le_bytes());
    header.extend(1_u32.to_le_bytes());
    header
}

fn pcap_record(kept: usize, length: usize, now_ms: u64) -> Vec<u8> {
    let (seconds, micros) = ((now_ms / 1000) as u32, (now_ms % 1000 * 1000) as u32);
    [seconds, micros, kept as u32, length as u32].iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pcap_layout() {
        assert_eq!(pcap_header().len(), 24);
        let record = pcap_record(60, 1514, 1_002_003);
        assert_eq!(record.len(), 16);
        assert_eq!(record[0..4], 1002_u32.to_le_bytes());
        assert_eq!(record[4..8], 3000_u32.to_le_bytes());
        assert_eq!(record[12..16], 1514_u32.to_le_bytes());
    }
}
