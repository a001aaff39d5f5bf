//! The questions as GraphQL. `schema.graphql` beside the crate is the whole of it.

mod alerts;
mod cluster;

use crate::access::{Access, Denied};
use crate::http::Clock;
use crate::level::Level;
use crate::query::{self, Aggregation, Dimension, Filter, Measure, Order, OriginFilter, Query, most};
use crate::scope::Scope;
use crate::sql;
use crate::store::Store;
use crate::turns::{Turns, Unanswered};
use aegis_usage_report::Protocol;
use async_graphql::{
    Context, EmptyMutation, EmptySubscription, Enum, Error, InputObject, MergedObject, Object, Result,
    Scalar, ScalarType, SimpleObject, Value,
};
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tracing::warn;

pub(crate) type Schema = async_graphql::Schema<Everything, EmptyMutation, EmptySubscription>;

/// What one question of `usage` costs; what it selects counts once.
const COST: usize = 500;

/// What all of a request may cost: a page of several plots.
const COMPLEXITY: usize = 5_000;

/// How deep a request may be. Tools that read the schema need most of it.
const DEPTH: usize = 16;

/// Accounts that one question may name: each is asked for at the API server.
const ACCOUNTS: usize = 20;

/// Whose request it is.
pub(crate) struct Asker(pub String);

/// The schema with what it asks.
pub(crate) fn schema(store: Arc<Store>, access: Arc<dyn Access>, clock: Clock) -> Schema {
    limited().data(store).data(access).data(clock).data(Turns::new()).finish()
}

/// The schema as a file.
pub fn sdl() -> String {
    limited().finish().sdl()
}

