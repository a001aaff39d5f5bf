//! `FORWARD` and `REVERSE` as the programs use them: the rules are `aegis_common`'s, the memory is that of the maps.

use crate::atomics;
use crate::maps::{FORWARD, REVERSE, TABLES};
use aegis_common::*;
use aya_ebpf::maps::Array;

/// One of the two tables.
pub trait Table: 'static {
    /// What it holds.
    type Value: Copy + 'static;
    /// Its index in `TABLES`.
    const INDEX: u32;
    /// Its buckets.
    fn buckets() -> &'static Array<Bucket<Self::Value>>;
    /// The functions of this module.
    fn find(key: &FlowKey) -> u64;
    fn find_in(key: &FlowKey, index: u32, mark: u32) -> u64;
    fn claim(hash: u64) -> u64;
    fn meets(key: &FlowKey, hash: u64, own: u64) -> u32;
    fn passed_by(hash: u64, level: u32) -> u32;
    fn claim_in(index: u32, mark: u32) -> u64;
    fn meets_in(key: &FlowKey, index: u32, mark: u32, own: u32) -> u32;
}

/// The tables, as types.
pub struct Forward;
pub struct Reverse;

/// An entry of a table that is looked for, or is being entered.
struct Entry<'e, T: Table> {
    settings: &'static TableValue,
    hash: u64,
    key: &'e FlowKey,
    /// Null where nothing is written.
    value: *const T::Value,
}

impl<'e, T: Table> Entry<'e, T> {
    #[inline(always)]
    fn hashed(key: &'e FlowKey, hash: u64) -> Option<Self> {
        Some(Entry { settings: TABLES.get(T::INDEX)?, hash, key, value: core::ptr::null() })
    }

    #[inline(always)]
    fn new(key: &'e FlowKey) -> Option<Self> {
        let settings = TABLES.get(T::INDEX)?;
        Some(Entry { settings, hash: hash_of(key, T::INDEX), key, value: core::ptr::null() })
    }

    #[inline(always)]
    fn spots(&self) -> Spots {
        self.settings.spots(self.hash)
    }

    #[inline(always)]
    fn used(&self) -> *mut u32 {
        (&raw const self.settings.used).cast_mut()
    }
}

/// A function of its own for the sake of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hash_of(key: *const FlowKey, table: u32) -> u64 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise it is the caller's.
    let (Some(key), Some(settings)) = (unsafe { key.as_ref() }, TABLES.get(table)) else { return 0 };
    hash(&settings.seed, key)
}

/// Adding this takes one away.
const MINUS_ONE: u32 = u32::MAX;

// SAFETY (of all that follows): a bucket is a map value, which stays readable and writable until the program ends; a place is
// checked against their number where it is computed.
impl<T: Table> Cells for Entry<'_, T> {
    type Bucket = *mut Bucket<T::Value>;

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<Self::Bucket> {
        T::buckets().get_ptr_mut(index)
    }
    #[inline(always)]
    fn tag(&self, bucket: Self::Bucket, way: u32) -> u32 {
        // SAFETY: see above.
        unsafe { tag(bucket, way).read_volatile() }
    }
    #[inline(always)]
    fn change(&self, bucket: Self::Bucket, way: u32, old: u32, new: u32) -> bool {
        atomics::compare_exchange(tag(bucket, way), old, new)
    }
    #[inline(always)]
    fn spilled(&self, bucket: Self::Bucket) -> u32 {
        // SAFETY: see above.
        unsafe { (&raw const (*bucket).spilled).read_volatile() }
    }
    #[inline(always)]
    fn spill(&self, bucket: Self::Bucket) {
        // SAFETY: see above.
        atomics::fetch_add(unsafe { &raw mut (*bucket).spilled }, 1);
    }
    #[inline(always)]
    fn unspill(&self, bucket: Self::Bucket) {
        // SAFETY: see above.
        atomics::fetch_add(unsafe { &raw mut (*bucket).spilled }, MINUS_ONE);
    }
    #[inline(always)]
    fn add(&self) -> bool {
        let room = atomics::fetch_add(self.used(), 1) < self.settings.limit;
        if !room {
            self.subtract();
        }
        room
    }
    #[inline(always)]
    fn subtract(&self) {
        atomics::fetch_add(self.used(), MINUS_ONE);
    }
    #[inline(always)]
    fn holds(&self, bucket: Self::Bucket, way: u32) -> bool {
        let Some(place) = place(bucket, way) else { return false };
        let (there, sought) = (place.cast::<u64>(), core::ptr::from_ref(self.key).cast::<u64>());
        let difference = |at: usize| {
            // SAFETY: see above; a key is two of these.
            unsafe { there.add(at).read_volatile() ^ sought.add(at).read() }
        };
        // One branch, not two, for the verifier to follow.
        difference(0) | difference(1) == 0
    }
    #[inline(always)]
    fn write(&self, bucket: Self::Bucket, way: u32) {
        if self.value.is_null() {
            return;
        }
        let Some(place) = place(bucket, way) else { return };
        // SAFETY: see above; the place is the caller's alone.
        unsafe {
            copy(self.key, &raw mut (*place).key);
            copy(self.value, &raw mut (*place).value);
        }
    }
    #[inline(always)]
    fn find(&self, _: &Spots) -> Place {
        Place(T::find(self.key))
    }
    #[inline(always)]
    fn claim(&self, _: &Spots) -> Place {
        Place(T::claim(self.hash))
    }
    #[inline(always)]
    fn meets(&self, _: &Spots, own: Place) -> bool {
        T::meets(self.key, self.hash, own.0) != 0
    }
    #[inline(always)]
    fn passed_by(&self, _: &Spots, level: u32) {
        if level != 0 {
            T::passed_by(self.hash, level);
        }
    }
    #[inline(always)]
    fn find_in(&self, index: u32, mark: Mark) -> Place {
        Place(T::find_in(self.key, index, mark.0))
    }
    #[inline(always)]
    fn claim_in(&self, index: u32, mark: Mark) -> Place {
        Place(T::claim_in(index, mark.0))
    }
    #[inline(always)]
    fn meets_in(&self, index: u32, mark: Mark, own: u32) -> bool {
        T::meets_in(self.key, index, mark.0, own) != 0
    }
}

