//! Elections of several nodes on one link, in simulated time.

use super::*;

const ADDRESS: Egress = Egress::V4(Ipv4Addr::new(203, 0, 113, 7));
const STEP: Duration = Duration::from_millis(10);
/// After so long without a fault, one node answers and no more.
const SETTLED: Duration = Duration::from_secs(3);

struct Node {
    name: String,
    mac: Mac,
    election: Election,
    /// Its data plane answers: this outlives the agent.
    flag: bool,
    /// Its agent runs.
    agent: bool,
    /// Nodes that reach each other are on the same side.
    side: u32,
    stands: bool,
    /// Its tunnel can be reached.
    tunnel: bool,
    /// Since when it has been out of reach, by who looks.
    away: BTreeMap<usize, Instant>,
}

/// What was sent: by whom, and what.
type Sent = (usize, Act);

struct Lan {
    now: Instant,
    nodes: Vec<Node>,
    sent: Vec<Sent>,
}

fn tunnel(at: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, at as u8)
}

impl Lan {
    /// Nodes in the order of their rank for the address.
    fn new(count: usize) -> Lan {
        let mut names: Vec<String> = (0..count).map(|at| format!("n{at}")).collect();
        names.sort_by(|a, b| outranks(ADDRESS, b, a).cmp(&outranks(ADDRESS, a, b)));
        let node = |(at, name): (usize, String)| Node {
            name,
            mac: [2, 0, 0, 0, 0, at as u8],
            election: Election::default(),
            flag: false,
            agent: true,
            side: 0,
            stands: true,
            tunnel: true,
            away: BTreeMap::new(),
        };
        let nodes = names.into_iter().enumerate().map(node).collect();
        let mut lan = Lan { now: Instant::now(), nodes, sent: Vec::new() };
        lan.follow();
        lan
    }

    fn wanted(&self, at: usize) -> Wanted {
        let all = || self.nodes.iter().enumerate();
        let others = all().filter(|(other, node)| *other != at && node.stands);
        let seat = Seat {
            stands: self.nodes[at].stands,
            others: others.map(|(_, node)| node.name.clone()).collect(),
            pods: BTreeSet::new(),
        };
        Wanted {
            node: self.nodes[at].name.clone(),
            seats: [(ADDRESS, seat)].into(),
            tunnels: all().map(|(at, node)| (node.name.clone(), tunnel(at))).collect(),
            macs: all().map(|(_, node)| (node.mac, node.name.clone())).collect(),
        }
    }

    /// Every agent learns what is wanted.
    fn follow(&mut self) {
        for at in 0..self.nodes.len() {
            let (wanted, now) = (self.wanted(at), self.now);
            let acts = self.nodes[at].election.follow(wanted, &BTreeSet::new(), now);
            self.act(at, acts);
        }
    }

    fn restart(&mut self, at: usize) {
        let (wanted, now) = (self.wanted(at), self.now);
        let kept = if self.nodes[at].flag { [ADDRESS].into() } else { BTreeSet::new() };
        self.nodes[at].agent = true;
        self.nodes[at].election = Election::default();
        let acts = self.nodes[at].election.follow(wanted, &kept, now);
        self.act(at, acts);
    }

    fn act(&mut self, at: usize, acts: Vec<Act>) {
        for act in acts {
            match act {
                Act::Answer(_) => self.nodes[at].flag = true,
                Act::Stop(_) => self.nodes[at].flag = false,
                Act::Announce(_) | Act::Ask(_) | Act::HandOver(_) => self.send(at, act),
            }
        }
    }

    fn send(&mut self, from: usize, act: Act) {
        self.sent.push((from, act));
        let (mac, side) = (self.nodes[from].mac, self.nodes[from].side);
        for to in 0..self.nodes.len() {
            if to == from || self.nodes[to].side != side {
                continue;
            }
            match act {
                Act::Announce(_) => self.tell(to, mac, Heard::Claim),
                // The data plane answers before the agent hears anything.
                _ if self.nodes[to].flag => self.tell(from, self.nodes[to].mac, Heard::Claim),
                Act::HandOver(_) => self.tell(to, mac, Heard::HandOver),
                _ => self.tell(to, mac, Heard::Question),
            }
        }
    }

    fn tell(&mut self, to: usize, mac: Mac, heard: Heard) {
        if self.nodes[to].agent {
            let acts = self.nodes[to].election.hear(ADDRESS, mac, heard, self.now);
            self.act(to, acts);
        }
    }

    /// How the others answer whom a node probes: silent after 600 ms, prompt again at once.
    fn answers(&mut self, at: usize) -> BTreeMap<Ipv4Addr, Answer> {
        let (now, side) = (self.now, self.nodes[at].side);
        let mut answers = BTreeMap::new();
        for peer in self.nodes[at].election.peers() {
            let other = usize::from(peer.octets()[3]);
            let reached = self.nodes[other].side == side && self.nodes[other].tunnel;
            if reached {
                self.nodes[at].away.remove(&other);
                answers.insert(peer, Answer::Prompt);
                continue;
            }
            let since = *self.nodes[at].away.entry(other).or_insert(now);
            let silent = now - since >= Duration::from_millis(600);
            answers.insert(peer, if silent { Answer::Silent } else { Answer::Prompt });
        }
        answers
    }

