//! What meters have counted, from one look to the next. Pure.
//!
//! A meter's number is another's only after it was retired, was seen without a flow, and told once more. Names are given
//! when a meter is first seen: later its rule's number may be another's.

use crate::observed::{from_map, from_map6, from_network, to_map, to_network};
use crate::ops::Rules;
use crate::singles::{self, Singles};
use aegis_common::{
    Address6, Counter, METER_RETIRED, MeterKey, MeterUse, MeterValue, NO_ALLOCATION, Network, REST_METER,
    RefusalKey, metered_egress,
};
use aegis_core::egress::{Egress, Family};
use aegis_core::model::AllocationName;
use aegis_core::policy::RuleName;
use aegis_usage_report::{Figures, Key, Protocol, Row, Volume};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Looks in which a meter has nothing to tell, after which its number may be another's.
const STILL: u32 = 30;
/// The same where few numbers are free.
const STILL_WHEN_SHORT: u32 = 1;

/// What numbers in keys stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Rules.
    pub rules: Arc<Rules>,
    /// Allocations, by index.
    pub allocations: BTreeMap<u32, Whose>,
    /// Egress addresses of which this node holds slices, with the index of their allocation.
    pub addresses: BTreeMap<Egress, u32>,
    /// Whose the stand-ins are.
    pub singles: Singles,
}

/// An allocation, as reports tell of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whose {
    /// Its name.
    pub name: AllocationName,
    /// Site of the allocation that the node belongs to; may be empty.
    pub site: String,
    /// Its only address of each family, where it has one.
    pub sole: BTreeMap<Family, Egress>,
}

/// What was read.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// The index.
    pub linked: BTreeMap<MeterKey, u32>,
    /// Meters, by number: all that are in the index, and all that the book has.
    pub meters: BTreeMap<u32, (MeterUse, MeterValue)>,
    /// Numbers that flows over IPv6 have. Of IPv4 ports in use tell.
    pub held: BTreeSet<u32>,
    /// New flows that were refused.
    pub refusals: BTreeMap<RefusalKey, u64>,
    /// Few numbers are free.
    pub short: bool,
}

/// What was told before this agent started.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Of meters, by number.
    pub meters: BTreeMap<u32, MeterValue>,
    /// Of refusals.
    pub refusals: BTreeMap<RefusalKey, u64>,
    /// Names of rules then.
    pub rules: Option<Arc<Rules>>,
}

/// What is to be done once the rows are safe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// So much of a meter was told.
    Told(u32, MeterValue),
    /// So many of these refusals were told.
    ToldRefusals(RefusalKey, u64),
    /// Let the new flows of a meter have another.
    Retire(MeterKey, u32),
    /// Take a retired one from the index: its number is free again.
    Free(MeterKey, u32),
    /// Nothing was refused for long.
    Forget(RefusalKey),
    /// Give an address a meter for what has none of its own.
    Keep(MeterKey),
}

/// A meter.
#[derive(Debug)]
struct Meter {
    key: MeterKey,
    name: Key,
    told: MeterValue,
    still: u32,
}

impl Meter {
    fn is_retired(&self) -> bool {
        self.key.flags & METER_RETIRED != 0
    }

    /// Looks at rest after which nobody can find a retired one any more. A program that had found it by a flow over IPv6, which was
    /// then forgotten, may have given it to a fragment after the first of them.
    fn empty_after(&self) -> u32 {
        if self.key.egress[0] == 0 { 1 } else { 2 }
    }
}

/// All that is known of meters.
#[derive(Debug, Default)]
pub struct Book {
    told: Told,
    meters: BTreeMap<u32, Meter>,
    refusals: BTreeMap<RefusalKey, (Key, u64, u32)>,
    /// Whether rules have had names since the agent started.
    named: bool,
}

impl Book {
    /// Begins where another agent has ended.
    pub fn new(told: Told) -> Book {
        Book { told, ..Book::default() }
    }

