use super::*;
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
    /// Flows, packets and refusals that there were.
    truth: (u64, u64, u64),
    reported: (u64, u64, u64),
}

fn key(origin: u8) -> MeterKey {
    MeterKey { egress: 1, remote: u32::from(origin) + 1, protocol: 6, binding: 3, ..MeterKey::default() }
}

fn refusal(origin: u8) -> RefusalKey {
    RefusalKey { remote: u32::from(origin) + 1, protocol: 6, binding: 3, ..RefusalKey::default() }
}

fn names() -> Names {
    let address = Ipv4Addr::from(1u32.to_ne_bytes());
    let rules = [(3, RuleName::Policy("partners".into()))].into();
    Names { rules: Arc::new(rules), addresses: [(address, 0)].into(), ..Names::default() }
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
            truth: (0, 0, 0),
            reported: (0, 0, 0),
        }
    }

    fn begin(&mut self, origin: u8) {
        let number = match (self.index.get(&key(origin)), self.free.pop()) {
            (Some(number), free) => {
                self.free.extend(free);
                *number
            }
            (None, Some(number)) => {
                self.index.insert(key(origin), number);
                number
            }
            (None, None) => {
                let rest = MeterKey { egress: 1, ..MeterKey::default() };
                self.index.get(&rest).copied().unwrap_or(REST_METER)
            }
        };
        self.flows.push(number);
        self.values[number as usize].flows += 1;
        let used = &mut self.used[number as usize];
        used.in_use += 1;
        used.peak = used.peak.max(used.in_use);
        self.truth.0 += 1;
    }

    fn end(&mut self, which: usize) {
        if !self.flows.is_empty() {
            let number = self.flows.remove(which % self.flows.len());
            self.used[number as usize].in_use -= 1;
        }
    }

    fn send(&mut self, which: usize) {
        if !self.flows.is_empty() {
            self.values[self.flows[which % self.flows.len()] as usize].sent_packets += 1;
            self.truth.1 += 1;
        }
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
            refusals: self.refusals.clone(),
            short: self.free.len() < 3,
        };
        let (rows, steps) = book.look(&look, Some(&names()));
        let sum = |of: fn(&Figures) -> u64| rows.iter().map(|row| of(&row.figures)).sum::<u64>();
        assert_eq!(sum(|it| it.in_use), self.flows.len() as u64, "ports in use, at this moment");
        assert!(sum(|it| it.peak) >= sum(|it| it.in_use));
        self.reported.0 += sum(|it| it.flows);
        self.reported.1 += sum(|it| it.sent.packets);
        self.reported.2 += sum(|it| it.refused.values().sum());
        assert_eq!(self.reported, self.truth, "nothing is lost, and nothing told twice");
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
                assert!(!self.flows.contains(&number), "a flow has the number");
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
            assert!(!self.flows.contains(number), "a flow has the number");
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
