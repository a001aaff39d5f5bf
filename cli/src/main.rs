//! `kubectl-aegis`: see `kubectl aegis --help`.

use aegis_cli::allowlist::Wanted;
use aegis_cli::args::{Allowlist, Args, Command, Connection, Drain, Offline};
use aegis_cli::cluster::{Agent, Cluster, Pods};
use aegis_cli::drain::{Target, is_empty, preview, progress, slices};
use aegis_cli::output::Format;
use aegis_cli::state::State;
use aegis_cli::trace::{Destination, Subject};
use aegis_cli::{
    allowlist, completion, drops, files, flows, output, plan, policies, status, top, trace, usage,
};
use anyhow::{Result, bail};
use clap::{CommandFactory, FromArgMatches};
use k8s_openapi::jiff::Timestamp;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Time between two looks at what drains.
const LOOK: Duration = Duration::from_secs(2);

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // As which kubectl calls it. The completion scripts are for its own name.
    let matches = Args::command().bin_name("kubectl aegis").get_matches();
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    // What a command cannot tell is not an answer of its own: those whose answer is in the exit code keep it apart.
    let failed = if matches!(args.command, Command::Plan { .. } | Command::Drain(_)) { 1 } else { 2 };
    match run(args).await {
        Ok((text, code)) => {
            // Whoever closed the pipe has read enough.
            let _ = std::io::stdout().lock().write_all(text.as_bytes());
            ExitCode::from(code)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(failed)
        }
    }
}

