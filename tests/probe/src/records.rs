//! Who came in: every TCP connection and every UDP source, as the server saw them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

/// Remote address and port, and the local port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Tuple {
    /// The other side.
    pub source: SocketAddr,
    /// Port it came to.
    pub port: u16,
}

/// One accepted connection.
#[derive(Clone, Debug, Serialize)]
pub struct Connection {
    /// Who and where.
    #[serde(flatten)]
    pub tuple: Tuple,
    /// Milliseconds since the Unix epoch.
    pub opened_ms: u64,
    /// The same, unless it is open.
    pub closed_ms: Option<u64>,
}

/// All datagrams of one source to one port.
#[derive(Clone, Debug, Serialize)]
pub struct Datagrams {
    /// Who and where.
    #[serde(flatten)]
    pub tuple: Tuple,
    /// Milliseconds since the Unix epoch.
    pub first_ms: u64,
    /// The same.
    pub last_ms: u64,
    /// How many.
    pub count: u64,
}

/// What came in since the last reset.
#[derive(Debug, Default)]
pub struct Records {
    /// Index of the first connection since the last reset: indexes handed out before then mean nothing any more.
    first: usize,
    connections: Vec<Connection>,
    datagrams: BTreeMap<Tuple, Datagrams>,
}

/// Figures over one protocol.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Connections, or datagrams.
    pub total: u64,
    /// Connections that are open (TCP).
    pub open: u64,
    /// Connections or datagrams by source address.
    pub sources: BTreeMap<IpAddr, u64>,
    /// Distinct tuples.
    pub tuples: usize,
    /// Tuples that came with more than one connection, however much later.
    pub twice: u64,
}

impl Records {
    /// A connection was accepted; the index is for [`Records::closed`].
    pub fn opened(&mut self, tuple: Tuple, now_ms: u64) -> usize {
        self.connections.push(Connection { tuple, opened_ms: now_ms, closed_ms: None });
        self.first + self.connections.len() - 1
    }

    /// A connection ended.
    pub fn closed(&mut self, index: usize, now_ms: u64) {
        let connection = index.checked_sub(self.first).and_then(|index| self.connections.get_mut(index));
        if let Some(connection) = connection {
            connection.closed_ms = Some(now_ms);
        }
    }

    /// A datagram arrived.
    pub fn datagram(&mut self, tuple: Tuple, now_ms: u64) {
        let entry = Datagrams { tuple, first_ms: now_ms, last_ms: now_ms, count: 0 };
        let entry = self.datagrams.entry(tuple).or_insert(entry);
        entry.count += 1;
        entry.last_ms = now_ms;
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.first += self.connections.len();
        self.connections.clear();
        self.datagrams.clear();
    }

    /// Connections of a source, or all.
    pub fn connections(&self, source: Option<IpAddr>) -> Vec<&Connection> {
        self.connections
            .iter()
            .filter(|c| source.is_none_or(|source| c.tuple.source.ip() == source))
            .collect()
    }

    /// Datagrams of a source, or all.
    pub fn datagrams(&self, source: Option<IpAddr>) -> Vec<&Datagrams> {
        self.datagrams
            .values()
            .filter(|d| source.is_none_or(|source| d.tuple.source.ip() == source))
            .collect()
    }

    /// Figures over TCP.
    pub fn tcp(&self) -> Summary {
        let mut tuples: BTreeMap<Tuple, u64> = BTreeMap::new();
        let mut sources = BTreeMap::new();
        for connection in &self.connections {
            *tuples.entry(connection.tuple).or_default() += 1;
            *sources.entry(connection.tuple.source.ip()).or_default() += 1;
        }
        Summary {
            total: self.connections.len() as u64,
            open: self.connections.iter().filter(|connection| connection.closed_ms.is_none()).count() as u64,
            sources,
            tuples: tuples.len(),
            twice: tuples.values().filter(|count| **count > 1).count() as u64,
        }
    }

    /// Figures over UDP, which knows no connections: nothing is open or comes twice.
    pub fn udp(&self) -> Summary {
        let mut sources = BTreeMap::new();
        for datagrams in self.datagrams.values() {
            *sources.entry(datagrams.tuple.source.ip()).or_default() += datagrams.count;
        }
        Summary { total: sources.values().sum(), open: 0, sources, tuples: self.datagrams.len(), twice: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(source: &str) -> Tuple {
        Tuple { source: source.parse().unwrap(), port: 7000 }
    }

    #[test]
    fn a_tuple_that_comes_again_is_counted() {
        let mut records = Records::default();
        let first = records.opened(tuple("203.0.113.1:2000"), 1);
        records.opened(tuple("203.0.113.1:2001"), 2);
        records.closed(first, 3);
        assert_eq!(records.tcp().twice, 0);
        records.opened(tuple("203.0.113.1:2000"), 4);
        let summary = records.tcp();
        assert_eq!((summary.total, summary.open, summary.tuples, summary.twice), (3, 2, 2, 1));
        assert_eq!(summary.sources, [("203.0.113.1".parse().unwrap(), 3)].into());
    }

    #[test]
    fn an_end_after_a_reset_does_not_hit_another_connection() {
        let mut records = Records::default();
        let old = records.opened(tuple("203.0.113.1:2000"), 1);
        records.reset();
        let new = records.opened(tuple("203.0.113.1:2001"), 2);
        records.closed(old, 3);
        assert_eq!(records.tcp().open, 1);
        records.closed(new, 4);
        assert_eq!(records.tcp().open, 0);
    }

    #[test]
    fn datagrams_are_summed_by_source() {
        let mut records = Records::default();
        for source in ["203.0.113.1:2000", "203.0.113.1:2000", "203.0.113.1:2001", "10.99.0.1:9"] {
            records.datagram(tuple(source), 5);
        }
        let summary = records.udp();
        assert_eq!((summary.total, summary.tuples), (4, 3));
        assert_eq!(summary.sources.len(), 2);
        assert_eq!(records.datagrams(Some("10.99.0.1".parse().unwrap())).len(), 1);
    }
}
