//! Reads the flow table and the port bitmaps, and hands what has ended to the `sweep` program, which looks again and
//! removes. A thread of its own, since a scan of a full table takes long; it takes about a fiftieth of one CPU.

use crate::demand::{Origin, Ports};
use crate::load::Taken;
use crate::observed::from_map;
use crate::ops::Named;
use crate::raw;
use aegis_common::{BLOCK_DEAD, BlockKey, BlockValue, FlowKey, ForwardValue, WORDS_PER_BLOCK, is_stand_in};
use aegis_core::egress::Egress;
use aegis_core::slice::SliceSet;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Shortest time between the beginnings of two scans.
const PERIOD: Duration = Duration::from_secs(1);
/// A scan is followed by a pause of this many times the CPU time that it took: ports that are free again wait for the next one, and the
/// first of large tables, whose memory is mapped by then, takes several times as long as those that follow.
const REST: u32 = 20;

/// What a scan found.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// When the scan began; `None` before the first.
    pub started: Option<Instant>,
    /// How long it took.
    pub scan: Duration,
    /// Flows.
    pub flows: u64,
    /// Port bitmaps.
    pub blocks: u64,
    /// Slices from which some port is in use, by egress address.
    pub slices: BTreeMap<Ipv4Addr, SliceSet>,
    /// Slices of /64s from which some flow is live, by /64 and allocation ([`identity`](aegis_common::Flow6Value::identity)).
    pub networks: BTreeMap<(Egress, u64), SliceSet>,
    /// Flows over IPv6 that are remembered.
    pub flows6: u64,
    /// Ports in use.
    pub ports: Ports,
    /// Indices that live flows hold.
    pub named: Named,
    /// Those of the peers through which flows of this node's pods leave.
    pub gateways: BTreeSet<u32>,
    /// Flows by index of their allocation.
    pub taken: BTreeMap<u32, Taken>,
    /// Flows in slices that are not this node's, if the scan looked.
    pub foreign: Option<u64>,
    /// Where flows lead.
    pub remotes: Arc<HashSet<IpAddr>>,
    /// Where flows from single IPv6 addresses lead, until it is looked up.
    pub stand_ins: HashSet<u32>,
}

impl Usage {
    /// Counts one flow.
    pub fn add_flow(&mut self, key: &FlowKey, value: &ForwardValue) {
        self.flows += 1;
        match is_stand_in(key.remote) {
            true => _ = self.stand_ins.insert(key.remote),
            false => self.add_remote(from_map(key.remote).into()),
        }
        self.named.allocations.insert(u32::from(value.allocation));
        if value.peer != 0 {
            self.named.peers.insert(u32::from(value.peer));
            if !value.is_guest(key) {
                self.gateways.insert(u32::from(value.peer));
            }
        }
    }

    /// Notes where a flow leads.
    pub fn add_remote(&mut self, remote: IpAddr) {
        // Nobody else has it yet.
        Arc::make_mut(&mut self.remotes).insert(remote);
    }

    /// Counts one bitmap.
    pub fn add_block(&mut self, key: &BlockKey, value: &BlockValue) {
        self.blocks += 1;
        if value.used & BLOCK_DEAD != 0 {
            return;
        }
        let egress = from_map(key.egress);
        let origin = Origin { address: from_map(key.remote), port: key.remote_port, protocol: key.protocol };
        let used: u32 = value.words.iter().map(|word| word.count_ones()).sum();
        self.ports.add(egress, origin, used, value.high);
        // Four words are a slice, eight slices a block.
        for (slice, _) in
            (0..WORDS_PER_BLOCK / 4).zip(value.words.chunks(4)).filter(|(_, words)| **words != [0; 4])
        {
            self.slices.entry(egress).or_default().insert((key.block << 3) | slice as u8);
        }
    }
}

/// Pause after a scan that took `scan`, of which the thread worked for `busy`: where others have the CPUs, ports are not to wait for
/// longer.
fn pause(scan: Duration, busy: Duration) -> Duration {
    (busy * REST).max(PERIOD.saturating_sub(scan))
}

/// CPU time that this thread has had.
fn worked() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID);
    time.map_or(Duration::ZERO, Duration::from)
}

