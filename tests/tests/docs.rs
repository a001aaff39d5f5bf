//! The pages keep up with the code.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use aegis_tests::apiserver::repository;
use serde_json::Value;
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
    for (file, least) in [
        ("operator/src/metrics.rs", 10),
        ("node-agent/src/metrics.rs", 20),
        ("node-agent/src/metrics/usage.rs", 6),
        ("operator/usage/src/metrics.rs", 10),
        ("operator/usage/collector/src/metrics.rs", 2),
    ] {
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

/// Every page that people read.
fn pages() -> Vec<PathBuf> {
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
    pages
}

#[test]
fn values_that_pages_name_exist() {
    let values: Value = serde_yaml_ng::from_str(&read("charts/aegis/values.yaml")).expect("YAML");
    let groups: Vec<&String> = values.as_object().expect("groups").keys().collect();
    let mut found = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).expect("read a page");
        // In code, and as `--set` takes them.
        let words = text.split(|c: char| c.is_whitespace() || "`=,;:()|".contains(c));
        for word in
            words.filter(|word| word.contains('.') && word.chars().all(|c| c.is_alphanumeric() || c == '.'))
        {
            let (group, _) = word.split_once('.').expect("a full stop");
            if !groups.iter().any(|known| *known == group)
                || [".", ".md", ".rs"].iter().any(|end| word.ends_with(end))
            {
                continue;
            }
            found += 1;
            let pointer = format!("/{}", word.replace('.', "/"));
            assert!(values.pointer(&pointer).is_some(), "{}: the chart has no value {word}", page.display());
        }
    }
    assert!(found > 40, "only {found} values found");
}

/// Flags of a program and their environment variables, from the source of its command line.
fn flags(source: &str) -> Vec<(String, Option<String>)> {
    let arguments = source.split("#[arg(long").skip(1);
    let flag = |text: &str| -> Option<(String, Option<String>)> {
        let (attribute, field) = text.split_once("pub ")?;
        let name = field.split(':').next()?.replace('_', "-");
        let variable = attribute.split_once("env = \"").and_then(|(_, rest)| rest.split('"').next());
        Some((format!("--{name}"), variable.map(str::to_owned)))
    };
    arguments.filter_map(flag).collect()
}

#[test]
fn every_flag_is_in_the_reference() {
    let page = read("docs/reference/flags.md");
    for (program, file, least) in [
        ("aegis-operator", "operator/src/args.rs", 6),
        ("aegis-node-agent", "node-agent/src/args.rs", 15),
        ("aegis-collector", "operator/usage/collector/src/args.rs", 12),
    ] {
        let section = page.split("\n## ").find(|section| section.starts_with(&format!("{program}\n")));
        let section = section.unwrap_or_else(|| panic!("docs/reference/flags.md has no section {program}"));
        let rows: Vec<&str> = section.lines().filter(|line| line.starts_with("| `--")).collect();
        let flags = flags(&read(file));
        assert!(flags.len() >= least, "{file}: only {flags:?} found");
        for (flag, variable) in &flags {
            let variable = variable.as_ref().map(|name| format!(" `{name}`")).unwrap_or_default();
            let row = format!("| `{flag}` |{variable} |");
            assert!(rows.iter().any(|line| line.starts_with(&row)), "docs/reference/flags.md: no row {row}");
        }
        assert_eq!(rows.len(), flags.len(), "docs/reference/flags.md: {program} has other flags");
    }
}

#[test]
fn links_lead_somewhere() {
    let mut links = 0;
    let mut dead = Vec::new();
    for page in pages() {
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

/// The cells of each row of a table, without its head.
fn rows(text: &str) -> Vec<Vec<&str>> {
    let lines = text.lines().filter(|line| line.starts_with('|'));
    lines.skip(2).map(|line| line.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

/// Every Rust file of the repository that git would keep.
fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![repository().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("list sources") {
            let path = entry.expect("list sources").path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if name.ends_with(".rs") {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn conformance_counts_its_rows_and_names_tests_that_exist() {
    let page = read("docs/conformance.md");
    let (summary, sections) = page.split_once("\n## ").expect("sections");
    let sources = sources();
    let mut counted = Vec::new();
    let mut all = [0; 4];
    for section in sections.split("\n## ") {
        let rfc = section.get(..8).expect("the number of an RFC");
        let mut counts = [0; 4];
        for row in rows(section) {
            let [requirement, level, state, _, tests] = row[..] else {
                panic!("{rfc}: {row:?} has not five cells")
            };
            let what = format!("{rfc}, {requirement}");
            assert!(["MUST", "SHOULD", "SHOULD NOT", "MAY"].contains(&level), "{what}: {level}");
            let kind = ["met", "deviates", "not met", "n/a"].iter().position(|known| *known == state);
            counts[kind.unwrap_or_else(|| panic!("{what}: {state}"))] += 1;
            let tests: Vec<&str> = tests.split('`').filter(|test| !test.trim().is_empty()).collect();
            assert!(state != "met" || !tests.is_empty(), "{what} is met, but no test shows it");
            for test in tests {
                let (file, name) = test.split_once("::").unwrap_or_else(|| panic!("{what}: {test}"));
                let function = format!("fn {name}()");
                let exists = sources.iter().filter(|path| path.ends_with(file)).any(|path| {
                    let source = fs::read_to_string(path).expect("read a source");
                    let head = source.split(&function).next().filter(|head| head.len() < source.len());
                    // The attribute stands between the function and the one before.
                    let attributes = head.and_then(|head| head.rsplit("\n}\n").next());
                    attributes.is_some_and(|text| text.contains("#[test]") || text.contains("::test]"))
                });
                assert!(exists, "{what}: there is no test {test}");
            }
        }
        assert_ne!(counts, [0; 4], "{rfc} has no rows");
        (0..4).for_each(|kind| all[kind] += counts[kind]);
        counted.push((rfc.to_owned(), counts));
    }
    counted.push(("all".to_owned(), all));
    let row = |cells: Vec<&str>| {
        let counts: Vec<u32> = cells[1..].iter().map(|cell| cell.parse().expect("a count")).collect();
        (cells[0].to_owned(), <[u32; 4]>::try_from(counts).expect("four counts"))
    };
    let said: Vec<_> = rows(summary).into_iter().map(row).collect();
    assert_eq!(said, counted, "docs/conformance.md: the counts at the top");
}
