//! `kubectl aegis usage`: what was in use over time, as the collector keeps it. It is asked in GraphQL, and says what it does not know.

mod answer;
mod coverage;
pub mod period;
mod question;
mod rows;
mod told;
mod units;
pub mod words;

#[cfg(test)]
mod tests;

pub use answer::Answer;
pub use question::Question;

use crate::args::{Connection, Usage};
use crate::cluster::{Collector, Place};
use answer::Found;
use anyhow::{Context, Result, anyhow, ensure};
use coverage::Coverage;
use question::{ADDRESSES, COVERAGE, NOW, OBJECTS, PAGE, USAGE};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use told::{Address, CoverageTold, Line, NowTold, ObjectsTold, UsageTold};
use words::{Dimension, Figure, Level};

/// Pages that are read of an answer.
const PAGES: usize = 10;

/// Steps of `reported` in one question, at most.
const STEPS: i64 = 5_000;

/// Somebody who answers questions in GraphQL.
pub trait Ask {
    /// The data of the answer.
    fn ask(&mut self, query: &str, variables: Value) -> impl Future<Output = Result<Value>>;
}

/// Asks the collector of a cluster, or one at an address, and writes what it says.
///
/// # Errors
/// It cannot be reached or asked.
pub async fn run(connection: &Connection, how: &Usage) -> Result<String> {
    ensure!(
        how.filter.accounts.is_empty() || (connection.namespace.is_none() && !connection.all_namespaces),
        "--account takes the place of -n and -A: say one of them"
    );
    let place = Place::of(connection).await;
    let question = Question::of(how, (!connection.all_namespaces).then_some(place.namespace.as_str()))?;
    let mut collector = Collector::reach(place, &how.way, &question.accounts).await?;
    usage(&mut collector, how, question).await?.write(how.output)
}

/// Asks.
///
/// # Errors
/// What is asked makes no sense, or there is no answer.
pub async fn usage(source: &mut impl Ask, how: &Usage, question: Question) -> Result<Answer> {
    let now = told::<NowTold>(source, NOW, json!({})).await?.now;
    let window = period::window(how.since, how.from, how.to, now).map_err(|error| anyhow!(error))?;
    let step = question::step(how, window)?;
    let mut notes = Vec::new();

    let all = pages(source, &question, window, None).await?;
    // What level suits is known by the answer, and steps are to be of the same.
    let (level, whole) = (all.level, coverage::whole(window, all.level));
    if all.cut {
        notes.push(format!("there are more than {} groups: only the highest were read", PAGES * PAGE));
    }
    let addresses = match addresses(source, &question).await {
        Ok(addresses) => addresses,
        Err(error) => {
            notes.push(format!("how full ports are, and who reported, is not known: {error:#}"));
            Vec::new()
        }
    };
    let (mut rows, left_out) = rows::groups(&question, &all.lines, &addresses);

    let stepped = match step {
        Some(step) => Some(pages(source, &question, window, Some(step)).await?),
        None => None,
    };
    let (level, whole) =
        stepped.as_ref().map_or((level, whole), |it| (it.level, coverage::whole(window, it.level)));
    let grain = step.unwrap_or_else(|| coverage::grain(whole, level, STEPS));
    let seen = reported(source, &question, &addresses, whole, grain, level).await;
    let (coverage, known) = match seen {
        Ok(seen) => {
            let (coverage, known) = Coverage::of(&seen, &question.nodes, whole, grain, level, now);
            (Some(coverage), known)
        }
        Err(error) => {
            notes.push(format!(
                "who reported is not known, so what is missing may be rest or silence: {error:#}"
            ));
            (None, Default::default())
        }
    };
    let refused = question.figures.iter().position(|it| *it == Figure::Refused);
    let refused = |line: &Line| refused.and_then(|at| line.figures.get(at)).is_some_and(|it| *it > 0.0);
    let asks = all.lines.iter().any(refused) && !question.by.contains(&Dimension::Reason);
    if let Some(stepped) = &stepped {
        if stepped.cut {
            notes.push(format!(
                "there are more than {} rows: those that come later are missing",
                PAGES * PAGE
            ));
        }
        rows = rows::over_time(rows, &stepped.lines, &known);
    }
    if asks {
        let why = pages(source, &question.refusals(), window, step).await?;
        rows::reasons(&mut rows, &why.lines);
        if why.cut {
            notes.push("there are too many reasons of refusals: some are not told".to_owned());
        }
    }
    Ok(Answer::of(Found { question, window: whole, step, level, rows, left_out, coverage, notes }))
}

/// All pages of an answer, as far as they are read.
struct Pages {
    level: Level,
    lines: Vec<Line>,
    cut: bool,
}

async fn pages(
    source: &mut impl Ask,
    question: &Question,
    window: (i64, i64),
    step: Option<i64>,
) -> Result<Pages> {
    let mut variables = question.usage(window, step);
    let mut all = Pages { level: Level::Tens, lines: Vec::new(), cut: false };
    for page in 1.. {
        let UsageTold { usage } = told(source, USAGE, variables.clone()).await?;
        all.level = Level::parse(&usage.level).with_context(|| {
            format!("the collector knows a level {:?}: it is newer than this program", usage.level)
        })?;
        all.lines.extend(usage.nodes);
        let Some(next) = usage.page_info.end_cursor.filter(|_| usage.page_info.has_next_page) else { break };
        if page == PAGES {
            all.cut = true;
            break;
        }
        variables["after"] = next.into();
    }
    Ok(all)
}

/// Addresses that are asked about, with who holds their slices.
async fn addresses(source: &mut impl Ask, question: &Question) -> Result<Vec<Address>> {
    let mut variables = json!({"accounts": question.accounts, "ranges": question.ranges, "first": ADDRESSES});
    let mut all: Vec<Address> = Vec::new();
    for _ in 0..PAGES {
        let ObjectsTold { addresses } = told(source, OBJECTS, variables.clone()).await?;
        let more = addresses.len() >= ADDRESSES;
        variables["after"] = addresses.last().map(|it| it.address.clone()).into();
        all.extend(addresses);
        if !more {
            break;
        }
    }
    all.retain(|it| question.allocation.as_ref().is_none_or(|name| *name == it.allocation));
    Ok(all)
}

/// Who reported, and how much of each step.
async fn reported(
    source: &mut impl Ask,
    question: &Question,
    addresses: &[Address],
    window: (i64, i64),
    step: i64,
    level: Level,
) -> Result<CoverageTold> {
    // Holders of the allocation's addresses, not of all that the account has.
    let ranges: Vec<&String> = match question.allocation {
        Some(_) => addresses.iter().map(|it| &it.address).collect(),
        None => question.ranges.iter().collect(),
    };
    if question.allocation.is_some() && ranges.is_empty() {
        return Ok(CoverageTold::default());
    }
    let variables = json!({
        "accounts": question.accounts, "ranges": ranges, "nodes": question.nodes, "level": level.schema(),
        "from": period::rfc3339(window.0), "to": period::rfc3339(window.1), "step": step,
    });
    told(source, COVERAGE, variables).await
}

async fn told<T: DeserializeOwned>(source: &mut impl Ask, query: &str, variables: Value) -> Result<T> {
    let data = source.ask(query, variables).await?;
    serde_json::from_value(data)
        .context("the collector answers otherwise than its schema says: is it of another version?")
}
