//! The program against a real API server, with the rights that the chart gives: who may deliver, who sees what, and what remains when things
//! stop.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod agents;
mod alerts;
mod collector;
mod delivery;
mod kubelet;
mod objects;
mod people;
#[allow(dead_code, reason = "these tests need a part of it")]
#[path = "../../../../tests/cluster/process.rs"]
mod process;
mod stops;
mod tls;
mod usage;
mod world;