async fn run(args: Args) -> Result<(String, u8)> {
    let Args { connection, command } = args;
    let named = connection.namespace.as_deref().filter(|_| !connection.all_namespaces);
    match command {
        Command::Status { written, offline } => {
            let (state, _) = look(&connection, &offline, Pods::None).await?;
            // What may be read of one namespace at least is worth telling.
            let denied = |kind| state.missing.get(kind).is_some_and(|why| why.starts_with("may not"));
            if denied("egressallocations") && denied("zonebindings") && denied("egresspolicies") {
                bail!("nothing may be read: {}", state.notes().join("; "));
            }
            if state.missing.values().any(|why| why.contains("does not know this kind")) {
                bail!("the cluster does not know the kinds of Aegis: it is not installed there");
            }
            let answer = status::status(&state, named);
            Ok((output::write(&answer, written.output)?, u8::from(!answer.healthy)))
        }
        Command::Policies { pod, written, offline } => {
            let online = connect(&connection, &offline).await?;
            let namespace = namespace(&connection, online.as_ref());
            let subject = pod.map(|pod| Subject::parse(&pod, &namespace)).transpose()?;
            let pods = subject.as_ref().map_or(Pods::None, |it| Pods::Of(it.namespace()));
            let state = state(&connection, &offline, online.as_ref(), pods).await?;
            state.require(&["egresspolicies", "egressapplications"])?;
            let pod = match &subject {
                Some(Subject::Pod(namespace, name)) => Some(policies::pod_of(&state, namespace, name)?),
                Some(Subject::ServiceAccount(..)) => bail!("--pod is POD or NAMESPACE/POD"),
                None => None,
            };
            let answer = policies::policies(&state, named, pod.as_ref());
            Ok((output::write(&answer, written.output)?, 0))
        }
        Command::Trace { subject, destination, protocol, flows, written, offline } => {
            let destination = Destination::parse(&destination)?;
            let online = connect(&connection, &offline).await?;
            let namespace = namespace(&connection, online.as_ref());
            let subject = Subject::parse(&subject, &namespace)?;
            let mut state =
                state(&connection, &offline, online.as_ref(), Pods::Of(subject.namespace())).await?;
            state.require(&["egresspolicies", "egressapplications", "egressaddresses"])?;
            // An address outside of the cluster is no Service's (but for its external ones).
            let inside = |it: std::net::IpAddr| state.internal().iter().any(|range| range.contains(&it));
            if let Some(online) = online.as_ref().filter(|_| destination.address().is_none_or(inside)) {
                online.services(&mut state).await?;
            }
            let found = destination.find(&state, subject.namespace(), protocol)?;
            let mut answer = trace::traces(&state, &subject, &found)?;
            if let Some(online) = online.filter(|_| flows) {
                let (pods, _) = subject.pods(&state)?;
                for trace in &mut answer.traces {
                    let named = |it: &&trace::Placed| format!("{}/{}", it.0.account, it.0.name) == trace.pod;
                    let Some((pod, Some(node))) = pods.iter().find(named) else { continue };
                    let packet = found.packets.iter().find(|it| it.destination == trace.destination);
                    let port = packet.and_then(|packet| packet.port);
                    match online.flows(&state, pod, node, trace.destination, port).await {
                        Ok(live) => trace.flows = Some(live),
                        Err(error) => trace.notes.push(format!("live flows: {error:#}")),
                    }
                }
            }
            Ok((output::write(&answer, written.output)?, 0))
        }
        Command::Top { node, watch, written, offline } => {
            let pause = watch.map(every);
            let text = watched(pause, async || {
                let (state, _) = look(&connection, &offline, Pods::None).await?;
                output::write(&top::top(&state, named, node.as_deref()), written.output)
            });
            Ok((text.await?, 0))
        }
        Command::Flows { pod, to, protocol, egress, allocation, node, most, watch, written } => {
            let online = Cluster::connect(&connection).await?;
            let namespace = namespace(&connection, Some(&online));
            let subject = pod.map(|pod| Subject::parse(&pod, &namespace)).transpose()?;
            let pods = subject.as_ref().map_or(Pods::All, |it| Pods::Of(it.namespace()));
            let allocation =
                allocation.as_deref().map(|name| name.split_once('/').unwrap_or((namespace.as_str(), name)));
            let (pod, to) = (subject.as_ref(), to.as_deref());
            let wanted = flows::Wanted { pod, to, protocol, egress, allocation };
            let text = watched(watch.map(every), async || {
                let state = state(&connection, &Offline::default(), Some(&online), pods).await?;
                let (which, of) = flows::which(&state, &wanted)?;
                let agents = Agent::of_node_or_all(&state, node.as_deref().or(of.as_deref()))?;
                output::write(&flows::flows(&online, &state, &agents, &which, most).await?, written.output)
            });
            Ok((text.await?, 0))
        }
        Command::Drops { node, seconds, watch, written } => {
            let online = Cluster::connect(&connection).await?;
            // What it watches for is pause enough.
            let pause = watch.then(|| if seconds == 0 { every(0) } else { Duration::ZERO });
            let text = watched(pause, async || {
                let state = state(&connection, &Offline::default(), Some(&online), Pods::None).await?;
                let agents = Agent::of_node_or_all(&state, node.as_deref())?;
                let answer = drops::drops(&online, &state, &agents, Duration::from_secs(seconds)).await?;
                output::write(&answer, written.output)
            });
            Ok((text.await?, 0))
        }
        Command::Plan { filename, delete, written, offline } => {
            let found = files::read(&filename)?;
            let online = connect(&connection, &offline).await?;
            let namespace = namespace(&connection, online.as_ref());
            let mut state = state(&connection, &offline, online.as_ref(), Pods::All).await?;
            if let Some(online) = &online {
                online.alerts(&mut state, &namespace).await?;
            }
            let kinds =
                ["aegisprefixes", "egressallocations", "zonebindings", "egresspolicies", "egressaddresses"];
            state.require(&kinds)?;
            state.require(&["egressapplications", "egressnodes", "nodes", "namespaces"])?;
            let plan::Overlay { state: after, objects, mut notes } =
                plan::overlay(&state, &found, &namespace, delete)?;
            match &online {
                Some(online) => notes.extend(online.check(&state, &found, &namespace, delete).await?),
                None => notes.push(
                    "patterns and rules (CEL) of the fields are checked by an API server only".to_owned(),
                ),
            }
            let answer = plan::changes(&state, &after, objects, notes)?;
            Ok((output::write(&answer, written.output)?, if answer.changes { 3 } else { 0 }))
        }
        Command::Drain(how) => drained(&connection, &how).await,
        Command::Usage(how) => Ok((usage::run(&connection, &how).await?, 0)),
        Command::Allowlist(how) => listed(&connection, &how).await,
        Command::Completion { shell, kubectl } => Ok((
            match shell.filter(|_| !kubectl) {
                Some(shell) => completion::script(shell),
                None => completion::PLUGIN.to_owned(),
            },
            0,
        )),
        Command::Complete { words } => Ok((completion::candidates(&words), 0)),
    }
}

/// A pause of so many seconds, and of one at least.
fn every(seconds: u64) -> Duration {
    Duration::from_secs(seconds.max(1))
}

/// What is seen; with a pause it is shown, and looked for again, until somebody interrupts it.
async fn watched(pause: Option<Duration>, mut look: impl AsyncFnMut() -> Result<String>) -> Result<String> {
    loop {
        let text = look().await?;
        let Some(pause) = pause else { return Ok(text) };
        // On a terminal each takes the place of the one before.
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        write!(std::io::stdout().lock(), "{clear}{text}")?;
        std::io::stdout().lock().flush()?;
        tokio::time::sleep(pause).await;
    }
}

