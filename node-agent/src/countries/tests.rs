use super::*;
use aegis_tests::mmdb::{self, Entry};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// 2026-11-01.
const BUILT: u64 = 1_793_491_200;

fn range(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// A file that goes with the value.
struct File(PathBuf);

impl File {
    fn new(name: &str, contents: &[u8]) -> File {
        let path = std::env::temp_dir().join(format!("aegis-{}-{name}.mmdb", std::process::id()));
        fs::write(&path, contents).unwrap();
        File(path)
    }

    /// In its place comes another one, as by `mv`.
    fn replace(&self, contents: &[u8]) {
        let new = self.0.with_extension("new");
        fs::write(&new, contents).unwrap();
        fs::rename(&new, &self.0).unwrap();
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn of(database: &Database, country: &str) -> Vec<String> {
    let ranges = database.countries.get(country).into_iter().flatten();
    ranges.map(ToString::to_string).collect()
}

#[test]
fn ranges_of_both_families_are_read_and_neighbours_are_one() {
    let ranges = [
        (range("192.0.2.0/25"), "NZ"),
        (range("192.0.2.128/25"), "NZ"),
        (range("198.51.100.0/24"), "FR"),
        (range("198.51.100.7/32"), "NZ"),
        (range("2001:db8::/33"), "NZ"),
        (range("2001:db8:8000::/33"), "NZ"),
    ];
    let file = File::new("both", &mmdb::countries(BUILT, &ranges));
    let database = read(&file.0).unwrap();
    assert_eq!(of(&database, "NZ"), ["192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32"]);
    let french = database.countries["FR"].iter();
    let addresses: u32 = french.map(|range| 1 << (32 - range.prefix_len())).sum();
    assert_eq!(addresses, 255, "all but the one that is elsewhere");
    assert_eq!((database.built, date(database.built).as_str()), (BUILT, "2026-11-01"));
    assert_eq!(database.ranges, 3 + database.countries["FR"].len());
}

#[test]
fn where_it_is_registered_counts_only_where_nothing_else_is_known() {
    let entries = [
        Entry { range: range("192.0.2.0/24"), field: "registered_country", country: "NZ" },
        Entry { range: range("198.51.100.0/24"), field: "represented_country", country: "NZ" },
    ];
    let file = File::new("registered", &mmdb::database("Test-City", BUILT, &entries));
    assert_eq!(of(&read(&file.0).unwrap(), "NZ"), ["192.0.2.0/24"]);
}

#[test]
fn what_is_no_database_of_countries_says_so() {
    let good = mmdb::countries(BUILT, &[(range("192.0.2.0/24"), "NZ")]);
    let other = Entry { range: range("192.0.2.0/24"), field: "asn", country: "NZ" };
    for (contents, says) in [
        (&b"Not Found"[..], "is no MaxMind database"),
        (&good[..good.len() - 40], "is no MaxMind database"),
        (&mmdb::database("Test-ASN", BUILT, &[other])[..], "type Test-ASN and names no country"),
    ] {
        let file = File::new("wrong", contents);
        let error = read(&file.0).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = read(Path::new("/nonexistent/countries.mmdb")).unwrap_err().to_string();
    assert_eq!(error, "cannot read /nonexistent/countries.mmdb: No such file or directory (os error 2)");
}

async fn wait_for(keeper: &Keeper, what: &str, reached: impl Fn(&State) -> bool) {
    let begin = Instant::now();
    while !reached(&keeper.lock()) {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}: {:?}", keeper.lock());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_file_is_read_and_one_that_cannot_be_leaves_the_old_one_in_use() {
    let built = |state: &State| state.database.as_ref().map(|database| database.built);
    let version = |built| mmdb::countries(built, &[(range("192.0.2.0/24"), "NZ")]);
    let file = File::new("watched", &version(1));
    let (keeper, changes) = (Keeper::default(), Arc::new(AtomicU32::new(0)));
    let counted = Arc::clone(&changes);
    let task = tokio::spawn(keeper.clone().watch(Some(file.0.clone()), move || {
        counted.fetch_add(1, Ordering::AcqRel);
    }));
    wait_for(&keeper, "the first one", |state| built(state) == Some(1)).await;
    let calm = changes.load(Ordering::Acquire);
    file.replace(b"404");
    wait_for(&keeper, "that it is broken", |state| state.failure.is_some()).await;
    assert_eq!(built(&keeper.lock()), Some(1));
    file.replace(&version(2));
    wait_for(&keeper, "the second one", |state| built(state) == Some(2)).await;
    assert_eq!(keeper.lock().failure, None);
    fs::remove_file(&file.0).unwrap();
    wait_for(&keeper, "that it is gone", |state| state.failure.is_some()).await;
    assert_eq!(built(&keeper.lock()), Some(2));
    assert!(changes.load(Ordering::Acquire) >= calm + 3);
    task.abort();
}

#[tokio::test]
async fn without_a_file_nobody_waits_for_one() {
    let keeper = Keeper::default();
    let task = tokio::spawn(keeper.clone().watch(None, || ()));
    wait_for(&keeper, "the first attempt", |state| state.tried).await;
    assert_eq!(*keeper.lock(), State { tried: true, ..State::default() });
    task.abort();
}
