//! Taking reports: each once, whenever and however often it comes.

use crate::level::Level;
use crate::rollup;
use crate::series::{self, COLUMNS, Digest};
use crate::sql::{Error, FIGURES, SCALE, Sample, Sql, Value, bytes, int, text, tuples};
use aegis_usage_report::{Figures, Invalid, Key, Report};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// How far a node's clock may be ahead of the collector's, in seconds. What it says of a later time is of now.
pub const FUTURE: i64 = 300;

/// Reports of one slot of a node that have rows: those of many starts of its agent, or of a clock that was ahead for hours. Their sums still fit
/// into 64 bits, those of the slot's hour too.
const MOST: i64 = 1_000;

/// Most series that are remembered with their numbers.
const REMEMBERED: usize = 1 << 21;

/// Most series that one statement adds.
const ADDED: usize = 64;

/// Columns by which the new series of a report are numbered: account, allocation, address, rule, origin.
const NUMBERED: [usize; 5] = [5, 6, 1, 4, 2];

/// What became of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// It is in the store.
    Stored,
    /// It is in the store as if it ended now: it says that it ends more than [`FUTURE`] after the collector's time.
    Moved,
    /// It was there before; nothing changed.
    Repeated,
    /// It ends before what is still kept at 10 seconds, so that it cannot be summed right.
    TooOld,
    /// Something in it is wrong.
    Invalid(Invalid),
}

impl Receipt {
    /// Whether the store has it by that.
    pub(crate) fn is_new(&self) -> bool {
        matches!(self, Receipt::Stored | Receipt::Moved)
    }
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
    let judged = reports.iter().map(|report| judge(report, horizon, now));
    let (reports, mut receipts): (Vec<Cow<Report>>, Vec<Receipt>) = judged.unzip();
    let wanted = new(&reports, &receipts);
    if wanted.is_empty() {
        return Ok(receipts);
    }
    let mut unknown = enter(sql, &wanted, now)?;
    for (report, receipt) in reports.iter().zip(&mut receipts) {
        // The first one counts, also if another says something else under its number.
        if receipt.is_new() && !unknown.remove(&identity(report)) {
            *receipt = Receipt::Repeated;
        }
    }
    let full = keep(sql, known, &new(&reports, &receipts))?;
    for (report, receipt) in reports.iter().zip(&mut receipts) {
        if receipt.is_new() && full.contains(&(slot(report), report.node.clone())) {
            *receipt = Receipt::Invalid(Invalid::Crowded);
        }
    }
    if let Some(newest) = new(&reports, &receipts).iter().map(|report| report.to).max()
        && meta(sql, NEWEST)?.is_none_or(|before| newest > before)
    {
        set_meta(sql, NEWEST, newest)?;
    }
    Ok(receipts)
}

