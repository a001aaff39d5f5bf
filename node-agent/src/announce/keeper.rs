//! Keeps the routes, and judges how far the announcement has come.

use super::health::Look;
use super::routes::{self, Key};
use super::{Facts, announced, held};
use crate::args::RoutingDaemon;
use aegis_core::egress::Egress;
use aegis_crds::AnnouncementMode;
use rtnetlink::Handle;
use std::collections::{BTreeMap, BTreeSet};

/// Why not everything is announced, or that it is, in the words of the condition.
pub mod reason {
    /// All of it.
    pub const ANNOUNCED: &str = "Announced";
    /// The agent has been told not to.
    pub const SWITCHED_OFF: &str = "SwitchedOff";
    /// The node drains, and others announce.
    pub const DRAINING: &str = "Draining";
    /// The data plane does not take packets for the address (yet).
    pub const NOT_PROGRAMMED: &str = "NotProgrammed";
    /// The kernel refuses a route.
    pub const ROUTE_FAILED: &str = "RouteFailed";
    /// The routing daemon does not answer.
    pub const DAEMON_SILENT: &str = "RoutingDaemonSilent";
    /// No BGP session is established.
    pub const NO_SESSION: &str = "NoSession";
    /// The routing daemon has told no neighbour (yet).
    pub const NOT_TOLD: &str = "NotTold";
    /// Nobody is known to answer ARP for an address (yet).
    pub const NOBODY_ANSWERS: &str = "NobodyAnswers";
    /// The node cannot take part in answering ARP.
    pub const ARP_FAILED: &str = "ArpFailed";
}

/// How far the announcement has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Everything is announced that should be.
    pub good: bool,
    /// Of [`reason`].
    pub reason: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
}

impl Standing {
    /// Of two kinds of announcement. What is wrong comes first.
    pub fn and(self, other: Standing) -> Standing {
        let (first, second) = if self.good && !other.good { (other, self) } else { (self, other) };
        let message = format!("{}; {}", first.message, second.message);
        Standing { message, good: first.good && second.good, ..first }
    }
}

/// The routes of one node.
#[derive(Clone, Debug, Default)]
pub struct Keeper {
    /// Addresses of which this node holds slices and that are to be announced by BGP.
    held: BTreeSet<Egress>,
    /// Of those and of what stays for the sake of flows: what has its routes.
    routed: BTreeSet<Egress>,
    /// This node drains.
    drains: bool,
    written: BTreeSet<Key>,
    errors: BTreeMap<Key, String>,
    /// Routes that somebody else had removed.
    pub repairs: u64,
}

impl Keeper {
    /// Addresses that are announced, as far as the kernel's tables go.
    pub fn routed(&self) -> &BTreeSet<Egress> {
        &self.routed
    }

    /// Brings the routes to what the facts say; true if some were written. `present` are the agent's routes in the kernel.
    pub async fn keep(
        &mut self,
        handle: &Handle,
        table: u32,
        facts: &Facts<'_>,
        present: &BTreeSet<Key>,
    ) -> bool {
        let outside = present.iter().filter(|(of, _)| *of != routes::MAIN);
        let announced = announced(facts, &outside.map(|(_, range)| *range).collect());
        self.held = held(facts, AnnouncementMode::BGP);
        self.drains = facts.drains();
        let wanted = routes::wanted(table, announced.values().flatten());
        let removed = self.written.intersection(&wanted).filter(|key| !present.contains(key)).count();
        if removed > 0 {
            tracing::warn!(removed, "somebody has removed routes of announced addresses; they are put back");
            self.repairs += removed as u64;
        }
        let errors = routes::bring(handle, &wanted, present).await;
        for (key, error) in errors.iter().filter(|(key, error)| self.errors.get(key) != Some(error)) {
            tracing::error!(table = key.0, to = %key.1, error, "cannot write a route");
        }
        self.errors = errors;
        self.written = wanted.iter().filter(|key| !self.errors.contains_key(key)).copied().collect();
        let written = |egress: &Egress| self.written.contains(&(table, egress.range()));
        let routed: BTreeSet<Egress> = announced.keys().copied().filter(written).collect();
        if routed != self.routed {
            tracing::info!(addresses = routed.len(), before = self.routed.len(), "announced routes");
        }
        self.routed = routed;
        wanted != *present
    }

