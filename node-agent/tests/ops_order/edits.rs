//! Edits of policies: whatever a packet meets of the tables while they are written, it is judged as before or as afterwards.

use super::simple;
use super::world::{World, pods};
use aegis_common::{
    ACTION_ALLOCATE, ACTION_FORBID, ACTION_PASS, DESTINATION_INTERNAL, VerdictValue, observed,
};
use aegis_core::policy::{EgressPolicy, Exit, Identity, PortRange, Posture, RuleName};
use aegis_node_agent::desired::{Desired, desired};
use aegis_node_agent::observed::Observed;
use aegis_node_agent::ops::{Known, Named, Op, Transition, transition};
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

const RANGES: [&str; 6] = [
    "198.51.100.0/24",
    "198.51.100.128/25",
    "198.51.100.200/32",
    "203.0.113.0/24",
    "198.51.100.0/23",
    "203.0.113.64/26",
];
const DESTINATIONS: [Ipv4Addr; 6] = [
    Ipv4Addr::new(198, 51, 100, 1),
    Ipv4Addr::new(198, 51, 100, 129),
    Ipv4Addr::new(198, 51, 100, 200),
    Ipv4Addr::new(203, 0, 113, 65),
    Ipv4Addr::new(192, 0, 2, 200),
    Ipv4Addr::new(10, 96, 0, 1),
];
/// Destination ports of TCP; 0 = of whatever has none.
const PORTS: [u16; 4] = [0, 80, 443, 8001];

/// Label of the pods, precedence, ranges, ports, exit, and whether it only observes.
#[derive(Clone, Debug)]
struct Rule {
    label: u8,
    precedence: i32,
    ranges: Vec<usize>,
    ports: u8,
    exit: u8,
    observes: bool,
}

fn rule() -> impl Strategy<Value = Rule> {
    let ranges = prop::collection::vec(0..RANGES.len(), 1..3);
    (0u8..3, 0..4, ranges, 0u8..5, 0u8..4, prop::bool::weighted(0.2)).prop_map(
        |(label, precedence, ranges, ports, exit, observes)| Rule {
            label,
            precedence,
            ranges,
            ports,
            exit,
            observes,
        },
    )
}

impl Rule {
    fn policy(&self, name: usize) -> EgressPolicy {
        let ports = |first, last| vec![PortRange { protocol: 6, first, last }];
        let leave = |name: &str| Exit::Allocations { primary: name.into(), secondary: None };
        EgressPolicy {
            name: format!("p{name}"),
            precedence: self.precedence,
            identity: Identity {
                labels: [("app".to_owned(), format!("l{}", self.label))].into(),
                ..Identity::default()
            },
            posture: Posture::default(),
            countries: Vec::new(),
            applications: Vec::new(),
            observes: self.observes,
            sources: Vec::new(),
            cidrs: self.ranges.iter().map(|range| RANGES[*range].parse().unwrap()).collect(),
            hosts: Vec::new(),
            ports: match self.ports {
                0 => ports(443, 443),
                1 => ports(80, 443),
                2 => ports(8000, 8001),
                _ => Vec::new(),
            },
            exit: match self.exit {
                0 => leave("a0"),
                1 => leave("a1"),
                2 => Exit::Default,
                _ => Exit::Deny,
            },
            generation: 1,
        }
    }
}

/// Policies, labels of the pods, and whether everything else is refused.
#[derive(Clone, Debug)]
struct State {
    rules: Vec<(usize, Rule)>,
    pods: Vec<(u8, u8)>,
    rest: bool,
}

fn state() -> impl Strategy<Value = State> {
    let rules = prop::collection::vec(rule(), 1..5).prop_map(|rules| rules.into_iter().enumerate().collect());
    let pods = prop::collection::vec(0u8..3, 1..5).prop_map(|labels| (2..).zip(labels).collect());
    (rules, pods, prop::bool::weighted(0.8)).prop_map(|(rules, pods, rest)| State { rules, pods, rest })
}

