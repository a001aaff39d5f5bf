//! One delivery over HTTPS.

use crate::{Answer, Outcome};
use bytes::Bytes;
use http::header::{self, HeaderValue, InvalidHeaderValue};
use http::{Request, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, pem};
use rustls::{ClientConfig, RootCertStore};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Where deliveries go.
const PATH: &str = "/v1/reports";

/// Most bytes of an answer: a line for each report.
const ANSWER: usize = 256 << 10;

/// A connection is used again within this time: the collector itself ends one after 30 s.
const IDLE: Duration = Duration::from_secs(25);

/// Where the collector is: `https://HOST` or `https://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector(Uri);

/// Why an address is none of a collector.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// It is no address at all.
    #[error(transparent)]
    Uri(#[from] http::uri::InvalidUri),
    /// It is another kind of address. Tokens are never sent in plain text.
    #[error("must be https://HOST or https://HOST:PORT")]
    Form,
}

impl FromStr for Collector {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Collector, UrlError> {
        let uri: Uri = text.parse()?;
        let host = uri.authority().filter(|it| !it.host().is_empty() && !it.as_str().contains('@'));
        match (uri.scheme_str(), host, uri.path_and_query().map(|it| it.as_str())) {
            (Some("https"), Some(host), None | Some("/")) => {
                Ok(Collector(format!("https://{host}{PATH}").parse()?))
            }
            _ => Err(UrlError::Form),
        }
    }
}

/// Time limits of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Until there is a connection.
    pub connect: Duration,
    /// For all of it.
    pub whole: Duration,
}

impl Default for Wait {
    fn default() -> Wait {
        Wait { connect: Duration::from_secs(5), whole: Duration::from_secs(30) }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The token cannot be read.
    #[error("{path}: {source}")]
    Token {
        /// Its file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// What is in its file is none.
    #[error("{path} has no token: {source}")]
    NoToken {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        source: InvalidHeaderValue,
    },
    /// The authority of the collector's certificate cannot be read.
    #[error("{path}: {source}")]
    Authority {
        /// Its file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// What is in its file is none.
    #[error("{path} has no certificate of an authority: {source}")]
    NoAuthority {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        source: pem::Error,
    },
    /// The authority, or the versions of TLS, cannot be used.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// The request cannot be made.
    #[error(transparent)]
    Request(#[from] http::Error),
    /// There is no connection, or none that can be trusted.
    #[error("{}", causes(.0))]
    Send(#[from] legacy::Error),
    /// The answer has not come to its end, or is too long.
    #[error("the answer: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    /// There is no answer in time.
    #[error("no answer within {0:?}")]
    Late(Duration),
}

impl ClientError {
    /// As it is counted.
    pub fn outcome(&self) -> Outcome {
        match self {
            ClientError::Token { .. } | ClientError::NoToken { .. } => Outcome::Unauthorized,
            _ => Outcome::Unreachable,
        }
    }
}

/// An error and what caused it: hyper's own words are "client error (Connect)".
fn causes(error: &legacy::Error) -> String {
    let mut text = error.to_string();
    let mut next: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

type Connections = legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Delivers to one collector.
#[derive(Debug)]
pub struct Client {
    collector: Collector,
    token: PathBuf,
    authority: PathBuf,
    wait: Wait,
    /// Connections that trust an authority, as its file was.
    current: Option<(Vec<u8>, Connections)>,
}

impl Client {
    /// A client that reads its token anew for each delivery, and the authority of the collector's certificate (PEM) whenever its file changes.
    pub fn new(collector: Collector, token: PathBuf, authority: PathBuf, wait: Wait) -> Client {
        Client { collector, token, authority, wait, current: None }
    }

    /// Sends a JSON list of so many reports.
    ///
    /// # Errors
    /// There is no answer. Whether the collector has the reports is not known then: sent again, it recognises them.
    pub async fn deliver(&mut self, body: Vec<u8>, reports: usize) -> Result<Answer, ClientError> {
        let whole = self.wait.whole;
        tokio::time::timeout(whole, self.post(body, reports)).await.map_err(|_| ClientError::Late(whole))?
    }

    async fn post(&mut self, body: Vec<u8>, reports: usize) -> Result<Answer, ClientError> {
        let token = self.token().await?;
        let request = Request::post(self.collector.0.clone())
            .header(header::AUTHORIZATION, token)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let response = self.connections().await?.request(request).await?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER).collect().await.map_err(ClientError::Body)?.to_bytes();
        let wait = head.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        Ok(Answer::read(head.status.as_u16(), wait, &body, reports))
    }

    /// The token as it is now: it is replaced long before it ends.
    async fn token(&self) -> Result<HeaderValue, ClientError> {
        let path = || self.token.clone();
        let text = tokio::fs::read_to_string(&self.token).await;
        let text = text.map_err(|source| ClientError::Token { path: path(), source })?;
        let value = HeaderValue::from_str(&format!("Bearer {}", text.trim()));
        let mut value = value.map_err(|source| ClientError::NoToken { path: path(), source })?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// Connections that trust the authority as it is now.
    async fn connections(&mut self) -> Result<Connections, ClientError> {
        let path = || self.authority.clone();
        let file = tokio::fs::read(&self.authority).await;
        let file = file.map_err(|source| ClientError::Authority { path: path(), source })?;
        match &self.current {
            Some((known, connections)) if *known == file => Ok(connections.clone()),
            _ => {
                let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&file).collect();
                let certificates = match certificates {
                    Ok(certificates) if certificates.is_empty() => Err(pem::Error::NoItemsFound),
                    other => other,
                };
                let certificates =
                    certificates.map_err(|source| ClientError::NoAuthority { path: path(), source })?;
                let connections = connections(certificates, self.wait.connect)?;
                self.current = Some((file, connections.clone()));
                Ok(connections)
            }
        }
    }
}

fn connections(
    authorities: Vec<CertificateDer<'static>>,
    limit: Duration,
) -> Result<Connections, rustls::Error> {
    let mut roots = RootCertStore::empty();
    authorities.into_iter().try_for_each(|certificate| roots.add(certificate))?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut tcp = HttpConnector::new();
    tcp.set_connect_timeout(Some(limit));
    tcp.set_nodelay(true);
    tcp.enforce_http(false);
    let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_only().enable_http1();
    Ok(legacy::Client::builder(TokioExecutor::new())
        .pool_idle_timeout(IDLE)
        .pool_timer(TokioTimer::new())
        .pool_max_idle_per_host(1)
        .build(connector.wrap_connector(tcp)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_nowhere_in_plain_text() {
        for good in
            ["https://aegis-collector.aegis-system.svc", "https://192.0.2.1:8443/", "https://[2001:db8::1]:1"]
        {
            assert!(good.parse::<Collector>().is_ok(), "{good}");
        }
        let address = "https://host:8443".parse::<Collector>().map(|it| it.0.to_string());
        assert_eq!(address.ok().as_deref(), Some("https://host:8443/v1/reports"));
        for wrong in [
            "",
            "host",
            "host:443",
            "http://host",
            "https://",
            "https://host/v1/reports",
            "https://host/?a",
            "https://a@host",
        ] {
            assert!(wrong.parse::<Collector>().is_err(), "{wrong}");
        }
    }
}
