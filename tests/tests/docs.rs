//! The pages keep up with the code.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use aegis_tests::apiserver::repository;
use std::fs;
use std::path::{Path, PathBuf};

fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The string literals of Rust text, with what stands between each and the next.
fn literals(source: &str) -> Vec<(&str, &str)> {
    let parts: Vec<&str> = source.split('"').collect();
    parts[1..].chunks(2).map(|pair| (pair[0], pair.get(1).copied().unwrap_or_default().trim())).collect()
}

#[test]
fn every_metric_is_in_the_reference() {
    let page = read("docs/reference/metrics.md");
    for (file, least) in [("operator/src/metrics.rs", 10), ("node-agent/src/metrics.rs", 20)] {
        let source = read(file);
        let code = source.split("#[cfg(test)]").next().unwrap_or_default();
        // A metric is registered with its name and, after a comma, what it means.
        let literals = literals(code);
        let names: Vec<&str> = literals
            .windows(2)
            .filter(|pair| pair[0].1 == "," && pair[1].0.contains(' '))
            .map(|pair| pair[0].0)
            .filter(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
            .collect();
        assert!(names.len() >= least, "{file}: only {names:?} found");
        for name in names {
            assert!(
                page.contains(&format!("| `{name}` |")),
                "docs/reference/metrics.md lacks {name} of {file}"
            );
        }
    }
}

#[test]
fn every_drop_reason_is_in_the_reference() {
    let page = read("docs/reference/metrics.md");
    let source = read("node-agent/common/src/counter.rs");
    let labels: Vec<&str> =
        source.lines().filter_map(|line| line.trim().split_once(" = \"")?.1.strip_suffix("\",")).collect();
    assert!(labels.len() > 20, "only {labels:?} found");
    for label in labels {
        assert!(
            page.contains(&format!("| `{label}` |")),
            "docs/reference/metrics.md lacks the reason {label}"
        );
    }
}

#[test]
fn links_lead_somewhere() {
    let mut pages: Vec<PathBuf> = Vec::new();
    let mut folders = vec![repository().join("docs"), repository().join("tests")];
    for file in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        pages.push(repository().join(file));
    }
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("list pages") {
            let path = entry.expect("list pages").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    let mut links = 0;
    let mut dead = Vec::new();
    for page in pages {
        let text = fs::read_to_string(&page).expect("read a page");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            links += 1;
            if !page.parent().unwrap_or(Path::new("/")).join(target).exists() {
                dead.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(links > 10, "only {links} links found");
    assert!(dead.is_empty(), "{}", dead.join("\n"));
}
