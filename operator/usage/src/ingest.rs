//! Taking reports: each once, whenever and however often it comes.

use crate::level::Level;
use crate::series::{self, COLUMNS, Digest};
use crate::sql::{Error, FIGURES, Sample, Sql, Value, bytes, int};
use aegis_usage_report::{Figures, Invalid, Report};
use std::collections::{BTreeMap, HashMap};

/// How far a node's clock may be ahead of the collector's, in seconds.
pub const FUTURE: i64 = 300;

/// Most series that are remembered with their numbers.
const REMEMBERED: usize = 1 << 21;

/// Most series that one statement adds.
const ADDED: usize = 64;

/// What became of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// It is in the store.
    Stored,
    /// It was there before; nothing changed.
    Repeated,
    /// It begins before what is still kept at 10 seconds, so that it cannot be summed right.
    TooOld,
    /// It ends more than [`FUTURE`] after the collector's time.
    TooNew,
    /// Something in it is wrong.
    Invalid(Invalid),
}

/// Numbers of series that are known to be in the store.
pub(crate) type Known = HashMap<Digest, i64>;

/// Takes reports in their order, in the caller's transaction. When that fails, `known` is to be emptied.
pub(crate) fn ingest(
    sql: &mut dyn Sql,
    known: &mut Known,
    reports: &[Report],
    now: i64,
) -> Result<Vec<Receipt>, Error> {
    let horizon = meta(sql, horizon_name(Level::Tens))?.unwrap_or(0);
    let mut newest = meta(sql, NEWEST)?.unwrap_or(i64::MIN);
    let before = newest;
    let mut receipts = Vec::with_capacity(reports.len());
    for report in reports {
        let receipt = take(sql, known, report, horizon, now)?;
        if receipt == Receipt::Stored {
            newest = newest.max(report.to);
        }
        receipts.push(receipt);
    }
    if newest > before {
        set_meta(sql, NEWEST, newest)?;
    }
    Ok(receipts)
}

fn take(
    sql: &mut dyn Sql,
    known: &mut Known,
    report: &Report,
    horizon: i64,
    now: i64,
) -> Result<Receipt, Error> {
    if let Err(invalid) = report.check() {
        return Ok(Receipt::Invalid(invalid));
    }
    let slot = Level::Tens.slot(report.from);
    if slot < horizon {
        return Ok(Receipt::TooOld);
    }
    if report.to > now.saturating_add(FUTURE) {
        return Ok(Receipt::TooNew);
    }
    let node = Value::from(report.node.as_str());
    let values = [
        node.clone(),
        report.boot.as_str().into(),
        signed(report.sequence).into(),
        report.from.into(),
        report.to.into(),
        now.into(),
    ];
    let new = sql.run(
        "INSERT INTO reports (node, boot, sequence, begins, ends, received) VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (node, boot, sequence) DO NOTHING",
        &values,
    )?;
    if new == 0 {
        return Ok(Receipt::Repeated);
    }
    let samples = cover(sql, &node, slot, report.to - report.from)?;
    let mut rows = joined(sql, known, report)?;
    for sample in &mut rows {
        sample.slot = slot;
        sample.figures[0] = samples;
    }
    if samples > 1 {
        // Two reports of one slot: the mean of all of the node's rows there is by the new number.
        let text = format!(
            "UPDATE {} SET samples = $1 WHERE slot = $2 AND series IN (SELECT id FROM series WHERE node = $3)",
            Level::Tens.table()
        );
        sql.run(&text, &[samples.into(), slot.into(), node.clone()])?;
    }
    sql.make_room(Level::Tens, slot)?;
    // Series are of one node: with its first report of a slot none has a row there.
    sql.add(&rows, samples == 1)?;
    soil(sql, Level::Minutes, slot, &node)?;
    Ok(Receipt::Stored)
}

/// Says that a node has reported in a slot; how often, by now.
fn cover(sql: &mut dyn Sql, node: &Value, slot: i64, seconds: i64) -> Result<i64, Error> {
    let rows = sql.rows(
        "INSERT INTO coverage (level, slot, node, samples, seconds) VALUES ($1, $2, $3, 1, $4)
         ON CONFLICT (level, slot, node) DO UPDATE SET samples = coverage.samples + 1,
         seconds = coverage.seconds + excluded.seconds RETURNING samples",
        &[Level::Tens.resolution().into(), slot.into(), node.clone(), seconds.into()],
    )?;
    rows.first().map_or(Ok(1), |row| int(row, 0))
}

/// Says that the slot of a level in which a moment is has to be made anew for a node.
pub(crate) fn soil(sql: &mut dyn Sql, level: Level, at: i64, node: &Value) -> Result<(), Error> {
    sql.run(
        "INSERT INTO dirty (level, slot, node) VALUES ($1, $2, $3) ON CONFLICT (level, slot, node) DO NOTHING",
        &[level.resolution().into(), level.slot(at).into(), node.clone()],
    )
    .map(|_| ())
}

