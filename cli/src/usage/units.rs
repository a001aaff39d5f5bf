//! Figures as people read them.

/// `12345`, `1.23M`; a mean below ten keeps a digit.
pub fn count(value: f64) -> String {
    if value < 10.0 && value.fract() != 0.0 {
        // What is there is not told as nothing.
        return if value < 0.05 { "<0.1".to_owned() } else { format!("{value:.1}") };
    }
    if value < 99_999.5 { format!("{value:.0}") } else { scaled(value, ["k", "M", "G", "T", "P"]) }
}

/// `1.23 GB`, by thousands.
pub fn bytes(value: f64) -> String {
    if value < 999.5 { format!("{value:.0} B") } else { scaled(value, [" kB", " MB", " GB", " TB", " PB"]) }
}

/// Three digits that count, and the unit.
fn scaled(value: f64, units: [&str; 5]) -> String {
    let mut rest = value;
    let mut unit = "";
    for next in units {
        rest /= 1_000.0;
        unit = next;
        if rest < 999.5 {
            break;
        }
    }
    match rest {
        ..9.995 => format!("{rest:.2}{unit}"),
        ..99.95 => format!("{rest:.1}{unit}"),
        _ => format!("{rest:.0}{unit}"),
    }
}

/// A share in percent, rounded down, so that 100 % is all of it.
pub fn percent(share: f64) -> String {
    match share {
        0.0 => "0 %".to_owned(),
        ..1.0 => "<1 %".to_owned(),
        _ => format!("{} %", (share + 1e-9).floor()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_never_nothing_where_there_is_something() {
        for (value, text) in [
            (0.0, "0"),
            (0.01, "<0.1"),
            (4.0, "4"),
            (4.25, "4.2"),
            (42.6, "43"),
            (64_512.0, "64512"),
            (99_999.0, "99999"),
            (99_999.6, "100k"),
            (1_234_567.0, "1.23M"),
            (1e21, "1000000P"),
        ] {
            assert_eq!(count(value), text);
        }
        for (value, text) in [
            (0.0, "0 B"),
            (999.0, "999 B"),
            (1_000.0, "1.00 kB"),
            (12_345.0, "12.3 kB"),
            (999_600.0, "1.00 MB"),
            (3.2e12, "3.20 TB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        assert_eq!([0.0, 0.4, 1.0, 99.99, 100.0].map(percent), ["0 %", "<1 %", "1 %", "99 %", "100 %"]);
    }
}
