//! Change and failure, end to end: what happens to traffic while objects change and while parts of the cluster fail.
//!
//! Every test has an address of its own. What must not happen is always looked for on the wire, between the nodes and
//! the router, with connections going on meanwhile.

mod account;
mod first_packet;
mod inside;
