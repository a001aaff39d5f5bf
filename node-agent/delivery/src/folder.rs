//! One file for each report, in one folder.

use crate::Name;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// End of a file that is being written.
const NEW: &str = ".new";

/// Longest file that can be a report: beyond what one is held to ([`aegis_usage_report::MAX_ROWS`]), so that reading one never takes all memory.
const LONGEST: u64 = 16 << 20;

/// The folder of waiting reports.
#[derive(Clone, Debug)]
pub(crate) struct Folder(PathBuf);

/// What was found in it.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Reports and their bytes, the oldest first.
    pub reports: Vec<(Name, u64)>,
    /// Files that had the end of reports and cannot be any: they were removed.
    pub damaged: u64,
}

impl Folder {
    pub fn new(path: PathBuf) -> Folder {
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the folder if there is none, and looks what is in it. Files by other names than those of reports are somebody else's: they stay.
    pub fn list(&self) -> io::Result<Found> {
        // It says who had connections where.
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
        let mut found = Found::default();
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            let file = entry.file_name();
            let Some(file) = file.to_str() else { continue };
            let Some(text) = [Name::END.to_owned(), format!("{}{NEW}", Name::END)]
                .into_iter()
                .find(|it| file.ends_with(it.as_str()))
            else {
                continue;
            };
            let length = entry.metadata().map(|it| if it.is_file() { it.len() } else { 0 });
            match (Name::parse(file), length) {
                (Some(name), Ok(length @ 1..=LONGEST)) => found.reports.push((name, length)),
                // An agent that ended while it wrote is no loss: that report was in nobody's hands yet, and its number is missing.
                _ => {
                    found.damaged += u64::from(text == Name::END);
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
        found.reports.sort();
        Ok(found)
    }

    /// Writes a file as a whole or not at all. What is not on the disk yet when the machine stops is lost, and its number is missing: waiting for the
    /// disk every ten seconds, on every node, would be worse.
    pub fn write(&self, name: &Name, bytes: &[u8]) -> io::Result<()> {
        let path = self.file(name);
        let new = self.0.join(format!("{name}{NEW}"));
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(bytes))
            .and_then(|()| fs::rename(&new, path));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written
    }

    /// What is in a file.
    pub fn read(&self, name: &Name) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.file(name))?.take(LONGEST).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Removes a file, if it is there.
    pub fn remove(&self, name: &Name) -> io::Result<()> {
        match fs::remove_file(self.file(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn file(&self, name: &Name) -> PathBuf {
        self.0.join(name.to_string())
    }
}
