//! How much of this node somebody takes: one pod of an allocation, one account, and all together.
//!
//! Programs count what they enter before they enter it, and take it back once it has ended, so that a count is never less than what
//! lives. A count is a signed number beside a number of changes: who recounts the flows between two looks at both knows by how
//! much the count may differ from what was found, and the rest is an error to be set right.

use crate::{ANY_NUMBER, map_type};

/// Key of `LOADS` (hash).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LoadKey {
    /// Of a pod: its address and [`PodValue::incarnation`](crate::PodValue::incarnation), see [`LoadKey::pod`]. Of an account:
    /// [`AllocationValue::account`](crate::AllocationValue::account).
    pub id: u64,
    /// Index into `ALLOCATIONS` of what the pod takes flows of; [`WHOLE_ACCOUNT`] of an account.
    pub allocation: u32,
    /// Zero.
    pub pad: u32,
}
map_type!(LoadKey, 16);

/// In place of an allocation: all of an account's together.
pub const WHOLE_ACCOUNT: u32 = u32::MAX;

impl LoadKey {
    /// What a pod takes of an allocation.
    #[inline(always)]
    pub const fn pod(address: u32, incarnation: u32, allocation: u32) -> LoadKey {
        LoadKey { id: (address as u64) << 32 | incarnation as u64, allocation, pad: 0 }
    }

    /// The address (in network byte order) and the incarnation of a pod; `None` for an account.
    #[inline(always)]
    pub const fn whose_pod(&self) -> Option<(u32, u32)> {
        match self.allocation {
            WHOLE_ACCOUNT => None,
            _ => Some(((self.id >> 32) as u32, self.id as u32)),
        }
    }

    /// What an account takes.
    #[inline(always)]
    pub const fn account(account: u64) -> LoadKey {
        LoadKey { id: account, allocation: WHOLE_ACCOUNT, pad: 0 }
    }
}

/// Value of `LOADS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadValue {
    /// The entry's own key: who finds this memory reused for another undoes what it did.
    pub key: LoadKey,
    /// Flows: a count, see [`count`]. Marked [`DEAD`] while the entry is removed.
    pub flows: u64,
    /// Bitmaps of ports (`BLOCKS`) of an account: a count.
    pub blocks: u64,
    /// Flows that were asked for in the current second: the second in the upper half, how many in the lower.
    pub opened: u64,
    /// New flows of a pod that were refused by a limit, its own or its account's.
    pub refused: u64,
}
map_type!(LoadValue, 48);

/// Value of `ALL_LOADS` (array of one): all accounts, also those that have no name.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllLoads {
    /// Flows: a count.
    pub flows: u64,
    /// Bitmaps of ports: a count.
    pub blocks: u64,
}
map_type!(AllLoads, 16);

/// Value of `LIMITED` (per-CPU array; index: as in `ALLOCATIONS`): new flows that were refused, by the limit.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitedValue {
    /// The pod has as many flows as it may.
    pub pod_flows: u64,
    /// It has asked for as many in this second as it may.
    pub pod_rate: u64,
    /// The account has as many flows as it may.
    pub account_flows: u64,
    /// It has asked for as many in this second as it may.
    pub account_rate: u64,
}
map_type!(LimitedValue, 32);

/// Entries of `LOADS`: pods with flows, or that had some within [`LOAD_IDLE`], for each allocation that they use, and accounts.
pub const MAX_LOADS: u32 = 1 << 15;
/// Seconds without a new flow after which an entry that counts none is removed.
pub const LOAD_IDLE: u32 = 60;

/// What is added to a count for one more.
pub const MORE: u64 = 1 << 32 | 1;
/// What is added to a count for one less: the carry out of the lower half is the change that is counted.
pub const LESS: u64 = (1 << 32) - 1;
/// In the lower half of a count: the entry is being removed, and who counts there has to look for another.
pub const DEAD: u64 = 1 << 31;

/// How many a count says. (Less than none if it was wrong.)
#[inline(always)]
pub const fn count(cell: u64) -> i32 {
    cell as u32 as i32
}

/// How often it has changed, at least.
#[inline(always)]
pub const fn changes(cell: u64) -> u32 {
    (cell >> 32) as u32
}

/// Whether the entry is being removed. (A count below none has the next bit set too.)
#[inline(always)]
pub const fn is_dead(cell: u64) -> bool {
    cell as u32 >> 30 == 2
}

