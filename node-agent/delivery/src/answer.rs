//! What an answer means. Pure.

use crate::{Loss, Outcome};
use serde::Deserialize;
use std::time::Duration;

/// Most of an answer that goes into the log, in characters.
const SAID: usize = 200;

/// What the collector made of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has read it: what became of each report. None of them need come again.
    Taken(Vec<Told>),
    /// It does not understand what was sent, and will not understand it the next time.
    Refused(String),
    /// Another time.
    PutOff {
        /// Why, as it is counted.
        outcome: Outcome,
        /// How long the collector wants to be left alone.
        wait: Option<Duration>,
        /// What it said.
        said: String,
    },
}

/// What became of one report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// It is stored, or was already.
    Stored,
    /// It is not, and will not be.
    Lost(Loss, String),
}

#[derive(Deserialize)]
struct Line {
    outcome: String,
    #[serde(default)]
    reason: String,
}

impl Answer {
    /// What an answer to a delivery of so many reports means, of its status, header Retry-After and body.
    ///
    /// Only an answer that can have been given by somebody who has read the reports makes an end of them: a proxy in between, or an address
    /// where somebody else listens (404), does not.
    pub fn read(status: u16, retry_after: Option<&str>, body: &[u8], reports: usize) -> Answer {
        let put_off = |outcome| Answer::PutOff {
            outcome,
            // The other form, a date, needs clocks that agree.
            wait: retry_after.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs),
            said: format!("{status} {}", said(body)),
        };
        match status {
            200 => match serde_json::from_slice::<Vec<Line>>(body) {
                Ok(lines) if lines.len() == reports => Answer::Taken(lines.into_iter().map(told).collect()),
                _ => put_off(Outcome::Strange),
            },
            400 | 413 | 415 | 422 => Answer::Refused(format!("{status} {}", said(body))),
            401 | 403 => put_off(Outcome::Unauthorized),
            429 | 503 => put_off(Outcome::Busy),
            _ => put_off(Outcome::Strange),
        }
    }
}

fn told(line: Line) -> Told {
    match line.outcome.as_str() {
        "stored" | "repeated" => Told::Stored,
        "tooOld" => Told::Lost(Loss::Old, line.reason),
        "tooNew" => Told::Lost(Loss::New, line.reason),
        _ => Told::Lost(Loss::Invalid, line.reason),
    }
}

/// The beginning of an answer, on one line.
fn said(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(4 * SAID)]);
    text.trim().chars().take(SAID).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_has_read_a_report_makes_an_end_of_it() {
        let body =
            br#"[{"outcome":"stored"},{"outcome":"repeated"},{"outcome":"tooOld"},{"outcome":"tooNew"},
            {"outcome":"invalid","reason":"no"},{"outcome":"later than this agent"}]"#;
        let told = vec![
            Told::Stored,
            Told::Stored,
            Told::Lost(Loss::Old, String::new()),
            Told::Lost(Loss::New, String::new()),
            Told::Lost(Loss::Invalid, "no".into()),
            Told::Lost(Loss::Invalid, String::new()),
        ];
        assert_eq!(Answer::read(200, None, body, 6), Answer::Taken(told));
        let outcome = |status, body: &[u8]| match Answer::read(status, None, body, 1) {
            Answer::PutOff { outcome, .. } => Some(outcome),
            _ => None,
        };
        assert_eq!(outcome(200, body), Some(Outcome::Strange), "of another number of reports");
        assert_eq!(outcome(200, b"<html>sign in</html>"), Some(Outcome::Strange));
        for status in [204, 301, 404, 405, 408, 500, 502] {
            assert_eq!(outcome(status, b""), Some(Outcome::Strange), "{status}");
        }
        assert_eq!([outcome(401, b""), outcome(403, b"")], [Some(Outcome::Unauthorized); 2]);
        assert_eq!([outcome(429, b""), outcome(503, b"")], [Some(Outcome::Busy); 2]);
        for status in [400, 413, 415, 422] {
            assert!(
                matches!(Answer::read(status, None, b"no\n", 1), Answer::Refused(said) if said.ends_with(" no"))
            );
        }
    }

    #[test]
    fn it_is_read_for_how_long_the_collector_wants_to_be_left_alone() {
        let wait = |text| match Answer::read(503, text, b"", 1) {
            Answer::PutOff { wait, .. } => wait,
            _ => None,
        };
        assert_eq!(wait(Some(" 5 ")), Some(Duration::from_secs(5)));
        for none in [None, Some("-1"), Some("soon"), Some("Wed, 21 Oct 2026 07:28:00 GMT")] {
            assert_eq!(wait(none), None, "{none:?}");
        }
        let long = "x".repeat(5_000);
        let Answer::Refused(said) = Answer::read(400, None, long.as_bytes(), 1) else { panic!("refused") };
        assert_eq!(said.len(), 4 + SAID);
    }
}
