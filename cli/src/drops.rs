//! `kubectl aegis drops`: what does not get through, by node and reason, as it happens.

use crate::cluster::{Agent, Cluster};
use crate::output::{Answer, Table, notes, sections};
use crate::state::State;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// What does not get through.
#[derive(Debug, Serialize)]
pub struct Drops {
    /// By node and reason, most a second first.
    pub drops: Vec<Lost>,
    /// Nodes that were asked.
    pub nodes: usize,
    /// For how long they were watched, in seconds; 0: not at all.
    pub seconds: u64,
    /// What could not be looked at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Packets of a node that were dropped, or new flows that were refused, for one reason.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Lost {
    /// The node.
    pub node: String,
    /// Label `reason` of the metric `aegis_packets_total`.
    pub reason: String,
    /// Packets a second while they were watched.
    pub per_second: f64,
    /// Packets since the node's data plane was loaded.
    pub total: u64,
}

/// Counters of a node.
#[derive(Clone, Debug, Deserialize)]
struct Counters {
    /// Milliseconds since it has booted.
    at: u64,
    /// Packets by what happened to them.
    packets: BTreeMap<String, u64>,
}

/// Asks agents twice, so long apart; or once, for what there was.
///
/// # Errors
/// None of them answers.
pub async fn drops(online: &Cluster, state: &State, agents: &[Agent<'_>], watch: Duration) -> Result<Drops> {
    let question = ["counters".to_owned()];
    let before: Vec<Result<Counters>> = online.ask_all(agents, &question).await?;
    let after = if watch.is_zero() {
        None
    } else {
        tokio::time::sleep(watch).await;
        Some(online.ask_all(agents, &question).await?)
    };
    let nodes: Vec<&str> = agents.iter().map(|agent| agent.node).collect();
    Ok(compare(&nodes, before, after, watch.as_secs(), state.notes()))
}

/// What came between two looks, or was there at the only one.
fn compare(
    nodes: &[&str],
    before: Vec<Result<Counters>>,
    after: Option<Vec<Result<Counters>>>,
    seconds: u64,
    mut notes: Vec<String>,
) -> Drops {
    let watched = after.is_some();
    let after = after.into_iter().flatten().map(Some).chain(std::iter::repeat_with(|| None));
    let mut drops = Vec::new();
    for ((node, before), after) in nodes.iter().zip(before).zip(after) {
        let (before, now) = match (before, after.transpose()) {
            (Ok(before), Ok(None)) => (None, before),
            (Ok(before), Ok(Some(after))) => (Some(before), after),
            (Err(error), _) | (_, Err(error)) => {
                notes.push(format!("{error:#}"));
                continue;
            }
        };
        for (reason, total) in now.packets.iter().filter(|(reason, _)| is_lost(reason)) {
            let then = before.as_ref().map(|before| (before.at, before.packets.get(reason).copied()));
            let per_second = then.map_or(0.0, |(at, then)| {
                // Where the data plane was loaded anew, all have come since.
                let more = total.checked_sub(then.unwrap_or_default()).unwrap_or(*total);
                more as f64 * 1000.0 / now.at.saturating_sub(at).max(1) as f64
            });
            if per_second > 0.0 || !watched && *total > 0 {
                drops.push(Lost { node: (*node).into(), reason: reason.clone(), per_second, total: *total });
            }
        }
    }
    let order = |drop: &Lost| (-drop.per_second, std::cmp::Reverse(drop.total));
    drops.sort_by(|a, b| order(a).partial_cmp(&order(b)).unwrap_or(std::cmp::Ordering::Equal));
    Drops { drops, nodes: nodes.len(), seconds, notes }
}

/// Whether packets with this reason got no further: see `Counter::label`.
fn is_lost(reason: &str) -> bool {
    reason.starts_with("drop_") || reason.starts_with("refuse_")
}

impl Answer for Drops {
    fn table(&self) -> String {
        let mut table = Table::new(["NODE", "REASON", "A SECOND", "SINCE LOADED"]);
        for drop in &self.drops {
            let rate = if self.seconds == 0 { String::new() } else { format!("{:.1}", drop.per_second) };
            table.row([drop.node.clone(), drop.reason.clone(), rate, drop.total.to_string()]);
        }
        let none = match (self.drops.is_empty(), self.seconds) {
            (false, _) => String::new(),
            (true, 0) => format!("nothing was dropped or refused on {} nodes", self.nodes),
            (true, seconds) => {
                format!("nothing was dropped or refused on {} nodes in {seconds} s", self.nodes)
            }
        };
        sections([none, table.text(), notes(&self.notes)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    fn counters(at: u64, packets: &[(&str, u64)]) -> Result<Counters> {
        let packets = packets.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect();
        Ok(Counters { at, packets })
    }

    #[test]
    fn rates_are_of_what_came_between_two_looks() {
        let before = vec![
            counters(1_000, &[("drop_leak", 10), ("refuse_no_port", 5), ("translated", 7)]),
            counters(500, &[("drop_leak", 100)]),
            counters(500, &[("drop_leak", 1)]),
        ];
        let after = vec![
            counters(6_000, &[("drop_leak", 20), ("refuse_no_port", 5), ("translated", 900)]),
            // Loaded anew meanwhile.
            counters(2_500, &[("drop_leak", 8)]),
            Err(anyhow!("the agent of node n3 does not answer")),
        ];
        let found = compare(&["n1", "n2", "n3"], before, Some(after), 5, Vec::new());
        assert_eq!(
            found.table(),
            "NODE   REASON      A SECOND   SINCE LOADED\n\
             n2     drop_leak   4.0        8\n\
             n1     drop_leak   2.0        20\n\n\
             note: the agent of node n3 does not answer\n"
        );
    }

    #[test]
    fn one_look_tells_what_there_was() {
        let once = || vec![counters(1_000, &[("drop_leak", 10), ("refuse_no_port", 0), ("translated", 7)])];
        let found = compare(&["n1"], once(), None, 0, Vec::new());
        assert_eq!(
            found.table(),
            "NODE   REASON      A SECOND   SINCE LOADED\nn1     drop_leak   -          10\n"
        );
        let quiet = compare(&["n1"], once(), Some(once()), 5, Vec::new());
        assert_eq!(quiet.table(), "nothing was dropped or refused on 1 nodes in 5 s\n");
    }
}
