//! Places for stores, reports, and a slow obvious interpreter of questions.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]
#![allow(dead_code, missing_docs, reason = "each test takes what it needs")]

pub mod alerts;
pub mod generate;
pub mod model;
pub mod objects;
pub mod scenarios;
pub mod server;

use aegis_usage::{Query, Store};
use aegis_usage_report::{Figures, Key, Protocol, Report, Row, VERSION, Volume};
use std::collections::BTreeMap;
use std::time::Duration;
use tempfile::TempDir;

/// Begin of an hour.
pub const T0: i64 = 1_700_002_800;

/// Longest time of a question in tests: none of theirs is slow.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A folder that is removed with it.
pub fn folder(name: &str) -> TempDir {
    tempfile::Builder::new().prefix(&format!("aegis-{name}-")).tempdir().unwrap()
}

/// An empty SQLite store, and its folder.
pub fn sqlite() -> (Store, TempDir) {
    let folder = folder("usage");
    (Store::sqlite(folder.path().join("usage.db"), PATIENCE).unwrap(), folder)
}

/// A key of an account towards an origin, from 192.0.2.1.
pub fn key(account: &str, origin: u8) -> Key {
    Key {
        address: Some([192, 0, 2, 1].into()),
        origin: Some(([198, 51, 100, origin], 443).into()),
        protocol: Protocol::Tcp,
        rule: "binding/partner".into(),
        account: account.into(),
        allocation: "partner".into(),
        site: "east".into(),
        pod: format!("{account}-pod"),
    }
}

/// Figures with something of each kind.
pub fn figures(in_use: u64, flows: u64) -> Figures {
    let sent = Volume { packets: flows * 5, bytes: flows * 400 };
    let received = Volume { packets: flows * 4, bytes: flows * 4_000 };
    Figures { in_use, peak: in_use + 2, flows, refused: BTreeMap::new(), sent, received }
}

/// The report with a number of a node, of the 10 seconds that begin at T0 and ten times its number.
pub fn report(node: &str, sequence: u64, rows: Vec<(Key, Figures)>) -> Report {
    let from = T0 + 10 * sequence as i64;
    let rows = rows.into_iter().map(|(key, figures)| Row { key, figures }).collect();
    Report { version: VERSION, node: node.into(), boot: "boot".into(), sequence, from, to: from + 10, rows }
}

/// All pages of a question, one after the other.
pub fn all(store: &Store, scope: &aegis_usage::Scope, query: &Query) -> Vec<aegis_usage::Answer> {
    let mut query = query.clone();
    let mut rows = Vec::new();
    loop {
        let page = store.query(scope, &query).unwrap();
        assert!(page.rows.len() <= query.first as usize);
        rows.extend(page.rows);
        match page.next {
            Some(next) => query.after = Some(next),
            None => return rows,
        }
    }
}

/// Gives a scenario stores of SQLite, each with a folder of its own for as long as it goes on.
pub fn each(scenario: fn(&dyn Fn() -> Store)) {
    let folders = std::cell::RefCell::new(Vec::new());
    scenario(&|| {
        let (store, folder) = sqlite();
        folders.borrow_mut().push(folder);
        store
    });
}
