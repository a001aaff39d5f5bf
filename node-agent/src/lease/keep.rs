//! Carries out what the [`Keeper`](super::Keeper) wants.

use super::{Act, Epochs, Failure, Hold, Keeper, Need};
use crate::metrics::Metrics;
use crate::objects;
use aegis_core::fence::lease_name;
use aegis_crds::EgressAddress;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ListParams, PostParams};
use std::time::Duration;
use tokio::sync::watch;

/// Longest time of one call.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Where the Lease is.
#[derive(Clone)]
pub struct Access {
    /// Access to the API server.
    pub client: Client,
    /// Namespace of the release.
    pub namespace: String,
    /// Name of the node.
    pub node: String,
}

/// Keeps the Lease for as long as the controller says what it needs; `changed` is called when there is news for it.
/// Nothing happens before the first need, which also tells by which renewal the programs count.
pub async fn keep(
    access: Access,
    mut need: watch::Receiver<Option<Need>>,
    hold: watch::Sender<Option<Hold>>,
    metrics: Metrics,
    changed: impl Fn(),
) {
    let leases: Api<Lease> = Api::namespaced(access.client.clone(), &access.namespace);
    let addresses: Api<EgressAddress> = Api::all(access.client);
    let name = lease_name(&access.node);
    let Ok(first) = need.wait_for(Option::is_some).await.map(|need| need.clone().unwrap_or_default()) else {
        return;
    };
    let mut keeper = Keeper::new(&access.node, first.renewed);
    loop {
        let now = match boot_time() {
            Ok(now) => now,
            Err(error) => {
                // Without a clock nothing is renewed, and the deadlines pass.
                tracing::error!(%error, "cannot read the clock");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let needed = need.borrow_and_update().clone().unwrap_or_default();
        // Read before the request is made: the deadlines count from no later than when it was sent.
        match keeper.act(&needed, now, Timestamp::now()) {
            Act::Wait(until) => {
                tell(&keeper, &hold, &changed);
                let pause = Duration::from_nanos(until.saturating_sub(now)).min(Duration::from_secs(60));
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    more = need.changed() => if more.is_err() { return },
                }
                continue;
            }
            Act::Get => {
                let result = call(leases.get_opt(&name)).await;
                keeper.got(result, boot_time().unwrap_or(now));
            }
            Act::Put(lease) => {
                let parameters = PostParams::default();
                let result = match lease.metadata.resource_version {
                    Some(_) => call(leases.replace(&name, &parameters, &lease)).await,
                    None => call(leases.create(&parameters, &lease)).await,
                };
                metrics.lease_renewed(match &result {
                    Ok(_) => "success",
                    Err(Failure::Conflict) => "conflict",
                    Err(Failure::Other(_)) => "failure",
                });
                keeper.put(now, &needed, result, boot_time().unwrap_or(now));
            }
            Act::List => {
                // Without a resource version the API server answers with the newest state, not from its cache.
                let result = call(addresses.list(&ListParams::default())).await;
                let result = result.and_then(|list| epochs(&list.items));
                keeper.listed(now, &needed, result, boot_time().unwrap_or(now));
            }
        }
        tell(&keeper, &hold, &changed);
    }
}

fn tell(keeper: &Keeper, hold: &watch::Sender<Option<Hold>>, changed: &impl Fn()) {
    let now = keeper.hold();
    let news = hold.send_if_modified(|before| {
        let trouble = before.as_ref().and_then(|before| before.trouble.as_ref());
        if now.trouble.as_ref() != trouble {
            match &now.trouble {
                Some(trouble) => tracing::warn!(%trouble, "the node's Lease is not renewed"),
                None => tracing::info!("the node's Lease is renewed again"),
            }
        }
        let news = before.as_ref() != Some(&now);
        *before = Some(now);
        news
    });
    if news {
        changed();
    }
}

fn epochs(items: &[EgressAddress]) -> Result<Epochs, Failure> {
    let mut epochs = Epochs::new();
    for object in items {
        let address = objects::address(object).map_err(|error| Failure::Other(error.to_string()))?;
        epochs.insert(address.address, address.epoch);
    }
    Ok(epochs)
}

async fn call<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Failure> {
    match tokio::time::timeout(TIMEOUT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Err(Failure::Conflict),
        Ok(Err(error)) => Err(Failure::Other(error.to_string())),
        Err(_) => Err(Failure::Other("no answer in time".to_owned())),
    }
}

/// Nanoseconds since boot, as the programs count them.
fn boot_time() -> nix::Result<u64> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    let of = |value: i64| u64::try_from(value).unwrap_or(0);
    Ok(of(time.tv_sec()) * 1_000_000_000 + of(time.tv_nsec()))
}
