//! The life of slices under everything that can go wrong, in every order: no two nodes send from the same slice at a
//! time, and slices come back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod model_support;

use model_support::state::Left;
use model_support::{Cluster, Fence, Kind, check};

/// What may happen beside flows, reports, plans, writes that are late or lost, and copies that lag.
const NOTHING: Left = Left {
    ticks: 1,
    moves: 0,
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

/// Nothing is wrong in any state, and the model is not one in which nothing happens. Returns how many states there are.
fn holds(what: &str, cluster: Cluster) -> usize {
    let moves = cluster.left.moves + cluster.left.takeovers > 0;
    let found = check(what, cluster);
    assert_eq!(found.wrong, []);
    assert_eq!(found.moves, moves, "some slice went from one node to another");
    found.states
}

fn comes_back(what: &str, nodes: (usize, usize), left: Left) {
    let mut cluster = Cluster::new(nodes.0, nodes.1, 1, left);
    cluster.liveness = true;
    holds(what, cluster);
}

#[test]
fn one_owner_while_nodes_come_and_go() {
    let left = Left { moves: 1, starts: 1, deletions: 1, ..NOTHING };
    let states = holds("nodes come and go", Cluster::new(2, 1, 1, left));
    assert!(states >= 1_000_000, "{states}");
}

#[test]
fn one_owner_while_every_copy_lags() {
    let mut cluster = Cluster::new(2, 2, 1, Left { moves: 1, lags: 1, ..NOTHING });
    cluster.lagging = &Kind::ALL;
    holds("every copy lags", cluster);
}

#[test]
fn one_owner_of_several_slices_among_three_nodes() {
    holds("three nodes, two slices", Cluster::new(3, 3, 2, Left { moves: 1, ..NOTHING }));
}

#[test]
fn one_owner_while_everybody_restarts() {
    let left = Left { ticks: 2, moves: 1, stops: 1, starts: 1, crashes: 1, ..NOTHING };
    holds("everybody restarts", Cluster::new(2, 2, 1, left));
}

#[test]
fn one_owner_while_the_address_is_given_back_and_made_again() {
    let left = Left { moves: 1, edits: 2, ..NOTHING };
    holds("the address is given back and made again", Cluster::new(2, 2, 1, left));
}

#[test]
fn slices_come_back_from_drained_nodes() {
    comes_back("drained", (2, 1), Left { ticks: 2, moves: 1, starts: 1, ..NOTHING });
}

#[test]
fn slices_come_back_from_deleted_nodes() {
    comes_back("deleted", (2, 2), Left { moves: 1, deletions: 1, ..NOTHING });
}

#[test]
fn slices_come_back_after_restarts() {
    comes_back("restarted", (2, 2), Left { moves: 1, stops: 1, starts: 1, crashes: 1, ..NOTHING });
}

#[test]
fn slices_come_back_from_an_address_that_is_given_back() {
    comes_back("given back", (2, 2), Left { edits: 2, ..NOTHING });
}

/// Nodes keep a deadline, and operators take the Leases of `faulty` ones over.
fn fenced(faulty: u8, left: Left) -> Cluster {
    Cluster { fence: Fence::Time, faulty, lagging: &[], ..Cluster::new(2, 2, 1, left) }
}

#[test]
fn one_owner_while_a_lease_is_taken_over_and_given_back() {
    let left = Left { ticks: 3, takeovers: 1, confirms: 1, ..NOTHING };
    holds("a Lease is taken over", Cluster { operators: 1, ..fenced(1, left) });
}

#[test]
fn slices_come_back_from_silent_nodes() {
    let left = Left { ticks: 2, takeovers: 1, confirms: 1, ..NOTHING };
    let cluster = Cluster { liveness: true, operators: 1, ..fenced(1, left) };
    // Time ends before the slice has gone to the other node: that it does in the end is what is looked into.
    assert_eq!(check("silent nodes", cluster).wrong, []);
}
