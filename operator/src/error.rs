//! What can fail, one variant per step.

use crate::args::CALL_TIMEOUT;
use std::future::Future;

/// A step of the operator that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No usable client configuration.
    #[error("cannot find out how to reach the API server: {0}")]
    Configure(#[source] Box<kube::config::InferConfigError>),
    /// The client could not be made.
    #[error("cannot make a client: {0}")]
    Client(#[source] Box<kube::Error>),
    /// The listener could not be opened.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The HTTP server ended.
    #[error("the HTTP server failed: {0}")]
    Serve(#[source] std::io::Error),
    /// Reading the Lease.
    #[error("cannot read the lease: {0}")]
    ReadLease(#[source] CallError),
    /// Writing the Lease.
    #[error("cannot write the lease: {0}")]
    WriteLease(#[source] CallError),
    /// Signals cannot be received.
    #[error("cannot receive signals: {0}")]
    Signal(#[source] std::io::Error),
    /// A part of the operator ended, which it never should.
    #[error("{0} ended")]
    Ended(&'static str),
}

/// An API call that failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No answer in time. The call may or may not have had its effect.
    #[error("no answer within {} ms", CALL_TIMEOUT.as_millis())]
    Timeout,
    /// This replica is not the leader (any more), so the call was not made.
    #[error("this replica does not lead")]
    NotLeader,
    /// The API server refused, or could not be reached.
    #[error(transparent)]
    Api(Box<kube::Error>),
}

impl CallError {
    /// Code of the API server's answer, if it answered.
    pub fn code(&self) -> Option<u16> {
        match self {
            CallError::Api(error) => match error.as_ref() {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            CallError::Timeout | CallError::NotLeader => None,
        }
    }

    /// What to tell people: of an answer the API server's own words.
    pub fn words(&self) -> String {
        match self {
            CallError::Api(error) => match error.as_ref() {
                kube::Error::Api(status) => status.message.clone(),
                other => other.to_string(),
            },
            CallError::Timeout | CallError::NotLeader => self.to_string(),
        }
    }

    /// Whether somebody else wrote first (also: made the object first, or deleted it).
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// Whether the object does not exist (any more).
    pub fn is_gone(&self) -> bool {
        self.code() == Some(404)
    }

    /// Whether trying the same again is pointless until something changes.
    pub fn is_refusal(&self) -> bool {
        matches!(self.code(), Some(400 | 403 | 422))
    }
}

/// Makes an API call, but waits for no longer than [`CALL_TIMEOUT`].
pub async fn call<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, CallError> {
    match tokio::time::timeout(CALL_TIMEOUT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(CallError::Api(Box::new(error))),
        Err(_) => Err(CallError::Timeout),
    }
}
