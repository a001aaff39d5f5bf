//! Who answers ARP for an egress address, or neighbour solicitations for a /64: exactly one of the nodes that hold slices of it. Without the control plane, from
//! what is said on the link and from the probes that nodes send each other. Pure: time is passed in.
//!
//! Who answers goes on (nothing moves because a node comes back or is better placed) until it is silent, hands over, or hears
//! that somebody else answers. Whoever may have missed something asks before it insists.

use crate::probe::Answer;
use aegis_core::announcer::outranks;
use aegis_core::egress::Egress;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Address of a device.
pub type Mac = [u8; 6];

/// Time between two questions or announcements, and by which each node that is worse placed waits longer to take over.
pub const INTERVAL: Duration = Duration::from_millis(200);
/// Time between two questions to one that has answered before: its data plane does so at once.
const SOON: Duration = Duration::from_millis(50);
/// Questions, or announcements, in a row.
const TIMES: u32 = 3;
/// Time without a look after which this node may have missed everything. Others may have taken over sooner: then they say so.
const STOOD_STILL: Duration = Duration::from_secs(2);
/// How often one is asked that does not answer probes through the tunnel, but does answer ARP.
const CHECK: Duration = Duration::from_secs(1);
/// How often one is asked that does answer probes, in case it has forgotten that it is to answer ARP.
const CHECK_PROMPT: Duration = Duration::from_secs(30);
/// How often one that wants to hand over and finds nobody asks after the first questions.
const HAND_OVER: Duration = Duration::from_secs(5);
/// How often the one who answers says so, should an announcement have been lost.
const REFRESH: Duration = Duration::from_secs(60);

/// What it depends on who answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Name of this node.
    pub node: String,
    /// Addresses that one node is to answer for.
    pub seats: BTreeMap<Egress, Seat>,
    /// Tunnel address of each node, where probes go.
    pub tunnels: BTreeMap<String, Ipv4Addr>,
    /// Nodes by the MAC that they have on a link of this node.
    pub macs: BTreeMap<Mac, String>,
}

/// One address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// This node may answer. If not, and it does, it goes on until another one does.
    pub stands: bool,
    /// Other nodes that may.
    pub others: BTreeSet<String>,
    /// Of a /64, the addresses in it that pods of this node have: neighbours are told of each.
    pub pods: BTreeSet<Ipv6Addr>,
}

/// What is to be done, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// From now on the data plane answers.
    Answer(Egress),
    /// It does not any more.
    Stop(Egress),
    /// Everybody on the link is told that the address is here.
    Announce(Egress),
    /// Everybody on the link is asked who answers.
    Ask(Egress),
    /// The same by one that wants somebody else to.
    HandOver(Egress),
}

