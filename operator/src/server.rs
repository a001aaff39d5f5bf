//! HTTP: /healthz, /readyz, /metrics.

use crate::error::Error;
use crate::metrics::Metrics;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;

/// The planning loop is stuck when it has not come round for this long.
const STUCK: Duration = Duration::from_secs(120);

/// What the probes tell.
pub struct Health {
    started: Instant,
    last_turn: AtomicU64,
    complete: AtomicBool,
}

impl Health {
    /// Alive, not ready.
    pub fn new() -> Health {
        Health { started: Instant::now(), last_turn: AtomicU64::new(0), complete: AtomicBool::new(false) }
    }

    /// The planning loop came round.
    pub fn turn(&self) {
        self.last_turn.store(self.started.elapsed().as_secs(), Ordering::Relaxed);
    }

    /// Everything has been listed once.
    pub fn complete(&self) {
        self.complete.store(true, Ordering::Relaxed);
        self.turn();
    }

    fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Relaxed)
    }

    fn is_stuck(&self) -> bool {
        let turned = Duration::from_secs(self.last_turn.load(Ordering::Relaxed));
        self.is_complete() && self.started.elapsed() > turned + STUCK
    }
}

/// Serves until the process ends.
pub async fn serve(listen: SocketAddr, metrics: Metrics, health: Arc<Health>) -> Result<(), Error> {
    let routes = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(health)
        .route("/metrics", get(page).with_state(metrics));
    let listener =
        TcpListener::bind(listen).await.map_err(|source| Error::Listen { address: listen, source })?;
    axum::serve(listener, routes).await.map_err(Error::Serve)
}

async fn healthz(State(health): State<Arc<Health>>) -> Response {
    match health.is_stuck() {
        false => (StatusCode::OK, "ok\n").into_response(),
        true => (StatusCode::SERVICE_UNAVAILABLE, "the planning loop is stuck\n").into_response(),
    }
}

async fn readyz(State(health): State<Arc<Health>>) -> Response {
    match health.is_complete() {
        true => (StatusCode::OK, "ok\n").into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not everything has been listed yet\n").into_response(),
    }
}

async fn page(State(metrics): State<Metrics>) -> Response {
    const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match metrics.encode() {
        Ok(page) => ([(header::CONTENT_TYPE, FORMAT)], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