/// Calls `each` with every entry of a hash map or an array (of which none may have a value for each CPU): see
/// [`raw::Map::for_each`]. A map of other sizes than the types have is an error.
pub fn for_each<K, V>(map: BorrowedFd<'_>, mut each: impl FnMut(&K, &V)) -> io::Result<()>
where
    K: aya::Pod,
    V: aya::Pod,
{
    let map = raw::Map::of(map)?;
    let types = raw::Sizes { key: size_of::<K>(), value: size_of::<V>() };
    if map.sizes() != types {
        let odd = format!("a map of {:?} is not one of {types:?}", map.sizes());
        return Err(io::Error::new(io::ErrorKind::InvalidData, odd));
    }
    map.for_each(|key, value| {
        if let (Some(key), Some(value)) = (raw::from_bytes(key), raw::from_bytes(value)) {
            each(&key, &value);
        }
    })
}

/// What a sweep needs of the data plane.
pub trait Tables: Send + 'static {
    /// Removes flows that have ended and bitmaps that are empty; gives what was found meanwhile. With `closely`, it looks at
    /// whose slices the flows are in, which it else does now and then.
    fn sweep(&mut self, closely: bool) -> io::Result<Usage>;
}

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Sweeper {
    latest: watch::Receiver<Usage>,
    stop: Arc<AtomicBool>,
    closely: Arc<AtomicBool>,
    failures: Arc<Mutex<Failures>>,
}

/// Scans that have failed in a row, and why the last one did.
#[derive(Debug, Default)]
struct Failures {
    count: u32,
    reason: String,
}

impl Failures {
    fn add(&mut self, error: &io::Error) {
        self.count = self.count.saturating_add(1);
        self.reason = error.to_string();
    }
}

/// Scans that may fail in a row before it counts.
const PATIENCE: u32 = 2;

impl Sweeper {
    /// Starts sweeping.
    pub fn start(mut tables: impl Tables) -> io::Result<Sweeper> {
        let (publish, latest) = watch::channel(Usage::default());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let closely = Arc::new(AtomicBool::new(false));
        let look_closely = Arc::clone(&closely);
        let failures = Arc::new(Mutex::new(Failures::default()));
        let noted = Arc::clone(&failures);
        std::thread::Builder::new().name("sweep".to_owned()).spawn(move || {
            let failing = || noted.lock().unwrap_or_else(PoisonError::into_inner);
            while !stopped.load(Ordering::Acquire) {
                let (started, before) = (Instant::now(), worked());
                let result = tables.sweep(look_closely.load(Ordering::Acquire));
                let scan = started.elapsed();
                match result {
                    Ok(usage) => {
                        *failing() = Failures::default();
                        publish.send_replace(Usage { started: Some(started), scan, ..usage });
                    }
                    Err(error) => {
                        if failing().count == 0 {
                            tracing::error!(%error, "cannot sweep; ports of ended flows are not reused");
                        }
                        failing().add(&error);
                    }
                }
                let wake = Instant::now() + pause(scan, worked().saturating_sub(before));
                while let Some(left) = wake.checked_duration_since(Instant::now()) {
                    if stopped.load(Ordering::Acquire) {
                        return;
                    }
                    std::thread::sleep(left.min(Duration::from_millis(500)));
                }
            }
        })?;
        Ok(Sweeper { latest, stop, closely, failures })
    }

    /// Whether each scan is to look at whose slices the flows are in.
    pub fn look_closely(&self, closely: bool) {
        self.closely.store(closely, Ordering::Release);
    }

    /// What the last scan found.
    pub fn usage(&self) -> Usage {
        self.latest.borrow().clone()
    }

    /// Why it does not work, if it keeps failing.
    pub fn failure(&self) -> Option<String> {
        if self.latest.has_changed().is_err() {
            return Some("the sweeping thread has ended".to_owned());
        }
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        (failures.count > PATIENCE).then(|| failures.reason.clone())
    }

    /// Resolves when there was another scan.
    pub async fn changed(&mut self) {
        if self.latest.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails until it is mended.
    struct Failing(Arc<AtomicBool>);

    impl Tables for Failing {
        fn sweep(&mut self, _: bool) -> io::Result<Usage> {
            let mended = self.0.load(Ordering::Acquire);
            if mended { Ok(Usage::default()) } else { Err(io::Error::other("no such map")) }
        }
    }

    #[test]
    fn a_sweep_that_keeps_failing_is_told_until_it_works_again() {
        let mended = Arc::new(AtomicBool::new(false));
        let sweeper = Sweeper::start(Failing(Arc::clone(&mended))).unwrap();
        assert_eq!(sweeper.failure(), None, "once is nothing");
        let wait_for = |failure: Option<&str>| {
            let end = Instant::now() + Duration::from_secs(30);
            while sweeper.failure().as_deref() != failure {
                assert!(Instant::now() < end, "{:?}", sweeper.failure());
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        wait_for(Some("no such map"));
        mended.store(true, Ordering::Release);
        wait_for(None);
    }
}
