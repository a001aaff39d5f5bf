//! A question in SQL. Whatever somebody asked for by name is a value, never text.

use super::{Aggregation, Dimension, Filter, Measure, Order, OriginFilter, Query};
use crate::level::Level;
use crate::scope::{Scope, Seen};
use crate::series;
use crate::sql::{MEAN, Value};

/// Text with the values that it names `$1`, `$2`, ….
#[derive(Default)]
struct Values(Vec<Value>);

impl Values {
    fn name(&mut self, value: impl Into<Value>) -> String {
        self.0.push(value.into());
        format!("${}", self.0.len())
    }

    fn list<V: Into<Value>>(&mut self, values: impl IntoIterator<Item = V>) -> String {
        values.into_iter().map(|value| self.name(value)).collect::<Vec<_>>().join(", ")
    }
}

/// The question, one row more than a page has. Columns: groups, begin of the step, slots, figures. `among` is what the database wants to
/// be told besides: see [`Sql::among`](crate::sql::Sql::among).
///
/// First which series count, each with the number of its group, so that rows are summed by numbers; names come back at the end.
pub(super) fn text(
    scope: &Scope,
    query: &Query,
    level: Level,
    totals: bool,
    after: Option<Vec<Value>>,
    among: &str,
) -> (String, Vec<Value>) {
    let mut values = Values::default();
    let Seen { series, since, pod } = scope.sql(&mut |value| values.name(value));
    let mut conditions = vec![series];
    filter(&query.filter, &pod, &mut values, &mut conditions);
    let groups: Vec<String> = (0..query.by.len()).map(|at| format!("g{at}")).collect();
    let columns: Vec<&str> = query.by.iter().map(|dimension| column(*dimension, &pod)).collect();
    let (from, to) = (values.name(level.slot(query.from)), values.name(query.to));
    let mut chosen = vec!["s.id AS id".into(), format!("{} AS grp", number(&columns))];
    chosen.extend(columns.iter().zip(&groups).map(|(column, name)| format!("{column} AS {name}")));
    chosen.extend(since.iter().map(|since| format!("{since} AS since")));
    chosen.extend(query.fullest.map(|fullest| format!("{} AS part", number(&columns[..fullest]))));
    chosen.extend(query.newest.then(|| "newest.slot AS newest".into()));
    let newest = match query.newest {
        true => format!(
            " JOIN (SELECT node, MAX(slot) AS slot FROM coverage WHERE level = {} AND slot >= {from} AND slot < {to} GROUP BY node) AS newest
             ON newest.node = s.node",
            values.name(level.resolution())
        ),
        false => String::new(),
    };
    let chosen =
        format!("SELECT {} FROM series s{newest} WHERE {}", chosen.join(", "), conditions.join(" AND "));

    let step = match query.step {
        // Whole numbers, so that the division leaves the begin of the step.
        Some(step) => {
            let step = values.name(step);
            format!("u.slot / {step} * {step}")
        }
        None => format!("CAST({from} AS BIGINT)"),
    };
    let measures =
        query.figures.iter().enumerate().map(|(at, figure)| {
            format!("CAST(SUM({}) AS BIGINT) AS m{at}", expression(figure.measure, totals))
        });
    let mut rows = format!("u.series = c.id{among} AND u.slot >= {from} AND u.slot < {to}");
    if since.is_some() {
        rows += " AND u.slot >= c.since";
    }
    if query.newest {
        // The second half is for the index.
        rows += " AND u.slot = c.newest AND u.slot >= (SELECT MIN(newest) FROM chosen)";
    }
    // Whatever sums are of: a group, with what it is a part of.
    let of = if query.fullest.is_some() { "grp, part" } else { "grp" };
    // In this order: SQLite would look for the series of each row.
    let slots = format!(
        "SELECT {of}, {step} AS step, u.slot AS slot, MIN(c.id) AS one, {} FROM chosen c CROSS JOIN {} u WHERE {rows} GROUP BY {of}, step, u.slot",
        measures.collect::<Vec<_>>().join(", "),
        if totals { level.totals() } else { level.table() },
    );
    let figures = query.figures.iter().enumerate().map(|(at, figure)| {
        let value = match figure.aggregation {
            Aggregation::Avg | Aggregation::Sum => format!("CAST(SUM(m{at}) AS BIGINT)"),
            Aggregation::Min => format!("MIN(m{at})"),
            Aggregation::Max => format!("MAX(m{at})"),
            Aggregation::Quantile(thousandths) => {
                let thousandths = values.name(i64::from(thousandths));
                format!("MAX(CASE WHEN r{at} = (n * {thousandths} + 999) / 1000 THEN m{at} END)")
            }
        };
        format!("{value} AS f{at}")
    });
    let figures = figures.collect::<Vec<_>>().join(", ");
    let mut sums = format!(
        "SELECT {of}, step, MIN(one) AS one, CAST(COUNT(*) AS BIGINT) AS slots, {figures} FROM ({}) AS ranked GROUP BY {of}, step",
        ranked(query, &slots)
    );
    if query.fullest.is_some() {
        sums = format!(
            "SELECT * FROM (SELECT sums.*, ROW_NUMBER() OVER (PARTITION BY part, step ORDER BY f0 DESC, grp) AS place
             FROM ({sums}) AS sums) AS placed WHERE place = 1"
        );
    }
    let keys = listed(&groups, &["step"]);
    let figures: Vec<String> = (0..query.figures.len()).map(|at| format!("f{at}")).collect();
    let columns = format!("{keys}, slots, {}", figures.join(", "));
    let answers = match groups[..] {
        [] => format!("SELECT {columns} FROM ({sums}) AS sums"),
        // Names of a group are those of any of its series.
        _ => format!("SELECT {columns} FROM ({sums}) AS sums JOIN chosen ON chosen.id = sums.one"),
    };
    let place = after.map_or_else(|| "1 = 1".into(), |after| beyond(query.order, &keys, after, &mut values));
    let order = if query.order == Order::Highest { "f0 DESC, " } else { "" };
    let limit = values.name(i64::from(query.first) + 1);
    let text = format!(
        "WITH chosen AS MATERIALIZED ({chosen}) SELECT * FROM ({answers}) AS answers WHERE {place} ORDER BY {order}{keys} LIMIT {limit}"
    );
    (text, values.0)
}

