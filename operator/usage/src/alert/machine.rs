//! What becomes of one thing that is looked at, from one look to the next.

use aegis_usage_report::Protocol;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// What is looked at by itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Key {
    /// Name of the alert.
    pub alert: String,
    /// Its identity.
    pub uid: String,
    /// Which of its limits.
    pub kind: Kind,
    /// The allocation.
    pub allocation: String,
    /// The egress address, where there is one.
    pub address: Option<IpAddr>,
    /// The origin, where it is known.
    pub origin: Option<SocketAddr>,
    /// The protocol; of a site it says nothing.
    pub protocol: Protocol,
    /// Why connections are refused; otherwise empty.
    pub reason: String,
    /// The site; otherwise empty.
    pub site: String,
}

/// Which limit of an alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Kind {
    /// Ports of an address towards an origin.
    PortUse,
    /// Refused connections.
    Refusals,
    /// A site from which nobody sends.
    SiteWithoutHolders,
}

/// What was seen in one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Surely at or above the limit.
    Above,
    /// Surely below it, but not so far that what is raised is cleared.
    Between,
    /// Surely below what clears it.
    Below,
    /// Nobody knows: somebody who may have to do with it did not report.
    Unknown,
}

/// What is known of a thing that exceeds its limit, or did and is not cleared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Track {
    /// Begin of the first look that was above, in seconds since the Unix epoch.
    pub since: i64,
    /// Seconds for which it was seen above: what nobody reported of counts for nothing.
    pub held: i64,
    /// End of the last look.
    pub until: i64,
    /// End of the look with which it was raised.
    pub raised: Option<i64>,
    /// The last figure: ports, connections, or slices.
    pub figure: i64,
    /// The highest since it began.
    pub highest: i64,
}

/// That something is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Raised,
    Cleared,
}

/// One look: at a moment, for some seconds, with a figure. `wait` is how long it has to be above.
pub(super) fn step(
    track: Option<Track>,
    seen: Seen,
    (at, span): (i64, i64),
    figure: i64,
    wait: i64,
) -> (Option<Track>, Option<Turn>) {
    let began = Track { since: at, held: 0, until: at, raised: None, figure, highest: figure };
    let mut track = match (track, seen) {
        (None, Seen::Above) => began,
        (None, _) => return (None, None),
        (Some(track), _) => track,
    };
    if seen != Seen::Unknown {
        track.figure = figure;
    }
    track.highest = track.highest.max(figure);
    track.until = at + span;
    match (track.raised, seen) {
        (_, Seen::Unknown) | (Some(_), Seen::Above | Seen::Between) => (Some(track), None),
        (Some(_), Seen::Below) => (Some(track), Some(Turn::Cleared)),
        (None, Seen::Above) => {
            track.held += span;
            if track.held < wait {
                return (Some(track), None);
            }
            track.raised = Some(at + span);
            (Some(track), Some(Turn::Raised))
        }
        (None, Seen::Between | Seen::Below) => (None, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::select;

    /// What is told of looks every ten seconds from 100 on, each with the moment of its end or, if cleared, its begin.
    fn told(seen: &[Seen], wait: i64) -> Vec<(Turn, i64)> {
        let mut track = None;
        let mut told = Vec::new();
        for (at, seen) in (100..).step_by(10).zip(seen) {
            let (next, turn) = step(track, *seen, (at, 10), 1, wait);
            told.extend(turn.map(|turn| (turn, if turn == Turn::Raised { at + 10 } else { at })));
            track = next.filter(|_| turn != Some(Turn::Cleared));
        }
        told
    }

    #[test]
    fn it_is_raised_and_cleared_at_the_right_second() {
        use Seen::{Above as A, Below as L, Between as B, Unknown as U};
        use Turn::{Cleared, Raised};
        type Case<'c> = (&'c [Seen], i64, &'c [(Turn, i64)]);
        let cases: [Case<'_>; 12] = [
            (&[L, B, U], 0, &[]),
            (&[A], 0, &[(Raised, 110)]),
            (&[A], 10, &[(Raised, 110)]),
            (&[A], 11, &[]),
            (&[A, A], 11, &[(Raised, 120)]),
            (&[A, A, A, A, A, L], 30, &[(Raised, 130), (Cleared, 150)]),
            // Hysteresis: below the limit it is not cleared, and does not wait any more either.
            (&[A, B, A, B, L, A], 10, &[(Raised, 110), (Cleared, 140), (Raised, 160)]),
            (&[A, A, B, A, A], 30, &[]),
            (&[A, A, L, A, A, A], 30, &[(Raised, 160)]),
            // What nobody knows neither breaks the wait nor counts for it, and clears nothing.
            (&[A, U, U, A, U, A], 30, &[(Raised, 160)]),
            (&[A, U, U, U, U], 30, &[]),
            (&[A, U, U, L, U], 0, &[(Raised, 110), (Cleared, 130)]),
        ];
        for (seen, wait, expected) in cases {
            assert_eq!(told(seen, wait), expected, "{seen:?} for {wait} s");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Raised and cleared take turns; each raising has been above for long enough since the last look that was surely not.
        #[test]
        fn whatever_is_seen(
            seen in prop::collection::vec(select(vec![Seen::Above, Seen::Between, Seen::Below, Seen::Unknown]), 0..60),
            wait in 0i64..60,
        ) {
            let told = told(&seen, wait);
            for (at, (turn, _)) in told.iter().enumerate() {
                prop_assert_eq!(*turn, if at % 2 == 0 { Turn::Raised } else { Turn::Cleared });
            }
            for (turn, moment) in &told {
                let index = usize::try_from((moment - 100) / 10).unwrap();
                if *turn == Turn::Cleared {
                    prop_assert_eq!(seen[index], Seen::Below);
                    continue;
                }
                let before = &seen[..index];
                let run = before.iter().rev().take_while(|it| matches!(it, Seen::Above | Seen::Unknown));
                let above = run.filter(|it| **it == Seen::Above).count() as i64 * 10;
                prop_assert!(above >= wait && before.last() == Some(&Seen::Above));
            }
            // With all that is not known left out, the same is told, only sooner.
            let known: Vec<Seen> = seen.iter().copied().filter(|it| *it != Seen::Unknown).collect();
            let turns = |told: Vec<(Turn, i64)>| told.into_iter().map(|(turn, _)| turn).collect::<Vec<_>>();
            prop_assert_eq!(turns(told), turns(self::told(&known, wait)));
        }
    }
}
