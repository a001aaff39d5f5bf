//! The store: one connection that writes, and a few that read.

use crate::coverage::{self, Coverage, Gap, Reported};
use crate::ingest::{self, Known, Receipt};
use crate::level::{Level, Retention};
use crate::owners::{self, Owners};
use crate::postgres::{self, Address, Postgres, PostgresTls};
use crate::query::{self, Page, Query};
use crate::rollup::{self, Due, Maintained};
use crate::schema;
use crate::scope::{Owned, Prefix, Scope};
use crate::sql::{Error, Sql, int, transaction};
use crate::sqlite::{self, Sqlite};
use aegis_usage_report::Report;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Connections that wait for the next question; more are opened while they are needed.
const READERS: usize = 4;

/// Where use is kept. Its methods block.
pub struct Store {
    place: Place,
    patience: Duration,
    writer: Mutex<Writer>,
    /// What makes coarser levels in PostgreSQL. None until it is needed, and after an error.
    roller: Mutex<Option<Box<dyn Sql>>>,
    readers: Mutex<Vec<Box<dyn Sql>>>,
    owners: Mutex<Owners>,
}

/// What a store has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// End of the newest report.
    pub newest: Option<i64>,
    /// Series of which something is kept.
    pub series: i64,
    /// Bytes that it takes on disk, without SQLite's log.
    pub bytes: i64,
}

enum Place {
    Sqlite(PathBuf),
    Postgres(Box<Address>),
}

#[derive(Default)]
struct Writer {
    /// None until it is needed, and after an error that it did not survive.
    sql: Option<Box<dyn Sql>>,
    known: Known,
}

impl Store {
    /// A file of SQLite, which is made if it is missing. No question takes longer than `patience`.
    ///
    /// # Errors
    /// The file cannot be opened or made, or a newer collector did.
    pub fn sqlite(path: impl Into<PathBuf>, patience: Duration) -> Result<Store, Error> {
        Store::open(Place::Sqlite(path.into()), patience)
    }

    /// A database of PostgreSQL 12 or newer, by a connection string (`postgres://…` or `host=… user=…`).
    ///
    /// # Errors
    /// As [`Store::postgres_at`].
    pub fn postgres(url: impl AsRef<str>, patience: Duration) -> Result<Store, Error> {
        Store::postgres_at(Address::parse(url.as_ref(), &PostgresTls::default())?, patience)
    }

    /// A database of PostgreSQL 12 or newer.
    ///
    /// # Errors
    /// It cannot be reached or is not who it should be, another collector writes to it ([`Error::Taken`]), or a newer one made it.
    pub fn postgres_at(address: Address, patience: Duration) -> Result<Store, Error> {
        Store::open(Place::Postgres(Box::new(address)), patience)
    }

    fn open(place: Place, patience: Duration) -> Result<Store, Error> {
        let (writer, roller, readers) = (Mutex::default(), Mutex::default(), Mutex::default());
        let store = Store { place, patience, writer, roller, readers, owners: Mutex::default() };
        store.write(|_, _| Ok(()))?;
        Ok(store)
    }

    /// Takes reports, all in one transaction: what became of each, in their order. `now` is the collector's time.
    ///
    /// # Errors
    /// The database fails; then none is stored.
    pub fn ingest(&self, reports: &[Report], now: i64) -> Result<Vec<Receipt>, Error> {
        self.write(|sql, known| ingest::ingest(sql, known, reports, now))
    }

    /// Makes the slots of coarser levels that are due, and forgets what is older than `retention` says. Between its parts reports are
    /// taken.
    ///
    /// # Errors
    /// The database fails; what is left is done the next time.
    pub fn maintain(&self, now: i64, retention: &Retention) -> Result<Maintained, Error> {
        let mut done = Maintained::default();
        for level in rollup::MADE {
            let mut after = None;
            loop {
                let due = self.read(|sql| rollup::due(sql, level, now, after.as_ref()))?;
                let Some(last) = due.last() else { break };
                self.roll_or_skip(&due, &mut done)?;
                after = Some(last.clone());
            }
        }
        if self.write(|sql, _| rollup::forget(sql, now, retention))? {
            let mut next = Some(0);
            while let Some(first) = next {
                let (dropped, more) = self.write(|sql, known| rollup::drop_series(sql, known, first))?;
                done.dropped += dropped;
                next = more;
            }
        }
        Ok(done)
    }

