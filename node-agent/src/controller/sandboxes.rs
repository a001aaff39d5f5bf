//! Between the container runtime and the data plane: what the one says of pods, and what the other knows of them.

use super::{Controller, Signals};
use crate::nri::{self, Known};
use std::collections::BTreeSet;
use std::net::IpAddr;

impl Controller {
    pub(super) fn look_at_sandboxes(&mut self) {
        if !Signals::take(&self.signals.runtime) {
            return;
        }
        let told = {
            let cluster = self.shared.lock();
            let watched = cluster.pods.objects.values();
            let named = watched.flat_map(|pod| [pod.uid.as_str(), pod.kubelet_uid.as_str()]);
            let named: BTreeSet<&str> =
                named.chain(self.cni.iter().map(|result| result.uid.as_str())).collect();
            self.sandboxes.told(|uid| named.contains(uid), nri::now())
        };
        self.dirty |= told != self.told;
        self.told = told;
    }

    /// Whoever waits for a pod to be known, or to be known no more, looks at this.
    pub(super) fn publish_known(&self) {
        let able = self.pinned.plane.is_some() && self.shared.lock().pods.error.is_none();
        let policy = self.in_force.as_ref().map(|force| &force.wanted.policy);
        let v4 = policy.into_iter().flat_map(|policy| &policy.pods);
        let v6 = policy.into_iter().flat_map(|policy| &policy.pods6);
        let addresses = v4
            .map(|(address, pod)| (IpAddr::from(*address), pod.incarnation))
            .chain(v6.map(|(address, pod)| (IpAddr::from(*address), pod.incarnation)))
            .collect();
        let new = Known { addresses, able };
        self.sandboxes.publish(|known| {
            let changed = *known != new;
            *known = new;
            changed
        });
    }
}
