//! Who may see what: the rule, apart from how somebody shows who they are.

use crate::series;
use crate::sql::Value;
use ipnet::IpNet;
use std::collections::BTreeSet;

/// What somebody may see of the use of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// Some accounts, and use of some ranges.
    Part {
        /// These accounts see their own, whatever address it leaves from.
        accounts: BTreeSet<String>,
        /// The owner of a prefix sees who uses it, but not with which pods, unless the account is one of `accounts`.
        prefixes: Vec<IpNet>,
    },
}

/// Who asks, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Viewer {
    /// May see the whole cluster.
    pub all: bool,
    /// Accounts whose use may be seen, as far as they are known: one's own, and of those that were asked for the ones that may.
    pub accounts: BTreeSet<String>,
}

/// A range and the account that owns it, also where others have addresses of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The range.
    pub range: IpNet,
    /// Its parent account.
    pub account: String,
}

impl Scope {
    /// What somebody may see: their accounts' use, and who uses the prefixes that these accounts own.
    pub fn of(viewer: &Viewer, prefixes: &[Prefix]) -> Scope {
        if viewer.all {
            return Scope::All;
        }
        let owned = prefixes.iter().filter(|prefix| viewer.accounts.contains(&prefix.account));
        Scope::Part {
            accounts: viewer.accounts.clone(),
            prefixes: owned.map(|prefix| prefix.range).collect(),
        }
    }

    /// One account and nothing else.
    pub fn account(name: impl Into<String>) -> Scope {
        Scope::Part { accounts: BTreeSet::from([name.into()]), prefixes: Vec::new() }
    }

    /// Whether it says nothing about other accounts' nodes: who sees only a part does not see which nodes did not report.
    pub fn sees_nodes(&self) -> bool {
        *self == Scope::All
    }

    /// The condition on a series, and its pod as far as it may be seen.
    pub(crate) fn sql(&self, value: &mut dyn FnMut(Value) -> String) -> (String, String) {
        let Scope::Part { accounts, prefixes } = self else { return ("1 = 1".into(), "s.pod".into()) };
        let names: Vec<String> = accounts.iter().map(|name| value(name.as_str().into())).collect();
        let own =
            if names.is_empty() { "1 = 0".into() } else { format!("s.account IN ({})", names.join(", ")) };
        let pod = format!("CASE WHEN {own} THEN s.pod ELSE '' END");
        let ranges = prefixes.iter().map(|range| {
            let (first, last) = series::range(range);
            format!("s.address BETWEEN {} AND {}", value(first.into()), value(last.into()))
        });
        let ranges: Vec<String> = ranges.collect();
        let seen = [own].into_iter().chain(ranges).collect::<Vec<_>>().join(" OR ");
        (format!("({seen})"), pod)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_sees_its_prefix_and_nobody_elses() {
        let prefix =
            |range: &str, account: &str| Prefix { range: range.parse().unwrap(), account: account.into() };
        let prefixes = [prefix("192.0.2.0/24", "parent"), prefix("203.0.113.0/24", "other")];
        let viewer = |all, accounts: &[&str]| Viewer {
            all,
            accounts: accounts.iter().map(|it| it.to_string()).collect(),
        };
        let part = |accounts: &[&str], ranges: &[&str]| Scope::Part {
            accounts: accounts.iter().map(|it| it.to_string()).collect(),
            prefixes: ranges.iter().map(|it| it.parse().unwrap()).collect(),
        };
        assert_eq!(Scope::of(&viewer(false, &["parent"]), &prefixes), part(&["parent"], &["192.0.2.0/24"]));
        assert_eq!(Scope::of(&viewer(false, &["tenant"]), &prefixes), part(&["tenant"], &[]));
        assert_eq!(Scope::of(&viewer(false, &[]), &prefixes), part(&[], &[]));
        assert_eq!(Scope::of(&viewer(true, &[]), &prefixes), Scope::All);
        assert!(Scope::All.sees_nodes() && !part(&["parent"], &["0.0.0.0/0"]).sees_nodes());
    }
}
