//! `WithinLimits` of an allocation: whether its limits, or its account's, refuse flows.

use super::capacity::about;
use super::conditions::Wanted;
use aegis_crds::{Limited, reason, type_};

/// Tells the limit that refuses most on a node, and the pod that it refuses most. `limited` is what each node reports of the
/// allocation.
pub fn judge(limited: &[(&str, &Limited)]) -> Wanted {
    let all = limited.iter().rev().flat_map(|(node, limited)| {
        let counts =
            [limited.account_new_flows, limited.account_flows, limited.pod_new_flows, limited.pod_flows];
        (0..).zip(counts).map(move |(limit, refused)| (refused, limit, *node, limited.pod.as_str()))
    });
    // Of equal ones the first node by name, and its pods' limits before the account's.
    let Some((refused, limit, node, pod)) = all.max_by_key(|(refused, limit, ..)| (*refused, *limit)) else {
        return none();
    };
    let (reason, why, remedy) = match limit {
        _ if refused == 0 => return none(),
        3 => (
            reason::POD_FLOWS,
            "a pod has as many as spec.limits.perPod.flows",
            "see whether it closes or reuses its connections, or raise spec.limits.perPod.flows",
        ),
        2 => (
            reason::POD_NEW_FLOWS,
            "a pod has begun as many in a second as spec.limits.perPod.newFlowsPerSecond",
            "see whether it reuses its connections, or raise spec.limits.perPod.newFlowsPerSecond",
        ),
        1 => (
            reason::ACCOUNT_FLOWS,
            "the account has as many on the node as it may, or as leave other accounts room",
            "spread its pods over more nodes, limit what one pod may take (spec.limits.perPod), or ask the platform's team to raise agent.limits.account.flows or agent.maxFlows",
        ),
        _ => (
            reason::ACCOUNT_NEW_FLOWS,
            "the account has begun as many on the node in a second as it may",
            "spread its pods over more nodes, limit what one pod may begin (spec.limits.perPod), or ask the platform's team to raise agent.limits.account.newFlowsPerSecond",
        ),
    };
    let whose = if pod.is_empty() { String::new() } else { format!(", most of them of pod {pod}") };
    let message = format!(
        "node {node} refused {} new flows during the last minute{whose}: {why}; {remedy}",
        about(refused)
    );
    Wanted::bad(type_::WITHIN_LIMITS, reason, &message)
}

fn none() -> Wanted {
    Wanted::good(type_::WITHIN_LIMITS, reason::NOTHING_REFUSED, "no limit refuses flows")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_that_refuses_most_is_told_with_its_node_and_the_remedy() {
        let limited = |pod_flows, pod_new_flows, account_flows, account_new_flows| Limited {
            pod_flows,
            pod_new_flows,
            account_flows,
            account_new_flows,
            pod: if pod_flows > 2 { "shop/web-1" } else { "shop/web-0" }.into(),
            ..Limited::default()
        };
        for (counts, reason, words) in [
            ([5, 0, 0, 0], reason::POD_FLOWS, "spec.limits.perPod.flows"),
            ([5, 6, 0, 0], reason::POD_NEW_FLOWS, "spec.limits.perPod.newFlowsPerSecond"),
            ([5, 6, 7, 0], reason::ACCOUNT_FLOWS, "agent.limits.account.flows"),
            ([5, 6, 7, 8], reason::ACCOUNT_NEW_FLOWS, "agent.limits.account.newFlowsPerSecond"),
            ([8, 8, 8, 8], reason::POD_FLOWS, "node n1 refused 8 or more"),
        ] {
            let [a, b, c, d] = counts;
            let wanted = judge(&[
                ("n0", &limited(1, 1, 1, 1)),
                ("n1", &limited(a, b, c, d)),
                ("n2", &limited(2, 2, 2, 2)),
            ]);
            assert_eq!((wanted.status, wanted.reason), (false, reason), "{counts:?}");
            for words in [words, "node n1 refused ", ", most of them of pod shop/web-1: "] {
                assert!(wanted.message.contains(words), "{words}: {}", wanted.message);
            }
        }
        let same = |pod_flows| judge(&[("n1", &limited(pod_flows, 0, 0, 0))]);
        assert_eq!(same(412), same(499), "the figure changes every other second");
        let first = judge(&[("n1", &limited(3, 0, 0, 0)), ("n2", &limited(3, 0, 0, 0))]);
        assert!(first.message.starts_with("node n1 "), "{}", first.message);
        let gone = judge(&[("n1", &Limited { pod_flows: 1, ..Limited::default() })]);
        assert!(gone.message.starts_with("node n1 refused 1 new flows during the last minute: a pod"));
    }

    #[test]
    fn without_refusals_all_is_well() {
        for wanted in [judge(&[]), judge(&[("n1", &Limited::default())])] {
            assert_eq!((wanted.status, wanted.reason), (true, reason::NOTHING_REFUSED));
        }
    }
}