/// A place's tag. (The counter comes after the last: sixteen words, so that the verifier need not follow a check.)
#[inline(always)]
fn tag<V>(bucket: *mut Bucket<V>, way: u32) -> *mut u32 {
    // SAFETY: bounded; no caller gives more than there are.
    unsafe { bucket.cast::<u32>().add(way as usize & 15) }
}

/// A place, if there is such a one: the verifier must see it.
#[inline(always)]
fn place<V>(bucket: *mut Bucket<V>, way: u32) -> Option<*mut Way<V>> {
    let way = u64::from(way);
    // In 64 bits it believes the check, of what comes from memory.
    // SAFETY: a local.
    let way = unsafe { (&raw const way).read_volatile() };
    // SAFETY: bounded.
    (way < u64::from(WAYS)).then(|| unsafe { (&raw mut (*bucket).ways).cast::<Way<V>>().add(way as usize) })
}

/// Copies word by word. (As a whole the compiler would copy byte by byte.)
#[inline(always)]
fn copy<T>(from: *const T, to: *mut T) {
    let mut at = 0;
    while at < size_of::<T>() / 4 {
        // SAFETY: the caller's, as large as their type.
        unsafe { to.cast::<u32>().add(at).write_volatile(from.cast::<u32>().add(at).read()) };
        at += 1;
    }
}

/// Where an entry is, with its tag.
#[derive(Clone, Copy)]
pub struct Seen<V> {
    /// Its value, which may become another's at any time.
    pub value: *mut V,
    tag: *mut u32,
    word: u32,
}

impl<V> Seen<V> {
    /// Whether what has been copied since it was found is all its own.
    #[inline(always)]
    pub fn is_same(&self) -> bool {
        // SAFETY: within a map value.
        unsafe { self.tag.read_volatile() == self.word }
    }
}

/// Looks for a key.
#[inline(always)]
pub fn find<T: Table>(key: &FlowKey) -> Option<Seen<T::Value>> {
    let found = Place(T::find(key));
    if !found.exists() {
        return None;
    }
    let bucket = T::buckets().get_ptr_mut(found.index())?;
    let place = place(bucket, found.way())?;
    // SAFETY: within a map value.
    let value = unsafe { &raw mut (*place).value };
    Some(Seen { value, tag: tag(bucket, found.way()), word: found.word() })
}

/// What came of entering a key.
pub const NEW: u32 = 0;
pub const KNOWN: u32 = 1;
pub const FULL: u32 = 2;

#[inline(always)]
fn insert<T: Table>(key: *const FlowKey, value: *const T::Value) -> u32 {
    // SAFETY: null is what the verifier wants to see excluded; otherwise they are the caller's.
    let Some(key) = (unsafe { key.as_ref() }) else { return FULL };
    let Some(entry) = Entry::<T>::new(key) else { return FULL };
    let entry = Entry { value, ..entry };
    match aegis_common::insert(&entry, &entry.spots()) {
        Inserted::New => NEW,
        Inserted::Known => KNOWN,
        Inserted::Full => FULL,
    }
}

#[inline(always)]
fn remove<T: Table>(key: *const FlowKey) -> u32 {
    // SAFETY: as in `insert`.
    let Some(entry) = (unsafe { key.as_ref() }).and_then(Entry::<T>::new) else { return 0 };
    let spots = entry.spots();
    let found = Cells::find(&entry, &spots);
    u32::from(found.exists() && aegis_common::remove(&entry, &spots, found))
}

/// Enters a key, or gives it another value if it is in; 0 if there is no room, or others are just changing the same.
#[inline(always)]
fn set<T: Table>(way: *const Way<T::Value>) -> u32 {
    // SAFETY: as in `insert`.
    let Some(way) = (unsafe { way.as_ref() }) else { return 0 };
    let found = Place(T::find(&way.key));
    if !found.exists() {
        return u32::from(insert::<T>(&way.key, &way.value) == NEW);
    }
    let Some(entry) = Entry::<T>::new(&way.key) else { return 0 };
    u32::from(aegis_common::replace(&Entry { value: &raw const way.value, ..entry }, found))
}

