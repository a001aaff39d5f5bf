//! Questions about objects of the cluster: allocations, addresses, policies, and when their nodes reported last.

use super::{COST, LevelName, Time, ask, range, scope};
use crate::Reported;
use crate::access::Access;
use crate::cluster::{self, Cluster, State};
use crate::http::Clock;
use crate::scope::Scope;
use async_graphql::{ComplexObject, Context, Enum, Error, Object, Result, SimpleObject};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Most objects of an answer.
const OBJECTS: u32 = 1_000;

/// State of slices.
#[derive(Enum, Clone, Copy, PartialEq, Eq)]
#[graphql(remote = "State", name = "SliceState")]
enum StateName {
    /// New flows may start.
    Held,
    /// Live flows go on, none starts.
    Draining,
    /// Nobody sends.
    Quarantined,
}

/// A condition of an object.
#[derive(SimpleObject)]
struct Condition {
    /// Its type, as `Accepted`.
    #[graphql(name = "type")]
    kind: String,
    /// `True`, `False` or `Unknown`.
    status: String,
    /// In one word.
    reason: String,
    /// What it says; empty where it is not yours to see.
    message: String,
    /// Since when the status is this.
    since: Time,
}

/// Dedicated addresses of an account, and how nodes share them.
#[derive(SimpleObject)]
struct Allocation {
    /// The account: a namespace.
    account: String,
    /// Name in the account.
    name: String,
    /// Its addresses; of IPv6 a /64 each, or a single address.
    addresses: Vec<String>,
    /// Sites, where it has some.
    sites: Vec<Site>,
    /// First port in use of each address.
    first_port: u32,
    /// And the last.
    last_port: u32,
    /// Share of a node's ports towards one origin above which `CapacityLow` turns true, in percent.
    target_percent: u32,
    /// What the operator found.
    conditions: Vec<Condition>,
}

/// What became of a site.
#[derive(SimpleObject)]
struct Site {
    /// Its name.
    name: String,
    /// Nodes that belong to it.
    nodes: u32,
    /// Slices that they may hold together, over all addresses.
    slices: u32,
    /// Slices that they hold.
    held: u32,
}

/// An address and who holds its slices. One has slices 4 to 255: 256 ports each, from 256 times the number on; of a /64, which is told with its
/// length, the numbers of nodes.
#[derive(SimpleObject)]
#[graphql(complex)]
struct Address {
    /// The address, or the /64.
    address: String,
    /// The account that it is dedicated to.
    account: String,
    /// Its allocation there.
    allocation: String,
    /// The prefix that it comes from.
    prefix: String,
    /// Grows with every change of its slices' holders.
    epoch: i64,
    /// First slice that the allocation uses.
    first: u32,
    /// And the last.
    last: u32,
    /// Slices in which new flows may start.
    held: u32,
    /// Slices in which live flows go on.
    draining: u32,
    /// Slices in which nobody sends.
    quarantined: u32,
    /// Share of a node's ports towards one origin that is planned, in percent. None: the allocation is gone.
    target_percent: Option<u32>,
    /// Nodes that hold slices, by name.
    holders: Vec<Holder>,
    /// What the nodes report.
    conditions: Vec<Condition>,
    #[graphql(skip)]
    holdings: Vec<cluster::Holding>,
}

#[ComplexObject]
impl Address {
    /// Consecutive slices that a node holds, by number; those that are missing are free.
    #[graphql(complexity = "100 + child_complexity")]
    async fn slices(&self) -> Vec<Slices> {
        self.holdings.iter().map(Slices::from).collect()
    }
}

/// What a node holds of an address.
#[derive(SimpleObject)]
struct Holder {
    /// The node.
    node: String,
    /// Site of the allocation that it belongs to; empty without.
    site: String,
    /// Slices in which new flows may start.
    held: u32,
    /// Slices in which live flows go on.
    draining: u32,
}

