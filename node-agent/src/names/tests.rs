#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

use super::*;
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;
use tempfile::TempDir;

const LIMITS: Limits = Limits { per_name: 2, total: 4, grace: 300 };

fn address(last: u8) -> IpAddr {
    Ipv4Addr::new(198, 51, 100, last).into()
}

fn record(name: &str, last: u8) -> Record {
    Record::Address(name.into(), address(last), 60)
}

fn patterns() -> Patterns {
    ["a.test", "*.x.test"].iter().filter_map(|it| HostPattern::new(it)).collect()
}

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("aegis-names-").tempdir().unwrap()
}

/// Those of the node, as they are in a folder.
fn kept(folder: &TempDir) -> Names {
    Names::new(Some(folder.path().to_owned()), "n0", LIMITS, || ())
}

#[tokio::test]
async fn an_answer_waits_until_its_addresses_are_in_force_and_others_do_not() {
    let names = Names::new(None, "n0", LIMITS, || ());
    names.follow(&patterns());
    names.in_force(names.resolved().0, &BTreeSet::new());
    let other = [record("b.test", 1)];
    tokio::time::timeout(Duration::from_millis(100), names.take(&other)).await.unwrap().unwrap();
    let (taken, released) = (names.clone(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let flag = Arc::clone(&released);
    let waiting = tokio::spawn(async move {
        let taken = taken.take(&[record("b.x.test", 2)]).await;
        flag.store(true, Ordering::Release);
        taken
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!released.load(Ordering::Acquire));
    let (revision, resolved) = names.resolved();
    let wild = [HostPattern::new("*.x.test").unwrap()];
    assert_eq!(resolved.of(&wild).collect::<Vec<_>>(), [&address(2)]);
    names.in_force(revision, &BTreeSet::new());
    waiting.await.unwrap().unwrap();
    // What is known and in force is told at once.
    tokio::time::timeout(Duration::from_millis(100), names.take(&[record("b.x.test", 2)]))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(names.tally().held.0, 1);
}

#[tokio::test]
async fn what_does_not_come_into_force_is_not_told() {
    let names = Names::new(None, "n0", LIMITS, || ());
    names.follow(&patterns());
    assert_eq!(names.take(&[record("a.test", 1)]).await, Err(Refusal::NotInForce));
    assert_eq!(names.tally().refused, [("not_in_force", 1)].into());
}

#[tokio::test]
async fn what_does_not_fit_is_not_told_and_reported() {
    let names = Names::new(None, "n0", LIMITS, || ());
    names.follow(&patterns());
    let three = [record("a.test", 1), record("a.test", 2), record("a.test", 3)];
    assert_eq!(names.take(&three).await, Err(Refusal::NameFull));
    assert!(names.lacks_room().unwrap().contains("agent.dns.addressesPerName"));
    assert_eq!(names.tally().known, (0, 4));
}

#[test]
fn the_next_agent_knows_what_was_in_force_and_no_more() {
    let folder = folder();
    let names = kept(&folder);
    names.follow(&patterns());
    assert!(names.learn(&[record("a.test", 1)]).unwrap().is_some());
    let nameless = BTreeSet::from([address(9)]);
    names.in_force(names.resolved().0, &nameless);
    names.learn(&[record("a.test", 2)]).unwrap();
    let next = kept(&folder);
    assert!(next.any() && next.failure().is_none());
    assert_eq!(next.nameless(), nameless);
    let (revision, resolved) = next.resolved();
    let exact = [HostPattern::new("a.test").unwrap()];
    assert_eq!((revision, resolved.of(&exact).collect::<Vec<_>>()), (0, vec![&address(1)]));
    // It tells pods what is in force, though it has not heard from the API server yet.
    assert_eq!(next.learn(&[record("a.test", 1)]), Ok(None));
    std::fs::write(folder.path().join("names-n0.json"), "{").unwrap();
    assert!(!kept(&folder).any(), "nothing is made of what cannot be read");
}

#[test]
fn what_cannot_be_kept_is_said() {
    let names = Names::new(Some("/proc/none".into()), "n0", LIMITS, || ());
    names.follow(&patterns());
    names.in_force(1, &BTreeSet::new());
    assert!(names.failure().unwrap().starts_with("addresses of host names are forgotten with this agent"));
}

#[test]
fn resolvers_are_those_of_the_file() {
    let folder = folder();
    let file = folder.path().join("resolv.conf");
    std::fs::write(
        &file,
        "search a\nnameserver 10.96.0.10\n# nameserver 1.1.1.1\n nameserver fe80::1%eth0\noptions x\n",
    )
    .unwrap();
    assert_eq!(resolvers(&file).unwrap(), [IpAddr::from([10, 96, 0, 10]), "fe80::1".parse().unwrap()]);
}
