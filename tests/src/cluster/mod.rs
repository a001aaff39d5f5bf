//! What the end-to-end tests are written with. Works on any cluster that a kubeconfig reaches.
//!
//! The lab is one such cluster. What only the lab can do (faults, captures, routes) is reached through
//! [`Cluster::lab`]; a test that needs it says so on another cluster and passes as skipped.

mod apply;
mod inside;
mod metrics;
mod namespace;
mod origin;
mod pod;
mod settled;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ListParams};

pub use self::inside::Inside;
pub use self::metrics::Metrics;
pub use self::namespace::Namespace;
pub use self::origin::{Origin, Summaries, Summary};
pub use self::pod::{Pod, PodBuilder};
pub use self::settled::{explained, settled};
use crate::lab::{self, Lab, images};

/// How long things that should happen at once may take on a busy machine before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster to test on.
#[derive(Clone)]
pub struct Cluster {
    client: kube::Client,
    lab: Option<Lab>,
    probe_image: String,
}

impl Cluster {
    /// The cluster to test on: the one that `KUBECONFIG` names, else the running lab. `None`, after saying so on
    /// standard error, if there is neither: the test is skipped. An error with `AEGIS_REQUIRE_LAB`, see [`lab::required`].
    pub async fn connect() -> anyhow::Result<Option<Self>> {
        let lab = Lab::attach();
        let kubeconfig: PathBuf = match (std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty()), &lab)
        {
            (Some(path), _) => path.into(),
            (None, Some(lab)) => lab.kubeconfig(),
            (None, None) => {
                ensure!(!lab::required(), "lab {:?} does not run", Lab::instance_name());
                eprintln!("skipped: needs a cluster; set KUBECONFIG, or start the lab by `make lab`");
                return Ok(None);
            }
        };
        // A kubeconfig of another cluster beside a running lab means the other cluster.
        let lab = lab.filter(|lab| kubeconfig == lab.kubeconfig());
        ensure!(lab.is_some() || !lab::required(), "{} is not of the lab", kubeconfig.display());
        let probe_image = match (std::env::var("AEGIS_PROBE_IMAGE"), &lab) {
            (Ok(image), _) => image,
            (Err(_), Some(lab)) => lab.probe_image()?,
            (Err(_), None) => images::probe().context("set AEGIS_PROBE_IMAGE")?.reference,
        };
        let client = crate::lab::client(&kubeconfig).await?;
        Ok(Some(Self { client, lab, probe_image }))
    }

    /// The cluster of a lab, whatever the environment names.
    pub async fn of_lab(lab: &Lab) -> anyhow::Result<Self> {
        let client = crate::lab::client(&lab.kubeconfig()).await?;
        Ok(Self { client, lab: Some(lab.clone()), probe_image: lab.probe_image()? })
    }

    /// A client with the administrator's rights.
    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Whether it is the lab.
    pub fn is_lab(&self) -> bool {
        self.lab.is_some()
    }

    /// The lab, or `None` after saying that the test is skipped.
    pub fn lab(&self) -> Option<&Lab> {
        if self.lab.is_none() {
            eprintln!("skipped: needs the lab");
        }
        self.lab.as_ref()
    }

    /// Names of the nodes, sorted.
    pub async fn nodes(&self) -> anyhow::Result<Vec<String>> {
        let nodes: Api<Node> = Api::all(self.client());
        let listed = nodes.list(&ListParams::default()).await?;
        let mut names: Vec<String> = listed.into_iter().filter_map(|node| node.metadata.name).collect();
        names.sort();
        ensure!(!names.is_empty(), "the cluster has no node");
        Ok(names)
    }

    /// A new namespace with a name of its own. Its end, and the end of what was applied through it, is
    /// [`Namespace::end`], or the value's drop.
    pub async fn namespace(&self, prefix: &str) -> anyhow::Result<Namespace> {
        Namespace::create(self, prefix).await
    }

    /// A namespace that is there already; it is not deleted.
    pub async fn adopt(&self, name: &str) -> anyhow::Result<Namespace> {
        Namespace::adopt(self, name).await
    }

    /// Applies manifests that bring their own namespaces, and leaves them.
    pub async fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        for object in apply::documents(yaml)? {
            let name = object.metadata.name.clone().unwrap_or_default();
            apply::apply(&self.client, object, "default").await.with_context(|| format!("apply {name}"))?;
        }
        Ok(())
    }

    /// The `index`-th origin (0 or 1): a server outside the cluster that records who comes.
    pub fn origin(&self, index: usize) -> anyhow::Result<Origin> {
        Origin::find(self.lab.as_ref(), index)
    }
}

/// Asks again and again until there is an answer. `Ok(None)` means not yet; an error ends the wait at once.
pub async fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut attempt: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        match tokio::time::timeout(limit, attempt()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => return Err(error.context(format!("waiting for {what}"))),
            Err(_) => bail!("waiting for {what}: no answer in {limit:?}"),
        }
        if Instant::now() > end {
            bail!("{what}: not within {limit:?}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiting_ends_with_an_answer_an_error_or_the_limit() {
        let mut left = 2;
        let answer = wait_for("a", PATIENCE, async || {
            left -= 1;
            Ok((left == 0).then_some(7))
        });
        assert_eq!(answer.await.unwrap(), 7);
        let never = wait_for("b", Duration::from_millis(1), async || Ok(None::<()>)).await;
        assert!(never.unwrap_err().to_string().starts_with("b: not within"));
        let failed = wait_for("c", PATIENCE, async || bail!("broken") as anyhow::Result<Option<()>>).await;
        assert!(format!("{:#}", failed.unwrap_err()).contains("broken"));
    }
}
