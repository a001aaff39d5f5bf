//! The command line.

mod usage;

pub use usage::{Filter, Form as UsageForm, Usage, Way};

use crate::allowlist::{Form, Only, Rule};
use crate::output::Format;
use crate::trace::Protocol;
use clap::{Args as Arguments, Parser, Subcommand, ValueHint};
use ipnet::IpNet;
use std::net::IpAddr;
use std::path::PathBuf;

/// Who leaves a Kubernetes cluster from which address, and why.
///
/// It reads with the rights of your kubeconfig, and decides by the code of the operator and the node agents.
#[derive(Parser, Debug)]
#[command(name = "kubectl-aegis", version, propagate_version = true)]
pub struct Args {
    /// Which cluster.
    #[command(flatten)]
    pub connection: Connection,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How to write.
#[derive(Arguments, Clone, Copy, Debug, Default)]
pub struct Written {
    /// Form of the answer.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Format,
}

/// Which cluster.
#[derive(Arguments, Clone, Debug, Default)]
pub struct Connection {
    /// Path of the kubeconfig; else `KUBECONFIG`, or `~/.kube/config`.
    #[arg(long, global = true, value_hint = ValueHint::FilePath)]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, global = true)]
    pub context: Option<String>,
    /// Namespace; else that of the context.
    #[arg(long, short, global = true)]
    pub namespace: Option<String>,
    /// All namespaces.
    #[arg(long, short = 'A', global = true, conflicts_with = "namespace")]
    pub all_namespaces: bool,
    /// Namespace of the operator and the agents.
    #[arg(long, global = true, default_value = "aegis-system")]
    pub system_namespace: String,
    /// Ranges inside the cluster that neither objects nor the agents' arguments tell, separated by commas.
    #[arg(long, global = true, value_delimiter = ',')]
    pub cluster_cidrs: Vec<IpNet>,
}

/// Objects of a cluster, from files.
#[derive(Arguments, Clone, Debug, Default)]
pub struct Offline {
    /// Look at objects in these files or folders (`kubectl get -o yaml`; `-` is the standard input) instead of a cluster.
    #[arg(long, value_name = "FILES", num_args = 1.., value_hint = ValueHint::AnyPath)]
    pub state: Vec<PathBuf>,
}

/// Commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// What is there and what is wrong: 0 nothing, 1 something, 2 cannot tell.
    ///
    /// Of namespaced kinds all namespaces are looked at, unless -n says one.
    Status {
        /// How to write.
        #[command(flatten)]
        written: Written,
        /// Instead of a cluster.
        #[command(flatten)]
        offline: Offline,
    },
    /// Policies in the order in which they are asked, then the bindings.
    Policies {
        /// Tell which are about this pod: POD or NAMESPACE/POD.
        #[arg(long)]
        pod: Option<String>,
        /// How to write.
        #[command(flatten)]
        written: Written,
        /// Instead of a cluster.
        #[command(flatten)]
        offline: Offline,
    },
    /// Where packets of a pod leave, and why: every rule in order, allocation, address, node, ports.
    Trace {
        /// POD, NAMESPACE/POD, or sa/NAME: all pods that run as this service account.
        subject: String,
        /// ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT, NAME or NAME:PORT.
        destination: String,
        /// Protocol of the packet.
        #[arg(long, value_enum, default_value_t)]
        protocol: Protocol,
        /// Also ask the agent of the pod's node for its live flows there; needs the right to exec in the agents' pods.
        #[arg(long, conflicts_with = "state")]
        flows: bool,
        /// How to write.
        #[command(flatten)]
        written: Written,
        /// Instead of a cluster.
        #[command(flatten)]
        offline: Offline,
    },
    /// What would change if these objects were applied: 0 nothing, 3 something, 1 it cannot be told.
    ///
    /// The planner of the operator and the rules of the agents are run on what stands, with and without the objects. Nothing is written.
    Plan {
        /// Files or folders with the objects; `-` is the standard input.
        #[arg(long, short, value_name = "FILES", num_args = 1.., required = true, value_hint = ValueHint::AnyPath)]
        filename: Vec<PathBuf>,
        /// Plan as if they were deleted.
        #[arg(long)]
        delete: bool,
        /// How to write.
        #[command(flatten)]
        written: Written,
        /// Instead of a cluster.
        #[command(flatten)]
        offline: Offline,
    },
    /// Empties a node, or gives back an allocation, and shows how it comes on.
    Drain(Drain),
    /// How full the ports of allocations are, by node, the fullest first.
    ///
    /// Of all namespaces, unless -n says one.
    Top {
        /// Only of this node.
        #[arg(long)]
        node: Option<String>,
        /// Look again every so many seconds, until it is interrupted.
        #[arg(long, short, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", conflicts_with = "state")]
        watch: Option<u64>,
        /// How to write.
        #[command(flatten)]
        written: Written,
        /// Instead of a cluster.
        #[command(flatten)]
        offline: Offline,
    },
    /// Live flows, those with the latest packets first: of all nodes, of a pod, or towards an origin.
    Flows {
        /// POD or NAMESPACE/POD.
        pod: Option<String>,
        /// Only those to ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT.
        #[arg(long)]
        to: Option<String>,
        /// Only those of this protocol.
        #[arg(long, value_enum)]
        protocol: Option<Protocol>,
        /// Only those that leave from this egress address; the first one of a /64 is all of it.
        #[arg(long)]
        egress: Option<IpAddr>,
        /// Only those that leave from this allocation: NAME or NAMESPACE/NAME.
        #[arg(long, conflicts_with = "egress")]
        allocation: Option<String>,
        /// Only those that this node knows.
        #[arg(long)]
        node: Option<String>,
        /// Flows to show at most.
        #[arg(long, default_value_t = 50)]
        most: usize,
        /// Look again every so many seconds (2, or --watch=SECONDS), until it is interrupted.
        #[arg(long, short, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", require_equals = true)]
        watch: Option<u64>,
        /// How to write.
        #[command(flatten)]
        written: Written,
    },
    /// What does not get through, by node and reason, while it is watched.
    Drops {
        /// Only on this node.
        #[arg(long)]
        node: Option<String>,
        /// Seconds to watch; 0 tells what there was since the data planes were loaded.
        #[arg(long, default_value_t = 5)]
        seconds: u64,
        /// Go on with the next seconds, until it is interrupted.
        #[arg(long, short)]
        watch: bool,
        /// How to write.
        #[command(flatten)]
        written: Written,
    },
    /// Ports, flows, refusals and traffic of a window of time, the fullest first, as the collector keeps them.
    ///
    /// Of the namespace, unless -A says of all that you may see. What nobody reported is told as not known.
    Usage(Box<Usage>),
    /// Addresses of allocations, as the partner's firewall takes them.
    ///
    /// All that they have, also those that are on their way out and still send.
    Allowlist(Allowlist),
    /// The completion script of a shell. For `kubectl aegis` see `--kubectl`.
    Completion {
        /// The shell.
        #[arg(required_unless_present = "kubectl")]
        shell: Option<clap_complete::Shell>,
        /// The script that kubectl asks: put it on PATH as `kubectl_complete-aegis`.
        #[arg(long)]
        kubectl: bool,
    },
    /// Candidates for kubectl's completion.
    #[command(name = "__complete", hide = true)]
    Complete {
        /// The words so far.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
}

/// What to drain, and how.
#[derive(Arguments, Clone, Debug)]
pub struct Drain {
    /// node/NAME, allocation/NAME, or a name alone if only one of both has it.
    pub target: String,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask.
    #[arg(long, short)]
    pub yes: bool,
    /// Seconds to wait until it is empty; 0 does not wait.
    #[arg(long, value_name = "SECONDS", default_value_t = 7500)]
    pub timeout: u64,
    /// Let the node work again.
    #[arg(long)]
    pub undo: bool,
    /// How to write.
    #[command(flatten)]
    pub written: Written,
}

/// What to list, and how.
#[derive(Arguments, Clone, Debug)]
pub struct Allowlist {
    /// NAME or NAMESPACE/NAME; several make one list.
    #[arg(value_name = "ALLOCATION", required_unless_present = "all", conflicts_with = "all")]
    pub allocations: Vec<String>,
    /// All of the namespace, or with -A of the cluster.
    #[arg(long)]
    pub all: bool,
    /// Form of the list.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Form,
    /// IPv4 or IPv6 alone.
    #[arg(long, value_enum)]
    pub family: Option<Only>,
    /// What rules say.
    #[command(flatten)]
    pub rule: Rule,
    /// Instead of a cluster.
    #[command(flatten)]
    pub offline: Offline,
}
