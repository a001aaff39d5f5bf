//! Which program is attached where, as pinned: `<root>/v<schema>/links/<program>-<interface index>`.
//!
//! A new agent puts its programs into the links that it finds: at no moment is a device without a program. Links of an agent
//! with another schema are taken over in the same way.

use aya::programs::links::{FdLink, PinnedLink};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// The folders of links.
#[derive(Clone, Debug)]
pub struct Links {
    root: PathBuf,
    schema: u32,
}

/// A pinned link.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pin {
    /// Interface index.
    pub ifindex: u32,
    /// Program, as the pin is named for it.
    pub program: String,
    /// Where it is pinned.
    pub path: PathBuf,
}

impl Links {
    /// Those of one schema.
    pub fn new(root: &Path, schema: u32) -> Links {
        Links { root: root.to_owned(), schema }
    }

    /// Folder of the schema's links.
    pub fn folder(&self) -> PathBuf {
        self.root.join(format!("v{}/links", self.schema))
    }

    /// Folder of the schema's maps.
    pub fn maps(&self) -> PathBuf {
        self.root.join(format!("v{}/maps", self.schema))
    }

    /// The schema.
    pub fn schema(&self) -> u32 {
        self.schema
    }

    /// Where the link of a program and a device is pinned.
    pub fn path(&self, program: &str, ifindex: u32) -> PathBuf {
        self.folder().join(format!("{program}-{ifindex}"))
    }

    /// The link that an earlier agent left for this program and device.
    pub fn pinned(&self, program: &str, ifindex: u32) -> Option<FdLink> {
        PinnedLink::from_pin(self.path(program, ifindex)).ok().map(FdLink::from)
    }

    /// All of them.
    pub fn pins(&self) -> io::Result<Vec<Pin>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.folder())? {
            let path = entry?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let Some((program, index)) = name.rsplit_once('-') else { continue };
            let Ok(ifindex) = index.parse() else { continue };
            found.push(Pin { ifindex, program: program.to_owned(), path });
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Those of other schemas.
    pub fn others(&self) -> Vec<Links> {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let schemas = entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix('v')?.parse().ok());
        schemas
            .filter(|schema| *schema != self.schema)
            .map(|schema| Links { root: self.root.clone(), schema })
            .collect()
    }

    /// Removes the whole schema, its maps included.
    pub fn remove(&self) -> io::Result<()> {
        fs::remove_dir_all(self.root.join(format!("v{}", self.schema)))
    }
}