/// One rule, one pod or both are others; or everything is.
fn edited(before: State) -> impl Strategy<Value = (State, State)> {
    let kinds = (0u8..9, any::<prop::sample::Index>(), rule(), 0u8..3, state());
    kinds.prop_map(move |(kind, place, rule, label, other)| {
        let mut after = before.clone();
        let at = place.index(after.rules.len());
        match kind {
            0 => after.rules[at].1.exit = rule.exit,
            1 => after.rules[at].1.ranges = rule.ranges,
            2 => after.rules[at].1.ports = rule.ports,
            3 => after.rules[at].1.precedence = rule.precedence,
            4 => after.rules.push((7, rule)),
            5 => _ = after.rules.remove(at),
            6 => after.rules[at].1 = rule,
            7 => {
                let at = place.index(after.pods.len());
                after.pods[at].1 = label;
                after.rules[0].1.exit = rule.exit;
            }
            _ => after = other,
        }
        (before.clone(), after)
    })
}

fn wanted(state: &State) -> Desired {
    let dedicated = |owner| Some((owner, vec![(0, 3), (1, 3)]));
    let world = World {
        pods: state.pods.clone(),
        bindings: Vec::new(),
        addresses: vec![dedicated(0), dedicated(1), None, None],
        ..simple()
    };
    let mut inputs = world.inputs(1);
    inputs.policies = state.rules.iter().map(|(name, rule)| rule.policy(*name)).collect();
    if state.rest {
        let rest = Rule { label: 0, precedence: 9, ranges: vec![], ports: 9, exit: 9, observes: false };
        let everything = vec!["0.0.0.0/0".parse().unwrap()];
        let policy = rest.policy(99);
        let rest = EgressPolicy { cidrs: everything, identity: Identity::default(), ..policy };
        inputs.policies.push(rest);
    }
    desired(&inputs)
}

/// What a program finds that looks at these states, in this order, for the policy's generation, the three classes, the verdict, and the
/// one for whatever port. `None`: the pod is unknown.
fn found(states: [&Observed; 6], pod: Ipv4Addr, destination: Ipv4Addr, port: u16) -> Option<VerdictValue> {
    let generation = states[0].config.generation;
    let of = |state: usize| states[state].generations.get(&generation);
    let class = of(1)?.pods.get(&pod)?.class;
    let ranges = of(2).into_iter().flat_map(|policy| &policy.destinations);
    let around = ranges.filter(|(range, _)| range.contains(&IpAddr::V4(destination)));
    let Some((_, to)) = around.max_by_key(|(range, _)| range.prefix_len()) else {
        return Some(VerdictValue::default());
    };
    if *to == DESTINATION_INTERNAL {
        return Some(VerdictValue::default());
    }
    let ports = of(3).into_iter().flat_map(|policy| &policy.ports);
    let with = ports.filter(|((protocol, first, length), _)| {
        let host = 16 - u32::from(*length);
        port != 0 && *protocol == 6 && u32::from(*first) >> host == u32::from(port) >> host
    });
    let by = with.max_by_key(|((.., length), _)| *length).map_or(0, |(_, class)| *class);
    let verdict = |state: usize, port| of(state)?.verdicts.get(&(class, *to, port)).copied();
    Some(verdict(4, by).or_else(|| verdict(5, 0)).unwrap_or_default())
}

/// The packets that are looked at.
fn packets() -> impl Iterator<Item = (Ipv4Addr, Ipv4Addr, u16)> {
    let to = |pod| DESTINATIONS.into_iter().flat_map(move |to| PORTS.map(move |port| (pod, to, port)));
    pods().flat_map(to)
}

