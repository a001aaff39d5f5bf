//! What is asked of the store at a time, of all and of one. It takes a thread and a connection for as long as the store needs, also when
//! nobody waits for the answer any more: so a turn goes with the question onto its thread, and ends there.

use crate::sql;
use crate::store::Store;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::task::{JoinError, spawn_blocking};

/// Questions that are put to the store at a time; others wait.
const AT_A_TIME: usize = 4;

/// And those of one, who would otherwise stop all others with questions that take long.
const OF_ONE: usize = 2;

/// Why there is no answer.
#[derive(Debug, Error)]
pub(crate) enum Unanswered {
    /// The store has none.
    #[error(transparent)]
    Store(#[from] sql::Error),
    /// The thread ended.
    #[error(transparent)]
    Thread(#[from] JoinError),
}

/// Turns of questions.
pub(crate) struct Turns {
    all: Arc<Semaphore>,
    /// By a digest of whose they are, since tokens are not kept. Those without a question are gone with the next.
    own: Mutex<HashMap<[u8; 32], Weak<Semaphore>>>,
}

impl Turns {
    /// Nobody asks yet.
    pub fn new() -> Turns {
        Turns { all: Arc::new(Semaphore::new(AT_A_TIME)), own: Mutex::default() }
    }

    /// Asks the store on a thread that may block, once it is `whose` turn.
    ///
    /// # Errors
    /// The store fails, or the thread ends.
    pub async fn ask<T: Send + 'static>(
        &self,
        store: &Arc<Store>,
        whose: &str,
        question: impl FnOnce(&Store) -> Result<T, sql::Error> + Send + 'static,
    ) -> Result<T, Unanswered> {
        let store = store.clone();
        Ok(self.run(whose, move || question(&store)).await??)
    }

    async fn run<T: Send + 'static>(
        &self,
        whose: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        // One's own first: what waits for that takes no turn of others. Neither is ever closed.
        let own = self.own(whose).acquire_owned().await;
        let turn = (own, self.all.clone().acquire_owned().await);
        spawn_blocking(move || {
            let _turn = turn;
            work()
        })
        .await
    }

    fn own(&self, whose: &str) -> Arc<Semaphore> {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.retain(|_, turns| turns.strong_count() > 0);
        let known = own.entry(Sha256::digest(whose).into()).or_default();
        known.upgrade().unwrap_or_else(|| {
            let new = Arc::new(Semaphore::new(OF_ONE));
            *known = Arc::downgrade(&new);
            new
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    /// Work under way now, and the most there was.
    #[derive(Default)]
    struct Busy {
        now: AtomicUsize,
        most: AtomicUsize,
    }

    impl Busy {
        fn work(self: &Arc<Busy>) -> impl FnOnce() + Send + 'static {
            let busy = self.clone();
            move || {
                let now = busy.now.fetch_add(1, Ordering::SeqCst) + 1;
                busy.most.fetch_max(now, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(20));
                busy.now.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Asks over and over, as one of several, and never waits for an answer.
    async fn ask_and_leave(turns: &Arc<Turns>, busy: &Arc<Busy>, people: usize) {
        for number in 0..200 {
            let (turns, work) = (turns.clone(), busy.work());
            let asked = tokio::spawn(async move { turns.run(&(number % people).to_string(), work).await });
            tokio::time::sleep(Duration::from_millis(1)).await;
            asked.abort();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_hangs_up_has_a_turn_until_the_work_is_done() {
        let (turns, busy) = (Arc::new(Turns::new()), Arc::new(Busy::default()));
        ask_and_leave(&turns, &busy, 10).await;
        assert_eq!(busy.most.load(Ordering::SeqCst), AT_A_TIME);
        let (turns, busy) = (Arc::new(Turns::new()), Arc::new(Busy::default()));
        ask_and_leave(&turns, &busy, 1).await;
        assert_eq!(busy.most.load(Ordering::SeqCst), OF_ONE);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_who_asks_much_leaves_turns_to_others() {
        let turns = Arc::new(Turns::new());
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        let slow = |number: usize| {
            let (turns, wait) = (turns.clone(), wait.clone());
            tokio::spawn(async move {
                turns
                    .run("greedy", move || {
                        // Until somebody lets it go on.
                        let _ = wait.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        number
                    })
                    .await
            })
        };
        let slow: Vec<_> = (0..40).map(slow).collect();
        for other in 0..20 {
            assert_eq!(turns.run("other", move || other).await.unwrap(), other);
        }
        assert!(slow.iter().all(|it| !it.is_finished()));
        drop(end);
        for it in slow {
            it.await.unwrap().unwrap();
        }
        // Who asks nothing is not remembered.
        turns.run("last", || ()).await.unwrap();
        assert_eq!(turns.own.lock().unwrap().len(), 1);
    }
}
