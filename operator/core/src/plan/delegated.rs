//! What to tell the two sides of a delegation: the account that takes, and the one that lends.

use super::{AccountRight, AccountUse, Verdict, plural};
use crate::delegation::{Ledger, Right};
use crate::egress::Egress;
use crate::model::{Address, Allocation, AllocationName, Prefix};
use crate::prefix::Prefixes;
use crate::reason;
use std::collections::{BTreeMap, BTreeSet};

/// Accounts that a message names.
const NAMED: usize = 3;

/// Whether an allocation's account has by right what it has of the prefixes that the allocation names or has addresses of.
pub(super) fn allocation(
    allocation: &Allocation,
    own: &BTreeSet<&str>,
    prefixes: &Prefixes,
    ledger: &Ledger,
) -> Verdict {
    let account = allocation.name.account.as_str();
    let named = allocation.prefixes.iter().map(String::as_str);
    let all: BTreeSet<&str> = named.chain(own.iter().copied()).collect();
    let mut told = Vec::new();
    for prefix in all.into_iter().filter_map(|name| Some(prefixes.get(name)?.prefix)) {
        let name = &prefix.name;
        let used = ledger.used(name, account);
        match ledger.right(prefix, account) {
            Right::Owner => {}
            Right::Delegated(it) if used <= it.max => {
                told.push(format!("{used} of at most {} of AegisPrefix {name:?}", it.max));
            }
            Right::Delegated(it) => {
                return Verdict::bad(
                    reason::DELEGATION_WITHDRAWN,
                    format!(
                        "account {account:?} has {} of AegisPrefix {name:?}, of which {} delegated to it: all stay in use, and it gets no further one; have the prefix's owner raise maxAddresses, or give some back by asking for fewer",
                        plural(used as usize, "address", "addresses"),
                        plural(it.max as usize, "is", "are")
                    ),
                );
            }
            Right::Nothing if used > 0 => {
                return Verdict::bad(
                    reason::DELEGATION_WITHDRAWN,
                    format!(
                        "AegisPrefix {name:?} is not delegated to account {account:?} any more: what it has of it ({}) stays in use, and it gets no further one; name another prefix, or have the owner delegate it again",
                        plural(used as usize, "address", "addresses"),
                    ),
                );
            }
            Right::Nothing => {
                return Verdict::bad(
                    reason::NOT_PERMITTED,
                    format!(
                        "AegisPrefix {name:?} is not delegated to account {account:?}; name another, or have its owner delegate it"
                    ),
                );
            }
        }
    }
    let message = match told.is_empty() {
        true => format!("account {account:?} needs no delegation"),
        false => format!("account {account:?} has {}", told.join(", ")),
    };
    Verdict::good(reason::DELEGATED, message)
}

/// Who has addresses of a prefix, by account, given all of its addresses with their allocations.
pub(super) fn accounts(
    prefix: &Prefix,
    holders: &[(Egress, &AllocationName)],
    ledger: &Ledger,
) -> Vec<AccountUse> {
    let mut by_account: BTreeMap<&str, BTreeMap<String, Vec<Egress>>> = BTreeMap::new();
    for (address, allocation) in holders {
        let of = by_account.entry(&allocation.account).or_default();
        of.entry(allocation.name.clone()).or_default().push(*address);
    }
    let told = by_account.into_iter().map(|(account, mut allocations)| {
        allocations.values_mut().for_each(|addresses| addresses.sort_unstable());
        AccountUse {
            account: account.to_owned(),
            right: match ledger.right(prefix, account) {
                Right::Owner => AccountRight::Owner,
                Right::Delegated(it) => AccountRight::Delegated { delegation: it.name.clone(), max: it.max },
                Right::Nothing => AccountRight::Withdrawn,
            },
            allocations,
        }
    });
    told.collect()
}

/// Whether every account has by right what it has of a prefix.
pub(super) fn prefix(owner: &str, accounts: &[AccountUse]) -> Verdict {
    let without = |it: &&AccountUse| it.used() > it.most();
    let over: Vec<&AccountUse> = accounts.iter().filter(without).collect();
    if !over.is_empty() {
        let told = over.iter().take(NAMED).map(|it| {
            let allocations = it.allocations.keys().take(NAMED).map(|name| format!("{}/{name}", it.account));
            format!(
                "account {:?} has {} ({}{}) where {} delegated to it",
                it.account,
                plural(it.used() as usize, "address", "addresses"),
                allocations.collect::<Vec<_>>().join(", "),
                if it.allocations.len() > NAMED { ", ..." } else { "" },
                match it.most() {
                    0 => "none is".to_owned(),
                    most => plural(most as usize, "is", "are"),
                }
            )
        });
        return Verdict::bad(
            reason::DELEGATION_WITHDRAWN,
            format!(
                "spec.delegations: {}{}: what is in use stays, until its allocations ask for fewer or are deleted, and there is no further one; delegate it again, or agree with the account on giving it back",
                told.collect::<Vec<_>>().join("; "),
                if over.len() > NAMED { "; ..." } else { "" }
            ),
        );
    }
    let others: Vec<&AccountUse> = accounts.iter().filter(|it| it.right != AccountRight::Owner).collect();
    let message = match others.len() {
        0 => format!("no account but {owner:?} has addresses"),
        count => format!(
            "{} {} by delegation",
            plural(count, "account has", "accounts have"),
            plural(others.iter().map(|it| it.used() as usize).sum(), "address", "addresses")
        ),
    };
    Verdict::good(reason::DELEGATED, message)
}

/// The prefixes of which each allocation has addresses.
pub(super) fn sources(addresses: &[Address]) -> BTreeMap<&AllocationName, BTreeSet<&str>> {
    let mut sources: BTreeMap<&AllocationName, BTreeSet<&str>> = BTreeMap::new();
    for address in addresses {
        sources.entry(&address.allocation).or_default().insert(&address.prefix);
    }
    sources
}
