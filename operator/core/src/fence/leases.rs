//! What to do about the Leases of nodes: take over that of a node that does not renew it, and give it back once the
//! node has nothing left that others may have got.

use super::{TAKEN, keeps_deadline, wait};
use crate::model::{Address, Inputs, Lease, Node, Seconds, State};
use std::collections::BTreeMap;
use std::time::Duration;

/// Who holds a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    /// Nobody: the node may acquire it.
    Nobody,
    /// The node.
    Node,
    /// The operator, who took it over.
    Operator,
}

impl Holder {
    /// By the name that the Lease has.
    pub fn of(identity: &str) -> Holder {
        match identity {
            "" => Holder::Nobody,
            TAKEN => Holder::Operator,
            _ => Holder::Node,
        }
    }
}

/// A Lease, as somebody saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sighting {
    /// Its resource version; 0 if there is no Lease.
    pub version: u64,
    /// Its holder.
    pub holder: Holder,
    /// Since when, by a clock that nobody sets, it has been seen like this.
    pub since: Duration,
}

/// What to do about a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing, and nothing before this time has passed, if ever.
    Wait(Option<Duration>),
    /// Take it over: the node has not renewed it for long enough. Only the version that was seen may be replaced.
    TakeOver,
    /// Its deadline has passed. Before that is acted on, write the Lease once more, over the version that was seen: it may
    /// have been given back meanwhile, and nobody may give it back who looked before this.
    Confirm,
    /// Give it back: the node holds nothing from which it must not send. The copies may be behind; the API server itself
    /// has to say so, and only the version that was seen may be replaced.
    Release,
}

/// The Leases of all nodes, by whatever name each has for the caller.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sightings(BTreeMap<String, Sighting>);

/// What a node holds of addresses with a fence: the shortest deadline of those that it is known to keep, in seconds, if
/// any.
pub type Burdens<'a> = BTreeMap<&'a str, Option<Seconds>>;

/// Nodes that hold slices, also draining ones, of addresses with a fence. What is withheld is not taken from anybody.
pub fn burdens(inputs: &Inputs) -> Burdens<'_> {
    let mut burdens = Burdens::new();
    if inputs.addresses.iter().all(|address| address.fence.is_none()) {
        return burdens;
    }
    let nodes: BTreeMap<&str, &Node> = inputs.nodes.iter().map(|node| (node.name.as_str(), node)).collect();
    for address in &inputs.addresses {
        let Some(fence) = address.fence else { continue };
        let withheld = inputs.withheld.contains_key(&address.address);
        for node in bearers(address) {
            let after = burdens.entry(node).or_default();
            let node = nodes.get(node);
            if !withheld && node.is_some_and(|node| keeps_deadline(address, node)) {
                *after = Some(after.map_or(fence.after, |it: Seconds| it.min(fence.after)));
            }
        }
    }
    burdens
}

/// Nodes that hold slices of an address, also draining ones, if it has a fence.
pub fn bearers(address: &Address) -> impl Iterator<Item = &str> {
    let holdings = address.holdings.iter().filter(|_| address.fence.is_some());
    let held = holdings.filter(|holding| matches!(holding.state, State::Held | State::Draining));
    held.map(|holding| holding.node.as_str())
}

impl Sightings {
    /// Takes note of a Lease; false if it is as it was. `now` never goes back.
    pub fn saw(&mut self, node: &str, version: u64, holder: Holder, now: Duration) -> bool {
        match self.0.get(node) {
            Some(known) if (known.version, known.holder) == (version, holder) => false,
            _ => {
                self.0.insert(node.to_owned(), Sighting { version, holder, since: now });
                true
            }
        }
    }

    /// A Lease that the operator held as `from` was written once more, and got this version: it was held without a break,
    /// unless it has changed again.
    pub fn confirmed(&mut self, node: &str, from: Sighting, version: u64) {
        if self.get(node).is_none_or(|it| it == from || it.version == version) {
            self.0.insert(node.to_owned(), Sighting { version, ..from });
        }
    }

    /// The Lease as it was seen last.
    pub fn get(&self, node: &str) -> Option<Sighting> {
        self.0.get(node).copied()
    }

    /// Whoever could not look, or was not to act on what was seen, begins anew to count how long nodes have not renewed.
    pub fn begin(&mut self, now: Duration) {
        let counted = |sighting: &&mut Sighting| sighting.holder != Holder::Operator;
        self.0.values_mut().filter(counted).for_each(|sighting| sighting.since = now);
    }

