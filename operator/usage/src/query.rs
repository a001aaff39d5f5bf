//! What may be asked: figures of a window, filtered, grouped, by steps.
//!
//! A figure is made in two stages. First, for each slot of the level, the rows of a group are summed over nodes, pods and whatever
//! else it does not tell apart. Then the slots of a step are aggregated. Slots in which a group has no row do not count;
//! [`Answer::slots`] says how many did.

pub(crate) mod cursor;
mod sql;

use crate::ingest::{NEWEST, horizon_name, meta};
use crate::level::Level;
use crate::scope::Scope;
use crate::series::{read_address, read_origin};
use crate::sql::{Error, Row, SCALE, Sql, Value, bytes, int, text};
use aegis_usage_report::Protocol;
use ipnet::IpNet;
use thiserror::Error;

/// Limits of a question.
pub mod most {
    /// Slots of the level between `from` and `to`.
    pub const SLOTS: i64 = 20_000;
    /// Steps between `from` and `to`.
    pub const STEPS: i64 = 5_000;
    /// Rows of a page.
    pub const ROWS: u32 = 1_000;
    /// Figures.
    pub const FIGURES: usize = 12;
    /// Values in all filters together.
    pub const FILTERS: usize = 200;
}

/// A question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// Begin of the window; the slot in which it is counts whole.
    pub from: i64,
    /// End of the window: the first slot that begins at it or later does not count.
    pub to: i64,
    /// Length of a step in seconds, a multiple of the level's resolution; steps begin at multiples of their length. None: the window is
    /// one step.
    pub step: Option<i64>,
    /// The level to be asked. None: the one that suits the window and the step.
    pub level: Option<Level>,
    /// What counts.
    pub filter: Filter,
    /// Of each node only the newest slot of the window of which it reported: what is in use now, also where nodes report at different
    /// moments, and without going through the whole window.
    pub newest: bool,
    /// What is told apart.
    pub by: Vec<Dimension>,
    /// Of all that have the same in so many of the first of `by`, in each step only the one with the greatest first figure, which may
    /// not be a mean; of equal ones the first. None: all.
    pub fullest: Option<usize>,
    /// What is asked.
    pub figures: Vec<Figure>,
    /// Order of the answers.
    pub order: Order,
    /// Length of a page.
    pub first: u32,
    /// [`Page::next`] of the page before, of the same question.
    pub after: Option<String>,
}

/// What counts: of each list any, and of all lists. An empty list excludes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Ranges of egress addresses.
    pub addresses: Vec<IpNet>,
    /// Accounts.
    pub accounts: Vec<String>,
    /// Allocations.
    pub allocations: Vec<String>,
    /// Rules: `binding/NAME`, whose zone this is, or `policy/NAME`.
    pub rules: Vec<String>,
    /// Sites.
    pub sites: Vec<String>,
    /// Nodes.
    pub nodes: Vec<String>,
    /// Origins.
    pub origins: Vec<OriginFilter>,
    /// Protocols.
    pub protocols: Vec<Protocol>,
    /// Pods, by name.
    pub pods: Vec<String>,
    /// Reasons of refusals.
    pub reasons: Vec<String>,
}

/// Some origins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OriginFilter {
    /// Those of a range, with any port or a certain one.
    Range(IpNet, Option<u16>),
    /// Those that an agent has summed, because they were too many.
    Summed,
}

/// What is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dimension {
    /// Egress address.
    Address,
    /// Account.
    Account,
    /// Allocation; of its account, so ask for both where there are several.
    Allocation,
    /// Rule, and with it the zone.
    Rule,
    /// Site.
    Site,
    /// Node.
    Node,
    /// Address and port of the origin.
    Origin,
    /// Protocol.
    Protocol,
    /// Pod.
    Pod,
    /// Why flows were refused; empty for all other figures.
    Reason,
}

/// One figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Figure {
    /// Of what.
    pub measure: Measure,
    /// How the slots of a step become one.
    pub aggregation: Aggregation,
}

/// What is measured, in each slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Measure {
    /// Ports in use: the mean over the slot's reports.
    InUse,
    /// Ports in use: of each series the most that a report of the slot said. Where a group has several series or a slot several
    /// reports, the truth is this or less.
    InUseMax,
    /// The most ports at any moment, between reports too; with the same reservation.
    Peak,
    /// New flows.
    Flows,
    /// Refused flows.
    Refused,
    /// Packets to the origin.
    SentPackets,
    /// Bytes to the origin.
    SentBytes,
    /// Packets from the origin.
    ReceivedPackets,
    /// Bytes from the origin.
    ReceivedBytes,
}

