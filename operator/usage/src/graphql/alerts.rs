//! How it stands with alerts.

use super::{ProtocolName, Time, ask, scope};
use crate::alert::{Key, Kind, Standing, Track};
use crate::query::{QueryError, cursor, most};
use crate::scope::Scope;
use async_graphql::{Context, Enum, Result, SimpleObject};
use std::collections::BTreeSet;

/// Which limit of an alert.
#[derive(Enum, Clone, Copy, PartialEq, Eq)]
#[graphql(remote = "Kind", name = "AlertKind")]
enum KindName {
    /// Ports of an address towards an origin.
    PortUse,
    /// Refused connections.
    Refusals,
    /// A site from which nobody sends.
    SiteWithoutHolders,
}

/// Something that exceeds a limit of a UsageAlert.
#[derive(SimpleObject)]
pub(super) struct Alert {
    /// Its place in the order of all, for `after`.
    cursor: String,
    /// Account: a namespace.
    account: String,
    /// Name of the UsageAlert.
    alert: String,
    /// Which of its limits.
    kind: KindName,
    /// The allocation.
    allocation: String,
    /// Egress address; empty where none is concerned.
    address: String,
    /// Address and port that the traffic goes to; empty where none is concerned.
    origin: String,
    /// Protocol; of a site it says nothing.
    protocol: ProtocolName,
    /// Why connections are refused.
    reason: String,
    /// The site, where one is concerned.
    site: String,
    /// Since when it exceeds the limit.
    since: Time,
    /// When it was raised; not yet where there is none.
    raised: Option<Time>,
    /// Ports in use, refused connections or slices, as of the last look.
    figure: i64,
    /// The most of them since it began.
    highest: i64,
    /// Nodes that hold ports of the account and did not report lately: what they may have to do with is not cleared.
    silent_nodes: u32,
}

/// By account and what they are about, after one of them: at most so many.
pub(super) async fn alerts(
    context: &Context<'_>,
    accounts: Vec<String>,
    first: u32,
    after: Option<String>,
) -> Result<Vec<Alert>> {
    let after: Option<(String, Key)> =
        after.map(|after| cursor::unpack(&after).ok_or(QueryError::Cursor)).transpose()?;
    let seen = match scope(context, &accounts).await? {
        Scope::All => None,
        // The owner of a prefix sees who uses it, but not what they want to be told.
        Scope::Part { accounts, .. } => Some(accounts),
    };
    let named: BTreeSet<String> = accounts.into_iter().collect();
    let wanted = match seen {
        None if named.is_empty() => None,
        None => Some(named),
        Some(seen) if named.is_empty() => Some(seen),
        Some(seen) => Some(seen.intersection(&named).cloned().collect()),
    };
    let standings = ask(context, move |store| store.standings(wanted.as_ref())).await?;
    let all = standings.into_iter().flat_map(|Standing { account, silent, tracks, .. }| {
        tracks.into_iter().map(move |(key, track)| ((account.clone(), key), silent, track))
    });
    let rest = all.filter(|(place, _, _)| after.as_ref().is_none_or(|after| place > after));
    let page = rest.take(first.min(most::ROWS) as usize);
    Ok(page.map(|(place, silent, track)| alert(place, silent, track)).collect())
}

fn alert(place: (String, Key), silent_nodes: u32, track: Track) -> Alert {
    let cursor = cursor::pack(&place).unwrap_or_default();
    let (account, key) = place;
    Alert {
        cursor,
        account,
        alert: key.alert,
        kind: key.kind.into(),
        allocation: key.allocation,
        address: key.address.map(|it| it.to_string()).unwrap_or_default(),
        origin: key.origin.map(|it| it.to_string()).unwrap_or_default(),
        protocol: key.protocol.into(),
        reason: key.reason,
        site: key.site,
        since: Time(track.since),
        raised: track.raised.map(Time),
        figure: track.figure,
        highest: track.highest,
        silent_nodes,
    }
}
