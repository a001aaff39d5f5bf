//! What is kept, in real files, whatever happens to them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod support;

use aegis_delivery::{Backlog, Boot, Bounds, Counters, Loss, Name};
use aegis_usage_report::Report;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use support::{NODE, T0, report};

const BLOCK: u64 = 4_096;

/// Room for twelve small reports on the disk, and for about three in memory.
const BOUNDS: Bounds = Bounds { disk: 12 * BLOCK, memory: 3 * 600, age: 1_000_000 };

fn lost(counters: &Counters, of: Loss) -> u64 {
    counters.losses().find(|(loss, _)| *loss == of).unwrap().1
}

fn all_lost(counters: &Counters) -> u64 {
    counters.losses().map(|(_, lost)| lost).sum()
}

fn open(folder: &Path, counters: &mut Counters) -> Backlog {
    Backlog::open(folder.into(), BOUNDS, NODE, T0, counters)
}

/// Everything that waits, as it is delivered: newest, then oldest first.
fn drain(backlog: &mut Backlog, counters: &mut Counters) -> Vec<Report> {
    let batch = backlog.next(usize::MAX, u64::MAX, counters);
    batch.map_or_else(Vec::new, |batch| {
        let reports: Vec<Report> = serde_json::from_slice(&batch.body).unwrap();
        assert!(batch.names.len() == reports.len());
        assert!(batch.names.iter().zip(&reports).all(|(name, report)| name.is_of(report)));
        backlog.done(&batch.names);
        reports
    })
}

fn numbers(reports: &[Report]) -> Vec<u64> {
    reports.iter().map(|report| report.sequence).collect()
}

fn files(folder: &Path) -> Vec<(String, u64)> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<_> =
        files.map(|it| (it.file_name().into_string().unwrap(), it.metadata().unwrap().len())).collect();
    files.sort();
    files
}

#[test]
fn what_an_earlier_start_left_is_delivered_under_its_own_number() {
    let (folder, mut counters) = (support::folder("backlog"), Counters::default());
    let (first, second) = (Boot::new(1, 9), Boot::new(2, 1));
    let mut backlog = open(folder.path(), &mut counters);
    for sequence in 0..3 {
        let (name, report) = report(&first, sequence, 2);
        backlog.push(&report, name, T0, &mut counters);
    }
    drop(backlog);
    let mut backlog = open(folder.path(), &mut counters);
    let (name, own) = report(&second, 0, 2);
    backlog.push(&own, name, T0, &mut counters);
    backlog.count(&mut counters);
    assert_eq!((counters.waiting, counters.bytes, counters.in_memory), (4, 4 * BLOCK, 0));
    assert_eq!(counters.oldest, Some(T0 + 10));
    // One alone is the oldest.
    let alone = backlog.next(1, u64::MAX, &mut counters).unwrap();
    assert_eq!(alone.names, [report(&first, 0, 2).0]);
    let reports = drain(&mut backlog, &mut counters);
    assert_eq!(
        reports,
        [(&second, 0), (&first, 0), (&first, 1), (&first, 2)].map(|(boot, it)| report(boot, it, 2).1)
    );
    assert!(backlog.is_empty() && files(folder.path()).is_empty());
    assert_eq!(all_lost(&counters), 0);
}

#[test]
fn what_cannot_be_a_report_is_removed_and_counted_and_other_files_are_left_alone() {
    let (folder, mut counters) = (support::folder("backlog"), Counters::default());
    let boot = Boot::new(1, 1);
    let mut backlog = open(folder.path(), &mut counters);
    for sequence in 0..5 {
        let (name, report) = report(&boot, sequence, 2);
        backlog.push(&report, name, T0, &mut counters);
    }
    let path = |sequence| folder.path().join(report(&boot, sequence, 2).0.to_string());
    // Torn; empty; another one's content; of another node.
    let text = fs::read(path(0)).unwrap();
    fs::write(path(0), &text[..text.len() / 2]).unwrap();
    fs::write(path(1), "").unwrap();
    fs::write(path(2), fs::read(path(3)).unwrap()).unwrap();
    let other = Report { node: "node-b".into(), ..report(&boot, 3, 2).1 };
    fs::write(path(3), serde_json::to_vec(&other).unwrap()).unwrap();
    fs::write(folder.path().join("nonsense.report"), "x").unwrap();
    fs::create_dir(folder.path().join("folder.report")).unwrap();
    fs::write(folder.path().join(format!("{}.new", report(&boot, 9, 2).0)), &text).unwrap();
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    let mut backlog = open(folder.path(), &mut counters);
    assert_eq!(lost(&counters, Loss::Damaged), 3, "{:?}", files(folder.path()));
    assert_eq!(numbers(&drain(&mut backlog, &mut counters)), [4]);
    assert_eq!(lost(&counters, Loss::Damaged), 6);
    let names: Vec<String> = files(folder.path()).into_iter().map(|file| file.0).collect();
    assert_eq!(names, ["folder.report", "notes.txt"]);
}

