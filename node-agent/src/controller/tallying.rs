//! What rules have decided about, and countries by which they do.

use super::Controller;
use crate::apply::Plane;
use crate::countries::{self, State};
use crate::desired::{Desired, Inputs};
use crate::meter::{Names, Whose};
use crate::metrics::RuleCount;
use crate::ops::Rules;
use crate::status::NotReady;
use crate::tally::Tally;
use aegis_core::egress::{Egress, Family};
use aegis_core::model::AllocationName;
use aegis_core::policy::{EgressPolicy, RuleName};
use aegis_crds::reason;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What numbers in the maps stand for.
pub(super) fn names(
    rules: &Arc<Rules>,
    numbers: &BTreeMap<AllocationName, u32>,
    wanted: &Desired,
    inputs: &Inputs,
) -> Names {
    let mut addresses = BTreeMap::new();
    let mut all: BTreeMap<(u32, Family), Vec<Egress>> = BTreeMap::new();
    let four = wanted.addresses.iter().map(|(address, own)| (own.egress(*address), own));
    for (egress, own) in four.chain(wanted.networks.iter().map(|(network, own)| (*network, own))) {
        let Some(number) = own.allocation.as_ref().and_then(|name| numbers.get(name)) else { continue };
        all.entry((*number, egress.family())).or_default().push(egress);
        if own.is_used() {
            addresses.insert(egress, *number);
        }
    }
    let whose = |(name, number): (&AllocationName, &u32)| {
        let site = || {
            let allocation = inputs.allocations.get(name)?;
            allocation.site_names.get(allocation.site_of(inputs.nodes.get(&inputs.node)?)).cloned()
        };
        let sole = |family| match all.get(&(*number, family)).map(Vec::as_slice) {
            Some([egress]) => Some((family, *egress)),
            _ => None,
        };
        let sole = Family::ALL.into_iter().filter_map(sole).collect();
        (*number, Whose { name: name.clone(), site: site().unwrap_or_default(), sole })
    };
    let singles = wanted.addresses.iter().filter_map(|(key, own)| Some((*key, own.single?)));
    Names {
        rules: Arc::clone(rules),
        allocations: numbers.iter().map(whose).collect(),
        addresses,
        singles: singles.collect(),
    }
}

impl Tally {
    /// Takes what the programs have counted for the rules that are known, and for so many numbers that may get names.
    pub(super) fn take(&mut self, plane: &dyn Plane, numbers: usize) {
        match plane.rules(self.size().max(numbers)) {
            Ok(counted) => self.look(counted),
            Err(error) => tracing::debug!(%error, "flows of rules are not counted"),
        }
    }
}

impl Controller {
    pub(super) fn look_at_countries(&mut self) {
        let now = self.atlas.lock().clone();
        // Why a file cannot be used is told, and changes nothing.
        let newer = |state: &State| (state.tried, state.database.as_ref().map(|it| it.built));
        let same = match (&now.database, &self.countries.database) {
            (Some(now), Some(before)) => std::sync::Arc::ptr_eq(&now.countries, &before.countries),
            _ => newer(&now) == newer(&self.countries),
        };
        self.dirty |= !same || now.tried != self.countries.tried;
        self.countries = now;
    }

    /// Brings the counts of rules up to date.
    pub(super) fn look_at_rules(&mut self) {
        if let Some(plane) = &self.pinned.plane {
            self.tally.take(plane.as_ref(), 0);
        }
    }

    /// The counts of the rules that cover pods here, or once did.
    pub(super) fn rule_counts(&self, wanted: &Desired, policies: &[EgressPolicy]) -> Vec<RuleCount> {
        let observing: BTreeMap<&str, bool> =
            policies.iter().map(|policy| (policy.name.as_str(), policy.observes)).collect();
        let mut counts = self.tally.totals().clone();
        for rule in &wanted.rules {
            counts.entry(rule.clone()).or_default();
        }
        let count = |(rule, value)| {
            let (kind, namespace, name, observes) = match rule {
                RuleName::Policy(name) => {
                    let observes = observing.get(name.as_str()).copied().unwrap_or_default();
                    ("policy", String::new(), name, observes)
                }
                RuleName::Binding(name) => ("binding", name.account, name.name, false),
            };
            RuleCount { kind, namespace, name, observes, value }
        };
        counts.into_iter().map(count).collect()
    }

    /// Whether countries are known, where somebody asks for them or a database is given.
    pub(super) fn known_countries(
        &self,
        policies: &[EgressPolicy],
    ) -> Option<Result<(String, &'static str), NotReady>> {
        let asked = policies.iter().any(|policy| !policy.countries.is_empty());
        if !asked && self.args.countries.is_none() {
            return None;
        }
        let State { database, failure, .. } = &self.countries;
        let not = |reason, message| Some(Err(NotReady { reason, message }));
        let closed = "until then pods that a policy with countries matches otherwise are refused whatever no policy before it decides";
        match (database, failure) {
            (Some(database), None) => {
                let countries = database.countries.len();
                let built = countries::date(database.built);
                let message =
                    format!("built on {built}: {} ranges of {countries} countries", database.ranges);
                Some(Ok((message, reason::DATABASE_READ)))
            }
            (Some(database), Some(failure)) => {
                let built = countries::date(database.built);
                not(
                    reason::DATABASE_UNREADABLE,
                    format!("{failure}; the database that was built on {built} stays in use"),
                )
            }
            (None, Some(failure)) => not(
                reason::DATABASE_UNREADABLE,
                format!(
                    "{failure}: put a database of countries there (the chart's agent.countries); {closed}"
                ),
            ),
            (None, None) => not(
                reason::NO_DATABASE,
                format!(
                    "policies name countries, and this node has no database of them: give one by the chart's agent.countries; {closed}"
                ),
            ),
        }
    }
}