/// How slots become one figure. All but `Sum` are of the amounts in single slots, so they depend on the level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Aggregation {
    /// Mean.
    Avg,
    /// Least.
    Min,
    /// Greatest.
    Max,
    /// Sum: of what is counted, all there was.
    Sum,
    /// The least value that this many thousandths of the slots do not exceed (nearest rank), 1 to 1000.
    Quantile(u16),
}

/// Order of answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// By group, then by time.
    #[default]
    Group,
    /// The greatest first figure first; equal ones by group and time. That figure may not be a mean.
    Highest,
}

/// Part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Page {
    /// The level that was asked.
    pub level: Level,
    /// Up to when it is made: what begins at this moment or later may be missing in a level of minutes or hours.
    pub until: i64,
    /// Groups and steps.
    pub rows: Vec<Answer>,
    /// Where the next page begins, if there is one.
    pub next: Option<String>,
}

/// A group in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Values of [`Query::by`], in its order: as text, and empty where it is not known.
    pub by: Vec<String>,
    /// Begin of the step.
    pub at: i64,
    /// Slots in which the group was seen.
    pub slots: i64,
    /// Values of [`Query::figures`], in their order.
    pub figures: Vec<f64>,
}

/// Why a question is not answered.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum QueryError {
    /// A window that ends before it begins.
    #[error("the window ends at {to}, not after its begin {from}")]
    Window {
        /// Its begin.
        from: i64,
        /// Its end.
        to: i64,
    },
    /// Too long a window for its level.
    #[error("the window has {0} slots of this level, more than {most}: ask for a shorter one or a coarser level", most = most::SLOTS)]
    Slots(i64),
    /// Too many steps.
    #[error("the window has {0} steps, more than {most}: ask for longer ones", most = most::STEPS)]
    Steps(i64),
    /// A step that slots do not fit into.
    #[error("a step of {step} s is not a multiple of the level's {resolution} s")]
    Step {
        /// Its length.
        step: i64,
        /// The level's.
        resolution: i64,
    },
    /// Nothing or too much is asked.
    #[error("{0} figures are asked; it takes 1 to {most}", most = most::FIGURES)]
    Figures(usize),
    /// A dimension twice.
    #[error("the answer is grouped by the same twice")]
    Twice,
    /// Too many values in filters.
    #[error("the filters have {0} values, more than {most}", most = most::FILTERS)]
    Filters(usize),
    /// A page that is empty or too long.
    #[error("a page of {0} rows is asked; it takes 1 to {most}", most = most::ROWS)]
    Rows(u32),
    /// A quantile that is none.
    #[error("a quantile of {0} thousandths is asked; it takes 1 to 1000")]
    Quantile(u16),
    /// An order that would not be the same on every page.
    #[error("a mean cannot order the answers: put another figure first")]
    Order,
    /// The fullest of more than is told apart.
    #[error("the fullest by {0} of the {1} that are told apart are asked: it takes fewer")]
    Fullest(usize, usize),
    /// A cursor that is not of this question.
    #[error("the cursor is not one of this question")]
    Cursor,
}

impl Query {
    /// Whether it tells nothing apart that totals do not.
    fn is_of_totals(&self) -> bool {
        let Filter { origins, rules, pods, .. } = &self.filter;
        let apart = [Dimension::Origin, Dimension::Rule, Dimension::Pod];
        origins.is_empty()
            && rules.is_empty()
            && pods.is_empty()
            && !self.by.iter().any(|dimension| apart.contains(dimension))
    }