#[test]
fn a_disk_that_takes_nothing_stops_nothing() {
    let (folder, mut counters) = (support::folder("backlog"), Counters::default());
    let path = folder.path().join("usage");
    // There cannot be such a folder.
    fs::write(&path, "in the way").unwrap();
    let boot = Boot::new(1, 1);
    let mut backlog = open(&path, &mut counters);
    let size = serde_json::to_vec(&report(&boot, 0, 1).1).unwrap().len() as u64;
    let room = BOUNDS.memory / size;
    for sequence in 0..5 {
        let (name, report) = report(&boot, sequence, 1);
        backlog.push(&report, name, T0, &mut counters);
    }
    backlog.count(&mut counters);
    assert_eq!((counters.waiting, counters.in_memory), (room, room));
    assert_eq!(lost(&counters, Loss::Full), 5 - room, "the oldest");
    let waiting = backlog.next(usize::MAX, u64::MAX, &mut counters).unwrap();
    assert_eq!(waiting.names.len() as u64, room);
    assert_eq!(waiting.names[0].sequence, 4);
    // It works again: what was in memory is on it.
    fs::remove_file(&path).unwrap();
    let (name, report) = report(&boot, 5, 1);
    backlog.push(&report, name, T0, &mut counters);
    backlog.count(&mut counters);
    assert_eq!((counters.waiting, counters.in_memory), (room + 1, 0));
    assert_eq!(files(&path).len() as u64, room + 1);
    assert_eq!(drain(&mut backlog, &mut counters).len() as u64, room + 1);
}

#[test]
fn a_full_disk_leaves_no_torn_file() {
    let (folder, mut counters) = (support::folder("backlog"), Counters::default());
    let boot = Boot::new(1, 1);
    let mut backlog = open(folder.path(), &mut counters);
    let (name, zero) = report(&boot, 0, 1);
    backlog.push(&zero, name, T0, &mut counters);
    let (name, one) = report(&boot, 1, 1);
    std::os::unix::fs::symlink("/dev/full", folder.path().join(format!("{name}.new"))).unwrap();
    backlog.push(&one, name, T0, &mut counters);
    backlog.count(&mut counters);
    assert_eq!((counters.waiting, counters.in_memory, files(folder.path()).len()), (2, 1, 1));
    assert_eq!(drain(&mut backlog, &mut counters), [one, zero]);
    assert_eq!(all_lost(&counters), 0);
}

#[test]
fn what_the_collector_would_not_take_any_more_goes() {
    let (folder, mut counters) = (support::folder("backlog"), Counters::default());
    let boot = Boot::new(1, 1);
    let mut backlog = open(folder.path(), &mut counters);
    for sequence in 0..3 {
        let (name, report) = report(&boot, sequence, 1);
        backlog.push(&report, name, T0, &mut counters);
    }
    drop(backlog);
    let later = T0 + 20 + BOUNDS.age;
    let mut backlog = Backlog::open(folder.path().to_owned(), BOUNDS, NODE, later, &mut counters);
    assert_eq!(lost(&counters, Loss::Old), 1);
    backlog.expire(later + 10, &mut counters);
    assert_eq!(lost(&counters, Loss::Old), 2);
    assert_eq!(numbers(&drain(&mut backlog, &mut counters)), [2]);
}

#[derive(Clone, Debug)]
enum Step {
    /// A report of so many origins.
    Push(u16),
    /// So many reports are delivered.
    Deliver(usize),
    /// The agent starts again.
    Restart,
    /// One of the files is cut short.
    Tear(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0u16..60).prop_map(Step::Push),
        2 => (1usize..8).prop_map(Step::Deliver),
        1 => Just(Step::Restart),
        1 => any::<prop::sample::Index>().prop_map(Step::Tear),
    ]
}

