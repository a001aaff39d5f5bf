//! Keeping a report small without losing anything of its sums.

use crate::{Figures, Key, Row};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// Fewer rows than this make no report: there is one for each protocol that nothing can be summed beyond.
const LEAST: usize = 8;

/// At most `limit` rows (but [`LEAST`]), one for each key: the rows with the highest peak are kept apart, then those with most
/// traffic; the rest is summed into rows without origin and pod, and where even these are too many, without rule, or with nothing
/// but the protocol. Sums over all rows stay what they were; the order is that of the keys.
///
/// Ports of different origins are different ports of the same number: the sum in a row without origin says how many flows
/// there are, and not how full an address is.
pub fn bound(rows: Vec<Row>, limit: usize) -> Vec<Row> {
    let limit = limit.max(LEAST);
    let merged = merge(rows.into_iter().map(|row| (row.key, row.figures)));
    if merged.len() <= limit {
        return rows_of(merged);
    }
    let coarser = [without_origin, without_rule, protocol_only];
    let sums = |coarsen: &fn(&Key) -> Key| merged.keys().map(coarsen).collect::<BTreeSet<_>>().len();
    let few = coarser.into_iter().map(|it| it as fn(&Key) -> Key).find(|it| sums(it) <= limit / 2);
    let coarsen = few.unwrap_or(protocol_only);
    let apart = limit - sums(&coarsen);
    let mut ranked: Vec<(Key, Figures)> = merged.into_iter().collect();
    ranked.sort_by_cached_key(|(key, figures)| {
        let bytes = figures.sent.bytes.saturating_add(figures.received.bytes);
        let refused: u64 = figures.refused.values().fold(0, |sum, count| sum.saturating_add(*count));
        (Reverse((figures.peak, figures.in_use, refused, figures.flows, bytes)), key.clone())
    });
    let rest = ranked.split_off(apart);
    let summed = rest.into_iter().map(|(key, figures)| (coarsen(&key), figures));
    rows_of(merge(ranked.into_iter().chain(summed)))
}

fn merge(rows: impl Iterator<Item = (Key, Figures)>) -> BTreeMap<Key, Figures> {
    let mut merged: BTreeMap<Key, Figures> = BTreeMap::new();
    for (key, figures) in rows {
        merged.entry(key).or_default().add(&figures);
    }
    merged
}

fn rows_of(merged: BTreeMap<Key, Figures>) -> Vec<Row> {
    merged.into_iter().map(|(key, figures)| Row { key, figures }).collect()
}

fn without_origin(key: &Key) -> Key {
    Key { origin: None, pod: String::new(), ..key.clone() }
}

fn without_rule(key: &Key) -> Key {
    Key { rule: String::new(), ..without_origin(key) }
}

fn protocol_only(key: &Key) -> Key {
    Key { protocol: key.protocol, ..Key::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Protocol, Volume};
    use proptest::prelude::*;
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};

    fn row() -> impl Strategy<Value = Row> {
        let key = (0u8..3, 0u16..200, 0usize..4, 0u8..30, 0u8..12, 0u8..3, 0u8..4);
        let figures = (0u64..300, 0u64..300, 0u64..9, 0u64..3, 0u64..9999);
        (key, figures).prop_map(|((address, port, protocol, rule, account, site, pod), numbers)| {
            let (in_use, more, flows, refused, bytes) = numbers;
            let key = Key {
                address: Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, address))),
                origin: Some(SocketAddr::from(([198, 51, 100, 1], port))),
                protocol: Protocol::ALL[protocol],
                rule: format!("binding/{rule}"),
                account: format!("account-{account}"),
                allocation: "partner".into(),
                site: format!("site-{site}"),
                pod: format!("pod-{pod}"),
            };
            let volume = Volume { packets: bytes / 100, bytes };
            let refused =
                if refused > 0 { BTreeMap::from([("no_port".into(), refused)]) } else { BTreeMap::new() };
            let figures =
                Figures { in_use, peak: in_use + more, flows, refused, sent: volume, received: volume };
            Row { key, figures }
        })
    }

    fn sum(rows: &[Row], of: impl Fn(&Key) -> bool) -> Figures {
        let mut sum = Figures::default();
        rows.iter().filter(|row| of(&row.key)).for_each(|row| sum.add(&row.figures));
        sum
    }

    proptest! {
        #[test]
        fn sums_are_kept(rows in prop::collection::vec(row(), 0..400), limit in 0usize..300) {
            let bounded = bound(rows.clone(), limit);
            prop_assert!(bounded.len() <= limit.max(LEAST));
            prop_assert_eq!(sum(&rows, |_| true), sum(&bounded, |_| true));
            for protocol in Protocol::ALL {
                prop_assert_eq!(sum(&rows, |key| key.protocol == protocol), sum(&bounded, |key| key.protocol == protocol));
            }
            // Summed rows still have their account, unless there are too many accounts for that.
            if bounded.iter().all(|row| !row.key.account.is_empty()) {
                for account in 0..12 {
                    let of = |key: &Key| key.account == format!("account-{account}");
                    prop_assert_eq!(sum(&rows, of), sum(&bounded, of));
                }
            }
            let keys: BTreeSet<&Key> = bounded.iter().map(|row| &row.key).collect();
            prop_assert_eq!(keys.len(), bounded.len());
        }
    }

    #[test]
    fn the_fullest_stay_apart() {
        let row = |port: u16, peak| {
            let origin = Some(SocketAddr::from(([198, 51, 100, 1], port)));
            Row {
                key: Key { origin, account: "shop".into(), ..Key::default() },
                figures: Figures { peak, in_use: 1, ..Figures::default() },
            }
        };
        let rows = (0..100).map(|port| row(port, u64::from(port))).collect();
        let bounded = bound(rows, 10);
        let peaks: Vec<u64> = bounded.iter().map(|row| row.figures.peak).collect();
        assert_eq!(peaks, [(0..91).sum::<u64>(), 91, 92, 93, 94, 95, 96, 97, 98, 99]);
        assert_eq!(bounded[0].key.account, "shop");
        assert_eq!(bounded[0].figures.in_use, 91);
    }
}
