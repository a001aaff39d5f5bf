//! The collector of use: takes reports from the agents of the nodes, keeps them, and answers accounts and those who run the platform. Who
//! somebody is and what they may see, the API server says.

mod access;
mod alerts;
mod args;
mod cache;
mod certificate;
mod database;
mod error;
mod metrics;
mod objects;
mod probes;
mod review;
mod serve;
mod statuses;
mod watch;
mod words;

use access::{Rules, Tokens};
use aegis_usage::{Clock, Retention, Store, feeds, graphiql, keep, router};
use args::{Args, LogFormat};
use certificate::Certificate;
use clap::Parser;
use error::Error;
use metrics::Metrics;
use review::{Reviewer, connect};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing_subscriber::EnvFilter;
use watch::Cluster;

/// The image is linked with musl, whose allocator is slow where many threads share it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Longest time to answer what has come in once the process is told to stop. Kubernetes kills it after 30 s.
const GRACE: Duration = Duration::from_secs(20);

/// And to end what nobody waits for. What is cut off here is done the next time.
const REST: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // kube logs answers that it can't read, and those of TokenReviews have the token in them.
    let filter = EnvFilter::new(format!("{},kube_client::client=off", args.log));
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    match args.log_format {
        LogFormat::Json => log.json().flatten_event(true).init(),
        LogFormat::Text => log.init(),
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "aegis-collector starts");
    Ok(start(args).inspect_err(|error| tracing::error!(%error, "aegis-collector ends"))?)
}

fn start(args: Args) -> Result<(), Error> {
    args.served()?;
    let retention = args.retention()?;
    let certificate = certificate(&args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
    // Out here, where it is also dropped: connections of PostgreSQL block when they end.
    let database::Database { store, lock: _held } = database::open(&args.database, &args.postgres_tls())?;
    let store = Arc::new(store);
    let ended = runtime.block_on(run(args, retention, certificate, store.clone()));
    runtime.shutdown_timeout(REST);
    ended
}

async fn run(
    args: Args,
    retention: Retention,
    certificate: Option<Arc<Certificate>>,
    store: Arc<Store>,
) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signal)?;
    let metrics = Metrics::new();
    let mut tasks = JoinSet::new();
    let tls = certificate.map(|certificate| follow(certificate, &metrics, &mut tasks)).transpose()?;
    let client = connect().await?;
    let cluster = Cluster::start(&client, &mut tasks);
    let listener = listen(args.metrics_listen, "metrics are served", false).await?;
    let mut probes = tokio::spawn(probes::serve(listener, metrics.clone(), cluster.clone()));

    let rules =
        Rules { audience: args.audience, agent: args.agent_service_account, api_tokens: args.api_tokens };
    let access =
        Arc::new(Tokens::new(Reviewer::new(client.clone(), metrics.clone()), cluster.clone(), rules));
    let clock: Clock = Arc::new(|| jiff::Timestamp::now().as_second());
    let counted = metrics.service.clone();
    let service = router(store.clone(), access.clone(), clock.clone(), counted.clone());
    let mut service =
        service.merge(feeds(store.clone(), access, clock.clone(), counted.clone(), &args.public_url));
    if args.development {
        service = service.merge(graphiql());
    }
    let watched = alerts::watch(client, cluster, store.clone(), clock.clone(), counted);
    tasks.spawn(async move {
        watched.await;
        "alerts"
    });
    let kept = keep(store, retention, clock, metrics.service.clone());
    tasks.spawn(async move {
        kept.await;
        "maintenance"
    });
    let listener = listen(args.listen, "reports are taken", tls.is_some()).await?;

    let mut ended = Ok(());
    let stop = async {
        ended = tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            served = &mut probes => served.unwrap_or(Err(Error::Ended("HTTP server"))),
            task = tasks.join_next() => Err(Error::Ended(task.and_then(Result::ok).unwrap_or("task"))),
        };
        tracing::info!("aegis-collector stops");
    };
    serve::serve(listener, tls, service, stop, GRACE).await;
    ended
}

/// What connections are encrypted with. Without it only this machine may ask ([`Args::served`]).
fn certificate(args: &Args) -> Result<Option<Arc<Certificate>>, Error> {
    match (&args.tls_cert, &args.tls_key) {
        (Some(chain), Some(key)) => Ok(Some(Certificate::open(chain.clone(), key.clone())?)),
        _ => Ok(None),
    }
}

fn follow(
    certificate: Arc<Certificate>,
    metrics: &Metrics,
    tasks: &mut JoinSet<&'static str>,
) -> Result<TlsAcceptor, Error> {
    let config = certificate.config()?;
    let followed = certificate.follow(metrics.clone());
    tasks.spawn(async move {
        followed.await;
        "certificate"
    });
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn listen(address: SocketAddr, purpose: &'static str, tls: bool) -> Result<TcpListener, Error> {
    let failed = |source| Error::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    // The port, too, where any was asked for.
    tracing::info!(address = %listener.local_addr().map_err(failed)?, tls, "{purpose}");
    Ok(listener)
}
