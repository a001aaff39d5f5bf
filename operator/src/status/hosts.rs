//! Whether nodes find addresses of the host names of a rule.

use super::conditions::Wanted;
use super::fleet::Fleet;
use aegis_crds::{reason, type_};
use std::collections::{BTreeMap, BTreeSet};

/// Most names that a message names, and most nodes with each.
const NAMED: usize = 3;

/// The condition of a rule with host names; one without has none. Names with `*` are not looked up: there is nothing to tell of them.
pub fn resolved(field: &str, hosts: &[String], fleet: &Fleet<'_>) -> Option<Wanted> {
    if hosts.is_empty() {
        return None;
    }
    let names: BTreeSet<&str> = hosts.iter().map(String::as_str).collect();
    let mut lost: BTreeMap<&str, Vec<(&str, bool, &str)>> = BTreeMap::new();
    for (node, entry) in fleet.unresolved().filter(|(_, entry)| names.contains(entry.host.as_str())) {
        lost.entry(&entry.host).or_default().push((node, entry.absent, &entry.message));
    }
    if lost.is_empty() {
        let message = "every name without * has addresses on the nodes with pods that it is for";
        return Some(Wanted::good(type_::RESOLVED, reason::RESOLVED, message));
    }
    let absent = lost.values().all(|nodes| nodes.iter().all(|(_, absent, _)| *absent));
    let described = lost.iter().take(NAMED).map(|(host, nodes)| {
        let on: Vec<&str> = nodes.iter().take(NAMED).map(|(node, ..)| *node).collect();
        let more =
            if nodes.len() > NAMED { format!(" and {} more", nodes.len() - NAMED) } else { String::new() };
        let why = nodes.first().map(|(.., message)| *message).unwrap_or_default();
        format!("{host:?} has no address on {}{more} ({why})", on.join(", "))
    });
    let mut message = format!("{field}: {}", described.collect::<Vec<_>>().join("; "));
    if lost.len() > NAMED {
        message += &format!("; and {} more names", lost.len() - NAMED);
    }
    message += if absent {
        "; correct the name or take it out; meanwhile nothing goes by it"
    } else {
        "; see that the nodes reach the resolvers of the chart's agent.dns.servers; what is known of it stays in force"
    };
    let reason = if absent { reason::HOST_NOT_FOUND } else { reason::RESOLVER_FAILED };
    Some(Wanted::bad(type_::RESOLVED, reason, &message))
}