    /// The level to ask, and whether all is within its limits.
    fn check(&self, kept: &[(Level, i64)]) -> Result<Level, QueryError> {
        let Query { from, to, .. } = *self;
        let window = to.checked_sub(from).filter(|window| *window > 0 && from >= 0);
        let window = window.ok_or(QueryError::Window { from, to })?;
        let level = self.level.unwrap_or_else(|| suited(self, kept));
        let resolution = level.resolution();
        if window / resolution > most::SLOTS {
            return Err(QueryError::Slots(window / resolution));
        }
        if let Some(step) = self.step {
            if step <= 0 || step % resolution != 0 {
                return Err(QueryError::Step { step, resolution });
            }
            if window / step > most::STEPS {
                return Err(QueryError::Steps(window / step));
            }
        }
        if self.figures.is_empty() || self.figures.len() > most::FIGURES {
            return Err(QueryError::Figures(self.figures.len()));
        }
        if (1..self.by.len()).any(|at| self.by[..at].contains(&self.by[at])) {
            return Err(QueryError::Twice);
        }
        if self.filter.len() > most::FILTERS {
            return Err(QueryError::Filters(self.filter.len()));
        }
        if !(1..=most::ROWS).contains(&self.first) {
            return Err(QueryError::Rows(self.first));
        }
        let wrong = |figure: &Figure| match figure.aggregation {
            Aggregation::Quantile(thousandths) if !(1..=1000).contains(&thousandths) => Some(thousandths),
            _ => None,
        };
        if let Some(thousandths) = self.figures.iter().find_map(wrong) {
            return Err(QueryError::Quantile(thousandths));
        }
        let compared = self.order == Order::Highest || self.fullest.is_some();
        if compared && self.figures[0].aggregation == Aggregation::Avg {
            return Err(QueryError::Order);
        }
        if let Some(fullest) = self.fullest.filter(|fullest| *fullest >= self.by.len()) {
            return Err(QueryError::Fullest(fullest, self.by.len()));
        }
        Ok(level)
    }
}

/// The level that suits a question: 10 seconds for an hour or less, minutes for a day or less, hours for more; with steps the coarsest that
/// fits into them, beyond an hour. Never one that has forgotten the window's begin, while a coarser one has not.
fn suited(query: &Query, kept: &[(Level, i64)]) -> Level {
    let window = query.to.saturating_sub(query.from);
    let fitting = Level::ALL
        .into_iter()
        .rev()
        .find(|level| query.step.is_none_or(|step| step % level.resolution() == 0));
    let wanted = match window {
        ..=3_600 => Level::Tens,
        3_601..=86_400 => Level::Minutes,
        _ => Level::Hours,
    };
    let level = match query.step {
        Some(_) if window > 3_600 => fitting.unwrap_or(Level::Tens),
        Some(_) => Level::Tens,
        None => wanted,
    };
    let forgotten = |level: Level| kept.iter().any(|(of, since)| *of == level && *since > query.from);
    Level::ALL.into_iter().filter(|it| *it >= level).find(|it| !forgotten(*it)).unwrap_or(Level::Hours)
}

/// Answers a question.
pub(crate) fn answer(sql: &mut dyn Sql, scope: &Scope, query: &Query) -> Result<Page, Error> {
    let kept = Level::ALL.into_iter().map(|level| Ok((level, meta(sql, horizon_name(level))?.unwrap_or(0))));
    let level = query.check(&kept.collect::<Result<Vec<_>, Error>>()?)?;
    let after = query.after.as_deref().map(|after| cursor::read(query, after)).transpose()?;
    let since = meta(sql, level.totals())?;
    let totals = query.is_of_totals() && since.is_some_and(|since| level.slot(query.from) >= since);
    let (text, values) = sql::text(scope, query, level, totals, after, sql.among());
    let mut rows = sql.ask(&text, &values)?;
    let more = rows.len() > query.first as usize;
    rows.truncate(query.first as usize);
    let next = rows.last().filter(|_| more).map(|row| cursor::write(query, row)).transpose()?;
    let rows = rows.iter().map(|row| read(query, row)).collect::<Result<_, Error>>()?;
    Ok(Page { level, until: until(sql, level)?, rows, next })
}

/// What begins before it is there, as far as it was reported: the first slot that is still to be made, or the end of the newest report.
fn until(sql: &mut dyn Sql, level: Level) -> Result<i64, Error> {
    let newest = meta(sql, NEWEST)?.unwrap_or(0);
    let dirty = sql.rows("SELECT MIN(slot) FROM dirty WHERE level <= $1", &[level.resolution().into()])?;
    let waiting =
        dirty.first().filter(|row| row.first() != Some(&Value::Null)).map(|row| int(row, 0)).transpose()?;
    Ok(waiting.map_or(newest, |slot| level.slot(slot).min(newest)))
}

