//! What goes wrong when: a pure function of the seed.

use std::fmt;

/// Length of an outage, a freeze or a cut, in seconds.
type Seconds = u32;

/// Something that goes wrong, or changes. Nodes are given by their position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL to a node's agent.
    KillAgent(usize),
    /// SIGKILL to an operator, the leader or not.
    KillOperator(usize),
    /// No API server.
    StopApiServer(Seconds),
    /// The victim hangs.
    Freeze(Seconds),
    /// The victim is cut off.
    Cut(Seconds),
    /// `kubectl rollout restart` of the agents.
    RollAgents,
    /// An edit of a binding of another account.
    EditBeside,
    /// An edit of the loaded account's binding that changes nothing for its flows.
    EditLoaded,
    /// Another account opens many connections from a node, and closes them after some seconds.
    Burst(usize, Seconds),
}

/// Kinds of faults, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// [`Fault::KillAgent`].
    KillAgent,
    /// [`Fault::KillOperator`].
    KillOperator,
    /// [`Fault::StopApiServer`].
    StopApiServer,
    /// [`Fault::Freeze`].
    Freeze,
    /// [`Fault::Cut`].
    Cut,
    /// [`Fault::RollAgents`].
    RollAgents,
    /// [`Fault::EditBeside`].
    EditBeside,
    /// [`Fault::EditLoaded`].
    EditLoaded,
    /// [`Fault::Burst`].
    Burst,
}

impl Fault {
    /// Its kind.
    pub fn kind(self) -> Kind {
        match self {
            Fault::KillAgent(_) => Kind::KillAgent,
            Fault::KillOperator(_) => Kind::KillOperator,
            Fault::StopApiServer(_) => Kind::StopApiServer,
            Fault::Freeze(_) => Kind::Freeze,
            Fault::Cut(_) => Kind::Cut,
            Fault::RollAgents => Kind::RollAgents,
            Fault::EditBeside => Kind::EditBeside,
            Fault::EditLoaded => Kind::EditLoaded,
            Fault::Burst(..) => Kind::Burst,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::KillAgent(node) => write!(f, "the agent of n{} is killed", node + 1),
            Fault::KillOperator(_) => write!(f, "an operator is killed"),
            Fault::StopApiServer(seconds) => write!(f, "no API server for {seconds} s"),
            Fault::Freeze(seconds) => write!(f, "the victim hangs for {seconds} s"),
            Fault::Cut(seconds) => write!(f, "the victim is cut off for {seconds} s"),
            Fault::RollAgents => write!(f, "the agents are rolled"),
            Fault::EditBeside => write!(f, "another account's binding is edited"),
            Fault::EditLoaded => write!(f, "the loaded binding is edited"),
            Fault::Burst(node, seconds) => {
                write!(f, "another account's connections from n{} for {seconds} s", node + 1)
            }
        }
    }
}

/// A fault and when it begins, in seconds from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Second.
    pub at: Seconds,
    /// What happens.
    pub fault: Fault,
}

/// A whole run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// The one node that hangs and is cut off; the others are alive all along.
    pub victim: usize,
    /// In order of time.
    pub events: Vec<Event>,
}

/// All kinds, those that come more often several times.
const BAG: [Kind; 13] = [
    Kind::KillAgent,
    Kind::KillAgent,
    Kind::KillAgent,
    Kind::KillOperator,
    Kind::StopApiServer,
    Kind::Freeze,
    Kind::Cut,
    Kind::RollAgents,
    Kind::EditBeside,
    Kind::EditLoaded,
    Kind::EditLoaded,
    Kind::Burst,
    Kind::Burst,
];

/// Seconds at the end of a run in which nothing new begins.
const CALM: Seconds = 15;
/// Shortest time between two rolls of the agents.
const BETWEEN_ROLLS: Seconds = 40;
/// After an outage of the API server: until objects are edited again.
const API_BACK: Seconds = 5;

