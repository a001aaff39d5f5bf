//! The collector of use: takes the reports of agents, keeps them in SQLite or PostgreSQL, and answers who used how many ports of
//! which egress address towards which origin, when.
//!
//! | to change | look in |
//! |---|---|
//! | what agents send | the crate `aegis-usage-report` |
//! | which reports count, and when one counts twice | `ingest` |
//! | how 10 seconds become minutes and hours, and what is forgotten | `rollup`, `level` |
//! | tables and columns | `schema` |
//! | what may be asked, and how it is put to a database | `query` |
//! | who may see what | `scope`, and since when, `owners`; how they show who they are, `access` |
//! | allocations, addresses and policies, and who may see them | `cluster`, `graphql/cluster` |
//! | the page for browsers | the folder `page`; how it is served, `page` |
//! | what is served, and how much at a time | `http`, `graphql`, `inbox`, `turns` |
//! | when an alert is raised and cleared | `alert` (`alert/machine`, `alert/evaluate`); its words, `alert/item` |
//! | feeds, and who reads them | `alert/feed`, `feeds` |
//! | what is counted of the service itself | `metrics` |
//! | which nodes did not report, and when | `coverage` |
//! | where SQLite and PostgreSQL differ | `sqlite`, `postgres` |
//! | connection strings of PostgreSQL, and whom to believe | `postgres/address`, `postgres/tls` |
//! | the program: flags, tokens checked by Kubernetes, TLS | the crate `aegis-collector`, in `collector` |
//!
//! Time is an argument, in whole seconds since the Unix epoch. The store blocks; `http` and `inbox` put it on
//! threads where it may.
#![forbid(unsafe_code)]

mod access;
pub mod alert;
pub mod cluster;
mod coverage;
mod feeds;
mod graphql;
mod http;
mod inbox;
mod ingest;
mod level;
mod metrics;
mod owners;
mod page;
mod postgres;
mod query;
mod rollup;
mod schema;
mod scope;
mod series;
mod sql;
mod sqlite;
mod store;
mod turns;

pub use access::{Access, Denied, Pending};
pub use coverage::{Coverage, Gap, Reported};
pub use feeds::feeds;
pub use graphql::sdl;
pub use http::{Clock, router};
pub use inbox::keep;
pub use ingest::{FUTURE, Receipt};
pub use level::{Level, Retention, RetentionError};
pub use metrics::Metrics;
pub use page::graphiql;
pub use postgres::{Address, PostgresTls, SslMode, TlsError};
pub use query::{
    Aggregation, Answer, Dimension, Figure, Filter, Measure, Order, OriginFilter, Page, Query, QueryError,
    most,
};
pub use rollup::{Maintained, SETTLE};
pub use scope::{Owned, Prefix, Scope, Viewer};
pub use sql::Error;
pub use store::{Contents, Store};
