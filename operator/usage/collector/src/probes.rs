//! HTTP: /healthz, /readyz, /metrics. Nothing there is anybody's secret, so that it needs neither token nor TLS.

use crate::error::Error;
use crate::metrics::Metrics;
use crate::watch::Cluster;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

/// Serves until the process ends.
///
/// # Errors
/// The listener fails.
pub async fn serve(listener: TcpListener, metrics: Metrics, cluster: Cluster) -> Result<(), Error> {
    let routes = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz).with_state(cluster))
        .route("/metrics", get(page).with_state(metrics));
    axum::serve(listener, routes).await.map_err(Error::Serve)
}

async fn readyz(State(cluster): State<Cluster>) -> Response {
    match cluster.is_complete() {
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
