//! Feeds by a secret address: `GET /feeds/ACCOUNT/TOKEN/rss.xml` and `atom.xml`, for readers that know nothing of Kubernetes. Where it
//! is, `GET /v1/feeds/ACCOUNT` tells those who may see the use of the account, and `POST` gives it another one.

use crate::access::{Access, Denied};
use crate::alert::{Feed, Form, Token, date};
use crate::http::{Clock, refuse, token};
use crate::metrics::Metrics;
use crate::sql::Error;
use crate::store::Store;
use crate::turns::Turns;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use tracing::warn;

struct Shared {
    store: Arc<Store>,
    access: Arc<dyn Access>,
    clock: Clock,
    metrics: Metrics,
    base: String,
    /// Apart from those of questions, which come with a token that somebody knows.
    turns: Turns,
}

/// The service of feeds. `base` is where others reach it (`https://host`).
pub fn feeds(
    store: Arc<Store>,
    access: Arc<dyn Access>,
    clock: Clock,
    metrics: Metrics,
    base: &str,
) -> Router {
    let base = base.trim_end_matches('/').to_owned();
    let shared = Shared { store, access, clock, metrics, base, turns: Turns::new() };
    Router::new()
        .route("/feeds/{account}/{token}/{file}", get(read))
        .route("/v1/feeds/{account}", get(find).post(renew))
        .with_state(Arc::new(shared))
}

/// Where a feed is.
#[derive(Serialize)]
struct Places {
    rss: String,
    atom: String,
}

async fn read(
    State(shared): State<Arc<Shared>>,
    path: Result<Path<(String, String, String)>, PathRejection>,
    headers: HeaderMap,
) -> Response {
    let response = match asked(path) {
        Some((account, token, form)) => shared.feed(account, token, form, &headers).await,
        None => absent(),
    };
    shared.metrics.read(response.status());
    response
}

/// What may be asked for at all; the rest is not looked up.
fn asked(path: Result<Path<(String, String, String)>, PathRejection>) -> Option<(String, Token, Form)> {
    let Path((account, token, file)) = path.ok()?;
    Some((Some(account).filter(|it| is_account(it))?, Token::read(&token)?, Form::of(&file)?))
}

impl Shared {
    async fn feed(&self, account: String, said: Token, form: Form, headers: &HeaderMap) -> Response {
        let (base, whose) = (self.base.clone(), account.clone());
        let found = self.ask(&whose, move |store| {
            // An account that is not known takes as long as a wrong token.
            let known = store.token(&account)?;
            let right = said.is(known.as_ref().map_or(&said, |(token, _)| token));
            let Some((token, made)) = known.filter(|_| right) else { return Ok(None) };
            let items = store.items(&account)?;
            let updated = items.first().map_or(made, |item| item.published);
            let address = place(&base, &account, &token, form);
            Ok(Some(Feed { account, base, address, updated, items }))
        });
        match found.await {
            Some(Some(feed)) => answer(&feed, form, headers),
            Some(None) => absent(),
            None => unavailable(),
        }
    }

    async fn places(&self, account: String, headers: &HeaderMap, new: bool) -> Result<Response, Denied> {
        let token = token(headers).ok_or(Denied::Unknown)?;
        let may = match new {
            true => self.access.renews(token, &account).await?,
            false => {
                let viewer = self.access.viewer(token, std::slice::from_ref(&account)).await?;
                viewer.all || viewer.accounts.contains(&account)
            }
        };
        if !may || !is_account(&account) {
            return Err(Denied::Forbidden);
        }
        let (base, now, whose) = (self.base.clone(), (self.clock)(), account.clone());
        let Ok(fresh) = Token::random() else { return Ok(unavailable()) };
        let given = self.ask(&whose, move |store| {
            let token = store.give_token(&account, &fresh, new, now)?;
            let at = |form| place(&base, &account, &token, form);
            Ok(Places { rss: at(Form::Rss), atom: at(Form::Atom) })
        });
        Ok(match given.await {
            Some(places) => ([(header::CACHE_CONTROL, "no-store")], Json(places)).into_response(),
            None => unavailable(),
        })
    }

    /// Asks the store, in turn with others who ask of the account.
    async fn ask<T: Send + 'static>(
        &self,
        account: &str,
        question: impl FnOnce(&Store) -> Result<T, Error> + Send + 'static,
    ) -> Option<T> {
        let answer = self.turns.ask(&self.store, account, question).await;
        answer.inspect_err(|error| warn!(%error, "a feed is not read")).ok()
    }
}

async fn find(
    State(shared): State<Arc<Shared>>,
    Path(account): Path<String>,
    headers: HeaderMap,
) -> Response {
    shared.places(account, &headers, false).await.unwrap_or_else(refuse)
}

async fn renew(
    State(shared): State<Arc<Shared>>,
    Path(account): Path<String>,
    headers: HeaderMap,
) -> Response {
    shared.places(account, &headers, true).await.unwrap_or_else(refuse)
}

fn place(base: &str, account: &str, token: &Token, form: Form) -> String {
    let file = match form {
        Form::Rss => "rss.xml",
        Form::Atom => "atom.xml",
    };
    format!("{base}/feeds/{account}/{}/{file}", token.secret())
}

fn answer(feed: &Feed, form: Form, headers: &HeaderMap) -> Response {
    let Ok(body) = feed.write(form) else { return unavailable() };
    let digest: String = Sha256::digest(&body).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let (tag, modified) = (format!("\"{digest}\""), date(feed.updated));
    let unchanged = is_unchanged(headers, &tag, feed.updated);
    let mut response = match unchanged {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => ([(header::CONTENT_TYPE, form.media_type())], body).into_response(),
    };
    let fields = response.headers_mut();
    for (name, value) in [(header::ETAG, tag), (header::LAST_MODIFIED, modified)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            fields.insert(name, value);
        }
    }
    // The address is a secret: no cache that others share, and no page that it leads to is told of it.
    fields.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    fields.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    fields.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Whether who asks has it already. The time counts only without tags (RFC 9110, 13.1.3).
fn is_unchanged(headers: &HeaderMap, tag: &str, updated: i64) -> bool {
    let tags: Vec<&HeaderValue> = headers.get_all(header::IF_NONE_MATCH).iter().collect();
    if !tags.is_empty() {
        let mut listed =
            tags.iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
        return listed.any(|it| matches!(it.trim(), "*") || it.trim().trim_start_matches("W/") == tag);
    }
    let since = headers.get(header::IF_MODIFIED_SINCE).and_then(|value| value.to_str().ok());
    let since = since.and_then(|text| jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok());
    since.is_some_and(|since| since.as_second() >= updated)
}

/// The same for all that is wrong: account, token or file.
fn absent() -> Response {
    (StatusCode::NOT_FOUND, "there is no such feed\n").into_response()
}

fn unavailable() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, "not now\n").into_response()
}

/// Whether a namespace can have this name.
fn is_account(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(plain)
}
