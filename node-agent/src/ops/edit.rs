//! An edit of the live generation: a few writes, if they can be put in an order in which every packet is judged as before the edit or as
//! after it, whatever it meets of which table.
//!
//! A packet's classes are looked up in three tables, and then its verdict: for its three classes or, if there is none, for port class 0.
//! So meanwhile it may meet any mixture of its classes before and after. No verdict changes that a packet can meet: the kernel uses the
//! memory of what was replaced again at once, for another verdict, while somebody may still be reading. What is decided differently
//! gets new classes, and so:
//!
//! 1. Verdicts are written that no packet can meet yet.
//! 2. Destinations, ports and pods get their classes, in any mixture.
//! 3. When every packet is through, verdicts are removed that none can meet any more.
//!
//! Whether all of that is right is looked at for each kind of packet before anything is written; if it is not, a new generation is made.

use crate::observed::{Generation, PortEntry, VerdictEntry};
use aegis_common::{ACTION_DENY, ACTION_PASS, DESTINATION_INTERNAL, HOST_UNKNOWN, POD_REFUSED, VerdictValue};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// Look-ups that a proof may take: more would take as long as a new generation.
const MOST_LOOK_UPS: usize = 1 << 19;

/// Entries that are set, or removed.
pub(super) type Writes<K> = Vec<(K, Option<u32>)>;

/// Writes of verdicts.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Edit {
    /// Come first.
    pub new: Vec<(VerdictEntry, VerdictValue)>,
    /// Go last, when every packet is through.
    pub unused: Vec<VerdictEntry>,
}

/// Class before and after, of what is there before and after. No class of destinations is one, too.
type Moves<C> = BTreeSet<(C, C)>;
/// Class before and after; none where nothing has one.
type Classes = (Option<u32>, Option<u32>);
/// Class of pods and of destinations.
type Row = (u32, u32);

/// Why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsafe {
    /// Something that was covered would not be any more. Between the pod and the uplink a packet is looked at twice: there it would be
    /// refused. Of a generation the last one tells.
    Uncovers,
    /// A verdict that packets can meet would change.
    Changes,
    /// Some packet may meet a mixture that is neither as before nor as after.
    Mixes,
    /// It would take too long to tell.
    Large,
}

/// The verdicts to be written to come from `before` to `after`, if each packet can be judged right meanwhile.
pub(super) fn edit(before: &Generation, after: &Generation) -> Result<Edit, Unsafe> {
    let pods = pod_moves(before, after);
    let destinations = moves(&before.destinations, &after.destinations, |outer, inner| outer.contains(inner));
    let ports = moves(&before.ports, &after.ports, contains);
    let ports: Moves<u32> = ports.iter().map(|(then, now)| (then.unwrap_or(0), now.unwrap_or(0))).collect();
    let (met_before, met_after) = (Met::of(before), Met::of(after));

    let mut edit = Edit::default();
    let mut by_port: Vec<Row> = Vec::new();
    for (key, then, now) in pairs(&before.verdicts, &after.verdicts) {
        let row = (key.0, key.1);
        if key.2 != 0 && by_port.last() != Some(&row) {
            by_port.push(row);
        }
        match (then, now) {
            _ if then == now => {}
            (None, Some(now)) if !met_before.contains(key) => edit.new.push((key, *now)),
            (Some(_), None) if !met_after.contains(key) => edit.unused.push(key),
            _ => return Err(Unsafe::Changes),
        }
    }
    let mixed = mixed(before, after, [&met_before, &met_after], &pods, &destinations)?;
    edit.new.extend(mixed.iter().map(|(key, value)| (*key, *value)));
    edit.unused.extend(mixed.keys());

    let mut proof = Proof {
        before,
        after,
        mixed,
        met_after,
        by_port,
        ports: ports.iter().copied().chain([(0, 0)]).collect(),
        left: MOST_LOOK_UPS,
    };
    proof.run(&pods, &destinations)?;
    Ok(edit)
}

/// Verdicts that no packet can meet: what an edit has left that was not carried through.
pub(super) fn unmet(generation: &Generation) -> Vec<VerdictEntry> {
    let met = Met::of(generation);
    generation.verdicts.keys().copied().filter(|key| !met.contains(*key)).collect()
}

/// Classes that packets meet.
struct Met {
    pods: HashSet<u32>,
    destinations: HashSet<u32>,
    ports: HashSet<u32>,
}

impl Met {
    fn of(generation: &Generation) -> Met {
        Met {
            pods: classes_of_pods(generation).collect(),
            destinations: generation.destinations.values().copied().collect(),
            ports: generation.ports.values().copied().chain([0]).collect(),
        }
    }

    fn contains(&self, (pod, destination, port): VerdictEntry) -> bool {
        self.pods.contains(&pod) && self.destinations.contains(&destination) && self.ports.contains(&port)
    }
}

fn classes_of_pods(generation: &Generation) -> impl Iterator<Item = u32> {
    let v4 = generation.pods.values().map(|pod| pod.class);
    let v6 = generation.pods6.values().map(|pod| pod.class);
    v4.chain(v6).chain(generation.hosts.values().map(|pod| pod.class))
}

