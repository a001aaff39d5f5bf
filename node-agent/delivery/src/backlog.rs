//! The reports that wait: on the disk, and in memory while the disk does not take them.

use crate::folder::Folder;
use crate::{Bounds, Counters, Loss, Name, Place, Queue};
use aegis_usage_report::Report;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

/// Reports on their way to the collector. They wait until [`Backlog::done`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Which they are.
    pub names: Vec<Name>,
    /// A JSON list of them.
    pub body: Vec<u8>,
}

/// The reports of a node that wait. It reads and writes files in place: not for a thread that others wait for.
#[derive(Debug)]
pub struct Backlog {
    node: String,
    folder: Folder,
    /// What is in the folder is known.
    listed: bool,
    /// The disk took the last report, as far as anybody knows.
    works: bool,
    queue: Queue,
    memory: BTreeMap<Name, Vec<u8>>,
}

impl Backlog {
    /// The backlog of a node in a folder, with what an earlier start of the agent left there. If the folder can't be used, reports are kept in
    /// memory until it can.
    pub fn open(folder: PathBuf, bounds: Bounds, node: &str, now: i64, counters: &mut Counters) -> Backlog {
        let mut backlog = Backlog {
            node: node.to_owned(),
            folder: Folder::new(folder),
            listed: false,
            works: true,
            queue: Queue::new(bounds),
            memory: BTreeMap::new(),
        };
        let listed = backlog.list(counters);
        backlog.note(listed);
        backlog.expire(now, counters);
        backlog
    }

