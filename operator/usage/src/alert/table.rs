//! What is kept of alerts, and the looks that change it.

use super::evaluate::{GRACE, MOST_ITEMS, Slot, State, counting, expected};
use super::item::{Happening, Item};
use super::machine::{Key, Track};
use super::observe::{self, Figures, SCALE};
use super::token::Token;
use super::{Account, Kind};
use crate::ingest::{FUTURE, NEWEST, meta};
use crate::level::Level;
use crate::sql::{Error, Sql, int, text};
use crate::store::Store;
use std::collections::{BTreeMap, BTreeSet};

/// Slots that are looked at in one go; more are left for the next.
const SLOTS: usize = 60;

/// How far back slots are looked at that were missed, in seconds.
const BACK: i64 = 3_600;

/// How it stands with an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The account.
    pub account: String,
    /// Up to when its use was looked at.
    pub until: i64,
    /// Nodes that hold its ports and did not report in the last slot, so that nothing is cleared that they may have to do with.
    pub silent: u32,
    /// What exceeds a limit, raised or not yet.
    pub tracks: BTreeMap<Key, Track>,
}

/// An item with its number, which grows by one with each of an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The number.
    pub number: i64,
    /// The item.
    pub item: Item,
}

/// What a look at an account found.
struct Found {
    account: String,
    state: State,
    items: Vec<Item>,
}

impl Store {
    /// Looks at what is new since the last time, for all accounts of the cluster: those that are not among them are forgotten. `began` is when
    /// the collector did. Says how it stands with the accounts that have alerts, and what is new.
    ///
    /// # Errors
    /// The database fails; the next time the same is looked at.
    pub fn watch(
        &self,
        accounts: &[Account],
        now: i64,
        began: i64,
    ) -> Result<(Vec<Standing>, Vec<Item>), Error> {
        let found = self.read(|sql| {
            let mut states = states(sql)?;
            let newest = meta(sql, NEWEST)?.unwrap_or(0);
            let mut reports = Reports::default();
            let mut found = Vec::new();
            for account in accounts {
                let before = states.remove(&account.name);
                let state = before.unwrap_or_default();
                if account.rules.is_empty() && state.tracks.is_empty() {
                    if state.until != 0 {
                        // An alert that comes later does not look back.
                        let state = State { next: state.next, ..State::default() };
                        found.push(Found { account: account.name.clone(), state, items: Vec::new() });
                    }
                    continue;
                }
                found.push(look(sql, &mut reports, account, state, (now, newest, began))?);
            }
            Ok(found)
        })?;
        let names: BTreeSet<&str> = accounts.iter().map(|it| it.name.as_str()).collect();
        self.write(|sql, _| {
            for found in &found {
                save(sql, found)?;
            }
            forget(sql, &names)
        })?;
        let mut items = Vec::new();
        let mut standings = Vec::new();
        for Found { account, state, items: new } in found {
            standings.push(Standing {
                account,
                until: state.until,
                silent: state.silent,
                tracks: state.tracks,
            });
            items.extend(new);
        }
        Ok((standings, items))
    }

    /// How it stands with these accounts, or with all.
    ///
    /// # Errors
    /// The database fails.
    pub fn standings(&self, accounts: Option<&BTreeSet<String>>) -> Result<Vec<Standing>, Error> {
        let states = self.read(states)?;
        let seen = states.into_iter().filter(|(account, _)| accounts.is_none_or(|it| it.contains(account)));
        Ok(seen
            .map(|(account, State { until, silent, tracks, .. })| Standing { account, until, silent, tracks })
            .collect())
    }

    /// Items of an account, the newest first.
    ///
    /// # Errors
    /// The database fails.
    pub fn items(&self, account: &str) -> Result<Vec<Item>, Error> {
        let rows = self.read(|sql| {
            sql.rows(
                "SELECT item FROM alert_items WHERE account = $1 ORDER BY number DESC LIMIT $2",
                &[account.into(), MOST_ITEMS.into()],
            )
        })?;
        rows.iter().map(|row| parsed(&text(row, 0)?)).collect()
    }

