//! What the API server accepts and rejects, and in which words.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod address;
mod alert;
mod allocation;
mod application;
mod binding;
mod manual;
mod policy;
mod prefix;

use aegis_tests::apiserver::ApiServer;
use std::sync::Arc;

/// The shared server with the namespace `shop`. The chart is installed without its policies: the tables are about the
/// schemas, also those of objects that only the machinery may write.
fn server() -> Arc<ApiServer> {
    let server = ApiServer::shared(&["admission.enabled=false"]).expect("start the API server");
    let namespace = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}";
    server.provide(namespace).expect("create the namespace");
    server
}

/// Creates an object, applies another version of it, and returns what the server says to that.
fn update(server: &ApiServer, before: &str, after: &str) -> Result<String, String> {
    server.kubectl_with(&["create", "-f", "-"], before).expect("the first version is right");
    server.kubectl_with(&["replace", "-f", "-"], after).map_err(|error| error.to_string())
}
