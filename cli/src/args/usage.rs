//! What `usage` takes.

use crate::usage::period::{length, moment};
use crate::usage::words::{Dimension, Figure, Level, Protocol, Sort};
use clap::{Args as Arguments, ValueHint};
use std::path::PathBuf;

/// What was in use, by whom and towards where, and how the collector that knows it is asked.
#[derive(Arguments, Clone, Debug, Default)]
pub struct Usage {
    /// Only this allocation: NAME or NAMESPACE/NAME.
    pub allocation: Option<String>,
    /// Length of the window, as 90s, 15m, 24h, 1h30m or 7d; it ends now, or at --to.
    #[arg(long, value_name = "LENGTH", value_parser = length, default_value = "1h", conflicts_with = "from")]
    pub since: i64,
    /// Begin of the window, as 2026-01-31T12:00:00Z.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub from: Option<i64>,
    /// End of the window; else now.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub to: Option<i64>,
    /// A row for each step of time, of a length that suits the window.
    #[arg(long)]
    pub over_time: bool,
    /// The same with steps of this length, as 5m.
    #[arg(long, value_name = "LENGTH", value_parser = length)]
    pub step: Option<i64>,
    /// Detail of the figures that are read; else what suits the window.
    #[arg(long, value_enum)]
    pub level: Option<Level>,
    /// What is told apart, separated by commas; else allocation, address, origin and protocol, and with -A the account.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "DIMENSION")]
    pub by: Vec<Dimension>,
    /// Tell nothing apart.
    #[arg(long, conflicts_with = "by")]
    pub total: bool,
    /// Figures to show, separated by commas; else those of -o.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "FIGURE")]
    pub figures: Vec<Figure>,
    /// What comes first: the highest of this.
    #[arg(long, value_enum, default_value_t)]
    pub sort: Sort,
    /// Groups to show at most.
    #[arg(long, value_name = "GROUPS", default_value_t = 50)]
    pub limit: usize,
    /// What counts.
    #[command(flatten)]
    pub filter: Filter,
    /// How the collector is asked.
    #[command(flatten)]
    pub way: Way,
    /// Form of the answer.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Form,
}

/// Form of what was in use.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// For people.
    #[default]
    Table,
    /// With all figures.
    Wide,
    /// For programs.
    Json,
    /// For programs.
    Yaml,
    /// For spreadsheets.
    Csv,
}

/// What counts: of each list any, and of all lists.
#[derive(Arguments, Clone, Debug, Default)]
pub struct Filter {
    /// Only these accounts (namespaces), instead of -n, separated by commas, as all these lists are.
    #[arg(long = "account", value_delimiter = ',', value_name = "ACCOUNT")]
    pub accounts: Vec<String>,
    /// Only these egress addresses, or ranges of them.
    #[arg(long = "address", value_delimiter = ',', value_name = "ADDRESS")]
    pub addresses: Vec<String>,
    /// Only what these rules cover: binding/NAME or policy/NAME.
    #[arg(long = "rule", value_delimiter = ',', value_name = "RULE")]
    pub rules: Vec<String>,
    /// Only these sites.
    #[arg(long = "site", value_delimiter = ',', value_name = "SITE")]
    pub sites: Vec<String>,
    /// Only these nodes.
    #[arg(long = "node", value_delimiter = ',', value_name = "NODE")]
    pub nodes: Vec<String>,
    /// Only these origins: ADDRESS:PORT, an address or a range, or `other`: those that were too many to be told apart.
    #[arg(long = "origin", value_delimiter = ',', value_name = "ORIGIN")]
    pub origins: Vec<String>,
    /// Only these protocols.
    #[arg(long = "protocol", value_enum, value_delimiter = ',', value_name = "PROTOCOL")]
    pub protocols: Vec<Protocol>,
    /// Only these pods.
    #[arg(long = "pod", value_delimiter = ',', value_name = "POD")]
    pub pods: Vec<String>,
    /// Only refusals for these reasons.
    #[arg(long = "reason", value_delimiter = ',', value_name = "REASON")]
    pub reasons: Vec<String>,
}

/// How the collector is reached, and by which token it knows who asks.
#[derive(Arguments, Clone, Debug, Default)]
pub struct Way {
    /// Where the collector is, as https://use.example.com; else its pod is looked for, and a port of it forwarded.
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    pub collector: Option<String>,
    /// Certificate of the authority that the collector's is by (PEM); else the one that the chart tells, or with --collector those of the system.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub ca_file: Option<PathBuf>,
    /// Token for the audience aegis-collector, where nothing else is said. Others see a flag in the list of processes; the variable they do not.
    #[arg(long, env = "AEGIS_COLLECTOR_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// File that has such a token.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "service_account")]
    pub token_file: Option<PathBuf>,
    /// Ask as this service account: NAME or NAMESPACE/NAME. It takes the right to create serviceaccounts/token of it.
    #[arg(long, value_name = "ACCOUNT")]
    pub service_account: Option<String>,
}