/// Consecutive slices.
#[derive(SimpleObject)]
struct Slices {
    /// The first.
    first: u32,
    /// The last.
    last: u32,
    /// The node that holds, or last held, them.
    node: String,
    /// Site of the allocation that the node belongs to; empty without.
    site: String,
    /// What the node may do with them.
    state: StateName,
    /// When they are free again, where that is known.
    until: Option<Time>,
}

/// A rule of the cluster.
#[derive(SimpleObject)]
struct Policy {
    /// Place in the order in which they are asked, from 1 on: the first that matches decides.
    order: u32,
    /// Its name.
    name: String,
    /// The lowest comes first; equal ones by name.
    precedence: i32,
    /// `Egress`, `Default` (the node's address) or `Deny`.
    action: String,
    /// It only counts what it would do.
    observes: bool,
    /// Allocations that it lets traffic leave from, the preferred one first.
    egress: Vec<String>,
    /// Accounts that it names, as far as they are yours to see.
    accounts: Vec<String>,
    /// What else it says of the pods.
    pods: String,
    /// Destinations; empty: all.
    destinations: String,
    /// Pods that match, over all nodes.
    matched: Option<u32>,
    /// What the operator and the nodes found.
    conditions: Vec<Condition>,
}

/// When a node reported.
#[derive(SimpleObject)]
struct NodeReport {
    /// The node.
    node: String,
    /// End of the newest slot of which it reported something: exact to 10 seconds, and where it is long ago to a minute or an hour. None: it has not for 30 days.
    last: Option<Time>,
}

/// How much of a step some nodes reported.
#[derive(SimpleObject)]
struct ReportedStep {
    /// Begin of the step.
    at: Time,
    /// Nodes that reported something of it.
    nodes: i64,
    /// Seconds that they cover, of all nodes together.
    seconds: i64,
}

/// Questions about objects.
#[derive(Default)]
pub(crate) struct Objects;

#[Object]
impl Objects {
    /// The collector's time.
    async fn now(&self, context: &Context<'_>) -> Result<Time> {
        Ok(Time(context.data::<Clock>()?()))
    }

    /// Allocations of accounts that you may see, by account and name.
    #[graphql(complexity = "COST + child_complexity")]
    async fn allocations(
        &self,
        context: &Context<'_>,
        #[graphql(default, desc = "Accounts. Name those that you may see beside your own.")] accounts: Vec<
            String,
        >,
        #[graphql(default = 1000, desc = "At most 1,000.")] first: u32,
        #[graphql(desc = "The last one of the page before, as `ACCOUNT/NAME`.")] after: Option<String>,
    ) -> Result<Vec<Allocation>> {
        let after = after.map(|text| place(&text)).transpose()?;
        let (cluster, scope) = seen(context, &accounts).await?;
        let wanted = cluster.allocations.iter().filter(|it| named(&accounts, &it.account));
        let wanted = wanted.filter(|it| scope.sees_allocation(it));
        let rest = wanted.filter(|it| {
            after.as_ref().is_none_or(|(account, name)| (account, name) < (&it.account, &it.name))
        });
        Ok(rest.take(first.min(OBJECTS) as usize).map(Allocation::from).collect())
    }