/// How many there may be. `most` is what is set, 0 = nothing. With a `room` (not 0), of which `all` is taken, an account leaves
/// room for others: it may have no more than is left for whoever comes next. One account has half of it then, two have a third
/// each, and there is always something left.
#[inline(always)]
pub const fn limit(most: u32, room: u32, all: i32) -> u32 {
    let most = if most == 0 { ANY_NUMBER } else { most };
    if room == 0 {
        return most;
    }
    let left = room as i64 - all as i64;
    if left <= 0 {
        0
    } else if left < most as i64 {
        left as u32
    } else {
        most
    }
}

/// Whether there are as many as there may be.
#[inline(always)]
pub const fn is_full(count: i32, limit: u32) -> bool {
    count as i64 >= limit as i64
}

/// By how much a count is wrong for sure, if `found` were there, between looks at it before and after. 0 = it may be right.
pub const fn error(before: u64, after: u64, found: u32) -> i32 {
    let moved = changes(after).wrapping_sub(changes(before)) as i64;
    let off = count(after) as i64 - found as i64;
    let error = if off > moved {
        off - moved
    } else if off < -moved {
        off + moved
    } else {
        0
    };
    error as i32
}

/// What is added to a count to take an error out of it: its number of changes may only rise.
pub const fn correction(error: i32) -> u64 {
    (1u64 << 32).wrapping_add((error.wrapping_neg()) as i64 as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_goes_up_and_down_and_tells_how_often() {
        let mut cell = 0u64;
        for expected in 1..=3 {
            cell = cell.wrapping_add(MORE);
            assert_eq!((count(cell), changes(cell)), (expected, expected as u32));
        }
        for (expected, turns) in [(2, 4), (1, 5), (0, 6)] {
            cell = cell.wrapping_add(LESS);
            assert_eq!((count(cell), changes(cell), is_dead(cell)), (expected, turns, false));
        }
        // Should it ever be wrong, it goes below none and comes back.
        cell = cell.wrapping_add(LESS);
        assert_eq!((count(cell), is_dead(cell)), (-1, false));
        cell = cell.wrapping_add(MORE);
        assert_eq!((count(cell), changes(cell)), (0, 8));
        assert!(is_dead(cell | DEAD) && is_dead((cell | DEAD).wrapping_add(MORE)));
    }

    #[test]
    fn nothing_set_is_no_limit_and_a_limit_is_reached_at_its_number() {
        assert!(!is_full(i32::MAX, limit(0, 0, 0)));
        let five = limit(5, 0, i32::MAX);
        assert!(!is_full(-1, five) && !is_full(4, five) && is_full(5, five) && is_full(6, five));
        assert_eq!([limit(5, 100, 94), limit(5, 100, 96), limit(0, 100, 0)], [5, 4, 100]);
        assert_eq!([limit(5, 100, 100), limit(0, 100, 101), limit(0, 100, -1)], [0, 0, 101]);
        assert!(is_full(0, limit(0, 100, 100)), "there is no room for anybody");
    }

    #[test]
    fn whoever_comes_next_finds_room() {
        // Each account in turn takes what it can get.
        for room in [64u32, 1000, 1 << 20] {
            let (mut all, mut last) = (0, i32::MAX);
            for _ in 0..4 {
                let mut own = 0;
                while !is_full(own, limit(0, room, all)) {
                    own += 1;
                    all += 1;
                }
                assert!(own > 0 && own <= last && (all as u32) < room, "{own} of {room}, {all} are taken");
                last = own;
            }
        }
        // Together they have the same each.
        let mut own = [0; 3];
        let mut turned_away = 0;
        while turned_away < 3 {
            turned_away = 0;
            for at in 0..3 {
                let full = is_full(own[at], limit(0, 1000, own.iter().sum()));
                if full { turned_away += 1 } else { own[at] += 1 }
            }
        }
        assert_eq!(own, [250; 3]);
    }

    #[test]
    fn only_what_no_change_explains_is_an_error() {
        let cell = |count: i32, changes: u64| changes << 32 | u64::from(count as u32);
        for (before, after, found, expected) in [
            (cell(5, 10), cell(5, 10), 5, 0),
            (cell(5, 10), cell(5, 10), 3, 2),
            (cell(5, 10), cell(5, 10), 7, -2),
            (cell(5, 10), cell(7, 12), 5, 0),
            (cell(5, 10), cell(7, 12), 9, 0),
            (cell(5, 10), cell(7, 12), 4, 1),
            (cell(-1, u64::from(u32::MAX)), cell(-1, 1 << 32), 0, 0),
            (cell(-3, 0), cell(-3, 0), 0, -3),
        ] {
            let wrong = error(before, after, found);
            assert_eq!(wrong, expected, "{before:#x} {after:#x} {found}");
            let mended = after.wrapping_add(correction(wrong));
            assert_eq!(count(mended), count(after) - wrong);
            assert!(changes(mended).wrapping_sub(changes(after)) <= 2);
        }
    }
}
