//! Objects of the cluster beside which use is read, as far as questions are about them, and who may see which. How they come here is up to
//! [`crate::Access::cluster`].

use crate::scope::Scope;
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What was known of the cluster at a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// Allocations, by account and name.
    pub allocations: Vec<Allocation>,
    /// Addresses, in their order.
    pub addresses: Vec<Address>,
    /// Policies, in the order in which they are asked.
    pub policies: Vec<Policy>,
}

/// A condition of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// Its type, as `Accepted`.
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// In one word.
    pub reason: String,
    /// What it says to people.
    pub message: String,
    /// Since when the status is this, in seconds since the Unix epoch.
    pub since: i64,
}

/// Dedicated addresses of an account, and how nodes share them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocation {
    /// The account.
    pub account: String,
    /// Name in the account.
    pub name: String,
    /// What it has.
    pub addresses: Vec<String>,
    /// Sites that nodes are of.
    pub sites: Vec<Site>,
    /// First port in use of each address.
    pub first_port: u32,
    /// And the last.
    pub last_port: u32,
    /// Share of a node's ports towards one origin that is planned, in percent.
    pub target_percent: u32,
    /// What the operator found.
    pub conditions: Vec<Condition>,
}

/// What became of a site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// Its name.
    pub name: String,
    /// Nodes that belong to it.
    pub nodes: u32,
    /// Slices that they may hold together.
    pub slices: u32,
    /// Slices that they hold.
    pub held: u32,
}

/// An address and who holds its slices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address, or the /64.
    pub range: IpNet,
    /// The account that it is dedicated to.
    pub account: String,
    /// Its allocation there.
    pub allocation: String,
    /// The prefix that it comes from.
    pub prefix: String,
    /// Grows with every change of its holdings.
    pub epoch: i64,
    /// Consecutive slices that a node holds, by number.
    pub holdings: Vec<Holding>,
    /// First slice that the allocation uses.
    pub first: u32,
    /// And the last.
    pub last: u32,
    /// What the allocation plans with. None: it is gone.
    pub target_percent: Option<u32>,
    /// What the nodes report.
    pub conditions: Vec<Condition>,
}

/// Consecutive slices that a node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// First slice.
    pub first: u32,
    /// Last slice.
    pub last: u32,
    /// The node that holds, or last held, them.
    pub node: Arc<str>,
    /// Site of the allocation that the node belongs to; empty without.
    pub site: Arc<str>,
    /// What the node may do with them.
    pub state: State,
    /// When they are free again, in seconds since the Unix epoch, where that is known.
    pub until: Option<i64>,
}

/// State of a holding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// New flows may start.
    Held,
    /// Live flows go on, none starts.
    Draining,
    /// Nobody sends.
    Quarantined,
}

/// Slices of one node, of one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The node.
    pub node: Arc<str>,
    /// Its site.
    pub site: Arc<str>,
    /// Slices in which new flows may start.
    pub held: u32,
    /// Slices in which live flows go on.
    pub draining: u32,
}

/// A rule of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Place in the order in which they are asked, from 1 on.
    pub order: u32,
    /// Its name.
    pub name: String,
    /// The lowest comes first.
    pub precedence: i32,
    /// `Egress`, `Default` or `Deny`.
    pub action: String,
    /// It only counts what it would do.
    pub observes: bool,
    /// Names of allocations that it lets traffic leave from, the preferred one first.
    pub egress: Vec<String>,
    /// Accounts that it names; none: it is about all, or says by labels which.
    pub accounts: Vec<String>,
    /// What else it says of the pods, in words; empty: nothing.
    pub pods: String,
    /// Destinations, in words; empty: all.
    pub destinations: String,
    /// Pods that match, over all nodes.
    pub matched: Option<u32>,
    /// What the operator and the nodes found.
    pub conditions: Vec<Condition>,
}

impl Address {
    /// Its nodes by name, with how much each has. Slices in quarantine are nobody's.
    pub fn holders(&self) -> Vec<Holder> {
        let mut holders: BTreeMap<&str, Holder> = BTreeMap::new();
        for it in self.holdings.iter().filter(|it| it.state != State::Quarantined) {
            let none = || Holder { node: it.node.clone(), site: it.site.clone(), held: 0, draining: 0 };
            let holder = holders.entry(&it.node).or_insert_with(none);
            match it.state {
                State::Held => holder.held += it.slices(),
                State::Draining | State::Quarantined => holder.draining += it.slices(),
            }
        }
        holders.into_values().collect()
    }

    /// Slices in a state.
    pub fn slices(&self, state: State) -> u32 {
        self.holdings.iter().filter(|it| it.state == state).map(Holding::slices).sum()
    }
}

impl Holding {
    /// How many slices it has.
    pub fn slices(&self) -> u32 {
        (self.last + 1).saturating_sub(self.first)
    }
}

/// The rules of who sees what. They are those of use ([`Scope`]), so that nobody learns from an object what figures would not have told, nor the
/// other way round.
impl Scope {
    /// An allocation is its account's.
    pub fn sees_allocation(&self, it: &Allocation) -> bool {
        self.sees_account(&it.account)
    }

