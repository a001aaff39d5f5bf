//! Tables of manifests that the API server must accept or reject.

use crate::apiserver::ApiServer;
use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use kube::api::PostParams;
use kube::core::Request;
use serde_json::Value;

/// A manifest that must be rejected.
pub struct Wrong {
    /// What is wrong with it.
    pub name: &'static str,
    /// The manifest.
    pub manifest: String,
    /// The field that the message must name.
    pub field: &'static str,
    /// What else the message must say.
    pub message: &'static str,
}

/// A manifest of `kind` with this `spec` (in flow style, without the outer braces).
pub fn manifest(kind: &str, name: &str, spec: &str) -> String {
    format!("{{apiVersion: aegis.dev/v1alpha1, kind: {kind}, metadata: {{name: {name}}}, spec: {{{spec}}}}}")
}

/// A manifest in a namespace.
pub fn namespaced(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: aegis.dev/v1alpha1, kind: {kind}, metadata: {{namespace: {namespace}, name: {name}}}, \
         spec: {{{spec}}}}}"
    )
}

/// Lets the server judge each manifest. The error lists those that it accepted or whose message lacks something.
pub fn all_rejected(server: &ApiServer, table: &[Wrong]) -> Result<()> {
    let verdicts = judge(server, table.iter().map(|wrong| wrong.manifest.as_str()))?;
    let failures: Vec<String> = table
        .iter()
        .zip(verdicts)
        .filter_map(|(wrong, verdict)| {
            let error = match verdict {
                Ok(()) => return Some(format!("{}: accepted", wrong.name)),
                Err(error) => error,
            };
            let lacks = [wrong.field, wrong.message].into_iter().find(|part| !error.contains(part))?;
            Some(format!("{}: the message lacks {lacks:?}:\n  {error}", wrong.name))
        })
        .collect();
    ensure!(failures.is_empty(), "{} of {}:\n{}", failures.len(), table.len(), failures.join("\n"));
    Ok(())
}

/// Lets the server judge each (name, manifest). The error lists those that it rejected.
pub fn all_accepted(server: &ApiServer, table: &[(&str, String)]) -> Result<()> {
    let verdicts = judge(server, table.iter().map(|(_, manifest)| manifest.as_str()))?;
    let failures: Vec<String> = table
        .iter()
        .zip(verdicts)
        .filter_map(|((name, _), verdict)| Some(format!("{name}: {}", verdict.err()?)))
        .collect();
    ensure!(failures.is_empty(), "{} of {}:\n{}", failures.len(), table.len(), failures.join("\n"));
    Ok(())
}

/// What the server says to each manifest, in order: the message if it rejects it.
fn judge<'a>(
    server: &ApiServer,
    manifests: impl Iterator<Item = &'a str>,
) -> Result<Vec<Result<(), String>>> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let client = server.client().await?;
        let verdicts = manifests.map(async |manifest| create(&client, manifest).await);
        futures::stream::iter(verdicts).buffered(4).try_collect().await
    })
}

/// Asks for what `kubectl create` asks for, but as a dry run: strict validation, and no merging with what is there.
async fn create(client: &kube::Client, manifest: &str) -> Result<Result<(), String>> {
    let object: Value = serde_yaml_ng::from_str(manifest).context(manifest.to_owned())?;
    let plural = match object["kind"].as_str().context("no kind")? {
        "EgressAddress" => "egressaddresses".to_owned(),
        "AegisPrefix" => "aegisprefixes".to_owned(),
        "EgressPolicy" => "egresspolicies".to_owned(),
        kind => format!("{}s", kind.to_lowercase()),
    };
    let namespace = object["metadata"]["namespace"].as_str();
    let namespace = namespace.map(|namespace| format!("namespaces/{namespace}/")).unwrap_or_default();
    let path = format!("/apis/{}/{}/{namespace}{plural}", aegis_crds::GROUP, aegis_crds::VERSION);
    let parameters = PostParams { dry_run: true, ..PostParams::default() };
    let mut request = Request::new(path).create(&parameters, serde_json::to_vec(&object)?)?;
    *request.uri_mut() = format!("{}&fieldValidation=Strict", request.uri()).parse()?;
    match client.request::<Value>(request).await {
        Ok(_) => Ok(Ok(())),
        Err(kube::Error::Api(status)) => Ok(Err(status.message)),
        Err(error) => Err(error).context("the API server does not answer"),
    }
}
