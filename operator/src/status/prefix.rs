//! Status of an `AegisPrefix`.

use super::conditions::Clock;
use super::verdict;
use aegis_core::plan::{self, PrefixOutcome};
use aegis_crds::{AccountRight, AccountUse, AegisPrefixStatus, AllocationUse, type_};

/// Most accounts, and most addresses of an allocation, that the status lists: as many as a cluster has addresses.
const LISTED: usize = 1024;

/// What the prefix's status should be.
pub fn status(outcome: &PrefixOutcome, old: &AegisPrefixStatus, clock: &Clock) -> AegisPrefixStatus {
    let wanted =
        vec![verdict(type_::ACCEPTED, &outcome.accepted), verdict(type_::DELEGATED, &outcome.delegated)];
    AegisPrefixStatus {
        addresses: outcome.capacity,
        reserved: outcome.reserved,
        used: outcome.used,
        free: outcome.free,
        accounts: outcome.accounts.iter().take(LISTED).map(account).collect(),
        conditions: clock.settle(&old.conditions, wanted),
    }
}

fn account(account: &plan::AccountUse) -> AccountUse {
    let (right, delegation, max_addresses) = match &account.right {
        plan::AccountRight::Owner => (AccountRight::Owner, None, None),
        plan::AccountRight::Delegated { delegation, max } => {
            (AccountRight::Delegated, Some(delegation.clone()), Some(*max))
        }
        plan::AccountRight::Withdrawn => (AccountRight::Withdrawn, None, None),
    };
    let allocations = account.allocations.iter().take(LISTED).map(|(name, addresses)| AllocationUse {
        name: name.clone(),
        addresses: addresses.iter().take(LISTED).map(ToString::to_string).collect(),
    });
    AccountUse {
        account: account.account.clone(),
        right,
        delegation,
        max_addresses,
        used: account.used(),
        allocations: allocations.collect(),
    }
}
