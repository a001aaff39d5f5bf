//! The commands that `serve` understands, and the protocol that its ports speak.
//!
//! Commands are JSON objects, one a line, told apart by `do`; the answer is one line. On failure of the command itself
//! the answer has the one field `error`; failures of the traffic are part of an ordinary answer, by kind (see
//! [`crate::failure`]). Addresses are `ip:port` strings, times are milliseconds, `name` names a group of connections
//! or a running job, and lives until `close` or `stop`.
//!
//! TCP ports take one byte that says what the connection is for: [`ECHO`], [`WHO`], [`DOWNLOAD`], [`UPLOAD`], or `G`,
//! the beginning of an HTTP request, which is answered with the source. UDP ports answer each datagram by its first
//! byte: [`WHO`], [`REPLY`], [`SINK`], anything else is echoed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use serde::Deserialize;

/// Everything that follows is sent back.
pub const ECHO: u8 = b'E';
/// The answer is the source the server sees, `ip:port` and a newline.
pub const WHO: u8 = b'W';
/// Followed by a `u64` (big-endian) n: the answer is n bytes and their SHA-256.
pub const DOWNLOAD: u8 = b'D';
/// Followed by a `u64` (big-endian) n and n bytes: the answer is their SHA-256.
pub const UPLOAD: u8 = b'U';
/// A datagram followed by a `u32` (big-endian) n: the answer is one datagram of n bytes.
pub const REPLY: u8 = b'R';
/// A datagram that is recorded but not answered.
pub const SINK: u8 = b'S';

