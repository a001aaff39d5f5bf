//! Host names in a turn: what is known of them goes into the policy, and pods' queries to where they are answered.

use super::Controller;
use crate::conntrack;
use crate::desired::{Desired, Inputs};
use crate::names::{Listening, Names};
use crate::nft::Queries;
use crate::sweep::Usage;
use aegis_core::policy;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Pause between two looks whether something is over.
const PAUSE: Duration = Duration::from_secs(1);
/// Resolvers that count: a pod can name as many.
const MAX_RESOLVERS: u16 = 3;

/// What the controller keeps of it.
pub(super) struct Naming {
    pub names: Names,
    listening: watch::Sender<Listening>,
    /// Whose queries go to the agent, as nftables has been told.
    told: Queries,
    looked: Instant,
    /// Why connections from before may go on.
    pub failure: Option<String>,
}

impl Naming {
    pub fn new(names: Names, now: Instant) -> Naming {
        let listening = watch::Sender::new(Listening::new());
        Naming { names, listening, told: Queries::default(), looked: now, failure: None }
    }

    /// The data plane is as these want it.
    pub fn in_force(&self, inputs: &Inputs, wanted: &Desired) {
        self.names.look_up(&wanted.looked_up);
        self.names.in_force(inputs.resolved.0, &wanted.nameless);
    }
}

impl Controller {
    /// Where is to be listened for pods' queries.
    pub fn listening(&self) -> watch::Receiver<Listening> {
        self.naming.listening.subscribe()
    }

    /// Forgets names' addresses whose time is over.
    pub(super) fn look_at_names(&mut self, usage: &Usage, now: Instant) {
        // Without a scan nobody knows what is in use.
        if usage.started.is_none() || now.saturating_duration_since(self.naming.looked) < PAUSE {
            return;
        }
        self.naming.looked = now;
        self.dirty |= self.naming.names.expire(|address| usage.remotes.contains(address));
    }

    /// Puts what is known of names into the inputs. Before everything has been listed, what the agent before knew counts.
    pub(super) fn name(&self, inputs: &mut Inputs) {
        let names = &self.naming.names;
        if self.synced {
            names.follow(&policy::patterns(&inputs.policies, &inputs.bindings, &inputs.applications));
        }
        names.serve_pods(&inputs.pod_ranges);
        inputs.resolved = names.resolved();
    }

    /// Which queries the agent answers.
    pub(super) fn queries(&self, wanted: Option<&Desired>, inputs: &Inputs) -> Queries {
        if !self.naming.names.any() {
            return Queries::default();
        }
        let own6 = inputs.nodes.get(&inputs.node).and_then(|node| node.addresses6.first().copied());
        let ports = (0..MAX_RESOLVERS).filter_map(|place| self.args.dns_port.checked_add(place));
        let listening = self.args.dns_servers.iter().zip(ports).filter_map(|(resolver, port)| {
            let own: IpAddr = match resolver {
                IpAddr::V4(_) => inputs.tunnel_address?.into(),
                IpAddr::V6(_) => own6?.into(),
            };
            Some((*resolver, SocketAddr::new(own, port)))
        });
        let nameless = wanted.map_or_else(|| self.naming.names.nameless(), |wanted| wanted.nameless.clone());
        Queries { listening: listening.collect(), nameless }
    }

    /// Listens for them. Connections that were made while they went another way end: their queries would go on to go that way.
    pub(super) fn direct(&mut self, queries: Queries) {
        self.naming.listening.send_if_modified(|listening| {
            let changed = *listening != queries.listening;
            listening.clone_from(&queries.listening);
            changed
        });
        if self.table.state.is_err() || queries == self.naming.told && self.naming.failure.is_none() {
            return;
        }
        let before = &self.naming.told;
        let more = |resolver: &IpAddr| {
            !before.listening.contains_key(resolver) || !before.nameless.is_subset(&queries.nameless)
        };
        let mut failure = None;
        let (nobody, now) = (BTreeSet::new(), &queries.listening);
        // Where nobody listens any more, the answer to everything would be that there is nobody.
        let over = before.listening.keys().filter(|it| !now.contains_key(it)).map(|it| (it, &nobody));
        let new = now.keys().filter(|resolver| more(resolver)).map(|it| (it, &queries.nameless));
        for (resolver, but_for) in over.chain(new) {
            let forget = || conntrack::forget_queries(*resolver, but_for);
            match tokio::task::block_in_place(forget) {
                Ok(0) => {}
                Ok(connections) => {
                    tracing::info!(connections, %resolver, "queries go another way from now on")
                }
                Err(error) => {
                    tracing::warn!(%error, "pods whose queries went to a resolver before cannot ask it for a while");
                    failure = Some(error.to_string());
                }
            }
        }
        self.naming.failure = failure;
        self.naming.told = queries;
    }

    /// Names of rules without an address.
    pub(super) fn unresolved(&self) -> Vec<aegis_crds::UnresolvedHost> {
        let unresolved = self.naming.names.unresolved();
        let entry = |(host, why): (String, crate::names::Unresolved)| aegis_crds::UnresolvedHost {
            host,
            absent: why.absent,
            message: why.message,
        };
        unresolved.into_iter().map(entry).collect()
    }
}
