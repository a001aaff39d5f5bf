//! Announcing by L2: one of the nodes that hold slices of an address answers ARP for it, or neighbour solicitations for the
//! addresses of a /64. The data plane answers, so that it goes on without the agent; who does is found out by the agents among
//! themselves ([`election`]).
//!
//! Routers know the addresses of a /64 one by one, and each node only those of its own pods. So when somebody claims the /64,
//! every node tells of its own at which MAC they are from then on.

pub mod arp;
pub mod election;
pub mod link;
mod multicast;
pub mod ndp;
mod wanted;

pub use wanted::wanted;

use super::{Standing, reason};
use crate::apply::{AnswerTable, Answering};
use crate::probe::Prober;
use aegis_core::egress::{Egress, Family};
use election::{Act, Election, Heard, Mac, Wanted};
use link::Link;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest time between two looks while there is an address to care for, in milliseconds.
const LOOK: u16 = 50;
/// The same while there is none.
const IDLE: u16 = 1000;

/// Where an address stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Addresses that this node answers for.
    pub answering: BTreeSet<Egress>,
    /// Addresses that it may answer for, and another node does.
    pub followed: BTreeSet<Egress>,
    /// Addresses that it may answer for, and for which nobody is known to answer.
    pub vacant: BTreeSet<Egress>,
    /// Tunnel addresses of nodes that are to be probed.
    pub peers: BTreeSet<Ipv4Addr>,
    /// Why this node cannot take part.
    pub failure: Option<String>,
}

impl Outcome {
    /// How far the announcement has come; nothing if there is nothing to announce.
    pub fn standing(&self) -> Option<Standing> {
        if let Some(failure) = &self.failure {
            return Some(Standing { good: false, reason: reason::ARP_FAILED, message: failure.clone() });
        }
        let (own, others) = (self.answering.len(), self.followed.len());
        if let Some(address) = self.vacant.first() {
            let message = format!(
                "nobody is known to answer for {} addresses, {address} among them: this node does soon, unless another one \
                 does",
                self.vacant.len()
            );
            return Some(Standing { good: false, reason: reason::NOBODY_ANSWERS, message });
        }
        let message =
            format!("answers for {own} of {} addresses, and other nodes for the rest", own + others);
        (own + others > 0).then_some(Standing { good: true, reason: reason::ANNOUNCED, message })
    }
}

/// Takes part in the elections. Shared by the controller, who tells what is wanted, the prober, who knows first that a node is
/// silent, and the thread that listens.
#[derive(Clone)]
pub struct L2 {
    state: Arc<Mutex<State>>,
    prober: Prober,
    changed: Arc<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    election: Election,
    links: BTreeMap<(u32, Family), Link>,
    table: Option<Box<dyn AnswerTable>>,
    /// What is in the table.
    entries: BTreeMap<(Egress, u32), Answering>,
    outcome: Outcome,
}

impl L2 {
    /// `changed` is called whenever the outcome has.
    pub fn new(prober: Prober, changed: impl Fn() + Send + Sync + 'static) -> L2 {
        L2 { state: Arc::default(), prober, changed: Arc::new(changed) }
    }

