//! The chart's Prometheus rules and Grafana dashboards: what the chart makes of the files, whether each alert comes and goes when
//! it should (promtool), and whether every query finds something in what operator and agents serve (a real Prometheus).
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod chart;
mod dashboards;
mod exposition;
mod prometheus;
mod queries;
mod rules;

use aegis_tests::apiserver::repository;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// A folder of the chart.
fn folder(name: &str) -> PathBuf {
    repository().join("charts/aegis").join(name)
}

/// Text of the files of a folder of the chart that end so, by name. There are some.
fn files(name: &str, end: &str) -> Vec<(String, String)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder(name)).expect("list a folder") {
        let path = entry.expect("list a folder").path();
        let file = path.file_name().and_then(|file| file.to_str()).expect("a name in UTF-8").to_owned();
        if file.ends_with(end) {
            files.push((file, fs::read_to_string(&path).expect("read a file")));
        }
    }
    files.sort();
    assert!(!files.is_empty(), "charts/aegis/{name} has no {end}");
    files
}

/// A program, to its end: what it says.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap_or_else(|error| panic!("run {command:?}: {error}"));
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    if output.status.success() { Ok(said) } else { Err(format!("{said}{errors}")) }
}