/// What somebody else on the link says of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// That it is there.
    Claim,
    /// Nothing: it asks who answers (an address probe, RFC 5227).
    Question,
    /// That somebody else is to answer, who may be doing so already.
    HandOver,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nobody is known to answer.
    Asking { asked: u32, next: Instant },
    /// Nobody answers. This node does from then on, unless a better one has begun to.
    Waiting { until: Instant },
    /// Somebody else does.
    Following(Following),
    /// This node does.
    Answering(Answering),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Following {
    mac: Mac,
    /// It answers probes.
    prompt: bool,
    /// Questions since it was heard last.
    asked: u32,
    next: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answering {
    /// Announcements since it began.
    told: u32,
    /// When the next one is due.
    next: Instant,
    /// No claim is answered before then, lest two go on without end.
    insist: Instant,
    /// Questions so far, where it is not certain that nobody else answers.
    asked: Option<u32>,
    ask: Instant,
    /// All others are silent.
    alone: bool,
    /// All others fell silent while this node answered: it may be that it was cut off, and one of them has taken over.
    missed: bool,
}

impl Answering {
    /// Answers since an agent before has begun to: whether somebody else does too is asked first.
    fn adopted(now: Instant) -> Stage {
        let unknown = Answering {
            told: TIMES,
            next: now,
            insist: now,
            asked: Some(0),
            ask: now,
            alone: false,
            missed: false,
        };
        Stage::Answering(unknown)
    }
}

fn asking(now: Instant) -> Stage {
    Stage::Asking { asked: 0, next: now }
}

/// Who answers for each address, as far as this node knows.
#[derive(Clone, Debug, Default)]
pub struct Election {
    wanted: Wanted,
    stages: BTreeMap<Egress, Stage>,
    answers: BTreeMap<Ipv4Addr, Answer>,
    looked: Option<Instant>,
}

impl Election {
    /// Follows what is wanted. For addresses in `answering` the data plane answers already.
    pub fn follow(&mut self, wanted: Wanted, answering: &BTreeSet<Egress>, now: Instant) -> Vec<Act> {
        let mut gone: BTreeSet<Egress> = answering.iter().copied().chain(self.answering()).collect();
        self.stages.retain(|address, stage| match (wanted.seats.get(address), stage) {
            (Some(seat), stage) => seat.stands || matches!(stage, Stage::Answering(_)),
            (None, _) => false,
        });
        for (address, seat) in &wanted.seats {
            gone.remove(address);
            if answering.contains(address) {
                self.stages.entry(*address).or_insert(Answering::adopted(now));
            } else if seat.stands {
                self.stages.entry(*address).or_insert(asking(now));
            }
        }
        self.wanted = wanted;
        gone.into_iter().flat_map(|address| [Act::Stop(address), Act::HandOver(address)]).collect()
    }

    /// Somebody else has said something of an address.
    pub fn hear(&mut self, address: Egress, mac: Mac, heard: Heard, now: Instant) -> Vec<Act> {
        let view = View { wanted: &self.wanted, answers: &self.answers };
        let (Some(stage), Some(seat)) = (self.stages.get_mut(&address), view.wanted.seats.get(&address))
        else {
            return Vec::new();
        };
        let follow = |mac| {
            let prompt = view.answer(&mac) == Some(Answer::Prompt);
            let next = now + if prompt { CHECK_PROMPT } else { CHECK };
            Stage::Following(Following { mac, prompt, asked: 0, next })
        };
        match (stage, heard) {
            (stage @ Stage::Following(_), Heard::Question | Heard::HandOver) => {
                match stage {
                    Stage::Following(other) if other.mac != mac => {}
                    _ if heard == Heard::HandOver => *stage = view.waiting(address, seat, now),
                    // It may have forgotten that it answers.
                    Stage::Following(other) if other.asked == 0 => (other.asked, other.next) = (1, now),
                    _ => {}
                }
                Vec::new()
            }
            (_, Heard::Question | Heard::HandOver) => Vec::new(),
            (Stage::Answering(own), Heard::Claim) => {
                let other = view.wanted.macs.get(&mac);
                let yields = !seat.stands
                    || own.asked.is_some()
                    || own.missed
                    || other.is_some_and(|other| outranks(address, other, &view.wanted.node));
                if yields {
                    let mut stage = follow(mac);
                    // It may have stopped for this node's sake in the same instant.
                    if let Stage::Following(other) = &mut stage {
                        (other.asked, other.next) = (1, now + SOON);
                    }
                    if seat.stands {
                        self.stages.insert(address, stage);
                    } else {
                        self.stages.remove(&address);
                    }
                    return vec![Act::Stop(address)];
                }
                if now < own.insist {
                    return Vec::new();
                }
                own.insist = now + if other.is_some() { INTERVAL } else { CHECK };
                vec![Act::Announce(address)]
            }
            (stage, Heard::Claim) => {
                *stage = follow(mac);
                Vec::new()
            }
        }
    }

    /// Does what is due. `answers`: how the nodes answer that are probed.
    pub fn look(&mut self, answers: BTreeMap<Ipv4Addr, Answer>, now: Instant) -> Vec<Act> {
        // It may have missed everything meanwhile.
        let stood_still =
            self.looked.is_some_and(|looked| now.saturating_duration_since(looked) > STOOD_STILL);
        self.looked = (!self.stages.is_empty()).then_some(now);
        let before = std::mem::replace(&mut self.answers, answers);
        let view = View { wanted: &self.wanted, answers: &self.answers };
        let mut acts = Vec::new();
        for (address, stage) in &mut self.stages {
            let Some(seat) = view.wanted.seats.get(address) else { continue };
            match stage {
                Stage::Asking { .. } | Stage::Waiting { .. } if stood_still => *stage = asking(now),
                Stage::Answering(own) if stood_still => (own.asked, own.ask) = (Some(0), now),
                _ => {}
            }
            let due = match stage {
                Stage::Asking { asked, next } if now >= *next => {
                    if *asked < TIMES {
                        (*asked, *next) = (*asked + 1, now + INTERVAL);
                        acts.push(Act::Ask(*address));
                        continue;
                    }
                    view.waiting(*address, seat, now)
                }
                Stage::Following(other) => {
                    let Some(stage) = view.look_after(other, *address, seat, now, &mut acts) else {
                        continue;
                    };
                    stage
                }
                Stage::Answering(own) => {
                    view.go_on(own, *address, seat, &before, now, &mut acts);
                    continue;
                }
                Stage::Waiting { .. } => *stage,
                Stage::Asking { .. } => continue,
            };
            *stage = due;
            if matches!(due, Stage::Waiting { until } if now >= until) {
                acts.push(Act::Answer(*address));
                let own = Answering {
                    told: 0,
                    next: now,
                    insist: now,
                    asked: None,
                    ask: now,
                    alone: view.alone(seat),
                    missed: false,
                };
                *stage = Stage::Answering(own);
                if let Stage::Answering(own) = stage {
                    view.go_on(own, *address, seat, &before, now, &mut acts);
                }
            }
        }
        acts
    }

    /// When there is something to be done next, unless somebody says something before.
    pub fn next(&self) -> Option<Instant> {
        let due = |stage: &Stage| match stage {
            Stage::Asking { next, .. } => *next,
            Stage::Waiting { until } => *until,
            Stage::Following(other) => other.next,
            Stage::Answering(own) => own.asked.map_or(own.next, |_| own.ask),
        };
        self.stages.values().map(due).min()
    }

    /// Whether this is the MAC of a node.
    pub fn knows(&self, mac: &Mac) -> bool {
        self.wanted.macs.contains_key(mac)
    }

    /// Whether this node takes the word of one that claims an address, in an election or without part in it.
    pub fn believes(&self, address: Egress, mac: &Mac) -> bool {
        match self.stages.get(&address) {
            Some(Stage::Following(other)) => other.mac == *mac,
            Some(_) => false,
            None => self.knows(mac),
        }
    }

    /// Addresses of this node's pods in a /64.
    pub fn pods(&self, address: Egress) -> impl Iterator<Item = Ipv6Addr> + '_ {
        self.wanted.seats.get(&address).into_iter().flat_map(|seat| seat.pods.iter().copied())
    }

    /// Whether there is any address to care for.
    pub fn is_idle(&self) -> bool {
        self.stages.is_empty()
    }

    /// Addresses that this node answers for.
    pub fn answering(&self) -> BTreeSet<Egress> {
        let own = self.stages.iter().filter(|(_, stage)| matches!(stage, Stage::Answering(_)));
        own.map(|(address, _)| *address).collect()
    }

    /// Addresses that another node answers for.
    pub fn followed(&self) -> BTreeSet<Egress> {
        let others = self.stages.iter().filter(|(_, stage)| matches!(stage, Stage::Following(_)));
        others.map(|(address, _)| *address).collect()
    }

    /// Addresses for which nobody is known to answer.
    pub fn vacant(&self) -> BTreeSet<Egress> {
        let open = |stage: &&Stage| matches!(stage, Stage::Asking { .. } | Stage::Waiting { .. });
        self.stages.iter().filter(|(_, stage)| open(stage)).map(|(address, _)| *address).collect()
    }

    /// Tunnel addresses of the nodes that are to be probed: who answers, and for one's own addresses whoever could take over.
    pub fn peers(&self) -> BTreeSet<Ipv4Addr> {
        let mut names: BTreeSet<&String> = BTreeSet::new();
        for (address, stage) in &self.stages {
            match stage {
                Stage::Following(other) => names.extend(self.wanted.macs.get(&other.mac)),
                Stage::Answering(_) => {
                    names.extend(self.wanted.seats.get(address).into_iter().flat_map(|seat| &seat.others));
                }
                Stage::Asking { .. } | Stage::Waiting { .. } => {}
            }
        }
        names.into_iter().filter_map(|name| self.wanted.tunnels.get(name)).copied().collect()
    }
}

