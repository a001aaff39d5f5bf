//! Which accounts may have addresses of a prefix, and how many of them they have.

use crate::model::{Address, Delegate, Delegation, Inputs, Prefix};
use crate::selector::Labels;
use std::collections::BTreeMap;

/// What an account may have of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right<'a> {
    /// Every address: it owns the prefix.
    Owner,
    /// As many as this delegation says.
    Delegated(&'a Delegation),
    /// None.
    Nothing,
}

impl<'a> Right<'a> {
    /// Of several delegations the greatest counts, then the first by name.
    pub fn of(prefix: &'a Prefix, account: &str, namespaces: &BTreeMap<String, Labels>) -> Right<'a> {
        if prefix.account == account {
            return Right::Owner;
        }
        let labels = namespaces.get(account);
        let applies = |it: &&Delegation| match &it.to {
            Delegate::Account(name) => name == account,
            Delegate::Namespaces(selector) => labels.is_some_and(|labels| selector.matches(labels)),
        };
        let greatest = prefix
            .delegations
            .iter()
            .filter(applies)
            .max_by(|a, b| a.max.cmp(&b.max).then_with(|| b.name.cmp(&a.name)));
        greatest.map_or(Right::Nothing, Right::Delegated)
    }

    /// How many addresses it allows.
    pub fn most(self) -> u32 {
        match self {
            Right::Owner => u32::MAX,
            Right::Delegated(delegation) => delegation.max,
            Right::Nothing => 0,
        }
    }
}

/// How many addresses of each prefix each account has.
pub(crate) struct Ledger<'a> {
    namespaces: &'a BTreeMap<String, Labels>,
    used: BTreeMap<(&'a str, &'a str), u32>,
}

impl<'a> Ledger<'a> {
    /// With these addresses, and those that planning does not touch.
    pub fn new(inputs: &'a Inputs, addresses: &'a [Address]) -> Ledger<'a> {
        let mut ledger = Ledger { namespaces: &inputs.namespaces, used: BTreeMap::new() };
        for address in addresses.iter().chain(&inputs.frozen) {
            ledger.take(&address.prefix, &address.allocation.account);
        }
        ledger
    }

    /// One more.
    pub fn take(&mut self, prefix: &'a str, account: &'a str) {
        *self.used.entry((prefix, account)).or_default() += 1;
    }

    /// How many an account has.
    pub fn used(&self, prefix: &str, account: &str) -> u32 {
        self.used.get(&(prefix, account)).copied().unwrap_or(0)
    }

    /// What an account may have.
    pub fn right<'p>(&self, prefix: &'p Prefix, account: &str) -> Right<'p> {
        Right::of(prefix, account, self.namespaces)
    }

    /// Why an account can take no further address, if so: because of the prefix's delegation.
    pub fn against(&self, prefix: &Prefix, account: &str) -> Option<String> {
        let (used, most) = (self.used(&prefix.name, account), self.right(prefix, account).most());
        (used >= most).then(|| {
            format!(
                "account {account:?} has {used} of the {most} addresses of AegisPrefix {:?} that are delegated to it; name another prefix in spec.prefixes, ask for fewer, delete an allocation that is not used, or have the prefix's owner raise maxAddresses",
                prefix.name
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selector::Selector;

    fn labels(text: &[(&str, &str)]) -> Labels {
        text.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn the_greatest_delegation_that_applies_counts() {
        let delegation = |name: &str, to, max| Delegation { name: name.into(), to, max };
        let team = |team: &str| {
            Delegate::Namespaces(Selector { labels: labels(&[("team", team)]), ..Selector::default() })
        };
        let prefix = Prefix {
            name: "p".into(),
            created: 1,
            cidr: "192.0.2.0/28".parse().unwrap(),
            reserved: vec![],
            account: "shop".into(),
            delegations: vec![
                delegation("c", Delegate::Account("bank".into()), 2),
                delegation("b", team("money"), 3),
                delegation("a", team("money"), 3),
                delegation("d", Delegate::Account("gone".into()), 1),
                delegation("e", Delegate::Namespaces(Selector::default()), 9),
            ],
            deleting: false,
        };
        let namespaces = [("bank", "money"), ("till", "money"), ("plain", "other")];
        let namespaces: BTreeMap<String, Labels> =
            namespaces.map(|(name, team)| (name.to_owned(), labels(&[("team", team)]))).into();
        let right = |account| match Right::of(&prefix, account, &namespaces) {
            Right::Owner => "owner",
            Right::Delegated(it) => it.name.as_str(),
            Right::Nothing => "nothing",
        };
        assert_eq!(right("shop"), "owner");
        assert_eq!(right("bank"), "a", "three are more than two, and a comes before b");
        assert_eq!(right("till"), "a");
        assert_eq!(right("plain"), "nothing", "an empty selector selects nothing");
        assert_eq!(right("gone"), "d", "a name counts without a namespace, too");
        assert_eq!(right("nobody"), "nothing");
    }
}
