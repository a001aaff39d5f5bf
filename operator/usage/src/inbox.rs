//! Reports on their way into the store: a queue of bounded length, and one task that takes what is in it in one transaction.

use crate::http::Clock;
use crate::ingest::Receipt;
use crate::level::Retention;
use crate::sql::Error;
use crate::store::Store;
use aegis_usage_report::Report;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
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
    answer: oneshot::Sender<Option<Vec<Receipt>>>,
}

/// The way into the store.
#[derive(Clone)]
pub(crate) struct Inbox(mpsc::Sender<Delivery>);

impl Inbox {
    /// Begins the task that takes deliveries; it ends with the last of the inbox.
    pub fn open(store: Arc<Store>, clock: Clock) -> Inbox {
        let (sender, receiver) = mpsc::channel(WAITING);
        tokio::spawn(take(store, clock, receiver));
        Inbox(sender)
    }

    /// What became of each report; None if there is no room or the store fails: none is stored, as far as anybody knows.
    pub async fn deliver(&self, reports: Vec<Report>) -> Option<Vec<Receipt>> {
        let (answer, answered) = oneshot::channel();
        self.0.try_send(Delivery { reports, answer }).ok()?;
        answered.await.ok().flatten()
    }
}

async fn take(store: Arc<Store>, clock: Clock, mut deliveries: mpsc::Receiver<Delivery>) {
    while let Some(first) = deliveries.recv().await {
        let mut reports = first.reports;
        let mut answers = vec![(reports.len(), first.answer)];
        while reports.len() < PART
            && let Ok(Delivery { reports: more, answer }) = deliveries.try_recv()
        {
            answers.push((more.len(), answer));
            reports.extend(more);
        }
        let mut receipts = ingest(&store, &clock, reports).await.map(Vec::into_iter);
        for (count, answer) in answers {
            // Who has gone does not hear; the reports come again.
            let _ = answer.send(receipts.as_mut().map(|it| it.by_ref().take(count).collect()));
        }
    }
}

async fn ingest(store: &Arc<Store>, clock: &Clock, reports: Vec<Report>) -> Option<Vec<Receipt>> {
    let (store, now) = (store.clone(), clock());
    let done = tokio::task::spawn_blocking(move || store.ingest(&reports, now)).await;
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
pub async fn keep(store: Arc<Store>, retention: Retention, clock: Clock) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (store, now) = (store.clone(), clock());
        let done = tokio::task::spawn_blocking(move || store.maintain(now, &retention)).await;
        let failed: Option<Box<dyn std::error::Error>> = match done {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(Box::<Error>::from(error)),
            Err(error) => Some(Box::from(error)),
        };
        if let Some(error) = failed {
            warn!(%error, "minutes and hours are not made; they will be the next time");
        }
    }
}
