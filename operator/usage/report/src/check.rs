//! What a report must look like to be taken.

use crate::{Figures, Key, Report, Row, VERSION};
use thiserror::Error;

/// Most rows of a report.
pub const MAX_ROWS: usize = 5_000;

/// Most bytes of a name.
pub const MAX_NAME: usize = 253;

/// Longest interval, in seconds.
pub const MAX_INTERVAL: i64 = 3_600;

/// Most reasons of refusals in a row. The data plane knows fewer.
pub const MAX_REASONS: usize = 64;

/// Greatest number of ports, in all rows together: more flows than the tables of a node have room for.
pub const MAX_GAUGE: u64 = 1 << 24;

/// Greatest number of anything else, in all rows together: more bytes than a node sends in an hour. Sums of many reports fit into 64 bits.
pub const MAX_COUNT: u64 = 1 << 44;

/// What is counted, and how much of it there is at most.
const NUMBERS: [(&str, u64); 8] = [
    (PEAK, MAX_GAUGE),
    ("inUse", MAX_GAUGE),
    ("flows", MAX_COUNT),
    ("refused", MAX_COUNT),
    ("sent.packets", MAX_COUNT),
    ("sent.bytes", MAX_COUNT),
    ("received.packets", MAX_COUNT),
    ("received.bytes", MAX_COUNT),
];

const PEAK: &str = "peak";

/// Why a report is not taken. Sent again it would not be, either.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Invalid {
    /// Written by a newer agent.
    #[error("reports of version {0} are not known here, only up to {VERSION}: update the collector first")]
    Version(u8),
    /// No interval, or too long a one.
    #[error("the interval from {from} to {to} has not 1 to {MAX_INTERVAL} seconds, or is before 1970")]
    Interval {
        /// Its begin.
        from: i64,
        /// Its end.
        to: i64,
    },
    /// A sequence number that no agent gets to.
    #[error("the sequence number {0} is out of range")]
    Sequence(u64),
    /// Too many rows.
    #[error("{0} rows are more than {MAX_ROWS}")]
    Rows(usize),
    /// Too many reasons of refusals in a row.
    #[error("{0} reasons in a row are more than {MAX_REASONS}")]
    Reasons(usize),
    /// Too many reports of one slot of 10 seconds.
    #[error("the node has reported too often in these 10 seconds")]
    Crowded,
    /// A name that is missing, too long, or has control characters.
    #[error("{field} is missing, longer than {MAX_NAME} bytes, or has control characters")]
    Name {
        /// Field that has it.
        field: &'static str,
    },
    /// A number that no node gets to.
    #[error("{field} is {value}, which no node gets to")]
    Number {
        /// Field that has it.
        field: &'static str,
        /// What it is.
        value: u64,
    },
}

impl Report {
    /// Whether a collector can take it.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), Invalid> {
        if self.version == 0 || self.version > VERSION {
            return Err(Invalid::Version(self.version));
        }
        let longest = self.from.checked_add(MAX_INTERVAL).is_none_or(|last| self.to > last);
        if self.from < 0 || self.to <= self.from || longest {
            return Err(Invalid::Interval { from: self.from, to: self.to });
        }
        if i64::try_from(self.sequence).is_err() {
            return Err(Invalid::Sequence(self.sequence));
        }
        if self.rows.len() > MAX_ROWS {
            return Err(Invalid::Rows(self.rows.len()));
        }
        required("node", &self.node)?;
        required("boot", &self.boot)?;
        let mut sums = [0u64; NUMBERS.len()];
        for Row { key, figures } in &self.rows {
            key.check()?;
            figures.check()?;
            for (sum, number) in sums.iter_mut().zip(figures.numbers()) {
                *sum = sum.saturating_add(number);
            }
        }
        // Each was at a moment of its own.
        let together = |(field, _): &(&str, u64)| *field != PEAK;
        within(NUMBERS.into_iter().zip(sums).filter(|(number, _)| together(number)))
    }
}

