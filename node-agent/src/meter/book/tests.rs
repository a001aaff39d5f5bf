use super::*;
use aegis_common::mapped;
use proptest::prelude::*;

/// Numbers of meters.
const SIZE: usize = 12;

/// The maps, with what really happened.
struct Plane {
    index: BTreeMap<MeterKey, u32>,
    free: Vec<u32>,
    values: [MeterValue; SIZE],
    used: [MeterUse; SIZE],
    refusals: BTreeMap<RefusalKey, u64>,
    told: Told,
    /// Meters of live flows.
    flows: Vec<u32>,
    /// The same over IPv6: they end without a word.
    flows6: Vec<u32>,
    /// Datagrams over IPv6 whose first fragment got the meter of its flow. Nothing gets it from them.
    datagrams: Vec<u32>,
    /// Programs that have found a flow over IPv6, which has been forgotten since, and are about to give its meter to a datagram.
    hands: Vec<u32>,
    /// Flows, packets and refusals that there were.
    truth: (u64, u64, u64),
    reported: (u64, u64, u64),
}

const NETWORK: Network = [9, 9];

fn key(origin: u8) -> MeterKey {
    let (egress, remote) = (metered_egress(1), mapped(u32::from(origin) + 1));
    MeterKey { egress, remote, protocol: 6, binding: 3, ..MeterKey::default() }
}

fn key6(origin: u8) -> MeterKey {
    MeterKey { egress: NETWORK, remote: [9, 9, 9, u32::from(origin)], ..key(origin) }
}

fn refusal(origin: u8) -> RefusalKey {
    let remote = if origin.is_multiple_of(2) { key(origin).remote } else { key6(origin).remote };
    RefusalKey { remote, protocol: 6, binding: 3, ..RefusalKey::default() }
}

fn of(network: Network) -> Egress {
    egress(network, &Singles::new())
}

fn names() -> Names {
    let rules = [(3, RuleName::Policy("partners".into()))].into();
    let addresses = [(of(metered_egress(1)), 0), (of(NETWORK), 0)].into();
    Names { rules: Arc::new(rules), addresses, ..Names::default() }
}

impl Plane {
    fn new() -> Plane {
        Plane {
            index: BTreeMap::new(),
            free: (1..SIZE as u32).collect(),
            values: [MeterValue::default(); SIZE],
            used: [MeterUse::default(); SIZE],
            refusals: BTreeMap::new(),
            told: Told::default(),
            flows: Vec::new(),
            flows6: Vec::new(),
            datagrams: Vec::new(),
            hands: Vec::new(),
            truth: (0, 0, 0),
            reported: (0, 0, 0),
        }
    }

    fn number(&mut self, key: MeterKey, rest: MeterKey) -> u32 {
        let number = match (self.index.get(&key), self.free.pop()) {
            (Some(number), free) => {
                self.free.extend(free);
                *number
            }
            (None, Some(number)) => {
                self.index.insert(key, number);
                number
            }
            (None, None) => self.index.get(&rest).copied().unwrap_or(REST_METER),
        };
        self.values[number as usize].flows += 1;
        self.truth.0 += 1;
        number
    }

    fn begin(&mut self, origin: u8) {
        let number = self.number(key(origin), MeterKey { egress: metered_egress(1), ..MeterKey::default() });
        self.flows.push(number);
        let used = &mut self.used[number as usize];
        used.in_use += 1;
        used.peak = used.peak.max(used.in_use);
    }

    fn begin6(&mut self, origin: u8) {
        let number = self.number(key6(origin), MeterKey::rest_of(NETWORK));
        self.flows6.push(number);
    }

    fn forget(&mut self, which: usize, in_hand: bool) {
        let which = which % (self.flows6.len() + self.datagrams.len()).max(1);
        if which < self.flows6.len() {
            let number = self.flows6.remove(which);
            self.hands.extend(in_hand.then_some(number));
        } else if !self.datagrams.is_empty() {
            self.datagrams.remove(which - self.flows6.len());
        }
    }

    fn end(&mut self, which: usize) {
        if !self.flows.is_empty() {
            let number = self.flows.remove(which % self.flows.len());
            self.used[number as usize].in_use -= 1;
        }
    }

