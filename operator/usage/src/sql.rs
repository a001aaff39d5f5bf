//! What the two databases are asked to do, in SQL that both understand: `$1` is the first value, and no text has a user's words in it.

use crate::level::Level;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What a database says no to.
#[derive(Debug, Error)]
pub enum Error {
    /// SQLite.
    #[error("SQLite: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// PostgreSQL.
    #[error("PostgreSQL: {}", describe(.0))]
    Postgres(#[from] tokio_postgres::Error),
    /// PostgreSQL, where somebody can do something about it.
    #[error("PostgreSQL: {}: {remedy}", describe(.error))]
    Connect {
        /// What is wrong.
        error: tokio_postgres::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// Nothing can be asked at all.
    #[error("no connection can be made: {0}")]
    Runtime(std::io::Error),
    /// PostgreSQL does not answer any more, or not even the connection.
    #[error("PostgreSQL says nothing for {0} s")]
    Silent(u64),
    /// TLS to PostgreSQL cannot be spoken as it is wanted.
    #[error("TLS to PostgreSQL: {0}")]
    Tls(#[from] crate::postgres::TlsError),
    /// The store was made by a newer collector.
    #[error(
        "the store has schema {found}; this collector knows {known}: run a newer collector, or give it an empty store"
    )]
    Schema {
        /// Its version.
        found: i64,
        /// The version that is known here.
        known: i64,
    },
    /// Another collector writes to this store.
    #[error("another collector writes to this database: one at a time may")]
    Taken,
    /// A query that took too long was ended.
    #[error(
        "the answer takes longer than {0} s: ask for a shorter window, fewer groups or a narrower filter"
    )]
    TooSlow(u64),
    /// A column that is not as the schema says.
    #[error("column {0} of an answer is not what was asked for")]
    Column(usize),
    /// What may not be asked.
    #[error(transparent)]
    Query(#[from] crate::query::QueryError),
}

impl Error {
    /// Whether figures that are kept are what is wrong, as where a sum does not fit: with others the same would work.
    pub(crate) fn is_of_figures(&self) -> bool {
        match self {
            Error::Column(_) => true,
            // It has no number of its own.
            Error::Sqlite(rusqlite::Error::SqliteFailure(_, Some(said))) => said == "integer overflow",
            // Class 22: data exception.
            Error::Postgres(error) => error.code().is_some_and(|code| code.code().starts_with("22")),
            _ => false,
        }
    }
}

/// With what the server says, which the driver's own words leave out.
fn describe(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), |said| said.to_string())
}

/// A value that goes to a database or comes from it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Value {
    /// Nothing.
    Null,
    /// A number.
    Int(i64),
    /// A name.
    Text(String),
    /// An address or a digest, whose order is that of its bytes.
    Bytes(Vec<u8>),
}

impl From<i64> for Value {
    fn from(number: i64) -> Value {
        Value::Int(number)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Text(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Text(text)
    }
}

impl From<Vec<u8>> for Value {
    fn from(bytes: Vec<u8>) -> Value {
        Value::Bytes(bytes)
    }
}

/// A row of an answer.
pub(crate) type Row = Vec<Value>;

/// The number in a column.
pub(crate) fn int(row: &Row, column: usize) -> Result<i64, Error> {
    match row.get(column) {
        Some(Value::Int(number)) => Ok(*number),
        _ => Err(Error::Column(column)),
    }
}

/// The text in a column.
pub(crate) fn text(row: &Row, column: usize) -> Result<String, Error> {
    match row.get(column) {
        Some(Value::Text(text)) => Ok(text.clone()),
        _ => Err(Error::Column(column)),
    }
}

/// The bytes in a column.
pub(crate) fn bytes(row: &Row, column: usize) -> Result<Vec<u8>, Error> {
    match row.get(column) {
        Some(Value::Bytes(bytes)) => Ok(bytes.clone()),
        _ => Err(Error::Column(column)),
    }
}

/// Columns of a level's table after `series` and `slot`: how a finer level's rows, or two reports of one slot, become one.
pub(crate) const FIGURES: [(&str, Join); 10] = [
    // How often the node reported in the slot. What a series has no row for was 0.
    ("samples", Join::Same),
    // Sum of the ports in use, of which `samples` make the mean.
    ("in_use", Join::Sum),
    ("in_use_max", Join::Max),
    ("peak", Join::Max),
    ("flows", Join::Sum),
    ("refused", Join::Sum),
    ("sent_packets", Join::Sum),
    ("sent_bytes", Join::Sum),
    ("received_packets", Join::Sum),
    ("received_bytes", Join::Sum),
];

/// A port in use, in the parts in which means are kept in whole numbers.
pub(crate) const SCALE: i64 = 1_000_000;

/// Mean of the ports in use of a row, in those parts.
pub(crate) const MEAN: &str = "u.in_use * 1000000 / u.samples";

/// How two values of a column become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Join {
    /// All rows of the node and slot have the same.
    Same,
    /// They add up.
    Sum,
    /// The greater counts.
    Max,
}

