//! `kubectl aegis top`: how full the ports of allocations are, the fullest first.

use crate::output::{Answer, Table, notes, sections};
use crate::state::{State, readable};
use aegis_crds::{Demand, HoldingState, Limited};
use kube::ResourceExt;
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// How full.
#[derive(Debug, Serialize)]
pub struct Top {
    /// By allocation and node, the fullest first.
    pub uses: Vec<Use>,
    /// What could not be looked at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What a node holds and uses of an allocation.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Use {
    /// Namespace and name.
    pub allocation: String,
    /// The node.
    pub node: String,
    /// Ports in use towards the busiest origin, in percent of what the node holds; left out where its agent has told nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fill_percent: Option<u32>,
    /// Slices that it holds: 256 ports each, or its part of a /64.
    pub held: u32,
    /// Slices that it wants.
    pub wanted: u32,
    /// New flows refused for want of a port during the last minute.
    pub refused: u32,
    /// New flows refused by a limit during the last minute.
    pub limited: u32,
    /// The pod whose flows these were for the most part.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub pod: String,
}

/// What agents report, and slices as they are given; of a namespace and a node, if they are named.
pub fn top(state: &State, namespace: Option<&str>, node: Option<&str>) -> Top {
    let mut uses: BTreeMap<(String, String), Use> = BTreeMap::new();
    let mut entry = |account: &str, allocation: &str, holder: &str, add: &dyn Fn(&mut Use)| {
        if namespace.is_none_or(|it| it == account) && node.is_none_or(|it| it == holder) {
            let key = (format!("{account}/{allocation}"), holder.to_owned());
            add(uses.entry(key).or_default());
        }
    };
    for address in readable(&state.snapshot.addresses) {
        let allocation = &address.spec.allocation_ref;
        for holding in address.spec.holdings.iter().filter(|it| it.state == HoldingState::Held) {
            let count = holding.last + 1 - holding.first;
            entry(&allocation.namespace, &allocation.name, &holding.node, &|it| it.held += count);
        }
    }
    for report in readable(&state.snapshot.egress_nodes) {
        let Some(status) = &report.status else { continue };
        let holder = report.name_any();
        for demand in &status.told.demand {
            let Demand { allocation, slices, fill_percent, refused, .. } = demand;
            entry(&allocation.namespace, &allocation.name, &holder, &|it| {
                (it.fill_percent, it.wanted, it.refused) = (Some(*fill_percent), *slices, *refused);
            });
        }
        for limited in &status.told.limited {
            let allocation = &limited.allocation;
            entry(&allocation.namespace, &allocation.name, &holder, &|it| {
                (it.limited, it.pod) = (count(limited), limited.pod.clone());
            });
        }
    }
    let named = uses.into_iter().map(|((allocation, node), it)| Use { allocation, node, ..it });
    let mut uses: Vec<Use> = named.collect();
    uses.sort_by_key(|it| Reverse((it.fill_percent, it.refused, it.limited, it.held)));
    Top { uses, notes: state.notes() }
}

fn count(limited: &Limited) -> u32 {
    let counts = [limited.pod_flows, limited.pod_new_flows, limited.account_flows, limited.account_new_flows];
    counts.into_iter().fold(0, u32::saturating_add)
}

impl Answer for Top {
    fn table(&self) -> String {
        let mut table =
            Table::new(["ALLOCATION", "NODE", "FULL", "SLICES HELD", "WANTED", "REFUSED", "LIMITED", "POD"]);
        let of = |count: u32| if count == 0 { String::new() } else { format!("{count}/min") };
        for it in &self.uses {
            table.row([
                it.allocation.clone(),
                it.node.clone(),
                it.fill_percent.map(|fill| format!("{fill} %")).unwrap_or_default(),
                it.held.to_string(),
                it.wanted.to_string(),
                of(it.refused),
                of(it.limited),
                it.pod.clone(),
            ]);
        }
        let none = if self.uses.is_empty() { "nobody holds or wants a slice" } else { "" };
        sections([none.to_owned(), table.text(), notes(&self.notes)])
    }
}
