//! The right to write, which a leader has for a while only.

use crate::error::{CallError, call};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Open while this replica leads. It shuts by itself: a leader that cannot renew its lease stops writing before
/// anybody else may start, whatever its tasks are waiting for.
pub struct Gate {
    started: Instant,
    open_until: AtomicU64,
}

impl Gate {
    /// A gate that is shut.
    pub fn new() -> Gate {
        Gate { started: Instant::now(), open_until: AtomicU64::new(0) }
    }

    /// Time since the gate was made, by a clock that never goes back.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Lets writes begin until this time.
    pub fn open_until(&self, until: Duration) {
        self.open_until.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Ordering::Release);
    }

    /// Lets no further write begin.
    pub fn shut(&self) {
        self.open_until.store(0, Ordering::Release);
    }

    /// Whether a write may begin now.
    pub fn is_open(&self) -> bool {
        self.now().as_millis() < u128::from(self.open_until.load(Ordering::Acquire))
    }

    /// Makes a writing API call, if this replica leads.
    pub async fn write<T>(
        &self,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, CallError> {
        if self.is_open() { call(request).await } else { Err(CallError::NotLeader) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn shut_gate_makes_no_call() {
        let gate = Gate::new();
        let called = std::sync::atomic::AtomicBool::new(false);
        let request = || async {
            called.store(true, Ordering::Relaxed);
            Ok(())
        };
        assert!(matches!(gate.write(request()).await, Err(CallError::NotLeader)));
        assert!(!called.load(Ordering::Relaxed));
        gate.open_until(gate.now() + Duration::from_secs(60));
        assert!(gate.write(request()).await.is_ok());
        assert!(called.load(Ordering::Relaxed));
        gate.shut();
        assert!(!gate.is_open());
    }

    #[test]
    fn gate_shuts_by_itself() {
        let gate = Gate::new();
        gate.open_until(Duration::ZERO);
        assert!(!gate.is_open());
    }
}
