//! `CapacityLow`: whether the ports of some node come to an end.

use super::conditions::{Wanted, find};
use aegis_core::egress::Kind;
use aegis_crds::{Condition, Demand, reason, type_};

/// Once low, the condition stays until the fill is this far below the target.
const HYSTERESIS: u32 = 10;
/// Fill is told in steps, so that the message does not change with every report.
const STEP: u32 = 5;

/// Refused flows are told as one digit and zeros, for the same reason.
pub fn about(count: u32) -> String {
    let step = 10_u32.pow(count.max(1).ilog10());
    if count < 2 { count.to_string() } else { format!("{} or more", count / step * step) }
}

/// How an allocation with addresses of these kinds gets more addresses with ports.
pub fn more(kinds: impl Iterator<Item = Kind>) -> &'static str {
    let (mut four, mut single) = (false, false);
    for kind in kinds {
        (four, single) = (four || kind == Kind::Address, single || kind == Kind::Single);
    }
    match (four, single) {
        (false, true) => {
            "add an AegisPrefix of one IPv6 address to spec.prefixes and raise spec.addresses.ipv6 (or add to spec.addresses.explicit) for more addresses"
        }
        (true, true) => {
            "raise spec.addresses.ipv4 and, with an AegisPrefix of one IPv6 address more, spec.addresses.ipv6 (or add to spec.addresses.explicit) for more addresses"
        }
        (_, false) => "raise spec.addresses.ipv4 (or add to spec.addresses.explicit) for more addresses",
    }
}

/// Judges the fullest node. `more` says how to get more addresses. `demand` is what each node reports of the allocation, `site` the name of a node's site where
/// there are several: one can be full while others are not.
pub fn judge<'a>(
    demand: &[(&str, &Demand)],
    site: impl Fn(&str) -> Option<&'a str>,
    target: u32,
    more: &str,
    old: &[Condition],
) -> Wanted {
    let was_low = find(old, type_::CAPACITY_LOW).is_some_and(|condition| condition.status == "True");
    let limit = if was_low { target.saturating_sub(HYSTERESIS).max(1) } else { target };
    // Of equal ones the first by name.
    let fullest = demand.iter().rev().max_by_key(|(_, demand)| (demand.refused, demand.fill_percent));
    let Some((fullest_name, worst)) =
        fullest.filter(|(_, worst)| worst.refused > 0 || worst.fill_percent >= limit)
    else {
        return Wanted::bad(
            type_::CAPACITY_LOW,
            reason::CAPACITY_SUFFICIENT,
            &format!("no node uses {target} % of its ports towards one origin"),
        );
    };
    let mut remedy = format!("{more}, or raise spec.ports.perNode.max for a larger share of each");
    let mut node = format!("node {fullest_name}");
    if let Some(site) = site(fullest_name) {
        node += &format!(" of site {site:?}");
        remedy += &format!(", or the weight of spec.sites {site:?}");
    }
    let fill = worst.fill_percent / STEP * STEP;
    let (reason, message) = match worst {
        Demand { refused: 1.., .. } => (
            reason::EXHAUSTED,
            format!(
                "{node} refused {} new flows during the last minute, since every port towards an origin is in use; {remedy}",
                about(worst.refused)
            ),
        ),
        Demand { fill_percent: 100.., .. } => (
            reason::EXHAUSTED,
            format!("{node} uses all of its ports towards an origin, and refuses the next flow; {remedy}"),
        ),
        _ => (
            reason::ABOVE_TARGET,
            format!(
                "{node} uses {fill} % or more of its ports towards an origin (spec.capacity.targetPercent is {target}); {remedy}"
            ),
        ),
    };
    Wanted::good(type_::CAPACITY_LOW, reason, &message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_crds::AllocationRef;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    const MORE: &str = "raise spec.addresses.ipv4";

    fn demand(fill_percent: u32, refused: u32) -> Demand {
        let allocation = AllocationRef { namespace: "a".into(), name: "x".into() };
        Demand { allocation, slices: 8, fill_percent, refused, reason: String::new() }
    }

    fn low() -> Vec<Condition> {
        vec![Condition {
            type_: type_::CAPACITY_LOW.into(),
            status: "True".into(),
            reason: reason::ABOVE_TARGET.into(),
            message: String::new(),
            observed_generation: None,
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
        }]
    }

    #[test]
    fn turns_true_at_the_target_and_false_well_below() {
        for (fill, old, expected) in [
            (79, vec![], false),
            (80, vec![], true),
            (79, low(), true),
            (70, low(), true),
            (69, low(), false),
        ] {
            let wanted = judge(&[("n1", &demand(fill, 0))], |_| None, 80, MORE, &old);
            assert_eq!(wanted.status, expected, "fill {fill}, low before: {}", !old.is_empty());
        }
    }

    #[test]
    fn names_the_node_the_figure_and_the_remedy() {
        let (calm, full, refusing) = (demand(10, 0), demand(93, 0), demand(60, 12));
        let wanted = judge(&[("n1", &calm), ("n2", &full)], |_| None, 80, MORE, &[]);
        assert_eq!(wanted.reason, reason::ABOVE_TARGET);
        assert!(wanted.message.contains("node n2 uses 90 %"), "{}", wanted.message);
        assert!(wanted.message.contains("spec.addresses.ipv4"), "{}", wanted.message);
        let wanted = judge(&[("n2", &full), ("n3", &refusing)], |_| None, 80, MORE, &[]);
        assert_eq!(wanted.reason, reason::EXHAUSTED);
        assert!(wanted.message.contains("node n3 refused 10 or more"), "{}", wanted.message);
        let refusing = |refused| judge(&[("n1", &demand(100, refused))], |_| None, 80, MORE, &[]);
        assert_eq!(refusing(412), refusing(499), "the figure changes every other second");
        assert!(refusing(412).message.contains("400 or more"));
        assert_eq!(judge(&[("n1", &demand(100, 0))], |_| None, 80, MORE, &[]).reason, reason::EXHAUSTED);
    }

    #[test]
    fn tells_of_addresses_that_have_ports() {
        let of = |kinds: &[Kind]| more(kinds.iter().copied());
        assert!(of(&[]).starts_with("raise spec.addresses.ipv4 (or"));
        assert_eq!(of(&[Kind::Address, Kind::Network]), of(&[]));
        let single = of(&[Kind::Network, Kind::Single]);
        assert!(single.contains("spec.addresses.ipv6") && !single.contains("ipv4"), "{single}");
        let both = of(&[Kind::Address, Kind::Single]);
        assert!(both.contains("spec.addresses.ipv6") && both.contains("spec.addresses.ipv4"), "{both}");
    }

    #[test]
    fn names_the_site_of_the_node_and_its_weight() {
        let wanted = judge(&[("n1", &demand(93, 0))], |_| Some("east"), 80, MORE, &[]);
        assert!(wanted.message.starts_with("node n1 of site \"east\" uses 90 %"), "{}", wanted.message);
        assert!(wanted.message.ends_with("or the weight of spec.sites \"east\""), "{}", wanted.message);
    }

    #[test]
    fn sufficient_message_does_not_change_with_the_figures() {
        let calm = |node, fill| judge(&[(node, &demand(fill, 0))], |_| None, 80, MORE, &[]);
        assert_eq!(calm("n1", 10), calm("n2", 55));
        assert_eq!(judge(&[], |_| None, 80, MORE, &[]).reason, reason::CAPACITY_SUFFICIENT);
    }
}
