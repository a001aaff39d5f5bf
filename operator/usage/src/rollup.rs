//! Making minutes of 10 seconds and hours of minutes, and forgetting what is old.
//!
//! A slot of a coarser level is not counted up: it is made anew of the finer one whenever that has changed. So a late report is right
//! in every level, and a collector that dies in between has lost nothing.

use crate::ingest::{Known, NEWEST, horizon_name, meta, set_meta, soil};
use crate::level::{Level, Retention};
use crate::series::{self, SUMMED};
use crate::sql::{Error, FIGURES, Join, MEAN, Sql, Value, int, text};

/// How long after its end a slot is made, in seconds: most reports of it are there by then.
pub const SETTLE: i64 = 20;

/// Slots that are made in one transaction.
const PART: i64 = 16;

/// Series that are looked at in one transaction.
const SERIES_PART: i64 = 10_000;

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Maintained {
    /// Slots of nodes that were made of finer ones.
    pub rolled: u64,
    /// Those that could not be made, since the figures of one that they are made of make no sense to the database.
    pub skipped: u64,
    /// Series that nothing is kept of any more.
    pub dropped: u64,
}

/// A slot of a node that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    level: Level,
    slot: i64,
    node: String,
}

/// Levels that are made, in the order in which they are.
pub(crate) const MADE: [Level; 2] = [Level::Minutes, Level::Hours];

/// The first slots of a level that are to be made and come after another one.
pub(crate) fn due(sql: &mut dyn Sql, level: Level, now: i64, after: Option<&Due>) -> Result<Vec<Due>, Error> {
    let ended = now.saturating_sub(SETTLE).saturating_sub(level.resolution());
    let (slot, node) = after.map_or((i64::MIN, ""), |after| (after.slot, after.node.as_str()));
    let rows = sql.rows(
        "SELECT slot, node FROM dirty WHERE level = $1 AND slot <= $2 AND (slot, node) > ($3, $4)
         ORDER BY slot, node LIMIT $5",
        &[level.resolution().into(), ended.into(), slot.into(), node.into(), PART.into()],
    )?;
    rows.iter().map(|row| Ok(Due { level, slot: int(row, 0)?, node: text(row, 1)? })).collect()
}

/// Makes slots, in the caller's transaction.
pub(crate) fn roll(sql: &mut dyn Sql, due: &[Due]) -> Result<(), Error> {
    due.iter().try_for_each(|Due { level, slot, node }| make(sql, *level, *slot, &node.as_str().into()))
}

/// Makes one slot of one node of the finer level.
fn make(sql: &mut dyn Sql, level: Level, slot: i64, node: &Value) -> Result<(), Error> {
    let Some(finer) = level.finer() else { return Ok(()) };
    let end = slot + level.resolution();
    let this = [level.resolution().into(), slot.into(), node.clone()];
    // First of all: what is read afterwards is what was marked until now.
    sql.run("DELETE FROM dirty WHERE level = $1 AND slot = $2 AND node = $3", &this)?;
    let again = sql.run("DELETE FROM coverage WHERE level = $1 AND slot = $2 AND node = $3", &this)? > 0;
    let rows = sql.rows(
        "SELECT CAST(SUM(samples) AS BIGINT), CAST(SUM(seconds) AS BIGINT) FROM coverage
         WHERE level = $1 AND slot >= $2 AND slot < $3 AND node = $4",
        &[finer.resolution().into(), slot.into(), end.into(), node.clone()],
    )?;
    let Some(sums) = rows.first().filter(|row| row.first() != Some(&Value::Null)) else { return Ok(()) };
    let (samples, seconds) = (int(sums, 0)?, int(sums, 1)?);
    sql.run(
        "INSERT INTO coverage (level, slot, node, samples, seconds) VALUES ($1, $2, $3, $4, $5)",
        &[level.resolution().into(), slot.into(), node.clone(), samples.into(), seconds.into()],
    )?;
    sql.make_room(level, slot)?;
    let table = level.table();
    if again {
        empty(sql, table, slot, node)?;
    }
    let columns: Vec<&str> = FIGURES.iter().map(|(name, _)| *name).collect();
    let sums = FIGURES.iter().map(|(name, join)| match join {
        Join::Same => "CAST($2 AS BIGINT)".into(),
        Join::Sum => format!("CAST(SUM(u.{name}) AS BIGINT)"),
        Join::Max => format!("MAX(u.{name})"),
    });
    let sums: Vec<String> = sums.collect();
    let text = format!(
        "INSERT INTO {table} (series, slot, {}) SELECT u.series, CAST($1 AS BIGINT), {}
         FROM series s JOIN {} u ON u.series = s.id
         WHERE s.node = $3 AND u.slot >= $1 AND u.slot < $4 GROUP BY u.series",
        columns.join(", "),
        sums.join(", "),
        finer.table()
    );
    sql.run(&text, &[slot.into(), samples.into(), node.clone(), end.into()])?;
    total(sql, level, slot, node, again)?;
    level.coarser().map_or(Ok(()), |coarser| soil(sql, coarser, slot, node))
}

