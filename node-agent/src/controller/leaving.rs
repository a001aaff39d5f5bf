//! What a turn does for an agent that is being taken off its node.

use super::Controller;
use crate::desired::Inputs;
use crate::leave;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Nothing depends on the agent for this long: what the operator gave the node before it heard that the agent is leaving has come by
/// then.
const CALM: Duration = Duration::from_secs(2);

impl Controller {
    pub(super) fn look_whether_to_leave(&mut self) {
        let leaving = self.signals.leaving.load(Ordering::Acquire);
        self.dirty |= leaving != self.leaving;
        self.leaving = leaving;
    }

    /// Says so when the operator has been told, the node's slices are empty, and the data plane knows.
    pub(super) fn look_whether_left(&mut self, inputs: &Inputs, now: Instant) {
        let told = || {
            let key = (String::new(), self.args.node_name.clone());
            self.shared.lock().reports.objects.get(&key).is_some_and(|report| report.leaving)
        };
        let up_to_date = self.leaving && self.synced && !self.dirty && told();
        let answering = self.l2.outcome().answering;
        let empty = up_to_date
            && leave::is_empty(
                &self.args.node_name,
                inputs.addresses.values().chain(inputs.networks.values()),
                &answering,
            );
        self.empty = empty.then(|| self.empty.unwrap_or(now));
        if self.empty.is_some_and(|since| now - since >= CALM) {
            self.signals.left.store(true, Ordering::Release);
        }
    }
}