fn limited() -> async_graphql::SchemaBuilder<Everything, EmptyMutation, EmptySubscription> {
    Schema::build(Everything::default(), EmptyMutation, EmptySubscription)
        .limit_complexity(COMPLEXITY)
        .limit_depth(DEPTH)
        .limit_directives(8)
        .disable_suggestions()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Time(i64);

/// A moment, in RFC 3339: `2026-01-31T12:00:00Z`.
#[Scalar]
impl ScalarType for Time {
    fn parse(value: Value) -> async_graphql::InputValueResult<Time> {
        match &value {
            Value::String(text) => Ok(Time(text.parse::<jiff::Timestamp>()?.as_second())),
            _ => Err(async_graphql::InputValueError::expected_type(value)),
        }
    }

    fn to_value(&self) -> Value {
        jiff::Timestamp::from_second(self.0).map_or(Value::Null, |time| Value::String(time.to_string()))
    }
}

/// Detail of the figures.
#[derive(Enum, Clone, Copy, PartialEq, Eq)]
#[graphql(remote = "Level", name = "Level")]
enum LevelName {
    /// 10 seconds.
    Tens,
    /// One minute: those that ended 20 seconds ago and before.
    Minutes,
    /// One hour.
    Hours,
}

/// What is told apart.
#[derive(Enum, Clone, Copy, PartialEq, Eq)]
#[graphql(remote = "Dimension", name = "Dimension")]
enum DimensionName {
    /// Egress address; of a /64 its first one.
    Address,
    /// Account: a namespace.
    Account,
    /// Allocation, by its name in the account.
    Allocation,
    /// Rule that covers the traffic, and with it the zone: `binding/NAME` or `policy/NAME`.
    Rule,
    /// Site of the allocation.
    Site,
    /// Node.
    Node,
    /// Address and port that the traffic goes to.
    Origin,
    /// Protocol.
    Protocol,
    /// Pod; empty where it is not yours to see, and where agents tell none, as those of today.
    Pod,
    /// Why flows were refused.
    Reason,
}

/// What is measured, in each slot of the level.
#[derive(Enum, Clone, Copy, PartialEq, Eq)]
#[graphql(remote = "Measure", name = "Measure")]
enum MeasureName {
    /// Ports in use: the mean over the slot's reports. A /64 has none.
    InUse,
    /// The most ports in use that a report of the slot told; of several series their sum, which the truth does not exceed.
    InUseMax,
    /// The most ports in use at any moment, with the same reservation.
    Peak,
    /// Flows that began. Over IPv6 what a node had forgotten and goes on counts again.
    Flows,
    /// Flows that were refused.
    Refused,
    /// Packets to the origin.
    SentPackets,
    /// Bytes to the origin.
    SentBytes,
    /// Packets from the origin.
    ReceivedPackets,
    /// Bytes from the origin.
    ReceivedBytes,
}

/// How the slots of a step become one figure.
#[derive(Enum, Clone, Copy, PartialEq, Eq)]
#[graphql(name = "Aggregation")]
enum AggregationName {
    /// Mean.
    Avg,
    /// Least.
    Min,
    /// Greatest.
    Max,
    /// Sum.
    Sum,
    /// The value that `thousandths` of the slots do not exceed.
    Quantile,
}

/// Transport protocol.
#[derive(Enum, Clone, Copy, PartialEq, Eq)]
#[graphql(remote = "Protocol", name = "Protocol")]
enum ProtocolName {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo.
    Icmp,
    /// Any other.
    Other,
}

/// Order of the answers.
#[derive(Enum, Clone, Copy, PartialEq, Eq)]
#[graphql(remote = "Order", name = "Order")]
enum OrderName {
    /// By group, then by time.
    Group,
    /// The greatest first figure first.
    Highest,
}

/// One figure that is asked.
#[derive(InputObject)]
struct Figure {
    /// Of what.
    measure: MeasureName,
    /// How slots become one.
    aggregation: AggregationName,
    /// Of a quantile: 950 is the 95th percentile.
    thousandths: Option<u16>,
}

/// What counts: of each list any, and of all lists. An empty list excludes nothing.
#[derive(InputObject, Default)]
#[graphql(name = "Filter")]
struct FilterInput {
    /// Egress addresses or ranges of them.
    #[graphql(default)]
    addresses: Vec<String>,
    /// Accounts. Name those that you may see beside your own.
    #[graphql(default)]
    accounts: Vec<String>,
    /// Allocations.
    #[graphql(default)]
    allocations: Vec<String>,
    /// Rules.
    #[graphql(default)]
    rules: Vec<String>,
    /// Sites.
    #[graphql(default)]
    sites: Vec<String>,
    /// Nodes.
    #[graphql(default)]
    nodes: Vec<String>,
    /// Origins: `198.51.100.7:443`, an address or a range with any port, or `other` for those that were too many to be told apart.
    #[graphql(default)]
    origins: Vec<String>,
    /// Protocols.
    #[graphql(default)]
    protocols: Vec<ProtocolName>,
    /// Pods; agents of today tell none.
    #[graphql(default)]
    pods: Vec<String>,
    /// Reasons of refusals.
    #[graphql(default)]
    reasons: Vec<String>,
}

/// Part of an answer.
#[derive(SimpleObject)]
struct UsageConnection {
    /// The level that was asked.
    level: LevelName,
    /// Up to when it is made: what begins later may be missing in minutes and hours, and is there in tens.
    until: Time,
    /// Groups and steps.
    nodes: Vec<Usage>,
    /// What comes next.
    page_info: PageInfo,
}

/// Where a page ends.
#[derive(SimpleObject)]
struct PageInfo {
    /// Whether there is another page.
    has_next_page: bool,
    /// `after` of the next page.
    end_cursor: Option<String>,
}

/// A group in a step.
#[derive(SimpleObject)]
struct Usage {
    /// Values of what is told apart, in the order of `by`; empty where it is not known, or not yours to see.
    by: Vec<String>,
    /// Begin of the step.
    at: Time,
    /// Slots of the level in which the group was seen; others count for nothing.
    slots: i64,
    /// Figures in the order in which they were asked.
    figures: Vec<f64>,
}

/// How much of a slot a node reported.
#[derive(SimpleObject)]
struct Coverage {
    /// The node.
    node: String,
    /// Begin of the slot.
    at: Time,
    /// Reports.
    samples: i64,
    /// Seconds that they cover.
    seconds: i64,
}

/// Reports that are missing.
#[derive(SimpleObject)]
struct Gap {
    /// The node.
    node: String,
    /// The start of its agent.
    boot: String,
    /// Number of the first that is missing.
    first: i64,
    /// And of the last.
    last: i64,
    /// End of the report before.
    from: Time,
    /// Begin of the report after.
    to: Time,
}

/// All questions.
#[derive(MergedObject, Default)]
#[graphql(name = "Query")]
pub(crate) struct Everything(Uses, cluster::Objects);

/// Questions about use.
#[derive(Default)]
struct Uses;

#[Object]
impl Uses {
    /// Ports, flows, refusals and traffic, of what you may see.
    #[allow(clippy::too_many_arguments, reason = "they are those of the field")]
    #[graphql(complexity = "COST + child_complexity")]
    async fn usage(
        &self,
        context: &Context<'_>,
        #[graphql(desc = "Begin of the window.")] from: Time,
        #[graphql(desc = "End of the window.")] to: Time,
        #[graphql(
            desc = "Length of a step in seconds, a multiple of the level's. Without it the window is one."
        )]
        step: Option<i64>,
        #[graphql(desc = "Level to be asked. Without it the one that suits window and step.")] level: Option<
            LevelName,
        >,
        #[graphql(default, desc = "What counts.")] filter: FilterInput,
        #[graphql(
            default,
            desc = "Of each node only the newest slot of the window of which it reported: what is in use now."
        )]
        newest: bool,
        #[graphql(default, desc = "What is told apart.")] by: Vec<DimensionName>,
        #[graphql(
            desc = "Of all that have the same in so many of the first of `by`, only the one with the greatest first figure, in each step."
        )]
        fullest: Option<u32>,
        #[graphql(desc = "What is asked, at most 12.")] figures: Vec<Figure>,
        #[graphql(desc = "Order of the answers.", default_with = "OrderName::Group")] order: OrderName,
        #[graphql(default = 100, desc = "Rows of a page, at most 1,000.")] first: u32,
        #[graphql(desc = "`endCursor` of the page before.")] after: Option<String>,
    ) -> Result<UsageConnection> {
        let filter = filter.read()?;
        let scope = scope(context, &filter.accounts).await?;
        let figures = figures.into_iter().map(Figure::read).collect::<Result<_>>()?;
        let query = Query {
            from: from.0,
            to: to.0,
            step,
            level: level.map(Level::from),
            filter,
            newest,
            by: by.into_iter().map(Dimension::from).collect(),
            fullest: fullest.map(|fullest| usize::try_from(fullest).unwrap_or(usize::MAX)),
            figures,
            order: order.into(),
            first,
            after,
        };
        let page = ask(context, move |store| store.query(&scope, &query)).await?;
        Ok(page.into())
    }

    /// What exceeds the limits of alerts, raised or not yet, of the accounts whose use you may see.
    #[graphql(complexity = "COST + child_complexity")]
    async fn alerts(
        &self,
        context: &Context<'_>,
        #[graphql(
            default,
            desc = "Accounts. Name those that you may see beside your own. Without any: all that you see."
        )]
        accounts: Vec<String>,
        #[graphql(default = 100, desc = "At most 1,000.")] first: u32,
        #[graphql(desc = "`cursor` of the last one of the page before.")] after: Option<String>,
    ) -> Result<Vec<alerts::Alert>> {
        alerts::alerts(context, accounts, first, after).await
    }

    /// How much of each slot each node reported. For those who may see the whole cluster.
    #[graphql(complexity = "COST + child_complexity")]
    async fn coverage(
        &self,
        context: &Context<'_>,
        level: LevelName,
        from: Time,
        to: Time,
        #[graphql(default = 100, desc = "At most 1,000.")] first: u32,
    ) -> Result<Vec<Coverage>> {
        whole(context).await?;
        let first = first.min(most::ROWS);
        let slots = ask(context, move |store| store.coverage(level.into(), from.0, to.0, first)).await?;
        let read = |it: crate::Coverage| Coverage {
            node: it.node,
            at: Time(it.slot),
            samples: it.samples,
            seconds: it.seconds,
        };
        Ok(slots.into_iter().map(read).collect())
    }

    /// Reports that are missing, while 10-second figures are kept. For those who may see the whole cluster.
    #[graphql(complexity = "COST + child_complexity")]
    async fn gaps(
        &self,
        context: &Context<'_>,
        from: Time,
        to: Time,
        #[graphql(default = 100, desc = "At most 1,000.")] first: u32,
    ) -> Result<Vec<Gap>> {
        whole(context).await?;
        let first = first.min(most::ROWS);
        let gaps = ask(context, move |store| store.gaps(from.0, to.0, first)).await?;
        let read = |it: crate::Gap| {
            let crate::Gap { node, boot, first, last, from, to } = it;
            Gap { node, boot, first, last, from: Time(from), to: Time(to) }
        };
        Ok(gaps.into_iter().map(read).collect())
    }
}

