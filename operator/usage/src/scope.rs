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
        /// The owner of a prefix sees who uses it since it is theirs, but not with which pods, unless the account is one of `accounts`.
        prefixes: Vec<Owned>,
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
    /// Since when, in seconds since the Unix epoch, as far as the prefix itself says so.
    pub since: Option<i64>,
}

/// A range, whose it is, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    /// The range.
    pub range: IpNet,
    /// Its parent account.
    pub account: String,
    /// Since when, in seconds since the Unix epoch: a slot that begins earlier is not seen.
    pub since: i64,
}

impl Scope {
    /// What somebody may see: their accounts' use, and who uses the prefixes that these accounts own.
    pub fn of(viewer: &Viewer, prefixes: Vec<Owned>) -> Scope {
        if viewer.all {
            return Scope::All;
        }
        let prefixes = prefixes.into_iter().filter(|prefix| viewer.accounts.contains(&prefix.account));
        Scope::Part { accounts: viewer.accounts.clone(), prefixes: prefixes.collect() }
    }

    /// One account and nothing else.
    pub fn account(name: impl Into<String>) -> Scope {
        Scope::Part { accounts: BTreeSet::from([name.into()]), prefixes: Vec::new() }
    }

    /// Whether it says nothing about other accounts' nodes: who sees only a part does not see which nodes did not report.
    pub fn sees_nodes(&self) -> bool {
        *self == Scope::All
    }

    /// What of it a question has to say.
    pub(crate) fn sql(&self, value: &mut dyn FnMut(Value) -> String) -> Seen {
        let Scope::Part { accounts, prefixes } = self else {
            return Seen { series: "1 = 1".into(), since: None, pod: "s.pod".into() };
        };
        let names: Vec<String> = accounts.iter().map(|name| value(name.as_str().into())).collect();
        let own =
            if names.is_empty() { "1 = 0".into() } else { format!("s.account IN ({})", names.join(", ")) };
        let pod = format!("CASE WHEN {own} THEN s.pod ELSE '' END");
        let mut prefixes: Vec<&Owned> = prefixes.iter().collect();
        // The first one counts that a series is of.
        prefixes.sort_by_key(|prefix| prefix.since);
        let (mut seen, mut since) = (own.clone(), format!("CASE WHEN {own} THEN CAST(0 AS BIGINT)"));
        for prefix in &prefixes {
            let (first, last) = series::range(&prefix.range);
            let within = format!("s.address BETWEEN {} AND {}", value(first.into()), value(last.into()));
            seen += &format!(" OR {within}");
            since += &format!(" WHEN {within} THEN CAST({} AS BIGINT)", value(prefix.since.into()));
        }
        let since = (!prefixes.is_empty()).then(|| since + " END");
        Seen { series: format!("({seen})"), since, pod }
    }
}

/// What somebody may see, as SQL.
pub(crate) struct Seen {
    /// Which series (`s`).
    pub series: String,
    /// From which slot on those, if it is not all.
    pub since: Option<String>,
    /// The pod of a series as far as it may be seen.
    pub pod: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_sees_its_prefix_and_nobody_elses() {
        let owned = |range: &str, account: &str| Owned {
            range: range.parse().unwrap(),
            account: account.into(),
            since: 1_000,
        };
        let prefixes = vec![owned("192.0.2.0/24", "parent"), owned("203.0.113.0/24", "other")];
        let viewer = |all, accounts: &[&str]| Viewer {
            all,
            accounts: accounts.iter().map(|it| it.to_string()).collect(),
        };
        let part = |accounts: &[&str], ranges: &[&str]| Scope::Part {
            accounts: accounts.iter().map(|it| it.to_string()).collect(),
            prefixes: ranges.iter().map(|it| owned(it, accounts[0])).collect(),
        };
        let of = |viewer| Scope::of(&viewer, prefixes.clone());
        assert_eq!(of(viewer(false, &["parent"])), part(&["parent"], &["192.0.2.0/24"]));
        assert_eq!(of(viewer(false, &["tenant"])), part(&["tenant"], &[]));
        assert_eq!(of(viewer(false, &[])), part(&[], &[]));
        assert_eq!(of(viewer(true, &[])), Scope::All);
        assert!(Scope::All.sees_nodes() && !part(&["parent"], &["0.0.0.0/0"]).sees_nodes());
    }
}
