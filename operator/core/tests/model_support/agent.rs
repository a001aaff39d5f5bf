//! A node: its data plane follows objects, its pods open and close flows, its agent reports.

use super::state::*;
use super::{Cluster, Kind, View};
use aegis_core::holding::{Rights, may_follow};

/// The rights that an object gives to a node, and the slices that have an owner.
fn rights(object: &Object, node: usize) -> (Rights, bool) {
    let owned = object.slots.iter().flatten().any(|slot| !matches!(slot.state, SlotState::Quarantined(_)));
    (Rights::of(&object.address(), node_name(node)), owned)
}

/// The agent brings the data plane to what an object says. `partly`: it gets no further than what comes first (it is
/// killed, or what follows takes long).
pub fn program(cluster: &Cluster, last: &State, node: usize, view: View, partly: bool) -> Option<State> {
    let mut state = last.clone();
    let agent = &mut state.agents[node];
    agent.fresh |= agent.acquired.is_some() && view == View::Current && !partly;
    let before = agent.plane.unwrap_or(Plane { epoch: 0, open: 0, draining: 0, owned: false, fence: false });
    let after = match view.of(last).object {
        Some(object) => {
            let follows = may_follow(object.epoch.into(), before.epoch.into());
            if !follows && cluster.safeguards.epoch_at_agent {
                return None;
            }
            let (rights, owned) = rights(&object, node);
            let meanwhile = bits(rights.meanwhile(slice_set(before.open)));
            if partly && meanwhile == bits(rights.open) {
                return None;
            }
            let fence = object.fence.is_some();
            match partly {
                true => Plane { open: meanwhile, owned, fence, ..before },
                false => Plane {
                    epoch: object.epoch,
                    open: bits(rights.open),
                    draining: bits(rights.draining),
                    owned,
                    fence,
                },
            }
        }
        // Without object nothing is opened, and what nobody sends from is forgotten.
        None if before.open != 0 => Plane { open: 0, ..before },
        None if agent.settled && agent.flows == 0 && !before.owned => {
            agent.plane = None;
            return (state != *last).then_some(state);
        }
        None => return (state != *last).then_some(state),
    };
    let lost = before.open & !after.open;
    if agent.plane != Some(after) {
        agent.settled = false;
    }
    agent.late |= lost;
    agent.plane = Some(after);
    agent.normalise();
    (state != *last).then_some(state)
}

/// The agent reports. What it reported before is lost to whoever has not read it yet.
pub fn report(cluster: &Cluster, last: &State, node: usize) -> Option<State> {
    let mut state = last.clone();
    let agent = &last.agents[node];
    let settled = agent.settled || !cluster.safeguards.settled;
    let busy = settled.then(|| slice_set(agent.flows));
    let report = match agent.plane {
        Some(Plane { epoch, open, draining, fence, .. }) => {
            let rights = Rights { open: slice_set(open), draining: slice_set(draining) };
            let drained = rights.drained(epoch.into(), Some(epoch.into()), busy);
            Report { epoch: Some(epoch), drained: bits(drained), fenced: fence }
        }
        None => Report { epoch: None, drained: 0, fenced: false },
    };
    state.server.reports[node] = Some(report);
    if !cluster.lagging.contains(&Kind::Reports) {
        Kind::Reports.catch_up(&mut state);
    }
    (state != *last).then_some(state)
}

/// The machine stops: flows are gone, and so is all that the data plane had.
pub fn stop(agent: &mut Agent) {
    let linger = agent.linger | agent.flows;
    *agent = Agent { linger, settled: true, ..Agent::default() };
}
