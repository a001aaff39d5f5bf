//! Looks up names without `*` as pods would: a pod may have been told an address before anybody listened, or be one whose queries do
//! not come by here.

use super::ask::{self, AskError, Way};
use super::{Names, Unresolved, message};
use aegis_core::policy::names::Record;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Shortest and longest time until a name is looked up again. In between its time to live decides.
const SOONEST: Duration = Duration::from_secs(5);
const LATEST: Duration = Duration::from_secs(300);
/// Look-ups at a time.
const AT_A_TIME: usize = 16;

/// Resolvers that a file like `/etc/resolv.conf` names.
pub fn resolvers(path: &Path) -> std::io::Result<Vec<IpAddr>> {
    let text = std::fs::read_to_string(path)?;
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    Ok(servers.filter_map(|server| server.trim().split('%').next()?.parse().ok()).collect())
}

/// Keeps what is known of names that matter up to date, until the future is dropped.
pub async fn keep(names: Names, resolvers: Vec<IpAddr>) {
    let mut looked = names.0.looked.subscribe();
    let mut due: BTreeMap<String, Instant> = BTreeMap::new();
    let mut tasks: JoinSet<(String, Duration)> = JoinSet::new();
    let mut busy = BTreeSet::new();
    loop {
        let wanted = names.lock().wanted.clone();
        let now = Instant::now();
        due.retain(|name, _| wanted.contains(name));
        for name in &wanted {
            due.entry(name.clone()).or_insert(now);
        }
        let ready: Vec<String> = due
            .iter()
            .filter(|(name, at)| **at <= now && !busy.contains(*name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in ready {
            if tasks.len() >= AT_A_TIME {
                break;
            }
            busy.insert(name.clone());
            let (names, resolvers) = (names.clone(), resolvers.clone());
            tasks.spawn(async move {
                let again = look_up(&names, &name, &resolvers).await;
                (name, again)
            });
        }
        let waiting = due.iter().filter(|(name, _)| !busy.contains(*name)).map(|(_, at)| *at).min();
        let next = waiting.filter(|_| tasks.len() < AT_A_TIME).unwrap_or(now + LATEST);
        tokio::select! {
            changed = looked.changed() => if changed.is_err() { return },
            Some(done) = tasks.join_next() => {
                if let Ok((name, again)) = done {
                    busy.remove(&name);
                    due.insert(name, Instant::now() + again);
                }
            }
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

/// Looks a name up. Gives the time until that is to be done again.
async fn look_up(names: &Names, name: &str, resolvers: &[IpAddr]) -> Duration {
    let (v4, v6) =
        tokio::join!(ask_for(name, RecordType::A, resolvers), ask_for(name, RecordType::AAAA, resolvers));
    let (mut records, mut failures, mut absent) = (Vec::new(), Vec::new(), true);
    for found in [v4, v6] {
        match found {
            Ok(found) => records.extend(found),
            Err(error) => {
                absent &= error.absent;
                failures.push(error.message);
            }
        }
    }
    failures.dedup();
    let addresses = records.iter().filter_map(|it| match it {
        Record::Address(_, _, ttl) => Some(*ttl),
        Record::Alias(..) => None,
    });
    let soonest = addresses.min();
    let outcome = match soonest {
        // That the other family has none, or cannot be told, is no failure.
        Some(_) => names.take(&records).await.err().map(|why| Unresolved {
            absent: false,
            message: format!("its addresses could not be taken ({})", why.word()),
        }),
        None if failures.is_empty() => {
            Some(Unresolved { absent: true, message: "it has no address".to_owned() })
        }
        None => Some(Unresolved { absent, message: failures.join("; ") }),
    };
    let failed = outcome.is_some();
    {
        let mut state = names.lock();
        let before = match outcome {
            Some(outcome) if state.wanted.contains(name) => state.unresolved.insert(name.to_owned(), outcome),
            _ => state.unresolved.remove(name),
        };
        if failed && before.is_none() {
            tracing::warn!(name, "a host name of a rule has no address");
        }
    }
    match soonest {
        Some(ttl) if !failed => Duration::from_secs(ttl.into()).clamp(SOONEST, LATEST),
        _ => SOONEST * 2,
    }
}

async fn ask_for(name: &str, kind: RecordType, resolvers: &[IpAddr]) -> Result<Vec<Record>, Unresolved> {
    let mut failure = Unresolved {
        absent: false,
        message: "no resolver is known: name one with agent.dns.servers".to_owned(),
    };
    for resolver in resolvers {
        let failed = |message| Unresolved { absent: false, message };
        failure = match ask_one((*resolver, ask::PORT).into(), name, kind).await {
            Ok((records, ResponseCode::NoError)) => return Ok(records),
            Ok((_, ResponseCode::NXDomain)) => {
                return Err(Unresolved { absent: true, message: "no such name (NXDOMAIN)".to_owned() });
            }
            Ok((_, code)) => failed(format!("{resolver} answers: {code}")),
            Err(error) => failed(format!("{resolver}: {error}")),
        };
    }
    Err(failure)
}

async fn ask_one(
    resolver: SocketAddr,
    name: &str,
    kind: RecordType,
) -> Result<(Vec<Record>, ResponseCode), AskError> {
    let parsed = message::query(ask::random(), name, kind)?;
    let query = parsed.to_vec().map_err(message::MessageError::from)?;
    let (_, mut answer) = ask::ask(resolver, &query, &parsed, Way::Udp).await?;
    if answer.truncated {
        (_, answer) = ask::ask(resolver, &query, &parsed, Way::Tcp).await?;
    }
    Ok((answer.records, answer.code))
}
