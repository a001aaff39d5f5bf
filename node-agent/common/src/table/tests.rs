//! All orders in which several can use one table: each actor is run again and again, one access to the memory further each time,
//! from every state that the others can bring about meanwhile. What the programs run is what runs here.
#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is what they are for")]

extern crate std;

use super::*;
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

/// Three buckets of at most two places: those in which all keys can be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Memory {
    tags: [[u32; 2]; 3],
    keys: [[u32; 2]; 3],
    values: [[u32; 2]; 3],
    spilled: [u32; 3],
    used: u32,
}

impl Memory {
    /// Keys that can be seen, with their values.
    fn seen<const WAYS: usize>(&self) -> Vec<(u32, u32)> {
        let mut seen = Vec::new();
        for bucket in 0..3 {
            for way in 0..WAYS {
                let tag = self.tags[bucket][way];
                if tag & TAG != 0 && tag & PENDING == 0 {
                    seen.push((self.keys[bucket][way], self.values[bucket][way]));
                }
            }
        }
        seen
    }
}

/// What is done to the table.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Enters a key with a value.
    Insert(u32, u32),
    /// Removes a key.
    Remove(u32),
    /// Looks for a key.
    Find(u32),
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Done {
    Inserted(Inserted2),
    Removed(bool),
    Found(Option<u32>),
}

/// [`Inserted`], to be hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Inserted2 {
    New,
    Known,
    Full,
}

/// A safeguard that is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Without {
    Nothing,
    /// Whoever has taken a place does not look for others.
    SecondLook,
    /// That entries went on from a bucket is not told.
    Spilled,
    /// A place that is taken again has the same tag as before.
    Generations,
}

/// What an actor's accesses so far gave, which is all that tells where it is.
type History = Vec<u32>;

/// The memory as one actor sees it: accesses that it has made before give what they gave then, one more is made, and all after
/// that do nothing.
struct View<'v, const WAYS: u32, const LEVELS: u32> {
    memory: &'v RefCell<Memory>,
    history: &'v RefCell<History>,
    at: Cell<usize>,
    made: Cell<bool>,
    over: Cell<bool>,
    without: Without,
    limit: u32,
    key: Cell<u32>,
    value: Cell<u32>,
}

impl<const WAYS: u32, const LEVELS: u32> View<'_, WAYS, LEVELS> {
    fn access(&self, access: impl FnOnce(&mut Memory) -> u32) -> u32 {
        let at = self.at.get();
        self.at.set(at + 1);
        if let Some(result) = self.history.borrow().get(at) {
            return *result;
        }
        if self.made.replace(true) {
            // It does not count what the rest of the run does.
            self.over.set(true);
            return 0;
        }
        let result = access(&mut self.memory.borrow_mut());
        self.history.borrow_mut().push(result);
        result
    }

    /// All keys meet.
    fn spots(&self) -> Spots {
        let spots = (0..).map(|high| Spots { hash: high << 32, own: 1, further: 2 });
        spots.into_iter().find(|spots| [0, 1, 2].map(|level| spots.bucket(level)) == [0, 1, 2]).unwrap()
    }

    fn run(&self, acts: &[Act]) -> Vec<Done> {
        acts.iter().map(|act| self.act(*act)).collect()
    }

    fn act(&self, act: Act) -> Done {
        let spots = self.spots();
        match act {
            Act::Insert(key, value) => {
                self.key.set(key);
                self.value.set(value);
                Done::Inserted(match insert(self, &spots) {
                    Inserted::New => Inserted2::New,
                    Inserted::Known => Inserted2::Known,
                    Inserted::Full => Inserted2::Full,
                })
            }
            Act::Remove(key) => {
                self.key.set(key);
                let found = find(self, &spots);
                Done::Removed(found.exists() && remove(self, &spots, found))
            }
            Act::Find(key) => {
                self.key.set(key);
                let place = find(self, &spots);
                if !place.exists() {
                    return Done::Found(None);
                }
                let (bucket, way) = (place.index() as usize, place.way() as usize);
                let value = self.access(|memory| memory.values[bucket][way]);
                let same = self.tag(bucket, place.way()) == place.word();
                Done::Found(same.then_some(value))
            }
        }
    }
}