/// Removes the rows that a table has of a slot of a node.
fn empty(sql: &mut dyn Sql, table: &str, slot: i64, node: &Value) -> Result<(), Error> {
    let text =
        format!("DELETE FROM {table} WHERE slot = $1 AND series IN (SELECT id FROM series WHERE node = $2)");
    sql.run(&text, &[slot.into(), node.clone()]).map(|_| ())
}

/// Sums the rows of a slot of a node over what most questions do not tell apart, `again` if that was done before. One of the series stands
/// for each sum.
pub(crate) fn total(
    sql: &mut dyn Sql,
    level: Level,
    slot: i64,
    node: &Value,
    again: bool,
) -> Result<(), Error> {
    let totals = level.totals();
    if again {
        empty(sql, totals, slot, node)?;
    }
    let columns: Vec<&str> = FIGURES.iter().map(|(name, _)| *name).collect();
    let sums = columns.iter().map(|name| match *name {
        "samples" => "1".into(),
        // The very figure of a question, since a mean of sums is not quite the sum of means in whole numbers.
        "in_use" => format!("CAST(SUM({MEAN}) AS BIGINT)"),
        name => format!("CAST(SUM(u.{name}) AS BIGINT)"),
    });
    let sums: Vec<String> = sums.collect();
    let kept: Vec<String> =
        series::COLUMNS.iter().filter(|it| !SUMMED.contains(it)).map(|it| format!("s.{it}")).collect();
    let text = format!(
        "INSERT INTO {totals} (series, slot, {}) SELECT MIN(u.series), CAST($1 AS BIGINT), {}
         FROM series s JOIN {} u ON u.series = s.id WHERE s.node = $2 AND u.slot = $1 GROUP BY {}",
        columns.join(", "),
        sums.join(", "),
        level.table(),
        kept.join(", ")
    );
    sql.run(&text, &[slot.into(), node.clone()]).map(|_| ())
}

/// Forgets what is older than it need be, by the collector's clock or by the newest report, whichever is earlier: a clock that jumps
/// ahead must not empty the store. In the caller's transaction; true if anything was.
pub(crate) fn forget(sql: &mut dyn Sql, now: i64, retention: &Retention) -> Result<bool, Error> {
    let Some(newest) = meta(sql, NEWEST)? else { return Ok(false) };
    let mut forgot = false;
    for level in Level::ALL {
        let name = horizon_name(level);
        let horizon = retention.horizon(level, now.min(newest));
        // It never goes back: what was forgotten could not be summed again.
        if horizon <= meta(sql, name)?.unwrap_or(0) {
            continue;
        }
        sql.forget(level, horizon)?;
        sql.run(
            "DELETE FROM coverage WHERE level = $1 AND slot < $2",
            &[level.resolution().into(), horizon.into()],
        )?;
        if level == Level::Tens {
            // Those whose slot is gone. Before that they could come again.
            sql.run("DELETE FROM reports WHERE begins < $1 AND ends <= $1", &[horizon.into()])?;
        }
        set_meta(sql, name, horizon)?;
        forgot = true;
    }
    Ok(forgot)
}

/// Drops series that no level has a row of, from `first` on, in the caller's transaction: how many, and where to go on.
pub(crate) fn drop_series(
    sql: &mut dyn Sql,
    known: &mut Known,
    first: i64,
) -> Result<(u64, Option<i64>), Error> {
    let unused: Vec<String> = Level::ALL
        .iter()
        .map(|level| format!("NOT EXISTS (SELECT 1 FROM {} u WHERE u.series = series.id)", level.table()))
        .collect();
    let next = first + SERIES_PART;
    let text = format!("DELETE FROM series WHERE id >= $1 AND id < $2 AND {}", unused.join(" AND "));
    let dropped = sql.run(&text, &[first.into(), next.into()])?;
    if dropped > 0 {
        known.clear();
    }
    let rows = sql.rows("SELECT MIN(id) FROM series WHERE id >= $1", &[next.into()])?;
    let more = rows.first().filter(|row| row.first() != Some(&Value::Null));
    Ok((dropped, more.map(|row| int(row, 0)).transpose()?))
}
