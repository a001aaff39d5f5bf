//! Requests over TLS, on whatever leads there.

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use kube::Config;
use kube::client::ConfigExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};

/// Most bytes of an answer: a page of a thousand rows has some 300 KB.
const ANSWER: usize = 16 << 20;

/// Whose certificates are trusted.
pub enum Trust {
    /// Those of the system's authorities.
    System,
    /// Those of these authorities alone, in DER.
    These(Vec<Vec<u8>>),
}

impl Trust {
    /// Authorities in PEM. `of` says whose they are.
    pub fn pem(text: &[u8], of: &str) -> Result<Trust> {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
        let found = found.with_context(|| format!("{of} has no certificate that can be read"))?;
        if found.is_empty() {
            bail!("{of} has no certificate");
        }
        Ok(Trust::These(found.into_iter().map(|it| it.to_vec()).collect()))
    }

    /// Those of a file.
    pub fn file(path: &Path) -> Result<Trust> {
        let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        Trust::pem(&text, &path.display().to_string())
    }
}

/// A connection.
pub struct Https {
    sender: SendRequest<Full<Bytes>>,
    host: String,
}

impl Https {
    /// Speaks TLS with `host` on a stream.
    pub async fn open<S>(stream: S, host: &str, trust: &Trust) -> Result<Https>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        // As the client of the API server does it, with the same authorities of the system.
        let mut config = Config::new("https://localhost".parse()?);
        if let Trust::These(authorities) = trust {
            config.root_cert = Some(authorities.clone());
        }
        let tls = TlsConnector::from(Arc::new(config.rustls_client_config()?));
        let name = ServerName::try_from(host.to_owned()).with_context(|| format!("{host:?} is no name"))?;
        let stream = tls.connect(name, stream).await?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // It ends with the sender. What goes wrong, the request says.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Https { sender, host: host.to_owned() })
    }

    /// Posts JSON; gives status and body.
    pub async fn post(&mut self, path: &str, token: &str, body: String) -> Result<(StatusCode, String)> {
        let mut secret = HeaderValue::from_str(&format!("Bearer {token}")).context("the token is none")?;
        secret.set_sensitive(true);
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let request = Request::post(path)
            .header(HOST, host)
            .header(AUTHORIZATION, secret)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        self.sender.ready().await?;
        let (head, body) = self.sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, ANSWER).collect().await.map_err(anyhow::Error::from_boxed)?;
        Ok((head.status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    }
}
