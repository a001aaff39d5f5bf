//! What the page shows of the load, in a browser that signs in as the account.

use std::net::{Ipv4Addr, SocketAddr};

use aegis_browser::Page;
use aegis_tests::cluster::Origin;
use aegis_tests::lab::NAMESPACE;
use aegis_tests::lab::plan::NODES;
use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::{CONNECTIONS, connections};
use crate::account::Account;

/// Port of the collector's container.
const PORT: u16 = 8443;

/// A port of this machine that leads to the collector's pod by the API server, while it is there.
struct Forward {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Forward {
    async fn start(account: &Account) -> anyhow::Result<Self> {
        let pods: Api<Pod> = Api::namespaced(account.namespace.cluster().client(), NAMESPACE);
        let wanted = ListParams::default().labels("app.kubernetes.io/name=aegis-collector");
        let name = pods.list(&wanted).await?.items.first().context("no collector")?.name_any();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (pods, name) = (pods.clone(), name.clone());
                // The browser says what did not work.
                tokio::spawn(async move { lead(stream, &pods, &name).await.ok() });
            }
        });
        Ok(Self { address, task })
    }
}

async fn lead(mut here: TcpStream, pods: &Api<Pod>, name: &str) -> anyhow::Result<()> {
    let mut forwarded = pods.portforward(name, &[PORT]).await?;
    let mut there = forwarded.take_stream(PORT).context("no port is forwarded")?;
    tokio::io::copy_bidirectional(&mut here, &mut there).await?;
    Ok(())
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ports in use of each node, and of all towards each origin, and nothing else.
pub async fn shows(account: &Account, token: &str, origin: &Origin) -> anyhow::Result<()> {
    let forward = Forward::start(account).await?;
    let url = format!("https://{}", forward.address);
    // The certificate is the Service's, and this is no name of it.
    let mut page = Page::open_with(&["--ignore-certificate-errors"]).await;
    let accounts = json!([account.namespace.name()]).to_string();
    let remember = format!(
        "if (location.protocol === 'https:') {{ sessionStorage.setItem('aegis-token', {}); sessionStorage.setItem('aegis-accounts', {}); }}",
        json!(token),
        json!(accounts)
    );
    page.call("Page.addScriptToEvaluateOnNewDocument", json!({ "source": remember })).await;
    page.go(&format!("{url}/#/address/{}", account.address)).await;
    for index in 0..2u16 {
        let (to, all) = (origin.port(index), connections(index, NODES.len()));
        let plot = json!(format!("[data-key=\"{to} tcp\"] p"));
        let said = json!(format!("now {all}, highest {all} ports;"));
        page.until(&format!("document.querySelector({plot}).textContent.startsWith({said})")).await;
    }
    let plots = page.value("document.querySelectorAll('.plots [data-key]').length").await;
    ensure!(plots == 2, "{plots} origins, not 2");
    for (more, node) in NODES.iter().enumerate() {
        let (in_use, to) = (CONNECTIONS[0] + more, origin.port(0));
        let row = json!(format!(r"{}.* held{in_use} of its [\d,]+ ports towards {to} tcp", node.name()));
        page.until(&format!(
            "[...document.querySelectorAll('tr')].some((it) => new RegExp({row}).test(it.textContent))"
        ))
        .await;
    }
    let wrongs = page.wrongs(&url, "").await;
    ensure!(wrongs.is_empty(), "{wrongs:?}");
    Ok(())
}