    /// Addresses of accounts that you may see, and of prefixes that these own, in their order.
    #[graphql(complexity = "COST + child_complexity * (first as usize).div_ceil(20)")]
    async fn addresses(
        &self,
        context: &Context<'_>,
        #[graphql(default, desc = "Accounts. Name those that you may see beside your own.")] accounts: Vec<
            String,
        >,
        #[graphql(default, desc = "Addresses or ranges.")] ranges: Vec<String>,
        #[graphql(
            default = 100,
            desc = "At most 1,000; of those with `slices` fewer may be asked at a time."
        )]
        first: u32,
        #[graphql(desc = "The last address of the page before.")] after: Option<String>,
    ) -> Result<Vec<Address>> {
        let ranges = ranges.iter().map(|text| range(text)).collect::<Result<Vec<_>>>()?;
        let after = after.map(|text| range(&text)).transpose()?;
        let (cluster, scope) = seen(context, &accounts).await?;
        let wanted = addresses(&cluster, &scope, &accounts, &ranges);
        let wanted = wanted.filter(|it| after.is_none_or(|after| after < it.range));
        Ok(wanted.take(first.min(OBJECTS) as usize).map(Address::from).collect())
    }

    /// When nodes reported last that hold slices of addresses that you may see: of one that is silent nobody knows what is in use.
    #[graphql(complexity = "COST + child_complexity")]
    async fn reports(
        &self,
        context: &Context<'_>,
        #[graphql(default, desc = "Accounts. Name those that you may see beside your own.")] accounts: Vec<
            String,
        >,
        #[graphql(default, desc = "Addresses or ranges.")] ranges: Vec<String>,
    ) -> Result<Vec<NodeReport>> {
        let nodes = holders(context, &accounts, &ranges).await?;
        let now = context.data::<Clock>()?();
        let last = ask(context, move |store| store.last_reports(nodes, now)).await?;
        Ok(last.into_iter().map(|(node, last)| NodeReport { node, last: last.map(Time) }).collect())
    }

    /// How much of each step was reported by nodes that hold slices of addresses that you may see. Where nobody did, what was in use is not known;
    /// such steps are missing.
    #[allow(clippy::too_many_arguments, reason = "they are those of the field")]
    #[graphql(complexity = "COST + child_complexity")]
    async fn reported(
        &self,
        context: &Context<'_>,
        #[graphql(default, desc = "Accounts. Name those that you may see beside your own.")] accounts: Vec<
            String,
        >,
        #[graphql(default, desc = "Addresses or ranges.")] ranges: Vec<String>,
        #[graphql(default, desc = "Nodes; empty: all of those.")] nodes: Vec<String>,
        #[graphql(desc = "Level to be asked.")] level: LevelName,
        #[graphql(desc = "Begin of the window.")] from: Time,
        #[graphql(desc = "End of the window.")] to: Time,
        #[graphql(desc = "Length of a step in seconds, a multiple of the level's.")] step: i64,
    ) -> Result<Vec<ReportedStep>> {
        let mut holders = holders(context, &accounts, &ranges).await?;
        holders.retain(|node| nodes.is_empty() || nodes.contains(node));
        let window = (from.0, to.0);
        let steps = ask(context, move |store| store.reported(&holders, level.into(), window, step)).await?;
        let read =
            |(at, it): (i64, Reported)| ReportedStep { at: Time(at), nodes: it.nodes, seconds: it.seconds };
        Ok(steps.into_iter().map(read).collect())
    }

    /// Policies in the order in which they are asked: all for those who may see the whole cluster, for others those that name their accounts.
    #[graphql(complexity = "COST + child_complexity")]
    async fn policies(
        &self,
        context: &Context<'_>,
        #[graphql(default, desc = "Accounts that you may see beside your own.")] accounts: Vec<String>,
        #[graphql(default = 1000, desc = "At most 1,000.")] first: u32,
        #[graphql(desc = "`order` of the last one of the page before.")] after: Option<u32>,
    ) -> Result<Vec<Policy>> {
        let (cluster, scope) = seen(context, &accounts).await?;
        let seen = cluster.policies.iter().filter_map(|it| scope.policy(it));
        let rest = seen.filter(|it| after.is_none_or(|after| after < it.order));
        Ok(rest.take(first.min(OBJECTS) as usize).map(Policy::from).collect())
    }
}

/// Account and name.
fn place(text: &str) -> Result<(String, String)> {
    let (account, name) =
        text.split_once('/').ok_or_else(|| Error::new(format!("{text:?} is not ACCOUNT/NAME")))?;
    Ok((account.into(), name.into()))
}

/// What is known, and what the asker may see of it.
async fn seen(context: &Context<'_>, accounts: &[String]) -> Result<(Arc<Cluster>, Scope)> {
    let scope = scope(context, accounts).await?;
    let cluster = context.data::<Arc<dyn Access>>()?.cluster();
    let cluster = cluster.ok_or_else(|| Error::new("objects of the cluster are not known at the moment"))?;
    Ok((cluster, scope))
}

