//! What is said: a table, or all of it for programs.

use super::coverage::{Coverage, Known, maybe_moment, moment};
use super::question::Question;
use super::rows::Row;
use super::units::{bytes, count, percent};
use super::words::{Dimension, Figure, Level};
use super::{period, units};
use crate::args::UsageForm;
use crate::output::{Table, notes, plural, sections};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// What was in use.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Begin of the window, in whole slots.
    #[serde(serialize_with = "moment")]
    pub from: i64,
    /// End of the window.
    #[serde(serialize_with = "moment")]
    pub to: i64,
    /// Length of a step in seconds, where time is told apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_seconds: Option<i64>,
    /// Length in seconds of the slots that were read.
    pub slot_seconds: i64,
    /// What is told apart.
    pub by: Vec<&'static str>,
    /// Groups, or steps of groups.
    pub rows: Vec<Told>,
    /// Groups that are not shown.
    #[serde(skip_serializing_if = "is_zero")]
    pub left_out: usize,
    /// How much of the window was reported. None: it could not be found out.
    pub coverage: Option<Coverage>,
    /// What is to be known beside.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    #[serde(skip)]
    head: String,
    #[serde(skip)]
    question: Question,
    #[serde(skip)]
    plain: Vec<Row>,
}

/// A row, exactly.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Told {
    /// Values of what is told apart.
    pub group: BTreeMap<&'static str, String>,
    /// Begin of the step.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "maybe_moment")]
    pub at: Option<i64>,
    /// Slots in which it was seen.
    pub slots: u64,
    /// Figures; none where they are not known.
    pub figures: Option<BTreeMap<&'static str, Value>>,
    /// Why flows were refused, and how many.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub refused_by: BTreeMap<String, u64>,
    /// Ports that there are for it towards one origin, as of now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<u64>,
    /// The peak in percent of these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fill_percent: Option<f64>,
    /// How much of the step was reported, in percent; none where it is too early to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reported_percent: Option<i64>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// What an answer is made of.
pub struct Found {
    /// What was asked.
    pub question: Question,
    /// The window in whole slots.
    pub window: (i64, i64),
    /// Length of a step.
    pub step: Option<i64>,
    /// The level that was read.
    pub level: Level,
    /// Rows in their order.
    pub rows: Vec<Row>,
    /// Groups that are left out.
    pub left_out: usize,
    /// How much was reported.
    pub coverage: Option<Coverage>,
    /// What is to be known beside.
    pub notes: Vec<String>,
}

impl Answer {
    /// Puts it together.
    pub fn of(found: Found) -> Answer {
        let Found { question, window, step, level, rows, left_out, coverage, notes } = found;
        let of = match (&question.accounts[..], &question.allocation) {
            ([], None) => "all that you may see".to_owned(),
            ([], Some(name)) => format!("allocations {name}"),
            (accounts, None) => accounts.join(", "),
            (accounts, Some(name)) => {
                accounts.iter().map(|it| format!("{it}/{name}")).collect::<Vec<_>>().join(", ")
            }
        };
        let (from, to) = window;
        let head = format!(
            "use of {of}, {} to {} ({}), by {}",
            period::rfc3339(from),
            period::rfc3339(to),
            period::words(to - from),
            level.words()
        );
        Answer {
            from,
            to,
            step_seconds: step,
            slot_seconds: level.resolution(),
            by: question.by.iter().map(|it| it.name()).collect(),
            rows: rows.iter().map(|row| told(&question, row)).collect(),
            left_out,
            coverage,
            notes,
            head,
            question,
            plain: rows,
        }
    }

    /// Its text in a form, with a line feed at its end.
    pub fn write(&self, form: UsageForm) -> anyhow::Result<String> {
        Ok(match form {
            UsageForm::Table => self.table(false),
            UsageForm::Wide => self.table(true),
            UsageForm::Json => serde_json::to_string_pretty(self)? + "\n",
            UsageForm::Yaml => serde_yaml_ng::to_string(self)?,
            UsageForm::Csv => self.csv(),
        })
    }

