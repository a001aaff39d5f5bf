//! Fragments that came before the first of their datagram. The data plane knows whose a fragment is only from the first one, and
//! can't wait: it hands the others to this thread, which sends them after it. (RFC 4787 REQ-14, RFC 6888 REQ-1.)

mod waiting;

use crate::geneve;
use crate::raw;
use crate::test_run;
use aegis_common::{
    Config, EarlyHeader, FRAGMENT_LIFE, FragmentKey, FragmentValue, PeerValue, SLOTS_PER_ADDRESS, SlotValue,
    VNI_RETURN, VNI_STEER,
};
use aya::maps::{Array, HashMap, MapData, RingBuf};
use aya::programs::ProgramFd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use waiting::{Early, Waiting};

pub use waiting::PATIENCE;

/// How soon the thread notices that it is to end.
const STOP: Duration = Duration::from_millis(500);
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// What became of the fragments.
#[derive(Debug, Default)]
pub struct Tally {
    delivered: AtomicU64,
    lost: AtomicU64,
}

impl Tally {
    /// Fragments that were sent after their first one, and those that were not.
    pub fn read(&self) -> (u64, u64) {
        (self.delivered.load(Ordering::Relaxed), self.lost.load(Ordering::Relaxed))
    }

    fn add(&self, delivered: bool, count: usize) {
        let counter = if delivered { &self.delivered } else { &self.lost };
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// The maps and the program.
pub struct Tables {
    /// `EARLY`.
    pub early: RingBuf<MapData>,
    /// `FRAGMENTS_IN`.
    pub firsts: HashMap<MapData, FragmentKey, FragmentValue>,
    /// `SLOTS`.
    pub slots: Array<MapData, SlotValue>,
    /// `PEERS`.
    pub peers: Array<MapData, PeerValue>,
    /// `CONFIG`.
    pub config: Array<MapData, Config>,
    /// `uplink_ingress`.
    pub program: ProgramFd,
}

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Fragments {
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
}

impl Fragments {
    /// Starts waiting for fragments.
    pub fn start(tables: Tables) -> io::Result<Fragments> {
        let (stop, tally) = (Arc::new(AtomicBool::new(false)), Arc::new(Tally::default()));
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        let mut carrier = Carrier { tables, socket, tally: Arc::clone(&tally), waiting: Waiting::default() };
        let stopped = Arc::clone(&stop);
        std::thread::Builder::new().name("fragments".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                if let Err(error) = carrier.turn() {
                    tracing::error!(%error, "cannot read fragments that came early; trying again");
                    std::thread::sleep(STOP);
                }
            }
        })?;
        Ok(Fragments { stop, tally })
    }

    /// What became of them so far.
    pub fn tally(&self) -> (u64, u64) {
        self.tally.read()
    }
}

