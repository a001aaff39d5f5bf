//! UDP: one question, or a stream without end.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::UdpSocket;

use crate::command::{REPLY, SINK, WHO};
use crate::connections::milliseconds;
use crate::failure::{Tally, count, kind, within};

/// One datagram to send.
pub struct Question {
    /// Server.
    pub to: SocketAddr,
    /// A connected socket learns of ICMP errors.
    pub connected: bool,
    /// Payload.
    pub bytes: usize,
    /// Size of the answer; without it, the answer is the source seen.
    pub reply_bytes: Option<u32>,
    /// Local port, 0 for any.
    pub port: u16,
    /// For the answer.
    pub limit: Duration,
}

/// Sends a datagram and awaits the answer.
pub async fn ask(question: &Question) -> Value {
    let begin = Instant::now();
    let result = within(question.limit, exchange(question)).await;
    let ms = milliseconds(begin.elapsed());
    match result {
        Ok((received, source)) => json!({"ok": true, "ms": ms, "received": received, "source": source}),
        Err(error) => json!({"ok": false, "ms": ms, "failure": kind(&error)}),
    }
}

/// Any address of the family of the other side.
fn any(to: SocketAddr, port: u16) -> SocketAddr {
    match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, port).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, port).into(),
    }
}

async fn exchange(question: &Question) -> io::Result<(usize, Option<String>)> {
    let socket = UdpSocket::bind(any(question.to, question.port)).await?;
    let mut payload = match question.reply_bytes {
        Some(size) => [&[REPLY][..], &size.to_be_bytes()].concat(),
        None => vec![WHO],
    };
    payload.resize(question.bytes.max(payload.len()), b'.');
    let mut buffer = vec![0; 65_536];
    let received = if question.connected {
        socket.connect(question.to).await?;
        socket.send(&payload).await?;
        socket.recv(&mut buffer).await?
    } else {
        socket.send_to(&payload, question.to).await?;
        socket.recv_from(&mut buffer).await?.0
    };
    let source = question
        .reply_bytes
        .is_none()
        .then(|| String::from_utf8_lossy(&buffer[..received]).trim().to_owned());
    Ok((received, source))
}

/// Statistics of [`stream`].
pub struct Stream {
    sent: u64,
    received: u64,
    /// Of how many something is known: the number of the last that was answered, and one.
    answered: u64,
    failed: Tally,
    longest_gap: Duration,
    last: Instant,
}

impl Stream {
    /// Nothing sent yet.
    pub fn new() -> Self {
        let zero = Duration::ZERO;
        Self {
            sent: 0,
            received: 0,
            answered: 0,
            failed: Tally::new(),
            longest_gap: zero,
            last: Instant::now(),
        }
    }

    /// As the command answers them. A gap that lasts still counts.
    pub fn answer(&self) -> Value {
        json!({
            "sent": self.sent,
            "received": self.received,
            "lost": self.answered.saturating_sub(self.received),
            "failed": self.failed,
            "longest_gap_ms": milliseconds(self.longest_gap.max(self.last.elapsed())),
        })
    }

    fn received(&mut self, payload: &[u8]) {
        self.received += 1;
        let number = payload.get(1..9).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        self.answered = self.answered.max(number.map_or(self.received, |number| number.saturating_add(1)));
        self.longest_gap = self.longest_gap.max(self.last.elapsed());
        self.last = Instant::now();
    }
}

/// Sends numbered datagrams from one socket until aborted, and counts the echoes.
pub async fn stream(
    to: SocketAddr,
    interval: Duration,
    bytes: usize,
    echo: bool,
    statistics: Arc<Mutex<Stream>>,
) {
    let lock = || statistics.lock().unwrap_or_else(PoisonError::into_inner);
    let socket = match UdpSocket::bind(any(to, 0)).await {
        Ok(socket) => socket,
        Err(error) => return count(&mut lock().failed, &error),
    };
    if let Err(error) = socket.connect(to).await {
        return count(&mut lock().failed, &error);
    }
    let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(1)));
    // One that was held up does not make up for it: a burst may lose what a stream would not.
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut buffer = vec![0; 65_536];
    let mut number = 0_u64;
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let mut payload = vec![if echo { b'e' } else { SINK }];
                payload.extend(number.to_be_bytes());
                payload.resize(bytes.max(payload.len()), b'.');
                number += 1;
                let result = socket.send(&payload).await;
                let mut statistics = lock();
                statistics.sent += 1;
                if let Err(error) = result {
                    count(&mut statistics.failed, &error);
                }
            }
            result = socket.recv(&mut buffer) => match result {
                Ok(length) => lock().received(buffer.get(..length).unwrap_or_default()),
                Err(error) => count(&mut lock().failed, &error),
            }
        }
    }
}
