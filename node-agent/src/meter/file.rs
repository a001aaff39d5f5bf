//! The file by which an agent knows what numbers of rules stood for to the one before: those that it finds in meters are of then.

use crate::ops::Rules;
use aegis_core::policy::{BindingName, RuleName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A rule.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Saved {
    /// Of the cluster.
    Policy(String),
    /// Of an account.
    Binding {
        /// The account.
        account: String,
        /// Its name there.
        name: String,
    },
}

fn place(folder: &Path) -> PathBuf {
    folder.join("meter-rules.json")
}

/// Reads it; nothing if there is none, or none that can be read.
pub fn read(folder: &Path) -> Option<Arc<Rules>> {
    let path = place(folder);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot read the names of rules");
            return None;
        }
    };
    let saved: BTreeMap<u32, Saved> = serde_json::from_slice(&text)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "not names of rules"))
        .ok()?;
    let name = |saved| match saved {
        Saved::Policy(name) => RuleName::Policy(name),
        Saved::Binding { account, name } => RuleName::Binding(BindingName { account, name }),
    };
    Some(Arc::new(saved.into_iter().map(|(number, saved)| (number, name(saved))).collect()))
}

/// Writes it as a whole or not at all.
pub fn write(folder: &Path, rules: &Rules) -> io::Result<()> {
    let saved: BTreeMap<u32, Saved> = rules
        .iter()
        .map(|(number, rule)| {
            let saved = match rule {
                RuleName::Policy(name) => Saved::Policy(name.clone()),
                RuleName::Binding(name) => {
                    Saved::Binding { account: name.account.clone(), name: name.name.clone() }
                }
            };
            (*number, saved)
        })
        .collect();
    let path = place(folder);
    let new = path.with_extension("new");
    std::fs::write(&new, serde_json::to_vec(&saved).map_err(io::Error::other)?)?;
    std::fs::rename(new, path)
}
