//! The rights that the chart gives the operator, and who may write what.

use super::{Cluster, tool};
use kube::api::{Api, DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use kube::discovery::Scope;
use kube::{ResourceExt, discovery};
use std::path::Path;
use std::process::Command;

/// Namespace of the release.
pub const NAMESPACE: &str = "aegis-system";

/// Installs the operator's rights and the admission policies of the chart.
pub async fn install_rights(cluster: &Cluster) {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/aegis");
    let mut helm = Command::new(tool("helm"));
    helm.args(["template", "aegis"]).arg(chart).args(["--namespace", NAMESPACE]);
    helm.args(["--show-only", "templates/rbac-operator.yaml", "--show-only", "templates/admission.yaml"]);
    // The test's administrator plays the agents too.
    helm.args(["--set", "admission.exemptGroups={system:masters}", "--kube-version", "1.36.0"]);
    let output = helm.output().expect("helm");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifests = String::from_utf8(output.stdout).expect("UTF-8");
    for document in manifests.split("\n---").filter(|document| document.contains("kind:")) {
        let object: DynamicObject = serde_yaml_ng::from_str(document).expect(document);
        let types = object.types.clone().expect("kind");
        let kind = GroupVersionKind::try_from(&types).expect("kind");
        let (resource, capabilities) =
            discovery::pinned_kind(&cluster.client, &kind).await.expect("discovery");
        let api: Api<DynamicObject> = match capabilities.scope {
            Scope::Cluster => Api::all_with(cluster.client.clone(), &resource),
            Scope::Namespaced => {
                let namespace = object.namespace().unwrap_or_else(|| NAMESPACE.to_owned());
                Api::namespaced_with(cluster.client.clone(), &namespace, &resource)
            }
        };
        api.create(&PostParams::default(), &object).await.expect(document);
    }
}