/// The rows of a report by series, in the order of their numbers.
fn joined(sql: &mut dyn Sql, known: &mut Known, report: &Report) -> Result<Vec<Sample>, Error> {
    let mut wanted: Vec<(Digest, [i64; FIGURES.len()])> = Vec::with_capacity(report.rows.len());
    let mut unknown: BTreeMap<Digest, [Value; COLUMNS.len()]> = BTreeMap::new();
    for row in &report.rows {
        for (reason, figures) in split(&row.figures) {
            let columns = series::columns(&report.node, &row.key, reason);
            let digest = series::digest(&columns);
            if !known.contains_key(&digest) {
                unknown.insert(digest, columns);
            }
            wanted.push((digest, figures));
        }
    }
    if known.len() + unknown.len() > REMEMBERED {
        known.clear();
        // What was known a moment ago is asked for again.
        return joined(sql, known, report);
    }
    let unknown: Vec<(Digest, [Value; COLUMNS.len()])> = unknown.into_iter().collect();
    for part in unknown.chunks(ADDED) {
        number(sql, known, part)?;
    }
    let mut samples: BTreeMap<i64, Sample> = BTreeMap::new();
    for (digest, figures) in wanted {
        let series = *known.get(&digest).ok_or(Error::Column(0))?;
        // A key that a report has twice is one.
        let sample = samples.entry(series).or_insert(Sample { series, slot: 0, figures: [0; FIGURES.len()] });
        for (sum, figure) in sample.figures.iter_mut().zip(figures) {
            *sum = sum.saturating_add(figure);
        }
    }
    Ok(samples.into_values().collect())
}

/// Finds or makes the numbers of series.
fn number(
    sql: &mut dyn Sql,
    known: &mut Known,
    series: &[(Digest, [Value; COLUMNS.len()])],
) -> Result<(), Error> {
    let width = COLUMNS.len() + 1;
    let tuple = |at: usize| {
        let places: Vec<String> = (1..=width).map(|column| format!("${}", at * width + column)).collect();
        format!("({})", places.join(", "))
    };
    let tuples: Vec<String> = (0..series.len()).map(tuple).collect();
    // An update that changes nothing, because only rows that are written are returned.
    let text = format!(
        "INSERT INTO series (digest, {}) VALUES {} ON CONFLICT (digest) DO UPDATE SET digest = excluded.digest RETURNING digest, id",
        COLUMNS.join(", "),
        tuples.join(", ")
    );
    let mut values = Vec::with_capacity(series.len() * width);
    for (digest, columns) in series {
        values.push(Value::Bytes(digest.to_vec()));
        values.extend(columns.iter().cloned());
    }
    for row in sql.rows(&text, &values)? {
        let digest: Digest = bytes(&row, 0)?.try_into().map_err(|_| Error::Column(0))?;
        known.insert(digest, int(&row, 1)?);
    }
    Ok(())
}

/// The figures of a row as those of series: one with all but refusals, and one for each reason of these.
fn split(figures: &Figures) -> Vec<(&str, [i64; FIGURES.len()])> {
    let Figures { in_use, peak, flows, refused, sent, received } = figures;
    let of = |refused: u64| {
        let rest = [
            *in_use,
            *in_use,
            *peak,
            *flows,
            refused,
            sent.packets,
            sent.bytes,
            received.packets,
            received.bytes,
        ];
        let mut figures = [0; FIGURES.len()];
        figures[1..].copy_from_slice(&rest.map(signed));
        figures
    };
    let refusal = |count: u64| {
        let mut figures = [0; FIGURES.len()];
        figures[5] = signed(count);
        figures
    };
    let rest = of(0);
    // A key with nothing but refusals holds no port; a key with nothing at all was seen nonetheless.
    let idle = rest.iter().all(|figure| *figure == 0) && !refused.is_empty();
    let refusals = refused.iter().map(|(reason, count)| (reason.as_str(), refusal(*count)));
    (!idle).then_some(("", rest)).into_iter().chain(refusals).collect()
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// End of the newest report.
pub(crate) const NEWEST: &str = "newest";

/// Name under which it is kept before which moment a level is forgotten.
pub(crate) fn horizon_name(level: Level) -> &'static str {
    match level {
        Level::Tens => "horizon_10",
        Level::Minutes => "horizon_60",
        Level::Hours => "horizon_3600",
    }
}

/// A number that the store keeps about itself.
pub(crate) fn meta(sql: &mut dyn Sql, name: &str) -> Result<Option<i64>, Error> {
    let rows = sql.rows("SELECT value FROM meta WHERE name = $1", &[name.into()])?;
    rows.first().map(|row| int(row, 0)).transpose()
}

/// Keeps it.
pub(crate) fn set_meta(sql: &mut dyn Sql, name: &str, value: i64) -> Result<(), Error> {
    sql.run(
        "INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        &[name.into(), value.into()],
    )
    .map(|_| ())
}