    /// Items of which nobody has been told otherwise ([`Store::tell`]), at most `most`: the first of each account, then the second of each, so
    /// that none waits for those of another.
    ///
    /// # Errors
    /// The database fails.
    pub fn untold(&self, most: u32) -> Result<Vec<Told>, Error> {
        let rows = self.read(|sql| {
            sql.rows(
                "SELECT number, item FROM (
                     SELECT i.account, i.number, i.item, ROW_NUMBER() OVER (PARTITION BY i.account ORDER BY i.number) AS place
                     FROM alert_items i JOIN alert_states s ON s.account = i.account WHERE i.number >= s.told) AS untold
                 ORDER BY place, account LIMIT $1",
                &[i64::from(most).into()],
            )
        })?;
        rows.iter().map(|row| Ok(Told { number: int(row, 0)?, item: parsed(&text(row, 1)?)? })).collect()
    }

    /// Says that an item has been told, and with it all before it.
    ///
    /// # Errors
    /// The database fails.
    pub fn tell(&self, told: &Told) -> Result<(), Error> {
        let values = [told.item.account.as_str().into(), (told.number + 1).into()];
        self.write(|sql, _| {
            sql.run("UPDATE alert_states SET told = $2 WHERE account = $1 AND told < $2", &values).map(|_| ())
        })
    }

    /// The token of an account's feed, and since when it counts.
    ///
    /// # Errors
    /// The database fails.
    pub fn token(&self, account: &str) -> Result<Option<(Token, i64)>, Error> {
        self.read(|sql| token(sql, account))
    }

    /// The token of an account's feed: the one that it has; or the new one, if it has none or is to have another.
    ///
    /// # Errors
    /// The database fails.
    pub fn give_token(&self, account: &str, new: &Token, renew: bool, now: i64) -> Result<Token, Error> {
        let changed =
            if renew { "token = excluded.token, made = excluded.made" } else { "token = feed_tokens.token" };
        let text = format!(
            "INSERT INTO feed_tokens (account, token, made) VALUES ($1, $2, $3) ON CONFLICT (account) DO UPDATE SET {changed}"
        );
        self.write(|sql, _| {
            sql.run(&text, &[account.into(), new.secret().into(), now.into()])?;
            Ok(token(sql, account)?.ok_or(Error::Column(0))?.0)
        })
    }
}

fn token(sql: &mut dyn Sql, account: &str) -> Result<Option<(Token, i64)>, Error> {
    let rows = sql.rows("SELECT token, made FROM feed_tokens WHERE account = $1", &[account.into()])?;
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some((Token::read(&text(row, 0)?).ok_or(Error::Column(0))?, int(row, 1)?)))
}

fn states(sql: &mut dyn Sql) -> Result<BTreeMap<String, State>, Error> {
    let rows = sql.rows("SELECT account, state FROM alert_states ORDER BY account", &[])?;
    rows.iter().map(|row| Ok((text(row, 0)?, parsed(&text(row, 1)?)?))).collect()
}

fn parsed<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, Error> {
    serde_json::from_str(text).map_err(|_| Error::Column(0))
}

fn written<T: serde::Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|_| Error::Column(0))
}

/// Who reported when, which is the same for all accounts.
#[derive(Default)]
struct Reports(BTreeMap<(i64, i64), BTreeSet<String>>);

impl Reports {
    fn of(&mut self, sql: &mut dyn Sql, window: (i64, i64)) -> Result<&BTreeSet<String>, Error> {
        use std::collections::btree_map::Entry;
        match self.0.entry(window) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(observe::reported(sql, window)?)),
        }
    }
}

fn look(
    sql: &mut dyn Sql,
    reports: &mut Reports,
    account: &Account,
    mut state: State,
    (now, newest, began): (i64, i64, i64),
) -> Result<Found, Error> {
    let mut items = state.prune(account, now);
    items.extend(state.look_at_sites(account, now));
    // Of what is reported nothing counts that is ahead of the newest report, or of the clock: either may have jumped.
    let known = Level::Tens.slot(newest.min(now));
    if state.until == 0 || state.until > now.saturating_add(FUTURE) {
        state.until = Level::Tens.slot(if newest == 0 { now } else { newest.min(now) });
    }
    state.until = state.until.max(known - BACK);
    for _ in 0..SLOTS {
        let (begin, end) = (state.until, state.until + Level::Tens.resolution());
        let reported = reports.of(sql, (begin, end))?.clone();
        let complete = expected(account).is_subset(&reported);
        if end > known || !(complete || now >= end.max(began) + GRACE) {
            break;
        }
        let (ports, refused) = (ports(sql, account, begin)?, refused(sql, reports, account, &state, end)?);
        let slot = Slot { begin, reported: &reported, ports: &ports, refused: &refused };
        let mut new = state.look(account, &slot);
        for item in &mut new {
            let length = if item.key.kind == Kind::Refusals { item.limit.seconds } else { end - begin };
            let window = (end - length, end);
            match item.happening {
                Happening::Raised => item.pod = observe::busiest(sql, &account.name, &item.key, window)?,
                // What is far below a limit was not asked for before.
                Happening::Cleared => item.figure = observe::figure(sql, &account.name, &item.key, window)?,
            }
        }
        items.extend(new);
    }
    for item in &mut items {
        item.published = now;
    }
    Ok(Found { account: account.name.clone(), state, items })
}

