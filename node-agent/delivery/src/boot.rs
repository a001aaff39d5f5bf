//! One start of the agent.

use crate::random;
use std::fmt;

/// One start of the agent, as reports name it: `00001764484043123-9f86d081`, the time of the start in milliseconds since 1970 and a random
/// number, so that no two are the same even where the clock was set back. Later ones are greater.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Boot {
    started: u64,
    random: u32,
}

impl Boot {
    /// A start at a time, in milliseconds since 1970, with a random number.
    pub fn new(started: u64, random: u32) -> Boot {
        Boot { started, random }
    }

    /// The start that is now.
    pub fn now() -> Boot {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let started = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        Boot::new(started, (random::number() >> 32) as u32)
    }

    /// Reads one as it is written; None if the text is anything else.
    pub fn parse(text: &str) -> Option<Boot> {
        let (started, random) = text.split_once('-')?;
        let boot = Boot { started: started.parse().ok()?, random: u32::from_str_radix(random, 16).ok()? };
        (boot.to_string() == text).then_some(boot)
    }
}

impl fmt::Display for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:017}-{:08x}", self.started, self.random)
    }
}
