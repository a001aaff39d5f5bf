//! An item of a feed: that something was raised or cleared, and what to do. Once told it never changes.

use super::machine::{Key, Kind, Track};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::net::{IpAddr, SocketAddr};

/// Whether something began or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Happening {
    /// A limit is exceeded, for long enough.
    Raised,
    /// It is no more.
    Cleared,
}

/// The limit that something exceeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limit {
    /// Percent of ports, or connections.
    pub limit: i64,
    /// Below how many percent it is cleared.
    pub clear_below: i64,
    /// How long it has to last, or the window of refusals.
    pub seconds: i64,
    /// Ports of the address that the allocation gives out.
    pub capacity: i64,
}

/// The pod that has most of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Ports or connections.
    pub figure: i64,
}

/// An item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Item {
    /// The same for the same happening, whenever and by whichever collector it is told.
    pub id: String,
    /// Whose it is: a namespace.
    pub account: String,
    /// What it is about.
    pub key: Key,
    /// Whether it began or ended.
    pub happening: Happening,
    /// Since when the limit was exceeded, in seconds since the Unix epoch.
    pub since: i64,
    /// When it was raised or cleared.
    pub at: i64,
    /// When it was told.
    pub published: i64,
    /// Ports, connections or slices at that time.
    pub figure: i64,
    /// The most of them since it began.
    pub highest: i64,
    /// The limit.
    pub limit: Limit,
    /// The pod that had most of it.
    pub pod: Option<Pod>,
    /// It ended because nobody wants to know of it any more.
    pub unwatched: bool,
}

impl Item {
    pub(super) fn new(
        account: &str,
        key: Key,
        track: &Track,
        happening: Happening,
        at: i64,
        limit: Limit,
    ) -> Item {
        Item {
            id: identity(account, &key, track.since, happening),
            account: account.into(),
            key,
            happening,
            since: track.since,
            at,
            published: 0,
            figure: track.figure,
            highest: track.highest,
            limit,
            pod: None,
            unwatched: false,
        }
    }

    /// One line.
    pub fn title(&self) -> String {
        let head = match self.happening {
            Happening::Raised => "",
            Happening::Cleared => "Cleared: ",
        };
        format!("{head}{}", self.subject())
    }

    fn subject(&self) -> String {
        let Item { account, key, .. } = self;
        let way = self.way();
        match key.kind {
            Kind::PortUse => format!("{} % of the ports of {way} are in use", self.percent(self.figure)),
            Kind::Refusals => format!("{} connections from {way} were refused: {}", self.figure, key.reason),
            Kind::SiteWithoutHolders if key.site.is_empty() => {
                format!("No node can send from the addresses of {account}/{}", key.allocation)
            }
            Kind::SiteWithoutHolders => {
                format!(
                    "No node of site {} can send from the addresses of {account}/{}",
                    key.site, key.allocation
                )
            }
        }
    }

    /// Address, origin and protocol.
    fn way(&self) -> String {
        let Key { allocation, address, origin, protocol, .. } = &self.key;
        let shown = |it| shown(it, self.key.kind);
        let from = address.map_or_else(|| format!("{}/{allocation}", self.account), shown);
        let to = origin.map_or_else(|| "other origins".into(), |it| it.to_string());
        format!("{from} towards {to} ({})", protocol.name())
    }

    /// Paragraphs: figures, since when, what to do.
    pub fn text(&self) -> Vec<String> {
        let mut text = vec![self.figures()];
        let (since, at) = (moment(self.since), moment(self.at));
        text.push(match self.happening {
            Happening::Raised => format!("Since {since}; raised at {at}."),
            Happening::Cleared => format!("It began at {since} and ended at {at}."),
        });
        if let Some(Pod { name, figure }) = &self.pod {
            text.push(format!("The pod with the most of them is {name}, with {figure}."));
        }
        match self.happening {
            Happening::Raised => text.push(format!("What to do: {}", self.remedy())),
            Happening::Cleared if self.unwatched => {
                text.push("It ended because the alert, its limit or the allocation is no more, or looks elsewhere now.".into());
            }
            Happening::Cleared => {}
        }
        let Key { alert, allocation, .. } = &self.key;
        let account = &self.account;
        text.push(format!("UsageAlert {account}/{alert}, EgressAllocation {account}/{allocation}."));
        text
    }

