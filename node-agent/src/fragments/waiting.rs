//! Which fragments wait for the first of their datagram, and when it is looked for. Pure: time is passed in.

use aegis_common::{EarlyHeader, FragmentKey};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a datagram's fragments wait. Those of one datagram leave their origin together, so what they are apart is what the
/// ways between two nodes differ by; the first is lost when it has not come by then.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Time until the first is looked for; each time it is not there, twice as long as before.
const FIRST_LOOK: Duration = Duration::from_millis(1);
/// Bytes of all that wait: a flood of fragments without a first one takes no more memory than this.
const BYTES: usize = 4 << 20;
/// Fragments of one datagram: 64 KiB on links of the smallest MTU that is usual.
const FRAGMENTS: usize = 128;

/// A fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Early {
    /// What the data plane says of it.
    pub header: EarlyHeader,
    /// Ethernet header and IP packet.
    pub frame: Vec<u8>,
}

/// Fragments of one datagram.
#[derive(Debug)]
struct Datagram {
    since: Instant,
    look_at: Instant,
    pause: Duration,
    fragments: Vec<Early>,
}

/// All that wait.
#[derive(Debug, Default)]
pub struct Waiting {
    datagrams: HashMap<FragmentKey, Datagram>,
    bytes: usize,
}

impl Waiting {
    /// Lets a fragment wait. False if there is no room.
    pub fn keep(&mut self, early: Early, now: Instant) -> bool {
        if self.bytes + early.frame.len() > BYTES {
            return false;
        }
        let datagram = self.datagrams.entry(early.header.key).or_insert_with(|| Datagram {
            since: now,
            look_at: now + FIRST_LOOK,
            pause: FIRST_LOOK,
            fragments: Vec::new(),
        });
        if datagram.fragments.len() >= FRAGMENTS {
            return false;
        }
        self.bytes += early.frame.len();
        datagram.fragments.push(early);
        true
    }

    /// When there is something to be done again.
    pub fn next(&self) -> Option<Instant> {
        self.datagrams.values().map(|datagram| datagram.look_at.min(datagram.since + PATIENCE)).min()
    }

    /// Datagrams whose first fragment is to be looked for now.
    pub fn due(&mut self, now: Instant) -> Vec<FragmentKey> {
        let due = self.datagrams.iter_mut().filter(|(_, datagram)| datagram.look_at <= now);
        due.map(|(key, datagram)| {
            datagram.pause *= 2;
            datagram.look_at = now + datagram.pause;
            *key
        })
        .collect()
    }

    /// The fragments of a datagram whose first one is there, in the order in which they came.
    pub fn take(&mut self, key: &FragmentKey) -> Vec<Early> {
        let fragments = self.datagrams.remove(key).map(|datagram| datagram.fragments).unwrap_or_default();
        self.bytes -= fragments.iter().map(|early| early.frame.len()).sum::<usize>();
        fragments
    }

    /// Gives up those whose first fragment has not come. Returns how many.
    pub fn give_up(&mut self, now: Instant) -> usize {
        let late = self.datagrams.iter().filter(|(_, datagram)| datagram.since + PATIENCE <= now);
        let late: Vec<FragmentKey> = late.map(|(key, _)| *key).collect();
        late.iter().map(|key| self.take(key).len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn early(id: u16, bytes: usize) -> Early {
        let key = FragmentKey { id, ..FragmentKey::default() };
        Early { header: EarlyHeader { key, ..EarlyHeader::default() }, frame: vec![0; bytes] }
    }

    #[test]
    fn the_first_is_looked_for_less_and_less_often_until_its_time_is_over() {
        let start = Instant::now();
        let mut waiting = Waiting::default();
        assert_eq!(waiting.next(), None);
        assert!(waiting.keep(early(1, 100), start) && waiting.keep(early(1, 200), start));
        let mut looks = Vec::new();
        while let Some(at) = waiting.next() {
            let due = waiting.due(at);
            looks.extend(due.iter().map(|_| (at - start).as_millis()));
            if waiting.give_up(at) > 0 {
                assert_eq!(at - start, PATIENCE);
            }
        }
        assert_eq!(looks, [1, 3, 7, 15, 31, 63, 127, 255, 511, 1023]);
        assert_eq!(waiting.bytes, 0);
    }

    #[test]
    fn what_has_its_first_is_given_back_in_order_and_others_go_on_waiting() {
        let start = Instant::now();
        let mut waiting = Waiting::default();
        for (id, bytes) in [(1, 100), (2, 300), (1, 200)] {
            assert!(waiting.keep(early(id, bytes), start));
        }
        let key = early(1, 0).header.key;
        let sizes: Vec<usize> = waiting.take(&key).iter().map(|early| early.frame.len()).collect();
        assert_eq!(sizes, [100, 200]);
        assert_eq!(waiting.take(&key), []);
        assert_eq!(waiting.give_up(start + PATIENCE), 1);
    }

    #[test]
    fn memory_is_bounded() {
        let start = Instant::now();
        let mut waiting = Waiting::default();
        let kept = (0..u16::MAX).filter(|id| waiting.keep(early(*id, 1514), start)).count();
        assert_eq!(kept, BYTES / 1514);
        waiting.give_up(start + PATIENCE);
        let kept = (0..1000).filter(|_| waiting.keep(early(1, 60), start)).count();
        assert_eq!(kept, FRAGMENTS);
    }
}