impl<const WAYS: u32, const LEVELS: u32> Cells for View<'_, WAYS, LEVELS> {
    type Bucket = usize;
    const WAYS: u32 = WAYS;
    const LEVELS: u32 = LEVELS;

    fn bucket(&self, index: u32) -> Option<usize> {
        Some(index as usize)
    }
    fn tag(&self, bucket: usize, way: u32) -> u32 {
        self.access(|memory| memory.tags[bucket][way as usize])
    }
    fn tag_again(&self, bucket: usize, way: u32) -> u32 {
        if self.without == Without::SecondLook { 0 } else { self.tag(bucket, way) }
    }
    fn change(&self, bucket: usize, way: u32, old: u32, new: u32) -> bool {
        let new = if self.without == Without::Generations { new & TAG } else { new };
        let changed = self.access(|memory| {
            let tag = &mut memory.tags[bucket][way as usize];
            let same = *tag == old || self.without == Without::Generations && *tag & TAG == old & TAG;
            if same {
                *tag = new;
            }
            u32::from(same)
        });
        changed != 0
    }
    fn spilled(&self, bucket: usize) -> u32 {
        let spilled = self.access(|memory| memory.spilled[bucket]);
        if self.without == Without::Spilled { 0 } else { spilled }
    }
    fn spill(&self, bucket: usize) {
        self.access(|memory| {
            memory.spilled[bucket] += 1;
            0
        });
    }
    fn unspill(&self, bucket: usize) {
        self.access(|memory| {
            memory.spilled[bucket] -= 1;
            0
        });
    }
    fn add(&self) -> bool {
        let before = self.access(|memory| {
            memory.used += 1;
            memory.used - 1
        });
        if before >= self.limit {
            self.subtract();
        }
        before < self.limit
    }
    fn subtract(&self) {
        self.access(|memory| {
            memory.used -= 1;
            0
        });
    }
    fn holds(&self, bucket: usize, way: u32) -> bool {
        self.access(|memory| memory.keys[bucket][way as usize]) == self.key.get()
    }
    fn write(&self, bucket: usize, way: u32) {
        let (key, value) = (self.key.get(), self.value.get());
        self.access(|memory| {
            memory.keys[bucket][way as usize] = key;
            0
        });
        self.access(|memory| {
            memory.values[bucket][way as usize] = value;
            0
        });
    }
}

/// An actor's part of a state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Actor {
    history: History,
    done: Option<Vec<Done>>,
}

/// Several actors at one table.
struct Scene<'s> {
    actors: &'s [&'s [Act]],
    limit: u32,
    without: Without,
    /// Must be found by whoever looks for it: it is there from the beginning, and nobody removes it.
    stays: Option<u32>,
}

