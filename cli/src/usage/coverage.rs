//! What was reported of a window, so that nobody takes silence for rest.

use super::period;
use super::told::{CoverageTold, NodeReport};
use super::words::Level;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;

/// A node that reported nothing for so many seconds before the window's end is silent.
const SILENT: i64 = 60;

/// How much of a window was reported by the nodes that hold slices now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Coverage {
    /// How many these are.
    pub nodes: usize,
    /// Seconds that they reported, of all together.
    pub reported_seconds: i64,
    /// Seconds that there are to report.
    pub wanted_seconds: i64,
    /// Of these nobody reported anything.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<Span>,
    /// What begins here or later is not all there yet.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "maybe_moment")]
    pub not_yet: Option<i64>,
    /// Nodes that did not report up to the window's end.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<Silent>,
}

/// A part of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Span {
    /// Its begin.
    #[serde(serialize_with = "moment")]
    pub from: i64,
    /// Its end.
    #[serde(serialize_with = "moment")]
    pub to: i64,
}

/// A node that does not report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Silent {
    /// Its name.
    pub node: String,
    /// End of what it reported last, within the last 30 days.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "maybe_moment")]
    pub last: Option<i64>,
}

/// What is known of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// So many percent of it were reported, and more than nothing.
    Part(i64),
    /// It is too early to say.
    NotYet,
    /// Nobody reported anything.
    Nothing,
}

/// A moment as JSON has it.
pub fn moment<S: Serializer>(at: &i64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&period::rfc3339(*at))
}

/// The same of one that may be missing.
pub fn maybe_moment<S: Serializer>(at: &Option<i64>, to: S) -> Result<S::Ok, S::Error> {
    at.map(period::rfc3339).serialize(to)
}

/// The window in whole slots of a level: a slot that it begins or ends in counts whole.
pub fn whole(window: (i64, i64), level: Level) -> (i64, i64) {
    let slot = level.resolution();
    (window.0.div_euclid(slot) * slot, (window.1 + slot - 1).div_euclid(slot) * slot)
}

/// Begins of the steps of a window: multiples of their length.
pub fn steps(window: (i64, i64), step: i64) -> impl Iterator<Item = i64> {
    let first = window.0.div_euclid(step) * step;
    (0..).map(move |number| first + number * step).take_while(move |at| *at < window.1)
}

/// A step of `reported` for a window: the level's, unless these were too many.
pub fn grain(window: (i64, i64), level: Level, most: i64) -> i64 {
    let slots = (window.1 - window.0) / level.resolution();
    level.resolution() * (slots / most + 1)
}

impl Coverage {
    /// By what was told of steps of this length, with what is known of each.
    pub fn of(
        told: &CoverageTold,
        nodes: &[String],
        window: (i64, i64),
        step: i64,
        level: Level,
        now: i64,
    ) -> (Coverage, BTreeMap<i64, Known>) {
        let holders = told.reports.iter().filter(|it| nodes.is_empty() || nodes.contains(&it.node));
        let holders: Vec<&NodeReport> = holders.collect();
        let late = |it: &&&NodeReport| it.last.is_none_or(|last| last < window.1 - SILENT);
        let silent = holders.iter().filter(late);
        let mut all = Coverage {
            nodes: holders.len(),
            silent: silent.map(|it| Silent { node: it.node.clone(), last: it.last }).collect(),
            ..Coverage::default()
        };
        let count = i64::try_from(holders.len()).unwrap_or(i64::MAX);
        let seconds: BTreeMap<i64, i64> = told.reported.iter().map(|it| (it.at, it.seconds)).collect();
        let mut known = BTreeMap::new();
        for at in steps(window, step) {
            let (from, to) = (at.max(window.0), (at + step).min(window.1));
            let reported = seconds.get(&at).copied().filter(|it| *it > 0);
            if now < to + lateness(level) {
                all.not_yet = all.not_yet.or(Some(from));
                known.insert(at, Known::NotYet);
                continue;
            }
            let wanted = count.saturating_mul(to - from);
            all.wanted_seconds += wanted;
            all.reported_seconds += reported.unwrap_or(0).min(wanted);
            match reported {
                Some(seconds) => {
                    known.insert(at, Known::Part((seconds * 100 / wanted.max(1)).min(100)));
                }
                None => {
                    known.insert(at, Known::Nothing);
                    match all.unknown.last_mut().filter(|it| it.to == from) {
                        Some(before) => before.to = to,
                        None => all.unknown.push(Span { from, to }),
                    }
                }
            }
        }
        (all, known)
    }

