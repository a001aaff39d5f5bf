//! From what somebody typed to what the collector is asked.

use super::period;
use super::words::{Dimension, Figure, Level, Sort};
use crate::args::{Usage, UsageForm};
use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

/// Accounts that a question may name.
const ACCOUNTS: usize = 20;

/// Steps of a question, at most.
const STEPS: i64 = 5_000;

/// Rows of a page, at most.
pub const PAGE: usize = 1_000;

/// Objects of a page.
pub const ADDRESSES: usize = 500;

/// What was in use.
pub const USAGE: &str = "query($from: Time!, $to: Time!, $step: Int, $level: Level, $filter: Filter!, $by: [Dimension!]!, $figures: [Figure!]!,
    $order: Order!, $first: Int!, $after: String) {
  usage(from: $from, to: $to, step: $step, level: $level, filter: $filter, by: $by, figures: $figures, order: $order, first: $first, after: $after) {
    level nodes { by at slots figures } pageInfo { hasNextPage endCursor } } }";

/// What there is to use.
pub const OBJECTS: &str = "query($accounts: [String!]!, $ranges: [String!]!, $after: String, $first: Int!) {
  addresses(accounts: $accounts, ranges: $ranges, first: $first, after: $after) {
    address account allocation first last holders { node site held draining } } }";

/// Who reported, and when.
pub const COVERAGE: &str = "query($accounts: [String!]!, $ranges: [String!]!, $nodes: [String!]!, $level: Level!, $from: Time!, $to: Time!, $step: Int!) {
  reports(accounts: $accounts, ranges: $ranges) { node last }
  reported(accounts: $accounts, ranges: $ranges, nodes: $nodes, level: $level, from: $from, to: $to, step: $step) { at nodes seconds } }";

/// The collector's time.
pub const NOW: &str = "{ now }";

/// A question.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Accounts; empty: all that whoever asks may see.
    pub accounts: Vec<String>,
    /// Only this allocation of them.
    pub allocation: Option<String>,
    /// What counts, as in the schema.
    pub filter: Value,
    /// Egress addresses or ranges of them.
    pub ranges: Vec<String>,
    /// Nodes.
    pub nodes: Vec<String>,
    /// What is told apart.
    pub by: Vec<Dimension>,
    /// What is asked; the first one sorts.
    pub figures: Vec<Figure>,
    /// Those of them that are shown, in their order.
    pub shown: Vec<Figure>,
    /// What comes first.
    pub sort: Sort,
    /// Detail of the figures.
    pub level: Option<Level>,
    /// Groups to show.
    pub limit: usize,
}

impl Question {
    /// By what was typed. `namespace` is the one that counts where nothing else is said; none: all.
    pub fn of(how: &Usage, namespace: Option<&str>) -> Result<Question> {
        let filter = &how.filter;
        let mut accounts = filter.accounts.clone();
        if accounts.is_empty() {
            accounts.extend(namespace.map(str::to_owned));
        }
        let allocation = match how.allocation.as_deref().map(|it| it.split_once('/').ok_or(it)) {
            Some(Ok((account, name))) => {
                ensure!(
                    filter.accounts.is_empty() || filter.accounts == [account],
                    "{account}/{name} is of another account than --account says"
                );
                accounts = vec![account.to_owned()];
                Some(name.to_owned())
            }
            Some(Err(name)) => Some(name.to_owned()),
            None => None,
        };
        ensure!(accounts.len() <= ACCOUNTS, "--account names more than {ACCOUNTS}: say -A, or ask in parts");
        if let Some(rule) = filter.rules.iter().find(|it| !it.contains('/')) {
            bail!("--rule {rule}: say binding/{rule} or policy/{rule}");
        }
        let by = dimensions(how, accounts.len() != 1);
        if let Some(twice) = by.iter().enumerate().find(|(at, it)| by[..*at].contains(it)) {
            bail!("--by names {} twice", twice.1.name());
        }
        let shown = match (how.figures.as_slice(), how.output) {
            ([], UsageForm::Table) => Figure::FEW.to_vec(),
            ([], _) => Figure::MANY.to_vec(),
            (named, _) => named.to_vec(),
        };
        let mut figures = vec![how.sort.figure()];
        for figure in shown.iter().copied().chain([Figure::Refused]) {
            if !figures.contains(&figure) {
                figures.push(figure);
            }
        }
        let protocols: Vec<&str> = filter.protocols.iter().map(|it| it.schema()).collect();
        let allocations: Vec<&String> = allocation.iter().collect();
        let counts = json!({
            "accounts": accounts, "allocations": allocations, "addresses": filter.addresses, "rules": filter.rules,
            "sites": filter.sites, "nodes": filter.nodes, "origins": filter.origins, "protocols": protocols,
            "pods": filter.pods, "reasons": filter.reasons,
        });
        Ok(Question {
            accounts,
            allocation,
            filter: counts,
            ranges: filter.addresses.clone(),
            nodes: filter.nodes.clone(),
            by,
            figures,
            shown,
            sort: how.sort,
            level: how.level,
            limit: how.limit.max(1),
        })
    }

    /// Variables of [`USAGE`].
    pub fn usage(&self, window: (i64, i64), step: Option<i64>) -> Value {
        let by: Vec<String> = self.by.iter().map(|it| it.schema()).collect();
        let figures: Vec<Value> = self.figures.iter().map(|it| it.schema()).collect();
        json!({
            "from": period::rfc3339(window.0), "to": period::rfc3339(window.1), "step": step,
            "level": self.level.map(Level::schema), "filter": self.filter, "by": by, "figures": figures,
            "order": if step.is_some() { "GROUP" } else { "HIGHEST" }, "first": PAGE,
        })
    }