/// Ports in use in a slot, as far as any alert wants to know.
fn ports(sql: &mut dyn Sql, account: &Account, slot: i64) -> Result<Figures, Error> {
    let wanted = counting(account).filter_map(|rule| Some((rule, rule.port_use?)));
    let limits = wanted.flat_map(|(rule, limit)| {
        let about = account.allocations.iter().filter(|(name, it)| rule.is_about(name) && it.ports > 0);
        about
            .map(move |(_, allocation)| limit.clear_below.min(limit.percent) * allocation.ports * SCALE / 100)
    });
    match limits.min() {
        Some(least) => observe::ports(sql, &account.name, slot, least),
        None => Ok(Figures::default()),
    }
}

/// Refused connections of all windows that end at a moment. Who reported in all of one is asked for only where something may be cleared.
fn refused(
    sql: &mut dyn Sql,
    reports: &mut Reports,
    account: &Account,
    state: &State,
    end: i64,
) -> Result<BTreeMap<i64, (Figures, BTreeSet<String>)>, Error> {
    let mut limits: BTreeMap<i64, i64> = BTreeMap::new();
    for limit in counting(account).filter_map(|rule| rule.refusals) {
        let least = limits.entry(limit.within).or_insert(limit.more_than);
        *least = limit.more_than.min(*least);
    }
    let mut found = BTreeMap::new();
    for (within, more_than) in limits {
        let window = (end - within, end);
        let figures = observe::refused(sql, &account.name, window, more_than + 1)?;
        let raised = state.tracks.keys().any(|key| key.kind == Kind::Refusals);
        let reported = if raised { reports.of(sql, window)?.clone() } else { BTreeSet::new() };
        found.insert(within, (figures, reported));
    }
    Ok(found)
}

fn save(sql: &mut dyn Sql, found: &Found) -> Result<(), Error> {
    let Found { account, state, items } = found;
    let mut state = state.clone();
    for item in items {
        // What is told already, as after a clock went back, is not told again.
        let new = sql.run(
            "INSERT INTO alert_items (account, number, id, item) VALUES ($1, $2, $3, $4) ON CONFLICT (account, id) DO NOTHING",
            &[
                account.as_str().into(),
                state.next.into(),
                item.id.as_str().into(),
                written(item)?.into(),
            ],
        )?;
        state.next += i64::from(new > 0);
    }
    if !items.is_empty() {
        sql.run(
            "DELETE FROM alert_items WHERE account = $1 AND number < $2",
            &[account.as_str().into(), (state.next - MOST_ITEMS).into()],
        )?;
    }
    sql.run(
        "INSERT INTO alert_states (account, state, told) VALUES ($1, $2, 0)
         ON CONFLICT (account) DO UPDATE SET state = excluded.state",
        &[account.as_str().into(), written(&state)?.into()],
    )
    .map(|_| ())
}

/// Forgets accounts that are no more: another one of the same name must not see anything of theirs.
fn forget(sql: &mut dyn Sql, accounts: &BTreeSet<&str>) -> Result<(), Error> {
    let rows = sql.rows("SELECT account FROM alert_states UNION SELECT account FROM feed_tokens", &[])?;
    for row in &rows {
        let account = text(row, 0)?;
        if accounts.contains(account.as_str()) {
            continue;
        }
        for table in ["alert_states", "alert_items", "feed_tokens"] {
            sql.run(&format!("DELETE FROM {table} WHERE account = $1"), &[account.as_str().into()])?;
        }
    }
    Ok(())
}
