//! `make chaos`: traffic from every node while things go wrong by a seeded schedule. Starts the lab and installs Aegis where
//! none runs, and ends what it started. The last line is `chaos: ok`, or what failed.

use std::process::ExitCode;

use aegis_tests::chaos::{self, Options};
use aegis_tests::lab::{Lab, images, node_init};
use anyhow::anyhow;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Breaks things while traffic flows.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// For how long things go wrong.
    #[arg(long, default_value_t = 300)]
    seconds: u32,
    /// Which schedule; without it, one by the clock.
    #[arg(long)]
    seed: Option<u64>,
    /// Leave a lab running that this has started.
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    if let Err(error) = node_init::run_if_asked() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let arguments = Arguments::parse();
    let name = Lab::instance_name();
    let running = Lab::attach();
    let started = running.is_none();
    let outcome = tokio::select! {
        biased;
        signal = interrupted() => signal.and_then(|signal| Err(anyhow!("interrupted by {signal}"))),
        outcome = run(&arguments, &name, running) => outcome,
    };
    let ended = if started && !arguments.keep { Lab::down(&name) } else { Ok(()) };
    match outcome.and(ended) {
        Ok(()) => {
            println!("chaos: ok");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let text = format!("{error:#}");
            let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            println!("chaos: failed: {}", lines.join(" | "));
            ExitCode::FAILURE
        }
    }
}

/// Ends when somebody wants it to end, with the signal's name.
async fn interrupted() -> anyhow::Result<&'static str> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
    })
}

async fn run(arguments: &Arguments, name: &str, running: Option<Lab>) -> anyhow::Result<()> {
    let lab = match running {
        Some(lab) => lab,
        None => {
            images::compile(&["aegis-probe", "aegis-operator", "aegis-node-agent"])?;
            let lab = Lab::up(name).await?;
            lab.install(&[])?;
            lab
        }
    };
    let by_clock = || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |now| now.as_secs())
    };
    let seed = arguments.seed.unwrap_or_else(by_clock);
    let report = chaos::run(&lab, Options { seconds: arguments.seconds, seed }).await?;
    print!("{}", report.text());
    chaos::judge(&report)
}
