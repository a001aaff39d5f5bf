//! Pods that are talked to from within their node.

pub use aegis_tests::cluster::Inside;