/// Writes one by one. Fails if some packet is judged by something that is neither as before nor as after, whichever of the states
/// between two grace periods it meets; `seed` says which ones are tried.
fn write(maps: &mut Observed, ops: &[Op], mut seed: u64) -> Result<(), TestCaseError> {
    let old = maps.clone();
    let mut new = maps.clone();
    ops.iter().for_each(|op| new.apply(op));
    let mut dice = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let judged: Vec<_> = packets()
        .map(|packet| {
            let (pod, to, port) = packet;
            (packet, [&old, &new].map(|state| found([state; 6], pod, to, port)))
        })
        .collect();
    let check =
        |((pod, to, port), [was, will]): &(_, [Option<VerdictValue>; 2]), states: [&Observed; 6], op: &Op| {
            let now = found(states, *pod, *to, *port);
            // A pod that goes may be unknown for a moment, before another one has its address.
            let unknown = now.is_none() && was.is_some() != will.is_some();
            // Its last packets are judged like those of pods that are left, and never uncovered.
            let passes = |verdict: &Option<VerdictValue>| verdict.is_none_or(|it| it.action == ACTION_PASS);
            let last = will.is_none() && (passes(was) || !passes(&now));
            prop_assert!(
                now == *was || now == *will || unknown || last,
                "{} to {}:{} is {:?} at {:?}, was {:?}, is to be {:?}",
                pod,
                to,
                port,
                now,
                op,
                was,
                will
            );
            Ok(())
        };
    let mut window = vec![maps.clone()];
    for (at, op) in ops.iter().enumerate() {
        maps.apply(op);
        for packet in &judged {
            check(packet, [&*maps; 6], op)?;
        }
        window.push(maps.clone());
        if *op != Op::Settle && at + 1 < ops.len() {
            continue;
        }
        for packet in &judged {
            for _ in 0..4 {
                let mut times = [0; 6].map(|_| dice(window.len()));
                times.sort_unstable();
                check(packet, times.map(|time| &window[time]), op)?;
            }
        }
        window = vec![maps.clone()];
    }
    Ok(())
}

/// What the maps say, in names.
type Told = (u16, Option<String>, Option<RuleName>, Option<RuleName>);

/// What is told of a packet by the maps, and what the desired state says.
fn told(maps: &Observed, change: &Transition, (pod, to, port): (Ipv4Addr, Ipv4Addr, u16)) -> Option<Told> {
    let verdict = found([maps; 6], pod, to, port)?;
    let rule = |number: u32| change.rules.get(&number).cloned();
    let named = |number| change.numbers.iter().find(|(_, it)| **it == u32::from(number));
    let allocation =
        (verdict.action == ACTION_ALLOCATE).then(|| named(verdict.allocation).unwrap().0.name.clone());
    let decides = (verdict.action != ACTION_PASS).then(|| rule(verdict.binding & 0xffff)).flatten();
    Some((
        verdict.action,
        allocation,
        decides,
        observed(verdict.binding).and_then(|(number, _)| rule(number)),
    ))
}

fn settled(state: &State) -> (Observed, Known, Transition) {
    let mut maps = Observed::default();
    let known = Known { flows: Some(Named::default()), ..Known::default() };
    let change = transition(&wanted(state), &maps, &known);
    change.ops.iter().for_each(|op| maps.apply(op));
    let known = Known { rules: Some(Arc::new(change.rules.clone())), ..known };
    (maps, known, change)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_packets_meet_of_an_edit_is_as_before_or_as_after(
        (before, after) in state().prop_flat_map(edited),
        seed in any::<u64>(),
        restart in prop::bool::weighted(0.1),
    ) {
        let (mut maps, mut known, _) = settled(&before);
        if restart {
            known.rules = None;
        }
        for (state, seed) in [(&after, seed), (&before, !seed), (&after, seed)] {
            let change = transition(&wanted(state), &maps, &known);
            write(&mut maps, &change.ops, seed)?;
            known.rules = Some(Arc::new(change.rules.clone()));
            prop_assert_eq!(transition(&wanted(state), &maps, &known).ops, []);
            // The same as if nothing had been there before.
            let (fresh, _, anew) = settled(state);
            for packet in packets() {
                prop_assert_eq!(told(&maps, &change, packet), told(&fresh, &anew, packet), "{:?}", packet);
            }
        }
    }
}

