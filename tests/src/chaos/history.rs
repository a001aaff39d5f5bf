//! Who held which slices of which address over time, as the API server tells it: never may a slice pass from one node to
//! another without having rested, and epochs only grow.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aegis_crds::{EgressAddress, HoldingState};
use futures::StreamExt;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};

/// Who holds a slice.
#[derive(Clone, Debug, PartialEq)]
struct Holder {
    node: String,
    epoch: i64,
    state: HoldingState,
}

/// What was seen last of one address.
#[derive(Clone, Debug, Default)]
struct Seen {
    epoch: i64,
    slices: BTreeMap<u32, Holder>,
}

/// What has been seen of all addresses.
#[derive(Clone, Debug, Default)]
pub struct History {
    addresses: BTreeMap<String, Seen>,
    /// Versions of objects that were looked at.
    pub versions: u64,
    /// How often a slice had another holder, or another state, than before.
    pub changes: u64,
    /// What must never be, in words.
    pub violations: Vec<String>,
}

impl History {
    /// Looks at the next version of an object. After a `gap` versions between may have been missed.
    pub fn see(&mut self, address: &EgressAddress, gap: bool) {
        self.versions += 1;
        let (name, spec) = (&address.spec.address, &address.spec);
        let before = self.addresses.entry(name.clone()).or_default();
        if spec.epoch < before.epoch {
            self.violations.push(format!("{name}: epoch {} after {}", spec.epoch, before.epoch));
        }
        let mut slices = BTreeMap::new();
        for holding in &spec.holdings {
            for slice in holding.first..=holding.last {
                let holder =
                    Holder { node: holding.node.clone(), epoch: holding.epoch, state: holding.state };
                if let Some(other) = slices.insert(slice, holder.clone()) {
                    self.violations.push(format!(
                        "{name}: slice {slice} of {} and {} at a time",
                        other.node, holder.node
                    ));
                }
                let Some(old) = before.slices.get(&slice) else { continue };
                if *old == holder {
                    continue;
                }
                self.changes += 1;
                if old.node == holder.node {
                    continue;
                }
                if holder.epoch <= old.epoch {
                    self.violations.push(format!(
                        "{name}: slice {slice} went from {} to {} with epoch {} after {}",
                        old.node, holder.node, holder.epoch, old.epoch
                    ));
                }
                if !gap && old.state != HoldingState::Quarantined {
                    self.violations.push(format!(
                        "{name}: slice {slice} went from {} ({:?}) to {} without a rest",
                        old.node, old.state, holder.node
                    ));
                }
            }
        }
        for (slice, old) in before.slices.iter().filter(|(slice, _)| !slices.contains_key(slice)) {
            self.changes += 1;
            if !gap && old.state != HoldingState::Quarantined {
                self.violations.push(format!(
                    "{name}: slice {slice} of {} ({:?}) became free without a rest",
                    old.node, old.state
                ));
            }
        }
        *before = Seen { epoch: spec.epoch, slices };
    }

    /// The address's object is gone; its epoch stays known.
    pub fn gone(&mut self, address: &str) {
        if let Some(seen) = self.addresses.get_mut(address) {
            seen.slices.clear();
        }
    }
}

/// Follows all addresses until dropped.
pub struct Watch {
    history: Arc<Mutex<History>>,
    task: tokio::task::JoinHandle<()>,
}

impl Watch {
    /// Begins.
    pub fn start(client: kube::Client) -> Watch {
        let history = Arc::new(Mutex::new(History::default()));
        let into = Arc::clone(&history);
        let task = tokio::spawn(async move {
            let mut gap = false;
            loop {
                // Without an API server there is nothing to see, and nobody who could change anything.
                let _ = follow(&client, &into, gap).await;
                gap = true;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
        Watch { history, task }
    }

    /// What was seen so far.
    pub fn history(&self) -> History {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(client: &kube::Client, history: &Mutex<History>, gap: bool) -> kube::Result<()> {
    let lock = || history.lock().unwrap_or_else(PoisonError::into_inner);
    let api: Api<EgressAddress> = Api::all(client.clone());
    let listed = api.list(&ListParams::default()).await?;
    for address in &listed.items {
        lock().see(address, gap);
    }
    let from = listed.metadata.resource_version.unwrap_or_default();
    let mut events = api.watch(&WatchParams::default(), &from).await?.boxed();
    while let Some(event) = events.next().await {
        match event? {
            WatchEvent::Added(address) | WatchEvent::Modified(address) => lock().see(&address, false),
            WatchEvent::Deleted(address) => lock().gone(&address.spec.address),
            WatchEvent::Error(_) => break,
            WatchEvent::Bookmark(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn address(epoch: i64, holdings: &[(u32, u32, &str, i64, &str)]) -> EgressAddress {
        let holdings: Vec<_> = holdings
            .iter()
            .map(|(first, last, node, epoch, state)| {
                json!({"first": first, "last": last, "node": node, "epoch": epoch, "state": state})
            })
            .collect();
        serde_json::from_value(json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressAddress", "metadata": {"name": "203.0.113.1"},
            "spec": {"address": "203.0.113.1", "prefix": "p", "allocationRef": {"namespace": "a", "name": "b"},
                     "epoch": epoch, "holdings": holdings},
        }))
        .unwrap()
    }

    /// What is said of these versions, seen one after another.
    fn said(versions: &[EgressAddress], gap: bool) -> Vec<String> {
        let mut history = History::default();
        for version in versions {
            history.see(version, gap);
        }
        history.violations
    }

    #[test]
    fn a_slice_that_drains_rests_and_then_goes_to_another_node_is_well() {
        let life = [
            address(1, &[(4, 7, "n1", 1, "Held")]),
            address(2, &[(4, 5, "n1", 1, "Held"), (6, 7, "n1", 2, "Draining")]),
            address(3, &[(4, 5, "n1", 1, "Held"), (6, 7, "n1", 3, "Quarantined")]),
            address(4, &[(4, 5, "n1", 1, "Held"), (6, 7, "n2", 4, "Held")]),
        ];
        assert_eq!(said(&life, false), [] as [String; 0]);
    }

    #[test]
    fn each_violation_is_told() {
        let held = address(3, &[(4, 7, "n1", 3, "Held")]);
        let taken = address(4, &[(4, 7, "n2", 4, "Held")]);
        let told = said(&[held.clone(), taken.clone()], false);
        assert!(told.len() == 4 && told[0].contains("without a rest"), "{told:?}");
        // With versions between that nobody saw, that proves nothing.
        assert!(said(&[held.clone(), taken], true).is_empty());
        let rests = address(3, &[(4, 4, "n1", 3, "Quarantined")]);
        let told = said(&[rests, address(4, &[(4, 4, "n2", 3, "Held")])], false);
        assert!(told.len() == 1 && told[0].contains("epoch 3 after 3"), "{told:?}");
        let told = said(&[held, address(2, &[(4, 7, "n1", 3, "Held")])], false);
        assert_eq!(told, ["203.0.113.1: epoch 2 after 3"]);
        let free = [address(1, &[(9, 9, "n1", 1, "Draining")]), address(2, &[])];
        assert_eq!(said(&free, false), ["203.0.113.1: slice 9 of n1 (Draining) became free without a rest"]);
        let twice = address(1, &[(4, 6, "n1", 1, "Held"), (6, 7, "n2", 1, "Held")]);
        assert_eq!(said(&[twice], false), ["203.0.113.1: slice 6 of n1 and n2 at a time"]);
    }
}