/// Reports that are stored by this, as far as it is known.
fn new<'a>(reports: &'a [Cow<'_, Report>], receipts: &[Receipt]) -> Vec<&'a Report> {
    let new = reports.iter().zip(receipts).filter(|(_, receipt)| receipt.is_new());
    new.map(|(report, _)| report.as_ref()).collect()
}

/// What is wrong with a report by itself; otherwise it is to be stored, as it is or as if it ended now.
fn judge(report: &Report, horizon: i64, now: i64) -> (Cow<'_, Report>, Receipt) {
    if let Err(invalid) = report.check() {
        return (Cow::Borrowed(report), Receipt::Invalid(invalid));
    }
    let mut report = Cow::Borrowed(report);
    let ahead = report.to > now.saturating_add(FUTURE);
    if ahead {
        // Nobody knows by how much which clock is wrong, but its flows and bytes are there.
        let from = now.saturating_sub(report.to - report.from).max(0);
        report = Cow::Owned(Report { from, to: now, ..report.into_owned() });
    }
    let receipt = match ahead {
        _ if slot(&report) < horizon => Receipt::TooOld,
        true => Receipt::Moved,
        false => Receipt::Stored,
    };
    (report, receipt)
}

/// The slot that a report is of: that of its end, when its ports were in use. Most have no other.
fn slot(report: &Report) -> i64 {
    Level::Tens.slot(report.to - 1)
}

/// What a report is known by.
type Identity = (String, String, i64);

fn identity(report: &Report) -> Identity {
    (report.node.clone(), report.boot.clone(), signed(report.sequence))
}

/// Enters reports, and says which were not there before.
fn enter(sql: &mut dyn Sql, reports: &[&Report], now: i64) -> Result<BTreeSet<Identity>, Error> {
    let text = format!(
        "INSERT INTO reports (node, boot, sequence, begins, ends, received) VALUES {}
         ON CONFLICT (node, boot, sequence) DO NOTHING RETURNING node, boot, sequence",
        tuples(reports.len(), 6)
    );
    let values = reports.iter().flat_map(|report| {
        let (node, boot, sequence) = identity(report);
        [node.into(), boot.into(), sequence.into(), report.from.into(), report.to.into(), now.into()]
    });
    let rows = sql.rows(&text, &values.collect::<Vec<Value>>())?;
    rows.iter().map(|row| Ok((self::text(row, 0)?, self::text(row, 1)?, int(row, 2)?))).collect()
}

/// Keeps what new reports say: all that is the first of its node and slot in one piece. Of which slots and nodes it keeps none, since there are
/// too many.
fn keep(sql: &mut dyn Sql, known: &mut Known, reports: &[&Report]) -> Result<BTreeSet<(i64, String)>, Error> {
    if reports.is_empty() {
        return Ok(BTreeSet::new());
    }
    let mut left = cover(sql, reports)?;
    let full: BTreeSet<_> = left.extract_if(.., |_, it| it.samples > MOST).map(|(place, _)| place).collect();
    let (mut first, mut totals, mut more) = (Vec::new(), Vec::new(), Vec::new());
    for report in reports {
        let slot = slot(report);
        let Some(Slot { samples, new }) = left.get_mut(&(slot, report.node.clone())) else { continue };
        let mut rows = joined(sql, known, report)?;
        for sample in rows.series.iter_mut().chain(&mut rows.totals) {
            sample.slot = slot;
        }
        rows.series.iter_mut().for_each(|sample| sample.figures[0] = *samples);
        // Series are of one node: with its first report of a slot none has a row there.
        if std::mem::take(new) {
            first.extend(rows.series);
        } else {
            more.push(rows.series);
        }
        if *samples == 1 {
            totals.extend(rows.totals);
        }
        sql.make_room(Level::Tens, slot)?;
    }
    // Side by side as they lie.
    for rows in [&mut first, &mut totals] {
        rows.sort_unstable_by_key(|sample| (sample.series, sample.slot));
    }
    sql.add(Level::Tens.table(), &first, true)?;
    sql.add(Level::Tens.totals(), &totals, true)?;
    let several = left.iter().filter(|(_, it)| it.samples > 1);
    let several: Vec<(i64, Value, i64)> =
        several.map(|((slot, node), it)| (*slot, node.as_str().into(), it.samples)).collect();
    for (slot, node, samples) in &several {
        // The mean of all of the node's rows there is by the new number.
        let text = format!(
            "UPDATE {} SET samples = $1 WHERE slot = $2 AND series IN (SELECT id FROM series WHERE node = $3)",
            Level::Tens.table()
        );
        sql.run(&text, &[(*samples).into(), (*slot).into(), node.clone()])?;
    }
    for rows in &more {
        sql.add(Level::Tens.table(), rows, false)?;
    }
    for (slot, node, _) in &several {
        rollup::total(sql, Level::Tens, *slot, node, true)?;
    }
    if left.is_empty() {
        return Ok(full);
    }
    let minutes: BTreeSet<(i64, &str)> =
        left.keys().map(|(slot, node)| (Level::Minutes.slot(*slot), node.as_str())).collect();
    let text = format!("INSERT INTO dirty (level, slot, node) VALUES {} {SOILED}", tuples(minutes.len(), 3));
    let values = minutes
        .into_iter()
        .flat_map(|(slot, node)| [Level::Minutes.resolution().into(), slot.into(), node.into()]);
    sql.run(&text, &values.collect::<Vec<Value>>())?;
    Ok(full)
}

/// What a node has reported in a slot.
struct Slot {
    /// How often, by now.
    samples: i64,
    /// None of that is stored yet.
    new: bool,
}

/// Says that nodes have reported in slots.
fn cover(sql: &mut dyn Sql, reports: &[&Report]) -> Result<BTreeMap<(i64, String), Slot>, Error> {
    let mut more: BTreeMap<(i64, String), (i64, i64)> = BTreeMap::new();
    for report in reports {
        let of = more.entry((slot(report), report.node.clone())).or_default();
        *of = (of.0 + 1, of.1 + report.to - report.from);
    }
    let text = format!(
        "INSERT INTO coverage (level, slot, node, samples, seconds) VALUES {}
         ON CONFLICT (level, slot, node) DO UPDATE SET samples = coverage.samples + excluded.samples,
         seconds = coverage.seconds + excluded.seconds RETURNING slot, node, samples",
        tuples(more.len(), 5)
    );
    let values = more.iter().flat_map(|((slot, node), (samples, seconds))| {
        let level = Level::Tens.resolution();
        [level.into(), (*slot).into(), node.as_str().into(), (*samples).into(), (*seconds).into()]
    });
    let values: Vec<Value> = values.collect();
    let mut covered = BTreeMap::new();
    for row in sql.rows(&text, &values)? {
        let (key, samples) = ((int(&row, 0)?, self::text(&row, 1)?), int(&row, 2)?);
        let new = more.get(&key).is_some_and(|(came, _)| samples == *came);
        covered.insert(key, Slot { samples, new });
    }
    Ok(covered)
}

/// A mark that is there already is written again, so that whoever makes the slot meanwhile, and takes the mark away, waits for what
/// is marked here, or this for that.
const SOILED: &str = "ON CONFLICT (level, slot, node) DO UPDATE SET slot = excluded.slot";

/// Says that the slot of a level in which a moment is has to be made anew for a node.
pub(crate) fn soil(sql: &mut dyn Sql, level: Level, at: i64, node: &Value) -> Result<(), Error> {
    sql.run(
        &format!("INSERT INTO dirty (level, slot, node) VALUES ($1, $2, $3) {SOILED}"),
        &[level.resolution().into(), level.slot(at).into(), node.clone()],
    )
    .map(|_| ())
}

/// Rows of a report, without their slot.
struct Rows {
    /// By series.
    series: Vec<Sample>,
    /// The totals of a slot with no other report of the node.
    totals: Vec<Sample>,
}

/// The rows of a report.
fn joined(sql: &mut dyn Sql, known: &mut Known, report: &Report) -> Result<Rows, Error> {
    let mut wanted = Vec::with_capacity(report.rows.len());
    let mut unknown: BTreeMap<Digest, [Value; COLUMNS.len()]> = BTreeMap::new();
    for row in &report.rows {
        for (reason, figures) in split(&row.figures) {
            let digest = series::digest(&report.node, &row.key, reason);
            let Key { address, protocol, account, allocation, site, .. } = &row.key;
            wanted.push((digest, (address, protocol, account, allocation, site, reason), figures));
            if !known.contains_key(&digest) {
                unknown.insert(digest, series::columns(&report.node, &row.key, reason));
            }
        }
    }
    if known.len() + unknown.len() > REMEMBERED {
        known.clear();
        // What was known a moment ago is asked for again.
        return joined(sql, known, report);
    }
    let mut unknown: Vec<(Digest, [Value; COLUMNS.len()])> = unknown.into_iter().collect();
    // Rows lie in the order of these numbers: an account's side by side.
    unknown.sort_by(|(_, a), (_, b)| NUMBERED.map(|at| &a[at]).cmp(&NUMBERED.map(|at| &b[at])));
    for part in unknown.chunks(ADDED) {
        number(sql, known, part)?;
    }
    let mut samples: BTreeMap<i64, Sample> = BTreeMap::new();
    let mut totals: BTreeMap<_, Sample> = BTreeMap::new();
    for (digest, total, figures) in wanted {
        let series = *known.get(&digest).ok_or(Error::Column(0))?;
        let new = || Sample { series, slot: 0, figures: [0; FIGURES.len()] };
        // A key that a report has twice is one.
        let sample = samples.entry(series).or_insert_with(new);
        // As `rollup::total` has them.
        let total = totals.entry(total).or_insert_with(new);
        total.series = total.series.min(series);
        total.figures[0] = 1;
        for (at, figure) in figures.into_iter().enumerate() {
            sample.figures[at] = sample.figures[at].saturating_add(figure);
            let figure = if FIGURES[at].0 == "in_use" { figure.saturating_mul(SCALE) } else { figure };
            if at > 0 {
                total.figures[at] = total.figures[at].saturating_add(figure);
            }
        }
    }
    Ok(Rows { series: samples.into_values().collect(), totals: totals.into_values().collect() })
}

/// Finds or makes the numbers of series.
fn number(
    sql: &mut dyn Sql,
    known: &mut Known,
    series: &[(Digest, [Value; COLUMNS.len()])],
) -> Result<(), Error> {
    let width = COLUMNS.len() + 1;
    // An update that changes nothing, because only rows that are written are returned.
    let text = format!(
        "INSERT INTO series (digest, {}) VALUES {} ON CONFLICT (digest) DO UPDATE SET digest = excluded.digest RETURNING digest, id",
        COLUMNS.join(", "),
        tuples(series.len(), width)
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
