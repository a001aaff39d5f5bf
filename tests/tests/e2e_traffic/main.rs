//! What covered traffic does on the wire: out, back, refused and forged, on three nodes that share one address.

mod account;
mod bulk;
mod dedicated;
mod exhaustion;
mod headline;
mod icmp_errors;
mod inbound;
mod limits;
mod logs;
mod metrics;
mod nftables;