    fn send(&mut self, which: usize) {
        let flows = self.flows.iter().chain(&self.flows6).chain(&self.datagrams).collect::<Vec<_>>();
        if !flows.is_empty() {
            self.values[*flows[which % flows.len()] as usize].sent_packets += 1;
            self.truth.1 += 1;
        }
    }

    /// A packet of which no flow is known.
    fn receive(&mut self) {
        let number = self.index.get(&MeterKey::rest_of(NETWORK)).copied().unwrap_or(REST_METER);
        self.values[number as usize].received_packets += 1;
        self.truth.1 += 1;
    }

    fn look(&mut self, book: &mut Book) {
        let numbers: BTreeSet<u32> = self.index.values().copied().chain(book.numbers()).collect();
        let take = |number: u32| {
            let used = self.used[number as usize];
            self.used[number as usize].peak = used.in_use;
            (number, (used, self.values[number as usize]))
        };
        let look = Look {
            linked: self.index.clone(),
            meters: numbers.into_iter().map(take).collect(),
            held: self.flows6.iter().chain(&self.datagrams).copied().collect(),
            refusals: self.refusals.clone(),
            short: self.free.len() < 3,
        };
        let (rows, steps) = book.look(&look, Some(&names()));
        let sum = |of: fn(&Figures) -> u64| rows.iter().map(|row| of(&row.figures)).sum::<u64>();
        assert_eq!(sum(|it| it.in_use), self.flows.len() as u64, "ports in use, at this moment");
        assert!(sum(|it| it.peak) >= sum(|it| it.in_use));
        self.reported.0 += sum(|it| it.flows);
        self.reported.1 += sum(|it| it.sent.packets + it.received.packets);
        self.reported.2 += sum(|it| it.refused.values().sum());
        assert_eq!(self.reported, self.truth, "nothing is lost, and nothing told twice");
        self.datagrams.append(&mut self.hands);
        steps.iter().for_each(|step| self.follow(step));
    }

    fn follow(&mut self, step: &Step) {
        match *step {
            Step::Told(number, value) => _ = self.told.meters.insert(number, value),
            Step::ToldRefusals(key, count) => _ = self.told.refusals.insert(key, count),
            Step::Retire(key, number) => {
                assert_eq!(self.index.remove(&key), Some(number));
                let retired = MeterKey { flags: key.flags | METER_RETIRED, ..key };
                assert!(self.index.insert(retired, number).is_none());
            }
            Step::Free(key, number) => {
                let mut held = self.flows.iter().chain(&self.flows6).chain(&self.datagrams);
                assert!(!held.any(|it| *it == number), "a flow has the number");
                assert_eq!(self.index.remove(&key), Some(number));
                self.values[number as usize] = MeterValue::default();
                self.used[number as usize] = MeterUse::default();
                self.told.meters.remove(&number);
                self.free.insert(0, number);
            }
            Step::Forget(key) => {
                self.refusals.remove(&key);
                self.told.refusals.remove(&key);
            }
            Step::Keep(key) => {
                if let Some(number) = self.free.pop() {
                    assert!(self.index.insert(key, number).is_none());
                }
            }
        }
    }

    /// An agent that starts gives out what is not in the index.
    fn restart(&mut self, rule: &str) -> Book {
        let linked: BTreeSet<u32> = self.index.values().copied().collect();
        self.free = (1..SIZE as u32).filter(|number| !linked.contains(number)).collect();
        for number in &self.free {
            let held = self.flows.iter().chain(&self.flows6).chain(&self.datagrams).chain(&self.hands);
            assert!(!held.copied().any(|it| it == *number), "a flow has the number");
            self.values[*number as usize] = MeterValue::default();
            self.used[*number as usize] = MeterUse::default();
        }
        let rules = Some(Arc::new([(3, RuleName::Policy(rule.to_owned()))].into()));
        Book::new(Told { rules, ..self.told.clone() })
    }
}

