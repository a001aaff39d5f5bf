//! A small cluster, and tokens whose words say whose they are.

use aegis_usage::cluster::{Address, Allocation, Cluster, Condition, Holding, Policy, Site, State};
use aegis_usage::{Access, Denied, Pending, Prefix, Viewer};
use std::sync::Arc;

/// Knows `admin`, `account-NAME` and `auditor`, who may see x and y if they are named.
pub struct People(pub Option<Arc<Cluster>>);

impl Access for People {
    fn node<'a>(&'a self, _token: &'a str) -> Pending<'a, Result<String, Denied>> {
        Box::pin(async { Err(Denied::Forbidden) })
    }

    fn viewer<'a>(&'a self, token: &'a str, accounts: &'a [String]) -> Pending<'a, Result<Viewer, Denied>> {
        Box::pin(async move {
            let accounts: Vec<String> = match token.strip_prefix("account-") {
                _ if token == "admin" => return Ok(Viewer { all: true, ..Viewer::default() }),
                _ if token == "auditor" => {
                    accounts.iter().filter(|it| ["x", "y"].contains(&it.as_str())).cloned().collect()
                }
                Some(account) => vec![account.into()],
                None if token == "lost" => return Err(Denied::Unavailable),
                None => return Err(Denied::Unknown),
            };
            Ok(Viewer { all: false, accounts: accounts.into_iter().collect() })
        })
    }

    fn prefixes(&self) -> Vec<Prefix> {
        vec![Prefix { range: "192.0.2.0/28".parse().unwrap(), account: "parent".into(), since: Some(0) }]
    }

    fn cluster(&self) -> Option<Arc<Cluster>> {
        self.0.clone()
    }
}

/// A name that would do something if it were taken for HTML.
pub const NASTY: &str = "<script>window.taken=1</script><img src=x onerror=window.taken=1>";

/// x has 192.0.2.1, of the parent's prefix, and a /64; y has 203.0.113.77; z waits for an address.
pub fn cluster() -> Cluster {
    let condition = |kind: &str, status: &str, reason: &str, message: &str| Condition {
        kind: kind.into(),
        status: status.into(),
        reason: reason.into(),
        message: message.into(),
        since: super::T0,
    };
    let allocation = |account: &str, addresses: &[&str], conditions| Allocation {
        account: account.into(),
        name: "partner".into(),
        addresses: addresses.iter().map(|it| (*it).into()).collect(),
        sites: vec![Site { name: format!("{account}-site"), nodes: 3, slices: 252, held: 18 }],
        first_port: 1024,
        last_port: 65_535,
        target_percent: 80,
        conditions,
    };
    let low = condition("CapacityLow", "True", "AboveTarget", &format!("node {NASTY} uses 90 %"));
    let none = condition("Allocated", "False", "NoFreeAddress", "the prefixes have no free address");
    let allocations = vec![
        allocation("x", &["192.0.2.1", "2001:db8:1:2::/64"], vec![low.clone()]),
        allocation("y", &["203.0.113.77"], vec![condition("Accepted", "False", "Invalid", "y-message")]),
        allocation("z", &[], vec![none]),
    ];
    let of_x = vec![
        holding(4, 11, "n1", "x-site", State::Held),
        holding(12, 19, "n2", "x-site", State::Held),
        holding(20, 21, "n2", "x-site", State::Draining),
        Holding { until: Some(super::T0 + 4_000), ..holding(22, 22, "n3", "x-site", State::Quarantined) },
        holding(30, 33, "n4", "x-site", State::Held),
        holding(40, 41, NASTY, "x-site", State::Held),
    ];
    let address = |range: &str, account: &str, holdings: Vec<Holding>| Address {
        range: range.parse().unwrap(),
        account: account.into(),
        allocation: "partner".into(),
        prefix: format!("{account}-prefix"),
        epoch: 4_141,
        holdings,
        first: 4,
        last: 251,
        target_percent: Some(80),
        conditions: vec![condition("Programmed", "True", "Programmed", "4 of 4 nodes")],
    };
    let wide = vec![holding(5, 5, "n1", "x-site", State::Held)];
    let of_y = vec![holding(4, 11, "y-node", "y-site", State::Held)];
    Cluster {
        allocations,
        addresses: vec![
            address("192.0.2.1/32", "x", of_x),
            address("203.0.113.77/32", "y", of_y),
            address("2001:db8:1:2::/64", "x", wide),
        ],
        policies: policies(&condition),
    }
}

fn holding(first: u32, last: u32, node: &str, site: &str, state: State) -> Holding {
    Holding { first, last, node: node.into(), site: site.into(), state, until: None }
}

fn policies(condition: &dyn Fn(&str, &str, &str, &str) -> Condition) -> Vec<Policy> {
    let policy = |order: u32, name: &str, action: &str, accounts: &[&str]| Policy {
        order,
        name: name.into(),
        precedence: 10 * order as i32,
        action: action.into(),
        accounts: accounts.iter().map(|it| (*it).into()).collect(),
        matched: Some(7),
        conditions: vec![condition("Accepted", "True", "Accepted", "")],
        ..Policy::default()
    };
    let shadowed = condition("Effective", "False", "Shadowed", "y-policy before it decides always");
    vec![
        Policy { destinations: "198.51.100.0/24; ports TCP 25".into(), ..policy(1, "no-mail", "Deny", &[]) },
        Policy { pods: "pods with app=y-app".into(), ..policy(2, "y-policy", "Default", &["y"]) },
        Policy {
            egress: vec!["partner".into(), "spare".into()],
            pods: "pods with app=y-app".into(),
            conditions: vec![condition("Accepted", "True", "Accepted", ""), shadowed],
            ..policy(3, "shared", "Egress", &["x", "y"])
        },
        Policy { observes: true, destinations: NASTY.into(), ..policy(4, NASTY, "Deny", &["x"]) },
    ]
}
