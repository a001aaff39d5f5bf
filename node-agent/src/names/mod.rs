//! Host names of rules: which addresses they have, learned from the answers that pods get and by asking.
//!
//! The order is what matters: an address is in the data plane before the pod that asked is told it, and in the file from which the next
//! agent reads it before that, too. What cannot be learned, the pod is not told.

pub mod ask;
mod file;
mod look_up;
pub mod message;
pub mod proxy;

pub use look_up::{keep, resolvers};
pub use proxy::{Listening, serve};

use aegis_core::policy::names::{Full, HostPattern, Learned, Limits, Patterns, Record, Resolved, told};
use file::Saved;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Time for which an answer is held until the data plane knows its addresses.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a pod is not told an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// A name has as many addresses as are remembered of one.
    NameFull,
    /// All names together have.
    Full,
    /// Those of the account that means the name leave others too little room.
    Share,
    /// The data plane did not take its addresses in time.
    NotInForce,
    /// There was none.
    NoAnswer,
}

impl Refusal {
    /// In a word, for metrics.
    pub fn word(self) -> &'static str {
        match self {
            Refusal::NameFull => "name_full",
            Refusal::Full => "full",
            Refusal::Share => "share",
            Refusal::NotInForce => "not_in_force",
            Refusal::NoAnswer => "no_answer",
        }
    }
}

/// Why a name has no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unresolved {
    /// The DNS says that there is none, not only that it cannot tell.
    pub absent: bool,
    /// In words.
    pub message: String,
}

/// What the metrics say.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Pairs of name and address that are known, and how many may be.
    pub known: (usize, usize),
    /// Names that were looked for and have no address.
    pub unresolved: usize,
    /// Answers that pods were not told, by why.
    pub refused: BTreeMap<&'static str, u64>,
    /// Pairs given up before their grace was over.
    pub hurried: u64,
    /// Queries that were not heard, of pods with too many at a time, or of strangers.
    pub unheard: u64,
    /// Answers that were held until the data plane knew their addresses, and the seconds that this took.
    pub held: (u64, f64),
}

#[derive(Default)]
struct State {
    patterns: Patterns,
    learned: Learned,
    /// Grows with whatever changes what patterns mean.
    revision: u64,
    resolved: Option<Arc<Resolved>>,
    /// Names without `*` of rules with pods here.
    wanted: BTreeSet<String>,
    unresolved: BTreeMap<String, Unresolved>,
    /// The last time that something did not fit.
    full: Option<(Refusal, Instant)>,
    nameless: BTreeSet<IpAddr>,
    pods: Vec<IpNet>,
    failures: BTreeMap<SocketAddr, String>,
    saved: Option<Saved>,
    save_failure: Option<String>,
    tally: Tally,
}

struct Inner {
    state: Mutex<State>,
    limits: Limits,
    path: Option<PathBuf>,
    /// Revision that the data plane has.
    in_force: watch::Sender<u64>,
    /// Wakes whoever looks names up.
    looked: watch::Sender<()>,
    changed: Box<dyn Fn() + Send + Sync>,
}

/// What is known of names, shared by those who learn and the controller.
#[derive(Clone)]
pub struct Names(Arc<Inner>);

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

