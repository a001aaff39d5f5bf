//! Announcement, end to end: real FRR and BIRD on the nodes, with the chart's configuration, and a router that spreads the
//! packets over whom they name. What the router does is read from its kernel's table.

mod account;
mod daemons;
mod drain;
mod holders;
mod loss;
mod moves;
