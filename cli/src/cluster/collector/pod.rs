//! The collector's pod, and a port of it through the API server.

use super::https::{Https, Trust};
use super::{CLIENT, CONNECT, Cluster, NAME, Notice};
use crate::state::PART;
use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use std::time::Duration;

/// The port of its container that takes questions, and its number unless the pod says otherwise.
const PORT: (&str, u16) = ("https", 8443);

/// For how long the node's word on a port that is not forwarded is waited for.
const WORD: Duration = Duration::from_secs(2);

/// The volume of its pod that has the certificate.
const VOLUME: &str = "tls";

impl Cluster {
    /// A pod of the collector that is ready.
    pub(super) async fn collector_pod(&self, notice: &Notice) -> Result<Pod> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.system);
        let wanted = ListParams::default().labels(&format!("{PART}={NAME}"));
        let found = match tokio::time::timeout(CONNECT, pods.list(&wanted)).await {
            Ok(Ok(found)) => found.items,
            Ok(Err(error)) => return Err(self.refused(error, "pods may not be listed", notice)),
            Err(_) => bail!("the API server does not answer within {} s", CONNECT.as_secs()),
        };
        choose(found).map_err(|why| anyhow!("{why}, in namespace {} (--system-namespace)", self.system))
    }

    /// Whose certificates are the collector's.
    pub(super) async fn authority(&self, notice: Result<Notice, kube::Error>, pod: &Pod) -> Result<Trust> {
        let told = match &notice {
            Ok(notice) => notice.authority.as_deref(),
            Err(_) => None,
        };
        if let Some(authority) = told {
            return Trust::pem(authority.as_bytes(), &format!("ConfigMap {}/{NAME}", self.system));
        }
        // Where certificates are made by others, the chart may not have seen any; whoever may read the Secret need not care.
        let (name, secrets) = (secret(pod), Api::<Secret>::namespaced(self.client.clone(), &self.system));
        if let Ok(Some(secret)) = secrets.get_opt(name).await
            && let Some(authority) = secret.data.as_ref().and_then(|data| data.get("ca.crt"))
        {
            return Trust::pem(&authority.0, &format!("Secret {}/{name}", self.system));
        }
        let why = match notice {
            Ok(_) => {
                format!("ConfigMap {}/{NAME} does not tell it: upgrade the chart's release", self.system)
            }
            Err(error) => format!("{error}: Role {CLIENT} gives the right to read it"),
        };
        bail!("the authority of the collector's certificate is not known ({why}), or say --ca-file")
    }

    /// A connection to the pod.
    pub(super) async fn forward(&self, pod: &Pod, trust: Trust, notice: &Notice) -> Result<Https> {
        let (name, port) = (pod.name_any(), port(pod));
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.system);
        let forwarded = tokio::time::timeout(CONNECT, pods.portforward(&name, &[port])).await;
        let mut forwarded = match forwarded {
            Ok(Ok(forwarded)) => forwarded,
            Ok(Err(error)) => return Err(self.refused(error, "no port of its pod may be forwarded", notice)),
            Err(_) => bail!("no port of pod {name} is forwarded within {} s", CONNECT.as_secs()),
        };
        let stream = forwarded.take_stream(port).context("no port is forwarded")?;
        let error = forwarded.take_error(port);
        // As agents know it: the name that its certificate is for.
        let host = format!("{NAME}.{}.svc", self.system);
        match tokio::time::timeout(CONNECT, Https::open(stream, &host, &trust)).await {
            Ok(Ok(opened)) => Ok(opened),
            failed => {
                // What the node says of it tells more than that the stream has ended, and may come a moment later.
                let told = match error {
                    Some(error) => tokio::time::timeout(WORD, error).await.ok().flatten(),
                    None => None,
                };
                forwarded.abort();
                match (told.filter(|it| !it.is_empty()), failed) {
                    (Some(told), _) => bail!("port {port} of pod {name} is not forwarded: {}", told.trim()),
                    (None, Ok(Err(error))) if is_end(&error) => {
                        bail!("pod {name} ends the connection at once: does the collector run? kubectl logs tells")
                    }
                    (None, Ok(Err(error))) => Err(error).with_context(|| {
                        format!("pod {name} is not the {host} that is trusted: has its certificate changed since the chart was upgraded? See --ca-file")
                    }),
                    _ => bail!("pod {name} does not answer within {} s", CONNECT.as_secs()),
                }
            }
        }
    }

    /// An error of the API server, with what gives the right where there is none.
    fn refused(&self, error: kube::Error, what: &str, notice: &Notice) -> anyhow::Error {
        match error {
            kube::Error::Api(status) if status.code == 403 => anyhow!(
                "{}: {what}: {}. Role {CLIENT} of namespace {} gives the right; or ask it at its address: --collector {}",
                self.system,
                status.message,
                self.system,
                notice.url.as_deref().unwrap_or("https://HOST"),
            ),
            other => anyhow::Error::from(other).context("the API server does not lead to the collector"),
        }
    }
}

/// One that is ready.
fn choose(pods: Vec<Pod>) -> Result<Pod, String> {
    let Some(first) = pods.first().map(ResourceExt::name_any) else {
        return Err(
            "there is no collector: it is not installed (usage.enabled=true of the chart), or scaled to nothing".to_owned()
        );
    };
    pods.into_iter()
        .find(is_ready)
        .ok_or_else(|| format!("the collector's pod {first} is not ready: kubectl describe it"))
}

/// Whether a connection was closed instead of answered.
fn is_end(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    kind == Some(std::io::ErrorKind::UnexpectedEof)
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|it| it.type_ == "Ready" && it.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

fn port(pod: &Pod) -> u16 {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|it| it.ports.iter().flatten());
    let named = ports.find(|it| it.name.as_deref() == Some(PORT.0));
    named.and_then(|it| u16::try_from(it.container_port).ok()).unwrap_or(PORT.1)
}

fn secret(pod: &Pod) -> &str {
    let mut volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let named = volumes.find(|it| it.name == VOLUME).and_then(|it| it.secret.as_ref());
    named.and_then(|it| it.secret_name.as_deref()).unwrap_or("aegis-collector-tls")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, ready: &str) -> Pod {
        let object = json!({
            "metadata": {"name": name},
            "spec": {
                "containers": [{"name": "collector", "ports": [
                    {"name": "metrics", "containerPort": 8080}, {"name": "https", "containerPort": 9443},
                ]}],
                "volumes": [{"name": "tls", "secret": {"secretName": "certificate"}}],
            },
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn the_pod_that_is_ready_is_asked_at_its_port() {
        assert!(choose(Vec::new()).unwrap_err().contains("usage.enabled=true"));
        assert!(choose(vec![pod("a", "False")]).unwrap_err().contains("pod a is not ready"));
        let mut leaving = pod("b", "True");
        leaving.metadata.deletion_timestamp =
            Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        assert!(choose(vec![leaving.clone()]).is_err());
        let chosen = choose(vec![pod("a", "False"), leaving, pod("c", "True")]).unwrap();
        assert_eq!((chosen.name_any().as_str(), port(&chosen), secret(&chosen)), ("c", 9443, "certificate"));
        assert_eq!((port(&Pod::default()), secret(&Pod::default())), (8443, "aegis-collector-tls"));
    }
}
