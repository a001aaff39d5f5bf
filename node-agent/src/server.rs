//! `/healthz`, `/readyz` and `/metrics`.

use crate::metrics::Metrics;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use std::net::SocketAddr;
use std::time::Duration;

/// A turn of the event loop that takes longer than this means that it hangs.
pub const STUCK: Duration = Duration::from_secs(60);

/// Serves until the process ends.
pub async fn serve(address: SocketAddr, metrics: Metrics) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    axum::serve(listener, router(metrics)).await
}

/// The routes.
pub fn router(metrics: Metrics) -> Router {
    Router::new()
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .route("/metrics", get(text))
        .with_state(metrics)
}

async fn health(State(metrics): State<Metrics>) -> (StatusCode, String) {
    let silent = metrics.lock().alive.elapsed();
    if silent < STUCK {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the event loop has not turned for {} s\n", silent.as_secs()),
        )
    }
}

async fn ready(State(metrics): State<Metrics>) -> (StatusCode, String) {
    match &metrics.lock().ready {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}: {}\n", why.reason, why.message)),
    }
}

async fn text(State(metrics): State<Metrics>) -> impl IntoResponse {
    match metrics.encode() {
        Ok(text) => (
            StatusCode::OK,
            [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")],
            text,
        )
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
