//! The pinned data plane: opened, read back, and opened anew when it cannot be read.

use crate::apply::{Attached, Plane, PlaneError};
use crate::args::Args;
use crate::desired::Shared;
use crate::fragments::Fragments;
use crate::kernel;
use crate::meter::{Fill, Meters, Published};
use crate::network::Network;
use crate::observed::Observed;
use crate::sweep::{Sweeper, Usage};
use aegis_core::policy::Room;
use aegis_usage_report::Row;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time after which the maps are read again, in case somebody else wrote to them.
const READ_AGAIN: Duration = Duration::from_secs(60);
/// Pause between two attempts to load the programs.
const LOAD_AGAIN: Duration = Duration::from_secs(3);

/// Loads the data plane, or finds it pinned.
pub type Open = Box<dyn Fn(&Args) -> Result<Box<dyn Plane>, PlaneError> + Send>;

/// Takes what egress addresses were used for, from one second since the Unix epoch to another. It must not block.
pub type Tell = Arc<dyn Fn(Vec<Row>, i64, i64) + Send + Sync>;

/// The data plane, with what its maps hold.
pub(super) struct Pinned {
    open: Open,
    pub plane: Option<Box<dyn Plane>>,
    /// Why there is no plane.
    pub failure: String,
    open_at: Instant,
    read_at: Instant,
    pub observed: Observed,
    pub sweeper: Option<Sweeper>,
    /// Why there is no sweeper.
    no_sweeper: String,
    fragments: Option<Fragments>,
    /// Why there is none.
    no_fragments: String,
    meters: Option<Meters>,
    /// Why there is none.
    no_meters: String,
    /// What numbers in the maps stand for.
    pub names: Published,
    tell: Tell,
}

impl Pinned {
    pub fn new(open: Open, tell: Tell, now: Instant) -> Pinned {
        Pinned {
            open,
            plane: None,
            failure: "not loaded yet".to_owned(),
            open_at: now,
            read_at: now,
            observed: Observed::default(),
            sweeper: None,
            no_sweeper: "it has not started yet".to_owned(),
            fragments: None,
            no_fragments: String::new(),
            meters: None,
            no_meters: String::new(),
            names: Published::default(),
            tell,
        }
    }

    /// Loads the programs, or finds them pinned, and reads what the maps hold: when it is time to, or at once where
    /// `doubted`. True if there is something new.
    pub fn open(&mut self, args: &Args, doubted: bool, now: Instant) -> bool {
        let mut new = false;
        if self.plane.is_none() && now >= self.open_at {
            match tokio::task::block_in_place(|| (self.open)(args)) {
                Ok(plane) => {
                    tracing::info!("data plane loaded");
                    self.plane = Some(plane);
                    self.read_at = now;
                    new = true;
                }
                Err(error) => {
                    if self.failure != error.to_string() {
                        tracing::error!(%error, "cannot load the data plane; trying again");
                    }
                    self.fail(&error, now);
                }
            }
        }
        self.start_fragments();
        self.start_sweeper();
        self.start_meters(args);
        let Some(plane) = &mut self.plane else { return new };
        if !doubted && now < self.read_at {
            return new;
        }
        match tokio::task::block_in_place(|| plane.read()) {
            Ok(observed) => {
                new |= observed != self.observed;
                self.observed = observed;
                self.read_at = now + READ_AGAIN;
            }
            Err(error) => {
                tracing::error!(%error, "cannot read the maps");
                self.fail(&error, now);
                return new;
            }
        }
        new
    }

    fn start_fragments(&mut self) {
        let (Some(plane), None) = (&self.plane, &self.fragments) else { return };
        match plane.fragments() {
            Ok(fragments) => self.fragments = Some(fragments),
            Err(error) => {
                let error = error.to_string();
                if self.no_fragments != error {
                    tracing::error!(error, "fragments that come before the first of their datagram are lost");
                }
                self.no_fragments = error;
            }
        }
    }