    /// Where things stand.
    pub fn outcome(&self) -> Outcome {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).outcome.clone()
    }

    /// Whether the table of the data plane is still to be given.
    pub fn needs_table(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).table.is_none()
    }

    /// Takes the table of the data plane, with what an agent before has left in it.
    pub fn take_table(&self, table: Box<dyn AnswerTable>) {
        self.with(|state| match table.read() {
            Ok(entries) => (state.table, state.entries) = (Some(table), entries),
            Err(error) => state.fail(format!("cannot read for which addresses this node answers: {error}")),
        });
    }

    /// Follows what is wanted on these uplinks (MAC by interface index).
    pub fn follow(&self, wanted: Wanted, uplinks: &BTreeMap<u32, Mac>) {
        self.with(|state| {
            if state.table.is_none() {
                return;
            }
            let answering = state.answering();
            let families = wanted.seats.keys().chain(&answering).map(|egress| egress.family()).collect();
            if let Err(error) = state.listen(&families, uplinks) {
                // Who does not hear others must not take over from them.
                return state.fail(format!("cannot listen to what is said on the link: {error}"));
            }
            state.outcome.failure = None;
            let acts = state.election.follow(wanted, &answering, Instant::now());
            // Uplinks may have changed too.
            state.sync();
            state.act(&acts);
            self.look_at(state);
        });
    }

    /// Does what is due.
    pub fn look(&self) {
        self.with(|state| self.look_at(state));
    }

    fn look_at(&self, state: &mut State) {
        if state.outcome.failure.is_none() {
            let acts = state.election.look(self.prober.answers(), Instant::now());
            state.act(&acts);
        }
    }

    /// Listens and takes part, without end.
    pub fn run(&self) {
        loop {
            let (links, pause) = self.with(|state| {
                let pause = match state.election.next() {
                    _ if state.election.is_idle() => IDLE,
                    _ if state.outcome.failure.is_some() => LOOK,
                    Some(next) => {
                        let left = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                        u16::try_from(left.as_millis()).unwrap_or(LOOK).min(LOOK)
                    }
                    None => LOOK,
                };
                (state.links.values().cloned().collect::<Vec<Link>>(), pause)
            });
            link::wait(&links, pause);
            self.with(|state| {
                let all =
                    links.iter().flat_map(|link| link.heard().into_iter().map(move |said| (link, said)));
                for (link, (address, mac, heard)) in all {
                    // A link may lead to two devices of this node.
                    if state.outcome.failure.is_some() || state.links.values().any(|link| link.mac == mac) {
                        continue;
                    }
                    let acts = state.election.hear(address, mac, heard, Instant::now());
                    if heard == Heard::Claim && state.election.believes(address, &mac) {
                        state.election.pods(address).for_each(|pod| drop(link.tell(pod, mac)));
                    }
                    if acts == [Act::Announce(address)] && !state.election.knows(&mac) {
                        let mac = mac.map(|octet| format!("{octet:02x}")).join(":");
                        tracing::warn!(%address, mac, "a stranger claims an egress address");
                    }
                    state.act(&acts);
                }
                self.look_at(state);
            });
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let (result, changed) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let before = state.outcome.clone();
            let result = work(&mut state);
            let election = &state.election;
            let (followed, vacant, peers) = (election.followed(), election.vacant(), election.peers());
            let failure = state.outcome.failure.take();
            state.outcome = Outcome { answering: state.answering(), followed, vacant, peers, failure };
            (result, before != state.outcome)
        };
        if changed {
            (self.changed)();
        }
        result
    }
}

impl State {
    fn fail(&mut self, error: String) {
        if self.outcome.failure.as_ref() != Some(&error) {
            tracing::error!(error, "cannot take part in who answers for addresses");
        }
        self.outcome.failure = Some(error);
    }

    /// Has a socket for each uplink and family, and no others.
    fn listen(&mut self, families: &BTreeSet<Family>, uplinks: &BTreeMap<u32, Mac>) -> std::io::Result<()> {
        self.links.retain(|(index, family), link| {
            families.contains(family) && uplinks.get(index) == Some(&link.mac)
        });
        for (index, mac) in uplinks {
            for family in families
                .iter()
                .filter(|family| !self.links.contains_key(&(*index, **family)))
                .collect::<Vec<_>>()
            {
                self.links.insert((*index, *family), Link::open(*index, *mac, *family)?);
            }
        }
        Ok(())
    }

    /// The links on which an address is spoken of.
    fn links_of(&self, address: Egress) -> impl Iterator<Item = &Link> {
        self.links.values().filter(move |link| link.is_for(address))
    }

    /// Addresses that the data plane answers for.
    fn answering(&self) -> BTreeSet<Egress> {
        self.entries.keys().map(|(address, _)| *address).collect()
    }

    /// Carries out what the election says: first the data plane, then what others are told.
    fn act(&mut self, acts: &[Act]) {
        if acts.iter().any(|act| matches!(act, Act::Answer(_) | Act::Stop(_))) {
            self.sync();
        }
        for act in acts {
            // What cannot be sent is said again, or not needed: whoever does not hear this node finds out by itself.
            match act {
                Act::Answer(address) => tracing::info!(%address, "answers for it from now on"),
                Act::Stop(address) => tracing::info!(%address, "leaves it to others to answer"),
                Act::Announce(address) => {
                    for link in self.links_of(*address) {
                        let _ = link.announce(*address);
                        self.election.pods(*address).for_each(|pod| drop(link.tell(pod, link.mac)));
                    }
                }
                Act::Ask(address) => self.links_of(*address).for_each(|link| drop(link.ask(*address))),
                Act::HandOver(address) => {
                    self.links_of(*address).for_each(|link| drop(link.hand_over(*address)));
                }
            }
        }
    }