/// A row: groups, begin of the step, slots, figures.
fn read(query: &Query, row: &Row) -> Result<Answer, Error> {
    let groups = query.by.len();
    let by = query.by.iter().enumerate().map(|(at, dimension)| match dimension {
        Dimension::Address => {
            Ok(read_address(&bytes(row, at)?).map_or_else(String::new, |it| it.to_string()))
        }
        Dimension::Origin => Ok(read_origin(&bytes(row, at)?).map_or_else(String::new, |it| it.to_string())),
        _ => text(row, at),
    });
    let slots = int(row, groups + 1)?;
    let figure = |(at, figure): (usize, &Figure)| {
        let value = int(row, groups + 2 + at)? as f64 / figure.measure.scale() as f64;
        Ok(if figure.aggregation == Aggregation::Avg { value / slots as f64 } else { value })
    };
    let figures = query.figures.iter().enumerate().map(figure).collect::<Result<_, Error>>()?;
    Ok(Answer { by: by.collect::<Result<_, Error>>()?, at: int(row, groups)?, slots, figures })
}

impl Filter {
    fn len(&self) -> usize {
        let names = [
            &self.accounts,
            &self.allocations,
            &self.rules,
            &self.sites,
            &self.nodes,
            &self.pods,
            &self.reasons,
        ];
        names.into_iter().map(Vec::len).sum::<usize>()
            + self.addresses.len()
            + self.origins.len()
            + self.protocols.len()
    }
}

impl Measure {
    /// What a figure is to be divided by: means are kept in millionths, in whole numbers, so that both databases answer the same.
    fn scale(self) -> i64 {
        if self == Measure::InUse { SCALE } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IN_USE: Figure = Figure { measure: Measure::InUse, aggregation: Aggregation::Avg };

    fn query() -> Query {
        Query { from: 0, to: 3_600, figures: vec![IN_USE], first: 10, ..Query::default() }
    }

    #[test]
    fn a_level_suits_the_window() {
        let kept = [(Level::Tens, 90_000), (Level::Minutes, 80_000), (Level::Hours, 0)];
        let level =
            |from: i64, to: i64, step: Option<i64>| suited(&Query { from, to, step, ..query() }, &kept);
        assert_eq!(level(90_000, 93_600, None), Level::Tens);
        assert_eq!(level(90_000, 93_600, Some(60)), Level::Tens);
        assert_eq!(level(90_000, 97_200, Some(60)), Level::Minutes);
        assert_eq!(level(90_000, 97_200, Some(90)), Level::Tens);
        assert_eq!(level(90_000, 97_200, None), Level::Minutes);
        assert_eq!(level(90_000, 900_000, None), Level::Hours);
        assert_eq!(level(90_000, 900_000, Some(7_200)), Level::Hours);
        // What is forgotten at 10 seconds is still there in minutes, and later in hours.
        assert_eq!(level(80_000, 83_600, None), Level::Minutes);
        assert_eq!(level(0, 3_600, None), Level::Hours);
    }

    #[test]
    fn what_is_too_wide_is_refused() {
        type Edit = fn(&mut Query);
        let cases: [(Edit, QueryError); 15] = [
            (|it| it.to = 0, QueryError::Window { from: 0, to: 0 }),
            (|it| it.from = -10, QueryError::Window { from: -10, to: 3_600 }),
            (|it| it.from = i64::MIN, QueryError::Window { from: i64::MIN, to: 3_600 }),
            (|it| (it.level, it.to) = (Some(Level::Tens), 200_010), QueryError::Slots(20_001)),
            (|it| (it.step, it.to) = (Some(10), 50_010), QueryError::Steps(5_001)),
            (|it| it.step = Some(15), QueryError::Step { step: 15, resolution: 10 }),
            (|it| it.step = Some(-60), QueryError::Step { step: -60, resolution: 10 }),
            (|it| it.figures.clear(), QueryError::Figures(0)),
            (|it| it.by = vec![Dimension::Pod, Dimension::Node, Dimension::Pod], QueryError::Twice),
            (|it| it.filter.pods = vec![String::new(); 201], QueryError::Filters(201)),
            (|it| it.first = 1_001, QueryError::Rows(1_001)),
            (|it| it.figures[0].aggregation = Aggregation::Quantile(0), QueryError::Quantile(0)),
            (|it| it.order = Order::Highest, QueryError::Order),
            (|it| it.fullest = Some(0), QueryError::Order),
            (
                |it| (it.fullest, it.figures[0].aggregation) = (Some(0), Aggregation::Max),
                QueryError::Fullest(0, 0),
            ),
        ];
        for (edit, wrong) in cases {
            let mut query = query();
            edit(&mut query);
            assert_eq!(query.check(&[]), Err(wrong));
        }
        assert_eq!(query().check(&[]), Ok(Level::Tens));
    }
}