    fn figures(&self) -> String {
        let Item { figure, highest, limit, .. } = self;
        let Limit { limit, clear_below, seconds, capacity } = *limit;
        let way = self.way();
        match (self.key.kind, self.happening) {
            _ if self.unwatched => format!("The last figure was {figure}, the highest {highest}."),
            (Kind::PortUse, Happening::Raised) => format!(
                "{figure} of the {capacity} ports that the allocation gives out of {way} are in use: {} %. The limit is {limit} % for \
                 {seconds} s.",
                self.percent(*figure)
            ),
            (Kind::PortUse, Happening::Cleared) => format!(
                "{figure} of the {capacity} ports of {way} are in use: {} %, which is below {clear_below} %. There were {highest} at \
                 most, {} %.",
                self.percent(*figure),
                self.percent(*highest)
            ),
            (Kind::Refusals, Happening::Raised) => format!(
                "{figure} connections from {way} were refused within {seconds} s; the limit is {limit}. Reason: {}.",
                self.key.reason
            ),
            (Kind::Refusals, Happening::Cleared) => format!(
                "{figure} connections from {way} were refused within the last {seconds} s, which is not above the limit of {limit}. \
                 There were {highest} at most."
            ),
            (Kind::SiteWithoutHolders, Happening::Raised) => {
                format!(
                    "No node there has held a slice for {seconds} s: connections that would leave from there go elsewhere or fail."
                )
            }
            (Kind::SiteWithoutHolders, Happening::Cleared) => {
                format!("Nodes there hold {figure} slices again.")
            }
        }
    }

    fn remedy(&self) -> String {
        let (account, allocation) = (&self.account, &self.key.allocation);
        let find = self.find();
        let add = match self.key.address {
            Some(IpAddr::V6(_)) => format!(
                "add an address (an AegisPrefix of one IPv6 address to spec.prefixes, and one to spec.addresses.ipv6, of EgressAllocation \
                 {account}/{allocation}), and tell the owner of the origin of it"
            ),
            _ => format!(
                "add an address (spec.addresses.ipv4 of EgressAllocation {account}/{allocation}), and tell the owner of the origin of it"
            ),
        };
        match self.key.kind {
            Kind::PortUse => format!("{add}. If it need not be so many connections, {find}."),
            Kind::SiteWithoutHolders => format!(
                "see whether nodes of the site are there and ready (kubectl get egressallocations -n {account} {allocation} -o yaml, \
                 status.sites and the condition Allocated)."
            ),
            Kind::Refusals => match self.key.reason.trim_start_matches("refuse_") {
                "no_port" | "no_socket_port" => format!(
                    "wait for growth, if only some nodes are full: they get more ports within seconds, up to spec.ports.perNode.max. If \
                     it goes on, {add}. Or {find}."
                ),
                "pod_flows" | "pod_rate" => {
                    format!(
                        "{find}; it exceeds spec.limits.perPod of the allocation. Raise that, if the pod is right."
                    )
                }
                "account_flows" | "account_rate" => format!(
                    "{find}. The account has as many connections on a node as the platform lets it have; spread the pods over more \
                     nodes, or ask the platform's team for more."
                ),
                "unavailable" => format!(
                    "nothing was there to leave from: see the condition Allocated of EgressAllocation {account}/{allocation}."
                ),
                _ => "look the reason up in docs/operations.md, \"Packets by reason\".".into(),
            },
        }
    }

    /// How to find the pod: reports tell none, the nodes know whose flows they have. Of IPv6 they are not listed.
    fn find(&self) -> String {
        let Key { address, origin, .. } = &self.key;
        let egress = address.filter(IpAddr::is_ipv4).map(|it| format!(" --egress {it}"));
        let to = origin.filter(SocketAddr::is_ipv4).map(|it| format!(" --to {it}"));
        let options = [egress, to].map(Option::unwrap_or_default).concat();
        format!("ask the platform's team which pod has so many (kubectl aegis flows{options})")
    }

    /// Percent of the ports, rounded down.
    fn percent(&self, figure: i64) -> i64 {
        figure.saturating_mul(100).checked_div(self.limit.capacity).unwrap_or(0)
    }
}

/// An egress address. A /64 is told by its first one, and has no ports that could be in use.
fn shown(address: IpAddr, kind: Kind) -> String {
    match address {
        IpAddr::V6(first) if kind != Kind::PortUse && first.to_bits() as u64 == 0 => format!("{first}/64"),
        address => address.to_string(),
    }
}

/// In RFC 3339.
pub(super) fn moment(second: i64) -> String {
    jiff::Timestamp::from_second(second).unwrap_or_default().to_string()
}

fn identity(account: &str, key: &Key, since: i64, happening: Happening) -> String {
    let parts = serde_json::to_vec(&(account, key, since, happening)).unwrap_or_default();
    let digest = Sha256::digest(parts);
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}