    /// Brings the table to what the election says.
    fn sync(&mut self) {
        if self.table.is_none() {
            return;
        }
        let mut wanted: BTreeMap<(Egress, u32), Answering> = BTreeMap::new();
        for address in self.election.answering() {
            let links = self.links.iter().filter(|(_, link)| link.is_for(address));
            wanted.extend(links.map(|((index, _), link)| {
                ((address, *index), Answering { mac: link.mac, multicast: false })
            }));
        }
        let before = devices6(&self.entries);
        for index in devices6(&wanted) {
            // Before the first answer, and again should somebody have switched it off.
            match multicast::set(index, true) {
                Ok(switched) => {
                    let ours =
                        switched || self.entries.iter().any(|((_, at), it)| *at == index && it.multicast);
                    let here = wanted.iter_mut().filter(|((egress, at), _)| *at == index && is_six(*egress));
                    here.for_each(|(_, entry)| entry.multicast = ours);
                }
                Err(error) => {
                    self.fail(format!("cannot hear who asks for IPv6 addresses: {error}"));
                    wanted.retain(|(egress, at), _| *at != index || !is_six(*egress));
                }
            }
        }
        let ours = |index: &u32| self.entries.iter().any(|((_, at), it)| at == index && it.multicast);
        let left: Vec<u32> = before.difference(&devices6(&wanted)).copied().filter(ours).collect();
        let gone = self.entries.keys().filter(|key| !wanted.contains_key(*key)).map(|key| (*key, None));
        let new = wanted.iter().filter(|(key, value)| self.entries.get(*key) != Some(*value));
        let changes: Vec<((Egress, u32), Option<Answering>)> =
            gone.chain(new.map(|(key, value)| (*key, Some(*value)))).collect();
        let mut failure = None;
        for ((address, index), value) in changes {
            let Some(table) = &mut self.table else { return };
            match table.set(address, index, value) {
                Ok(()) => match value {
                    Some(value) => _ = self.entries.insert((address, index), value),
                    None => _ = self.entries.remove(&(address, index)),
                },
                Err(error) => failure = Some(error),
            }
        }
        for index in left {
            // The device may be gone.
            let _ = multicast::set(index, false);
        }
        if let Some(error) = failure {
            self.fail(format!("cannot write for which addresses this node answers: {error}"));
        }
    }
}

fn is_six(egress: Egress) -> bool {
    egress.family() == Family::V6
}

/// Devices on which /64s are answered for.
fn devices6(entries: &BTreeMap<(Egress, u32), Answering>) -> BTreeSet<u32> {
    entries.keys().filter(|(egress, _)| is_six(*egress)).map(|(_, index)| *index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_counts_and_names_what_is_wrong() {
        let address = |last| Egress::from(Ipv4Addr::new(203, 0, 113, last));
        let judged = |outcome: &Outcome| outcome.standing().map(|it| (it.good, it.reason, it.message));
        assert_eq!(judged(&Outcome::default()), None);
        let well = Outcome {
            answering: [address(1)].into(),
            followed: [address(2), address(3)].into(),
            ..Outcome::default()
        };
        let message = "answers for 1 of 3 addresses, and other nodes for the rest".to_owned();
        assert_eq!(judged(&well), Some((true, reason::ANNOUNCED, message)));
        let vacant = Outcome { vacant: [address(4)].into(), ..well.clone() };
        let (good, reason, message) = judged(&vacant).unwrap();
        assert!(!good && reason == reason::NOBODY_ANSWERS && message.contains("203.0.113.4"), "{message}");
        let failed = Outcome { failure: Some("cannot listen".to_owned()), ..well };
        assert_eq!(judged(&failed), Some((false, reason::ARP_FAILED, "cannot listen".to_owned())));
    }
}