    /// An address is its account's, and the owner's of the prefix that it is in: who holds it, and with which nodes, use of the prefix tells them anyway.
    pub fn sees_address(&self, it: &Address) -> bool {
        let owned = match self {
            Scope::All => true,
            Scope::Part { prefixes, .. } => prefixes.iter().any(|prefix| prefix.range.contains(&it.range)),
        };
        owned || self.sees_account(&it.account)
    }

    /// A policy as it may be seen. One belongs to the whole cluster; an account sees those that name it, without what they say of others:
    /// their names, pods that are not told apart by account, and messages, which may have such names in them.
    pub fn policy(&self, it: &Policy) -> Option<Policy> {
        let Scope::Part { accounts, .. } = self else { return Some(it.clone()) };
        let (own, others): (Vec<_>, Vec<_>) =
            it.accounts.iter().cloned().partition(|name| accounts.contains(name));
        let alone = others.is_empty();
        let quiet = |it: &Condition| Condition { message: String::new(), ..it.clone() };
        (!own.is_empty()).then(|| Policy {
            accounts: own,
            pods: if alone { it.pods.clone() } else { String::new() },
            matched: it.matched.filter(|_| alone),
            conditions: it.conditions.iter().map(quiet).collect(),
            ..it.clone()
        })
    }

    fn sees_account(&self, account: &str) -> bool {
        match self {
            Scope::All => true,
            Scope::Part { accounts, .. } => accounts.contains(account),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::Owned;

    fn part(account: &str, prefixes: &[&str]) -> Scope {
        let owned = |it: &&str| Owned { range: it.parse().unwrap(), account: account.to_owned(), since: 0 };
        let prefixes = prefixes.iter().map(owned).collect();
        Scope::Part { accounts: [account.to_owned()].into(), prefixes }
    }

    fn address(range: &str, account: &str) -> Address {
        Address {
            range: range.parse().unwrap(),
            account: account.into(),
            allocation: "partner".into(),
            prefix: "lent".into(),
            epoch: 7,
            holdings: Vec::new(),
            first: 4,
            last: 255,
            target_percent: Some(80),
            conditions: Vec::new(),
        }
    }

    #[test]
    fn addresses_are_seen_by_their_account_and_the_owner_of_the_prefix() {
        let lent = address("192.0.2.1/32", "tenant");
        assert!(part("tenant", &[]).sees_address(&lent) && Scope::All.sees_address(&lent));
        assert!(part("parent", &["192.0.2.0/28"]).sees_address(&lent));
        assert!(!part("other", &["203.0.113.0/24", "::/0"]).sees_address(&lent));
        // A part of a /64 is not all of it.
        let wide = address("2001:db8:1:2::/64", "tenant");
        assert!(part("parent", &["2001:db8:1::/48"]).sees_address(&wide));
        assert!(!part("parent", &["2001:db8:1:2::/80"]).sees_address(&wide));
        let allocation = Allocation { account: "tenant".into(), ..Allocation::default() };
        assert!(!part("parent", &["192.0.2.0/28"]).sees_allocation(&allocation));
        assert!(part("tenant", &[]).sees_allocation(&allocation));
    }

    #[test]
    fn a_policy_says_nothing_of_others() {
        let condition =
            Condition { kind: "Effective".into(), message: "y has".into(), ..Condition::default() };
        let policy = |accounts: &[&str]| Policy {
            accounts: accounts.iter().map(|it| (*it).into()).collect(),
            pods: "app=y".into(),
            matched: Some(7),
            conditions: vec![condition.clone()],
            ..Policy::default()
        };
        let x = part("x", &["0.0.0.0/0"]);
        assert_eq!(x.policy(&policy(&[])), None, "about everybody: the platform's");
        assert_eq!(x.policy(&policy(&["y"])), None);
        let both = x.policy(&policy(&["x", "y"])).unwrap();
        assert_eq!((both.accounts, both.pods, both.matched), (vec!["x".into()], String::new(), None));
        assert_eq!(both.conditions[0].message, "");
        let own = x.policy(&policy(&["x"])).unwrap();
        assert_eq!((own.pods.as_str(), own.matched), ("app=y", Some(7)));
        assert_eq!(Scope::All.policy(&policy(&["y"])), Some(policy(&["y"])));
    }

    #[test]
    fn slices_are_summed_by_node() {
        let holding = |first, last, node: &str, state| Holding {
            first,
            last,
            node: node.into(),
            site: "east".into(),
            state,
            until: None,
        };
        let mut it = address("192.0.2.1/32", "x");
        it.holdings = vec![
            holding(4, 11, "n2", State::Held),
            holding(12, 12, "n1", State::Held),
            holding(13, 14, "n2", State::Draining),
            holding(15, 20, "n3", State::Quarantined),
        ];
        let told = it.holders();
        let told: Vec<_> = told.iter().map(|it| (&*it.node, it.held, it.draining)).collect();
        assert_eq!(told, [("n1", 1, 0), ("n2", 8, 2)]);
        assert_eq!((it.slices(State::Held), it.slices(State::Quarantined)), (9, 6));
    }
}
