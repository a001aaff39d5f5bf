//! What covered traffic does on the wire: out, back, refused and forged, on three nodes that share one address.

mod account;
mod headline;
mod metrics;
