//! The operator: watches what people want and what nodes report, plans which node holds which slice of which egress
//! address, and writes plan and status to the API server. Any number of replicas may run; one of them leads.

mod agents;
mod apply;
mod args;
mod backoff;
mod controller;
mod error;
mod events;
mod evidence;
mod fence;
mod finalizer;
mod gate;
mod leader;
mod memory;
mod metrics;
mod presence;
mod server;
mod status;
mod statuses;
mod watch;

use aegis_world::{object, report, world};
use agents::Agents;
use apply::Applier;
use args::Args;
use clap::Parser;
use controller::{Controller, Mind};
use error::Error;
use events::Publisher;
use fence::Fencer;
use gate::Gate;
use kube::{Client, Config};
use leader::Election;
use metrics::Metrics;
use server::Health;
use status::View;
use statuses::Statuses;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch as channel};
use tokio::task::JoinSet;
use tracing_subscriber::EnvFilter;
use watch::Caches;

/// The image is linked with musl, whose allocator makes plans of thousands of nodes take two to three times as long.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Name under which the operator writes fields.
pub const FIELD_MANAGER: &str = "aegis-operator";
/// Longest time to connect to the API server.
const CONNECT: Duration = Duration::from_secs(2);
/// Longest time to end what has begun once the process is told to stop.
const GRACE: Duration = Duration::from_secs(10);

#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // kube logs the whole answer of a failed list there.
    let filter = EnvFilter::new(format!("{},kube_client::client=error", args.log));
    tracing_subscriber::fmt().json().flatten_event(true).with_env_filter(filter).init();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), identity = args.identity, "aegis-operator starts");
    run(args).await.inspect_err(|error| tracing::error!(%error, "aegis-operator ends"))?;
    Ok(())
}

async fn run(args: Args) -> Result<(), Error> {
    // First of all: the first process of a container does not get a signal for which it has no handler yet.
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signal)?;
    let metrics = Metrics::new();
    let health = Arc::new(Health::new());
    let mut server = tokio::spawn(server::serve(args.listen, metrics.clone(), health.clone()));
    let client = connect().await?;
    let mut watches = JoinSet::new();
    let gate = Arc::new(Gate::new());
    let mut caches = Caches::start(&client, &args.namespace, gate.clone(), &mut watches);
    caches.agents = (!args.agent_pods.is_empty()).then(|| {
        Agents::start(&client, &args.namespace, &args.agent_pods, caches.dirty.clone(), &mut watches)
    });
    let (stop, stopping) = channel::channel(false);
    let mut parts = start(&args, &client, &caches, gate, &metrics, &health, stopping);
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        served = &mut server => served.unwrap_or(Err(Error::Ended("HTTP server"))),
        watch = watches.join_next() => Err(Error::Ended(watch.and_then(Result::ok).unwrap_or("watch"))),
        part = parts.join_next() => Err(Error::Ended(part.and_then(Result::ok).unwrap_or("task"))),
    };
    tracing::info!("aegis-operator stops");
    stop.send_replace(true);
    if tokio::time::timeout(GRACE, async { while parts.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!("did not come to an end in time");
    }
    ended
}

async fn connect() -> Result<Client, Error> {
    let mut config = Config::infer().await.map_err(|error| Error::Configure(Box::new(error)))?;
    config.connect_timeout = Some(CONNECT);
    // Against a server that froze, and a connection that died without a word, while a list is under way.
    config.read_timeout = Some(Duration::from_secs(u64::from(watch::WATCH_SECONDS) + 10));
    config.reset_reader_on_write = true;
    Client::try_from(config).map_err(|error| Error::Client(Box::new(error)))
}

/// Starts election, planning loop and statuses. The election ends last: until then nobody else leads.
fn start(
    args: &Args,
    client: &Client,
    caches: &Caches,
    gate: Arc<Gate>,
    metrics: &Metrics,
    health: &Arc<Health>,
    stopping: channel::Receiver<bool>,
) -> JoinSet<&'static str> {
    let publisher = Publisher::new(client, args, gate.clone(), metrics.clone());
    let (views, seen) = channel::channel(Arc::new(View::default()));
    let controller = Controller {
        client: client.clone(),
        caches: caches.clone(),
        gate: gate.clone(),
        fencer: Fencer::new(
            client,
            &args.namespace,
            caches.leases.clone(),
            gate.clone(),
            publisher.clone(),
            metrics.clone(),
            health.clone(),
        ),
        applier: Applier::new(client, gate.clone(), metrics.clone(), health.clone()),
        publisher: publisher.clone(),
        metrics: metrics.clone(),
        health: health.clone(),
        views,
        quarantine: args.quarantine_seconds,
        mind: Mind::default(),
        thought: Duration::ZERO,
    };
    let statuses = Statuses {
        client: client.clone(),
        caches: caches.clone(),
        gate: gate.clone(),
        metrics: metrics.clone(),
        publisher,
        written: HashMap::new(),
        told: HashSet::new(),
    };
    let election = Election::new(client, args, gate, caches.dirty.clone(), metrics.clone());

    // Until everything has been listed once nothing can be planned, and this replica had better not lead.
    let (listed, health) = (caches.clone(), health.clone());
    let (ready, started) = oneshot::channel();
    let (planned, over) = oneshot::channel();
    let mut parts = JoinSet::new();
    parts.spawn(async move {
        let complete = tokio::select! {
            complete = listed.complete() => complete.is_ok(),
            () = stopped(stopping.clone()) => false,
        };
        if complete {
            tracing::info!("everything has been listed");
            health.complete();
            // The receivers live as long as their tasks, whose end ends the process.
            let _ = ready.send(());
            controller.run(stopped(stopping)).await;
        }
        let _ = planned.send(());
        "planning loop"
    });
    parts.spawn(async move {
        if started.await.is_ok() {
            election.run(async { drop(over.await) }).await;
        }
        "leader election"
    });
    parts.spawn(async move {
        statuses.run(seen).await;
        "status writer"
    });
    parts
}

/// Resolves when the process is told to stop.
async fn stopped(mut stopping: channel::Receiver<bool>) {
    // An error means that the sender is gone, and so is the process, nearly.
    let _ = stopping.wait_for(|stop| *stop).await;
}