    /// Gives the longest time in which not exactly one node of each side that has one to answer did.
    fn run(&mut self, time: Duration) -> Duration {
        let end = self.now + time;
        let (mut wrong, mut longest) = (Duration::ZERO, Duration::ZERO);
        while self.now < end {
            self.now += STEP;
            for at in 0..self.nodes.len() {
                if self.nodes[at].agent {
                    let (answers, now) = (self.answers(at), self.now);
                    let acts = self.nodes[at].election.look(answers, now);
                    self.act(at, acts);
                }
            }
            wrong = if self.is_settled() { Duration::ZERO } else { wrong + STEP };
            longest = longest.max(wrong);
        }
        longest
    }

    fn is_settled(&self) -> bool {
        let sides: BTreeSet<u32> = self.nodes.iter().map(|node| node.side).collect();
        sides.into_iter().all(|side| {
            let here = || self.nodes.iter().filter(|node| node.side == side);
            let answering = here().filter(|node| node.flag).count();
            answering == 1 || answering == 0 && !here().any(|node| node.stands && node.agent)
        })
    }

    fn answering(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|at| self.nodes[*at].flag).collect()
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }
}

#[test]
fn when_nobody_answers_the_best_placed_takes_over_and_says_so_three_times() {
    let mut lan = Lan::new(3);
    let longest = lan.run(Lan::ms(2000));
    assert_eq!(lan.answering(), [0]);
    assert!(longest <= Lan::ms(600), "{longest:?}");
    let told: Vec<&Sent> = lan.sent.iter().filter(|(_, act)| matches!(act, Act::Announce(_))).collect();
    assert_eq!(told, vec![&(0, Act::Announce(ADDRESS)); 3]);
}

#[test]
fn a_better_placed_node_that_comes_later_leaves_who_answers_in_place() {
    let mut lan = Lan::new(3);
    (lan.nodes[0].agent, lan.nodes[1].agent) = (false, false);
    assert!(lan.run(SETTLED) <= Lan::ms(1200), "each waits for those before it");
    assert_eq!(lan.answering(), [2]);
    lan.restart(0);
    lan.restart(1);
    assert_eq!(lan.run(SETTLED), Duration::ZERO);
    assert_eq!(lan.answering(), [2]);
}

#[test]
fn who_is_cut_off_is_replaced_within_a_second_and_does_not_take_the_address_back() {
    for count in [2, 3, 5] {
        let mut lan = Lan::new(count);
        lan.run(SETTLED);
        lan.nodes[0].side = 1;
        let gap = lan.run(SETTLED);
        assert_eq!(lan.answering(), [0, 1], "of {count}: one on each side");
        assert!(gap < Duration::from_secs(1), "{gap:?}");
        lan.nodes[0].side = 0;
        let both = lan.run(SETTLED);
        assert_eq!(lan.answering(), [1], "of {count}: no flap back");
        assert!(both <= INTERVAL, "both answered for {both:?}");
    }
}

#[test]
fn who_stood_still_asks_before_it_goes_on() {
    let mut lan = Lan::new(3);
    lan.run(SETTLED);
    // Frozen as a whole, agent and data plane.
    (lan.nodes[0].side, lan.nodes[0].agent) = (1, false);
    lan.run(SETTLED);
    (lan.nodes[0].side, lan.nodes[0].agent) = (0, true);
    let both = lan.run(SETTLED);
    assert_eq!(lan.answering(), [1]);
    assert!(both <= INTERVAL, "both answered for {both:?}");
}

#[test]
fn an_agent_that_hangs_or_starts_again_changes_nothing() {
    let mut lan = Lan::new(3);
    lan.run(SETTLED);
    lan.nodes[0].agent = false;
    assert_eq!(lan.run(Duration::from_secs(100)), Duration::ZERO);
    lan.restart(0);
    assert_eq!(lan.run(SETTLED), Duration::ZERO);
    lan.nodes[0].agent = false;
    lan.run(SETTLED);
    lan.nodes[0].agent = true;
    assert_eq!(lan.run(SETTLED), Duration::ZERO);
    assert_eq!(lan.answering(), [0]);
}

#[test]
fn a_node_that_drains_hands_over_without_a_gap() {
    let mut lan = Lan::new(3);
    lan.run(SETTLED);
    for (leaves, next) in [(0, vec![1]), (1, vec![2]), (2, vec![2])] {
        lan.nodes[leaves].stands = false;
        lan.follow();
        assert_eq!(lan.run(SETTLED), Duration::ZERO, "{leaves} leaves");
        assert_eq!(lan.answering(), next, "the last one stays");
    }
    lan.nodes[1].stands = true;
    lan.follow();
    // It finds the one that wants to hand over, which goes on asking.
    assert_eq!(lan.run(2 * HAND_OVER), Duration::ZERO);
    assert_eq!(lan.answering(), [1]);
}