impl Scene<'_> {
    /// Goes through all states. Gives their number, or what is wrong with one.
    fn explore<const WAYS: u32, const LEVELS: u32>(&self, begin: &[Act]) -> Result<usize, String> {
        let first = Actor { history: vec![], done: None };
        let mut memory = Memory::default();
        // What is there at the beginning, by an actor alone.
        let mut alone = first.clone();
        while alone.done.is_none() {
            (memory, alone) = self.step::<WAYS, LEVELS>(&memory, &alone, begin);
        }
        let mut waiting = vec![(memory, vec![first; self.actors.len()])];
        let mut known: HashSet<(Memory, Vec<Actor>)> = waiting.iter().cloned().collect();
        let mut ends = 0;
        while let Some((memory, actors)) = waiting.pop() {
            let seen = if WAYS == 1 { memory.seen::<1>() } else { memory.seen::<2>() };
            let keys: HashSet<u32> = seen.iter().map(|(key, _)| *key).collect();
            if keys.len() != seen.len() {
                return Err(format!("a key is there twice: {memory:?}"));
            }
            if actors.iter().all(|actor| actor.done.is_some()) {
                ends += 1;
                self.check_end(&memory, &seen, begin, &actors)?;
            }
            for (at, actor) in actors.iter().enumerate().filter(|(_, actor)| actor.done.is_none()) {
                let (memory, actor) = self.step::<WAYS, LEVELS>(&memory, actor, self.actors[at]);
                let mut actors = actors.clone();
                actors[at] = actor;
                let state = (memory, actors);
                if known.insert(state.clone()) {
                    waiting.push(state);
                }
            }
        }
        assert!(ends > 0);
        Ok(known.len())
    }

    /// One access of one actor.
    fn step<const WAYS: u32, const LEVELS: u32>(
        &self,
        memory: &Memory,
        actor: &Actor,
        acts: &[Act],
    ) -> (Memory, Actor) {
        let memory = RefCell::new(memory.clone());
        let history = RefCell::new(actor.history.clone());
        let view = View::<WAYS, LEVELS> {
            memory: &memory,
            history: &history,
            at: Cell::new(0),
            made: Cell::new(false),
            over: Cell::new(false),
            without: self.without,
            limit: self.limit,
            key: Cell::new(0),
            value: Cell::new(0),
        };
        let done = Some(view.run(acts)).filter(|_| !view.over.get());
        let mut history = history.into_inner();
        if done.is_some() {
            // Of no account any more.
            history.clear();
        }
        (memory.into_inner(), Actor { history, done })
    }

    /// At rest: what was entered and not removed is there, all counts are exact, and nobody saw a mixture.
    fn check_end(
        &self,
        memory: &Memory,
        seen: &[(u32, u32)],
        begin: &[Act],
        actors: &[Actor],
    ) -> Result<(), String> {
        let mut balance = begin.len();
        for (acts, actor) in self.actors.iter().zip(actors) {
            for (act, done) in acts.iter().zip(actor.done.as_deref().unwrap_or_default()) {
                match (act, done) {
                    (Act::Insert(..), Done::Inserted(Inserted2::New)) => balance += 1,
                    (Act::Insert(key, _), Done::Inserted(Inserted2::Full)) if self.limit > 9 => {
                        return Err(format!("no room for {key}: {memory:?}"));
                    }
                    (Act::Remove(_), Done::Removed(true)) => balance -= 1,
                    (Act::Find(key), Done::Found(found)) => {
                        if found.is_some_and(|value| value / 10 != *key) {
                            return Err(format!("{found:?} is no value of {key}"));
                        }
                        if found.is_none() && self.stays == Some(*key) {
                            return Err(format!("{key} was not found: {memory:?}"));
                        }
                    }
                    _ => {}
                }
            }
        }
        let pending = memory.tags.iter().flatten().any(|tag| tag & PENDING != 0);
        // Here nothing is in a further bucket that did not go on from those before.
        let beyond =
            |from: usize| memory.tags[from..].iter().flatten().filter(|tag| **tag & TAG != 0).count();
        let spilled = [beyond(1), beyond(2), 0].map(|count| count as u32);
        if pending || seen.len() != balance || memory.used as usize != balance || memory.spilled != spilled {
            return Err(format!("{balance} were entered and not removed: {memory:?}"));
        }
        Ok(())
    }
}

use Act::{Find, Insert, Remove};

/// What several do at once; values are ten times their key, and a number.
const SCENES: &[(&[Act], &[&[Act]])] = &[
    // Two enter the same key, and somebody looks for it.
    (&[], &[&[Insert(1, 11)], &[Insert(1, 12)], &[Find(1)]]),
    // The same, where it is full, and becomes less so.
    (&[Insert(2, 21), Insert(3, 31)], &[&[Insert(1, 11)], &[Insert(1, 12)], &[Remove(2)]]),
    (&[Insert(2, 21)], &[&[Insert(1, 11)], &[Insert(1, 12), Remove(1)], &[Remove(2)]]),
    // A key is removed and entered anew.
    (&[Insert(1, 11)], &[&[Remove(1), Insert(1, 12)], &[Insert(1, 13)], &[Find(1)]]),
    (&[Insert(2, 21), Insert(1, 11)], &[&[Remove(1)], &[Remove(1)], &[Insert(1, 12)]]),
    // Places become others' while somebody copies.
    (&[Insert(1, 11)], &[&[Find(1)], &[Remove(1), Insert(2, 21)], &[Insert(3, 31)]]),
    (&[Insert(1, 11)], &[&[Find(1)], &[Remove(1), Insert(2, 21), Remove(2), Insert(1, 12)]]),
];

/// All scenes with two places in two buckets, and with one place in three.
fn explore(without: Without) -> impl Iterator<Item = Result<usize, String>> {
    SCENES.iter().flat_map(move |(begin, actors)| {
        let scene = Scene { actors, limit: 9, without, stays: None };
        [scene.explore::<2, 2>(begin), scene.explore::<1, 3>(begin)]
    })
}