    /// Forgets all others.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.0.retain(|node, _| keep(node));
    }

    /// As planning reads it. `sure`: it was confirmed just now (see [`Step::Confirm`]).
    pub fn lease(&self, node: &str, sure: bool, now: Duration) -> Lease {
        match self.get(node) {
            Some(Sighting { holder: Holder::Operator, since, .. }) => {
                Lease::Taken { waited: if sure { now.saturating_sub(since) } else { Duration::ZERO } }
            }
            Some(Sighting { holder: Holder::Node, .. }) => Lease::Own,
            _ => Lease::Free,
        }
    }

    /// What to do about the Lease of a node that exists, and that `burden` is held by, if anything is.
    pub fn step(&self, node: &str, burden: Option<Option<Seconds>>, now: Duration) -> Step {
        let Some(Sighting { holder, since, .. }) = self.get(node) else { return Step::Wait(None) };
        let (lasts, then) = match (holder, burden) {
            (Holder::Operator, None) => return Step::Release,
            (_, None | Some(None)) => return Step::Wait(None),
            (Holder::Operator, Some(Some(after))) => (wait(after), Step::Confirm),
            (Holder::Node | Holder::Nobody, Some(Some(after))) => {
                (Duration::from_secs(u64::try_from(after).unwrap_or(0)), Step::TakeOver)
            }
        };
        match (since + lasts).checked_sub(now) {
            None | Some(Duration::ZERO) => then,
            Some(left) => Step::Wait(Some(left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AllocationName, Fence, Holding, Programmed};
    use std::net::Ipv4Addr;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn address(last: u8, fence: Option<Fence>, state: State) -> Address {
        Address {
            address: Ipv4Addr::new(203, 0, 113, last).into(),
            prefix: "p".into(),
            allocation: AllocationName { account: "a".into(), name: "x".into() },
            epoch: 9,
            holdings: vec![Holding { first: 4, last: 11, node: "n1".into(), epoch: 7, state }],
            fence,
        }
    }

    fn node(programmed: &[(u8, i64, bool)]) -> Node {
        let report = |(last, epoch, fenced): &(u8, i64, bool)| {
            let report = Programmed { epoch: *epoch, fenced: *fenced, ..Programmed::default() };
            (Ipv4Addr::new(203, 0, 113, *last).into(), report)
        };
        Node { name: "n1".into(), programmed: programmed.iter().map(report).collect(), ..Node::default() }
    }

    #[test]
    fn a_node_bears_what_it_holds_of_fenced_addresses() {
        let fence = |after| Some(Fence { after, epoch: 8 });
        let held = [
            address(1, None, State::Held),
            address(2, fence(60), State::Held),
            address(3, fence(15), State::Draining),
            address(4, fence(15), State::Quarantined { until: 0 }),
        ];
        let of = |addresses: &[Address], reports| {
            let withheld = [(Ipv4Addr::new(203, 0, 113, 9).into(), None)].into();
            let (addresses, nodes) = (addresses.to_vec(), vec![node(reports)]);
            let inputs = Inputs { addresses, nodes, withheld, ..Inputs::default() };
            burdens(&inputs).get("n1").copied()
        };
        assert_eq!(of(&held[..1], &[(1, 9, true)]), None, "no fence");
        assert_eq!(of(&held[3..], &[(4, 9, true)]), None, "nothing held");
        assert_eq!(of(&held, &[]), Some(None), "nothing is known of the node");
        assert_eq!(of(&held, &[(2, 8, true), (3, 7, true)]), Some(Some(60)), "one deadline is kept");
        assert_eq!(of(&held, &[(2, 8, true), (3, 8, false)]), Some(Some(60)), "an agent without deadlines");
        let withheld = address(9, fence(15), State::Held);
        assert_eq!(of(&[withheld], &[(9, 9, true)]), Some(None), "withheld");
        assert_eq!(of(&held, &[(2, 9, true), (3, 9, true)]), Some(Some(15)), "the shortest counts");
    }

    #[test]
    fn a_lease_that_is_not_renewed_is_taken_over_and_waited_for() {
        let (mut leases, burden) = (Sightings::default(), Some(Some(60)));
        assert_eq!(leases.step("n1", burden, at(0)), Step::Wait(None), "not looked at yet");
        assert!(leases.saw("n1", 5, Holder::Node, at(100)));
        assert!(!leases.saw("n1", 5, Holder::Node, at(130)));
        assert_eq!(leases.step("n1", burden, at(159)), Step::Wait(Some(at(1))));
        assert_eq!(leases.step("n1", burden, at(160)), Step::TakeOver);
        assert!(leases.saw("n1", 6, Holder::Node, at(160)), "renewed");
        assert_eq!(leases.step("n1", burden, at(219)), Step::Wait(Some(at(1))));
        assert_eq!(leases.step("n1", None, at(500)), Step::Wait(None), "it holds nothing");
        assert_eq!(leases.step("n1", Some(None), at(500)), Step::Wait(None), "it keeps no deadline");

        leases.begin(at(200));
        assert_eq!(leases.step("n1", burden, at(220)), Step::Wait(Some(at(40))), "it could not be seen");

        assert!(leases.saw("n1", 7, Holder::Operator, at(220)));
        leases.begin(at(230));
        assert_eq!(leases.step("n1", burden, at(282)), Step::Wait(Some(at(1))));
        assert_eq!(leases.step("n1", burden, at(283)), Step::Confirm);
        assert_eq!(leases.lease("n1", false, at(283)), Lease::Taken { waited: at(0) });
        let seen = leases.get("n1").unwrap();
        leases.confirmed("n1", seen, 8);
        assert_eq!(leases.lease("n1", true, at(283)), Lease::Taken { waited: at(63) });
        assert!(!leases.saw("n1", 8, Holder::Operator, at(283)), "the watch shows the same");
        assert_eq!(
            leases.step("n1", Some(None), at(500)),
            Step::Wait(None),
            "it may hold what it does not fence"
        );
        assert_eq!(leases.step("n1", None, at(284)), Step::Release);
        leases.confirmed("n1", seen, 7);
        assert_eq!(leases.get("n1").unwrap().version, 8, "an answer that comes late");
        assert!(leases.saw("n1", 9, Holder::Operator, at(284)), "given back, acquired, and taken over again");
        assert_eq!(leases.step("n1", burden, at(284)), Step::Wait(Some(at(63))));
    }

    #[test]
    fn a_missing_lease_is_made_by_whoever_takes_it_over() {
        let mut leases = Sightings::default();
        assert!(leases.saw("n1", 0, Holder::of(""), at(10)));
        assert_eq!(leases.lease("n1", true, at(10)), Lease::Free);
        assert_eq!(leases.step("n1", Some(Some(15)), at(25)), Step::TakeOver);
        assert_eq!(Holder::of("n1"), Holder::Node);
        assert_eq!(Holder::of("aegis-operator"), Holder::Operator);
        leases.retain(|node| node != "n1");
        assert_eq!(leases.get("n1"), None);
    }
}
