//! What the API server holds, as planning reads it. The operator plans from it what it writes, the command line what it would write.

pub mod agents;
pub mod object;
pub mod report;
pub mod snapshot;
pub mod world;