/// Bytes of a report on the disk.
fn blocks(report: &Report) -> u64 {
    (serde_json::to_vec(report).unwrap().len() as u64).div_ceil(BLOCK) * BLOCK
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Never more than the bound, each report as it was and in order, none lost while there is room, and each that is lost counted.
    #[test]
    fn nothing_is_lost_below_the_bound(steps in prop::collection::vec(step(), 0..80)) {
        let (folder, mut counters) = (support::folder("backlog"), Counters::default());
        let mut boot = Boot::new(1, 77);
        let mut starts = 1;
        let mut backlog = open(folder.path(), &mut counters);
        // What waits, torn files included: nobody has read them yet.
        let mut waiting: BTreeMap<Name, (Report, bool)> = BTreeMap::new();
        let (mut pushed, mut delivered, mut sequence) = (0u64, 0u64, 0u64);
        for step in steps {
            match step {
                Step::Push(origins) => {
                    let (name, report) = report(&boot, sequence, origins);
                    sequence += 1;
                    pushed += 1;
                    let before = lost(&counters, Loss::Full);
                    backlog.push(&report, name.clone(), T0, &mut counters);
                    waiting.insert(name, (report, false));
                    let mut gone = 0;
                    while waiting.values().map(|(report, _)| blocks(report)).sum::<u64>() > BOUNDS.disk {
                        waiting.pop_first();
                        gone += 1;
                    }
                    prop_assert_eq!(lost(&counters, Loss::Full) - before, gone);
                }
                Step::Deliver(reports) => {
                    let before = lost(&counters, Loss::Damaged);
                    let batch = backlog.next(reports, u64::MAX, &mut counters);
                    let damaged = lost(&counters, Loss::Damaged) - before;
                    let names = batch.as_ref().map(|it| it.names.clone()).unwrap_or_default();
                    prop_assert!(names.len() <= reports);
                    prop_assert_eq!(batch.is_none(), waiting.values().all(|(_, torn)| *torn));
                    if let Some(batch) = &batch {
                        let read: Vec<Report> = serde_json::from_slice(&batch.body).unwrap();
                        for (name, report) in batch.names.iter().zip(read) {
                            prop_assert_eq!(waiting.get(name), Some(&(report, false)));
                        }
                    }
                    prop_assert!(names.iter().skip(1).is_sorted());
                    backlog.done(&names);
                    names.iter().for_each(|name| { waiting.remove(name); });
                    delivered += names.len() as u64;
                    // The torn ones that were come upon are gone.
                    let there = files(folder.path());
                    let all = waiting.len();
                    waiting.retain(|name, (_, torn)| !*torn || there.iter().any(|(file, _)| *file == name.to_string()));
                    prop_assert_eq!((all - waiting.len()) as u64, damaged);
                }
                Step::Restart => {
                    starts += 1;
                    boot = Boot::new(starts, 3);
                    sequence = 0;
                    backlog = open(folder.path(), &mut counters);
                }
                Step::Tear(index) => {
                    let there = files(folder.path());
                    if let Some((file, length)) = (!there.is_empty()).then(|| index.get(&there)) {
                        let path = folder.path().join(file);
                        let text = fs::read(&path).unwrap();
                        // Within the block, so that the bytes that wait are as before.
                        let keep = (*length as usize - 1).max(1);
                        fs::write(&path, &text[..keep]).unwrap();
                        if let Some(entry) = Name::parse(file).and_then(|name| waiting.get_mut(&name)) {
                            entry.1 = true;
                        }
                    }
                }
            }
            let there = files(folder.path());
            let bytes: u64 = there.iter().map(|(_, length)| length.div_ceil(BLOCK) * BLOCK).sum();
            prop_assert!(bytes <= BOUNDS.disk, "{bytes}: {there:?}");
            let names: Vec<String> = waiting.keys().map(Name::to_string).collect();
            prop_assert_eq!(there.into_iter().map(|(file, _)| file).collect::<Vec<_>>(), names);
            prop_assert_eq!(pushed, delivered + waiting.len() as u64 + all_lost(&counters));
        }
    }
}
