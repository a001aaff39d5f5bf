//! Since when a range is whose. Whoever gets a prefix sees who uses it from then on, not who did before.

use crate::scope::{Owned, Prefix};
use crate::sql::{Error, Sql, int, text};
use ipnet::IpNet;
use std::collections::BTreeMap;

/// By range, its account and the moment.
pub(crate) type Owners = BTreeMap<IpNet, (String, i64)>;

/// Whether all of that is known.
pub(crate) fn knows(owners: &Owners, prefixes: &[Prefix]) -> bool {
    prefixes.iter().all(|it| owners.get(&it.range).is_some_and(|(account, _)| *account == it.account))
}

/// The prefixes, each with its moment.
pub(crate) fn of(owners: &Owners, prefixes: &[Prefix]) -> Vec<Owned> {
    let since = |it: &Prefix| owners.get(&it.range).map(|(_, since)| *since);
    let owned = |it: &Prefix| Some(Owned { range: it.range, account: it.account.clone(), since: since(it)? });
    prefixes.iter().filter_map(owned).collect()
}

/// Notes what has changed, in the caller's transaction, and gives all that is known. Ranges that are gone stay noted: who gets one next
/// is another owner.
pub(crate) fn note(sql: &mut dyn Sql, prefixes: &[Prefix], now: i64) -> Result<Owners, Error> {
    let mut owners = Owners::new();
    for row in sql.rows("SELECT prefix, account, since FROM owners", &[])? {
        let range = text(&row, 0)?.parse().map_err(|_| Error::Column(0))?;
        owners.insert(range, (text(&row, 1)?, int(&row, 2)?));
    }
    for prefix in prefixes {
        let since = match owners.get(&prefix.range) {
            Some((account, _)) if *account == prefix.account => continue,
            Some(_) => now,
            None => prefix.since.unwrap_or(now),
        };
        sql.run(
            "INSERT INTO owners (prefix, account, since) VALUES ($1, $2, $3)
             ON CONFLICT (prefix) DO UPDATE SET account = excluded.account, since = excluded.since",
            &[prefix.range.to_string().into(), prefix.account.as_str().into(), since.into()],
        )?;
        owners.insert(prefix.range, (prefix.account.clone(), since));
    }
    Ok(owners)
}
