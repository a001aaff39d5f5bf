//! The file by which an agent knows what the one before has learned. It says no more than the data plane has.

use aegis_core::policy::names::{HostPattern, Learned, Patterns};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::Path;

/// An address may be believed for longer than the file says by so many seconds: a file is not written for each answer.
const STALE: i64 = 60;

/// What is in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    /// With whose they are.
    patterns: Vec<(String, BTreeSet<String>)>,
    nameless: BTreeSet<IpAddr>,
    /// Name, address, and until when it is believed.
    addresses: Vec<(String, IpAddr, i64)>,
}

impl Saved {
    pub fn of(patterns: &Patterns, nameless: &BTreeSet<IpAddr>, learned: &Learned) -> Saved {
        let entries = learned.entries().map(|(name, address, until)| (name.to_owned(), address, until));
        Saved {
            patterns: patterns.iter().map(|(it, owners)| (it.as_str().to_owned(), owners.clone())).collect(),
            nameless: nameless.clone(),
            addresses: entries.collect(),
        }
    }

    pub fn into_parts(self) -> (Patterns, BTreeSet<IpAddr>, Learned) {
        let patterns =
            self.patterns.into_iter().filter_map(|(it, owners)| Some((HostPattern::new(&it)?, owners)));
        let patterns = patterns.flat_map(|(it, owners)| owners.into_iter().map(move |own| (it.clone(), own)));
        (patterns.collect(), self.nameless, Learned::restore(self.addresses))
    }

    /// Whether a file that says this needs no other one.
    pub fn says_the_same(&self, other: &Saved) -> bool {
        let near = |a: &(String, IpAddr, i64), b: &(String, IpAddr, i64)| {
            (&a.0, a.1) == (&b.0, b.1) && b.2 - a.2 <= STALE
        };
        self.patterns == other.patterns
            && self.nameless == other.nameless
            && self.addresses.len() == other.addresses.len()
            && self.addresses.iter().zip(&other.addresses).all(|(a, b)| near(a, b))
    }
}

/// Reads it; nothing if there is none, or none that can be read.
pub(super) fn read(path: &Path) -> Option<Saved> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "cannot read what is known of host names");
            return None;
        }
    };
    serde_json::from_slice(&text)
        .inspect_err(
            |error| tracing::error!(path = %path.display(), %error, "not what is known of host names"),
        )
        .ok()
}

/// Writes it as a whole or not at all.
pub(super) fn write(path: &Path, saved: &Saved) -> io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, serde_json::to_vec(saved).map_err(io::Error::other)?)?;
    std::fs::rename(new, path)
}