/// What the asker may see of these accounts.
async fn scope(context: &Context<'_>, accounts: &[String]) -> Result<Scope> {
    if accounts.len() > ACCOUNTS {
        return Err(Error::new(format!(
            "the filter names {} accounts, more than {ACCOUNTS}",
            accounts.len()
        )));
    }
    let access = context.data::<Arc<dyn Access>>()?;
    let Asker(token) = context.data()?;
    let viewer = access.viewer(token, accounts).await.map_err(said)?;
    if viewer.all {
        return Ok(Scope::All);
    }
    let (prefixes, now) = (access.prefixes(), context.data::<Clock>()?());
    let owned = ask(context, move |store| store.owned(&prefixes, now)).await?;
    Ok(Scope::of(&viewer, owned))
}

/// That the asker may see everything.
async fn whole(context: &Context<'_>) -> Result<()> {
    if scope(context, &[]).await?.sees_nodes() { Ok(()) } else { Err(said(Denied::Forbidden)) }
}

fn said(denied: Denied) -> Error {
    Error::new(denied.to_string())
}

/// Asks the store. Errors that are not the asker's are not told.
async fn ask<T: Send + 'static>(
    context: &Context<'_>,
    question: impl FnOnce(&Store) -> Result<T, sql::Error> + Send + 'static,
) -> Result<T> {
    let (store, Asker(token)) = (context.data::<Arc<Store>>()?, context.data()?);
    let answer = context.data::<Turns>()?.ask(store, token, question).await;
    answer.map_err(|error| match error {
        Unanswered::Store(error @ (sql::Error::Query(_) | sql::Error::TooSlow(_))) => {
            Error::new(error.to_string())
        }
        error => {
            warn!(%error, "a question is not answered");
            Error::new("the store does not answer")
        }
    })
}

