//! Command line of the lab: start, stop, use and break it.

use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use aegis_tests::lab::plan::{DEFAULT_INSTANCE, NODES, Node, ORIGINS};
use aegis_tests::lab::{Lab, images, like_a_wire, node_init};
use anyhow::Context;
use clap::{Parser, Subcommand};

/// A Kubernetes of three nodes, a router and two origins on this machine.
#[derive(Parser)]
#[command(name = "aegis-lab", version)]
struct Arguments {
    /// Name of the lab; several run side by side.
    #[arg(long, env = "AEGIS_LAB", default_value = "aegis")]
    instance: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start the lab, after cleaning up a dead one.
    Up {
        /// Use the probe as it is, do not compile it.
        #[arg(long)]
        no_build: bool,
    },
    /// End the lab and remove everything it made.
    Down,
    /// Show what runs, and the memory of operators and agents; exit code 1 if a part of the lab does not run.
    Status,
    /// Print how to use the running lab.
    Usage,
    /// Compile, load the images and install the chart.
    Install {
        /// Further Helm values, `a.b=c`.
        #[arg(long)]
        set: Vec<String>,
    },
    /// Compile and load the images only.
    LoadImages,
    /// Run a command in a node (n1..n3) or a part (router, cp, o1, o2).
    #[command(trailing_var_arg = true)]
    Exec {
        /// n1, n2, n3, router, cp, o1 or o2.
        part: String,
        /// Program and arguments.
        #[arg(required = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Send a line of JSON to an origin's control socket, as `{"do":"records"}`.
    Origin {
        /// o1 or o2.
        name: String,
        /// The request.
        request: String,
    },
    /// Break something, or mend it.
    Fault {
        #[command(subcommand)]
        fault: Fault,
    },
    /// Route one egress address to these nodes; without nodes, undo it.
    Pin {
        /// An address of 203.0.113.0/24.
        address: Ipv4Addr,
        /// n1, n2, n3.
        nodes: Vec<String>,
    },
    /// Spread the egress range over these nodes (all, if none is named).
    Ecmp {
        /// n1, n2, n3.
        nodes: Vec<String>,
    },
    /// Make a veth of this machine that faces another cluster's node behave like a wire: XDP sends through it, checksums are
    /// filled in (`tests/kind.sh` needs it).
    Wire { device: String },
    /// First process of a node; the lab starts it.
    #[command(hide = true)]
    NodeInit { name: String, data: PathBuf, tools: PathBuf, address: String },
}

#[derive(Subcommand)]
enum Fault {
    /// kill -9 of a node's agent.
    KillAgent { node: String },
    /// kill -9 of the operator on a node.
    KillOperator { node: String },
    /// Kill the API server.
    StopApi,
    /// Start the API server again.
    StartApi,
    /// Cut a node's link, silently.
    Cut { node: String },
    /// Restore a node's link.
    Restore { node: String },
    /// Freeze a node: no process runs, no packet passes.
    Freeze { node: String },
    /// Thaw a node.
    Thaw { node: String },
    /// Take a node away, with its Node object.
    RemoveNode { node: String },
    /// Bring a node back, new.
    AddNode { node: String },
    /// Offloads of a node's uplink and pods: on or off.
    Offloads {
        node: String,
        #[arg(action = clap::ArgAction::Set)]
        on: bool,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let instance = arguments.instance;
    let lab = || {
        Lab::attach_to(&instance)
            .with_context(|| format!("lab {instance:?} does not run; `make lab` starts it"))
    };
    match arguments.command {
        Command::NodeInit { name, data, tools, address } => node_init::run(&name, &data, &tools, &address),
        Command::Wire { device } => like_a_wire(Path::new("/proc/self/ns/net"), &device),
        Command::Up { no_build } => {
            if !no_build {
                images::compile(&["aegis-probe"])?;
            }
            Lab::up(&instance).await.map(drop)
        }
        Command::Down => Lab::down(&instance),
        Command::Status => status(&lab()?),
        Command::Usage => usage(&lab()?),
        Command::Install { set } => {
            let settings: Vec<&str> = set.iter().map(String::as_str).collect();
            lab()?.install(&settings).map(drop)
        }
        Command::LoadImages => lab()?.load_images().map(drop),
        Command::Exec { part, command } => {
            let lab = lab()?;
            let mut run = match Node::named(&part) {
                Ok(node) => lab.command(node, &command[0])?,
                Err(_) => lab.command_in(&part, &command[0]),
            };
            Err(run.args(&command[1..]).exec()).context("run the command")
        }
        Command::Origin { name, request } => {
            println!("{}", lab()?.ask_origin(&name, &request)?);
            Ok(())
        }
        Command::Fault { fault } => break_something(&lab()?, fault).await,
        Command::Pin { address, nodes } => lab()?.pin(address, &named(&nodes)?),
        Command::Ecmp { nodes } if nodes.is_empty() => lab()?.spread(&NODES),
        Command::Ecmp { nodes } => lab()?.spread(&named(&nodes)?),
    }
}

fn named(names: &[String]) -> anyhow::Result<Vec<Node>> {
    names.iter().map(|name| Node::named(name)).collect()
}

fn usage(lab: &Lab) -> anyhow::Result<()> {
    let program = std::env::current_exe()?;
    let select = if lab.plan().instance() == DEFAULT_INSTANCE {
        ""
    } else {
        &format!("export AEGIS_LAB={}\n", lab.plan().instance())
    };
    println!(
        "\nUse the lab:\n\nexport KUBECONFIG={}\nexport PATH={}:$PATH\n{select}alias aegis-lab={}\n\n\
         kubectl get nodes                                  # n1, n2, n3\n\
         aegis-lab exec n1 ip route                         # inside a node, the router or an origin (o1, o2)\n\
         aegis-lab origin o1 '{{\"do\":\"summary\"}}'             # who came to {}\n\
         aegis-lab fault --help                             # break something\n\
         make lab-down                                      # end it",
        lab.kubeconfig().display(),
        lab.tools()?.display(),
        program.display(),
        ORIGINS[0].address,
    );
    Ok(())
}

fn status(lab: &Lab) -> anyhow::Result<()> {
    let all = lab.status()?;
    for (name, alive) in &all {
        println!("{name:24} {}", if *alive { "runs" } else { "does not run" });
    }
    for (node, program, kib) in lab.memory()? {
        println!("{:24} {:.0} MiB resident", format!("{program} on {}", node.name()), kib as f64 / 1024.0);
    }
    anyhow::ensure!(all.iter().all(|(_, alive)| *alive), "not everything runs");
    Ok(())
}

async fn break_something(lab: &Lab, fault: Fault) -> anyhow::Result<()> {
    match fault {
        Fault::KillAgent { node } => lab.kill_agent(Node::named(&node)?).map(drop),
        Fault::KillOperator { node } => lab.kill_operator(Node::named(&node)?).map(drop),
        Fault::StopApi => lab.stop_api_server(),
        Fault::StartApi => lab.start_api_server().await,
        Fault::Cut { node } => lab.cut_link(Node::named(&node)?),
        Fault::Restore { node } => lab.restore_link(Node::named(&node)?),
        Fault::Freeze { node } => lab.freeze(Node::named(&node)?),
        Fault::Thaw { node } => lab.thaw(Node::named(&node)?),
        Fault::RemoveNode { node } => lab.remove_node(Node::named(&node)?).await,
        Fault::AddNode { node } => lab.add_node(Node::named(&node)?).await,
        Fault::Offloads { node, on } => lab.set_offloads(Node::named(&node)?, on),
    }
}
