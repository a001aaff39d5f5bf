//! Command line.

use clap::Parser;
use std::net::SocketAddr;
use std::time::Duration;

/// Plans which node holds which slice of which egress address, and writes the plan to the API server.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Where /healthz, /readyz and /metrics are served.
    #[arg(long, env = "AEGIS_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Namespace of the Lease by which replicas agree on a leader.
    #[arg(long, env = "POD_NAMESPACE", default_value = "aegis-system")]
    pub namespace: String,
    /// Name of that Lease.
    #[arg(long, default_value = "aegis-operator")]
    pub lease: String,
    /// Name of this replica, different from that of every other one.
    #[arg(long, env = "POD_NAME", default_value_t = default_identity())]
    pub identity: String,
    /// Seconds that a slice rests between two holders, at least 1. Shorten it only where nothing but tests uses the
    /// addresses: origins remember closed connections for up to two minutes.
    #[arg(long, default_value_t = aegis_core::model::QUARANTINE, value_parser = clap::value_parser!(i64).range(1..))]
    pub quarantine_seconds: i64,
    /// Labels of the agents' pods, in the namespace of the Lease: a node without one that is ready gets no new slices, whatever
    /// its agent has reported. Empty: nobody looks.
    #[arg(long, default_value = "")]
    pub agent_pods: String,
    /// Log filter, as `info` or `aegis_operator=debug,info`.
    #[arg(long, env = "AEGIS_LOG", default_value = "info")]
    pub log: String,
}

/// Longest time an API call may take. Twice this and a little more fits between the moment a leader stops writing and
/// the moment another replica may take over.
pub const CALL_TIMEOUT: Duration = Duration::from_millis(2_500);

fn default_identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{}", host.trim(), std::process::id())
}