/// One command.
#[derive(Debug, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Answers at once: the process is there.
    Hello,
    /// Opens TCP connections and holds them: `{opened, failed: {kind: n}, slowest_ms}`.
    Open {
        /// Name of the group; opening again adds to it.
        name: String,
        /// Server.
        to: SocketAddr,
        /// How many.
        count: usize,
        /// How many at a time.
        #[serde(default = "parallel")]
        parallel: usize,
        /// For each connection.
        #[serde(default = "timeout")]
        timeout_ms: u64,
    },
    /// Sends a byte on every connection of a group and awaits its echo: `{answered, failed: {kind: n}}`.
    Exchange {
        /// Name of the group.
        name: String,
        /// For each connection.
        #[serde(default = "timeout")]
        timeout_ms: u64,
    },
    /// Closes a group: `{closed}`.
    Close {
        /// Name of the group.
        name: String,
        /// By RST instead of FIN.
        #[serde(default)]
        reset: bool,
        /// Only so many; the others stay open.
        count: Option<usize>,
    },
    /// Opens one TCP connection, asks for the source seen, closes: `{ok, ms, source, local}` or `{ok: false, ms, failure}`.
    Connect {
        /// Server.
        to: SocketAddr,
        /// For the whole.
        #[serde(default = "timeout")]
        timeout_ms: u64,
    },
    /// Sends one datagram and awaits the answer: `{ok, ms, received, source}` or `{ok: false, ms, failure}`.
    Udp {
        /// Server.
        to: SocketAddr,
        /// A connected socket learns of ICMP errors; an unconnected one does not.
        #[serde(default = "yes")]
        connected: bool,
        /// Payload to send.
        #[serde(default = "small")]
        bytes: usize,
        /// Size of the answer wanted; without it, the answer is the source seen.
        reply_bytes: Option<u32>,
        /// Local port; 0 lets the kernel choose.
        #[serde(default)]
        port: u16,
        /// For the answer.
        #[serde(default = "timeout")]
        timeout_ms: u64,
    },
    /// ICMP echo: `{sent, received, slowest_ms, errors: ["type/code"]}`.
    Ping {
        /// Whom.
        to: Ipv4Addr,
        /// How many requests.
        #[serde(default = "one")]
        count: u16,
        /// Payload of each.
        #[serde(default = "small")]
        bytes: usize,
        /// Identifier; without it, one by chance.
        identifier: Option<u16>,
        /// For each answer.
        #[serde(default = "timeout")]
        timeout_ms: u64,
    },
    /// Receives so many bytes and checks their digest: `{ok, bytes, ms, failure}`.
    Download {
        /// Server.
        to: SocketAddr,
        /// How many.
        bytes: u64,
        /// For the whole.
        #[serde(default = "long")]
        timeout_ms: u64,
    },
    /// Sends so many bytes and checks the digest that comes back: `{ok, bytes, ms, failure}`.
    Upload {
        /// Server.
        to: SocketAddr,
        /// How many.
        bytes: u64,
        /// For the whole.
        #[serde(default = "long")]
        timeout_ms: u64,
    },
    /// Sends packets with a source of choice through a raw socket (needs CAP_NET_RAW): `{sent}`.
    Forge {
        /// Source address and port of the packets.
        from: SocketAddrV4,
        /// Destination; port 0 with `icmp`.
        to: SocketAddrV4,
        /// `tcp` (a SYN), `tcp_ack`, `udp` or `icmp` (an echo request, the source port as identifier).
        protocol: Protocol,
        /// How many.
        #[serde(default = "one")]
        count: u16,
    },
    /// Opens, exchanges and closes connections one after another in so many tasks, until stopped.
    Churn {
        /// Name of the job.
        name: String,
        /// Server.
        to: SocketAddr,
        /// Tasks at a time.
        #[serde(default = "one_task")]
        parallel: usize,
        /// Pause of a task after each connection.
        #[serde(default)]
        pause_ms: u64,
        /// For each connection.
        #[serde(default = "timeout")]
        timeout_ms: u64,
    },
    /// Sends numbered datagrams at an interval from one socket and counts the echoes, until stopped.
    Stream {
        /// Name of the job.
        name: String,
        /// Server.
        to: SocketAddr,
        /// Between two datagrams.
        interval_ms: u64,
        /// Payload, at least 9.
        #[serde(default = "small")]
        bytes: usize,
        /// Whether the server is to answer.
        #[serde(default = "yes")]
        echo: bool,
    },
    /// Statistics of a running job. Churn: `{connections, answered, failed: {kind: n}, slowest_ms, sources: {ip: n}}`;
    /// stream: `{sent, received, lost, failed: {kind: n}, longest_gap_ms}`, lost without those that may still be answered.
    Statistics {
        /// Name of the job.
        name: String,
    },
    /// Ends a job and gives its last statistics.
    Stop {
        /// Name of the job.
        name: String,
    },
    /// What came in since the last `reset`: `{tcp: {...}, udp: {...}}`, each with `total`, `sources: {ip: n}`,
    /// `tuples`, `twice` (tuples with more than one connection), and for TCP `open`.
    Summary,
    /// Every connection and UDP source since the last `reset`, oldest first.
    Records {
        /// Only of this source address.
        source: Option<IpAddr>,
    },
    /// Forgets what came in.
    Reset,
}

/// Kind of a forged packet.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// A SYN.
    Tcp,
    /// An ACK out of the blue.
    TcpAck,
    /// A datagram.
    Udp,
    /// An echo request.
    Icmp,
}

fn parallel() -> usize {
    64
}

fn timeout() -> u64 {
    5_000
}

fn long() -> u64 {
    120_000
}

fn yes() -> bool {
    true
}

fn small() -> usize {
    32
}

fn one() -> u16 {
    1
}

fn one_task() -> usize {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_fill_a_short_command() {
        let command = r#"{"do": "open", "name": "a", "to": "198.51.100.10:7000", "count": 3}"#;
        let Command::Open { count: 3, parallel: 64, timeout_ms: 5_000, .. } =
            serde_json::from_str(command).unwrap()
        else {
            panic!("not what was sent");
        };
    }

    #[test]
    fn what_is_misspelt_is_refused() {
        for bad in [r#"{"do": "opne"}"#, r#"{"do": "close", "name": "a", "rest": true}"#, "{}"] {
            assert!(serde_json::from_str::<Command>(bad).is_err(), "{bad}");
        }
    }
}
