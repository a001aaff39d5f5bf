//! The node agent's process: wires the watches, the event sources, the controller and the servers together.

use aegis_node_agent::args::{Args, LogFormat};
use aegis_node_agent::controller::{Controller, Signals, Tell};
use aegis_node_agent::lease::{self, Access};
use aegis_node_agent::metrics::Metrics;
use aegis_node_agent::names::Names;
use aegis_node_agent::watch::Shared;
use aegis_node_agent::{cni, groups, leave, live, names, network, nft, nri, server, status, usage, watch};
use anyhow::Context;
use clap::Parser;
use futures::StreamExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The image is linked with musl, whose allocator makes policies of hundreds of rules take several times as long.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Time for the process to wind down.
const END: Duration = Duration::from_secs(2);

fn main() -> anyhow::Result<()> {
    if let Some(answered) = live::answer() {
        return answered;
    }
    let end = End::listen()?;
    let args = Args::parse();
    let filter = EnvFilter::try_new(&args.log).context("--log")?;
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    match args.log_format {
        LogFormat::Json => log.json().flatten_event(true).init(),
        LogFormat::Text => log.init(),
    }
    // Two threads: one may be busy writing maps while the other follows the API server.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run(args, end))
}

async fn run(args: Args, end: End) -> anyhow::Result<()> {
    let metrics = Metrics::default();
    let signals = Arc::new(Signals::default());
    let shared = Shared::default();

    let served = metrics.clone();
    let address = args.metrics_address;
    tokio::spawn(async move {
        // Metrics are no reason to stop: the port may be free later.
        loop {
            if let Err(error) = server::serve(address, served.clone()).await {
                tracing::error!(%address, %error, "cannot serve metrics; trying again");
            }
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    });

    let mut args = args;
    if args.dns_servers.is_empty() {
        let file = Path::new("/etc/resolv.conf");
        let found = names::resolvers(file);
        args.dns_servers =
            found.inspect_err(|error| tracing::warn!(%error, "no resolver is known")).unwrap_or_default();
    }
    let learned = Arc::clone(&signals);
    let names = Names::new(args.state.clone(), &args.node_name, args.dns_limits(), move || {
        learned.set(|it| &it.names)
    });
    let resolvers = args.dns_servers.clone();

    let mut config = kube::Config::infer().await.context("no way to the API server")?;
    config.connect_timeout = Some(Duration::from_secs(5));
    // A watch that is idle is ended by the server before this.
    config.read_timeout = Some(Duration::from_secs(75));
    let ended = end.when_told(&args, config.clone(), &signals, &metrics)?;
    let client = kube::Client::try_from(config).context("cannot make an API client")?;
    let _watches = watch::start(&client, &args.node_name, &shared);
    let (report, pending) = tokio::sync::watch::channel(status::Pending::default());
    tokio::spawn(status::write(client.clone(), metrics.clone(), pending));

    let (connection, netlink, mut changes) =
        rtnetlink::new_multicast_connection(&network::GROUPS).context("cannot open a netlink socket")?;
    let netlink_ended = tokio::spawn(connection);
    let changed = Arc::clone(&signals);
    tokio::spawn(async move {
        while changes.next().await.is_some() {
            changed.set(|signals| &signals.network);
        }
    });

    let (folder, changed) = (args.cni_cache.clone(), Arc::clone(&signals));
    tokio::spawn(async move { cni::watch_cache(&folder, || changed.set(|signals| &signals.cni)).await });

    let (mount, changed) = (args.cgroups.clone(), Arc::clone(&signals));
    tokio::spawn(async move { groups::watch(&mount, || changed.set(|signals| &signals.groups)).await });

    let changed = Arc::clone(&signals);
    tokio::spawn(async move {
        loop {
            let error = nft::watch(|| changed.tables_changed()).await;
            tracing::warn!(%error, "cannot watch nftables; looking at it from time to time");
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    });

    // What counts use hands its rows to this. Without it the agent works as well.
    let reporter = usage::start(&args).unwrap_or_else(|error| {
        tracing::error!(%error, "use is not reported");
        None
    });
    let tell: Tell = match reporter {
        Some(reporter) => {
            let counting = reporter.clone();
            metrics.follow_usage(move || counting.counters());
            Arc::new(move |rows, from, to| reporter.report(rows, from, to))
        }
        None => Arc::new(|_, _, _| {}),
    };

    let tunnel_port = args.tunnel_port;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tracing::info!(node = args.node_name, version = env!("CARGO_PKG_VERSION"), "started");
    let open = Box::new(aegis_node_agent::kernel::open);
    let (daemon, sockets) = (args.routing_daemon, args.routing_sockets.clone());
    let (countries, read) = (args.countries.clone(), Arc::clone(&signals));
    let (probed, heard) = (Arc::clone(&signals), Arc::clone(&signals));
    let (access, renewed) = (
        Access { client, namespace: args.namespace.clone(), node: args.node_name.clone() },
        Arc::clone(&signals),
    );
    let (hold, held) = tokio::sync::watch::channel(None);
    let counted = metrics.clone();
    let (socket, wait) = (args.nri_socket.clone(), Duration::from_millis(args.nri_wait));
    let (said, waited) = (Arc::clone(&signals), metrics.clone());
    let controller =
        Controller::new(args, open, tell, shared, signals, metrics, netlink, report, held, names.clone());
    let listening = controller.listening();
    let answered = names.clone();
    tokio::spawn(async move { names::serve(answered, listening).await });
    tokio::spawn(async move { names::keep(names, resolvers).await });
    if let Some(socket) = socket {
        let sandboxes = controller.sandboxes();
        let plugin = nri::Plugin::new(sandboxes.clone(), waited, wait, move || said.runtime_said());
        tokio::spawn(async move { nri::keep(&socket, &plugin, &sandboxes).await });
    }
    let need = controller.need();
    tokio::spawn(async move {
        lease::keep(access, need, hold, counted, || renewed.set(|signals| &signals.lease)).await;
    });
    let atlas = controller.atlas();
    tokio::spawn(atlas.watch(countries, move || read.wake()));
    let (prober, l2) = (controller.prober(), controller.l2());
    let announcer = l2.clone();
    std::thread::Builder::new()
        .name("arp".to_owned())
        .spawn(move || announcer.run())
        .context("cannot start the thread that listens to ARP")?;
    let probe = move || loop {
        let error = prober.run(tunnel_port, || {
            l2.look();
            probed.set(|signals| &signals.gateways);
        });
        tracing::error!(%error, "cannot probe gateways; trying again");
        std::thread::sleep(Duration::from_secs(1));
    };
    std::thread::Builder::new().name("prober".to_owned()).spawn(probe).context("cannot start the prober")?;
    let health = controller.health();
    tokio::spawn(async move {
        health.watch(daemon, &sockets, || heard.wake()).await;
    });
    // Nothing is undone at the end: what is pinned goes on without the agent.
    tokio::select! {
        () = controller.run() => {}
        // Without it nothing of the network would be noticed any more; started again, the agent opens another one.
        _ = netlink_ended => anyhow::bail!("the netlink socket has failed"),
        _ = ended => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ended; the data plane goes on");
    Ok(())
}

/// How the agent hears that it is to end. Has a thread and a runtime of its own: an agent that hangs must not take the kubelet's
/// grace period, which is that of one that leaves its node.
struct End {
    runtime: tokio::runtime::Runtime,
    terminate: Signal,
}

impl End {
    /// To be called before anything else: as long as there is no handler, the first process of a container does not get the
    /// signal at all (pid_namespaces(7)).
    fn listen() -> anyhow::Result<End> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let terminate = {
            let _inside = runtime.enter();
            signal(SignalKind::terminate())?
        };
        Ok(End { runtime, terminate })
    }

    /// Resolves when the agent has been told to end and is to do so.
    fn when_told(
        self,
        args: &Args,
        config: kube::Config,
        signals: &Arc<Signals>,
        metrics: &Metrics,
    ) -> anyhow::Result<tokio::sync::oneshot::Receiver<()>> {
        let End { runtime, mut terminate } = self;
        let client = {
            let _inside = runtime.enter();
            kube::Client::try_from(config).context("cannot make an API client")?
        };
        let place = leave::Place {
            client,
            namespace: args.namespace.clone(),
            daemon_set: args.daemon_set.clone(),
            node: args.node_name.clone(),
            pod_uid: args.pod_uid.clone(),
        };
        let (signals, metrics) = (Arc::clone(signals), metrics.clone());
        let (sender, ended) = tokio::sync::oneshot::channel();
        let wait = move || {
            let told = futures::stream::poll_fn(move |context| terminate.poll_recv(context));
            runtime.block_on(leave::end(told, &place, &signals, &metrics, leave::ASK));
            let _ = sender.send(());
            std::thread::sleep(END);
            tracing::error!("the agent hangs; it ends without winding down");
            std::process::exit(0);
        };
        std::thread::Builder::new().name("end".to_owned()).spawn(wait).context("cannot start a thread")?;
        Ok(ended)
    }
}
