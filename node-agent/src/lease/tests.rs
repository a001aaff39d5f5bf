use super::*;
use std::net::Ipv4Addr;

const NODE: &str = "n1";

fn clock() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn need(renewed: u64) -> Need {
    Need { uid: "uid".into(), after: Some(15), renewed, followed: None }
}

fn held_by(who: &str, version: &str) -> Lease {
    let spec = LeaseSpec { holder_identity: Some(who.to_owned()), ..LeaseSpec::default() };
    let metadata = ObjectMeta { resource_version: Some(version.to_owned()), ..ObjectMeta::default() };
    Lease { metadata, spec: Some(spec) }
}

fn put(act: Act) -> Lease {
    match act {
        Act::Put(lease) => *lease,
        other => panic!("{other:?}"),
    }
}

const fn s(seconds: u64) -> u64 {
    1_000_000 * SECOND + seconds * SECOND
}

/// A keeper that has acquired the Lease at 1 s, has read and is armed.
fn armed() -> Keeper {
    let mut keeper = Keeper::new(NODE, 0);
    assert_eq!(keeper.act(&need(0), s(1), clock()), Act::Get);
    keeper.got(Ok(None), s(1));
    put(keeper.act(&need(0), s(1), clock()));
    keeper.put(s(1), &need(0), Ok(held_by(NODE, "1")), s(1));
    assert_eq!(keeper.act(&need(0), s(1), clock()), Act::List);
    keeper.listed(s(1), &need(0), Ok(Epochs::new()), s(1));
    keeper.act(&Need { followed: Some(1), ..need(0) }, s(1), clock());
    assert_eq!(keeper.hold().renewed, s(1));
    keeper
}

#[test]
fn nobody_renews_what_nobody_needs() {
    let mut keeper = armed();
    assert_eq!(keeper.act(&Need { after: None, ..need(0) }, s(2), clock()), Act::Wait(u64::MAX));
    assert_eq!(keeper.hold(), Hold::default(), "nor counts by it");
}

#[test]
fn the_first_lease_is_created_with_owner_and_label() {
    let mut keeper = Keeper::new(NODE, 0);
    assert_eq!(keeper.act(&Need { uid: String::new(), ..need(0) }, s(0), clock()), Act::Wait(u64::MAX));
    assert_eq!(keeper.act(&need(0), s(0), clock()), Act::Get);
    keeper.got(Ok(None), s(0));
    let lease = put(keeper.act(&need(0), s(0), clock()));
    assert_eq!(lease.metadata.name.as_deref(), Some("aegis-node-n1"));
    assert_eq!(lease.metadata.resource_version, None);
    assert_eq!(lease.metadata.labels.unwrap()["app.kubernetes.io/component"], "node-lease");
    assert_eq!(lease.metadata.owner_references.unwrap()[0].uid, "uid");
    let spec = lease.spec.unwrap();
    assert_eq!((spec.holder_identity.as_deref(), spec.lease_duration_seconds), (Some(NODE), Some(15)));
    assert_eq!(spec.lease_transitions, Some(1));
}

#[test]
fn it_arms_only_after_acquiring_reading_and_following() {
    let mut keeper = Keeper::new(NODE, 0);
    keeper.act(&need(0), s(0), clock());
    keeper.got(Ok(Some(held_by("", "7"))), s(0));
    let lease = put(keeper.act(&need(0), s(0), clock()));
    assert_eq!(lease.metadata.resource_version.as_deref(), Some("7"), "by compare-and-swap");
    keeper.put(s(0), &need(0), Ok(held_by(NODE, "8")), s(1));
    assert_eq!(keeper.hold().renewed, 0, "acquired, not read");
    assert_eq!(keeper.act(&need(0), s(1), clock()), Act::List);
    let epochs: Epochs = [(Ipv4Addr::new(203, 0, 113, 1).into(), 9)].into();
    keeper.listed(s(1), &need(0), Ok(epochs.clone()), s(1));
    let hold = keeper.hold();
    assert_eq!((hold.renewed, hold.read.unwrap().epochs.as_ref()), (0, &epochs), "read, not followed");
    // It is renewed meanwhile, and what counts in the end is the last renewal.
    assert_eq!(keeper.act(&need(0), s(2), clock()), Act::Wait(s(4)));
    put(keeper.act(&need(0), s(4), clock()));
    keeper.put(s(4), &need(0), Ok(held_by(NODE, "9")), s(5));
    let other = Need { followed: Some(0), ..need(0) };
    keeper.act(&other, s(5), clock());
    assert_eq!(keeper.hold().renewed, 0, "another round was followed");
    keeper.act(&Need { followed: Some(1), ..need(0) }, s(5), clock());
    assert_eq!(keeper.hold().renewed, s(4));
}

#[test]
fn a_renewal_counts_from_when_it_was_sent_and_only_if_it_succeeded() {
    let mut keeper = armed();
    let need = need(s(1));
    put(keeper.act(&need, s(4), clock()));
    keeper.put(s(4), &need, Err(Failure::Other("no answer in time".into())), s(7));
    assert_eq!(keeper.hold().renewed, s(1));
    assert!(matches!(keeper.hold().trouble, Some(Trouble::Failed(_))));
    assert_eq!(keeper.act(&need, s(7), clock()), Act::Wait(s(8)));
    assert_eq!(keeper.act(&need, s(8), clock()), Act::Get, "whether it was written is not known");
    keeper.got(Ok(Some(held_by(NODE, "5"))), s(8));
    let lease = put(keeper.act(&need, s(9), clock()));
    assert_eq!(lease.metadata.resource_version.as_deref(), Some("5"));
    keeper.put(s(9), &need, Ok(held_by(NODE, "6")), s(10));
    assert_eq!((keeper.hold().renewed, keeper.hold().trouble), (s(9), None));
    assert_eq!(keeper.act(&need, s(10), clock()), Act::Wait(s(12)));
}

