//! Which nodes reported when, so that nobody takes silence for rest.

use crate::level::Level;
use crate::query::{QueryError, most};
use crate::sql::{Error, Sql, int, text};
use std::collections::{BTreeMap, BTreeSet};

/// How much of a slot a node reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coverage {
    /// The node.
    pub node: String,
    /// Begin of the slot.
    pub slot: i64,
    /// Reports of it.
    pub samples: i64,
    /// Seconds that they cover; less than the slot has if some are missing.
    pub seconds: i64,
}

/// What some nodes reported of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    /// How many reported something.
    pub nodes: i64,
    /// Seconds that they cover, of all together.
    pub seconds: i64,
}

/// Reports that are missing between two that came. One that comes late closes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The node.
    pub node: String,
    /// The start of its agent.
    pub boot: String,
    /// Sequence number of the first that is missing.
    pub first: i64,
    /// And of the last.
    pub last: i64,
    /// End of the report before.
    pub from: i64,
    /// Begin of the report after.
    pub to: i64,
}

/// Slots of a level in a window, by slot and node, at most `limit`.
pub(crate) fn coverage(
    sql: &mut dyn Sql,
    level: Level,
    window: (i64, i64),
    limit: i64,
) -> Result<Vec<Coverage>, Error> {
    let rows = sql.rows(
        "SELECT node, slot, samples, seconds FROM coverage WHERE level = $1 AND slot >= $2 AND slot < $3
         ORDER BY slot, node LIMIT $4",
        &[level.resolution().into(), level.slot(window.0).into(), window.1.into(), limit.into()],
    )?;
    rows.iter()
        .map(|row| {
            Ok(Coverage {
                node: text(row, 0)?,
                slot: int(row, 1)?,
                samples: int(row, 2)?,
                seconds: int(row, 3)?,
            })
        })
        .collect()
}

/// How many of some nodes reported in each step of a window, and for how many seconds in all. Steps of which none did are missing.
pub(crate) fn reported(
    sql: &mut dyn Sql,
    nodes: &BTreeSet<String>,
    level: Level,
    window: (i64, i64),
    step: i64,
) -> Result<BTreeMap<i64, Reported>, Error> {
    let ((from, to), resolution) = (window, level.resolution());
    if to <= from || from < 0 {
        return Err(QueryError::Window { from, to }.into());
    }
    if step <= 0 || step % resolution != 0 {
        return Err(QueryError::Step { step, resolution }.into());
    }
    let (slots, wide) = ((to - from) / resolution, (to - from) / step);
    if slots > most::SLOTS {
        return Err(QueryError::Slots(slots).into());
    }
    if wide > most::STEPS {
        return Err(QueryError::Steps(wide).into());
    }
    let rows = sql.rows(
        "SELECT node, slot - slot % $4, CAST(SUM(seconds) AS BIGINT) FROM coverage
         WHERE level = $1 AND slot >= $2 AND slot < $3 GROUP BY 1, 2",
        &[resolution.into(), level.slot(from).into(), to.into(), step.into()],
    )?;
    let mut steps: BTreeMap<i64, Reported> = BTreeMap::new();
    for row in &rows {
        if nodes.contains(&text(row, 0)?) {
            let it = steps.entry(int(row, 1)?).or_default();
            it.nodes += 1;
            it.seconds += int(row, 2)?;
        }
    }
    Ok(steps)
}

/// End of the newest slot of which each of these nodes reported something: first among the last ten minutes, then ever further back and less
/// exactly, so that what is usual costs little.
pub(crate) fn last_reports(
    sql: &mut dyn Sql,
    nodes: BTreeSet<String>,
    now: i64,
) -> Result<BTreeMap<String, Option<i64>>, Error> {
    let mut last: BTreeMap<String, Option<i64>> = nodes.into_iter().map(|node| (node, None)).collect();
    for (level, back) in [(Level::Tens, 600), (Level::Minutes, 6 * 3_600), (Level::Hours, 30 * 86_400)] {
        if last.values().all(Option::is_some) {
            break;
        }
        let rows = sql.rows(
            "SELECT node, MAX(slot) FROM coverage WHERE level = $1 AND slot >= $2 GROUP BY node",
            &[level.resolution().into(), level.slot(now - back).into()],
        )?;
        for row in &rows {
            if let Some(unknown @ None) = last.get_mut(&text(row, 0)?) {
                *unknown = Some(int(row, 1)? + level.resolution());
            }
        }
    }
    Ok(last)
}

/// Gaps that end in a window, while 10-second figures are kept, at most `limit`.
pub(crate) fn gaps(sql: &mut dyn Sql, window: (i64, i64), limit: i64) -> Result<Vec<Gap>, Error> {
    let rows = sql.rows(
        "SELECT node, boot, before + 1, sequence - 1, ended, begins FROM (
             SELECT node, boot, sequence, begins,
                 LAG(sequence) OVER (PARTITION BY node, boot ORDER BY sequence) AS before,
                 LAG(ends) OVER (PARTITION BY node, boot ORDER BY sequence) AS ended
             FROM reports) AS pairs
         WHERE before < sequence - 1 AND begins >= $1 AND begins < $2 ORDER BY begins, node, boot, sequence LIMIT $3",
        &[window.0.into(), window.1.into(), limit.into()],
    )?;
    rows.iter()
        .map(|row| {
            let (node, boot) = (text(row, 0)?, text(row, 1)?);
            let (first, last) = (int(row, 2)?, int(row, 3)?);
            Ok(Gap { node, boot, first, last, from: int(row, 4)?, to: int(row, 5)? })
        })
        .collect()
}