/// Of those there are. Those that are new are named last, when everything else is as it is to be; packets of one that goes may still be
/// on their way.
fn pod_moves(before: &Generation, after: &Generation) -> Moves<u32> {
    let v4 = before.pods.iter().map(|(own, pod)| (pod.class, after.pods.get(own).map(|now| now.class)));
    let v6 = before.pods6.iter().map(|(own, pod)| (pod.class, after.pods6.get(own).map(|now| now.class)));
    let hosts = before.hosts.iter().map(|(own, pod)| (pod.class, after.hosts.get(own).map(|now| now.class)));
    let all = v4.chain(v6).chain(hosts).map(|(then, now)| (then, now.unwrap_or(then)));
    // A pod that nobody has named is held by where it sends to alone.
    all.filter(|(then, now)| ![*then, *now].contains(&HOST_UNKNOWN)).collect()
}

/// Verdicts for what is neither before nor after, where both pods and destinations get new classes: for pods that have theirs, to
/// destinations that do not, as before; the other way round, as after.
fn mixed(
    before: &Generation,
    after: &Generation,
    [met_before, met_after]: [&Met; 2],
    pods: &Moves<u32>,
    destinations: &Moves<Option<u32>>,
) -> Result<BTreeMap<VerdictEntry, VerdictValue>, Unsafe> {
    let mut mixed = BTreeMap::new();
    let moves = destinations.iter().filter(|(then, now)| then != now);
    let moves: Vec<_> = moves.filter_map(|(then, now)| (*then).zip(*now)).collect();
    for (pod, next) in pods.iter().filter(|(then, now)| then != now) {
        for (from, to) in &moves {
            let mut add = |policy: &Generation, like: Row, row: Row| {
                let of = policy.verdicts.range((like.0, like.1, 0)..=(like.0, like.1, u32::MAX));
                of.into_iter().all(|((.., port), value)| {
                    *mixed.entry((row.0, row.1, *port)).or_insert(*value) == *value
                })
            };
            let as_before = met_before.pods.contains(next)
                || met_after.destinations.contains(from)
                || add(before, (*pod, *from), (*next, *from));
            let as_after = met_after.pods.contains(pod)
                || met_before.destinations.contains(to)
                || add(after, (*next, *to), (*pod, *to));
            if !(as_before && as_after) {
                return Err(Unsafe::Mixes);
            }
        }
    }
    Ok(mixed)
}

/// What addresses (or ports) are before and after, of those that are in some entry of a longest-prefix table: by the entry that is the
/// longest around them in each.
fn moves<K: Ord + Copy>(
    before: &BTreeMap<K, u32>,
    after: &BTreeMap<K, u32>,
    contains: impl Fn(&K, &K) -> bool,
) -> Moves<Option<u32>> {
    let mut moves = Moves::default();
    // Entries in order come after those that are around them: these are on the stack.
    let mut around: Vec<(K, Classes)> = Vec::new();
    let mut last = None;
    for (key, then, now) in pairs(before, after) {
        while around.last().is_some_and(|(outer, _)| !contains(outer, &key)) {
            around.pop();
        }
        let (outer_then, outer_now) = around.last().map(|(_, classes)| *classes).unwrap_or_default();
        let classes = (then.copied().or(outer_then), now.copied().or(outer_now));
        around.push((key, classes));
        if last.replace(classes) != Some(classes) {
            moves.insert(classes);
        }
    }
    moves
}

fn contains((protocol, port, length): &PortEntry, other: &PortEntry) -> bool {
    let host = 16 - u32::from((*length).min(16));
    *protocol == other.0 && *length <= other.2 && u32::from(*port) >> host == u32::from(other.1) >> host
}

/// The entries of two tables by key, in order.
fn pairs<'a, K: Ord + Copy, V>(
    before: &'a BTreeMap<K, V>,
    after: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (K, Option<&'a V>, Option<&'a V>)> {
    let (mut before, mut after) = (before.iter().peekable(), after.iter().peekable());
    std::iter::from_fn(move || {
        let key = match (before.peek(), after.peek()) {
            (Some((then, _)), Some((now, _))) => **then.min(now),
            (Some((key, _)), None) | (None, Some((key, _))) => **key,
            (None, None) => return None,
        };
        let then = before.next_if(|(found, _)| **found == key).map(|(_, value)| value);
        let now = after.next_if(|(found, _)| **found == key).map(|(_, value)| value);
        Some((key, then, now))
    })
}

/// The keys whose values are not the same.
fn differences<K: Ord + Copy, V: PartialEq + Copy>(
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
) -> Vec<(K, Option<V>, Option<V>)> {
    pairs(before, after)
        .filter(|(_, then, now)| then != now)
        .map(|(key, then, now)| (key, then.copied(), now.copied()))
        .collect()
}

