//! Failures of traffic, by kind: short words that a test can compare.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

/// How often each kind of failure occurred.
pub type Tally = BTreeMap<String, u64>;

/// The kind of a failure: the name of the error number where it matters, else what the kernel says.
pub fn kind(error: &io::Error) -> String {
    let name = match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => "refused",
        Some(libc::ECONNRESET) => "reset",
        Some(libc::EPIPE) => "broken_pipe",
        Some(libc::ETIMEDOUT) => "timeout",
        Some(libc::EHOSTUNREACH) => "host_unreachable",
        Some(libc::ENETUNREACH) => "network_unreachable",
        Some(libc::EACCES | libc::EPERM) => "prohibited",
        Some(libc::EADDRNOTAVAIL) => "no_local_port",
        Some(libc::EMSGSIZE) => "too_long",
        Some(libc::EMFILE | libc::ENFILE) => "no_descriptor",
        _ => match error.kind() {
            io::ErrorKind::TimedOut => "timeout",
            io::ErrorKind::UnexpectedEof => "closed",
            _ => return error.to_string(),
        },
    };
    name.to_owned()
}

/// Ends a future in time; being late is a failure like any other.
pub async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Counts one failure.
pub fn count(tally: &mut Tally, error: &io::Error) {
    *tally.entry(kind(error)).or_default() += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_words() {
        let kind_of = |number| kind(&io::Error::from_raw_os_error(number));
        assert_eq!(kind_of(libc::ECONNREFUSED), "refused");
        assert_eq!(kind_of(libc::EHOSTUNREACH), "host_unreachable");
        assert_eq!(kind(&io::ErrorKind::TimedOut.into()), "timeout");
        assert_eq!(kind(&io::ErrorKind::UnexpectedEof.into()), "closed");
    }
}
