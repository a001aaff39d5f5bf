//! Reports on their way: kept first, then delivered when the pace says so.

use crate::reporter::Shared;
use crate::{
    Answer, Backlog, Batch, Boot, Bounds, Client, ClientError, Collector, Counters, Loss, Name, Outcome,
    Pace, Reporter, Timing, Told, Wait, random,
};
use aegis_usage_report::Report;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::Instant;

/// The time, in seconds since the Unix epoch.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// Reports that were handed in and are not kept yet. There are as many only while the disk hangs.
const COMING: usize = 16;

/// Most bytes of a delivery, but for a report that is larger by itself. The collector takes 16 MiB, but a thousand at a time.
const BYTES: u64 = 1 << 20;

/// How often it is said that nothing gets through.
const SAY: Duration = Duration::from_secs(300);

/// What is delivered, where to, and how much may wait meanwhile.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the node.
    pub node: String,
    /// The collector.
    pub collector: Collector,
    /// File of the token, for the collector's audience.
    pub token: PathBuf,
    /// File of the authority that the collector's certificate is by, in PEM.
    pub authority: PathBuf,
    /// Folder of the reports that wait. Nobody else's.
    pub folder: PathBuf,
    /// How much may wait.
    pub bounds: Bounds,
    /// How patient it is.
    pub timing: Timing,
    /// Time limits of one delivery.
    pub wait: Wait,
}

/// The reports of one start of the agent, and what waits from earlier ones.
pub struct Delivery {
    clock: Clock,
    bounds: Bounds,
    node: String,
    folder: PathBuf,
    timing: Timing,
    client: Client,
    coming: Receiver<(Name, Report)>,
    shared: Shared,
}

impl Delivery {
    /// A start of the agent, and what it reports by. Nothing happens before [`Delivery::run`].
    pub fn new(settings: Settings, boot: Boot, clock: Clock) -> (Reporter, Delivery) {
        let Settings { node, collector, token, authority, folder, bounds, timing, wait } = settings;
        let (sender, coming) = channel(COMING);
        let shared = Shared::default();
        let reporter = Reporter::new(&node, boot, sender, shared.clone());
        let client = Client::new(collector, token, authority, wait);
        (reporter, Delivery { clock, bounds, node, folder, timing, client, coming, shared })
    }

    /// Delivers, until the reporter and its clones are gone and nothing waits. It may be dropped at any time: what is kept is delivered by the next
    /// start.
    ///
    /// It reads and writes files in place: on a thread of its own a disk that hangs holds up nobody else.
    pub async fn run(self) {
        let Delivery { clock, bounds, node, folder, timing, client, mut coming, shared } = self;
        let start = Instant::now();
        let mut counted = Counters::default();
        let backlog = Backlog::open(folder, bounds, &node, clock(), &mut counted);
        let pace = Pace::new(timing, Duration::ZERO, random::number());
        let mut work = Work { clock, backlog, pace, start, shared, said: None };
        work.count(&counted);
        let mut idle = Some(client);
        let mut flight = None;
        let mut open = true;
        while open || !work.backlog.is_empty() {
            if flight.is_none()
                && work.ready()
                && let Some(client) = idle.take()
            {
                match work.next() {
                    Some(batch) => flight = Some(Box::pin(fly(client, batch))),
                    None => idle = Some(client),
                }
                continue;
            }
            tokio::select! {
                report = coming.recv(), if open => match report {
                    Some((name, report)) => work.keep(name, &report),
                    None => open = false,
                },
                (client, names, took, answer) = landed(&mut flight) => {
                    (flight, idle) = (None, Some(client));
                    work.answered(&names, took, answer);
                }
                () = tokio::time::sleep_until(start + work.pace.due()), if flight.is_none() && !work.backlog.is_empty() => {}
            }
        }
    }
}

type Landed = (Client, Vec<Name>, Duration, Result<Answer, ClientError>);

async fn fly(mut client: Client, batch: Batch) -> Landed {
    let begin = Instant::now();
    let answer = client.deliver(batch.body, batch.names.len()).await;
    (client, batch.names, begin.elapsed(), answer)
}

/// The end of a flight; never, if there is none.
async fn landed<F: Future + Unpin>(flight: &mut Option<F>) -> F::Output {
    match flight {
        Some(flight) => flight.await,
        None => std::future::pending().await,
    }
}

struct Work {
    clock: Clock,
    backlog: Backlog,
    pace: Pace,
    start: Instant,
    shared: Shared,
    /// When it was last said that nothing gets through.
    said: Option<Instant>,
}

impl Work {
    fn ready(&self) -> bool {
        !self.backlog.is_empty() && self.start.elapsed() >= self.pace.due()
    }

    /// Changes the counters, and says how much waits. Metrics wait meanwhile, so files are not touched.
    fn count(&self, counted: &Counters) {
        let mut counters = self.shared.lock();
        for (loss, lost) in counted.losses() {
            counters.lose(loss, lost);
        }
        self.backlog.count(&mut counters);
    }

    fn keep(&mut self, name: Name, report: &Report) {
        if self.backlog.is_empty() {
            self.pace.arrived(self.start.elapsed());
        }
        let mut counted = Counters::default();
        self.backlog.push(report, name, (self.clock)(), &mut counted);
        self.count(&counted);
    }

    fn next(&mut self) -> Option<Batch> {
        let mut counted = Counters::default();
        self.backlog.expire((self.clock)(), &mut counted);
        let batch = self.backlog.next(self.pace.reports(), BYTES, &mut counted);
        self.count(&counted);
        batch
    }

    fn answered(&mut self, names: &[Name], took: Duration, answer: Result<Answer, ClientError>) {
        let (now, chance) = (self.start.elapsed(), random::number());
        let mut counted = Counters::default();
        let mut delivered = 0;
        let outcome = match answer {
            Ok(Answer::Taken(told)) => {
                self.pace.taken(now, names.len(), took, chance);
                for (name, told) in names.iter().zip(told) {
                    match told {
                        Told::Stored => delivered += 1,
                        Told::Lost(loss, reason) => {
                            tracing::warn!(%name, why = loss.label(), reason, "the collector does not take a report of use");
                            counted.lose(loss, 1);
                        }
                    }
                }
                self.backlog.done(names);
                if self.said.take().is_some() {
                    tracing::info!("the collector takes reports of use again");
                }
                Outcome::Taken
            }
            Ok(Answer::Refused(said)) => {
                if self.pace.refused(now, names.len(), chance) {
                    tracing::warn!(reports = ?names, said, "the collector does not understand a report of use; it is lost");
                    counted.lose(Loss::Invalid, names.len() as u64);
                    self.backlog.done(names);
                }
                Outcome::Refused
            }
            Ok(Answer::PutOff { outcome, wait, said }) => {
                self.pace.put_off(now, wait, chance);
                self.say(outcome, &said);
                outcome
            }
            Err(error) => {
                self.pace.put_off(now, None, chance);
                self.say(error.outcome(), &error);
                error.outcome()
            }
        };
        self.count(&counted);
        let mut counters = self.shared.lock();
        counters.attempt(outcome);
        counters.delivered += delivered;
        if outcome == Outcome::Taken {
            counters.last_success = Some((self.clock)());
        }
    }

    /// Says why nothing gets through, at first and from time to time.
    fn say(&mut self, outcome: Outcome, why: &dyn std::fmt::Display) {
        if self.said.is_none_or(|said| said.elapsed() >= SAY) {
            self.said = Some(Instant::now());
            tracing::warn!(outcome = outcome.label(), %why, "reports of use are not delivered; they wait");
        }
    }
}
