//! Does the routing daemon announce what the kernel's table says? It is asked, since nothing else tells: with a frozen
//! zebra, sessions and BFD live on, and no change of a route gets out.

use super::daemon::{self, Answer, DaemonError, Session};
use crate::args::RoutingDaemon;
use aegis_core::egress::Egress;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Addresses that one look asks for; with more of them, each has its turn.
const BATCH: usize = 32;
/// Looks without an answer before the daemon counts as silent: a busy machine may be late once.
const MISSED: u32 = 2;

/// What the last looks have shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Its BGP sessions.
    pub sessions: Vec<Session>,
    /// Why it does not answer.
    pub failure: Option<String>,
    /// Addresses that somebody has been told of, and those of which nobody has; others have not been asked for yet.
    pub told: BTreeMap<Egress, bool>,
}

impl Look {
    /// Sessions that are established.
    pub fn up(&self) -> usize {
        self.sessions.iter().filter(|session| session.up).count()
    }
}

/// The rule by which looks become knowledge.
#[derive(Clone, Debug, Default)]
struct State {
    ask_for: BTreeSet<Egress>,
    after: Option<Egress>,
    missed: u32,
    look: Look,
}

impl State {
    /// Addresses to ask for next.
    fn next(&mut self) -> Vec<Egress> {
        let (before, behind): (Vec<Egress>, Vec<Egress>) =
            self.ask_for.iter().partition(|address| self.after.is_some_and(|after| **address <= after));
        let next: Vec<Egress> = behind.into_iter().chain(before).take(BATCH).collect();
        self.after = next.last().copied();
        next
    }

    fn take(&mut self, asked: &[Egress], answer: Result<Answer, DaemonError>) {
        match answer {
            Ok(answer) => {
                self.missed = 0;
                self.look.failure = None;
                self.look.sessions = answer.sessions;
                for address in asked {
                    self.look.told.insert(*address, answer.announced.contains(address));
                }
            }
            Err(error) => {
                self.missed += 1;
                if self.missed >= MISSED || !matches!(error, DaemonError::Silent(_)) {
                    self.look.failure = Some(error.to_string());
                    self.look.sessions.clear();
                    self.look.told.clear();
                }
            }
        }
        self.look.told.retain(|address, _| self.ask_for.contains(address));
    }
}

/// Shared by the watcher and the controller.
#[derive(Clone, Debug, Default)]
pub struct Health {
    state: Arc<Mutex<State>>,
}

impl Health {
    /// What is known, of these addresses.
    pub fn look(&self, ask_for: &BTreeSet<Egress>) -> Look {
        self.with(|state| {
            state.ask_for.clone_from(ask_for);
            state.look.told.retain(|address, _| ask_for.contains(address));
            state.look.clone()
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks without end; `changed` is called when there is news. Ends at once if there is no daemon.
    pub async fn watch(&self, daemon: RoutingDaemon, folder: &Path, changed: impl Fn()) {
        if daemon == RoutingDaemon::None {
            return;
        }
        let mut timer = tokio::time::interval(INTERVAL);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut known = Look::default();
        loop {
            timer.tick().await;
            let asked = self.with(State::next);
            let answer = match daemon {
                RoutingDaemon::FRR => daemon::frr(folder, &asked).await,
                RoutingDaemon::BIRD => daemon::bird(folder, &asked).await,
                RoutingDaemon::None => return,
            };
            let look = self.with(|state| {
                state.take(&asked, answer);
                state.look.clone()
            });
            if look != known {
                match (&known.failure, &look.failure) {
                    (None, Some(failure)) => tracing::warn!(failure, "the routing daemon is not well"),
                    (Some(_), None) => tracing::info!("the routing daemon answers again"),
                    _ => {}
                }
                known = look;
                changed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn address(low: u8) -> Egress {
        Ipv4Addr::new(203, 0, 113, low).into()
    }

    fn answer(announced: &[u8]) -> Result<Answer, DaemonError> {
        let sessions = vec![Session { name: "r".into(), up: true }];
        Ok(Answer { sessions, announced: announced.iter().map(|low| address(*low)).collect() })
    }

    #[test]
    fn every_address_has_its_turn() {
        let mut state = State { ask_for: (0..40).map(address).collect(), ..State::default() };
        let (first, second) = (state.next(), state.next());
        assert_eq!((first.len(), second.len()), (BATCH, BATCH));
        let asked: BTreeSet<Egress> = first.into_iter().chain(second).collect();
        assert_eq!(asked, state.ask_for);
        state.ask_for = [address(1)].into();
        assert_eq!([state.next(), state.next()], [[address(1)], [address(1)]]);
    }

    #[test]
    fn silence_counts_the_second_time_and_absence_at_once() {
        let mut state = State { ask_for: [address(1), address(2)].into(), ..State::default() };
        let asked = [address(1), address(2)];
        state.take(&asked, answer(&[1]));
        let well = state.look.clone();
        assert_eq!((well.up(), &well.told), (1, &[(address(1), true), (address(2), false)].into()));
        state.take(&asked, Err(DaemonError::Silent("zebra")));
        assert_eq!(state.look, well);
        state.take(&asked, Err(DaemonError::Silent("zebra")));
        assert_eq!(state.look.failure.as_deref(), Some("zebra does not answer"));
        assert_eq!((state.look.up(), state.look.told.len()), (0, 0), "nothing is known any more");
        state.take(&asked, answer(&[1]));
        assert_eq!(state.look, well);
        state.take(&asked, Err(DaemonError::Absent("zebra", std::io::ErrorKind::NotFound.into())));
        assert!(state.look.failure.is_some());
    }
}