    /// How far it has come; nothing if there is nothing to announce.
    pub fn standing(&self, table: u32, entry: bool, daemon: RoutingDaemon, look: &Look) -> Option<Standing> {
        let total = self.held.len();
        if total == 0 {
            return None;
        }
        let of = |count: usize| format!("{count} of {total} addresses");
        let bad = |reason, message| Some(Standing { good: false, reason, message });
        let routed = self.held.intersection(&self.routed).count();
        if table == 0 {
            let message = "agent.announcement.table is 0: no route is written, and prefixes that say BGP are not announced";
            return bad(reason::SWITCHED_OFF, format!("{}: {message}", of(0)));
        }
        if let Some(((table, range), error)) = self.errors.first_key_value() {
            let message = format!("cannot write the route to {range} in table {table}: {error}");
            return bad(reason::ROUTE_FAILED, format!("{}: {message}", of(routed)));
        }
        if routed < total {
            let (reason, why) = if !entry {
                (reason::NOT_PROGRAMMED, "this node does not take their packets: see the condition Ready")
            } else if self.drains {
                (
                    reason::DRAINING,
                    "the node is cordoned, being deleted or out of service, or its agent is leaving it, and others announce them",
                )
            } else {
                (reason::NOT_PROGRAMMED, "the data plane does not have the others yet")
            };
            return bad(reason, format!("{} are announced: {why}", of(routed)));
        }
        if daemon == RoutingDaemon::None {
            let message = format!(
                "{} are in routing table {table}; agent.announcement.routingDaemon names nobody who could tell whether the \
                 network knows",
                of(routed)
            );
            return Some(Standing { good: true, reason: reason::ANNOUNCED, message });
        }
        if let Some(failure) = &look.failure {
            let message = format!(
                "{failure}: what the network knows of {} may be out of date; restart the daemon, or cordon the node and end \
                 the daemon",
                of(routed)
            );
            return bad(reason::DAEMON_SILENT, message);
        }
        let sessions = format!("{} of {} BGP sessions are up", look.up(), look.sessions.len());
        if look.up() == 0 {
            return bad(
                reason::NO_SESSION,
                format!(
                    "{} are in routing table {table}, but {sessions}: look at the neighbours",
                    of(routed)
                ),
            );
        }
        let told = self.held.iter().filter(|address| look.told.get(address) == Some(&true)).count();
        if told < total {
            let message = format!(
                "a neighbour has been told of {}, and {sessions}: look whether the daemon reads table {table} and what its \
                 filters let out",
                of(told)
            );
            return bad(reason::NOT_TOLD, message);
        }
        let message = format!("neighbours have been told of {}; {sessions}", of(told));
        Some(Standing { good: true, reason: reason::ANNOUNCED, message })
    }
}

#[cfg(test)]
mod tests {
    use super::super::daemon::Session;
    use super::*;

    use std::net::Ipv4Addr;

    const A: Egress = Egress::V4(Ipv4Addr::new(203, 0, 113, 1));
    const B: Egress = Egress::V4(Ipv4Addr::new(203, 0, 113, 2));

    fn well() -> (Keeper, Look) {
        let keeper = Keeper { held: [A, B].into(), routed: [A, B].into(), ..Keeper::default() };
        let sessions = vec![Session { name: "r".into(), up: true }, Session { name: "s".into(), up: false }];
        (keeper, Look { sessions, failure: None, told: [(A, true), (B, true)].into() })
    }

    fn judged(keeper: &Keeper, look: &Look) -> (bool, &'static str, String) {
        let standing = keeper.standing(180, true, RoutingDaemon::FRR, look).unwrap();
        (standing.good, standing.reason, standing.message)
    }

    #[test]
    fn what_is_announced_is_counted() {
        let (keeper, look) = well();
        let (good, reason, message) = judged(&keeper, &look);
        assert!(good && reason == reason::ANNOUNCED, "{message}");
        assert_eq!(message, "neighbours have been told of 2 of 2 addresses; 1 of 2 BGP sessions are up");
        assert_eq!(Keeper::default().standing(180, true, RoutingDaemon::FRR, &look), None);
        let nobody = keeper.standing(180, true, RoutingDaemon::None, &Look::default()).unwrap();
        assert!(nobody.good && nobody.message.contains("routingDaemon"), "{nobody:?}");
    }

    #[test]
    fn two_kinds_are_good_if_both_are() {
        let [good, bad] = [true, false].map(|good| Standing {
            good,
            reason: if good { reason::ANNOUNCED } else { reason::NO_SESSION },
            message: good.to_string(),
        });
        let both = good.clone().and(bad.clone());
        assert_eq!(
            (both.good, both.reason, both.message.as_str()),
            (false, reason::NO_SESSION, "false; true")
        );
        assert_eq!(bad.and(good.clone()), both);
        assert!(good.clone().and(good).good);
    }

    #[test]
    fn each_way_not_to_be_announced_has_a_reason() {
        let (keeper, look) = well();
        let silent = Look { failure: Some("zebra does not answer".into()), ..look.clone() };
        assert_eq!(judged(&keeper, &silent).1, reason::DAEMON_SILENT);
        let alone = Look { sessions: vec![Session { name: "r".into(), up: false }], ..look.clone() };
        assert_eq!(judged(&keeper, &alone).1, reason::NO_SESSION);
        let untold = Look { told: [(A, true), (B, false)].into(), ..look.clone() };
        assert_eq!(judged(&keeper, &untold).1, reason::NOT_TOLD);
        assert!(judged(&keeper, &untold).2.contains("1 of 2 addresses"));
        let failed = Keeper { errors: [((180, A.range()), "File exists".into())].into(), ..keeper.clone() };
        assert_eq!(judged(&failed, &look).1, reason::ROUTE_FAILED);
        let pending = Keeper { routed: [A].into(), ..keeper.clone() };
        assert_eq!(judged(&pending, &look).1, reason::NOT_PROGRAMMED);
        assert_eq!(judged(&Keeper { drains: true, ..pending }, &look).1, reason::DRAINING);
        let off = keeper.standing(0, true, RoutingDaemon::FRR, &look).unwrap();
        assert!(!off.good && off.reason == reason::SWITCHED_OFF);
    }
}