    /// The share that was reported, in percent; none if nobody has anything to report.
    pub fn percent(&self) -> Option<f64> {
        (self.wanted_seconds > 0).then(|| self.reported_seconds as f64 * 100.0 / self.wanted_seconds as f64)
    }
}

/// After how many seconds what has ended is there.
fn lateness(level: Level) -> i64 {
    period::LAG
        + match level {
            Level::Tens => 0,
            Level::Minutes => 20,
            Level::Hours => 100,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::told::Step;

    fn told(last: [Option<i64>; 2], reported: &[(i64, i64)]) -> CoverageTold {
        let nodes = ["n1", "n2"].into_iter().zip(last);
        CoverageTold {
            reports: nodes.map(|(node, last)| NodeReport { node: node.into(), last }).collect(),
            reported: reported.iter().map(|(at, seconds)| Step { at: *at, seconds: *seconds }).collect(),
        }
    }

    #[test]
    fn what_nobody_reported_is_not_known() {
        let told = told([Some(60), Some(60)], &[(0, 20), (10, 10), (40, 20), (50, 20)]);
        let (all, known) = Coverage::of(&told, &[], (0, 60), 10, Level::Tens, 1_000);
        assert_eq!((all.nodes, all.reported_seconds, all.wanted_seconds), (2, 70, 120));
        assert_eq!(all.unknown, [Span { from: 20, to: 40 }]);
        assert_eq!((all.percent().map(f64::floor), all.not_yet, all.silent.len()), (Some(58.0), None, 0));
        let expected = [
            (0, Known::Part(100)),
            (10, Known::Part(50)),
            (20, Known::Nothing),
            (30, Known::Nothing),
            (40, Known::Part(100)),
            (50, Known::Part(100)),
        ];
        assert_eq!(known.into_iter().collect::<Vec<_>>(), expected);
        // Of one node alone.
        let (one, _) = Coverage::of(&told, &["n2".into()], (0, 60), 10, Level::Tens, 1_000);
        assert_eq!((one.nodes, one.wanted_seconds), (1, 60));
        assert_eq!(Coverage::of(&told, &["n3".into()], (0, 60), 10, Level::Tens, 1_000).0.percent(), None);
    }

    #[test]
    fn what_cannot_be_there_yet_is_no_silence() {
        let told = told([Some(120), None], &[(0, 120)]);
        let (all, known) = Coverage::of(&told, &[], (0, 180), 60, Level::Minutes, 159);
        assert_eq!((all.not_yet, all.unknown.len(), all.wanted_seconds), (Some(60), 0, 120));
        assert_eq!(known[&60], Known::NotYet);
        let (all, _) = Coverage::of(&told, &[], (0, 180), 60, Level::Minutes, 160);
        assert_eq!((all.not_yet, all.unknown), (Some(120), vec![Span { from: 60, to: 120 }]));
        // A node without a report, and one that has not come to the window's end for a while.
        assert_eq!(all.silent, [Silent { node: "n2".into(), last: None }]);
        let (all, _) = Coverage::of(&told, &[], (0, 190), 10, Level::Tens, 1_000);
        assert_eq!(all.silent.len(), 2);
    }

    #[test]
    fn windows_are_whole_and_steps_multiples() {
        assert_eq!(whole((65, 125), Level::Minutes), (60, 180));
        assert_eq!(whole((60, 120), Level::Minutes), (60, 120));
        assert_eq!(steps((65, 185), 60).collect::<Vec<_>>(), [60, 120, 180]);
        assert_eq!(grain((0, 3_600), Level::Tens, 5_000), 10);
        let wide = (0, 200_000);
        let step = grain(wide, Level::Tens, 5_000);
        assert!(step % 10 == 0 && (wide.1 - wide.0) / step <= 5_000, "{step}");
    }
}