#[inline(always)]
fn find_place<T: Table>(key: *const FlowKey) -> u64 {
    // SAFETY: as in `insert`.
    let Some(entry) = (unsafe { key.as_ref() }).and_then(Entry::<T>::new) else { return 0 };
    aegis_common::find(&entry, &entry.spots()).0
}

/// An entry that is looked for in buckets by their indices.
#[inline(always)]
fn sought<T: Table>(key: *const FlowKey) -> Option<Entry<'static, T>> {
    // SAFETY: as in `insert`; it is not kept.
    unsafe { key.as_ref() }.and_then(|key| Entry::hashed(key, 0))
}

/// Functions of their own for the verifier's sake, like `take` in `ports`.
macro_rules! functions {
    ($table:ident, $map:ident, $index:ident, $value:ident, $find:ident, $find_in:ident, $claim:ident, $claim_in:ident,
     $meets:ident, $meets_in:ident, $passed_by:ident,
     $insert:ident, $remove:ident, $set:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $find(key: *const FlowKey) -> u64 {
            find_place::<$table>(key)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $find_in(key: *const FlowKey, index: u32, mark: u32) -> u64 {
            let Some(entry) = sought::<$table>(key) else { return 0 };
            aegis_common::find_in(&entry, index, Mark(mark)).0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $claim(hash: u64) -> u64 {
            let Some(entry) = Entry::<$table>::hashed(&NO_KEY, hash) else { return 0 };
            aegis_common::claim(&entry, &entry.spots()).0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $meets(key: *const FlowKey, hash: u64, own: u64) -> u32 {
            let Some(entry) = sought::<$table>(key) else { return 1 };
            u32::from(aegis_common::meets(&entry, &entry.settings.spots(hash), Place(own)))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $passed_by(hash: u64, level: u32) -> u32 {
            let Some(entry) = Entry::<$table>::hashed(&NO_KEY, hash) else { return 0 };
            aegis_common::passed_by(&entry, &entry.spots(), level);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $claim_in(index: u32, mark: u32) -> u64 {
            let Some(entry) = Entry::<$table>::hashed(&NO_KEY, 0) else { return 0 };
            aegis_common::claim_in(&entry, index, Mark(mark)).0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $meets_in(key: *const FlowKey, index: u32, mark: u32, own: u32) -> u32 {
            let Some(entry) = sought::<$table>(key) else { return 1 };
            u32::from(aegis_common::meets_in(&entry, index, Mark(mark), own))
        }

        /// Enters a key that must not be in: [`NEW`], [`KNOWN`] or [`FULL`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $insert(key: *const FlowKey, value: *const $value) -> u32 {
            insert::<$table>(key, value)
        }

        /// Removes a key; 0 if it was not in.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $remove(key: *const FlowKey) -> u32 {
            remove::<$table>(key)
        }

        /// See [`set`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $set(way: *const Way<$value>) -> u32 {
            set::<$table>(way)
        }

        impl Table for $table {
            type Value = $value;
            const INDEX: u32 = $index;
            #[inline(always)]
            fn buckets() -> &'static Array<Bucket<$value>> {
                &$map
            }
            #[inline(always)]
            fn find(key: &FlowKey) -> u64 {
                $find(key)
            }
            #[inline(always)]
            fn find_in(key: &FlowKey, index: u32, mark: u32) -> u64 {
                $find_in(key, index, mark)
            }
            #[inline(always)]
            fn claim(hash: u64) -> u64 {
                $claim(hash)
            }
            #[inline(always)]
            fn meets(key: &FlowKey, hash: u64, own: u64) -> u32 {
                $meets(key, hash, own)
            }
            #[inline(always)]
            fn passed_by(hash: u64, level: u32) -> u32 {
                $passed_by(hash, level)
            }
            #[inline(always)]
            fn claim_in(index: u32, mark: u32) -> u64 {
                $claim_in(index, mark)
            }
            #[inline(always)]
            fn meets_in(key: &FlowKey, index: u32, mark: u32, own: u32) -> u32 {
                $meets_in(key, index, mark, own)
            }
        }
    };
}
/// The key of which only the mark counts.
const NO_KEY: FlowKey =
    FlowKey { local: 0, remote: 0, local_port: 0, remote_port: 0, protocol: 0, pad: [0; 3] };
functions!(
    Forward,
    FORWARD,
    FORWARD_TABLE,
    ForwardValue,
    find_forward,
    find_in_forward,
    claim_forward,
    claim_in_forward,
    meets_forward,
    meets_in_forward,
    passed_by_forward,
    insert_forward,
    remove_forward,
    set_forward
);
functions!(
    Reverse,
    REVERSE,
    REVERSE_TABLE,
    ReverseValue,
    find_reverse,
    find_in_reverse,
    claim_reverse,
    claim_in_reverse,
    meets_reverse,
    meets_in_reverse,
    passed_by_reverse,
    insert_reverse,
    remove_reverse,
    set_reverse
);
