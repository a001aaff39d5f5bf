//! `aegis-probe`: traffic source, origin and packet recorder of the tests, one static binary.
//!
//! Runs as the lab's pause image, inside test pods, and beside them in the lab's network namespaces.

mod pause;

use clap::{Parser, Subcommand};

/// Traffic source, origin and packet recorder.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Sleep and reap orphans until SIGTERM: the pause image, and an idle container.
    Pause,
    /// Serve and record connections.
    Origin {
        #[arg(long)]
        ports: String,
        #[arg(long)]
        control: String,
    },
}

fn main() -> anyhow::Result<()> {
    // The pause image has no arguments of its own: containerd starts it with the image's entry point only.
    match Arguments::parse().command {
        Command::Pause => pause::run(),
        Command::Origin { .. } => pause::run(),
    }
}
