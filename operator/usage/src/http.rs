//! What the collector serves: `POST /v1/reports` for agents, `POST /v1/graphql` for everybody else, each by token, and the page that asks the
//! latter.

use crate::access::{Access, Denied};
use crate::graphql::{self, Asker, Schema};
use crate::inbox::Inbox;
use crate::ingest::Receipt;
use crate::metrics::{Failed, Metrics};
use crate::page;
use crate::store::Store;
use aegis_usage_report::Report;
use axum::body::{Bytes, HttpBody as _};
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Serialize;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The time, in seconds since the Unix epoch.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// Most reports of a delivery.
const REPORTS: usize = 64;

/// Most bytes of a delivery: some full reports.
const DELIVERY: usize = 16 << 20;

/// Most bytes of a question.
const QUESTION: usize = 64 << 10;

/// Most bytes of all deliveries that are in memory. What they become there is some seven times as much at worst (rows with next to nothing in them).
const ROOM: usize = 128 << 20;

/// After how many seconds an agent is to come again.
const AGAIN: HeaderValue = HeaderValue::from_static("5");

struct Shared {
    access: Arc<dyn Access>,
    inbox: Inbox,
    schema: Schema,
    room: Arc<Semaphore>,
    metrics: Metrics,
}

/// The service. To be made where tokio runs, since a task of its own takes the reports.
pub fn router(store: Arc<Store>, access: Arc<dyn Access>, clock: Clock, metrics: Metrics) -> Router {
    let room = Arc::new(Semaphore::new(ROOM));
    let schema = graphql::schema(store.clone(), access.clone(), clock.clone());
    let inbox = Inbox::open(store, clock, metrics.clone());
    let shared = Arc::new(Shared { access, inbox, schema, room, metrics });
    let reports = post(reports)
        .layer(DefaultBodyLimit::max(DELIVERY))
        .layer(from_fn_with_state(shared.clone(), count_delivery));
    let question = post(question)
        .layer(DefaultBodyLimit::max(QUESTION))
        .layer(from_fn_with_state(shared.clone(), count_question));
    Router::new()
        .route("/v1/reports", reports)
        .route("/v1/graphql", question)
        .route("/healthz", get(|| async { "ok" }))
        .with_state(shared)
        .merge(page::router())
}

/// The node whose agent sends a request. Known before anything of the body is read: whoever is not an agent costs no more than
/// a look at the token.
struct Agent(String);

impl FromRequestParts<Arc<Shared>> for Agent {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<Agent, Response> {
        let token = token(&parts.headers).ok_or_else(|| refuse(Denied::Unknown))?;
        shared.access.node(token).await.map(Agent).map_err(refuse)
    }
}

/// The token of somebody who is known: the schema too is only for them.
struct Known(String);

impl FromRequestParts<Arc<Shared>> for Known {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<Known, Response> {
        let token = token(&parts.headers).ok_or_else(|| refuse(Denied::Unknown))?;
        shared.access.viewer(token, &[]).await.map_err(refuse)?;
        Ok(Known(token.into()))
    }
}

async fn count_delivery(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let again = response.headers().contains_key(header::RETRY_AFTER);
    shared.metrics.delivered(response.status(), again);
    response
}

async fn count_question(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let begin = Instant::now();
    let response = next.run(request).await;
    let failed = response.extensions().get::<Failed>().is_some();
    shared.metrics.answered(response.status(), failed, begin.elapsed());
    response
}

/// What an agent is told of one report. Whatever it is, the report need not come again.
#[derive(Serialize)]
#[serde(rename_all = "camelCase", tag = "outcome")]
enum Told {
    Stored,
    Repeated,
    TooOld,
    Invalid { reason: String },
}

impl From<Receipt> for Told {
    fn from(receipt: Receipt) -> Told {
        match receipt {
            // Agents know no word for the latter, and there is nothing to do for them.
            Receipt::Stored | Receipt::Moved => Told::Stored,
            Receipt::Repeated => Told::Repeated,
            Receipt::TooOld => Told::TooOld,
            Receipt::Invalid(invalid) => Told::Invalid { reason: invalid.to_string() },
        }
    }
}

/// The body of a delivery, and the room that it takes until its reports are stored. Without room it is not even read: the agent keeps it.
struct Body(Bytes, OwnedSemaphorePermit);

impl FromRequest<Arc<Shared>> for Body {
    type Rejection = Response;

    async fn from_request(request: Request, shared: &Arc<Shared>) -> Result<Body, Response> {
        // What does not say how much it is may be as much as anything.
        let bytes =
            request.body().size_hint().exact().map_or(DELIVERY, |exact| exact.min(DELIVERY as u64) as usize);
        let room = shared.room.clone().try_acquire_many_owned(bytes as u32).map_err(|_| later())?;
        let bytes = Bytes::from_request(request, shared).await.map_err(IntoResponse::into_response)?;
        Ok(Body(bytes, room))
    }
}

async fn reports(State(shared): State<Arc<Shared>>, Agent(node): Agent, Body(body, room): Body) -> Response {
    let reports: Vec<Report> = match serde_json::from_slice(&body) {
        Ok(reports) => reports,
        Err(error) => {
            return (StatusCode::BAD_REQUEST, format!("not a list of reports: {error}\n")).into_response();
        }
    };
    if reports.len() > REPORTS {
        let text = format!("{} reports are more than {REPORTS} of one delivery\n", reports.len());
        return (StatusCode::PAYLOAD_TOO_LARGE, text).into_response();
    }
    if let Some(other) = reports.iter().find(|report| report.node != node) {
        let text = format!("a report of node {:?} with the token of {node}\n", other.node);
        return (StatusCode::FORBIDDEN, text).into_response();
    }
    drop(body);
    match shared.inbox.deliver(reports, room).await {
        Some(receipts) => Json(receipts.into_iter().map(Told::from).collect::<Vec<_>>()).into_response(),
        None => later(),
    }
}

/// An agent is to come again.
fn later() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, AGAIN)], "not now\n").into_response()
}

async fn question(
    State(shared): State<Arc<Shared>>,
    Known(token): Known,
    Json(request): Json<async_graphql::Request>,
) -> Response {
    let answer = shared.schema.execute(request.data(Asker(token))).await;
    let failed = answer.is_err();
    let mut response = Json(answer).into_response();
    if failed {
        response.extensions_mut().insert(Failed);
    }
    response
}

pub(crate) fn token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

pub(crate) fn refuse(denied: Denied) -> Response {
    let status = match denied {
        Denied::Unknown => StatusCode::UNAUTHORIZED,
        Denied::Forbidden => StatusCode::FORBIDDEN,
        Denied::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, format!("{denied}\n")).into_response()
}