async fn connect(connection: &Connection, offline: &Offline) -> Result<Option<Cluster>> {
    if offline.state.is_empty() { Ok(Some(Cluster::connect(connection).await?)) } else { Ok(None) }
}

/// The namespace that counts where an argument names none.
fn namespace(connection: &Connection, online: Option<&Cluster>) -> String {
    let of_context = online.map(|online| online.namespace.clone());
    connection.namespace.clone().or(of_context).unwrap_or_else(|| "default".to_owned())
}

async fn state(
    connection: &Connection,
    offline: &Offline,
    online: Option<&Cluster>,
    pods: Pods<'_>,
) -> Result<State> {
    let namespace = namespace(connection, online);
    let mut state = match online {
        Some(online) => online.state(&namespace, pods).await?,
        None => files::state(&offline.state)?,
    };
    if online.is_none() {
        state.now = Timestamp::now().as_second();
    }
    state.cluster_cidrs.clone_from(&connection.cluster_cidrs);
    Ok(state)
}

async fn look(connection: &Connection, offline: &Offline, pods: Pods<'_>) -> Result<(State, String)> {
    let online = connect(connection, offline).await?;
    let namespace = namespace(connection, online.as_ref());
    Ok((state(connection, offline, online.as_ref(), pods).await?, namespace))
}

async fn listed(connection: &Connection, how: &Allowlist) -> Result<(String, u8)> {
    let online = connect(connection, &how.offline).await?;
    let namespace = namespace(connection, online.as_ref());
    let wanted = match how.all {
        true => Wanted::All((!connection.all_namespaces).then_some(namespace)),
        false => Wanted::named(&how.allocations, &namespace),
    };
    let mut state = match &online {
        Some(online) => online.allocations(&wanted.namespaces()).await?,
        None => files::state(&how.offline.state)?,
    };
    // Who keeps lists under version control wants the same one for the same addresses (https://reproducible-builds.org/specs/source-date-epoch/).
    let told = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|it| it.parse().ok());
    state.now = told.unwrap_or_else(|| Timestamp::now().as_second());
    let (mut list, warnings) = allowlist::list(&state, &wanted, how.family)?;
    list.context = online.and_then(|online| online.context);
    let text = allowlist::write(&list, how.output, &how.rule)?;
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    Ok((text, 0))
}

async fn drained(connection: &Connection, how: &Drain) -> Result<(String, u8)> {
    let online = Cluster::connect(connection).await?;
    let namespace = namespace(connection, Some(&online));
    let state = online.state(&namespace, Pods::None).await?;
    state.require(&["egressaddresses", "egressallocations"])?;
    let target = Target::parse(&how.target, &namespace, &state)?;
    if matches!(target, Target::Allocation(..)) {
        state.require(&["zonebindings", "egresspolicies"])?;
    }
    let preview = preview(&state, &target, how.undo);
    let text = output::write(&preview, how.written.output)?;
    if how.dry_run || !preview.refused.is_empty() {
        return Ok((text, u8::from(!preview.refused.is_empty())));
    }
    print!("{text}");
    // What comes after the answer is for people: programs read the answer alone.
    let said = |text: String| {
        if how.written.output == Format::Table {
            return text;
        }
        eprint!("{text}");
        String::new()
    };
    if !how.yes && !agreed()? {
        return Ok((said("nothing is done\n".to_owned()), 1));
    }
    online.drain(&target, how.undo).await?;
    if how.undo || how.timeout == 0 {
        return Ok((String::new(), 0));
    }
    let (end, code) = follow(&online, &namespace, &target, Duration::from_secs(how.timeout)).await?;
    Ok((said(end), code))
}

/// Asks, if somebody is there to answer.
fn agreed() -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("nobody can be asked: say --yes, or --dry-run");
    }
    eprint!("go on? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Waits until nothing is used any more, and says each time that something has changed.
async fn follow(online: &Cluster, namespace: &str, target: &Target, limit: Duration) -> Result<(String, u8)> {
    let begin = Instant::now();
    let mut told = String::new();
    loop {
        match online.state(namespace, Pods::None).await {
            Ok(state) => {
                let slices = slices(&state, target);
                let now = progress(&slices);
                if now != told {
                    eprintln!("{:>5} s  {now}", begin.elapsed().as_secs());
                    told = now;
                }
                if is_empty(&slices) {
                    return Ok(("empty\n".to_owned(), 0));
                }
            }
            // An API server that is away for a while is no reason to stop looking.
            Err(error) => eprintln!("{:>5} s  {error:#}", begin.elapsed().as_secs()),
        }
        if begin.elapsed() >= limit {
            return Ok((
                format!("not empty within {} s; it goes on: look again with --dry-run\n", limit.as_secs()),
                1,
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}
