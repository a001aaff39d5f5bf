//! The database of countries: which addresses are where, as MaxMind and others publish it (`.mmdb`).
//!
//! The file is looked at every few seconds, whichever way it comes to be replaced. All of it is read at once, and only the
//! ranges are kept; one that cannot be read leaves the one before in use.

use aegis_core::policy::Countries;
use ipnet::IpNet;
use jiff::Timestamp;
use maxminddb::{MaxMindDbError, PathElement, Reader, WithinOptions};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Time between two looks at the file.
const LOOK: Duration = Duration::from_secs(2);

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CountriesError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Somebody writes to the file.
    #[error("{0} changes while it is read: put the new file in the place of the old one by renaming it")]
    Changing(PathBuf),
    /// It is no database, or a broken one.
    #[error("{path} is no MaxMind database, or a part of one: {source}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: MaxMindDbError,
    },
    /// It is a database of something else.
    #[error("{path} is a database of type {kind} and names no country: give one of countries or of cities")]
    Kind {
        /// The file.
        path: PathBuf,
        /// What the file says that it is.
        kind: String,
    },
}

/// A database that was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Database {
    /// Ranges of each country; neighbours are one.
    pub countries: Arc<Countries>,
    /// When it was built, in seconds since 1970.
    pub built: u64,
    /// Ranges of all countries.
    pub ranges: usize,
}

/// What is known of countries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// There was a first attempt to read the file, or there is none to be read.
    pub tried: bool,
    /// The database that is in use.
    pub database: Option<Database>,
    /// Why the file that is there now is not.
    pub failure: Option<String>,
    /// How often it could not be read.
    pub failures: u64,
}

/// The state, shared by who reads the file and who goes by it.
#[derive(Clone, Debug, Default)]
pub struct Keeper {
    state: Arc<Mutex<State>>,
}

/// What tells one file from the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Keeper {
    /// The state; nothing is awaited while it is locked.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the file when it is another one than before, and says so. Without a file there is nothing to do. Does not return.
    pub async fn watch(self, file: Option<PathBuf>, changed: impl Fn()) {
        let Some(file) = file else {
            self.lock().tried = true;
            changed();
            return std::future::pending().await;
        };
        let mut seen = None;
        loop {
            let path = file.clone();
            let known = seen;
            let look = tokio::task::spawn_blocking(move || look(&path, known)).await;
            if let Ok(Some((now, outcome))) = look {
                seen = now;
                self.take(outcome);
                changed();
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn take(&self, outcome: Result<Database, CountriesError>) {
        let mut state = self.lock();
        state.tried = true;
        match outcome {
            Ok(database) => {
                tracing::info!(ranges = database.ranges, built = date(database.built), "countries are known");
                state.failure = None;
                state.database = Some(database);
            }
            Err(error) => {
                let reason = error.to_string();
                if state.failure.as_ref() != Some(&reason) {
                    tracing::error!(reason, "cannot read the database of countries");
                }
                state.failure = Some(reason);
                state.failures += 1;
            }
        }
    }
}

/// The day on which a database was built.
pub fn date(built: u64) -> String {
    let time = i64::try_from(built).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    time.map(|time| time.strftime("%F").to_string()).unwrap_or_default()
}

/// What is there now, if it is something else than what was seen; with what to compare the next look with.
fn look(path: &Path, seen: Option<Identity>) -> Option<(Option<Identity>, Result<Database, CountriesError>)> {
    let before = identity(path);
    match &before {
        Ok(now) if seen == Some(*now) => return None,
        _ => {}
    }
    let outcome = before.and_then(|before| {
        let database = read(path)?;
        match identity(path)? == before {
            true => Ok((before, database)),
            false => Err(CountriesError::Changing(path.to_owned())),
        }
    });
    // What could not be read is tried again: it may be about to become whole without looking any different.
    Some(match outcome {
        Ok((now, database)) => (Some(now), Ok(database)),
        Err(error) => (None, Err(error)),
    })
}

fn identity(path: &Path) -> Result<Identity, CountriesError> {
    let file = fs::metadata(path).map_err(|source| CountriesError::File { path: path.to_owned(), source })?;
    Ok(Identity {
        device: file.dev(),
        inode: file.ino(),
        size: file.size(),
        modified: (file.mtime(), file.mtime_nsec()),
    })
}

/// Reads a database.
pub fn read(path: &Path) -> Result<Database, CountriesError> {
    let bytes = fs::read(path).map_err(|source| CountriesError::File { path: path.to_owned(), source })?;
    let format = |source| CountriesError::Format { path: path.to_owned(), source };
    let reader = Reader::from_source(bytes).map_err(format)?;
    let ranges = ranges(&reader).map_err(format)?;
    if ranges.is_empty() {
        return Err(CountriesError::Kind {
            path: path.to_owned(),
            kind: reader.metadata().database_type.clone(),
        });
    }
    let countries: Countries =
        ranges.into_iter().map(|(country, ranges)| (country, IpNet::aggregate(&ranges))).collect();
    Ok(Database {
        ranges: countries.values().map(Vec::len).sum(),
        countries: Arc::new(countries),
        built: reader.metadata().build_epoch,
    })
}

/// Where an address is (`country`); of one of which that is not known, where it is registered (`registered_country`).
const FIELDS: [&str; 2] = ["country", "registered_country"];

fn ranges(reader: &Reader<Vec<u8>>) -> Result<BTreeMap<String, Vec<IpNet>>, MaxMindDbError> {
    let mut ranges: BTreeMap<String, Vec<IpNet>> = BTreeMap::new();
    // Many networks have one record in common.
    let mut records: HashMap<usize, Option<String>> = HashMap::new();
    for network in reader.networks(WithinOptions::default())? {
        let network = network?;
        let Some(offset) = network.offset() else { continue };
        let country = match records.entry(offset) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let iso_code =
                    |field| network.decode_path(&[PathElement::Key(field), PathElement::Key("iso_code")]);
                let [located, registered] = FIELDS.map(iso_code);
                new.insert(located?.or(registered?))
            }
        };
        let Some(country) = country else { continue };
        let range = network.network()?;
        if let Ok(range) = IpNet::new(range.ip(), range.prefix()) {
            match ranges.get_mut(country) {
                Some(of) => of.push(range),
                None => _ = ranges.insert(country.clone(), vec![range]),
            }
        }
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests;