impl Drop for Fragments {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

struct Carrier {
    tables: Tables,
    socket: UdpSocket,
    tally: Arc<Tally>,
    waiting: Waiting,
}

impl Carrier {
    /// Waits until there is something to do, and does it.
    fn turn(&mut self) -> io::Result<()> {
        let wait =
            self.waiting.next().map_or(STOP, |at| at.saturating_duration_since(Instant::now()).min(STOP));
        // In whole milliseconds, upwards: it would spin otherwise.
        let wait = u16::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let mut ready = [PollFd::new(self.tables.early.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::from(wait)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => (),
            Err(error) => return Err(error.into()),
        }
        while let Some(early) = self.tables.early.next().and_then(|record| parse(&record)) {
            self.arrived(early)?;
        }
        for key in self.waiting.due(Instant::now()) {
            if let Some(first) = self.first(&key)? {
                for early in self.waiting.take(&key) {
                    self.deliver(early, &first)?;
                }
            }
        }
        self.tally.add(false, self.waiting.give_up(Instant::now()));
        Ok(())
    }

    fn arrived(&mut self, early: Early) -> io::Result<()> {
        let waited = boot_seconds()?.saturating_sub(early.header.seen);
        if u64::from(waited) > PATIENCE.as_secs() {
            // From a time when nobody listened.
            self.tally.add(false, 1);
            return Ok(());
        }
        match self.first(&early.header.key)? {
            Some(first) => self.deliver(early, &first),
            None => {
                if !self.waiting.keep(early, Instant::now()) {
                    self.tally.add(false, 1);
                }
                Ok(())
            }
        }
    }

    /// What the first fragment of a datagram led to, if it is here.
    fn first(&self, key: &FragmentKey) -> io::Result<Option<FragmentValue>> {
        match self.tables.firsts.get(key, 0) {
            Ok(first) => {
                let age = boot_seconds()?.saturating_sub(first.seen);
                Ok((age <= FRAGMENT_LIFE).then_some(first))
            }
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Sends a fragment where the first one went.
    fn deliver(&self, early: Early, first: &FragmentValue) -> io::Result<()> {
        let delivered = self.send(early, first).unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot send a fragment after its first one");
            false
        });
        self.tally.add(delivered, 1);
        Ok(())
    }

    fn send(&self, Early { header, mut frame }: Early, first: &FragmentValue) -> io::Result<bool> {
        let config = self.tables.config.get(&0, 0).map_err(io::Error::other)?;
        if first.address == 0 {
            let slot = header.address * SLOTS_PER_ADDRESS + u32::from(first.port >> 8);
            let owner = self.tables.slots.get(&slot, 0).map_err(io::Error::other)?.peer;
            let elsewhere = owner != 0 && owner != config.own_peer;
            return Ok(elsewhere && self.tunnel(&config, owner, VNI_STEER, &frame)?);
        }
        let Some(packet) = frame.get_mut(ETHERNET..) else { return Ok(false) };
        set_destination(packet, first.address.to_ne_bytes());
        if first.peer != 0 {
            return self.tunnel(&config, u32::from(first.peer), VNI_RETURN, &frame);
        }
        // As if it arrived only now: to the pod's address, which is nothing to the program, and up the host stack.
        test_run::inject(self.tables.program.as_fd(), &frame, header.ifindex)?;
        Ok(true)
    }

    /// Sends a packet to another node through the tunnel. False if it cannot get through.
    fn tunnel(&self, config: &Config, peer: u32, vni: u32, frame: &[u8]) -> io::Result<bool> {
        let peer = self.tables.peers.get(&peer, 0).map_err(io::Error::other)?;
        let packet = frame.get(ETHERNET..).unwrap_or_default();
        if peer.address == 0 || packet.len() > config.tunnel_mtu as usize {
            return Ok(false);
        }
        let message = [&geneve::header(vni), packet].concat();
        let address = Ipv4Addr::from(peer.address.to_ne_bytes());
        self.socket.send_to(&message, SocketAddrV4::new(address, config.tunnel_port as u16)).map(|_| true)
    }
}

/// Reads a record of `EARLY`.
fn parse(record: &[u8]) -> Option<Early> {
    let (header, frame) = record.split_at_checked(size_of::<EarlyHeader>())?;
    let header: EarlyHeader = raw::from_bytes(header)?;
    Some(Early { header, frame: frame.get(..header.length as usize)?.to_vec() })
}

/// Writes the destination of an IPv4 packet, with the header's checksum (RFC 1624 equation 3).
fn set_destination(packet: &mut [u8], address: [u8; 4]) {
    let word = |packet: &[u8], at: usize| u32::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
    if packet.len() < 20 {
        return;
    }
    let mut sum = !word(packet, 10) & 0xffff;
    for at in [0, 2] {
        sum += (!word(packet, 16 + at) & 0xffff) + word(&address, at);
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!sum as u16).to_be_bytes());
    packet[16..20].copy_from_slice(&address);
}

fn boot_seconds() -> io::Result<u32> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?.tv_sec() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_with_another_destination_still_sums_up() {
        for destination in [[10, 244, 1, 5], [0, 0, 0, 0], [255, 255, 255, 255]] {
            let mut packet =
                vec![0x45, 0, 0, 40, 0x12, 0x34, 0x20, 0xb9, 64, 17, 0, 0, 198, 51, 100, 7, 203, 0, 113, 10];
            let sum = |packet: &[u8]| {
                let sum: u32 =
                    packet.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
                let sum = (sum & 0xffff) + (sum >> 16);
                (sum & 0xffff) + (sum >> 16)
            };
            let checksum = !sum(&packet) as u16;
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
            assert_eq!(sum(&packet), 0xffff);
            set_destination(&mut packet, destination);
            assert_eq!(sum(&packet), 0xffff, "{destination:?}");
            assert_eq!(packet[16..20], destination);
        }
    }

    #[test]
    fn a_record_that_is_shorter_than_it_says_is_none() {
        let header = EarlyHeader { length: 3, ..EarlyHeader::default() };
        let whole = [raw::bytes(&header), &[1, 2, 3]].concat();
        assert_eq!(parse(&whole).map(|early| early.frame), Some(vec![1, 2, 3]));
        assert!(parse(&whole[..30]).is_none() && parse(&whole[..20]).is_none());
    }
}
