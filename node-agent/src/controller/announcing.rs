//! What a turn tells the network.

use super::Controller;
use crate::announce::{Facts, Standing};
use crate::desired::Inputs;
use crate::uplink;
use aegis_crds::AnnouncementMode;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
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
        let programmed: BTreeSet<Ipv4Addr> = self.pinned.observed.addresses.keys().copied().collect();
        let facts = Facts {
            node: &self.args.node_name,
            addresses: &inputs.addresses,
            modes: &modes,
            nodes: &inputs.nodes,
            programmed: &programmed,
            entry,
        };
        let table = self.args.announcement_table;
        if self.keeper.keep(&self.netlink, table, &facts, &network.announced).await {
            // Read back before the next comparison: the notification may come after it.
            self.signals.network.store(true, Ordering::Release);
        }
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
        self.keeper.standing(self.args.announcement_table, self.is_entry(), self.args.routing_daemon, &look)
    }
}