/// What a stage is judged by.
#[derive(Clone, Copy)]
struct View<'a> {
    wanted: &'a Wanted,
    answers: &'a BTreeMap<Ipv4Addr, Answer>,
}

impl View<'_> {
    fn answer_of(&self, node: &str) -> Option<Answer> {
        self.answers.get(self.wanted.tunnels.get(node)?).copied()
    }

    fn answer(&self, mac: &Mac) -> Option<Answer> {
        self.answer_of(self.wanted.macs.get(mac)?)
    }

    fn is_silent(&self, node: &str) -> bool {
        matches!(self.answer_of(node), Some(Answer::Silent | Answer::Lost))
    }

    fn alone(&self, seat: &Seat) -> bool {
        !seat.others.is_empty() && seat.others.iter().all(|other| self.is_silent(other))
    }

    /// Nodes that are to take over before this one.
    fn rank(&self, address: Egress, seat: &Seat) -> u32 {
        let better = |other: &&String| outranks(address, other, &self.wanted.node) && !self.is_silent(other);
        seat.others.iter().filter(better).count() as u32
    }

    fn waiting(&self, address: Egress, seat: &Seat, now: Instant) -> Stage {
        Stage::Waiting { until: now + INTERVAL * self.rank(address, seat) }
    }

    /// Somebody else answers: does it still? The next stage, if it does not.
    fn look_after(
        &self,
        other: &mut Following,
        address: Egress,
        seat: &Seat,
        now: Instant,
        acts: &mut Vec<Act>,
    ) -> Option<Stage> {
        let prompt = self.answer(&other.mac) == Some(Answer::Prompt);
        if prompt != other.prompt {
            other.prompt = prompt;
            if !prompt {
                (other.asked, other.next) = (0, now);
            } else if other.asked == 0 {
                other.next = now + CHECK_PROMPT;
            }
        }
        if now < other.next {
            return None;
        }
        // Two look after it: that is enough, and many would be a burden.
        if prompt && other.asked == 0 && self.rank(address, seat) > 1 {
            other.next = now + CHECK_PROMPT;
            return None;
        }
        if other.asked < TIMES {
            (other.asked, other.next) = (other.asked + 1, now + SOON);
            acts.push(Act::Ask(address));
            return None;
        }
        Some(self.waiting(address, seat, now))
    }

    /// This node answers: says so when it is time to, and asks where it is in doubt.
    fn go_on(
        &self,
        own: &mut Answering,
        address: Egress,
        seat: &Seat,
        before: &BTreeMap<Ipv4Addr, Answer>,
        now: Instant,
        acts: &mut Vec<Act>,
    ) {
        let alone = self.alone(seat);
        own.missed |= alone && !own.alone;
        if own.alone && !alone && std::mem::take(&mut own.missed) {
            (own.asked, own.ask) = (Some(0), now);
        }
        own.alone = alone;
        let returned = |other: &String| {
            let Some(tunnel) = self.wanted.tunnels.get(other) else { return false };
            matches!(before.get(tunnel), Some(Answer::Silent | Answer::Lost)) && !self.is_silent(other)
        };
        // Who was away may answer too.
        if seat.others.iter().any(returned) {
            own.next = now;
        }
        if !seat.stands && own.asked.is_none() {
            (own.asked, own.ask) = (Some(0), now);
        }
        match own.asked {
            Some(_) if now < own.ask => {}
            Some(_) if !seat.stands && seat.others.is_empty() => own.ask = now + INTERVAL,
            Some(asked) if !seat.stands || asked < TIMES => {
                let pause = if asked < TIMES { INTERVAL } else { HAND_OVER };
                (own.asked, own.ask) = (Some(asked + 1), now + pause);
                acts.push(if seat.stands { Act::Ask(address) } else { Act::HandOver(address) });
            }
            Some(_) => (own.asked, own.next) = (None, now),
            None => {}
        }
        if own.asked.is_none() && now >= own.next {
            own.told = own.told.saturating_add(1);
            own.next = now + if own.told < TIMES { INTERVAL } else { REFRESH };
            acts.push(Act::Announce(address));
        }
    }
}

#[cfg(test)]
#[path = "election_tests.rs"]
mod tests;