    /// The same, asking for nothing but refusals, with the reason as the last that is told apart.
    pub fn refusals(&self) -> Question {
        let mut question = self.clone();
        question.by.push(Dimension::Reason);
        question.figures = vec![Figure::Refused];
        question
    }
}

/// What is told apart where nothing is said: whose ports are used towards where, which is what they can be too few for.
fn dimensions(how: &Usage, many: bool) -> Vec<Dimension> {
    if how.total {
        return Vec::new();
    }
    if !how.by.is_empty() {
        return how.by.clone();
    }
    let account = many.then_some(Dimension::Account);
    let rest = [Dimension::Allocation, Dimension::Address, Dimension::Origin, Dimension::Protocol];
    account.into_iter().chain(rest).collect()
}

/// The step to ask for, if time is told apart.
pub fn step(how: &Usage, window: (i64, i64)) -> Result<Option<i64>> {
    let length = window.1 - window.0;
    let Some(step) = how.step.or_else(|| how.over_time.then(|| period::step(length))) else {
        return Ok(None);
    };
    let resolution = how.level.map_or(period::SLOT, Level::resolution);
    ensure!(
        step % resolution == 0,
        "--step {}: a step is a multiple of {}",
        period::words(step),
        period::words(resolution)
    );
    ensure!(
        length / step <= STEPS,
        "--step {}: the window has {} steps, more than {STEPS}: say a longer one",
        period::words(step),
        length / step
    );
    Ok(Some(step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use crate::args::Command;
    use clap::Parser;

    fn parsed(words: &[&str]) -> Usage {
        match Args::try_parse_from(["kubectl-aegis", "usage"].iter().chain(words)).map(|it| it.command) {
            Ok(Command::Usage(how)) => *how,
            other => panic!("{other:?}"),
        }
    }

    fn of(words: &[&str]) -> Question {
        Question::of(&parsed(words), Some("shop")).unwrap()
    }

    #[test]
    fn the_namespace_counts_unless_something_else_is_said() {
        let plain = of(&[]);
        assert_eq!((plain.accounts, plain.allocation), (vec!["shop".to_owned()], None));
        assert_eq!(plain.filter["accounts"], json!(["shop"]));
        let names: Vec<&str> = plain.by.iter().map(|it| it.name()).collect();
        assert_eq!(names, ["allocation", "address", "origin", "protocol"]);
        let all = Question::of(&parsed(&[]), None).unwrap();
        assert_eq!((all.filter["accounts"].clone(), all.by[0]), (json!([]), Dimension::Account));
        let other = of(&["bank/vault"]);
        assert_eq!((other.accounts, other.allocation.as_deref()), (vec!["bank".to_owned()], Some("vault")));
        assert_eq!(of(&["vault", "--account", "a,b"]).accounts, ["a", "b"]);
        assert!(Question::of(&parsed(&["bank/vault", "--account", "shop"]), None).is_err());
        let rule = Question::of(&parsed(&["--rule", "web"]), None).unwrap_err().to_string();
        assert_eq!(rule, "--rule web: say binding/web or policy/web");
        let twice = Question::of(&parsed(&["--by", "node,node"]), None).unwrap_err().to_string();
        assert_eq!(twice, "--by names node twice");
    }

    #[test]
    fn variables_are_those_of_the_schema() {
        let question = of(&[
            "partners",
            "--by",
            "node,reason",
            "--protocol",
            "tcp,udp",
            "--origin",
            "198.51.100.7:443,other",
            "--sort",
            "sent",
            "--figures",
            "in-use-p95",
            "--level",
            "minutes",
            "--pod",
            "web",
        ]);
        let variables = question.usage((0, 3_600), Some(60));
        assert_eq!(
            variables,
            json!({
                "from": "1970-01-01T00:00:00Z", "to": "1970-01-01T01:00:00Z", "step": 60, "level": "MINUTES",
                "filter": {
                    "accounts": ["shop"], "allocations": ["partners"], "addresses": [], "rules": [], "sites": [], "nodes": [],
                    "origins": ["198.51.100.7:443", "other"], "protocols": ["TCP", "UDP"], "pods": ["web"], "reasons": [],
                },
                "by": ["NODE", "REASON"],
                // What sorts is the first, and refusals are always there, since their reasons are asked for where there are some.
                "figures": [
                    {"measure": "SENT_BYTES", "aggregation": "SUM"},
                    {"measure": "IN_USE", "aggregation": "QUANTILE", "thousandths": 950},
                    {"measure": "REFUSED", "aggregation": "SUM"},
                ],
                "order": "GROUP", "first": 1000,
            })
        );
        assert_eq!(question.usage((0, 60), None)["order"], "HIGHEST");
        let refusals = of(&["--by", "node"]).refusals();
        assert_eq!(
            (refusals.by, refusals.figures),
            (vec![Dimension::Node, Dimension::Reason], vec![Figure::Refused])
        );
        // All that one may ask for is not more than the collector takes.
        assert!(of(&["-o", "wide"]).figures.len() < 12);
    }

    #[test]
    fn steps_fit() {
        let step = |words: &[&str]| step(&parsed(words), (0, 3_600)).map_err(|error| error.to_string());
        assert_eq!(step(&[]), Ok(None));
        assert_eq!(step(&["--over-time"]), Ok(Some(120)));
        assert_eq!(step(&["--step", "5m"]), Ok(Some(300)));
        assert_eq!(step(&["--step", "15s"]), Err("--step 15s: a step is a multiple of 10s".into()));
        assert_eq!(
            step(&["--step", "90s", "--level", "minutes"]),
            Err("--step 1m30s: a step is a multiple of 1m".into())
        );
    }
}
