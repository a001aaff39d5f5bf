//! Windows of time, and steps in them.

use k8s_openapi::jiff::Timestamp;

/// Reports of the last moments may still be on their way: a window that ends now ends so many seconds before.
pub const LAG: i64 = 20;

/// Detail of what agents report, in seconds.
pub const SLOT: i64 = 10;

/// Lengths of steps that are chosen, in seconds.
const STEPS: [i64; 14] =
    [10, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 10_800, 21_600, 43_200, 86_400, 604_800];

/// Steps of a window that are chosen, at most.
const FEW: i64 = 48;

/// A length as `1h30m`, in seconds.
pub fn length(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is no length: say 90s, 15m, 24h, 1h30m or 7d");
    let mut rest = text;
    let mut all: i64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|it: char| !it.is_ascii_digit()).ok_or_else(wrong)?;
        let count: i64 = rest[..digits].parse().map_err(|_| wrong())?;
        let mut after = rest[digits..].chars();
        let unit = match after.next() {
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3_600,
            Some('d') => 86_400,
            Some('w') => 604_800,
            _ => return Err(wrong()),
        };
        all = count.checked_mul(unit).and_then(|it| it.checked_add(all)).ok_or_else(wrong)?;
        rest = after.as_str();
    }
    if all > 0 { Ok(all) } else { Err(wrong()) }
}

/// A moment in RFC 3339, in seconds since the Unix epoch.
pub fn moment(text: &str) -> Result<i64, String> {
    let read = text.parse::<Timestamp>().map(|it| it.as_second());
    read.map_err(|_| format!("{text:?} is no time: say 2026-01-31T12:00:00Z"))
}

/// The same as text.
pub fn rfc3339(at: i64) -> String {
    Timestamp::from_second(at).map_or_else(|_| at.to_string(), |it| it.to_string())
}

/// A length as text.
pub fn words(seconds: i64) -> String {
    let mut text = String::new();
    let mut rest = seconds;
    for (unit, name) in [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")] {
        if rest >= unit {
            text.push_str(&format!("{}{name}", rest / unit));
            rest %= unit;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

/// Begin and end of the window that is asked for, `now` being the collector's time.
pub fn window(since: i64, from: Option<i64>, to: Option<i64>, now: i64) -> Result<(i64, i64), String> {
    let end = to.unwrap_or_else(|| (now - LAG).div_euclid(SLOT) * SLOT);
    let begin = from.unwrap_or(end - since);
    if begin < end {
        return Ok((begin, end));
    }
    let (begin, end) = (rfc3339(begin), rfc3339(end));
    Err(format!("the window begins at {begin} and ends at {end}: it must end later than it begins"))
}

/// A step that makes a few rows of a window. Up to a day it is shorter than an hour: hours are there an hour late.
pub fn step(window: i64) -> i64 {
    let few = STEPS.into_iter().find(|step| window / step <= FEW);
    let step = few.unwrap_or(STEPS[STEPS.len() - 1]);
    if window <= 86_400 { step.min(1_800) } else { step.max(3_600) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_moments() {
        for (text, seconds) in
            [("90s", 90), ("15m", 900), ("1h30m", 5_400), ("7d", 604_800), ("2w", 1_209_600)]
        {
            assert_eq!(length(text), Ok(seconds));
        }
        assert_eq!((words(5_400), words(604_800), words(0)), ("1h30m".into(), "7d".into(), "0s".into()));
        for wrong in
            ["", "5", "h", "0s", "1y", "-5m", "1.5h", "99999999999999999999s", "9223372036854775807w"]
        {
            assert!(length(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(moment("2026-01-01T00:00:00Z"), Ok(1_767_225_600));
        assert_eq!(moment("2026-01-01T01:00:00+01:00"), Ok(1_767_225_600));
        assert!(moment("yesterday").is_err() && moment("2026-01-01").is_err());
    }

    #[test]
    fn a_window_ends_where_all_has_come() {
        assert_eq!(window(3_600, None, None, 1_000_005), Ok((996_380, 999_980)));
        assert_eq!(window(3_600, None, Some(7_200), 1_000_000), Ok((3_600, 7_200)));
        assert_eq!(window(3_600, Some(10), Some(20), 1_000_000), Ok((10, 20)));
        assert_eq!(window(3_600, Some(10), None, 1_000_005), Ok((10, 999_980)));
        assert!(window(3_600, Some(20), Some(20), 0).is_err_and(|it| it.contains("must end later")));
    }

    #[test]
    fn steps_are_few() {
        for (window, expected) in
            [(600, 30), (3_600, 120), (86_400, 1_800), (7 * 86_400, 21_600), (400 * 86_400, 604_800)]
        {
            assert_eq!(step(window), expected, "{window}");
        }
        // Beyond a day minutes may be gone.
        assert_eq!(step(90_000), 3_600);
    }
}
