//! Faults that end with the test that made them, also when it fails.

use super::Lab;
use super::plan::Node;
use super::process::Process;

/// Undoes something at its end. On a failing test that is its drop; otherwise [`Undo::now`], which reports errors.
#[must_use = "dropped at once, it undoes the fault at once"]
pub struct Undo<'a> {
    what: String,
    action: Option<Box<dyn FnOnce() -> anyhow::Result<()> + Send + 'a>>,
}

impl<'a> Undo<'a> {
    /// To be undone by `action`; `what` stays if that fails.
    pub fn by(what: impl Into<String>, action: impl FnOnce() -> anyhow::Result<()> + Send + 'a) -> Self {
        Self { what: what.into(), action: Some(Box::new(action)) }
    }

    /// Undoes it now.
    pub fn now(mut self) -> anyhow::Result<()> {
        self.action.take().map_or(Ok(()), |action| action())
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.action.take().map(|action| action()) {
            eprintln!("{} stays: {error:#}", self.what);
        }
    }
}

impl Lab {
    /// [`Lab::pin`] for as long as the value lives: replies to an address enter at a node.
    pub fn entry(&self, address: std::net::Ipv4Addr, node: Node) -> anyhow::Result<Undo<'_>> {
        let undo = Undo::by(format!("the route to {address}"), move || self.pin(address, &[]));
        self.pin(address, &[node])?;
        Ok(undo)
    }

    /// [`Lab::cut_link`] for as long as the value lives.
    pub fn without_link(&self, node: Node) -> anyhow::Result<Undo<'_>> {
        let undo = Undo::by(format!("the cut link of {}", node.name()), move || self.restore_link(node));
        self.cut_link(node)?;
        Ok(undo)
    }

    /// [`Lab::freeze`] for as long as the value lives.
    pub fn frozen(&self, node: Node) -> anyhow::Result<Undo<'_>> {
        let undo = Undo::by(format!("the frozen node {}", node.name()), move || self.thaw(node));
        self.freeze(node)?;
        Ok(undo)
    }

    /// The agent of a node hangs for as long as the value lives: what happens meanwhile is not its doing.
    pub fn without_agent(&self, node: Node) -> anyhow::Result<Undo<'_>> {
        let agent = Process::of(self.only_program(node, "aegis-node-agent")?)?;
        agent.signal(libc::SIGSTOP);
        let go_on = move || {
            agent.signal(libc::SIGCONT);
            Ok(())
        };
        Ok(Undo::by(format!("the hanging agent of {}", node.name()), go_on))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn it_is_undone_once_and_also_when_a_test_fails() {
        let count = AtomicU32::new(0);
        let fault = || {
            Undo::by("the fault", || {
                count.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
        };
        fault().now().unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        let failing = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _fault = fault();
            assert_eq!(1, 2, "as a test fails");
        }));
        assert!(failing.is_err());
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }
}
