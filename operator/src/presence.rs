//! Asks the API server itself whether nodes exist: the local copies may be behind.

use crate::error::call;
use crate::server::Health;
use crate::world::Presence;
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::Api;
use std::collections::{BTreeMap, BTreeSet};

/// Questions at a time.
const PARALLEL: usize = 8;

/// What the API server says of these nodes. A read without a version is answered by a majority of etcd.
pub async fn of(client: &Client, names: BTreeSet<String>, health: &Health) -> BTreeMap<String, Presence> {
    let api: Api<Node> = Api::all(client.clone());
    let questions = names.into_iter().map(async |name| {
        let presence = match call(api.get_opt(&name)).await {
            Ok(Some(node)) => Presence::There(Box::new(node)),
            Ok(None) => Presence::Gone,
            Err(error) => {
                tracing::warn!(node = name, error = %error, "cannot ask whether the node exists");
                Presence::Unknown
            }
        };
        health.turn();
        (name, presence)
    });
    stream::iter(questions).buffer_unordered(PARALLEL).collect().await
}
