//! Each safeguard is needed: without it the model finds two nodes that can send from the same slice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod model_support;

use model_support::state::Left;
use model_support::{Cluster, ONE_OWNER, Safeguards, check};

/// A node leaves the site, and all of its slice's life goes by once.
const A_MOVE: Left =
    Left { ticks: 1, moves: 1, stops: 0, starts: 0, deletions: 0, edits: 0, lags: 0, crashes: 0 };

/// Whether two nodes come to own a slice when the safeguards are changed so.
fn breaks(what: &str, left: Left, change: impl FnOnce(&mut Safeguards)) -> bool {
    let mut cluster = Cluster::new(2, 2, 1, left);
    change(&mut cluster.safeguards);
    let found = check(what, cluster);
    assert!(found.wrong.iter().all(|(name, _)| *name == ONE_OWNER), "{:?}", found.wrong);
    !found.wrong.is_empty()
}

#[test]
fn all_of_them_suffice() {
    assert!(!breaks("all safeguards", A_MOVE, |_| {}));
}

#[test]
fn a_data_plane_follows_no_older_object() {
    assert!(breaks("no epoch check at the agent", A_MOVE, |it| it.epoch_at_agent = false));
}

#[test]
fn slices_rest_between_two_holders() {
    assert!(breaks("no quarantine", A_MOVE, |it| it.quarantine = false));
}

#[test]
fn rests_are_measured_by_a_clock_that_nobody_sets() {
    assert!(breaks("rests by the time of day alone", A_MOVE, |it| it.own_rests = false));
}

#[test]
fn what_changed_meanwhile_is_not_deleted() {
    let again = Left { edits: 2, ..A_MOVE };
    assert!(breaks("no compare-and-swap", again, |it| it.compare_and_swap = false));
}

#[test]
fn what_changed_meanwhile_is_not_written_over() {
    let back = Left { moves: 2, ..A_MOVE };
    let neither = |it: &mut Safeguards| (it.compare_and_swap, it.epoch_grows) = (false, false);
    assert!(breaks("neither compare-and-swap nor a growing epoch", back, neither));
    // Every plan raises the epoch by one, so that the API server's own rule does for replacements what
    // compare-and-swap does.
    assert!(!breaks("a growing epoch alone", back, |it| it.compare_and_swap = false));
    assert!(!breaks("compare-and-swap alone", back, |it| it.epoch_grows = false));
}

#[test]
fn a_report_counts_for_what_was_programmed() {
    let out_in_out = Left { moves: 3, ..A_MOVE };
    assert!(breaks("reports of any epoch count", out_in_out, |it| it.confirmed_epoch = false));
}

#[test]
fn a_report_knows_of_packets_that_were_under_way() {
    assert!(breaks("reports by any scan", A_MOVE, |it| it.settled = false));
}

#[test]
fn a_node_that_the_list_lacks_is_asked_for() {
    let old_list = Left { lags: 1, ..A_MOVE };
    assert!(breaks("nodes are gone that the list lacks", old_list, |it| it.ask_for_nodes = false));
}

/// No safeguard, but what is assumed of the world (see `model_support`), and why.
#[test]
fn a_node_that_is_made_again_is_not_faster_than_a_write() {
    let again = Left { deletions: 1, starts: 1, ..A_MOVE };
    assert!(breaks("a Node made again during a write", again, |it| it.slow_start = false));
}
