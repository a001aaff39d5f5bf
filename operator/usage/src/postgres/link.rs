//! A connection to PostgreSQL that ends when the server says nothing for too long. Neither TCP nor the driver notices a server that hangs while its
//! machine goes on.

use super::address::Address;
use super::tls;
use crate::sql::Error;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tokio_postgres::Client;

/// Longest time to connect, with all addresses that the server has, TLS and the password.
const CONNECT: Duration = Duration::from_secs(15);

/// A connection with the loop that moves it on, which turns only while something is asked. Blocks.
pub(super) struct Link {
    client: Client,
    silence: Duration,
    /// The server said nothing for that long: whatever is asked next would wait as long.
    silent: bool,
    runtime: Runtime,
}

impl Link {
    /// Connects. Nothing that is asked may take longer than `silence`.
    pub fn connect(address: &Address, silence: Duration) -> Result<Link, Error> {
        let runtime = Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
        let limit = CONNECT.min(silence);
        let connected = runtime.block_on(async { timeout(limit, tls::connect(address)).await });
        let client = connected.map_err(|_| Error::Silent(limit.as_secs()))??;
        Ok(Link { client, silence, silent: false, runtime })
    }

    /// Asks something.
    pub fn run<T>(
        &mut self,
        question: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, Error> {
        let Link { client, silence, silent, runtime } = self;
        if !*silent && let Ok(answer) = runtime.block_on(async { timeout(*silence, question(client)).await })
        {
            return Ok(answer?);
        }
        *silent = true;
        Err(Error::Silent(silence.as_secs()))
    }
}
