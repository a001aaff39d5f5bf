//! What a waiting report is called.

use crate::Boot;
use aegis_usage_report::Report;
use std::fmt;

/// Which report it is: also the name of its file, so that what waits is known without reading it. In the order in which they were made.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// Start of the agent that made it.
    pub boot: Boot,
    /// Its number.
    pub sequence: u64,
    /// End of its interval, in seconds since the Unix epoch.
    pub to: i64,
}

impl Name {
    /// End of the files' names. No other file of the folder is touched.
    pub const END: &'static str = ".report";

    /// Reads the name of a file; None if it is none of a report.
    pub fn parse(file: &str) -> Option<Name> {
        let (boot, rest) = file.strip_suffix(Name::END)?.split_once('.')?;
        let (sequence, to) = rest.split_once('.')?;
        let name = Name { boot: Boot::parse(boot)?, sequence: sequence.parse().ok()?, to: to.parse().ok()? };
        // Exactly one text for each.
        (name.to_string() == file).then_some(name)
    }

    /// Whether this is the name of a report.
    pub fn is_of(&self, report: &Report) -> bool {
        (report.sequence, report.to) == (self.sequence, self.to) && report.boot == self.boot.to_string()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:010}.{}{}", self.boot, self.sequence, self.to, Name::END)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_one_name() {
        let name = Name { boot: Boot::new(1_764_484_043_123, 0x0f86_d081), sequence: 42, to: 1_764_484_050 };
        let text = "00001764484043123-0f86d081.0000000042.1764484050.report";
        assert_eq!((name.to_string().as_str(), Name::parse(text)), (text, Some(name)));
        for other in [
            "report",
            "00001764484043123-0f86d081.0000000042.1764484050",
            "00001764484043123-0f86d081.0000000042.1764484050.report.new",
            "1764484043123-0f86d081.0000000042.1764484050.report",
            "00001764484043123-0F86D081.0000000042.1764484050.report",
            "00001764484043123-0f86d081.42.1764484050.report",
            "00001764484043123-0f86d081.0000000042.+1764484050.report",
        ] {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }
}
