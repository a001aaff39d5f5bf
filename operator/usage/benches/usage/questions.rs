//! What dashboards ask.

use crate::cluster::address;
use crate::support::T0;
use aegis_usage::{
    Aggregation, Dimension, Figure, Filter, Level, Measure, Order, OriginFilter, Page, Query, Scope, Store,
};
use std::time::{Duration, Instant};

/// Asks a store, and says how long each of the questions took.
type Ask = Box<dyn Fn(&Store) -> Vec<Duration>>;

/// What somebody looks at, and how the store is asked for it.
pub struct Look {
    pub what: &'static str,
    pub ask: Ask,
}

/// All that is measured, of a store whose newest report ends at `end`.
pub fn looks(end: i64) -> Vec<Look> {
    let page = [
        ("page, an address: its nodes and their fullest origins, now", now(end, of(3))),
        ("page, all accounts: nodes and their fullest origins, now", now(end, Filter::default())),
        ("page, an address: six origins over 10 minutes", plots(end, 600, Level::Tens, 10)),
        ("page, an address: six origins over an hour", plots(end, 3_600, Level::Tens, 60)),
        ("page, an address: six origins over a day", plots(end, 86_400, Level::Minutes, 900)),
        ("page, an address: six origins over a week", plots(end, 7 * 86_400, Level::Hours, 3_600)),
    ];
    let all = Query { from: T0, to: end, first: 1_000, level: Some(Level::Tens), ..Query::default() };
    let minutes = Query { level: Some(Level::Minutes), step: Some(60), ..all.clone() };
    let ports = vec![figure(Measure::InUse, Aggregation::Avg), figure(Measure::Peak, Aggregation::Max)];
    let one = OriginFilter::Range("198.51.0.40/32".parse().unwrap(), None);
    let rest = [
        (
            "all the time: one address and origin, by 10 s",
            Query {
                step: Some(10),
                filter: Filter { origins: vec![one], ..of(0) },
                figures: ports.clone(),
                ..all.clone()
            },
        ),
        (
            "all the time: an account's fullest origins, with a quantile, of 10 s",
            Query {
                filter: of(3),
                by: vec![Dimension::Address, Dimension::Origin],
                figures: vec![
                    figure(Measure::Peak, Aggregation::Max),
                    figure(Measure::InUse, Aggregation::Quantile(950)),
                ],
                order: Order::Highest,
                first: 10,
                ..all.clone()
            },
        ),
        (
            "all the time: an account by node, by minutes",
            Query { filter: of(7), by: vec![Dimension::Node], figures: ports, ..minutes.clone() },
        ),
        (
            "all the time: all accounts' flows, by minutes",
            Query {
                by: vec![Dimension::Account],
                figures: vec![figure(Measure::Flows, Aggregation::Sum)],
                ..minutes
            },
        ),
    ];
    let rest =
        rest.map(|(what, query)| Look { what, ask: Box::new(move |store| vec![answer(store, &query).1]) });
    page.map(|(what, ask)| Look { what, ask }).into_iter().chain(rest).collect()
}

fn answer(store: &Store, query: &Query) -> (Page, Duration) {
    let begin = Instant::now();
    let page = store.query(&Scope::All, query).unwrap();
    assert!(!page.rows.is_empty(), "{query:?}");
    (page, begin.elapsed())
}

fn figure(measure: Measure, aggregation: Aggregation) -> Figure {
    Figure { measure, aggregation }
}

fn of(account: u64) -> Filter {
    let range = ipnet::Ipv4Net::from(address(account)).into();
    Filter { accounts: vec![format!("account-{account}")], addresses: vec![range], ..Filter::default() }
}

/// As `fill.js` of the page asks.
fn now(end: i64, filter: Filter) -> Ask {
    let query = Query {
        from: end - 60,
        to: end,
        level: Some(Level::Tens),
        filter,
        newest: true,
        by: vec![Dimension::Address, Dimension::Node, Dimension::Origin, Dimension::Protocol],
        fullest: Some(2),
        figures: vec![figure(Measure::InUse, Aggregation::Max)],
        order: Order::Highest,
        first: 1_000,
        ..Query::default()
    };
    Box::new(move |store| vec![answer(store, &query).1])
}

/// As `address.js` asks: which origins had the most, and these over time.
fn plots(end: i64, length: i64, level: Level, step: i64) -> Ask {
    let window = Query {
        from: (end - length).div_euclid(step) * step,
        to: end,
        level: Some(level),
        filter: of(3),
        by: vec![Dimension::Origin, Dimension::Protocol],
        figures: vec![figure(Measure::InUse, Aggregation::Max)],
        ..Query::default()
    };
    Box::new(move |store| {
        let most = Query { order: Order::Highest, first: 6, ..window.clone() };
        let (top, first) = answer(store, &most);
        let origins = top.rows.into_iter().map(|row| {
            let origin: std::net::SocketAddr = row.by[0].parse().unwrap();
            OriginFilter::Range(ipnet::IpNet::from(origin.ip()), Some(origin.port()))
        });
        let filter = Filter { origins: origins.collect(), ..window.filter.clone() };
        let (_, second) = answer(store, &Query { step: Some(step), filter, first: 1_000, ..window.clone() });
        vec![first, second]
    })
}