fn example() -> State {
    let rule = |label, precedence, ranges: &[usize], ports, exit| Rule {
        label,
        precedence,
        ranges: ranges.to_vec(),
        ports,
        exit,
        observes: false,
    };
    let rules = vec![rule(0, 1, &[0], 0, 0), rule(0, 2, &[0], 9, 3), rule(1, 3, &[3], 9, 1)];
    State {
        rules: rules.into_iter().enumerate().collect(),
        pods: vec![(2, 0), (3, 0), (4, 1), (5, 1)],
        rest: true,
    }
}

/// Writes for an edit of the example, which must be right.
fn writes(edit: impl Fn(&mut State)) -> Vec<Op> {
    let (mut maps, known, _) = settled(&example());
    let mut after = example();
    edit(&mut after);
    let ops = transition(&wanted(&after), &maps, &known).ops;
    write(&mut maps, &ops, 1).unwrap();
    ops
}

fn switches(ops: &[Op]) -> bool {
    ops.iter().any(|op| matches!(op, Op::SetConfig(_)))
}

#[test]
fn edits_of_one_rule_make_no_new_generation() {
    type Edit = fn(&mut State);
    let edits: [(&str, Edit); 9] = [
        ("another allocation", |it| it.rules[0].1.exit = 1),
        ("it only observes", |it| it.rules[1].1.observes = true),
        ("a range more", |it| it.rules[0].1.ranges.push(5)),
        ("a range around another one", |it| it.rules[0].1.ranges.push(4)),
        ("a range less", |it| it.rules[2].1.ranges.clear()),
        ("other ports", |it| it.rules[0].1.ports = 1),
        ("precedence", |it| it.rules[0].1.precedence = 3),
        ("a new rule", |it| {
            let rule = Rule { ranges: vec![1, 2], ..it.rules[2].1.clone() };
            it.rules.push((7, rule));
        }),
        ("a rule less", |it| _ = it.rules.remove(1)),
    ];
    for (what, edit) in edits {
        let ops = writes(edit);
        assert!(!switches(&ops), "{what}: {ops:?}");
    }
}

#[test]
fn what_uncovers_something_is_a_new_generation() {
    let ops = writes(|it| it.rest = false);
    assert!(switches(&ops), "{ops:?}");
}

/// Nobody knows whose the numbers are.
#[test]
fn the_first_edit_of_an_agent_is_a_new_generation() {
    let (maps, known, _) = settled(&example());
    let mut after = example();
    after.rules[0].1.exit = 1;
    assert!(!switches(&transition(&wanted(&after), &maps, &known).ops));
    assert!(switches(&transition(&wanted(&after), &maps, &Known { rules: None, ..known.clone() }).ops));
    // But where nothing has changed there is nothing to write.
    let restarted = Known { rules: None, ..known };
    assert_eq!(transition(&wanted(&example()), &maps, &restarted).ops, []);
}

#[test]
fn a_rule_keeps_its_number_and_another_gets_it_when_nobody_can_count_for_it_any_more() {
    let (mut maps, mut known, first) = settled(&example());
    let name = |number: usize| RuleName::Policy(format!("p{number}"));
    let number = |change: &Transition, rule: usize| {
        change.rules.iter().find(|(_, it)| **it == name(rule)).map(|(number, _)| *number)
    };
    let mut turn = |state: &State| {
        let change = transition(&wanted(state), &maps, &known);
        write(&mut maps, &change.ops, 5).unwrap();
        known.rules = Some(Arc::new(change.rules.clone()));
        change
    };
    let mut state = example();
    // One goes and another comes in the same edit.
    let (_, gone) = state.rules.remove(0);
    state.rules.push((7, gone.clone()));
    let change = turn(&state);
    assert_eq!([1, 2].map(|rule| number(&change, rule)), [1, 2].map(|rule| number(&first, rule)));
    assert!(!first.rules.contains_key(&number(&change, 7).unwrap()));
    state.rules.push((8, gone));
    assert_eq!(number(&turn(&state), 8), number(&first, 0));
}

