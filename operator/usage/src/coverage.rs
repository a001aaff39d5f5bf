//! Which nodes reported when, so that nobody takes silence for rest.

use crate::level::Level;
use crate::sql::{Error, Sql, int, text};

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