impl Figure {
    fn read(self) -> Result<query::Figure> {
        let aggregation = match (self.aggregation, self.thousandths) {
            (AggregationName::Quantile, Some(thousandths)) => Aggregation::Quantile(thousandths),
            (AggregationName::Quantile, None) => return Err(Error::new("a quantile needs `thousandths`")),
            (_, Some(_)) => return Err(Error::new("`thousandths` are of a quantile")),
            (AggregationName::Avg, None) => Aggregation::Avg,
            (AggregationName::Min, None) => Aggregation::Min,
            (AggregationName::Max, None) => Aggregation::Max,
            (AggregationName::Sum, None) => Aggregation::Sum,
        };
        Ok(query::Figure { measure: self.measure.into(), aggregation })
    }
}

impl FilterInput {
    fn read(self) -> Result<Filter> {
        Ok(Filter {
            addresses: self.addresses.iter().map(|text| range(text)).collect::<Result<_>>()?,
            accounts: self.accounts,
            allocations: self.allocations,
            rules: self.rules,
            sites: self.sites,
            nodes: self.nodes,
            origins: self.origins.iter().map(|text| origin(text)).collect::<Result<_>>()?,
            protocols: self.protocols.into_iter().map(Protocol::from).collect(),
            pods: self.pods,
            reasons: self.reasons,
        })
    }
}

fn range(text: &str) -> Result<IpNet> {
    let range = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    range.ok_or_else(|| Error::new(format!("{text:?} is no address and no range of addresses")))
}

fn origin(text: &str) -> Result<OriginFilter> {
    if text == "other" {
        return Ok(OriginFilter::Summed);
    }
    match text.parse::<SocketAddr>() {
        Ok(origin) => Ok(OriginFilter::Range(origin.ip().into(), Some(origin.port()))),
        Err(_) => Ok(OriginFilter::Range(range(text)?, None)),
    }
}

impl From<query::Page> for UsageConnection {
    fn from(page: query::Page) -> UsageConnection {
        let read =
            |it: query::Answer| Usage { by: it.by, at: Time(it.at), slots: it.slots, figures: it.figures };
        UsageConnection {
            level: page.level.into(),
            until: Time(page.until),
            nodes: page.rows.into_iter().map(read).collect(),
            page_info: PageInfo { has_next_page: page.next.is_some(), end_cursor: page.next },
        }
    }
}
