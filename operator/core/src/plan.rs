//! Planning: from what people want and what stands, to what shall stand.
//!
//! A plan only ever takes steps that are safe by themselves, whatever happens to the steps after it: a slice goes
//! Free -> Held -> Draining -> Quarantined -> Free, and each arrow needs its own reason. Planning again from the
//! result of a plan gives the same result until something outside changes.

mod addresses;
mod board;
mod delegated;
mod holdings;
mod members;
mod outcomes;
mod targets;

use crate::delegation::Ledger;
use crate::egress::Egress;
use crate::model::{Address, Allocation, AllocationName, Inputs, Seconds, Site, State};
use crate::prefix::Prefixes;
use std::collections::BTreeMap;

/// What shall stand, and what to tell the owners.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// All `EgressAddress` objects that shall exist, sorted by address. Those without a change equal the input.
    pub addresses: Vec<Address>,
    /// What became of each allocation.
    pub allocations: BTreeMap<AllocationName, AllocationOutcome>,
    /// What became of each prefix, by name.
    pub prefixes: BTreeMap<String, PrefixOutcome>,
    /// When the next quarantine ends: plan again then.
    pub wake: Option<Seconds>,
}

/// What became of an allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocationOutcome {
    /// Whether the allocation can be acted on. One that cannot keeps the addresses it has and gets no new one.
    pub accepted: Verdict,
    /// Whether its account has by right what it has of the prefixes.
    pub delegated: Verdict,
    /// Whether everything asked for is set aside.
    pub allocated: Verdict,
    /// Its sites, by name; none if every node may hold slices.
    pub sites: Vec<SiteOutcome>,
}

/// What became of a site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SiteOutcome {
    /// Name.
    pub name: String,
    /// Weight.
    pub weight: u32,
    /// Nodes that belong to it.
    pub nodes: u32,
    /// Those of them that are ready, or hold slices: that an agent restarts is no news.
    pub usable: u32,
    /// Those of them that may start flows.
    pub holders: u32,
    /// Slices of each address that its nodes may hold together.
    pub quota: u32,
    /// As many, over all addresses that serve.
    pub slices: u32,
    /// Slices of all addresses that its nodes hold, also those that drain.
    pub held: u32,
    /// Some ready node of it has fewer slices than `spec.ports.perNode.min`.
    pub short: bool,
}

impl SiteOutcome {
    /// Those of an allocation, with no nodes yet.
    fn all(allocation: &Allocation, quotas: &[u32], addresses: usize) -> Vec<SiteOutcome> {
        let site = |((name, site), quota): ((&String, &Site), &u32)| SiteOutcome {
            name: name.clone(),
            weight: site.weight,
            quota: *quota,
            slices: quota.saturating_mul(u32::try_from(addresses).unwrap_or(u32::MAX)),
            ..SiteOutcome::default()
        };
        allocation.sites.iter().zip(quotas).map(site).collect()
    }
}

/// What became of a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixOutcome {
    /// Whether addresses may be taken from it.
    pub accepted: Verdict,
    /// Whether every account has by right what it has of it.
    pub delegated: Verdict,
    /// Addresses that can be allocated: the whole range but what is reserved.
    pub capacity: u32,
    /// Addresses that must not be allocated.
    pub reserved: u32,
    /// Addresses that allocations have, also those that drain or rest. While there is one, the finalizer must stay.
    pub used: u32,
    /// Addresses that an allocation can get.
    pub free: u32,
    /// Who has addresses of it, by account.
    pub accounts: Vec<AccountUse>,
}

/// What an account has of a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccountUse {
    /// The account.
    pub account: String,
    /// By which right.
    pub right: AccountRight,
    /// Addresses of each of its allocations, by name.
    pub allocations: BTreeMap<String, Vec<Egress>>,
}

/// By which right an account has addresses of a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccountRight {
    /// It owns the prefix.
    Owner,
    /// By this delegation, which allows so many.
    Delegated {
        /// Its name.
        delegation: String,
        /// How many.
        max: u32,
    },
    /// By a delegation that applies no more.
    Withdrawn,
}

impl AccountUse {
    /// How many addresses it has.
    pub fn used(&self) -> u32 {
        u32::try_from(self.allocations.values().map(Vec::len).sum::<usize>()).unwrap_or(u32::MAX)
    }

    /// How many it may have.
    pub fn most(&self) -> u32 {
        match &self.right {
            AccountRight::Owner => u32::MAX,
            AccountRight::Delegated { max, .. } => *max,
            AccountRight::Withdrawn => 0,
        }
    }
}

/// A condition's status with its reason (see [`crate::reason`]) and a message for people: what is the case, and, if
/// it is bad, which field of which object to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The condition is true.
    Good {
        /// Stable word.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The condition is false.
    Bad {
        /// Stable word.
        reason: &'static str,
        /// For people.
        message: String,
    },
}

impl Verdict {
    /// Whether the condition is true.
    pub fn is_good(&self) -> bool {
        matches!(self, Verdict::Good { .. })
    }

    /// Stable word for the condition's reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Verdict::Good { reason, .. } | Verdict::Bad { reason, .. } => reason,
        }
    }

    /// Text for people.
    pub fn message(&self) -> &str {
        match self {
            Verdict::Good { message, .. } | Verdict::Bad { message, .. } => message,
        }
    }

    pub(crate) fn good(reason: &'static str, message: impl Into<String>) -> Verdict {
        Verdict::Good { reason, message: message.into() }
    }

    pub(crate) fn bad(reason: &'static str, message: impl Into<String>) -> Verdict {
        Verdict::Bad { reason, message: message.into() }
    }
}

/// `1 node`, `2 nodes`.
pub(crate) fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// Plans.
///
/// Names (of prefixes, allocations, nodes) and addresses must each be unique in the inputs, as they are in the API.
/// The inputs must also be complete: slices of a node that is missing rest and go to others, and addresses of an
/// allocation that is missing drain. An object that could not be read has to be given as it was last known.
pub fn plan(inputs: &Inputs) -> Plan {
    let prefixes = Prefixes::judge(&inputs.prefixes, &inputs.nodes, &inputs.services);
    let assignments = addresses::assign(inputs, &prefixes);
    let (addresses, shares) = holdings::plan(inputs, &assignments);
    let wake =
        addresses.iter().flat_map(|address| &address.holdings).filter_map(|holding| match holding.state {
            State::Quarantined { until } => Some(until),
            State::Held | State::Draining => None,
        });
    let ledger = Ledger::new(inputs, &addresses);
    Plan {
        wake: wake.min(),
        allocations: outcomes::allocations(inputs, assignments, shares, &addresses, &prefixes, &ledger),
        prefixes: outcomes::prefixes(inputs, &prefixes, &addresses, &ledger),
        addresses,
    }
}