#[test]
fn an_address_that_is_given_up_is_left_to_the_others() {
    let mut lan = Lan::new(3);
    lan.run(SETTLED);
    let wanted = Wanted { seats: BTreeMap::new(), ..lan.wanted(0) };
    let acts = lan.nodes[0].election.follow(wanted, &BTreeSet::new(), lan.now);
    assert_eq!(acts, [Act::Stop(ADDRESS), Act::HandOver(ADDRESS)]);
    lan.act(0, acts);
    lan.nodes[0].stands = false;
    assert!(lan.run(SETTLED) <= INTERVAL, "at once, but for those before it that are not there");
    assert_eq!(lan.answering(), [1]);
}

#[test]
fn who_has_forgotten_that_it_answers_is_found_out() {
    let mut lan = Lan::new(3);
    lan.run(SETTLED);
    lan.nodes[0].flag = false;
    lan.nodes[0].agent = false;
    let gap = lan.run(2 * CHECK_PROMPT);
    assert!(gap <= CHECK_PROMPT + INTERVAL, "{gap:?}");
    assert_eq!(lan.answering(), [1]);
}

#[test]
fn one_whose_tunnel_alone_is_cut_goes_on() {
    let mut lan = Lan::new(3);
    lan.run(SETTLED);
    lan.nodes[0].tunnel = false;
    assert_eq!(lan.run(Duration::from_secs(20)), Duration::ZERO);
    assert_eq!(lan.answering(), [0]);
    // And is replaced all the same when it goes.
    lan.nodes[0].side = 1;
    let gap = lan.run(SETTLED);
    assert!(gap <= CHECK + INTERVAL, "{gap:?}");
}

#[test]
fn a_claim_by_a_stranger_is_contradicted_but_not_without_end() {
    let mut lan = Lan::new(2);
    lan.run(SETTLED);
    lan.sent.clear();
    for _ in 0..100 {
        lan.tell(0, [6; 6], Heard::Claim);
        lan.run(STEP);
    }
    assert_eq!(lan.answering(), [0]);
    assert_eq!(lan.sent, [(0, Act::Announce(ADDRESS))], "once in a second");
}

#[test]
fn of_two_that_answer_the_worse_placed_stops_at_once() {
    let mut lan = Lan::new(3);
    lan.run(SETTLED);
    // As if both had begun in the same instant.
    lan.nodes[2].flag = true;
    let wanted = lan.wanted(2);
    lan.nodes[2].election = Election { wanted: wanted.clone(), ..Election::default() };
    let own = Answering { told: 0, asked: None, ..certain(lan.now) };
    lan.nodes[2].election.stages.insert(ADDRESS, Stage::Answering(own));
    let both = lan.run(SETTLED);
    assert_eq!(lan.answering(), [0]);
    assert!(both <= STEP, "{both:?}");
}

#[test]
fn of_two_that_stop_for_each_others_sake_one_begins_again() {
    let mut lan = Lan::new(3);
    lan.run(SETTLED);
    for at in [0, 1] {
        lan.nodes[at].flag = true;
        lan.restart(at);
    }
    // Both ask, and the questions and answers cross.
    let macs = [lan.nodes[0].mac, lan.nodes[1].mac];
    lan.tell(0, macs[1], Heard::Claim);
    lan.tell(1, macs[0], Heard::Claim);
    assert!(lan.answering().is_empty());
    let gap = lan.run(SETTLED);
    assert_eq!(lan.answering().len(), 1);
    assert!(gap <= 2 * INTERVAL, "nobody answered for {gap:?}");
}

fn certain(now: Instant) -> Answering {
    match Answering::adopted(now) {
        Stage::Answering(own) => own,
        other => panic!("{other:?}"),
    }
}

/// Any faults, then none: one answers.
#[test]
fn whatever_happens_one_is_left() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for round in 0..200 {
        let count = 2 + random(4) as usize;
        let mut lan = Lan::new(count);
        let mut story = Vec::new();
        for _ in 0..1 + random(12) {
            let at = random(count as u64) as usize;
            let fault = random(5);
            story.push((at, fault));
            match fault {
                0 => lan.nodes[at].side = random(3) as u32,
                1 => lan.nodes[at].agent = false,
                2 => lan.restart(at),
                3 => {
                    lan.nodes[at].stands = !lan.nodes[at].stands;
                    lan.follow();
                }
                _ => lan.nodes[at].tunnel = !lan.nodes[at].tunnel,
            }
            lan.run(Lan::ms(random(2500)));
        }
        for at in 0..count {
            (lan.nodes[at].side, lan.nodes[at].stands, lan.nodes[at].tunnel) = (0, true, true);
            if !lan.nodes[at].agent {
                lan.restart(at);
            }
        }
        lan.follow();
        lan.run(SETTLED);
        assert_eq!(lan.answering().len(), 1, "round {round}, {count} nodes: {story:?}");
        let answers = lan.answering();
        assert_eq!(lan.run(SETTLED), Duration::ZERO);
        assert_eq!(lan.answering(), answers, "round {round}: it stays");
    }
}
