//! Reports on their way into the store: a queue of bounded length, and one task that takes what is in it in one transaction.

use crate::http::Clock;
use crate::ingest::Receipt;
use crate::level::Retention;
use crate::metrics::Metrics;
use crate::sql::Error;
use crate::store::Store;
use aegis_usage_report::Report;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tracing::warn;

/// Deliveries that may wait. Beyond that agents keep theirs and come again.
const WAITING: usize = 256;

/// Reports of one transaction, unless a single delivery has more.
const PART: usize = 64;

/// How often slots are made and old ones forgotten.
const EVERY: Duration = Duration::from_secs(10);

/// What an agent delivers, and where its answer goes. None: the store does not take it now.
struct Delivery {
    reports: Vec<Report>,
    /// Given back once they are not in memory any more, whether somebody waits for the answer or not.
    room: OwnedSemaphorePermit,
    answer: oneshot::Sender<Option<Vec<Receipt>>>,
}

/// The way into the store.
#[derive(Clone)]
pub(crate) struct Inbox {
    deliveries: mpsc::Sender<Delivery>,
    metrics: Metrics,
}

impl Inbox {
    /// Begins the task that takes deliveries; it ends with the last of the inbox.
    pub fn open(store: Arc<Store>, clock: Clock, metrics: Metrics) -> Inbox {
        let (deliveries, receiver) = mpsc::channel(WAITING);
        tokio::spawn(take(store, clock, receiver, metrics.clone()));
        Inbox { deliveries, metrics }
    }

    /// What became of each report; None if there is no room or the store fails: none is stored, as far as anybody knows.
    pub async fn deliver(&self, reports: Vec<Report>, room: OwnedSemaphorePermit) -> Option<Vec<Receipt>> {
        let (answer, answered) = oneshot::channel();
        let place = self.deliveries.try_reserve().ok()?;
        self.metrics.wait(1);
        place.send(Delivery { reports, room, answer });
        answered.await.ok().flatten()
    }
}

async fn take(store: Arc<Store>, clock: Clock, mut deliveries: mpsc::Receiver<Delivery>, metrics: Metrics) {
    while let Some(first) = deliveries.recv().await {
        let mut reports = first.reports;
        let mut room = first.room;
        let mut answers = vec![(reports.len(), first.answer)];
        while reports.len() < PART
            && let Ok(more) = deliveries.try_recv()
        {
            answers.push((more.reports.len(), more.answer));
            reports.extend(more.reports);
            room.merge(more.room);
        }
        let waited = answers.len() as i64;
        let mut receipts = ingest(&store, &clock, reports, &metrics).await.map(Vec::into_iter);
        metrics.wait(-waited);
        drop(room);
        for (count, answer) in answers {
            // Who has gone does not hear; the reports come again.
            let _ = answer.send(receipts.as_mut().map(|it| it.by_ref().take(count).collect()));
        }
    }
}

async fn ingest(
    store: &Arc<Store>,
    clock: &Clock,
    reports: Vec<Report>,
    metrics: &Metrics,
) -> Option<Vec<Receipt>> {
    let (store, now, metrics) = (store.clone(), clock(), metrics.clone());
    let done = tokio::task::spawn_blocking(move || {
        let begin = Instant::now();
        let receipts = store.ingest(&reports, now)?;
        metrics.ingested(begin.elapsed());
        for (report, receipt) in reports.iter().zip(&receipts) {
            // One that was moved ends now.
            let end = if *receipt == Receipt::Moved { now } else { report.to };
            metrics.reported(receipt, report.rows.len(), end);
        }
        Ok::<_, Error>(receipts)
    })
    .await;
    match done {
        Ok(Ok(receipts)) => Some(receipts),
        Ok(Err(error)) => {
            warn!(%error, "reports are not stored; agents keep them");
            None
        }
        Err(error) => {
            warn!(%error, "reports are not stored; agents keep them");
            None
        }
    }
}

/// Makes slots and forgets old ones, for ever.
pub async fn keep(store: Arc<Store>, retention: Retention, clock: Clock, metrics: Metrics) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (store, now) = (store.clone(), clock());
        let done = tokio::task::spawn_blocking(move || {
            let done = store.maintain(now, &retention)?;
            store.contents().map(|contents| (done, contents))
        });
        let failed: Option<Box<dyn std::error::Error>> = match done.await {
            Ok(Ok((done, contents))) => {
                metrics.maintained(&done);
                metrics.contents(&contents);
                None
            }
            Ok(Err(error)) => Some(Box::<Error>::from(error)),
            Err(error) => Some(Box::from(error)),
        };
        if let Some(error) = failed {
            metrics.failed();
            warn!(%error, "minutes and hours are not made; they will be the next time");
        }
    }
}