#[test]
fn no_key_is_there_twice_and_none_is_lost_in_whatever_order() {
    for (at, result) in explore(Without::Nothing).enumerate() {
        match result {
            Ok(states) => assert!(states > 100, "scene {at}: {states} states"),
            Err(wrong) => panic!("scene {at}: {wrong}"),
        }
    }
}

#[test]
fn each_safeguard_is_needed() {
    for without in [Without::SecondLook, Without::Spilled, Without::Generations] {
        assert!(explore(without).any(|result| result.is_err()), "nothing goes wrong without {without:?}");
    }
}

/// What is in a further bucket is found for as long as it is there, though those before it come and go.
#[test]
fn what_stays_is_always_found() {
    let begin = [Insert(2, 21), Insert(3, 31), Insert(1, 11)];
    let actors: &[&[Act]] = &[&[Find(1)], &[Remove(2), Insert(4, 41)], &[Remove(3)]];
    let scene = Scene { actors, limit: 9, without: Without::Nothing, stays: Some(1) };
    for result in [scene.explore::<2, 2>(&begin), scene.explore::<1, 3>(&begin)] {
        assert!(result.is_ok_and(|states| states > 100));
    }
    let scene = Scene { without: Without::Spilled, ..scene };
    assert!(scene.explore::<2, 2>(&begin).is_err());
}

/// Never more than may be in, and as many as may be if they come one by one.
#[test]
fn the_limit_holds_in_whatever_order() {
    let actors: &[&[Act]] = &[&[Insert(1, 11)], &[Insert(2, 21)], &[Remove(3)]];
    let scene = Scene { actors, limit: 2, without: Without::Nothing, stays: None };
    assert!(scene.explore::<2, 2>(&[Insert(3, 31)]).is_ok_and(|states| states > 100));
    let actors: &[&[Act]] = &[&[Insert(2, 21), Insert(3, 31), Remove(2), Insert(3, 31)]];
    let scene = Scene { actors, limit: 2, without: Without::Nothing, stays: None };
    assert!(scene.explore::<1, 3>(&[Insert(1, 11)]).is_ok());
}

fn key(number: u32) -> FlowKey {
    FlowKey {
        local: 0x0100_f40a,
        remote: 0x0764_33c6,
        local_port: number as u16,
        remote_port: (number >> 16) as u16,
        protocol: 6,
        pad: [0; 3],
    }
}

/// The bytes 0 to 12 as a key. (CPython hashes bytes by SipHash-1-3, with a seed of zeroes if it is told so.)
#[test]
fn the_hash_is_siphash_1_3() {
    let key = FlowKey {
        local: 0x0302_0100,
        remote: 0x0706_0504,
        local_port: 0x0908,
        remote_port: 0x0b0a,
        protocol: 0x0c,
        pad: [0; 3],
    };
    assert_eq!(hash(&[0, 0], &key), 0xa0cf_3211_850f_8e0d);
    let seed = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
    assert_eq!(hash(&seed, &key), 0x306f_760c_1229_ffa7);
}

/// As many flows as may be find a place, in tables of any size, and few are in further buckets.
#[test]
fn a_full_table_has_room_for_all() {
    for (limit, seed) in [(8, 1), (1024, 2), (4096, 3), (100_000, 4)] {
        let buckets = TableValue::buckets(limit);
        let table = TableValue::new(buckets, limit, [seed, 77]);
        assert_eq!(table.own + table.further, buckets);
        assert!(u64::from(table.own * WAYS) * LOAD >= u64::from(limit) * 4, "{limit}");
        let mut room = vec![WAYS; buckets as usize];
        let mut at_level = [0, 0, 0];
        for number in 0..limit {
            let spots = table.spots(hash(&table.seed, &key(number)));
            let level = (0..3).find(|level| room[spots.bucket(*level) as usize] > 0);
            let level = level.unwrap_or_else(|| panic!("flow {number} of {limit} finds no place"));
            room[spots.bucket(level) as usize] -= 1;
            at_level[level as usize] += 1;
        }
        assert!(at_level[1] + at_level[2] <= limit / 25 + 8, "{limit}: {at_level:?}");
    }
}
