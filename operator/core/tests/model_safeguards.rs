//! Each safeguard is needed: without it the model finds two nodes that can send from the same slice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod model_support;

use aegis_core::fence::Holder;
use model_support::state::{Lease, Left, NodeObject, State, node_name};
use model_support::{Cluster, Fence, Kind, ONE_OWNER, Safeguards, check};
use std::time::Duration;

/// A node leaves the site, and all of its slice's life goes by once.
const A_MOVE: Left = Left {
    ticks: 1,
    moves: 1,
    stops: 0,
    starts: 0,
    deletions: 0,
    edits: 0,
    lags: 0,
    crashes: 0,
    takeovers: 0,
    confirms: 0,
    fences: 0,
};

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

/// A node whose Lease is taken over once, and that is never seen to do anything else wrong.
fn breaks_fence(what: &str, left: Left, change: impl FnOnce(&mut Cluster)) -> bool {
    let mut cluster = Cluster::new(2, 2, 1, left);
    (cluster.fence, cluster.faulty) = (Fence::Time, 1);
    (cluster.operators, cluster.drift, cluster.lagging) = (1, [0, 0], &[]);
    change(&mut cluster);
    let found = check(what, cluster);
    assert!(found.wrong.iter().all(|(name, _)| *name == ONE_OWNER), "{:?}", found.wrong);
    !found.wrong.is_empty()
}

/// Its slice goes to the other node.
const A_TAKE_OVER: Left = Left { ticks: 3, moves: 0, takeovers: 1, confirms: 1, ..A_MOVE };

fn without(left: Left, what: &str, change: impl FnOnce(&mut Safeguards)) {
    assert!(breaks_fence(what, left, |it| change(&mut it.safeguards)), "{what}");
}

#[test]
fn with_a_fence_they_suffice() {
    assert!(!breaks_fence("fence, all safeguards", A_TAKE_OVER, |_| {}));
}

#[test]
fn a_lease_is_taken_over_before_anybody_waits() {
    without(A_TAKE_OVER, "no take-over", |it| it.take_over = false);
}

#[test]
fn a_deadline_is_waited_for() {
    without(A_TAKE_OVER, "no wait", |it| it.wait = false);
}

#[test]
fn a_data_plane_keeps_its_deadline() {
    without(A_TAKE_OVER, "no deadline in the data plane", |it| it.deadline = false);
}

#[test]
fn slices_rest_after_a_deadline_too() {
    without(A_TAKE_OVER, "no quarantine after a deadline", |it| it.quarantine = false);
}

#[test]
fn a_deadline_counts_from_when_the_renewal_was_sent() {
    let longer = Left { ticks: 4, ..A_TAKE_OVER };
    without(longer, "a deadline from the answer on", |it| it.from_sending = false);
}

#[test]
fn only_nodes_that_are_known_to_keep_a_deadline_are_fenced() {
    let edit = Left { fences: 1, ..A_TAKE_OVER };
    without(edit, "whatever is programmed", |it| it.programmed_fence = false);
}

#[test]
fn a_lease_is_given_back_when_its_node_holds_nothing() {
    // The node is to lose its slice anyhow, so that the other one gets it when it is free.
    let leaves = |state: &mut State| state.server.nodes[0] = Some(NodeObject { member: false });
    let broken = breaks_fence("given back whatever is held", A_TAKE_OVER, |it| {
        it.before = leaves;
        it.safeguards.empty_release = false;
    });
    assert!(broken);
}

#[test]
fn a_node_that_acquires_its_lease_sends_nothing_yet() {
    let crash = Left { crashes: 1, ..A_TAKE_OVER };
    without(crash, "armed while it acquires", |it| it.disarm = false);
}

#[test]
fn a_node_that_has_acquired_its_lease_reads_what_it_holds() {
    without(A_TAKE_OVER, "no read after acquiring", |it| it.fresh_read = false);
}

#[test]
fn a_node_that_has_acquired_its_lease_removes_flows_of_others_slices() {
    without(A_TAKE_OVER, "no sweep after acquiring", |it| it.sweep = false);
}

/// The other operator saw the take-over, and nothing since: the Lease was given back, and the node has it, and slices,
/// again.
fn an_old_belief(state: &mut State) {
    state.operators[1].leases.saw(node_name(0), 1, Holder::Operator, Duration::ZERO);
    state.behind.leases[0] = Some(Lease { version: 1, holder: Holder::Operator });
    state.server.leases[0] = Some(Lease { version: 4, holder: Holder::Node });
}

#[test]
fn a_lease_is_confirmed_before_its_passing_counts() {
    let late = Left { takeovers: 0, lags: 2, ..A_TAKE_OVER };
    let believes = |it: &mut Cluster| {
        (it.operators, it.lagging, it.before) = (2, &[Kind::Leases], an_old_belief);
    };
    assert!(!breaks_fence("an old belief, all safeguards", late, believes));
    assert!(breaks_fence("an old belief", late, |it| {
        believes(it);
        it.safeguards.confirm = false;
    }));
}
