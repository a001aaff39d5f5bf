//! The flow tables: buckets in an array, shared without locks.
//!
//! A key may be in three buckets: its own; if that was full when it was entered, one of a few further ones; if that was full
//! too, a last one. Each bucket counts the entries that went on from it, so that a search goes on only where something did.
//!
//! A tag of a few bits of the key's hash says what is in each place of a bucket, and is all that is ever changed there by
//! whoever does not own the place. 0 = free; with [`PENDING`] somebody has the place for an entry that nobody may see yet.
//! Whoever enters a key takes a place first and looks for others with the key after: of two that do so at once, at least one
//! sees the other. **Whoever sees another gives way**, also if both do; what is to be seen is never taken back. Each time that a place
//! is taken its generation grows, which is part of the tag: whoever has copied an entry compares, and has either what he
//! looked for or knows that he has not.
//!
//! Everything here is the same for the programs, for the agent, which reads the buckets in its own memory, and for the test that
//! goes through all orders in which several can do it.

use crate::{FlowKey, ForwardValue, ReverseValue, map_type, mix};

#[cfg(test)]
mod tests;

/// Places of a bucket: with their tags and the counter, 16 words, a bucket begins with 64 bytes.
pub const WAYS: u32 = 15;
/// Of every place in the buckets of the keys' own, how many hold a flow when there are as many as there may be: this / 4.
const LOAD: u64 = 3;
/// One further bucket for so many of the keys' own, and not less than [`LEAST_FURTHER`]. At that load 2.3 % of the flows are in
/// further buckets, which are a quarter full; that both of a key's are full happens to one of 10^10 flows.
const FURTHER: u32 = 16;
const LEAST_FURTHER: u32 = 4;

/// A place that is taken, but whose entry is not to be seen yet.
pub const PENDING: u32 = 1 << 31;
/// How often the place was taken, without the highest bits.
const GENERATION: u32 = 0x7f << 24;
const ONE_GENERATION: u32 = 1 << 24;
/// What is compared: the hash's part, and that the entry is to be seen.
pub const TAG: u32 = !GENERATION;

/// A key with its value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Way<V> {
    /// The key.
    pub key: FlowKey,
    /// Its value.
    pub value: V,
}

/// One element of the arrays `FORWARD` and `REVERSE`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Bucket<V> {
    /// What is in which place.
    pub tags: [u32; WAYS as usize],
    /// Entries that went on from here since all places were taken.
    pub spilled: u32,
    /// The places.
    pub ways: [Way<V>; WAYS as usize],
}
map_type!(Bucket<ForwardValue>, 784);
map_type!(Bucket<ReverseValue>, 664);

/// Index of `FORWARD` in `TABLES`.
pub const FORWARD_TABLE: u32 = 0;
/// Index of `REVERSE` in `TABLES`.
pub const REVERSE_TABLE: u32 = 1;

/// Value of `TABLES` (array of two).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableValue {
    /// Key of the hash, random, so that nobody can choose flows that meet in one bucket.
    pub seed: [u64; 2],
    /// Buckets of the keys' own; 0 = not set up yet.
    pub own: u32,
    /// Further buckets, which follow.
    pub further: u32,
    /// Most entries that may be in.
    pub limit: u32,
    /// Zero: what follows is written all the time.
    pub pad: [u32; 9],
    /// Entries that are in, exactly, also those that are just being entered.
    pub used: u32,
    /// Zero.
    pub pad_2: [u32; 15],
}
map_type!(TableValue, 128);

impl TableValue {
    /// A table in an array of so many buckets.
    pub fn new(buckets: u32, limit: u32, seed: [u64; 2]) -> TableValue {
        let further = (buckets / (FURTHER + 1)).max(LEAST_FURTHER).min(buckets - 1);
        TableValue { seed, own: buckets - further, further, limit, ..TableValue::default() }
    }

    /// Buckets of a table for so many entries.
    pub fn buckets(limit: u32) -> u32 {
        let own = (u64::from(limit) * 4).div_ceil(u64::from(WAYS) * LOAD).max(1) as u32;
        own + own.div_ceil(FURTHER).max(LEAST_FURTHER)
    }

    /// Where a key can be.
    #[inline(always)]
    pub fn spots(&self, hash: u64) -> Spots {
        Spots { hash, own: self.own, further: self.further }
    }
}

/// How a key is known in a bucket, in one word: its tag, and where a search begins, so that few keys wait for the tags to come
/// from memory before what is in their own place does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub u32);

