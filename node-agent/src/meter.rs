//! Metering: every ten seconds, what each egress address was used for on this node.
//!
//! | to change | look in |
//! |---|---|
//! | what the programs count, and when | `ebpf/src/meter.rs` |
//! | what a report tells, and when a meter's number is another's | `book` |
//! | how the maps are read and written | `read` |
//! | when a connection of a socket with an egress address is over | `bound` |

mod book;
mod bound;
mod file;
mod read;
mod uses;

pub use book::{Book, Look, Names, Step, Told, Whose};
pub use read::Maps;

use crate::ops::Rules;
use aegis_usage_report::{INTERVAL, MAX_INTERVAL, Row};
use aya::maps::MapError;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How often it is looked whether there is something to do.
const LOOK: Duration = Duration::from_millis(200);
/// Time in which a program that has taken a number enters it into the index.
const TAKEN: Duration = Duration::from_secs(1);

/// What numbers stand for, which whoever gives them says. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Published(Arc<Mutex<Option<Arc<Names>>>>);

impl Published {
    /// Says it anew, if it is something new.
    pub fn set(&self, names: Names) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if now.as_deref() != Some(&names) {
            *now = Some(Arc::new(names));
        }
    }

    fn get(&self) -> Option<Arc<Names>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Meters in use, of those that fit, as of the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Those in use.
    pub in_use: u32,
    /// Those that fit.
    pub size: u32,
}

/// The thread that reads meters; it ends when this is dropped.
#[derive(Debug)]
pub struct Meters {
    stop: Arc<AtomicBool>,
    fill: Arc<Mutex<Option<Fill>>>,
}

impl Meters {
    /// Starts metering. `state` is a folder that outlives the agent; `tell` gets the rows of each interval with its begin and end, in
    /// seconds since the Unix epoch, and must not block.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(
        maps: Maps,
        names: Published,
        state: Option<PathBuf>,
        tell: impl FnMut(Vec<Row>, i64, i64) + Send + 'static,
    ) -> io::Result<Meters> {
        let (stop, fill) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let mut meter =
            Meter { maps, names, state, tell, stop: Arc::clone(&stop), fill: Arc::clone(&fill), saved: None };
        std::thread::Builder::new().name("meters".to_owned()).spawn(move || {
            while let Err(error) = meter.run() {
                tracing::error!(%error, "use is not metered; trying again");
                if meter.rest(Duration::from_secs(5)) {
                    return;
                }
            }
        })?;
        Ok(Meters { stop, fill })
    }

    /// How many are in use; `None` before the first look.
    pub fn fill(&self) -> Option<Fill> {
        *self.fill.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Meters {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

struct Meter<T> {
    maps: Maps,
    names: Published,
    state: Option<PathBuf>,
    tell: T,
    stop: Arc<AtomicBool>,
    fill: Arc<Mutex<Option<Fill>>>,
    /// What the file says.
    saved: Option<Arc<Rules>>,
}

impl<T: FnMut(Vec<Row>, i64, i64)> Meter<T> {
    /// Meters until it is to stop.
    fn run(&mut self) -> Result<(), MapError> {
        self.maps.withdraw()?;
        if self.rest(TAKEN) {
            return Ok(());
        }
        self.maps.give_out()?;
        self.maps.keep_rest_of_refusals()?;
        let rules = self.state.as_deref().and_then(file::read);
        let mut book = Book::new(Told { rules, ..self.maps.told()? });
        let mut due = next(now());
        loop {
            self.save();
            // A clock that jumps back is not to keep it waiting.
            let second = now();
            if second < due && due - second <= INTERVAL {
                self.maps.look_at_sockets()?;
                if self.rest(LOOK) {
                    return Ok(());
                }
                continue;
            }
            let (from, to) = self.interval(second);
            due = next(second);
            let look = self.maps.look(book.numbers())?;
            *self.fill.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.maps.fill(&look));
            let names = self.names.get();
            let (rows, steps) = book.look(&look, names.as_deref());
            (self.tell)(rows, from, to);
            self.maps.set_clock(since_boot())?;
            self.maps.follow(&steps)?;
        }
    }

    /// The interval that ends now, in whole tens of seconds as long as nothing is late: from where the last one has ended, also one of
    /// the agent before. How long that is ago no jump of the clock changes.
    fn interval(&self, second: i64) -> (i64, i64) {
        let to = second - second.rem_euclid(INTERVAL);
        let tens = |seconds: u64| i64::try_from((seconds + 5) / 10).unwrap_or(i64::MAX);
        let last = self.maps.clock();
        let elapsed = if last == 0 { 1 } else { tens(since_boot().saturating_sub(last)) };
        (to - elapsed.saturating_mul(INTERVAL).clamp(INTERVAL, MAX_INTERVAL), to)
    }

    /// Keeps the names of rules, for the agent after this one.
    fn save(&mut self) {
        let Some((path, names)) = self.state.as_deref().zip(self.names.get()) else { return };
        if self.saved.as_ref() == Some(&names.rules) {
            return;
        }
        if let Err(error) = file::write(path, &names.rules) {
            tracing::warn!(%error, "names of rules are not kept; after a restart some use is told without them");
        }
        self.saved = Some(Arc::clone(&names.rules));
    }

    /// Waits. True if it is to stop.
    fn rest(&self, time: Duration) -> bool {
        std::thread::sleep(time);
        self.stop.load(Ordering::Acquire)
    }
}

/// Seconds since the Unix epoch.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// The next end of an interval.
fn next(second: i64) -> i64 {
    second - second.rem_euclid(INTERVAL) + INTERVAL
}

/// Seconds since boot, which no clock changes.
fn since_boot() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    time.map_or(0, |time| Duration::from(time).as_secs())
}
