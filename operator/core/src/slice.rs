//! Slices: 256 consecutive, aligned ports of one IPv4 address or one IPv6 address, or of a /64 the part with the same bits 64 to 79.

use std::fmt;

/// Ports of a slice.
pub const PORTS: u32 = 256;
/// First usable slice (port 1024).
pub const FIRST: u8 = 4;
/// Last usable slice (port 65535).
pub const LAST: u8 = 255;

/// How many slices are usable.
pub const COUNT: u32 = LAST as u32 - FIRST as u32 + 1;

/// A set of the 256 slice indices of one address.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SliceSet([u64; 4]);

impl SliceSet {
    /// No slice.
    pub const EMPTY: SliceSet = SliceSet([0; 4]);

    /// The slices `first..=last`; empty if `first > last`.
    pub fn range(first: u8, last: u8) -> SliceSet {
        let mut set = SliceSet::EMPTY;
        for slice in first..=last {
            set.insert(slice);
        }
        set
    }

    /// Adds a slice; true if it was not in the set.
    pub fn insert(&mut self, slice: u8) -> bool {
        let new = !self.contains(slice);
        self.0[usize::from(slice >> 6)] |= 1 << (slice & 63);
        new
    }

    /// Takes a slice out; true if it was in the set.
    pub fn remove(&mut self, slice: u8) -> bool {
        let had = self.contains(slice);
        self.0[usize::from(slice >> 6)] &= !(1 << (slice & 63));
        had
    }

    /// Whether the slice is in the set.
    pub fn contains(&self, slice: u8) -> bool {
        self.0[usize::from(slice >> 6)] >> (slice & 63) & 1 == 1
    }

    /// Number of slices.
    pub fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether there is no slice.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// Slices in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        (0..=255u8).filter(|slice| self.contains(*slice))
    }

    /// The set that the data plane has as these words: the inverse of [`SliceSet::words`].
    pub fn from_words(words: [u64; 4]) -> SliceSet {
        SliceSet(words)
    }

    /// Slices of both sets.
    pub fn intersection(self, other: SliceSet) -> SliceSet {
        SliceSet(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    /// Slices of either set.
    pub fn union(self, other: SliceSet) -> SliceSet {
        SliceSet(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    /// Slices of this set that the other lacks.
    pub fn difference(self, other: SliceSet) -> SliceSet {
        SliceSet(std::array::from_fn(|word| self.0[word] & !other.0[word]))
    }

    /// The set as the data plane takes it: bit `s & 63` of word `s >> 6`.
    pub fn words(&self) -> [u64; 4] {
        self.0
    }

    /// Maximal runs of consecutive slices, as (first, last), ascending.
    pub fn runs(&self) -> Vec<(u8, u8)> {
        let mut runs: Vec<(u8, u8)> = Vec::new();
        for slice in self.iter() {
            match runs.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(slice) => *last = slice,
                _ => runs.push((slice, slice)),
            }
        }
        runs
    }
}

impl FromIterator<u8> for SliceSet {
    fn from_iter<I: IntoIterator<Item = u8>>(slices: I) -> SliceSet {
        let mut set = SliceSet::EMPTY;
        for slice in slices {
            set.insert(slice);
        }
        set
    }
}

impl fmt::Debug for SliceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.runs()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_reach_both_ends() {
        assert_eq!(SliceSet::range(0, 255).len(), 256);
        assert_eq!(SliceSet::range(FIRST, LAST).len(), 252);
        assert_eq!(SliceSet::range(255, 255).iter().collect::<Vec<_>>(), [255]);
        assert!(SliceSet::range(5, 4).is_empty());
        for (first, last) in [(0, 63), (63, 64), (4, 200), (64, 127), (128, 255)] {
            let expected: SliceSet = (first..=last).collect();
            assert_eq!(SliceSet::range(first, last), expected);
        }
    }

    #[test]
    fn runs_cross_words_and_end_at_the_last_slice() {
        let set: SliceSet = [4, 62, 63, 64, 65, 127, 254, 255].into_iter().collect();
        assert_eq!(set.runs(), [(4, 4), (62, 65), (127, 127), (254, 255)]);
        assert_eq!(SliceSet::EMPTY.runs(), []);
        assert_eq!(SliceSet::range(0, 255).runs(), [(0, 255)]);
    }

    #[test]
    fn algebra() {
        let (low, high) = (SliceSet::range(4, 100), SliceSet::range(90, 255));
        assert_eq!(low.intersection(high), SliceSet::range(90, 100));
        assert_eq!(low.union(high), SliceSet::range(4, 255));
        assert_eq!(low.difference(high), SliceSet::range(4, 89));
    }

    #[test]
    fn insert_and_remove_tell_what_changed() {
        let mut set = SliceSet::EMPTY;
        assert!(set.insert(255) && !set.insert(255));
        assert_eq!(set.words(), [0, 0, 0, 1 << 63]);
        assert_eq!(SliceSet::from_words(set.words()), set);
        assert!(set.remove(255) && !set.remove(255));
        assert!(set.is_empty());
    }
}
