//! What a turn tells the network.

use super::Controller;
use crate::announce::{Facts, Standing, l2};
use crate::desired::Inputs;
use crate::network::Network;
use crate::uplink;
use aegis_core::egress::Egress;
use aegis_crds::AnnouncementMode;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::sync::atomic::Ordering;

impl Controller {
    /// Keeps the routes of announced addresses. Until it is known what should be, what an agent before has announced stays.
    pub(super) async fn announce(&mut self, inputs: &Inputs, synced: bool) {
        let modes: BTreeMap<String, AnnouncementMode> = {
            let cluster = self.shared.lock();
            if !synced || !cluster.prefixes.listed {
                return;
            }
            cluster.prefixes.objects.iter().map(|((_, name), mode)| (name.clone(), *mode)).collect()
        };
        let entry = self.is_entry();
        let Ok(network) = &self.network else { return };
        let observed = &self.pinned.observed;
        let v4 = observed.addresses.keys().map(|address| observed.egress(*address));
        let programmed: BTreeSet<Egress> = v4.chain(observed.networks.keys().copied()).collect();
        let facts = Facts {
            node: &self.args.node_name,
            addresses: &inputs.addresses,
            networks: &inputs.networks,
            modes: &modes,
            nodes: &inputs.nodes,
            programmed: &programmed,
            entry,
        };
        self.answer(inputs, network, &facts);
        let table = self.args.announcement_table;
        if self.keeper.keep(&self.netlink, table, &facts, &network.announced).await {
            // Read back before the next comparison: the notification may come after it.
            self.signals.network.store(true, Ordering::Release);
        }
    }

    /// Takes part in the elections of who answers for addresses on the link.
    fn answer(&self, inputs: &Inputs, network: &Network, facts: &Facts<'_>) {
        if let (true, Some(plane)) = (self.l2.needs_table(), &self.pinned.plane) {
            match plane.answers() {
                Ok(table) => self.l2.take_table(table),
                Err(error) => tracing::error!(%error, "cannot answer for addresses on the link"),
            }
        }
        let uplinks: BTreeMap<u32, [u8; 6]> =
            self.devices.uplinks.iter().map(|(index, device)| (*index, device.mac)).collect();
        let answering = self.l2.outcome().answering;
        let observed = &self.pinned.observed;
        let live = observed.generations.get(&observed.config.generation);
        let pods = live.into_iter().flat_map(|live| &live.pods6);
        let suffixes: BTreeMap<Ipv6Addr, u32> = pods.map(|(pod, value)| (*pod, value.suffix)).collect();
        let wanted = l2::wanted(facts, inputs, network, &uplinks, &answering, &suffixes);
        self.l2.follow(wanted, &uplinks);
    }

    /// Whether what arrives at this node is taken: every uplink has its program, and somebody keeps its tables.
    fn is_entry(&self) -> bool {
        let attached = self.attached().uplinks;
        let Ok(network) = &self.network else { return false };
        self.pinned.plane.is_some()
            && !self.devices.uplinks.is_empty()
            && self.devices.uplinks.keys().all(|index| attached.contains_key(index))
            && uplink::absent(network, &self.args.uplinks).is_empty()
    }

    /// How far the announcement has come, if there is anything to announce.
    pub(super) fn standing(&self) -> Option<Standing> {
        let look = self.health.look(self.keeper.routed());
        let (table, daemon) = (self.args.announcement_table, self.args.routing_daemon);
        let by_bgp = self.keeper.standing(table, self.is_entry(), daemon, &look);
        match (by_bgp, self.l2.outcome().standing()) {
            (Some(by_bgp), Some(by_l2)) => Some(by_bgp.and(by_l2)),
            (by_bgp, by_l2) => by_bgp.or(by_l2),
        }
    }
}