    /// For people.
    fn table(&self, wide: bool) -> String {
        let columns = self.columns(wide);
        let mut table = Table::of(columns.iter().map(|(head, _)| (*head).to_owned()).collect());
        for row in &self.plain {
            table.line(columns.iter().map(|(_, cell)| cell(self, row)).collect());
        }
        let none = if self.plain.is_empty() { self.nothing() } else { String::new() };
        let mut said = Vec::new();
        if self.left_out > 0 {
            let groups = plural(self.left_out, "group is", "groups are");
            said.push(format!("{groups} not shown: see --limit, or narrow it down"));
        }
        said.extend(self.unknown());
        said.extend(self.notes.iter().cloned());
        sections([self.head.clone() + &self.reported(), none, table.text(), notes(&said)])
    }

    fn reported(&self) -> String {
        let Some(coverage) = &self.coverage else { return String::new() };
        match coverage.percent() {
            Some(share) => {
                format!("; {} reported by {}", percent(share), plural(coverage.nodes, "node", "nodes"))
            }
            None => String::new(),
        }
    }

    /// What is not known of the window.
    fn unknown(&self) -> Vec<String> {
        let Some(coverage) = &self.coverage else { return Vec::new() };
        let mut said = Vec::new();
        const FEW: usize = 5;
        let spans = coverage.unknown.iter().take(FEW);
        let spans: Vec<String> =
            spans.map(|it| format!("{} to {}", period::rfc3339(it.from), period::rfc3339(it.to))).collect();
        if !spans.is_empty() {
            let more = match coverage.unknown.len().saturating_sub(FEW) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            said.push(format!("not known, since no node reported: {}{more}", spans.join(", ")));
        }
        if let Some(at) = coverage.not_yet {
            said.push(format!("not all there yet: what begins at {} or later", period::rfc3339(at)));
        }
        for silent in coverage.silent.iter().take(FEW) {
            let since = silent
                .last
                .map_or_else(|| "for 30 days".to_owned(), |at| format!("since {}", period::rfc3339(at)));
            said.push(format!(
                "node {} has not reported {since}: what it has in use is not counted",
                silent.node
            ));
        }
        if let Some(more) = coverage.silent.len().checked_sub(FEW).filter(|it| *it > 0) {
            said.push(format!("{} more reported nothing at the window's end", plural(more, "node", "nodes")));
        }
        said
    }

    /// Why there is no row.
    fn nothing(&self) -> String {
        match &self.coverage {
            Some(coverage) if coverage.wanted_seconds > 0 && coverage.reported_seconds == 0 => {
                "not known: no node reported anything of this window".to_owned()
            }
            Some(coverage) if coverage.wanted_seconds > 0 => "nothing was in use".to_owned(),
            _ => {
                let scope = match &self.question.accounts[..] {
                    [] => "-A".to_owned(),
                    accounts => format!("-n {}", accounts[0]),
                };
                format!(
                    "nothing was in use, or nothing of it is yours to see: kubectl auth can-i get egressallocations.aegis.dev/usage {scope}"
                )
            }
        }
    }