/// The number of a group, from 1 on, in the order of these columns.
fn number(columns: &[&str]) -> String {
    if columns.is_empty() {
        "1".into()
    } else {
        format!("DENSE_RANK() OVER (ORDER BY {})", columns.join(", "))
    }
}

/// With the rank of each slot by each figure of which a quantile is asked: that costs a sort.
fn ranked(query: &Query, slots: &str) -> String {
    let ranks =
        query.figures.iter().enumerate().filter(|(_, it)| matches!(it.aggregation, Aggregation::Quantile(_)));
    let ranks: Vec<String> = ranks
        .map(|(at, _)| format!("ROW_NUMBER() OVER (PARTITION BY grp, step ORDER BY m{at}) AS r{at}"))
        .collect();
    if ranks.is_empty() {
        return slots.into();
    }
    format!(
        "SELECT slots.*, COUNT(*) OVER (PARTITION BY grp, step) AS n, {} FROM ({slots}) AS slots",
        ranks.join(", ")
    )
}

/// The condition that a row comes after a place.
fn beyond(order: Order, keys: &str, mut place: Vec<Value>, values: &mut Values) -> String {
    match order {
        Order::Group => format!("({keys}) > ({})", values.list(place)),
        Order::Highest => {
            let rest = place.split_off(1);
            let highest = values.list(place);
            format!("(f0 < {highest} OR (f0 = {highest} AND ({keys}) > ({})))", values.list(rest))
        }
    }
}

fn listed(groups: &[String], rest: &[&str]) -> String {
    groups.iter().map(String::as_str).chain(rest.iter().copied()).collect::<Vec<_>>().join(", ")
}

fn column(dimension: Dimension, pod: &str) -> &str {
    match dimension {
        Dimension::Address => "s.address",
        Dimension::Account => "s.account",
        Dimension::Allocation => "s.allocation",
        Dimension::Rule => "s.rule",
        Dimension::Site => "s.site",
        Dimension::Node => "s.node",
        Dimension::Origin => "s.origin",
        Dimension::Protocol => "s.protocol",
        Dimension::Pod => pod,
        Dimension::Reason => "s.reason",
    }
}

fn expression(measure: Measure, totals: bool) -> &'static str {
    match measure {
        Measure::InUse if totals => "u.in_use",
        Measure::InUse => MEAN,
        Measure::InUseMax => "u.in_use_max",
        Measure::Peak => "u.peak",
        Measure::Flows => "u.flows",
        Measure::Refused => "u.refused",
        Measure::SentPackets => "u.sent_packets",
        Measure::SentBytes => "u.sent_bytes",
        Measure::ReceivedPackets => "u.received_packets",
        Measure::ReceivedBytes => "u.received_bytes",
    }
}

fn filter(filter: &Filter, pod: &str, values: &mut Values, conditions: &mut Vec<String>) {
    let names = [
        ("s.account", &filter.accounts),
        ("s.allocation", &filter.allocations),
        ("s.rule", &filter.rules),
        ("s.site", &filter.sites),
        ("s.node", &filter.nodes),
        // As far as it may be seen, so that nobody finds out by asking which pods there are.
        (pod, &filter.pods),
        ("s.reason", &filter.reasons),
    ];
    for (column, names) in names.into_iter().filter(|(_, names)| !names.is_empty()) {
        // PostgreSQL refuses a text with a NUL, and nothing has such a name.
        let names = names.iter().map(|name| name.replace('\0', "\u{fffd}"));
        conditions.push(format!("{column} IN ({})", values.list(names)));
    }
    if !filter.protocols.is_empty() {
        let names = filter.protocols.iter().map(|protocol| protocol.name());
        conditions.push(format!("s.protocol IN ({})", values.list(names)));
    }
    let addresses = filter.addresses.iter().map(|range| {
        let (first, last) = series::range(range);
        format!("s.address BETWEEN {} AND {}", values.name(first), values.name(last))
    });
    let addresses: Vec<String> = addresses.collect();
    let origins: Vec<String> = filter.origins.iter().map(|it| origin(*it, values)).collect();
    for any in [addresses, origins].into_iter().filter(|any| !any.is_empty()) {
        conditions.push(format!("({})", any.join(" OR ")));
    }
}

fn origin(filter: OriginFilter, values: &mut Values) -> String {
    let OriginFilter::Range(range, port) = filter else {
        return format!("s.origin = {}", values.name(Vec::new()));
    };
    let octets = if range.addr().is_ipv4() { 4 } else { 16 };
    let (mut first, mut last) = series::range(&range);
    first.extend([0, 0]);
    last.extend([0xff, 0xff]);
    let within = format!("s.origin BETWEEN {} AND {}", values.name(first), values.name(last));
    match port {
        // After the family and the octets; all of the range have the same number of them.
        Some(port) => {
            let port = values.name(port.to_be_bytes().to_vec());
            format!("({within} AND substr(s.origin, {}, 2) = {port})", octets + 2)
        }
        None => within,
    }
}