#[derive(Clone, Debug)]
enum Event {
    Begin(u8),
    Begin6(u8),
    /// A flow over IPv6 is forgotten; perhaps a program has just found it.
    Forget(usize, bool),
    Receive,
    End(usize),
    Send(usize),
    Refuse(u8),
    Look,
    Quiet,
    /// Whether rules are numbered otherwise.
    Restart(bool),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0u8..20).prop_map(Event::Begin),
        6 => (0u8..20).prop_map(Event::Begin6),
        5 => any::<(usize, bool)>().prop_map(|(which, in_hand)| Event::Forget(which, in_hand)),
        1 => Just(Event::Receive),
        5 => any::<usize>().prop_map(Event::End),
        6 => any::<usize>().prop_map(Event::Send),
        2 => (0u8..4).prop_map(Event::Refuse),
        4 => Just(Event::Look),
        1 => Just(Event::Quiet),
        1 => any::<bool>().prop_map(Event::Restart),
    ]
}

proptest! {
    #[test]
    fn nothing_is_lost_and_nothing_told_twice(events in prop::collection::vec(event(), 1..200)) {
        let (mut plane, mut book) = (Plane::new(), Book::default());
        for event in events {
            match event {
                Event::Begin(origin) => plane.begin(origin),
                Event::Begin6(origin) => plane.begin6(origin),
                Event::Forget(which, in_hand) => plane.forget(which, in_hand),
                Event::Receive => plane.receive(),
                Event::End(which) => plane.end(which),
                Event::Send(which) => plane.send(which),
                Event::Refuse(origin) => {
                    *plane.refusals.entry(refusal(origin)).or_default() += 1;
                    plane.truth.2 += 1;
                }
                Event::Look => plane.look(&mut book),
                Event::Quiet => (0..STILL + 3).for_each(|_| plane.look(&mut book)),
                Event::Restart(renamed) => {
                    book = plane.restart(if renamed { "of before" } else { "partners" });
                }
            }
        }
        plane.look(&mut book);
    }
}

/// Looks once, with nothing but this index.
fn look_at(book: &mut Book, key: MeterKey, names: Option<&Names>) -> Vec<Row> {
    let value = MeterValue { received_packets: 1, ..MeterValue::default() };
    let told = book.meters.get(&1).map(|meter| meter.told).unwrap_or_default();
    let meters = [(1, (MeterUse::default(), told.plus(&value)))].into();
    book.look(&Look { linked: [(key, 1)].into(), meters, ..Look::default() }, names).0
}

#[test]
fn the_rest_of_a_64_is_told_as_whose_it_is_then() {
    let mut book = Book::default();
    let whose = |names: &[&str]| {
        let whose = |(number, name): (usize, &&str)| {
            let name = AllocationName { account: "shop".into(), name: (*name).into() };
            (number as u32, Whose { name, site: String::new(), sole: BTreeMap::new() })
        };
        names.iter().enumerate().map(whose).collect::<BTreeMap<_, _>>()
    };
    let names = |number| Names {
        allocations: whose(&["first", "second"]),
        addresses: [(of(NETWORK), number)].into(),
        ..Names::default()
    };
    let mut told = |names: Option<&Names>| {
        let rows = look_at(&mut book, MeterKey::rest_of(NETWORK), names);
        assert_eq!((rows.len(), rows[0].figures.received.packets), (1, 1));
        assert_eq!(rows[0].key.address, Some(address(of(NETWORK))));
        rows[0].key.allocation.clone()
    };
    assert_eq!(told(None), "", "before the agent knows anything");
    // What came before is of then.
    assert_eq!(told(Some(&names(0))), "");
    assert_eq!(told(Some(&names(0))), "first");
    assert_eq!(told(Some(&names(1))), "first");
    assert_eq!(told(Some(&names(1))), "second");
}

#[test]
fn what_began_by_a_rule_of_a_new_agent_is_told_by_its_name() {
    let policy = |name: &str| RuleName::Policy(name.into());
    let former: Rules = [(3, policy("of before"))].into();
    let current = [(3, policy("another")), (7, policy("new"))].into();
    let names = Names { rules: Arc::new(current), ..names() };
    for (binding, expected) in [(7, "policy/new"), (3, "policy/of before")] {
        let mut book = Book::new(Told { rules: Some(Arc::new(former.clone())), ..Told::default() });
        let rows = look_at(&mut book, MeterKey { binding, ..key(0) }, Some(&names));
        assert_eq!(rows[0].key.rule, expected);
        let retired = book.meters[&1].is_retired();
        assert_eq!(retired, binding == 3, "whose name may be another's begins anew");
    }
}
