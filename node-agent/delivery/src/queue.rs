//! What waits, and what goes when there is no room. Pure: nothing here knows where a report is.

use crate::Name;
use std::collections::BTreeMap;

/// How much may wait, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes on the disk.
    pub disk: u64,
    /// Bytes in memory, while the disk does not take any.
    pub memory: u64,
    /// Seconds since the end of its interval, after which the collector would not take a report any more.
    pub age: i64,
}

/// Where a report waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file.
    Disk,
    /// In memory, and lost when the agent ends.
    Memory,
}

/// Files take whole blocks.
const BLOCK: u64 = 4_096;

#[derive(Clone, Copy, Debug)]
struct Entry {
    bytes: u64,
    place: Place,
}

/// The waiting reports, in the order in which they were made.
#[derive(Clone, Debug)]
pub struct Queue {
    bounds: Bounds,
    entries: BTreeMap<Name, Entry>,
    disk: u64,
    memory: u64,
}

impl Queue {
    /// One in which nothing waits.
    pub fn new(bounds: Bounds) -> Queue {
        Queue { bounds, entries: BTreeMap::new(), disk: 0, memory: 0 }
    }

    /// Adds a report, or moves it to another place. What has to go for it is returned: the oldest ones of that place, or itself if it is larger
    /// than all that may wait there.
    #[must_use]
    pub fn insert(&mut self, name: Name, bytes: u64, place: Place) -> Vec<Name> {
        self.remove(&name);
        let bytes = match place {
            Place::Disk => bytes.max(1).div_ceil(BLOCK).saturating_mul(BLOCK),
            Place::Memory => bytes,
        };
        let bound = match place {
            Place::Disk => self.bounds.disk,
            Place::Memory => self.bounds.memory,
        };
        if bytes > bound {
            return vec![name];
        }
        let mut gone = Vec::new();
        while *self.used(place) > bound - bytes {
            let oldest = self.entries.iter().find(|(_, entry)| entry.place == place);
            let Some(oldest) = oldest.map(|(name, _)| name.clone()) else { break };
            self.remove(&oldest);
            gone.push(oldest);
        }
        *self.used(place) += bytes;
        self.entries.insert(name, Entry { bytes, place });
        gone
    }

    /// Removes a report; where it was, or None if it does not wait.
    pub fn remove(&mut self, name: &Name) -> Option<Place> {
        let entry = self.entries.remove(name)?;
        *self.used(entry.place) -= entry.bytes;
        Some(entry.place)
    }

    /// Those that are too old at a time, in seconds since the Unix epoch. They still wait.
    pub fn expired(&self, now: i64) -> Vec<Name> {
        let old = |name: &&Name| now.saturating_sub(name.to) > self.bounds.age;
        self.entries.keys().filter(old).cloned().collect()
    }

    /// Which go next, at most so many reports and bytes, but one. The newest, since somebody looks at what is now, and then the oldest, which
    /// would be the first to go for good. One alone is the oldest.
    pub fn next(&self, reports: usize, bytes: u64) -> Vec<Name> {
        let newest = self.entries.iter().next_back().filter(|_| reports > 1);
        let oldest = self.entries.iter().filter(|(name, _)| newest.is_none_or(|(newest, _)| *name != newest));
        let mut sum = 0u64;
        newest
            .into_iter()
            .chain(oldest)
            .take(reports.max(1))
            .enumerate()
            .take_while(|(index, (_, entry))| {
                sum = sum.saturating_add(entry.bytes);
                *index == 0 || sum <= bytes
            })
            .map(|(_, (name, _))| name.clone())
            .collect()
    }

