//! Tables of manifests that the API server must accept or reject.

use crate::apiserver::ApiServer;

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

/// Lets the server judge each manifest as `kubectl create` does, and fails with the list of those that it accepted or
/// whose message lacks something.
pub fn assert_rejected(server: &ApiServer, table: &[Wrong]) {
    let failures: Vec<String> = table
        .iter()
        .filter_map(|wrong| {
            let error = match create(server, &wrong.manifest) {
                Ok(()) => return Some(format!("{}: accepted", wrong.name)),
                Err(error) => error,
            };
            let lacks = [wrong.field, wrong.message].into_iter().find(|part| !error.contains(part))?;
            Some(format!("{}: the message lacks {lacks:?}:\n  {error}", wrong.name))
        })
        .collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), table.len(), failures.join("\n"));
}

/// Lets the server judge each (name, manifest), and fails with the list of those that it rejected.
pub fn assert_accepted(server: &ApiServer, table: &[(&str, String)]) {
    let failures: Vec<String> = table
        .iter()
        .filter_map(|(name, manifest)| Some(format!("{name}: {}", create(server, manifest).err()?)))
        .collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), table.len(), failures.join("\n"));
}

fn create(server: &ApiServer, manifest: &str) -> Result<(), String> {
    let arguments = ["create", "--dry-run=server", "--validate=strict", "-f", "-"];
    server.kubectl_with(&arguments, manifest).map(drop).map_err(|error| error.to_string())
}