#[test]
fn the_check_notices_writes_in_another_order() {
    let (maps, known, _) = settled(&example());
    let mut after = example();
    after.rules[0].1.ranges.push(5);
    let ops = transition(&wanted(&after), &maps, &known).ops;
    let check = |ops: &[Op]| write(&mut maps.clone(), ops, 3);
    check(&ops).unwrap();
    let is_destination = |op: &Op| matches!(op, Op::SetDestination { .. });
    let mut early = ops.clone();
    early.sort_by_key(|op| !is_destination(op));
    assert_ne!(early, ops);
    assert!(check(&early).is_err(), "a range before its verdicts");

    // Who has met the class from before may still be looking for its verdict.
    let mut after = example();
    after.rules[0].1.exit = 1;
    let ops = transition(&wanted(&after), &maps, &known).ops;
    check(&ops).unwrap();
    let unsettled: Vec<Op> = ops.iter().copied().filter(|op| *op != Op::Settle).collect();
    let broken = (0..50).any(|seed| write(&mut maps.clone(), &unsettled, seed).is_err());
    assert!(broken, "no grace period: {ops:?}");
}

/// An agent that ends in the middle of an edit leaves verdicts that nobody meets.
#[test]
fn what_is_left_of_an_edit_makes_room_for_a_new_generation() {
    let (maps, known, _) = settled(&example());
    let mut after = example();
    after.rules[0].1.exit = 1;
    let ops = transition(&wanted(&after), &maps, &known).ops;
    for done in 1..ops.len() {
        let mut maps = maps.clone();
        ops[..done].iter().for_each(|op| maps.apply(op));
        let before = maps.config.generation;
        let rest = transition(&wanted(&after), &maps, &Known { rules: None, ..known.clone() });
        let highest = |maps: &Observed| maps.generations.values().map(|it| it.verdicts.len()).sum::<usize>();
        let mut most = 0;
        for op in &rest.ops {
            maps.apply(op);
            most = most.max(highest(&maps));
        }
        let needed = maps.live().verdicts.len();
        assert!(
            maps.config.generation == before || most <= 2 * needed + 1,
            "{most} of {needed} after {done}"
        );
        assert_eq!(maps.generations.len(), 1);
        let known = Known { rules: Some(Arc::new(rest.rules)), ..known.clone() };
        assert_eq!(transition(&wanted(&after), &maps, &known).ops, []);
    }
}

/// The kernel uses the memory of what was replaced again at once, for another verdict, while somebody may still be reading.
#[test]
fn no_verdict_changes_in_place() {
    let (maps, known, _) = settled(&example());
    let mut after = example();
    after.rules[0].1.exit = 1;
    after.rules[0].1.ranges.push(5);
    let ops = transition(&wanted(&after), &maps, &known).ops;
    assert!(!switches(&ops), "{ops:?}");
    let settle = ops.iter().position(|op| *op == Op::Settle).unwrap();
    for (at, op) in ops.iter().enumerate() {
        match op {
            Op::SetVerdict { verdict, .. } => assert!(!maps.live().verdicts.contains_key(verdict), "{op:?}"),
            Op::RemoveVerdict { .. } => assert!(at > settle, "{ops:?}"),
            _ => {}
        }
    }
}

#[test]
fn what_observes_keeps_its_number_too() {
    let mut state = example();
    state.rules[0].1.observes = true;
    let (maps, _, change) = settled(&state);
    let packet = (Ipv4Addr::new(10, 244, 0, 2), DESTINATIONS[0], 443);
    let (action, _, decides, observes) = told(&maps, &change, packet).unwrap();
    assert_eq!((action, decides), (ACTION_FORBID, Some(RuleName::Policy("p1".into()))));
    assert_eq!(observes, Some(RuleName::Policy("p0".into())));
}