impl Schedule {
    /// The schedule of a seed for a run of so many seconds on so many nodes. The same arguments give the same schedule.
    pub fn new(seed: u64, seconds: Seconds, nodes: usize) -> Schedule {
        let mut chance = Chance(seed);
        let victim = chance.below(nodes as u32) as usize;
        let mut events = Vec::new();
        let mut bag: Vec<Kind> = Vec::new();
        let (mut victim_back, mut api_back, mut rolled) = (0, 0, None::<Seconds>);
        let mut at = 2 + chance.below(3);
        while at + CALM < seconds {
            if bag.is_empty() {
                bag = BAG.to_vec();
                chance.shuffle(&mut bag);
            }
            let possible = |kind: &Kind| match kind {
                Kind::Freeze | Kind::Cut => at >= victim_back,
                Kind::StopApiServer => at >= api_back + API_BACK,
                Kind::RollAgents => at >= api_back && rolled.is_none_or(|then| at >= then + BETWEEN_ROLLS),
                Kind::EditBeside | Kind::EditLoaded | Kind::Burst => at >= api_back,
                Kind::KillAgent | Kind::KillOperator => true,
            };
            // The next that is possible now; with none, a pause.
            if let Some(position) = bag.iter().position(possible) {
                let kind = bag.remove(position);
                let node = chance.below(nodes as u32) as usize;
                let short = 4 + chance.below(7);
                let fault = match kind {
                    Kind::KillAgent => Fault::KillAgent(node),
                    Kind::KillOperator => Fault::KillOperator(node),
                    Kind::StopApiServer => Fault::StopApiServer(2 * short),
                    Kind::Freeze => Fault::Freeze(short),
                    Kind::Cut => Fault::Cut(short),
                    Kind::RollAgents => Fault::RollAgents,
                    Kind::EditBeside => Fault::EditBeside,
                    Kind::EditLoaded => Fault::EditLoaded,
                    Kind::Burst => Fault::Burst(node, short),
                };
                match fault {
                    Fault::Freeze(length) | Fault::Cut(length) => victim_back = at + length + API_BACK,
                    Fault::StopApiServer(length) => api_back = at + length + API_BACK,
                    Fault::RollAgents => rolled = Some(at),
                    _ => {}
                }
                events.push(Event { at, fault });
            }
            at += 2 + chance.below(4);
        }
        Schedule { victim, events }
    }
}

/// SplitMix64: small, and the same everywhere and for ever.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u32) -> u32 {
        (self.next() % u64::from(limit.max(1))) as u32
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u32 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_schedule_and_another_one_another() {
        let first = Schedule::new(7, 300, 3);
        assert_eq!(first, Schedule::new(7, 300, 3));
        assert_ne!(first, Schedule::new(8, 300, 3));
        // Written down, so that a seed in an old report still means the same.
        assert_eq!(first.victim, 0);
        assert_eq!(first.events[0], Event { at: 2, fault: Fault::KillAgent(0) });
    }

    #[test]
    fn everything_happens_in_order_within_the_time_and_one_thing_of_a_kind_at_once() {
        for seed in 0..200 {
            let schedule = Schedule::new(seed, 90, 3);
            assert!(schedule.victim < 3);
            let kinds: BTreeSet<Kind> = schedule.events.iter().map(|event| event.fault.kind()).collect();
            assert!(kinds.len() >= 7, "seed {seed}: {kinds:?}");
            assert!(schedule.events.is_sorted_by_key(|event| event.at));
            let (mut victim_back, mut api_back) = (0, 0);
            for event in &schedule.events {
                assert!(event.at + CALM < 90);
                match event.fault {
                    Fault::Freeze(length) | Fault::Cut(length) => {
                        assert!(event.at >= victim_back, "seed {seed}: one victim, one fault at a time");
                        victim_back = event.at + length;
                    }
                    Fault::StopApiServer(length) => {
                        assert!(event.at >= api_back, "seed {seed}");
                        api_back = event.at + length;
                    }
                    Fault::KillAgent(_) | Fault::KillOperator(_) => {}
                    _ => assert!(event.at >= api_back, "seed {seed}: {} without an API server", event.fault),
                }
            }
        }
        let long = Schedule::new(1, 600, 3);
        let kinds: BTreeSet<Kind> = long.events.iter().map(|event| event.fault.kind()).collect();
        assert_eq!(kinds.len(), 9);
        assert!(long.events.len() > 130, "{}", long.events.len());
    }
}