fn within(mut numbers: impl Iterator<Item = ((&'static str, u64), u64)>) -> Result<(), Invalid> {
    let wrong = numbers.find(|((_, most), value)| value > most);
    wrong.map_or(Ok(()), |((field, _), value)| Err(Invalid::Number { field, value }))
}

impl Key {
    fn check(&self) -> Result<(), Invalid> {
        name("rule", &self.rule)?;
        name("account", &self.account)?;
        name("allocation", &self.allocation)?;
        name("site", &self.site)?;
        name("pod", &self.pod)
    }
}

impl Figures {
    fn check(&self) -> Result<(), Invalid> {
        if self.refused.len() > MAX_REASONS {
            return Err(Invalid::Reasons(self.refused.len()));
        }
        within(NUMBERS.into_iter().zip(self.numbers()))?;
        self.refused.keys().try_for_each(|reason| required("refused", reason))
    }

    /// In the order of [`NUMBERS`].
    fn numbers(&self) -> [u64; NUMBERS.len()] {
        let Figures { in_use, peak, flows, refused, sent, received } = self;
        let refused = refused.values().fold(0u64, |sum, count| sum.saturating_add(*count));
        [*peak, *in_use, *flows, refused, sent.packets, sent.bytes, received.packets, received.bytes]
    }
}

fn required(field: &'static str, text: &str) -> Result<(), Invalid> {
    if text.is_empty() { Err(Invalid::Name { field }) } else { name(field, text) }
}

fn name(field: &'static str, text: &str) -> Result<(), Invalid> {
    let fits = text.len() <= MAX_NAME && !text.contains(char::is_control);
    if fits { Ok(()) } else { Err(Invalid::Name { field }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Protocol, Volume};
    use std::collections::BTreeMap;

    fn report() -> Report {
        let key = Key {
            address: Some([192, 0, 2, 1].into()),
            origin: Some(([198, 51, 100, 7], 443).into()),
            protocol: Protocol::Tcp,
            rule: "binding/partner".into(),
            account: "shop".into(),
            allocation: "partner".into(),
            ..Key::default()
        };
        let figures = Figures {
            in_use: 3,
            peak: 5,
            flows: 4,
            refused: BTreeMap::from([("no_port".into(), 1)]),
            sent: Volume { packets: 10, bytes: 900 },
            received: Volume::default(),
        };
        let rows = vec![Row { key, figures }];
        Report {
            version: VERSION,
            node: "node-a".into(),
            boot: "b1".into(),
            sequence: 7,
            from: 100,
            to: 110,
            rows,
        }
    }

    #[test]
    fn is_read_as_written() {
        let text = r#"{"version":1,"node":"node-a","boot":"b1","sequence":7,"from":100,"to":110,"rows":[{"key":{"address":"192.0.2.1",
            "origin":"198.51.100.7:443","protocol":"tcp","rule":"binding/partner","account":"shop","allocation":"partner"},"figures":
            {"inUse":3,"peak":5,"flows":4,"refused":{"no_port":1},"sent":{"packets":10,"bytes":900},"future":1}}]}"#;
        let read: Report = serde_json::from_str(text).unwrap();
        assert_eq!(read, report());
        let again: Report = serde_json::from_str(&serde_json::to_string(&read).unwrap()).unwrap();
        assert_eq!(again, read);
        assert_eq!(read.check(), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        type Edit = fn(&mut Report);
        let cases: [(Edit, Invalid); 11] = [
            (|it| it.version = 2, Invalid::Version(2)),
            (|it| it.to = 100, Invalid::Interval { from: 100, to: 100 }),
            (|it| it.to = 3_701, Invalid::Interval { from: 100, to: 3_701 }),
            (|it| it.from = i64::MAX, Invalid::Interval { from: i64::MAX, to: 110 }),
            (|it| it.sequence = u64::MAX, Invalid::Sequence(u64::MAX)),
            (|it| it.node.clear(), Invalid::Name { field: "node" }),
            (|it| it.boot = "a\0b".into(), Invalid::Name { field: "boot" }),
            (|it| it.rows[0].key.pod = "x".repeat(254), Invalid::Name { field: "pod" }),
            (
                |it| it.rows[0].figures.peak = MAX_GAUGE + 1,
                Invalid::Number { field: "peak", value: MAX_GAUGE + 1 },
            ),
            (|it| it.rows = vec![it.rows[0].clone(); MAX_ROWS + 1], Invalid::Rows(MAX_ROWS + 1)),
            (
                |it| it.rows[0].figures.refused = (0..65).map(|it| (format!("r{it}"), 1)).collect(),
                Invalid::Reasons(65),
            ),
        ];
        for (edit, wrong) in cases {
            let mut report = report();
            edit(&mut report);
            assert_eq!(report.check(), Err(wrong));
        }
    }

    /// What each row may say all of them together may, but for peaks.
    #[test]
    fn rows_together_are_bounded() {
        type Edit = fn(&mut Figures);
        let half: [(Edit, &str, u64); 4] = [
            (|it| it.in_use = MAX_GAUGE / 2 + 1, "inUse", MAX_GAUGE + 2),
            (|it| it.flows = MAX_COUNT / 2 + 1, "flows", MAX_COUNT + 2),
            (|it| it.received.bytes = MAX_COUNT / 2 + 1, "received.bytes", MAX_COUNT + 2),
            (
                |it| it.refused = [("a".into(), MAX_COUNT / 4 + 1), ("b".into(), MAX_COUNT / 4)].into(),
                "refused",
                MAX_COUNT + 2,
            ),
        ];
        let twice = |edit: Edit| {
            let mut report = report();
            report.rows[0].figures = Figures::default();
            edit(&mut report.rows[0].figures);
            assert_eq!(report.check(), Ok(()));
            report.rows.push(report.rows[0].clone());
            report.check()
        };
        for (edit, field, value) in half {
            assert_eq!(twice(edit), Err(Invalid::Number { field, value }));
        }
        assert_eq!(twice(|it| it.peak = MAX_GAUGE), Ok(()));
    }
}