    /// Numbers that have to be looked at beside those in the index.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        std::iter::once(REST_METER).chain(self.meters.keys().copied())
    }

    /// Rows of what has come since the last look, one for each key, and what is to be done once they are safe. `names` is `None` until
    /// the agent has written a policy: until then numbers are those of the agent before.
    pub fn look(&mut self, look: &Look, names: Option<&Names>) -> (Vec<Row>, Vec<Step>) {
        let empty = Names::default();
        let current = names.unwrap_or(&empty);
        // When they get new names, what was numbered before is told under the old ones, and begins anew.
        let renamed = names.is_some() && !self.named && self.told.rules.is_some();
        let former = match (&self.told.rules, names.is_some() && self.named) {
            (Some(rules), false) => with(rules, &current.rules),
            _ => Arc::clone(&current.rules),
        };
        let naming = Names { rules: former, ..current.clone() };
        self.named |= names.is_some();
        let mut steps = Vec::new();
        self.meet(look, &naming);
        let mut rows: BTreeMap<Key, Figures> = BTreeMap::new();
        let limit = if look.short { STILL_WHEN_SHORT } else { STILL };
        let mut gone = BTreeSet::new();
        for (number, meter) in &mut self.meters {
            let (used, value) = look.meters.get(number).copied().unwrap_or_default();
            let more = value.since(&meter.told);
            let figures = figures(used, &more);
            let quiet = figures == Figures::default();
            let rests = quiet && used == MeterUse::default() && !look.held.contains(number);
            meter.still = if rests { meter.still + 1 } else { 0 };
            if !quiet {
                rows.entry(meter.name.clone()).or_default().add(&figures);
            }
            if more != MeterValue::default() {
                meter.told = value;
                steps.push(Step::Told(*number, value));
            }
            let of_rest = meter.key.remote == [0; 4];
            let kept = of_rest && current.addresses.contains_key(&egress(meter.key.egress, &current.singles));
            if *number == REST_METER {
                continue;
            }
            if meter.is_retired() {
                // It was without a flow for a whole interval in which nobody could find it.
                if meter.still >= meter.empty_after() {
                    steps.push(Step::Free(meter.key, *number));
                    gone.insert(*number);
                }
                continue;
            }
            let retired = MeterKey { flags: meter.key.flags | METER_RETIRED, ..meter.key };
            let stale = renamed && rule(meter.key.binding, current) != meter.name.rule;
            if (stale || !kept && meter.still > limit) && !look.linked.contains_key(&retired) {
                steps.push(Step::Retire(meter.key, *number));
                (meter.key, meter.still) = (retired, 0);
            } else if of_rest && names.is_some() {
                // Whose a /64 is, its key does not say.
                meter.name = meter_name(&meter.key, *number, current);
            }
        }
        self.meters.retain(|number, _| !gone.contains(number));
        self.told.meters.retain(|number, _| !gone.contains(number));
        self.refused(look, &naming, &mut rows, &mut steps);
        steps.extend(self.missing(current));
        (rows.into_iter().map(|(key, figures)| Row { key, figures }).collect(), steps)
    }

    /// Gives names to what is new.
    fn meet(&mut self, look: &Look, names: &Names) {
        let told = &self.told.meters;
        let of = |number: u32| told.get(&number).copied().unwrap_or_default();
        let found = look.linked.iter().map(|(key, number)| (*number, *key));
        for (number, key) in found.chain([(REST_METER, MeterKey::default())]) {
            if self.meters.get(&number).is_none_or(|meter| meter.key != key) {
                let name = meter_name(&key, number, names);
                self.meters.insert(number, Meter { key, name, told: of(number), still: 0 });
            }
        }
    }

    fn refused(
        &mut self,
        look: &Look,
        names: &Names,
        rows: &mut BTreeMap<Key, Figures>,
        steps: &mut Vec<Step>,
    ) {
        for (key, count) in &look.refusals {
            let told = self.told.refusals.get(key).copied().unwrap_or_default();
            let (name, told, still) =
                self.refusals.entry(*key).or_insert_with(|| (refusal_name(key, names), told, 0));
            let more = count.wrapping_sub(*told);
            *told = *count;
            if more == 0 {
                *still += 1;
                if *still > STILL && *key != RefusalKey::rest_of(key.reason) {
                    steps.push(Step::Forget(*key));
                }
                continue;
            }
            *still = 0;
            steps.push(Step::ToldRefusals(*key, *count));
            let refused = [(reason(key.reason), more)].into();
            rows.entry(name.clone()).or_default().add(&Figures { refused, ..Figures::default() });
        }
        self.refusals.retain(|key, _| look.refusals.contains_key(key));
        self.told.refusals.retain(|key, _| look.refusals.contains_key(key));
    }

    /// Addresses that have no meter yet for what has none of its own.
    fn missing(&self, names: &Names) -> Vec<Step> {
        let have: BTreeSet<MeterKey> = self.meters.values().map(|meter| meter.key).collect();
        let wanted = names.addresses.iter().filter_map(|(egress, allocation)| match singles::key(*egress) {
            Some(key) => Some(MeterKey::rest(
                metered_egress(to_map(key)),
                u16::try_from(*allocation).unwrap_or(NO_ALLOCATION),
            )),
            None => to_network(*egress).map(MeterKey::rest_of),
        });
        wanted.filter(|key| !have.contains(key)).map(Step::Keep).collect()
    }
}

