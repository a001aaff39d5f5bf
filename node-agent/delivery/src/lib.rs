//! From the finished rows of a report to the collector's answer: reports wait in a bounded folder until the collector has them.
//!
//! | to change | look in |
//! |---|---|
//! | what whoever counts calls | [`Reporter`] |
//! | what waits, what goes when there is no room, what goes next | [`Queue`], pure |
//! | how it is kept on the disk, and in memory when that fails | [`Backlog`] |
//! | when something is sent, and how much | [`Pace`], pure |
//! | what the collector's answers mean | [`Answer`], pure |
//! | how it is sent: token, authority, time limits | [`Client`] |
//! | how these come together | [`Delivery`] |
//! | what metrics say | [`Counters`] |
//!
//! Why so: `docs/decisions/0046-delivery.md`.
#![forbid(unsafe_code)]

mod answer;
mod backlog;
mod boot;
mod client;
mod counters;
mod deliver;
mod folder;
mod name;
mod pace;
mod queue;
mod random;
mod reporter;

pub use answer::{Answer, Told};
pub use backlog::{Backlog, Batch};
pub use boot::Boot;
pub use client::{Client, ClientError, Collector, UrlError, Wait};
pub use counters::{Counters, Loss, Outcome};
pub use deliver::{Clock, Delivery, Settings};
pub use name::Name;
pub use pace::{Pace, Timing};
pub use queue::{Bounds, Place, Queue};
pub use reporter::Reporter;

/// The time, in seconds since the Unix epoch.
pub fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    // A clock before 1970 is none.
    since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}
