//! Writes the CRD manifests, the chart's copy of them and their reference page from the Rust types.

mod manifest;
mod reference;

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Writes what is derived from the resource types.
///
/// Without options: `crds/generated/`, the templates of the chart and `docs/reference/crds.md`.
#[derive(Parser)]
struct Args {
    /// Write nothing; fail if a file differs from what would be written, or should not be there.
    #[arg(long, conflicts_with = "out")]
    check: bool,
    /// Write only the manifests, into this directory.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

const GENERATED: &str = "crds/generated";
const TEMPLATES: &str = "charts/aegis/templates/crds";
const REFERENCE: &str = "docs/reference/crds.md";

fn main() -> Result<()> {
    let args = Args::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the crate has no parent directory")?;
    if let Some(directory) = args.out {
        return write(&directory, &manifests("")?);
    }
    let files = files()?;
    if args.check { check(root, &files) } else { write(root, &files) }
}

fn manifests(directory: &str) -> Result<BTreeMap<PathBuf, String>> {
    let mut files = BTreeMap::new();
    for definition in manifest::definitions()? {
        files.insert(
            Path::new(directory).join(manifest::file_name(&definition)),
            manifest::yaml(&definition)?,
        );
    }
    Ok(files)
}

fn files() -> Result<BTreeMap<PathBuf, String>> {
    let definitions = manifest::definitions()?;
    let mut files = manifests(GENERATED)?;
    for definition in &definitions {
        let path = Path::new(TEMPLATES).join(manifest::file_name(definition));
        files.insert(path, manifest::template(definition)?);
    }
    files.insert(REFERENCE.into(), reference::page(&definitions));
    Ok(files)
}

fn write(root: &Path, files: &BTreeMap<PathBuf, String>) -> Result<()> {
    for (path, text) in files {
        let path = root.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        }
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn check(root: &Path, files: &BTreeMap<PathBuf, String>) -> Result<()> {
    let mut drift = Vec::new();
    for (path, text) in files {
        match fs::read_to_string(root.join(path)) {
            Ok(found) if found == *text => {}
            Ok(_) => drift.push(format!("{} differs", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                drift.push(format!("{} is missing", path.display()));
            }
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        }
    }
    for directory in [GENERATED, TEMPLATES] {
        for entry in fs::read_dir(root.join(directory)).with_context(|| format!("list {directory}"))? {
            let path = Path::new(directory).join(entry?.file_name());
            if !files.contains_key(&path) {
                drift.push(format!("{} belongs to no type", path.display()));
            }
        }
    }
    if drift.is_empty() {
        return Ok(());
    }
    bail!("{}\nrun `cargo run -p aegis-crds --bin crdgen` and commit what it writes", drift.join("\n"));
}
