//! TCP connections: held in groups, tried once, or made and closed without end.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::command::{ECHO, WHO};
use crate::failure::{Tally, count, kind, within};
use crate::proxy;

/// Opens connections to a server's echo, so many at a time.
pub async fn open(
    to: SocketAddr,
    wanted: usize,
    parallel: usize,
    limit: Duration,
) -> (Vec<TcpStream>, Value) {
    let mut running = JoinSet::new();
    let mut streams = Vec::with_capacity(wanted);
    let mut failed = Tally::new();
    let mut slowest = Duration::ZERO;
    let mut started = 0;
    loop {
        while started < wanted && running.len() < parallel.max(1) {
            started += 1;
            running.spawn(async move {
                let begin = Instant::now();
                (within(limit, connect_echo(to)).await, begin.elapsed())
            });
        }
        let Some(ended) = running.join_next().await else { break };
        let Ok((result, took)) = ended else { continue };
        slowest = slowest.max(took);
        match result {
            Ok(stream) => streams.push(stream),
            Err(error) => count(&mut failed, &error),
        }
    }
    let answer = json!({"opened": streams.len(), "failed": failed, "slowest_ms": milliseconds(slowest)});
    (streams, answer)
}

/// Connects, and lets one byte go around: only then is the connection known to work both ways.
async fn connect_echo(to: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&[ECHO]).await?;
    echo(&mut stream).await?;
    Ok(stream)
}

async fn echo(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"x").await?;
    match stream.read_u8().await? {
        b'x' => Ok(()),
        _ => Err(io::Error::other("wrong_echo")),
    }
}

/// A byte there and back on every connection. A connection that fails stays in the group, to be counted again.
pub async fn exchange(streams: &mut Vec<TcpStream>, limit: Duration) -> Value {
    let mut running = JoinSet::new();
    for mut stream in streams.drain(..) {
        running.spawn(async move {
            let result = within(limit, echo(&mut stream)).await;
            (stream, result)
        });
    }
    let mut failed = Tally::new();
    let mut answered = 0;
    while let Some(ended) = running.join_next().await {
        let Ok((stream, result)) = ended else { continue };
        streams.push(stream);
        match result {
            Ok(()) => answered += 1,
            Err(error) => count(&mut failed, &error),
        }
    }
    json!({"answered": answered, "failed": failed})
}

/// Closes connections by FIN or RST.
pub fn close(streams: Vec<TcpStream>, reset: bool) -> Value {
    let closed = streams.len();
    for stream in streams {
        if reset {
            // Closing with unsent data thrown away is what sends an RST.
            let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
    }
    json!({"closed": closed})
}

/// One connection that asks for the source the server sees.
pub async fn connect(to: SocketAddr, limit: Duration) -> Value {
    let begin = Instant::now();
    let result = within(limit, ask(to)).await;
    let ms = milliseconds(begin.elapsed());
    match result {
        Ok((source, local)) => json!({"ok": true, "ms": ms, "source": source, "local": local}),
        Err(error) => json!({"ok": false, "ms": ms, "failure": kind(&error)}),
    }
}

async fn ask(to: SocketAddr) -> io::Result<(String, SocketAddr)> {
    let mut stream = TcpStream::connect(to).await?;
    let local = stream.local_addr()?;
    stream.write_all(&[WHO]).await?;
    let mut line = String::new();
    BufReader::new(&mut stream).read_line(&mut line).await?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((line.trim_end().to_owned(), local))
}

/// Statistics of [`churn`].
#[derive(Default)]
pub struct Churn {
    answered: u64,
    failed: Tally,
    slowest: Duration,
    sources: BTreeMap<String, u64>,
}

impl Churn {
    /// As the command answers them.
    pub fn answer(&self) -> Value {
        json!({
            "connections": self.answered + self.failed.values().sum::<u64>(),
            "answered": self.answered,
            "failed": self.failed,
            "slowest_ms": milliseconds(self.slowest),
            "sources": self.sources,
        })
    }
}

/// Connects, asks, closes, without end. The caller ends it by aborting the task.
pub async fn churn(to: SocketAddr, pause: Duration, limit: Duration, statistics: Arc<Mutex<Churn>>) {
    loop {
        let begin = Instant::now();
        let result = within(limit, ask(to)).await;
        {
            let mut statistics = statistics.lock().unwrap_or_else(PoisonError::into_inner);
            statistics.slowest = statistics.slowest.max(begin.elapsed());
            match result {
                Ok((source, _)) => {
                    statistics.answered += 1;
                    let address = source.split(':').next().unwrap_or_default().to_owned();
                    *statistics.sources.entry(address).or_default() += 1;
                }
                Err(error) => count(&mut statistics.failed, &error),
            }
        }
        if pause.is_zero() {
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(pause).await;
        }
    }
}

/// The same for a one-shot container, without a runtime: its very first packet is this SYN.
pub fn whoami(through: Option<SocketAddr>, to: SocketAddr, time: bool) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut stream = match through {
        Some(proxy) => proxy::connect(proxy, to)?,
        None => std::net::TcpStream::connect(to)?,
    };
    let connected = begin.elapsed();
    stream.write_all(&[WHO])?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut line = String::new();
    stream.read_to_string(&mut line)?;
    print!("{line}");
    if time {
        println!("connected in {} ms", milliseconds(connected));
    }
    Ok(())
}

/// Milliseconds with a fraction.
pub fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