/// Writes to a longest-prefix table after each of which every address has the class that it had or the one that it is to have: what is
/// inserted comes first, the longest before those that are around it; what is removed last, the other way round.
pub(super) fn in_order<K: Ord + Copy>(
    before: &BTreeMap<K, u32>,
    after: &BTreeMap<K, u32>,
    length: impl Fn(&K) -> u8,
) -> Writes<K> {
    let (mut new, mut changed, mut gone) = (Vec::new(), Vec::new(), Vec::new());
    for (key, then, now) in differences(before, after) {
        match then {
            None => new.push((key, now)),
            Some(_) if now.is_some() => changed.push((key, now)),
            Some(_) => gone.push((key, now)),
        }
    }
    new.sort_by_key(|(key, _)| Reverse(length(key)));
    gone.sort_by_key(|(key, _)| length(key));
    new.into_iter().chain(changed).chain(gone).collect()
}

struct Proof<'a> {
    before: &'a Generation,
    after: &'a Generation,
    mixed: BTreeMap<VerdictEntry, VerdictValue>,
    met_after: Met,
    /// Rows with verdicts for ports, ascending.
    by_port: Vec<Row>,
    /// Class of each port before and after.
    ports: Moves<u32>,
    /// Look-ups that it may still take.
    left: usize,
}

impl Proof<'_> {
    /// Each packet of which a class changes must be judged right at any moment.
    fn run(&mut self, pods: &Moves<u32>, destinations: &Moves<Option<u32>>) -> Result<(), Unsafe> {
        for pod in pods.iter().filter(|(then, now)| then != now) {
            destinations.iter().try_for_each(|destination| self.look_at(*pod, *destination))?;
        }
        for destination in destinations.iter().filter(|(then, now)| then != now) {
            pods.iter().try_for_each(|pod| self.look_at(*pod, *destination))?;
        }
        // Where a port alone changes its class, that matters where there are verdicts by port.
        if self.ports.iter().all(|(then, now)| then == now) {
            return Ok(());
        }
        for (pod, destination) in self.by_port.clone() {
            let stays = (Some(destination), Some(destination));
            if pods.contains(&(pod, pod)) && destinations.contains(&stays) {
                self.look_at((pod, pod), stays)?;
            }
        }
        Ok(())
    }

    /// The same of packets of pods and to destinations that are of these classes before and after.
    fn look_at(&mut self, pod: (u32, u32), destination: (Option<u32>, Option<u32>)) -> Result<(), Unsafe> {
        let pods = [pod.0, pod.1];
        let destinations = [destination.0, destination.1];
        let by_port = pods.iter().any(|pod| {
            let row = |destination: &u32| self.by_port.binary_search(&(*pod, *destination)).is_ok();
            destinations.iter().flatten().any(row)
        });
        // Where no verdict is by port, all of them are alike.
        let ports = if by_port { self.ports.clone() } else { [(0, 0)].into() };
        let moves = pod.0 != pod.1 || destination.0 != destination.1;
        for port in ports.into_iter().filter(|(then, now)| moves || then != now) {
            let then = look_up(|key| self.before.verdicts.get(&key).copied(), pod.0, destination.0, port.0);
            let now = look_up(|key| self.after.verdicts.get(&key).copied(), pod.1, destination.1, port.1);
            if then.action != ACTION_PASS && now.action == ACTION_PASS {
                return Err(Unsafe::Uncovers);
            }
            for (pod, destination, port) in mixtures(pods, destinations, [port.0, port.1]) {
                self.left = self.left.checked_sub(1).ok_or(Unsafe::Large)?;
                let found = look_up(|key| self.meanwhile(key), pod, destination, port);
                if found != then && found != now {
                    return Err(Unsafe::Mixes);
                }
            }
        }
        Ok(())
    }

    /// A verdict while classes change: those that nobody meets afterwards are still there.
    fn meanwhile(&self, key: VerdictEntry) -> Option<VerdictValue> {
        let unused = || self.before.verdicts.get(&key).filter(|_| !self.met_after.contains(key));
        self.after.verdicts.get(&key).or_else(unused).or_else(|| self.mixed.get(&key)).copied()
    }
}

/// What programs find for the classes of a packet: see `look_up_verdict`.
fn look_up(
    verdict: impl Fn(VerdictEntry) -> Option<VerdictValue>,
    pod: u32,
    destination: Option<u32>,
    port: u32,
) -> VerdictValue {
    let passes = VerdictValue { action: ACTION_PASS, ..VerdictValue::default() };
    if destination == Some(DESTINATION_INTERNAL) {
        return passes;
    }
    if pod == POD_REFUSED {
        return VerdictValue { action: ACTION_DENY, ..VerdictValue::default() };
    }
    let Some(destination) = destination else { return passes };
    verdict((pod, destination, port)).or_else(|| verdict((pod, destination, 0))).unwrap_or(passes)
}

fn mixtures(
    pods: [u32; 2],
    destinations: [Option<u32>; 2],
    ports: [u32; 2],
) -> impl Iterator<Item = (u32, Option<u32>, u32)> {
    fn each<C: Copy + PartialEq>([then, now]: [C; 2]) -> impl Iterator<Item = C> + Clone {
        std::iter::once(then).chain((then != now).then_some(now))
    }
    each(pods).flat_map(move |pod| {
        each(destinations).flat_map(move |destination| each(ports).map(move |port| (pod, destination, port)))
    })
}
