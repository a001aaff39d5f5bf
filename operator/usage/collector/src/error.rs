//! What can fail, one variant per step.

use std::net::SocketAddr;
use std::path::PathBuf;

/// A step of the collector that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No usable client configuration.
    #[error("cannot find out how to reach the API server: {0}")]
    Configure(#[source] Box<kube::config::InferConfigError>),
    /// The client could not be made.
    #[error("cannot make a client: {0}")]
    Client(#[source] Box<kube::Error>),
    /// Levels that cannot be kept so.
    #[error(transparent)]
    Retention(#[from] aegis_usage::RetentionError),
    /// The store could not be opened.
    #[error("cannot open the store: {0}")]
    Store(#[from] aegis_usage::Error),
    /// The file beside the store that says whose it is.
    #[error("cannot lock {path}: {source}")]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Another collector has the store.
    #[error("another collector has {0}: one at a time may")]
    Taken(PathBuf),
    /// Tokens would go over the network for everybody to read.
    #[error(
        "{0} is no address of this machine: give --tls-cert and --tls-key, since tokens must not be sent in plain text"
    )]
    Plain(SocketAddr),
    /// Others would be offered what is for developers.
    #[error("{0} is no address of this machine: --development is for one's own machine")]
    Development(SocketAddr),
    /// Certificate or key.
    #[error("cannot use certificate and key: {0}")]
    Certificate(#[from] crate::certificate::CertificateError),
    /// The listener could not be opened.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The server of metrics ended.
    #[error("the HTTP server failed: {0}")]
    Serve(#[source] std::io::Error),
    /// Threads could not be started.
    #[error("cannot start: {0}")]
    Runtime(#[source] std::io::Error),
    /// Signals cannot be received.
    #[error("cannot receive signals: {0}")]
    Signal(#[source] std::io::Error),
    /// A part of the collector ended, which it never should.
    #[error("{0} ended")]
    Ended(&'static str),
}
