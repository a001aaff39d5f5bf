//! Clocks that jump. All nodes of the lab have the machine's, so only who runs the tests may say whether it is set.

use anyhow::Context;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// The machine's clock is ahead. It is set back when this is dropped.
pub struct Ahead(i64);

impl Ahead {
    /// Lets it jump by as many seconds as `AEGIS_CLOCK` says; not at all without.
    pub fn if_allowed() -> anyhow::Result<Option<Self>> {
        let Ok(seconds) = std::env::var("AEGIS_CLOCK") else { return Ok(None) };
        let seconds = seconds.parse().context("AEGIS_CLOCK")?;
        jump(seconds)?;
        Ok(Some(Self(seconds)))
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let _ = jump(-self.0);
    }
}

fn jump(seconds: i64) -> nix::Result<()> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(now.tv_sec() + seconds, now.tv_nsec()))
}
