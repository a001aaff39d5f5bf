//! How somebody shows who they are: behind a trait, so that rules and protocol are tested without a cluster.

use crate::cluster::Cluster;
use crate::scope::{Prefix, Viewer};
use std::pin::Pin;
use std::sync::Arc;
use thiserror::Error;

/// What will be known later.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Knows tokens.
pub trait Access: Send + Sync + 'static {
    /// The node whose agent has this token.
    fn node<'a>(&'a self, token: &'a str) -> Pending<'a, Result<String, Denied>>;

    /// Who has this token: with the accounts that are theirs anyway, and those of `accounts` that they may see.
    fn viewer<'a>(&'a self, token: &'a str, accounts: &'a [String]) -> Pending<'a, Result<Viewer, Denied>>;

    /// Whether who has this token may give the feed of an account another address: whoever has the old one loses it. Nobody may, where
    /// nothing else is said.
    fn renews<'a>(&'a self, _token: &'a str, _account: &'a str) -> Pending<'a, Result<bool, Denied>> {
        Box::pin(async { Ok(false) })
    }

    /// All prefixes of the cluster.
    fn prefixes(&self) -> Vec<Prefix>;

    /// Objects of the cluster that may be asked about. None: they are not known.
    fn cluster(&self) -> Option<Arc<Cluster>> {
        None
    }
}

/// Why somebody gets nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Denied {
    /// No token, or one that is expired, for somebody else, or made up.
    #[error("the token is missing or not valid here")]
    Unknown,
    /// Known, but not for this.
    #[error("this is not for the owner of the token")]
    Forbidden,
    /// Nobody knows at the moment.
    #[error("tokens cannot be checked at the moment")]
    Unavailable,
}