/// A row of a level's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Whose.
    pub series: i64,
    /// When.
    pub slot: i64,
    /// In the order of [`FIGURES`].
    pub figures: [i64; FIGURES.len()],
}

/// A connection to a database.
pub(crate) trait Sql: Send {
    /// Does something, and says how many rows it concerned.
    fn run(&mut self, text: &str, values: &[Value]) -> Result<u64, Error>;

    /// Asks something.
    fn rows(&mut self, text: &str, values: &[Value]) -> Result<Vec<Row>, Error>;

    /// Asks something that somebody wants to know: with what [`Sql::among`] says.
    fn ask(&mut self, text: &str, values: &[Value]) -> Result<Vec<Row>, Error> {
        self.rows(text, values)
    }

    /// What a question says of its rows (`u`) besides which series it has chosen (`chosen`), for the sake of the plan.
    fn among(&self) -> &'static str {
        ""
    }

    /// Begins a transaction that writes.
    fn begin(&mut self) -> Result<(), Error>;

    /// Statements without values.
    fn script(&mut self, text: &str) -> Result<(), Error>;

    /// Adds rows to a table, each series and slot once. None is there yet if they are `new`; otherwise what is there is joined.
    fn add(&mut self, table: &str, samples: &[Sample], new: bool) -> Result<(), Error>;

    /// Makes sure that a level has a place for a slot.
    fn make_room(&mut self, level: Level, slot: i64) -> Result<(), Error>;

    /// Forgets the rows of a level before a moment, a multiple of its chunk.
    fn forget(&mut self, level: Level, before: i64) -> Result<(), Error>;

    /// Whether it can be used again after an error.
    fn alive(&self) -> bool;
}

/// Does several things or none.
pub(crate) fn transaction<T>(
    sql: &mut dyn Sql,
    work: impl FnOnce(&mut dyn Sql) -> Result<T, Error>,
) -> Result<T, Error> {
    sql.begin()?;
    let done = work(sql).and_then(|done| sql.script("COMMIT").map(|()| done));
    if done.is_err() {
        // The error that counts is the first one; a connection that cannot go back is not alive.
        let _ = sql.script("ROLLBACK");
    }
    done
}

/// A table of figures with its columns.
pub(crate) fn target(table: &str) -> String {
    let columns: Vec<&str> = FIGURES.iter().map(|(name, _)| *name).collect();
    format!("{table} (series, slot, {})", columns.join(", "))
}

/// Places for the values of so many rows: `($1, $2), ($3, $4)`.
pub(crate) fn tuples(rows: usize, width: usize) -> String {
    let tuple = |row: usize| {
        let places: Vec<String> = (1..=width).map(|column| format!("${}", row * width + column)).collect();
        format!("({})", places.join(", "))
    };
    (0..rows).map(tuple).collect::<Vec<_>>().join(", ")
}

/// `INSERT` of rows of a table of figures, by `values`, which joins what is there; `greater` names the function of the greater of two.
pub(crate) fn upsert(table: &str, values: &str, greater: &str) -> String {
    let joined = FIGURES.iter().map(|(name, join)| match join {
        Join::Same => format!("{name} = excluded.{name}"),
        Join::Sum => format!("{name} = {table}.{name} + excluded.{name}"),
        Join::Max => format!("{name} = {greater}({table}.{name}, excluded.{name})"),
    });
    let joined: Vec<String> = joined.collect();
    format!(
        "INSERT INTO {} {values} ON CONFLICT (series, slot) DO UPDATE SET {}",
        target(table),
        joined.join(", ")
    )
}