    fn columns(&self, wide: bool) -> Vec<(&'static str, Cell)> {
        let by = &self.question.by;
        let place = |dimension| by.iter().position(|it| *it == dimension);
        let mut columns: Vec<(&'static str, Cell)> = Vec::new();
        for (at, dimension) in by.iter().enumerate() {
            let cell: Cell = match (dimension, place(Dimension::Account), place(Dimension::Allocation)) {
                // As everywhere else.
                (Dimension::Account, _, Some(_)) => continue,
                (Dimension::Allocation, Some(account), _) => {
                    Box::new(move |_, row| format!("{}/{}", value(row, account), value(row, at)))
                }
                (Dimension::Origin, ..) => Box::new(move |_, row| match value(row, at) {
                    "" => "other".to_owned(),
                    origin => origin.to_owned(),
                }),
                _ => Box::new(move |_, row| value(row, at).to_owned()),
            };
            columns.push((head(*dimension), cell));
        }
        if self.step_seconds.is_some() {
            columns.push(("FROM", Box::new(|_, row| row.at.map(period::rfc3339).unwrap_or_default())));
        }
        if self.plain.iter().any(|row| row.ports.is_some()) {
            columns
                .push(("FULL", Box::new(|it, row| row.fill(&it.question).map(percent).unwrap_or_default())));
        }
        for figure in self.question.shown.iter().copied() {
            columns.push((figure.head(), Box::new(move |it, row| cell(&it.question, row, figure))));
        }
        if self.plain.iter().any(|row| !row.refused_by.is_empty()) {
            columns.push(("WHY", Box::new(|_, row| why(row, ", "))));
        }
        if wide {
            columns.push((
                "SEEN",
                Box::new(|it, row| {
                    period::words(
                        i64::try_from(row.slots).unwrap_or(i64::MAX).saturating_mul(it.slot_seconds),
                    )
                }),
            ));
        }
        if self.step_seconds.is_some() {
            columns.push((
                "REPORTED",
                Box::new(|_, row| match row.known {
                    Some(Known::Part(share)) => units::percent(share as f64),
                    Some(Known::NotYet) => "not all yet".to_owned(),
                    Some(Known::Nothing) => "nothing".to_owned(),
                    None => String::new(),
                }),
            ));
        }
        columns
    }

    fn csv(&self) -> String {
        let figures = &self.question.shown;
        let more = ["at", "slots", "ports", "fillPercent", "refusedBy", "reportedPercent"];
        let heads = self.by.iter().copied().chain(figures.iter().map(|it| it.name())).chain(more);
        let mut text = heads.collect::<Vec<_>>().join(",") + "\n";
        for (row, told) in self.plain.iter().zip(&self.rows) {
            let number = |figure: &Figure| {
                row.figure(&self.question, *figure).map(|it| exact(it).to_string()).unwrap_or_default()
            };
            let optional = |value: Option<String>| value.unwrap_or_default();
            let cells = row.group.iter().cloned().chain(figures.iter().map(number)).chain([
                optional(row.at.map(period::rfc3339)),
                row.slots.to_string(),
                optional(row.ports.map(|it| it.to_string())),
                optional(told.fill_percent.map(|it| exact(it).to_string())),
                why(row, ";"),
                optional(told.reported_percent.map(|it| it.to_string())),
            ]);
            text.push_str(&cells.map(|cell| quoted(&cell)).collect::<Vec<_>>().join(","));
            text.push('\n');
        }
        text
    }
}

type Cell = Box<dyn Fn(&Answer, &Row) -> String>;

fn value(row: &Row, at: usize) -> &str {
    row.group.get(at).map_or("", String::as_str)
}

fn head(dimension: Dimension) -> &'static str {
    match dimension {
        Dimension::Account => "ACCOUNT",
        Dimension::Allocation => "ALLOCATION",
        Dimension::Address => "ADDRESS",
        Dimension::Origin => "ORIGIN",
        Dimension::Protocol => "PROTOCOL",
        Dimension::Rule => "RULE",
        Dimension::Site => "SITE",
        Dimension::Node => "NODE",
        Dimension::Pod => "POD",
        Dimension::Reason => "REASON",
    }
}

fn cell(question: &Question, row: &Row, figure: Figure) -> String {
    let Some(number) = row.figure(question, figure) else { return "?".to_owned() };
    match figure {
        _ if number == 0.0 => String::new(),
        Figure::Sent | Figure::Received => bytes(number),
        _ => count(number),
    }
}

fn why(row: &Row, between: &str) -> String {
    let reasons = row.refused_by.iter().map(|(reason, refused)| format!("{reason} {refused}"));
    reasons.collect::<Vec<_>>().join(between)
}

fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_owned()
    }
}

/// A figure as it is: whole ones without a point.
fn exact(value: f64) -> Value {
    // All that a float tells exactly.
    const WHOLE: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && (0.0..WHOLE).contains(&value) {
        Value::from(value as u64)
    } else {
        Value::from(value)
    }
}

fn told(question: &Question, row: &Row) -> Told {
    let figures = |figures: &Vec<f64>| {
        let named =
            question.figures.iter().zip(figures).filter(|(figure, _)| question.shown.contains(figure));
        named.map(|(figure, value)| (figure.name(), exact(*value))).collect()
    };
    Told {
        group: question.by.iter().map(|it| it.name()).zip(row.group.iter().cloned()).collect(),
        at: row.at,
        slots: row.slots,
        figures: row.figures.as_ref().map(figures),
        refused_by: row.refused_by.clone(),
        ports: row.ports,
        fill_percent: row.fill(question).map(|it| (it * 100.0).round() / 100.0),
        reported_percent: match row.known {
            Some(Known::Part(share)) => Some(share),
            Some(Known::Nothing) => Some(0),
            Some(Known::NotYet) | None => None,
        },
    }
}