    fn start_sweeper(&mut self) {
        let Some(plane) = &mut self.plane else { return };
        // Flows that are not here yet must neither count as none nor be ended.
        if self.sweeper.is_some() || plane.inherits() {
            return;
        }
        match plane.sweeper() {
            Ok(sweeper) => self.sweeper = Some(sweeper),
            Err(error) => {
                let error = error.to_string();
                if self.no_sweeper != error {
                    tracing::error!(error, "cannot start the sweeper");
                }
                self.no_sweeper = error;
            }
        }
    }

    fn start_meters(&mut self, args: &Args) {
        let Some(plane) = &self.plane else { return };
        if self.meters.is_some() || plane.inherits() {
            return;
        }
        let tell = Arc::clone(&self.tell);
        let start = |maps| {
            let tell = move |rows, from, to| tell(rows, from, to);
            Meters::start(maps, self.names.clone(), args.state.clone(), tell)
                .map_err(|error| error.to_string())
        };
        match plane.meters().map_err(|error| error.to_string()).and_then(start) {
            Ok(meters) => self.meters = Some(meters),
            Err(error) => {
                if self.no_meters != error {
                    tracing::error!(error, "use is not metered");
                }
                self.no_meters = error;
            }
        }
    }

    fn fail(&mut self, error: &PlaneError, now: Instant) {
        self.plane = None;
        self.sweeper = None;
        self.fragments = None;
        self.meters = None;
        self.failure = error.to_string();
        self.open_at = now + LOAD_AGAIN;
    }

    /// What has programs: programs of an earlier agent go on even if this one cannot load its own.
    pub fn attached(&self, args: &Args, network: Option<&Network>) -> Attached {
        match (&self.plane, network) {
            (Some(plane), _) => plane.attached(),
            (None, Some(network)) => kernel::pinned(args, network),
            (None, None) => Attached::default(),
        }
    }

    /// Room in the tables of the policy. They hold two generations while one follows the other.
    pub fn room(&self) -> Room {
        let sizes: BTreeMap<&str, u64> = self.plane.iter().flat_map(|plane| plane.sizes()).collect();
        let of = |table| sizes.get(table).and_then(|size| usize::try_from(size / 2).ok());
        let unknown = Room::default();
        Room {
            destinations: of("destinations").unwrap_or(unknown.destinations),
            ports: of("ports").unwrap_or(unknown.ports),
            verdicts: of("verdicts").unwrap_or(unknown.verdicts),
        }
    }

    /// Room in the tables of flows: pinned ones keep their size.
    pub fn shared(&self) -> Option<Shared> {
        let sizes: BTreeMap<&str, u64> = self.plane.as_ref()?.sizes().into_iter().collect();
        let of = |table| u32::try_from(*sizes.get(table)?).ok();
        Some(Shared { flows: of("flows")?, blocks: of("blocks")? })
    }

    /// Why flows are not swept, if they are not.
    pub fn sweep_failure(&self) -> Option<String> {
        self.sweeper.as_ref().map_or_else(|| Some(self.no_sweeper.clone()), Sweeper::failure)
    }

    /// Fragments that came early and were sent after their first one, and those that were not.
    pub fn early_fragments(&self) -> (u64, u64) {
        self.fragments.as_ref().map(Fragments::tally).unwrap_or_default()
    }

    /// Meters in use; `None` while none are looked at.
    pub fn meters(&self) -> Option<Fill> {
        self.meters.as_ref().and_then(Meters::fill)
    }

    /// What the last scan found.
    pub fn usage(&self) -> Usage {
        self.sweeper.as_ref().map(Sweeper::usage).unwrap_or_default()
    }

    /// Resolves when there was another scan.
    pub async fn scanned(&mut self) {
        match &mut self.sweeper {
            Some(sweeper) => sweeper.changed().await,
            None => std::future::pending().await,
        }
    }
}