/// Nodes that hold, or last held, slices of addresses that the asker may see.
async fn holders(context: &Context<'_>, accounts: &[String], ranges: &[String]) -> Result<BTreeSet<String>> {
    let ranges = ranges.iter().map(|text| range(text)).collect::<Result<Vec<_>>>()?;
    let (cluster, scope) = seen(context, accounts).await?;
    let seen = addresses(&cluster, &scope, accounts, &ranges);
    Ok(seen.flat_map(|it| &it.holdings).map(|it| it.node.to_string()).collect())
}

fn addresses<'a>(
    cluster: &'a Cluster,
    scope: &'a Scope,
    accounts: &'a [String],
    ranges: &'a [IpNet],
) -> impl Iterator<Item = &'a cluster::Address> {
    let wanted = cluster.addresses.iter().filter(|it| named(accounts, &it.account));
    let wanted =
        wanted.filter(|it| ranges.is_empty() || ranges.iter().any(|range| range.contains(&it.range)));
    wanted.filter(|it| scope.sees_address(it))
}

fn named(accounts: &[String], account: &str) -> bool {
    accounts.is_empty() || accounts.iter().any(|it| it == account)
}

/// Of IPv4 the address alone.
fn text(range: &IpNet) -> String {
    match range {
        IpNet::V4(range) => range.addr().to_string(),
        IpNet::V6(range) if range.prefix_len() == range.max_prefix_len() => range.addr().to_string(),
        IpNet::V6(range) => range.to_string(),
    }
}

fn conditions(of: &[cluster::Condition]) -> Vec<Condition> {
    let read = |it: &cluster::Condition| {
        let cluster::Condition { kind, status, reason, message, since } = it.clone();
        Condition { kind, status, reason, message, since: Time(since) }
    };
    of.iter().map(read).collect()
}

impl From<&cluster::Allocation> for Allocation {
    fn from(it: &cluster::Allocation) -> Allocation {
        let site = |it: &cluster::Site| {
            let cluster::Site { name, nodes, slices, held } = it.clone();
            Site { name, nodes, slices, held }
        };
        Allocation {
            account: it.account.clone(),
            name: it.name.clone(),
            addresses: it.addresses.clone(),
            sites: it.sites.iter().map(site).collect(),
            first_port: it.first_port,
            last_port: it.last_port,
            target_percent: it.target_percent,
            conditions: conditions(&it.conditions),
        }
    }
}

impl From<&cluster::Address> for Address {
    fn from(it: &cluster::Address) -> Address {
        let holder = |it: cluster::Holder| Holder {
            node: it.node.to_string(),
            site: it.site.to_string(),
            held: it.held,
            draining: it.draining,
        };
        Address {
            address: text(&it.range),
            account: it.account.clone(),
            allocation: it.allocation.clone(),
            prefix: it.prefix.clone(),
            epoch: it.epoch,
            first: it.first,
            last: it.last,
            held: it.slices(State::Held),
            draining: it.slices(State::Draining),
            quarantined: it.slices(State::Quarantined),
            target_percent: it.target_percent,
            holders: it.holders().into_iter().map(holder).collect(),
            conditions: conditions(&it.conditions),
            holdings: it.holdings.clone(),
        }
    }
}

impl From<&cluster::Holding> for Slices {
    fn from(it: &cluster::Holding) -> Slices {
        Slices {
            first: it.first,
            last: it.last,
            node: it.node.to_string(),
            site: it.site.to_string(),
            state: it.state.into(),
            until: it.until.map(Time),
        }
    }
}

impl From<cluster::Policy> for Policy {
    fn from(it: cluster::Policy) -> Policy {
        Policy {
            order: it.order,
            name: it.name,
            precedence: it.precedence,
            action: it.action,
            observes: it.observes,
            egress: it.egress,
            accounts: it.accounts,
            pods: it.pods,
            destinations: it.destinations,
            matched: it.matched,
            conditions: conditions(&it.conditions),
        }
    }
}