impl Mark {
    #[inline(always)]
    fn tag(self) -> u32 {
        self.0 & TAG & !PENDING
    }

    #[inline(always)]
    fn start(self) -> u32 {
        self.0 >> 24
    }
}

/// Where a key can be: reckoned when it is wanted, for the sake of the programs' stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spots {
    hash: u64,
    own: u32,
    further: u32,
}

impl Spots {
    // The highest bits of a word of the hash say which bucket, lower ones of the other word the tag.

    /// The bucket at a level.
    #[inline(always)]
    pub fn bucket(&self, level: u32) -> u32 {
        let high = (self.hash >> 32) as u32;
        match level {
            0 => part(self.hash as u32, self.own),
            1 => self.own + part(high, self.further),
            _ => self.own + part(mix(high), self.further),
        }
    }

    #[inline(always)]
    fn mark(&self) -> Mark {
        let start = ((self.hash as u32 & 0xffff) * WAYS) >> 16;
        Mark(start << 24 | (self.hash >> 32) as u32 & TAG & !PENDING | 1)
    }
}

/// A number below `of`, by the highest bits of a word.
#[inline(always)]
fn part(word: u32, of: u32) -> u32 {
    ((u64::from(word) * u64::from(of)) >> 32) as u32
}

/// Hash of a key: SipHash-1-3 of its 13 bytes.
#[inline(always)]
pub fn hash(seed: &[u64; 2], key: &FlowKey) -> u64 {
    let first = u64::from(key.remote) << 32 | u64::from(key.local);
    let ports = u64::from(key.remote_port) << 16 | u64::from(key.local_port);
    let second = 13 << 56 | u64::from(key.protocol) << 32 | ports;
    let mut v = [
        seed[0] ^ 0x736f_6d65_7073_6575,
        seed[1] ^ 0x646f_7261_6e64_6f6d,
        seed[0] ^ 0x6c79_6765_6e65_7261,
        seed[1] ^ 0x7465_6462_7974_6573,
    ];
    for word in [first, second] {
        v[3] ^= word;
        v = round(v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    v = round(round(round(v)));
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

#[inline(always)]
fn round([mut a, mut b, mut c, mut d]: [u64; 4]) -> [u64; 4] {
    a = a.wrapping_add(b);
    c = c.wrapping_add(d);
    b = b.rotate_left(13) ^ a;
    d = d.rotate_left(16) ^ c;
    a = a.rotate_left(32);
    c = c.wrapping_add(b);
    a = a.wrapping_add(d);
    b = b.rotate_left(17) ^ c;
    d = d.rotate_left(21) ^ a;
    c = c.rotate_left(32);
    [a, b, c, d]
}

/// A place with what its tag was, in one word; 0 = none. From the lowest bit on: number in the bucket (4), level (2), bucket (26),
/// tag, which a place that is pending has like others (31).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(pub u64);

impl Place {
    /// There is none.
    pub const NONE: Place = Place(0);

    #[inline(always)]
    fn new(word: u32, way: u32) -> Place {
        Place(u64::from(word & !PENDING) << 32 | u64::from(way))
    }

    #[inline(always)]
    fn at(self, index: u32, level: u32) -> Place {
        Place(self.0 | u64::from(index << 6 | level << 4))
    }

    /// Whether there is one.
    #[inline(always)]
    pub fn exists(self) -> bool {
        self.0 != 0
    }

    /// Its number in the bucket.
    #[inline(always)]
    pub fn way(self) -> u32 {
        self.0 as u32 & 15
    }

    /// How many buckets it went on from.
    #[inline(always)]
    pub fn level(self) -> u32 {
        self.0 as u32 >> 4 & 3
    }

    /// Its bucket.
    #[inline(always)]
    pub fn index(self) -> u32 {
        self.0 as u32 >> 6
    }

    /// Its tag.
    #[inline(always)]
    pub fn word(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The memory of a table. All that changes something is atomic, and a barrier.
pub trait Cells {
    /// A bucket.
    type Bucket: Copy;
    /// Places of a bucket.
    const WAYS: u32 = WAYS;
    /// Buckets in which a key can be.
    const LEVELS: u32 = 3;

    /// A bucket by its index.
    fn bucket(&self, index: u32) -> Option<Self::Bucket>;
    /// The tag of a place.
    fn tag(&self, bucket: Self::Bucket, way: u32) -> u32;
    /// The same, for whoever looks whether he must give way.
    #[inline(always)]
    fn tag_again(&self, bucket: Self::Bucket, way: u32) -> u32 {
        self.tag(bucket, way)
    }
    /// Changes a tag, if it still is `old`.
    fn change(&self, bucket: Self::Bucket, way: u32, old: u32, new: u32) -> bool;
    /// Entries that went on from a bucket.
    fn spilled(&self, bucket: Self::Bucket) -> u32;
    /// One goes on from a bucket.
    fn spill(&self, bucket: Self::Bucket);
    /// One that went on from a bucket is gone.
    fn unspill(&self, bucket: Self::Bucket);
    /// Counts one entry more. False if there is no room for it.
    fn add(&self) -> bool;
    /// Counts one entry less.
    fn subtract(&self);
    /// Whether a place holds the key.
    fn holds(&self, bucket: Self::Bucket, way: u32) -> bool;
    /// Writes key and value into a place that is the caller's.
    fn write(&self, bucket: Self::Bucket, way: u32);

    // What the programs have as functions of their own, which the verifier follows once.

    /// See [`find`].
    #[inline(always)]
    fn find(&self, spots: &Spots) -> Place {
        find(self, spots)
    }
    /// See [`claim`].
    #[inline(always)]
    fn claim(&self, spots: &Spots) -> Place {
        claim(self, spots)
    }
    /// See [`meets`].
    #[inline(always)]
    fn meets(&self, spots: &Spots, own: Place) -> bool {
        meets(self, spots, own)
    }
    /// See [`remove`].
    #[inline(always)]
    fn passed_by(&self, spots: &Spots, level: u32) {
        passed_by(self, spots, level);
    }
    /// See [`find_in`].
    #[inline(always)]
    fn find_in(&self, index: u32, mark: Mark) -> Place {
        find_in(self, index, mark)
    }
    /// See [`claim_in`].
    #[inline(always)]
    fn claim_in(&self, index: u32, mark: Mark) -> Place {
        claim_in(self, index, mark)
    }
    /// See [`meets_in`].
    #[inline(always)]
    fn meets_in(&self, index: u32, mark: Mark, own: u32) -> bool {
        meets_in(self, index, mark, own)
    }
}

/// What came of entering a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It is in.
    New,
    /// It is in already, or somebody else is just entering it.
    Known,
    /// There is no room.
    Full,
}

/// The place of a key. Whoever copies what is there looks once more at the tag.
#[inline(always)]
pub fn find<C: Cells + ?Sized>(cells: &C, spots: &Spots) -> Place {
    let mut level = 0;
    while level < C::LEVELS {
        let index = spots.bucket(level);
        let found = cells.find_in(index, spots.mark());
        if found.exists() {
            return found.at(index, level);
        }
        if !went_on(cells, index) {
            break;
        }
        level += 1;
    }
    Place::NONE
}

/// Whether entries went on from a bucket.
#[inline(always)]
fn went_on<C: Cells + ?Sized>(cells: &C, index: u32) -> bool {
    cells.bucket(index).is_some_and(|bucket| cells.spilled(bucket) != 0)
}

/// The place of a key in one bucket.
#[inline(always)]
pub fn find_in<C: Cells + ?Sized>(cells: &C, index: u32, mark: Mark) -> Place {
    let Some(bucket) = cells.bucket(index) else { return Place::NONE };
    let (tag, mut way, mut turn) = (mark.tag(), mark.start(), 0);
    while turn < C::WAYS {
        let word = cells.tag(bucket, way);
        if word & TAG == tag && cells.holds(bucket, way) {
            return Place::new(word, way);
        }
        way = after::<C>(way);
        turn += 1;
    }
    Place::NONE
}

/// The next place of a bucket. (Without a branch: the verifier would follow every place by itself.)
#[inline(always)]
fn after<C: Cells + ?Sized>(way: u32) -> u32 {
    let beyond = C::WAYS.wrapping_sub(2).wrapping_sub(way) >> 31;
    way + 1 - beyond * C::WAYS
}

/// Enters a key that must not be in.
#[inline(always)]
pub fn insert<C: Cells>(cells: &C, spots: &Spots) -> Inserted {
    if cells.find(spots).exists() {
        return Inserted::Known;
    }
    if !cells.add() {
        return Inserted::Full;
    }
    let place = cells.claim(spots);
    let (true, Some(bucket)) = (place.exists(), cells.bucket(place.index())) else {
        cells.subtract();
        return Inserted::Full;
    };
    let (way, word) = (place.way(), place.word() | PENDING);
    cells.write(bucket, way);
    if cells.meets(spots, place) {
        cells.change(bucket, way, word, word & GENERATION);
        cells.passed_by(spots, place.level());
        cells.subtract();
        return Inserted::Known;
    }
    // Nobody else changes a place that is pending.
    cells.change(bucket, way, word, word & !PENDING);
    Inserted::New
}

/// Gives what was found in a place another value. False if it has become another's.
#[inline(always)]
pub fn replace<C: Cells + ?Sized>(cells: &C, found: Place) -> bool {
    let Some(bucket) = cells.bucket(found.index()) else { return false };
    let (way, taken) = (found.way(), taken(found.word(), found.word() & TAG));
    if !cells.change(bucket, way, found.word(), taken) {
        return false;
    }
    cells.write(bucket, way);
    cells.change(bucket, way, taken, taken & !PENDING)
}

/// The tag of a place that is taken for an entry.
#[inline(always)]
fn taken(before: u32, tag: u32) -> u32 {
    before.wrapping_add(ONE_GENERATION) & GENERATION | tag | PENDING
}

/// Takes a free place, which stays pending.
#[inline(always)]
pub fn claim<C: Cells + ?Sized>(cells: &C, spots: &Spots) -> Place {
    let mut level = 0;
    while level < C::LEVELS {
        let index = spots.bucket(level);
        let place = cells.claim_in(index, spots.mark());
        if place.exists() {
            return place.at(index, level);
        }
        // Before a place is taken there: whoever takes one here after this sees that there may be another.
        if let Some(bucket) = cells.bucket(index) {
            cells.spill(bucket);
        }
        level += 1;
    }
    passed_by(cells, spots, C::LEVELS);
    Place::NONE
}

/// The same in one bucket.
#[inline(always)]
pub fn claim_in<C: Cells + ?Sized>(cells: &C, index: u32, mark: Mark) -> Place {
    let Some(bucket) = cells.bucket(index) else { return Place::NONE };
    let (mut way, mut turn) = (mark.start(), 0);
    while turn < C::WAYS {
        let word = cells.tag(bucket, way);
        if word & TAG == 0 {
            let taken = taken(word, mark.tag());
            if cells.change(bucket, way, word, taken) {
                return Place::new(taken, way);
            }
        }
        way = after::<C>(way);
        turn += 1;
    }
    Place::NONE
}

/// Whether another place holds the key or may be about to.
#[inline(always)]
pub fn meets<C: Cells + ?Sized>(cells: &C, spots: &Spots, own: Place) -> bool {
    let mut level = 0;
    while level < C::LEVELS {
        let index = spots.bucket(level);
        let own = if level == own.level() { own.way() } else { C::WAYS };
        if cells.meets_in(index, spots.mark(), own) {
            return true;
        }
        if !went_on(cells, index) {
            break;
        }
        level += 1;
    }
    false
}

/// The same in one bucket; `own` is the place there that is the caller's, if there is such a one.
#[inline(always)]
pub fn meets_in<C: Cells + ?Sized>(cells: &C, index: u32, mark: Mark, own: u32) -> bool {
    let Some(bucket) = cells.bucket(index) else { return false };
    let mut way = 0;
    while way < C::WAYS {
        let word = cells.tag_again(bucket, way);
        // What is in a place that is pending can't be told yet.
        if way != own
            && word & TAG & !PENDING == mark.tag()
            && (word & PENDING != 0 || cells.holds(bucket, way))
        {
            return true;
        }
        way += 1;
    }
    false
}

/// Removes what was found in a place. False if somebody else has.
#[inline(always)]
pub fn remove<C: Cells + ?Sized>(cells: &C, spots: &Spots, found: Place) -> bool {
    let Some(bucket) = cells.bucket(found.index()) else { return false };
    if !cells.change(bucket, found.way(), found.word(), found.word() & GENERATION) {
        return false;
    }
    cells.passed_by(spots, found.level());
    cells.subtract();
    true
}

/// One that went on to this level is gone.
#[inline(always)]
pub fn passed_by<C: Cells + ?Sized>(cells: &C, spots: &Spots, level: u32) {
    let mut passed = 0;
    while passed < level && passed < C::LEVELS {
        if let Some(bucket) = cells.bucket(spots.bucket(passed)) {
            cells.unspill(bucket);
        }
        passed += 1;
    }
}