    /// Keeps a report, and lets go what there is no room for any more.
    pub fn push(&mut self, report: &Report, name: Name, now: i64, counters: &mut Counters) {
        let bytes = match serde_json::to_vec(report) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::error!(%error, "a report of use cannot be written");
                return counters.lose(Loss::Invalid, 1);
            }
        };
        let kept = self.on_disk(&name, &bytes, counters);
        if kept.is_err() {
            self.admit(name.clone(), bytes.len() as u64, Place::Memory, counters);
            if self.queue.names(Place::Memory).any(|it| *it == name) {
                self.memory.insert(name, bytes);
            }
        }
        self.note(kept);
        self.expire(now, counters);
    }

    /// What goes next, at most so many reports and bytes, but one; None if nothing waits. What turns out to be no report, or another node's,
    /// is removed.
    pub fn next(&mut self, reports: usize, bytes: u64, counters: &mut Counters) -> Option<Batch> {
        while !self.queue.is_empty() {
            let mut batch = Batch { names: Vec::new(), body: vec![b'['] };
            for name in self.queue.next(reports, bytes) {
                match self.read(&name) {
                    Ok(text) => {
                        if !batch.names.is_empty() {
                            batch.body.push(b',');
                        }
                        batch.body.extend(text);
                        batch.names.push(name);
                    }
                    Err(error) => {
                        let folder = self.folder.path().display();
                        tracing::warn!(%folder, %name, %error, "a waiting report of use cannot be read; it is lost");
                        counters.lose(Loss::Damaged, 1);
                        self.remove(&name);
                    }
                }
            }
            if !batch.names.is_empty() {
                batch.body.push(b']');
                return Some(batch);
            }
        }
        None
    }

    /// These need not wait any longer.
    pub fn done(&mut self, names: &[Name]) {
        names.iter().for_each(|name| self.remove(name));
    }

    /// Lets go what the collector would not take any more.
    pub fn expire(&mut self, now: i64, counters: &mut Counters) {
        let old = self.queue.expired(now);
        if !old.is_empty() {
            tracing::warn!(
                reports = old.len(),
                "reports of use have become too old for the collector; they are lost"
            );
            counters.lose(Loss::Old, old.len() as u64);
            self.done(&old);
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Says how much waits.
    pub fn count(&self, counters: &mut Counters) {
        counters.waiting = self.queue.len() as u64;
        counters.in_memory = self.memory.len() as u64;
        counters.bytes = self.queue.bytes(Place::Disk) + self.queue.bytes(Place::Memory);
        counters.oldest = self.queue.oldest();
    }

    /// Writes a report to the disk, and those first that waited for the disk to take them.
    fn on_disk(&mut self, name: &Name, bytes: &[u8], counters: &mut Counters) -> io::Result<()> {
        if !self.listed {
            self.list(counters)?;
        }
        while let Some((name, bytes)) = self.memory.pop_first() {
            if let Err(error) = self.folder.write(&name, &bytes) {
                self.memory.insert(name, bytes);
                return Err(error);
            }
            self.admit(name, bytes.len() as u64, Place::Disk, counters);
        }
        self.folder.write(name, bytes)?;
        self.admit(name.clone(), bytes.len() as u64, Place::Disk, counters);
        Ok(())
    }

    fn list(&mut self, counters: &mut Counters) -> io::Result<()> {
        let found = self.folder.list()?;
        self.listed = true;
        counters.lose(Loss::Damaged, found.damaged);
        if found.damaged > 0 {
            let folder = self.folder.path().display();
            tracing::warn!(%folder, files = found.damaged, "files that are no reports of use were removed");
        }
        if !found.reports.is_empty() {
            tracing::info!(reports = found.reports.len(), "reports of use wait from before");
        }
        for (name, bytes) in found.reports {
            self.admit(name, bytes, Place::Disk, counters);
        }
        Ok(())
    }

    /// Takes a report that is in its place into the queue, and removes what has to go for it.
    fn admit(&mut self, name: Name, bytes: u64, place: Place, counters: &mut Counters) {
        let gone = self.queue.insert(name, bytes, place);
        if gone.is_empty() {
            return;
        }
        tracing::warn!(reports = gone.len(), "there is no room for more reports of use: the oldest are lost");
        counters.lose(Loss::Full, gone.len() as u64);
        // They may not be in the queue any more, but where they were.
        for name in &gone {
            self.memory.remove(name);
            if place == Place::Disk {
                self.unlink(name);
            }
        }
    }

    fn remove(&mut self, name: &Name) {
        match self.queue.remove(name) {
            Some(Place::Disk) => self.unlink(name),
            Some(Place::Memory) => {
                self.memory.remove(name);
            }
            None => {}
        }
    }

    /// A file that stays is found by the next start of the agent, and the collector sees that it has it.
    fn unlink(&mut self, name: &Name) {
        if let Err(error) = self.folder.remove(name) {
            tracing::warn!(folder = %self.folder.path().display(), %name, %error, "a report of use cannot be removed");
        }
    }

    /// The text of a report, which is one of this node: with those of others the collector would refuse all that go with it, for ever.
    fn read(&self, name: &Name) -> Result<Vec<u8>, Unreadable> {
        if let Some(text) = self.memory.get(name) {
            return Ok(text.clone());
        }
        let text = self.folder.read(name).map_err(Unreadable::File)?;
        let report: Report = serde_json::from_slice(&text).map_err(Unreadable::Text)?;
        if !name.is_of(&report) {
            return Err(Unreadable::Other);
        }
        if report.node != self.node {
            return Err(Unreadable::Node(report.node));
        }
        Ok(text)
    }

    /// Says it once when the disk begins to fail, and once when it works again.
    fn note(&mut self, done: io::Result<()>) {
        let folder = self.folder.path().display();
        match &done {
            Err(error) if self.works => {
                tracing::error!(%folder, %error, "reports of use cannot be kept on the disk, only some in memory");
            }
            Ok(()) if !self.works => tracing::info!(%folder, "reports of use are kept on the disk again"),
            _ => {}
        }
        self.works = done.is_ok();
    }
}

#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error(transparent)]
    File(io::Error),
    #[error(transparent)]
    Text(serde_json::Error),
    #[error("it is not the report that its name says")]
    Other,
    #[error("it is of node {0:?}")]
    Node(String),
}