#[test]
fn who_is_taken_over_disarms_until_the_lease_is_free_and_everything_anew() {
    let mut keeper = armed();
    let armed_need = need(s(1));
    put(keeper.act(&armed_need, s(900), clock()));
    keeper.put(s(900), &armed_need, Err(Failure::Conflict), s(900));
    assert_eq!(keeper.act(&armed_need, s(900), clock()), Act::Get);
    keeper.got(Ok(Some(held_by("aegis-operator", "8"))), s(900));
    let hold = keeper.hold();
    assert_eq!((hold.renewed, hold.read), (0, None));
    assert_eq!(hold.trouble, Some(Trouble::TakenBy("aegis-operator".into())));
    // It is looked at again, never written.
    assert_eq!(keeper.act(&need(0), s(900), clock()), Act::Wait(s(901)));
    assert_eq!(keeper.act(&need(0), s(901), clock()), Act::Get);
    keeper.got(Ok(Some(held_by("", "9"))), s(901));
    assert_eq!(keeper.act(&armed_need, s(901), clock()), Act::Wait(s(902)), "the programs are still armed");
    put(keeper.act(&need(0), s(902), clock()));
    // Even if the answer is lost: it was not this node's until now.
    keeper.put(s(902), &need(0), Err(Failure::Other("no answer".into())), s(905));
    assert_eq!(keeper.act(&need(0), s(906), clock()), Act::Get);
    keeper.got(Ok(Some(held_by(NODE, "10"))), s(906));
    assert_eq!(keeper.hold().renewed, 0);
    put(keeper.act(&need(0), s(906), clock()));
    keeper.put(s(906), &need(0), Ok(held_by(NODE, "11")), s(906));
    assert_eq!(keeper.act(&need(0), s(906), clock()), Act::List);
    keeper.listed(s(906), &need(0), Ok(Epochs::new()), s(906));
    // The read of the term before does not count.
    keeper.act(&Need { followed: Some(1), ..need(0) }, s(907), clock());
    assert_eq!(keeper.hold().renewed, 0);
    keeper.act(&Need { followed: Some(2), ..need(0) }, s(907), clock());
    assert_eq!(keeper.hold().renewed, s(906));
}

#[test]
fn an_agent_that_starts_goes_on_with_its_own_lease() {
    let mut keeper = Keeper::new(NODE, s(1));
    assert_eq!(keeper.hold().renewed, s(1));
    assert_eq!(keeper.act(&need(s(1)), s(5), clock()), Act::Get);
    keeper.got(Ok(Some(held_by(NODE, "5"))), s(5));
    put(keeper.act(&need(s(1)), s(5), clock()));
    keeper.put(s(5), &need(s(1)), Ok(held_by(NODE, "6")), s(5));
    assert_eq!(keeper.hold().renewed, s(5), "nobody has taken anything from it");
    // With another's, or none, it does not.
    for other in [Some(held_by("aegis-operator", "5")), Some(held_by("", "5")), None] {
        let mut keeper = Keeper::new(NODE, s(1));
        keeper.act(&need(s(1)), s(5), clock());
        keeper.got(Ok(other), s(5));
        let act = keeper.act(&need(s(1)), s(5), clock());
        assert!(matches!(act, Act::Wait(_)), "{act:?}");
        assert_eq!(keeper.hold().renewed, 0);
    }
}

#[test]
fn a_node_that_was_restarted_has_all_to_do_though_the_lease_is_its_own() {
    let mut keeper = Keeper::new(NODE, 0);
    keeper.act(&need(0), s(0), clock());
    keeper.got(Ok(Some(held_by(NODE, "5"))), s(0));
    put(keeper.act(&need(0), s(0), clock()));
    keeper.put(s(0), &need(0), Ok(held_by(NODE, "6")), s(0));
    assert_eq!(keeper.hold().renewed, 0);
    assert_eq!(keeper.act(&need(0), s(0), clock()), Act::List);
}

#[test]
fn a_read_that_fails_leaves_the_lease_renewed() {
    let mut keeper = Keeper::new(NODE, 0);
    keeper.act(&need(0), s(0), clock());
    keeper.got(Ok(Some(held_by(NODE, "5"))), s(0));
    put(keeper.act(&need(0), s(0), clock()));
    keeper.put(s(0), &need(0), Ok(held_by(NODE, "6")), s(0));
    for at in 0..3 {
        assert_eq!(keeper.act(&need(0), s(at), clock()), Act::List, "{at} s");
        keeper.listed(s(at), &need(0), Err(Failure::Other("too large".into())), s(at));
    }
    put(keeper.act(&need(0), s(3), clock()));
}

#[test]
fn it_is_renewed_several_times_before_the_soft_deadline() {
    assert_eq!(period(Some(15)), 3 * SECOND);
    assert_eq!(period(Some(3600)), LONGEST);
    assert_eq!(period(Some(1)), SECOND);
}