    /// Those in a place, the oldest first.
    pub fn names(&self, place: Place) -> impl Iterator<Item = &Name> {
        self.entries.iter().filter(move |(_, entry)| entry.place == place).map(|(name, _)| name)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of those in a place: files by whole blocks.
    pub fn bytes(&self, place: Place) -> u64 {
        match place {
            Place::Disk => self.disk,
            Place::Memory => self.memory,
        }
    }

    /// The earliest end of an interval among those that wait.
    pub fn oldest(&self) -> Option<i64> {
        self.entries.keys().map(|name| name.to).min()
    }

    fn used(&mut self, place: Place) -> &mut u64 {
        match place {
            Place::Disk => &mut self.disk,
            Place::Memory => &mut self.memory,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Boot;
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds { disk: 10 * BLOCK, memory: 100, age: 1_000 };

    fn name(sequence: u64) -> Name {
        Name { boot: Boot::new(1, 1), sequence, to: 10 * sequence as i64 }
    }

    fn sequences(names: &[Name]) -> Vec<u64> {
        names.iter().map(|name| name.sequence).collect()
    }

    #[test]
    fn the_newest_and_then_the_oldest_go_next() {
        let mut queue = Queue::new(BOUNDS);
        assert!(queue.next(5, 100).is_empty());
        for sequence in [3, 1, 2, 4, 5] {
            assert!(queue.insert(name(sequence), 1, Place::Disk).is_empty());
        }
        assert_eq!(sequences(&queue.next(3, u64::MAX)), [5, 1, 2]);
        assert_eq!(sequences(&queue.next(9, u64::MAX)), [5, 1, 2, 3, 4]);
        assert_eq!(sequences(&queue.next(9, 3 * BLOCK)), [5, 1, 2]);
        assert_eq!(sequences(&queue.next(9, 0)), [5], "one goes however large it is");
        assert_eq!(sequences(&queue.next(1, u64::MAX)), [1]);
        let later = Name { boot: Boot::new(2, 0), sequence: 0, to: 60 };
        assert!(queue.insert(later.clone(), 1, Place::Memory).is_empty());
        assert_eq!(queue.next(2, u64::MAX), [later, name(1)], "a later start is newer, wherever it waits");
    }

    #[test]
    fn what_is_too_old_or_too_large_goes() {
        let mut queue = Queue::new(BOUNDS);
        let _ = queue.insert(name(1), 1, Place::Disk);
        let _ = queue.insert(name(2), 1, Place::Memory);
        assert_eq!(sequences(&queue.expired(1_010)), [0; 0]);
        assert_eq!(sequences(&queue.expired(1_011)), [1]);
        assert_eq!(sequences(&queue.expired(i64::MAX)), [1, 2]);
        assert_eq!(queue.oldest(), Some(10));
        assert_eq!(sequences(&queue.insert(name(3), 10 * BLOCK + 1, Place::Disk)), [3], "and nothing else");
        assert_eq!((queue.len(), queue.bytes(Place::Disk), queue.bytes(Place::Memory)), (2, BLOCK, 1));
        assert_eq!(
            sequences(&queue.insert(name(3), 10 * BLOCK, Place::Disk)),
            [1],
            "all that is in its place"
        );
        assert_eq!(queue.remove(&name(2)), Some(Place::Memory));
        assert_eq!(queue.remove(&name(2)), None);
    }

    proptest! {
        /// Whatever comes and goes: never more than may wait, only the oldest go, and none while there is room.
        #[test]
        fn only_the_oldest_go_and_only_for_want_of_room(
            steps in prop::collection::vec((0u64..30, 0u64..6 * BLOCK, any::<bool>(), any::<bool>()), 0..200)
        ) {
            let mut queue = Queue::new(BOUNDS);
            let mut model: Vec<(u64, u64, Place)> = Vec::new();
            for (sequence, bytes, memory, remove) in steps {
                let place = if memory { Place::Memory } else { Place::Disk };
                if remove {
                    let at = model.iter().position(|it| it.0 == sequence);
                    let place = at.map(|at| model.remove(at).2);
                    prop_assert_eq!(queue.remove(&name(sequence)), place);
                    continue;
                }
                let bytes = if memory { bytes / BLOCK * 30 } else { bytes.max(1).div_ceil(BLOCK) * BLOCK };
                let gone = queue.insert(name(sequence), bytes, place);
                model.retain(|it| it.0 != sequence);
                let bound = if memory { BOUNDS.memory } else { BOUNDS.disk };
                let mut expected = Vec::new();
                if bytes > bound {
                    expected.push(sequence);
                } else {
                    model.push((sequence, bytes, place));
                    let sum = |model: &[(u64, u64, Place)]| {
                        model.iter().filter(|it| it.2 == place).map(|it| it.1).sum::<u64>()
                    };
                    while sum(&model) > bound {
                        let others = model.iter().filter(|it| it.2 == place && it.0 != sequence);
                        let Some(oldest) = others.map(|it| it.0).min() else { break };
                        model.retain(|it| it.0 != oldest);
                        expected.push(oldest);
                    }
                    prop_assert_eq!(queue.bytes(place), sum(&model));
                }
                prop_assert_eq!(sequences(&gone), expected);
                prop_assert!(queue.bytes(Place::Disk) <= BOUNDS.disk && queue.bytes(Place::Memory) <= BOUNDS.memory);
                let mut all: Vec<u64> = model.iter().map(|it| it.0).collect();
                all.sort_unstable();
                let mut known = sequences(&queue.next(usize::MAX, u64::MAX));
                known.sort_unstable();
                prop_assert_eq!(known, all);
            }
        }
    }
}
