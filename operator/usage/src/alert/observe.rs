//! What the store says of one slot, or of several: no more of it than matters.

use super::item::Pod;
use super::machine::Key;
use crate::level::Level;
use crate::series::{self, read_address, read_origin};
use crate::sql::{Error, Row, Sql, Value, bytes, int, text};
use aegis_usage_report::Protocol;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// Most rows of an answer.
const ROWS: i64 = 2_000;

/// Ports in use and means are in millionths, as everywhere in the store.
pub(super) use crate::sql::{MEAN, SCALE};

/// Where something goes on, and for refusals why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub allocation: String,
    pub address: Option<IpAddr>,
    pub origin: Option<SocketAddr>,
    pub protocol: Protocol,
    pub reason: String,
}

impl From<&Key> for Place {
    fn from(key: &Key) -> Place {
        let Key { allocation, address, origin, protocol, reason, .. } = key.clone();
        Place { allocation, address, origin, protocol, reason }
    }
}

/// Figures by place: those from some figure on.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub found: BTreeMap<Place, i64>,
    /// What is not found is surely below that figure.
    pub whole: bool,
}

/// Ports in use in a slot, in millionths: `least` or more of them.
pub(super) fn ports(sql: &mut dyn Sql, account: &str, slot: i64, least: i64) -> Result<Figures, Error> {
    let text = format!(
        "SELECT s.allocation, s.address, s.origin, s.protocol, '' AS reason,
             CAST(SUM({MEAN}) AS BIGINT) AS figure
         FROM series s JOIN {} u ON u.series = s.id
         WHERE s.account = $1 AND s.reason = '' AND u.slot = $2
         GROUP BY s.allocation, s.address, s.origin, s.protocol
         HAVING CAST(SUM({MEAN}) AS BIGINT) >= $3
         ORDER BY figure DESC, s.allocation, s.address, s.origin, s.protocol LIMIT $4",
        Level::Tens.table()
    );
    figures(sql.rows(&text, &[account.into(), slot.into(), least.into(), ROWS.into()])?)
}

/// Refused connections of the slots from `from` to `to`: `least` or more of them.
pub(super) fn refused(
    sql: &mut dyn Sql,
    account: &str,
    (from, to): (i64, i64),
    least: i64,
) -> Result<Figures, Error> {
    let text = format!(
        "SELECT s.allocation, s.address, s.origin, s.protocol, s.reason, CAST(SUM(u.refused) AS BIGINT) AS figure
         FROM series s JOIN {} u ON u.series = s.id
         WHERE s.account = $1 AND s.reason <> '' AND u.slot >= $2 AND u.slot < $3
         GROUP BY s.allocation, s.address, s.origin, s.protocol, s.reason
         HAVING CAST(SUM(u.refused) AS BIGINT) >= $4
         ORDER BY figure DESC, s.allocation, s.address, s.origin, s.protocol, s.reason LIMIT $5",
        Level::Tens.table()
    );
    figures(sql.rows(&text, &[account.into(), from.into(), to.into(), least.into(), ROWS.into()])?)
}

fn figures(rows: Vec<Row>) -> Result<Figures, Error> {
    let whole = (rows.len() as i64) < ROWS;
    let read = |row: &Row| {
        let place = Place {
            allocation: text(row, 0)?,
            address: read_address(&bytes(row, 1)?),
            origin: read_origin(&bytes(row, 2)?),
            protocol: protocol(&text(row, 3)?),
            reason: text(row, 4)?,
        };
        Ok((place, int(row, 5)?))
    };
    let found = rows.iter().map(read).collect::<Result<_, Error>>()?;
    Ok(Figures { found, whole })
}

fn protocol(name: &str) -> Protocol {
    Protocol::ALL.into_iter().find(|it| it.name() == name).unwrap_or_default()
}

/// The pod that has most of something in some slots: ports in millionths, or refused connections. None where pods are not told apart.
pub(super) fn busiest(
    sql: &mut dyn Sql,
    account: &str,
    key: &Key,
    window: (i64, i64),
) -> Result<Option<Pod>, Error> {
    let (sum, scale, rest, values) = of_key(account, key, window);
    let question = format!(
        "SELECT s.pod, {sum} AS figure {rest} AND s.pod <> '' GROUP BY s.pod ORDER BY figure DESC, s.pod LIMIT 1"
    );
    let rows = sql.rows(&question, &values)?;
    rows.first().map(|row| Ok(Pod { name: text(row, 0)?, figure: int(row, 1)? / scale })).transpose()
}

/// Ports or refused connections of something in some slots.
pub(super) fn figure(sql: &mut dyn Sql, account: &str, key: &Key, window: (i64, i64)) -> Result<i64, Error> {
    let (sum, scale, rest, values) = of_key(account, key, window);
    let rows = sql.rows(&format!("SELECT COALESCE({sum}, 0) {rest}"), &values)?;
    rows.first().map_or(Ok(0), |row| Ok(int(row, 0)? / scale))
}

/// What is summed, in what unit, and from where.
fn of_key(account: &str, key: &Key, (from, to): (i64, i64)) -> (String, i64, String, [Value; 8]) {
    let (figure, scale) = match key.reason.is_empty() {
        true => (MEAN, SCALE),
        false => ("u.refused", 1),
    };
    let rest = format!(
        "FROM series s JOIN {} u ON u.series = s.id
         WHERE s.account = $1 AND s.allocation = $2 AND s.address = $3 AND s.origin = $4 AND s.protocol = $5
             AND s.reason = $6 AND u.slot >= $7 AND u.slot < $8",
        Level::Tens.table()
    );
    let values = [
        account.into(),
        key.allocation.as_str().into(),
        key.address.map(series::address).unwrap_or_default().into(),
        key.origin.map(series::origin).unwrap_or_default().into(),
        key.protocol.name().into(),
        key.reason.as_str().into(),
        from.into(),
        to.into(),
    ];
    (format!("CAST(SUM({figure}) AS BIGINT)"), scale, rest, values)
}

/// Nodes that reported in every slot from `from` to `to`.
pub(super) fn reported(sql: &mut dyn Sql, (from, to): (i64, i64)) -> Result<BTreeSet<String>, Error> {
    let tens = Level::Tens.resolution();
    let rows = sql.rows(
        "SELECT node FROM coverage WHERE level = $1 AND slot >= $2 AND slot < $3
         GROUP BY node HAVING CAST(COUNT(*) AS BIGINT) >= $4",
        &[tens.into(), from.into(), to.into(), ((to - from) / tens).into()],
    )?;
    rows.iter().map(|row| text(row, 0)).collect()
}
