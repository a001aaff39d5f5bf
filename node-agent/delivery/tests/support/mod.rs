//! Folders and reports.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]
#![allow(dead_code, missing_docs, reason = "each test takes what it needs")]

use aegis_delivery::{Boot, Name};
use aegis_usage_report::{Figures, Key, Protocol, Report, Row, VERSION};
use tempfile::TempDir;

/// Begin of an hour.
pub const T0: i64 = 1_700_002_800;

/// The node whose agent reports.
pub const NODE: &str = "node-a";

/// A folder that is removed with it.
pub fn folder(name: &str) -> TempDir {
    tempfile::Builder::new().prefix(&format!("aegis-{name}-")).tempdir().unwrap()
}

/// Rows of one account towards so many origins.
pub fn rows(origins: u16) -> Vec<Row> {
    (0..origins)
        .map(|port| Row {
            key: Key {
                address: Some([192, 0, 2, 1].into()),
                origin: Some(([198, 51, 100, 1], port + 1).into()),
                protocol: Protocol::Tcp,
                rule: "binding/partner".into(),
                account: "shop".into(),
                allocation: "partner".into(),
                ..Key::default()
            },
            figures: Figures { in_use: 3, peak: 5, flows: 1, ..Figures::default() },
        })
        .collect()
}

/// The report with a number of a start, of the 10 seconds that begin at T0 and ten times its number.
pub fn report(boot: &Boot, sequence: u64, origins: u16) -> (Name, Report) {
    let from = T0 + 10 * sequence as i64;
    let report = Report {
        version: VERSION,
        node: NODE.into(),
        boot: boot.to_string(),
        sequence,
        from,
        to: from + 10,
        rows: rows(origins),
    };
    (Name { boot: boot.clone(), sequence, to: report.to }, report)
}