impl Names {
    /// What an agent before has left in a file of this folder; `changed` is called whenever there is something new.
    pub fn new(
        folder: Option<PathBuf>,
        node: &str,
        limits: Limits,
        changed: impl Fn() + Send + Sync + 'static,
    ) -> Names {
        let path = folder.map(|folder| folder.join(format!("names-{node}.json")));
        let saved = path.as_ref().and_then(|path| file::read(path));
        let mut state = State::default();
        if let Some(saved) = saved {
            (state.patterns, state.nameless, state.learned) = saved.clone().into_parts();
            tracing::info!(addresses = state.learned.len(), "host names as the agent before knew them");
            state.saved = Some(saved);
        }
        Names(Arc::new(Inner {
            state: Mutex::new(state),
            limits,
            path,
            in_force: watch::Sender::new(0),
            looked: watch::Sender::new(()),
            changed: Box::new(changed),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns what an answer says; resolves when the data plane knows all of it. What is not learned, nobody must be told.
    pub async fn take(&self, records: &[Record]) -> Result<(), Refusal> {
        let Some(revision) = self.learn(records)? else { return Ok(()) };
        let mut in_force = self.0.in_force.subscribe();
        let started = Instant::now();
        let reached = tokio::time::timeout(PATIENCE, in_force.wait_for(|now| *now >= revision)).await;
        let mut state = self.lock();
        state.tally.held.0 += 1;
        state.tally.held.1 += started.elapsed().as_secs_f64();
        drop(state);
        match reached {
            Ok(Ok(_)) => Ok(()),
            _ => {
                self.refused(Refusal::NotInForce);
                Err(Refusal::NotInForce)
            }
        }
    }

    /// Learns; gives the revision that the data plane must have, if it has not.
    fn learn(&self, records: &[Record]) -> Result<Option<u64>, Refusal> {
        let told = told(records);
        let mut state = self.lock();
        let State { patterns, learned, .. } = &mut *state;
        // Most answers are about something else: they wait for nobody.
        if !told.keys().any(|name| patterns.mean(name)) {
            return Ok(None);
        }
        match learned.learn(&told, patterns, &self.0.limits, now()) {
            Ok(true) => {
                state.revision += 1;
                state.resolved = None;
                let revision = state.revision;
                drop(state);
                (self.0.changed)();
                Ok(Some(revision))
            }
            Ok(false) => Ok(Some(state.revision).filter(|revision| *revision > *self.0.in_force.borrow())),
            Err(full) => {
                let refusal = match full {
                    Full::Name => Refusal::NameFull,
                    Full::Total => Refusal::Full,
                    Full::Share => Refusal::Share,
                };
                state.full = Some((refusal, Instant::now()));
                drop(state);
                self.refused(refusal);
                Err(refusal)
            }
        }
    }

    fn refused(&self, refusal: Refusal) {
        *self.lock().tally.refused.entry(refusal.word()).or_default() += 1;
    }

    fn unheard(&self) {
        self.lock().tally.unheard += 1;
    }

    /// Whether whoever has this address may ask: the agent is nobody else's resolver.
    fn serves(&self, address: IpAddr) -> bool {
        self.lock().pods.iter().any(|range| range.contains(&address))
    }

    fn listens(&self, address: SocketAddr, failure: Option<String>) {
        let mut state = self.lock();
        let before = state.failures.remove(&address);
        if let Some(failure) = failure {
            if before.as_ref() != Some(&failure) {
                tracing::error!(%address, failure, "cannot listen for the queries of pods");
            }
            state.failures.insert(address, failure);
        }
    }

    /// Learns from now on what these mean.
    pub fn follow(&self, patterns: &Patterns) {
        let mut state = self.lock();
        if state.patterns != *patterns {
            state.patterns = patterns.clone();
            state.revision += 1;
            state.resolved = None;
        }
    }

    /// Looks up those without `*`: they are of rules that cover pods here.
    pub fn look_up(&self, matter: &BTreeSet<HostPattern>) {
        let mut state = self.lock();
        let wanted: BTreeSet<String> =
            matter.iter().filter_map(HostPattern::name).map(str::to_owned).collect();
        if state.wanted != wanted {
            state.unresolved.retain(|name, _| wanted.contains(name));
            state.wanted = wanted;
            self.0.looked.send_replace(());
        }
    }

    /// Ranges of the pods that may ask.
    pub fn serve_pods(&self, ranges: &[IpNet]) {
        self.lock().pods = ranges.to_vec();
    }

    /// Pods that no rule with host names covers, as they were last known: their queries go where they ask.
    pub fn nameless(&self) -> BTreeSet<IpAddr> {
        self.lock().nameless.clone()
    }

    /// Whether rules have host names, as far as is known.
    pub fn any(&self) -> bool {
        !self.lock().patterns.is_empty()
    }

    /// What is known, and a number that is greater the more is.
    pub fn resolved(&self) -> (u64, Arc<Resolved>) {
        let mut state = self.lock();
        let resolved = match &state.resolved {
            Some(resolved) => Arc::clone(resolved),
            None => Arc::new(state.learned.resolve(&state.patterns)),
        };
        state.resolved = Some(Arc::clone(&resolved));
        (state.revision, resolved)
    }

    /// The data plane has what was known at this revision.
    pub fn in_force(&self, revision: u64, nameless: &BTreeSet<IpAddr>) {
        let mut state = self.lock();
        state.nameless.clone_from(nameless);
        self.save(&mut state);
        drop(state);
        self.0.in_force.send_if_modified(|now| {
            let newer = revision > *now;
            *now = revision.max(*now);
            newer
        });
    }

    /// Before anybody is told. Without a file the next agent knows nothing of what pods have been told.
    fn save(&self, state: &mut State) {
        let Some(path) = &self.0.path else { return };
        if state.patterns.is_empty() && state.saved.is_none() {
            return;
        }
        let current = Saved::of(&state.patterns, &state.nameless, &state.learned);
        if state.saved.as_ref().is_some_and(|saved| saved.says_the_same(&current)) {
            return;
        }
        match file::write(path, &current) {
            Ok(()) => (state.saved, state.save_failure) = (Some(current), None),
            Err(error) => {
                let error = error.to_string();
                if state.save_failure.as_ref() != Some(&error) {
                    tracing::error!(path = %path.display(), error, "cannot keep the addresses of host names");
                }
                state.save_failure = Some(error);
            }
        }
    }

    /// Forgets what is over. Gives whether there was something.
    pub fn expire(&self, in_use: impl Fn(&IpAddr) -> bool) -> bool {
        let mut state = self.lock();
        let State { patterns, learned, .. } = &mut *state;
        let forgotten = learned.expire(patterns, &self.0.limits, in_use, now());
        if forgotten {
            state.revision += 1;
            state.resolved = None;
        }
        forgotten
    }

    /// Names that have no address though they were looked for.
    pub fn unresolved(&self) -> BTreeMap<String, Unresolved> {
        self.lock().unresolved.clone()
    }

    /// What does not fit, if answers have been withheld for it within the last minute.
    pub fn lacks_room(&self) -> Option<String> {
        let Limits { per_name, total, .. } = self.0.limits;
        let state = self.lock();
        let (refusal, _) = state.full.filter(|(_, at)| at.elapsed() < Duration::from_secs(60))?;
        Some(match refusal {
            Refusal::NameFull => format!(
                "a host name of a rule has more than {per_name} addresses at a time, so pods are not told the rest: raise the chart's \
                 agent.dns.addressesPerName, or name the ranges by cidrs"
            ),
            _ => format!(
                "host names of rules have more than {total} addresses at a time, so pods are not told the rest: raise the chart's \
                 agent.dns.addresses, or name fewer"
            ),
        })
    }

    /// Why pods cannot be answered, or what is learned is not kept.
    pub fn failure(&self) -> Option<String> {
        let state = self.lock();
        let listening = state.failures.first_key_value();
        let listening = listening.map(|(address, error)| {
            format!("look-ups of pods that rules with hosts cover fail: cannot listen at {address}: {error}")
        });
        let saving = state.save_failure.as_ref();
        listening
            .or_else(|| Some(format!("addresses of host names are forgotten with this agent: {}", saving?)))
    }

    /// For the metrics.
    pub fn tally(&self) -> Tally {
        let state = self.lock();
        Tally {
            known: (state.learned.len(), self.0.limits.total),
            unresolved: state.unresolved.len(),
            hurried: state.learned.hurried,
            ..state.tally.clone()
        }
    }
}

#[cfg(test)]
mod tests;
