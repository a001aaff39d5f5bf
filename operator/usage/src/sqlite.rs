//! SQLite: one file, embedded.

use crate::level::Level;
use crate::schema::Words;
use crate::sql::{Error, FIGURES, Row, Sample, Sql, Value, upsert};
use rusqlite::types::{ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, ErrorCode, OpenFlags, params_from_iter};
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) const WORDS: Words = Words {
    identity: "INTEGER PRIMARY KEY",
    text: "TEXT",
    bytes: "BLOB",
    // The rows lie in the order of their key: one series' rows side by side, and no second index.
    level: "WITHOUT ROWID",
    keyed: "WITHOUT ROWID",
};

/// Steps of SQLite's machine between two looks at the clock.
const STEPS: i32 = 100_000;

/// Series whose old rows are deleted by one statement.
const SERIES_PART: i64 = 1_000;

pub(crate) struct Sqlite {
    connection: Connection,
    /// Longest time of a question.
    patience: Option<Duration>,
}

impl Sqlite {
    /// The one connection that writes.
    pub fn writer(path: &Path) -> Result<Sqlite, Error> {
        let connection = Connection::open(path)?;
        // FULL: what an agent was told to be stored is so after a loss of power, too.
        connection.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 10000;
             PRAGMA cache_size = -65536; PRAGMA journal_size_limit = 67108864;",
        )?;
        Ok(Sqlite { connection, patience: None })
    }

    /// A connection that only reads, and for so long at most.
    pub fn reader(path: &Path, patience: Duration) -> Result<Sqlite, Error> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.execute_batch(
            "PRAGMA busy_timeout = 10000; PRAGMA cache_size = -32768; PRAGMA query_only = ON;",
        )?;
        Ok(Sqlite { connection, patience: Some(patience) })
    }
}

impl Sql for Sqlite {
    fn run(&mut self, text: &str, values: &[Value]) -> Result<u64, Error> {
        let mut statement = self.connection.prepare_cached(&numbered(text))?;
        Ok(statement.execute(params_from_iter(values))? as u64)
    }

    fn rows(&mut self, text: &str, values: &[Value]) -> Result<Vec<Row>, Error> {
        let Some(patience) = self.patience else { return self.ask(text, values) };
        let end = Instant::now() + patience;
        self.connection.progress_handler(STEPS, Some(move || Instant::now() > end))?;
        self.ask(text, values).map_err(|error| match error {
            Error::Sqlite(error) if error.sqlite_error_code() == Some(ErrorCode::OperationInterrupted) => {
                Error::TooSlow(patience.as_secs())
            }
            error => error,
        })
    }

    fn begin(&mut self) -> Result<(), Error> {
        // Waits for others that write (a copy being made, somebody's shell). A transaction that reads first and writes later would fail at once.
        self.script("BEGIN IMMEDIATE")
    }

    fn script(&mut self, text: &str) -> Result<(), Error> {
        Ok(self.connection.execute_batch(text)?)
    }

    fn add(&mut self, table: &str, samples: &[Sample], _: bool) -> Result<(), Error> {
        let places: Vec<String> = (1..=FIGURES.len() + 2).map(|at| format!("?{at}")).collect();
        let text = upsert(table, &format!("VALUES ({})", places.join(", ")), "MAX");
        let mut statement = self.connection.prepare_cached(&text)?;
        for Sample { series, slot, figures } in samples {
            let values = [*series, *slot].into_iter().chain(*figures);
            statement.execute(params_from_iter(values))?;
        }
        Ok(())
    }

    fn make_room(&mut self, _: Level, _: i64) -> Result<(), Error> {
        Ok(())
    }

    fn forget(&mut self, level: Level, before: i64) -> Result<(), Error> {
        // By series, in the order of the rows: a condition on the time alone would read the whole table.
        for table in level.tables() {
            let last: Option<i64> =
                self.connection
                    .query_row(&format!("SELECT MAX(series) FROM {table}"), [], |row| row.get(0))?;
            let text = format!(
                "DELETE FROM {table} WHERE slot < ?1 AND series IN (SELECT id FROM series WHERE id >= ?2 AND id < ?3)"
            );
            let mut statement = self.connection.prepare(&text)?;
            for first in (0..=last.unwrap_or(-1)).step_by(SERIES_PART as usize) {
                statement.execute([before, first, first + SERIES_PART])?;
            }
        }
        Ok(())
    }

    fn alive(&self) -> bool {
        // After an error in the middle of a transaction that could not be undone.
        self.connection.is_autocommit()
    }
}

impl Sqlite {
    fn ask(&mut self, text: &str, values: &[Value]) -> Result<Vec<Row>, Error> {
        let mut statement = self.connection.prepare_cached(&numbered(text))?;
        let columns = statement.column_count();
        let mut rows = statement.query(params_from_iter(values))?;
        let mut answer = Vec::new();
        while let Some(row) = rows.next()? {
            let read = |column| {
                Ok(match row.get_ref(column)? {
                    ValueRef::Null => Value::Null,
                    ValueRef::Integer(number) => Value::Int(number),
                    ValueRef::Text(text) => Value::Text(String::from_utf8_lossy(text).into_owned()),
                    ValueRef::Blob(bytes) => Value::Bytes(bytes.to_vec()),
                    ValueRef::Real(_) => return Err(Error::Column(column)),
                })
            };
            answer.push((0..columns).map(read).collect::<Result<Row, Error>>()?);
        }
        Ok(answer)
    }
}

/// `?1` is the first value whatever comes before it in the text, `$1` is not.
fn numbered(text: &str) -> String {
    text.replace('$', "?")
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Value::Null => ValueRef::Null,
            Value::Int(number) => ValueRef::Integer(*number),
            Value::Text(text) => ValueRef::Text(text.as_bytes()),
            Value::Bytes(bytes) => ValueRef::Blob(bytes),
        }))
    }
}