fn figures(used: MeterUse, more: &MeterValue) -> Figures {
    // A flow that ends while it is counted makes it less than none for a moment.
    let ports = |count: u32| u64::try_from(count.cast_signed()).unwrap_or_default();
    let in_use = ports(used.in_use);
    Figures {
        in_use,
        peak: ports(used.peak).max(in_use),
        flows: more.flows,
        refused: BTreeMap::new(),
        sent: Volume { packets: more.sent_packets, bytes: more.sent_bytes },
        received: Volume { packets: more.received_packets, bytes: more.received_bytes },
    }
}

fn whose(allocation: u16, names: &Names) -> Key {
    match names.allocations.get(&u32::from(allocation)) {
        Some(whose) => Key {
            account: whose.name.account.clone(),
            allocation: whose.name.name.clone(),
            site: whose.site.clone(),
            ..Key::default()
        },
        None => Key::default(),
    }
}

/// Names of before, and the new ones of numbers that stood for nothing then: such a flow has begun since.
fn with(former: &Rules, current: &Rules) -> Arc<Rules> {
    let mut rules = current.clone();
    rules.extend(former.iter().map(|(number, name)| (*number, name.clone())));
    Arc::new(rules)
}

fn rule(number: u16, names: &Names) -> String {
    match names.rules.get(&u32::from(number)) {
        Some(RuleName::Policy(name)) => format!("policy/{name}"),
        Some(RuleName::Binding(name)) => format!("binding/{}", name.name),
        None => String::new(),
    }
}

fn protocol(number: u8) -> Protocol {
    match number {
        1 | 58 => Protocol::Icmp,
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        _ => Protocol::Other,
    }
}

fn egress(address: Network, singles: &Singles) -> Egress {
    match address {
        [0, address] => singles::egress(from_map(address), singles),
        network => from_network(network),
    }
}

/// As reports name it: a /64 by its first address.
fn address(egress: Egress) -> IpAddr {
    egress.range().addr()
}

/// IPv4 is told apart by being mapped into IPv6.
fn remote(address: Address6) -> IpAddr {
    from_map6(address).to_canonical()
}

fn origin(address: Address6, port: u16) -> Option<SocketAddr> {
    let address = remote(address);
    (!address.is_unspecified()).then(|| SocketAddr::new(address, port))
}

fn meter_name(key: &MeterKey, number: u32, names: &Names) -> Key {
    if number == REST_METER {
        return Key::default();
    }
    // What the rule of a retired one was, only the agent knows that retired it.
    let own = key.remote != [0; 4] && key.flags == 0;
    let of = egress(key.egress, &names.singles);
    let allocation = match names.addresses.get(&of) {
        Some(number) if key.allocation == NO_ALLOCATION => u16::try_from(*number).unwrap_or(NO_ALLOCATION),
        _ => key.allocation,
    };
    Key {
        address: Some(address(of)),
        origin: origin(key.remote, key.remote_port),
        protocol: protocol(key.protocol),
        rule: if own { rule(key.binding, names) } else { String::new() },
        ..whose(allocation, names)
    }
}

fn refusal_name(key: &RefusalKey, names: &Names) -> Key {
    let family = if remote(key.remote).is_ipv4() { Family::V4 } else { Family::V6 };
    let whose_it_is = names.allocations.get(&u32::from(key.allocation));
    let sole = whose_it_is.and_then(|whose| whose.sole.get(&family));
    Key {
        address: sole.copied().map(address),
        origin: origin(key.remote, key.remote_port),
        protocol: protocol(key.protocol),
        rule: rule(key.binding, names),
        ..whose(key.allocation, names)
    }
}

/// As reports tell it: the label of the metric without what all of them begin with.
fn reason(counter: u8) -> String {
    let label = Counter::from_index(u32::from(counter)).map_or("unknown", Counter::label);
    label.strip_prefix("refuse_").unwrap_or(label).to_owned()
}

#[cfg(test)]
#[path = "book/tests.rs"]
mod tests;
