//! `aegis-probe`: traffic source, server and packet recorder of the tests, one static binary.
//!
//! It is the lab's pause image, the program in test pods, the origin, and what captures on the router.

mod capture;
mod command;
mod connections;
mod datagrams;
mod failure;
mod forge;
mod listener;
mod packet;
mod pause;
mod ping;
mod proxy;
mod recorder;
mod records;
mod serve;
mod transfer;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Where `serve` listens for commands unless told otherwise.
const CONTROL: &str = "127.0.0.1:7099";

/// Traffic source, server and packet recorder.
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
    /// Serve TCP and UDP, record who comes, and carry out traffic commands (one line of JSON each).
    Serve {
        /// TCP and UDP ports to serve, `7000-7009` or `8080`.
        #[arg(long, default_value = "8080")]
        ports: String,
        /// Where commands come in: `ip:port`, or the path of a Unix socket.
        #[arg(long, default_value = CONTROL)]
        control: String,
    },
    /// Send one command to a `serve` and print its answer.
    Call {
        /// Where the `serve` listens for commands.
        #[arg(long, default_value = CONTROL)]
        control: String,
        /// The command, a JSON object.
        request: String,
    },
    /// Record packets on devices of this network namespace; commands come on standard input.
    Capture {
        /// Devices, separated by commas.
        #[arg(long, value_delimiter = ',', required = true)]
        devices: Vec<String>,
        /// Count packets to these destinations; `address/length`, separated by commas.
        #[arg(long, value_delimiter = ',', required = true)]
        to: Vec<String>,
        /// Also write every packet to this file, in pcap format.
        #[arg(long)]
        pcap: Option<PathBuf>,
    },
    /// Serve as a forward proxy (`CONNECT` only).
    Proxy {
        /// TCP port.
        #[arg(long, default_value_t = 3128)]
        port: u16,
    },
    /// Ask a `serve` port over TCP which source address it sees, and print it.
    Whoami {
        /// Through a forward proxy, `ip:port`.
        #[arg(long)]
        through: Option<SocketAddr>,
        /// Also print how long it took to connect.
        #[arg(long)]
        time: bool,
        /// Address of the server.
        address: IpAddr,
        /// Its port.
        port: u16,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Pause => pause::run(),
        Command::Serve { ports, control } => serve::run(&ports, &control),
        Command::Call { control, request } => serve::call(&control, &request),
        Command::Capture { devices, to, pcap } => capture::run(&devices, &to, pcap.as_deref()),
        Command::Proxy { port } => proxy::run(port),
        Command::Whoami { through, time, address, port } => {
            connections::whoami(through, (address, port).into(), time)
        }
    }
}