    /// Makes a few slots: all of them or, where one of them cannot be made, the others. It is tried again the next time, until it is forgotten.
    fn roll_or_skip(&self, due: &[Due], done: &mut Maintained) -> Result<(), Error> {
        match self.roll(due) {
            Ok(()) => done.rolled += due.len() as u64,
            Err(error) if error.is_of_figures() => match due {
                [one] => {
                    if done.skipped == 0 {
                        tracing::warn!(%error, slot = ?one, "a minute or an hour of a node is not made, and maybe others");
                    }
                    done.skipped += 1;
                }
                _ => due.chunks(1).try_for_each(|one| self.roll_or_skip(one, done))?,
            },
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Makes a few slots. In PostgreSQL while reports are taken; in SQLite one connection at a time writes.
    fn roll(&self, due: &[Due]) -> Result<(), Error> {
        let Place::Postgres(address) = &self.place else {
            return self.write(|sql, _| rollup::roll(sql, due));
        };
        let mut roller = lock(&self.roller);
        let mut sql = match roller.take() {
            Some(sql) => sql,
            None => Box::new(Postgres::roller(address, self.patience)?),
        };
        let done = transaction(sql.as_mut(), |sql| rollup::roll(sql, due));
        if done.is_ok() {
            *roller = Some(sql);
        }
        done
    }

    /// Answers a question, with what `scope` may see.
    ///
    /// # Errors
    /// The question is too wide or takes too long, its cursor is of another one, or the database fails.
    pub fn query(&self, scope: &Scope, query: &Query) -> Result<Page, Error> {
        self.read(|sql| query::answer(sql, scope, query))
    }

    /// Since when prefixes are whose: since they say so themselves, or since it was first seen here that they have another owner. What is
    /// known already costs nothing.
    ///
    /// # Errors
    /// The database fails.
    pub fn owned(&self, prefixes: &[Prefix], now: i64) -> Result<Vec<Owned>, Error> {
        let mut known = lock(&self.owners);
        if !owners::knows(&known, prefixes) {
            *known = self.write(|sql, _| owners::note(sql, prefixes, now))?;
        }
        Ok(owners::of(&known, prefixes))
    }

    /// How much of each slot of `from..to` each node reported: the first `limit`, by slot and node.
    ///
    /// # Errors
    /// The database fails.
    pub fn coverage(&self, level: Level, from: i64, to: i64, limit: u32) -> Result<Vec<Coverage>, Error> {
        self.read(|sql| coverage::coverage(sql, level, (from, to), limit.into()))
    }

    /// How many of these nodes reported in each step of a window, and for how many seconds; none did in steps that are missing.
    ///
    /// # Errors
    /// The question is too wide, or the database fails.
    pub fn reported(
        &self,
        nodes: &BTreeSet<String>,
        level: Level,
        window: (i64, i64),
        step: i64,
    ) -> Result<BTreeMap<i64, Reported>, Error> {
        self.read(|sql| coverage::reported(sql, nodes, level, window, step))
    }

    /// End of the newest slot of which each of these nodes reported something, in the last 30 days: to the minute or the hour where it is long ago.
    ///
    /// # Errors
    /// The database fails.
    pub fn last_reports(
        &self,
        nodes: BTreeSet<String>,
        now: i64,
    ) -> Result<BTreeMap<String, Option<i64>>, Error> {
        self.read(|sql| coverage::last_reports(sql, nodes, now))
    }

    /// Reports that are missing before one that begins in `from..to`: the first `limit`, by time.
    ///
    /// # Errors
    /// The database fails.
    pub fn gaps(&self, from: i64, to: i64, limit: u32) -> Result<Vec<Gap>, Error> {
        self.read(|sql| coverage::gaps(sql, (from, to), limit.into()))
    }

    /// How much there is, and up to when.
    ///
    /// # Errors
    /// The database fails.
    pub fn contents(&self) -> Result<Contents, Error> {
        let size = match self.place {
            Place::Sqlite(_) => "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()",
            Place::Postgres(_) => "SELECT pg_database_size(current_database())",
        };
        self.read(|sql| {
            let mut one = |text: &str| sql.rows(text, &[])?.first().map_or(Ok(0), |row| int(row, 0));
            let (series, bytes) = (one("SELECT COUNT(*) FROM series")?, one(size)?);
            Ok(Contents { newest: ingest::meta(sql, ingest::NEWEST)?, series, bytes })
        })
    }

    pub(crate) fn write<T>(
        &self,
        work: impl FnOnce(&mut dyn Sql, &mut Known) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut writer = lock(&self.writer);
        let mut sql = match writer.sql.take() {
            Some(sql) => sql,
            None => {
                // Another connection may have dropped series in between.
                writer.known.clear();
                self.writer()?
            }
        };
        let known = &mut writer.known;
        let done = transaction(sql.as_mut(), |sql| work(sql, known));
        if done.is_err() {
            // Series that were numbered in this transaction are gone with it.
            known.clear();
        }
        if done.is_ok() || sql.alive() {
            writer.sql = Some(sql);
        }
        done
    }

    pub(crate) fn read<T>(&self, work: impl FnOnce(&mut dyn Sql) -> Result<T, Error>) -> Result<T, Error> {
        let waiting = lock(&self.readers).pop();
        let mut sql = match waiting {
            Some(sql) => sql,
            None => self.reader()?,
        };
        let done = work(sql.as_mut());
        // Of the errors that leave it whole two are common: a question that may not be put, and one that took too long.
        if matches!(done, Ok(_) | Err(Error::Query(_) | Error::TooSlow(_))) {
            let mut readers = lock(&self.readers);
            if readers.len() < READERS {
                readers.push(sql);
            }
        } else {
            // What ended this one, as a server that was started anew, may have ended them all.
            lock(&self.readers).clear();
        }
        done
    }

    fn writer(&self) -> Result<Box<dyn Sql>, Error> {
        let (mut sql, words): (Box<dyn Sql>, _) = match &self.place {
            Place::Sqlite(path) => (Box::new(Sqlite::writer(path)?), sqlite::WORDS),
            Place::Postgres(address) => {
                (Box::new(Postgres::writer(address, self.patience)?), postgres::WORDS)
            }
        };
        schema::create(sql.as_mut(), &words)?;
        Ok(sql)
    }

    fn reader(&self) -> Result<Box<dyn Sql>, Error> {
        Ok(match &self.place {
            Place::Sqlite(path) => Box::new(Sqlite::reader(path, self.patience)?),
            Place::Postgres(address) => Box::new(Postgres::reader(address, self.patience)?),
        })
    }
}

/// A thread that panicked left nothing half done in here: a transaction that was not committed is none.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
