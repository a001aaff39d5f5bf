//! The lab and what the end-to-end tests are written with. `tests/README.md` shows how.

pub mod admission;
pub mod apiserver;
pub mod chaos;
pub mod cluster;
pub mod lab;
pub mod mmdb;
